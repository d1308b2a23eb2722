"""Response heads: every rule that takes or refuses one, what is left of its header section, and how it is written."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stickyproxy.errors import ResponseError
from stickyproxy.wire.head import CHUNKED, UNTIL_CLOSE, find_head_end
from stickyproxy.wire.response_head import ResponseHead, parse_response_head, write_date, write_response_head
from tests.wire.heads import ANY_BYTES, BAD_LENGTH, BOTH, LIMITS, SEVERAL, check_section


def respond(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK", method: bytes = b"GET") -> ResponseHead:
    data = line + b"\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"
    return parse_response_head(data + b"\x00Content-Length: 9\r\n\r\n", len(data), LIMITS, method)


@pytest.mark.parametrize(
    ("line", "method", "fields", "length"),
    [
        pytest.param(b"HTTP/1.1 200 OK", b"GET", [b"Content-Length: 5"], 5, id="a length"),
        pytest.param(b"HTTP/1.1 200 OK", b"GET", [b"Transfer-Encoding: Chunked"], CHUNKED, id="chunks"),
        pytest.param(b"HTTP/1.1 200 OK", b"GET", [], UNTIL_CLOSE, id="neither"),
        pytest.param(b"HTTP/1.1 200 OK", b"HEAD", [b"Content-Length: 5"], 0, id="HEAD with a length"),
        pytest.param(b"HTTP/1.1 200 OK", b"HEAD", [b"Transfer-Encoding: chunked"], 0, id="HEAD with chunks"),
        pytest.param(b"HTTP/1.1 200 OK", b"HEAD", [], 0, id="HEAD with neither"),
        pytest.param(b"HTTP/1.1 304 Not Modified", b"GET", [b"Content-Length: 5"], 0, id="304 with a length"),
        pytest.param(b"HTTP/1.1 304 Not Modified", b"GET", [], 0, id="304"),
        pytest.param(b"HTTP/1.1 204 No Content", b"GET", [], 0, id="204"),
        pytest.param(b"HTTP/1.1 100 Continue", b"GET", [], 0, id="100"),
        pytest.param(b"HTTP/1.1 103 Early Hints", b"GET", [b"Link: <a>"], 0, id="103"),
        pytest.param(b"HTTP/1.0 200 OK", b"GET", [], UNTIL_CLOSE, id="HTTP/1.0"),
        pytest.param(b"HTTP/1.1 999 Odd", b"GET", [], UNTIL_CLOSE, id="a status beyond 599"),
    ],
)
def test_whether_and_how_a_body_follows(line: bytes, method: bytes, fields: list[bytes], length: int) -> None:
    """RFC 9112, section 6.3."""
    head = respond(*fields, line=line, method=method)
    assert (head.status, head.length) == (int(line[9:12]), length)


@pytest.mark.parametrize(
    ("line", "status_text"),
    [
        (b"HTTP/1.1 200 OK", b"200 OK"),
        (b"HTTP/1.1 200 ", b"200 "),
        (b"HTTP/1.1 200", b"200 "),
        (b"HTTP/1.0 404 N\xf6t\tFound  x", b"404 N\xf6t\tFound  x"),
    ],
)
def test_a_status_line_is_written_with_its_space(line: bytes, status_text: bytes) -> None:
    """RFC 9112, section 4: the space is there even where no reason follows."""
    assert respond(line=line).status_text == status_text


@pytest.mark.parametrize(
    "line",
    [b"HTTP/1.1 20 OK", b"HTTP/1.1 099 x", b"HTTP/1.1 2000 x", b"HTTP/1.1  200 x", b"HTTP/2 200", b"HTTP/1.2 200 x",
     b" HTTP/1.1 200 x", b"http/1.1 200 x", b"HTTP/1.1 2\xb20 x", b"HTTP/1.1 +20 x", b"HTTP/1.1 200 a\x00b",
     b"HTTP/1.1 200 a\nb", b"ICY 200 OK", b"", b"SSH-2.0-OpenSSH_9"],
)  # fmt: skip
def test_a_bad_status_line_is_refused(line: bytes) -> None:
    with pytest.raises(ResponseError, match=r"^the upstream sent an invalid status line$") as caught:
        respond(line=line)
    assert (caught.value.status, caught.value.proxy_status) == (502, "http_protocol_error")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], BOTH),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 5"], BOTH),
        ([b"Content-Length: 5", b"Content-Length: 5"], SEVERAL),
        ([b"Content-Length: -1"], BAD_LENGTH),
        ([b"Transfer-Encoding: gzip, chunked"], "a transfer coding other than chunked"),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], "several Transfer-Encoding fields"),
        ([b"X: a", b" b"], "a folded header line (obs-fold)"),
        ([b"X : a"], "white space before the colon of a header field"),
        ([b"X: a\rb"], "a control character in a header field value"),
    ],
)
def test_a_response_that_two_could_read_differently_is_refused(fields: list[bytes], reason: str) -> None:
    with pytest.raises(ResponseError) as caught:
        respond(*fields)
    assert (caught.value.status, caught.value.reason) == (502, f"the upstream sent {reason}")


@pytest.mark.parametrize("field", [b"A: " + b"x" * (128 * 1024), b"\r\n".join([b"A: 1"] * 201)])
def test_a_response_head_beyond_its_limits_is_refused(field: bytes) -> None:
    with pytest.raises(ResponseError, match="too large") as caught:
        respond(field)
    assert caught.value.proxy_status == "http_response_header_section_size"
    respond(b"\r\n".join([b"A: 1"] * 200))


def test_what_concerns_the_connection_to_the_upstream_is_dropped() -> None:
    head = respond(b"Server: x", b"Connection: keep-alive, x-hop", b"Keep-Alive: timeout=5", b"X-Hop: 1", b"TE: x",
                   b"Upgrade: h2c", b"Proxy-Connection: close", b"Transfer-Encoding: chunked", b"Trailer: A",
                   b"Set-Cookie: a=b")  # fmt: skip
    assert b"".join(head.section) == b"Server: x\r\nTrailer: A\r\nSet-Cookie: a=b\r\n"
    assert head.length == CHUNKED


def test_a_response_keeps_its_length_and_is_made_canonical() -> None:
    head = respond(b"Content-Length:5", b"Connection: content-length")
    assert (b"".join(head.section), head.length, head.has_length) == (b"Content-Length: 5\r\n", 5, True)


@pytest.mark.parametrize(
    ("line", "fields", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK", [], True),
        (b"HTTP/1.1 200 OK", [b"Connection: Close"], False),
        (b"HTTP/1.1 200 OK", [b"Connection: keep-alive", b"Connection: close"], False),
        (b"HTTP/1.1 200 OK", [b"Connection: close", b"Connection: keep-alive"], False),
        (b"HTTP/1.1 200 OK", [b"Connection: x"], True),
        (b"HTTP/1.0 200 OK", [], False),
        (b"HTTP/1.0 200 OK", [b"Connection: Keep-Alive"], True),
        (b"HTTP/1.0 200 OK", [b"Connection: keep-alive, x"], True),
        (b"HTTP/1.0 200 OK", [b"Connection: x"], False),
        # RFC 9112, section 6.1: the framing of such a message is not to be relied on.
        (b"HTTP/1.0 200 OK", [b"Connection: keep-alive", b"Transfer-Encoding: chunked"], False),
        (b"HTTP/1.1 200 OK", [b"Connection: keep-alive", b"Transfer-Encoding: chunked"], True),
        # A body where none may be: if it comes after all, it must not be taken for the next response.
        (b"HTTP/1.1 204 No Content", [b"Content-Length: 5"], False),
        (b"HTTP/1.1 204 No Content", [b"Transfer-Encoding: chunked"], False),
        (b"HTTP/1.1 204 No Content", [b"Content-Length: 0"], True),
        (b"HTTP/1.1 204 No Content", [], True),
        (b"HTTP/1.1 304 Not Modified", [b"Content-Length: 5"], True),
    ],
)
def test_whether_the_upstream_may_be_asked_again(line: bytes, fields: list[bytes], keep_alive: bool) -> None:  # noqa: FBT001
    assert respond(*fields, line=line).keep_alive is keep_alive


@pytest.mark.parametrize("line", [b"HTTP/1.1 204 No Content", b"HTTP/1.1 101 Switching Protocols"])
def test_no_length_is_passed_on_where_none_may_be(line: bytes) -> None:
    """RFC 9110, section 8.6; a 304 may have one, and so may the answer to HEAD."""
    assert respond(b"A: 1", b"Content-Length: 0", line=line).section == [b"A: 1\r\n"]
    assert respond(b"Content-Length: 5", line=b"HTTP/1.1 304 x").section == [b"Content-Length: 5\r\n"]
    assert respond(b"Content-Length: 5", method=b"HEAD").section == [b"Content-Length: 5\r\n"]


@pytest.mark.parametrize(
    ("fields", "is_upgrade"),
    [
        ([b"Connection: Upgrade", b"Upgrade: websocket"], True),
        ([b"Connection: upgrade", b"Upgrade: h2c"], False),
        ([b"Upgrade: websocket"], False),
        ([b"Connection: upgrade"], False),
    ],
)
def test_whether_the_upstream_switched_to_websocket(fields: list[bytes], is_upgrade: bool) -> None:  # noqa: FBT001
    assert respond(*fields, line=b"HTTP/1.1 101 Switching Protocols").is_upgrade is is_upgrade


def test_cache_control_is_gathered_and_passed_on() -> None:
    head = respond(b"Cache-Control: Public", b"cache-control: max-age=1")
    assert head.cache_control == b",public,max-age=1"
    assert b"".join(head.section) == b"Cache-Control: Public\r\ncache-control: max-age=1\r\n"
    assert respond().cache_control is None


@settings(deadline=None, max_examples=200)
@given(ANY_BYTES, st.sampled_from([b"GET", b"HEAD"]), st.booleans())
@example(b"", b"GET", False)
def test_any_bytes_are_a_response_head_or_refused(data: bytes, method: bytes, has_line: bool) -> None:  # noqa: FBT001
    data = (b"HTTP/1.1 200 OK\r\n" if has_line else b"") + data + b"\r\n\r\n"
    end = find_head_end(data)
    head, status = None, 0
    try:
        head = parse_response_head(data, end, LIMITS, method)
    except ResponseError as error:
        status = error.status
    if head is None:
        assert status == 502
        return
    check_section(head.section)
    assert 100 <= head.status <= 999
    assert head.status_text[3:4] == b" "
    assert head.length >= UNTIL_CLOSE


def test_a_head_is_written_with_the_lines_of_the_proxy_after_its_own() -> None:
    head = respond(b"A: 1", b"Connection: close", b"B: 2")
    assert write_response_head(head, b"", b"C: 3\r\n") == b"HTTP/1.1 200 OK\r\nA: 1\r\nB: 2\r\nC: 3\r\n\r\n"


def test_repr_shows_the_facts() -> None:
    assert repr(respond(b"Content-Length: 5")) == "<ResponseHead 200 length=5>"


# What is told of it


@pytest.mark.parametrize("name", [b"Stickyproxy-Pin", b"stickyproxy-pin", b"STICKYPROXY-PIN"])
@pytest.mark.parametrize("value", [b"release", b"app-2", b"anything; else", b""])
def test_what_the_application_says_of_the_pin_is_read_and_not_passed_on(name: bytes, value: bytes) -> None:
    head = respond(b"A: 1", name + b": " + value, b"Content-Length: 5")
    assert head.pin == value
    assert b"".join(head.section) == b"A: 1\r\nContent-Length: 5\r\n"
    assert head.keep_alive
    assert respond(b"A: 1", b"X-Stickyproxy-Pin: a").pin is None


def test_of_several_pins_the_last_counts() -> None:
    head = respond(b"Stickyproxy-Pin: app-1", b"A: 1", b"stickyproxy-pin: release")
    assert (head.pin, b"".join(head.section)) == (b"release", b"A: 1\r\n")


@pytest.mark.parametrize(
    ("fields", "has_date", "has_cookies"),
    [
        (b"", False, False),
        (b"Date: Mon, 23 Nov 2026 07:00:00 GMT\r\n", True, False),
        (b"date: x\r\nset-cookie: a=b\r\nSET-COOKIE: c=d\r\n", True, True),
        (b"X-Date: x\r\nX-Set-Cookie: y\r\nDated: z\r\n", False, False),
    ],
)
def test_a_date_and_cookies_are_noted_and_stay(fields: bytes, has_date: bool, has_cookies: bool) -> None:  # noqa: FBT001
    data = b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 0\r\n\r\n"
    head = parse_response_head(data, len(data), LIMITS, b"GET")
    assert (head.has_date, head.has_cookies) == (has_date, has_cookies)
    assert b"".join(head.section) == fields + b"Content-Length: 0\r\n"


def test_a_date_is_written_as_others_read_it() -> None:
    assert write_date(1_795_417_200.9) == b"Date: Mon, 23 Nov 2026 07:00:00 GMT\r\n"
    assert write_date(784111777) == b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"  # RFC 9110, section 5.6.7
