"""Counters in shared memory: read by another process, by another version, and after the end of the one that counted."""

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stickyproxy.affinity.snapshot import upstream_digest
from stickyproxy.observe import table as table_module
from stickyproxy.observe.counters import (
    CONNECTIONS,
    DURATION_BOUNDS_NS,
    IN_FLIGHT,
    NS,
    PLANE,
    SENT_BYTES,
    TICKED_AT,
    TUNNELS_OPEN,
    UPSTREAM,
    PlaneCounters,
    UpstreamCounters,
)
from stickyproxy.observe.table import Reading, Table, TableError, Totals, read_table, sum_readings

APP_1, APP_2 = upstream_digest("app-1"), upstream_digest("app-2")


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table.create()
    yield made
    made.close()


def count_something(table: Table) -> None:
    plane, upstream = table.plane, table.upstream(APP_1)
    plane.cells[CONNECTIONS] += 3
    plane.cells[TICKED_AT] = 99
    plane.none.count_exchange(b"GET", 503)
    upstream.count_exchange(b"POST", 200)
    upstream.count_attempt("ok")
    upstream.count_close("client", 1001, "eof")
    upstream.observe_duration(NS)
    upstream.frames_sent[2] += 5
    upstream.cells[SENT_BYTES] += 1 << 40
    upstream.cells[IN_FLIGHT] += 2


def facts(counters: UpstreamCounters | PlaneCounters) -> list[int]:
    """Return all cells but the first, which is the digest."""
    return counters.cells.tolist()[1:]


# One table


def test_what_a_worker_counts_is_read(table: Table) -> None:
    count_something(table)
    reading = table.read()
    assert (reading.plane.connections, reading.plane.ticked_at_ns) == (3, 99)
    assert sum(reading.plane.none.exchanges) == 1
    assert reading.upstreams.keys() == {APP_1}
    upstream = reading.upstream(APP_1)
    assert facts(upstream) == facts(table.upstream(APP_1))
    assert (upstream.attempts, upstream.closes) == ({"ok": 1}, {("client", "1001", "eof"): 1})
    assert (upstream.sent_bytes, upstream.in_flight, upstream.frames_sent[2]) == (1 << 40, 2, 5)
    assert sum(facts(reading.upstream(APP_2))) == 0


def test_a_reading_does_not_change_afterwards(table: Table) -> None:
    count_something(table)
    reading = table.read()
    before = facts(reading.plane), facts(reading.upstream(APP_1))
    count_something(table)
    assert (facts(reading.plane), facts(reading.upstream(APP_1))) == before
    assert (facts(table.read().plane), facts(table.read().upstream(APP_1))) != before


def test_an_upstream_keeps_its_block(table: Table) -> None:
    digests = [upstream_digest(f"app-{number}") for number in range(100)]
    for number, digest in enumerate(digests):
        table.upstream(digest).cells[SENT_BYTES] = number
    assert all(table.upstream(digest).sent_bytes == number for number, digest in enumerate(digests))
    read = table.read().upstreams
    assert {digest: counters.sent_bytes for digest, counters in read.items()} == dict(
        zip(digests, range(100), strict=True)
    )


def test_who_attaches_again_goes_on(table: Table) -> None:
    count_something(table)
    again = Table(os.dup(table.descriptor))
    again.upstream(APP_2).count_attempt("tls")
    again.upstream(APP_1).count_attempt("ok")
    again.plane.cells[CONNECTIONS] += 1
    again.close()
    reading = table.read()
    assert (reading.upstream(APP_1).attempts, reading.upstream(APP_2).attempts) == ({"ok": 2}, {"tls": 1})
    assert reading.plane.connections == 4


def test_a_table_that_nobody_has_laid_out_is_read_as_nothing(table: Table) -> None:
    assert os.fstat(table.descriptor).st_size == 0
    assert (table.read().upstreams, sum(table.read().plane.cells)) == ({}, 0)
    assert repr(table).startswith("<Table ")


