"""Who the client is, as told to the upstream: believed only where a trusted proxy says it."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter, client_address, is_in
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import RequestHead, StrippedHead, parse_request_head

PLAIN = ConnectionOrigin("203.0.113.9", "8080", is_https=False, is_trusted=False)
HTTPS = ConnectionOrigin("203.0.113.9", "8443", is_https=True, is_trusted=False)
TRUSTED = ConnectionOrigin("10.0.0.1", "8080", is_https=False, is_trusted=True)
UNIX = ConnectionOrigin("unix", "", is_https=False, is_trusted=True)
IPV6 = ConnectionOrigin("2001:db8::1", "80", is_https=False, is_trusted=False)
PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))

SPOOFED = {
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil",
    "X-Forwarded-Port": "666",
    "X-Forwarded-Prefix": "/evil",
    "X-Request-ID": "evil",
    "X-Real-IP": "6.6.6.6",
    "X-Forwarded-Scheme": "https",
    "X-Forwarded-SSL": "on",
    "X-Scheme": "https",
    "Forwarded": "for=6.6.6.6",
}


def parse(fields: dict[str, str] | None = None, *, version: str = "1.1", host: str = "app.example") -> RequestHead:
    lines = [f"GET / HTTP/{version}", f"Host: {host}", *[f"{name}: {value}" for name, value in (fields or {}).items()]]
    data = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return parse_request_head(data, len(data), HeadLimits())


def told(
    origin: ConnectionOrigin, head: RequestHead, *, forwarded: bool = False, prefix: str | None = None
) -> dict[str, str]:
    """Return the fields that are written for a request; each may be there once."""
    writer = ForwardedWriter(origin, forwarded=forwarded, prefix=prefix)
    lines = writer.write(head).decode().split("\r\n")
    assert lines.pop() == ""
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(fields) == len(lines)
    return fields


def test_a_client_is_described_by_its_connection() -> None:
    assert told(PLAIN, parse()) == {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Port": "8080",
        "X-Forwarded-Host": "app.example",
        "Via": "1.1 stickyproxy",
    }


def test_nothing_that_a_stranger_says_is_believed() -> None:
    head = parse(SPOOFED)
    assert told(PLAIN, head) == told(PLAIN, parse())
    assert b"evil" not in b"".join(head.section)
    assert b"6.6.6.6" not in b"".join(head.section)


def test_a_trusted_proxy_says_nothing() -> None:
    expected = told(PLAIN, parse()) | {"X-Forwarded-For": "10.0.0.1"}
    assert told(TRUSTED, parse()) == expected


def test_what_a_trusted_proxy_says_is_passed_on() -> None:
    assert told(TRUSTED, parse(SPOOFED)) == {
        "X-Forwarded-For": "6.6.6.6, 10.0.0.1",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil",
        "X-Forwarded-Port": "666",
        "X-Forwarded-Prefix": "/evil",
        "Forwarded": 'for=6.6.6.6, for=10.0.0.1;proto=http;host="app.example"',
        "Via": "1.1 stickyproxy",
    }


def test_what_a_trusted_proxy_leaves_out_is_filled_in() -> None:
    assert told(TRUSTED, parse({"X-Forwarded-Prefix": "/a"})) == {
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "app.example",
        "X-Forwarded-Port": "8080",
        "X-Forwarded-Prefix": "/a",
        "Via": "1.1 stickyproxy",
    }


@pytest.mark.parametrize("bad", ["gopher", "https, gopher", "", 'https"'])
def test_a_scheme_that_is_none_is_replaced(bad: str) -> None:
    https = ConnectionOrigin("10.0.0.1", "", is_https=True, is_trusted=True)
    assert told(https, parse({"X-Forwarded-Proto": bad}))["X-Forwarded-Proto"] == "https"
    assert told(TRUSTED, parse({"X-Forwarded-Proto": bad}))["X-Forwarded-Proto"] == "http"


def test_the_last_of_several_schemes_counts_for_the_application_and_for_the_cookie() -> None:
    head = parse({"X-Forwarded-Proto": "http, https"})
    assert told(TRUSTED, head)["X-Forwarded-Proto"] == "https"
    assert ForwardedWriter(TRUSTED).is_https(head)


@pytest.mark.parametrize(
    ("origin", "fields", "request_id"),
    [
        pytest.param(TRUSTED, {}, None, id="a trusted proxy says nothing"),
        pytest.param(TRUSTED, {"X-Real-IP": "1.2.3.4"}, None, id="a trusted proxy says something else"),
        pytest.param(PLAIN, {"X-Request-ID": "id-1"}, None, id="a stranger is not believed"),
        pytest.param(TRUSTED, {"X-Request-ID": "id-1"}, b"id-1", id="a trusted proxy gives one"),
        pytest.param(
            TRUSTED, {"X-Request-ID": "Root=1-67-ab/a:b+c._=-"}, b"Root=1-67-ab/a:b+c._=-", id="any usual one"
        ),
        pytest.param(TRUSTED, {"X-Request-ID": "x" * 128}, b"x" * 128, id="a long one"),
        pytest.param(TRUSTED, {"X-Request-ID": "x" * 129}, None, id="too long a one"),
        pytest.param(TRUSTED, {"X-Request-ID": ""}, None, id="an empty one"),
        pytest.param(TRUSTED, {"X-Request-ID": "a b"}, None, id="a space"),
        pytest.param(TRUSTED, {"X-Request-ID": "a, b"}, None, id="a list"),
        pytest.param(TRUSTED, {"X-Request-ID": 'a"b'}, None, id="a quote"),
        pytest.param(TRUSTED, {"X-Request-ID": "<script>"}, None, id="an element"),
    ],
)
def test_the_request_id_of_a_trusted_proxy(
    origin: ConnectionOrigin, fields: dict[str, str], request_id: bytes | None
) -> None:
    head = parse(fields)
    assert ForwardedWriter(origin).request_id(head) == request_id
    assert "X-Request-ID" not in told(origin, head)


def test_a_unix_socket_has_no_port_and_no_address() -> None:
    fields = told(UNIX, parse({"X-Forwarded-For": "192.0.2.1"}), forwarded=True)
    assert "X-Forwarded-Port" not in fields
    assert fields["X-Forwarded-For"] == "192.0.2.1, unix"
    assert fields["Forwarded"] == 'for=_unix;proto=http;host="app.example"'
    assert "X-Forwarded-Port" not in told(UNIX, parse())


@pytest.mark.parametrize("origin", [PLAIN, TRUSTED])
def test_a_prefix_of_the_configuration_wins(origin: ConnectionOrigin) -> None:
    assert told(origin, parse(SPOOFED), prefix="/app")["X-Forwarded-Prefix"] == "/app"
    assert told(origin, parse(), prefix="/app")["X-Forwarded-Prefix"] == "/app"


@pytest.mark.parametrize(
    ("origin", "element"),
    [
        (PLAIN, 'for=203.0.113.9;proto=http;host="app.example"'),
        (HTTPS, 'for=203.0.113.9;proto=https;host="app.example"'),
        (IPV6, 'for="[2001:db8::1]";proto=http;host="app.example"'),
    ],
)
def test_forwarded_is_written_where_it_is_asked_for(origin: ConnectionOrigin, element: str) -> None:
    """RFC 7239, sections 4 and 6: an IPv6 address stands in brackets and quotes."""
    assert told(origin, parse(), forwarded=True)["Forwarded"] == element
    assert told(origin, parse({"Forwarded": "for=6.6.6.6"}), forwarded=True)["Forwarded"] == element
    assert "Forwarded" not in told(origin, parse())


def test_forwarded_without_a_host() -> None:
    assert told(PLAIN, parse(version="1.0", host=""), forwarded=True)["Forwarded"] == "for=203.0.113.9;proto=http"


def test_a_trusted_proxy_adds_to_forwarded() -> None:
    fields = told(TRUSTED, parse({"Forwarded": "for=192.0.2.1", "X-Forwarded-Proto": "https"}))
    assert fields["Forwarded"] == 'for=192.0.2.1, for=10.0.0.1;proto=http;host="app.example"'
    assert told(TRUSTED, parse({"X-Real-IP": "1.2.3.4"}), forwarded=True)["Forwarded"].startswith("for=10.0.0.1;")


@pytest.mark.parametrize(
    ("version", "before", "via"),
    [
        ("1.1", None, "1.1 stickyproxy"),
        ("1.0", None, "1.0 stickyproxy"),
        ("1.1", "1.0 fred, 1.1 p", "1.0 fred, 1.1 p, 1.1 stickyproxy"),
        ("1.0", "1.1 p", "1.1 p, 1.0 stickyproxy"),
    ],
)
@pytest.mark.parametrize("origin", [PLAIN, TRUSTED])
def test_via_is_added_to(origin: ConnectionOrigin, version: str, before: str | None, via: str) -> None:
    """RFC 9110, section 7.6.3: one's own element comes last, with the version that was received."""
    head = parse({} if before is None else {"Via": before, "X-Real-IP": "1.2.3.4"}, version=version)
    assert told(origin, head)["Via"] == via


