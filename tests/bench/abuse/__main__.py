"""Memory and CPU amplification: `python -m tests.bench.abuse`, from the root of the source tree.

Each kind of abuse is run against a `stickyproxy serve` of its own for a short, bounded time, and its cost compared with
that of a plain request and of an idle connection; `verdict.py` says what counts as too much. Exit status 1 where
something does, or where a kind was not answered as it should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.abuse.kinds import Requests, all_kinds, plain_kinds
from tests.bench.abuse.measure import Plan, Stage
from tests.bench.abuse.table import Row, write_report
from tests.bench.abuse.verdict import Bases, compare
from tests.bench.certificate import make_certificate
from tests.bench.process import choose_cores, held_to, raise_file_limit
from tests.bench.programs import HOW_TO_GET, find_program
from tests.bench.report import describe, gather_facts
from tests.bench.results import RunError
from tests.bench.targets import TARGETS
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.abuse.kinds import Kind

_NAMES = {kind.name: kind.title for kind in all_kinds(Requests(b""))}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.abuse",
        description="Measure what abuse costs stickyproxy, in units of a plain request.",
        epilog="kinds:\n" + "\n".join(f"  {name:24} {title}" for name, title in _NAMES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="which kinds (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each is repeated (default: 1)")
    parser.add_argument("--connections", type=int, default=500, help="at the most, at a time (default: 500)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.connections < 1:
        parser.error("--seconds and --connections must be positive")
    if unknown := [name for name in options.kinds if name not in _NAMES]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(_NAMES)}")
    return options


def measure_bases(stage: Stage, requests: Requests) -> Bases:
    """Measure what all is compared with."""
    plain, idle = (stage.measure(kind, requests) for kind in plain_kinds(requests))
    if not (plain.cpu_us and plain.reads and plain.read_bytes and idle.kib):
        raise RunError(f"no CPU time, reads or memory of the proxy were seen in /proc: {plain}, {idle}")
    return Bases(plain, idle)


def measure_row(kind: Kind, stage: Stage, requests: Requests, bases: Bases) -> Row:
    """Measure one kind; what fails is in the row."""
    try:
        cost = stage.measure(kind, requests)
    except (RunError, OSError, AssertionError) as error:
        row = Row(kind, failure=f"{type(error).__name__}: {error}")
    else:
        row = Row(kind, cost, compare(cost, bases, kind.requests))
    request = f"x {row.ratios.by_request:.1f}" if row.ratios else row.failure
    print(f"{kind.name}: {row.verdict}, {request}", file=sys.stderr, flush=True)
    return row


def run(options: argparse.Namespace, stage: Stage) -> list[Row]:
    """Measure the kinds between two measurements of the bases, of which the lesser counts."""
    requests = Requests(stage.find_cookie())
    bases = measure_bases(stage, requests)
    kinds = [kind for kind in all_kinds(requests) if kind.name in options.kinds or not options.kinds]
    if not stage.has_certificate:
        print(f"openssl is not installed, no kinds over TLS: {HOW_TO_GET['openssl']}", file=sys.stderr)
        kinds = [kind for kind in kinds if not kind.is_tls]
    rows = [measure_row(kind, stage, requests, bases) for kind in kinds]
    again = measure_bases(stage, requests)
    bases = Bases(
        plain=min(bases.plain, again.plain, key=lambda cost: cost.cpu_us),
        idle=min(bases.idle, again.idle, key=lambda cost: cost.kib),
    )
    print(
        f"a plain request: {bases.plain.cpu_us:.1f} us; an idle connection: {bases.idle.kib:.1f} KiB", file=sys.stderr
    )
    base_rows = [
        Row(kind, cost, compare(cost, bases))
        for kind, cost in zip(plain_kinds(requests), (bases.plain, bases.idle), strict=True)
    ]
    compared = (replace(row, ratios=compare(row.cost, bases, row.kind.requests)) if row.cost else row for row in rows)
    return [*base_rows, *compared]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; return 0, or 1 if anything is too much or failed."""
    options = parse_options(arguments)
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    cores = choose_cores(os.sched_getaffinity(0))
    plan = Plan(options.seconds, options.connections, cores)
    target = TARGETS["stickyproxy"]
    held = "nothing held to a core" if cores.proxy is None else f"proxy on core {cores.proxy}, the rest on {cores.rest}"
    versions = {target.name: target.version()}
    facts = gather_facts(versions, held=held, rounds=plan.batches, seconds=plan.seconds / plan.batches)
    try:
        with tempfile.TemporaryDirectory(prefix="abuse-") as folder, Children(Path(folder)) as children:
            certificate = make_certificate(Path(folder)) if find_program("openssl") else None
            with held_to(cores.rest):
                rows = run(options, Stage(children, plan, certificate))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(write_report(rows, describe(facts), is_markdown=options.markdown))
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
