"""The PROXY protocol: what a header says in either version, at any cut, and where the bytes can be none any more."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stickyproxy.wire.proxy_protocol import ProxyHeader, ProxyHeaderError, crc32c, parse_proxy_header

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V4 = bytes((192, 168, 0, 1, 192, 168, 0, 11)) + (56324).to_bytes(2, "big") + (443).to_bytes(2, "big")
V6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + b"\xff\xff\x00\x50"  # ports 65535 and 80
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/listener".ljust(108, b"\0")
TLS = b"\x01\x00\x00\x00\x00\x21\x00\x07TLSv1.3"  # `client`, `verify`, and the version as a TLV inside


def parse(data: bytes) -> ProxyHeader | None:
    """Parse; what follows a header must not matter."""
    header = parse_proxy_header(data)
    if header is not None:
        assert parse_proxy_header(data[: header.size_bytes]) == header
        assert parse_proxy_header(data + b"\r\nPROXY \x00") == header
    return header


def tlv(kind: int, value: bytes) -> bytes:
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


def write_v2(block: bytes, *tlvs: bytes, command: int = 0x21, family: int = 0x11, checksum: bool = False) -> bytes:
    """Write a header of version 2, with its checksum among the TLVs if asked for."""
    parts = [*tlvs]
    if checksum:
        parts.insert(len(parts) // 2, tlv(3, bytes(4)))
    body = block + b"".join(parts)
    data = SIGNATURE + bytes((command, family)) + len(body).to_bytes(2, "big") + body
    if checksum:
        at = 16 + len(block) + sum(len(part) for part in parts[: len(tlvs) // 2]) + 3
        data = data[:at] + crc32c(data).to_bytes(4, "big") + data[at + 4 :]
    return data


def first_refusal(data: bytes) -> int:
    """Return how many bytes it takes until the parser refuses; each cut before must ask for more, each after refuse."""
    sizes = []
    for size in range(len(data) + 1):
        try:
            assert parse_proxy_header(data[:size]) is None
        except ProxyHeaderError:
            sizes.append(size)
    assert sizes
    assert sizes == list(range(sizes[0], len(data) + 1))
    return sizes[0]


# Version 1

VALID_V1 = [
    pytest.param(
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        ("192.168.0.1", 56324, "192.168.0.11", 443),
        id="the example of the specification",
    ),
    pytest.param(
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        ("255.255.255.255", 65535, "255.255.255.255", 65535),
        id="the longest with IPv4",
    ),
    pytest.param(b"PROXY TCP4 0.0.0.0 1.2.3.4 0 0\r\n", ("0.0.0.0", 0, "1.2.3.4", 0), id="zeroes"),  # noqa: S104 -- data
    pytest.param(
        b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n",
        ("ffff:" * 7 + "ffff", 65535, "ffff:" * 7 + "ffff", 65535),
        id="the longest with IPv6",
    ),
    pytest.param(b"PROXY TCP6 2001:DB8::0:1 ::1 1 2\r\n", ("2001:db8::1", 1, "::1", 2), id="made canonical"),
    pytest.param(b"PROXY TCP6 1:2:3:4:5:6:7:8 :: 1 2\r\n", ("1:2:3:4:5:6:7:8", 1, "::", 2), id="without a gap"),
    pytest.param(b"PROXY TCP6 ::ffff:1.2.3.4 ::FFFF:0a00:1 1 2\r\n", ("1.2.3.4", 1, "10.0.0.1", 2), id="IPv4-mapped"),
    pytest.param(b"PROXY UNKNOWN\r\n", (None, 0, None, 0), id="unknown"),
    pytest.param(b"PROXY UNKNOWN \r\n", (None, 0, None, 0), id="unknown and a space"),
    pytest.param(b"PROXY UNKNOWN x  y \x00\xff z z z z\r\n", (None, 0, None, 0), id="unknown and what is ignored"),
    pytest.param(
        b"PROXY UNKNOWN " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n",
        (None, 0, None, 0),
        id="the longest of all",
    ),
]


@pytest.mark.parametrize(("data", "facts"), VALID_V1)
def test_a_line_is_read(data: bytes, facts: tuple[str | None, int, str | None, int]) -> None:
    assert len(data) <= 107
    assert parse(data) == ProxyHeader(len(data), *facts, is_tls=False)
    assert parse(data + b"GET / HTTP/1.1\r\n") == ProxyHeader(len(data), *facts)
    for size in range(len(data)):
        assert parse_proxy_header(data[:size]) is None


# Each text up to the byte that `|` stands before, which is the first that nothing can follow from.
@pytest.mark.parametrize(
    "text",
    [
        "|GET / HTTP/1.1",
        "P|OST / HTTP/1.1",
        "P|UT / HTTP/1.1",
        "PR|I * HTTP/2.0\r\n",
        "PRO|PFIND / HTTP/1.1",
        "PROXY|\r\n",
        "PROXY|\tTCP4",
        "|proxy TCP4",
        "| PROXY TCP4",
        "\r\n|GET / HTTP/1.1",
        "\r\n\r\n|PROXY",
        "PROXY | TCP4 1.1.1.1 1.1.1.1 1 1\r\n",
        "PROXY |tcp4",
        "PROXY TCP|5 ",
        "PROXY TCP4|6 ",
        "PROXY TC|\r\n",
        "PROXY TCP| 4",
        "PROXY U|DP4 ",
        "PROXY UNKNOWN|X\r\n",
        "PROXY UNKNOWN|\n",
        "PROXY UNKNOWN a|\nb\r\n",
        "PROXY UNKNOWN\r|GET",
        "PROXY UNKNOWN\r|\r\n",
        "PROXY TCP4|\r\n",
        "PROXY TCP4 |\r\n",
        "PROXY TCP4 | 1.1.1.1",
        "PROXY TCP4 1.1.1.1 | 1.1.1.1",
        "PROXY TCP4 1.1.1.1|\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1|\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 |\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1|\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1 |\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1 1| \r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1 1|\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r|GET",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1 | 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 6553|6 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1 6553|6\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 0|1 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 0|0 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 |+1 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 |-1 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1|_0 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 |\u0661 1\r\n",
        "PROXY TCP4 1.1.1.1 1.1.1.1 1|\t1\r\n",
        "PROXY TCP4 25|6.1.1.1 1.1.1.1 1 1\r\n",
        "PROXY TCP4 0|1.1.1.1 1.1.1.1 1 1\r\n",
        "PROXY TCP4 1.1.1| 1.1.1.1 1 1\r\n",
        "PROXY TCP4 1.1.1.| 1.1.1.1 1 1\r\n",
        "PROXY TCP4 1.1.1.1|. 1.1.1.1 1 1\r\n",
        "PROXY TCP4 1.|.1.1 1.1.1.1 1 1\r\n",
        "PROXY TCP4 |\u0661.1.1.1 1.1.1.1 1 1\r\n",
        "PROXY TCP4 |localhost 1.1.1.1 1 1\r\n",
        "PROXY TCP4 |::1 ::1 1 1\r\n",
        "PROXY TCP4 1|:: ::1 1 1\r\n",
        "PROXY TCP6 1|.1.1.1 1.1.1.1 1 1\r\n",
        "PROXY TCP6 ::1 1|.1.1.1 1 1\r\n",
        "PROXY TCP6 ::1|%eth0 ::1 1 1\r\n",
        "PROXY TCP6 |[::1] ::1 1 1\r\n",
        "PROXY TCP6 ::1|/128 ::1 1 1\r\n",
        "PROXY TCP6 ::|g ::1 1 1\r\n",
        "PROXY TCP6 ::|: ::1 1 1\r\n",
        "PROXY TCP6 1::2:|: ::1 1 1\r\n",
        "PROXY TCP6 :|1 ::1 1 1\r\n",
        "PROXY TCP6 :| ::1 1 1\r\n",
        "PROXY TCP6 1:2| ::1 1 1\r\n",
        "PROXY TCP6 0000|0:: ::1 1 1\r\n",
        "PROXY TCP6 1:2:3:4:5:6:7:8|:9 ::1 1 1\r\n",
        "PROXY TCP6 1:2:3:4:5:6:7.1| ::1 1 1\r\n",
        "PROXY TCP6 1:2:3:4:5:6:7:8|.1 ::1 1 1\r\n",
        "PROXY TCP6 ::ffff:1.2.3| ::1 1 1\r\n",
        "PROXY TCP6 ::ffff:1.2.3.4|.5 ::1 1 1\r\n",
        "PROXY TCP6 ::ffff:256|.2.3.4 ::1 1 1\r\n",
        "PROXY UNKNOWN " + "x" * 91 + "|x\r\n",
        "PROXY UNKNOWN " + "x" * 91 + "|" + "x" * 300,
    ],
)
def test_a_line_is_refused_at_the_first_byte_that_nothing_can_follow_from(text: str) -> None:
    good, bad = (part.encode() for part in text.split("|"))
    at = first_refusal(good + bad)
    # A character of several bytes is refused at its first one, like any other.
    assert (good + bad)[: at - 1] == good


MISSING = {2: b"::1 ::2 1 1", 3: b"::2 1 1", 4: b"1 1", 5: b"1"}
REST = [b"", b"0", b":", b"::", b":1", b".0", b".0.0", b"0.0", b".0.0.0", b"0.0.0", b"0.0.0.0"]


def completions(begun: bytes) -> list[bytes]:
    """Return the ways to end a line that was begun."""
    starts = [b"PROXY UNKNOWN\r\n", b"PROXY TCP4 ", b"PROXY TCP6 ", write_v2(V4)]
    ways = [start for start in starts if start.startswith(begun)] or [begun]
    ended = [way for way in ways if way.endswith(b"\n") or way == starts[-1]] + [begun + b"\n", begun + b"\r\n"]
    for way in ways:
        rest = MISSING.get(way.count(b" ") + 1, b"")
        for missing in (rest, rest.replace(b"::", b"0.0.0.")):
            ended += [way + end + (b" " + missing if missing else b"") + b"\r\n" for end in REST]
            ended.append(way + missing + b"\r\n")
    return ended


ALPHABET = st.sampled_from([b"0", b"1", b"25", b"65535", b"ffff", b"a", b":", b"::", b".", b" ", b"\r", b"\n", b"x"])
STARTS = st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY TCP6 ::1 ", b"PROXY TCP4 1.1.1.1 1.",
                          b"PROXY UNKNOWN", b"PROXY TCP6 ::1 ::1 "])  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(STARTS, st.lists(ALPHABET, max_size=10).map(b"".join), st.data())
def test_while_more_is_asked_for_something_can_come_of_it(start: bytes, rest: bytes, data: st.DataObject) -> None:
    """The parser waits for nothing in vain: what it does not refuse has an end that makes it a header."""
    line = (start + rest)[: data.draw(st.integers(0, len(start + rest)))]
    try:
        header = parse_proxy_header(line)
    except ProxyHeaderError:
        return
    if header is not None or (b"." in line and len(line) > 80):  # no room for the rest of what no sender writes
        return
    ended = []
    for whole in completions(line):
        try:
            ended.append(parse_proxy_header(whole))
        except ProxyHeaderError:
            continue
    assert any(ended), line


ADDRESSES_4 = st.binary(min_size=4, max_size=4).map(IPv4Address)
ADDRESSES_6 = st.one_of(
    st.binary(min_size=16, max_size=16).map(IPv6Address),
    st.binary(min_size=4, max_size=4).map(lambda raw: IPv6Address(bytes(10) + b"\xff\xff" + raw)),
    st.lists(st.sampled_from([b"\0\0", b"\0\1", b"\xff\xff"]), min_size=8, max_size=8).map(
        lambda groups: IPv6Address(b"".join(groups))
    ),
)
PAIRS = st.one_of(st.tuples(ADDRESSES_4, ADDRESSES_4), st.tuples(ADDRESSES_6, ADDRESSES_6))
PORTS = st.integers(0, 65535)


def canonical(address: IPv4Address | IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


@settings(deadline=None)
@given(PAIRS, PORTS, PORTS, st.sampled_from([str, lambda address: address.exploded]), st.binary(max_size=20))
def test_a_line_that_was_written_reads_back(
    pair: tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address],
    source_port: int,
    destination_port: int,
    write: type[str],
    after: bytes,
) -> None:
    source, destination = pair
    texts = f"{write(source)} {write(destination)}".upper()
    data = f"PROXY TCP{source.version} {texts} {source_port} {destination_port}\r\n".encode()
    expected = ProxyHeader(len(data), canonical(source), source_port, canonical(destination), destination_port)
    assert parse_proxy_header(data + after) == expected
    assert all(parse_proxy_header(data[:size]) is None for size in range(len(data)))


# Version 2

VALID_V2 = [
    pytest.param(write_v2(V4), ("192.168.0.1", 56324, "192.168.0.11", 443, False), id="TCP over IPv4"),
    pytest.param(write_v2(V6, family=0x21), ("2001:db8::1", 65535, "2001:db8::2", 80, False), id="TCP over IPv6"),
    pytest.param(
        write_v2(bytes(10) + b"\xff\xff\x01\x02\x03\x04" + bytes(15) + b"\x01" + V6[32:], family=0x21),
        ("1.2.3.4", 65535, "::1", 80, False),
        id="IPv4-mapped",
    ),
    pytest.param(write_v2(UNIX, family=0x31), (None, 0, None, 0, False), id="Unix"),
    pytest.param(write_v2(UNIX, tlv(0x20, TLS), family=0x31), (None, 0, None, 0, True), id="TLS over Unix"),
    pytest.param(write_v2(b"", family=0), (None, 0, None, 0, False), id="no address"),
    pytest.param(write_v2(b"\xff" * 7, family=0), (None, 0, None, 0, False), id="no address, with what is ignored"),
    pytest.param(write_v2(b"", command=0x20, family=0), (None, 0, None, 0, False), id="LOCAL"),
    pytest.param(write_v2(V4, command=0x20), (None, 0, None, 0, False), id="LOCAL, with an address that is ignored"),
    pytest.param(
        write_v2(b"\xff" * 50, command=0x20, family=0xFF), (None, 0, None, 0, False), id="LOCAL with anything"
    ),
    pytest.param(
        write_v2(V4, tlv(1, b"h2"), tlv(2, b"app.example"), tlv(4, b""), tlv(5, bytes(128)), tlv(0xEA, b"x" * 300)),
        ("192.168.0.1", 56324, "192.168.0.11", 443, False),
        id="TLVs",
    ),
    pytest.param(write_v2(V4, tlv(0x20, TLS)), ("192.168.0.1", 56324, "192.168.0.11", 443, True), id="TLS"),
    pytest.param(
        write_v2(V4, tlv(0x20, b"\xfe" + bytes(4))),
        ("192.168.0.1", 56324, "192.168.0.11", 443, False),
        id="all flags but that of TLS",
    ),
    pytest.param(
        write_v2(V4, tlv(0x20, TLS), tlv(4, b"123"), checksum=True),
        ("192.168.0.1", 56324, "192.168.0.11", 443, True),
        id="a checksum between",
    ),
    pytest.param(
        write_v2(V6, family=0x21, checksum=True), ("2001:db8::1", 65535, "2001:db8::2", 80, False), id="a checksum"
    ),
    pytest.param(
        write_v2(V4, *[tlv(4, b"")] * 64), ("192.168.0.1", 56324, "192.168.0.11", 443, False), id="the most TLVs"
    ),
    pytest.param(
        write_v2(V4, tlv(4, bytes(4096 - 16 - 12 - 3))),
        ("192.168.0.1", 56324, "192.168.0.11", 443, False),
        id="the most bytes",
    ),
]


@pytest.mark.parametrize(("data", "facts"), VALID_V2)
def test_a_block_is_read(data: bytes, facts: tuple[str | None, int, str | None, int, bool]) -> None:
    source, source_port, destination, destination_port, is_tls = facts
    expected = ProxyHeader(len(data), source, source_port, destination, destination_port, is_tls=is_tls)
    assert parse(data) == expected
    assert parse(data + b"\x16\x03\x01\x02\x00\x01\x00") == expected
    for size in range(len(data)):
        assert parse_proxy_header(data[:size]) is None


@pytest.mark.parametrize(
    ("data", "size"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 1, id="a TLS ClientHello"),
        pytest.param(b"\r\n\r\nGET / HTTP/1.1", 5, id="empty lines before a request"),
        pytest.param(SIGNATURE[:11] + b"\r\x21\x11", 12, id="the last byte of the signature"),
        pytest.param(write_v2(V4, command=0x11), 13, id="version 1"),
        pytest.param(write_v2(V4, command=0x31), 13, id="version 3"),
        pytest.param(write_v2(V4, command=0x22), 13, id="an unknown command"),
        pytest.param(write_v2(V4, family=0x41), 14, id="an unknown family"),
        pytest.param(write_v2(V4, family=0x13), 14, id="an unknown protocol"),
        pytest.param(write_v2(V4, family=0x10), 14, id="a family without a protocol"),
        pytest.param(write_v2(V4, family=0x01), 14, id="a protocol without a family"),
        pytest.param(write_v2(V4, family=0x12), 14, id="UDP over IPv4"),
        pytest.param(write_v2(V6, family=0x22), 14, id="UDP over IPv6"),
        pytest.param(write_v2(UNIX, family=0x32), 14, id="datagrams over Unix"),
        pytest.param(write_v2(V4[:-1]), 16, id="too short for IPv4"),
        pytest.param(write_v2(V6[:-1], family=0x21), 16, id="too short for IPv6"),
        pytest.param(write_v2(UNIX[:-1], family=0x31), 16, id="too short for Unix"),
        pytest.param(write_v2(b""), 16, id="no address where one is named"),
        pytest.param(write_v2(V4, tlv(4, bytes(4096 - 16 - 12 - 2))), 16, id="one byte too many"),
        pytest.param(write_v2(bytes(4081), command=0x20), 16, id="one byte too many for LOCAL"),
        pytest.param(write_v2(bytes(0x1000), command=0x20), 15, id="far too many"),
        pytest.param(write_v2(V4, b"\x04"), 16, id="a TLV without a length"),
        pytest.param(write_v2(V4, b"\x04\x00"), 16, id="a TLV with half a length"),
        pytest.param(write_v2(V4, b"\x04\x00\x01"), 31, id="a TLV without its value"),
        pytest.param(write_v2(V4, b"\x04\x01\x00abc"), 30, id="a TLV that is far too long"),
        pytest.param(write_v2(V4, tlv(4, b"a"), b"\x04\x00\x03ab"), 35, id="the last of two that runs past"),
        pytest.param(write_v2(UNIX, b"\x04\x00\x01", family=0x31), 235, id="a TLV after Unix addresses"),
        pytest.param(write_v2(V4, tlv(0x20, b"\x01\x00\x00\x00")), 31, id="TLS, too short"),
        pytest.param(write_v2(V4, tlv(0x20, TLS[:-1]), tlv(4, b"")), 39, id="in TLS a TLV that runs past it"),
        pytest.param(write_v2(V4, tlv(0x20, TLS + b"\x00"), tlv(4, b"")), 39, id="in TLS half a TLV"),
        pytest.param(write_v2(V4, tlv(0x20, TLS), tlv(0x20, bytes(5))), 49, id="TLS twice"),
        pytest.param(write_v2(V4, *[tlv(4, b"a")] * 65), 28 + 64 * 4 - 1, id="too many TLVs"),
        pytest.param(write_v2(V4, tlv(0x20, TLS + tlv(0x22, b"") * 64)), 36 + 10 + 63 * 3, id="in TLS too many TLVs"),
        pytest.param(write_v2(V4, tlv(3, b"abc")), 31, id="a checksum of three bytes"),
        pytest.param(write_v2(V4, tlv(3, b"abcde")), 31, id="a checksum of five bytes"),
        pytest.param(write_v2(V4, tlv(3, bytes(4))), 35, id="a checksum that does not fit"),
        pytest.param(write_v2(V4, tlv(3, bytes(4)), checksum=True), 38, id="two checksums"),
    ],
)
def test_a_block_is_refused_at_the_first_byte_that_tells(data: bytes, size: int) -> None:
    assert first_refusal(data) == size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "no PROXY protocol header"),
        (b"\x16\x03\x01", "no PROXY protocol header"),
        (b"PROXY TCP5 ", "a protocol other than TCP4, TCP6 and UNKNOWN"),
        (b"PROXY TCP4 1.1.1.256 ", "an invalid IPv4 address"),
        (b"PROXY TCP6 ::g", "an invalid IPv6 address"),
        (b"PROXY TCP4 1.1.1.1 1.1.1.1 01", "an invalid port"),
        (b"PROXY TCP4 1.1.1.1\r\n", "a line that has not two addresses and two ports"),
        (write_v2(V4, family=0x12), "datagrams (UDP)"),
        (write_v2(V4, family=0x41), "an unknown address family or transport protocol"),
        (write_v2(V4, tlv(3, bytes(4))), "a checksum that does not fit"),
    ],
)
def test_the_reason_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(ProxyHeaderError) as error:
        parse(data)
    assert str(error.value) == reason


def test_each_bit_of_a_header_is_under_its_checksum() -> None:
    data = write_v2(V4, tlv(0x20, TLS), tlv(4, b"123"), checksum=True)
    assert parse(data) is not None
    kind_at = data.index(b"\x03\x00\x04")  # another kind would make it no checksum
    for at in {*range(8 * 16, 8 * len(data))} - {*range(8 * kind_at, 8 * kind_at + 8)}:
        changed = bytearray(data)
        changed[at >> 3] ^= 1 << (at & 7)
        with pytest.raises(ProxyHeaderError):
            parse(bytes(changed))


@pytest.mark.parametrize(
    ("data", "value"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(b"123456789", 0xE3069283, id="the check value"),
        pytest.param(bytes(32), 0x8A9136AA, id="32 zeroes"),
        pytest.param(b"\xff" * 32, 0x62A8AB43, id="32 ones"),
        pytest.param(bytes(range(32)), 0x46DD794E, id="32 rising"),
        pytest.param(bytes(range(31, -1, -1)), 0x113FDB5C, id="32 falling"),
    ],
)
def test_the_checksum_is_crc32c(data: bytes, value: int) -> None:
    """The vectors of RFC 3720, appendix B.4."""
    assert crc32c(data) == value


@settings(deadline=None)
@given(
    PAIRS,
    PORTS,
    PORTS,
    st.lists(
        st.tuples(st.integers(0, 255).filter(lambda kind: kind not in {3, 0x20}), st.binary(max_size=40)), max_size=4
    ),
    st.one_of(st.none(), st.integers(0, 255)),
    st.booleans(),
)
def test_a_block_that_was_written_reads_back(
    pair: tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address],
    source_port: int,
    destination_port: int,
    others: list[tuple[int, bytes]],
    flags: int | None,
    checksum: bool,  # noqa: FBT001
) -> None:
    source, destination = pair
    block = source.packed + destination.packed + source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    tlvs = [tlv(kind, value) for kind, value in others]
    if flags is not None:
        tlvs.append(tlv(0x20, bytes((flags, 0, 0, 0, 1)) + tlv(0x22, b"a name") + tlv(0x21, b"TLSv1.2")))
    data = write_v2(block, *tlvs, family=0x11 if source.version == 4 else 0x21, checksum=checksum)
    is_tls = flags is not None and flags % 2 == 1
    expected = ProxyHeader(
        len(data), canonical(source), source_port, canonical(destination), destination_port, is_tls=is_tls
    )
    assert parse(data) == expected
    assert all(parse_proxy_header(data[:size]) is None for size in range(len(data)))


# Any bytes

ANY = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda rest: b"PROXY " + rest),
    st.binary(max_size=60).map(lambda rest: SIGNATURE + rest),
    st.binary(max_size=60).map(lambda rest: write_v2(V4, rest)),
    st.binary(max_size=60).map(lambda rest: write_v2(V4, tlv(0x20, rest), tlv(3, rest[:4]))),
    st.text("PROXY TCP46UNKNW0123456789abf:.\r\n", max_size=60).map(lambda rest: b"PROXY TCP6 " + rest.encode()),
)


@settings(deadline=None, max_examples=400)
@given(ANY, st.integers(0, 120), st.integers(0, 255))
@example(b"PROXY TCP6 ::1%1 ::1 1 1\r\n", 120, 0)
def test_any_bytes_are_a_header_or_none_or_refused_once_and_for_all(data: bytes, at: int, byte: int) -> None:
    data = data[:at] + bytes((byte,)) + data[at + 1 :] if at < len(data) else data
    found: ProxyHeader | str | None = None
    for size in range(len(data) + 1):
        try:
            result: ProxyHeader | str | None = parse_proxy_header(data[:size])
        except ProxyHeaderError:
            result = "refused"
        assert found is None or type(result) is type(found)
        if isinstance(result, ProxyHeader):
            assert result.size_bytes <= size
            assert found in {None, result}
            for address in (result.source, result.destination):
                assert address is None or str(ip_address(address)) == address
        found = result