# Is the client's own link https?


@pytest.mark.parametrize(
    ("origin", "fields", "is_https"),
    [
        pytest.param(PLAIN, {}, False, id="http"),
        pytest.param(HTTPS, {}, True, id="https"),
        pytest.param(PLAIN, {"X-Forwarded-Proto": "https"}, False, id="a stranger says https"),
        pytest.param(HTTPS, {"X-Forwarded-Proto": "http"}, True, id="a stranger says http"),
        pytest.param(TRUSTED, {}, False, id="a trusted proxy says nothing"),
        pytest.param(TRUSTED, {"X-Real-IP": "1.2.3.4"}, False, id="a trusted proxy says something else"),
        pytest.param(TRUSTED, {"X-Forwarded-Proto": "HTTPS"}, True, id="a trusted proxy says https"),
        pytest.param(TRUSTED, {"X-Forwarded-Proto": "wss"}, True, id="a trusted proxy says wss"),
        pytest.param(TRUSTED, {"X-Forwarded-Proto": "http, https"}, True, id="the last one said https"),
        pytest.param(TRUSTED, {"X-Forwarded-Proto": "https, http"}, False, id="the last one said http"),
    ],
)
def test_whether_the_client_came_by_https(
    origin: ConnectionOrigin,
    fields: dict[str, str],
    is_https: bool,  # noqa: FBT001
) -> None:
    assert ForwardedWriter(origin).is_https(parse(fields)) is is_https


