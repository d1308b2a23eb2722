"""A bound socket that accepts clients, and what it does before the first request: PROXY protocol and TLS."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stickyproxy.errors import UsageError
from stickyproxy.observe.counters import CONNECTIONS
from stickyproxy.proxy.downstream import Downstream
from stickyproxy.proxy.handshake import Handshake
from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter, is_in

if TYPE_CHECKING:
    import asyncio
    import ssl

    from stickyproxy.config import Address
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.wire.proxy_protocol import ProxyHeader

_BACKLOG: Final = 4096  # a thousand clients that reconnect at once must not be refused
_MAX_WRITERS: Final = 4096
# Since Python 3.13 the end of a server removes its socket: a pause would.
UNIX_OPTIONS: Final[dict[str, Any]] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
_UNKNOWN: Final = "unknown"  # RFC 7239, section 6.2


def bind(address: Address) -> socket.socket:
    """Return a socket bound to an address; raise UsageError with the reason where that cannot be.

    An empty host is all interfaces, IPv6 and IPv4. The socket of a dead process is taken over, a living one's is not.
    """
    try:
        if address.path:
            return _bind_unix(address.path)
        family = socket.AF_INET6 if ":" in address.host or (not address.host and socket.has_ipv6) else socket.AF_INET
        link = socket.socket(family, socket.SOCK_STREAM)
        try:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address.host in {"", "::"} else 1)
            link.bind((address.host, address.port))
        except OSError:
            link.close()
            raise
    except OSError as error:
        raise UsageError(f"cannot listen on {address}: {_explain(error)}") from error
    return link


def _bind_unix(path: str) -> socket.socket:
    if os.path.lexists(path) and stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 -- one call, no objects
        _remove_dead_socket(path)
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.bind(path)
    except OSError:
        link.close()
        raise
    return link


def _remove_dead_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:  # one of another type or owner is alive too
            raise OSError(errno.EADDRINUSE, "another process listens there")
    Path(path).unlink()


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the address is in use; is another proxy running?"
    if error.errno == errno.EACCES:
        return "permission denied; ports below 1024 need a privilege"
    return (error.strerror or str(error)).lower()


@dataclass(frozen=True, slots=True)
class Role:
    """What a listener is for, beside plain HTTP.

    `redirect_to_https` is the port that its clients are sent to; `proxy_protocol` says that each connection begins
    with a PROXY protocol header, which only trusted proxies may send.
    """

    tls: ssl.SSLContext | None = None
    proxy_protocol: bool = False
    redirect_to_https: int | None = None


class Listener:
    """One bound socket; `address` is where it really listens, with the port that the system chose for port 0."""

    def __init__(self, plane: Plane, link: socket.socket, address: Address, role: Role | None = None) -> None:
        self._plane = plane
        self._link = link
        self.address = address
        self.port = "" if address.path else str(link.getsockname()[1])
        self.role = role or Role()
        self._server: asyncio.Server | None = None
        self._is_closed = False
        self._writers: dict[tuple[str, str, bool, bool], ForwardedWriter] = {}

    async def start(self) -> None:
        """Begin to accept, or go on after a pause."""
        if self._server is not None or self._is_closed:
            return
        loop = self._plane.loop
        # The server gets a descriptor of its own: it closes it, and the socket with its queue stays for the next one.
        link = self._link.dup()
        if self.address.path:
            self._server = await loop.create_unix_server(self._accept, sock=link, backlog=_BACKLOG, **UNIX_OPTIONS)
        else:
            self._server = await loop.create_server(self._accept, sock=link, backlog=_BACKLOG)
        if not self._may_accept:  # meanwhile
            self.pause()

    @property
    def _may_accept(self) -> bool:
        return not self._is_closed and self._plane.gate.is_open

    def _accept(self) -> asyncio.BaseProtocol:
        role = self.role
        self._plane.counters.cells[CONNECTIONS] += 1
        if role.tls is None and not role.proxy_protocol:
            return Downstream(self._plane, self)
        return Handshake(self._plane, self)

    def change_role(self, role: Role) -> None:
        """Be for something else from the next connection on; what the settings say of clients is looked at anew."""
        self.role = role
        self._writers.clear()

    def pause(self) -> None:
        """Accept nobody for now; who connects waits in the kernel's queue until `start`."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    @property
    def has_waiting(self) -> bool:
        """Say whether a client waits to be accepted; one system call."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Accept nobody any more; what is open goes on, and the file of a Unix socket is left to its owner."""
        self._is_closed = True
        self.pause()
        self._link.close()

    def forwarded_writer(self, transport: asyncio.BaseTransport, header: ProxyHeader | None = None) -> ForwardedWriter:
        """Return what writes the fields about the client of a connection; shared by all from one address.

        Where a trusted proxy has named the client in a PROXY protocol header, that is the client. Where it has named
        none, the client is unknown, and not believed as the proxy would be.
        """
        is_https = self.role.tls is not None or (header is not None and header.is_tls)
        if header is not None and header.source is not None:
            key = (header.source, str(header.destination_port), is_https, True)
        else:
            key = (self.peer_address(transport), self.port, is_https, header is None)
        writer = self._writers.get(key)
        if writer is None:
            if len(self._writers) >= _MAX_WRITERS:
                self._writers.clear()
            writer = self._writers[key] = self._make_writer(*key)
        return writer

    def peer_address(self, transport: asyncio.BaseTransport) -> str:
        """Return the address at the other end of a connection as text, or "unix"."""
        peer = transport.get_extra_info("peername")
        # A client that has reset the connection before it was accepted has no address any more.
        return peer[0] if isinstance(peer, tuple) else "unix" if self.address.path else _UNKNOWN

    def _make_writer(self, address: str, port: str, is_https: bool, is_known: bool) -> ForwardedWriter:  # noqa: FBT001
        settings = self._plane.settings
        origin = ConnectionOrigin(canonical(address), port, is_https, is_known and self.is_trusted(address))
        return ForwardedWriter(origin, forwarded=settings.forwarded, prefix=settings.prefix)

    def is_trusted(self, address: str) -> bool:
        """Say whether an address, or "unix", is that of a trusted proxy."""
        settings = self._plane.settings
        if address == "unix":
            return settings.trusts_unix
        return address != _UNKNOWN and is_in(ip_address(address.partition("%")[0]), settings.trusted)


def canonical(address: str) -> str:
    """Return an address without its zone, and an IPv4-mapped one as the IPv4 address that it is."""
    if address in {"unix", _UNKNOWN}:
        return address
    parsed = ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
