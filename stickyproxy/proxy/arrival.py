"""Connections that come from another process: made from their descriptors and their state, and then gone on with.

An arrival is complete before anything of it is read or written. Until `go` the other process may still take it back.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.proxy.downstream import Downstream
from stickyproxy.proxy.handover import DownstreamState, HandOverError, TunnelState, share
from stickyproxy.proxy.tunnel import Tunnel
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stickyproxy.proxy.listener import Listener
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool

_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6, socket.AF_UNIX})


class _Waiting(asyncio.Protocol):
    """Stands where nothing may be read yet. What is read nonetheless is kept."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.early = b""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        self.early += data

    def hold(self) -> None:
        """Stop the reading, which the loop begins once the connection is made."""
        self.transport.pause_reading()


class Arrival:
    """A connection taken over and not begun with: either `go` or `drop` must follow, once."""

    def __init__(self, waiting: Sequence[_Waiting]) -> None:
        self._waiting = waiting

    def go(self) -> Tunnel | Downstream:
        """Count the connection, write what the other process could not, read, and return what goes on with it."""
        raise NotImplementedError

    def drop(self) -> None:
        """Give the connection up: this copy of it is closed, which its two ends do not see while there are others."""
        for waiting in self._waiting:
            waiting.transport.abort()


class _TunnelArrival(Arrival):
    def __init__(self, waiting: Sequence[_Waiting], plane: Plane, pool: Pool, state: TunnelState) -> None:
        super().__init__(waiting)
        self._plane, self._pool, self._state = plane, pool, state

    @override
    def go(self) -> Tunnel:
        plane, state = self._plane, self._state
        session = None
        if state.client_id:
            digest = self._pool.digest  # nearly always the same, and then one object for all
            pinned_to = digest if state.pinned_to == digest else state.pinned_to
            session = plane.sessions.find(state.client_id, pinned_to, state.pinned_at)
            session.open += 1
            plane.sessions.touch(session, plane.now)
        else:
            self._pool.strangers += 1
        origin = share(state.origin)
        tunnel = Tunnel(plane, self._pool, session, state.record if plane.log is not None else None, origin)
        plane.addresses.admit(origin)
        client, upstream = self._waiting
        tunnel.go_on(client.transport, upstream.transport, state)
        for side, waiting in ((tunnel.client, client), (tunnel.upstream, upstream)):
            if waiting.early:
                side.data_received(waiting.early)
        plane.on_accepted()
        return tunnel


class _DownstreamArrival(Arrival):
    def __init__(self, waiting: Sequence[_Waiting], listener: Listener, plane: Plane, state: DownstreamState) -> None:
        super().__init__(waiting)
        self._listener, self._plane, self._state = listener, plane, state

    @override
    def go(self) -> Downstream:
        (waiting,) = self._waiting
        downstream = Downstream(self._plane, self._listener, self._state.header)
        waiting.transport.set_protocol(downstream)
        downstream.go_on(waiting.transport, self._state)
        if waiting.early:
            downstream.data_received(waiting.early)
        return downstream


async def arrive(
    plane: Plane, listeners: Iterable[Listener], state: TunnelState | DownstreamState, descriptors: Sequence[int]
) -> Arrival:
    """Take over a connection of either kind; its listener is the one of the same address.

    The descriptors belong to it from now on. Raises HandOverError, with all of them closed, where nobody here can go on
    with it.
    """
    wanted = 2 if isinstance(state, TunnelState) else 1
    if len(descriptors) != wanted:
        _close(descriptors)
        raise HandOverError(f"a {state.kind} came with {len(descriptors)} descriptors, not {wanted}")
    if isinstance(state, TunnelState):
        return await arrive_tunnel(plane, state, *descriptors)
    for listener in listeners:
        if str(listener.address) == state.listener:
            return await arrive_downstream(plane, listener, state, *descriptors)
    _close(descriptors)
    raise HandOverError(f"nothing listens at {state.listener} here")


async def arrive_tunnel(
    plane: Plane, state: TunnelState, client: int, upstream: int, *, pool: Pool | None = None
) -> Arrival:
    """Take over a tunnel by the descriptors of both sides; see `arrive`. `pool` is that of its upstream, if known."""
    pool = pool or plane.pools.get(state.digest)
    if pool is None:
        _close((client, upstream))
        raise HandOverError(f"the upstream {state.upstream_id!r} is not known here")
    return _TunnelArrival(await _open(plane, client, upstream), plane, pool, state)


async def arrive_downstream(plane: Plane, listener: Listener, state: DownstreamState, client: int) -> Arrival:
    """Take over a client's connection that `listener` would have accepted; see `arrive`."""
    if listener.role.tls is not None:
        _close((client,))
        raise HandOverError(f"the listener at {listener.address} speaks TLS now")
    return _DownstreamArrival(await _open(plane, client), listener, plane, state)


async def _open(plane: Plane, *descriptors: int) -> list[_Waiting]:
    """Make transports that do not read; raise HandOverError, with all descriptors closed."""
    links: list[socket.socket] = []
    try:
        for descriptor in descriptors:
            links.append(_check(socket.socket(fileno=descriptor)))  # noqa: PERF401 -- those made are closed below
    except OSError as error:
        for link in links:
            link.detach()
        _close(descriptors)
        raise HandOverError(f"a descriptor is no connection: {error.strerror or error}") from error
    made = await asyncio.gather(*(_connect(plane, link) for link in links), return_exceptions=True)
    failed = [one for one in made if isinstance(one, BaseException)]
    waiting = [one for one in made if isinstance(one, _Waiting)]
    if failed:
        for one in waiting:
            one.transport.abort()
        for link, result in zip(links, made, strict=True):
            if isinstance(result, BaseException):
                link.close()
        if isinstance(failed[0], OSError | RuntimeError):
            raise HandOverError(f"the connection cannot be taken over: {failed[0]}") from failed[0]
        raise failed[0]
    return waiting


def _check(link: socket.socket) -> socket.socket:
    """Return what is a stream with another end, and not a listening socket; raise OSError."""
    if (
        link.family not in _FAMILIES
        or link.type != socket.SOCK_STREAM
        or link.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        link.detach()
        raise OSError("a socket of another type")
    link.setblocking(False)
    return link


async def _connect(plane: Plane, link: socket.socket) -> _Waiting:
    waiting, loop = _Waiting(), plane.loop
    task = spawn(loop.connect_accepted_socket(lambda: waiting, link), "take over a connection")
    # The task's first step queues the callback that makes the connection and begins to read. What stops the reading
    # again goes right behind it, before the loop looks at the socket.
    loop.call_soon(loop.call_soon, waiting.hold)
    await task
    return waiting


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
