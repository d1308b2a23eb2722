"""Request heads: every rule that takes or refuses one, what is left of its header section, and how it is written."""

from __future__ import annotations

from contextlib import suppress
from time import perf_counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stickyproxy.errors import RequestError
from stickyproxy.wire.cookies import CookieReader
from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter
from stickyproxy.wire.head import CHUNKED, HeadLimits, find_head_end
from stickyproxy.wire.request_head import (
    RequestHead,
    RequestHeadReader,
    find_head_error,
    parse_request_head,
    write_request_head,
)
from tests.wire.heads import ANY_BYTES, BAD_LENGTH, BOTH, LIMITS, PARTS, SEVERAL, check_section

GET = b"GET / HTTP/1.1\r\n"
HOST = b"Host: a.example\r\n"


def parse(data: bytes, limits: HeadLimits = LIMITS) -> RequestHead:
    """Parse a whole head, with something after it that must not matter."""
    return parse_request_head(data + b"\x00Content-Length: 9\r\n\r\n", len(data), limits)


def request(*fields: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = HOST) -> RequestHead:
    return parse(line + b"\r\n" + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n")


def refusal(data: bytes, limits: HeadLimits = LIMITS) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        parse(data, limits)
    assert caught.value.phase == "head"
    return caught.value.status, caught.value.reason


def facts_of(head: RequestHead) -> dict[str, object]:
    names = set(RequestHead.__slots__) - {"section", "cookies", "is_repeatable", "outgoing"}
    return {name: getattr(head, name) for name in names} | {"section": b"".join(head.section)}


# The request line


@pytest.mark.parametrize(
    ("line", "method", "target"),
    [
        (b"GET / HTTP/1.1", b"GET", b"/"),
        (b'get /a?b=%20&c"d HTTP/1.1', b"get", b'/a?b=%20&c"d'),
        (b"M-SEARCH!#$%&'*+.^_`|~ // HTTP/1.1", b"M-SEARCH!#$%&'*+.^_`|~", b"//"),
        (b"OPTIONS * HTTP/1.1", b"OPTIONS", b"*"),
        (b"GET http://a.example HTTP/1.1", b"GET", b"/"),
        (b"OPTIONS http://a.example:81 HTTP/1.1", b"OPTIONS", b"*"),  # RFC 9112, section 3.2.4
        (b"OPTIONS http://a.example/ HTTP/1.1", b"OPTIONS", b"/"),
        (b"OPTIONS http://a.example?x HTTP/1.1", b"OPTIONS", b"/?x"),
        (b"GET HTTPS://a.example:8443/x?y HTTP/1.1", b"GET", b"/x?y"),
        (b"GET http://a.example?y=http://b/ HTTP/1.1", b"GET", b"/?y=http://b/"),
    ],
)
def test_a_request_line_gives_method_and_target(line: bytes, method: bytes, target: bytes) -> None:
    head = request(line=line)
    assert (head.method, head.target, head.is_http_10, head.length) == (method, target, False, 0)


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        pytest.param(b"GET /", 400, "an invalid request line", id="HTTP/0.9"),
        pytest.param(b"", 400, "an invalid request line", id="an empty line"),
        pytest.param(b" GET / HTTP/1.1", 400, "an invalid request line", id="white space before the method"),
        pytest.param(b"GET  / HTTP/1.1", 400, "an invalid request line", id="two spaces before the target"),
        pytest.param(b"GET /  HTTP/1.1", 400, "an invalid request line", id="two spaces after the target"),
        pytest.param(b"GET /a b HTTP/1.1", 400, "an invalid request line", id="a space in the target"),
        pytest.param(b"GET\t/\tHTTP/1.1", 400, "an invalid request line", id="tabs"),
        pytest.param(b"GET / HTTP/1.1 ", 400, "an invalid request line", id="a space at the end"),
        pytest.param(b"GET / HTTP/1.1\r", 400, "an invalid request line", id="a bare CR at the end"),
        pytest.param(b"GET / http/1.1", 400, "an invalid request line", id="the protocol in lower case"),
        pytest.param(b"GET / HTTP/11", 400, "an invalid request line", id="no version"),
        pytest.param(b"GET / ICY/1.1", 400, "an invalid request line", id="another protocol"),
        pytest.param(b"GET / HTTP/1.\xb9", 400, "an invalid request line", id="a digit of another script"),
        pytest.param(b"GET /\xe4 HTTP/1.1", 400, "an invalid method or request target", id="a target beyond ASCII"),
        pytest.param(b"GET /\x00 HTTP/1.1", 400, "an invalid method or request target", id="NUL in the target"),
        pytest.param(b"GET /\x7f HTTP/1.1", 400, "an invalid method or request target", id="DEL in the target"),
        pytest.param(b"GET /\n HTTP/1.1", 400, "an invalid method or request target", id="a bare LF in the target"),
        pytest.param(b"G(T / HTTP/1.1", 400, "an invalid method or request target", id="a method that is no token"),
        pytest.param(b"GET / HTTP/2.0", 505, "an HTTP version other than 1.0 and 1.1", id="HTTP/2"),
        pytest.param(b"GET / HTTP/1.2", 505, "an HTTP version other than 1.0 and 1.1", id="HTTP/1.2"),
        pytest.param(b"PRI * HTTP/2.0", 505, "an HTTP version other than 1.0 and 1.1", id="the preface of HTTP/2"),
        pytest.param(b"CONNECT a.example:443 HTTP/1.1", 405, "CONNECT is not for a reverse proxy", id="CONNECT"),
        pytest.param(b"CONNECT / HTTP/1.1", 405, "CONNECT is not for a reverse proxy", id="CONNECT with a path"),
        pytest.param(b"CONNECT * HTTP/1.1", 405, "CONNECT is not for a reverse proxy", id="CONNECT with *"),
        pytest.param(b"GET * HTTP/1.1", 400, "a request target that is no path", id="* without OPTIONS"),
        pytest.param(b"GET a.example:80 HTTP/1.1", 400, "a request target that is no path", id="authority-form"),
        pytest.param(b"GET x/../y HTTP/1.1", 400, "a request target that is no path", id="a relative path"),
        pytest.param(b"GET ftp://a.example/ HTTP/1.1", 400, "a request target that is no path", id="another scheme"),
        pytest.param(b"GET http:///x HTTP/1.1", 400, "a request target that is no path", id="no authority"),
        pytest.param(b"GET http://:80/ HTTP/1.1", 400, "a request target that is no path", id="a port and no host"),
        pytest.param(b"GET http://u@a.example/ HTTP/1.1", 400, "a request target that is no path", id="user data"),
        pytest.param(b"GET http://a.example\\@b/ HTTP/1.1", 400, "a request target that is no path", id="backslash"),
        pytest.param(b"GET http://a.example#f HTTP/1.1", 400, "an invalid method or request target", id="a fragment"),
        pytest.param(b"GET http:a.example/ HTTP/1.1", 400, "a request target that is no path", id="no slashes"),
        pytest.param(b"GET http://a.example:x/ HTTP/1.1", 400, "a request target that is no path", id="a bad port"),
        pytest.param(b"GET http://[::1/ HTTP/1.1", 400, "a request target that is no path", id="an open bracket"),
    ],
)
def test_a_bad_request_line_is_refused(line: bytes, status: int, reason: str) -> None:
    assert refusal(line + b"\r\n" + HOST + b"\r\n") == (status, reason)


