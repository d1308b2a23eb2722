"""One worker's counters in memory that it shares with the supervisor, and their sums over all workers.

The memory is a file that has no name. It begins with a header that says where each field is, so that a process of
another version can read it, by names: what it does not know is left out, and what is not there is 0. Behind it stand
the block of the plane and those of the upstreams. The worker alone writes, one cell at a time, and what it has counted
stays readable when it is gone; the supervisor reads the file and waits for nobody.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy.affinity.snapshot import DIGEST_BYTES
from stickyproxy.errors import StickyproxyError
from stickyproxy.observe.counters import (
    BEYOND,
    CELL_BYTES,
    DIGEST,
    OTHER,
    PLANE,
    PLANE_CELLS,
    TICKED_AT,
    UPSTREAM,
    Field,
    PlaneCounters,
    UpstreamCounters,
    make_cells,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

_MAGIC: Final = b"sticky\x00\x01"
_HEAD: Final = struct.Struct("<8sII")  # magic, size and CRC-32 of the description
_HEADER_BYTES: Final = 1 << 14  # a description has some 3 KiB
_MAX_DESCRIPTION_BYTES: Final = 1 << 20  # of a foreign one
_CAPACITY: Final = 1100  # the 1,000 upstreams that a configuration may have, and some that were removed just now
_BLOCKS_AT_ONCE: Final = 32  # read together
_MAX_COUNT: Final = 1 << 60  # of a counter; sums must fit into 63 bits


def make_memory(name: str) -> int:
    """Return the descriptor of memory that other processes can share; `name` is for those who look at processes.

    It is a file that has no name where there is no such memory.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:  # pragma: no cover -- where there is no Linux
        return os.dup(file.fileno())


class TableError(StickyproxyError):
    """The memory is no table, or a torn one; the text says why."""


def _describe_fields(fields: Iterable[Field]) -> list[dict[str, Any]]:
    return [{"name": one.name, "at": one.at, "kind": one.kind, "axes": one.axes} for one in fields]


# Of the plane's block, that of exchanges which reached no upstream is the second part, with the upstreams' fields.
_UPSTREAMS_AT: Final = _HEADER_BYTES + PLANE_CELLS * CELL_BYTES
_BLOCK_BYTES: Final = UPSTREAM.size * CELL_BYTES
_TABLE_BYTES: Final = _UPSTREAMS_AT + _CAPACITY * _BLOCK_BYTES
_DESCRIPTION: Final = json.dumps(
    {
        "plane": {"at": _HEADER_BYTES, "cells": PLANE.size, "fields": _describe_fields(PLANE.fields)},
        "none": {"at": _HEADER_BYTES + PLANE.size * CELL_BYTES},
        "upstreams": {
            "at": _UPSTREAMS_AT,
            "cells": UPSTREAM.size,
            "blocks": _CAPACITY,
            "fields": _describe_fields(UPSTREAM.fields),
        },
    },
    separators=(",", ":"),
).encode()
_HEADER: Final = _HEAD.pack(_MAGIC, len(_DESCRIPTION), zlib.crc32(_DESCRIPTION)) + _DESCRIPTION


@dataclass(frozen=True, slots=True)
class Reading:
    """What a table held at one moment: `upstreams` by digest. Nothing in it changes."""

    plane: PlaneCounters = field(default_factory=PlaneCounters)
    upstreams: Mapping[bytes, UpstreamCounters] = field(default_factory=dict)

    def upstream(self, digest: bytes) -> UpstreamCounters:
        """Return the counters of an upstream, or such of which all are 0."""
        return self.upstreams.get(digest) or UpstreamCounters()


