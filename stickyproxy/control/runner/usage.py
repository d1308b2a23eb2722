"""What app processes use: memory and CPU time of a process group with all its members, from /proc of Linux."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_PROC: Final = Path("/proc")

# proc_pid_stat(5), counted from the field after the name
_TIMES: Final = slice(11, 15)  # utime, stime, cutime, cstime
_STARTED: Final = 19
_RSS: Final = 21

_AGAIN_S: Final = 30.0
_MOVED: Final = 32  # by a 32nd of the resident set: 3 %


@dataclass(frozen=True, slots=True)
class Usage:
    """`memory_bytes` of all members of a group at one moment, and the CPU time that they have used so far.

    Memory is the proportional set size where it can be read (pages that processes share are counted once in all),
    else the resident set size. The time of a child that has ended counts once its parent has waited for it.
    """

    memory_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class _Status:
    """What /proc/PID/stat says of a process; with `started`, in ticks, it is no other with the same id."""

    started: bytes
    resident_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class _Seen:
    """A proportional set size, and when and beside which resident set it was read."""

    started: bytes
    resident_bytes: int
    memory_bytes: int
    read_at: float


def measure_group(group_id: int) -> Usage | None:
    """Return what a process group uses; None where it has no member, or the system has no /proc.

    The proportional set size is read anew: for what that costs, and for calls again and again, see `Meter`.
    """
    return Meter().measure((group_id,)).get(group_id)


class Meter:
    """Measures process groups again and again, without a walk over all their memory each time.

    To find the members costs 1 us for each process of the machine, to measure one 22 us, and to read its proportional
    set size 18 us for each MiB of it (Linux 6.18), as the kernel walks all its pages. So this is read only at first,
    when the resident set has moved by 3 %, and every 30 s; what is added or gone in between counts as not shared. A
    call for 16 processes of 300 MiB takes 80 ms of CPU the first time, and 0.5 ms after that.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def measure(self, group_ids: Iterable[int]) -> dict[int, Usage]:
        """Return what process groups use, by their ids; one without a member that may be seen is not in it."""
        wanted = {group_id for group_id in group_ids if group_id > 0}
        before, self._seen = self._seen, {}  # those that are gone are forgotten
        found: dict[int, Usage] = {}
        for process_id in _process_ids() if wanted else ():
            try:
                group_id = os.getpgid(process_id)  # a tenth of what reading it from a file takes
            except OSError:
                continue
            if group_id not in wanted or (status := _read_status(process_id)) is None:
                continue
            memory_bytes = self._memory_of(process_id, status, before.get(process_id))
            sum_so_far = found.get(group_id, Usage(0, 0.0))
            found[group_id] = Usage(sum_so_far.memory_bytes + memory_bytes, sum_so_far.cpu_s + status.cpu_s)
        return found

    def _memory_of(self, process_id: int, status: _Status, seen: _Seen | None) -> int:
        now = monotonic()
        resident_bytes = status.resident_bytes
        if (
            seen is None
            or seen.started != status.started
            or abs(resident_bytes - seen.resident_bytes) * _MOVED > seen.resident_bytes
            or now - seen.read_at >= _AGAIN_S
        ):
            # What has ended and is not waited for has no memory, and nothing to read.
            memory_bytes = _read_pss(process_id) if resident_bytes else None
            memory_bytes = resident_bytes if memory_bytes is None else memory_bytes
            seen = _Seen(status.started, resident_bytes, memory_bytes, now)
        self._seen[process_id] = seen
        return max(0, seen.memory_bytes + resident_bytes - seen.resident_bytes)


def _process_ids() -> list[int]:
    try:
        names = os.listdir(_PROC)  # noqa: PTH208 -- names are what is wanted
    except OSError:
        return []
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def _read_status(process_id: int) -> _Status | None:
    """Return what one process uses; None where it has just ended, or may not be seen."""
    try:
        text = (_PROC / str(process_id) / "stat").read_bytes()
        # The name of a program may have any characters in it: what follows is numbers.
        fields = text.rpartition(b")")[2].split()
        return _Status(
            started=fields[_STARTED],
            resident_bytes=int(fields[_RSS]) * os.sysconf("SC_PAGE_SIZE"),
            cpu_s=sum(int(ticks) for ticks in fields[_TIMES]) / os.sysconf("SC_CLK_TCK"),
        )
    except (OSError, IndexError, ValueError):
        return None


def _read_pss(process_id: int) -> int | None:
    """Return the proportional set size in bytes; None where it cannot be read: another user's process, or an old Linux.

    The kernel walks all pages of the process for it.
    """
    try:
        text = (_PROC / str(process_id) / "smaps_rollup").read_bytes()
        line = next(line for line in text.splitlines() if line.startswith(b"Pss:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, IndexError, ValueError):
        return None