# The client's address


@pytest.mark.parametrize(
    ("origin", "said", "address"),
    [
        pytest.param(PLAIN, "6.6.6.6", "203.0.113.9", id="a stranger is not believed"),
        pytest.param(TRUSTED, None, "10.0.0.1", id="a trusted proxy says nothing"),
        pytest.param(TRUSTED, "192.0.2.1", "192.0.2.1", id="a trusted proxy names its client"),
        pytest.param(TRUSTED, "6.6.6.6, 192.0.2.1", "192.0.2.1", id="what the client said itself does not count"),
        pytest.param(TRUSTED, "192.0.2.1, 10.0.0.2,\t10.0.0.3", "192.0.2.1", id="through several trusted proxies"),
        pytest.param(TRUSTED, "10.9.9.9, 10.0.0.2", "10.0.0.1", id="trusted proxies only"),
        pytest.param(TRUSTED, "192.0.2.1, ::ffff:10.0.0.2", "192.0.2.1", id="a mapped address of a trusted proxy"),
        pytest.param(TRUSTED, "192.0.2.1, fd00::1", "192.0.2.1", id="a trusted proxy by IPv6"),
        pytest.param(TRUSTED, "2001:db8::1", "2001:db8::1", id="a client by IPv6"),
        pytest.param(TRUSTED, "192.0.2.1, unknown", "10.0.0.1", id="a chain broken by a word"),
        pytest.param(TRUSTED, "192.0.2.1:5000", "10.0.0.1", id="a port is no part of an address"),
        pytest.param(TRUSTED, "192.0.2.1, \xe9", "10.0.0.1", id="a chain broken by rubbish"),
        pytest.param(TRUSTED, "", "10.0.0.1", id="an empty chain"),
        pytest.param(UNIX, "192.0.2.1", "192.0.2.1", id="behind a Unix socket"),
        pytest.param(UNIX, None, "unix", id="a Unix socket"),
    ],
)
def test_the_address_of_the_client(origin: ConnectionOrigin, said: str | None, address: str) -> None:
    head = parse({} if said is None else {"X-Forwarded-For": said})
    assert client_address(origin, head, PROXIES) == address


