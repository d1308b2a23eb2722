"""Placement: each client at its upstream, the cookie when it is due, and counts that agree."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, get_args

import pytest

from stickyproxy.affinity.choose import choose
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.snapshot import (
    AdminState,
    Health,
    OnUnavailable,
    Policy,
    Rules,
    Snapshot,
    upstream_digest,
)
from stickyproxy.affinity.token import Lifetimes, Token, TokenCodec
from stickyproxy.proxy import placement
from stickyproxy.proxy.settings import Settings
from tests.helpers.plane import CODEC, cluster_settings
from tests.helpers.raw import GET, Message, RawLink, RawUpstream, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE

if TYPE_CHECKING:
    from stickyproxy.affinity.choose import Choice, Question
    from tests.helpers.plane import PlaneUnderTest, Start


async def visit(
    proxy: PlaneUnderTest, cookie: str = "", *fields: str, client: RawLink | None = None
) -> tuple[RawUpstream, Message, Message]:
    """Send one request and answer it; return where it went, what came there, and what came back."""
    client = client or await proxy.client()
    before = {one: sum(link.received_bytes for link in one.links) for one in proxy.upstreams}
    client.send(request("GET /", *fields, *([f"Cookie: {cookie}"] if cookie else [])))

    def reached() -> list[RawUpstream]:
        return [one for one in proxy.upstreams if sum(link.received_bytes for link in one.links) > before[one]]

    await eventually(reached, "the request arrives")
    (upstream,) = reached()
    link = next(link for link in upstream.links if link.held)
    got = await link.read_request()
    link.answer(upstream.id.encode())
    return upstream, got, await client.read_response()


def token(cookie: str) -> Token:
    """Read the token of a cookie."""
    parsed = CODEC.parse(cookie.removeprefix("stickyproxy=").encode(), time.time() + 60)  # noqa: TID251 -- tokens use it
    assert parsed is not None
    return parsed


def cookie_for(upstream_id: str, *, age_s: int = 0, codec: TokenCodec = CODEC, client_id: bytes = b"0123456789") -> str:
    """Return the cookie of a client that was pinned some time ago."""
    made = int(time.time()) - age_s  # noqa: TID251 -- tokens use it
    return "stickyproxy=" + codec.write(Token(upstream_digest(upstream_id), client_id, made, made)).decode()


# The cookie


@pytest.mark.parametrize(
    "status", ["200 OK", "302 Found", "404 Not Found", "500 Internal Server Error", "304 Not Modified"]
)
async def test_the_first_response_sets_the_cookie_whatever_it_is(proxy: PlaneUnderTest, status: str) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.send(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nContent-Type: image/png\r\n\r\n".encode())
    response = await client.read_response()
    assert token(response.cookie).digest == upstream_digest("app-1")
    assert response["Set-Cookie"].endswith("; Path=/; HttpOnly; SameSite=Lax")
    assert (await proxy.recorded()).affinity == "new"
    assert proxy.plane.counters.affinity == {"new": 1}


@pytest.mark.parametrize("value", ["public, max-age=60", "max-age=9, immutable"])
async def test_what_shared_caches_keep_gets_no_cookie(proxy: PlaneUnderTest, value: str) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"", f"Cache-Control: {value}")
    response = await client.read_response()
    assert response.cookie == ""
    assert response["Cache-Control"] == value


async def test_a_client_comes_back_to_its_upstream_and_gets_no_second_cookie(start: Start) -> None:
    proxy = await start(3)
    first, _, response = await visit(proxy)
    for _ in range(5):
        again, got, second = await visit(proxy, f"a=1; {response.cookie}; b=2")
        assert again is first
        assert second.cookie == ""
        assert got["Cookie"] == "a=1; b=2", "the application never sees it"
    assert proxy.plane.counters.hits == 5
    assert proxy.records[-1].affinity == "hit"
    assert len(proxy.sessions) == 1


async def test_a_cookie_alone_leaves_no_cookie_field(proxy: PlaneUnderTest) -> None:
    _, _, response = await visit(proxy)
    _, got, _ = await visit(proxy, response.cookie)
    assert got.all("cookie") == []


async def test_new_clients_spread(start: Start) -> None:
    proxy = await start(3)
    places = [(await visit(proxy))[0].id for _ in range(9)]
    assert sorted(places) == ["app-1"] * 3 + ["app-2"] * 3 + ["app-3"] * 3


@pytest.mark.parametrize(
    "bad",
    ["stickyproxy=rubbish", "stickyproxy=", cookie_for("app-1", codec=TokenCodec([b"other"]))],
    ids=["rubbish", "empty", "of another secret"],
)
async def test_an_invalid_token_counts_as_none(proxy: PlaneUnderTest, bad: str) -> None:
    _, got, response = await visit(proxy, bad)
    assert response.cookie
    assert got.all("cookie") == []
    assert proxy.plane.counters.affinity == {"invalid" if bad != "stickyproxy=" else proxy.records[0].affinity: 1}


async def test_an_expired_token_counts_as_none(start: Start) -> None:
    proxy = await start(lifetimes=Lifetimes(max_idle_s=100))
    _, _, response = await visit(proxy, cookie_for("app-1", age_s=200))
    assert response.cookie
    assert proxy.plane.counters.affinity == {"expired": 1}


async def test_an_old_token_is_written_anew_for_the_same_client(start: Start) -> None:
    proxy = await start(refresh_s=100)
    _, _, response = await visit(proxy, cookie_for("app-1", age_s=200))
    assert token(response.cookie).client_id == b"0123456789"
    assert token(response.cookie).digest == upstream_digest("app-1")
    assert proxy.plane.counters.hits == 1


async def test_without_a_cookie_nobody_is_pinned(start: Start) -> None:
    proxy = await start(2, settings=Settings(clusters=cluster_settings(cookie=None)), rules=Rules(has_cookie=False))
    for _ in range(4):
        _, _, response = await visit(proxy, cookie_for("app-1"))
        assert "set-cookie" not in response
    assert proxy.plane.counters.affinity == {"unpinned": 4}
    assert len(proxy.sessions) == 0


async def test_a_tunnel_without_a_cookie_counts_as_a_stranger(start: Start) -> None:
    proxy = await start(settings=Settings(clusters=cluster_settings(cookie=None)), rules=Rules(has_cookie=False))
    client, app = await proxy.open(request("GET /", "Connection: Upgrade", "Upgrade: websocket"))
    await app.read_request()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await client.read_message()).all("set-cookie") == []
    assert proxy.pool().strangers == 1
    assert proxy.pool().counters.in_flight == 0


async def test_a_tunnel_makes_a_new_client_a_session(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("GET /", "Connection: Upgrade", "Upgrade: websocket"))
    await app.read_request()
    assert (proxy.pool().strangers, len(proxy.sessions)) == (1, 0)
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    cookie = (await client.read_message()).cookie
    assert (proxy.pool().strangers, len(proxy.sessions)) == (0, 1)
    (session,) = proxy.sessions.all
    assert session.open == 1
    assert token(cookie).client_id == session.client_id
    await visit(proxy, cookie)
    assert session.open == 1
    client.reset()
    await eventually(lambda: session.open == 0)


# Pins that hold and pins that break


async def test_drain_keeps_the_pinned_and_takes_nobody_new(start: Start) -> None:
    proxy = await start(2)
    first, _, response = await visit(proxy)
    proxy.set_admin(first, AdminState.DRAIN)
    for _ in range(4):
        assert (await visit(proxy))[0] is not first
    assert (await visit(proxy, response.cookie))[0] is first
    assert not proxy.plane.counters.breaks


async def test_an_unhealthy_upstream_keeps_the_pinned(start: Start) -> None:
    proxy = await start(2)
    first, _, response = await visit(proxy)
    proxy.set_health(first, Health.UNHEALTHY)
    for _ in range(4):
        assert (await visit(proxy))[0] is not first
    assert (await visit(proxy, response.cookie))[0] is first


async def test_all_unhealthy_are_better_than_none(start: Start) -> None:
    proxy = await start(2)
    for upstream in proxy.upstreams:
        proxy.set_health(upstream, Health.UNHEALTHY)
    assert {(await visit(proxy))[0].id for _ in range(4)} == {"app-1", "app-2"}


@pytest.mark.parametrize("reason", ["maint", "removed", "refused"])
async def test_a_broken_pin_is_renewed_on_the_same_response(start: Start, reason: str) -> None:
    proxy = await start(2)
    first, _, response = await visit(proxy)
    if reason == "maint":
        proxy.set_admin(first, AdminState.MAINT)
    elif reason == "removed":
        proxy.remove(first)
    else:
        await first.stop()
        first.links[0].transport.abort()
    second, _, moved = await visit(proxy, response.cookie)
    assert second is not first
    assert token(moved.cookie).digest == upstream_digest(second.id)
    assert token(moved.cookie).client_id == token(response.cookie).client_id, "still the same client"
    assert proxy.plane.counters.breaks == {reason: 1}
    assert proxy.plane.counters.affinity == {"new": 1, "redispatched": 1}
    assert (await visit(proxy, moved.cookie))[0] is second
    if reason != "removed":
        again, _, told = await visit(proxy, response.cookie)
        assert again is second, "the old token follows its session"
        assert token(told.cookie).digest == upstream_digest(second.id)


async def test_a_websocket_of_a_broken_pin_gets_its_cookie_with_the_101(start: Start) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    await first.stop()
    client = await proxy.client()
    client.send(request("GET /", "Connection: Upgrade", "Upgrade: websocket", f"Cookie: {cookie_for('app-1')}"))
    app = await second.accept()
    await app.read_request()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    answer = await client.read_message()
    assert answer.status == 101
    assert token(answer.cookie).digest == upstream_digest("app-2")


async def test_parallel_requests_of_a_moved_client_stay_together(start: Start) -> None:
    proxy = await start(4)
    first = proxy.upstreams[0]
    await first.stop()
    cookie = cookie_for("app-1")
    clients = [await proxy.client() for _ in range(6)]
    for client in clients:
        client.send(request("GET /", f"Cookie: {cookie}"))
    await eventually(lambda: sum(bool(link.held) for one in proxy.upstreams for link in one.links) == 6)
    (second,) = [one for one in proxy.upstreams if one.links]
    for link in second.links:
        await link.read_request()
        link.answer()
    cookies = [(await client.read_response()).cookie for client in clients]
    assert {token(one).digest for one in cookies} == {upstream_digest(second.id)}
    assert {token(one).client_id for one in cookies} == {b"0123456789"}, "one client, however many requests"
    assert proxy.plane.counters.breaks == {"refused": 1}
    assert len(proxy.sessions) == 1


async def test_a_new_client_is_placed_elsewhere_when_nobody_answers(start: Start) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    await first.stop()
    for _ in range(4):
        assert (await visit(proxy))[0] is second
    assert (proxy.pool(first).strangers, proxy.pool(first).placed) == (0, 0)
    assert proxy.pool(second).placed == 4


async def test_refuse_answers_503_and_keeps_the_pin(start: Start) -> None:
    proxy = await start(2, rules=Rules(on_unavailable="refuse"))
    first, _, response = await visit(proxy)
    proxy.set_admin(first, AdminState.MAINT)
    client = await proxy.client()
    client.send(request("GET /", f"Cookie: {response.cookie}"))
    refused = await client.read_response()
    assert (refused.status, refused["Retry-After"]) == (503, "1")
    assert refused.cookie == ""
    assert proxy.plane.counters.affinity == {"new": 1, "refused": 1}
    proxy.set_admin(first, AdminState.READY)
    assert (await visit(proxy, response.cookie))[0] is first


async def test_wait_holds_the_request_until_its_upstream_is_back(start: Start) -> None:
    proxy = await start(2, rules=Rules(on_unavailable="wait", wait_s=30))
    first, second = proxy.upstreams
    proxy.set_admin(first, AdminState.MAINT)
    client = await proxy.client()
    client.send(request("POST /", f"Cookie: {cookie_for('app-1')}", body=b"held"))
    await eventually(lambda: proxy.plane._changed)
    proxy.set_health(second, Health.HEALTHY)  # something else changes: it goes on waiting
    await eventually(lambda: proxy.plane._changed)
    assert (first.links, second.links) == ([], [])
    proxy.set_admin(first, AdminState.READY)
    app = await first.accept()
    assert (await app.read_request()).body == b"held"
    app.answer(b"back")
    response = await client.read_response()
    assert (response.body, response.cookie) == (b"back", "")
    assert proxy.plane.counters.hits == 1


async def test_wait_ends_and_another_upstream_is_chosen(start: Start) -> None:
    proxy = await start(2, rules=Rules(on_unavailable="wait", wait_s=0.2))
    first, second = proxy.upstreams
    proxy.set_admin(first, AdminState.MAINT)
    where, _, response = await visit(proxy, cookie_for("app-1"))
    assert where is second
    assert token(response.cookie).digest == upstream_digest("app-2")
    assert proxy.plane._changed == set()
    assert proxy.plane.counters.breaks == {"maint": 1}


async def test_a_client_that_leaves_while_it_waits_is_forgotten(start: Start) -> None:
    proxy = await start(1, rules=Rules(on_unavailable="wait", wait_s=30))
    proxy.set_admin(proxy.upstream, AdminState.MAINT)
    client = await proxy.client()
    client.send(request("GET /", f"Cookie: {cookie_for('app-1')}"))
    await eventually(lambda: proxy.plane._changed)
    client.reset()
    assert (await proxy.recorded()).status == 499
    proxy.set_admin(proxy.upstream, AdminState.READY)
    for _ in range(20):
        await asyncio.sleep(0)
    assert proxy.upstream.links == []
    assert proxy.plane.counters.affinity == {"wait": 1}


# An upstream that is closing


def begin_closing(proxy: PlaneUnderTest, upstream: RawUpstream) -> None:
    """Publish that an upstream has drained for as long as it may."""
    before, endpoints = (
        proxy.plane.default.snapshot,
        {one.upstream_id: one.endpoint for one in proxy.plane.pools.values()},
    )
    states = tuple(replace(one, is_closing=one.is_closing or one.id == upstream.id) for one in before.upstreams)
    proxy.plane.publish([Snapshot(before.cluster, states, before.rules)], endpoints)


def note_questions(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Note what is asked beyond the look at the pin that is all that most exchanges need."""
    asked: list[Question] = []

    def note(snapshot: Snapshot, question: Question, *more: Any) -> Choice:
        asked.append(question)
        return choose(snapshot, question, *more)

    monkeypatch.setattr(placement, "choose", note)
    return asked


