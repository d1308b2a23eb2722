"""The pool: which connection is used again, and which never."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import Address
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.proxy.pool import Pool
from stickyproxy.proxy.settings import Settings
from tests.helpers.raw import GET, RawUpstream, eventually, request

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
    pool = Pool(proxy.plane, "far", b"12345678", Endpoint(Address("127.0.0.1", proxy.upstream.port)))
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
