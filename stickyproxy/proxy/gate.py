"""The gate: stops accepting when as many clients are connected as may be, and goes on when there is room again.

What is not accepted waits in the kernel's queue; nothing that is open suffers. Running out of descriptors would be
worse: libuv then accepts and closes at once, so that clients are lost, and no upstream can be dialled.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.observe.counters import ACCEPT_PAUSES
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from stickyproxy.proxy.listener import Listener
    from stickyproxy.proxy.plane import Plane

logger = logging.getLogger(__name__)

_REOPEN_PART: Final = 7 / 8  # opened at once when so few are left; in between, with the next sweep
_EVICTED_PART: Final = 1 / 8  # of the connections, as many idle ones are closed to make room


class Gate:
    """Opens and closes the listeners of a data plane together."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self.listeners: list[Listener] = []
        self.is_open = True

    @property
    def _limit(self) -> float:
        return self._plane.settings.connections

    @property
    def has_room(self) -> bool:
        """Say whether one more client may connect."""
        return self._plane.connections < self._limit

    def on_accepted(self) -> None:
        """Close the gate when the last place was taken."""
        if self.is_open and not self.has_room:
            self.is_open = False
            self._plane.counters.cells[ACCEPT_PAUSES] += 1
            logger.warning("%d clients are connected, as many as may be: others wait", self._plane.connections)
            for listener in self.listeners:
                listener.pause()

    def on_closed(self) -> None:
        """Open the gate again once there is room for many."""
        if not self.is_open and self._plane.connections < self._limit * _REOPEN_PART:
            self._open()

    def sweep(self) -> None:
        """Open the gate again once there is room for one, and make room where somebody waits."""
        if self.is_open:
            return
        if self.has_room:
            self._open()
        elif any(listener.has_waiting for listener in self.listeners):
            self._evict()

    def _open(self) -> None:
        if self._plane.is_stopping:
            return
        self.is_open = True
        for listener in self.listeners:
            spawn(listener.start(), "accept again")

    def _evict(self) -> None:
        """Close the keep-alive connections that have waited longest for a next request: a client opens another."""
        idle = [one for one in self._plane.downstreams if one.is_idle]
        idle.sort(key=lambda one: one.deadline)
        for downstream in idle[: int(self._plane.connections * _EVICTED_PART) or 1]:
            downstream.stop()

    @override
    def __repr__(self) -> str:
        return f"<Gate {'open' if self.is_open else 'closed'} {self._plane.connections}/{self._limit:g}>"
