"""The result as a table, for a terminal or as Markdown: what must be zero, what was measured, what went wrong."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from tests.bench.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.deploys.run import Result


class Line(NamedTuple):
    """A figure; `is_bad` where it must be zero and is not."""

    name: str
    value: str
    is_bad: bool = False


def verdicts(result: Result) -> list[Line]:
    """Return what must be zero."""
    tally = result.tally
    codes = ", ".join(f"{code}: {number}" for code, number in sorted(tally.early.items()))
    counts = {
        "failed requests": tally.failed,
        "tunnels that did not open": tally.refused,
        "tunnels closed early": tally.early.total(),
        "messages lost": tally.lost,
        "messages doubled or out of order": tally.wrong,
        "sessions moved while open": tally.moved,
        "deploys that failed, and other faults": len(result.problems),
        "old app processes left after a deploy": result.old_left,
        "processes left at the end": result.left,
    }
    lines = [Line(name, f"{count:,}", is_bad=count > 0) for name, count in counts.items()]
    return [
        line._replace(value=f"{line.value} (Close codes: {codes})") if codes and "early" in line.name else line
        for line in lines
    ]


def measures(result: Result) -> list[Line]:
    """Return what was measured."""
    tally, prints = result.tally, result.footprints
    seconds = sorted(result.seconds) or [0.0]
    return [
        Line("deploys", f"{len(result.seconds)}"),
        Line("requests", f"{tally.requests:,}"),
        Line("tunnels opened", f"{tally.opened:,}"),
        Line("tunnels ended by their clients", f"{tally.ended:,}"),
        Line("messages", f"{tally.messages:,}"),
        Line("sessions", f"{tally.sessions:,}"),
        Line("sessions that came with the cookie of a generation that was gone", f"{tally.stale:,}"),
        Line("visitors moved between their first two contacts, before there is a session", f"{tally.moved_at_once:,}"),
        Line("moves after so long that the session may have ended", f"{tally.unjudged:,}"),
        Line("longest wait for a response, an echo", f"{tally.longest_request_s * 1e3:,.0f} ms, "
                                                     f"{tally.longest_echo_s * 1e3:,.0f} ms"),
        Line("seconds of a deploy: least, median, most",
             f"{seconds[0]:.1f}, {statistics.median(seconds):.1f}, {seconds[-1]:.1f}"),
        Line("memory (PSS, MiB) of the supervisor: before, after the first deploy, after the last",
             _steps([f"{one.supervisor_kib / 1024:.1f}" for one in prints])),
        Line("memory (PSS, MiB) of its workers: the same", _steps([f"{one.workers_kib / 1024:.1f}" for one in prints])),
        Line("descriptors of the supervisor: the same", _steps([str(one.descriptors) for one in prints])),
    ]  # fmt: skip


def _steps(values: Sequence[str]) -> str:
    return " → ".join((*values[:2], *values[2:][-1:]))


def is_good(result: Result) -> bool:
    """Say whether all is zero that must be."""
    return not any(line.is_bad for line in verdicts(result))


def write_report(result: Result, facts: Sequence[str], *, is_markdown: bool) -> str:
    """Return the whole report."""
    lines = [*verdicts(result), *measures(result)]
    head = [f"- {fact}" if is_markdown else fact for fact in facts]
    rows = [[line.name, f"{line.value} (!)" if line.is_bad else line.value] for line in lines]
    table = write_table([["", ""], *rows], (0,), is_markdown=is_markdown)
    bad = [f"{line.name}: {line.value}" for line in verdicts(result) if line.is_bad]
    verdict = f"NOT GOOD: {'; '.join(bad)}" if bad else "good: all is zero that must be"
    return "\n".join([*head, "", *table, "", *result.problems, *result.tally.told, verdict])
