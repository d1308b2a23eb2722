"""What a million learned keys cost: `python -m tests.bench.key_table [--keys 1000000]`, on one core, as Markdown.

One process fills a table that is made for so many keys, then looks up and learns keys at random; another does the same
with a dict of bytes to bytes, which no second process could ask and in which nothing expires. Times are of the whole
call, with the loop around it, over keys made beforehand. Memory is what the process has more when all keys are in, and
for the table also the size of its file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stickyproxy.proxy.key_table import MAX_KEYS, KeyTable
from tests.bench.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Kind = Callable[[int], "Costs"]

COLUMNS: Final = (
    "", "keys", "kept", "bytes a key", "of its file", "find: hit", "find: miss", "learn: new", "learn: known",
)  # fmt: skip
_AT_ONCE: Final = 5000  # keys that are made before they are timed
_NOW: Final = 1e6
_IDLE_S: Final = 3600.0
_DIGESTS: Final = tuple(bytes([number]) * 8 for number in range(1, 4))


@dataclass(frozen=True)
class Costs:
    """What was measured: `kept` of `keys` were found again; memory in bytes, times in ns for each call."""

    keys: int
    kept: int
    memory: int
    file: int | None
    hit: float
    miss: float
    new: float
    known: float


def make_keys(numbers: Sequence[int]) -> list[bytes]:
    """Return keys as an Engine.IO id makes them: the name of the id, and 20 characters."""
    return [b"engineio\0%020x" % number for number in numbers]


def read_memory() -> int:
    """Return what this process has of memory that is no file's (bytes): its heap, and its part of what is shared."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    if len(found) != 2:
        raise RuntimeError("this system does not say how much memory a process has")
    return sum(found) * 1024


def _cost_ns(call: Callable[[bytes], object], numbers: Sequence[int]) -> float:
    """Return the time (ns) of a call, for each of the keys once."""
    spent = 0
    for first in range(0, len(numbers), _AT_ONCE):
        keys = make_keys(numbers[first : first + _AT_ONCE])
        begun = time.perf_counter_ns()
        for key in keys:
            call(key)
        spent += time.perf_counter_ns() - begun
    return spent / len(numbers)


def _measure(
    count: int, find: Callable[[bytes], bytes | None], learn: Callable[[bytes], object], table: KeyTable | None = None
) -> Costs:
    chance = random.Random(1)
    some = chance.choices(range(count), k=min(count, 200_000))
    make_keys(range(min(count, _AT_ONCE)))  # the heap that making keys needs is no part of the growth
    before = read_memory()
    new = _cost_ns(learn, range(count))
    memory = read_memory() - before
    kept = sum(find(key) is not None for at in range(0, count, _AT_ONCE)
               for key in make_keys(range(at, min(count, at + _AT_ONCE))))  # fmt: skip
    return Costs(
        keys=count,
        kept=kept,
        memory=memory,
        file=None if table is None else os.fstat(table.descriptor).st_size,
        hit=_cost_ns(find, some),
        miss=_cost_ns(find, [count + number for number in some]),
        new=new,
        known=_cost_ns(learn, some),
    )


def measure_table(count: int) -> Costs:
    """Return what a table costs that is made for `count` keys, each of which is used when it is found."""
    table = KeyTable.create(count)
    try:
        return _measure(
            count,
            lambda key: table.find(key, _NOW, _IDLE_S),
            lambda key: table.learn(key, _DIGESTS[0], _IDLE_S, _NOW),
            table,
        )
    finally:
        table.close()


def measure_dict(count: int) -> Costs:
    """Return what a dict with `count` keys costs."""
    known: dict[bytes, bytes] = {}
    return _measure(count, known.get, lambda key: known.__setitem__(key, _DIGESTS[0]))


def measure_apart(kind: Kind, count: int) -> Costs:
    """Measure in a process of its own, so that no memory is counted that another left behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(kind, (count,))


def write_cells(name: str, costs: Costs) -> list[str]:
    times = [f"{one:,.0f} ns" for one in (costs.hit, costs.miss, costs.new, costs.known)]
    file = "-" if costs.file is None else f"{costs.file / costs.keys:.1f}"
    return [name, f"{costs.keys:,}", f"{costs.kept:,}", f"{costs.memory / costs.keys:.1f}", file, *times]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.key_table", description=__doc__)
    parser.add_argument("--keys", type=int, default=MAX_KEYS, help=f"1 to {MAX_KEYS} (default)")
    options = parser.parse_args(arguments)
    if not 1 <= options.keys <= MAX_KEYS:
        parser.error(f"--keys must be between 1 and {MAX_KEYS}")
    return options


def main() -> None:
    """Measure, and print the table."""
    count = parse_options().keys
    rows: list[Sequence[str]] = [COLUMNS]
    for name, kind in (("table, shared", measure_table), ("dict, of one process", measure_dict)):
        rows.append(write_cells(name, measure_apart(kind, count)))
    print("\n".join(write_table(rows, {0}, is_markdown=True)))


if __name__ == "__main__":
    main()
