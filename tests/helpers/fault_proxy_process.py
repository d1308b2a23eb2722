"""What a process holds and spends, read from /proc; and children that are started under other conditions than ours."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from tests.helpers.processes import Child, Children

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PROC = Path("/proc")
_RESET_PEAK = "5"  # proc(5): the peak resident set size begins anew at the present one


def memory_kib(pid: int, name: str = "VmRSS") -> int:
    """Return a figure (KiB) of the memory of a process: VmRSS is what it has now, VmHWM the most that it had."""
    match = re.search(rf"^{name}:\s+([0-9]+) kB$", (_PROC / str(pid) / "status").read_text(), re.MULTILINE)
    assert match is not None, f"no {name} of process {pid}"
    return int(match[1])


class Growth:
    """By how much the memory of a process has grown at most since this was made; between two looks, too."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        (_PROC / str(pid) / "clear_refs").write_text(_RESET_PEAK)
        self._began_kib = memory_kib(pid)

    @property
    def kib(self) -> int:
        return memory_kib(self._pid, "VmHWM") - self._began_kib


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(list((_PROC / str(pid) / "fd").iterdir()))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used, in itself and in the kernel; in steps of 10 ms."""
    after_name = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    utime, stime = after_name[11:13]  # fields 14 and 15 of proc(5), of which two stand before
    return (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")


class ChildrenUnder(Children):
    """Children whose command stands behind `prefix`, a program that runs it in its own process, with `env` besides."""

    def __init__(self, directory: Path, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        super().__init__(directory)
        self._prefix = prefix
        self._env = env or {}

    @override
    def start(self, name: str, arguments: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Child:
        return super().start(name, [*self._prefix, *arguments], {**(env or {}), **self._env})