def test_the_authority_of_the_target_replaces_host() -> None:
    """RFC 9112, section 3.2.2; and what the field said never reaches the upstream."""
    head = request(b"A: 1", b"Cookie: b=2", b"C: 3", line=b"GET http://b.example:81/ HTTP/1.1", host=b"hOsT: evil\r\n")
    assert head.host == b"b.example:81"
    assert b"".join(head.section) == b"Host: b.example:81\r\nA: 1\r\nCookie: b=2\r\nC: 3\r\n"
    assert [head.section[at] for at in head.cookies or ()] == [b"Cookie: b=2\r\n"]
    assert refusal(b"GET http://b.example/ HTTP/1.1\r\n\r\n") == (400, "no Host field")


# Host


@pytest.mark.parametrize(
    "host",
    [
        b"a",
        b"a.example:8080",
        b"a_b",
        b"127.0.0.1",
        b"[::1]",
        b"[fe80::1%25eth0]:80",
        b"[::ffff:192.0.2.1]",
        b"",
        b"a:",
        b"xn--e1a",
        b"%61",
        b"a%2Eb!$&'()*+;=~",
    ],
)
def test_a_host_is_taken_as_it_is(host: bytes) -> None:
    head = request(b"A: 1", host=b"Host: " + host + b"\r\n")
    assert head.host == host
    assert b"".join(head.section) == b"Host: " + host + b"\r\nA: 1\r\n"


