"""The program of the warden: it ends the app processes when the supervisor is gone, however that came.

It reads from its standard input, a pipe that nobody but the supervisor writes to:

    +<group> <signal> <timeout in seconds>     there is such a process group; this is how it is ended
    -<group>                                   it has ended

End of file says that the supervisor is gone, or has no more use for a warden: each group that is left gets its signal,
and SIGKILL after its timeout. Nothing else ends the warden but SIGKILL. It imports nothing that is not needed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Final, NamedTuple

_IGNORED: Final = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "SIGTSTP")
_CHUNK_BYTES: Final = 65536
_LOOK_S: Final = 0.05  # no event tells that a group of foreign processes has ended
_KILL_S: Final = 2.0  # for the system to end what got SIGKILL; a zombie that nobody waits for stays for ever


class Ending(NamedTuple):
    """How a group is ended: the number of the signal, and the seconds until SIGKILL."""

    signal: int
    timeout_s: float


def main() -> int:
    """Read until the supervisor is gone, then end what it has left."""
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setsid()
    os.closerange(1, 3)  # the terminal and the log of the supervisor end with it
    os.chdir("/")
    end(read_groups(0))
    return 0


def read_groups(descriptor: int) -> dict[int, Ending]:
    """Read until end of file; return the groups that are left."""
    groups: dict[int, Ending] = {}
    rest = b""
    while data := os.read(descriptor, _CHUNK_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            follow(groups, line)
    return groups


def follow(groups: dict[int, Ending], line: bytes) -> None:
    """Do what a line says to the groups; one of another version that cannot be read changes nothing."""
    with suppress(ValueError):
        if line.startswith(b"+"):
            group, number, timeout_s = line[1:].split()
            if int(group) > 1:  # 0 and 1 mean others than a group
                groups[int(group)] = Ending(int(number), float(timeout_s))
        elif line.startswith(b"-"):
            groups.pop(int(line[1:]), None)


def end(groups: dict[int, Ending]) -> None:
    """End groups, each in its way; return when all are gone, or got SIGKILL a while ago."""
    deadlines = {}
    for group, how in groups.items():
        send(group, how.signal)
        send(group, signal.SIGCONT)  # a stopped process notices no other signal
        deadlines[group] = time.monotonic() + how.timeout_s
    killed: set[int] = set()
    while deadlines:
        for group, deadline in list(deadlines.items()):
            if not send(group, 0):
                del deadlines[group]
            elif time.monotonic() >= deadline:
                if group in killed:
                    del deadlines[group]
                    continue
                send(group, signal.SIGKILL)
                killed.add(group)
                deadlines[group] = time.monotonic() + _KILL_S
        if deadlines:
            time.sleep(_LOOK_S)


def send(group: int, number: int) -> bool:
    """Send a signal to a group, none with number 0; say whether there is such a group."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's now, or the number is none of a signal
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
