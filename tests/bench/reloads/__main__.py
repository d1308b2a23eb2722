"""What proxies do to their clients when they are reloaded or replaced: `python -m tests.bench.reloads`.

Each proxy is held under load, and its documented reload and its documented upgrade are done to it, several times. What
is counted is what the clients saw, and what /proc says of the proxy's processes. Two controls show that the counting
counts: nothing is done, and the proxy is killed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from tests.bench.process import raise_file_limit
from tests.bench.programs import HOW_TO_GET
from tests.bench.reloads.peers import CONTROLS, PEERS, Kind, lacking_commands, with_limit
from tests.bench.reloads.run import Plan, run
from tests.bench.reloads.table import Row, legend, write_report
from tests.bench.report import describe, gather_facts
from tests.bench.results import RunError
from tests.bench.targets import TARGETS
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.bench.reloads.peers import Operation, Peer


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.reloads",
        description="Reload and replace proxies under load, and count what their clients and /proc see of it.",
    )
    parser.add_argument("--targets", default=",".join(PEERS), help="which proxies (default: all)")
    parser.add_argument("--kinds", default=",".join(kind.value for kind in Kind), help="what is done (default: all)")
    parser.add_argument("--times", type=int, default=Plan.times, help="how often (default: %(default)s)")
    parser.add_argument("--tunnels", type=int, default=Plan.tunnels, help="open WebSockets (default: %(default)s)")
    parser.add_argument(
        "--renewed", type=int, default=Plan.renewed, help="clients that leave and come back between two (%(default)s)"
    )
    parser.add_argument("--interval", type=float, default=Plan.interval_s, help="between two, in s (%(default)s)")
    parser.add_argument("--watch", type=float, default=Plan.watch_s, help="after the last, in s (%(default)s)")
    parser.add_argument("--limit", type=float, default=5.0, help="of the proxies that have one, in s (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if min(options.times, options.tunnels) < 1 or min(options.renewed, options.interval, options.watch) < 0:
        parser.error("--times and --tunnels must be positive, and nothing negative")
    if not 1 <= options.limit < options.watch and Kind.LIMIT.value in options.kinds.split(","):
        parser.error("--limit must be at least 1, and less than --watch")
    options.targets = list(dict.fromkeys(options.targets.split(",")))
    options.kinds = list(dict.fromkeys(options.kinds.split(",")))
    for given, known in ((options.targets, list(PEERS)), (options.kinds, [kind.value for kind in Kind])):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def choose_runs(names: Sequence[str], kinds: Sequence[str], limit_s: float) -> Iterator[tuple[Peer, Operation, str]]:
    """Give what is to be run, each with the reason why it cannot be; the controls with the first that can."""
    is_controlled = False
    for name in names:
        peer = with_limit(PEERS[name], limit_s)
        is_there = TARGETS[name].is_installed()
        lacking = lacking_commands() if name == "stickyproxy" else []
        for operation in peer.operations:
            if operation.kind.value in kinds:
                yield peer, operation, _reason(name, operation, lacking, is_there=is_there)
        if is_there and not lacking and not is_controlled and Kind.CONTROL.value in kinds:
            is_controlled = True
            yield from ((peer, control, "") for control in CONTROLS)


def _reason(name: str, operation: Operation, lacking: Sequence[str], *, is_there: bool) -> str:
    if not is_there:
        return f"{name} is not installed: {HOW_TO_GET[name]}"
    if lacking:  # its configuration has not what the commands need
        return f"skipped: this version has no command `{operation.kind.value}` (lacking: {', '.join(lacking)})"
    return ""


def run_one(peer: Peer, operation: Operation, plan: Plan, children: Children) -> Row:
    """Run one; what fails is in the row."""
    try:
        row = Row(peer.name, operation.title, uvloop.run(run(peer, operation, plan, children)))
    except (RunError, OSError) as error:
        row = Row(peer.name, operation.title, failure=f"{type(error).__name__}: {error}")
    seen = f"{len(row.outcome.tally.cuts_s)} cut, {row.outcome.requests.failed} failed" if row.outcome else row.failure
    print(f"{peer.name}, {operation.title}: {seen}", file=sys.stderr, flush=True)
    return row


def find_miscounts(rows: Sequence[Row], tunnels: int) -> list[str]:
    """Return what the controls say against the counting."""
    nothing, killed = (control.title for control in CONTROLS)
    found = []
    for row in rows:
        if row.outcome is None or row.operation not in {nothing, killed}:
            continue
        expected = tunnels if row.operation == killed else 0
        if len(row.outcome.tally.cuts_s) != expected or bool(row.outcome.requests.failed) != bool(expected):
            found.append(f"{row.operation}: {len(row.outcome.tally.cuts_s)} of {expected} cuts were counted")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; return 0, or 1 if a run failed or a control was miscounted."""
    options = parse_options(arguments)
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    plan = Plan(options.times, options.tunnels, options.renewed, interval_s=options.interval, watch_s=options.watch)
    versions = {name: TARGETS[name].version() for name in options.targets if TARGETS[name].is_installed()}
    facts = gather_facts(versions)
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="reloads-") as folder, Children(Path(folder)) as children:
            Path(folder).chmod(0o755)  # nginx, started by root, reads it as another user
            one = partial(run_one, plan=plan, children=children)
            for peer, operation, reason in choose_runs(options.targets, options.kinds, options.limit):
                rows.append(Row(peer.name, operation.title, failure=reason) if reason else one(peer, operation))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(write_report(rows, [*describe(facts), *legend(plan)], is_markdown=options.markdown))
    miscounts = find_miscounts(rows, plan.tunnels)
    for text in miscounts:
        print(text, file=sys.stderr)
    return 1 if miscounts or any(row.outcome is None and "Error: " in row.failure for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