@pytest.mark.parametrize(
    "host",
    [b"a b", b"a/b", b"a?b", b"a#b", b"a@b", b"a\\b", b'"a"', b"a:b", b"a:1:2", b"a:123456", b"[::1", b"::1", b"<a>",
     b"\xe4", b"a\tb", b"[a]b", b"http://a", b"[a]", b"[evil.example]", b"[127.0.0.1]", b"[]", b"[::1]x", b"[::1%]",
     b":80", b":", b"a%", b"a%2", b"a%zz"],
)  # fmt: skip
def test_a_host_that_is_none_is_refused(host: bytes) -> None:
    assert refusal(GET + b"Host: " + host + b"\r\n\r\n") == (400, "an invalid Host")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(GET, "no Host field", id="none"),
        pytest.param(GET + b"Host: a\r\nHost: b\r\n", "several Host fields", id="two"),
        pytest.param(GET + b"Host: a\r\nhost: a\r\n", "several Host fields", id="two that agree"),
        pytest.param(GET + b"Host: a\r\nX: y\r\nHost:\r\n", "several Host fields", id="a second empty one"),
        pytest.param(b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n", "several Host fields", id="two in HTTP/1.0"),
        pytest.param(GET + b"Host : a\r\n", "white space before the colon of a header field", id="before the colon"),
        pytest.param(GET + b" Host: a\r\n", "a folded header line (obs-fold)", id="a fold in the first line"),
        pytest.param(GET + b"X: y\r\n Host: a\r\n", "a folded header line (obs-fold)", id="a fold"),
    ],
)
def test_there_is_exactly_one_host(data: bytes, reason: str) -> None:
    assert refusal(data + b"\r\n") == (400, reason)


@pytest.mark.parametrize("host", [b"", b"Host:\r\n", b"Host: \r\n"])
def test_http_10_may_name_no_host_and_then_has_no_host_field(host: bytes) -> None:
    """The proxy names the upstream where the client names nothing: two Host fields must not be the result."""
    head = request(b"A: 1", line=b"GET / HTTP/1.0", host=host)
    assert (head.host, b"".join(head.section)) == (b"", b"A: 1\r\n")


# The header section


def test_a_head_without_special_fields_stays_in_one_part() -> None:
    head = request(b"Accept: */*", b"User-Agent: x")
    assert head.section == [HOST + b"Accept: */*\r\nUser-Agent: x\r\n"]
    assert (head.cookies, head.forwarded, head.via, head.is_upgrade, head.keep_alive) == (None, None, None, False, True)


@pytest.mark.parametrize("field", [b"X: a\x00b", b"X: a\rb", b"X: a\nb", b"X : a", b"X", b": a", b" X: a", b"X Y: a"])
def test_a_broken_field_is_refused(field: bytes) -> None:
    status, reason = refusal(GET + HOST + field + b"\r\n\r\n")
    assert status == 400
    assert reason


def test_odd_white_space_is_made_canonical() -> None:
    head = request(b"A:1", b"B: \t 2 \t", b"C:", host=b"host:a.example\r\n")
    assert (head.host, b"".join(head.section)) == (b"a.example", b"host: a.example\r\nA: 1\r\nB: 2\r\nC: \r\n")


@pytest.mark.parametrize(
    "field",
    [
        b"Connection: close", b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b"TE: trailers",
        b"HTTP2-Settings: AAMAAABkAAQ", b"Upgrade: h2c", b"Content-Length: 0", b"Via: 1.1 x", b"Proxy: http://evil/",
        b"X-Forwarded-For: 1.1.1.1", b"X_Forwarded_For: 1.1.1.1", b"X-Forwarded_For: 1.1.1.1", b"Forwarded: for=x",
        b"X-Real-IP: 1.1.1.1", b"X_Real_IP: 1.1.1.1", b"X-Request-ID: 1", b"X_Request_ID: 1", b"X-Scheme: https",
        b"X_Scheme: https", b"Content_Length: 5", b"Transfer_Encoding: chunked", b"CONTENT_LENGTH: 5",
        b"Stickyproxy-Pin: release", b"Stickyproxy_Pin: app-2",
    ],
)  # fmt: skip
def test_what_concerns_one_connection_or_only_claims_to_be_of_a_proxy_is_dropped(field: bytes) -> None:
    for spelling in (field, field.lower(), field.upper(), field.replace(b": ", b":  ", 1)):
        head = request(b"A: 1", spelling, b"B: 2")
        assert b"".join(head.section) == HOST + b"A: 1\r\nB: 2\r\n"
        assert head.length == 0


def test_what_a_client_says_of_those_before_it_is_gathered() -> None:
    head = request(b"X-Forwarded-For: a", b"x-forwarded-for: b", b"Forwarded: c", b"Via: 1.0 d", b"via: 1.1 e")
    assert head.forwarded == {b"x-forwarded-for": b"a, b", b"forwarded": b"c"}
    assert head.via == b"1.0 d, 1.1 e"


def test_cookie_fields_stand_in_parts_of_their_own() -> None:
    head = request(b"Cookie: a=1", b"X: y", b"cookie: b=2", b"Cookie2: c")
    assert [head.section[at] for at in head.cookies or ()] == [b"Cookie: a=1\r\n", b"cookie: b=2\r\n"]
    assert b"".join(head.section) == HOST + b"Cookie: a=1\r\nX: y\r\ncookie: b=2\r\nCookie2: c\r\n"


@pytest.mark.parametrize("value", [b"100-Continue", b"other"])
def test_an_expectation_is_for_the_upstream_to_answer(value: bytes) -> None:
    assert b"Expect: " + value + b"\r\n" in b"".join(request(b"Expect: " + value).section)