def test_a_table_whose_layout_is_being_written_is_read_as_nothing(table: Table) -> None:
    count_something(table)
    os.pwrite(table.descriptor, bytes(8), 0)  # the magic comes last
    assert table.read().upstreams == {}


def test_the_memory_of_a_table_is_there_once_it_is_written_to(table: Table) -> None:
    count_something(table)
    status = os.fstat(table.descriptor)
    assert status.st_size > UPSTREAM.size * 8 * 1000
    assert status.st_blocks * 512 < status.st_size / 20


def test_without_anonymous_memory_an_unlinked_file_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    table = Table.create()
    count_something(table)
    assert table.read().plane.connections == 3
    assert os.fstat(table.descriptor).st_nlink == 0
    table.close()


def test_a_table_may_be_closed_twice_and_who_counts_counts_on() -> None:
    table = Table.create()
    counters = table.upstream(APP_1)
    with_descriptor = os.dup(table.descriptor)
    table.close()
    table.close()
    counters.count_attempt("ok")
    assert read_table(with_descriptor).upstream(APP_1).attempts == {"ok": 1}
    os.close(with_descriptor)


WORKER = """
import os, signal, sys
from stickyproxy.observe.table import Table
table = Table(int(sys.argv[1]))
upstream = table.upstream(bytes.fromhex(sys.argv[2]))
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    upstream.count_exchange(b"GET", 200)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_counted_is_complete(table: Table) -> None:
    command = [sys.executable, "-c", WORKER, str(table.descriptor), APP_1.hex(), "12345"]
    done = subprocess.run(command, pass_fds=[table.descriptor], stdout=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"ready\n")
    assert sum(table.read().upstream(APP_1).exchanges) == 12345
    private = Table.create()  # the control: what nobody shared is lost
    assert sum(private.read().upstream(APP_1).exchanges) == 0
    private.close()


# When all blocks are taken


def test_as_many_upstreams_as_there_may_be_and_some_that_were_removed(table: Table) -> None:
    digests = [upstream_digest(f"app-{number}") for number in range(1100)]
    for digest in digests:
        table.upstream(digest).count_attempt("ok")
    read = table.read().upstreams
    assert list(read) == digests
    assert all(counters.attempts == {"ok": 1} for counters in read.values())
    again = Table(os.dup(table.descriptor))
    again.upstream(APP_1).count_attempt("tls")
    again.upstream(b"too many").count_attempt("tls")
    again.close()
    assert len(table.read().upstreams) == 1100
    assert table.read().upstream(APP_1).attempts == {"ok": 1, "tls": 1}


@pytest.fixture
def small(table: Table, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Return a table of three upstreams, all of them taken."""
    monkeypatch.setattr(table_module, "_CAPACITY", 3)
    for number in (1, 2, 3):
        table.upstream(bytes([number] * 8)).cells[SENT_BYTES] = number
    return table


def test_beyond_the_capacity_counters_are_private(small: Table) -> None:
    counters = small.upstream(APP_1)
    counters.count_attempt("ok")
    assert APP_1 not in small.read().upstreams
    assert len(small.read().upstreams) == 3


def test_a_block_that_was_given_back_is_used_again_from_zero(small: Table) -> None:
    for number in (3, 2):  # the longest ago first
        small.release(bytes([number] * 8))
    assert sum(facts(small.upstream(APP_1))) == 0
    assert small.read().upstreams.keys() == {bytes([1] * 8), bytes([2] * 8), APP_1}
    assert sum(facts(small.upstream(APP_2))) == 0
    assert small.read().upstreams.keys() == {bytes([1] * 8), APP_1, APP_2}


@pytest.mark.parametrize("cell", [IN_FLIGHT, TUNNELS_OPEN])
def test_a_block_that_something_open_counts_on_is_left_alone(small: Table, cell: int) -> None:
    used, idle = bytes([1] * 8), bytes([2] * 8)
    small.upstream(used).cells[cell] = 1
    small.release(used)
    assert sum(facts(small.upstream(APP_1))) == 0
    assert APP_1 not in small.read().upstreams
    small.release(idle)
    small.upstream(APP_1)
    assert small.read().upstreams.keys() == {used, bytes([3] * 8), APP_1}


