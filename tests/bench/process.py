"""What processes cost: CPU time and memory, of a tree or a session, read from /proc; and the core they are held to.

CPU time is read from `schedstat` (nanoseconds) and not from `stat`, whose ticks of 10 ms are too coarse for one run.
"""

from __future__ import annotations

import os
import re
import resource
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.helpers.proc import descriptors, session_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROC = Path("/proc")


class Cores(NamedTuple):
    """The core of the proxy under test, and that of the load and the application; None: not held to any."""

    proxy: int | None
    rest: int | None


def choose_cores(usable: set[int]) -> Cores:
    """Give the proxy the first core and the rest the second; with one core nothing is held."""
    if len(usable) == 1:
        return Cores(None, None)
    first, second = sorted(usable)[:2]
    return Cores(first, second)


@contextmanager
def held_to(core: int | None) -> Iterator[None]:
    """Hold this thread, and every process it starts meanwhile, to one core."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_file_limit() -> None:
    """Let this process and its children open as many files as the system allows: an idle WebSocket takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def parse_schedstat(text: str) -> float:
    """Return the CPU seconds of one thread: the first field of its schedstat is nanoseconds on a core."""
    return int(text.split(maxsplit=1)[0]) / 1e9


def parse_pss_kib(text: str) -> int:
    """Return the proportional set size (KiB) of a `smaps_rollup`; 0 if it has none."""
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) if match else 0


def process_tree(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    found = [pid]
    for one in found:  # grows while it is walked
        for task in _tasks(one):
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU seconds used so far by the living threads of a process and its descendants."""
    total_s = 0.0
    for one in process_tree(pid):
        for task in _tasks(one):
            with suppress(OSError):  # it ended meanwhile
                total_s += parse_schedstat((task / "schedstat").read_text())
    return total_s


def own_pss_kib(pid: int) -> int:
    """Return the memory (KiB) of one process, and its part of the pages that it shares; 0 where it has ended."""
    with suppress(OSError):
        return parse_pss_kib((_PROC / str(pid) / "smaps_rollup").read_text())
    return 0


def pss_kib(pid: int) -> int:
    """Return the memory (KiB) of a process and its descendants; pages that they share are counted once."""
    return sum(map(own_pss_kib, process_tree(pid)))


class Footprint(NamedTuple):
    """What the processes of a session hold."""

    processes: int
    pss_kib: int
    descriptors: int


def footprint(pid: int) -> Footprint:
    """Return what all processes of the session hold that `pid` leads or led."""
    processes = session_of(pid)
    held = 0
    for one in processes:
        with suppress(OSError):  # it ended meanwhile
            held += descriptors(one)
    return Footprint(len(processes), sum(map(own_pss_kib, processes)), held)


def parse_busy_s(text: str) -> float:
    """Return the seconds in which the cores of the machine did something, of the text of /proc/stat."""
    user, nice, system, _, _, interrupts, soft_interrupts = map(int, text.split(maxsplit=8)[1:8])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Return the seconds in which the cores of this machine did something since it runs."""
    return parse_busy_s((_PROC / "stat").read_text())


def _tasks(pid: int) -> list[Path]:
    try:
        return list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return []
