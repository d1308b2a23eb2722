"""The end of child processes: seen on the loop, which has SIGCHLD for itself, and put into words."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOK_S: Final = 0.1


class Watch:
    """A child that is waited for on the running loop.

    `on_end` is called once, when it has ended, with its wait status; None where somebody else has waited for it.
    """

    def __init__(self, process_id: int, on_end: Callable[[int | None], None]) -> None:
        self.process_id = process_id
        self.has_ended = False
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self._descriptor = _open(process_id)
        if self._descriptor is None:
            self._look_later()
        else:
            asyncio.get_running_loop().add_reader(self._descriptor, self.look)

    def _look_later(self) -> None:
        """Look again and again whether the process has ended, where the system does not tell."""
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def _look_again(self) -> None:
        if not self.look():
            self._look_later()

    def look(self) -> bool:
        """Take note of the end of the process, if it has ended; say whether it has."""
        if self.has_ended:
            return True
        try:
            process_id, status = os.waitpid(self.process_id, os.WNOHANG)
        except ChildProcessError:  # it was somebody else's child, or was waited for already
            process_id, status = 0 if is_alive(self.process_id) else self.process_id, None
        if not process_id:
            return False
        self.has_ended = True
        self.close()
        self._on_end(status)
        return True

    def close(self) -> None:
        """Watch no more, for instance because another image of this process goes on to."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def _open(process_id: int) -> int | None:
    """Return a descriptor that can be read once the process has ended; None where there is no such thing."""
    try:
        return os.pidfd_open(process_id)
    except (AttributeError, OSError):  # no Linux, or one before 5.3
        return None


def is_alive(process_id: int) -> bool:
    """Say whether there is such a process; one that has ended and that nobody has waited for is one."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def describe(status: int | None) -> str:
    """Return in words how a process ended; `status` is what `os.waitpid` gave, or None."""
    if status is None:
        return "unknown how: somebody else has waited for it"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
