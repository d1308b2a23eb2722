"""One run: a proxy that runs an app itself, visitors, and deploys in a row; what each deploy took, and what is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from stickyproxy.tasks import spawn
from tests.bench.deploys.visitors import Habits, Load, Tally
from tests.bench.process import own_pss_kib, process_tree
from tests.bench.results import RunError
from tests.helpers.proc import descriptors, read_stat, workers_of
from tests.helpers.run_stage import RunStage, states
from tests.helpers.supervised import SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.helpers.operated import Proxy

FAULTS: Final = ("kill", "hurry")
_WAIT_S: Final = 60.0
_LEFT_AFTER_S: Final = 5.0  # what has not gone by then, after what ended it has said so, counts as left
_LOOK_S: Final = 0.05
_COMMAND_S: Final = 150.0  # that the command may take at most


@dataclass(frozen=True)
class Plan:
    """What is asked for; `fault` is done wrong once, in the middle: an old process killed, or none waited for."""

    times: int = 20
    habits: Habits = field(default_factory=Habits)
    processes: int = 3
    workers: int = 1
    watch_s: float = 1.0
    drain_timeout_s: float = 60.0
    pause_s: float = 2.0
    fault: str = ""


@dataclass(frozen=True)
class Footprint:
    """What the proxy has: memory of the supervisor and of its workers, and the supervisor's open descriptors."""

    supervisor_kib: int
    workers_kib: int
    descriptors: int


@dataclass
class Result:
    """What was seen. `footprints` are those before the first deploy and after each."""

    plan: Plan
    tally: Tally
    seconds: list[float] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of deploys that failed, or had no effect
    old_left: int = 0  # app processes of a former generation, a while after its deploy was over
    left: int = 0  # processes of any kind, after the proxy has ended
    exit_status: int | None = None


class Seen:
    """The processes that were seen, so that those that are left can be told; a process id alone may be another's."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def add(self, pids: Iterable[int]) -> None:
        """Remember processes."""
        self._seen |= {(pid, began) for pid in pids if (began := _began(pid)) is not None}

    @property
    def left(self) -> set[int]:
        """Those that still run."""
        return {pid for pid, began in self._seen if _began(pid) == began}


def _began(pid: int) -> int | None:
    """Return when a process began; None where it has ended."""
    stat = read_stat(pid)
    return None if stat is None or stat.has_ended else stat.began


def read_footprint(supervisor: int) -> Footprint:
    """Return what a proxy has now."""
    workers = sum(map(own_pss_kib, workers_of(supervisor)))
    return Footprint(own_pss_kib(supervisor), workers, descriptors(supervisor))


async def perform(plan: Plan, directory: Path) -> Result:
    """Do it all; raise RunError where it cannot be done. All that was started has ended in the end."""
    async with RunStage(directory) as stage:
        habits = plan.habits
        proxy = await stage.run(
            plan.processes,
            workers=plan.workers,
            affinity={"secrets": [SECRET], "session_idle": f"{habits.idle_s:g}s"},
        )
        await _ready(proxy, 1, plan.processes)
        load = Load(proxy.port, habits)
        result = Result(plan, load.tally)
        seen = Seen()
        try:
            await load.all_open()
            await asyncio.sleep(plan.pause_s)
            result.footprints.append(read_footprint(proxy.pid))
            for number in range(1, plan.times + 1):
                await _deploy(number, stage, proxy, load, result)
                seen.add(process_tree(proxy.pid))
                await asyncio.sleep(plan.pause_s)
            await load.stop()
        finally:
            await load.abort()
            seen.add(process_tree(proxy.pid) if proxy.child.is_running() else [])
        await _end(stage, proxy, seen, result)
        return result


async def _ready(proxy: Proxy, generation: int, processes: int) -> bool:
    """Wait until so many processes of a generation take clients, and no other does; say whether they did in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_WAIT_S):
            while True:
                ready = [one for one, state in (await states(proxy)).items() if state["process"]["state"] == "ready"]
                if len(ready) == processes and all(one.startswith(f"g{generation}-") for one in ready):
                    return True
                await asyncio.sleep(_LOOK_S)
    return False


async def _deploy(number: int, stage: RunStage, proxy: Proxy, load: Load, result: Result) -> None:
    plan, loop = result.plan, asyncio.get_running_loop()
    fault = plan.fault if number == (plan.times + 1) // 2 else ""
    before = stage.app_processes()
    generation = max(int(one[1:].partition("-")[0]) for one in await states(proxy))
    stage.set_version(str(number + 1))
    hurry = ("--pace", "1000/s") if fault == "hurry" else ()
    timeout_s = 0.1 if fault == "hurry" else plan.drain_timeout_s
    killing = spawn(_kill_one(proxy, generation), "kill an old process") if fault == "kill" else None
    began_s = loop.time()
    try:
        done = await proxy.command(
            "deploy", "--watch", f"{plan.watch_s:g}s", "--surge", "all", "--drain-timeout", f"{timeout_s:g}s", *hurry
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"deploy {number} is not over after {_COMMAND_S:g} s\n{proxy.log[-2000:]}") from error
    finally:
        if killing is not None:
            killing.cancel()
    result.seconds.append(loop.time() - began_s)
    if done.returncode:
        result.problems.append(f"deploy {number}: exit {done.returncode}: {(done.stdout + done.stderr).strip()}")
    elif not await _ready(proxy, generation + 1, plan.processes):
        result.problems.append(f"deploy {number}: it had no effect")
    else:
        load.retire(generation)
        result.old_left += await _count_left(lambda: stage.app_processes() & before)
    result.footprints.append(read_footprint(proxy.pid))


async def _kill_one(proxy: Proxy, generation: int) -> None:
    """Kill a process of a generation as soon as that drains."""
    while True:
        for name, state in (await states(proxy)).items():
            if name.startswith(f"g{generation}-") and state["admin_state"] == "drain" and state["process"]["pid"]:
                os.kill(state["process"]["pid"], signal.SIGKILL)
                return
        await asyncio.sleep(_LOOK_S)


async def _count_left(find: Callable[[], set[int]]) -> int:
    """Return how many processes are left after a while."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + _LEFT_AFTER_S
    while find() and loop.time() < until_s:  # noqa: ASYNC110 -- they are no children
        await asyncio.sleep(_LOOK_S)
    return len(find())


async def _end(stage: RunStage, proxy: Proxy, seen: Seen, result: Result) -> None:
    """End the proxy as an operator does, and count what is left of it; then end that."""
    with suppress(ProcessLookupError):
        os.kill(proxy.pid, signal.SIGTERM)
    try:
        result.exit_status = await asyncio.to_thread(proxy.child.wait, _WAIT_S)
    except subprocess.TimeoutExpired:
        result.problems.append(f"the proxy does not end:\n{proxy.log[-2000:]}")
    else:
        if result.exit_status:
            result.problems.append(f"the proxy ended with {result.exit_status}:\n{proxy.log[-2000:]}")
    if "Traceback" in proxy.log:
        result.problems.append(f"the proxy's log has a Traceback{proxy.log.partition('Traceback')[2][:1000]}")
    result.left = await _count_left(lambda: seen.left | stage.app_processes())
    for pid in seen.left | stage.app_processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
