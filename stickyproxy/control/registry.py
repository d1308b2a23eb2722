"""The sessions of all workers, each counted once: a browser's connections may be spread over several of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping



class SessionRegistry:
    """Which client is active at which upstream, as the workers say. Client ids and digests are hexadecimal text.

    Where two workers have a client at different upstreams, the pin that was made last counts.
    """

    def __init__(self) -> None:
        self._holders: dict[str, set[int]] = {}  # client id to the workers that have it
        self._pins: dict[str, tuple[int, str]] = {}  # client id to when and where it was pinned
        self._held: dict[int, set[str]] = {}  # worker to client ids
        self.counts: dict[str, int] = {}
        """Active sessions by upstream digest."""

    def __len__(self) -> int:
        return len(self._pins)

    def take(self, worker: int, news: Mapping[str, Any]) -> None:
        """Take in what a worker says.

        `began` lists [client id, digest, pinned at] of sessions that are new or were moved, `ended` client ids.
        """
        for client_id in news.get("ended", ()):
            self._end(worker, client_id)
        for client_id, digest, pinned_at in news.get("began", ()):
            self._begin(worker, client_id, digest, pinned_at)

    def _begin(self, worker: int, client_id: str, digest: str, pinned_at: int) -> None:
        self._holders.setdefault(client_id, set()).add(worker)
        self._held.setdefault(worker, set()).add(client_id)
        before = self._pins.get(client_id)
        if before is None or before[0] <= pinned_at:
            self._pins[client_id] = pinned_at, digest
            self._count(digest, +1)
            if before is not None:
                self._count(before[1], -1)

    def _end(self, worker: int, client_id: str) -> None:
        self._held.get(worker, set()).discard(client_id)
        holders = self._holders.get(client_id)
        if holders is None:
            return
        holders.discard(worker)
        if not holders:
            del self._holders[client_id]
            self._count(self._pins.pop(client_id)[1], -1)

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
        return f"<SessionRegistry of {len(self._pins)} sessions>"
