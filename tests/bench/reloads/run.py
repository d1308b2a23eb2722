"""One run: a proxy under load, one operation done to it several times, and what its clients and /proc saw of that."""

from __future__ import annotations

import asyncio
import http.client
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench.reloads.family import Family, Usage
from tests.bench.reloads.look import Look, look
from tests.bench.reloads.peers import Kind, Stage
from tests.bench.reloads.requests import Requests
from tests.bench.reloads.settings import Setting
from tests.bench.reloads.tunnels import WAIT_S, Tally, Visitor, all_open
from tests.bench.results import RunError
from tests.bench.targets import Site, environment
from tests.helpers.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.reloads.peers import Operation, Peer
    from tests.bench.reloads.requests import RequestTally
    from tests.helpers.processes import Child, Children

AT_ONCE_S: Final = 1.0
_EFFECT_TIMEOUT_S: Final = 5.0
_READY_TIMEOUT_S: Final = 30.0
_SETTLE_S: Final = 1.0
_POLL_S: Final = 0.05


@dataclass(frozen=True)
class Plan:
    """How much is done. `renewed` clients leave and come back between two operations, as visitors do."""

    times: int = 10
    tunnels: int = 200
    renewed: int = 10
    requests_per_s: float = 50.0
    interval_s: float = 2.0
    watch_s: float = 30.0


@dataclass(frozen=True)
class Stranded:
    """How many processes hold tunnels and take no new ones, and how many tunnels are in them."""

    processes: int
    tunnels: int


@dataclass(frozen=True)
class Outcome:
    """The facts of one run. `times` operations were done, of which `effective` were seen to take effect.

    `cut_at_once` within 1 s of one, of all that are in `tally`. Usage and strays: before the first, some seconds after
    the last, and at the end of the watch. `taken_out`: tunnels on the upstream that the last operation took out,
    before it and at the end.
    """

    times: int
    effective: int
    cut_at_once: int
    tally: Tally
    requests: RequestTally
    usage: tuple[Usage, Usage, Usage]
    stranded: tuple[Stranded, Stranded]
    taken_out: tuple[int, int] | None
    complaints: tuple[str, ...]


async def run(peer: Peer, operation: Operation, plan: Plan, children: Children) -> Outcome:
    """Start the application and the proxy, do it all, and end them; raise RunError if the proxy cannot be loaded."""
    ports = (free_port(), free_port(), free_port())
    directory = children.directory / f"{len(list(children.directory.iterdir()))}-{peer.name}"
    directory.mkdir()
    directory.chmod(0o755)  # nginx, started by root, reads it as another user
    command = [sys.executable, "-m", "tests.bench.reloads.app", *map(str, ports)]
    application = children.start(f"{directory.name}-application", command, environment(directory))
    site = Site(directory, free_port(), free_port(), (ports[0], ports[1]), is_websocket=True)
    pid_file = directory / peer.pid_file if peer.pid_file else None
    family = Family(children, f"{directory.name}-proxy", peer.command(site), environment(directory), pid_file)
    drill = Drill(peer, operation, plan, Stage(site, family), ports)
    try:
        await drill.start(application)
        return await drill.run()
    finally:
        try:
            await drill.stop()
        finally:
            await asyncio.to_thread(family.end)
            application.stop()


