"""A worker: the data plane made from a configuration, its listeners, and its orderly end."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.sessions import SessionTable
from stickyproxy.affinity.token import Lifetimes, TokenCodec
from stickyproxy.proxy.listener import Listener
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.settings import Settings, Timeouts
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.head import HeadLimits

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from stickyproxy.affinity.health import HealthEvent
    from stickyproxy.config import Address, Config
    from stickyproxy.observe.record import Record

logger = logging.getLogger(__name__)

_OFF: Final = float("inf")
# A token is written anew after this part of the shortest of its lifetimes, so that they count from the last visit.
_REFRESH_PART: Final = 0.25
_TUNNEL_PAUSE_S: Final = 0.01  # between two tunnels, at most
_CLOSE_S: Final = 1.0  # for connections that were cut; it takes one turn of the loop


def make_settings(config: Config) -> Settings:
    """Return the settings of the data plane that a configuration asks for."""
    timeouts, limits, cookie = config.timeouts, config.limits, config.affinity.cookie
    return Settings(
        head=HeadLimits(limits.head_bytes, limits.line_bytes, limits.fields, limits.target_bytes),
        timeouts=Timeouts(
            head_s=timeouts.head_s,
            body_idle_s=_or_off(timeouts.body_idle_s),
            keep_alive_s=timeouts.keep_alive_s,
            connect_s=timeouts.connect_s,
            response_s=_or_off(timeouts.response_s),
            upstream_keep_alive_s=timeouts.upstream_keep_alive_s,
            tunnel_idle_s=_or_off(timeouts.tunnel_idle_s),
            linger_s=timeouts.linger_s,
        ),
        trailers_bytes=limits.trailers_bytes,
        chunk_extensions_bytes=limits.chunk_extensions_bytes,
        buffer_bytes=limits.buffer_bytes,
        idle_connections=limits.upstream_idle_connections,
        cookie=None
        if cookie is None
        else CookieAttributes(
            name=cookie.name,
            path=cookie.path,
            domain=cookie.domain,
            max_age_s=None if cookie.max_age_s is None else int(cookie.max_age_s),
            http_only=cookie.http_only,
            same_site=cookie.same_site,
            secure=cookie.secure,
            partitioned=cookie.partitioned,
        ),
        trusted=config.trusted_proxies.networks,
        trusts_unix=config.trusted_proxies.unix,
        forwarded=config.forwarded.forwarded,
        prefix=config.forwarded.prefix,
    )


def _or_off(timeout_s: float | None) -> float:
    return _OFF if timeout_s is None else timeout_s


def make_sessions(config: Config, secrets: Sequence[bytes]) -> SessionTable:
    """Return the empty session table of a cluster."""
    affinity = config.affinity
    lifetimes = Lifetimes(affinity.max_idle_s, affinity.max_life_s)
    limits = [affinity.max_idle_s, affinity.cookie.max_age_s if affinity.cookie else None]
    shortest = min((limit for limit in limits if limit is not None), default=None)
    return SessionTable(
        TokenCodec(secrets),
        lifetimes,
        idle_s=affinity.session_idle_s,
        refresh_s=None if shortest is None else shortest * _REFRESH_PART,
    )


class Worker:
    """One data plane with its listeners."""

    def __init__(
        self,
        config: Config,
        secrets: Sequence[bytes],
        *,
        report: Callable[[str, HealthEvent], None],
        log: Callable[[Record], None] | None,
    ) -> None:
        self.plane = Plane(
            make_settings(config),
            make_sessions(config, secrets),
            report=report,
            random=random.SystemRandom().random,
            log=log,
        )
        self.listeners: list[Listener] = []

    async def listen(self, bound: Sequence[tuple[Address, socket.socket]]) -> None:
        """Begin to accept on sockets that are bound already."""
        self.listeners = [Listener(self.plane, link, address) for address, link in bound]
        for listener in self.listeners:
            await listener.start()

    async def drain(self, grace_s: float) -> None:
        """Accept nobody any more, let exchanges finish, and close tunnels one after the other over half of the grace.

        Returns when nothing is open any more, or after `grace_s` seconds; the rest is cut by `close`.
        """
        plane, loop = self.plane, self.plane.loop
        self._stop_listening()
        plane.stop()
        until = loop.time() + grace_s
        tunnels = tuple(plane.tunnels)
        # Paced, so that the clients of thousands of tunnels do not all reconnect in the same moment; the other half
        # is for them to answer the Close frame.
        pause_s = grace_s / 2 / len(tunnels) if tunnels else 0.0
        began = loop.time()
        for number, tunnel in enumerate(tunnels):
            delay_s = began + number * min(pause_s, _TUNNEL_PAUSE_S) - loop.time()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tunnel.shut()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await plane.wait_until_empty()
        if plane.tunnels or plane.downstreams:
            logger.warning(
                "the grace period is over: %d tunnels and %d connections are cut",
                len(plane.tunnels),
                len(plane.downstreams),
            )

    async def close(self) -> None:
        """End everything at once, and return when each connection that was cut has been counted and logged."""
        self._stop_listening()
        self.plane.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self.plane.wait_until_empty()

    def _stop_listening(self) -> None:
        """Close each listener once: by the second time, its Unix socket may be another proxy's."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.close()
