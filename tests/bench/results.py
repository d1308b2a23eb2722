"""What a run gives: a `Sample` of each round or the reason why there is none, and a `Row` of their medians."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.bench.scenarios import Scenario

BASE = "haproxy"


class RunError(Exception):
    """A round that counts for nothing: the text says why, with the end of the output of who failed."""


@dataclass(frozen=True)
class Sample:
    """One target in one round. `cpu_us` is for each request or echo, `kib` for each connection; None: not measured."""

    cpu_us: float | None = None
    kib: float | None = None
    per_s: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    errors: int = 0


@dataclass(frozen=True)
class Row:
    """One target in one scenario over all rounds."""

    scenario: Scenario
    target: str
    samples: tuple[Sample, ...]
    failures: tuple[str, ...] = ()

    def median(self, field: str) -> float | None:
        """Return the median of a field of the samples, over the rounds that have it; None if none has."""
        values = [value for sample in self.samples if (value := getattr(sample, field)) is not None]
        return statistics.median(values) if values else None

    @property
    def figure(self) -> float | None:
        return self.median(self.scenario.figure)

    @property
    def errors(self) -> int:
        """Return the errors of all rounds: a median would hide those of one round."""
        return sum(sample.errors for sample in self.samples)

    @property
    def is_clean(self) -> bool:
        return bool(self.samples) and not self.failures and not self.errors


def ratio_to_base(row: Row, rows: Iterable[Row]) -> float | None:
    """Return the row's figure in units of HAProxy's in the same scenario; None where one of the two is missing."""
    for other in rows:
        if other.target == BASE and other.scenario == row.scenario and other.figure and row.figure is not None:
            return row.figure / other.figure
    return None
