"""A client's connection: heads as they come, one exchange after the other, and its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from stickyproxy.proxy.listener import Role
from stickyproxy.proxy.settings import Settings
from stickyproxy.tasks import spawn
from stickyproxy.wire.head import MAX_PIECES
from tests.helpers.raw import GET, eventually, request
from tests.helpers.tunnels import HANDSHAKE

if TYPE_CHECKING:
    from tests.helpers.plane import PlaneUnderTest, Start


# Heads


async def test_a_head_may_come_octet_by_octet(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    for octet in GET:
        client.send(bytes([octet]))
        await asyncio.sleep(0)
    app = await proxy.upstream.accept()
    assert (await app.read_request()).target == "/"
    app.answer(b"hello")
    assert (await client.read_response()).body == b"hello"


@pytest.mark.parametrize("before", [b"\r\n", b"\r\n\r\n"])
@pytest.mark.parametrize("is_apart", [False, True])
async def test_empty_lines_before_a_request_are_skipped(
    proxy: PlaneUnderTest, before: bytes, *, is_apart: bool
) -> None:
    client = await proxy.client()
    if is_apart:
        client.send(before)
        await eventually(lambda: proxy.plane.downstreams)
        (downstream,) = proxy.plane.downstreams
        for _ in range(100):
            await asyncio.sleep(0)
        client.send(GET[:5])
        await eventually(lambda: downstream._held is not None and downstream._held.endswith(GET[:5]))
        client.send(GET[5:])
    else:
        client.send(before + GET)
    app = await proxy.upstream.accept()
    assert (await app.read_request()).start == "GET / HTTP/1.1"
    app.answer()
    assert (await client.read_response()).status == 200


@pytest.mark.parametrize(
    ("sent", "status", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "http_request_error"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "http_request_error"),
        (b"GET / HTTP/1.1\nHost: a", 400, "http_request_error"),
        (b"\n", 400, "http_request_error"),
        (b"GET\x00", 400, "http_request_error"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "http_request_error"),
        (request("GET /", "Content-Length: 3", "Transfer-Encoding: chunked"), 400, "http_request_error"),
        (request("GET /" + "a" * 20_000), 414, "http_request_error"),
        (b"GET /" + b"a" * 20_000, 414, "http_request_error"),
        (request("GET /", *(f"X-{number}: 1" for number in range(300))), 431, "http_request_error"),
        (request("GET /", "X: " + "a" * 70_000), 431, "http_request_error"),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 40_000, 431, "http_request_error"),
        (request("POST /", "Transfer-Encoding: gzip, chunked"), 501, "http_request_error"),
        (request(version="2.0"), 505, "http_request_error"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", 405, "http_request_denied"),
    ],
)
async def test_what_is_no_request_is_answered_and_the_connection_closed(
    proxy: PlaneUnderTest, sent: bytes, status: int, error: str
) -> None:
    client = await proxy.client()
    client.send(sent)
    response = await client.read_response()
    assert response.status == status
    assert response["Connection"] == "close"
    assert f"error={error}" in response["Proxy-Status"]
    assert response["X-Request-ID"] in response.body.decode()
    assert ("Allow" in response) == (status == 405)
    assert await client.read_rest() == b""
    assert client.ending == "eof"
    record = await proxy.recorded()
    assert (record.status, record.request_id, record.client) == (status, response["X-Request-ID"], "127.0.0.1")
    assert proxy.upstream.links == []
    client.close()
    await eventually(lambda: not proxy.plane.downstreams)


async def test_rubbish_after_a_good_request_is_refused_after_its_answer(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET + b"rubbish\r\n\r\n" + GET)
    await app.read_request()
    app.answer(b"good")
    assert (await client.read_response()).body == b"good"
    assert (await client.read_response()).status == 400
    assert await client.read_rest() == b""
    assert app.held == b""


async def test_a_plane_without_a_log_refuses_too(proxy: PlaneUnderTest) -> None:
    proxy.plane.log = None
    client = await proxy.client()
    client.send(b"\n")
    assert (await client.read_response()).status == 400
    proxy.forget_counts()


# Time


async def test_a_head_that_does_not_come_whole_in_time_is_408(start: Start) -> None:
    proxy = await start(head_s=0.3)
    client = await proxy.client()
    client.send(GET[:-2])
    response = await client.read_response()
    assert response.status == 408
    assert (await proxy.recorded()).error == "the request head did not arrive in time"


async def test_octets_that_trickle_in_do_not_renew_the_time_for_a_head(start: Start) -> None:
    proxy = await start(head_s=0.3)
    client = await proxy.client()
    client.send(b"GET / HTTP/1.1\r\n")
    while not client.held:
        client.send(b"A: b\r\n")
        await asyncio.sleep(0.02)
    assert (await client.read_response()).status == 408


async def test_a_client_that_sends_nothing_is_closed_without_a_word(start: Start) -> None:
    proxy = await start(head_s=0.2)
    client = await proxy.client()
    assert await client.read_rest() == b""
    assert client.ending == "eof"
    assert proxy.records == []


async def test_a_kept_connection_is_closed_after_the_keep_alive_timeout(start: Start) -> None:
    proxy = await start(keep_alive_s=0.2)
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    assert (await client.read_response()).all("connection") == []
    assert await client.read_rest() == b""
    assert len(proxy.records) == 1


# Pipelines


async def test_pipelined_requests_are_answered_in_order(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(b"".join(request(f"GET /{number}") for number in range(20)))
    for number in range(20):
        assert (await app.read_request()).target == f"/{number}"
        assert app.held == b"", "one at a time"
        app.answer(str(number).encode())
    assert [(await client.read_response()).body for _ in range(20)] == [str(number).encode() for number in range(20)]
    assert len(proxy.upstream.links) == 1


async def test_a_body_is_followed_by_the_next_request(proxy: PlaneUnderTest) -> None:
    chunked = request("PUT /2", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n"
    client, app = await proxy.open(request("POST /1", body=b"one") + chunked + request("GET /3"))
    first = await app.read_request()
    assert (first.target, first.body) == ("/1", b"one")
    app.answer(b"1")
    second = await app.read_request()
    assert (second.target, second.body) == ("/2", b"abc")
    app.answer(b"2")
    assert (await app.read_request()).target == "/3"
    app.answer(b"3")
    assert [(await client.read_response()).body for _ in range(3)] == [b"1", b"2", b"3"]


async def test_a_long_pipeline_is_not_read_on(start: Start) -> None:
    proxy = await start(settings=Settings(buffer_bytes=10_000))
    piece = request("GET /next", "X: " + "a" * 900)
    client, app = await proxy.open(GET + piece * 400)
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_paused)
    app.answer(b"first")
    for _ in range(400):
        await app.read_request()
        app.answer(b"next")
    assert (await client.read_response()).body == b"first"
    for _ in range(400):
        assert (await client.read_response()).body == b"next"


async def test_a_request_that_comes_while_a_held_one_is_due_waits_for_its_turn(proxy: PlaneUnderTest) -> None:
    for _ in range(20):
        client = await proxy.client()
        client.send(request("GET /a") + request("GET /b") + request("GET /c"))
        await eventually(lambda: proxy.upstream.links and proxy.upstream.links[-1].held)
        app = proxy.upstream.links[-1]
        await app.read_request()
        # Both arrive in the same turn of the loop: the answer, and the next request.
        app.answer(b"/a")
        client.send(request("GET /d"))
        for target in ("/b", "/c", "/d"):
            assert (await app.read_request()).target == target
            app.answer(target.encode())
        assert [(await client.read_response()).body for _ in range(4)] == [b"/a", b"/b", b"/c", b"/d"]
        client.close()


async def test_an_end_of_file_while_a_held_request_is_due_does_not_lose_it(proxy: PlaneUnderTest) -> None:
    for _ in range(20):
        client = await proxy.client()
        client.send(request("GET /a") + request("GET /b"))
        await eventually(lambda: proxy.upstream.links and proxy.upstream.links[-1].held)
        app = proxy.upstream.links[-1]
        await app.read_request()
        app.answer(b"/a")
        client.half_close_at_once()
        assert (await app.read_request()).target == "/b"
        app.answer(b"/b")
        assert [(await client.read_response()).body for _ in range(2)] == [b"/a", b"/b"]
        assert await client.read_rest() == b""


async def test_a_client_that_pipelines_and_does_not_read_is_not_served_on(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    client.stop_reading()
    body = b"x" * 200_000
    client.send(request("GET /big") * 500)
    app = await proxy.upstream.accept()
    served = 0

    async def serve() -> None:
        nonlocal served
        while True:
            await app.read_request()
            served += 1
            app.answer(body)
            await app.flush()

    server = spawn(serve(), "serve")
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_blocked)
    # The kernel takes some; what the proxy itself holds stays below a few reads, though hundreds were asked for.
    for _ in range(100):
        assert downstream.transport.get_write_buffer_size() < 1_000_000
        await asyncio.sleep(0.002)
    assert served < 500
    client.read_again()
    for _ in range(500):
        assert len((await client.read_response()).body) == 200_000
    server.cancel()


async def test_a_request_that_comes_before_the_last_response_was_taken_waits(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    app.answer(b"x" * 30_000_000)
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_blocked)
    client.send(request("GET /next"))
    client.read_again()
    assert len((await client.read_response()).body) == 30_000_000
    assert (await app.read_request()).target == "/next"
    app.answer(b"next")
    assert (await client.read_response()).body == b"next"


# Ends


async def test_a_client_that_has_half_closed_gets_its_response(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    client.half_close()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.has_eof)
    app.answer(b"still")
    assert (await client.read_response()).body == b"still"
    assert await client.read_rest() == b""
    assert client.ending == "eof"


async def test_half_closed_pipeline_is_answered_to_its_end(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET + GET + GET[:10])
    client.half_close()
    for _ in range(2):
        await app.read_request()
        app.answer()
        assert (await client.read_response()).status == 200
    assert await client.read_rest() == b""


async def test_an_idle_client_that_closes_is_forgotten(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    await eventually(lambda: proxy.plane.downstreams)
    (downstream,) = proxy.plane.downstreams
    assert repr(downstream) == "<Downstream idle>"
    client.half_close()
    await eventually(lambda: not proxy.plane.downstreams)


async def test_an_incomplete_head_at_the_end_of_file_is_no_request(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    client.send(GET[:10])
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: repr(downstream) == "<Downstream head>")
    client.half_close()
    assert await client.read_rest() == b""
    assert proxy.records == []


async def test_an_incomplete_body_at_the_end_of_file_is_an_aborted_upload(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", "Content-Length: 100") + b"part")
    client.half_close()
    assert (await app.read_message())["Content-Length"] == "100"
    assert await app.read_rest() == b"part"
    assert (await proxy.recorded()).status == 499
    assert await client.read_rest() == b""


async def test_a_client_that_resets_in_an_exchange_is_a_499(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    client.reset()
    await app.read_rest()
    record = await proxy.recorded()
    assert (record.status, record.error) == (499, "the client went away")
    assert proxy.pool().counters.attempts == {"client_gone": 1}


async def test_connection_close_is_honoured(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: close"))
    assert (await app.read_request()).all("connection") == []
    app.answer(b"last")
    response = await client.read_response()
    assert (response["Connection"], response.body) == ("close", b"last")
    assert await client.read_rest() == b""
    assert client.ending == "eof"
    assert len(proxy.pool().idle) == 1, "the upstream's connection is kept all the same"


async def test_what_follows_connection_close_is_no_request(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: close") + GET)
    await app.read_request()
    app.answer(b"last")
    assert (await client.read_response()).body == b"last"
    assert await client.read_rest() == b""
    assert app.held == b""


async def test_a_stopping_plane_closes_idle_clients_and_lets_exchanges_end(proxy: PlaneUnderTest) -> None:
    idle = await proxy.client()
    client, app = await proxy.open(GET + request("GET /next"))
    await app.read_request()
    proxy.plane.stop()
    assert await idle.read_rest() == b""
    app.answer(b"whole")
    response = await client.read_response()
    assert (response["Connection"], response.body) == ("close", b"whole")
    assert await client.read_rest() == b""
    late = await proxy.client()
    assert await late.read_rest() == b""
    client.close()
    await proxy.plane.wait_until_empty()


# What passes through


async def test_a_body_comes_in_pieces(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", "Content-Length: 6"))
    await app.read_message()
    for piece in (b"ab", b"cd", b"ef"):
        client.send(piece)
        assert await app.read(2) == piece
    app.answer()
    assert (await client.read_response()).status == 200


async def test_a_timeout_in_an_exchange_is_the_exchanges(start: Start) -> None:
    proxy = await start(response_s=0.2)
    client, app = await proxy.open(GET)
    await app.read_request()
    assert (await client.read_response()).status == 504


async def test_a_half_closed_client_that_sent_rubbish_is_answered_and_closed(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET + b"rubbish\r\n\r\n")
    client.half_close()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.has_eof)
    app.answer()
    assert (await client.read_response()).status == 200
    assert (await client.read_response()).status == 400
    assert await client.read_rest() == b""


async def test_a_tunnel_takes_the_connection_over(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: Upgrade", "Upgrade: websocket") + b"early")
    await app.read_request()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await client.read_message()).status == 101
    assert await app.read(5) == b"early"
    assert not proxy.plane.downstreams


async def test_a_head_in_too_many_pieces_is_refused(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    client.send(b"GET / HTTP/1.1\r\nX: ")
    await eventually(lambda: [one for one in proxy.plane.downstreams if one._held])
    (downstream,) = proxy.plane.downstreams
    while downstream._pieces < MAX_PIECES:
        before = downstream._pieces
        client.send(b"x")
        await eventually(lambda before=before: downstream._pieces > before, look_s=0)  # type: ignore[misc]
    assert not client.held
    client.send(b"x")
    response = await client.read_response()
    assert response.status == 400
    assert "too many pieces" in response["Proxy-Status"]


async def test_the_pieces_are_those_of_one_head(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    app = None
    for number in range(3):
        client.send(b"GET / HTTP/1.1\r\n")
        await eventually(lambda: [one for one in proxy.plane.downstreams if one._held])
        (downstream,) = proxy.plane.downstreams
        assert downstream._pieces == 0
        downstream._pieces = MAX_PIECES - 1
        client.send(b"Host: a\r\n\r\n")
        app = app or await proxy.upstream.accept()
        await app.read_request()
        app.answer(b"%d" % number)
        assert (await client.read_response()).body == b"%d" % number


async def test_the_head_of_a_websocket_handshake_has_a_limit_of_its_own(start: Start) -> None:
    proxy = await start(settings=Settings(handshake_bytes=400))
    client = await proxy.client()
    client.send(HANDSHAKE.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 400 + b"\r\n\r\n"))
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (431, "close")
    other, app = await proxy.open(request("GET /", "X: " + "x" * 400))
    await app.read_request()
    app.answer()
    assert (await other.read_response()).status == 200


# Redirects to https


async def redirecting(start: Start, port: int = 443) -> PlaneUnderTest:
    return await start(role=Role(redirect_to_https=port))


async def test_a_redirect_is_recorded_and_counted_once_and_reaches_no_upstream(start: Start) -> None:
    proxy = await redirecting(start, 8443)
    client = await proxy.client()
    for number in range(1, 4):
        client.send(request("GET /a?b"))
        response = await client.read_response()
        assert (response.status, response["Location"]) == (308, "https://example.org:8443/a?b")
        assert "Connection" not in response
        record = await proxy.recorded(number)
        assert (record.status, record.method, record.target, record.host) == (308, b"GET", b"/a?b", b"example.org")
        assert record.request_id == response["X-Request-ID"]
        assert proxy.exchanges == number
    assert proxy.upstream.links == []


@pytest.mark.parametrize("line", ["HEAD /", "OPTIONS *", "GET /", "DELETE /x"])
async def test_pipelined_requests_are_redirected_in_order(start: Start, line: str) -> None:
    proxy = await redirecting(start)
    client = await proxy.client()
    client.send(request(line) * 3 + request("GET /last", "Connection: close") + GET)
    target = line.split()[1].replace("*", "/")
    for _ in range(3):
        response = await client.read_message()
        assert (response["Location"], response["Content-Length"]) == (f"https://example.org{target}", "0")
    response = await client.read_message()
    assert (response["Location"], response["Connection"]) == ("https://example.org/last", "close")
    assert await client.read_rest() == b""
    await proxy.recorded(4)


async def test_a_body_that_is_redirected_is_not_awaited(start: Start) -> None:
    proxy = await redirecting(start)
    client = await proxy.client()
    client.send(request("POST /x", "Content-Length: 3000000", "Expect: 100-continue"))
    response = await client.read_message()
    assert (response.status, response["Connection"]) == (308, "close")
    client.send(bytes(3_000_000))
    assert await client.read_rest() == b""
    assert client.ending == "eof"
    await proxy.recorded()


async def test_a_large_body_that_came_already_does_not_hide_the_redirect(start: Start) -> None:
    proxy = await redirecting(start)
    client = await proxy.client()
    client.send(request("POST /x", body=bytes(3_000_000)))
    assert (await client.read_response()).status == 308
    assert await client.read_rest() == b""
    assert client.ending == "eof"


async def test_a_request_without_a_host_cannot_be_redirected(start: Start) -> None:
    proxy = await redirecting(start)
    client = await proxy.client()
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert (await client.read_response()).status == 400
    assert (await proxy.recorded()).error == "the request names no host to be redirected to"
    client = await proxy.client()
    client.send(request(version="1.0"))
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (308, "close")
    await proxy.recorded(2)


async def test_a_websocket_is_redirected_too(start: Start) -> None:
    proxy = await redirecting(start)
    client = await proxy.client()
    client.send(request("GET /ws", "Connection: Upgrade", "Upgrade: websocket"))
    assert (await client.read_response())["Location"] == "https://example.org/ws"


async def test_a_plane_without_a_log_redirects_too(start: Start) -> None:
    proxy = await redirecting(start)
    log, proxy.plane.log = proxy.plane.log, None
    client = await proxy.client()
    client.send(GET)
    assert (await client.read_response()).status == 308
    proxy.plane.log = log
    assert proxy.exchanges == 1
    proxy.forget_counts()


async def test_a_stopping_plane_redirects_and_closes(start: Start) -> None:
    proxy = await redirecting(start)
    client = await proxy.client()
    client.send(GET)
    await client.read_response()
    proxy.plane.is_stopping = True
    client.send(GET)
    response = await client.read_response()
    assert (response.status, response["Connection"]) == (308, "close")
    await client.read_rest()
