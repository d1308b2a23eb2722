"""What operations do to live tunnels: `python -m tests.bench.operations upgrade`, from the root of the source tree.

Three apps, one proxy, thousands of WebSockets with numbered messages both ways, and requests with ids; meanwhile the
operation is done again and again. Exit status 1 where anything was lost, doubled, damaged, reordered or cut. At the
default 2,000 tunnels, 20 messages a second each way (`--period 0.05`) take 1.8 of 2 cores without any operation, and
half as many 1.1: that is the default.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.operations.actions import OPERATIONS
from tests.bench.operations.relay import FAULTS
from tests.bench.operations.report import is_good, write_report
from tests.bench.operations.run import Run
from tests.bench.operations.stage import Plan, Stage
from tests.bench.process import raise_file_limit
from tests.bench.programs import package_version
from tests.bench.report import describe, gather_facts
from tests.bench.results import RunError
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 on a mistake."""
    plan = Plan("")
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.operations",
        description="Show that operations lose nothing: numbered messages and requests, compared at both ends.",
    )
    parser.add_argument("operation", choices=OPERATIONS, help="none: a command that does not concern the proxy")
    parser.add_argument("--times", type=int, default=plan.times, help="how often (default: %(default)s)")
    parser.add_argument("--tunnels", type=int, default=plan.tunnels, help="open WebSockets (default: %(default)s)")
    parser.add_argument(
        "--period", type=float, default=plan.period_s,
        help="seconds between two messages on a tunnel, each way (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--requests", type=float, default=plan.requests, help="in a second (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=plan.workers, help="of the proxy (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=plan.pause_s, help="seconds after each (default: %(default)s)")
    parser.add_argument("--quiet", type=float, default=plan.quiet_s, help="seconds before them (default: %(default)s)")
    parser.add_argument(
        "--fault", choices=FAULTS, action="append", default=[],
        help="a control: a relay before the proxy does this wrong after an operation; several: one after the other",
    )  # fmt: skip
    parser.add_argument("--directory", type=Path, help="where logs and files are kept (default: nowhere)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if min(options.times, options.tunnels, options.workers) < 1 or options.requests < 0:
        parser.error("--times, --tunnels and --workers must be positive, --requests not negative")
    if options.period < 0.005 or options.quiet <= 0 or options.pause < 0:
        parser.error("--period must be 5 ms or longer, --quiet positive, --pause not negative")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    """Return what the options ask for."""
    return Plan(
        operation=options.operation,
        times=options.times,
        tunnels=options.tunnels,
        period_s=options.period,
        requests=options.requests,
        workers=options.workers,
        pause_s=options.pause,
        quiet_s=options.quiet,
        faults=tuple(options.fault),
    )


def describe_plan(plan: Plan) -> str:
    """Return in one line what was done."""
    return (
        f"{plan.operation}, {plan.times} times, {plan.pause_s:g} s apart; {plan.tunnels} tunnels, a numbered message "
        f"each {plan.period_s * 1e3:g} ms each way, {plan.requests:g} requests/s; {plan.workers} workers, 3 apps"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the report and return the exit status: 0 good, 1 something was lost, 2 it could not be run."""
    options = parse_options(arguments)
    plan = make_plan(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with it
    raise_file_limit()
    versions = {name: package_version(name) for name in ("stickyproxy", "uvloop")}
    facts = gather_facts(versions)
    with tempfile.TemporaryDirectory(prefix="operations-") as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with Children(directory) as children:
                stage = Stage(children, plan)
                try:
                    result = Run(stage).perform()
                finally:
                    stage.stop_proxy()
        except (RunError, AssertionError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
    lines = [describe_plan(plan), *describe(facts)]
    print(write_report(result, lines, os.cpu_count() or 1, is_markdown=options.markdown))
    return 0 if is_good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
