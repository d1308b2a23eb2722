"""Placement by keys: what the app has made leads back to it, what the client has made leads everyone to one place."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, get_args

import pytest

from stickyproxy.affinity.keys import GoneAnswer, Key, Lesson, member_pattern, path_pattern
from stickyproxy.affinity.snapshot import AdminState, Health, OnUnavailable, Rules, upstream_digest
from stickyproxy.affinity.token import Token
from stickyproxy.observe.counters import KEY_CONFLICTS, KEYS_EVICTED, KEYS_LEARNED
from stickyproxy.proxy.key_table import KeyTable
from stickyproxy.proxy.settings import Settings
from tests.helpers.plane import CODEC, PlaneUnderTest, cluster_settings
from tests.helpers.raw import Message, RawLink, RawUpstream, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, frame, the_tunnel
from tests.proxy.moving import start_pair

if TYPE_CHECKING:
    from tests.helpers.plane import Start

SID: Final = Key(
    "sid",
    "learn",
    queries=("sid",),
    headers=(("X-Sid", b""),),
    cookies=("sid",),
    lessons=(
        Lesson("header", name="X-Sid"),
        Lesson("cookie", name="sid"),
        Lesson("response", pattern=member_pattern("sid")),
    ),
)
GONE: Final = GoneAnswer(400, "application/json", '{"code":1,"message":"Session ID unknown"}')
HASH: Final = Key("hash", "hash", queries=("hash",), paths=(path_pattern("/of/{id}"),))
MEMBER: Final = Key("member", "hash", members=("session_hash",), on=(b"/join",))


def with_keys(*keys: Key, **options: Any) -> Settings:
    return Settings(clusters=cluster_settings(keys=keys, **options))


async def reached(proxy: PlaneUnderTest, client: RawLink, data: bytes) -> tuple[RawUpstream, RawLink, Message]:
    """Send a request; return the upstream that it came to, its connection there, and what came."""
    before = {one: sum(link.received_bytes for link in one.links) for one in proxy.all_upstreams}
    client.send(data)

    def where() -> list[RawUpstream]:
        return [one for one in proxy.all_upstreams if sum(link.received_bytes for link in one.links) > before[one]]

    await eventually(where, "the request arrives")
    (upstream,) = where()
    link = next(link for link in upstream.links if link.held)
    return upstream, link, await link.read_request()


async def visit(
    proxy: PlaneUnderTest,
    target: str = "/",
    *fields: str,
    cookie: str = "",
    body: bytes | None = None,
    answer: tuple[bytes, str] | bytes = b"",
    client: RawLink | None = None,
) -> tuple[str, Message]:
    """Send one request over a connection of its own; return where it went and what came back."""
    client = client or await proxy.client()
    cookies = [f"Cookie: {cookie}"] if cookie else []
    upstream, link, _ = await reached(
        proxy, client, request(f"{'GET' if body is None else 'POST'} {target}", *cookies, *fields, body=body)
    )
    if isinstance(answer, tuple):
        link.answer(answer[0], answer[1])
    else:
        link.answer(answer)
    return upstream.id, await client.read_response()


async def learn(proxy: PlaneUnderTest, value: str = "one") -> str:
    """Let an app make a key; return the id of its upstream."""
    where, _ = await visit(proxy, "/new", answer=(b"", f"X-Sid: {value}"))
    return where


async def learn_at(proxy: PlaneUnderTest, upstream: RawUpstream, value: str = "one") -> None:
    """Let the app of an upstream make a key."""
    assert (await visit(proxy, "/new", cookie=cookie_for(upstream.id), answer=(b"", f"X-Sid: {value}")))[
        0
    ] == upstream.id


def cookie_for(upstream_id: str, age_s: int = 10) -> str:
    """Return the cookie of a client of this upstream; each has one."""
    made = int(time.time()) - age_s  # noqa: TID251 -- tokens use it
    return (
        "stickyproxy="
        + CODEC.write(Token(upstream_digest(upstream_id), upstream_id.encode().ljust(10), made, made)).decode()
    )


def conflicts(proxy: PlaneUnderTest) -> int:
    return proxy.plane.counters.cells[KEY_CONFLICTS]


def found(proxy: PlaneUnderTest, key: Key, value: bytes) -> bytes | None:
    """Return the digest that a key leads to."""
    return proxy.plane.keys.find(key.name.encode() + b"\0" + value, proxy.plane.now)


async def until_settled(proxy: PlaneUnderTest, count: int) -> None:
    await eventually(lambda: len(proxy.records) >= count, f"{count} records")


# Learned


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((b"", "X-Sid: one"), id="header"),
        pytest.param((b"", "Set-Cookie: sid=one; Path=/"), id="cookie"),
        pytest.param((b'{"sid":"one"}', "Content-Type: application/json"), id="body"),
    ],
)
@pytest.mark.parametrize("carried", ["query", "header", "cookie"])
async def test_what_an_app_has_made_leads_back_to_it_without_a_cookie(
    start: Start, answer: tuple[bytes, str], carried: str
) -> None:
    proxy = await start(3, settings=with_keys(SID))
    home, _ = await visit(proxy, "/new", answer=answer)
    for _ in range(6):
        target = "/?a=1&sid=one" if carried == "query" else "/"
        fields = {"header": ("X-Sid: one",), "cookie": ("Cookie: a=1; sid=one",)}.get(carried, ())
        assert (await visit(proxy, target, *fields))[0] == home
        assert proxy.records[-1].affinity == "learned"
    assert proxy.plane.counters.affinity == {"new": 1, "learned": 6}


async def test_control_without_keys_such_requests_go_anywhere(start: Start) -> None:
    proxy = await start(3)
    await learn(proxy)
    assert {(await visit(proxy, "/?sid=one"))[0] for _ in range(6)} == {"app-1", "app-2", "app-3"}


async def test_it_wins_over_a_cookie_which_stays_what_it_is(start: Start) -> None:
    proxy = await start(3, settings=with_keys(SID))
    await learn_at(proxy, proxy.upstreams[0])
    for number in range(1, 4):
        where, response = await visit(proxy, "/?sid=one", cookie=cookie_for("app-2"))
        assert (where, response.cookie) == ("app-1", "")
        assert conflicts(proxy) == number
    where, _ = await visit(proxy, "/", cookie=cookie_for("app-2"))
    assert where == "app-2", "the cookie leads where it led"
    assert conflicts(proxy) == 3


async def test_an_old_cookie_is_not_written_anew_for_the_place_of_the_key(start: Start) -> None:
    proxy = await start(3, settings=with_keys(SID), refresh_s=100)
    await learn_at(proxy, proxy.upstreams[0])
    assert (await visit(proxy, "/?sid=one", cookie=cookie_for("app-2", 200)))[1].cookie == ""
    _, response = await visit(proxy, "/", cookie=cookie_for("app-2", 200))
    assert (await visit(proxy, "/", cookie=response.cookie))[0] == "app-2"


async def test_a_cookie_that_agrees_is_no_conflict(start: Start) -> None:
    proxy = await start(3, settings=with_keys(SID))
    await learn_at(proxy, proxy.upstreams[1])
    where, response = await visit(proxy, "/?sid=one", cookie=cookie_for("app-2"))
    assert (where, response.cookie, conflicts(proxy)) == ("app-2", "", 0)
    assert len(proxy.sessions) == 1, "it is the session of the token"


async def test_who_has_only_the_key_gets_a_cookie_that_leads_to_the_same_place(start: Start) -> None:
    proxy = await start(3, settings=with_keys(SID))
    home = await learn(proxy)
    where, response = await visit(proxy, "/?sid=one")
    assert where == home
    assert response.cookie
    for _ in range(4):
        assert (await visit(proxy, "/", cookie=response.cookie))[0] == home


async def test_it_is_known_before_the_client_has_the_response(start: Start) -> None:
    """A client that answers at once, over another connection, while the response is still on its way."""
    proxy = await start(3, settings=with_keys(SID))
    client = await proxy.client()
    upstream, app, _ = await reached(proxy, client, request("GET /new"))
    seen: list[bytes | None] = []
    client.on_data = lambda _: seen.append(found(proxy, SID, b"one"))
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await client.read_message()
    app.send(b'd\r\n{"sid":"one"}\r\n')
    assert await client.read_chunk() == b'{"sid":"one"}'
    assert seen[-1] == upstream_digest(upstream.id)
    assert (await visit(proxy, "/?sid=one"))[0] == upstream.id
    app.send(b"0\r\n\r\n")
    assert await client.read_chunk() == b""


async def test_a_body_in_pieces_passes_as_it_came(start: Start) -> None:
    proxy = await start(2, settings=with_keys(SID))
    client = await proxy.client()
    upstream, app, _ = await reached(proxy, client, request("GET /new"))
    body = b'{"a": 1, "sid" : "one", "z": "' + b"z" * 10_000 + b'"}'
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
    await client.read_message()
    for at in range(20):
        app.send(body[at : at + 1])
        assert await client.read(1) == body[at : at + 1], "nothing is held back"
    app.send(body[20:])
    assert await client.read(len(body) - 20) == body[20:]
    assert (await visit(proxy, "/?sid=one"))[0] == upstream.id


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "500 Internal Server Error"])
async def test_a_refusal_teaches_nothing(start: Start, status: str) -> None:
    proxy = await start(2, settings=with_keys(SID))
    client = await proxy.client()
    _, app, _ = await reached(proxy, client, request("GET /new"))
    app.answer(b'{"sid":"two"}', "X-Sid: one", status=status)
    await client.read_response()
    assert (found(proxy, SID, b"one"), found(proxy, SID, b"two")) == (None, None)


async def test_a_key_that_another_app_makes_again_leads_there_from_then_on(start: Start) -> None:
    proxy = await start(2, settings=with_keys(SID))
    await learn_at(proxy, proxy.upstreams[0])
    await learn_at(proxy, proxy.upstreams[1])
    assert (await visit(proxy, "/?sid=one"))[0] == "app-2"


async def test_it_is_forgotten_after_its_time(start: Start) -> None:
    proxy = await start(2, settings=with_keys(replace(SID, idle_s=100.0)))
    home = await learn(proxy)
    plane = proxy.plane
    read_clocks = plane._read_clocks
    late_s = 90.0

    def read_late() -> None:
        read_clocks()
        plane.now += late_s

    plane._read_clocks = read_late  # type: ignore[method-assign]
    read_late()
    assert (await visit(proxy, "/?sid=one"))[0] == home
    late_s = 180.0  # not so long after its last use
    read_late()
    assert found(proxy, SID, b"one") == upstream_digest(home)
    late_s = 400.0
    read_late()
    await visit(proxy, "/?sid=one")
    assert proxy.records[-1].affinity == "new"


@pytest.mark.parametrize("health", [Health.UNHEALTHY, Health.HEALTHY])
async def test_its_upstream_may_drain_or_be_unhealthy(start: Start, health: Health) -> None:
    proxy = await start(3, settings=with_keys(replace(SID, gone=GONE)))
    home = next(one for one in proxy.upstreams if one.id == "app-2")
    await learn_at(proxy, home)
    proxy.set_health(home, health)
    proxy.set_admin(home, AdminState.DRAIN)
    for _ in range(4):
        assert (await visit(proxy, "/?sid=one"))[0] == "app-2"


# Hashed


async def test_parallel_first_requests_meet(start: Start) -> None:
    """None of them is answered before all have come: nothing was learned that could help, and no cookie was set."""
    proxy = await start(4, settings=with_keys(HASH))
    clients = [await proxy.client() for _ in range(10)]
    for number, client in enumerate(clients):
        client.send(request(f"GET /of/{'mine'}?n={number}"))
    await eventually(lambda: sum(len(one.links) for one in proxy.upstreams) == 10, "all have come")
    (home,) = (one for one in proxy.upstreams if one.links)
    for link in home.links:
        await link.read_request()
        link.answer()
    for client in clients:
        await client.read_response()
    assert proxy.plane.counters.affinity == {"hashed": 10}
    assert len(home.links) == 10


async def test_control_without_the_key_parallel_first_requests_are_spread(start: Start) -> None:
    proxy = await start(4)
    clients = [await proxy.client() for _ in range(8)]
    for client in clients:
        client.send(request("GET /of/mine"))
    await eventually(lambda: sum(len(one.links) for one in proxy.upstreams) == 8, "all have come")
    assert sorted(len(one.links) for one in proxy.upstreams) == [2] * 4


async def places(proxy: PlaneUnderTest, count: int = 12) -> dict[str, str]:
    return {name: (await visit(proxy, f"/?hash={name}"))[0] for name in map(str, range(count))}


@pytest.mark.parametrize("change", ["added", "drained", "unhealthy", "maint and back"])
async def test_a_change_of_the_upstreams_moves_nobody(start: Start, change: str) -> None:
    proxy = await start(3, settings=with_keys(HASH, cookie=None))
    before = await places(proxy)
    assert len(set(before.values())) > 1
    if change == "added":
        other = await RawUpstream("app-4").start()
        proxy.upstreams = (*proxy.upstreams, other)
        proxy.all_upstreams = proxy.upstreams
        proxy.admin[other.id], proxy.observed[other.id] = AdminState.READY, proxy.observed["app-1"]
        proxy.publish()
    elif change == "drained":
        proxy.set_admin(proxy.upstreams[0], AdminState.DRAIN)
    elif change == "unhealthy":
        proxy.set_health(proxy.upstreams[0], Health.UNHEALTHY)
    else:
        proxy.set_admin(proxy.upstreams[0], AdminState.MAINT)
        proxy.set_admin(proxy.upstreams[0], AdminState.READY)
    assert await places(proxy) == before
    assert proxy.records[-1].affinity == "hashed"


async def test_control_what_is_not_remembered_moves_with_an_upstream_that_drains(start: Start) -> None:
    proxy = await start(3, settings=with_keys(HASH, cookie=None))
    before = await places(proxy)
    for name in before:
        proxy.plane.keys.forget(b"hash\0" + name.encode())
    proxy.set_admin(proxy.upstreams[0], AdminState.DRAIN)
    after = await places(proxy)
    assert after != before
    assert "app-1" not in after.values()


async def test_the_cookie_comes_before_it_and_it_then_leads_there_too(start: Start) -> None:
    proxy = await start(4, settings=with_keys(HASH))
    for home in ("app-1", "app-2", "app-3", "app-4"):
        where, response = await visit(proxy, f"/?hash={home}", cookie=cookie_for(home))
        assert (where, response.cookie) == (home, "")
        assert proxy.records[-1].affinity == "hit"
        assert (await visit(proxy, f"/?hash={home}"))[0] == home
    assert conflicts(proxy) == 0
    where, _ = await visit(proxy, "/?hash=app-1", cookie=cookie_for("app-2"))
    assert (where, conflicts(proxy)) == ("app-2", 1)


async def test_two_workers_with_one_table_agree_and_two_proxies_without_one_agree_on_what_is_new(start: Start) -> None:
    settings = with_keys(SID, HASH, cookie=None)
    first = await start(4, settings=settings)
    worker = await start(first.upstreams, settings=settings)
    stranger = await start(first.upstreams, settings=settings)
    worker.plane.keys = first.plane.keys
    assert await places(first) == await places(stranger), "nothing but the id leads there"
    first.set_admin(first.upstreams[0], AdminState.DRAIN)
    drained = await places(first, 24)
    worker.set_admin(worker.upstreams[1], AdminState.DRAIN)
    assert await places(worker, 24) == drained
    home = await learn(first)
    for _ in range(4):
        assert (await visit(worker, "/?sid=one"))[0] == home
    assert worker.records[-1].affinity == "learned"
    assert found(stranger, SID, b"one") is None


async def test_first_requests_meet_even_when_their_upstream_has_just_died(start: Start) -> None:
    """The first has found it dead while the second comes: that finds the key, tries in vain, and goes where it went."""
    settings = with_keys(HASH, cookie=None)
    rules = Rules(is_shared=True, has_cookie=False)
    first = await start(4, settings=settings, rules=rules)
    for number in range(8):
        other = await start(first.upstreams, settings=settings, rules=rules)
        home = (await visit(first, f"/?hash=n{number}"))[0]
        other.plane.keys = KeyTable.create(100)
        dead = next(one for one in first.upstreams if one.id == home)
        other.set_health(dead, Health.HEALTHY, is_refused=True)
        anew, _ = await visit(other, f"/?hash=n{number}")  # as new
        assert anew != home
        first.set_health(dead, Health.HEALTHY, is_refused=True)
        assert (await visit(first, f"/?hash=n{number}"))[0] == anew, "as moved"
        first.set_health(dead, Health.HEALTHY)
        other.plane.keys.close()


# Several keys


async def test_learned_comes_before_cookie_before_hashed(start: Start) -> None:
    proxy = await start(3, settings=with_keys(HASH, SID))
    await learn_at(proxy, proxy.upstreams[0])
    assert (await visit(proxy, "/?hash=h", cookie=cookie_for("app-2")))[0] == "app-2"
    assert (await visit(proxy, "/?hash=h"))[0] == "app-2"
    assert conflicts(proxy) == 0
    where, _ = await visit(proxy, "/?hash=h&sid=one", cookie=cookie_for("app-3"))
    assert (where, conflicts(proxy)) == ("app-1", 2), "the token and the hashed key lead elsewhere"
    where, _ = await visit(proxy, "/?hash=h&sid=one")
    assert (where, conflicts(proxy)) == ("app-1", 3)
    assert (await visit(proxy, "/?hash=h"))[0] == "app-2", "it leads where it led"


async def test_a_new_hashed_key_goes_with_the_learned_one(start: Start) -> None:
    proxy = await start(3, settings=with_keys(HASH, SID))
    await learn_at(proxy, proxy.upstreams[2])
    for number in range(6):
        assert (await visit(proxy, f"/?hash={number}&sid=one"))[0] == "app-3"
        assert (await visit(proxy, f"/?hash={number}"))[0] == "app-3"


async def test_of_two_hashed_keys_the_one_that_is_known_leads(start: Start) -> None:
    first, second = replace(HASH, name="first", queries=("first",)), replace(HASH, name="second", queries=("second",))
    proxy = await start(4, settings=with_keys(first, second, cookie=None))
    for number in range(6):
        home, _ = await visit(proxy, f"/?second=a{number}")
        assert (await visit(proxy, f"/?first=b{number}&second=a{number}"))[0] == home
        assert (await visit(proxy, f"/?first=b{number}"))[0] == home
    assert conflicts(proxy) == 0


async def test_the_same_value_of_two_keys_is_not_the_same(start: Start) -> None:
    other = replace(
        SID, name="other", queries=("other",), headers=(), cookies=(), lessons=(Lesson("header", name="X-Other"),)
    )
    proxy = await start(2, settings=with_keys(SID, other))
    await visit(proxy, "/", cookie=cookie_for("app-1"), answer=(b"", "X-Sid: one"))
    await visit(proxy, "/", cookie=cookie_for("app-2"), answer=(b"", "X-Other: one"))
    assert (await visit(proxy, "/?sid=one"))[0] == "app-1"
    assert (await visit(proxy, "/?other=one"))[0] == "app-2"


async def test_a_learned_key_in_the_body_wins_over_a_hashed_one_in_the_head(start: Start) -> None:
    event = Key("event", "learn", members=("event_id",), on=(b"/poll",), lessons=(Lesson("header", name="X-Event"),))
    proxy = await start(3, settings=with_keys(HASH, event))
    await visit(proxy, "/?hash=h", cookie=cookie_for("app-1"))
    await visit(proxy, "/", cookie=cookie_for("app-2"), answer=(b"", "X-Event: e"))
    where, _ = await visit(proxy, "/poll?hash=h", body=b'{"event_id":"e"}')
    assert where == "app-2"
    assert proxy.records[-1].affinity == "learned"
    assert conflicts(proxy) == 1


# Gone


async def end_upstream(proxy: PlaneUnderTest, upstream: RawUpstream, how: str) -> None:
    if how == "refused":
        await upstream.stop()
        for link in upstream.links:
            link.close()
        await eventually(lambda: not proxy.pool(upstream).idle, "no connection is left")
    elif how == "known as refused":
        await end_upstream(proxy, upstream, "refused")
        proxy.set_health(upstream, Health.UNHEALTHY, is_refused=True)
    elif how == "removed":
        proxy.remove(upstream)
    else:
        proxy.set_admin(upstream, AdminState.MAINT)


ENDS: Final = ["refused", "known as refused", "removed", "maint"]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("rules", get_args(OnUnavailable))
async def test_what_is_about_a_lost_session_is_answered_at_once(start: Start, how: str, rules: OnUnavailable) -> None:
    proxy = await start(
        3, settings=with_keys(replace(SID, gone=GONE)), rules=Rules(on_unavailable=rules, wait_s=1000.0)
    )
    await learn_at(proxy, proxy.upstreams[1])
    await end_upstream(proxy, proxy.all_upstreams[1], how)
    client = await proxy.client()
    for cookie in ("", f"Cookie: {cookie_for('app-1')}"):
        client.send(request("GET /?sid=one", *([cookie] if cookie else [])))
        response = await client.read_response()
        assert (response.status, response.body) == (400, GONE.body.encode())
        assert response["Content-Type"] == "application/json"
        assert response.cookie == ""
        assert proxy.records[-1].affinity == "gone"
    assert proxy.plane.counters.affinity["gone"] == 2
    assert [one.all_bytes for one in proxy.all_upstreams] == [b"", b"", b""], "it was sent to nobody"
    await visit(proxy, "/", client=client)  # the connection goes on
    assert proxy.plane.counters.breaks == {}


async def test_a_request_with_a_body_is_answered_too(start: Start) -> None:
    proxy = await start(2, settings=with_keys(replace(SID, gone=GONE)))
    await learn_at(proxy, proxy.upstreams[0])
    proxy.set_admin(proxy.upstreams[0], AdminState.MAINT)
    client = await proxy.client()
    client.send(request("POST /?sid=one", body=b"2probe"))
    assert (await client.read_response()).body == GONE.body.encode()
    assert proxy.upstreams[1].all_bytes == b""


@pytest.mark.parametrize("how", ENDS)
async def test_without_an_answer_the_client_is_placed_anew_and_stays_there(start: Start, how: str) -> None:
    proxy = await start(4, settings=with_keys(SID, cookie=None), rules=Rules(has_cookie=False))
    await visit(proxy, "/?sid=none")
    home = await learn(proxy)
    await end_upstream(proxy, next(one for one in proxy.upstreams if one.id == home), how)
    moved, _ = await visit(proxy, "/?sid=one")
    assert moved != home
    assert proxy.records[-1].affinity == "redispatched"
    for _ in range(5):
        assert (await visit(proxy, "/?sid=one"))[0] == moved
        assert proxy.records[-1].affinity == "learned"
    assert sum(proxy.plane.counters.breaks.values()) == 1


async def test_an_upstream_that_is_back_gets_what_was_about_it(start: Start) -> None:
    """As far as anybody can tell: it says itself that it knows nothing of it."""
    proxy = await start(2, settings=with_keys(replace(SID, gone=GONE)))
    await learn_at(proxy, proxy.upstreams[0])
    proxy.set_health(proxy.upstreams[0], Health.UNHEALTHY, is_refused=True)
    client = await proxy.client()
    client.send(request("GET /?sid=one"))
    assert (await client.read_response()).status == 400
    proxy.set_health(proxy.upstreams[0], Health.HEALTHY)
    assert (await visit(proxy, "/?sid=one"))[0] == "app-1"


async def test_a_hashed_key_of_a_lost_upstream_is_answered_where_it_says_so(start: Start) -> None:
    proxy = await start(2, settings=with_keys(replace(HASH, gone=GONE)))
    home, _ = await visit(proxy, "/?hash=h")
    proxy.set_admin(next(one for one in proxy.upstreams if one.id == home), AdminState.MAINT)
    client = await proxy.client()
    client.send(request("GET /?hash=h"))
    assert (await client.read_response()).status == 400
    assert (await visit(proxy, "/?hash=other"))[0] != home


# A member of the body


async def send_body(proxy: PlaneUnderTest, data: bytes, *, pieces: int = 0) -> tuple[str, Message]:
    """Send a request, in pieces if so; return where it went and what came there."""
    client = await proxy.client()
    if pieces:
        step = len(data) // pieces + 1
        for at in range(0, len(data) - step, step):
            client.send(data[at : at + step])
            await client.flush()
            await asyncio.sleep(0.001)
        assert [one.all_bytes for one in proxy.upstreams] == [b""] * len(proxy.upstreams), (
            "it is held until it is whole"
        )
        data = data[(len(data) - 1) // step * step :]
    upstream, app, got = await reached(proxy, client, data)
    app.answer()
    await client.read_response()
    return upstream.id, got


def chunked(body: bytes, step: int = 7, end: bytes = b"0\r\n\r\n") -> bytes:
    parts = [body[at : at + step] for at in range(0, len(body), step)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


JOIN: Final = b'{"data": ["x"], "session_hash": "%b", "fn": 1}'


def join(value: str, how: str) -> tuple[bytes, bytes]:
    body = JOIN % value.encode()
    if how.startswith("chunked"):
        end = b"0\r\nX-Sum: 1\r\n\r\n" if how == "chunked with trailers" else b"0\r\n\r\n"
        return request("POST /join", "Transfer-Encoding: chunked") + chunked(body, end=end), body
    return request("POST /join", body=body), body


@pytest.mark.parametrize("pieces", [0, 9])
@pytest.mark.parametrize("how", ["length", "chunked", "chunked with trailers"])
async def test_a_member_of_the_body_leads_and_the_body_arrives_as_it_was(start: Start, how: str, pieces: int) -> None:
    proxy = await start(4, settings=with_keys(MEMBER, replace(HASH, name="member"), cookie=None))
    for number in range(8):
        data, body = join(f"v{number}", how)
        where, got = await send_body(proxy, data, pieces=pieces)
        assert got.body == body
        assert where == (await visit(proxy, f"/?hash=v{number}"))[0], "the same key as one in the query"
    assert proxy.plane.counters.affinity == {"hashed": 16}


async def test_a_body_on_another_path_is_not_held(start: Start) -> None:
    proxy = await start(2, settings=with_keys(MEMBER))
    client = await proxy.client()
    client.send(request("POST /other", "Content-Length: 100") + b"{")
    await eventually(lambda: any(one.all_bytes for one in proxy.upstreams), "it is sent on at once")


async def test_for_who_has_a_cookie_the_body_is_not_held_for_a_hashed_key(start: Start) -> None:
    proxy = await start(2, settings=with_keys(MEMBER))
    client = await proxy.client()
    client.send(request("POST /join", "Content-Length: 100", f"Cookie: {cookie_for('app-2')}") + b"{")
    await eventually(lambda: proxy.upstreams[1].all_bytes.endswith(b"{"), "it is sent on at once")


async def test_a_learned_member_is_looked_for_even_then(start: Start) -> None:
    event = Key("event", "learn", members=("event_id",), on=(b"/poll",), lessons=(Lesson("header", name="X-Event"),))
    proxy = await start(3, settings=with_keys(event))
    await visit(proxy, "/", cookie=cookie_for("app-2"), answer=(b"", "X-Event: e"))
    where, response = await visit(proxy, "/poll", cookie=cookie_for("app-1"), body=b'{"event_id": "e"}')
    assert (where, response.cookie, conflicts(proxy)) == ("app-2", "", 1)


@pytest.mark.parametrize("how", ["length", "chunked"])
async def test_a_large_body_goes_on_without(start: Start, how: str) -> None:
    proxy = await start(3, settings=with_keys(MEMBER, cookie=None))
    size = 3 << 20
    body = JOIN % b"large" + b" " * size
    if how == "length":
        data = request("POST /join", body=body)
    else:
        data = request("POST /join", "Transfer-Encoding: chunked") + chunked(body, 60_000)
    where, got = await send_body(proxy, data)
    assert got.body == body
    assert proxy.records[-1].affinity == "new"
    assert proxy.records[-1].received_bytes == len(body)
    assert where


async def test_a_large_body_is_not_waited_for(start: Start) -> None:
    proxy = await start(2, settings=with_keys(MEMBER))
    client = await proxy.client()
    client.send(request("POST /join", f"Content-Length: {2 << 20}") + b"{")
    await eventually(lambda: any(one.all_bytes for one in proxy.upstreams), "it is sent on at once")


async def test_who_waits_to_be_asked_for_the_body_is_asked(start: Start) -> None:
    proxy = await start(2, settings=with_keys(MEMBER))
    client = await proxy.client()
    body = JOIN % b"one"
    client.send(request("POST /join", "Expect: 100-continue", f"Content-Length: {len(body)}"))
    await eventually(lambda: any(one.all_bytes for one in proxy.upstreams), "the head is sent on")
    link = next(link for one in proxy.upstreams for link in one.links)
    await link.read_message()
    link.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert (await client.read_message()).status == 100
    client.send(body)
    assert await link.read(len(body)) == body
    link.answer()
    assert (await client.read_response()).status == 200


@pytest.mark.parametrize("is_reset", [True, False])
async def test_a_client_may_go_away_in_the_middle_of_a_held_body(start: Start, *, is_reset: bool) -> None:
    proxy = await start(2, settings=with_keys(MEMBER))
    client = await proxy.client()
    client.send(request("POST /join", "Content-Length: 100") + b"{")
    await eventually(lambda: any(one.exchange for one in proxy.plane.downstreams), "it has begun")
    client.reset() if is_reset else client.half_close()
    assert (await proxy.recorded()).status == 499
    assert [one.links for one in proxy.upstreams] == [[], []]


async def test_a_held_body_that_does_not_come_is_given_up(start: Start) -> None:
    proxy = await start(2, settings=with_keys(MEMBER), body_idle_s=0.3)
    client = await proxy.client()
    client.send(request("POST /join", "Content-Length: 100") + b"{")
    assert (await client.read_response()).status == 408
    await client.read_rest()
    assert [one.links for one in proxy.upstreams] == [[], []]


@pytest.mark.parametrize("how", ["length", "chunked"])
async def test_the_next_request_may_stand_behind_a_held_body(start: Start, how: str) -> None:
    """And what stands in that is not taken for what stands in this one."""
    proxy = await start(4, settings=with_keys(MEMBER, replace(HASH, name="member"), cookie=None))
    for number in range(6):
        first, body = join(f"a{number}", how)
        second, other = join(f"b{number}", how)
        client = await proxy.client()
        upstream, app, got = await reached(proxy, client, first + second)
        assert got.body == body
        before = {one: sum(link.received_bytes for link in one.links) for one in proxy.upstreams}
        app.answer(b"1")
        assert (await client.read_response()).body == b"1"

        def where(before: dict[RawUpstream, int] = before) -> list[RawUpstream]:
            return [one for one in proxy.upstreams if sum(link.received_bytes for link in one.links) > before[one]]

        await eventually(where, "the second arrives")
        (next_,) = where()
        link = next(link for link in next_.links if link.held)
        assert (await link.read_request()).body == other
        link.answer(b"2")
        assert (await client.read_response()).body == b"2"
        assert upstream.id == (await visit(proxy, f"/?hash=a{number}"))[0]
        assert next_.id == (await visit(proxy, f"/?hash=b{number}"))[0]


@pytest.mark.parametrize("how", ["length", "chunked"])
async def test_a_held_body_may_be_too_large(start: Start, how: str) -> None:
    proxy = await start(2, settings=replace(with_keys(MEMBER), body_bytes=100))
    client = await proxy.client()
    body = b"x" * 101
    if how == "length":
        client.send(request("POST /join", body=body))
    else:
        client.send(request("POST /join", "Transfer-Encoding: chunked") + chunked(body, end=b""))
    assert (await client.read_response()).status == 413
    assert [one.links for one in proxy.upstreams] == [[], []]


async def test_a_held_body_with_broken_framing_is_refused_at_once(start: Start) -> None:
    proxy = await start(2, settings=with_keys(MEMBER))
    client = await proxy.client()
    client.send(request("POST /join", "Transfer-Encoding: chunked") + b"xyz\r\n")
    assert (await client.read_response()).status == 400
    assert [one.links for one in proxy.upstreams] == [[], []]


async def test_a_body_with_bytes_of_the_framing_in_it_is_held_to_its_end(start: Start) -> None:
    proxy = await start(4, settings=with_keys(MEMBER, replace(HASH, name="member"), cookie=None))
    client = await proxy.client()
    start_ = b'{"text": "0\r\n\r\n'
    client.send(request("POST /join", "Transfer-Encoding: chunked") + b"%x\r\n%b" % (len(start_) + 30, start_))
    await client.flush()
    await eventually(lambda: any(one.exchange for one in proxy.plane.downstreams), "it has come")
    rest = b'", "session_hash": "mine"}'.ljust(30)
    upstream, app, got = await reached(proxy, client, rest + b"\r\n0\r\n\r\n")
    assert got.body == start_ + rest
    app.answer()
    await client.read_response()
    assert (await visit(proxy, "/?hash=mine"))[0] == upstream.id


# Bad input


@pytest.mark.parametrize(
    "value",
    ["x" * 10_240, "", "%", "%zz", "%00%01%0d%0a", "%ff%fe", "a%20b", "../..", "'\"", "%25", "x" * 1024],
    ids=lambda value: value[:12] or "empty",
)
async def test_a_key_of_any_shape_is_a_hash_or_a_miss_and_never_an_error(start: Start, value: str) -> None:
    proxy = await start(3, settings=with_keys(SID, HASH, replace(MEMBER, on=())))
    for target in (f"/?sid={value}", f"/?hash={value}", f"/of/{value}", f"/?hash={value}&sid=1&hash=1"):
        _, response = await visit(proxy, target)
        assert response.status == 200
    for field in (f"X-Sid: {value}", f"Cookie: sid={value}", f"Cookie: {value}; sid={value}"):
        _, response = await visit(proxy, "/", field)
        assert response.status == 200
    for body in (JOIN % value.encode(), b'{"session_hash": "\x00\x01"}', b'{"session_hash": 5}', b"\xff" * 50, b"{"):
        _, response = await visit(proxy, "/join", body=body)
        assert response.status == 200


async def test_what_nobody_has_made_is_placed_as_if_it_were_not_there(start: Start) -> None:
    proxy = await start(3, settings=with_keys(replace(SID, gone=GONE)))
    for number in range(6):
        where, response = await visit(proxy, f"/?sid=forged-{number}")
        assert response.cookie
        assert proxy.records[-1].affinity == "new"
        again, _ = await visit(proxy, f"/?sid=forged-{number}", cookie=response.cookie)
        assert (again, proxy.records[-1].affinity) == (where, "hit")
    assert proxy.plane.keys.learned == 0, "a guess is not remembered"


async def test_many_different_keys_stay_within_the_bound(start: Start) -> None:
    proxy = await start(2, settings=with_keys(HASH, cookie=None))
    table = proxy.plane.keys = KeyTable.create(64)
    client = await proxy.client()
    for number in range(300):
        await visit(proxy, f"/?hash={number}", client=client)
    assert 64 <= table.count(proxy.plane.now) <= 64 * 2
    assert table.evicted > 100
    assert table.evicted + table.count(proxy.plane.now) == table.learned == 300
    plane = proxy.plane
    plane._show()
    assert plane.counters.cells[KEYS_LEARNED] == table.learned
    assert plane.counters.cells[KEYS_EVICTED] == table.evicted
    assert len(proxy.sessions._active) <= 300
    table.close()


# Stickyproxy-Pin


@pytest.mark.parametrize("written", ["release", "Release"])
async def test_an_app_can_release_a_client(start: Start, written: str) -> None:
    proxy = await start(2)
    _, first = await visit(proxy)
    for _ in range(2):
        await visit(proxy, "/", cookie=first.cookie)
    assert len(proxy.sessions) == 1
    _, response = await visit(proxy, "/logout", cookie=first.cookie, answer=(b"bye", f"Stickyproxy-Pin: {written}"))
    assert response["Set-Cookie"].startswith("stickyproxy=; Path=/; Max-Age=0")
    assert "Stickyproxy-Pin" not in response
    assert response.body == b"bye"
    await eventually(lambda: len(proxy.sessions) == 0, "the session has ended")
    assert proxy.plane.counters.breaks == {"released": 1}
    _, anew = await visit(proxy)
    assert anew.cookie
    assert proxy.records[-1].affinity == "new"


async def test_only_a_client_that_has_a_cookie_is_told_to_drop_it(start: Start) -> None:
    proxy = await start(2)
    _, response = await visit(proxy, "/logout", answer=(b"", "Stickyproxy-Pin: release"))
    assert response.all("set-cookie") == []
    assert "Stickyproxy-Pin" not in response


async def test_a_release_lets_the_key_go_as_well(start: Start) -> None:
    proxy = await start(3, settings=with_keys(SID, HASH, cookie=None), rules=Rules(has_cookie=False))
    await learn(proxy)
    await visit(proxy, "/?sid=one", answer=(b"", "Stickyproxy-Pin: release"))
    assert found(proxy, SID, b"one") is None
    await visit(proxy, "/?sid=one")
    assert proxy.records[-1].affinity == "unpinned"


async def test_a_session_of_which_more_is_open_is_not_ended(start: Start) -> None:
    proxy = await start(2)
    _, first = await visit(proxy)
    await visit(proxy, cookie=first.cookie)
    slow = await proxy.client()
    _, app, _ = await reached(proxy, slow, request("GET /slow", f"Cookie: {first.cookie}"))
    await visit(proxy, "/logout", cookie=first.cookie, answer=(b"", "Stickyproxy-Pin: release"))
    assert len(proxy.sessions) == 1
    app.answer()
    await slow.read_response()


async def test_an_app_can_move_a_client(start: Start) -> None:
    proxy = await start(3, settings=with_keys(SID))
    await learn_at(proxy, proxy.upstreams[0])
    cookie = cookie_for("app-1")
    _, response = await visit(proxy, "/?sid=one", cookie=cookie, answer=(b"", "Stickyproxy-Pin: app-3"))
    assert "Stickyproxy-Pin" not in response
    assert response.cookie
    assert proxy.plane.counters.breaks == {"moved": 1}
    assert (await visit(proxy, "/", cookie=response.cookie))[0] == "app-3"
    assert (await visit(proxy, "/?sid=one"))[0] == "app-3"
    where, again = await visit(proxy, "/", cookie=cookie)  # sent before the response had come
    assert (where, bool(again.cookie)) == ("app-3", True)


async def test_a_new_client_can_be_moved_with_its_first_response(start: Start) -> None:
    proxy = await start(2)
    client = await proxy.client()
    upstream, app, _ = await reached(proxy, client, request("GET /login"))
    other = "app-1" if upstream.id == "app-2" else "app-2"
    app.answer(b"", f"Stickyproxy-Pin: {other}")
    response = await client.read_response()
    assert (await visit(proxy, "/", cookie=response.cookie))[0] == other


@pytest.mark.parametrize("order", ["app-9", "", "release-me", "x" * 5000, "app-2", "app-3", "app-1"])
async def test_an_order_that_cannot_be_followed_changes_nothing(
    start: Start, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start(3)
    proxy.set_admin(proxy.upstreams[1], AdminState.MAINT)
    proxy.set_health(proxy.upstreams[2], Health.UNHEALTHY, is_refused=True)
    _, response = await visit(proxy, "/", cookie=cookie_for("app-1"), answer=(b"", f"Stickyproxy-Pin: {order}"))
    assert response.all("set-cookie") == []
    assert "Stickyproxy-Pin" not in response
    assert proxy.plane.counters.breaks == {}
    assert ("which is no upstream that can take it" in caplog.text) is (order != "app-1")
    assert len(caplog.text) < 1000
    assert (await visit(proxy, "/", cookie=cookie_for("app-1")))[0] == "app-1"


async def test_without_pins_an_order_is_only_taken_off(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    proxy = await start(2, settings=with_keys(cookie=None), rules=Rules(has_cookie=False))
    _, response = await visit(proxy, "/", answer=(b"", "Stickyproxy-Pin: app-2"))
    assert "Stickyproxy-Pin" not in response
    assert "and the client has none" in caplog.text


async def test_a_client_cannot_give_orders(start: Start) -> None:
    proxy = await start(2)
    client = await proxy.client()
    _, app, got = await reached(
        proxy,
        client,
        request("GET /", "Stickyproxy-Pin: release", "stickyproxy_pin: app-2", f"Cookie: {cookie_for('app-1')}"),
    )
    assert b"pin" not in got.head.lower()
    app.answer()
    response = await client.read_response()
    assert response.all("set-cookie") == []
    assert proxy.plane.counters.breaks == {}


@pytest.mark.parametrize("order", ["release", "app-2"])
async def test_an_order_may_stand_on_a_101(start: Start, order: str) -> None:
    proxy = await start(2)
    client = await proxy.client()
    data = HANDSHAKE.replace(b"\r\n\r\n", f"\r\nCookie: {cookie_for('app-1')}\r\n\r\n".encode())
    upstream, app, _ = await reached(proxy, client, data)
    assert upstream.id == "app-1"
    app.send(ACCEPT[:-2] + f"Stickyproxy-Pin: {order}\r\n\r\n".encode())
    response = await client.read_message()
    assert response.status == 101
    assert "Stickyproxy-Pin" not in response
    if order == "release":
        assert "Max-Age=0" in response["Set-Cookie"]
    else:
        assert (await visit(proxy, "/", cookie=response.cookie))[0] == "app-2"
    assert sum(proxy.plane.counters.breaks.values()) == 1
    app.send(frame(b"still here"))
    assert await client.read(12) == frame(b"still here")


# Tunnels


def tells(origin: str) -> Key:
    return replace(SID, lessons=(Lesson(origin, pattern=member_pattern("sid"), on=(b"/ws",)),))  # type: ignore[arg-type]


def ends_of(origin: str, client: RawLink, app: RawLink) -> tuple[RawLink, RawLink, bool]:
    """Return who speaks and who hears, and whether what is said is masked."""
    return (client, app, True) if origin == "client_messages" else (app, client, False)


ORIGINS: Final = ["upstream_messages", "client_messages"]


async def open_tunnel(
    proxy: PlaneUnderTest, *, early: bytes = b"", early_app: bytes = b""
) -> tuple[str, RawLink, RawLink]:
    client = await proxy.client()
    upstream, app, _ = await reached(proxy, client, HANDSHAKE + early)
    app.send(ACCEPT + early_app)
    assert (await client.read_message()).status == 101
    return upstream.id, client, app


def is_plain(proxy: PlaneUnderTest) -> bool:
    return all(side.transport.get_protocol() is side for side in the_tunnel(proxy).sides)


@pytest.mark.parametrize("origin", ORIGINS)
async def test_the_first_message_of_a_tunnel_tells_the_key(start: Start, origin: str) -> None:
    proxy = await start(3, settings=with_keys(tells(origin)))
    home, client, app = await open_tunnel(proxy)
    speaker, hearer, is_masked = ends_of(origin, client, app)
    assert not is_plain(proxy)
    data = frame(b'{"type":"hello","sid":"one"}', is_masked=is_masked)
    known: list[bytes | None] = []
    hearer.on_data = lambda _: known.append(found(proxy, SID, b"one"))
    for at in range(len(data)):
        speaker.send(data[at : at + 1])
        assert await hearer.read(1) == data[at : at + 1], "nothing is held back"
    assert known[-1] == upstream_digest(home)
    assert is_plain(proxy)
    for _ in range(3):
        assert (await visit(proxy, "/?sid=one"))[0] == home
    speaker.send(data * 2)
    assert await hearer.read(2 * len(data)) == data * 2
    hearer.send(frame(b"back", is_masked=not is_masked))
    await speaker.read(6)


@pytest.mark.parametrize("origin", ORIGINS)
async def test_a_message_that_comes_with_the_handshake_tells_it_too(start: Start, origin: str) -> None:
    proxy = await start(3, settings=with_keys(tells(origin)))
    is_masked = origin == "client_messages"
    data = frame(b'{"sid":"one"}', is_masked=is_masked)
    if is_masked:
        home, client, app = await open_tunnel(proxy, early=data)
        assert await app.read(len(data)) == data
    else:
        home, client, app = await open_tunnel(proxy, early_app=data)
        assert await client.read(len(data)) == data
    assert is_plain(proxy)
    assert (await visit(proxy, "/?sid=one"))[0] == home


async def test_a_tunnel_that_nobody_is_to_learn_from_is_left_alone(start: Start) -> None:
    key = replace(SID, lessons=(Lesson("upstream_messages", pattern=member_pattern("sid"), on=(b"/other",)),))
    proxy = await start(settings=with_keys(key))
    await open_tunnel(proxy)
    assert is_plain(proxy)


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("cut", [1, 9])
async def test_a_tunnel_may_move_while_it_is_overheard(start: Start, origin: str, cut: int) -> None:
    pair = await start_pair(start, settings=with_keys(tells(origin)))
    _, client, app = await open_tunnel(pair.old)
    speaker, hearer, is_masked = ends_of(origin, client, app)
    data = frame(b'{"sid":"one"}', is_masked=is_masked)
    speaker.send(data[:cut])
    assert await hearer.read(cut) == data[:cut]
    await pair.move()
    assert pair.mover.moved == {"tunnel": 1}
    speaker.send(data[cut:])
    assert await hearer.read(len(data) - cut) == data[cut:]
    hearer.send(frame(b"back", is_masked=not is_masked))
    assert len(await speaker.read(6 + 4 * (not is_masked))) == 6 + 4 * (not is_masked)
    assert is_plain(pair.new)


@pytest.mark.parametrize("origin", ORIGINS)
async def test_a_tunnel_that_is_overheard_ends_as_any_other(start: Start, origin: str) -> None:
    proxy = await start(settings=with_keys(tells(origin)))
    _, client, app = await open_tunnel(proxy)
    speaker, hearer, is_masked = ends_of(origin, client, app)
    data = frame(b'{"si', is_masked=is_masked)
    speaker.send(data[:3])
    await hearer.read(3)
    the_tunnel(proxy).shut()  # in the middle of a frame
    speaker.send(data[3:])
    assert await hearer.read(len(data) - 3) == data[3:]
    assert (await hearer.read(1))[0] == 0x88
    client.close()
    app.close()
    await eventually(lambda: not proxy.plane.tunnels, "it has ended")


@pytest.mark.parametrize("origin", ORIGINS)
async def test_the_end_of_an_overheard_side_is_passed_on(start: Start, origin: str) -> None:
    proxy = await start(settings=with_keys(tells(origin)))
    _, client, app = await open_tunnel(proxy)
    speaker, hearer, _ = ends_of(origin, client, app)
    speaker.half_close()
    await eventually(lambda: hearer.is_over, "the other side hears of it")
    hearer.close()
    await eventually(lambda: not proxy.plane.tunnels, "it has ended")


# The log


async def test_the_first_use_of_a_key_is_said_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    proxy = await start(2, settings=with_keys(SID, HASH))
    for number in range(3):
        await learn(proxy, f"s{number}")
        await visit(proxy, f"/page?hash={number}&secret=1")
    said = [record.getMessage() for record in caplog.records if "known by the key" in record.getMessage()]
    assert said == [
        "clients are known by the key sid, too: first seen with /new",
        "clients are known by the key hash, too: first seen with /page",
    ]
