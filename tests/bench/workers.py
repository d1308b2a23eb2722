"""What a second worker brings: `python -m tests.bench.workers [--seconds 3] [--rounds 3] [--markdown]`.

The proxy runs with 1, 2 and 3 workers under one and the same load, in turn, in several rounds: requests on 64
keep-alive connections, then echoes of 64 bytes on 32 tunnels. wrk, nginx and an echo on uvloop are the load and the
application, the cheapest there are. No process is held to a core; with `--held` the proxy is to one, and the load and
the application to another, as in `python -m tests.bench`.

A machine with two cores cannot show what two workers carry, since load and application take their part of both. What
can be measured is the CPU time of all processes of the proxy, supervisor included, for each request; and as one worker
fills one core at most, W workers on W cores of their own carry W / (CPU seconds for each request). That is a
computation and no observation. It holds where the work spreads evenly; where it does not, and clients do not go faster
on the worker that has less to do, the busiest worker is full first: 1 / (its part of the CPU seconds). Both are
printed, and beside them the throughput that was seen.

Both err on the low side for several workers where load and application leave them idle: a worker that is full finds
many messages at once when it looks, one that waits is woken for each. `--held` keeps all of them busy.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.__main__ import held as describe_cores
from tests.bench.__main__ import missing_programs, say_missing
from tests.bench.apps import application_command
from tests.bench.load import run_load, visit
from tests.bench.process import Cores, choose_cores, cpu_s, held_to, raise_file_limit
from tests.bench.programs import package_version, path_of, program_version
from tests.bench.reloads.family import Family
from tests.bench.report import describe, gather_facts
from tests.bench.results import RunError, Sample
from tests.bench.scenarios import SCENARIOS
from tests.bench.tables import write_table
from tests.bench.targets import Site, environment, stickyproxy_config
from tests.helpers.proc import workers_of
from tests.helpers.processes import Children, free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.scenarios import Scenario

LOADS: Final = ("http", "ws")
COUNTS: Final = (1, 2, 3)
COLUMNS: Final = (
    "load",
    "workers",
    "us CPU",
    "per s on own cores",
    "x 1 worker",
    "busiest full",
    "x 1 worker",
    "seen per s",
    "connections of each worker",
    "CPU of each worker, supervisor",
    "errors",
)
_PROGRAM: Final = b"stickyproxy.control.worker_process"
_LOOK_S: Final = 0.5
FREE: Final = Cores(None, None)


@dataclass(frozen=True)
class Observed:
    """One round: what the load saw, and what each worker had of the CPU time and of the connections, most first.

    `cpu_parts` are parts of the CPU time of the whole proxy; the supervisor has the rest.
    """

    sample: Sample
    cpu_parts: tuple[float, ...]
    connections: tuple[int, ...]


@dataclass
class Row:
    """One number of workers under one load, over all rounds."""

    scenario: Scenario
    workers: int
    rounds: list[Observed] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def cpu_us(self) -> float:
        """CPU time (us) of the whole proxy for each request or echo."""
        return statistics.median(one.sample.cpu_us or 0.0 for one in self.rounds)

    @property
    def seen_per_s(self) -> float:
        """Requests or echoes that were seen in a second, with all that shares the cores."""
        return statistics.median(one.sample.per_s or 0.0 for one in self.rounds)

    @property
    def carried_per_s(self) -> float:
        """What as many cores as workers carry where the work spreads evenly: computed."""
        return self.workers / self.cpu_us * 1e6

    @property
    def carried_at_least_per_s(self) -> float:
        """What they carry until the busiest worker is full, as the work was spread: computed."""
        return statistics.median(1e6 / ((one.sample.cpu_us or 0.0) * max(one.cpu_parts)) for one in self.rounds)

    @property
    def errors(self) -> int:
        return sum(one.sample.errors for one in self.rounds)

    @property
    def is_clean(self) -> bool:
        return bool(self.rounds) and not self.failures and not self.errors


def write_config(site: Site, workers: int) -> str:
    """Return the configuration of the benchmark, but for the number of workers."""
    return stickyproxy_config(site).replace("workers: 1\n", f"workers: {workers}\n")


@dataclass(frozen=True)
class Stage:
    """Where the rounds of one load run: the two ports of the application, how long (s) each is, and on which cores."""

    children: Children
    ports: tuple[int, int]
    seconds: float
    cores: Cores = FREE


def observe(scenario: Scenario, workers: int, stage: Stage) -> Observed:
    """Start the proxy, load it and stop it; raise RunError if the round counts for nothing."""
    children = stage.children
    site = Site(children.directory, free_port(), free_port(), stage.ports, scenario.is_websocket)
    file = site.write(f"workers-{site.port}.yaml", write_config(site, workers))
    command = [sys.executable, "-m", "stickyproxy", "serve", "--config", file]
    proxy = Family(children, f"proxy-{site.port}", command, environment(children.directory))
    with held_to(stage.cores.proxy):
        proxy.start()
    try:
        proxy.main.wait_until_ready(f"http://127.0.0.1:{site.admin_port}/readyz")
        pids = sorted(workers_of(proxy.main.pid))
        if len(pids) != workers:
            raise RunError(f"it has {len(pids)} workers and not {workers}")
        return _load(scenario, site, proxy, pids, stage.seconds)
    except (AssertionError, OSError, http.client.HTTPException) as error:
        raise RunError(str(error)) from error
    finally:
        proxy.end()


def _load(scenario: Scenario, site: Site, proxy: Family, pids: Sequence[int], seconds: float) -> Observed:
    cookie = visit(site.port, scenario.path).cookie
    pid = proxy.main.pid
    before_s, all_before_s = {one: cpu_s(one) for one in pids}, cpu_s(pid)
    held: Counter[int] = Counter()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(run_load, scenario, site.port, cookie, pid, seconds)
        while not loading.done():
            seen = Counter(proxy.holders(site.port).values())
            if seen.total() >= held.total():  # the load opens and closes its connections within this time
                held = seen
            time.sleep(_LOOK_S)
        sample = loading.result()
    all_s = cpu_s(pid) - all_before_s
    if not all_s or workers_of(pid) != set(pids):
        raise RunError("workers have ended under load")
    parts = sorted(((cpu_s(one) - before_s[one]) / all_s for one in pids), reverse=True)
    return Observed(sample, tuple(parts), tuple(sorted((held[one] for one in pids), reverse=True)))


def run_rounds(scenario: Scenario, counts: Sequence[int], rounds: int, stage: Stage) -> list[Row]:
    """Return a row for each number of workers; what fails is in the rows, and the rest goes on."""
    rows = [Row(scenario, count) for count in counts]
    nginx, directory, ports = "" if scenario.is_websocket else path_of("nginx"), stage.children.directory, stage.ports
    command = application_command(scenario, nginx, directory, ports)
    application = stage.children.start(f"{scenario.name}-application", command, environment(directory))
    try:
        application.wait_until_ready(f"http://127.0.0.1:{ports[0]}{scenario.path}")
        for turn in range(1, rounds + 1):
            for row in rows:
                label = f"{scenario.name}, {row.workers} workers, round {turn}/{rounds}"
                try:
                    row.rounds.append(observe(scenario, row.workers, stage))
                except RunError as error:
                    row.failures.append(f"{label}: {error}")
                    print(row.failures[-1], file=sys.stderr)
                else:
                    print(f"{label}: {row.rounds[-1].sample.cpu_us:.1f} {scenario.unit}", file=sys.stderr)
    finally:
        application.stop()
    return rows


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return a row as text, in the order of `COLUMNS`; `-` is what was not measured."""
    if not row.rounds:
        return [row.scenario.name, str(row.workers), *["-"] * (len(COLUMNS) - 3), "invalid"]
    one = next((other for other in rows if other.scenario == row.scenario and other.workers == 1), None)
    base = one.carried_per_s if one is not None and one.rounds else None
    least = one.carried_at_least_per_s if one is not None and one.rounds else None
    return [
        row.scenario.name,
        str(row.workers),
        f"{row.cpu_us:.1f}",
        f"{row.carried_per_s:,.0f}",
        "-" if base is None else f"{row.carried_per_s / base:.2f}",
        f"{row.carried_at_least_per_s:,.0f}",
        "-" if least is None else f"{row.carried_at_least_per_s / least:.2f}",
        f"{row.seen_per_s:,.0f}",
        ", ".join("+".join(map(str, one.connections)) for one in row.rounds),
        ", ".join(_share(one.cpu_parts) for one in row.rounds),
        str(row.errors),
    ]


