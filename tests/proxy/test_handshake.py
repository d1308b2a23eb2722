"""What comes before the first request: the TLS handshake, a PROXY protocol header, or both; and TLS from there on."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.config import ListenerTls
from stickyproxy.control.certificates import make_listener_context
from stickyproxy.proxy import side as side_module
from stickyproxy.proxy.listener import Role
from stickyproxy.proxy.settings import Settings, Timeouts
from stickyproxy.proxy.socket_state import count_taken
from tests.helpers.certificates import Authority
from tests.helpers.raw import GET, RawLink, SealedLink, count_queued, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, close_of, ended, frame, the_tunnel

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy.proxy.downstream import Downstream
    from tests.helpers.plane import PlaneUnderTest, Start
    from tests.helpers.raw import Message


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> ssl.SSLContext:
    """Give the context of the listener, made as the program makes it."""
    leaf = authority.issue("localhost")
    return make_listener_context(ListenerTls.model_validate({"certificates": leaf.section}))


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> ssl.SSLContext:
    """Give the context of a client that believes the listener."""
    return authority.client_context()


@pytest.fixture
async def proxy(start: Start, server: ssl.SSLContext) -> PlaneUnderTest:
    """Give a plane with one upstream, whose listener speaks TLS."""
    return await start(role=Role(tls=server))


def handshakes(proxy: PlaneUnderTest) -> dict[str, int]:
    return dict(proxy.plane.counters.handshakes)


async def sealed(proxy: PlaneUnderTest, context: ssl.SSLContext) -> SealedLink:
    return SealedLink(await proxy.client(), context)


def versions(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    context.maximum_version = version
    return context


VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


def only(proxy: PlaneUnderTest) -> Downstream:
    (downstream,) = proxy.plane.downstreams
    return downstream


# The handshake


@VERSIONS
async def test_one_handshake_serves_many_requests(
    proxy: PlaneUnderTest, authority: Authority, version: ssl.TLSVersion
) -> None:
    client = await proxy.client(tls=versions(authority.client_context(), version))
    app = None
    for number in range(3):
        client.send(GET)
        app = app or await proxy.upstream.accept()
        got = await app.read_request()
        assert (got["X-Forwarded-Proto"], got["X-Forwarded-Port"]) == ("https", proxy.listeners[0].port)
        app.answer(b"%d" % number)
        assert (await client.read_response()).body == b"%d" % number
    assert handshakes(proxy) == {"tls_completed": 1}
    assert client.transport.get_extra_info("cipher")[1] == version.name.replace("v1_", "v1.")
    assert only(proxy).is_tls


async def test_the_affinity_cookie_is_secure(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client = await proxy.client(tls=trusting)
    client.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.answer()
    assert "; Secure" in (await client.read_response())["Set-Cookie"]


async def test_a_request_in_one_packet_with_the_end_of_the_handshake(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext
) -> None:
    client = await sealed(proxy, trusting)
    client.link.send(client.hello())
    last = await client.shake()
    assert client.tls.version() == "TLSv1.3"
    client.link.send(last + client.seal(GET + request("GET /next")))
    app = await proxy.upstream.accept()
    for target, body in (("/", b"first"), ("/next", b"second")):
        assert (await app.read_request()).target == target
        app.answer(body)
        await client.read_until(body)


async def test_much_in_one_packet_with_the_end_of_the_handshake(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext
) -> None:
    """More than one read of the TLS layer, which is 256 KiB: the second comes before the task can go on."""
    proxy.listeners[0]._link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
    client = await sealed(proxy, trusting)
    client.link.send(client.hello())
    body = bytes(range(256)) * 8192
    sent = await client.shake() + client.seal(request("POST /", body=body))
    with socket.socket(fileno=socket.dup(client.link.transport.get_extra_info("socket").fileno())) as link:
        written = link.send(sent)  # what the kernel takes, at once
        assert written > 300 * 1024
    client.link.send(sent[written:])
    app = await proxy.upstream.accept()
    assert (await app.read_request()).body == body
    app.answer(b"all")
    await client.read_until(b"all")


@pytest.mark.parametrize("size", [1, 7])
async def test_a_hello_in_pieces(proxy: PlaneUnderTest, trusting: ssl.SSLContext, size: int) -> None:
    client = await sealed(proxy, trusting)
    hello = client.hello()
    await feed(client.link, hello, size)
    await feed(client.link, await client.shake(), size)
    await feed(client.link, client.seal(GET), size)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.answer(b"hello")
    await client.read_until(b"hello")


async def feed(link: RawLink, data: bytes, size: int) -> None:
    """Send bytes in pieces, each in a packet of its own."""
    link.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(0, len(data), size):
        link.send(data[at : at + size])
        await asyncio.sleep(0)


async def test_many_clients_at_once(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    proxy.upstream.on_accept = lambda link: setattr(link, "on_data", lambda link: link.answer(b"hello"))

    async def ask() -> None:
        client = await proxy.client(tls=trusting)
        client.send(GET)
        assert (await client.read_response()).body == b"hello"

    await asyncio.gather(*(ask() for _ in range(150)))
    assert handshakes(proxy) == {"tls_completed": 150}
    assert not proxy.plane.handshakes


async def test_a_client_gone_in_the_handshake(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    for number, end in enumerate((RawLink.reset, RawLink.close), 1):
        client = await sealed(proxy, trusting)
        client.link.send(client.hello())
        await eventually(lambda client=client: client.link.held)  # type: ignore[misc]
        end(client.link)
        await eventually(lambda number=number: handshakes(proxy) == {"tls_failed": number})  # type: ignore[misc]
    assert not proxy.plane.handshakes


async def test_a_client_gone_before_the_handshake_has_begun(proxy: PlaneUnderTest) -> None:
    for end in (RawLink.reset, RawLink.close, RawLink.half_close) * 5:
        end(await proxy.client())
    await eventually(lambda: proxy.plane.counters.connections == 15 and not proxy.plane.handshakes)


async def test_a_client_gone_right_behind_the_handshake(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    for number, ends in enumerate((b"", b"close_notify"), 1):
        client = await sealed(proxy, trusting)
        client.link.send(client.hello())
        client.link.send(await client.shake() + (client.close_notify() if ends else b""))
        client.link.half_close()
        await client.link.read_rest()
        await eventually(lambda number=number: handshakes(proxy) == {"tls_completed": number})  # type: ignore[misc]
        await eventually(lambda: proxy.plane.connections == 0)


@pytest.mark.parametrize(
    "rubbish",
    [
        GET,
        b"\x16\x03\x01\xff\xff" + bytes(100_000),
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        bytes(600_000),
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"\x80\x2e\x01\x00\x02",
    ],
    ids=["http", "long", "short", "zeros", "proxy", "ssl2"],
)
async def test_what_is_no_hello_is_refused(proxy: PlaneUnderTest, rubbish: bytes) -> None:
    client = await proxy.client()
    client.send(rubbish)
    await eventually(lambda: client.is_over)
    assert b"HTTP/" not in client.held
    assert handshakes(proxy) == {"tls_failed": 1}
    assert not proxy.plane.handshakes
    assert proxy.records == []


async def test_a_client_that_does_not_believe_us(proxy: PlaneUnderTest) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await proxy.client(tls=ssl.create_default_context())
    await eventually(lambda: proxy.plane.connections == 0)
    assert proxy.records == []


@pytest.mark.parametrize("sent", ["nothing", "half"])
async def test_a_handshake_that_never_ends_is_cut(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext, sent: str
) -> None:
    proxy = await start(role=Role(tls=server), tls_handshake_s=0.3)
    client = await sealed(proxy, trusting)
    if sent == "half":
        client.link.send(client.hello()[:50])
    await eventually(lambda: len(proxy.plane.handshakes) == 1)
    assert repr(*proxy.plane.handshakes) == "<Handshake TLS>"
    await eventually(lambda: client.link.is_over)
    await eventually(lambda: not proxy.plane.handshakes)
    assert handshakes(proxy) == {"tls_failed": 1}


async def test_a_handshake_in_time_is_not_cut_afterwards(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    proxy = await start(role=Role(tls=server), tls_handshake_s=2.0)
    client = await proxy.client(tls=trusting)
    client.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    until = proxy.plane.now + 2.5
    await eventually(lambda: proxy.plane.now > until)
    app.answer(b"late")
    assert (await client.read_response()).body == b"late"


@pytest.mark.parametrize("turns", range(6))
async def test_a_proxy_that_stops_cuts_handshakes(proxy: PlaneUnderTest, trusting: ssl.SSLContext, turns: int) -> None:
    """In whatever turn of the loop since the connection came."""
    clients = [await sealed(proxy, trusting) for _ in range(3)]
    for client in clients:
        client.link.send(client.hello())
    await eventually(lambda: all(client.link.held for client in clients))
    late = asyncio.get_running_loop().create_task(proxy.client(tls=trusting))
    await eventually(lambda: len(proxy.plane.handshakes) == 4 or late.done(), look_s=0)
    for _ in range(turns):
        await asyncio.sleep(0)
    proxy.plane.stop()
    await eventually(lambda: all(client.link.is_over for client in clients))
    await asyncio.wait((late,))
    if late.exception() is None:
        await late.result().read_rest()
    else:
        assert isinstance(late.exception(), OSError)
    assert not proxy.plane.handshakes
    await proxy.plane.wait_until_empty()
    assert handshakes(proxy)["tls_failed"] >= 3


async def test_handshakes_count_towards_the_limit(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    settings = Settings(connections=2, timeouts=Timeouts(tls_handshake_s=1.0))
    proxy = await start(settings=settings, role=Role(tls=server))
    silent = [await proxy.client() for _ in range(2)]
    await eventually(lambda: not proxy.plane.gate.is_open)
    assert len(proxy.plane.handshakes) == 2
    client = await sealed(proxy, trusting)
    client.link.send(client.hello())  # waits in the queue of the kernel until the silent ones are cut
    client.link.send(await client.shake() + client.seal(GET))
    app = await proxy.upstream.accept()
    await app.read_request()
    assert all(one.is_over for one in silent)
    app.answer(b"hello")
    await client.read_until(b"hello")


# Exchanges over TLS


async def opened(proxy: PlaneUnderTest, context: ssl.SSLContext, data: bytes = GET) -> tuple[SealedLink, RawLink]:
    """Open a connection step by step, send a request, and return the client and the upstream's end."""
    client = await (await sealed(proxy, context)).open()
    client.link.send(client.seal(data))
    return client, await proxy.upstream.accept()