class Drill:
    """The state of one run."""

    def __init__(self, peer: Peer, operation: Operation, plan: Plan, stage: Stage, ports: Sequence[int]) -> None:
        self._peer, self._operation, self._plan, self._stage = peer, operation, plan, stage
        self._named = tuple(zip("abc", ports, strict=True))
        self._tally = Tally()
        self._visitors: list[Visitor] = []
        self._requests: Requests | None = None
        self._windows_s: list[tuple[float, float]] = []
        self._complaints: list[str] = []
        self._effective = 0
        self._times = plan.times if operation.kind in {Kind.RELOAD, Kind.UPGRADE} else 1

    async def start(self, application: Child) -> None:
        """Start the proxy and the load, and wait until both run; raise RunError if they do not."""
        for _, port in self._named:  # nginx would ask no upstream again for 10 s that once did not answer
            await self._until_ready(application, port)
        self._write(0)
        self._stage.family.start()
        await self._until_ready(self._stage.family.main, self._stage.site.port)
        self._visitors = [Visitor(self._stage.site.port, self._tally) for _ in range(self._plan.tunnels)]
        try:
            await all_open(self._visitors)
        except TimeoutError:
            raise RunError(f"not all WebSockets were opened:\n{self._stage.family.main.log_tail()}") from None
        self._requests = Requests(self._stage.site.port, self._plan.requests_per_s)
        await asyncio.sleep(_SETTLE_S)

    async def run(self) -> Outcome:
        """Do the operation `times` times, and watch."""
        before = self._stage.family.usage()
        on_upstream = 0
        for number in range(1, self._times + 1):
            begin_s = asyncio.get_running_loop().time()
            on_upstream = self._count_on_taken_out()
            await self._operate(number)
            await self._wait_until(begin_s + self._plan.interval_s / 2)
            if number < self._times:
                await self._renew(number)
            await self._wait_until(begin_s + self._plan.interval_s)
        last_s = self._windows_s[-1][1]
        after, stranded = self._stage.family.usage(), await self._strays()
        await self._wait_until(last_s + self._plan.watch_s)
        later, stranded_later = self._stage.family.usage(), await self._strays()
        on_upstream_later = self._count_on_taken_out()
        requests = await self.stop()
        return Outcome(
            self._times,
            self._effective,
            self._tally.cuts_within(self._windows_s),
            self._tally,
            requests,
            (before, after, later),
            (stranded, stranded_later),
            (on_upstream, on_upstream_later) if self._takes_out else None,
            tuple(dict.fromkeys(self._complaints)),
        )

    async def stop(self) -> RequestTally:
        """End the load, once all that is under way has been answered, or was not within 30 s."""
        requests, self._requests = self._requests, None
        visitors, self._visitors = self._visitors, []
        if requests is not None:
            await requests.stop()
        tunnels = [visitor.tunnel for visitor in visitors if visitor.tunnel is not None and visitor.tunnel.is_open]
        for tunnel in tunnels:
            tunnel.be_silent()
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while any(tunnel.is_open and not tunnel.is_quiet for tunnel in tunnels):
            if asyncio.get_running_loop().time() > deadline_s:
                break
            await asyncio.sleep(_POLL_S)
        await asyncio.gather(*(visitor.stop() for visitor in visitors))
        return requests.tally if requests is not None else Requests(0, 1, 0).tally

    @property
    def _takes_out(self) -> bool:
        return self._operation.kind is Kind.RELOAD

    def _write(self, generation: int) -> None:
        """Write a configuration: every second has a third upstream, and the last reload takes the second out."""
        first, second, third = self._named
        if generation == self._times and self._takes_out:
            upstreams: tuple[tuple[str, int], ...] = (first, third)
        else:
            upstreams = (first, second, third) if generation % 2 else (first, second)
        self._peer.write(self._stage.site, Setting(generation, upstreams, self._operation.extra))

    async def _operate(self, number: int) -> None:
        """Do the operation once and wait until a new connection shows it, or 5 s."""
        begin_s = asyncio.get_running_loop().time()
        is_control = self._operation.kind is Kind.CONTROL
        if not is_control:
            self._write(number)
        try:
            await asyncio.to_thread(self._operation.act, self._stage)
            await self._until_effective(str(number) if self._peer.shows_generation and not is_control else "")
            self._effective += 1
        except (RunError, OSError, TimeoutError) as error:
            self._complaints.append(f"{type(error).__name__}: {error}")
        self._windows_s.append((begin_s, asyncio.get_running_loop().time() + AT_ONCE_S))

    async def _until_effective(self, generation: str) -> None:
        """Wait until a new connection shows that configuration, and after an upgrade the new executable too."""
        is_upgrade = self._operation.kind is Kind.UPGRADE
        async with asyncio.timeout(_EFFECT_TIMEOUT_S):
            while True:
                seen = await self._look()
                if seen is not None and generation in {"", seen.generation} and not (is_upgrade and seen.is_outdated):
                    return
                await asyncio.sleep(_POLL_S)

    async def _look(self, port: int | None = None) -> Look | None:
        """Return what a new connection to the proxy shows, or to another port; None if it is not answered."""
        try:
            return await asyncio.to_thread(look, self._stage.family, port or self._stage.site.port)
        except (OSError, http.client.HTTPException):
            return None

    async def _until_ready(self, child: Child, port: int) -> None:
        """Wait until a child answers on a port; raise RunError with its output if it does not."""
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while await self._look(port) is None:
                    if not child.is_running() and child.wait() != 0:  # 0: it is in the background now
                        raise RunError(f"{child!r} before it was ready:\n{child.log_tail()}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise RunError(f"{child!r} answers nothing:\n{child.log_tail()}") from None

    async def _renew(self, number: int) -> None:
        """Let some clients leave and come back; others each time."""
        begin = number * self._plan.renewed
        for place in range(begin, begin + self._plan.renewed):
            tunnel = self._visitors[place % len(self._visitors)].tunnel
            if tunnel is not None and tunnel.is_open:
                tunnel.leave()

    async def _strays(self) -> Stranded:
        """Count what is held by other processes than the one that takes new connections."""
        seen = await self._look()
        holders = self._stage.family.holders(self._stage.site.port)
        ports = {visitor.tunnel.port for visitor in self._visitors if visitor.tunnel is not None and visitor.is_open}
        pids = [pid for port, pid in holders.items() if port in ports and (seen is None or pid != seen.pid)]
        return Stranded(len(set(pids)), len(pids))

    def _count_on_taken_out(self) -> int:
        port = self._named[1][1]
        tunnels = (visitor.tunnel for visitor in self._visitors if visitor.is_open)
        return sum(tunnel.upstream_port == port for tunnel in tunnels if tunnel is not None)

    async def _wait_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - asyncio.get_running_loop().time()))
