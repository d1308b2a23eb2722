"""All processes that came of one proxy, those too that outlived their parent, and which of them holds which connection.

They are found by the session that each child begins (`start_new_session`), and by that of the process which a pid
file names: nginx goes to the background in a session of its own, as it must to be upgraded, and what it starts for an
upgrade is no descendant of anything once the old process has gone.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.bench.process import own_pss_kib
from tests.helpers.proc import LISTENING, inodes_of, living, read_stat, sockets_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from tests.helpers.processes import Child, Children

_END_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.02


class Usage(NamedTuple):
    """How many processes there are, and their memory; pages that they share are counted once."""

    processes: int
    kib: int


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
        found = {pid: stat.session for pid, stat in living() if stat.session in self._sessions}
        # The id of a session without a member may be given to a stranger.
        self._sessions = set(found.values()) | {child.pid for child in self._started if child.is_running()}
        return sorted(found)

    def _read_pid_file(self) -> set[int]:
        """Return the session of the process in the background, if it has begun one."""
        if self._pid_file is None:
            return set()
        with suppress(OSError, ValueError):  # not written yet
            pid = int(self._pid_file.read_text())
            stat = read_stat(pid)
            if stat is not None and (stat.session == pid or stat.session in self._sessions):
                return {stat.session}
        return set()

    def usage(self) -> Usage:
        pids = self.pids()
        return Usage(len(pids), sum(map(own_pss_kib, pids)))

    def holders(self, port: int) -> dict[int, int]:
        """Return which process holds each connection that was accepted on `port`: the client's port to a pid."""
        clients = {one.inode: one.remote_port for one in sockets_on(port) if one.state != LISTENING}
        return {clients[inode]: pid for pid in self.pids() for inode in inodes_of(pid) if inode in clients}

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


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