@pytest.mark.parametrize("rules", [Rules(), Rules(on_unavailable="refuse"), Rules(on_unavailable="wait", wait_s=3600)])
async def test_a_tunnel_holds_its_client_at_one_that_is_closing_and_its_end_lets_it_go(
    start: Start, rules: Rules
) -> None:
    proxy = await start(2, rules=rules)
    first, second = proxy.upstreams
    cookie, idle = (cookie_for("app-1", age_s=9, client_id=one) for one in (b"has tunnel", b"is idle   "))
    client, app = await proxy.open(HANDSHAKE.replace(b"\r\n\r\n", f"\r\nCookie: {cookie}\r\n\r\n".encode()))
    await app.read_request()
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    begin_closing(proxy, first)
    for _ in range(3):
        where, _, response = await visit(proxy, cookie)
        assert (where, response.cookie) == (first, "")
    moved, _, response = await visit(proxy, idle)
    assert moved is second, "nothing holds this one"
    assert token(response.cookie).digest == upstream_digest("app-2")
    assert (await visit(proxy))[0] is second, "nobody new"
    assert proxy.plane.counters.breaks == {"closed": 1}
    client.reset()
    await eventually(lambda: not proxy.plane.tunnels)
    where, _, response = await visit(proxy, cookie)
    assert where is second
    assert token(response.cookie).digest == upstream_digest("app-2")
    assert token(response.cookie).client_id == token(cookie).client_id
    assert proxy.plane.counters.breaks == {"closed": 2}
    assert proxy.plane.counters.affinity == {"new": 1, "hit": 4, "redispatched": 2}


