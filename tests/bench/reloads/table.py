"""The outcomes as one table, for a terminal or as Markdown, with a legend that says what each column counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench.reloads.run import AT_ONCE_S
from tests.bench.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.bench.reloads.run import Outcome, Plan

COLUMNS: Final = (
    "proxy", "operation", "took effect", "WebSockets cut at once", "cut in all", "Close codes", "messages unanswered",
    "longest wait ms", "requests", "repeated", "failed", "processes", "MiB", "old processes", "tunnels in them",
    "on the upstream taken out",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: its outcome, or the reason why there is none."""

    peer: str
    operation: str
    outcome: Outcome | None = None
    failure: str = ""


def legend(plan: Plan) -> list[str]:
    """Return what the columns mean, one on each line."""
    return [
        (
            f"load: {plan.tunnels} WebSockets, a numbered message on each every 100 ms;"
            f" {plan.requests_per_s:g} requests a second on 10 keep-alive connections; who is cut is back in 100 ms"
        ),
        (
            f"operations: {plan.times}, one every {plan.interval_s:g} s, and between two"
            f" {plan.renewed} clients leave and come back; of those with a limit, and of the controls: 1"
        ),
        "took effect: a new connection showed the new configuration within 5 s, or the command said so",
        f"cut at once: within {AT_ONCE_S:g} s of an operation; cut in all: until {plan.watch_s:g} s after the last one",
        "Close codes: of the cut WebSockets, how many had a Close frame with that code; none: ended without one",
        "messages unanswered: sent on a WebSocket and not answered when it ended, or answered wrongly",
        "repeated: requests that met the close of a connection in use before, and were sent again on a new one",
        "failed: requests without a whole 200 in the end",
        (
            "processes, MiB (PSS): all of the proxy; before the first operation, after the last,"
            f" {plan.watch_s:g} s after it"
        ),
        (
            "old processes, tunnels in them: those that hold tunnels and do not take new connections; after the last"
            f" operation, {plan.watch_s:g} s after it"
        ),
        "on the upstream taken out: tunnels on the upstream that the last reload took out; before it, at the end",
    ]


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of `COLUMNS`."""
    outcome = row.outcome
    if outcome is None:
        return [row.peer, row.operation, *["-"] * (len(COLUMNS) - 2)]
    tally, requests = outcome.tally, outcome.requests
    codes = sorted(tally.codes.items(), key=lambda item: item[0] or 0)
    return [
        row.peer,
        row.operation,
        f"{outcome.effective} of {outcome.times}",
        str(outcome.cut_at_once),
        str(len(tally.cuts_s)),
        ", ".join(f"{'none' if code is None else code}: {number}" for code, number in codes) or "-",
        str(tally.unanswered + tally.wrong),
        f"{tally.longest_s * 1e3:.0f}",
        str(requests.sent),
        str(requests.repeated),
        str(requests.failed),
        _steps(usage.processes for usage in outcome.usage),
        _steps(round(usage.kib / 1024) for usage in outcome.usage),
        _steps(stranded.processes for stranded in outcome.stranded),
        _steps(stranded.tunnels for stranded in outcome.stranded),
        "-" if outcome.taken_out is None else _steps(outcome.taken_out),
    ]


def _steps(values: Iterable[int]) -> str:
    return " → ".join(map(str, values))


def write_report(rows: Sequence[Row], facts: Sequence[str], *, is_markdown: bool) -> str:
    """Return the report: facts, table, and below it what a run complained of or why it failed."""
    lines = write_table([COLUMNS, *map(cells, rows)], (0, 1), is_markdown=is_markdown)
    head = [f"- {fact}" if is_markdown else fact for fact in facts]
    return "\n".join([*head, "", *lines, *_remarks(rows)])


def _remarks(rows: Sequence[Row]) -> list[str]:
    texts = []
    for row in rows:
        reasons = [row.failure] if row.failure else list(row.outcome.complaints) if row.outcome else []
        texts += [f"{row.peer}, {row.operation}: {reason}" for reason in reasons]
    return [line for text in texts for line in ("", text)]