class Table:
    """The shared memory of one worker, by its descriptor, which the table owns.

    The worker takes `plane` and `upstream` and writes; the supervisor only `read`s. The first of the worker's calls
    lays the table out, as its own version has it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._cells: memoryview[int] | None = None
        self._plane: PlaneCounters
        self._upstreams: dict[bytes, UpstreamCounters] = {}
        self._released: dict[bytes, None] = {}  # those given back, the longest ago first

    @classmethod
    def create(cls) -> Self:
        """Return a table that nobody has laid out yet. Its memory is there once it is written to."""
        return cls(make_memory("stickyproxy-counters"))

    @property
    def plane(self) -> PlaneCounters:
        """Return the counters of the plane; raise TableError where the memory is another version's."""
        self._lay_out()
        return self._plane

    def upstream(self, digest: bytes) -> UpstreamCounters:
        """Return the counters of an upstream: its own, or a free block, or one that was released.

        Where there is none left they are private, and nobody sees them. Raises TableError as `plane` does.
        """
        cells = self._lay_out()
        self._released.pop(digest, None)
        found = self._upstreams.get(digest)
        if found is not None:
            return found
        if len(self._upstreams) < _CAPACITY:
            at = (_UPSTREAMS_AT - _HEADER_BYTES) // CELL_BYTES + len(self._upstreams) * UPSTREAM.size
            found = UpstreamCounters(cells[at : at + UPSTREAM.size])
        else:
            found = self._reuse()
        if found is None:
            return UpstreamCounters()
        found.cells[DIGEST] = int.from_bytes(digest, "little", signed=True)
        self._upstreams[digest] = found
        return found

    def _reuse(self) -> UpstreamCounters | None:
        """Return the block that was released first of those that nothing open counts on any more; None without one."""
        for digest in self._released:
            found = self._upstreams[digest]
            if not (found.in_flight or found.tunnels_open):
                del self._released[digest], self._upstreams[digest]
                found.cells[DIGEST + 1 :] = make_cells(UPSTREAM.size - 1)  # never without a digest: there reading ends
                return found
        return None

    def release(self, digest: bytes) -> None:
        """Give back the counters of an upstream that was removed; what is still open goes on counting there."""
        if digest in self._upstreams:
            self._released[digest] = None

    def _lay_out(self) -> memoryview[int]:
        """Return all cells behind the header, which is written where there is none; raise TableError."""
        if self._cells is not None:
            return self._cells
        header = os.pread(self.descriptor, len(_HEADER), 0)
        is_new = not any(header)
        if not is_new and header != _HEADER:
            raise TableError("the counters were laid out by another version of this program")
        os.ftruncate(self.descriptor, _TABLE_BYTES)
        memory = mmap.mmap(self.descriptor, _TABLE_BYTES)
        self._cells = cells = memoryview(memory)[_HEADER_BYTES:].cast("q")
        if is_new:
            memory[len(_MAGIC) : len(_HEADER)] = _HEADER[len(_MAGIC) :]
            memory[: len(_MAGIC)] = _MAGIC  # last: who sees it sees the rest
        self._plane = PlaneCounters(cells[:PLANE_CELLS])
        for at in range(PLANE_CELLS, len(cells), UPSTREAM.size):  # those of one that had the table before
            if not cells[at + DIGEST]:
                break
            digest = cells[at + DIGEST].to_bytes(DIGEST_BYTES, "little", signed=True)
            self._upstreams[digest] = UpstreamCounters(cells[at : at + UPSTREAM.size])
        return cells

    def read(self) -> Reading:
        """Return what the table holds now, and nothing where it is closed; raise TableError."""
        return read_table(self.descriptor) if self.descriptor >= 0 else Reading()

    def close(self) -> None:
        """Close the descriptor; who still counts, counts on."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @override
    def __repr__(self) -> str:
        return f"<Table {self.descriptor} upstreams={len(self._upstreams)} released={len(self._released)}>"


def read_table(descriptor: int) -> Reading:
    """Return what a table of any version holds; nothing, if nobody has laid it out yet. Raises TableError.

    O(n) in upstreams: some 3 us for each where the versions are the same, and 0.3 ms where they are not.
    """
    head = os.pread(descriptor, _HEAD.size, 0)
    if not any(head):
        return Reading()
    if len(head) < _HEAD.size:
        raise TableError("the counters are cut")
    magic, size, check = _HEAD.unpack(head)
    if magic == bytes(len(_MAGIC)):
        return Reading()  # it is being written
    if magic != _MAGIC:
        raise TableError("the memory holds no counters of this program")
    description = os.pread(descriptor, min(size, _MAX_DESCRIPTION_BYTES), _HEAD.size)
    if len(description) != size or zlib.crc32(description) != check:
        raise TableError("the description of the counters is torn")
    return _plan_reading(description).read(descriptor)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a table of one version is read: where its blocks are, and what makes blocks of this version's of them."""

    plane_at: int
    plane_cells: int
    none_at: int
    upstreams_at: int
    upstream_cells: int
    blocks: int
    digest_at: int
    adapt_plane: Callable[[memoryview[int]], memoryview[int]] | None
    adapt_upstream: Callable[[memoryview[int]], memoryview[int]] | None

    def read(self, descriptor: int) -> Reading:
        """Return what the table holds; raise TableError where it is cut."""
        plane = self._read_cells(descriptor, self.plane_at, self.plane_cells)
        none = self._read_cells(descriptor, self.none_at, self.upstream_cells)
        cells = make_cells(PLANE_CELLS)
        cells[: PLANE.size] = plane if self.adapt_plane is None else self.adapt_plane(plane)
        cells[PLANE.size :] = none if self.adapt_upstream is None else self.adapt_upstream(none)
        upstreams: dict[bytes, UpstreamCounters] = {}
        size, digest_at = self.upstream_cells, self.digest_at
        for first in range(0, self.blocks, _BLOCKS_AT_ONCE):
            count = min(_BLOCKS_AT_ONCE, self.blocks - first)
            read = self._read_cells(descriptor, self.upstreams_at + first * size * CELL_BYTES, count * size)
            for at in range(0, len(read), size):
                if not read[at + digest_at]:  # none is free before one that is taken
                    return Reading(PlaneCounters(cells), upstreams)
                digest = read[at + digest_at].to_bytes(DIGEST_BYTES, "little", signed=True)
                block = read[at : at + size]
                upstreams[digest] = UpstreamCounters(
                    block if self.adapt_upstream is None else self.adapt_upstream(block)
                )
        return Reading(PlaneCounters(cells), upstreams)

    @staticmethod
    def _read_cells(descriptor: int, at: int, count: int) -> memoryview[int]:
        data = os.pread(descriptor, count * CELL_BYTES, at)
        if len(data) != count * CELL_BYTES:
            raise TableError("the counters are cut")
        return memoryview(data).cast("q")


