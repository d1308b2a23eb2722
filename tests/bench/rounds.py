"""The run: for each scenario an application, and in each round every target in turn, started anew and stopped again."""

from __future__ import annotations

import http.client
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tests.bench.apps import application_command
from tests.bench.load import run_load, visit
from tests.bench.process import Cores, held_to
from tests.bench.programs import path_of
from tests.bench.results import Row, RunError, Sample
from tests.bench.targets import Site, environment
from tests.helpers.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.certificate import Certificate
    from tests.bench.load import Answer
    from tests.bench.scenarios import Scenario
    from tests.bench.targets import Target
    from tests.helpers.processes import Child, Children

_READY_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.05
_OK: Final = 200


@dataclass(frozen=True)
class Plan:
    """How often and how long (s) each target is loaded, on which cores all of it runs, and what targets show by TLS."""

    rounds: int
    seconds: float
    cores: Cores
    certificate: Certificate | None = None


@dataclass
class _Tally:
    """What the rounds of one target gave so far."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run_scenario(scenario: Scenario, targets: Sequence[Target], plan: Plan, children: Children) -> list[Row]:
    """Measure one scenario and return a row for each target.

    What fails is in the rows, once for each target and reason, and the rest goes on. Takes rounds * targets *
    (seconds + 2) seconds or so.
    """
    tallies = {target.name: _Tally() for target in targets}
    ports = (free_port(), free_port())
    nginx = "" if scenario.is_websocket else path_of("nginx")
    with held_to(plan.cores.rest):  # the loads inherit it
        command = application_command(scenario, nginx, children.directory, ports)
        application = children.start(f"{scenario.name}-application", command, environment(children.directory))
        try:
            _run_rounds(scenario, targets, plan, _Stage(children, application, ports), tallies)
        finally:
            application.stop()
    return [Row(scenario, name, tuple(tally.samples), tuple(tally.failures)) for name, tally in tallies.items()]


@dataclass(frozen=True)
class _Stage:
    """Where the targets of one scenario run: the application behind them, and its two ports."""

    children: Children
    application: Child
    ports: tuple[int, int]


def _run_rounds(
    scenario: Scenario, targets: Sequence[Target], plan: Plan, stage: _Stage, tallies: dict[str, _Tally]
) -> None:
    try:
        _wait_for_answer(stage.application, stage.ports[0], scenario)
    except RunError as error:
        for tally in tallies.values():
            tally.failures.append(f"application: {error}")
        return
    for turn in range(1, plan.rounds + 1):
        for target in targets:
            tally = tallies[target.name]
            label = f"{scenario.name} {target.name} round {turn}/{plan.rounds}"
            try:
                sample = _measure(scenario, target, plan, stage)
            except RunError as error:
                tally.failures.append(f"round {turn}: {error}")
                _say(f"{label}: INVALID: {error}")
            else:
                tally.samples.append(sample)
                _say(f"{label}: {getattr(sample, scenario.figure):.1f} {scenario.unit}, errors {sample.errors}")


def _measure(scenario: Scenario, target: Target, plan: Plan, stage: _Stage) -> Sample:
    """Start the target, take its cookie, load it and stop it; raise RunError if the round counts for nothing."""
    certificate = plan.certificate if scenario.is_tls else None
    site = Site(stage.children.directory, free_port(), free_port(), stage.ports, scenario.is_websocket, certificate)
    command, env = target.command(site), environment(site.directory)
    with held_to(plan.cores.proxy):
        proxy = stage.children.start(f"{scenario.name}-{target.name}-{site.port}", command, env)
    try:
        answer = _wait_for_answer(proxy, site.port, scenario, is_tls=scenario.is_tls)
        if target.sets_cookie[scenario.is_websocket] and not answer.cookie:
            raise RunError("it set no affinity cookie")
        sample = run_load(scenario, site.port, answer.cookie, proxy.pid, plan.seconds)
        if not proxy.is_running():
            raise RunError(_with_output("it ended under load", proxy))
        if not getattr(sample, scenario.figure):
            raise RunError("no CPU time or memory of it was seen in /proc")
        return sample
    finally:
        proxy.stop()


def _wait_for_answer(child: Child, port: int, scenario: Scenario, *, is_tls: bool = False) -> Answer:
    """Visit until the answer is what the application gives; raise RunError with the child's output if it never is."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    seen = "no answer"
    while child.is_running():
        try:
            answer = visit(port, scenario.path, is_tls=is_tls)
        except (OSError, http.client.HTTPException) as error:
            seen = f"{type(error).__name__}: {error}"
        else:
            if answer.status == _OK and (scenario.is_websocket or answer.body_bytes == scenario.size_bytes):
                return answer
            seen = f"status {answer.status} with {answer.body_bytes} bytes"
        if time.monotonic() > deadline:
            raise RunError(_with_output(f"not ready after {_READY_TIMEOUT_S:g} s ({seen})", child))
        time.sleep(_POLL_S)
    raise RunError(_with_output(f"it did not come up ({seen})", child))


def _with_output(text: str, child: Child) -> str:
    output = child.log_tail().strip()
    return f"{text}; its output:\n{output}" if output else f"{text}; no output"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