def test_an_expectation_of_http_10_is_ignored() -> None:
    """RFC 9110, section 10.1.1: the upstream would take it for one of HTTP/1.1, since that is what it is sent."""
    head = request(b"expect: 100-continue", b"Cookie: a=1", line=b"POST / HTTP/1.0")
    assert b"".join(head.section) == HOST + b"Cookie: a=1\r\n"
    assert [head.section[at] for at in head.cookies or ()] == [b"Cookie: a=1\r\n"]


@pytest.mark.parametrize("method", [b"TRACE", b"OPTIONS"])
def test_max_forwards_counts_the_proxies(method: bytes) -> None:
    """RFC 9110, section 7.6.2; each proxy takes one, and the last one does not pass the request on."""
    line = method + b" /x HTTP/1.1"
    head = request(b"A: 1", b"max-forwards: 010", b"Cookie: a=1", line=line)
    assert b"".join(head.section) == HOST + b"A: 1\r\nCookie: a=1\r\nMax-Forwards: 9\r\n"
    assert [head.section[at] for at in head.cookies or ()] == [b"Cookie: a=1\r\n"]
    start = line + b"\r\n" + HOST + b"Max-Forwards: "
    assert refusal(start + b"0\r\n\r\n") == (501, "a request that Max-Forwards ends here")
    for value in (b"-1", b"+1", b"1, 2", b"x", b"9" * 19):
        assert refusal(start + value + b"\r\n\r\n") == (400, "an invalid Max-Forwards")


def test_max_forwards_means_nothing_with_other_methods() -> None:
    assert b"Max-Forwards: 0\r\n" in b"".join(request(b"Max-Forwards: 0").section)


@pytest.mark.parametrize("method", [b"TRACE", b"OPTIONS"])
def test_max_forwards_is_counted_over_a_repeated_section(method: bytes) -> None:
    reader = RequestHeadReader(LIMITS)
    section = HOST + b"Max-Forwards: 3\r\n\r\n"
    for line, left in [
        (GET, b"3"),
        (method + b" / HTTP/1.1\r\n", b"2"),
        (GET, b"3"),
        (method + b" /x HTTP/1.1\r\n", b"2"),
    ]:
        head = reader.read(line + section, len(line + section))
        assert b"".join(head.section) == HOST + b"Max-Forwards: " + left + b"\r\n"


# Connection


@pytest.mark.parametrize(
    ("version", "fields", "keep_alive"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"Connection: keep-alive"], True),
        (b"1.1", [b"Connection: Close"], False),
        (b"1.1", [b"Connection: x, close ,y"], False),
        (b"1.1", [b"Connection: keep-alive", b"Connection: close"], False),
        (b"1.1", [b"Connection: close", b"Connection: keep-alive"], False),
        (b"1.1", [b"Connection: closed"], True),
        (b"1.0", [], False),
        (b"1.0", [b"Connection: Keep-Alive"], True),
        (b"1.0", [b"Connection: keep-alive", b"Connection: close"], False),
        (b"1.0", [b"Connection: x"], False),
    ],
)
def test_whether_the_connection_is_kept(version: bytes, fields: list[bytes], keep_alive: bool) -> None:  # noqa: FBT001
    assert request(*fields, line=b"GET / HTTP/" + version).keep_alive is keep_alive


def test_the_fields_that_connection_names_are_dropped() -> None:
    head = request(b"X: 1", b"Connection: x, Expect,Via , x-real-ip", b"Y: 2", b"Expect: 100-continue", b"Via: 1.1 p",
                   b"X-Real-IP: 1", b"X-Scheme: s", b"x: 3")  # fmt: skip
    assert b"".join(head.section) == HOST + b"Y: 2\r\n"
    assert (head.via, head.forwarded) == (None, {b"x-scheme": b"s"})


def test_connection_may_name_what_is_not_there() -> None:
    head = request(b"Connection: x, via, expect", b"X-Forwarded-For: 1")
    assert (b"".join(head.section), head.forwarded) == (HOST, {b"x-forwarded-for": b"1"})


@pytest.mark.parametrize("name", [b"host", b"cookie", b"content-length", b"transfer-encoding", b"upgrade"])
def test_connection_cannot_take_away_what_gives_a_request_its_meaning(name: bytes) -> None:
    head = request(b"Cookie: a=1", b"Content-Length: 5", b"Connection: keep-alive, " + name)
    assert (head.host, head.length) == (b"a.example", 5)
    assert b"".join(head.section) == HOST + b"Cookie: a=1\r\n"


