"""The table of learned keys: what it remembers and for how long, what goes first, and many processes at once."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typing_extensions import override

from stickyproxy.affinity.snapshot import DIGEST_BYTES, upstream_digest
from stickyproxy.proxy import key_table
from stickyproxy.proxy.key_table import MAX_KEYS, KeyTable, KeyTableError

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE, THERE, NOWHERE = (upstream_digest(name) for name in ("here", "there", "nowhere"))
IDLE_S: Final = 60.0
NOW: Final = 1000.0
ENTRY: Final = 32
VERSION_AT, MAX_KEYS_AT = 8, 12


@contextmanager
def made(max_keys: int) -> Iterator[KeyTable]:
    table = KeyTable.create(max_keys)
    try:
        yield table
    finally:
        table.close()


@pytest.fixture
def table() -> Iterator[KeyTable]:
    with made(100) as table:
        yield table


def learn_many(table: KeyTable, numbers: range, now: float = NOW) -> None:
    for number in numbers:
        table.learn(b"%d" % number, HERE, IDLE_S, now)


def places_of(table: KeyTable, key: bytes) -> list[int]:
    """Return where the 16 entries of the two buckets of a key begin."""
    _, *buckets = table._locate(table._hash(key))
    return [bucket + place for bucket in buckets for place in range(0, 8 * ENTRY, ENTRY)]


def place_of(table: KeyTable, key: bytes) -> int:
    name = table._hash(key)
    (found,) = (at for at in places_of(table, key) if table._memory[at : at + 16] == name)
    return found


def expiry_at(table: KeyTable, at: int) -> int:
    (expiry,) = struct.unpack_from("=24xI4x", table._memory, at)
    assert isinstance(expiry, int)
    return expiry


# Remembering


def test_a_key_leads_to_the_upstream_that_was_learned_last(table: KeyTable) -> None:
    assert table.find(b"key", NOW) is None
    table.learn(b"key", HERE, IDLE_S, NOW)
    table.learn(b"other", THERE, IDLE_S, NOW)
    assert [table.find(key, NOW) for key in (b"key", b"other", b"third")] == [HERE, THERE, None]
    table.learn(b"key", NOWHERE, IDLE_S, NOW)
    assert [table.find(key, NOW) for key in (b"key", b"other", b"third")] == [NOWHERE, THERE, None]
    assert (table.count(NOW), table.learned, table.evicted) == (2, 2, 0)


def test_a_key_that_is_forgotten_is_unknown_and_no_other(table: KeyTable) -> None:
    for key in (b"key", b"other"):
        table.learn(key, HERE, IDLE_S, NOW)
    for _ in range(2):
        table.forget(b"key")
        assert [table.find(key, NOW) for key in (b"key", b"other")] == [None, HERE]
    assert table.count(NOW) == 1


@pytest.mark.parametrize(
    "key", [b"", b"\0", b"\0\0", b"\r\n\x1b[2J\x7f\xff", b"k" * 10240, b"k" * 10241, bytes(range(256)) * 40]
)
def test_any_bytes_are_a_key(table: KeyTable, key: bytes) -> None:
    others = (key + b"\0", b"\0" + key, key[:-1] + b"x")
    table.learn(key, HERE, IDLE_S, NOW)
    assert table.find(key, NOW) == HERE
    assert [table.find(other, NOW) for other in others] == [None] * len(others)


def test_a_digest_of_another_length_is_refused(table: KeyTable) -> None:
    for digest in (b"", HERE[:-1], HERE + b"\0"):
        with pytest.raises(ValueError, match="a digest has 8 bytes, not"):
            table.learn(b"key", digest, IDLE_S, NOW)
    assert table.find(b"key", NOW) is None


# Expiry


@pytest.mark.parametrize("idle_s", [0.5, 6.0, 45.0, 3600.0])
@pytest.mark.parametrize("now", [0.0, 1000.0, 1000.4, 4e6 + 0.9])
def test_a_key_lives_for_its_idle_time_and_little_longer(table: KeyTable, idle_s: float, now: float) -> None:
    table.learn(b"key", HERE, idle_s, now)
    table.learn(b"used", HERE, idle_s, now - idle_s)
    assert table.find(b"used", now - 0.01, idle_s) == HERE
    for key in (b"key", b"used"):
        assert table.find(key, now + idle_s - 0.02) == HERE
        assert table.find(key, now + idle_s * 17 / 16 + 1) is None
    assert table.count(now + idle_s - 0.02) == 2
    assert table.count(now + idle_s * 17 / 16 + 1) == 0


def test_a_key_that_is_used_lives_on(table: KeyTable) -> None:
    for key in (b"used", b"looked at"):
        table.learn(key, HERE, 45.0, NOW)
    for second in range(0, 4000, 40):
        assert table.find(b"used", NOW + second, 45.0) == HERE
        assert (table.find(b"looked at", NOW + second) == HERE) == (second <= 45), "to look is no use"
    assert table.find(b"used", NOW + 4100, 45.0) is None
    assert table.find(b"used", NOW + 4000) == HERE, "what has expired is not used again"


def test_a_use_is_written_once_in_a_sixteenth_of_the_idle_time(
    table: KeyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def renew(name: bytes, at: int, stripe: int, expiry: int) -> None:
        written.append(expiry)
        KeyTable._renew(table, name, at, stripe, expiry)

    monkeypatch.setattr(table, "_renew", renew)
    table.learn(b"key", HERE, 160.0, NOW)
    for tenth in range(1600):
        assert table.find(b"key", NOW + tenth / 10, 160.0) == HERE
    assert 12 <= len(written) <= 16


def test_a_shorter_idle_time_takes_nothing_away(table: KeyTable) -> None:
    table.learn(b"key", HERE, 3600.0, NOW)
    assert table.find(b"key", NOW, 1.0) == HERE
    assert table.find(b"key", NOW + 3599) == HERE


def test_an_idle_time_without_an_end_is_the_longest_there_is(table: KeyTable) -> None:
    table.learn(b"key", HERE, 1e300, NOW)
    table.learn(b"other", THERE, float("inf"), NOW)
    assert [table.find(key, 4e9, 1e300) for key in (b"key", b"other")] == [HERE, THERE]


def test_a_key_is_learned_again_when_it_has_expired(table: KeyTable) -> None:
    table.learn(b"key", HERE, IDLE_S, NOW)
    table.learn(b"key", THERE, IDLE_S, NOW + 500)
    assert table.find(b"key", NOW + 501) == THERE
    assert table.count(NOW + 501) == 1


# Room


@pytest.mark.parametrize("max_keys", [1, 2, 12, 13, 100, 1000, 20_000])
def test_as_many_keys_as_promised_have_room(max_keys: int) -> None:
    """One or two of a million do not, once there are so many: `python -m tests.bench.key_table` counts them."""
    with made(max_keys) as table:
        learn_many(table, range(max_keys))
        lost = sum(table.find(b"%d" % number, NOW) != HERE for number in range(max_keys))
        assert lost == table.evicted == max_keys - table.count(NOW)
        assert lost <= max_keys // 500
        assert table.learned == max_keys
        assert os.fstat(table.descriptor).st_size <= 43 * max_keys + 2048


def test_with_one_bucket_for_each_key_there_would_not_be_enough_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: its bound is one that can be missed."""
    with made(20_000) as table:
        locate = table._locate
        monkeypatch.setattr(table, "_locate", lambda name: (locate(name)[0], locate(name)[1], locate(name)[1]))
        learn_many(table, range(10_000))
        assert table.evicted > 100