def test_an_upstream_that_is_back_has_its_block_back(small: Table) -> None:
    digest = bytes([2] * 8)
    small.release(digest)
    assert small.upstream(digest).sent_bytes == 2
    small.upstream(APP_1)
    assert small.upstream(digest).sent_bytes == 2
    small.release(b"nobody's")  # says nothing


# Other versions, and what is no table


def make_table(description: Any, cells: dict[int, int], *, size: int = 1 << 16) -> bytes:
    """Return the memory of a table with a description, and so many 8-byte cells set, by offset in bytes."""
    text = json.dumps(description).encode()
    memory = bytearray(size)
    head = struct.pack("<8sII", b"sticky\x00\x01", len(text), zlib.crc32(text)) + text
    memory[: len(head)] = head
    for at, value in cells.items():
        memory[at : at + 8] = value.to_bytes(8, sys.byteorder, signed=True)
    return bytes(memory)


@contextmanager
def written(memory: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(memory)
        file.flush()
        yield file.fileno()


def field(name: str, at: int, *axes: list[str], kind: str = "counter") -> dict[str, Any]:
    return {"name": name, "at": at, "kind": kind, "axes": list(axes)}


def describe() -> dict[str, Any]:
    """Return how another version describes its table."""
    return {
        "plane": {"at": 8192, "cells": 4, "fields": [field("connections", 3), field("news", 0)]},
        "none": {"at": 9000},
        "upstreams": {
            "at": 16384,
            "cells": 40,
            "blocks": 5,
            "fields": [
                field("digest", 2, kind="mark"),
                field("in_flight", 0, kind="gauge"),
                field("attempts", 10, ["refused", "ok", "new_one", "newer_one"]),
                field("exchanges", 20, ["GET", "QUERY"], ["2xx", "9xx"]),
                field("sent_bytes", 5, ["of", "other", "axes"]),
                field("duration", 30, ["5000000", "7000000", "900000000000", "nonsense", "inf"]),
            ],
        },
        "more": [1, 2, 3],
    }


def test_another_version_is_read_by_names() -> None:
    first, second = 16384, 16384 + 40 * 8
    digest = int.from_bytes(APP_1, "little", signed=True)
    cells = {8192 + 3 * 8: 7, 8192: 1000, 9000 + 11 * 8: 3, first + 2 * 8: digest, first: 4, second + 2 * 8: 5}
    cells |= {first + (10 + at) * 8: 10 * (at + 1) for at in range(4)}
    cells |= {first + (20 + at) * 8: at + 1 for at in range(4)}
    cells |= {first + (30 + at) * 8: 100 + at for at in range(5)} | {first + 5 * 8: 77}
    with written(make_table(describe(), cells)) as descriptor:
        reading = read_table(descriptor)
    assert reading.plane.connections == 7
    assert (sum(reading.plane.cells[: PLANE.size]), reading.plane.none.attempts) == (7, {"ok": 3})
    assert reading.upstreams.keys() == {APP_1, (5).to_bytes(8, "little")}
    upstream = reading.upstream(APP_1)
    assert upstream.in_flight == 4
    assert upstream.attempts == {"refused": 10, "ok": 20, "other": 70}
    assert (upstream.exchanges[1], sum(upstream.exchanges)) == (1, 1 + 3), "a class that is not known is left out"
    assert upstream.sent_bytes == 0
    counts = [0] * (len(DURATION_BOUNDS_NS) + 1)
    counts[0], counts[1], counts[-1] = 100, 101, 102 + 103 + 104
    assert upstream.duration.counts == counts


def test_a_worker_does_not_write_into_the_table_of_another_version() -> None:
    with written(make_table(describe(), {})) as descriptor, pytest.raises(TableError, match="another version"):
        _ = Table(os.dup(descriptor)).plane


def cut_fields(description: dict[str, Any]) -> None:
    del description["upstreams"]["fields"]


def forget_digest(description: dict[str, Any]) -> None:
    description["upstreams"]["fields"] = [field("in_flight", 0)]


def leave_block(description: dict[str, Any]) -> None:
    description["plane"]["fields"] = [field("connections", 4)]


def lie_about_size(description: dict[str, Any]) -> None:
    description["upstreams"]["blocks"] = 10_000


def lie_about_place(description: dict[str, Any]) -> None:
    description["plane"]["at"] = -8


def write_text(description: dict[str, Any]) -> None:
    description["plane"]["cells"] = "4"


def enlarge(description: dict[str, Any]) -> None:
    description["upstreams"]["cells"] = 1 << 60


@pytest.mark.parametrize("spoil", [cut_fields, forget_digest, leave_block, lie_about_place, write_text, enlarge])
def test_a_description_that_cannot_be_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    description = describe()
    spoil(description)
    with written(make_table(description, {})) as descriptor, pytest.raises(TableError, match="cannot be read"):
        read_table(descriptor)


@pytest.mark.parametrize("description", [None, [], "text", {"plane": 1}])
def test_a_description_of_something_else_is_refused(description: object) -> None:
    with written(make_table(description, {})) as descriptor, pytest.raises(TableError, match="cannot be read"):
        read_table(descriptor)


def test_a_table_that_is_shorter_than_it_says_is_refused() -> None:
    description = describe()
    lie_about_size(description)
    taken = {16384 + at * 40 * 8 + 2 * 8: at + 1 for at in range(20)}
    memory = make_table(description, taken, size=16384 + 20 * 40 * 8)
    with written(memory) as descriptor, pytest.raises(TableError, match="cut"):
        read_table(descriptor)


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        (b"sticky", "cut"),
        (b"\x7fELF" + bytes(range(256)), "no counters"),
        (b"sticky\x00\x02" + bytes(range(256)), "no counters"),
        (make_table(describe(), {})[:100], "torn"),
        (make_table(describe(), {40: -1}), "torn"),
    ],
)
def test_what_is_no_table_is_refused(memory: bytes, why: str) -> None:
    with written(memory) as descriptor, pytest.raises(TableError, match=why):
        read_table(descriptor)


