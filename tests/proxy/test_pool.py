"""The pool: which connection is used again, and which never."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.config import Address, UpstreamTls
from stickyproxy.control.certificates import make_upstream_context
from stickyproxy.observe.counters import UpstreamCounters
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.proxy.pool import Pool
from stickyproxy.proxy.settings import Settings
from tests.helpers.certificates import Authority
from tests.helpers.plane import LOOPBACK
from tests.helpers.raw import GET, RawUpstream, eventually, request
from tests.helpers.tunnels import close_of, connect, ended, frame

if TYPE_CHECKING:
    from pathlib import Path

    from stickyproxy.proxy.upstream import UpstreamConnection
    from tests.helpers.plane import PlaneUnderTest, Start
    from tests.helpers.raw import RawLink


async def keep(proxy: PlaneUnderTest, count: int) -> list[RawLink]:
    """Make so many connections idle in the pool and return the upstream's ends of them."""
    clients = [await proxy.client() for _ in range(count)]
    links = []
    for client in clients:
        client.send(GET)
    for _ in clients:
        link = await proxy.upstream.accept()
        await link.read_request()
        links.append(link)
    for link in links:
        link.answer()
    for client in clients:
        await client.read_response()
    return links


async def test_the_connection_used_last_is_used_first(proxy: PlaneUnderTest) -> None:
    await keep(proxy, 3)
    pool = proxy.pool()
    assert repr(pool) == "<Pool app-1 idle=3>"
    last = pool.idle[-1]
    assert not last.is_reused
    taken = pool.take(is_idempotent=False)
    assert taken is last
    assert taken.is_reused
    taken.release(reusable=True)
    assert pool.idle[-1] is last


async def test_a_connection_idle_too_long_is_closed_instead(proxy: PlaneUnderTest) -> None:
    await keep(proxy, 2)
    pool = proxy.pool()
    for connection in pool.idle:
        connection.idle_since -= 10
    assert pool.take(is_idempotent=True) is None
    assert pool.idle == []
    for link in proxy.upstream.links:
        await link.read_rest()


async def test_a_request_that_may_not_be_repeated_gets_a_fresh_one_or_a_new_one(proxy: PlaneUnderTest) -> None:
    await keep(proxy, 1)
    pool = proxy.pool()
    (connection,) = pool.idle
    connection.idle_since -= 2
    assert pool.take(is_idempotent=False) is None
    assert pool.take(is_idempotent=True) is connection
    connection.release(reusable=True)


async def test_a_post_does_not_meet_an_old_connection(proxy: PlaneUnderTest) -> None:
    (link,) = await keep(proxy, 1)
    (connection,) = proxy.pool().idle
    connection.idle_since -= 2
    client, app = await proxy.open(request("POST /", body=b"x"))
    assert app is not link
    await app.read_request()
    app.answer()
    assert (await client.read_response()).status == 200


async def test_idle_connections_are_closed_in_time_the_oldest_first(start: Start) -> None:
    proxy = await start(upstream_keep_alive_s=0.3)
    links = await keep(proxy, 2)
    pool = proxy.pool()
    connections = list(pool.idle)
    connections[1].idle_since += 1000
    await eventually(lambda: len(pool.idle) == 1)
    assert pool.idle == [connections[1]]
    await eventually(lambda: any(link.is_over for link in links))


async def test_no_more_are_kept_than_allowed(start: Start) -> None:
    proxy = await start(settings=Settings(idle_connections=2))
    links = await keep(proxy, 5)
    assert len(proxy.pool().idle) == 2
    await eventually(lambda: sum(link.is_over for link in links) == 3)


async def test_a_closed_pool_keeps_none(proxy: PlaneUnderTest) -> None:
    links = await keep(proxy, 2)
    pool = proxy.pool()
    busy = pool.take(is_idempotent=True)
    assert busy is not None
    pool.close()
    assert pool.idle == []
    busy.release(reusable=True)
    assert pool.idle == []
    pool.forget(busy)
    await eventually(lambda: all(link.is_over for link in links))