# Framing


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ([], 0),
        ([b"Content-Length: 0"], 0),
        ([b"Content-Length: 0005"], 5),
        ([b"content-length:5"], 5),
        ([b"Content-Length: 999999999999999999"], 10**18 - 1),
        ([b"Transfer-Encoding: chunked"], CHUNKED),
        ([b"transfer-encoding:\tChunKed "], CHUNKED),
        ([b"Content_Length: 7", b"Content-Length: 5"], 5),
        ([b"Transfer_Encoding: chunked", b"Content-Length: 5"], 5),
    ],
)
def test_the_length_of_a_body(fields: list[bytes], length: int) -> None:
    head = request(*fields, line=b"POST / HTTP/1.1")
    assert (head.length, b"".join(head.section)) == (length, HOST)


NOT_CHUNKED = "a Transfer-Encoding that does not end in chunked"


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        pytest.param([b"Content-Length: 5", b"Transfer-Encoding: chunked"], 400, BOTH, id="CL.TE"),
        pytest.param([b"Transfer-Encoding: chunked", b"Content-Length: 5"], 400, BOTH, id="TE.CL"),
        pytest.param([b"Content-Length: 0", b"Transfer-Encoding: x"], 400, BOTH, id="CL.TE obfuscated"),
        pytest.param([b"Content-Length: 5", b"Content-Length: 6"], 400, SEVERAL, id="two lengths"),
        pytest.param([b"Content-Length: 5", b"content-length: 5"], 400, SEVERAL, id="two lengths that agree"),
        pytest.param([b"Content-Length: 5, 5"], 400, BAD_LENGTH, id="a list of lengths"),
        pytest.param([b"Content-Length: +5"], 400, BAD_LENGTH, id="a plus"),
        pytest.param([b"Content-Length: -5"], 400, BAD_LENGTH, id="a minus"),
        pytest.param([b"Content-Length: 5_0"], 400, BAD_LENGTH, id="an underscore"),
        pytest.param([b"Content-Length: 5 0"], 400, BAD_LENGTH, id="a space"),
        pytest.param([b"Content-Length: 0x5"], 400, BAD_LENGTH, id="0x"),
        pytest.param([b"Content-Length: \xb2"], 400, BAD_LENGTH, id="a superscript"),
        pytest.param([b"Content-Length:"], 400, BAD_LENGTH, id="an empty length"),
        pytest.param([b"Content-Length: 1" + b"0" * 18], 400, BAD_LENGTH, id="a huge length"),
        pytest.param([b"Transfer-Encoding: x"], 400, NOT_CHUNKED, id="another coding"),
        pytest.param([b"Transfer-Encoding: xchunked"], 400, NOT_CHUNKED, id="xchunked"),
        pytest.param([b"Transfer-Encoding: chunked, identity"], 400, NOT_CHUNKED, id="chunked not last"),
        pytest.param([b"Transfer-Encoding: chunked;q=1"], 400, NOT_CHUNKED, id="chunked with a parameter"),
        pytest.param([b'Transfer-Encoding: "chunked"'], 400, NOT_CHUNKED, id="chunked in quotes"),
        pytest.param([b"Transfer-Encoding:"], 400, NOT_CHUNKED, id="an empty coding"),
        pytest.param([b"Transfer-Encoding: \xa0chunked"], 400, NOT_CHUNKED, id="a no-break space"),
        pytest.param([b"Transfer-Encoding: gzip, chunked"], 501, "a transfer coding other than chunked", id="gzip"),
        pytest.param([b"Transfer-Encoding: chunked, chunked"], 400, "a Transfer-Encoding that is not just one chunked",
                     id="chunked twice"),
        pytest.param([b"Transfer-Encoding: chunked, gzip, chunked"], 400,
                     "a Transfer-Encoding that is not just one chunked", id="chunked in gzip in chunked"),
        pytest.param([b"Transfer-Encoding: ,chunked"], 400, "a Transfer-Encoding that is not just one chunked",
                     id="an empty item"),
        pytest.param([b"Transfer-Encoding: chunked", b"Transfer-Encoding: x"], 400, "several Transfer-Encoding fields",
                     id="TE.TE"),
        pytest.param([b"Transfer-Encoding : chunked"], 400, "white space before the colon of a header field",
                     id="space before the colon"),
        pytest.param([b"Transfer-Encoding\t: chunked"], 400, "white space before the colon of a header field",
                     id="tab before the colon"),
        pytest.param([b"X: y\nTransfer-Encoding: chunked"], 400, "a control character in a header field value",
                     id="after a bare LF"),
        pytest.param([b"X: y\rTransfer-Encoding: chunked"], 400, "a control character in a header field value",
                     id="after a bare CR"),
        pytest.param([b"Transfer-Encoding: \x0bchunked"], 400, "a control character in a header field value",
                     id="a vertical tab"),
        pytest.param([b"Transfer-Encoding: chunked\x00"], 400, "a control character in a header field value", id="NUL"),
        pytest.param([b"Transfer-Encoding:\r\n chunked"], 400, "a folded header line (obs-fold)", id="a fold"),
        pytest.param([b"Content-Length\x00: 5"], 400, "a character that no header field name may have",
                     id="NUL in the name"),
        pytest.param([b"Transfer-Encoding"], 400, "a header line without a colon", id="no colon"),
    ],
)  # fmt: skip
def test_framing_that_two_could_read_differently_is_refused(fields: list[bytes], status: int, reason: str) -> None:
    lines = b"".join(field + b"\r\n" for field in fields)
    assert refusal(b"POST / HTTP/1.1\r\n" + HOST + lines + b"\r\n") == (status, reason)
    assert refusal(b"POST / HTTP/1.1\r\n" + lines + HOST + b"Connection: transfer-encoding\r\n\r\n") == (status, reason)


