"""Orphans that have become children of this process: somebody must wait for them, or they stay as zombies.

That is so where it is process 1, as in a container, or has asked for them (`PR_SET_CHILD_SUBREAPER`).
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stickyproxy.control.pidfd import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_PR_GET_CHILD_SUBREAPER: Final = 37  # linux/prctl.h


def gets_orphans() -> bool:
    """Say whether the orphans among the descendants of this process become its children."""
    if os.getpid() == 1:
        return True
    is_set = ctypes.c_int()
    try:
        failed = ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_set), 0, 0, 0)
    except (AttributeError, OSError):  # no Linux
        return False
    return not failed and bool(is_set.value)


class Reaper:
    """Waits for orphans, on the running loop, from `start` to `stop`.

    `list_known` gives the ids of children that others wait for, who need their exit status. Whoever is not among them,
    as asyncio itself, has a second for it: only what has ended at two looks is taken for an orphan.
    """

    def __init__(self, list_known: Callable[[], Collection[int | None]]) -> None:
        self._list_known = list_known
        self._seen: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look once a second from now on, if there can be orphans."""
        if gets_orphans():
            self._look_later()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._look_later()
        self.look()

    def look(self) -> list[int]:
        """Wait for the children that had ended at the last look too, and that nobody knows; return their ids."""
        ended = _find_ended()
        if ended:
            ended.difference_update(self._list_known())
        reaped = []
        for process_id in sorted(ended & self._seen):
            with suppress(ChildProcessError):
                _, status = os.waitpid(process_id, os.WNOHANG)
                logger.debug("waited for the orphan with process id %d: %s", process_id, describe(status))
                reaped.append(process_id)
        self._seen = ended.difference(reaped)
        return reaped

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _find_ended() -> set[int]:
    """Return the children that have ended and that nobody has waited for; one of them, where the system lists none."""
    children = _list_children()
    if children is not None:
        return {one for one in children if _has_ended(os.P_PID, one)}
    found = _has_ended(os.P_ALL, 0)
    return {found} if found else set()


def _list_children() -> set[int] | None:
    """Return the process ids of the children; None where the system does not list them."""
    try:
        listed = [file.read_text() for file in Path("/proc/self/task").glob("*/children")]
    except OSError:
        return None
    return {int(one) for text in listed for one in text.split()} if listed else None


def _has_ended(kind: int, process_id: int) -> int:
    """Return the id of a child that has ended, which stays as it is; 0 if there is none."""
    try:
        found = os.waitid(kind, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 0 if found is None else found.si_pid
