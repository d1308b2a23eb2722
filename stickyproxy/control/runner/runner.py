"""Runs the app: as many processes of its command as are wanted, each an upstream of the proxy while it is ready."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.control.runner.care import Care
from stickyproxy.control.runner.deploy import Deploy
from stickyproxy.control.runner.live_reload import LiveReload
from stickyproxy.control.runner.output import Output
from stickyproxy.control.runner.places import Places
from stickyproxy.control.runner.reaper import Reaper
from stickyproxy.control.runner.retirement import Retirement
from stickyproxy.control.runner.seat import Seat
from stickyproxy.control.runner.usage import Meter
from stickyproxy.control.runner.warden import Warden
from stickyproxy.errors import AppError, UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stickyproxy.config import Run, Upstream
    from stickyproxy.control.routing import Routing
    from stickyproxy.control.runner.deploy import DeployOptions
    from stickyproxy.control.runner.usage import Usage
    from stickyproxy.control.supervisor import Supervisor

logger = logging.getLogger(__name__)

_SHOWN_LINES: Final = 10
_MEASURED_S: Final = 1.0


class Runner:
    """The app processes of one supervisor, each in a seat.

    `generation` is the one that serves, `processes` how many of it are wanted. `directory` is the runtime directory.
    """

    def __init__(self, supervisor: Supervisor, run: Run, directory: Path) -> None:
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self.settings = run
        self.generation = 1
        self.processes = run.processes.min
        self.seats: dict[str, Seat] = {}
        """All seats that have not ended, by id."""
        self.warden = Warden()
        self.places = Places(run.ports, directory)
        self.deploy: Deploy | None = None
        self._output = Output(sys.stdout)
        self._numbers: defaultdict[int, int] = defaultdict(int)  # the last one given in each generation
        self._retirements: set[Retirement] = set()
        self._care = Care(self)
        self.live_reload = LiveReload(self)
        self._reaper = Reaper(self._list_process_ids)
        self.is_started = False
        """Whether the first processes have been waited for: from then on there are deploys."""
        self.is_stopping = False
        self._resize_to: int | None = None  # as a reload has said, while it cannot be
        self._replaced: dict[Seat, Seat] = {}  # by their replacements, while these are starting
        self._meter = Meter()
        self._usages: dict[int, Usage] = {}
        self._measured_at = 0.0

    # From the start to the end

    async def start(self, stop: asyncio.Event) -> None:
        """Start the processes, and return once the first is ready, or `stop` is set.

        Raises AppError, with nothing left running, where one ends before it is ready, or is not ready in time, and
        UsageError where it cannot be run at all. With live reload, an app that does not start is waited for: it returns
        without one, and the next change of its files is deployed.
        """
        if not (self.settings.uses_port or self.settings.uses_socket):
            logger.warning("the command has neither {port} nor {socket}: it must listen where the variable PORT says")
        await self.warden.start()
        self._reaper.start()
        await self.live_reload.start()
        while not await self._start_first(stop):
            pass
        self.is_started = True
        self._care.start()

    async def _start_first(self, stop: asyncio.Event) -> bool:
        """Start the processes; return True when it need not be done again, as files have changed meanwhile."""
        self.live_reload.take_in()
        seats = [self.make(self.generation) for _ in range(self.processes)]
        others = [spawn(stop.wait(), "a signal to stop"), spawn(self.live_reload.wait(), "a change of files")]
        firsts: list[asyncio.Future[Any]] = [seat.first for seat in seats]
        await asyncio.wait([*others, *firsts], return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            other.cancel()
        if stop.is_set():
            return True
        failed = next((seat for seat in seats if seat.first.done() and seat.first.result()), None)
        if failed is None and any(seat.first.done() for seat in seats):
            return True
        if failed is not None and (failed.is_unusable or not self.live_reload.is_on):
            lines = "".join(f"\n    {line}" for line in failed.last_lines[-_SHOWN_LINES:])
            kind = UsageError if failed.is_unusable else AppError
            raise kind(f"the app does not start: {failed.id}: {failed.first.result()}{lines}")
        await asyncio.gather(*(seat.stop() for seat in seats))
        if failed is not None and not self.live_reload.has_changed:
            reason = failed.first.result()
            logger.error("the app does not start, waiting for a change of its files: %s: %s", failed.id, reason)
            return True
        return False

    async def stop(self) -> None:
        """End all processes."""
        self.is_stopping = True
        self._care.stop()
        await self.live_reload.stop()
        while self.seats:  # some may have been made just now
            await asyncio.gather(*(seat.stop() for seat in tuple(self.seats.values())))
        self._reaper.stop()
        await self.warden.stop()
        self.places.close()
        self._output.close()

    def kill(self) -> None:
        """End all processes at once."""
        for seat in self.seats.values():
            seat.kill()

    @property
    def is_turning(self) -> bool:
        """Say whether a deploy is under way of which it is not decided yet which generation will serve."""
        return self.deploy is not None and self.deploy.is_turning

    def apply(self, run: Run) -> None:
        """Work by other settings: the processes that start from now on do."""
        before, self.settings = self.settings, run
        self.places.ports = run.ports
        self.live_reload.apply(before)
        wanted = min(max(self.processes, run.processes.min), run.processes.max)
        if run.processes != before.processes and wanted != self.processes:
            self._resize_to = wanted
            self.resize_if_due()

    def resize_if_due(self) -> None:
        """Have as many processes as the settings say, where that had to wait for a deploy or an upgrade."""
        if self._resize_to is not None:
            with suppress(UsageError):  # not yet
                self.scale(self._resize_to)

    # What operators ask for

    def begin_deploy(self, options: DeployOptions) -> Deploy:
        """Start a deploy; raise UsageError where that cannot be."""
        if self.is_turning:
            raise UsageError("a deploy is under way already")
        self._check_free()
        number = 1 if self.deploy is None else self.deploy.number + 1
        self.deploy = deploy = Deploy(self, number, options)
        self.live_reload.take_in()
        spawn(deploy.run(), f"deploy {number}").add_done_callback(lambda _: self.live_reload.on_deployed(deploy))
        return deploy

    def scale(self, processes: int) -> None:
        """Have so many processes; those that are too many, the emptiest, drain and end. Raises UsageError."""
        if self.is_turning:
            raise UsageError("a deploy is under way: scale after it")
        self._check_free()
        before, self.processes = self.processes, processes
        self._resize_to = None  # what was said last counts
        logger.info("scaling from %d to %d processes", before, processes)
        serving = self.serving
        for _ in range(processes - len(serving)):
            self.make(self.generation)
        emptiest = sorted(serving, key=lambda seat: (seat.state == "ready", self.count_sessions(seat), -seat.number))
        if len(serving) > processes:
            self.retire_soon(emptiest[: len(serving) - processes])

    def replace(self, seat: Seat) -> Seat:
        """Start another process, and retire the one of a seat once that is ready; return the new seat.

        Raises UsageError where the seat does not serve any more.
        """
        self._check_free()
        if self.is_turning:
            raise UsageError("a deploy is under way: restart it after that")
        if seat not in self.serving or seat in self._replaced:
            raise UsageError(f"{seat.id} is about to end, or does not serve yet")
        new = self.make(seat.generation)
        self._replace_soon(seat, new)
        return new

    def _replace_soon(self, seat: Seat, new: Seat) -> None:
        self._replaced[seat] = new
        spawn(self._replace(seat, new), f"replace {seat.id}")

    async def _replace(self, seat: Seat, new: Seat) -> None:
        reason = await asyncio.shield(new.first)
        del self._replaced[seat]
        if not reason:
            await self.retire(self._make_retirement([seat]))
        elif not (self.is_stopping or self._is_retired(new)):
            logger.error("app process %s stays: %s, its replacement, does not start: %s", seat.id, new.id, reason)
            await new.stop()

    def _is_retired(self, seat: Seat) -> bool:
        return any(seat in one.seats for one in self._retirements)

    def is_retired(self, upstream_id: str) -> bool:
        """Say whether a process is to end: another generation serves, or another process in its place."""
        seat = self.seats.get(upstream_id)
        return seat is not None and (seat.generation != self.generation or self._is_retired(seat))

    def _check_free(self) -> None:
        if self.is_stopping or self._supervisor.is_stopping:
            raise UsageError("the proxy is stopping")
        if self._supervisor.upgrader.is_running:
            raise UsageError("an upgrade is under way")

    # Seats

    @property
    def serving(self) -> tuple[Seat, ...]:
        """Return the seats that serve, or will as soon as they can: those that are neither held nor retired.

        Of one that is being replaced and its replacement, only the former is among them until it is retired.
        """
        starting = set(self._replaced.values())
        return tuple(
            seat
            for seat in self.seats.values()
            if not (seat.is_held or seat in starting or self._is_retired(seat) or seat.state in {"stopping", "ended"})
        )

    def make(self, generation: int, *, is_held: bool = False) -> Seat:
        """Start one more process; raise UsageError where the proxy is stopping."""
        if self.is_stopping:
            raise UsageError("the proxy is stopping")
        self._numbers[generation] += 1
        seat = Seat(self, generation, self._numbers[generation], is_held=is_held)
        self.seats[seat.id] = seat
        return seat.start()

    def remove(self, seat: Seat) -> None:
        """Forget a seat that has ended."""
        self.seats.pop(seat.id, None)
        if seat.id in self._routing.processes and not self.is_stopping:
            self._routing.remove_process(seat.id)

    def add(self, seat: Seat, upstream: Upstream) -> None:
        """Let clients come to a process that is ready; no new ones where another generation serves."""
        self._routing.add_process(upstream)
        if seat.generation < self.generation:
            self.set_state(seat, AdminState.DRAIN)

    def report_gone(self, seat: Seat) -> None:
        """Let nobody wait for a process that has ended."""
        if seat.id in self._routing.processes:
            self._routing.report_gone(seat.id)

    def set_state(self, seat: Seat, state: AdminState) -> None:
        """Say what is wanted of a process, where it is ready."""
        if seat.id in self._routing.processes:
            self._routing.set_admin_state(seat.id, state)

    @property
    def admin_states(self) -> dict[str, AdminState]:
        """Return what is wanted of each process that is ready, by id."""
        return self._routing.admin_states

    def drain(self, seats: Sequence[Seat]) -> None:
        """Send no new clients to processes; one that operators have taken out of service stays so."""
        states = self._routing.admin_states
        for seat in seats:
            if states.get(seat.id) is AdminState.READY:
                self._routing.set_admin_state(seat.id, AdminState.DRAIN)

    def close_pins(self, seats: Sequence[Seat]) -> None:
        """Let the clients of processes stay only while something of their session is open."""
        self._routing.set_closing([seat.id for seat in seats if seat.id in self._routing.processes])

    async def settle(self) -> None:
        """Wait until all workers know what was said of processes."""
        await self._supervisor.fleet.published()

    async def shut_tunnels(self, seats: Sequence[Seat], per_s: float, reason: str) -> int:
        """Begin to close the tunnels of processes, so many in a second; return how many there are."""
        return await self._supervisor.fleet.shut_upstreams([seat.digest for seat in seats], per_s, reason)

    def retire_soon(self, seats: Sequence[Seat]) -> None:
        """Retire seats, as the settings say, while everything goes on."""
        spawn(self.retire(self._make_retirement(seats)), "retire app processes")

    def _make_retirement(self, seats: Sequence[Seat]) -> Retirement:
        return self.make_retirement(seats, self.settings.drain_timeout_s, self.settings.pace_per_s)

    def make_retirement(self, seats: Sequence[Seat], drain_timeout_s: float | None, pace_per_s: float) -> Retirement:
        """Return the retirement of seats, and of those that are about to replace them."""
        replacements = [self._replaced[seat] for seat in seats if seat in self._replaced]
        retirement = Retirement(self, [*seats, *replacements], drain_timeout_s, pace_per_s)
        self._retirements.add(retirement)
        return retirement

    async def retire(self, retirement: Retirement) -> None:
        """Retire seats; return when they have ended."""
        self._retirements.add(retirement)
        try:
            await retirement.run()
        finally:
            self._retirements.discard(retirement)

    # What is known of them

    @property
    def _routing(self) -> Routing:
        return self._supervisor.routing

    @property
    def now(self) -> float:
        """Return the time of the loop's clock, in seconds."""
        return self._loop.time()

    @property
    def grace_s(self) -> float:
        """Return how long what is under way gets to end."""
        return self._supervisor.config.grace_s

    @property
    def stop_signal(self) -> int:
        """Return what a process is told to end by."""
        return int(signal.Signals[f"SIG{self.settings.stop.signal}"])

    def on_line(self, upstream_id: str, line: str) -> None:
        """Show a line of output."""
        seat = self.seats.get(upstream_id)
        if seat is not None:
            seat.written += 1
        self._output.write(upstream_id, line)

    def is_empty(self, seat: Seat) -> bool:
        """Say whether no session, tunnel or exchange is at a process."""
        return seat.id not in self._routing.processes or self._supervisor.readings.is_empty(seat.id)

    def is_idle(self, seat: Seat) -> bool:
        """Say whether no tunnel and no exchange is at a process."""
        return seat.id not in self._routing.processes or self._supervisor.readings.is_idle(seat.id)

    def count_sessions(self, seat: Seat) -> int:
        """Return how many sessions a process holds."""
        return self._supervisor.fleet.registry.count(seat.digest)

    def _list_process_ids(self) -> set[int | None]:
        """Return the children of this process that others wait for."""
        fleet = self._supervisor.fleet
        links = (*fleet, *fleet.successors)
        ids = {seat.process.process_id for seat in self.seats.values() if seat.process is not None}
        return ids | {self.warden.process_id, *(link.process_id for link in links)}

    def measure(self, seat: Seat) -> Usage | None:
        """Return what a process uses, as of this second; None where there is none, or where the system is silent."""
        if self.now >= self._measured_at + _MEASURED_S:
            ids = [one.process.process_id for one in self.seats.values() if one.process is not None]
            self._usages = self._meter.measure(ids)
            self._measured_at = self.now
        process_id = None if seat.process is None else seat.process.process_id
        return None if process_id is None else self._usages.get(process_id)

    def describe(self) -> dict[str, Any]:
        """Return what runs, as JSON."""
        processes = self.settings.processes
        return {
            "generation": self.generation,
            "processes": self.processes,
            "min": processes.min,
            "max": processes.max,
            "starting": [
                {"id": seat.id, "process": self.describe_seat(seat)}
                for seat in self.seats.values()
                if seat.id not in self._routing.processes
            ],
        }

    def describe_seat(self, seat: Seat) -> dict[str, Any]:
        """Return what is known of one process, as JSON."""
        usage = self.measure(seat)
        process = seat.process
        return {
            "pid": None if process is None else process.process_id,
            "generation": seat.generation,
            "state": seat.state,
            "age_s": None if process is None else round(self.now - process.started_at, 1),
            "memory_bytes": None if usage is None else usage.memory_bytes,
            "cpu_s": None if usage is None else round(usage.cpu_s, 2),
            "restarts": seat.restarts,
        }

    # Another image of this process

    def leave(self) -> dict[str, Any]:
        """Part from all processes without ending them, and return what another image of this one needs to go on."""
        self._care.stop()
        is_due = self.live_reload.leave()
        self._reaper.stop()
        self._output.close()
        deploy = self.deploy
        others = [one.leave() for one in self._retirements if deploy is None or one is not deploy.retirement]
        of_deploy = None if deploy is None or deploy.retirement not in self._retirements else deploy.retirement
        return {
            "generation": self.generation,
            "processes": self.processes,
            "numbers": dict(self._numbers),
            "resize_to": self._resize_to,
            "replaced": [[old.id, new.id] for old, new in self._replaced.items()],
            "seats": [seat.leave() for seat in self.seats.values()],
            "retirements": others,
            "retirement_of_deploy": None if of_deploy is None else of_deploy.leave(),
            "places": self.places.leave(),
            "warden": self.warden.leave(),
            "deploy": None if deploy is None else deploy.leave(),
            "is_reload_due": is_due,
        }

    async def adopt(self, left: Mapping[str, Any]) -> None:
        """Go on with the processes that a former image of this one has left."""
        self.generation, self.processes = int(left["generation"]), int(left["processes"])
        self._numbers.update({int(generation): int(number) for generation, number in left["numbers"].items()})
        self.places.resume(left.get("places", {}))
        await self.warden.adopt(left["warden"])
        self._reaper.start()
        for one in left["seats"]:
            seat = Seat.adopt(self, one)
            self.seats[seat.id] = seat
        self._resize_to = left["resize_to"]
        for old, new in left["replaced"]:
            if old in self.seats and new in self.seats:
                self._replace_soon(self.seats[old], self.seats[new])
        for one in left["retirements"]:
            spawn(self.retire(Retirement.adopt(self, one)), "retire app processes")
        if left["deploy"] is not None:
            self.deploy = Deploy.adopt(self, left["deploy"])
            if left["retirement_of_deploy"] is not None:
                spawn(self.deploy.finish(Retirement.adopt(self, left["retirement_of_deploy"])), "finish a deploy")
        self.live_reload.adopt(is_due=bool(left.get("is_reload_due")))
        self.is_started = True
        self._care.start()

    @override
    def __repr__(self) -> str:
        return f"<Runner generation={self.generation} seats={len(self.seats)}>"