def test_what_has_expired_is_room(table: KeyTable) -> None:
    for second in range(0, 1000, 100):
        learn_many(table, range(second, second + 100), NOW + second)
        assert table.count(NOW + second) == 100
    assert (table.learned, table.evicted) == (1000, 0)


def test_where_there_is_no_room_the_key_goes_that_expires_first() -> None:
    with made(1) as table:  # 16 entries, to which every key can go
        order = [5, 1, 4, 0, 2, 3, *range(6, 16)]
        for number in order:
            table.learn(b"%d" % number, HERE, IDLE_S + number * 2, NOW)
        assert table.evicted == 0
        for number in range(16, 40):
            table.learn(b"%d" % number, HERE, IDLE_S + number * 2, NOW)
            known = [other for other in range(40) if table.find(b"%d" % other, NOW)]
            assert known == list(range(number - 15, number + 1))
        assert (table.learned, table.evicted, table.count(NOW)) == (40, 24, 16)
        table.forget(b"30")
        table.learn(b"new", HERE, IDLE_S, NOW)
        assert table.evicted == 24, "now there was room"


def test_a_known_key_takes_the_place_of_no_other() -> None:
    with made(1) as table:
        learn_many(table, range(16))
        for number in range(16):
            table.learn(b"%d" % number, THERE, IDLE_S, NOW + 1)
        assert [table.find(b"%d" % number, NOW + 1) for number in range(16)] == [THERE] * 16
        assert table.evicted == 0


