"""Which upstream each learned key belongs to, in memory that all workers share: each can be asked for any key.

The supervisor owns the memory, so the keys outlive every worker, a reload and an upgrade. All workers write, also those
of two versions while one takes over from the other. The table has a fixed size; a key that was not used for as long as
its caller says expires, and where there is no room the key goes that would expire first.

The path asks `find`, `learn` and `forget` and nothing else, so that another store can stand in their place.

An entry has 32 bytes: a keyed hash of the key, so that a client can neither choose keys that meet nor can keys be read
from the memory; the digest of the upstream; when it expires; and a check over hash and digest. A bucket has 8 entries,
and a key has two of them to go to, of which it takes the emptier one: one in each half of a stripe, which is a part of
the table that a writer locks. Readers lock nothing: an entry that is half written fails its check, and counts as none.
**A key never leads to another upstream than the one that was learned for it.** All numbers are in the byte order of the
machine, and times on its monotonic clock, which is one for all processes.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import time
from bisect import bisect_right
from hashlib import blake2b
from struct import Struct
from typing import Final, Protocol, Self
from zlib import crc32

from typing_extensions import override

from stickyproxy.affinity.snapshot import DIGEST_BYTES
from stickyproxy.errors import StickyproxyError
from stickyproxy.observe.table import make_memory

MAX_KEYS: Final = 1_000_000  # 43 MB

_MAGIC: Final = b"sticky\x00k"
_VERSION: Final = 1  # of all that is said here of the layout
_HASH_KEY_BYTES: Final = 32
_HEADER: Final = Struct(f"=8sII{_HASH_KEY_BYTES}s")  # magic, version, the most keys, the key of the hash
_HEADER_BYTES: Final = 256

_HASH_BYTES: Final = 16
_ENTRY: Final = Struct(f"={_HASH_BYTES}s{DIGEST_BYTES}sII")  # hash, digest, expiry, check
_ENTRY_BYTES: Final = 32
_EXPIRY_AT: Final = _HASH_BYTES + DIGEST_BYTES
_EXPIRY_BYTES: Final = 4
_NEVER: Final = 2 ** (8 * _EXPIRY_BYTES) - 1
_ENTRIES: Final = 8  # of a bucket
_BUCKET_BYTES: Final = _ENTRIES * _ENTRY_BYTES
_EXPIRIES: Final = Struct("=" + f"{_EXPIRY_AT}xI4x" * _ENTRIES)  # of a bucket
_PLACES: Final = Struct("=4xIII")  # what a hash says of the stripe and of the bucket in each half of it

_LOAD: Final = 0.75  # of a table that holds as many keys as it promises to
_MAX_WIDTH: Final = 512  # buckets that a stripe has in each half

_LOCK_TRIES: Final = 10
_LOCK_WAIT_S: Final = 50e-6  # between tries; who holds the lock needs some 3 us
_READ_TRIES: Final = 3
_CELLS_AT_ONCE: Final = 1 << 16  # read together by a count: 0.3 ms


class KeyTableError(StickyproxyError):
    """The memory is no table of keys, or one with another layout; the text says why."""


def _measure(max_keys: int) -> tuple[int, int]:
    """Return how many stripes a table has, and how many buckets each of them has in each half."""
    half = math.ceil(max_keys / (2 * _ENTRIES * _LOAD))
    stripes = math.ceil(half / _MAX_WIDTH)
    return stripes, math.ceil(half / stripes)


def _size_of(max_keys: int) -> int:
    """Return the size (bytes) of a table."""
    stripes, width = _measure(max_keys)
    return _HEADER_BYTES + 2 * stripes * width * _BUCKET_BYTES


def _expire(now: float, idle_s: float) -> int:
    """Return when a key expires that is used now: a sixteenth later than it must, so that it is seldom renewed."""
    return math.ceil(min(now + idle_s + idle_s / 16, _NEVER))


class KeyStore(Protocol):
    """Where keys are remembered, as the path uses it; `KeyTable` says what each method does.

    A store that several proxies share would answer from a copy of its own, and tell the others what it learns.
    """

    learned: int
    evicted: int

    def find(self, key: bytes, now: float, idle_s: float = 0.0) -> bytes | None:
        """Return the digest of a key's upstream; None for a key that is unknown or expired."""

    def learn(self, key: bytes, digest: bytes, idle_s: float, now: float) -> None:
        """Remember the upstream of a key."""

    def forget(self, key: bytes) -> None:
        """Know a key no more."""

    def close(self) -> None:
        """Let go of what the store needs."""


