"""One exchange: the path of a request, and everything that can happen on it."""

from __future__ import annotations

import asyncio
import resource
import socket
from email.utils import parsedate_to_datetime
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.snapshot import AdminState, Rules
from stickyproxy.proxy.pool import Pool
from stickyproxy.proxy.settings import Settings
from stickyproxy.wire.origin import OriginRules
from tests.helpers.plane import cluster_settings
from tests.helpers.raw import GET, RawUpstream, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE

if TYPE_CHECKING:
    from stickyproxy.proxy.upstream import UpstreamConnection
    from tests.helpers.plane import PlaneUnderTest, Start

CHUNKED = "Transfer-Encoding: chunked"


# Heads


async def test_a_request_passes_with_what_the_proxy_adds(proxy: PlaneUnderTest) -> None:
    sent = request("GET /a?b=c", "Accept: */*", "X-Twice: 1", "X-Twice: 2", "Cookie: a=b")
    client, app = await proxy.open(sent)
    got = await app.read_request()
    assert got.start == "GET /a?b=c HTTP/1.1"
    assert got["Host"] == "example.org"
    assert got["Accept"] == "*/*"
    assert got.all("X-Twice") == ["1", "2"]
    assert got["Cookie"] == "a=b"
    assert got["Via"] == "1.1 stickyproxy"
    assert got["X-Forwarded-For"] == "127.0.0.1"
    assert got["X-Forwarded-Proto"] == "http"
    assert got["X-Forwarded-Host"] == "example.org"
    assert got["X-Forwarded-Port"] == proxy.listeners[0].port
    assert len(got["X-Request-ID"]) == 24
    assert not got.all("content-length")
    assert not got.all("connection")
    app.answer(b"hello", "Server: app", "Set-Cookie: a=1", "Set-Cookie: b=2")
    response = await client.read_response()
    assert response.start == "HTTP/1.1 200 OK"
    assert response["Server"] == "app"
    assert response.all("set-cookie")[:2] == ["a=1", "b=2"]
    assert response.body == b"hello"
    record = await proxy.recorded()
    assert record.request_id == got["X-Request-ID"]
    assert (record.method, record.target, record.host) == (b"GET", b"/a?b=c", b"example.org")
    assert (record.status, record.upstream, record.affinity, record.attempts) == (200, "app-1", "new", 1)
    assert (record.received_bytes, record.sent_bytes, record.error) == (0, 5, "")


async def test_hop_by_hop_fields_stay_where_they_are(proxy: PlaneUnderTest) -> None:
    sent = request("GET /", "Connection: keep-alive, X-Mine", "X-Mine: 1", "Keep-Alive: 5", "TE: trailers", "X-Kept: 1")
    client, app = await proxy.open(sent + sent)
    for _ in range(2):
        got = await app.read_request()
        assert [
            name.lower() for name, _ in got.fields if name.lower().startswith(("connection", "keep", "te", "x-mine"))
        ] == []
        assert got["X-Kept"] == "1"
        app.answer(b"", "Connection: X-Theirs, keep-alive", "X-Theirs: 1", "Keep-Alive: timeout=5", "X-Kept: 2")
        response = await client.read_response()
        assert [name for name in ("connection", "keep-alive", "x-theirs") if name in response] == []
        assert response["X-Kept"] == "2"


async def test_no_request_of_a_connection_takes_over_anything_of_another(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /1", "X-A: 1", body=b"body"))
    seen = []
    for sent in (
        request("GET /2"),
        request("GET /3", "X-B: 2"),
        request("GET /4"),
        request("POST /5"),
        request("GET /6"),
    ):
        got = await app.read_request()
        seen.append(got)
        app.answer()
        await client.read_response()
        client.send(sent)
    seen.append(await app.read_request())
    app.answer()
    await client.read_response()
    assert [one.target for one in seen] == ["/1", "/2", "/3", "/4", "/5", "/6"]
    assert [one.all("content-length") for one in seen] == [["4"], [], [], [], ["0"], []]
    assert [one.all("x-a") + one.all("x-b") for one in seen] == [["1"], [], ["2"], [], [], []]
    assert len({one["X-Request-ID"] for one in seen}) == 6


async def test_a_trusted_proxy_before_us_is_believed_and_others_are_not(start: Start) -> None:
    said = ("X-Request-ID: given-1", "X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https", "Via: 1.1 edge")
    trusting = await start(settings=Settings(trusted=(ip_network("127.0.0.0/8"),)))
    client, app = await trusting.open(request("GET /", *said))
    got = await app.read_request()
    assert got["X-Request-ID"] == "given-1"
    assert got["X-Forwarded-For"] == "203.0.113.9, 127.0.0.1"
    assert got["X-Forwarded-Proto"] == "https"
    assert got["Via"] == "1.1 edge, 1.1 stickyproxy"
    app.answer()
    assert "; Secure" in (await client.read_response())["Set-Cookie"]
    record = await trusting.recorded()
    assert (record.request_id, record.client) == ("given-1", "203.0.113.9")

    other = await start()
    client, app = await other.open(request("GET /", *said))
    got = await app.read_request()
    assert got["X-Request-ID"] != "given-1"
    assert got["X-Forwarded-For"] == "127.0.0.1"
    assert got["X-Forwarded-Proto"] == "http"
    app.answer()
    assert "Secure" not in (await client.read_response())["Set-Cookie"]
    assert (await other.recorded()).client == "127.0.0.1"


# Bodies


@pytest.mark.parametrize("size", [0, 1, 100, 70_000, 3_000_000])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_bodies_pass_both_ways(proxy: PlaneUnderTest, size: int, *, is_chunked: bool) -> None:
    body = bytes(at % 251 for at in range(size))
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part) + b"0\r\n\r\n"
    client = await proxy.client()
    if is_chunked:
        client.send(request("POST /", CHUNKED) + framed)
    else:
        client.send(request("POST /", body=body))
    app = await proxy.upstream.accept()
    got = await app.read_request()
    assert got.body == body
    assert ("transfer-encoding" in got, "content-length" in got) == (is_chunked, not is_chunked)
    if is_chunked:
        app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed)
    else:
        app.answer(body)
    response = await client.read_response()
    assert response.body == body
    assert ("transfer-encoding" in response, "content-length" in response) == (is_chunked, not is_chunked)
    record = await proxy.recorded()
    assert (record.received_bytes, record.sent_bytes) == (size, size)
    counters = proxy.pool().counters
    assert (counters.received_bytes, counters.sent_bytes) == (size, size)
    assert len(proxy.pool().idle) == 1


