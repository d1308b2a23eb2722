"""The results as a table, for a terminal or as Markdown, and below it what is too much or notable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.bench.abuse.verdict import LIMIT, NOTABLE
from tests.bench.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.abuse.kinds import Kind
    from tests.bench.abuse.measure import Cost
    from tests.bench.abuse.verdict import Ratios

COLUMNS: Final = (
    "kind", "what", "us CPU", "x request", "x byte", "x read", "x client", "KiB held", "x idle", "x byte held",
    "bytes", "reads", "verdict",
)  # fmt: skip
_LEFT: Final = (0, 1, len(COLUMNS) - 1)  # kind, what, verdict
LEGEND: Final = (
    "us CPU: of the proxy, for one request or connection; bytes, reads: what of it the proxy read, from both sides",
    "x request: in units of a plain request; x byte, x read: of what as many bytes or reads cost in plain requests",
    "x client: in units of the client's own CPU time for sending and reading (Envoy's measure; not judged)",
    "KiB held: the peak of the resident set, for each open connection; x idle: in units of an idle connection",
    "x byte held: in units of what an idle connection holds for each byte that it has sent and was sent",
    f"too much: {LIMIT:g} by request or by connection; an input as large as {LIMIT:g} plain requests: by its size",
)


@dataclass(frozen=True)
class Row:
    """One kind: its cost and ratios, or the reason why there are none."""

    kind: Kind
    cost: Cost | None = None
    ratios: Ratios | None = None
    failure: str = ""

    @property
    def verdict(self) -> str:
        if self.ratios is None:
            return "FAILED"
        if self.ratios.is_too_much:
            return "TOO MUCH"
        return "notable" if self.ratios.is_notable else "ok"

    @property
    def is_good(self) -> bool:
        return self.ratios is not None and not self.ratios.is_too_much


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of `COLUMNS`."""
    cost, ratios = row.cost, row.ratios
    if cost is None or ratios is None:
        return [row.kind.name, row.kind.title, *["-"] * (len(COLUMNS) - 3), row.verdict]
    return [
        row.kind.name,
        row.kind.title,
        f"{cost.cpu_us:,.1f}",
        *map(_ratio, (ratios.by_request, ratios.by_byte, ratios.by_read, ratios.by_client)),
        f"{cost.kib:,.1f}",
        _ratio(ratios.memory_by_connection),
        _ratio(ratios.memory_by_byte),
        f"{cost.read_bytes:,.0f}",
        f"{cost.reads:,.1f}",
        row.verdict,
    ]


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < LIMIT else f"{value:,.0f}"


def write_report(rows: Sequence[Row], facts: Sequence[str], *, is_markdown: bool) -> str:
    """Return the report: facts, legend, table, and the failures and what is notable, one on each line."""
    lines = write_table([COLUMNS, *map(cells, rows)], _LEFT, is_markdown=is_markdown)
    head = [f"- {line}" if is_markdown else line for line in (*facts, *LEGEND)]
    return "\n".join([*head, "", *lines, *_remarks(rows)])


def _remarks(rows: Sequence[Row]) -> list[str]:
    remarks = [f"{row.kind.name}: {row.failure}" for row in rows if row.failure]
    bad = [row.kind.name for row in rows if row.ratios is not None and row.ratios.is_too_much]
    notable = [row.kind.name for row in rows if row.ratios is not None and row.ratios.is_notable]
    if bad:
        remarks.append(f"too much: {', '.join(bad)}")
    if notable:
        remarks.append(f"{NOTABLE:g} plain requests or idle connections and more: {', '.join(notable)}")
    return [line for remark in remarks for line in ("", remark)]