def test_http_10_has_no_chunks() -> None:
    data = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refusal(data) == (400, "Transfer-Encoding in an HTTP/1.0 request")


# Upgrade


HANDSHAKE = (b"Connection: keep-alive, Upgrade", b"Upgrade: WebSocket", b"Sec-WebSocket-Key: x")


def test_a_websocket_handshake_is_an_upgrade() -> None:
    head = request(*HANDSHAKE)
    assert head.is_upgrade
    assert b"".join(head.section) == HOST + b"Sec-WebSocket-Key: x\r\n"
    assert request(*HANDSHAKE, b"Content-Length: 0").is_upgrade


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        pytest.param(b"POST / HTTP/1.1", HANDSHAKE, id="by POST"),
        pytest.param(b"GET / HTTP/1.0", HANDSHAKE, id="in HTTP/1.0"),
        pytest.param(b"GET / HTTP/1.1", (*HANDSHAKE, b"Content-Length: 1"), id="with a body"),
        pytest.param(b"GET / HTTP/1.1", (*HANDSHAKE, b"Transfer-Encoding: chunked"), id="with a chunked body"),
        pytest.param(b"GET / HTTP/1.1", (b"Upgrade: websocket",), id="without Connection"),
        pytest.param(b"GET / HTTP/1.1", (b"Upgrade: websocket", b"Connection: x-upgrade"), id="Connection of another"),
        pytest.param(b"GET / HTTP/1.1", (b"Connection: upgrade",), id="without Upgrade"),
        pytest.param(b"GET / HTTP/1.1", (b"Connection: upgrade", b"Upgrade: h2c"), id="h2c"),
        pytest.param(b"GET / HTTP/1.1", (b"Connection: upgrade", b"Upgrade: websocket, h2c"), id="one of two"),
        pytest.param(b"GET / HTTP/1.1", (b"Connection: upgrade", b"Upgrade: websocket/13"), id="with a version"),
        pytest.param(b"GET / HTTP/1.1", (*HANDSHAKE, b"Upgrade: websocket"), id="named twice"),
        pytest.param(b"GET / HTTP/1.1", (*HANDSHAKE, b"Upgrade: h2c"), id="and h2c in another field"),
    ],
)
def test_any_other_upgrade_is_dropped(line: bytes, fields: tuple[bytes, ...]) -> None:
    head = request(*fields, line=line)
    assert not head.is_upgrade
    assert b"pgrade" not in b"".join(head.section)


# Limits

SMALL = HeadLimits(head_bytes=150, line_bytes=60, fields=4, target_bytes=20)


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"GET /" + b"x" * 20 + b" HTTP/1.1\r\n" + HOST, 414, "the request target is too long"),
        (b"GET /" + b"x" * 100 + b" HTTP/1.\r\n" + HOST, 414, "the request line is too long"),
        (GET + HOST + b"A: 1\r\n" * 4, 431, "too many header fields"),
        (GET + HOST + b"A: " + b"x" * 58 + b"\r\n", 431, "a header line is too long"),
        (GET + HOST + (b"A: " + b"x" * 50 + b"\r\n") * 3, 431, "the request head is too large"),
    ],
)
def test_a_head_beyond_a_limit_is_refused(data: bytes, status: int, reason: str) -> None:
    assert refusal(data + b"\r\n", SMALL) == (status, reason)


def test_a_head_at_its_limits_is_taken() -> None:
    line, fields = b"GET /" + b"x" * 19 + b" HTTP/1.1\r\n", HOST + b"A: " + b"x" * 57 + b"\r\nB: 1\r\n"
    data = line + fields + b"C: " + b"x" * (150 - len(line + fields) - 7) + b"\r\n\r\n"
    assert len(data) == SMALL.head_bytes
    assert len(parse(data, SMALL).target) == SMALL.target_bytes


