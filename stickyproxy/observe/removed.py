"""Which upstreams were removed lately: what was counted for them is still shown.

Whoever scrapes sees the last increments of a series only if it is there at the next scrape. Where app processes are
replaced all the time, as by deploys, the sums over all upstreams would be too low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterable

KEPT_S: Final = 300.0  # Prometheus looks back so far, and scrapes each minute by default
MAX_REMOVED: Final = 100  # as many more than the configuration may have are there in the tables of the workers


class Removed:
    """Upstreams by id, for `KEPT_S` seconds after their removal; of more than `MAX_REMOVED` those removed last.

    `now` is the time of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._removed_at: dict[str, float] = {}  # the longest ago first

    def note(self, before: Iterable[str], present: Iterable[str], now: float) -> None:
        """Take in which upstreams there were and which there are."""
        present = frozenset(present)
        for upstream_id in before:
            if upstream_id not in present:
                self._removed_at.pop(upstream_id, None)
                self._removed_at[upstream_id] = now
        known = self._removed_at.items()
        kept = [(one, at) for one, at in known if one not in present and now - at < KEPT_S]
        self._removed_at = dict(kept[-MAX_REMOVED:])

    def ids(self, now: float) -> list[str]:
        """Return the upstreams that are still shown, those removed first first."""
        return [upstream_id for upstream_id, at in self._removed_at.items() if now - at < KEPT_S]

    def to_json(self, now: float) -> list[list[Any]]:
        """Return them as JSON, with how many seconds ago they were removed."""
        return [[upstream_id, now - at] for upstream_id, at in self._removed_at.items()]

    @classmethod
    def from_json(cls, written: Iterable[Any], now: float) -> Self:
        """Return what `to_json` wrote in another process, whose clock may be another."""
        removed = cls()
        removed._removed_at = {str(upstream_id): now - float(age_s) for upstream_id, age_s in written}
        return removed

    @override
    def __repr__(self) -> str:
        return f"<Removed {list(self._removed_at)}>"
