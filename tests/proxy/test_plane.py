"""The plane: what is published, what is counted, and how it ends."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
import uvloop

from stickyproxy.affinity.routes import Route
from stickyproxy.affinity.snapshot import Rules, Snapshot
from stickyproxy.config import Address, ListenerTls
from stickyproxy.control.certificates import make_listener_context
from stickyproxy.observe.counters import CONNECTIONS, LAG_BOUNDS_S
from stickyproxy.proxy import plane as plane_module
from stickyproxy.proxy.board import Board
from stickyproxy.proxy.departure import depart
from stickyproxy.proxy.listener import Role
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.pool import PLACED_WINDOW_S
from stickyproxy.proxy.settings import OFF, ClusterSettings, Pings, Settings, Timeouts
from stickyproxy.tasks import spawn
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.head import HeadLimits
from tests.helpers.certificates import Authority
from tests.helpers.plane import LOOPBACK, cluster_settings
from tests.helpers.raw import GET, RawUpstream, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, connect, the_tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.plane import PlaneUnderTest, Start
    from tests.helpers.raw import RawLink


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
    (upstream,) = plane.default.snapshot.upstreams
    assert plane.load(upstream) == 0
    client, app = await proxy.open(GET)
    await app.read_request()
    assert plane.load(upstream) == 1
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


async def test_waiting_until_all_are_gone_while_all_go_on(proxy: PlaneUnderTest) -> None:
    plane = proxy.plane
    await plane.wait_until_gone()
    tunnel, app = await connect(proxy)
    idle = await proxy.client()
    await eventually(lambda: plane.connections == 2)
    waiting = [spawn(plane.wait_until_gone(), "wait") for _ in range(2)]
    idle.close()
    await eventually(lambda: plane.connections == 1)
    late, other = await proxy.open(GET)
    await other.read_request()
    tunnel.reset()
    await app.read_rest()
    await eventually(lambda: plane.connections == 1)
    assert not any(task.done() for task in waiting), "who came meanwhile is waited for, too"
    other.answer(b"served")
    response = await late.read_response()
    assert (response.body, "connection" in response) == (b"served", False)
    assert not any(task.done() for task in waiting)
    late.close()
    await asyncio.gather(*waiting)
    assert plane.connections == 0


async def test_who_comes_just_after_the_last_has_gone_is_waited_for(proxy: PlaneUnderTest) -> None:
    plane = proxy.plane
    first = await proxy.client()
    await eventually(lambda: plane.connections == 1)
    waiting = spawn(plane.wait_until_gone(), "wait")
    await asyncio.sleep(0)
    (downstream,) = plane.downstreams
    plane.downstreams.clear()
    plane.on_closed()  # the last one; and before anybody is woken:
    plane.downstreams.add(downstream)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    first.close()
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

    await eventually(lambda: show() == (1, 1, 0, 1, 0), "the exchange of a client without a session")
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
    plane.publish([proxy.plane.default.snapshot], {one.id: proxy.endpoint for one in proxy.upstreams})
    plane.counters.cells[CONNECTIONS] += 1
    pool = plane.pools[proxy.pool().digest]
    pool.counters.count_attempt("ok")
    assert proxy.plane.counters.connections == 0
    assert proxy.pool().counters.attempts == {}
    plane.publish([Snapshot("default", (), Rules())], {})
    assert pool.is_closed
    plane.close()


# Other settings


async def serve(client: RawLink, app: RawLink) -> str:
    """Let a client have an exchange; return the cookie that it gets."""
    client.send(GET)
    await app.read_request()
    app.answer()
    return (await client.read_response())["Set-Cookie"].partition(";")[0]


async def test_the_same_settings_change_nothing(proxy: PlaneUnderTest) -> None:
    reader = proxy.plane.cookie_reader
    proxy.plane.change_settings(Settings())
    assert proxy.plane.cookie_reader is reader
    proxy.plane.change_settings(Settings(buffer_bytes=1000))
    assert proxy.plane.cookie_reader is not reader


async def test_other_settings_hold_from_the_next_request_on(proxy: PlaneUnderTest) -> None:
    kept, app = await proxy.open(GET)
    await app.read_request()
    small = Settings(
        head=HeadLimits(target_bytes=100),
        clusters=cluster_settings(cookie=CookieAttributes(name="other")),
        timeouts=Timeouts(keep_alive_s=0.3),
    )
    proxy.plane.change_settings(small)
    app.answer()
    assert (await kept.read_response())["Set-Cookie"].startswith("other="), "written just now, so by the new ones"
    kept.send(request("GET /" + "x" * 200))
    assert (await kept.read_response()).status == 414
    fresh = await proxy.client()
    cookie = await serve(fresh, app)
    assert cookie.startswith("other=")
    fresh.send(request("GET /", f"Cookie: {cookie}; stickyproxy=mine"))
    assert (await app.read_request())["Cookie"] == "stickyproxy=mine"
    app.answer()
    assert "set-cookie" not in await fresh.read_response()
    assert await fresh.read_rest() == b"", "the time of keep-alive, too"


async def test_a_tunnel_keeps_the_age_and_the_pings_that_it_was_opened_with(proxy: PlaneUnderTest) -> None:
    await connect(proxy)
    old = the_tunnel(proxy)
    assert not proxy.plane._sweeps_tunnels
    timeouts = Timeouts(tunnel_max_age_s=50.0, tunnel_idle_s=900.0, tunnel_max_age_jitter_percent=0)
    proxy.plane.change_settings(Settings(timeouts=timeouts, pings=Pings(1.0, 1.0)))
    assert proxy.plane._sweeps_tunnels
    assert (old._ends_at, old._pinger) == (OFF, None)
    await connect(proxy)
    (new,) = proxy.plane.tunnels - {old}
    assert new._ends_at <= proxy.plane.now + 50
    assert new._pinger is not None
    old.sweep(proxy.plane.now + 899)
    assert not old.is_ending
    old.sweep(proxy.plane.now + 901)
    assert old.is_ending, "how long it may be idle is looked up each time"


async def test_room_for_more_clients_lets_those_in_who_wait(start: Start) -> None:
    proxy = await start(settings=Settings(connections=1))
    await proxy.client()
    await eventually(lambda: not proxy.plane.gate.is_open)
    waiting = await proxy.client()
    proxy.plane._ticker.cancel()  # so that nothing but the change can let it in
    proxy.plane.change_settings(Settings(connections=2))
    assert proxy.plane.gate.is_open
    app = proxy.upstream.accept()
    waiting.send(GET)
    await (await app).read_request()


async def test_another_limit_for_addresses_counts_who_is_there(start: Start, tmp_path: Path) -> None:
    proxy = await start(settings=Settings(trusts_unix=True))
    await connect(proxy)
    (tunnel,) = proxy.plane.tunnels
    await proxy.client()
    await eventually(lambda: len(proxy.plane.downstreams) == 1)
    behind = await proxy.listen(Address(path=str(tmp_path / "proxy.sock")), Role(proxy_protocol=True))
    await proxy.client(behind)  # says nothing: who it is nobody knows
    await eventually(lambda: len(proxy.plane.handshakes) == 1)
    assert proxy.plane.addresses._counts == {}
    proxy.plane.change_settings(Settings(trusts_unix=True, connections_per_address=3))
    assert proxy.plane.addresses._counts == {"127.0.0.1": 2}
    departure = depart(proxy.plane, tunnel)
    assert departure is not None
    proxy.plane.change_settings(Settings(trusts_unix=True, connections_per_address=2))
    assert proxy.plane.addresses._counts == {"127.0.0.1": 2}, "one on its way to another process is here still"
    refused = await proxy.client()
    refused.send(GET)
    assert (await refused.read_response()).status == 503
    refused.close()
    await eventually(lambda: proxy.plane.addresses._counts == {"127.0.0.1": 2})
    await departure.parted
    await departure.come_back()
    proxy.plane.change_settings(Settings(trusts_unix=True, connections_per_address=2, buffer_bytes=1000))
    assert proxy.plane.addresses._counts == {"127.0.0.1": 2}
    proxy.plane.change_settings(Settings())
    assert proxy.plane.addresses._counts == {}
    proxy.plane.change_settings(Settings(trusts_unix=True, connections_per_address=2))


# With other workers


SHARED = Rules(is_shared=True)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


async def start_two(start: Start, board: Board, upstreams: int = 1) -> tuple[PlaneUnderTest, PlaneUnderTest]:
    """Start two planes that share a board; their upstreams have the same ids."""
    first, second = await start(upstreams, rules=SHARED), await start(upstreams, rules=SHARED)
    for index, proxy in enumerate((first, second)):
        proxy.plane.place = board.place(index)
        proxy.plane.place.slots = {digest: slot for slot, digest in enumerate(sorted(proxy.plane.pools))}
    return first, second


def loads(*proxies: PlaneUnderTest) -> list[int]:
    return [proxy.plane.load(proxy.plane.default.snapshot.upstreams[0]) for proxy in proxies]


async def test_a_client_that_is_placed_counts_for_the_other_workers_at_once(start: Start, board: Board) -> None:
    first, second = await start_two(start, board)
    for proxy in (first, second):
        proxy.plane._ticker.cancel()  # so that nothing is shared by it
    pool = first.pool()
    assert loads(first, second) == [0, 0]
    pool.strangers += 1
    first.plane.show_load(pool)
    assert loads(first, second) == [1, 1]
    pool.strangers += 2
    assert loads(first, second) == [3, 1], "others see the rest with the next tick"
    first.plane._tick()
    assert loads(first, second) == [3, 3]
    pool.strangers -= 2
    first.plane._tick()
    for proxy in (first, second):
        proxy.publish(Rules())
    assert loads(first, second) == [1, 0], "who is alone counts alone"
    pool.strangers -= 1
    first.plane._ticker.cancel()


@pytest.mark.parametrize("is_back_at_both", [False, True])
async def test_a_client_that_comes_back_to_several_workers_is_never_counted_less_than_once(
    start: Start, board: Board, *, is_back_at_both: bool
) -> None:
    """Twice for a while, where it comes back to another worker only."""
    first, second = await start_two(start, board)
    client, app = await first.open(GET)
    await app.read_request()
    app.answer()
    cookie = (await client.read_response()).cookie
    await eventually(lambda: loads(first, second) == [1, 1])
    again = request("GET /", f"Cookie: {cookie}")
    if is_back_at_both:
        client.send(again)
        await app.read_request()
        app.answer()
        await client.read_response()
    client, app = await second.open(again)
    await app.read_request()
    app.answer()
    await client.read_response()
    for proxy in (first, second):
        proxy.plane._ticker.cancel()
    for proxy in (first, second):
        proxy.plane.sessions.take_changes()
    board.write_sessions(0, 1)
    for proxy in (first, second):
        proxy.plane._tick()
        proxy.plane._ticker.cancel()
    assert loads(first, second) == ([1, 1] if is_back_at_both else [2, 2])
    now = second.plane.now
    for number in (1, 2):
        for proxy in (first, second):
            proxy.plane._ticker.cancel()
            proxy.plane._sweep_pools(now + number * PLACED_WINDOW_S)
            proxy.plane.on_tick = None
            assert proxy.plane.place is not None
            proxy.plane.place.write(proxy.pool().digest, proxy.plane._beyond(proxy.pool()))
        assert loads(first, second) == ([1, 1] if is_back_at_both or number == 2 else [2, 2])
    assert (first.pool().placed_before, second.pool().placed_before) == (0, 0)


async def test_new_clients_of_two_workers_spread_as_those_of_one(start: Start, board: Board) -> None:
    """Each places by what both have placed: no upstream gets the first client of each worker."""
    first, second = await start_two(start, board, 4)
    for proxy in (first, second, first, second):
        client = await proxy.client()
        client.send(GET)
        before = len([one for one in proxy.upstreams if one.links])
        await eventually(lambda proxy=proxy, before=before: len([u for u in proxy.upstreams if u.links]) > before)  # type: ignore[misc]
    used = [{one.id for one in proxy.upstreams if one.links} for proxy in (first, second)]
    assert [len(one) for one in used] == [2, 2]
    assert used[0] | used[1] == {"app-1", "app-2", "app-3", "app-4"}


async def test_windows_end_at_the_same_time_at_all_workers(
    start: Start, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await start_two(start, board)
    ends = {proxy.plane._next_window for proxy in (first, second)}
    assert all(end % PLACED_WINDOW_S == 0 for end in ends)
    assert max(ends) - min(ends) in {0, PLACED_WINDOW_S}, "of two that were started in different windows"
    assert [plane_module._next_window(now) for now in (0.0, 4.9, 5.0, 12.0)] == [5.0, 5.0, 10.0, 15.0]
    now = max(ends)
    for proxy in (first, second):
        proxy.pool().placed = 1
        proxy.plane._sweep_pools(now)
        proxy.plane._sweep_pools(now + 0.25)
        assert (proxy.pool().placed, proxy.pool().placed_before) == (0, 1)
        assert proxy.plane._next_window == now + PLACED_WINDOW_S


async def test_a_tick_shares_what_was_not_reported_and_then_what_is_left(start: Start, board: Board) -> None:
    """What `on_tick` reports is no longer beyond what all know, in the same tick."""
    first, _ = await start_two(start, board)
    first.plane._ticker.cancel()
    first.plane.sessions.touch(first.plane.sessions.begin(b"0123456789", first.pool().digest, 0), first.plane.now)

    def report() -> None:
        began, _ = first.plane.sessions.take_changes()
        board.write_sessions(0, len(began))

    first.plane.on_tick = report
    first.plane._tick()
    first.plane._ticker.cancel()
    assert loads(first) == [1]
    assert board._cells[:2].tolist() == [1, 0]


# While connections go to another process


@pytest.mark.parametrize("is_leaving", [False, True])
async def test_a_plane_that_is_left_closes_what_cannot_move_with_its_next_response(
    start: Start, tmp_path: Path, *, is_leaving: bool
) -> None:
    authority = Authority(tmp_path)
    certificate = authority.issue("localhost").section
    proxy = await start()
    tls = make_listener_context(ListenerTls.model_validate({"certificates": certificate}))
    secured = await proxy.listen(LOOPBACK, Role(tls=tls))
    plain, app = await proxy.open(GET)
    await app.read_request()
    client = await proxy.client(secured, tls=authority.client_context())
    client.send(GET)
    other = await proxy.upstream.accept()
    await other.read_request()
    proxy.plane.is_leaving = is_leaving
    for link in (app, other):
        link.answer(b"whole")
    response = await plain.read_response()
    assert (response.body, "connection" in response) == (b"whole", False), "this one moves"
    response = await client.read_response()
    assert response.body == b"whole"
    assert ("connection" in response) is is_leaving
    if is_leaving:
        assert response["Connection"] == "close"
        assert await client.read_rest() == b""
    else:
        client.send(GET)
        await eventually(lambda: app.held or other.held)


# Routes


async def test_routes_hold_once_each_of_their_clusters_is_known(proxy: PlaneUnderTest) -> None:
    """Until then those before do, with the cookies that belong to them: nobody is sent where nothing is."""
    plane, endpoints = proxy.plane, {one.id: proxy.endpoint for one in proxy.upstreams}
    before = plane.cookie_reader
    default = plane.default.snapshot
    clusters = cluster_settings() | {"shop": ClusterSettings(CookieAttributes("other"))}
    plane.change_settings(Settings(clusters=clusters, routes=(Route("shop", path="/shop"),)))
    assert (plane.router, plane.cookie_reader) == (None, before)
    plane.publish([default], endpoints)
    assert (plane.router, plane.cookie_reader) == (None, before)
    plane.publish([default, Snapshot("shop", (), Rules())], endpoints)
    assert plane.router is not None
    assert plane.cookie_reader is not before
    router = plane.router
    plane.publish([default, Snapshot("shop", (), Rules())], endpoints)
    assert plane.router is router, "made once"
    plane.change_settings(Settings())
    assert plane.router is None
    assert list(plane.clusters) == ["default", "shop"], "its upstreams may be leaving"
    plane.publish([default], endpoints)
    assert list(plane.clusters) == ["default"]


async def test_an_upstream_that_moves_to_another_cluster_keeps_its_pool(proxy: PlaneUnderTest) -> None:
    plane, pool = proxy.plane, proxy.pool()
    endpoints = {one.id: pool.endpoint for one in proxy.upstreams}
    upstreams = plane.default.snapshot.upstreams
    plane.publish([Snapshot("default", (), Rules()), Snapshot("shop", upstreams, Rules())], endpoints)
    assert plane.pools == {pool.digest: pool}
    assert not pool.is_closed
    found = plane.find_cluster(pool.digest)
    assert found is not None
    assert found.name == "shop"
    proxy.publish()
