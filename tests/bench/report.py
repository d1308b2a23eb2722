"""The results as text and as JSON: the machine, the versions, and a line for each target in a scenario."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.results import BASE, Row, ratio_to_base
from tests.bench.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

COLUMNS = ("scenario", "target", "figure", "unit", f"x {BASE}", "per s", "p50 us", "p99 us", "errors", "rounds")
_LEFT = (0, 1, 3)  # scenario, target, unit


@dataclass(frozen=True)
class Facts:
    """What a reader must know to judge the figures. `load_average` is that of the minute before the run."""

    date: str
    cpu: str
    cores: int
    kernel: str
    python: str
    load_average: float
    held: str
    rounds: int
    seconds: float
    versions: Mapping[str, str]


def gather_facts(versions: Mapping[str, str], *, held: str = "", rounds: int = 0, seconds: float = 0.0) -> Facts:
    """Return the facts of this machine and run, as of now; how it was measured only where that is in rounds."""
    return Facts(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=cpu_model(Path("/proc/cpuinfo").read_text()),
        cores=os.cpu_count() or 1,
        kernel=platform.release(),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 1),
        held=held,
        rounds=rounds,
        seconds=seconds,
        versions=versions,
    )


def cpu_model(cpuinfo: str) -> str:
    """Return the model in the text of /proc/cpuinfo; the architecture where it names none, as on many ARM machines."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def describe(facts: Facts) -> list[str]:
    """Return the facts, one on each line."""
    return [
        f"date: {facts.date}",
        f"machine: {facts.cpu}, {facts.cores} cores, Linux {facts.kernel}, Python {facts.python}",
        f"load average before the run: {facts.load_average:g} (other work makes the figures worthless)",
        *([f"method: median of {facts.rounds} rounds of {facts.seconds:g} s; {facts.held}"] if facts.rounds else []),
        *(f"{name}: {version}" for name, version in facts.versions.items()),
    ]


def cells(row: Row, rows: Iterable[Row]) -> list[str]:
    """Return a row as text, in the order of `COLUMNS`; `-` is what was not measured."""
    ratio = ratio_to_base(row, rows)
    return [
        row.scenario.name,
        row.target,
        "invalid" if row.figure is None else f"{row.figure:.1f}",
        row.scenario.unit,
        "-" if ratio is None else f"{ratio:.2f}",
        *(_whole(row.median(field)) for field in ("per_s", "p50_us", "p99_us")),
        str(row.errors),
        f"{len(row.samples)}/{len(row.samples) + len(row.failures)}",
    ]


def terminal(rows: Sequence[Row], facts: Facts) -> str:
    """Return the report for a terminal: facts, aligned table, failures."""
    lines = write_table([COLUMNS, *(cells(row, rows) for row in rows)], _LEFT, is_markdown=False)
    return "\n".join([*describe(facts), "", *lines, *_failures(rows, "")])


def markdown(rows: Sequence[Row], facts: Facts) -> str:
    """Return the report as Markdown: facts as a list, a table, failures as code."""
    lines = write_table([COLUMNS, *(cells(row, rows) for row in rows)], _LEFT, is_markdown=True)
    return "\n".join([*(f"- {fact}" for fact in describe(facts)), "", *lines, *_failures(rows, "    ")])


def as_json(rows: Sequence[Row], facts: Facts) -> dict[str, Any]:
    """Return the report as plain values: the medians, and the samples that they are the medians of."""
    return {
        "facts": asdict(facts),
        "rows": [
            {
                "scenario": row.scenario.name,
                "target": row.target,
                "figure": row.figure,
                "unit": row.scenario.unit,
                f"ratio_to_{BASE}": ratio_to_base(row, rows),
                **{field: row.median(field) for field in ("cpu_us", "kib", "per_s", "p50_us", "p99_us")},
                "errors": row.errors,
                "failures": list(row.failures),
                "samples": [asdict(sample) for sample in row.samples],
            }
            for row in rows
        ],
    }


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _failures(rows: Iterable[Row], indent: str) -> list[str]:
    texts = [f"{row.scenario.name} {row.target}, {failure}" for row in rows for failure in row.failures]
    return [line for text in texts for line in ("", *(indent + part for part in text.splitlines()))]
