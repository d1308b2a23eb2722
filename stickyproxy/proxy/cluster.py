"""A cluster as the data plane knows it: its routing state, how it chooses, and the cookie of its clients."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.affinity.keys import KeyReader
from stickyproxy.affinity.policy import Chance
from stickyproxy.affinity.snapshot import Rules, Snapshot
from stickyproxy.observe.counters import UpstreamCounters
from stickyproxy.wire.cookies import CookieWriter

logger = logging.getLogger(__name__)

_SHOWN_BYTES: Final = 64  # of a path in the log

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy.proxy.settings import ClusterSettings


class Cluster:
    """What the exchanges with one app share. `snapshot` is assigned anew with each routing state of the cluster.

    `cookie_writer` is None where the cluster has no affinity cookie, `keys` where it knows its clients by nothing else.
    `none` are the counters of exchanges that reached no upstream.
    """

    __slots__ = ("_noted", "chance", "cookie_writer", "keys", "name", "none", "settings", "snapshot")

    def __init__(
        self,
        name: str,
        settings: ClusterSettings,
        random: Callable[[], float],
        none: UpstreamCounters | None = None,
    ) -> None:
        self.name = name
        self.none = none or UpstreamCounters()
        self.snapshot = Snapshot(name, (), Rules())
        self.chance = Chance(random)
        self._noted: set[str] = set()
        self.change_settings(settings)

    def change_settings(self, settings: ClusterSettings) -> None:
        """Work by other settings from the next exchange on."""
        self.settings = settings
        self.cookie_writer = CookieWriter(settings.cookie) if settings.cookie else None
        self.keys = KeyReader(settings.keys) if settings.keys else None

    def note_key(self, name: str, target: bytes) -> None:
        """Say once in the log of each key that it is in use."""
        if name not in self._noted:
            self._noted.add(name)
            path = target.partition(b"?")[0][:_SHOWN_BYTES].decode("latin-1")
            logger.info("clients are known by the key %s, too: first seen with %s", name, path)

    @override
    def __repr__(self) -> str:
        return f"<Cluster {self.name} {self.snapshot}>"
