"""What comes before the first request: the TLS handshake, a PROXY protocol header, or both; and TLS from there on."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import ListenerTls
from stickyproxy.control.certificates import make_listener_context
from stickyproxy.proxy.listener import Role
from tests.helpers.certificates import Authority
from tests.helpers.raw import GET, RawLink, SealedLink, eventually, request

if TYPE_CHECKING:
    from stickyproxy.proxy.downstream import Downstream
    from tests.helpers.plane import PlaneUnderTest, Start


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> ssl.SSLContext:
    """The context of the listener, made as the program makes it."""
    leaf = authority.issue("localhost")
    return make_listener_context(ListenerTls.model_validate({"certificates": leaf.section}))


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> ssl.SSLContext:
    """The context of a client that believes the listener."""
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
    client = await sealed(proxy, trusting)
    client.link.send(client.hello())
    body = bytes(range(256)) * 8192
    sent = await client.shake() + client.seal(request("POST /", body=body))
    with socket.socket(fileno=socket.dup(client.link.transport.get_extra_info("socket").fileno())) as link:
        written = link.send(sent)  # what the kernel takes, at once
        assert written > 3 * 256 * 1024
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
async def test_a_proxy_that_stops_cuts_handshakes(
    proxy: PlaneUnderTest, trusting: ssl.SSLContext, turns: int
) -> None:
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
