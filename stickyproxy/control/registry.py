"""The sessions of all workers, each counted once: a browser's connections may be spread over several of them."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping


class SessionRegistry:
    """Which client is active at which upstream, as the workers say. Client ids and digests are hexadecimal text.

    Where two workers have a client at different upstreams, the pin that was made last counts; of two that were made in
    the same second, the one that was told of last.
    """

    def __init__(self) -> None:
        # Client id to the worker that has it, to when and where it is pinned there; who told of it last comes last.
        self._pins: dict[str, dict[int, tuple[int, str]]] = {}
        self._counted: dict[str, str] = {}  # client id to the digest that it counts for
        self._held: dict[int, set[str]] = {}  # worker to client ids
        self.counts: dict[str, int] = {}
        """Active sessions by upstream digest."""

    def __len__(self) -> int:
        return len(self._counted)

    def take(self, worker: int, news: Mapping[str, Any]) -> None:
        """Take in what a worker says; raise ValueError or TypeError, with nothing taken in, where it is nonsense.

        `began` lists [client id, digest, pinned at] of sessions that are new or were moved, `ended` client ids.
        """
        began = [
            (str(client_id), str(digest), int(pinned_at)) for client_id, digest, pinned_at in news.get("began", ())
        ]
        for client_id in [str(one) for one in news.get("ended", ())]:
            self._end(worker, client_id)
        for client_id, digest, pinned_at in began:
            self._begin(worker, client_id, digest, pinned_at)

    def _begin(self, worker: int, client_id: str, digest: str, pinned_at: int) -> None:
        pins = self._pins.setdefault(client_id, {})
        pins.pop(worker, None)
        pins[worker] = pinned_at, digest
        self._held.setdefault(worker, set()).add(client_id)
        self._count_anew(client_id, pins)

    def _end(self, worker: int, client_id: str) -> None:
        self._held.get(worker, set()).discard(client_id)
        pins = self._pins.get(client_id, {})
        if pins.pop(worker, None) is not None:
            self._count_anew(client_id, pins)
            if not pins:
                del self._pins[client_id]

    def _count_anew(self, client_id: str, pins: Mapping[int, tuple[int, str]]) -> None:
        """Count a client for the pin that was made last, or for none any more."""
        before = self._counted.pop(client_id, None)
        # Of equals `max` takes the first.
        after = max(reversed(list(pins.values())), key=itemgetter(0))[1] if pins else None
        if after is not None:
            self._counted[client_id] = after
        if after != before:
            if before is not None:
                self._count(before, -1)
            if after is not None:
                self._count(after, +1)

    def forget(self, worker: int) -> None:
        """End what only this worker had: it is gone."""
        for client_id in tuple(self._held.get(worker, ())):
            self._end(worker, client_id)
        self._held.pop(worker, None)

    def count(self, digest: bytes) -> int:
        """Return the active sessions at an upstream."""
        return self.counts.get(digest.hex(), 0)

    def _count(self, digest: str, change: int) -> None:
        count = self.counts.get(digest, 0) + change
        if count:
            self.counts[digest] = count
        else:
            self.counts.pop(digest, None)

    @override
    def __repr__(self) -> str:
        return f"<SessionRegistry of {len(self._counted)} sessions>"