@cache
def _plan_reading(description: bytes) -> _Plan:
    """Return how to read the tables of the version that wrote a description; raise TableError."""
    try:
        read = json.loads(description)
        plane, upstreams = read["plane"], read["upstreams"]
        plane_fields, upstream_fields = _read_fields(plane), _read_fields(upstreams)
        is_own = description == _DESCRIPTION
        return _Plan(
            plane_at=_natural(plane["at"]),
            plane_cells=_natural(plane["cells"]),
            none_at=_natural(read["none"]["at"]),
            upstreams_at=_natural(upstreams["at"]),
            upstream_cells=_natural(upstreams["cells"]),
            blocks=_natural(upstreams["blocks"]),
            digest_at=upstream_fields["digest"].at,
            adapt_plane=None if is_own else _make_adapter(plane_fields, PLANE.fields, PLANE.size),
            adapt_upstream=None if is_own else _make_adapter(upstream_fields, UPSTREAM.fields, UPSTREAM.size),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TableError(f"the description of the counters cannot be read: {error!r}") from error


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_DESCRIPTION_BYTES << 10:
        raise ValueError(f"{value!r} is no size")
    return value


def _read_fields(block: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields of a described block by name; raise ValueError where one is not within it."""
    fields = {}
    for one in block["fields"]:
        axes = tuple(tuple(map(str, axis)) for axis in one["axes"])
        found = fields[str(one["name"])] = Field(str(one["name"]), _natural(one["at"]), one["kind"], axes)
        if found.at + found.size > _natural(block["cells"]):
            raise ValueError(f"the field {found.name!r} is not within its block")
    return fields


def _make_adapter(
    theirs: Mapping[str, Field], ours: Iterable[Field], size: int
) -> Callable[[memoryview[int]], memoryview[int]]:
    """Return what makes a block of this version's, of `size` cells, of another version's, by names and labels."""
    moves = [move for one in ours if one.name in theirs for move in _find_moves(theirs[one.name], one)]

    def adapt(cells: memoryview[int]) -> memoryview[int]:
        adapted = make_cells(size)
        for source, target in moves:
            adapted[target] += cells[source]
        return adapted

    return adapt


def _find_moves(theirs: Field, ours: Field) -> list[tuple[int, int]]:
    """Return from which cell to which: a label that is not known goes to "other", or to the next bound of a histogram.

    What has no place, or other axes, is left out.
    """
    if len(theirs.axes) != len(ours.axes):
        return []
    places = {labels: ours.at + at for at, labels in enumerate(product(*ours.axes))}
    found = []
    for at, labels in enumerate(product(*theirs.axes)):
        known = tuple(_find_label(label, axis) for label, axis in zip(labels, ours.axes, strict=True))
        target = places.get(known)  # type: ignore[arg-type]  # with a None in it, it is not there
        if target is not None:
            found.append((theirs.at + at, target))
    return found


def _find_label(label: str, axis: tuple[str, ...]) -> str | None:
    if label in axis:
        return label
    if axis[-1] == BEYOND:
        return next((bound for bound in axis[:-1] if label.isascii() and label.isdigit() and int(bound) >= int(label)),
                    BEYOND)  # fmt: skip
    return OTHER if OTHER in axis else None


# Sums

_UPSTREAM_COUNTERS: Final = tuple(one for one in UPSTREAM.fields if one.kind == "counter")
_UPSTREAM_NOW: Final = tuple(at for one in UPSTREAM.fields if one.kind != "counter" for at in one.cells)
_PLANE_NOW: Final = tuple(at for one in PLANE.fields if one.kind != "counter" for at in one.cells)
_PLANE_COUNTERS: Final = tuple(one for one in PLANE.fields if one.kind == "counter")


class Totals:
    """What the workers had counted that are gone, by names; gauges and marks are not among it."""

    def __init__(self) -> None:
        self._reading = Reading()

    def fold(self, reading: Reading) -> None:
        """Add the counters of a worker that is gone."""
        summed = sum_readings([reading], self)
        for at in _PLANE_NOW:
            summed.plane.cells[at] = 0
        for counters in (summed.plane.none, *summed.upstreams.values()):
            for at in _UPSTREAM_NOW:
                counters.cells[at] = 0
        self._reading = summed

    def keep(self, digests: Collection[bytes]) -> None:
        """Forget all upstreams but these: those that were removed would be remembered for ever."""
        read = self._reading
        self._reading = Reading(read.plane, {one: read.upstreams[one] for one in digests if one in read.upstreams})

    def read(self) -> Reading:
        """Return the totals as they are summed with what living workers count."""
        return self._reading

    def to_json(self) -> dict[str, Any]:
        """Return the totals as JSON, by names, only what is not 0."""
        return {
            "plane": _write_counters(self._reading.plane.cells, _PLANE_COUNTERS),
            "none": _write_counters(self._reading.plane.none.cells, _UPSTREAM_COUNTERS),
            "upstreams": {
                digest.hex(): _write_counters(counters.cells, _UPSTREAM_COUNTERS)
                for digest, counters in self._reading.upstreams.items()
            },
        }

    @classmethod
    def from_json(cls, written: Any) -> Self:
        """Return the totals that `to_json` wrote, perhaps of another version: what cannot be read is left out."""
        written = written if isinstance(written, dict) else {}
        plane, found = PlaneCounters(), {}
        _read_counters(plane.cells, written.get("plane"), _PLANE_COUNTERS)
        _read_counters(plane.none.cells, written.get("none"), _UPSTREAM_COUNTERS)
        upstreams = written.get("upstreams")
        for name, one in (upstreams if isinstance(upstreams, dict) else {}).items():
            digest = _read_digest(name)
            if digest is not None:
                found[digest] = UpstreamCounters()
                _read_counters(found[digest].cells, one, _UPSTREAM_COUNTERS)
        totals = cls()
        totals._reading = Reading(plane, found)
        return totals


def _write_counters(cells: memoryview[int], fields: Iterable[Field]) -> dict[str, dict[str, int]]:
    """Return the values of each field by its labels, joined by spaces; one without axes has the empty label."""
    written = {}
    for one in fields:
        values = cells[one.at : one.at + one.size].tolist()
        if any(values):
            labelled = zip(product(*one.axes), values, strict=True)
            written[one.name] = {" ".join(labels): value for labels, value in labelled if value}
    return written


def _read_counters(cells: memoryview[int], written: Any, fields: Iterable[Field]) -> None:
    written = written if isinstance(written, dict) else {}
    for one in fields:
        values = written.get(one.name)
        if not isinstance(values, dict):
            continue
        places = {labels: one.at + at for at, labels in enumerate(product(*one.axes))}
        for label, value in values.items():
            labels = label.split()
            if len(labels) == len(one.axes):
                known = tuple(_find_label(part, axis) for part, axis in zip(labels, one.axes, strict=True))
                place = places.get(known)  # type: ignore[arg-type]
                if place is not None and type(value) is int and 0 <= value < _MAX_COUNT:
                    cells[place] += value


def _read_digest(name: str) -> bytes | None:
    try:
        digest = bytes.fromhex(name)
    except ValueError:
        return None
    return digest if len(digest) == DIGEST_BYTES else None


def sum_readings(readings: Collection[Reading], totals: Totals | None = None) -> Reading:
    """Return the sums of what living workers count and, where given, of the totals of those that are gone.

    Marks are 0 in it. O(n) in upstreams: some 10 us for each.
    """
    every = [*readings, *(() if totals is None else (totals.read(),))]
    plane = PlaneCounters(_sum([one.plane.cells for one in every], PLANE_CELLS))
    plane.cells[TICKED_AT] = 0
    blocks: dict[bytes, list[memoryview[int]]] = {}
    for reading in every:
        for digest, counters in reading.upstreams.items():
            blocks.setdefault(digest, []).append(counters.cells)
    return Reading(plane, {digest: _sum_upstream(cells) for digest, cells in blocks.items()})


def _sum_upstream(blocks: list[memoryview[int]]) -> UpstreamCounters:
    cells = make_cells(UPSTREAM.size)
    behind = DIGEST + 1  # which is the first cell
    cells[behind:] = _sum([block[behind:] for block in blocks], UPSTREAM.size - behind)
    return UpstreamCounters(cells)


def _sum(blocks: Iterable[memoryview[int]], size: int) -> memoryview[int]:
    """Return the sums of the cells of blocks, in cells of their own.

    A block is added as one long number, six times as fast as cell by cell: no cell is negative, and no sum too large
    for its 64 bits, so that nothing is carried from one to the next.
    """
    total = sum(int.from_bytes(block, sys.byteorder) for block in blocks)
    return memoryview(bytearray(total.to_bytes(size * CELL_BYTES, sys.byteorder))).cast("q")
