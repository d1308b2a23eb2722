"""The corpus and the tools that read it: that nothing is weaker than it looks."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.conformance.conversation import cut, send_cut, until
from tests.conformance.corpus import Step, _steps, load_request_cases, load_response_cases, name_of
from tests.conformance.strict import StrictError, read_partial_response, read_request, read_responses
from tests.helpers.raw import RawLink, RawUpstream
from tests.helpers.raw import request as raw_request

ADDED = (
    "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-Proto: http",
    "X-Forwarded-Host: a.example",
    "Via: 1.1 stickyproxy",
    "X-Request-ID: 1",
)


def test_every_case_has_a_name_of_its_own_and_a_reason() -> None:
    requests, responses = load_request_cases(), load_response_cases()
    for cases in (requests, responses):
        assert len({name_of(one) for one in cases}) == len(cases)
        assert all(one.why for one in cases)
    assert len(requests) >= 150
    assert len(responses) >= 50


def test_text_stands_for_exact_octets() -> None:
    assert _steps(["\r\n\x00\xff", {"repeat": "ab", "times": 2}, {"await": "x"}, "end"]) == (
        Step("send", b"\r\n\x00\xffabab"),
        Step("await", b"x"),
        Step("end"),
    )


@pytest.mark.parametrize("size", [1, 2, 399, 400, 401, 5000])
def test_a_cut_loses_nothing(size: int) -> None:
    rng = random.Random(size)
    data = rng.randbytes(size)
    assert b"".join(cut(data, rng)) == data
    assert cut(data, None) == [data]
    assert max(len(piece) for piece in cut(data[:400], rng)) == 1


async def test_what_is_cut_is_read_in_as_many_pieces() -> None:
    upstream = await RawUpstream("app-1").start()
    reads: list[int] = []
    upstream.on_accept = lambda link: setattr(link, "on_data", lambda one: reads.append(one.received_bytes))
    _, link = await asyncio.get_running_loop().create_connection(RawLink, upstream.host, upstream.port)
    await upstream.accept()
    await send_cut(link, b"x" * 300, random.Random(1))
    await until(lambda: reads and reads[-1] == 300)
    link.close()
    upstream.close()
    await until(lambda: link.is_lost)
    assert len(reads) >= 250, "most bytes are read one by one, whatever the machine does meanwhile"


def passed_on(line: str = "GET /", *fields: str) -> bytes:
    """Return a request as the proxy writes it."""
    return raw_request(line, *ADDED, *fields)


def test_the_strict_reader_takes_what_the_proxy_writes() -> None:
    for data, body in [
        (passed_on(), b""),
        (passed_on("POST /", "Content-Length: 2") + b"ab", b"ab"),
        (passed_on("POST /", "Transfer-Encoding: chunked") + b"a\r\n0123456789\r\n0\r\nX: y\r\n\r\n", b"0123456789"),
    ]:
        read = read_request(data + b"GET / HTTP/1.1\r\n\r\n")
        assert read is not None
        assert (read[0].body, read[0].raw, read[1]) == (body, data, True)
        for end in range(len(data)):
            part = read_request(data[:end])
            assert part is None or not part[1]


@pytest.mark.parametrize(
    "data",
    [
        passed_on("GET http://a/"),
        passed_on("GET /a b"),
        passed_on("GET /", "A:b"),
        passed_on("GET /", "A:  b"),
        passed_on("GET /", "A: b "),
        passed_on("GET /", "A : b"),
        passed_on("GET /", "A: b\nC: d"),
        passed_on("GET /", "A: \x00"),
        passed_on("GET /", "Host: b"),
        passed_on("GET /", "Via: b"),
        passed_on("GET /", "TE: trailers"),
        passed_on("GET /", "Connection: close"),
        passed_on("GET /", "Upgrade: websocket"),
        passed_on("GET /", "Connection: Upgrade", "Upgrade: h2c"),
        passed_on("GET /", "Content_Length: 1"),
        passed_on("GET /", "Content-Length: 1", "Content-Length: 1"),
        passed_on("GET /", "Content-Length: 1", "Transfer-Encoding: chunked"),
        passed_on("GET /", "Content-Length: +1"),
        passed_on("GET /", "Transfer-Encoding: Chunked"),
        passed_on("GET /", "Transfer-Encoding: chunked") + b"01\r\na\r\n",
        passed_on("GET /", "Transfer-Encoding: chunked") + b"A\r\na\r\n",
        passed_on("GET /", "Transfer-Encoding: chunked") + b"1;x\r\na\r\n",
        passed_on("GET /", "Transfer-Encoding: chunked") + b"1\r\nab\r\n",
        passed_on("GET /", "Transfer-Encoding: chunked") + b"0\r\nHost: b\r\n\r\n",
        passed_on("GET /", "Transfer-Encoding: chunked") + b"x" * 20,
        raw_request(),
        passed_on().replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    ],
)
def test_the_strict_reader_takes_nothing_else(data: bytes) -> None:
    with pytest.raises(StrictError):
        read_request(data)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nKeep-Alive: 1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n",
    ],
)
def test_the_strict_reader_takes_no_other_responses(data: bytes) -> None:
    with pytest.raises(StrictError):
        read_responses(data, is_over=False)


def test_a_response_that_is_not_whole_is_left() -> None:
    data = b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    for end in range(len(data)):
        _, final, rest = read_responses(data[:end], is_over=True)
        assert final == []
        assert rest or end in {0, 22}
    interim, final, rest = read_responses(data, is_over=False)
    assert ([one.status for one in interim], [one.body for one in final], rest) == ([103], [b"hello"], b"")
    assert read_partial_response(data[22:-1]).body == b"hell"
    with pytest.raises(StrictError):
        read_partial_response(data[22:])
