"""What /proc says of processes: which of them there are, what they hold and spend, and whose connections they have."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ESTABLISHED: Final = "01"  # states of a TCP socket
LISTENING: Final = "0A"
_PROC: Final = Path("/proc")
_ENDED: Final = frozenset("ZX")
_WORKER: Final = "stickyproxy.control.worker_process"  # stands in the command line of a worker
_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")
_RESET_PEAK: Final = "5"  # proc(5): the peak resident set size begins anew at the present one


# Which there are


class Stat(NamedTuple):
    """The state of a process, its session, and when it began: a process id alone may come to be another's."""

    state: str
    session: int
    began: int

    @property
    def has_ended(self) -> bool:
        """Say whether it is a zombie, that nobody has waited for."""
        return self.state in _ENDED


def parse_stat(text: str) -> Stat:
    """Return the facts in the text of /proc/PID/stat."""
    fields = text.rpartition(") ")[2].split()  # the name before it may hold anything
    return Stat(fields[0], int(fields[3]), int(fields[19]))


def read_stat(pid: int) -> Stat | None:
    """Return the facts of a process; None where it is not there."""
    try:
        return parse_stat((_PROC / str(pid) / "stat").read_text())
    except OSError:
        return None


def living() -> Iterator[tuple[int, Stat]]:
    """Give each process that lives, with its facts."""
    for pid in _all():
        stat = read_stat(pid)
        if stat is not None and not stat.has_ended:
            yield pid, stat


def _all() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal())


def session_of(pid: int) -> set[int]:
    """Return the living processes of the session that `pid` leads or led: also orphans."""
    return {one for one, stat in living() if stat.session == pid}


def mentioning(*texts: str) -> set[int]:
    """Return the processes, without this one, in whose command lines all these texts stand."""
    lines = {pid: _command_line(pid) for pid in _all() if pid != os.getpid()}
    return {pid for pid, line in lines.items() if all(text in line for text in texts)}


def _command_line(pid: int) -> str:
    """Return the words of a command line with NUL between them; nothing where the process has ended."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def children_of(pid: int) -> set[int]:
    """Return the children of a process, also those that it has not waited for; none where it has ended itself."""
    found: set[int] = set()
    for file in _PROC.glob(f"{pid}/task/*/children"):
        with suppress(OSError):
            found.update(map(int, file.read_text().split()))
    return found


def workers_of(supervisor: int) -> set[int]:
    """Return the workers of a proxy; those that have ended are none."""
    return {child for child in children_of(supervisor) if _WORKER in _command_line(child)}


def zombies_of(pid: int) -> set[int]:
    """Return the children of a process that have ended and that it has not waited for."""
    stats = {child: read_stat(child) for child in children_of(pid)}
    return {child for child, stat in stats.items() if stat is not None and stat.has_ended}


# What they hold and spend


def parse_status(text: str, name: str) -> int:
    """Return a size (KiB) in the text of /proc/PID/status; 0 if it is not there, as for a process that ended."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) if match else 0


def memory_kib(pid: int, name: str = "VmRSS") -> int:
    """Return a figure (KiB) of the memory of a process: VmRSS is what it has now, VmHWM the most that it had."""
    kib = parse_status((_PROC / str(pid) / "status").read_text(), name)
    assert kib, f"no {name} of process {pid}"
    return kib


def forget_peak(pid: int) -> None:
    """Let VmHWM begin anew at what the process has now."""
    (_PROC / str(pid) / "clear_refs").write_text(_RESET_PEAK)


class Growth:
    """By how much the memory of a process has grown at most since this was made; between two looks, too."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        forget_peak(pid)
        self._began_kib = memory_kib(pid)

    @property
    def kib(self) -> int:
        return memory_kib(self._pid, "VmHWM") - self._began_kib


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open; raise OSError where it has ended."""
    return len(list((_PROC / str(pid) / "fd").iterdir()))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used, in itself and in the kernel; in steps of 10 ms."""
    after_name = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    utime, stime = after_name[11:13]  # fields 14 and 15 of proc(5), of which two stand before
    return (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")


# Whose connections they have


class Socket(NamedTuple):
    """A TCP socket of this machine: what holds it is known by its inode."""

    inode: str
    remote_port: int
    state: str


def parse_tcp(text: str, port: int) -> list[Socket]:
    """Return the sockets whose local port is `port`, in the text of /proc/net/tcp."""
    found = []
    for line in text.splitlines()[1:]:
        _, local, remote, state, _, _, _, _, _, inode = line.split()[:10]
        if int(local.rpartition(":")[2], 16) == port:
            found.append(Socket(inode, int(remote.rpartition(":")[2], 16), state))
    return found


def sockets_on(port: int) -> list[Socket]:
    """Return the sockets of this machine whose local port is `port`."""
    return parse_tcp((_PROC / "net" / "tcp").read_text(), port)


def inodes_of(pid: int) -> set[str]:
    """Return the inodes of the sockets of a process; none if it has ended."""
    inodes = set()
    with suppress(OSError):
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                if match := _SOCKET.fullmatch(str(entry.readlink())):
                    inodes.add(match[1])
    return inodes


def ports_held(pid: int, port: int) -> set[int]:
    """Return the clients' ports of the connections that a process has accepted on a port of 127.0.0.1.

    A connection that several processes hold is of all of them.
    """
    inodes = inodes_of(pid)
    return {one.remote_port for one in sockets_on(port) if one.state == ESTABLISHED and one.inode in inodes}


def listens(pid: int, port: int) -> bool:
    """Say whether a process holds a listening socket of this port of 127.0.0.1."""
    inodes = inodes_of(pid)
    return any(one.state == LISTENING and one.inode in inodes for one in sockets_on(port))
