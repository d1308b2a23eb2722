"""A bound socket that accepts clients."""

from __future__ import annotations

import errno
import os
import socket
import stat
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stickyproxy.errors import UsageError
from stickyproxy.proxy.downstream import Downstream
from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter, is_in

if TYPE_CHECKING:
    import asyncio

    from stickyproxy.config import Address
    from stickyproxy.proxy.plane import Plane

_BACKLOG: Final = 4096  # a thousand clients that reconnect at once must not be refused
_MAX_WRITERS: Final = 4096
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


class Listener:
    """One bound socket; `address` is where it really listens, with the port that the system chose for port 0."""

    def __init__(self, plane: Plane, link: socket.socket, address: Address) -> None:
        self._plane = plane
        self._link = link
        self.address = address
        self.port = "" if address.path else str(link.getsockname()[1])
        self._server: asyncio.Server | None = None
        self._writers: dict[str, ForwardedWriter] = {}

    async def start(self) -> None:
        """Begin to accept."""
        loop = self._plane.loop
        make = lambda: Downstream(self._plane, self)  # noqa: E731 -- the factory that asyncio asks for
        if self.address.path:
            self._server = await loop.create_unix_server(make, sock=self._link, backlog=_BACKLOG)
        else:
            self._server = await loop.create_server(make, sock=self._link, backlog=_BACKLOG)

    def close(self) -> None:
        """Accept nobody any more; connections already open go on."""
        if self._server is not None:
            self._server.close()
        if self.address.path:
            Path(self.address.path).unlink(missing_ok=True)

    def forwarded_writer(self, transport: asyncio.BaseTransport) -> ForwardedWriter:
        """Return what writes the fields about the client of a connection; shared by all from one address."""
        peer = transport.get_extra_info("peername")
        # A client that has reset the connection before it was accepted has no address any more.
        address = peer[0] if isinstance(peer, tuple) else "unix" if self.address.path else _UNKNOWN
        writer = self._writers.get(address)
        if writer is None:
            if len(self._writers) >= _MAX_WRITERS:
                self._writers.clear()
            writer = self._writers[address] = self._make_writer(address)
        return writer

    def _make_writer(self, address: str) -> ForwardedWriter:
        settings = self._plane.settings
        if address == "unix":
            is_trusted = settings.trusts_unix
        elif address == _UNKNOWN:
            is_trusted = False
        else:
            parsed = ip_address(address.partition("%")[0])
            mapped = getattr(parsed, "ipv4_mapped", None)
            address = str(mapped or parsed)
            is_trusted = is_in(mapped or parsed, settings.trusted)
        origin = ConnectionOrigin(address, self.port, is_https=False, is_trusted=is_trusted)
        return ForwardedWriter(origin, forwarded=settings.forwarded, prefix=settings.prefix)
