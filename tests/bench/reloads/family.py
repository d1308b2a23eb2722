"""All processes that came of one proxy, those too that outlived their parent, and which of them holds which connection.

They are found by the session that each child begins (`start_new_session`), and by that of the process which a pid
file names: nginx goes to the background in a session of its own, as it must to be upgraded, and what it starts for an
upgrade is no descendant of anything once the old process has gone.
"""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.bench.process import parse_pss_kib

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tests.helpers.processes import Child, Children

_PROC: Final = Path("/proc")
_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")
_LISTENING: Final = "0A"
_ENDED: Final = frozenset("ZX")
_END_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.02


class Usage(NamedTuple):
    """How many processes there are, and their memory; pages that they share are counted once."""

    processes: int
    kib: int


def parse_stat(text: str) -> tuple[str, int]:
    """Return the state and the session of a process, from /proc/PID/stat."""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[3])


def parse_tcp(text: str, port: int) -> dict[str, int]:
    """Return what /proc/net/tcp says of the connections that were accepted on `port`: inode to the client's port."""
    found = {}
    for line in text.splitlines()[1:]:
        fields = line.split()
        local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
        if local == port and fields[3] != _LISTENING:
            found[fields[9]] = remote
    return found


class Family:
    """The processes of one proxy; `start` may be called again when the first has ended."""

    def __init__(
        self,
        children: Children,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        pid_file: Path | None = None,
    ) -> None:
        self._children, self._name, self._command, self._env = children, name, command, env
        self._pid_file = pid_file
        self._started: list[Child] = []
        self._sessions: set[int] = set()  # that have, or may still get, a member

    def start(self) -> None:
        """Start it, at first or once more."""
        self._started.append(self._children.start(self._name, self._command, self._env))
        self._sessions.add(self.main.pid)

    @property
    def main(self) -> Child:
        """Return the child that was started last."""
        return self._started[-1]

    def pids(self) -> list[int]:
        """Return the processes that live, in the order of their ids."""
        self._sessions |= self._read_pid_file()
        found: dict[int, int] = {}  # to the session
        for entry in _PROC.iterdir():
            if not entry.name.isdecimal():
                continue
            with suppress(OSError):  # it ended meanwhile
                state, session = parse_stat((entry / "stat").read_text())
                if state not in _ENDED and session in self._sessions:
                    found[int(entry.name)] = session
        # The id of a session without a member may be given to a stranger.
        self._sessions = set(found.values()) | {child.pid for child in self._started if child.is_running()}
        return sorted(found)

    def _read_pid_file(self) -> set[int]:
        """Return the session of the process in the background, if it has begun one."""
        if self._pid_file is None:
            return set()
        with suppress(OSError, ValueError):  # not written yet, or its process has ended
            pid = int(self._pid_file.read_text())
            _, session = parse_stat((_PROC / str(pid) / "stat").read_text())
            return {session} if session == pid or session in self._sessions else set()
        return set()

    def usage(self) -> Usage:
        pids = self.pids()
        total_kib = 0
        for pid in pids:
            with suppress(OSError):
                total_kib += parse_pss_kib((_PROC / str(pid) / "smaps_rollup").read_text())
        return Usage(len(pids), total_kib)

    def holders(self, port: int) -> dict[int, int]:
        """Return which process holds each connection that was accepted on `port`: the client's port to a pid."""
        clients = parse_tcp((_PROC / "net" / "tcp").read_text(), port)
        held = {}
        for pid in self.pids():
            for inode in _socket_inodes(pid):
                if inode in clients:
                    held[clients[inode]] = pid
        return held

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each of the processes."""
        _signal(self.pids(), number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End all of them; what is left after 15 s is killed."""
        self.send(number)
        deadline = time.monotonic() + _END_TIMEOUT_S
        while pids := self.pids():
            for child in self._started:
                child.is_running()  # so that it is no zombie
            if time.monotonic() > deadline:
                _signal(pids, signal.SIGKILL)
            time.sleep(_POLL_S)
        for child in self._started:
            child.wait()
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)


def _socket_inodes(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with suppress(OSError):
                if match := _SOCKET.fullmatch(str(Path(entry.path).readlink())):
                    found.append(match[1])
    return found


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
