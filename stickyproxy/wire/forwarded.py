"""Who the client is, as told to the upstream: X-Forwarded-*, Forwarded (RFC 7239), Via (RFC 9110, section 7.6.3).

What a client says of those before it is passed on only when it is a trusted proxy; else it is dropped, because the
application would believe it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stickyproxy.wire.request_head import RequestHead

Network = IPv4Network | IPv6Network
_PROTO = re.compile(rb"(?i:https?|wss?)")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=\-]{1,128}")
_MAX_PROXIES = 32  # looked at in a list of those before us; a chain has three or four
PSEUDONYM = b"stickyproxy"


@dataclass(frozen=True, slots=True)
class ConnectionOrigin:
    """What is known of a client's connection once it is accepted.

    `address` is the client's IP address, or "unix"; `port` that of the listener, empty for a Unix socket.
    """

    address: str
    port: str
    is_https: bool
    is_trusted: bool


class ForwardedWriter:
    """Writes the fields about the client for one connection; those that never change are put together once.

    `prefix` is what stands before all paths, as the apps' own links must have it; behind it comes the one that was
    taken off the target of a request.
    """

    __slots__ = ("_about", "_constant", "_forwarded", "_prefix", "origin")

    def __init__(self, origin: ConnectionOrigin, *, forwarded: bool = False, prefix: str | None = None) -> None:
        self.origin = origin
        self._forwarded = forwarded
        self._prefix = (prefix or "").encode("ascii")
        self._about = self._write_about()
        self._constant = self._about + _write_prefix(self._prefix)

    def _write_about(self) -> bytes:
        origin = self.origin
        proto = "https" if origin.is_https else "http"
        text = f"X-Forwarded-For: {origin.address}\r\nX-Forwarded-Proto: {proto}\r\n"
        if origin.port:
            text += f"X-Forwarded-Port: {origin.port}\r\n"
        return text.encode("ascii")

    def is_https(self, head: RequestHead) -> bool:
        """Say whether the client's own link is https: the listener's, or what a trusted proxy says of its own."""
        if self.origin.is_trusted and head.forwarded is not None:
            return self._proto(head.forwarded).lower() in {b"https", b"wss"}
        return self.origin.is_https

    def _proto(self, said: dict[bytes, bytes]) -> bytes:
        """Return the scheme that the nearest trusted proxy names, the last in a list, or that of the listener."""
        proto = said.get(b"x-forwarded-proto", b"").rpartition(b",")[2].strip(b" \t")
        if _PROTO.fullmatch(proto) is not None:
            return proto
        return b"https" if self.origin.is_https else b"http"

    def request_id(self, head: RequestHead) -> bytes | None:
        """Return the X-Request-ID that a trusted proxy gave the request, if it did."""
        if head.forwarded is None or not self.origin.is_trusted:
            return None
        given = head.forwarded.get(b"x-request-id", b"")
        return given if _REQUEST_ID.fullmatch(given) else None

    def write(self, head: RequestHead) -> bytes:
        """Return the lines about the client, each with its CRLF; the same for heads with the same section."""
        via = b"Via: 1.0 " if head.is_http_10 else b"Via: 1.1 "
        if head.via is not None:
            via = b"Via: " + head.via + via[4:].replace(b" ", b", ", 1)
        if head.forwarded is not None and self.origin.is_trusted:
            return self._write_taken_over(head, head.forwarded) + via + PSEUDONYM + b"\r\n"
        constant = self._constant
        if head.prefix:
            constant = self._about + _write_prefix(_join(self._prefix, head.prefix))
        lines = b"%bX-Forwarded-Host: %b\r\n%b%b\r\n" % (constant, head.host, via, PSEUDONYM)
        return lines + self._write_forwarded(head, b"") if self._forwarded else lines

    def _write_taken_over(self, head: RequestHead, said: dict[bytes, bytes]) -> bytes:
        origin = self.origin
        address = origin.address.encode("ascii")
        before = said.get(b"x-forwarded-for")
        lines = [
            b"X-Forwarded-For: " + (before + b", " + address if before else address),
            b"X-Forwarded-Proto: " + self._proto(said),
            b"X-Forwarded-Host: " + said.get(b"x-forwarded-host", head.host),
        ]
        port = said.get(b"x-forwarded-port", origin.port.encode("ascii"))
        if port:
            lines.append(b"X-Forwarded-Port: " + port)
        before_us = self._prefix or said.get(b"x-forwarded-prefix", b"")
        text = b"\r\n".join(lines) + b"\r\n" + _write_prefix(_join(before_us, head.prefix))
        if self._forwarded or b"forwarded" in said:
            text += self._write_forwarded(head, said.get(b"forwarded", b""))
        return text

    def _write_forwarded(self, head: RequestHead, before: bytes) -> bytes:
        origin = self.origin
        node = f'"[{origin.address}]"' if ":" in origin.address else origin.address
        if node == "unix":
            node = "_unix"  # what is no address begins with "_" (RFC 7239, section 6.3)
        proto = "https" if origin.is_https else "http"
        element = f"for={node};proto={proto}".encode("ascii")
        if head.host:
            element += b';host="' + head.host + b'"'
        return b"Forwarded: " + (before + b", " if before else b"") + element + b"\r\n"


def _join(outer: bytes, inner: bytes) -> bytes:
    """Return two prefixes as one, the outermost first; neither ends the other with a second slash."""
    return outer.rstrip(b"/") + inner if inner else outer


def _write_prefix(prefix: bytes) -> bytes:
    return b"X-Forwarded-Prefix: " + prefix + b"\r\n" if prefix else b""


def client_address(origin: ConnectionOrigin, head: RequestHead, trusted: tuple[Network, ...]) -> str:
    """Return the address of the client itself: the last one in X-Forwarded-For that is no trusted proxy's.

    Without a trusted proxy before us it is the address of the connection.
    """
    if not origin.is_trusted or head.forwarded is None:
        return origin.address
    for item in reversed(head.forwarded.get(b"x-forwarded-for", b"").rsplit(b",", _MAX_PROXIES)[-_MAX_PROXIES:]):
        address = _parse_address(item.strip(b" \t"))
        if address is None:
            break
        if not is_in(address, trusted):
            return str(address)
    return origin.address


def _parse_address(text: bytes) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text.decode("ascii"))
    except ValueError:
        return None


def is_in(address: IPv4Address | IPv6Address, networks: tuple[Network, ...]) -> bool:
    """Say whether an address lies in one of the networks; an IPv4-mapped IPv6 address counts as the IPv4 one."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address.version == network.version and address in network for network in networks)
