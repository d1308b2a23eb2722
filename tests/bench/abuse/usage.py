"""What the proxy has used so far, read from /proc: CPU time, reads and their bytes, and its memory.

`reads` and `read_bytes` are those of `read(2)`, which the event loop takes everything from its connections with: what
reached the proxy from both of its sides, and in how many pieces. Opened connections are not among them.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench.process import cpu_s, process_tree
from tests.helpers.proc import forget_peak, parse_status

_PROC = Path("/proc")
_SETTLE_TIMEOUT_S = 5.0
_SETTLE_STEP_S = 0.02
_SETTLED_S = 0.000_3  # of CPU in one step: the ticks and probes of an idle proxy


class Usage(NamedTuple):
    """Totals since the process began."""

    cpu_s: float
    reads: int
    read_bytes: int

    def since(self, before: Usage) -> Usage:
        """Return what was used after `before`."""
        return Usage(self.cpu_s - before.cpu_s, self.reads - before.reads, self.read_bytes - before.read_bytes)


def parse_io(text: str) -> tuple[int, int]:
    """Return the reads and the bytes read in the text of /proc/PID/io."""
    values = dict(re.findall(r"^(\w+): (\d+)$", text, re.MULTILINE))
    return int(values["syscr"]), int(values["rchar"])


def usage(pid: int) -> Usage:
    """Return the totals of a process and its descendants; raise OSError if one may not be looked at."""
    counts = [parse_io((_PROC / str(one) / "io").read_text()) for one in process_tree(pid)]
    return Usage(cpu_s(pid), sum(reads for reads, _ in counts), sum(size for _, size in counts))


def settle(pid: int) -> None:
    """Return once a process does nothing any more, or after 5 s."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    before_s, quiet = cpu_s(pid), 0  # one quiet step could fall between two of its own
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(_SETTLE_STEP_S)
        now_s = cpu_s(pid)
        quiet = quiet + 1 if now_s - before_s < _SETTLED_S else 0
        before_s = now_s


def resident_kib(pid: int) -> int:
    """Return the resident set now, of a process and its descendants, and let the peak begin anew."""
    total_kib = 0
    for one in process_tree(pid):
        forget_peak(one)
        total_kib += parse_status((_PROC / str(one) / "status").read_text(), "VmRSS")
    return total_kib


def peak_kib(pid: int) -> int:
    """Return the largest resident set since `resident_kib` was called."""
    return sum(parse_status((_PROC / str(one) / "status").read_text(), "VmHWM") for one in process_tree(pid))