async def test_one_that_is_closing_is_not_given_out(proxy: PlaneUnderTest) -> None:
    await keep(proxy, 2)
    pool = proxy.pool()
    first, second = pool.idle
    second.transport.abort()
    assert pool.take(is_idempotent=True) is first
    first.transport.abort()
    first.release(reusable=True)
    assert pool.idle == []


async def test_a_unix_socket_serves_as_well(start: Start, tmp_path: Path) -> None:
    upstream = await RawUpstream("app-1").start(path=str(tmp_path / "app.sock"))
    proxy = await start([upstream])
    client, app = await proxy.open(b"GET / HTTP/1.0\r\n\r\n")
    assert (await app.read_request())["Host"] == "localhost"
    app.answer(b"hello")
    assert (await client.read_response()).body == b"hello"
    await upstream.stop()
    proxy.pool().close()
    (tmp_path / "app.sock").unlink(missing_ok=True)
    client = await proxy.client()
    client.send(GET)
    assert (await client.read_response()).status == 503


async def test_ipv6_serves_as_well(start: Start) -> None:
    upstream = await RawUpstream("app-1").start(host="::1")
    proxy = await start([upstream])
    client, app = await proxy.open(b"GET / HTTP/1.0\r\n\r\n")
    assert (await app.read_request())["Host"] == f"[::1]:{upstream.port}"
    app.answer()
    assert (await client.read_response()).status == 200


async def test_a_connect_that_takes_too_long_is_504_for_a_pinned_client_and_moves_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    dial = Pool.dial

    async def never(pool: Pool) -> UpstreamConnection:
        if pool.upstream_id == first.id:
            raise TimeoutError
        return await dial(pool)

    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.links for one in proxy.upstreams))
    first, second = sorted(proxy.upstreams, key=lambda one: not one.links)
    app = await first.accept()
    await app.read_request()
    app.answer(b"", "Connection: close").half_close()
    cookie = (await client.read_response()).cookie
    monkeypatch.setattr(Pool, "dial", never)
    client.send(request("GET /pinned", f"Cookie: {cookie}"))
    response = await client.read_response()
    assert response.status == 504
    assert "error=connection_timeout" in response["Proxy-Status"]
    assert not proxy.plane.counters.breaks
    assert proxy.reports == []
    for _ in range(2):
        fresh = await proxy.client()
        fresh.send(GET)
        await eventually(lambda: any(link.held for link in second.links))
        link = next(link for link in second.links if link.held)
        await link.read_request()
        link.answer()
        assert (await fresh.read_response()).status == 200
    assert proxy.pool(first).counters.attempts["timeout"] >= 1