async def test_pipelined_requests_are_answered_in_order(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client = await proxy.client(tls=trusting)
    client.send(b"".join(request(f"GET /{number}") for number in range(5)))
    app = await proxy.upstream.accept()
    for number in range(5):
        assert (await app.read_request()).target == f"/{number}"
        app.answer(b"%d" % number)
        assert (await client.read_response()).body == b"%d" % number


async def test_chunked_bodies_and_100_continue(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client = await proxy.client(tls=trusting)
    client.send(request("POST /", "Transfer-Encoding: chunked", "Expect: 100-continue"))
    app = await proxy.upstream.accept()
    await app.read_message()
    app.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert (await client.read_message()).status == 100
    client.send(b"5\r\nhello\r\n0\r\n\r\n")
    assert await app.read_chunked() == (b"hello", [])
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfoo\r\n")
    assert (await client.read_message()).status == 200
    assert await client.read_chunk() == b"foo"  # before the rest of it has come
    app.send(b"3\r\nbar\r\n0\r\n\r\n")
    assert await client.read_chunked() == (b"bar", [])
    await proxy.recorded()


def in_process(proxy: PlaneUnderTest, client: RawLink) -> int:
    """Return the bytes of a response that the proxy has read and that its kernel has not got from it."""
    downstream = only(proxy)
    assert downstream.exchange is not None
    assert downstream.exchange._response is not None
    with socket.socket(fileno=socket.dup(client.transport.get_extra_info("socket").fileno())) as link:
        arrived = len(link.recv(20_000_000, socket.MSG_PEEK))
    queued = count_queued(downstream.transport)
    return downstream.exchange._response.relayed_bytes - client.received_bytes - arrived - queued


async def test_a_slow_client_gets_all_of_a_large_response(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client = await sealed(proxy, trusting)
    await client.open()
    client.link.send(client.seal(GET))
    app = await proxy.upstream.accept()
    await app.read_request()
    client.link.stop_reading()
    body = bytes(range(256)) * (30 * 4096)
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
    app.send(body)
    await eventually(lambda: only(proxy).is_blocked)
    until = proxy.plane.loop.time() + 0.3
    await eventually(lambda: proxy.plane.loop.time() > until)
    exchange = only(proxy).exchange
    assert exchange is not None
    assert exchange._response is not None
    assert exchange._response.relayed_bytes < len(body), "the upstream is held back"
    assert in_process(proxy, client.link) < 1024 * 1024
    taken = bytearray()
    client.link.read_again()
    while len(taken) < len(body):
        taken += await client.read_some()
        client.link.stop_reading()
        await asyncio.sleep(0)
        client.link.read_again()
    assert taken.endswith(body)
    assert (await proxy.recorded()).sent_bytes == len(body)


async def test_an_upload_waits_for_its_upstream(start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    proxy = await start(role=Role(tls=server))
    proxy.upstream.reads_at_once = False
    client = await proxy.client(tls=trusting)
    body = bytes(range(256)) * 65536
    client.send(request("POST /", body=body))
    app = await proxy.upstream.accept()
    downstream = only(proxy)
    exchange = downstream.exchange
    assert exchange is not None
    await eventually(lambda: exchange._connection is not None and not app.transport.is_reading())
    connection = exchange._connection
    assert connection is not None
    await eventually(lambda: downstream.is_paused and connection.transport.get_write_buffer_size())
    assert connection.transport.get_write_buffer_size() < 1024 * 1024
    app.read_again()
    assert (await app.read_request()).body == body
    app.answer(b"thanks")
    assert (await client.read_response()).body == b"thanks"


# How it ends


async def test_a_client_that_closes_in_its_response_is_gone(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client, app = await opened(proxy, trusting)
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await client.read_until(b"half")
    client.link.send(client.close_notify())
    await app.read_rest()
    assert (await proxy.recorded()).status == 499
    await eventually(lambda: not proxy.plane.downstreams)


async def test_a_client_that_closes_before_its_response_is_gone(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext
) -> None:
    client, app = await opened(proxy, trusting)
    await app.read_request()
    client.link.half_close()
    await app.read_rest()
    assert (await proxy.recorded()).status == 499


async def test_a_client_that_closes_and_takes_nothing_is_counted_once_and_let_go(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    proxy = await start(role=Role(tls=server), send_s=0.3, linger_s=0.3)
    client, app = await opened(proxy, trusting)
    await app.read_request()
    client.link.stop_reading()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n" + bytes(30_000_000))
    downstream = only(proxy)
    await eventually(lambda: downstream.is_blocked)
    client.link.send(client.close_notify())
    assert (await proxy.recorded()).status == 499
    await eventually(lambda: not proxy.plane.downstreams)
    assert len(proxy.records) == 1


@pytest.mark.parametrize("is_cut", [True, False])
async def test_a_response_until_the_end_of_the_connection_ends_with_close_notify_only_if_it_is_whole(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext, *, is_cut: bool
) -> None:
    client, app = await opened(proxy, trusting, request(version="1.0"))
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    await client.read_until(b"hello")
    if is_cut:
        app.reset()
    else:
        app.send(b"0\r\n\r\n")
    assert await client.read_rest() == b""
    assert client.has_close_notify is not is_cut
    assert (await proxy.recorded()).error == ("the upstream broke off its response" if is_cut else "")


async def test_a_response_of_known_length_is_visibly_cut(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client = await proxy.client(tls=trusting)
    client.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    await client.read_until(b"hello")
    app.reset()
    assert await client.read_rest() == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"rubbish\r\n\r\n", 400),
        (request("POST /", "Content-Length: 3000000"), 413),
        (b"GET /" + b"x" * 20000, 414),
        (request("CONNECT a:1", "Content-Length: 3000000"), 405),
    ],
)
async def test_a_client_that_goes_on_sending_can_read_the_answer(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext, sent: bytes, status: int
) -> None:
    proxy = await start(role=Role(tls=server), settings=Settings(body_bytes=1000))
    client = await (await sealed(proxy, trusting)).open()
    client.link.send(client.seal(sent))
    for _ in range(100):
        client.link.send(client.seal(b"x" * 30_000))
    await client.link.flush()
    answer = await client.read_until(b"\r\n\r\n")
    assert int(answer.split()[1]) == status
    await client.read_rest()
    assert client.has_close_notify
    client.link.close()
    await proxy.recorded()


async def test_a_head_that_does_not_come_in_time_is_408(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    proxy = await start(role=Role(tls=server), head_s=0.3)
    client = await (await sealed(proxy, trusting)).open()
    client.link.send(client.seal(GET[:10]))
    assert b" 408 " in await client.read_until(b"\r\n\r\n")
    await client.read_rest()
    assert client.has_close_notify


@pytest.mark.parametrize("how", ["refused", "close", "keep_alive", "silent", "stop", "stop in exchange"])
async def test_a_client_that_never_answers_close_notify_is_let_go(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext, how: str
) -> None:
    limits: dict[str, Any] = {"keep_alive": {"keep_alive_s": 0.3}, "silent": {"head_s": 0.3}}.get(how, {})
    proxy = await start(role=Role(tls=server), linger_s=0.3, **limits)
    sent = {"refused": b"rubbish\r\n\r\n", "close": request("GET /", "Connection: close"), "silent": b""}
    client = await (await sealed(proxy, trusting)).open()
    if asked := sent.get(how, GET):
        client.link.send(client.seal(asked))
    if how not in {"refused", "silent"}:
        app = await proxy.upstream.accept()
        await app.read_request()
        if how == "stop in exchange":
            proxy.plane.stop()
        app.answer(b"hello")
        await client.read_until(b"hello")
    if how == "stop":
        await eventually(lambda: only(proxy).is_idle)
        proxy.plane.stop()
    await client.read_rest()
    assert client.has_close_notify
    await eventually(lambda: not proxy.plane.downstreams)
    await eventually(lambda: client.link.is_over)


async def test_what_a_client_takes_counts_although_the_layers_hold_as_much_as_before(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext
) -> None:
    """Else a client that takes little of it at a time would be cut as one that takes nothing."""
    client, app = await opened(proxy, trusting)
    await app.read_request()
    client.link.stop_reading()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 30000000\r\n\r\n")
    downstream = only(proxy)
    while not downstream.is_blocked:
        if not app.is_write_paused:
            app.send(bytes(65536))
        await asyncio.sleep(0)
    taken = count_taken(downstream.transport)
    client.link.read_again()
    await eventually(lambda: count_taken(downstream.transport) > taken)


# Tunnels over TLS


async def connect(proxy: PlaneUnderTest, context: ssl.SSLContext) -> tuple[RawLink, RawLink]:
    """Open a tunnel over TLS and return both ends."""
    client = await proxy.client(tls=context)
    client.send(HANDSHAKE)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    return client, app


async def test_a_tunnel_relays_both_ways(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client, app = await connect(proxy, trusting)
    for size in (5, 70_000, 3_000_000):
        asked, answered = frame(bytes(size), 2, is_masked=True), frame(b"x" * size, 2)
        client.send(asked)
        assert await app.read(len(asked)) == asked
        app.send(answered)
        assert await client.read(len(answered)) == answered
    client.send(frame(b"\x03\xe8", 8, is_masked=True))
    await app.read(8)
    app.send(frame(b"\x03\xe8", 8))
    assert close_of(await client.read(4)) == (1000, False)
    app.close()
    await client.read_rest()
    assert client.has_eof, "with close_notify"
    assert await ended(proxy) == ("client", 1000, "close_frame")


async def test_the_first_frames_may_come_with_the_101(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client = await proxy.client(tls=trusting)
    client.send(HANDSHAKE + frame(b"early", is_masked=True))
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT + frame(b"first"))
    await client.read_message()
    assert await client.read(7) == frame(b"first")
    assert await app.read(11) == frame(b"early", is_masked=True)


async def test_a_slow_client_holds_its_upstream_back_and_gets_all(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext
) -> None:
    client, app = await connect(proxy, trusting)
    client.stop_reading()
    message = frame(bytes(range(256)) * 512, 2)
    sent = 0
    while not app.is_write_paused:
        app.send(message)
        sent += 1
        await asyncio.sleep(0)
    client.read_again()
    assert await client.read(sent * len(message)) == message * sent


@pytest.mark.parametrize(
    ("end", "code", "cause"),
    [(RawLink.close, 1012, "eof"), (RawLink.half_close, 1012, "eof"), (RawLink.reset, 1014, "reset")],
)
async def test_a_client_is_told_why_its_application_is_gone(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext, end: Callable[[RawLink], None], code: int, cause: str
) -> None:
    client, app = await connect(proxy, trusting)
    app.send(frame(b"last"))
    assert await client.read(6) == frame(b"last")
    end(app)
    assert close_of(await client.read_rest()) == (code, False)
    assert client.has_eof, "with close_notify"
    assert await ended(proxy) == ("upstream", code, cause)


@pytest.mark.parametrize("how", ["close_notify", "half_close", "reset", "both"])
async def test_an_application_sees_that_its_client_is_gone(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext, how: str
) -> None:
    client = await (await sealed(proxy, trusting)).open()
    client.link.send(client.seal(HANDSHAKE))
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    await client.read_until(b"\r\n\r\n")
    last = client.seal(frame(b"last", is_masked=True))
    if how == "reset":
        client.link.send(last)
        assert await app.read(10) == frame(b"last", is_masked=True)
        client.link.reset()
    else:
        client.link.send(last + (client.close_notify() if how != "half_close" else b""))
        if how != "close_notify":
            client.link.half_close()
        assert await app.read(10) == frame(b"last", is_masked=True)
    assert await app.read_rest() == b""
    initiator, code, cause = await ended(proxy)
    assert (initiator, code) == ("client", 1006)
    assert cause == ("reset" if how == "reset" else "eof")


async def test_a_stopping_proxy_says_1001(proxy: PlaneUnderTest, trusting: ssl.SSLContext) -> None:
    client, app = await connect(proxy, trusting)
    the_tunnel(proxy).shut()
    assert close_of(await client.read(4 + len("the proxy is going away"))) == (1001, False)
    client.send(frame(b"\x03\xe9", 8, is_masked=True))
    app.follow()
    await client.read_rest()
    assert client.has_eof
    await eventually(lambda: not proxy.plane.tunnels)


async def test_a_tunnel_whose_client_never_answers_close_notify_is_let_go(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_module, "_FLUSH_S", 0.2)
    proxy = await start(role=Role(tls=server), linger_s=0.2)
    client = await (await sealed(proxy, trusting)).open()
    client.link.send(client.seal(HANDSHAKE))
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    await client.read_until(b"\r\n\r\n")
    app.close()
    assert close_of(await client.read_rest()) == (1012, False)
    assert client.has_close_notify
    await eventually(lambda: client.link.is_over)
    assert await ended(proxy) == ("upstream", 1012, "eof")


# The PROXY protocol

LOOPBACK_TRUSTED = Settings(trusted=(ip_network("127.0.0.0/8"),))
V2_START = b"\r\n\r\n\x00\r\nQUIT\n"
V1 = b"PROXY TCP4 203.0.113.7 198.51.100.1 50000 443\r\n"
V1_V6 = b"PROXY TCP6 2001:db8::7 2001:db8::1 50000 8443\r\n"
V2_ADDRESSES = bytes((203, 0, 113, 7, 198, 51, 100, 1)) + struct.pack("!HH", 50000, 443)
V2 = V2_START + b"\x21\x11" + struct.pack("!H", 12) + V2_ADDRESSES
V2_TLS = V2_START + b"\x21\x11" + struct.pack("!H", 20) + V2_ADDRESSES + b"\x20\x00\x05\x01\x00\x00\x00\x00"
V2_LOCAL = V2_START + b"\x20\x00\x00\x00"
V2_UNIX = V2_START + b"\x21\x31" + struct.pack("!H", 216) + b"/a".ljust(108, b"\0") + b"/b".ljust(108, b"\0")
V2_UNIX_TLS = (
    V2_START
    + b"\x21\x31"
    + struct.pack("!H", 224)
    + b"/a".ljust(108, b"\0")
    + b"/b".ljust(108, b"\0")
    + b"\x20\x00\x05\x01\x00\x00\x00\x00"
)
UNKNOWN = b"PROXY UNKNOWN\r\n"
HEADERS = [
    (V1, "203.0.113.7", "443", "http"),
    (V1_V6, "2001:db8::7", "8443", "http"),
    (V2, "203.0.113.7", "443", "http"),
    (V2_TLS, "203.0.113.7", "443", "https"),
    (V2_LOCAL, "127.0.0.1", "", "http"),
    (V2_UNIX, "127.0.0.1", "", "http"),
    (V2_UNIX_TLS, "127.0.0.1", "", "https"),
    (UNKNOWN, "127.0.0.1", "", "http"),
]
NAMES = ["v1", "v1-v6", "v2", "v2-tls", "v2-local", "v2-unix", "v2-unix-tls", "v1-unknown"]


async def behind(start: Start, tls: ssl.SSLContext | None = None, **timeouts: Any) -> PlaneUnderTest:
    """Start a plane behind a load balancer at 127.0.0.1."""
    return await start(settings=LOOPBACK_TRUSTED, role=Role(tls, proxy_protocol=True), **timeouts)


async def told(proxy: PlaneUnderTest) -> tuple[RawLink, Message]:
    """Return the upstream's end and the request that came to it."""
    app = await proxy.upstream.accept()
    return app, await app.read_request()


@pytest.mark.parametrize("size", [1, 1000], ids=["in pieces", "in one"])
@pytest.mark.parametrize("said", HEADERS, ids=NAMES)
async def test_a_header_says_who_the_client_is(start: Start, said: tuple[bytes, str, str, str], size: int) -> None:
    header, address, port, proto = said
    proxy = await behind(start)
    client = await proxy.client()
    await feed(client, header + GET, size)
    app, got = await told(proxy)
    assert (got["X-Forwarded-For"], got["X-Forwarded-Proto"]) == (address, proto)
    assert got["X-Forwarded-Port"] == (port or proxy.listeners[0].port)
    app.answer(b"hello")
    response = await client.read_response()
    assert response.body == b"hello"
    assert ("Secure" in response["Set-Cookie"]) == (proto == "https")
    assert (await proxy.recorded()).client == address
    client.send(GET)
    assert (await app.read_request())["X-Forwarded-For"] == address
    app.answer()
    await client.read_response()


@pytest.mark.parametrize("size", [1, 100_000], ids=["in pieces", "in one"])
@pytest.mark.parametrize("said", HEADERS, ids=NAMES)
async def test_a_header_stands_before_tls(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext, said: tuple[bytes, str, str, str], size: int
) -> None:
    header, address, port, _ = said
    proxy = await behind(start, server)
    client = await sealed(proxy, trusting)
    await feed(client.link, header + client.hello(), size)
    client.link.send(await client.shake() + client.seal(GET))
    app, got = await told(proxy)
    assert (got["X-Forwarded-For"], got["X-Forwarded-Proto"]) == (address, "https")
    assert got["X-Forwarded-Port"] == (port or proxy.listeners[0].port)
    app.answer(b"hello")
    await client.read_until(b"hello")
    assert (await proxy.recorded()).client == address


async def test_a_header_alone_is_followed_by_a_handshake(
    start: Start, server: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    proxy = await behind(start, server)
    client = await sealed(proxy, trusting)
    client.link.send(V1)
    await eventually(lambda: [repr(one) for one in proxy.plane.handshakes] == ["<Handshake TLS>"])
    await client.open()
    client.link.send(client.seal(GET))
    app, got = await told(proxy)
    assert got["X-Forwarded-For"] == "203.0.113.7"
    app.answer(b"hello")
    await client.read_until(b"hello")


async def test_what_a_client_says_of_itself_is_dropped(start: Start) -> None:
    proxy = await behind(start)
    client = await proxy.client()
    client.send(V1 + request("GET /", "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https"))
    app, got = await told(proxy)
    assert (got["X-Forwarded-For"], got["X-Forwarded-Proto"]) == ("203.0.113.7", "http")
    app.answer()
    await client.read_response()


async def test_a_proxy_that_is_not_trusted_is_refused(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    proxy = await start(role=Role(proxy_protocol=True))
    client = await proxy.client()
    client.send(V1 + GET)
    assert await client.read_rest() == b""
    await eventually(lambda: not proxy.plane.handshakes)
    assert handshakes(proxy) == {"proxy_protocol_refused": 1}
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert line == (
        "PROXY protocol: connection from 127.0.0.1 to 127.0.0.1:0 refused: 127.0.0.1 is none of the trusted proxies"
    )
    assert proxy.upstream.links == []
    assert proxy.records == []


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (GET, "no PROXY protocol header"),
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n" + GET, "an invalid port"),
        (V2_START + b"\x31\x11\x00\x0c" + V2_ADDRESSES + GET, "a version other than 2, or an unknown command"),
        (V2_START + b"\x21\x11\xff\xff", "a header of more than 4096 bytes"),
        (b"\x16\x03\x01\x02\x00", "no PROXY protocol header"),
    ],
)
async def test_a_bad_header_is_refused(
    start: Start, server: ssl.SSLContext, caplog: pytest.LogCaptureFixture, sent: bytes, reason: str
) -> None:
    for tls in (None, server):
        caplog.clear()
        proxy = await behind(start, tls)
        client = await proxy.client()
        client.send(sent)
        assert await client.read_rest() == b""
        await eventually(lambda proxy=proxy: not proxy.plane.handshakes)  # type: ignore[misc]
        assert handshakes(proxy) == {"proxy_protocol_refused": 1}
        (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert line.endswith(f" refused: {reason}")
        assert proxy.records == []


@pytest.mark.parametrize("sent", [b"", V1[:10], V2[:14]])
async def test_a_header_that_never_comes_is_cut(start: Start, sent: bytes) -> None:
    proxy = await behind(start, tls_handshake_s=0.3)
    client = await proxy.client()
    if sent:
        client.send(sent)
    await eventually(lambda: [repr(one) for one in proxy.plane.handshakes] == ["<Handshake PROXY header>"])
    await client.read_rest()
    await eventually(lambda: not proxy.plane.handshakes)


async def test_a_connection_that_ends_before_its_header_is_forgotten(start: Start) -> None:
    proxy = await behind(start)
    for end in (RawLink.close, RawLink.reset, RawLink.half_close):
        client = await proxy.client()
        client.send(V1[:10])
        await eventually(lambda: proxy.plane.handshakes)
        end(client)
        await eventually(lambda: not proxy.plane.handshakes)


async def test_a_proxy_that_stops_cuts_who_has_sent_no_header(start: Start) -> None:
    proxy = await behind(start)
    client = await proxy.client()
    await eventually(lambda: proxy.plane.handshakes)
    proxy.plane.stop()
    await client.read_rest()
    late = await proxy.client()
    await late.read_rest()
    await proxy.plane.wait_until_empty()


async def test_the_addresses_in_headers_are_counted_one_by_one(start: Start) -> None:
    settings = Settings(trusted=(ip_network("127.0.0.0/8"),), connections_per_address=1)
    proxy = await start(settings=settings, role=Role(proxy_protocol=True))
    first, second, third = [await proxy.client() for _ in range(3)]
    first.send(V1 + GET)
    app, _ = await told(proxy)
    second.send(V1 + GET)
    assert (await second.read_response()).status == 503
    third.send(V1_V6 + GET)
    other, _ = await told(proxy)
    for client, link in ((first, app), (third, other)):
        link.answer(b"hello")
        assert (await client.read_response()).body == b"hello"