class KeyTable:
    """The shared memory, by its descriptor, which the table owns once it is made.

    Raises KeyTableError for memory that holds no such table; it is then still the caller's to close, who can `create`
    another. `learned` and `evicted` are of this process alone: keys that were new, and keys that had not expired and
    had to go for them. A table that is closed must not be used any more.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            header = os.pread(descriptor, _HEADER.size, 0)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise KeyTableError("the memory holds no table of keys")
            _, version, self.max_keys, hash_key = _HEADER.unpack(header)
            if version != _VERSION:
                raise KeyTableError(f"the table of keys has layout {version}, and this version knows {_VERSION}")
            size = os.fstat(descriptor).st_size
            if not 1 <= self.max_keys <= MAX_KEYS or size != _size_of(self.max_keys):
                raise KeyTableError(f"a table of {self.max_keys} keys has not {size} bytes")
            self._memory = mmap.mmap(descriptor, size)
        except OSError as error:
            raise KeyTableError(f"the memory of the table of keys cannot be read: {error}") from error
        self.descriptor = descriptor
        self.learned = 0
        self.evicted = 0
        self._cells = memoryview(self._memory).cast("I")
        self._hasher = blake2b(digest_size=_HASH_BYTES, key=hash_key)
        self._stripes, self._width = _measure(self.max_keys)
        self._stripe_bytes = 2 * self._width * _BUCKET_BYTES

    @classmethod
    def create(cls, max_keys: int) -> Self:
        """Return an empty table for 1 to `MAX_KEYS` keys: 43 bytes for each, taken as they come."""
        if not 1 <= max_keys <= MAX_KEYS:
            raise ValueError(f"{max_keys} keys are not between 1 and {MAX_KEYS}")
        descriptor = make_memory("stickyproxy-keys")
        os.ftruncate(descriptor, _size_of(max_keys))
        os.pwrite(descriptor, _HEADER.pack(_MAGIC, _VERSION, max_keys, os.urandom(_HASH_KEY_BYTES)), 0)
        return cls(descriptor)

    def find(self, key: bytes, now: float, idle_s: float = 0.0) -> bytes | None:
        """Return the digest of a key's upstream; None for a key that is unknown or expired.

        With `idle_s` this is a use: the key expires no sooner than so many seconds from now, and a sixteenth and a
        second later at most. That is written, under the lock, when a sixteenth has passed since the last time.
        """
        name = self._hash(key)
        stripe, left, right = self._locate(name)
        at = self._find_entry(name, left)
        if at < 0:
            at = self._find_entry(name, right)
            if at < 0:
                return None
        # An entry that has expired or is torn is the answer: what the other bucket has of the key may be older.
        for _ in range(_READ_TRIES):  # it may be about to be written
            _, digest, expiry, check = _ENTRY.unpack_from(self._memory, at)
            if crc32(name + digest) == check:
                if expiry <= now:
                    return None
                if idle_s and expiry < now + idle_s:
                    self._renew(name, at, stripe, _expire(now, idle_s))
                return digest  # type: ignore[no-any-return]
        return None

    def learn(self, key: bytes, digest: bytes, idle_s: float, now: float) -> None:
        """Remember the upstream of a key, in place of the one that it had, until `idle_s` after its last use."""
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
        name = self._hash(key)
        entry = _ENTRY.pack(name, digest, _expire(now, idle_s), crc32(name + digest))
        stripe, left, right = self._locate(name)
        is_locked = self._lock(stripe)
        try:
            known = self._find_entries(name, left, right)
            at = known[0] if known else self._make_room(left, right, int(now))
            self._memory[at : at + _ENTRY_BYTES] = entry
            self._clear(known[1:])
        finally:
            if is_locked:
                self._unlock(stripe)

    def forget(self, key: bytes) -> None:
        """Know a key no more."""
        name = self._hash(key)
        stripe, left, right = self._locate(name)
        is_locked = self._lock(stripe)
        try:
            self._clear(self._find_entries(name, left, right))
        finally:
            if is_locked:
                self._unlock(stripe)

    def count(self, now: float) -> int:
        """Return how many keys have not expired. O(size): 0.05 s for a million; made for a thread beside the loop."""
        is_live = int(now).__lt__
        step = _ENTRY_BYTES // _EXPIRY_BYTES
        first = (_HEADER_BYTES + _EXPIRY_AT) // _EXPIRY_BYTES
        return sum(
            sum(map(is_live, self._cells[at : at + _CELLS_AT_ONCE : step].tolist()))
            for at in range(first, len(self._cells), _CELLS_AT_ONCE)
        )

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _hash(self, key: bytes) -> bytes:
        hasher = self._hasher.copy()
        hasher.update(key)
        return hasher.digest()

    def _locate(self, name: bytes) -> tuple[int, int, int]:
        """Return where the stripe of a hash begins, and its bucket in each half."""
        stripe, left, right = _PLACES.unpack(name)
        begin = _HEADER_BYTES + stripe % self._stripes * self._stripe_bytes
        width = self._width
        return (
            begin,
            begin + left % width * _BUCKET_BYTES,
            begin + (width + right % width) * _BUCKET_BYTES,
        )

    def _find_entry(self, name: bytes, bucket: int) -> int:
        """Return where the entry of a hash begins, and -1 where the bucket has none, whatever its check says."""
        place = self._memory[bucket : bucket + _BUCKET_BYTES].find(name)
        # Across the bounds of entries no hash is found but by chance, one in 2^120: no need to look on behind it.
        return bucket + place if place % _ENTRY_BYTES == 0 else -1

    def _find_entries(self, name: bytes, left: int, right: int) -> list[int]:
        """Return where the entries of a hash begin: two where two processes learned it at once without a lock."""
        return [at for bucket in (left, right) if (at := self._find_entry(name, bucket)) >= 0]

    def _make_room(self, left: int, right: int, now: int) -> int:
        """Return where a new entry goes: to the emptier bucket, in place of the one there that expires first.

        What has expired is room. Of buckets with as much room it is the one with the entry that expires first of both,
        and the left one while both have entries that were never used: ties that go to one side fill the table best
        ("How asymmetry helps load balancing", J. ACM 50(4), 2003).
        """
        lefts = _EXPIRIES.unpack_from(self._memory, left)
        rights = _EXPIRIES.unpack_from(self._memory, right)
        left_order, right_order = sorted(lefts), sorted(rights)
        left_room, right_room = bisect_right(left_order, now), bisect_right(right_order, now)
        if left_room > right_room or (left_room == right_room and left_order[0] <= right_order[0]):
            bucket, expiries, first = left, lefts, left_order[0]
        else:
            bucket, expiries, first = right, rights, right_order[0]
        self.learned += 1
        self.evicted += first > now
        return bucket + expiries.index(first) * _ENTRY_BYTES

    def _renew(self, name: bytes, at: int, stripe: int, expiry: int) -> None:
        is_locked = self._lock(stripe)
        try:
            if self._memory[at : at + _HASH_BYTES] == name:  # and not another's meanwhile
                self._cells[(at + _EXPIRY_AT) // _EXPIRY_BYTES] = expiry  # one cell is never half written
        finally:
            if is_locked:
                self._unlock(stripe)

    def _clear(self, entries: list[int]) -> None:
        for at in entries:
            self._memory[at : at + _ENTRY_BYTES] = bytes(_ENTRY_BYTES)

    def _lock(self, stripe: int) -> bool:
        """Keep all other processes from writing to a stripe; say whether that was possible within 1 ms or so.

        Without the lock the write is made all the same: who holds it may be stopped, and must not stop the others. The
        worst of it is that two new keys take the same place, and one of them is unknown again.

        A record lock belongs to the process: it ends with the process, but also when it closes any descriptor of this
        memory. Nothing is closed while it is held, as what holds it never waits, and a process writes in one thread. A
        lock of the open file description would need one for each worker, from /proc, and exists on Linux alone.
        """
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, stripe)
            except OSError:
                time.sleep(_LOCK_WAIT_S)
            else:
                return True
        return False

    def _unlock(self, stripe: int) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, stripe)

    @override
    def __repr__(self) -> str:
        return f"<KeyTable {self.descriptor} for {self.max_keys} keys>"