async def test_an_exchange_under_way_holds_its_client_at_one_that_is_closing(start: Start) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    cookie = cookie_for("app-1")
    client, app = await proxy.open(request("GET /events", f"Cookie: {cookie}"))
    await app.read_request()
    begin_closing(proxy, first)
    assert (await visit(proxy, cookie))[0] is first
    app.answer(b"whole")
    response = await client.read_response()
    assert (response.body, response.cookie) == (b"whole", "")
    assert (await visit(proxy, cookie))[0] is second


async def test_one_that_is_closing_and_gone_holds_nobody(start: Start) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    cookie = cookie_for("app-1")
    client, app = await proxy.open(request("GET /events", f"Cookie: {cookie}"))
    await app.read_request()
    begin_closing(proxy, first)
    await first.stop()  # the exchange goes on, and nobody else comes in
    proxy.observed.pop(first.id)  # what is reported of it changes nothing
    where, _, response = await visit(proxy, cookie)
    assert where is second
    assert token(response.cookie).digest == upstream_digest("app-2")
    assert proxy.reports == [("app-1", HealthEvent.REFUSED)]
    assert proxy.plane.counters.breaks == {"unreachable": 1}
    app.answer(b"whole")
    assert (await client.read_response()).body == b"whole"


@pytest.mark.parametrize("is_removed", [True, False])
async def test_nobody_waits_for_one_that_will_not_come_back(
    start: Start,
    is_removed: bool,  # noqa: FBT001
) -> None:
    proxy = await start(2, rules=Rules(on_unavailable="wait", wait_s=3600))
    first, second = proxy.upstreams
    proxy.set_admin(first, AdminState.MAINT)
    client = await proxy.client()
    client.send(request("GET /", f"Cookie: {cookie_for('app-1')}"))
    await eventually(lambda: proxy.plane._changed)
    proxy.set_health(second, Health.HEALTHY)  # something else changes: it goes on waiting
    await eventually(lambda: proxy.plane._changed)
    assert second.links == []
    if is_removed:
        proxy.remove(first)
    else:
        begin_closing(proxy, first)
    app = await second.accept()
    await app.read_request()
    app.answer()
    assert token((await client.read_response()).cookie).digest == upstream_digest("app-2")
    assert proxy.plane.counters.breaks == {"removed" if is_removed else "maint": 1}


