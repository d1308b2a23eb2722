"""Which upstreams were removed lately: what was counted for them is still shown.

Whoever scrapes sees the last increments of a series only if it is there at the next scrape. Where app processes are
replaced all the time, as by deploys, the sums over all upstreams would be too low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

KEPT_S: Final = 300.0  # Prometheus looks back so far, and scrapes each minute by default
MAX_REMOVED: Final = 100  # as many more than the configuration may have are there in the tables of the workers


class Removed:
    """Upstreams by id, for `KEPT_S` seconds after their removal; of more than `MAX_REMOVED` those removed last.

    `now` is the time of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._removed: dict[str, tuple[str, float]] = {}  # cluster and when; the longest ago first

    def note(self, before: Mapping[str, str], present: Collection[str], now: float) -> None:
        """Take in which upstreams there were, with their clusters, and which there are."""
        for upstream_id, cluster in before.items():
            if upstream_id not in present:
                self._removed.pop(upstream_id, None)
                self._removed[upstream_id] = cluster, now
        known = self._removed.items()
        kept = [(one, (cluster, at)) for one, (cluster, at) in known if one not in present and now - at < KEPT_S]
        self._removed = dict(kept[-MAX_REMOVED:])

    def clusters(self, now: float) -> dict[str, str]:
        """Return the upstreams that are still shown, those removed first first, each with its cluster."""
        return {upstream_id: cluster for upstream_id, (cluster, at) in self._removed.items() if now - at < KEPT_S}

    def to_json(self, now: float) -> list[list[Any]]:
        """Return them as JSON, with how many seconds ago they were removed, and from which cluster."""
        return [[upstream_id, now - at, cluster] for upstream_id, (cluster, at) in self._removed.items()]

    @classmethod
    def from_json(cls, written: Iterable[Any], now: float) -> Self:
        """Return what `to_json` wrote in another process, whose clock may be another."""
        removed = cls()
        removed._removed = {
            str(upstream_id): (str(*cluster[:1]) or "default", now - float(age_s))
            for upstream_id, age_s, *cluster in written
        }
        return removed

    @override
    def __repr__(self) -> str:
        return f"<Removed {list(self._removed)}>"
