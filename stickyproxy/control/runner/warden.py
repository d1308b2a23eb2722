"""The warden as the supervisor sees it: the process that ends the app processes when the supervisor is gone.

SIGKILL and a crash leave the supervisor no time to end anything, and the app processes would go on with nobody before
them. The warden is told of each before its app begins to run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.control.pidfd import Watch, describe
from stickyproxy.control.runner.program import start_program
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_AGAIN_S: Final = 1.0  # between two wardens, where the first one ended at once
_PROGRAM: Final = "warden_process.py"


@dataclass(slots=True)
class _Process:
    """One warden process; `pipe` is None once it is to end."""

    watch: Watch
    pipe: int | None
    ended: asyncio.Future[None]
    is_old: Callable[[], bool]
    """Whether it has lived for some time: the next one will, too."""

    def close(self) -> None:
        """Let it end."""
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None


class Warden:
    """One warden at any time, from `start` or `adopt` until `stop` or `leave`; one that dies is replaced.

    `add` and `remove` never fail: what one warden was not told, the next one is.
    """

    def __init__(self) -> None:
        self._groups: dict[int, tuple[int, float]] = {}
        self._process: _Process | None = None
        self._again: asyncio.TimerHandle | None = None

    @property
    def process_id(self) -> int | None:
        """The process id of the warden; None while there is none."""
        return None if self._process is None else self._process.watch.process_id

    async def start(self) -> None:
        """Start the process; raise UsageError where the system cannot."""
        self._start()

    def _start(self) -> None:
        """Start a process, and tell it of all groups."""
        theirs, ours = os.pipe()
        try:
            process_id = start_program(_PROGRAM, [], os.environ, {0: theirs})
        except (OSError, ValueError) as error:
            os.close(ours)
            raise UsageError(f"cannot start the warden of the app processes: {error}") from error
        finally:
            os.close(theirs)
        self._follow(process_id, ours, asyncio.get_running_loop().time())
        for group in self._groups:
            self._tell_of(group)

    def _follow(self, process_id: int, pipe: int, started_at: float) -> None:
        os.set_inheritable(pipe, False)  # any other process that had it would keep the end from being seen
        os.set_blocking(pipe, False)
        loop = asyncio.get_running_loop()
        watch = Watch(process_id, lambda status: self._on_end(process, status))
        process = _Process(watch, pipe, loop.create_future(), lambda: loop.time() - started_at > _AGAIN_S)
        self._process = process

    def _on_end(self, process: _Process, status: int | None) -> None:
        """Take note that a warden has ended, and have another one, unless this one was to end."""
        process.ended.set_result(None)
        is_accident = process.pipe is not None
        process.close()
        if process is self._process:
            self._process = None
            if is_accident:
                logger.warning("the warden of the app processes has ended (%s) and is replaced", describe(status))
                self._start_again(at_once=process.is_old())

    def _start_again(self, *, at_once: bool) -> None:
        if self._again is not None:
            self._again.cancel()
        self._again = None
        if not at_once:
            self._again = asyncio.get_running_loop().call_later(_AGAIN_S, partial(self._start_again, at_once=True))
            return
        try:
            self._start()
        except UsageError as error:
            logger.warning("%s; until there is one, app processes outlive a proxy that is killed", error)
            self._start_again(at_once=False)

    def add(self, group: int, number: int, timeout_s: float) -> None:
        """Have a process group ended, should this process be gone: by signal `number`, by SIGKILL after `timeout_s`."""
        self._groups[group] = (int(number), timeout_s)
        self._tell_of(group)

    def remove(self, group: int) -> None:
        """Leave a process group alone from now on: it has ended."""
        if self._groups.pop(group, None) is not None:
            self._tell(f"-{group}\n")

    def _tell_of(self, group: int) -> None:
        number, timeout_s = self._groups[group]
        self._tell(f"+{group} {number} {timeout_s:g}\n")

    def _tell(self, line: str) -> None:
        """Write a line, which the pipe takes whole or not at all; a warden that takes none is replaced."""
        process = self._process
        if process is None or process.pipe is None:  # the next one is told all
            return
        try:
            os.write(process.pipe, line.encode())
        except OSError as error:  # it has ended, which was not seen yet, or it reads no more
            logger.warning("the warden of the app processes takes no word (%s) and is replaced", error)
            self._process = None
            process.close()
            with suppress(ProcessLookupError):
                os.kill(process.watch.process_id, signal.SIGKILL)
            self._start_again(at_once=process.is_old())

    async def stop(self) -> None:
        """Let the warden end, and wait for it; groups that are left it ends first."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        process, self._process = self._process, None
        if process is not None:
            process.close()
            await asyncio.shield(process.ended)

    def leave(self) -> dict[str, Any]:
        """Part from the process without ending it; return, as JSON, what another image of this one needs to go on.

        Its pipe stays open over the execution, and must not get into any other process until then.
        """
        groups = [[group, number, timeout_s] for group, (number, timeout_s) in self._groups.items()]
        state: dict[str, Any] = {"process_id": None, "pipe": None, "groups": groups}
        if self._again is not None:
            self._again.cancel()
            self._again = None
        process, self._process = self._process, None
        if process is not None and process.pipe is not None:
            process.watch.close()
            os.set_inheritable(process.pipe, True)
            state |= {"process_id": process.watch.process_id, "pipe": process.pipe}
        return state

    async def adopt(self, state: Mapping[str, Any]) -> None:
        """Go on from what `leave` returned, instead of `start`; with another warden where there was none.

        Raises UsageError where there was none, and the system can start none.
        """
        self._groups |= {int(group): (int(number), float(timeout_s)) for group, number, timeout_s in state["groups"]}
        process_id, pipe = state.get("process_id"), state.get("pipe")
        if process_id is None or pipe is None:
            self._start()
        else:
            self._follow(int(process_id), int(pipe), -math.inf)

    @override
    def __repr__(self) -> str:
        return f"<Warden pid={self.process_id} groups={len(self._groups)}>"
