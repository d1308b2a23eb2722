"""A worker: the data plane made from a configuration, its listeners, and its orderly end."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.sessions import SessionTable
from stickyproxy.affinity.token import Lifetimes, TokenCodec
from stickyproxy.proxy.listener import Listener, Role
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.settings import OFF, Pings, Settings, Timeouts
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.origin import OriginRules

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Mapping, Sequence

    from stickyproxy.affinity.health import HealthEvent
    from stickyproxy.config import Address, Config
    from stickyproxy.observe.record import Record

logger = logging.getLogger(__name__)

# A token is written anew after this part of the shortest of its lifetimes, so that they count from the last visit.
_REFRESH_PART: Final = 0.25
_TUNNEL_PAUSE_S: Final = 0.01  # between two tunnels, at most
_CLOSE_S: Final = 1.0  # for connections that were cut; it takes one turn of the loop


def make_settings(config: Config, connections: float = OFF) -> Settings:
    """Return the settings of the data plane that a configuration asks for; `connections` of clients may be open."""
    limits, websocket = config.limits, config.websocket
    return Settings(
        head=HeadLimits(limits.head_bytes, limits.line_bytes, limits.fields, limits.target_bytes),
        timeouts=_make_timeouts(config),
        handshake_bytes=limits.handshake_bytes,
        body_bytes=_or_off(limits.body_bytes),
        trailers_bytes=limits.trailers_bytes,
        chunk_extensions_bytes=limits.chunk_extensions_bytes,
        buffer_bytes=limits.buffer_bytes,
        connections=connections,
        connections_per_address=_or_off(limits.connections_per_address),
        idle_connections=limits.upstream_idle_connections,
        cookie=_make_cookie(config),
        trusted=config.trusted_proxies.networks,
        trusts_unix=config.trusted_proxies.unix,
        forwarded=config.forwarded.forwarded,
        prefix=config.forwarded.prefix,
        origins=None if websocket.origins is None else OriginRules(websocket.origins),
        pings=None if websocket.ping is None else Pings(websocket.ping.interval_s, _or_off(websocket.ping.timeout_s)),
    )


def _make_timeouts(config: Config) -> Timeouts:
    """Return the timeouts, whose names are those of the file."""
    written = config.timeouts
    return Timeouts(**{one.name: _or_off(getattr(written, one.name)) for one in fields(Timeouts)})


def _make_cookie(config: Config) -> CookieAttributes | None:
    cookie = config.affinity.cookie
    if cookie is None:
        return None
    return CookieAttributes(
        name=cookie.name,
        path=cookie.path,
        domain=cookie.domain,
        max_age_s=None if cookie.max_age_s is None else int(cookie.max_age_s),
        http_only=cookie.http_only,
        same_site=cookie.same_site,
        secure=cookie.secure,
        partitioned=cookie.partitioned,
    )


def _or_off(value: float | None) -> float:
    return OFF if value is None else value


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
        connections: float = OFF,
        report: Callable[[str, HealthEvent], None],
        log: Callable[[Record], None] | None,
    ) -> None:
        self._config = config
        self.plane = Plane(
            make_settings(config, connections),
            make_sessions(config, secrets),
            report=report,
            random=random.SystemRandom().random,
            log=log,
        )
        self.listeners: list[Listener] = []

    async def listen(
        self, bound: Sequence[tuple[Address, socket.socket]], contexts: Mapping[int, ssl.SSLContext] | None = None
    ) -> None:
        """Begin to accept on sockets that are bound already, one for each listener of the configuration.

        `contexts` are those of the listeners with TLS, by position.
        """
        contexts = contexts or {}
        for position, ((address, link), written) in enumerate(zip(bound, self._config.listeners, strict=True)):
            role = Role(contexts.get(position), written.proxy_protocol, written.redirect_to_https)
            self.listeners.append(Listener(self.plane, link, address, role))
        self.plane.gate.listeners = self.listeners
        for listener in self.listeners:
            await listener.start()

    def renew(self, position: int, context: ssl.SSLContext) -> None:
        """Let a listener, by position, use another TLS context from its next connection on."""
        listener = self.listeners[position]
        listener.role = replace(listener.role, tls=context)

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
        self.plane.gate.listeners = []
        for listener in listeners:
            listener.close()
