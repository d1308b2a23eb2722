"""A deploy: another generation of app processes beside the one that serves, then in its place."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from typing_extensions import override

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.control.runner.retirement import Retirement
from stickyproxy.errors import StickyproxyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stickyproxy.control.runner.runner import Runner
    from stickyproxy.control.runner.seat import Seat

logger = logging.getLogger(__name__)

_LAST_LINES: Final = 20


class DeployError(StickyproxyError):
    """The new generation cannot serve; the text says why, `last_lines` are what the process has said."""

    def __init__(self, reason: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.last_lines = tuple(last_lines)


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """How a deploy is done.

    The old generation is closed after `drain_timeout_s` seconds (None: never), `pace_per_s` clients in a second;
    `surge` processes start at a time (0: all at once); for `watch_s` seconds a crash takes the new generation back.
    """

    drain_timeout_s: float | None
    pace_per_s: float
    surge: int = 1
    watch_s: float = 10.0


class Deploy:
    """One deploy, from its start to the end of the old generation; `run` does it all and never raises."""

    def __init__(self, host: Runner, number: int, options: DeployOptions) -> None:
        self._host = host
        self.number = number
        self.options = options
        self.generation = host.generation + 1
        self.state: Literal["starting", "watching", "draining", "ok", "failed"] = "starting"
        self._reason = ""
        self._last_lines: tuple[str, ...] = ()
        self._processes = host.processes
        self._new: list[Seat] = []
        self._given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._states_before: dict[str, AdminState] = {}  # of the old generation, as operators wanted it
        self.retirement: Retirement | None = None
        """That of the old generation, once the new one serves."""
        self._began_at = host.now
        self._first_sessions = 0

    @property
    def is_turning(self) -> bool:
        """Say whether it is not decided yet which generation will serve."""
        return self.state in {"starting", "watching"}

    def give_up(self, reason: str) -> bool:
        """Take the new generation back before it serves; say whether there was still time for that.

        It is over, as a deploy that has failed, when the processes that were started for it have ended.
        """
        if self.state == "starting" and not self._given_up.done():
            self._given_up.set_result(reason)
        return self._given_up.done()

    @property
    def status(self) -> dict[str, Any]:
        """Return how it stands, as JSON."""
        return {
            "number": self.number,
            "generation": self.generation,
            "state": self.state,
            "reason": self._reason,
            "ready": sum(seat.state == "ready" for seat in self._new),
            "processes": self._processes,
            "sessions_left": 0 if self.retirement is None else self.retirement.sessions_left,
            "eta_s": self._eta_s,
            "last_lines": list(self._last_lines),
        }

    @property
    def _eta_s(self) -> float | None:
        """Return in how many seconds the last session has ended, if it goes on so; at most to the drain timeout."""
        if self.retirement is None or self.state != "draining":
            return None
        left, now = self.retirement.sessions_left, self._host.now
        ended, passed_s = self._first_sessions - left, now - self._began_at
        at_pace_s = left * passed_s / ended if ended > 0 else math.inf
        eta_s = min(at_pace_s, max(0.0, self.retirement.close_at - now) + left / self.options.pace_per_s)
        return None if math.isinf(eta_s) else round(eta_s, 1)

    async def run(self) -> None:
        """Start the new generation, let it serve, and retire the old one; or take it back."""
        host = self._host
        logger.info("deploy: generation %d starts beside generation %d", self.generation, host.generation)
        try:
            await self._start(self._processes)
            self._switch(self._old)
            await self._watch()
        except (DeployError, UsageError) as error:
            await self._take_back(error)
            return
        except Exception as error:
            logger.exception("the deploy crashed")
            await self._take_back(DeployError(f"the deploy crashed: {error!r}"))
            return
        await self.finish(host.make_retirement(self._old, self.options.drain_timeout_s, self.options.pace_per_s))

    @property
    def _old(self) -> tuple[Seat, ...]:
        """Return the seats of former generations that nobody else retires."""
        return tuple(seat for seat in self._host.serving if seat.generation < self.generation)

    async def finish(self, retirement: Retirement) -> None:
        """Retire the old generation: the new one serves."""
        self.state, self._began_at = "draining", self._host.now
        self.retirement, self._first_sessions = retirement, retirement.sessions_left
        logger.info("deploy: generation %d serves; %d sessions are left", self.generation, self._first_sessions)
        await self._host.retire(retirement)
        if self._host.is_stopping:
            return
        self.state = "ok"
        logger.info("deploy: generation %d has taken over from all before", self.generation)

    async def _start(self, count: int) -> None:
        """Start so many processes, and wait until all are ready; raise DeployError."""
        host = self._host
        at_once = self.options.surge or count
        for begin in range(0, count, at_once):
            batch = [host.make(self.generation, is_held=True) for _ in range(min(at_once, count - begin))]
            self._new += batch
            starting: set[asyncio.Future[str]] = {seat.first for seat in batch}
            while starting:
                await asyncio.wait({*starting, self._given_up}, return_when=asyncio.FIRST_COMPLETED)
                self._check()
                starting = {first for first in starting if not first.done()}
        self._check()

    def _check(self) -> None:
        """Raise DeployError where a process of the new generation has ended, or it is given up."""
        if self._given_up.done():
            raise DeployError(self._given_up.result())
        for seat in self._new:
            if seat.first.done() and (seat.first.result() or seat.ended.done() or seat.restarts):
                reason = seat.first.result() or "it crashed"
                raise DeployError(f"{seat.id}: {reason}", seat.last_lines[-_LAST_LINES:])

    def _switch(self, old: Sequence[Seat]) -> None:
        """Send new clients to the new generation."""
        self._states_before = self._host.admin_states
        for seat in self._new:
            seat.serve()
        self._host.drain(old)
        self._host.generation = self.generation
        self.state = "watching"

    async def _watch(self) -> None:
        """Look whether the new generation lives; raise DeployError where it does not."""
        until = self._host.now + self.options.watch_s
        while self._host.now < until:
            await asyncio.sleep(min(0.1, self.options.watch_s))
            self._check()

    async def _take_back(self, error: StickyproxyError) -> None:
        self._reason = str(error)
        self._last_lines = error.last_lines if isinstance(error, DeployError) else ()
        level = logging.INFO if self._given_up.done() else logging.ERROR
        others = "the old one serves on" if self._old else "none serves"
        logger.log(level, "deploy: generation %d is taken back, %s: %s", self.generation, others, error)
        try:
            if self._host.generation == self.generation:
                self._host.generation -= 1
                self._undrain()
            await Retirement(self._host, self._new, 0.0, self.options.pace_per_s).run()
        finally:
            self.state = "failed"

    def _undrain(self) -> None:
        """Let new clients come to the old generation again; what operators have wanted of it, now or before, holds."""
        states = self._host.admin_states
        for seat in self._old:
            was_ready = self._states_before.get(seat.id, AdminState.READY) is AdminState.READY
            if was_ready and states.get(seat.id) is AdminState.DRAIN:
                self._host.set_state(seat, AdminState.READY)

    # Another image of this process

    def leave(self) -> dict[str, Any]:
        """Return what another image of this process needs to go on; there is none while it is turning."""
        return self.status | {"options": asdict(self.options)}

    @classmethod
    def adopt(cls, host: Runner, left: Mapping[str, Any]) -> Self:
        """Return the deploy that a former image has left."""
        deploy = cls(host, int(left["number"]), DeployOptions(**left["options"]))
        deploy.generation, deploy.state = int(left["generation"]), left["state"]
        deploy._reason, deploy._last_lines = str(left["reason"]), tuple(left["last_lines"])
        deploy._processes = int(left["processes"])
        deploy._new = [seat for seat in host.seats.values() if seat.generation == deploy.generation]
        return deploy

    @override
    def __repr__(self) -> str:
        return f"<Deploy {self.number} {self.state}>"
