"""The immutable routing state that the control plane publishes and the data plane reads.

What the operator wants of an upstream (admin state) and what was observed of it (health) are two values, and a sticky
proxy asks two questions of them: may a new client be placed there, and may a pinned one stay?
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Final, Literal

from typing_extensions import override

Policy = Literal["least_sessions", "round_robin", "random"]
OnUnavailable = Literal["redispatch", "wait", "refuse"]
DIGEST_BYTES: Final = 8


class AdminState(StrEnum):
    """What the operator wants of an upstream."""

    READY = "ready"
    DRAIN = "drain"  # no new client; pinned ones stay
    MAINT = "maint"  # nobody


class Health(StrEnum):
    """What was observed of an upstream."""

    UNKNOWN = "unknown"  # not probed yet, or not at all: trusted
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


def upstream_digest(upstream_id: str) -> bytes:
    """Return the 8 bytes that stand for an upstream in tokens: no name or address can be read from them."""
    return blake2b(upstream_id.encode(), digest_size=DIGEST_BYTES, person=b"stickyproxy-id").digest()


def nowhere_digest(cluster: str) -> bytes:
    """Return what stands for no upstream of a cluster, where counters are kept by digest; no id has such a space."""
    return upstream_digest(f"none of {cluster}")


@dataclass(frozen=True, slots=True)
class Upstream:
    """One app process, as it stands at one moment.

    `is_refused` says that the last connection to it was refused: its process is gone, and with it every session that
    it held. A slow or failing probe never says that. With `max_sessions` sessions it is full: no new client is placed
    there, whatever else happens; None is no bound. One that `is_closing` has drained for as long as it may: a pin holds
    only while something of its session is open here.
    """

    id: str
    weight: int = 1
    admin: AdminState = AdminState.READY
    health: Health = Health.UNKNOWN
    is_refused: bool = False
    max_sessions: int | None = None
    is_closing: bool = False
    digest: bytes = field(default=b"", compare=False)

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", upstream_digest(self.id))

    @property
    def is_wanted(self) -> bool:
        """Say whether new clients are meant to be placed here, whatever was observed of it."""
        return self.admin is AdminState.READY and not self.is_closing

    @property
    def accepts_new(self) -> bool:
        """Say whether a client without a pin may be placed here."""
        return self.is_wanted and self.health is not Health.UNHEALTHY and not self.is_refused

    @property
    def accepts_pinned(self) -> bool:
        """Say whether any client that is pinned here may stay: yes, unless it is dead, in maintenance or closing."""
        return self.admin is not AdminState.MAINT and not self.is_refused and not self.is_closing


@dataclass(frozen=True, slots=True)
class Rules:
    """How a cluster chooses. `wait_s` seconds count only with on_unavailable "wait".

    `is_shared` says that several processes choose: for a client whose pin breaks they must all choose the same, since
    its requests may come to several at once.
    """

    policy: Policy = "least_sessions"
    on_unavailable: OnUnavailable = "redispatch"
    wait_s: float = 0.0
    has_cookie: bool = True
    uses_client_address: bool = False
    is_shared: bool = False


class Snapshot:
    """The routing state of one cluster; nothing in it ever changes.

    `pinnable` are the upstreams that keep their clients, by digest; `candidates` those for new clients. When none
    accepts any (all unhealthy, all refused), those that the operator wants are used all the same and `is_guarded` is
    true: better a doubtful upstream than none.
    """

    __slots__ = (
        "by_digest",
        "candidates",
        "cluster",
        "is_guarded",
        "may_be_full",
        "pinnable",
        "rotation",
        "rules",
        "upstreams",
    )

    def __init__(self, cluster: str, upstreams: tuple[Upstream, ...], rules: Rules) -> None:
        self.cluster = cluster
        self.upstreams = upstreams
        self.rules = rules
        self.by_digest = {upstream.digest: upstream for upstream in upstreams}
        self.pinnable = {upstream.digest: upstream for upstream in upstreams if upstream.accepts_pinned}
        wanted = tuple(u for u in upstreams if u.is_wanted)
        healthy = tuple(u for u in wanted if u.accepts_new)
        reachable = tuple(u for u in wanted if not u.is_refused)
        self.candidates = healthy or reachable or wanted
        self.is_guarded = bool(wanted) and not healthy
        self.may_be_full = any(upstream.max_sessions is not None for upstream in upstreams)
        self.rotation = interleave(tuple(u.weight for u in self.candidates))

    @override
    def __repr__(self) -> str:
        return f"<Snapshot {self.cluster} upstreams={len(self.upstreams)} candidates={len(self.candidates)}>"


_MAX_ROTATION: Final = 1 << 14  # entries; weights are scaled down to fit


def interleave(weights: tuple[int, ...]) -> tuple[int, ...]:
    """Return positions in an order that gives each its share and spreads it evenly; O(n log n) in the weights' sum.

    (3, 1) gives (0, 0, 1, 0). Weights whose sum passes 16,384 are scaled down, none below 1.
    """
    total = sum(weights)
    if total > _MAX_ROTATION:
        weights = tuple(max(1, weight * _MAX_ROTATION // total) for weight in weights)
    if len(set(weights)) <= 1:
        return tuple(range(len(weights)))
    turns = sorted(
        ((turn + 0.5) / weight, position) for position, weight in enumerate(weights) for turn in range(weight)
    )
    return tuple(position for _, position in turns)
