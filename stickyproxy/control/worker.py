"""A worker: the data plane made from a configuration, its listeners, what a reload changes, and its orderly end."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.routes import Route
from stickyproxy.affinity.sessions import SessionTable
from stickyproxy.affinity.snapshot import Snapshot, upstream_digest
from stickyproxy.affinity.token import Lifetimes, TokenCodec
from stickyproxy.config import DEFAULT_CLUSTER
from stickyproxy.control.closing import Closing
from stickyproxy.observe.access_log import AccessLog
from stickyproxy.observe.counters import ACCESS_LOG_DROPPED
from stickyproxy.proxy.listener import Listener, Role
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.settings import OFF, ClusterSettings, Pings, Settings, Timeouts
from stickyproxy.tasks import spawn
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.frames import GOING_AWAY
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.origin import OriginRules

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from stickyproxy.affinity.keys import Key
    from stickyproxy.config import Address, Cluster, Config, RouteCookie
    from stickyproxy.observe.table import Table
    from stickyproxy.proxy.endpoint import Endpoint

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
        clusters={
            one.name: ClusterSettings(cookie=_make_cookie(config, one), keys=_make_keys(one))
            for one in config.every_cluster
        },
        routes=_make_routes(config),
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


def _make_cookie(config: Config, cluster: Cluster, said: RouteCookie | None = None) -> CookieAttributes | None:
    """Return the attributes of a cluster's cookie, with what a route says of them."""
    cookie = cluster.affinity.cookie
    if cookie is None:
        return None
    if said is not None:
        cookie = said.over(cookie)
    return CookieAttributes(
        name=config.name_cookie(cluster),
        path=cookie.path,
        domain=cookie.domain,
        max_age_s=None if cookie.max_age_s is None else int(cookie.max_age_s),
        http_only=cookie.http_only,
        same_site=cookie.same_site,
        secure=cookie.secure,
        partitioned=cookie.partitioned,
    )


def _make_keys(cluster: Cluster) -> tuple[Key, ...]:
    """Return the keys of the ladder. Values of two clusters are not the same."""
    scope = "" if cluster.name == DEFAULT_CLUSTER else cluster.name
    return tuple(replace(one.compile(), scope=scope) for one in cluster.affinity.keys)


def _make_routes(config: Config) -> tuple[Route, ...]:
    clusters = {one.name: one for one in config.every_cluster}
    return tuple(
        Route(
            cluster=one.cluster,
            host=one.host or "",
            path="" if one.path in {None, "/"} else str(one.path),
            strips_prefix=one.strip_prefix,
            cookie=None if one.cookie is None else _make_cookie(config, clusters[one.cluster], one.cookie),
        )
        for one in config.routes
    )


def _or_off(value: float | None) -> float:
    return OFF if value is None else value


def make_sessions(config: Config, secrets: Sequence[bytes]) -> SessionTable:
    """Return the empty session table of all clusters."""
    affinity = config.affinity
    lifetimes = Lifetimes(affinity.max_idle_s, affinity.max_life_s)
    cookies = [*(one.affinity.cookie for one in config.every_cluster), *(one.cookie for one in config.routes)]
    limits = [affinity.max_idle_s, *(cookie.max_age_s for cookie in cookies if cookie is not None)]
    shortest = min((limit for limit in limits if limit is not None), default=None)
    return SessionTable(
        TokenCodec(secrets),
        lifetimes,
        idle_s=affinity.session_idle_s,
        refresh_s=None if shortest is None else shortest * _REFRESH_PART,
    )


def _open_access_log(config: Config) -> AccessLog | None:
    """Begin to write the access log that the configuration asks for; raise UsageError where it cannot be opened."""
    log = AccessLog(config.access_log) if config.access_log is not None else None
    if log is not None:
        log.start()
    return log


