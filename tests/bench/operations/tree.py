"""The proxy's processes, read from /proc: the supervisor, its workers, and whatever else it has left in its session."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.process import parse_pss_kib, process_tree

_PROC: Final = Path("/proc")
WORKER: Final = "stickyproxy.control.worker_process"  # stands in the command line of a worker
_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")
_ESTABLISHED: Final = "01"
_LISTENING: Final = "0A"


@dataclass(frozen=True)
class Footprint:
    """What the processes of a session hold."""

    processes: int
    pss_kib: int
    descriptors: int


def session_of(pid: int) -> set[int]:
    """Return the living processes of the session that `pid` leads or led, zombies left out: also orphans."""
    found = set()
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                # After the name in parentheses: state, parent, group, session.
                state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
                if int(session) == pid and state != "Z":
                    found.add(int(entry.name))
    return found


def workers_of(pid: int) -> set[int]:
    """Return the workers among the descendants of a supervisor."""
    found = set()
    for one in process_tree(pid)[1:]:
        with suppress(OSError):
            if WORKER.encode() in (_PROC / str(one) / "cmdline").read_bytes():
                found.add(one)
    return found


def parse_busy_s(text: str) -> float:
    """Return the seconds in which the cores of the machine did something, of the text of /proc/stat."""
    user, nice, system, _, _, interrupts, soft_interrupts = map(int, text.split(maxsplit=8)[1:8])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Return the seconds in which the cores of this machine did something since it runs."""
    return parse_busy_s((_PROC / "stat").read_text())


def footprint(pid: int) -> Footprint:
    """Return what all processes of the session hold that `pid` leads."""
    processes = session_of(pid)
    pss_kib = descriptors = 0
    for one in processes:
        with suppress(OSError):  # it ended meanwhile
            pss_kib += parse_pss_kib((_PROC / str(one) / "smaps_rollup").read_text())
            descriptors += len(list((_PROC / str(one) / "fd").iterdir()))
    return Footprint(len(processes), pss_kib, descriptors)


def ports_held(pid: int, listening: int) -> set[int]:
    """Return the clients' ports of the connections that a process has accepted on a port of 127.0.0.1.

    A connection that several processes hold is of all of them.
    """
    return parse_ports((_PROC / "net" / "tcp").read_text(), listening, _sockets_of(pid), _ESTABLISHED)


def listens(pid: int, port: int) -> bool:
    """Say whether a process holds a listening socket of this port of 127.0.0.1."""
    return bool(parse_ports((_PROC / "net" / "tcp").read_text(), port, _sockets_of(pid), _LISTENING))


def _sockets_of(pid: int) -> set[str]:
    """Return the inodes of the sockets of a process; none if it has ended."""
    inodes = set()
    with suppress(OSError):
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                match = _SOCKET.fullmatch(str(entry.readlink()))
                if match:
                    inodes.add(match[1])
    return inodes


def parse_ports(table: str, listening: int, inodes: set[str], wanted: str) -> set[int]:
    """Return the remote ports of the sockets with these inodes and this state in the text of /proc/net/tcp."""
    found = set()
    for line in table.splitlines()[1:]:
        _, local, remote, state, _, _, _, _, _, inode = line.split()[:10]
        if state == wanted and inode in inodes and int(local.partition(":")[2], 16) == listening:
            found.add(int(remote.partition(":")[2], 16))
    return found
