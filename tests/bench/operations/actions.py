"""The operations: each is one command of an operator, or one death, and the check that it had its effect.

An operation that cannot be done, or that had no effect, raises RunError: a run without effect would prove nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tests.bench.operations.stage import SPARE
from tests.bench.programs import ROOT
from tests.bench.results import RunError
from tests.helpers.proc import listens, ports_held, session_of, workers_of
from tests.helpers.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.bench.operations.stage import Stage

_COMMAND_TIMEOUT_S: Final = 120.0
# What reloads change, one after the other, beside the spare upstream; nothing of it concerns what is open.
_CHANGES: Final[tuple[Mapping[str, Any], ...]] = (
    {"limits": {"body": "100MiB"}, "log_level": "warning"},
    {"timeouts": {"response": "200s", "keep_alive": "60s"}},
    {"limits": {"body": "200MiB", "fields": 150}, "log_level": "info"},
    {"timeouts": {"response": "250s"}, "affinity": {"cookie": {"name": "stickyproxy", "same_site": "strict"}}},
    {"affinity": {"cookie": {"name": "stickyproxy"}}, "limits": {"body": "off"}},
)


@dataclass
class Outcome:
    """What one operation did. `seconds` is how long the command, or the recovery, took.

    `doomed` are the clients' ports of connections that may end by it, because their process was killed.
    """

    name: str
    seconds: float
    doomed: set[int] = field(default_factory=set)
    survivors: int = 0  # processes that should have gone with the one that was killed


def run_command(stage: Stage, *words: str) -> str:
    """Run a command of stickyproxy to its end and return what it printed; raise RunError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(stage.directory)}
    command = [sys.executable, "-m", "stickyproxy", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S, env=environment
    )
    text = (done.stdout + done.stderr).strip()
    with (stage.directory / "commands.log").open("a") as log:
        log.write(f"{' '.join(words)}: exit {done.returncode}\n{text}\n")
    if done.returncode:
        raise RunError(f"stickyproxy {' '.join(words)}: exit {done.returncode}: {text}")
    return text


def do_nothing(stage: Stage, _: int) -> Outcome:
    """Start a command that has nothing to do with the proxy: what it costs the machine is the noise."""
    began_s = time.monotonic()
    run_command(stage, "version")
    return Outcome("none", time.monotonic() - began_s)


def reload(stage: Stage, number: int) -> Outcome:
    """Change the file, and let the proxy read it; it has its effect when the spare upstream has come or gone."""
    has_spare = SPARE not in stage.upstream_ids
    stage.write_configuration(_CHANGES[number % len(_CHANGES)], has_spare=has_spare)
    began_s = time.monotonic()
    run_command(stage, "reload", "--control", str(stage.control))
    seconds = time.monotonic() - began_s
    wait_for(lambda: (SPARE in stage.upstream_ids) == has_spare, "the upstreams are those of the new file")
    return Outcome("reload", seconds)


def upgrade(stage: Stage, _: int) -> Outcome:
    """Replace the program; it has its effect when no worker is left of those that were there before."""
    pid = stage.proxy.child.pid
    before = workers_of(pid)
    began_s = time.monotonic()
    run_command(stage, "upgrade", "--control", str(stage.control))
    seconds = time.monotonic() - began_s
    wait_for(lambda: not before & session_of(pid), "the old workers are gone")
    wait_for(lambda: len(workers_of(pid)) == stage.plan.workers, "the new workers are there")
    if not stage.proxy.child.is_running():
        raise RunError("the supervisor has another process id")
    return Outcome("upgrade", seconds)


def kill_worker(stage: Stage, number: int) -> Outcome:
    """Kill one worker after the other; the time is that until as many as before listen."""
    pid = stage.proxy.child.pid
    workers = sorted(workers_of(pid))
    if not workers:
        raise RunError("the proxy has no workers")
    victim = workers[number % len(workers)]
    doomed = ports_held(victim, stage.port)
    began_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)

    def is_replaced() -> bool:
        others = workers_of(pid) - {victim}
        return len(others) == len(workers) and all(listens(one, stage.port) for one in others)

    wait_for(is_replaced, "the worker is replaced", step_s=0.01)
    return Outcome("kill-worker", time.monotonic() - began_s, doomed)


def kill_supervisor(stage: Stage, _: int) -> Outcome:
    """Kill the supervisor and start another; the time is that until no process of the old one was left."""
    pid = stage.proxy.child.pid
    doomed = {port for one in session_of(pid) for port in ports_held(one, stage.port)}
    began_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    stage.proxy.child.wait()
    survivors: set[int] = set()
    try:
        wait_for(lambda: not session_of(pid), "the workers of a dead supervisor are gone", step_s=0.01)
    except RunError:
        survivors = session_of(pid)
        for one in survivors:
            os.kill(one, signal.SIGKILL)
    seconds = time.monotonic() - began_s
    stage.restart_proxy()
    return Outcome("kill-supervisor", seconds, doomed, len(survivors))


def mix(stage: Stage, number: int) -> Outcome:
    """Upgrade and reload by turns."""
    return (upgrade, reload)[number % 2](stage, number)


def wait_for(condition: Callable[[], bool], what: str, step_s: float | None = None) -> None:
    """Wait for an effect; raise RunError if it does not come within 60 s. A `step_s` makes the time exact."""
    deadline_s = time.monotonic() + _COMMAND_TIMEOUT_S / 2
    while step_s is not None and not condition() and time.monotonic() < deadline_s:
        time.sleep(step_s)
    try:
        wait_until(condition, what, max(0.0, deadline_s - time.monotonic()))
    except AssertionError as error:
        raise RunError(str(error)) from error


OPERATIONS: Final[dict[str, Callable[[Stage, int], Outcome]]] = {
    "none": do_nothing,
    "upgrade": upgrade,
    "reload": reload,
    "kill-worker": kill_worker,
    "kill-supervisor": kill_supervisor,
    "mixed": mix,
}
