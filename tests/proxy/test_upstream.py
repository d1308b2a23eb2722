"""A connection to an upstream: response heads in any cut, and nothing taken for what it is not."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import UpstreamTls
from stickyproxy.control.certificates import make_upstream_context
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.proxy.settings import Settings
from stickyproxy.wire.head import MAX_PIECES, HeadLimits
from tests.helpers.certificates import Authority
from tests.helpers.plane import LOOPBACK
from tests.helpers.raw import GET, RawUpstream, count_unsent, eventually, request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.plane import PlaneUnderTest, Start


async def test_a_response_may_come_octet_by_octet(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    for octet in b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello":
        app.send(bytes([octet]))
        await asyncio.sleep(0)
    assert (await client.read_message())["A"] == "b"
    assert (await client.read_response()).body == b"hello"
    assert len(proxy.pool().idle) == 1


@pytest.mark.parametrize("start_line", [b"HTTP/1.1 2x0 OK", b"HTTP/2 200 OK", b"HTTP/1.1 200\tOK", b"HTTQ"])
async def test_what_cannot_become_a_status_line_is_refused_at_once(proxy: PlaneUnderTest, start_line: bytes) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(start_line + (b"\r\n\r\n" if start_line != b"HTTQ" else b""))
    assert (await client.read_response()).status == 502
    assert await app.read_rest() == b""


async def test_a_head_that_never_ends_is_refused(start: Start) -> None:
    proxy = await start(settings=Settings(head=HeadLimits(head_bytes=2000)))
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\n")
    for _ in range(300):
        app.send(b"X: yyyy\r\n")
    response = await client.read_response()
    assert response.status == 502
    assert "error=http_response_header_section_size" in response["Proxy-Status"]


@pytest.mark.parametrize("extra", [b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
async def test_bytes_after_a_response_reach_nobody(
    proxy: PlaneUnderTest, answer: bytes, extra: bytes, *, is_late: bool
) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    if is_late:
        app.send(answer)
        await client.read_response()
        assert len(proxy.pool().idle) == 1
        app.send(extra)
    else:
        app.send(answer + extra)
        await client.read_response()
    assert await app.read_rest() == b""
    assert proxy.pool().idle == []
    client.send(request("GET /next"))
    other = await proxy.upstream.accept()
    assert (await other.read_request()).target == "/next"
    other.answer(b"good")
    assert (await client.read_response()).body == b"good"


async def test_an_idle_connection_that_ends_is_forgotten(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    await client.read_response()
    (connection,) = proxy.pool().idle
    assert repr(connection) == "<UpstreamConnection app-1 idle>"
    app.close()
    await eventually(lambda: not proxy.pool().idle)
    assert connection.is_closing


async def test_the_state_can_be_read(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    await client.read_response()
    (connection,) = proxy.pool().idle
    client.send(GET)
    await app.read_request()
    assert repr(connection) == "<UpstreamConnection app-1 reads head reused>"
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
    await client.read_until(b"o")
    await client.read_until(b"\r\n\r\no")
    assert repr(connection) == "<UpstreamConnection app-1 reads body reused>"
    app.send(b"k")


async def test_backpressure_of_an_upload_begins_and_ends(start: Start, tmp_path: Path) -> None:
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start(path=str(tmp_path / "app.sock"))
    proxy = await start([upstream], settings=Settings(buffer_bytes=5000))
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 30000000") + b"x" * 30_000_000)
    app = await upstream.accept()
    app.keeps = False
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_paused)
    app.read_again()
    await eventually(lambda: app.received_bytes > 30_000_000)
    assert not downstream.is_paused
    app.answer()
    assert (await client.read_response()).status == 200


async def test_an_upstream_that_ends_while_it_is_written_to_is_let_go(start: Start) -> None:
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


async def test_a_response_head_in_too_many_pieces_is_502(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    assert downstream.exchange is not None
    connection = downstream.exchange._connection
    assert connection is not None
    app.send(b"HTTP/1.1 200 OK\r\nX: ")
    await eventually(lambda: connection._pieces == 1)
    while connection._pieces < MAX_PIECES:
        before = connection._pieces
        app.send(b"x")
        await eventually(lambda before=before: connection._pieces > before, look_s=0)  # type: ignore[misc]
    assert not client.held
    app.send(b"x")
    assert (await client.read_response()).status == 502
    assert await app.read_rest() == b""


# Over TLS


async def encrypted(start: Start, folder: Path) -> PlaneUnderTest:
    """Start a plane with one upstream that is reached over TLS."""
    leaf = Authority(folder).issue("app.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.certificate, leaf.key)
    proxy = await start([await RawUpstream("app-1").start(tls=context)])
    tls = make_upstream_context(UpstreamTls(ca=leaf.authority.file))
    proxy.endpoint = Endpoint(LOOPBACK, tls=tls, server_name="app.example")
    proxy.publish()
    return proxy


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_body_until_the_end_of_the_connection_ends_with_close_notify_or_is_cut(
    start: Start, tmp_path: Path, version: str, *, is_whole: bool
) -> None:
    proxy = await encrypted(start, tmp_path)
    client, app = await proxy.open(request(version=version))
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
    await client.read_message()
    await eventually(lambda: b"hello" in client.held)
    if is_whole:
        app.close()  # with close_notify
    else:
        app.half_close_at_once()  # an end of file that anybody between could have made
    if version == "1.0":
        assert await client.read_rest() == b"hello"
        assert client.ending == ("eof" if is_whole else "reset")
    elif is_whole:
        assert await client.read_chunked() == (b"hello", [])
    else:
        assert await client.read_rest() == b"5\r\nhello\r\n"
    assert (await proxy.recorded()).error == ("" if is_whole else "the upstream broke off its response")


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_an_upstream_that_closes_behind_its_response_loses_nothing_of_it_for_a_slow_client(
    start: Start, tmp_path: Path, *, is_chunked: bool
) -> None:
    proxy = await encrypted(start, tmp_path)
    client, app = await proxy.open(request("GET /", "Connection: close"))
    await app.read_request()
    client.stop_reading()
    loop, piece = proxy.plane.loop, bytes(range(256)) * 40
    framed = b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece
    app.send(b"HTTP/1.1 200 OK\r\n%b\r\n" % (b"Transfer-Encoding: chunked\r\n" if is_chunked else b""))
    (downstream,) = proxy.plane.downstreams
    count, quiet_since = 0, loop.time()
    while loop.time() < quiet_since + 0.3:  # until the client's kernel takes nothing more
        if downstream.is_blocked:
            await asyncio.sleep(0.01)
            continue
        app.send(framed)
        count += 1
        await eventually(lambda: count_unsent(app.transport) == 0)
        quiet_since = loop.time()
    app.send(framed + (b"0\r\n\r\n" if is_chunked else b""))  # fits into the buffers, but the client takes nothing
    app.close()  # says close_notify, and many programs do not wait for an answer to it
    await eventually(lambda: count_unsent(app.transport) == 0)
    if not app.is_lost:
        app.half_close_at_once()
    await eventually(lambda: loop.time() > quiet_since + 0.8)
    client.read_again()
    await client.read_message()
    assert b"".join(unchunked(await client.read_rest())) == piece * (count + 1)


def unchunked(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a body; the last one must be there."""
    while True:
        size, _, data = data.partition(b"\r\n")
        if not int(size, 16):
            return
        yield data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