@pytest.mark.parametrize("end", [b"\x01", b""], ids=["refused", "taken"])
@pytest.mark.parametrize("filler", [b" ", b"\t", b",", b"a,", b"a;", b"=", b"\xff", b"a: b\r\n", b"Connection: a\r\n"])
def test_no_head_costs_much_more_than_its_size(filler: bytes, end: bytes) -> None:
    """60 KB are read in milliseconds; anything quadratic would take seconds."""
    limits = HeadLimits(line_bytes=1 << 20, fields=1 << 20)
    for name in (b"X", b"Connection", b"Cookie", b"Upgrade"):
        data = GET + HOST + name + b":" + filler * (60_000 // len(filler)) + end + b"\r\n\r\n"
        began_at = perf_counter()
        with suppress(RequestError):
            parse(data, limits)
        assert perf_counter() - began_at < 1.0


# Any bytes


LIKELY = st.lists(PARTS, max_size=12).map(lambda parts: GET + HOST + b"\r\n".join(parts) + b"\r\n")


@settings(deadline=None, max_examples=400)
@given(st.one_of(ANY_BYTES, LIKELY))
@example(b"")
def test_any_bytes_are_a_request_head_or_refused(data: bytes) -> None:
    data += b"\r\n\r\n"
    end = find_head_end(data)
    head, status = None, 0
    try:
        head = parse_request_head(data, end, LIMITS)
    except RequestError as error:
        status = error.status
    if head is None:
        assert status in {400, 405, 414, 431, 501, 505}
        return
    check_section(head.section)
    assert head.length >= CHUNKED
    assert head.target[:1] == b"/" or (head.target, head.method) == (b"*", b"OPTIONS")
    assert not (head.is_upgrade and (head.length or head.method != b"GET"))
    lower = b"\r\n" + b"".join(head.section).lower()
    for name in (b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"te", b"x-forwarded-for", b"via"):
        assert b"\r\n" + name + b":" not in lower
    assert lower.count(b"\r\nhost:") == (0 if head.is_http_10 and not head.host else 1)


# One connection, many heads


READER_LINES = st.lists(
    st.sampled_from(
        [b"Cookie: a=1; sp=T", b"Cookie: sp=U", b"Connection: keep-alive", b"Connection: close", b"Content-Length: 0",
         b"Content-Length: 5", b"Expect: 100-continue", b"X-Forwarded-For: 1.2.3.4", b"Via: 1.1 x", b"Bad", b"A:1",
     b"Max-Forwards: 5", b"Max-Forwards: 0"]
    ),
    max_size=3,
    unique=True,
)  # fmt: skip
READER_STARTS = st.sampled_from(
    [b"GET / HTTP/1.1", b"POST /x HTTP/1.1", b"GET / HTTP/1.0", b"CONNECT / HTTP/1.1", b"CONNECT a:1 HTTP/1.1",
     b"OPTIONS * HTTP/1.1", b"OPTIONS /y HTTP/1.1",
     b"GET http://b.example/ HTTP/1.1", b"GET /" + b"x" * 20000 + b" HTTP/1.1", b"GET /"]
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(READER_STARTS, st.sampled_from([0, 1])), min_size=1, max_size=5), READER_LINES, READER_LINES)
@example([(b"GET / HTTP/1.1", 0), (b"CONNECT / HTTP/1.1", 0)], [], [])
@example([(b"GET / HTTP/1.1", 0), (b"OPTIONS * HTTP/1.1", 0), (b"GET http://b.example/ HTTP/1.1", 0)], [], [])
def test_a_repeated_head_says_what_it_would_say_alone(
    starts: list[tuple[bytes, int]], lines: list[bytes], others: list[bytes]
) -> None:
    cookies = CookieReader("sp")
    reader = RequestHeadReader(LIMITS, cookies)
    sections = [b"".join(line + b"\r\n" for line in [b"Host: a", *chosen]) for chosen in (lines, others)]
    for start, chosen in starts:
        data = start + b"\r\n" + sections[chosen] + b"\r\n"
        assert read_facts(reader, data) == read_facts(RequestHeadReader(LIMITS, cookies), data)


def read_facts(reader: RequestHeadReader, data: bytes) -> object:
    try:
        return facts_of(reader.read(data + b"rest", len(data)))
    except RequestError as error:
        return error.status, error.reason


def test_a_repeated_section_is_not_read_again() -> None:
    reader = RequestHeadReader(LIMITS, CookieReader("sp"))
    section = HOST + b"Cookie: a=1; sp=T\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n"
    first, second = (reader.read(line + section, len(line + section)) for line in (GET, b"PUT /x HTTP/1.1\r\n"))
    assert second.section is first.section
    assert (second.method, second.target, second.token) == (b"PUT", b"/x", b"T")
    assert b"".join(second.section) == HOST + b"Cookie: a=1\r\n"
    first.outgoing = b"written"
    first.key_fields = (reader, (b"a key",))
    assert reader.read(GET + section, len(GET + section)).outgoing == b"written"
    assert reader.read(GET + section, len(GET + section)).key_fields is first.key_fields


