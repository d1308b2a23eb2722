"""The PROXY protocol, versions 1 and 2: who the client is, said before the first byte of the client's own.

Sections are those of HAProxy's doc/proxy-protocol.txt. A header stands at the start of a connection from a load
balancer, before TLS. Nothing is guessed: what begins otherwise is refused, and the connection must be closed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

V1_MAX_BYTES: Final = 107  # section 2.1: the longest line that a receiver must support, with its CRLF
V2_MAX_BYTES: Final = 4096  # section 2 asks for 536; a TLV may hold a client certificate (nginx: 4096)
_V1_START: Final = b"PROXY "
_V1_PROTOCOLS: Final = {b"TCP4": 4, b"TCP6": 6, b"UNKNOWN": 0}
_V1_FIELDS: Final = 6  # PROXY, protocol, two addresses, two ports
_V1_FIRST_PORT: Final = 4
_MAX_PORT: Final = 65535
_LF: Final = 0x0A
_V2_START: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_FIXED_BYTES: Final = 16
_PORT: Final = re.compile(rb"0|[1-9][0-9]{0,4}")
_ADDRESS: Final = re.compile(rb"[0-9A-Fa-f:.]{1,45}")
# One of these makes an address whole, wherever it was cut, if anything does.
_REST_OF_ADDRESS: Final = (b"", b"0", b":", b"::", b".0", b"0.0", b".0.0", b"0.0.0", b".0.0.0", b"0.0.0.0")
_PROXY: Final = 1  # the command; 0 is LOCAL: the sender speaks for itself
_UNSPEC: Final = 0x00  # the family and protocol of a connection that has no address
_STREAM: Final = 1
_DGRAM: Final = 2
_FAMILIES: Final = {1: 4, 2: 16, 3: 108}  # AF_INET, AF_INET6, AF_UNIX: bytes of one address
_UNIX: Final = 3
_IP_VERSIONS: Final = {1: 4, 2: 6}
_MAX_TLVS: Final = 64  # so that a header that comes byte by byte costs little; 15 types are registered
_CRC32C: Final = 0x03
_CRC32C_BYTES: Final = 4
_SSL: Final = 0x20
_SSL_FIXED_BYTES: Final = 5  # `client` and `verify`, before the TLVs in it
_CLIENT_SSL: Final = 0x01


class ProxyHeaderError(ValueError):
    """The bytes are no PROXY protocol header, nor the beginning of one; the text says why."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a header says. `size_bytes` are its own; what follows them is the client's.

    Addresses are in canonical form, an IPv4-mapped IPv6 address as the IPv4 one. Where they are None, the header
    names none and the connection's own count; ports are 0 then. `is_tls`: the client spoke TLS to the sender.
    """

    size_bytes: int
    source: str | None = None
    source_port: int = 0
    destination: str | None = None
    destination_port: int = 0
    is_tls: bool = False


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """Parse the header that `data` begins with; None while more bytes are needed, at most 4096 in all.

    Raises ProxyHeaderError as soon as the bytes so far can begin no header; only what concerns the whole of one, its
    checksum, is judged at its end. O(bytes) for each call.
    """
    if _V1_START.startswith(data[: len(_V1_START)]):
        return _parse_v1(data) if len(data) > len(_V1_START) else None
    if _V2_START.startswith(data[: len(_V2_START)]):
        return _parse_v2(data) if len(data) > len(_V2_START) else None
    raise ProxyHeaderError("no PROXY protocol header")


# Version 1: a line of text (section 2.1)


def _parse_v1(data: bytes) -> ProxyHeader | None:
    line, end, _ = data[: V1_MAX_BYTES - 1].partition(b"\r")
    fields = line.split(b" ")
    version = _check_v1(fields, is_whole=bool(end))
    if not end:
        if len(data) >= V1_MAX_BYTES - 1:
            raise ProxyHeaderError("a line of more than 107 bytes")
        return None
    size_bytes = len(line) + 2
    if len(data) < size_bytes:
        return None
    if data[size_bytes - 1] != _LF:
        raise ProxyHeaderError("a carriage return without a line feed")
    if not version:
        return ProxyHeader(size_bytes)
    source, destination = (_parse_address(text, version) for text in fields[2:4])
    return ProxyHeader(size_bytes, source, int(fields[4]), destination, int(fields[5]))


def _check_v1(fields: list[bytes], *, is_whole: bool) -> int:
    """Return the IP version, 0 for UNKNOWN; raise ProxyHeaderError. The last field may be cut unless `is_whole`."""
    last = len(fields) if is_whole else len(fields) - 1
    protocol = fields[1]
    if not (protocol in _V1_PROTOCOLS if last > 1 else any(name.startswith(protocol) for name in _V1_PROTOCOLS)):
        raise ProxyHeaderError("a protocol other than TCP4, TCP6 and UNKNOWN")
    version = _V1_PROTOCOLS.get(protocol, 0)
    if not version:  # what follows UNKNOWN is ignored, but for what another reader may take for the end of the line
        if any(b"\n" in field for field in fields):
            raise ProxyHeaderError("a line feed without a carriage return")
        return 0
    if len(fields) > _V1_FIELDS or (is_whole and len(fields) < _V1_FIELDS):
        raise ProxyHeaderError("a line that has not two addresses and two ports")
    for at in range(2, len(fields)):
        _check_v1_field(fields[at], version if at < _V1_FIRST_PORT else 0, is_cut=at == last)
    return version


def _check_v1_field(text: bytes, version: int, *, is_cut: bool) -> None:
    """Check an address, or a port where `version` is 0."""
    if not version:
        if not (is_cut and not text) and (_PORT.fullmatch(text) is None or int(text) > _MAX_PORT):
            raise ProxyHeaderError("an invalid port")
    elif not any(_parse_address(text + rest, version) for rest in (_REST_OF_ADDRESS if is_cut else (b"",))):
        raise ProxyHeaderError(f"an invalid IPv{version} address")


def _parse_address(text: bytes, version: int) -> str | None:
    """Return an address of this IP version in canonical form, or None; a zone (RFC 4007) is none of the grammar."""
    if _ADDRESS.fullmatch(text) is None:
        return None
    try:
        return _write_address(text.decode("ascii"), version)
    except ValueError:
        return None


def _write_address(address: str | bytes, version: int) -> str:
    """Return an address in canonical form, given as text or packed; raise ValueError."""
    if version == 4:  # noqa: PLR2004 -- the IP version
        return str(IPv4Address(address))
    parsed = IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed)


# Version 2: a binary block (section 2.2)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    version, command = data[12] >> 4, data[12] & 0x0F
    if version != 2 or command > _PROXY:  # noqa: PLR2004 -- the one version of this form
        raise ProxyHeaderError("a version other than 2, or an unknown command")
    kind = _read_kind(data[13]) if len(data) > 13 and command == _PROXY else 0  # noqa: PLR2004 -- where it stands
    # The least that it can be, while bytes of it are missing.
    size_bytes = _V2_FIXED_BYTES + int.from_bytes(data[14:_V2_FIXED_BYTES].ljust(2, b"\0"), "big")
    if size_bytes > V2_MAX_BYTES:
        raise ProxyHeaderError("a header of more than 4096 bytes")
    if len(data) < _V2_FIXED_BYTES:
        return None
    if not kind:  # LOCAL, whose family is ignored, or no address: nothing says where TLVs would begin
        return ProxyHeader(size_bytes) if len(data) >= size_bytes else None
    address_bytes = _FAMILIES[kind]
    tlvs_at = _V2_FIXED_BYTES + 2 * address_bytes + (0 if kind == _UNIX else 4)
    if tlvs_at > size_bytes:
        raise ProxyHeaderError("a header that is too short for its addresses")
    is_tls = _read_tlvs(data, tlvs_at, size_bytes)
    if len(data) < size_bytes:
        return None
    if kind == _UNIX:
        return ProxyHeader(size_bytes, is_tls=is_tls)
    middle = _V2_FIXED_BYTES + address_bytes
    ports_at = middle + address_bytes
    ip_version = _IP_VERSIONS[kind]
    return ProxyHeader(
        size_bytes,
        source=_write_address(data[_V2_FIXED_BYTES:middle], ip_version),
        source_port=int.from_bytes(data[ports_at : ports_at + 2], "big"),
        destination=_write_address(data[middle:ports_at], ip_version),
        destination_port=int.from_bytes(data[ports_at + 2 : tlvs_at], "big"),
        is_tls=is_tls,
    )


def _read_kind(value: int) -> int:
    """Return the address family, 0 where there is no address; raise unless streams go over it."""
    family, protocol = value >> 4, value & 0x0F
    if value == _UNSPEC:
        return 0
    if protocol == _DGRAM:
        raise ProxyHeaderError("datagrams (UDP)")
    if family not in _FAMILIES or protocol != _STREAM:
        raise ProxyHeaderError("an unknown address family or transport protocol")
    return family


def _read_tlvs(data: bytes, at: int, end: int) -> bool:
    """Say whether the TLVs tell of TLS; raise ProxyHeaderError. They may not have come whole."""
    is_tls = False
    seen = set()
    for kind, start, stop in _walk_tlvs(data, at, end):
        if kind in seen:
            raise ProxyHeaderError("two checksums, or two TLVs about TLS")
        if kind == _SSL:
            if stop - start < _SSL_FIXED_BYTES:
                raise ProxyHeaderError("a TLV about TLS that is too short")
            is_tls = bool(int.from_bytes(data[start : start + 1], "big") & _CLIENT_SSL)
            for _ in _walk_tlvs(data, start + _SSL_FIXED_BYTES, stop):
                pass
            seen.add(kind)
        elif kind == _CRC32C:
            if stop - start != _CRC32C_BYTES:
                raise ProxyHeaderError("a checksum that has not four bytes")
            zeroed = data[:start] + bytes(_CRC32C_BYTES) + data[stop:end]
            if len(data) >= end and crc32c(zeroed) != int.from_bytes(data[start:stop], "big"):
                raise ProxyHeaderError("a checksum that does not fit")
            seen.add(kind)
    return is_tls


def _walk_tlvs(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type, start and end of the value of each TLV of `data[at:end]`, as far as their first bytes have come.

    Raises ProxyHeaderError at one that runs past the end, and where there are too many.
    """
    for _ in range(_MAX_TLVS):
        if at >= end:
            return
        start = at + 3
        # The least that it can be, while bytes of it are missing.
        stop = start + int.from_bytes(data[at + 1 : start].ljust(2, b"\0"), "big")
        if stop > end:
            raise ProxyHeaderError("a TLV that runs past the end of what it stands in")
        if len(data) < start:
            return
        yield data[at], start, stop
        at = stop
    if at < end:
        raise ProxyHeaderError("more than 64 TLVs")


def _make_crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, bits reversed
        table.append(value)
    return tuple(table)


_CRC32C_TABLE: Final = _make_crc32c_table()


def crc32c(data: bytes) -> int:
    """Return the CRC32C of `data` (RFC 4960, appendix B). About 0.1 microseconds for each byte."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC32C_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF
