"""What the proxy reads and writes, against h11 and httptools: the three must always agree on where a message ends.

A head is sent with the body that the proxy expects of it and with another message right behind. Whoever frames it
differently sees another payload, or no next message: that is what request smuggling is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from stickyproxy.errors import RequestError, ResponseError
from stickyproxy.proxy.exchange import Exchange
from stickyproxy.wire.body import write_chunk, write_last_chunk
from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter
from stickyproxy.wire.head import CHUNKED, UNTIL_CLOSE, HeadLimits, find_head_end
from stickyproxy.wire.request_head import RequestHead, parse_request_head, write_request_head
from stickyproxy.wire.response_head import ResponseHead, parse_response_head
from tests.wire.peers import (
    NEXT_REQUEST,
    NEXT_RESPONSE,
    Reading,
    read_request_by_h11,
    read_request_by_httptools,
    read_response_by_h11,
    read_response_by_httptools,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = HeadLimits()
PAYLOAD = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: evil\r\n\r\n"  # whoever reads it as framing is found out
READERS = [read_request_by_h11, read_request_by_httptools]
ORIGIN = ConnectionOrigin("203.0.113.9", "8080", is_https=False, is_trusted=False)


def body_of(length: int) -> bytes:
    """Return a body as the proxy expects it for a head, or as it writes one."""
    if length == CHUNKED:
        return write_chunk(PAYLOAD) + write_last_chunk()
    return (PAYLOAD * (length // len(PAYLOAD) + 1))[: max(0, length)]


def payload_of(length: int) -> bytes:
    return PAYLOAD if length == CHUNKED else body_of(length)


def write_request(head: RequestHead) -> bytes:
    """Write a request head as an upstream gets it."""
    return write_request_head(head, ForwardedWriter(ORIGIN, forwarded=True), b"id-1", b"localhost")


def write_response(head: ResponseHead, *, is_chunked: bool) -> bytes:
    """Write a response head the way an exchange does for a client that keeps its connection."""
    exchange = Exchange.__new__(Exchange)
    exchange.head = RequestHead(b"GET", b"/", is_http_10=False)
    exchange._keep_alive = True
    exchange.plane = cast("Any", SimpleNamespace(date_line=b"Date: Mon, 23 Nov 2026 07:00:00 GMT\r\n"))
    exchange._place = cast(
        "Any",
        SimpleNamespace(cookie_writer=None, write_cookie=lambda _: b"Set-Cookie: stickyproxy=T\r\n"),
    )
    return exchange._write_response_head(head, is_chunked=is_chunked)


def fields_of(section: bytes) -> list[tuple[bytes, bytes]]:
    pairs = [line.partition(b": ") for line in section.split(b"\r\n")[:-1]]
    return [(name.lower(), value) for name, _, value in pairs]


def in_numbers(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes | int]]:
    """Return the fields with lengths as numbers: h11 leaves leading zeros out."""
    return [(name, int(value) if name == b"content-length" else value) for name, value in fields]


def read_request(data: bytes) -> RequestHead | None:
    """Return the head that `data` is, None where it is none or not just one."""
    if find_head_end(data) != len(data):
        return None
    try:
        return parse_request_head(data, len(data), LIMITS)
    except RequestError:
        return None


def read_response(data: bytes, method: bytes) -> ResponseHead | None:
    """Return the head that `data` is, None where it is none or not just one."""
    if find_head_end(data) != len(data):
        return None
    try:
        return parse_response_head(data, len(data), LIMITS, method)
    except ResponseError:
        return None


METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"PATCH"])
TARGETS = st.sampled_from([b"/", b"/a?b=c", b"//x", b"http://b.example/y", b"http://b.example?z", b"/%00;a#b"])
NAMES = st.sampled_from(
    [
        b"Content-Length", b"content-length", b"Transfer-Encoding", b"TRANSFER-ENCODING", b"Connection", b"Upgrade",
        b"Content_Length", b"Transfer_Encoding", b"Host", b"Expect", b"TE", b"Trailer", b"Cookie", b"X-Y", b"Via",
        b"Content-Length ", b"Transfer-Encoding\t", b" Content-Length", b"Keep-Alive", b"X-Forwarded-For", b"",
        b"Proxy-Connection", b"Forwarded", b"Set-Cookie", b"Content-Length\x00", b"Transfer-Encoding\x0b",
    ]
)  # fmt: skip
VALUES = st.sampled_from(
    [
        b"0", b"5", b"7", b"07", b"+5", b"-5", b"5_0", b"5, 5", b"5,7", b"0x5", b"\t5 ", b"", b"chunked", b"Chunked",
        b"\tchunked ", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"identity", b"xchunked", b"chunked;a",
        b"\x0bchunked", b"chunked\x00", b"close", b"keep-alive", b"close, content-length", b"transfer-encoding, host",
        b"upgrade", b"upgrade, x-y", b"websocket", b"h2c", b"100-continue", b"a", b"a\x80\xff", b"a\r b", b"5\r\n\t",
        b"a=1; b=2", b"5\n", b"1.1 x",
    ]
)  # fmt: skip
COLONS = st.sampled_from([b": ", b": ", b":", b":\t", b" : "])
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n "])
LINES = st.lists(st.builds(lambda *parts: b"".join(parts), NAMES, COLONS, VALUES, ENDS), max_size=4)
HOSTS = st.sampled_from([b"Host: a\r\n", b"Host: a\r\n", b"host:a:80 \r\n", b"", b"Host:\r\n", b"Host: a, b\r\n"])
VERSIONS = st.sampled_from([b"1.1", b"1.1", b"1.0"])
REQUESTS = st.builds(
    lambda method, target, version, host, lines: (
        method + b" " + target + b" HTTP/" + version + b"\r\n" + host + b"".join(lines) + b"\r\n"
    ),
    METHODS,
    TARGETS,
    VERSIONS,
    HOSTS,
    LINES,
)
# Lines that are mostly legal, so that what is accepted is often interesting.
LEGAL = st.lists(
    st.sampled_from(
        [
            b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Connection: keep-alive",
            b"Connection: close, x-y", b"Connection: upgrade", b"Upgrade: websocket", b"X-Y: z", b"Expect: x",
            b"Content_Length: 9", b"Transfer_Encoding: chunked", b"Cookie: a=1", b"X-Forwarded-For: 1.1.1.1", b"A:\t1 ",
            b"Via: 1.0 b", b"TE: trailers", b"Trailer: X-Y", b"Set-Cookie: a=1", b"Connection: Transfer-Encoding",
        ]
    ).map(lambda line: line + b"\r\n"),
    max_size=5,
    unique=True,
)  # fmt: skip
LEGAL_REQUESTS = st.builds(
    lambda method, target, version, lines: (
        method + b" " + target + b" HTTP/" + version + b"\r\nHost: a\r\n" + b"".join(lines) + b"\r\n"
    ),
    METHODS,
    TARGETS,
    VERSIONS,
    LEGAL,
)


# Requests


@settings(deadline=None, max_examples=600)
@given(st.one_of(REQUESTS, LEGAL_REQUESTS))
@example(b"GET / HTTP/1.0\r\nHost:\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n")
def test_what_is_written_to_an_upstream_reads_as_it_was_meant(data: bytes) -> None:
    head = read_request(data)
    assume(head is not None)
    assert head is not None
    written = write_request(head)
    stream = written + body_of(head.length) + NEXT_REQUEST
    expected_fields = fields_of(written.partition(b"\r\n")[2].removesuffix(b"\r\n"))
    names = [name for name, _ in expected_fields]
    assert names.count(b"host") == 1
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert names.count(b"connection") == names.count(b"upgrade") == int(head.is_upgrade)
    own = read_request(written)
    assert own is not None
    assert (own.method, own.target, own.length, own.is_upgrade) == (
        head.method,
        head.target,
        head.length,
        head.is_upgrade,
    )
    for read in READERS:
        reading = read(stream)
        assert reading == Reading((head.method, head.target), expected_fields, payload_of(head.length), True, True)


@settings(deadline=None, max_examples=600)
@given(st.one_of(REQUESTS, LEGAL_REQUESTS))
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\nContent-Length: 5\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
@example(b"GET / HTTP/1.0\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n")
def test_no_request_is_taken_that_others_frame_differently(data: bytes) -> None:
    """Whoever stands before the proxy and reads a request as h11 or httptools do sees the same messages as it."""
    head = read_request(data)
    assume(head is not None)
    assert head is not None
    # After `close`, httptools refuses whatever follows.
    following = NEXT_REQUEST if head.keep_alive else b""
    for read in READERS:
        reading = read(data + body_of(head.length) + following)
        if reading is None:
            continue
        assert reading.is_whole
        assert reading.payload == payload_of(head.length)
        assert reading.start[0] == head.method
        assert reading.has_next == bool(following)


@pytest.mark.parametrize("read", READERS)
def test_the_readers_tell_one_framing_from_another(read: Callable[[bytes], Reading | None]) -> None:
    """The comparison can fail: a body read one byte too short or too long gives no next request."""
    start = b"POST / HTTP/1.1\r\nHost: a\r\n"
    right = read(start + b"Content-Length: 5\r\n\r\nabcde" + NEXT_REQUEST)
    assert right == Reading(
        (b"POST", b"/"), [(b"host", b"a"), (b"content-length", b"5")], b"abcde", is_whole=True, has_next=True
    )
    for length in (b"4", b"6", b"99"):
        wrong = read(start + b"Content-Length: " + length + b"\r\n\r\nabcde" + NEXT_REQUEST)
        assert wrong is None or not wrong.has_next
    chunked = read(start + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n" + NEXT_REQUEST)
    assert chunked is not None
    assert (chunked.payload, chunked.is_whole, chunked.has_next) == (b"abcde", True, True)
    assert read(b"POST / HTTP/1.1\r\n\x00\r\n\r\n") is None


def test_most_of_the_legal_requests_are_taken_by_all() -> None:
    """The properties above say something only where all three take a request."""
    for fields in (b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 0\r\n"):
        data = b"POST /x HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"
        head = read_request(data)
        assert head is not None
        assert all(read(data + body_of(head.length) + NEXT_REQUEST) is not None for read in READERS)


# Responses

STATUS_LINES = st.sampled_from(
    [b"1.1 200 OK", b"1.1 200", b"1.1 404 ", b"1.1 204 No Content", b"1.1 304 Not Modified", b"1.0 200 OK",
     b"1.1 500 a\tb", b"1.1 599 \xff"]
)  # fmt: skip
RESPONSES = st.builds(
    lambda line, lines: b"HTTP/" + line + b"\r\n" + b"".join(lines) + b"\r\n", STATUS_LINES, st.one_of(LINES, LEGAL)
)


@settings(deadline=None, max_examples=500)
@given(RESPONSES, st.sampled_from([b"GET", b"HEAD"]))
@example(b"HTTP/1.1 204\r\nContent-Length: 5\r\n\r\n", b"GET")
@example(b"HTTP/1.1 200\r\n\r\n", b"GET")
def test_what_is_written_to_a_client_reads_as_it_was_meant(data: bytes, method: bytes) -> None:
    head = read_response(data, method)
    assume(head is not None)
    assert head is not None
    is_chunked = head.length < 0
    length = CHUNKED if is_chunked else head.length
    written = write_response(head, is_chunked=is_chunked)
    fields = fields_of(written.partition(b"\r\n")[2].removesuffix(b"\r\n"))
    names = [name for name, _ in fields]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert not {b"connection", b"upgrade", b"te", b"keep-alive"} & set(names)
    expected = Reading((b"%d" % head.status,), fields, payload_of(length), is_whole=True, has_next=True)
    stream = written + body_of(length) + NEXT_RESPONSE
    by_h11 = read_response_by_h11(stream, method)
    assert by_h11 is not None
    assert by_h11._replace(fields=[]) == expected._replace(fields=[])
    assert in_numbers(by_h11.fields) == in_numbers(fields)
    if method != b"HEAD":  # httptools cannot be told
        assert read_response_by_httptools(stream) == expected


@settings(deadline=None, max_examples=500)
@given(RESPONSES)
@example(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n")
@example(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n")
def test_no_response_is_taken_that_others_frame_differently(data: bytes) -> None:
    head = read_response(data, b"GET")
    assume(head is not None)
    assert head is not None
    if head.length == UNTIL_CLOSE:
        reading = read_response_by_h11(data + PAYLOAD, b"GET", ends=True)
        assert reading is None or (reading.payload, reading.is_whole) == (PAYLOAD, True)
        by_httptools = read_response_by_httptools(data + PAYLOAD)
        assert by_httptools is None or (by_httptools.payload, by_httptools.is_whole) == (PAYLOAD, False)
        return
    following = NEXT_RESPONSE if head.keep_alive else b""
    stream = data + body_of(head.length) + following
    for reading in (read_response_by_h11(stream, b"GET"), read_response_by_httptools(stream)):
        if reading is not None:
            assert (reading.payload, reading.is_whole) == (payload_of(head.length), True)
            assert reading.has_next == bool(following)


def test_the_readers_of_responses_tell_one_framing_from_another() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: "
    for read in (lambda data: read_response_by_h11(data, b"GET"), read_response_by_httptools):
        right = read(start + b"5\r\n\r\nabcde" + NEXT_RESPONSE)
        assert right is not None
        assert (right.payload, right.has_next) == (b"abcde", True)
        wrong = read(start + b"6\r\n\r\nabcde" + NEXT_RESPONSE)
        assert wrong is None or not wrong.has_next