@pytest.mark.parametrize(
    "field", [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Connection: close", b"Upgrade: websocket"]
)
def test_a_section_with_framing_is_always_read_again(field: bytes) -> None:
    reader = RequestHeadReader(LIMITS)
    data = GET + HOST + field + b"\r\n\r\n"
    first, second = reader.read(data, len(data)), reader.read(data, len(data))
    assert first.section is not second.section
    assert facts_of(first) == facts_of(second)


def test_the_affinity_cookie_stays_where_there_is_no_reader_for_it() -> None:
    data = GET + HOST + b"Cookie: sp=T\r\n\r\n"
    head = RequestHeadReader(LIMITS).read(data, len(data))
    assert (head.token, head.section[-1]) == (None, b"Cookie: sp=T\r\n")


# Writing


FORWARDED = ForwardedWriter(ConnectionOrigin("10.0.0.1", "", is_https=False, is_trusted=False))


def written(head: RequestHead) -> list[bytes]:
    lines = write_request_head(head, FORWARDED, b"id-1", b"127.0.0.1:8001").split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    return lines[:-2]


@pytest.mark.parametrize(
    ("head", "line"),
    [
        (request(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.1"), b"Transfer-Encoding: chunked"),
        (request(b"Content-Length: 005", line=b"POST / HTTP/1.1"), b"Content-Length: 5"),
        (request(line=b"POST / HTTP/1.1"), b"Content-Length: 0"),
        (request(b"Connection: upgrade", b"Upgrade: websocket"), b"Upgrade: websocket"),
        (request(line=b"GET / HTTP/1.0", host=b""), b"Host: 127.0.0.1:8001"),
        (request(), b"X-Request-ID: id-1"),
        (request(), b"X-Forwarded-For: 10.0.0.1"),
    ],
)
def test_a_head_is_written_with_one_framing_and_what_the_upstream_must_know(head: RequestHead, line: bytes) -> None:
    lines = written(head)
    assert lines.count(line) == 1
    assert sum(one.lower().startswith((b"content-length:", b"transfer-encoding:")) for one in lines) <= 1
    assert written(head) == lines  # put together once, and the same again


def test_repr_shows_the_facts() -> None:
    assert repr(request(b"Content-Length: 5")) == "<RequestHead b'GET' b'/' length=5>"


# Heads that have not come whole


@pytest.mark.parametrize(
    ("part", "status"),
    [
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\rX", 400),
        (b"GET / HTTP/1.1\r\nHost: a\rb", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\tb", 400),
        (b"GET / HTTP/1.1\r\nHost: \x00", 400),
        (b"HELO a\r\n", 400),
        (b"GET /\r\n", 400),
        (b"\r\n\r\nGET /\r\n", 400),
        (b"GET / HTTP/2.0\r\n", 505),
        (b"GET /" + b"a" * 20_000, 414),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
    ],
)
def test_what_cannot_become_a_head_is_known_before_its_end(part: bytes, status: int) -> None:
    error = find_head_error(bytearray(part), 0, HeadLimits())
    assert error is not None
    assert error.status == status
    if len(part) > 1000:
        return
    for position in range(1, len(part)):
        before = find_head_error(bytearray(part[:position]), 0, HeadLimits())
        assert (before or find_head_error(bytearray(part), position, HeadLimits())) is not None


@pytest.mark.parametrize(
    "whole",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b c\t\r\n\r\n",
        b"\r\n\r\nGET /a?b HTTP/1.0\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n",
    ],
)
def test_every_part_of_a_head_may_become_one(whole: bytes) -> None:
    for position in range(len(whole) - 1):
        for checked in range(position + 1):
            assert find_head_error(bytearray(whole[:position]), checked, HeadLimits()) is None, (position, checked)


@settings(deadline=None, max_examples=500)
@given(st.lists(PARTS, max_size=8).map(b"".join), st.integers(0, 60))
@example(b"GET / HTTP/1.1\r\nHost: a\r\nX : 1\r\n\r\n", 30)
def test_what_is_refused_early_is_refused_whole(data: bytes, position: int) -> None:
    """Nothing that would be taken is refused before its end."""
    end = find_head_end(data)
    if end < 0 or data.startswith(b"\r\n"):
        return
    with suppress(RequestError):
        parse_request_head(data, end, LIMITS)
        assert find_head_error(bytearray(data[: min(position, end - 1)]), 0, LIMITS) is None


# What is remembered


def test_a_large_section_is_not_remembered() -> None:
    """An idle connection would hold it three times."""
    reader = RequestHeadReader(HeadLimits())
    small, large = (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * size + b"\r\n\r\n" for size in (100, 50_000))
    reader.read(small, len(small))
    assert reader._last is not None
    reader.read(large, len(large))
    assert reader._section == b""
    assert reader.read(small, len(small)).host == b"a"


def test_far_too_many_connection_options_are_refused() -> None:
    assert request(b"Connection: " + b", ".join([b"a"] * 4000)).keep_alive
    with pytest.raises(RequestError, match="too many Connection options"):
        request(b"Connection: " + b", ".join([b"a"] * 5000))