# Sums


def make_reading(*, connections: int = 0, ticked_at: int = 1 << 62, **sent: int) -> Reading:
    """Return what a worker had counted: bytes sent, by name of the upstream, with an exchange in flight at each."""
    plane, upstreams = PlaneCounters(), {}
    plane.cells[CONNECTIONS], plane.cells[TICKED_AT] = connections, ticked_at
    plane.none.count_exchange(b"GET", 503)
    for name, count in sent.items():
        counters = upstreams[upstream_digest(name)] = UpstreamCounters()
        counters.cells[0] = -(1 << 63)  # a digest, and the worst one
        counters.cells[SENT_BYTES], counters.cells[IN_FLIGHT] = count, 1
        counters.count_close("proxy", 4999, "other")
    return Reading(plane, upstreams)


def test_counters_and_gauges_of_living_workers_are_summed() -> None:
    summed = sum_readings([make_reading(connections=1, a=10, b=5), make_reading(connections=2, b=7), make_reading()])
    assert (summed.plane.connections, sum(summed.plane.none.exchanges), summed.plane.ticked_at_ns) == (3, 3, 0)
    found = {name: summed.upstream(upstream_digest(name)) for name in ("a", "b", "c")}
    assert [(one.sent_bytes, one.in_flight) for one in found.values()] == [(10, 1), (12, 2), (0, 0)]
    assert found["b"].closes == {("proxy", "4xxx", "other"): 2}
    assert [sum(facts(one)) for one in found.values()] == [12, 16, 0], "nothing went into a neighbouring cell"
    assert found["b"].cells[0] == 0


def test_sums_are_as_exact_as_cells_are_wide() -> None:
    summed = sum_readings([make_reading(a=(1 << 61) + 1), make_reading(a=(1 << 61) + 2)])
    assert summed.upstream(upstream_digest("a")).sent_bytes == (1 << 62) + 3