class Worker:
    """One data plane with its listeners and its access log.

    `report` takes what was observed of an upstream. The sockets of listeners are given to the worker, which closes
    them; the files of Unix sockets are not its own.
    """

    def __init__(
        self,
        config: Config,
        secrets: Sequence[bytes],
        *,
        connections: float = OFF,
        report: Callable[[str, HealthEvent], None],
        table: Table | None = None,
    ) -> None:
        self.config = config
        self._report_on = report
        self.access_log = _open_access_log(config)
        self._former_logs: list[AccessLog] = []  # that are being closed
        self._dropped = 0  # lines of those that are closed
        self.plane = Plane(
            make_settings(config, connections),
            make_sessions(config, secrets),
            report=self._report,
            random=random.SystemRandom().random,
            log=self.access_log.write if self.access_log is not None else None,
            table=table,
        )
        self.listeners: dict[Address, Listener] = {}
        self._closings: list[Closing] = []

    def tick(self) -> None:
        """Show in the counters what the plane does not know."""
        logs = (*self._former_logs, *([] if self.access_log is None else [self.access_log]))
        self.plane.counters.cells[ACCESS_LOG_DROPPED] = self._dropped + sum(log.dropped for log in logs)

    def add_listeners(
        self, bound: Mapping[Address, socket.socket], contexts: Mapping[Address, ssl.SSLContext] | None = None
    ) -> None:
        """Take sockets that are bound already, by the addresses of the configuration; nobody is accepted yet.

        `contexts` are those of the listeners with TLS.
        """
        contexts = contexts or {}
        for written in self.config.listeners:
            link = bound.get(written.address)
            if link is not None and written.address in self.listeners:
                link.close()  # it is listened on already
            elif link is not None:
                role = Role(contexts.get(written.address), written.proxy_protocol, written.redirect_to_https)
                self.listeners[written.address] = Listener(self.plane, link, written.address, role)

    async def accept(self) -> None:
        """Begin to accept on all listeners, or on those that were added."""
        self.plane.gate.listeners = list(self.listeners.values())
        for listener in self.plane.gate.listeners:
            await listener.start()

    def pause(self) -> None:
        """Accept nobody for now; `accept` goes on."""
        self.plane.gate.listeners = []
        for listener in self.listeners.values():
            listener.pause()

    def stop_accepting(self) -> None:
        """Accept nobody any more; what is open goes on."""
        listeners, self.listeners = self.listeners, {}
        self.plane.gate.listeners = []
        for listener in listeners.values():
            listener.close()

    def reload(
        self,
        config: Config,
        secrets: Sequence[bytes],
        *,
        connections: float,
        contexts: Mapping[Address, ssl.SSLContext],
    ) -> None:
        """Work by another configuration from now on; what is open stays. Raises UsageError, with nothing changed.

        Listeners that it does not name any more are closed; new ones are added by `add_listeners`.
        """
        if config.access_log != self.config.access_log:
            before, self.access_log = self.access_log, _open_access_log(config)
            if before is not None:
                self._former_logs.append(before)
                spawn(self._close_former(before), "close the former access log")
            self.plane.log = self.access_log.write if self.access_log is not None else None
        self.config = config
        self.plane.change_settings(make_settings(config, connections))
        self.plane.sessions.adopt(make_sessions(config, secrets))
        written = {one.address: one for one in config.listeners}
        for address in self.listeners.keys() - written.keys():
            self.listeners.pop(address).close()
        for address, listener in self.listeners.items():
            one = written[address]
            listener.change_role(Role(contexts.get(address), one.proxy_protocol, one.redirect_to_https))
        self.plane.gate.listeners = list(self.listeners.values())

    async def _close_former(self, log: AccessLog) -> None:
        """Close an access log that is no longer written; it waits for its reader, so in a thread."""
        await asyncio.to_thread(log.close)
        self._former_logs.remove(log)
        self._dropped += log.dropped

    def renew(self, address: Address, context: ssl.SSLContext) -> None:
        """Let a listener use another TLS context from its next connection on; nothing where it is gone."""
        listener = self.listeners.get(address)
        if listener is not None:
            listener.change_role(replace(listener.role, tls=context))

    def publish(self, snapshots: Iterable[Snapshot], endpoints: Mapping[str, Endpoint]) -> None:
        """Take a new routing state."""
        self._endpoints = endpoints
        self.plane.publish(snapshots, endpoints)

    def _report(self, upstream_id: str, event: HealthEvent) -> None:
        """Report what was observed, and act at once on what cannot wait until the answer comes: a dead upstream."""
        if event in {HealthEvent.REFUSED, HealthEvent.CONNECTED}:
            digest, is_refused = upstream_digest(upstream_id), event is HealthEvent.REFUSED
            cluster = self.plane.find_cluster(digest)
            if cluster is not None and cluster.snapshot.by_digest[digest].is_refused is not is_refused:
                before = cluster.snapshot
                upstreams = tuple(
                    replace(one, is_refused=is_refused) if one.id == upstream_id else one for one in before.upstreams
                )
                after = Snapshot(before.cluster, upstreams, before.rules)
                states = [one.snapshot if one is not cluster else after for one in self.plane.clusters.values()]
                self.plane.publish(states, self._endpoints)
        self._report_on(upstream_id, event)

    async def drain(self, grace_s: float) -> None:
        """Accept nobody any more, let exchanges finish, and close tunnels one after the other over half of the grace.

        Returns when nothing is open any more, or after `grace_s` seconds; the rest is cut by `close`.
        """
        plane, loop = self.plane, self.plane.loop
        self.stop_accepting()
        plane.stop()
        until = loop.time() + grace_s
        await self.shut_tunnels(grace_s / 2)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await plane.wait_until_empty()
        if plane.tunnels or plane.downstreams:
            logger.warning(
                "the grace period is over: %d tunnels and %d connections are cut",
                len(plane.tunnels),
                len(plane.downstreams),
            )

    async def shut_tunnels(
        self, over_s: float, code: int = GOING_AWAY, reason: str = "the proxy is going away"
    ) -> None:
        """Send each tunnel that is open now a Close frame, one after the other, within `over_s` seconds.

        Paced, so that the clients of thousands of tunnels do not all reconnect in the same moment; as much time again
        is for them to answer.
        """
        loop, tunnels = self.plane.loop, tuple(self.plane.tunnels)
        pause_s = min(over_s / len(tunnels), _TUNNEL_PAUSE_S) if tunnels else 0.0
        began = loop.time()
        for number, tunnel in enumerate(tunnels):
            delay_s = began + number * pause_s - loop.time()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tunnel.shut(code, reason)

    def shut_upstreams(self, digests: Collection[bytes], per_s: float, reason: str) -> int:
        """Begin to close the tunnels of some upstreams with 1012, of `per_s` clients a second; return their number.

        Where some of these upstreams are being closed already, this pace counts for them from now on. Raises ValueError
        for what is no pace.
        """
        closing = Closing(self.plane, digests, per_s, reason)
        for former in tuple(self._closings):
            closing.take_from(former)
        self._closings.append(closing)
        closing.task.add_done_callback(lambda _: self._closings.remove(closing))
        return len(closing.find_tunnels())

    async def close(self) -> None:
        """End everything at once, and return when each connection that was cut has been counted and logged."""
        for closing in self._closings:
            closing.task.cancel()
        self.stop_accepting()
        self.plane.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self.plane.wait_until_empty()
        if self.access_log is not None:
            self.access_log.close()
        self.tick()
