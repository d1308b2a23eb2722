"""The side-by-side benchmark: `python -m tests.bench http ws idle`, from the root of the source tree.

Each target is loaded in turn, in several rounds, and compared by the CPU time of its whole process tree for each
request or echo, and not by throughput, which also depends on the other core; with `idle`, by memory. The proxy under
test is held to one core, the load and the application to another.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.certificate import make_certificate
from tests.bench.process import Cores, choose_cores, raise_file_limit
from tests.bench.programs import HOW_TO_GET, find_program, path_of, program_version
from tests.bench.report import as_json, gather_facts, markdown, terminal
from tests.bench.rounds import Plan, run_scenario
from tests.bench.scenarios import SCENARIOS
from tests.bench.targets import TARGETS
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.scenarios import Scenario
    from tests.bench.targets import Target

_BY_DEFAULT = [name for name, target in TARGETS.items() if not target.is_asked_for]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, with `scenarios` and `targets` as values; exit with status 2 on a mistake."""
    names = "\n".join(f"  {scenario.name:10} {scenario.title}" for scenario in SCENARIOS.values())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Compare stickyproxy with other reverse proxies, side by side on this machine.",
        epilog=f"scenarios:\n{names}\n\ntargets: {', '.join(TARGETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="+", metavar="SCENARIO", help="what to measure, one or more")
    parser.add_argument(
        "--targets", default=",".join(_BY_DEFAULT), help="which proxies (default: all but stickyproxy-keys)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each time (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    options.targets = options.targets.split(",")
    for given, known in ((options.scenarios, SCENARIOS), (options.targets, TARGETS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    options.scenarios = [SCENARIOS[name] for name in dict.fromkeys(options.scenarios)]
    options.targets = [TARGETS[name] for name in dict.fromkeys(options.targets)]
    return options


def leave_out_missing(targets: Sequence[Target]) -> list[Target]:
    """Return the targets that are installed, and name the others on standard error."""
    for target in targets:
        if not target.is_installed():
            say_missing(target.name, "left out")
    return [target for target in targets if target.is_installed()]


def missing_programs(scenarios: Sequence[Scenario]) -> list[str]:
    """Return the programs that these scenarios need and that are not installed."""
    is_http = any(not scenario.is_websocket for scenario in scenarios)
    needed = ["wrk", "nginx"] if is_http else []
    if any(scenario.is_tls for scenario in scenarios):
        needed.append("openssl")
    return [name for name in needed if find_program(name) is None]


def say_missing(name: str, consequence: str) -> None:
    print(f"{name} is not installed, {consequence}: {HOW_TO_GET[name]}", file=sys.stderr)


def held(cores: Cores) -> str:
    if cores.proxy is None:
        return "nothing held to a core, because there is only one"
    return f"proxy on core {cores.proxy}, load and application on core {cores.rest}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; return 0, or 1 if anything failed, 2 if a program that all depends on is missing."""
    options = parse_options(arguments)
    if missing := missing_programs(options.scenarios):
        for name in missing:
            say_missing(name, "and the scenarios need it")
        return 2
    targets = leave_out_missing(options.targets)
    versions = {target.name: target.version() for target in targets}
    if any(not scenario.is_websocket for scenario in options.scenarios):
        versions["wrk"] = program_version([path_of("wrk"), "-v"])
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    cores = choose_cores(os.sched_getaffinity(0))
    facts = gather_facts(versions, held=held(cores), rounds=options.rounds, seconds=options.seconds)
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, Children(Path(folder)) as children:
            Path(folder).chmod(0o755)  # nginx, started by root, reads it as another user
            is_tls = any(scenario.is_tls for scenario in options.scenarios)
            certificate = make_certificate(Path(folder)) if is_tls else None
            plan = Plan(options.rounds, options.seconds, cores, certificate)
            for scenario in options.scenarios:
                rows += run_scenario(scenario, targets, plan, children)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(rows, facts), indent=2) + "\n")
    print((markdown if options.markdown else terminal)(rows, facts))
    return 0 if all(row.is_clean for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