async def test_trailers_pass_both_ways(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(
        request("POST /", CHUNKED, "Trailer: X-Sum") + b"1\r\na\r\n0\r\nX-Sum: 1\r\nHost: evil\r\n\r\n"
    )
    got = await app.read_request()
    assert (got.body, got.trailers) == (b"a", ["X-Sum: 1"])
    app.send(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nb\r\n0\r\nX-Sum: 2\r\nContent-Length: 5\r\n\r\n"
    )
    response = await client.read_response()
    assert (response.body, response.trailers) == (b"b", ["X-Sum: 2"])


async def test_each_octet_of_a_stream_is_passed_on_at_once(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /events", "Accept: text/event-stream"))
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    head = await client.read_message()
    assert head["Content-Type"] == "text/event-stream"
    for number in range(10):
        app.send(b"7\r\ndata: %d\r\n" % number)
        assert await client.read_chunk() == b"data: %d" % number
    app.send(b"0\r\n\r\n")
    assert await client.read_chunk() == b""


async def test_each_octet_of_an_upload_is_passed_on_at_once(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", CHUNKED))
    await app.read_message()
    for number in range(10):
        client.send(b"1\r\n%d\r\n" % number)
        assert await app.read_chunk() == b"%d" % number
    client.send(b"0\r\n\r\n")
    assert await app.read_chunk() == b""
    await app.read(2)
    app.answer()
    assert (await client.read_response()).status == 200


async def test_request_and_response_may_stream_at_the_same_time(start: Start) -> None:
    proxy = await start(response_s=0.3)
    client, app = await proxy.open(request("POST /echo", CHUNKED))
    await app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await client.read_message())["Connection"] == "close"
    for number in range(5):
        client.send(b"1\r\n%d\r\n" % number)
        assert await app.read_chunk() == b"%d" % number
        app.send(b"1\r\n%d\r\n" % number)
        assert await client.read_chunk() == b"%d" % number
    client.send(b"0\r\n\r\n")
    assert await app.read_until(b"0\r\n\r\n") == b"0\r\n\r\n"
    # The response has begun: the time for its head is no matter any more, however long it streams.
    for _ in range(3):
        tick = proxy.plane.now
        await eventually(lambda tick=tick: proxy.plane.now > tick)  # type: ignore[misc]
    app.send(b"2\r\nok\r\n0\r\n\r\n")
    assert await client.read_chunk() == b"ok"
    assert await client.read_chunk() == b""
    assert await client.read_rest() == b"\r\n"
    assert client.ending == "eof"


async def test_a_broken_chunked_upload_is_400_and_the_upstream_sees_it_abort(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", CHUNKED) + b"1\r\na\r\nrubbish\r\n")
    assert (await client.read_response()).status == 400
    await app.read_message()
    assert await app.read_rest() == b""
    assert (await proxy.recorded()).status == 400


# What has no body


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", "200 OK\r\nContent-Length: 1000"),
        ("HEAD", "200 OK\r\nTransfer-Encoding: chunked"),
        ("HEAD", "404 Not Found"),
        ("GET", "204 No Content"),
        ("GET", "204 No Content\r\nContent-Length: 0"),
        ("GET", "304 Not Modified\r\nContent-Length: 1000"),
    ],
)
async def test_a_response_without_a_body_ends_with_its_head(proxy: PlaneUnderTest, method: str, answer: str) -> None:
    client, app = await proxy.open(request(f"{method} /1"))
    for number in (1, 2):
        assert (await app.read_request()).target == f"/{number}"
        app.send(f"HTTP/1.1 {answer}\r\n\r\n".encode())
        response = await client.read_response(to_head=True)
        assert response.start.endswith(answer.partition("\r\n")[0])
        assert response.all("content-length") == (["1000"] if "1000" in answer else [])
        if number == 1:
            client.send(request(f"{method} /2"))
    assert client.held == b""
    assert len(proxy.upstream.links) == 1


async def test_a_body_where_none_may_be_is_not_passed_on(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("HEAD /"))
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    assert (await client.read_response(to_head=True)).status == 200
    client.send(GET)
    other = await proxy.upstream.accept()
    await other.read_request()
    other.answer()
    assert (await client.read_response()).status == 200
    assert await app.read_rest() == b""


# Interim responses


async def test_100_continue_is_the_upstreams_to_give(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", "Expect: 100-continue", "Content-Length: 5"))
    assert (await app.read_message())["Expect"] == "100-continue"
    assert client.held == b""
    app.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert (await client.read_message()).start == "HTTP/1.1 100 Continue"
    client.send(b"hello")
    assert await app.read(5) == b"hello"
    app.answer(b"thanks")
    response = await client.read_response()
    assert (response.status, response.body) == (200, b"thanks")
    client.send(GET)
    await app.read_request()
    app.answer()
    assert (await client.read_response()).status == 200


async def test_a_refusal_instead_of_100_closes_the_connection(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", "Expect: 100-continue", "Content-Length: 5"))
    await app.read_message()
    app.answer(b"", status="417 Expectation Failed")
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (417, "close")
    assert await client.read_rest() == b""


async def test_several_interim_responses_are_relayed_in_order(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    app.send(b"HTTP/1.1 102 Processing\r\n\r\n" + hint)
    assert (await client.read_message()).status == 102
    assert (await client.read_message())["Link"] == "</a.css>"
    app.send(hint).answer(b"done")
    assert (await client.read_message()).status == 103
    response = await client.read_response()
    assert response.body == b"done"
    assert response.cookie


async def test_too_many_interim_responses_are_502(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 40)
    for _ in range(32):
        assert (await client.read_message()).status == 102
    assert (await client.read_response()).status == 502


# HTTP/1.0


async def test_http_10_gets_its_answer_and_an_end(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(b"GET / HTTP/1.0\r\n\r\n")
    got = await app.read_request()
    assert got.start == "GET / HTTP/1.1"
    assert got["Host"] == f"127.0.0.1:{proxy.upstream.port}"
    assert got["Via"] == "1.0 stickyproxy"
    app.send(b"HTTP/1.1 103 Early Hints\r\n\r\n").answer(b"hello")
    response = await client.read_response()
    assert (response.status, response["Connection"], response.body) == (200, "close", b"hello")
    assert await client.read_rest() == b""


async def test_http_10_with_keep_alive_keeps_the_connection(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: keep-alive", version="1.0"))
    for _ in range(2):
        await app.read_request()
        app.answer(b"hello")
        assert (await client.read_response())["Connection"] == "keep-alive"
        client.send(request("GET /", "Connection: keep-alive", version="1.0"))


async def test_http_10_gets_a_chunked_answer_until_the_end_of_the_connection(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: keep-alive", version="1.0"))
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nX: 1\r\n\r\n")
    response = await client.read_response()
    assert "transfer-encoding" not in response
    assert (response["Connection"], response.body) == ("close", b"hello")
    assert client.ending == "eof"
    assert len(proxy.pool().idle) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_response_until_the_end_of_its_connection(proxy: PlaneUnderTest, version: str) -> None:
    client, app = await proxy.open(request(version=version))
    await app.read_request()
    app.send(b"HTTP/1.0 200 OK\r\n\r\nhel")
    await client.read_until(b"hel")
    app.send(b"lo").close()
    rest = await client.read_until(b"0\r\n\r\n") if version == "1.1" else await client.read_rest()
    assert rest.replace(b"\r\n", b"") == (b"2lo0" if version == "1.1" else b"lo")
    assert client.ending != "reset"
    record = await proxy.recorded()
    assert (record.status, record.sent_bytes, record.error) == (200, 5, "")


async def test_connection_close_of_the_upstream_is_its_own_affair(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"bye", "Connection: close").half_close()
    assert (await client.read_response()).all("connection") == []
    client.send(GET)
    other = await proxy.upstream.accept()
    await other.read_request()
    other.answer(b"again")
    assert (await client.read_response()).body == b"again"


# Broken responses


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize(
    "part",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    ],
)
async def test_a_response_that_breaks_off_is_seen_to(
    proxy: PlaneUnderTest, version: str, end: str, part: bytes
) -> None:
    client, app = await proxy.open(request(version=version))
    await app.read_request()
    app.send(part)
    got = await client.read_until(b"hel")
    getattr(app, end)()
    got += await client.read_rest()
    assert client.ending == "reset"
    assert not got.endswith(b"0\r\n\r\n")
    assert got.count(b"HTTP/1.1") == 1
    record = await proxy.recorded()
    assert (record.status, record.error) == (200, "the upstream broke off its response")
    assert proxy.pool().counters.attempts == {"truncated": 1}


async def test_a_response_until_close_that_is_reset_is_seen_to(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
    await client.read_until(b"hello")
    app.reset()
    assert not (await client.read_rest()).endswith(b"0\r\n\r\n")
    assert client.ending == "reset"


async def test_broken_chunks_of_a_response_are_seen_to(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nrubbish\r\n")
    assert (await client.read_message()).status == 200
    assert await client.read_rest() == b""
    assert client.ending == "reset"
    assert "an invalid chunk size" in (await proxy.recorded()).error


async def test_a_body_that_stops_after_the_response_has_begun_cuts_both(start: Start) -> None:
    proxy = await start(body_idle_s=0.2)
    client, app = await proxy.open(request("POST /", CHUNKED))
    await app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await client.read_message()).status == 200
    assert await client.read_rest() == b""
    assert client.ending == "reset"
    assert await app.read_rest() == b""


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"rubbish\r\n\r\n", "http_protocol_error"),
        (b"SSH-2.0-x\r\n", "http_protocol_error"),
        (b"HTTP/1.1 200 OK\r\nX : 1\r\n\r\n", "http_protocol_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "http_protocol_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "http_protocol_error"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000, "http_response_header_section_size"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n", "http_response_header_section_size"),
    ],
)
async def test_what_is_no_response_is_502(proxy: PlaneUnderTest, answer: bytes, error: str) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(answer)
    response = await client.read_response()
    assert response.status == 502
    assert f"error={error};" in response["Proxy-Status"]
    await app.read_rest()
    client.send(GET)
    other = await proxy.upstream.accept()
    await other.read_request()
    other.answer()
    assert (await client.read_response()).status == 200, "the client's connection is as good as before"


@pytest.mark.parametrize("accept", ["text/html,*/*", "application/json", "*/*"])
async def test_an_error_is_answered_in_the_clients_language(proxy: PlaneUnderTest, accept: str) -> None:
    client, app = await proxy.open(request("GET /", f"Accept: {accept}"))
    got = await app.read_request()
    app.close()
    response = await client.read_response()
    assert response.status == 502
    assert response["Content-Type"].startswith(accept.partition(",")[0].replace("*/*", "text/plain"))
    assert response["Proxy-Status"].startswith("stickyproxy; error=connection_terminated")
    assert response["X-Request-ID"] == got["X-Request-ID"]
    assert got["X-Request-ID"] in response.body.decode()
    assert (await proxy.recorded()).request_id == got["X-Request-ID"]


# Timeouts


async def test_an_upload_that_stands_still_is_408(start: Start) -> None:
    proxy = await start(body_idle_s=0.2)
    client, app = await proxy.open(request("POST /", "Content-Length: 10") + b"hello")
    await app.read_message()
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (408, "close")
    assert await app.read_rest() == b"hello"


async def test_an_upstream_that_does_not_answer_is_504(start: Start) -> None:
    proxy = await start(response_s=0.2)
    client, app = await proxy.open(GET)
    await app.read_request()
    response = await client.read_response()
    assert response.status == 504
    assert "error=http_response_timeout" in response["Proxy-Status"]
    assert "connection" not in response
    app.answer(b"late")
    client.send(request("GET /next"))
    other = await proxy.upstream.accept()
    assert (await other.read_request()).target == "/next"
    other.answer(b"new")
    assert (await client.read_response()).body == b"new", "a late answer reaches nobody"
    assert (await app.read_rest()) == b""


async def test_a_response_that_stands_still_is_cut(start: Start) -> None:
    proxy = await start(response_idle_s=0.3)
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    assert (await client.read_message()).status == 200
    assert await client.read_rest() == b"hello"
    assert client.ending == "reset"
    assert await app.read_rest() == b""
    assert "nothing more of its response" in (await proxy.recorded()).error


async def test_a_response_that_goes_on_is_not_cut(start: Start) -> None:
    proxy = await start(response_idle_s=1.0)
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
    assert (await client.read_message()).status == 200
    began = proxy.plane.now
    for _ in range(8):  # 2 s in all
        before = proxy.plane.now
        app.send(b"x")
        assert await client.read(1) == b"x"
        await eventually(lambda before=before: proxy.plane.now > before)  # type: ignore[misc]
    assert proxy.plane.now - began > 1.5
    assert (await proxy.recorded()).status == 200


async def test_an_event_stream_may_be_silent(start: Start) -> None:
    proxy = await start(response_idle_s=0.2)
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n\r\ndata: 1\n\n")
    assert (await client.read_message()).status == 200
    assert await client.read_chunk() == b"data: 1\n\n"
    (downstream,) = proxy.plane.downstreams
    assert downstream.deadline == float("inf")
    before = proxy.plane.now
    await eventually(lambda: proxy.plane.now > before + 1)
    app.send(b"data: 2\n\n")
    assert await client.read_chunk() == b"data: 2\n\n"


async def test_a_client_that_takes_nothing_of_a_response_is_cut(start: Start) -> None:
    proxy = await start(send_s=0.3)
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    app.answer(b"x" * 50_000_000)
    record = await proxy.recorded()
    assert (record.status, record.error) == (499, "the client took nothing of the response in time")
    assert proxy.pool().counters.attempts["client_gone"] == 1
    await eventually(lambda: not proxy.plane.downstreams)
    app.follow()
    await eventually(lambda: app.is_over)


async def test_a_client_that_takes_a_response_slowly_gets_all_of_it(start: Start) -> None:
    """What the kernel still holds counts: nothing moves in the process while it drains."""
    proxy = await start(send_s=1.0)
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    size = 12_000_000
    app.answer(b"x" * size)
    await client.ready()
    (downstream,) = proxy.plane.downstreams
    began = proxy.plane.now
    while client.received_bytes < size and not client.is_over:
        client.read_again()
        before = client.received_bytes
        await eventually(lambda before=before: client.received_bytes > before or client.is_over)  # type: ignore[misc]
        client.stop_reading()
        if proxy.plane.now < began + 3:
            now = proxy.plane.now
            await eventually(lambda now=now: proxy.plane.now > now)  # type: ignore[misc]
    client.read_again()
    assert len((await client.read_response()).body) == size
    assert (await proxy.recorded()).status == 200
    assert downstream.deadline > proxy.plane.now


async def test_a_websocket_handshake_has_a_time_of_its_own(start: Start) -> None:
    proxy = await start(websocket_handshake_s=0.2)
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    response = await client.read_response()
    assert response.status == 504
    assert await app.read_rest() == b""


# Limits


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue"])
async def test_a_body_that_is_too_large_is_413_before_it_comes(start: Start, expect: str) -> None:
    proxy = await start(settings=Settings(body_bytes=100))
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 101", *filter(None, [expect])))
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (413, "close")
    client.send(b"x" * 101)  # still on its way: the answer could be read all the same
    assert proxy.upstream.links == []
    client.close()
    record = await proxy.recorded()
    assert (record.status, record.upstream) == (413, "")


async def test_a_body_as_large_as_may_be_passes(start: Start) -> None:
    proxy = await start(settings=Settings(body_bytes=100))
    client, app = await proxy.open(request("POST /", "Content-Length: 100") + b"x" * 100)
    assert (await app.read_request()).body == b"x" * 100
    app.answer()
    assert (await client.read_response()).status == 200
    client.send(request("POST /", CHUNKED) + b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n")
    assert (await app.read_request()).body == b"x" * 100
    app.answer()
    assert (await client.read_response()).status == 200


async def test_chunks_that_are_too_many_are_413_and_the_upstream_sees_no_end(start: Start) -> None:
    proxy = await start(settings=Settings(body_bytes=100))
    client, app = await proxy.open(request("POST /", CHUNKED) + b"64\r\n" + b"x" * 100 + b"\r\n")
    await app.read_message()
    client.send(b"1\r\ny\r\n0\r\n\r\n")
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (413, "close")
    assert not (await app.read_rest()).endswith(b"0\r\n\r\n")


# What the proxy adds, and takes out, of a response


async def test_a_response_without_a_date_gets_one(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    response = await client.read_response()
    assert abs(parsedate_to_datetime(response["Date"]).timestamp() - proxy.plane.wall) < 5
    client.send(GET)
    await app.read_request()
    app.answer(b"", "Date: Sun, 06 Nov 1994 08:49:37 GMT")
    assert (await client.read_response()).all("Date") == ["Sun, 06 Nov 1994 08:49:37 GMT"]
    client.send(request("POST /", body=b"x"))
    await app.read_request()
    app.close()
    response = await client.read_response()
    assert (response.status, len(response.all("Date"))) == (502, 1)


async def test_a_cookie_of_the_app_does_not_end_the_pin(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"", "Set-Cookie: stickyproxy=theirs; Path=/", "Set-Cookie: session=1")
    response = await client.read_response()
    cookie = response.cookie
    assert sorted(one.partition("=")[0] for one in response.all("Set-Cookie")) == ["session", "stickyproxy"]
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    app.answer(b"", "Set-Cookie: session=1", "set-cookie: stickyproxy=; Max-Age=0")
    assert (await client.read_response()).all("Set-Cookie") == ["session=1"]
    client.send(HANDSHAKE.replace(b"\r\n\r\n", f"\r\nCookie: {cookie}\r\n\r\n".encode()))
    await app.read_request()
    app.send(ACCEPT.replace(b"\r\n\r\n", b"\r\nSet-Cookie: stickyproxy=theirs\r\nSet-Cookie: session=2\r\n\r\n"))
    assert (await client.read_message()).all("Set-Cookie") == ["session=2"]


async def test_an_app_may_set_any_cookie_where_there_is_no_affinity_cookie(start: Start) -> None:
    proxy = await start(settings=Settings(clusters=cluster_settings(cookie=None)), rules=Rules(has_cookie=False))
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"", "Set-Cookie: stickyproxy=theirs")
    assert (await client.read_response()).all("Set-Cookie") == ["stickyproxy=theirs"]


async def test_a_request_that_the_end_of_its_connection_cuts_short_is_not_waited_for(proxy: PlaneUnderTest) -> None:
    """The end was seen while the request before it was under way."""
    client, app = await proxy.open(GET)
    await app.read_request()
    client.send(request("PUT /", "Content-Length: 36") + b"short")
    await client.flush()
    client.half_close()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.has_eof)
    app.answer()
    assert (await client.read_response()).status == 200
    await client.read_rest()
    assert (await proxy.recorded(2)).status == 499
    await eventually(lambda: not proxy.plane.downstreams)


# Origins


def websocket_from(origin: str) -> bytes:
    return HANDSHAKE.replace(b"\r\n\r\n", f"\r\nOrigin: {origin}\r\n\r\n".encode())


async def test_a_websocket_from_another_site_is_403(start: Start) -> None:
    proxy = await start(settings=Settings(origins=OriginRules(("https://example.org",))))
    client = await proxy.client()
    twice = websocket_from("https://example.org\r\nOrigin: https://example.com")
    for handshake in (websocket_from("https://example.com"), HANDSHAKE, twice, websocket_from("")):
        client.send(handshake)
        response = await client.read_response()
        assert response.status == 403
        assert "http_request_denied" in response["Proxy-Status"]
    assert proxy.upstream.links == []
    client.send(websocket_from("https://example.org"))
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101


async def test_origins_matter_to_websockets_only(start: Start) -> None:
    proxy = await start(settings=Settings(origins=OriginRules(("https://example.org",))))
    client, app = await proxy.open(request("GET /", "Origin: https://example.com"))
    await app.read_request()
    app.answer()
    assert (await client.read_response()).status == 200


# Uploads that the upstream does not take


async def test_an_upstream_that_does_not_take_the_body_is_504(start: Start) -> None:
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start()
    proxy = await start([upstream], body_idle_s=1.0)
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 60000000") + b"x" * 60_000_000)
    response = await client.read_response()
    assert response.status == 504


async def test_an_upstream_that_takes_the_body_slowly_is_no_fault_of_the_client(start: Start) -> None:
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start()
    proxy = await start([upstream], body_idle_s=1.0)
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 30000000"))
    app = await upstream.accept()
    app.keeps = False
    (downstream,) = proxy.plane.downstreams
    client.send(b"x" * 30_000_000)
    await eventually(lambda: downstream.is_paused)
    before = downstream.deadline
    app.read_again()
    await eventually(lambda: downstream.deadline > before)
    await eventually(lambda: app.received_bytes > 30_000_000)
    app.answer(b"thanks")
    assert (await client.read_response()).body == b"thanks"


# Upstreams that are not there


async def test_nobody_there_is_503_with_retry_after(proxy: PlaneUnderTest) -> None:
    await proxy.upstream.stop()
    client = await proxy.client()
    for _ in range(2):
        client.send(request("GET /", "Accept: text/html"))
        response = await client.read_response()
        assert (response.status, response["Retry-After"]) == (503, "1")
        assert "error=destination_unavailable" in response["Proxy-Status"]
        assert b"try again" in response.body
    assert set(proxy.reports) == {("app-1", HealthEvent.REFUSED)}
    await proxy.upstream.restart()
    client.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.answer(b"back")
    assert (await client.read_response()).body == b"back"
    assert proxy.reports[-1] == ("app-1", HealthEvent.CONNECTED)


async def test_an_upload_to_nobody_is_503_that_its_client_can_read(proxy: PlaneUnderTest) -> None:
    await proxy.upstream.stop()
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 10000000") + b"x" * 5_000_000)
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (503, "close")
    assert await client.read_rest() == b""
    assert client.ending == "eof"


async def test_an_upstream_that_accepts_and_closes_at_once_is_502(start: Start) -> None:
    upstream = RawUpstream("app-1")
    upstream.on_accept = lambda link: link.reset()
    await upstream.start()
    proxy = await start([upstream])
    for _ in range(30):
        client = await proxy.client()
        client.send(GET)
        assert (await client.read_response()).status == 502
        client.close()


async def test_a_connection_that_ended_before_it_could_be_used_is_502(
    proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pool.dial

    async def dial(pool: Pool) -> UpstreamConnection:
        connection = await real(pool)
        (await proxy.upstream.accept()).close()
        await eventually(lambda: connection.is_closing)
        return connection

    monkeypatch.setattr(Pool, "dial", dial)
    client = await proxy.client()
    for sent in (GET, request("POST /", body=b"x")):
        client.send(sent)
        response = await client.read_response()
        assert response.status == 502
        assert "error=connection_terminated" in response["Proxy-Status"]
    assert proxy.pool().counters.attempts == {"connection_terminated": 2}


async def test_an_upstream_that_speaks_first_is_502(start: Start) -> None:
    upstream = RawUpstream("app-1")
    upstream.on_accept = lambda link: link.send(b"220 mail.example.org ESMTP\r\n")
    await upstream.start()
    proxy = await start([upstream])
    for _ in range(30):
        client = await proxy.client()
        client.send(GET)
        assert (await client.read_response()).status == 502
        client.close()


# Retries


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "TRACE", "PUT"])
async def test_what_meets_the_end_of_an_idle_connection_is_sent_again_if_it_may(
    proxy: PlaneUnderTest, method: str
) -> None:
    client, app = await proxy.open(request("GET /first"))
    await app.read_request()
    app.answer()
    await client.read_response()
    app.on_data = lambda link: link.close()
    client.send(request(f"{method} /again"))
    other = await proxy.upstream.accept()
    assert (await other.read_request()).target == "/again"
    other.answer()
    assert (await client.read_response(to_head=True)).status == 200
    record = await proxy.recorded(2)
    assert (record.status, record.attempts) == (200, 2)
    assert proxy.pool().counters.attempts == {"ok": 2, "closed": 1}


@pytest.mark.parametrize(
    "sent",
    [
        request("POST /once", body=b""),
        request("POST /once", body=b"x"),
        request("PUT /once", body=b"x"),
        request("PATCH /once"),
    ],
)
async def test_what_may_not_be_repeated_is_sent_once(proxy: PlaneUnderTest, sent: bytes) -> None:
    client, app = await proxy.open(request("GET /first"))
    await app.read_request()
    app.answer()
    await client.read_response()
    app.on_data = lambda link: link.close()
    client.send(sent)
    assert (await client.read_response()).status == 502
    assert app.all_received.count(b"/once") == 1
    assert len(proxy.upstream.links) == 1


@pytest.mark.parametrize("part", [b"HTTP/1.1 200", b"HTTP/1.1 102 Processing\r\n\r\n"])
async def test_after_one_octet_of_an_answer_nothing_is_repeated(proxy: PlaneUnderTest, part: bytes) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    await client.read_response()
    client.send(GET)
    await app.read_request()
    app.send(part).close()
    response = await client.read_response()
    if response.status == 102:
        response = await client.read_response()
    assert response.status == 502
    assert len(proxy.upstream.links) == 1


async def test_a_new_connection_that_closes_is_not_tried_again(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.close()
    assert (await client.read_response()).status == 502
    assert len(proxy.upstream.links) == 1


async def test_a_retry_that_finds_nobody_goes_elsewhere(start: Start) -> None:
    proxy = await start(2)
    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.links for one in proxy.upstreams))
    first = next(one for one in proxy.upstreams if one.links)
    second = next(one for one in proxy.upstreams if one is not first)
    app = await first.accept()
    await app.read_request()
    app.answer()
    cookie = (await client.read_response()).cookie
    await first.stop()
    app.on_data = lambda link: link.close()
    client.send(request("GET /again", f"Cookie: {cookie}"))
    other = await second.accept()
    assert (await other.read_request()).target == "/again"
    other.answer()
    assert (await client.read_response()).cookie not in {"", cookie}
    assert proxy.plane.counters.breaks == {"refused": 1}


# Clients that go away


async def test_a_client_gone_in_the_middle_of_an_upload(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", "Content-Length: 100000") + b"x" * 50_000)
    await app.read_message()
    client.reset()
    assert len(await app.read_rest()) == 50_000
    record = await proxy.recorded()
    assert (record.status, record.received_bytes) == (499, 50_000)


async def test_a_client_gone_in_the_middle_of_a_response(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await client.read_message()
    client.close()
    while not app.is_over:
        app.send(b"5\r\nhello\r\n")
        await asyncio.sleep(0.001)
    record = await proxy.recorded()
    assert (record.status, record.error) == (499, "the client went away")


async def test_a_client_gone_while_its_upstream_is_dialled(proxy: PlaneUnderTest) -> None:
    for _ in range(20):
        before = len(proxy.records)
        client = await proxy.client()
        client.send(GET)
        await eventually(lambda: any(one.exchange for one in proxy.plane.downstreams) or proxy.upstream.links)
        client.reset()
        await eventually(lambda before=before: len(proxy.records) > before)  # type: ignore[misc]
    assert {record.status for record in proxy.records} == {499}


# Backpressure


async def test_a_slow_reader_stops_the_upstream(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    size = 200_000_000
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    sent = 0
    while not downstream.is_blocked:
        app.send(b"x" * 100_000)
        sent += 100_000
        await asyncio.sleep(0)
    (connection,) = [downstream.exchange._connection]  # type: ignore[union-attr]
    assert connection is not None
    assert not connection.transport.is_reading()
    assert downstream.transport.get_write_buffer_size() < 1_000_000
    client.keeps = False
    client.read_again()
    while sent < size:
        app.send(b"x" * min(1_000_000, size - sent))
        sent += 1_000_000
        await eventually(lambda: not app.is_write_paused)
    await eventually(lambda: client.received_bytes > size)
    assert (await proxy.recorded()).sent_bytes == size


@pytest.mark.parametrize("kind", ["length", "chunked"])
async def test_a_connection_paused_for_one_client_serves_the_next(proxy: PlaneUnderTest, kind: str) -> None:
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    if kind == "length":
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n"
        app.send(head)
        await eventually(lambda: downstream.exchange._response_head is not None)  # type: ignore[union-attr]
    else:
        app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2faf080\r\n")
    # All but the last octets, until the client's side is nearly full; then the last ones fill it.
    end = b"" if kind == "length" else b"\r\n0\r\n\r\n"
    app.send(b"x" * 50_000_000 + end)
    await eventually(lambda: downstream.is_blocked)
    client.read_again()
    await eventually(lambda: client.received_bytes > 30_000_000)
    client.stop_reading()
    client.read_again()
    assert len((await client.read_response()).body) == 50_000_000
    for _ in range(3):
        client.send(GET)
        await app.read_request()
        app.answer(b"next")
        assert (await client.read_response()).body == b"next"
    assert len(proxy.upstream.links) == 1


async def test_a_whole_response_that_its_client_does_not_take_frees_the_upstreams_connection(start: Start) -> None:
    proxy = await start(settings=Settings(buffer_bytes=4096))
    slow = await proxy.client()
    slow.stop_reading()
    slow.send(GET)
    app = await proxy.upstream.accept()
    (downstream,) = proxy.plane.downstreams
    # Whole responses, one after the other, until one of them does not fit any more.
    while not downstream.is_blocked:
        await app.read_request()
        app.answer(b"x" * 100_000)
        await eventually(lambda: downstream.exchange is None)
        if not downstream.is_blocked:
            slow.send(GET)
    await eventually(lambda: proxy.pool().idle)
    client = await proxy.client()
    client.send(request("GET /other"))
    assert (await app.read_request()).target == "/other"
    app.answer(b"other")
    assert (await client.read_response()).body == b"other"


async def test_a_slow_upstream_stops_the_client(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pool.dial

    async def dial(pool: Pool) -> UpstreamConnection:
        connection = await real(pool)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    monkeypatch.setattr(Pool, "dial", dial)
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start(path=str(tmp_path / "app.sock"))
    proxy = await start([upstream])
    client = await proxy.client()
    size = 60_000_000
    # The first read of the proxy holds much of the body already, more than the upstream's socket takes.
    client.send(request("POST /", f"Content-Length: {size}") + b"x" * size)
    await eventually(lambda: upstream.links)
    (downstream,) = proxy.plane.downstreams
    exchange = downstream.exchange
    assert exchange is not None
    await eventually(lambda: exchange._connection)
    connection, relay = exchange._connection, exchange._request
    assert connection is not None
    assert relay is not None
    accepted, unchanged = 0, 0
    while unchanged < 50:
        assert connection.transport.get_write_buffer_size() < 1_000_000
        unchanged = unchanged + 1 if accepted == relay.relayed_bytes > 0 else 0
        accepted = relay.relayed_bytes
        await asyncio.sleep(0.002)
    assert downstream.is_paused
    assert accepted < size // 2
    app = await upstream.accept()
    app.keeps = False
    app.read_again()
    await eventually(lambda: app.received_bytes > size)
    app.answer(b"thanks")
    assert (await client.read_response()).body == b"thanks"


async def test_an_upstream_that_answers_without_taking_the_body_is_not_used_again(start: Start, tmp_path: Path) -> None:
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start(path=str(tmp_path / "app.sock"))
    proxy = await start([upstream], settings=Settings(buffer_bytes=1 << 24))
    client = await proxy.client()
    client.send(request("POST /", body=b"x" * 12_000_000))
    app = await upstream.accept()
    (downstream,) = proxy.plane.downstreams
    exchange = downstream.exchange
    assert exchange is not None
    await eventually(lambda: not exchange.is_reading_request)
    connection = exchange._connection
    assert connection is not None
    assert connection.transport.get_write_buffer_size() > 0
    app.answer(b"early")
    assert (await client.read_response()).body == b"early"
    assert connection.transport.is_closing()
    assert proxy.pool().idle == []


async def test_an_upstream_that_half_closes_without_reading_does_not_hang(start: Start) -> None:
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start()
    proxy = await start([upstream])
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 60000000") + b"x" * 60_000_000)
    app = await upstream.accept()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_paused)
    app.half_close()
    assert (await client.read_response()).status == 502


@pytest.mark.load
async def test_an_upload_of_more_than_a_gibibyte_takes_no_memory(proxy: PlaneUnderTest) -> None:
    size = (1 << 30) + 12_345
    piece = b"x" * (1 << 18)
    client = await proxy.client()
    client.send(request("POST /", f"Content-Length: {size}"))
    app = await proxy.upstream.accept()
    await app.read_message()
    app.keeps = False
    already = app.received_bytes
    before = resident_bytes()
    highest = before
    sent = 0
    while sent < size:
        client.send(piece[: size - sent])
        sent += min(len(piece), size - sent)
        await client.ready()
        highest = max(highest, resident_bytes())
    await eventually(lambda: app.received_bytes - already >= size)
    assert highest - before < 32 << 20
    app.answer(b"thanks")
    assert (await client.read_response()).body == b"thanks"
    record = await proxy.recorded()
    assert record.received_bytes == size


def resident_bytes() -> int:
    """Return the memory that this process takes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# Where it goes


async def test_a_pinned_client_that_comes_back_is_a_hit(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    cookie = (await client.read_response()).cookie
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    app.answer()
    assert (await client.read_response()).cookie == ""
    assert proxy.plane.counters.hits == 1


@pytest.mark.parametrize("is_back", [True, False])
async def test_a_request_may_wait_for_its_upstream(start: Start, *, is_back: bool) -> None:
    proxy = await start(2, rules=Rules(on_unavailable="wait", wait_s=30 if is_back else 0.1))
    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.links for one in proxy.upstreams))
    first, second = sorted(proxy.upstreams, key=lambda one: not one.links)
    app = await first.accept()
    await app.read_request()
    app.answer()
    cookie = (await client.read_response()).cookie
    proxy.set_admin(first, AdminState.MAINT)
    client.send(request("POST /held", f"Cookie: {cookie}", body=b"held"))
    if is_back:
        await eventually(lambda: proxy.plane._changed)
        proxy.set_admin(first, AdminState.READY)
    other = app if is_back else await second.accept()
    assert (await other.read_request()).body == b"held"
    other.answer()
    assert bool((await client.read_response()).cookie) != is_back


@pytest.mark.parametrize(
    ("error", "outcome"), [(TimeoutError(), "timeout"), (OSError(113, "No route to host"), "error")]
)
async def test_an_upstream_that_cannot_be_dialled(
    proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch, error: OSError, outcome: str
) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"", "Connection: close")
    cookie = (await client.read_response()).cookie

    async def dial(_: Pool) -> UpstreamConnection:
        raise error

    monkeypatch.setattr(Pool, "dial", dial)
    client.send(GET)
    assert (await client.read_response()).status == 503, "a new client finds nobody"
    client.send(request("GET /", f"Cookie: {cookie}"))
    assert (await client.read_response()).status == (504 if outcome == "timeout" else 503)
    assert proxy.pool().counters.attempts[outcome] == 2
    assert proxy.reports == []


async def test_a_client_that_leaves_before_the_dial_fails_is_counted_once(
    proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = asyncio.Event()

    async def dial(_: Pool) -> UpstreamConnection:
        await gone.wait()
        raise OSError(113, "No route to host")

    monkeypatch.setattr(Pool, "dial", dial)
    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.exchange for one in proxy.plane.downstreams))
    client.reset()
    assert (await proxy.recorded()).status == 499
    gone.set()
    await eventually(lambda: proxy.pool().counters.attempts.get("error"))


async def test_a_connection_dialled_for_a_client_that_has_left_is_kept(
    proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, real = asyncio.Event(), Pool.dial

    async def dial(pool: Pool) -> UpstreamConnection:
        await gone.wait()
        return await real(pool)

    monkeypatch.setattr(Pool, "dial", dial)
    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.exchange for one in proxy.plane.downstreams))
    client.reset()
    await proxy.recorded()
    gone.set()
    await eventually(lambda: proxy.pool().idle)
    other = await proxy.client()
    other.send(request("GET /other"))
    app = await proxy.upstream.accept()
    assert (await app.read_request()).target == "/other"
    app.answer()
    assert (await other.read_response()).status == 200


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_tunnel_begins_with_its_101(proxy: PlaneUnderTest, *, is_early: bool) -> None:
    client = await proxy.client()
    client.send(request("GET /", "Connection: Upgrade", "Upgrade: websocket") + (b"to you" if is_early else b""))
    app = await proxy.upstream.accept()
    asked = await app.read_request()
    assert asked["Upgrade"] == "websocket"
    if is_early:
        client.half_close()
        (downstream,) = proxy.plane.downstreams
        await eventually(lambda: downstream.has_eof)
    accept = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    app.send(accept + (b"to me" if is_early else b""))
    assert (await client.read_message()).status == 101
    if is_early:
        assert await client.read(5) == b"to me"
        assert await app.read_rest() == b"to you"
    counters = proxy.pool().counters
    assert (counters.in_flight, counters.tunnels_open, sum(counters.duration.counts)) == (0, 1, 0)
    assert counters.attempts == {"ok": 1}


async def test_a_101_that_was_not_asked_for_is_502(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await client.read_response()).status == 502


# The end of the plane


async def test_the_last_response_of_a_stopping_plane_says_close(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    proxy.plane.stop()
    app.send(b"rubbish\r\n\r\n")
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (502, "close")
    assert await client.read_rest() == b""


async def test_a_tunnel_that_opens_while_the_plane_stops_is_closed_again(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: Upgrade", "Upgrade: websocket"))
    await app.read_request()
    proxy.plane.stop()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await client.read_message()).status == 101
    assert (await client.read(4))[2:] == (1001).to_bytes(2, "big")
    client.half_close()
    app.half_close()
    await proxy.plane.wait_until_empty()


async def test_a_plane_without_a_log_counts_all_the_same(proxy: PlaneUnderTest) -> None:
    proxy.plane.log = None
    client, app = await proxy.open(GET)
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    assert repr(downstream.exchange) == "<Exchange GET waiting attempts=1>"
    app.answer()
    await client.read_response()
    assert proxy.exchanges == 1
    proxy.forget_counts()
