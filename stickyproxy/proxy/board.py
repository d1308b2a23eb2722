"""What workers know of each other's load, in memory that all of them share: where a new client goes is right for all.

For each upstream there is a slot: the sessions of all workers, each counted once, which the supervisor writes; and
behind it what each worker knows beyond that, in a place of its own: exchanges and tunnels of no session, clients placed
just now, sessions not reported yet. Each place has one writer, so nothing is locked.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Final, Self

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SLOTS: Final = 1100  # the 1,000 upstreams that a configuration may have, and some that were removed just now
MAX_WORKERS: Final = 64
_CELLS: Final = 1 + MAX_WORKERS  # of a slot
_CELL_BYTES: Final = 8


class Board:
    """The shared memory, by its descriptor, which the board owns."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        size = MAX_SLOTS * _CELLS * _CELL_BYTES
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._cells = memoryview(mmap.mmap(descriptor, size)).cast("q")

    @classmethod
    def create(cls) -> Self:
        """Return an empty board."""
        return cls(os.memfd_create("stickyproxy-board"))

    def write_sessions(self, slot: int, count: int) -> None:
        """Say how many sessions an upstream has."""
        self._cells[slot * _CELLS] = count

    def clear_worker(self, worker: int) -> None:
        """Forget what a worker knew that is gone."""
        for at in range(1 + worker, len(self._cells), _CELLS):
            if self._cells[at]:
                self._cells[at] = 0

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
        return Place(self._cells, worker)

    @override
    def __repr__(self) -> str:
        return f"<Board {self.descriptor}>"


class Place:
    """The board as one worker uses it. `slots` are those of the upstreams, by digest."""

    def __init__(self, cells: memoryview[int], worker: int) -> None:
        self._cells = cells
        self._worker = worker
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