async def test_an_upstream_that_cannot_be_reached_is_left(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    dial = Pool.dial

    async def unreachable(pool: Pool) -> UpstreamConnection:
        if pool.upstream_id == first.id:
            raise OSError(113, "No route to host")
        return await dial(pool)

    monkeypatch.setattr(Pool, "dial", unreachable)
    for _ in range(2):
        client = await proxy.client()
        client.send(GET)
        await eventually(lambda: any(link.held for link in second.links))
        link = next(link for link in second.links if link.held)
        await link.read_request()
        link.answer()
        assert (await client.read_response()).status == 200
    assert proxy.pool(first).counters.attempts["error"] >= 1
    assert proxy.reports == [], "only a refusal says that a process is gone"


async def test_the_connect_timeout_ends_a_dial(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start(connect_s=0.0)
    pool = Pool(
        proxy.plane, "far", b"12345678", Endpoint(Address("127.0.0.1", proxy.upstream.port)), UpstreamCounters()
    )
    with pytest.raises(TimeoutError):
        await pool.dial()


async def test_a_client_that_came_back_is_no_longer_one_just_placed(proxy: PlaneUnderTest) -> None:
    pool = proxy.pool()
    pool.placed, pool.placed_before = 2, 1
    pool.on_return(0.0)
    assert (pool.placed, pool.placed_before) == (1, 1)
    pool.on_return(7.0)
    assert (pool.placed, pool.placed_before) == (1, 0)
    pool.on_return(7.0)
    pool.on_return(60.0)
    assert (pool.placed, pool.placed_before) == (1, 0)
    pool.on_return(1.0)
    pool.on_return(1.0)
    assert (pool.placed, pool.placed_before) == (0, 0)


# TLS towards upstreams


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class Apps:
    """Upstreams over TLS. `names` notes each name that was asked for (SNI), None for none."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self.names: list[str | None] = []

    async def start(self, upstream_id: str, *names: str) -> RawUpstream:
        """Start an upstream that shows a certificate for these names."""
        leaf = self._authority.issue(*names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf.certificate, leaf.key)
        context.sni_callback = self._note
        return await RawUpstream(upstream_id).start(tls=context)

    def _note(self, _: ssl.SSLObject | ssl.SSLSocket, name: str | None, __: ssl.SSLContext) -> None:
        self.names.append(name)


def over_tls(proxy: PlaneUnderTest, tls: UpstreamTls, name: str = "") -> None:
    """Publish that all upstreams are reached over TLS."""
    proxy.endpoint = Endpoint(LOOPBACK, tls=make_upstream_context(tls), server_name=name)
    proxy.publish()


async def test_an_upstream_over_tls_is_verified_and_its_connections_are_used_again(
    start: Start, authority: Authority
) -> None:
    apps = Apps(authority)
    proxy = await start([await apps.start("app-1", "app.example")])
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client = await proxy.client()
    link = None
    for number in range(3):
        client.send(request("POST /", body=b"x" * 300_000))
        link = link or await proxy.upstream.accept()
        assert (await link.read_request()).body == b"x" * 300_000
        link.answer(bytes([number]) * 300_000)
        assert (await client.read_response()).body == bytes([number]) * 300_000
    assert apps.names == ["app.example"]
    assert len(proxy.upstream.links) == 1
    (idle,) = proxy.pool().idle
    idle.close()
    assert link is not None
    await link.read_rest()
    assert link.has_eof, "with close_notify"


async def test_an_address_is_verified_where_no_name_is_given(start: Start, authority: Authority) -> None:
    apps = Apps(authority)
    proxy = await start([await apps.start("app-1", "127.0.0.1")])
    over_tls(proxy, UpstreamTls(ca=authority.file))
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"hello")
    assert (await client.read_response()).body == b"hello"
    assert apps.names == [None], "an address is no name (RFC 6066, section 3)"


async def test_the_name_is_asked_for_at_the_address_that_it_stands_for(start: Start, authority: Authority) -> None:
    apps = Apps(authority)
    upstream = await apps.start("app-1", "app.invalid")
    proxy = await start([upstream])
    upstream.host = "app.invalid"
    proxy.endpoint = Endpoint(LOOPBACK, "127.0.0.1", make_upstream_context(UpstreamTls(ca=authority.file)))
    proxy.publish()
    client, app = await proxy.open(b"GET / HTTP/1.0\r\n\r\n")
    assert (await app.read_request())["Host"] == f"app.invalid:{upstream.port}"
    app.answer(b"hello")
    assert (await client.read_response()).body == b"hello"
    assert apps.names == ["app.invalid"]


async def test_whoever_answers_is_believed_where_nothing_is_verified(start: Start, authority: Authority) -> None:
    proxy = await start([await Apps(authority).start("app-1", "other.example")])
    over_tls(proxy, UpstreamTls(verify=False), "app.example")
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"hello")
    assert (await client.read_response()).body == b"hello"


@pytest.mark.parametrize("wrong", ["name", "authority", "plain"])
async def test_an_upstream_that_is_not_who_it_should_be_gets_no_request(
    start: Start, authority: Authority, tmp_path: Path, wrong: str
) -> None:
    """A pinned client hears of it and keeps its pin, a new one goes elsewhere."""
    apps = Apps(authority)
    good = await apps.start("app-1", "app.example")
    proxy = await start([good])
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    pinned, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"", "Connection: close")
    cookie = (await pinned.read_response()).cookie
    app.close()
    await eventually(lambda: not proxy.pool().idle)
    await good.stop()
    if wrong == "plain":
        bad = await RawUpstream("app-1").start()
        bad.on_accept = lambda link: link.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    elif wrong == "name":
        bad = await apps.start("app-1", "other.example")
    else:
        bad = await Apps(Authority(tmp_path)).start("app-1", "app.example")
    other = await apps.start("app-2", "app.example")
    proxy.upstreams = (bad, other)
    proxy.all_upstreams += (bad, other)
    proxy.admin["app-2"], proxy.observed["app-2"] = AdminState.READY, proxy.observed["app-1"]
    proxy.publish()
    pinned.send(request("GET /", f"Cookie: {cookie}"))
    response = await pinned.read_response()
    assert response.status == 502
    assert "error=tls_protocol_error" in response["Proxy-Status"]
    assert not response.cookie
    assert proxy.plane.counters.breaks == {}
    for _ in range(6):  # some of them are placed at the one that cannot be used
        client = await proxy.client()
        client.send(GET)
        await eventually(lambda: other.links and any(b"\r\n\r\n" in link.held for link in other.links))
        link = next(link for link in other.links if link.held)
        await link.read_request()
        link.answer(b"elsewhere", "Connection: close")
        assert (await client.read_response()).body == b"elsewhere"
        link.close()
    assert proxy.pool(bad).counters.attempts["tls"] > 1
    assert all(b"GET" not in link.all_received for link in bad.links)


async def test_nobody_is_left_where_the_only_upstream_fails_its_handshake(start: Start, authority: Authority) -> None:
    proxy = await start([await Apps(authority).start("app-1", "other.example")])
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client = await proxy.client()
    client.send(GET)
    assert (await client.read_response()).status == 503
    assert proxy.upstream.links == []


async def test_a_handshake_that_never_ends_is_a_connect_that_takes_too_long(start: Start, authority: Authority) -> None:
    proxy = await start(connect_s=0.3)
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client = await proxy.client()
    client.send(GET)
    assert (await client.read_response()).status == 503
    assert proxy.pool().counters.attempts == {"timeout": 1}


async def test_a_client_that_goes_while_tls_is_dialled_leaves_an_idle_connection(
    start: Start, authority: Authority
) -> None:
    proxy = await start([await Apps(authority).start("app-1", "app.example")])
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.exchange for one in proxy.plane.downstreams), look_s=0)
    client.reset()
    await proxy.recorded()
    await eventually(lambda: proxy.pool().idle or proxy.upstream.links)
    assert proxy.upstream.all_bytes == b"" or proxy.records[0].status == 499


async def test_a_tunnel_over_tls_on_the_upstreams_side(start: Start, authority: Authority) -> None:
    proxy = await start([await Apps(authority).start("app-1", "app.example")])
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client, app = await connect(proxy)
    client.send(frame(b"ask", is_masked=True))
    assert await app.read(9) == frame(b"ask", is_masked=True)
    app.send(frame(b"answer"))
    assert await client.read(8) == frame(b"answer")
    app.close()
    assert close_of(await client.read_rest()) == (1012, False)
    assert client.ending == "eof"
    assert await ended(proxy) == ("upstream", 1012, "eof")


@pytest.mark.parametrize("is_tls", [True, False])
async def test_the_close_frame_reaches_a_client_that_is_sending(
    start: Start, authority: Authority, *, is_tls: bool
) -> None:
    """A connection that is closed with bytes unread is reset, and what was not read yet at the other end is lost."""
    if is_tls:
        proxy = await start([await Apps(authority).start("app-1", "app.example")])
        over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    else:
        proxy = await start()
    client, app = await connect(proxy)
    client.stop_reading()
    if is_tls:
        app.close()
        await eventually(lambda: app.is_lost)
    else:
        app.half_close()
    for _ in range(20):
        if not client.is_lost:
            client.send(frame(b"more", is_masked=True))
        await asyncio.sleep(0.002)
    if not client.is_lost:
        client.read_again()
    assert close_of(await client.read_rest()) == (1012, False)
    assert client.ending == "eof"


async def test_a_connection_whose_endpoint_has_changed_is_not_used_again(start: Start, authority: Authority) -> None:
    proxy = await start([await Apps(authority).start("app-1", "app.example")])
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    await client.read_response()
    over_tls(proxy, UpstreamTls(ca=authority.file), "app.example")
    client.send(GET)
    again = await proxy.upstream.accept()
    await again.read_request()
    again.answer()
    assert (await client.read_response()).status == 200
    await app.read_rest()
