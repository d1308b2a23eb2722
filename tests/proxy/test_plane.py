"""The plane: what is published, what is counted, and how it ends."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import uvloop

from stickyproxy.affinity.snapshot import Rules, Snapshot
from stickyproxy.observe.counters import CONNECTIONS, LAG_BOUNDS_S
from stickyproxy.proxy import plane as plane_module
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.settings import Settings
from stickyproxy.tasks import spawn
from tests.helpers.raw import GET, RawUpstream, eventually, request

if TYPE_CHECKING:
    import pytest

    from tests.helpers.plane import PlaneUnderTest, Start

HANDSHAKE = request("GET /", "Connection: Upgrade", "Upgrade: websocket")
ACCEPT = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


async def test_the_loop_is_the_one_of_production(proxy: PlaneUnderTest) -> None:
    assert isinstance(proxy.plane.loop, uvloop.Loop)


async def test_an_upstream_that_moves_to_another_address_is_dialled_there(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    before = proxy.pool()
    app.answer()
    cookie = (await client.read_response()).cookie
    other = await RawUpstream("app-1").start()
    proxy.upstreams = (other,)
    proxy.all_upstreams = (*proxy.all_upstreams, other)
    proxy.publish()
    assert proxy.pool() is not before
    assert before.is_closed
    await app.read_rest()
    client.send(request("GET /moved", f"Cookie: {cookie}"))
    new = await other.accept()
    assert (await new.read_request()).target == "/moved"
    new.answer()
    assert (await client.read_response()).cookie == ""
    proxy.publish()
    assert proxy.pool().idle, "the same address keeps its connections"


async def test_an_exchange_outlives_the_removal_of_its_upstream(start: Start) -> None:
    proxy = await start(2)
    client = await proxy.client()
    client.send(GET)
    await eventually(lambda: any(one.links for one in proxy.upstreams))
    first = next(one for one in proxy.upstreams if one.links)
    app = await first.accept()
    await app.read_request()
    proxy.remove(first)
    app.answer(b"still")
    assert (await client.read_response()).body == b"still"
    await app.read_rest()


async def test_a_tunnel_outlives_the_removal_of_its_upstream(start: Start) -> None:
    proxy = await start(2)
    client = await proxy.client()
    client.send(HANDSHAKE)
    await eventually(lambda: any(one.links for one in proxy.upstreams))
    first = next(one for one in proxy.upstreams if one.links)
    app = await first.accept()
    await app.read_request()
    app.send(ACCEPT)
    await client.read_message()
    proxy.remove(first)
    client.send(b"still")
    assert await app.read(5) == b"still"


async def test_waiting_ends_with_a_change_or_with_time(proxy: PlaneUnderTest) -> None:
    plane = proxy.plane
    waiting = asyncio.gather(plane.wait_for_change(30), plane.wait_for_change(30), plane.wait_for_change(0.01))
    await eventually(lambda: len(plane._changed) == 2)
    for future in list(plane._changed)[:1]:
        future.cancel()
    proxy.publish()
    await waiting
    assert plane._changed == set()


async def test_the_load_counts_sessions_strangers_and_those_just_placed(proxy: PlaneUnderTest) -> None:
    plane, pool = proxy.plane, proxy.pool()
    (upstream,) = plane.snapshot.upstreams
    assert plane.load(upstream) == 0
    client, app = await proxy.open(GET)
    await app.read_request()
    assert plane.load(upstream) == 2
    app.answer()
    cookie = (await client.read_response()).cookie
    assert plane.load(upstream) == 1
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    app.answer()
    await client.read_response()
    assert plane.load(upstream) == 1  # who came back is a session, and no longer one just placed
    client.send(GET)
    await app.read_request()
    app.answer()
    await client.read_response()
    assert plane.load(upstream) == 2
    for before, after in (((1, 0), (0, 1)), ((0, 1), (0, 0))):
        assert (pool.placed, pool.placed_before) == before
        plane._next_window = plane.now
        await eventually(lambda after=after: (pool.placed, pool.placed_before) == after)  # type: ignore[misc]


async def test_ids_are_never_given_twice(proxy: PlaneUnderTest) -> None:
    plane = proxy.plane
    clients = {plane.new_client_id() for _ in range(1000)}
    assert len(clients) == 1000
    assert {len(one) for one in clients} == {10}
    requests = {plane.new_request_id() for _ in range(1000)}
    assert len(requests) == 1000
    assert {len(one) for one in requests} == {24}


async def test_the_ends_of_waiting_until_empty(proxy: PlaneUnderTest) -> None:
    plane = proxy.plane
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(ACCEPT)
    await client.read_message()
    idle = await proxy.client()
    busy = await proxy.client()
    busy.send(GET)
    other = await proxy.upstream.accept()
    await other.read_request()
    plane.stop()
    waiting = spawn(plane.wait_until_empty(), "wait")
    await idle.read_rest()
    other.answer(b"whole")
    assert (await busy.read_response())["Connection"] == "close"
    await eventually(lambda: not plane.downstreams)
    assert not waiting.done()
    client.reset()
    app.close()
    await waiting


async def test_close_ends_all_at_once(start: Start) -> None:
    proxy = await start(rules=Rules())
    plane = proxy.plane
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(ACCEPT)
    await client.read_message()
    busy = await proxy.client()
    busy.send(GET)
    other = await proxy.upstream.accept()
    await other.read_request()
    kept = await proxy.client()
    kept.send(GET)
    third = await proxy.upstream.accept()
    await third.read_request()
    third.answer()
    await kept.read_response()
    plane.close()
    for link in (client, app, busy, other, kept, third):
        await link.read_rest()
    await eventually(lambda: not plane.downstreams)
    assert not plane.tunnels
    assert {record.status for record in proxy.records} == {101, 499, 200}


async def test_a_tick_renews_the_clocks_and_ends_idle_sessions(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_module, "TICK_S", 0.01)
    proxy = await start(idle_s=0.1)
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    cookie = (await client.read_response()).cookie
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    app.answer()
    await client.read_response()
    now, wall = proxy.plane.now, proxy.plane.wall
    await eventually(lambda: len(proxy.sessions) == 0)
    assert proxy.plane.now > now
    assert proxy.plane.wall > wall


async def test_a_tick_acts_on_what_is_overdue(start: Start) -> None:
    proxy = await start(tunnel_idle_s=0.1, linger_s=0.1, keep_alive_s=0.1, upstream_keep_alive_s=0.1)
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer()
    await client.read_response()
    await app.read_rest()
    other, tunnel = await proxy.open(HANDSHAKE)
    await tunnel.read_request()
    tunnel.send(ACCEPT)
    await other.read_message()
    await client.read_rest()
    await other.read_rest()
    await eventually(lambda: not proxy.plane.tunnels and not proxy.pool().idle)


# What is counted in shared memory


async def test_what_is_counted_is_in_the_table_of_the_plane(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    assert proxy.table.read().upstream(proxy.pool().digest).in_flight == 1
    app.answer(b"12345")
    cookie = (await client.read_response()).cookie
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    app.answer(b"")
    await client.read_response()
    reading = proxy.table.read()
    counters = reading.upstream(proxy.pool().digest)
    assert (reading.plane.connections, reading.plane.affinity) == (1, {"new": 1, "hit": 1})
    assert (sum(counters.exchanges), counters.attempts, counters.sent_bytes) == (2, {"ok": 2}, 5)
    assert sum(counters.duration.counts) == sum(counters.response.counts) == 2
    assert 0 < counters.response.total_s <= counters.duration.total_s
    assert counters.in_flight == 0


async def test_a_tick_shows_what_is_open(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()

    def show() -> tuple[int, ...]:
        reading = proxy.table.read()
        one = reading.upstream(proxy.pool().digest)
        return reading.plane.downstreams, reading.plane.is_accepting, one.idle_connections, one.strangers, one.placed

    await eventually(lambda: show() == (1, 1, 0, 1, 1), "the exchange of a client without a session")
    app.answer()
    await client.read_response()
    await eventually(lambda: show() == (1, 1, 1, 0, 1), "its end")
    ticked_at = proxy.table.read().plane.ticked_at_ns
    assert 0 < ticked_at <= time.monotonic_ns()
    proxy.plane.gate.is_open = False
    await eventually(lambda: proxy.table.read().plane.ticked_at_ns > ticked_at)
    assert sum(proxy.table.read().plane.lag.counts) > 1
    proxy.plane.is_stopping = True
    await eventually(lambda: show()[1] == 0)


async def test_a_late_tick_is_seen(proxy: PlaneUnderTest) -> None:
    await eventually(lambda: proxy.plane.counters.ticked_at_ns)
    time.sleep(0.6)  # noqa: ASYNC251 -- the loop is to stall
    await eventually(lambda: sum(proxy.plane.counters.lag.counts[LAG_BOUNDS_S.index(0.25) + 1 :]) > 0)


async def test_the_counters_of_an_upstream_that_is_removed_are_given_back(start: Start) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    gone = proxy.pool(first)
    gone.counters.count_attempt("ok")
    proxy.remove(first)
    assert list(proxy.table._released) == [gone.digest]
    proxy.upstreams = (first, second)
    proxy.publish()
    assert not proxy.table._released
    assert proxy.pool(first).counters.attempts == {"ok": 1}


async def test_a_plane_without_a_table_counts_in_memory_of_its_own(proxy: PlaneUnderTest) -> None:
    plane = Plane(Settings(), proxy.sessions, report=lambda *_: None, random=lambda: 0.0)
    plane.publish(proxy.plane.snapshot, {one.id: proxy.endpoint for one in proxy.upstreams})
    plane.counters.cells[CONNECTIONS] += 1
    pool = plane.pools[proxy.pool().digest]
    pool.counters.count_attempt("ok")
    assert proxy.plane.counters.connections == 0
    assert proxy.pool().counters.attempts == {}
    plane.publish(Snapshot("default", (), Rules()), {})
    assert pool.is_closed
    plane.close()