def test_no_worker_at_all_is_nothing() -> None:
    assert sum(sum_readings([]).plane.cells) == 0
    assert sum_readings([], Totals()).upstreams == {}


def test_counters_of_the_dead_are_kept_and_their_gauges_are_not() -> None:
    totals = Totals()
    for _ in range(2):
        totals.fold(make_reading(connections=4, a=100))
    summed = sum_readings([make_reading(connections=1, a=1, b=2)], totals)
    assert (summed.plane.connections, sum(summed.plane.none.exchanges)) == (9, 3)
    assert (summed.upstream(upstream_digest("a")).sent_bytes, summed.upstream(upstream_digest("a")).in_flight) == (
        201,
        1,
    )
    assert summed.upstream(upstream_digest("b")).sent_bytes == 2
    assert sum_readings([], totals).upstream(upstream_digest("a")).in_flight == 0


def test_a_folded_table_may_go_on_and_be_folded_again(table: Table) -> None:
    totals = Totals()
    count_something(table)
    totals.fold(table.read())
    count_something(table)
    assert totals.read().plane.connections == 3
    assert totals.read().upstream(APP_1).attempts == {"ok": 1}


def test_upstreams_that_are_gone_for_good_are_forgotten() -> None:
    totals = Totals()
    totals.fold(make_reading(connections=1, a=1, b=2))
    totals.keep({upstream_digest("b"), upstream_digest("c")})
    assert totals.read().upstreams.keys() == {upstream_digest("b")}
    assert totals.read().plane.connections == 1


def test_totals_survive_as_json(table: Table) -> None:
    totals = Totals()
    count_something(table)
    totals.fold(table.read())
    totals.fold(make_reading(connections=1, a=1))
    again = Totals.from_json(json.loads(json.dumps(totals.to_json())))
    before, after = totals.read(), again.read()
    assert facts(before.plane) == facts(after.plane)
    assert before.upstreams.keys() == after.upstreams.keys()
    for digest, counters in before.upstreams.items():
        assert facts(counters) == facts(after.upstream(digest))
    assert len(json.dumps(totals.to_json())) < 1000, "only what is not 0 is written"


def test_totals_of_another_version_are_read_by_names() -> None:
    written_by_it = {
        "plane": {
            "connections": {"": 5, "by": 6},
            "news": {"": 1},
            "ticked_at": {"": 3},
            "affinity": {"hit": 2, "x": 1},
        },
        "none": {"exchanges": {"GET 2xx": 1, "QUERY 2xx": 2, "GET": 4}},
        "upstreams": {
            APP_1.hex(): {"attempts": {"ok": 1, "surprising": 2}, "in_flight": {"": 9}, "duration": {"6000000": 8}},
            APP_2.hex(): [],
            "no hex": {},
            "abcd": {"attempts": {"ok": 1}},
        },
    }
    reading = Totals.from_json(written_by_it).read()
    assert (reading.plane.connections, reading.plane.affinity, reading.plane.ticked_at_ns) == (5, {"hit": 2}, 0)
    assert sum(reading.plane.none.exchanges) == 3
    assert reading.upstreams.keys() == {APP_1, APP_2}
    upstream = reading.upstream(APP_1)
    assert (upstream.attempts, upstream.in_flight, upstream.duration.counts[1]) == ({"ok": 1, "other": 2}, 0, 8)


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        [],
        "x",
        {"plane": 1, "none": [], "upstreams": "x"},
        {"plane": {"connections": 3}},
        {"plane": {"connections": {"": "3"}}},
        {"plane": {"connections": {"": -3}}},
        {"plane": {"connections": {"": True}}},
        {"plane": {"connections": {"": 1 << 60}}},
        {"plane": {"connections": {"": 1.5}}},
    ],
)
def test_nonsense_is_read_as_nothing(nonsense: object) -> None:
    reading = Totals.from_json(nonsense).read()
    assert (sum(reading.plane.cells), reading.upstreams) == (0, {})