def test_a_million_different_keys_take_no_more_memory_and_the_old_ones_go_first() -> None:
    with made(1000) as table:
        size = os.fstat(table.descriptor).st_size
        assert size <= 43 * 1000 + 2048
        for number in range(1_000_000):
            table.learn(b"%d" % number, HERE, 3600.0, NOW + number // 100)
        assert os.fstat(table.descriptor).st_size == size
        assert os.fstat(table.descriptor).st_blocks * 512 <= size + 4096
        now = NOW + 10_000
        known = [number for number in range(990_000, 1_000_000) if table.find(b"%d" % number, now)]
        assert set(range(999_500, 1_000_000)) <= set(known)
        assert min(known) > 1_000_000 - 3000
        assert table.count(now) == len(known) == 1_000_000 - table.evicted


class Keys(RuleBasedStateMachine):
    """Any order of calls, beside a dict: a key leads to what was learned last, or nowhere.

    Nowhere only when it was forgotten, has expired, or was evicted, as one that expires first of two full buckets.
    """

    keys = st.integers(0, 63).map(lambda number: b"key %d" % number)
    digests = st.sampled_from([HERE, THERE, NOWHERE])
    idles = st.sampled_from([1.0, 16.0, 100.0, 1000.0])

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.table: KeyTable
        self.expected: dict[bytes, tuple[bytes, float, float]] = {}  # lives until the first time, and not at the second

    @initialize(max_keys=st.sampled_from([1, 13]))  # 2 buckets, and 4
    def make(self, max_keys: int) -> None:
        self.table = KeyTable.create(max_keys)

    def use(self, key: bytes, digest: bytes, idle_s: float) -> None:
        _, until, end = self.expected.get(key, (b"", 0.0, 0.0))
        is_same = until > self.now
        first, second = self.now + idle_s, self.now + idle_s * 17 / 16 + 1
        self.expected[key] = (digest, max(until, first), max(end, second)) if is_same else (digest, first, second)

    @rule(key=keys, digest=digests, idle_s=idles)
    def learn(self, key: bytes, digest: bytes, idle_s: float) -> None:
        table, now = self.table, self.now
        before = {other for other in self.expected if table.find(other, now) is not None}
        expiries = {other: expiry_at(table, place_of(table, other)) for other in before}
        of_buckets = [expiry_at(table, at) for at in places_of(table, key)]
        evicted = table.evicted
        table.learn(key, digest, idle_s, now)
        self.expected.pop(key, None)
        self.use(key, digest, idle_s)
        lost = [other for other in before if table.find(other, now) is None]
        assert len(lost) == table.evicted - evicted
        for other in lost:
            assert key not in before
            assert expiries[other] == min(of_buckets) > now
            del self.expected[other]
        assert table.find(key, now) == digest

    @rule(first=st.integers(0, 40), count=st.integers(8, 24), digest=digests, idle_s=idles)
    def learn_more(self, first: int, count: int, digest: bytes, idle_s: float) -> None:
        for number in range(first, first + count):
            self.learn(b"key %d" % number, digest, idle_s)

    @rule(key=keys, idle_s=idles)
    def find(self, key: bytes, idle_s: float) -> None:
        found = self.table.find(key, self.now, idle_s)
        if found is not None:
            assert found == self.expected[key][0]
            self.use(key, found, idle_s)
            assert self.table.find(key, self.now + idle_s - 0.01) == found

    @rule(key=keys)
    def forget(self, key: bytes) -> None:
        self.table.forget(key)
        self.expected.pop(key, None)

    @rule(seconds=st.sampled_from([0.3, 1.0, 10.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take_over(self) -> None:
        """Another process goes on with the same memory."""
        table = KeyTable(os.dup(self.table.descriptor))
        self.table.close()
        self.table = table

    @invariant()
    def every_key_leads_to_its_own_upstream(self) -> None:
        if not hasattr(self, "table"):
            return
        live = 0
        for number in range(80):
            key = b"key %d" % number
            digest, until, end = self.expected.get(key, (None, 0.0, 0.0))
            found = self.table.find(key, self.now)
            live += found is not None
            assert found in {None, digest}
            assert found is not None or self.now >= until
            assert found is None or self.now < end
        assert self.table.count(self.now) == live

    @override
    def teardown(self) -> None:
        if hasattr(self, "table"):
            self.table.close()


TestKeys = Keys.TestCase
TestKeys.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


# Torn entries


def digest_of(key: bytes) -> bytes:
    return upstream_digest(f"of {key!r}")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(256, 256 + 16 * ENTRY - 1), st.binary(min_size=1, max_size=40)), max_size=30))
def test_whatever_is_written_over_it_no_key_leads_to_another_upstream(scratches: list[tuple[int, bytes]]) -> None:
    with made(1) as table:
        keys = [b"%d" % number for number in range(16)]
        for key in keys:
            table.learn(key, digest_of(key), IDLE_S, NOW)
        for at, data in scratches:
            end = min(at + len(data), len(table._memory))
            table._memory[at:end] = data[: end - at]
            for key in keys:
                assert table.find(key, NOW, IDLE_S) in {None, digest_of(key)}
        for key in keys:
            table.learn(key, digest_of(key), IDLE_S, NOW)
            assert table.find(key, NOW) == digest_of(key), "there is always a way back"


def tear(table: KeyTable) -> None:
    """Leave the hash of one key with the rest of the entry of another, as two writers without a lock may."""
    table.learn(b"key", HERE, IDLE_S, NOW)
    table.learn(b"other", THERE, IDLE_S, NOW)
    one, other = (place_of(table, key) for key in (b"key", b"other"))
    table._memory[one + 16 : one + ENTRY] = table._memory[other + 16 : other + ENTRY]


def test_an_entry_of_two_writers_counts_as_none(table: KeyTable) -> None:
    tear(table)
    assert [table.find(key, NOW, IDLE_S) for key in (b"key", b"other")] == [None, THERE]
    table.learn(b"key", HERE, IDLE_S, NOW)
    assert table.find(b"key", NOW) == HERE


def test_without_the_check_an_entry_of_two_writers_leads_elsewhere(
    table: KeyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr(key_table, "crc32", lambda _: 0)
    tear(table)
    assert table.find(b"key", NOW) == THERE


def test_an_entry_that_is_being_written_is_read_again(table: KeyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    table.learn(b"key", HERE, IDLE_S, NOW)
    at = place_of(table, b"key")
    entry = table._memory[at : at + ENTRY]
    table._memory[at + 20 : at + 24] = b"torn"

    def write_the_rest(data: bytes) -> int:
        table._memory[at : at + ENTRY] = entry
        return crc32(data)

    monkeypatch.setattr(key_table, "crc32", write_the_rest)
    assert table.find(b"key", NOW) == HERE


def test_a_key_that_two_processes_learned_at_once_has_one_entry_again(table: KeyTable) -> None:
    """Without a lock each may have taken another bucket: the one that is not changed later must not come back."""
    places = places_of(table, b"key")
    for change in ("learn", "forget"):
        table.learn(b"key", HERE, IDLE_S, NOW)
        at = place_of(table, b"key")
        twin = places[8] if at in places[:8] else places[0]
        table._memory[twin : twin + ENTRY] = table._memory[at : at + ENTRY]
        if change == "learn":
            table.learn(b"key", THERE, IDLE_S, NOW)
            assert table.find(b"key", NOW) == THERE
            at = place_of(table, b"key")  # there is but one
            table._memory[at : at + ENTRY] = bytes(ENTRY)
        else:
            table.forget(b"key")
        assert table.find(b"key", NOW) is None


def test_a_hash_across_the_bounds_of_entries_is_no_entry() -> None:
    with made(1) as table:
        learn_many(table, range(16))
        before = {number: table.find(b"%d" % number, NOW) for number in range(16)}
        assert before == dict.fromkeys(range(16), HERE)
        name, at = table._hash(b"key"), places_of(table, b"key")[3]
        lost = next(number for number in range(16) if place_of(table, b"%d" % number) == at)
        table._memory[at + 8 : at + 24] = name
        table.forget(b"key")
        assert table.find(b"key", NOW) is None
        assert [number for number in range(16) if table.find(b"%d" % number, NOW) is None] == [lost]
        assert table._memory[at + 8 : at + 24] == name


def test_a_use_gives_no_time_to_a_key_that_took_the_place_meanwhile(table: KeyTable) -> None:
    table.learn(b"other", THERE, IDLE_S, NOW)
    at = place_of(table, b"other")
    expiry = expiry_at(table, at)
    for key, expected in ((b"key", expiry), (b"other", 5)):
        table._renew(table._hash(key), at, table._locate(table._hash(key))[0], 5)
        assert expiry_at(table, at) == expected


# Several processes

_WRITER: Final = """
import sys
from stickyproxy.proxy import key_table
descriptor, digest, has_lock = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3] == "True"
table = key_table.KeyTable(descriptor)
make_room = table._make_room
def pause(*given):
    at = make_room(*given)
    print("chosen", flush=True)
    sys.stdin.readline()
    return at
table._make_room = pause
if not has_lock:
    table._lock = lambda stripe: False
table.learn(b"theirs", digest, 60.0, 1000.0)
print("written", flush=True)
"""


@contextmanager
def writing(table: KeyTable, *, has_lock: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Let another process learn a key, and stop between the choice of a place and the write."""
    command = [sys.executable, "-c", _WRITER, str(table.descriptor), THERE.hex(), str(has_lock)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[table.descriptor]
    ) as process:
        try:
            assert read_line(process) == "chosen"
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert read_line(process) == "written"


def test_two_processes_that_learn_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with made(1) as table, writing(table) as process:
        waits = []

        def wait(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == 1:
                go_on(process)

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", wait)
            table.learn(b"ours", HERE, IDLE_S, NOW)
        assert len(waits) == 1, "it waited for the other"
        assert [table.find(key, NOW) for key in (b"ours", b"theirs")] == [HERE, THERE]


def test_without_the_lock_one_of_the_keys_is_lost_and_never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    with made(1) as table, writing(table, has_lock=False) as process:
        monkeypatch.setattr(table, "_lock", lambda _: False)
        table.learn(b"ours", HERE, IDLE_S, NOW)
        assert table.find(b"ours", NOW) == HERE
        go_on(process)
        assert [table.find(key, NOW) for key in (b"ours", b"theirs")] == [None, THERE]


def test_a_process_that_is_stopped_stops_no_other_and_its_death_frees_the_lock() -> None:
    with made(1) as table:
        stripe = table._locate(table._hash(b"ours"))[0]
        with writing(table):
            assert not table._lock(stripe), "it has the lock"
            table.learn(b"ours", HERE, IDLE_S, NOW)
            table.learn(b"more", HERE, IDLE_S, NOW)
            table.forget(b"more")
            assert table.find(b"ours", NOW + IDLE_S - 1, IDLE_S) == HERE
            assert table.find(b"ours", NOW + 2 * IDLE_S - 2) == HERE, "renewed without the lock"
        assert table._lock(stripe)
        table._unlock(stripe)
        assert [table.find(key, NOW) for key in (b"ours", b"more", b"theirs")] == [HERE, None, None]


def test_the_lock_is_of_a_part_of_the_table() -> None:
    with made(20_000) as table, writing(table):
        theirs = table._locate(table._hash(b"theirs"))[0]
        stripes = {table._locate(table._hash(b"%d" % number))[0] for number in range(100)}
        assert len(stripes) > 1
        for stripe in stripes - {theirs}:
            assert table._lock(stripe)
            table._unlock(stripe)


_CROWD: Final = """
import hashlib, random, sys
from stickyproxy.proxy import key_table
descriptor, number, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
table = key_table.KeyTable(descriptor)
def digest_of(key):
    return hashlib.blake2b(key, digest_size=8).digest()
key_table._LOCK_TRIES = 10**9 if mode == "room" else 10
if mode == "unlocked":
    table._lock = lambda stripe: False
chance, found = random.Random(number), 0
print("ready", flush=True)
sys.stdin.readline()
for step in range(12_000):
    if mode == "room":
        key = b"%d %d" % (number, step)
        table.learn(key, digest_of(key), 60.0, 1000.0)
    else:
        key = b"%d" % chance.randrange(100)
        if step % 3 == 0:
            table.learn(key, digest_of(key), chance.choice([20.0, 60.0]), 1000.0 + step // 300)
        elif step % 17 == 0:
            table.forget(key)
    read = table.find(key, 1000.0 + step // 300, 60.0)
    assert read in (None, digest_of(key)), (key, read)
    found += read is not None
print(found)
"""


def run_crowd(table: KeyTable, mode: str, size: int = 3) -> list[int]:
    """Let several processes write and read at once; return how often each of them found a key."""
    command = [sys.executable, "-c", _CROWD, str(table.descriptor)]
    processes = [
        subprocess.Popen(
            [*command, str(number), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, pass_fds=[table.descriptor],
        )
        for number in range(size)
    ]  # fmt: skip
    try:
        assert [read_line(process) for process in processes] == ["ready"] * size
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * size, said
        return [int(output) for output, _ in said]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_many_processes_that_write_over_each_other_never_mix_up_keys(mode: str) -> None:
    with made(1) as table:  # 100 keys for 16 entries
        assert min(run_crowd(table, mode)) > 100


def test_many_processes_lose_no_key_where_there_is_room() -> None:
    with made(60_000) as table:
        assert run_crowd(table, "room") == [12_000] * 3
        keys = [b"%d %d" % (number, step) for number in range(3) for step in range(12_000)]
        assert sum(table.find(key, NOW) is None for key in keys) == 0
        assert table.count(NOW) == 36_000


# The memory


def test_a_table_has_a_hash_of_its_own_and_shows_no_key(table: KeyTable) -> None:
    with made(100) as other:
        assert table._hash(b"key") != other._hash(b"key")
    again = KeyTable(os.dup(table.descriptor))
    assert again._hash(b"key") == table._hash(b"key"), "but one for all of its workers"
    again.close()
    table.learn(b"engineio\0secret", HERE, IDLE_S, NOW)
    assert table._memory.find(b"secret") < 0 <= table._memory.find(HERE)


def pack_header(table: KeyTable, *, at: int, value: int) -> None:
    os.pwrite(table.descriptor, struct.pack("=I", value), at)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        pytest.param(0, 0, "holds no table of keys", id="magic"),
        pytest.param(VERSION_AT, 2, "has layout 2, and this version knows 1", id="version"),
        pytest.param(MAX_KEYS_AT, 0, "a table of 0 keys has not", id="none"),
        pytest.param(MAX_KEYS_AT, 10_000, "a table of 10000 keys has not", id="size"),
        pytest.param(MAX_KEYS_AT, 2**32 - 1, "a table of 4294967295 keys has not", id="many"),
    ],
)
def test_another_layout_is_refused(table: KeyTable, at: int, value: int, said: str) -> None:
    pack_header(table, at=at, value=value)
    with pytest.raises(KeyTableError, match=said):
        KeyTable(table.descriptor)
    os.fstat(table.descriptor)  # still the caller's


def test_what_is_no_table_is_refused(table: KeyTable) -> None:
    memory = os.memfd_create("other")
    reading, writing_end = os.pipe()
    try:
        with pytest.raises(KeyTableError, match="holds no table"):
            KeyTable(memory)
        os.ftruncate(memory, 1 << 20)
        with pytest.raises(KeyTableError, match="holds no table"):
            KeyTable(memory)
        os.pwrite(memory, os.pread(table.descriptor, 20, 0), 0)
        os.ftruncate(memory, 20)
        with pytest.raises(KeyTableError, match="holds no table"):
            KeyTable(memory)
        with pytest.raises(KeyTableError, match="cannot be read"):
            KeyTable(reading)
    finally:
        for descriptor in (memory, reading, writing_end):
            os.close(descriptor)
    with pytest.raises(KeyTableError, match="cannot be read"):
        KeyTable(memory)


@pytest.mark.parametrize("max_keys", [0, -1, MAX_KEYS + 1])
def test_a_size_that_cannot_be_is_refused(max_keys: int) -> None:
    with pytest.raises(ValueError, match="are not between 1 and 1000000"):
        KeyTable.create(max_keys)


def test_the_largest_table_takes_its_memory_as_keys_come() -> None:
    with made(MAX_KEYS) as table:
        assert os.fstat(table.descriptor).st_size < 43 * MAX_KEYS
        learn_many(table, range(100))
        assert os.fstat(table.descriptor).st_blocks * 512 <= 202 * 4096
        assert table.count(NOW) == 100


def test_it_works_without_memory_that_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with made(100) as table:
        learn_many(table, range(100))
        again = KeyTable(os.dup(table.descriptor))
        assert again.find(b"99", NOW) == HERE
        again.close()


def test_a_table_is_closed_once(table: KeyTable) -> None:
    descriptor = table.descriptor
    assert repr(table) == f"<KeyTable {descriptor} for 100 keys>"
    assert len(HERE) == DIGEST_BYTES
    table.close()
    table.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