def test_another_field_of_a_trusted_proxy_names_no_client() -> None:
    assert client_address(TRUSTED, parse({"X-Real-IP": "192.0.2.1"}), PROXIES) == "10.0.0.1"


def test_several_fields_are_one_chain() -> None:
    lines = b"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-For: 10.0.0.2\r\n"
    data = b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n"
    head = parse_request_head(data, len(data), HeadLimits())
    assert client_address(TRUSTED, head, PROXIES) == "192.0.2.1"
    assert told(TRUSTED, head)["X-Forwarded-For"] == "192.0.2.1, 10.0.0.2, 10.0.0.1"


@pytest.mark.parametrize(
    ("address", "is_inside"),
    [("10.255.0.1", True), ("11.0.0.1", False), ("fd12::1", True), ("fe80::1", False), ("::ffff:10.0.0.1", True),
     ("::ffff:11.0.0.1", False)],
)  # fmt: skip
def test_an_address_lies_in_a_network(address: str, is_inside: bool) -> None:  # noqa: FBT001
    assert is_in(ip_address(address), PROXIES) is is_inside


def test_a_list_without_end_is_looked_at_from_its_end_only() -> None:
    """Each item costs 5 microseconds; a trusted proxy passes on what its own clients say."""
    few = ", ".join(["192.0.2.1", *["10.0.0.7"] * 30])
    assert client_address(TRUSTED, parse({"X-Forwarded-For": few}), PROXIES) == "192.0.2.1"
    many = ", ".join(["192.0.2.1", *["10.0.0.7"] * 40])
    assert client_address(TRUSTED, parse({"X-Forwarded-For": many}), PROXIES) == "10.0.0.1"


# A prefix that was taken off the target


@pytest.mark.parametrize(
    ("prefix", "said", "trust", "sent"),
    [
        (None, None, "none", "/tool"),
        ("/site", None, "none", "/site/tool"),
        ("/site/", None, "none", "/site/tool"),
        (None, b"/outer", "none", "/tool"),
        (None, b"/outer", "trusted", "/outer/tool"),
        ("/site", b"/outer", "trusted", "/site/tool"),
    ],
)
def test_the_prefix_that_was_taken_off_comes_last(
    prefix: str | None, said: bytes | None, trust: str, sent: str
) -> None:
    origin = ConnectionOrigin("192.0.2.1", "80", is_https=False, is_trusted=trust == "trusted")
    head = RequestHead(b"GET", b"/tool/x", is_http_10=False)
    head.forwarded = None if said is None else {b"x-forwarded-prefix": said}
    writer = ForwardedWriter(origin, prefix=prefix)
    lines = writer.write(StrippedHead(head, b"/tool", b"/x")).decode().split("\r\n")
    assert [line for line in lines if "Prefix" in line] == [f"X-Forwarded-Prefix: {sent}"]
    assert "/tool" not in writer.write(head).decode()
