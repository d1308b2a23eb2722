"""One upstream of the runner through all its lives: started, ready, crashed, started again, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast

from typing_extensions import override

from stickyproxy.affinity.snapshot import upstream_digest
from stickyproxy.config import Upstream
from stickyproxy.control.runner.app_process import AppProcess
from stickyproxy.control.runner.command import Values, make_command
from stickyproxy.control.runner.readiness import NotReadyError, wait_until_ready
from stickyproxy.errors import UsageError
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stickyproxy.control.runner.places import Place
    from stickyproxy.control.runner.runner import Runner

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "stopping", "waiting", "ended"]

_BACK_OFF_S: Final = (0.1, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_S: Final = 30.0  # ready for so long, and the next crash is a first one again
_LOOPING: Final = 4  # crashes in a row after which it is said what to do
_TOLD_LINES: Final = 10


class Seat:
    """What the runner keeps an app process in. `first` tells, once, that it is ready ("") or why it is not.

    One that is `held` serves nobody when it is ready, until `serve` is called, and is not started again when that
    never comes. `ended` is done when no process of it is left and none will be started.
    """

    def __init__(self, host: Runner, generation: int, number: int, *, is_held: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self._host = host
        self.generation = generation
        self.number = number
        self.id = f"g{generation}-{number}"
        self.digest = upstream_digest(self.id)
        self.state: State = "starting"
        self.process: AppProcess | None = None
        self._starting: AppProcess | None = None
        self._former: AppProcess | None = None  # its lines may still be asked for
        self.restarts = 0
        self.written = 0
        """Lines of output, of all its processes."""
        self.is_unusable = False
        """Whether the last process could not even be started: the command is wrong."""
        self.is_held = is_held
        self.first: asyncio.Future[str] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._place: Place | None = None
        self.ready_at = 0.0
        """When the process became ready, by the clock of the loop; 0 while it is not."""
        self._is_stopping = False
        self._is_wanted = asyncio.Event()  # at once, whatever the back-off
        self._task: asyncio.Task[None] | None = None

    def start(self) -> Self:
        """Begin; the seat goes on by itself."""
        self._task = spawn(self._keep(), f"app process {self.id}")
        return self

    async def stop(self) -> None:
        """End the process, and do not start another one."""
        self._is_stopping = True
        self._is_wanted.set()
        if self.state != "ended":
            self.state = "stopping"
        if self.process is not None:
            await self.process.stop()
        elif self._task is not None:
            self._task.cancel()
        if self._task is not None:
            await asyncio.wait((self._task,))
        if not self.ended.done():  # a task that is cancelled before its first step does nothing
            self._end()

    def kill(self) -> None:
        """End the process at once, also one that is about to be the app."""
        process = self.process or self._starting
        if process is not None:
            process.kill()

    def serve(self) -> None:
        """Let clients come."""
        self.is_held = False
        if self.state == "ready":
            self._host.add(self, Upstream.model_validate({"id": self.id, "url": self._url}))

    @property
    def _url(self) -> str:
        address = cast("Place", self._place).address  # it is there from the start of a process to its end
        return f"http+unix://{address.path}" if address.is_unix else f"http://{address}"

    async def _keep(self, adopted: AppProcess | None = None) -> None:
        failures = 0
        try:
            while True:
                try:
                    reason = await (self._live() if adopted is None else self._watch(adopted))
                except Exception as error:
                    logger.exception("app process %s cannot be run", self.id)
                    reason = f"it cannot be run: {error!r}"
                    if self.process is not None:
                        await self.process.stop()
                adopted = None
                has_served, lived_s = bool(self.ready_at), self._host.now - self.ready_at
                self._leave_process()
                if self._is_stopping:
                    return
                self._tell(reason)
                if not self.first.done():
                    self.first.set_result(reason)
                if self.is_held or self.state == "draining" or not self._may_start_again():
                    return
                failures = 1 if has_served and lived_s >= _STABLE_S else failures + 1
                self.restarts += 1
                await self._wait(failures)
        finally:
            self._end()

    async def _live(self) -> str:
        """Start a process and stay with it to its end; return how it ended, or why it never served."""
        host = self._host
        run = host.settings
        self.state, self.is_unusable, self.ready_at = "starting", False, 0.0
        try:
            self._place = place = host.places.take(self.id, uses_socket=run.uses_socket)
            values = Values(self.id, self.generation, place.port, place.socket)
            command = make_command(run.command, run.env, run.cwd, values, os.environ)
            process = AppProcess(
                self.id,
                command.words,
                command.env,
                command.cwd,
                host.warden,
                host.on_line,
                host.stop_signal,
                run.stop.timeout_s,
            )
            place.let_go()
            self._starting = process
            await process.start()
        except UsageError as error:
            self.is_unusable = True
            return str(error)
        finally:
            self._starting = None
        self.process = process
        logger.debug("app process %s (pid %d) started", self.id, process.process_id)
        return await self._watch(process)

    async def _watch(self, process: AppProcess) -> str:
        if self.state == "starting":
            address = cast("Place", self._place).address
            try:
                await wait_until_ready(Endpoint(address), self._host.settings.ready, process.ended)
            except NotReadyError as error:
                await process.stop()
                return f"it does not get ready: {error}"
            if self._is_stopping:
                return await process.ended
            self.state, self.ready_at = "ready", self._host.now
            if not self.is_held:
                self.serve()
            if not self.first.done():
                self.first.set_result("")
            logger.info("app process %s (pid %d) is ready at %s", self.id, process.process_id, address)
        return await asyncio.shield(process.ended)

    def _leave_process(self) -> None:
        """Nobody is to come to where the process was."""
        if not self._is_stopping:
            self._host.report_gone(self)
        self._former, self.process = self.process, None
        self._release()

    def _release(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.release()

    @property
    def last_lines(self) -> list[str]:
        """Return the last lines of output, of the process that ended last where none runs."""
        process = self.process or self._former
        return [] if process is None else list(process.last_lines)

    def _tell(self, reason: str) -> None:
        """Log how the process ended, with its last lines."""
        lines = self.last_lines[-_TOLD_LINES:]
        last = "; its last lines:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
        logger.error("app process %s ended: %s%s", self.id, reason, last)

    def _may_start_again(self) -> bool:
        policy, process = self._host.settings.restart, self._former
        if policy == "on_failure":
            return process is None or process.exit_status != 0
        return policy == "always"

    async def _wait(self, failures: int) -> None:
        """Wait before the next start, longer each time."""
        pause_s = _BACK_OFF_S[min(failures, len(_BACK_OFF_S)) - 1]
        if failures >= _LOOPING:
            logger.error(
                "app process %s has ended %d times in a row; the next try is in %g s. Mend the app or its command, "
                "then: stickyproxy deploy",
                self.id,
                failures,
                pause_s,
            )
        self.state = "waiting"
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._is_wanted.wait()

    def _end(self) -> None:
        self.state = "ended"
        self._release()
        self._host.remove(self)
        if not self.first.done():
            self.first.set_result("it was stopped")
        if not self.ended.done():
            self.ended.set_result(None)

    # Another image of this process

    def leave(self) -> dict[str, Any]:
        """Part from the process without ending it, and return what another image of this one needs to go on."""
        if self._task is not None:
            self._task.cancel()
        if self._starting is not None:  # the other image starts it anew
            self._starting.kill()
            self._host.warden.remove(self._starting.process_id)
        return {
            "generation": self.generation,
            "number": self.number,
            "state": self.state,
            "restarts": self.restarts,
            "is_held": self.is_held,
            "place": None if self._place is None else self._place.leave(),
            "process": None if self.process is None else self.process.leave(),
        }

    @classmethod
    def adopt(cls, host: Runner, left: Mapping[str, Any]) -> Self:
        """Return the seat that a former image has left, and go on with it."""
        seat = cls(host, int(left["generation"]), int(left["number"]), is_held=bool(left["is_held"]))
        seat.restarts = int(left["restarts"])
        adopted = None
        if left["process"] is not None and left["place"] is not None:
            seat.state = left["state"]
            seat._place = host.places.adopt(seat.id, left["place"])
            adopted = seat.process = AppProcess.adopt(left["process"], host.warden, host.on_line)
            if seat.state != "starting":
                seat.ready_at = host.now
                seat.first.set_result("")
        seat._task = spawn(seat._keep(adopted), f"app process {seat.id}")
        if seat.state == "stopping":
            spawn(seat.stop(), f"stop app process {seat.id}")
        return seat

    @override
    def __repr__(self) -> str:
        return f"<Seat {self.id} {self.state}>"
