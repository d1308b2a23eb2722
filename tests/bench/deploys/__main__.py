"""Deploys in a row under load: `python -m tests.bench.deploys [--times 20] [--markdown]`.

The proxy runs an app itself. Visitors hold WebSockets with numbered echoes, which end and are opened again within their
sessions, and send requests; meanwhile `stickyproxy deploy` is called again and again, with a drain timeout that is
longer than every session. Exit status 1 where anything was lost. Two controls must find losses: `--fault kill` ends an
old process in the middle, `--fault hurry` waits for no session.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from tests.bench.deploys.report import is_good, write_report
from tests.bench.deploys.run import FAULTS, Plan, Result, perform
from tests.bench.deploys.visitors import Habits
from tests.bench.process import raise_file_limit
from tests.bench.programs import package_version
from tests.bench.report import describe, gather_facts
from tests.bench.results import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 on a mistake."""
    plan, habits = Plan(), Habits()
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.deploys",
        description="Show that deploys lose nothing: numbered messages, counted requests, sessions that stay.",
    )
    parser.add_argument("--times", type=int, default=plan.times, help="how often (default: %(default)s)")
    parser.add_argument("--sockets", type=int, default=habits.sockets, help="open WebSockets (default: %(default)s)")
    parser.add_argument(
        "--requests", type=float, default=habits.requests_per_s,
        help="in a second, half of them of clients with a WebSocket (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=plan.processes, help="of the app (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=plan.workers, help="of the proxy (default: %(default)s)")
    parser.add_argument(
        "--period", type=float, default=habits.period_s,
        help="seconds between two messages on a WebSocket (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--drain-timeout", type=float, default=plan.drain_timeout_s,
        help="seconds until the clients of old processes are closed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--returning", type=float, default=habits.returning,
        help="part of the visitors that come back with their cookies soon after their sessions (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--fault", choices=FAULTS, default="", help="a control: what is done wrong in the middle")
    parser.add_argument("--directory", type=Path, help="where logs and files are kept (default: nowhere)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if min(options.times, options.sockets, options.processes, options.workers) < 1 or options.requests < 0:
        parser.error("--times, --sockets, --processes and --workers must be positive, --requests not negative")
    if options.period < 0.005 or not 0 <= options.drain_timeout <= 90 or not 0 <= options.returning <= 1:
        parser.error("--period must be 5 ms or longer, --drain-timeout 0 to 90 s, --returning 0 to 1")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    """Return what the options ask for."""
    habits = Habits(options.sockets, options.requests, options.period, returning=options.returning)
    return Plan(
        times=options.times,
        habits=habits,
        processes=options.processes,
        workers=options.workers,
        drain_timeout_s=options.drain_timeout,
        fault=options.fault,
    )


def describe_plan(plan: Plan) -> list[str]:
    """Return what was done, one on each line."""
    habits = plan.habits
    return [
        (
            f"{plan.times} deploys, {plan.pause_s:g} s apart: `stickyproxy deploy --watch {plan.watch_s:g}s --surge all"
            f" --drain-timeout {plan.drain_timeout_s:g}s`; {plan.processes} app processes, {plan.workers} workers"
        ),
        (
            f"{habits.sockets} WebSockets, a numbered echo each {habits.period_s * 1e3:g} ms, each lives"
            f" {habits.life_s[0]:g} to {habits.life_s[1]:g} s, one or two in a session;"
            f" {habits.requests_per_s:g} requests/s, half of them beside a WebSocket;"
            f" session_idle {habits.idle_s:g} s"
            + (f"; {habits.returning:.0%} of the visitors come back" if habits.returning else "")
        ),
        *([f"fault in the middle: {plan.fault}"] if plan.fault else []),
    ]


async def run_until_told(plan: Plan, directory: Path) -> Result:
    """Perform it; SIGTERM cancels it, and with it ends all that was started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await perform(plan, directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the report and return the exit status: 0 good, 1 something was lost, 2 it could not be run."""
    options = parse_options(arguments)
    plan = make_plan(options)
    raise_file_limit()
    versions = {name: package_version(name) for name in ("stickyproxy", "uvloop")}
    facts = gather_facts(versions)
    result = None
    with tempfile.TemporaryDirectory(prefix="deploys-") as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with suppress(asyncio.CancelledError):
                result = uvloop.run(run_until_told(plan, directory))
        except (RunError, AssertionError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2
    if result is None:
        return 128 + signal.SIGTERM
    lines = [*describe_plan(plan), *describe(facts)]
    print(write_report(result, lines, is_markdown=options.markdown))
    return 0 if is_good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
