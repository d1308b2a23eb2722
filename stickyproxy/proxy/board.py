"""What workers know of each other, in memory that all of them share: a new client is placed right by all of them.

For each upstream there is a slot: the sessions of all workers, each counted once, which the supervisor writes; and
behind it what each worker knows beyond that, in a place of its own: exchanges and tunnels of no session, clients placed
just now, sessions not reported yet. Behind all slots stands how many connections client addresses have at each worker
that counts them. Each place has one writer, so nothing is locked.
"""

from __future__ import annotations

import mmap
import os
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Self

from typing_extensions import override

from stickyproxy.config.schema import MAX_WORKERS
from stickyproxy.observe.table import make_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SLOTS: Final = 1100  # the 1,000 upstreams that a configuration may have, and some that were removed just now
_CELLS: Final = 1 + MAX_WORKERS  # of a slot
_CELL_BYTES: Final = 8

# Addresses: a key, a mark for each worker that counts, and the rows of each worker. 256 KiB for each that counts.
_COLUMNS: Final = 1 << 15
_ROWS: Final = 2
_KEY_BYTES: Final = 32
_COUNT_BYTES: Final = 4
_KEY_AT: Final = MAX_SLOTS * _CELLS * _CELL_BYTES
_COUNTS_AT: Final = _KEY_AT + _KEY_BYTES
_SIZE: Final = _COUNTS_AT + (MAX_WORKERS + MAX_WORKERS * _ROWS * _COLUMNS) * _COUNT_BYTES


class Board:
    """The shared memory, by its descriptor, which the board owns."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        if os.fstat(descriptor).st_size < _SIZE:
            os.ftruncate(descriptor, _SIZE)
        memory = memoryview(mmap.mmap(descriptor, _SIZE))
        self._cells = memory[:_KEY_AT].cast("q")
        self._key = memory[_KEY_AT:_COUNTS_AT]
        self._counts = memory[_COUNTS_AT:].cast("i")

    @classmethod
    def create(cls) -> Self:
        """Return an empty board."""
        board = cls(make_memory("stickyproxy-board"))
        board._key[:] = os.urandom(_KEY_BYTES)
        return board

    def write_sessions(self, slot: int, count: int) -> None:
        """Say how many sessions an upstream has."""
        self._cells[slot * _CELLS] = count

    def clear_worker(self, worker: int) -> None:
        """Forget what a worker knew that is gone."""
        for at in range(1 + worker, len(self._cells), _CELLS):
            if self._cells[at]:
                self._cells[at] = 0
        AddressCells(self._counts, self._key, worker).clear()

    def clear_slot(self, slot: int) -> None:
        """Forget all about an upstream, so that another may have its slot."""
        for at in range(slot * _CELLS, (slot + 1) * _CELLS):
            self._cells[at] = 0

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def place(self, worker: int) -> Place:
        """Return what one of `MAX_WORKERS` workers reads and writes, by its index."""
        return Place(self._cells, worker, AddressCells(self._counts, self._key, worker))

    @override
    def __repr__(self) -> str:
        return f"<Board {self.descriptor}>"


class Place:
    """The board as one worker uses it. `slots` are those of the upstreams, by digest."""

    def __init__(self, cells: memoryview[int], worker: int, addresses: AddressCells) -> None:
        self._cells = cells
        self._worker = worker
        self.addresses = addresses
        self.slots: Mapping[bytes, int] = {}

    def read(self, digest: bytes) -> int:
        """Return the sessions of an upstream and what all others know beyond them; 0 where it has no slot."""
        slot = self.slots.get(digest)
        if slot is None:
            return 0
        at = slot * _CELLS
        return max(0, sum(self._cells[at : at + _CELLS].tolist()) - self._cells[at + 1 + self._worker])

    def write(self, digest: bytes, beyond: int) -> None:
        """Say what this worker knows of an upstream beyond its sessions."""
        slot = self.slots.get(digest)
        if slot is not None:
            self._cells[slot * _CELLS + 1 + self._worker] = beyond

    @override
    def __repr__(self) -> str:
        return f"<Place of worker {self._worker} with {len(self.slots)} slots>"


class AddressCells:
    """How many connections each client address has, as one worker counts its own and reads those of the others.

    Each worker that counts has two rows of cells. An address has one cell in each row, by a digest whose key nobody
    else knows, and what a worker has of it is the lesser of the two: never too few, and too many only where other
    addresses share both cells. With 10,000 connections of as many addresses elsewhere that is 0.07 too many on average,
    3 or more for one address in 70,000; with 100,000 it is 2. An address with many connections shares both cells with
    one in 2^30.
    """

    def __init__(self, counts: memoryview[int], key: memoryview[int], worker: int) -> None:
        self._counts = counts
        self._key = bytes(key)
        self._worker = worker
        self._at = _rows_of(worker)

    def _find(self, address: str) -> tuple[int, int]:
        """Return where the cells of an address stand in the rows of any worker."""
        digest = blake2b(address.encode(), digest_size=8, key=self._key).digest()
        first, second = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
        return first % _COLUMNS, _COLUMNS + second % _COLUMNS

    def begin(self) -> None:
        """Count nothing yet, and let the others see what is counted from now on."""
        self.clear()
        self._counts[self._worker] = 1

    def clear(self) -> None:
        """Count no more, and forget what was counted."""
        if self._counts[self._worker]:
            self._counts[self._worker] = 0
            self._counts[self._at : self._at + _ROWS * _COLUMNS] = memoryview(
                bytes(_ROWS * _COLUMNS * _COUNT_BYTES)
            ).cast("i")

    def add(self, address: str, change: int) -> None:
        """Count so many connections of an address more, or less."""
        counts = self._counts
        for cell in self._find(address):
            counts[self._at + cell] = max(0, counts[self._at + cell] + change)

    def count_elsewhere(self, address: str) -> int:
        """Return how many connections of an address all other workers have; O(workers)."""
        counts, (first, second) = self._counts, self._find(address)
        return sum(
            min(counts[at + first], counts[at + second])
            for worker, is_counting in enumerate(counts[:MAX_WORKERS].tolist())
            if is_counting and worker != self._worker
            for at in (_rows_of(worker),)
        )

    @override
    def __repr__(self) -> str:
        return f"<AddressCells of worker {self._worker}>"


def _rows_of(worker: int) -> int:
    """Return where the rows of a worker begin, in counts."""
    return MAX_WORKERS + worker * _ROWS * _COLUMNS