async def test_a_pin_that_holds_asks_nothing_more(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start(2)
    first, second = proxy.upstreams
    asked = note_questions(monkeypatch)
    begin_closing(proxy, first)
    assert (await visit(proxy, cookie_for("app-2")))[0] is second
    assert asked == []
    await visit(proxy, cookie_for("app-1", client_id=b"another..."))
    assert len(asked) == 1


# No upstream at all


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("on_unavailable", get_args(OnUnavailable))
@pytest.mark.parametrize("is_shared", [True, False])
async def test_without_an_upstream_everybody_is_told_to_come_again(
    start: Start,
    policy: Policy,
    on_unavailable: OnUnavailable,
    is_shared: bool,  # noqa: FBT001
) -> None:
    rules = Rules(policy, on_unavailable, wait_s=3600, uses_client_address=True, is_shared=is_shared)
    proxy = await start(1, rules=rules)
    upstream = proxy.upstream
    proxy.remove(upstream)
    client = await proxy.client()
    document = "Sec-Fetch-Dest: document"
    for fields in ([], [document], [f"Cookie: {cookie_for('app-1')}"], ["Cookie: stickyproxy=rubbish", document]):
        client.send(request("GET /", *fields))
        response = await client.read_response()
        assert (response.status, response["Retry-After"], response.cookie) == (503, "1", "")
    assert proxy.plane.counters.affinity == {"none": 4}
    proxy.upstreams = (upstream,)
    proxy.publish()
    client.send(request("GET /", document))
    app = await upstream.accept()
    await app.read_request()
    app.answer()
    assert (await client.read_response()).cookie


# The client's address


async def test_the_address_stands_in_for_a_cookie(start: Start) -> None:
    proxy = await start(
        4, settings=Settings(trusted=(ip_network("127.0.0.0/8"),)), rules=Rules(uses_client_address=True)
    )
    places = {}
    for number in range(8):
        said = f"X-Forwarded-For: 203.0.113.{number}"
        places[number] = (await visit(proxy, "", said))[0]
        assert (await visit(proxy, "", said))[0] is places[number]
    assert len(set(places.values())) > 1
    assert proxy.plane.counters.affinity == {"address": 16}


async def test_a_page_is_placed_by_the_policy_for_it_can_take_a_cookie(start: Start) -> None:
    proxy = await start(3, rules=Rules(uses_client_address=True))
    places = [(await visit(proxy, "", "Sec-Fetch-Dest: document"))[0].id for _ in range(6)]
    assert sorted(places) == ["app-1"] * 2 + ["app-2"] * 2 + ["app-3"] * 2
    assert proxy.plane.counters.affinity == {"new": 6}
    assert len({(await visit(proxy))[0].id for _ in range(4)}) == 1


# Counts


async def test_counts_while_it_is_under_way(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(GET)
    await app.read_request()
    pool = proxy.pool()
    assert (pool.counters.in_flight, pool.strangers, pool.placed) == (1, 1, 0)
    app.answer()
    cookie = (await client.read_response()).cookie
    assert (pool.counters.in_flight, pool.strangers, pool.placed) == (0, 0, 1)
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    (session,) = [one for one in proxy.sessions.all if one.open]
    assert (pool.counters.in_flight, pool.strangers, session.open) == (1, 0, 1)
    assert session.active_at == proxy.plane.now
    client.send(b"")
    app.answer()
    await client.read_response()
    client.send(request("GET /", f"Cookie: {cookie}"))
    await app.read_request()
    app.answer()
    await client.read_response()
    assert (pool.counters.in_flight, session.open) == (0, 0)


# Full upstreams


async def test_new_clients_go_where_there_is_room_and_then_hear_when_to_come_again(start: Start) -> None:
    proxy = await start(2)
    proxy.max_sessions = 2
    proxy.publish()
    cookies = []
    for _ in range(4):
        where, _, answer = await visit(proxy)
        cookies.append((where, answer.cookie))
    assert {where.id for where, _ in cookies} == {"app-1", "app-2"}
    client = await proxy.client()
    client.send(GET)
    response = await client.read_response()
    assert (response.status, response["Retry-After"]) == (503, "10")
    assert "connection_limit_reached" in response["Proxy-Status"]
    assert "set-cookie" not in response
    for where, cookie in cookies:
        assert (await visit(proxy, cookie))[0] is where
    assert proxy.plane.counters.affinity["full"] == 1
    proxy.max_sessions = 3
    proxy.publish()
    await visit(proxy, client=client)
