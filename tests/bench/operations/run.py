"""One run: a quiet phase, then the operations, each to its end, then the comparison of everything at both ends."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tests.bench.operations.actions import OPERATIONS, Outcome, wait_for
from tests.bench.operations.ledger import Tally, compare
from tests.bench.operations.pauses import Span, Worst, cut_up, percentile, worst_in
from tests.bench.process import Footprint, busy_s, cpu_s, footprint
from tests.bench.results import RunError

if TYPE_CHECKING:
    from tests.bench.operations.stage import Plan, Stage

_WARM_UP_S: Final = 1.0
QUIET: Final = "quiet"
BUSY: Final = "operations"


@dataclass
class Rates:
    """What moved in the quiet phase, in a second, and the CPU seconds of each part in a second."""

    up: float
    down: float
    requests: float
    cores: dict[str, float]
    others: float  # CPU seconds in a second of all else that runs on this machine
    load_us: float  # CPU of load and apps for each message, sent and received
    proxy_us: float  # CPU of the proxy for each message


@dataclass
class Result:
    """All facts of a run."""

    plan: Plan
    tally: Tally
    requests: dict[str, Any]
    rates: Rates
    outcomes: list[Outcome]
    problems: list[str]  # operations that failed
    quiet: list[Worst]  # for each stretch of the quiet phase that is as long as an operation
    busy: list[Worst]  # for each operation, until the next one
    tunnels_quiet: dict[str, list[float]]  # worst pause and delay of each tunnel and direction in the phase, in ms
    tunnels_busy: dict[str, list[float]]
    before: Footprint
    after: Footprint
    left: int  # processes after the proxy was stopped
    moved: int
    new_cookies: int
    refused: dict[str, int]
    shortfall: float  # part of the messages that were not sent because the machine had no time
    struck: int = 0
    strange_cuts: int = 0
    reopened_s: list[float] = field(default_factory=list)


def say(text: str) -> None:
    """Tell whoever waits how far it is."""
    print(text, file=sys.stderr, flush=True)


class Run:
    """The course of one run on a stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._plan = stage.plan
        self._spans: list[Span] = []
        self._outcomes: list[Outcome] = []
        self._problems: list[str] = []

    def perform(self) -> Result:
        """Do everything, and return what came of it; raise RunError where the load itself cannot run."""
        stage = self._stage
        opened = sum(load.ask("open") for load in stage.loads)
        say(f"{opened} tunnels are open")
        for program in stage.programs:
            program.ask("start")
        time.sleep(_WARM_UP_S)
        before = footprint(stage.proxy.child.pid)
        self._begin(QUIET)
        quiet, rates = self._be_quiet()
        self._begin(BUSY)
        busy_began_s = time.monotonic()
        self._operate()
        self._begin("end")
        stage.requests.ask("stop")
        for program in (*stage.apps, *stage.loads):
            program.ask("stop")
        busy_s = time.monotonic() - busy_began_s
        stage.settle()
        self._wait_for_processes(before)
        after = footprint(stage.proxy.child.pid)
        reports = {program.name: program.ask("report") for program in stage.programs}
        struck = stage.relay.ask("struck") if stage.relay is not None else 0
        left = stage.stop_proxy() + sum(outcome.survivors for outcome in self._outcomes)
        return self._judge(reports, quiet, rates, before=before, after=after, left=left, struck=struck, seconds=busy_s)

    def _begin(self, phase: str) -> None:
        for program in self._stage.programs:
            program.ask(f"phase {phase}")

    def _be_quiet(self) -> tuple[Span, Rates]:
        """Let everything run without an operation, and measure what it takes."""
        stage = self._stage
        parts = {
            "proxy": [stage.proxy.child.pid],
            "load": [load.child.pid for load in stage.loads],
            "requests": [stage.requests.child.pid],
            "apps": [app.child.pid for app in stage.apps],
        }
        began_ns = time.monotonic_ns()
        cpu_before = {name: sum(map(cpu_s, pids)) for name, pids in parts.items()}
        totals_before, busy_before_s = self._totals(), busy_s()
        time.sleep(self._plan.quiet_s)
        totals = [after - before for after, before in zip(self._totals(), totals_before, strict=True)]
        used_s = {name: sum(map(cpu_s, pids)) - cpu_before[name] for name, pids in parts.items()}
        span = Span(began_ns, time.monotonic_ns())
        others = max(0.0, (busy_s() - busy_before_s - sum(used_s.values())) / span.seconds)
        up, down, requests = (total / span.seconds for total in totals)
        messages = max(1, totals[0] + totals[1])
        rates = Rates(
            up,
            down,
            requests,
            cores={name: seconds / span.seconds for name, seconds in used_s.items()},
            others=others,
            load_us=(used_s["load"] + used_s["apps"]) / messages * 1e6,
            proxy_us=used_s["proxy"] / messages * 1e6,
        )
        return span, rates

    def _totals(self) -> tuple[int, int, int]:
        """Return the messages that came to the apps and to the clients, and the requests."""
        stage = self._stage
        return (
            sum(app.ask("totals")["received"] for app in stage.apps),
            sum(load.ask("totals")["received"] for load in stage.loads),
            stage.requests.ask("totals")["received"],
        )

    def _operate(self) -> None:
        """Do the operation as often as asked, with a pause after each; the span of one ends where the next begins."""
        plan, operation = self._plan, OPERATIONS[self._plan.operation]
        for number in range(plan.times):
            began_ns = time.monotonic_ns()
            try:
                outcome = operation(self._stage, number)
                self._outcomes.append(outcome)
                say(f"{number + 1}/{plan.times} {outcome.name}: {outcome.seconds:.2f} s")
            except RunError as error:
                self._problems.append(f"operation {number + 1}: {error}")
                say(self._problems[-1])
            self._stage.strike()
            time.sleep(plan.pause_s)
            self._wait_for_tunnels()
            self._spans.append(Span(began_ns, time.monotonic_ns()))

    def _wait_for_tunnels(self) -> None:
        """Wait until all tunnels are open again, those that were cut."""
        stage, plan = self._stage, self._plan
        try:
            wait_for(
                lambda: sum(load.ask("totals")["open"] for load in stage.loads) >= plan.tunnels, "all tunnels are open"
            )
        except RunError as error:
            self._problems.append(str(error))

    def _wait_for_processes(self, before: Footprint) -> None:
        """Wait until there are no more processes than there were; what is left then is left behind."""
        pid = self._stage.proxy.child.pid
        try:
            wait_for(lambda: footprint(pid).processes <= before.processes, "no more processes than before")
        except RunError as error:
            self._problems.append(str(error))

    def _judge(
        self,
        reports: dict[str, dict[str, Any]],
        quiet: Span,
        rates: Rates,
        *,
        before: Footprint,
        after: Footprint,
        left: int,
        struck: int,
        seconds: float,
    ) -> Result:
        stage, plan = self._stage, self._plan
        requests = reports[stage.requests.name]
        loads = [reports[load.name] for load in stage.loads]
        apps = [reports[app.name] for app in stage.apps]
        clients = {number: end for load in loads for number, end in load["tunnels"].items()}
        tally = compare(clients, {number: end for app in apps for number, end in app["tunnels"].items()})
        tally.unknown += sum(app["doubled_tunnels"] for app in apps)
        doomed = {port for outcome in self._outcomes for port in outcome.doomed}
        receivers = [*loads, *apps]
        streams = [one["buckets"] for one in receivers]
        period_ns = round(plan.period_s * 1e9)
        length_s = percentile([span.seconds for span in self._spans], 50) or plan.quiet_s
        sent = tally.up.sent + tally.down.sent
        aim = 2 * plan.tunnels / plan.period_s * (seconds + plan.quiet_s + _WARM_UP_S)
        reopened = [end for end in clients.values() if end["reopened_ns"]]
        return Result(
            plan=plan,
            tally=tally,
            requests=requests,
            rates=rates,
            outcomes=self._outcomes,
            problems=self._problems,
            quiet=[worst_in(span, streams, period_ns) for span in cut_up(quiet, length_s)],
            busy=[worst_in(span, streams, period_ns) for span in self._spans],
            tunnels_quiet=_of_tunnels(receivers, QUIET, period_ns),
            tunnels_busy=_of_tunnels(receivers, BUSY, period_ns),
            before=before,
            after=after,
            left=left,
            moved=sum(load["moved"] for load in loads) + requests["moved"],
            new_cookies=sum(load["new_cookies"] for load in loads) + requests["new_cookies"],
            refused=dict(sum((Counter(load["refused"]) for load in loads), Counter())),
            shortfall=max(0.0, 1 - sent / aim) if aim else 0.0,
            struck=struck,
            strange_cuts=sum(port not in doomed for _, _, port, _ in tally.cuts),
            reopened_s=[(end["reopened_ns"] - end["lost_ns"]) / 1e9 for end in reopened],
        )


def _of_tunnels(reports: list[dict[str, Any]], phase: str, period_ns: int) -> dict[str, list[float]]:
    """Return the worst pause and the worst delay (ms) that each tunnel saw in a phase, of both directions."""
    found = [report["phases"].get(phase, {"gaps": [], "delays": []}) for report in reports]
    return {
        "pause": [max(0, gap - period_ns) / 1e6 for one in found for gap in one["gaps"]],
        "delay": [delay / 1e6 for one in found for delay in one["delays"]],
    }
