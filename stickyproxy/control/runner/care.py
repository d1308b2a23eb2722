"""Looks after the app processes: replaces those that are too large or too old, and adapts their number to the load."""

from __future__ import annotations

import asyncio
import logging
from random import SystemRandom
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from stickyproxy.control.runner.runner import Runner
    from stickyproxy.control.runner.seat import Seat

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0
_SHRINK_AFTER_S: Final = 60.0  # with room for the sessions of one process less, all the while
_ROOM_PART: Final = 0.8  # of what the others are wanted to hold
_AFTER_FAILURE_S: Final = 60.0  # before another replacement is tried, where one did not start
_GROWN_AFTER_S: Final = 10.0  # a process that is too large sooner has not grown, it is so
_AGE_JITTER: Final = 0.1  # so that processes of one age are not all replaced at once


class Care:
    """Looks each second. One process is replaced at a time, and only once its replacement is ready."""

    def __init__(self, host: Runner) -> None:
        self._host = host
        self._looking: asyncio.Task[None] | None = None
        self._replaced: tuple[Seat, Seat] | None = None
        self._not_before = 0.0
        self._is_warned = False
        self._roomy_since: float | None = None
        self._jitter: dict[str, float] = {}
        self._random = SystemRandom()

    def start(self) -> None:
        """Begin to look."""
        self._looking = spawn(self._keep_looking(), "care for app processes")

    def stop(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                self._look()
            except UsageError as error:  # an upgrade or a deploy is under way: later
                logger.debug("not now: %s", error)

    def _look(self) -> None:
        host = self._host
        if host.is_turning:
            return
        host.resize_if_due()
        host.live_reload.deploy_if_due()
        self._recycle()
        self._adapt()

    def _recycle(self) -> None:
        """Replace a process that has grown too large or too old."""
        host = self._host
        if self._replaced is not None:
            old, new = self._replaced
            if not new.first.done():
                return
            if new.first.result() and host.now < self._not_before:
                return
            if not new.first.result() and not old.ended.done():
                return  # it drains: where several grow, memory is short already
        for seat in host.serving:
            reason = self._find_reason(seat) if seat.state == "ready" else ""
            if reason:
                logger.info("app process %s is replaced: %s", seat.id, reason)
                self._replaced = seat, host.replace(seat)
                self._not_before = host.now + _AFTER_FAILURE_S
                return

    def _find_reason(self, seat: Seat) -> str:
        host, settings = self._host, self._host.settings
        if settings.max_age_s is not None and seat.process is not None:
            jitter = self._jitter.setdefault(seat.id, self._random.uniform(1 - _AGE_JITTER, 1.0))
            if host.now - seat.process.started_at > settings.max_age_s * jitter:
                return "it has run for long enough"
        if settings.max_memory_bytes is not None:
            usage = host.measure(seat)
            if usage is not None and usage.memory_bytes > settings.max_memory_bytes:
                if host.now - seat.ready_at >= _GROWN_AFTER_S:
                    return f"it uses {usage.memory_bytes >> 20} MiB of memory"
                self._warn(seat, usage.memory_bytes)
        return ""

    def _warn(self, seat: Seat, memory_bytes: int) -> None:
        """Say once that another process would not help."""
        if not self._is_warned:
            self._is_warned = True
            logger.warning(
                "app process %s uses %d MiB of memory from its start on: max_memory is less than the app needs",
                seat.id,
                memory_bytes >> 20,
            )

    def _adapt(self) -> None:
        """Have one process more where all are full, one less where the others have room for long enough."""
        host, wanted = self._host, self._host.settings.processes
        if wanted.sessions_each is None:
            return
        serving = host.serving
        drained = {name for name, state in host.admin_states.items() if state is not AdminState.READY}
        sessions = [host.count_sessions(seat) for seat in serving if seat.id not in drained]
        is_settled = len(serving) == host.processes and all(seat.state == "ready" for seat in serving)
        is_full = min(sessions, default=0) >= wanted.sessions_each
        room = (len(serving) - 1) * wanted.sessions_each * _ROOM_PART
        if not (is_settled and host.processes > wanted.min and sum(sessions) <= room):
            self._roomy_since = None
        elif self._roomy_since is None:
            self._roomy_since = host.now
        if is_settled and is_full and host.processes < wanted.max:
            host.scale(host.processes + 1)
        elif self._roomy_since is not None and host.now - self._roomy_since >= _SHRINK_AFTER_S:
            self._roomy_since = None
            host.scale(host.processes - 1)

    @override
    def __repr__(self) -> str:
        return f"<Care of {self._host}>"