def _share(parts: Sequence[float]) -> str:
    """Return the parts of the workers and that of the supervisor, in percent."""
    return f"{'+'.join(f'{part:.0%}' for part in parts)}+{max(0.0, 1 - sum(parts)):.0%}"


def write_report(rows: Sequence[Row], facts: Sequence[str], *, is_markdown: bool) -> str:
    """Return the report: facts, the table, and what failed."""
    lines = write_table([COLUMNS, *(cells(row, rows) for row in rows)], (0,), is_markdown=is_markdown)
    failures = [failure for row in rows for failure in row.failures]
    return "\n".join([*(f"- {fact}" for fact in facts), "", *lines, *failures])


def legend() -> list[str]:
    """Return what the columns mean."""
    return [
        "us CPU: of the whole proxy, supervisor included, for each request (http) or echo (ws)",
        "per s on own cores = workers / CPU seconds for each request: computed, for a core for each worker",
        "busiest full = 1 / (the busiest worker's part of them): the same, where clients of the others go no faster",
        "seen per s: with the load and the application on the same cores",
        "connections and CPU of each worker: in each round, the busiest first; the last is the supervisor",
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.workers", description="What a second worker brings.")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each round (default: 3; wrk takes whole)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--loads", default=",".join(LOADS), help=f"which loads (default: {','.join(LOADS)})")
    parser.add_argument("--workers", default=",".join(map(str, COUNTS)), help="numbers of workers (default: 1,2,3)")
    parser.add_argument("--held", action="store_true", help="hold the proxy to one core and the rest to another")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    options.loads = options.loads.split(",")
    if unknown := [name for name in options.loads if name not in LOADS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(LOADS)}")
    try:
        options.workers = [int(number) for number in options.workers.split(",")]
    except ValueError:
        parser.error("--workers takes numbers with commas between them")
    if min(options.workers) < 1:
        parser.error("--workers must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; return 0, or 1 if anything failed, 2 if a program that it depends on is missing."""
    options = parse_options(arguments)
    scenarios = [SCENARIOS[name] for name in options.loads]
    if missing := missing_programs(scenarios):
        for name in missing:
            say_missing(name, "and the load needs it")
        return 2
    versions = {"stickyproxy": package_version("stickyproxy"), "uvloop": package_version("uvloop")}
    if "http" in options.loads:
        versions["wrk"] = program_version([path_of("wrk"), "-v"])
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    usable = os.sched_getaffinity(0)
    cores = choose_cores(usable) if options.held else FREE
    where = describe_cores(cores) if options.held else f"no process is held to any of the {len(usable)} cores"
    facts = gather_facts(versions, held=where, rounds=options.rounds, seconds=options.seconds)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="workers-") as folder, Children(Path(folder)) as children:
        Path(folder).chmod(0o755)  # nginx, started by root, reads it as another user
        for scenario in scenarios:
            stage = Stage(children, (free_port(), free_port()), options.seconds, cores)
            with held_to(cores.rest):  # the load inherits it
                rows += run_rounds(scenario, options.workers, options.rounds, stage)
    print(write_report(rows, [*describe(facts), *legend()], is_markdown=options.markdown))
    return 0 if all(row.is_clean for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
