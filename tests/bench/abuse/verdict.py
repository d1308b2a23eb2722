"""What counts as too much: the ratio of a unit of abuse to a plain request, and when it is judged by its size instead.

Envoy's threat model calls it a denial of service where memory of a request is "100x or more above the configured header
or high watermark limit", its example being 10 KiB of request that take 1 MiB, and where the proxy uses "100x or more
CPU compared to client". Here, more strictly than by its first half, one request or connection of abuse must stay below
100 plain ones: CPU against a GET of 1 KiB on a kept connection, memory against a connection that is idle after one. An
input that is itself as large as 100 plain requests, in bytes or in reads, is judged by what the same bytes or reads
would cost as plain requests. The CPU of the client, Envoy's own measure, is shown beside it and not judged: it says as
much of the client's language as of the proxy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.bench.abuse.measure import Cost

LIMIT: Final = 100.0
NOTABLE: Final = 30.0  # of one request: named below the table even where it is allowed


@dataclass(frozen=True)
class Bases:
    """What is compared with: a plain request, and a connection that is idle after one."""

    plain: Cost
    idle: Cost


@dataclass(frozen=True)
class Ratios:
    """A cost in units of the plain one; None where the input has no bytes or reads. `cpu` and `memory` are judged."""

    by_request: float
    by_byte: float | None
    by_read: float | None
    by_client: float | None
    memory_by_connection: float
    memory_by_byte: float | None
    cpu: float
    memory: float

    @property
    def is_too_much(self) -> bool:
        return self.cpu >= LIMIT or self.memory >= LIMIT

    @property
    def is_notable(self) -> bool:
        return self.by_request >= NOTABLE or self.memory_by_connection >= NOTABLE


def compare(cost: Cost, bases: Bases, requests: int = 1) -> Ratios:
    """Return the ratios of a kind whose messages hold so many requests each."""
    plain = bases.plain
    by_request = cost.cpu_us / plain.cpu_us
    bytes_ratio, reads_ratio = cost.read_bytes / plain.read_bytes, cost.reads / plain.reads
    size = max(bytes_ratio, reads_ratio)
    memory = cost.kib / bases.idle.kib
    memory_size = bytes_ratio * requests  # a connection holds them all
    return Ratios(
        by_request=by_request,
        by_byte=_divided(by_request, bytes_ratio),
        by_read=_divided(by_request, reads_ratio),
        by_client=_divided(cost.cpu_us, cost.client_us),
        memory_by_connection=memory,
        memory_by_byte=_divided(memory, memory_size),
        cpu=by_request / size if size >= LIMIT else by_request,
        memory=memory / memory_size if memory_size >= LIMIT else memory,
    )


def _divided(value: float, by: float) -> float | None:
    return value / by if by else None
