"""A worker: the data plane that a configuration asks for, its listeners, and its orderly end."""

import asyncio
import json
import ssl
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.keys import Found
from stickyproxy.affinity.routes import Route
from stickyproxy.affinity.token import Token, TokenCodec
from stickyproxy.config import Address, Config, load_text
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker import make_sessions, make_settings
from stickyproxy.errors import UsageError
from stickyproxy.proxy.listener import bind
from stickyproxy.proxy.settings import ClusterSettings, Pings, Settings, Timeouts
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.head import HeadLimits
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.supervised import until
from tests.helpers.worker import DEADLINE_S, HANDSHAKE, LOOPBACK, SECRET, Namespace, Running, running

OFF = float("inf")


# Settings


def test_the_settings_of_no_file_are_the_defaults() -> None:
    settings = make_settings(Config())
    assert settings == Settings(
        head=HeadLimits(head_bytes=128 * 1024, line_bytes=64 * 1024, fields=200, target_bytes=16 * 1024),
        timeouts=Timeouts(
            head_s=10,
            body_idle_s=60,
            keep_alive_s=75,
            connect_s=5,
            response_s=300,
            upstream_keep_alive_s=4,
            tunnel_idle_s=OFF,
            linger_s=2,
            tls_handshake_s=10,
            send_s=60,
            response_idle_s=300,
            websocket_handshake_s=60,
            tunnel_max_age_s=OFF,
            tunnel_max_age_jitter_percent=10,
        ),
        handshake_bytes=128 * 1024,
        body_bytes=OFF,
        connections=OFF,
        connections_per_address=OFF,
        origins=None,
        pings=None,
        trailers_bytes=8 * 1024,
        chunk_extensions_bytes=4 * 1024,
        buffer_bytes=64 * 1024,
        idle_connections=256,
        clusters={"default": ClusterSettings(CookieAttributes(name="stickyproxy"))},
        trusted=(),
        trusts_unix=False,
        forwarded=False,
        prefix=None,
    )


EVERYTHING = """
timeouts:
  {head: 1s, body_idle: off, keep_alive: 2s, connect: 3s, response: off, upstream_keep_alive: 4s, tunnel_idle: 5s,
   linger: 6s, tls_handshake: 7s, send: 8s, response_idle: off, websocket_handshake: 9s, tunnel_max_age: 10s,
   tunnel_max_age_jitter: 11}
limits:
  {head: 70KiB, line: 7KiB, fields: 8, target: 5KiB, trailers: 10B, chunk_extensions: 11B, buffer: 12KiB,
   upstream_idle_connections: 13, body: 14B, connections_per_address: 15, handshake: 16KiB}
websocket:
  ping: {interval: 17s, timeout: off}
affinity:
  cookie:
    {name: pin, path: /app, domain: example.org, max_age: 1m, http_only: false, same_site: none, secure: true,
     partitioned: true}
trusted_proxies: [10.0.0.0/8, unix]
forwarded: {forwarded: true, prefix: /app}
"""


def test_every_setting_comes_from_the_file() -> None:
    assert make_settings(load_text(EVERYTHING, {})) == Settings(
        head=HeadLimits(head_bytes=70 * 1024, line_bytes=7 * 1024, fields=8, target_bytes=5 * 1024),
        timeouts=Timeouts(
            head_s=1,
            body_idle_s=OFF,
            keep_alive_s=2,
            connect_s=3,
            response_s=OFF,
            upstream_keep_alive_s=4,
            tunnel_idle_s=5,
            linger_s=6,
            tls_handshake_s=7,
            send_s=8,
            response_idle_s=OFF,
            websocket_handshake_s=9,
            tunnel_max_age_s=10,
            tunnel_max_age_jitter_percent=11,
        ),
        handshake_bytes=16 * 1024,
        body_bytes=14,
        connections_per_address=15,
        pings=Pings(17, OFF),
        trailers_bytes=10,
        chunk_extensions_bytes=11,
        buffer_bytes=12 * 1024,
        idle_connections=13,
        clusters={
            "default": ClusterSettings(
                CookieAttributes(
                    name="pin",
                    path="/app",
                    domain="example.org",
                    max_age_s=60,
                    http_only=False,
                    same_site="none",
                    secure=True,
                    partitioned=True,
                )
            )
        },
        trusted=(ip_network("10.0.0.0/8"),),
        trusts_unix=True,
        forwarded=True,
        prefix="/app",
    )


def test_the_connections_and_origins_that_are_allowed() -> None:
    settings = make_settings(load_text("websocket: {origins: ['https://example.org'], ping: {}}", {}), 1234)
    assert settings.connections == 1234
    assert settings.pings == Pings(30, 20)
    assert settings.origins is not None
    assert settings.origins.allows(b"https://example.org", b"x")
    assert not settings.origins.allows(b"https://example.com", b"x")


def test_without_a_cookie_there_are_no_cookie_attributes() -> None:
    assert make_settings(load_text("affinity: {cookie: false}", {})).clusters["default"].cookie is None


def test_each_cluster_has_its_settings_and_each_route_its_cookie() -> None:
    keys = "keys: [{query: sid, mode: hash}]"
    settings = make_settings(
        load_text(
            f"""
upstreams: [http://127.0.0.1:1]
affinity: {{{keys}}}
clusters: {{shop: {{upstreams: [http://127.0.0.1:2], affinity: {{cookie: {{path: /a, http_only: false}}, {keys}}}}}}}
routes:
  - {{path: /shop, cluster: shop, strip_prefix: true, cookie: {{path: /b, same_site: none}}}}
  - {{host: a.org, path: /, cluster: default}}
""",
            {},
        )
    )
    own = CookieAttributes("stickyproxy-shop", path="/a", http_only=False)
    assert {name: one.cookie for name, one in settings.clusters.items()} == {
        "default": CookieAttributes("stickyproxy"),
        "shop": own,
    }
    assert settings.routes == (
        Route("shop", "", "/shop", strips_prefix=True, cookie=replace(own, path="/b", same_site="none")),
        Route("default", "a.org", ""),
    )
    first, second = (Found(one.keys[0], b"1") for one in settings.clusters.values())
    assert first.stored != second.stored, "a value of one app says nothing at another"


# Sessions


@pytest.mark.parametrize(
    ("affinity", "refresh_s"),
    [
        ("{}", OFF),
        ("{max_idle: 100s}", 25),
        ("{cookie: {max_age: 60s}}", 15),
        ("{max_idle: 100s, cookie: {max_age: 60s}}", 15),
        ("{max_idle: 40s, cookie: {max_age: 60s}}", 10),
        ("{max_idle: 40s, cookie: false}", 10),
        ("{max_life: 100s}", OFF),
    ],
)
def test_a_token_is_written_anew_in_the_last_part_of_its_shortest_lifetime(affinity: str, refresh_s: float) -> None:
    sessions = make_sessions(load_text(f"affinity: {affinity}", {}), [SECRET])
    token = Token(b"upstream", b"0123456789", pinned_at=1000, seen_at=1000)
    presented = sessions.present(TokenCodec([SECRET]).write(token), 1001)
    assert presented is not None
    assert presented.refresh_at == 1000 + refresh_s


def test_the_first_secret_signs_and_all_verify() -> None:
    old = b"old" + SECRET
    sessions = make_sessions(Config(), [SECRET, old])
    token = Token(b"upstream", b"0123456789", pinned_at=1000, seen_at=1000)
    assert sessions.present(TokenCodec([old]).write(token), 1001) is not None
    assert sessions.present(TokenCodec([b"new" + SECRET]).write(token), 1001) is None
    written = sessions.write_token(sessions.begin(b"0123456789", b"upstream", 1000), 1000)
    assert TokenCodec([SECRET]).parse(written, 1000) is not None


@pytest.mark.parametrize(
    ("affinity", "expires_at"), [("{}", OFF), ("{max_idle: 10s}", 1010), ("{max_idle: 1h, max_life: 20s}", 1020)]
)
def test_lifetimes_come_from_the_file(affinity: str, expires_at: float) -> None:
    sessions = make_sessions(load_text(f"affinity: {affinity}", {}), [SECRET])
    token = Token(b"upstream", b"0123456789", pinned_at=1000, seen_at=1000)
    presented = sessions.present(TokenCodec([SECRET]).write(token), 1001)
    assert presented is not None
    assert presented.expires_at == expires_at


def test_how_long_a_session_counts_comes_from_the_file() -> None:
    sessions = make_sessions(load_text("affinity: {session_idle: 7s}", {}), [SECRET])
    sessions.touch(sessions.begin(b"0123456789", b"upstream", 1000), 100.0)
    sessions.expire(106.9)
    assert len(sessions) == 1
    sessions.expire(107.1)
    assert len(sessions) == 0


# A worker with an upstream


async def open_tunnel(worker: Running) -> PlainClient:
    client = await PlainClient.connect(worker.port)
    client.send("/ws", fields=HANDSHAKE)
    status, _ = await client.receive_head()
    assert status == 101
    return client


async def test_it_serves_on_its_listener_and_logs() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        answer = await client.ask("/")
        assert (answer.status, answer.body) == (200, b"ok")
        assert answer.cookie is not None
        assert [(record.target, record.status) for record in worker.logged] == [(b"/", 200)]


async def test_what_it_finds_dead_is_reported() -> None:
    port = bind(LOOPBACK)
    dead = port.getsockname()[1]
    port.close()
    async with running() as worker:
        config = load_text(f"upstreams: [http://127.0.0.1:{dead}]", {})
        Routing(config, worker.worker.publish)
        async with await PlainClient.connect(worker.port) as client:
            assert (await client.ask("/")).status == 503
        assert worker.reported == [(f"127.0.0.1:{dead}", HealthEvent.REFUSED)]


async def test_drain_returns_at_once_where_nothing_is_open() -> None:
    async with running() as worker:
        port = worker.port
        async with asyncio.timeout(DEADLINE_S):
            await worker.worker.drain(3600)
        with pytest.raises(ConnectionRefusedError):
            await PlainClient.connect(port)


async def test_drain_waits_for_the_exchange_and_not_for_idle_connections() -> None:
    async with (
        running() as worker,
        await PlainClient.connect(worker.port) as idle,
        await PlainClient.connect(worker.port) as busy,
    ):
        await idle.ask("/")
        worker.upstream.has_request.clear()
        busy.send("/hold")
        await worker.upstream.has_request.wait()
        draining = asyncio.get_running_loop().create_task(worker.worker.drain(3600))
        assert await idle.receive_end() == b""
        assert not draining.done()
        worker.upstream.released.set()
        answer = await busy.receive()
        assert (answer.body, answer.fields["connection"]) == (b"ok", "close")
        async with asyncio.timeout(DEADLINE_S):
            await draining
        assert not worker.worker.plane.downstreams


async def test_drain_tells_every_tunnel_and_waits_for_their_ends() -> None:
    async with running() as worker:
        clients = [await open_tunnel(worker) for _ in range(20)]
        assert len(worker.worker.plane.tunnels) == 20
        async with asyncio.timeout(DEADLINE_S):
            draining = asyncio.get_running_loop().create_task(worker.worker.drain(3600))
            for client in clients:
                async with client:
                    frame = await client._reader.readexactly(4)
                    assert frame[0] == 0x88
                    assert int.from_bytes(frame[2:], "big") == 1001
            await draining
        assert not worker.worker.plane.tunnels
        assert {(record.kind, record.close_code, record.initiator) for record in worker.logged} == {
            ("tunnel", 1001, "proxy")
        }


async def test_what_is_left_after_the_grace_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        async with await open_tunnel(worker) as tunnel:
            client.send("/hold")
            await asyncio.wait_for(worker.upstream.has_request.wait(), DEADLINE_S)
            async with asyncio.timeout(DEADLINE_S):
                await worker.worker.drain(0)
            assert "the grace period is over: 1 tunnels and 1 connections are cut" in caplog.messages
            await worker.worker.close()
            assert not worker.worker.plane.downstreams
            assert not worker.worker.plane.tunnels
            await tunnel.receive_end()
        with pytest.raises(AbortedError):
            await client.receive()


async def test_close_counts_and_logs_what_it_cuts_before_it_returns() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client, await open_tunnel(worker):
        client.send("/hold")
        while len(worker.upstream.received) < 2:
            await asyncio.wait_for(worker.upstream.has_request.wait(), DEADLINE_S)
            await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            await worker.worker.close()
        assert sorted((record.kind, record.target) for record in worker.logged) == [
            ("exchange", b"/hold"),
            ("tunnel", b"/ws"),
        ]
        [pool] = worker.worker.plane.pools.values()
        assert (pool.counters.in_flight, pool.counters.tunnels_open) == (0, 0)


async def test_close_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stickyproxy.control.worker._CLOSE_S", 0.01)
    async with running() as worker:
        with monkeypatch.context() as patched:
            patched.setattr(worker.worker.plane, "wait_until_empty", asyncio.Event().wait)
            async with asyncio.timeout(DEADLINE_S):
                await worker.worker.close()


async def test_the_file_of_a_socket_is_not_its_own(tmp_path: Path) -> None:
    """Other workers serve there too."""
    path = tmp_path / "proxy.sock"
    async with running(listen=Address(path=str(path))) as worker:
        await worker.worker.drain(3600)
        await worker.worker.close()
        assert path.exists()


async def test_it_accepts_nobody_before_it_is_told_to_and_after_a_pause() -> None:
    async with running() as worker:
        port = worker.port
        worker.worker.pause()
        async with await PlainClient.connect(port) as client:  # it waits in the queue of the kernel
            client.send("/")
            await asyncio.sleep(0.1)
            assert not worker.upstream.received
            await worker.worker.accept()
            assert (await client.receive()).body == b"ok"


async def test_it_acts_at_once_on_what_it_finds_dead() -> None:
    """It does not wait for the control plane to publish it."""
    async with running() as worker:
        [before] = worker.worker.plane.default.snapshot.upstreams
        worker.worker.plane.report(before.id, HealthEvent.REFUSED)
        [after] = worker.worker.plane.default.snapshot.upstreams
        assert (before.is_refused, after.is_refused) == (False, True)
        worker.worker.plane.report(before.id, HealthEvent.CONNECTED)
        assert not worker.worker.plane.default.snapshot.upstreams[0].is_refused
        worker.worker.plane.report("removed", HealthEvent.REFUSED)
        worker.worker.plane.report(before.id, HealthEvent.PROBE_FAILED)
        assert worker.worker.plane.default.snapshot.upstreams == (before,)
        assert [event for _, event in worker.reported] == [
            HealthEvent.REFUSED,
            HealthEvent.CONNECTED,
            HealthEvent.REFUSED,
            HealthEvent.PROBE_FAILED,
        ]


async def test_the_access_log_has_all_that_was_cut_before_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    text = f"access_log: {{path: {log}}}"
    async with running(text) as worker, await PlainClient.connect(worker.port) as client:
        assert worker.worker.access_log is not None
        worker.worker.plane.log = worker.worker.access_log.write
        client.send("/hold")
        await asyncio.wait_for(worker.upstream.has_request.wait(), DEADLINE_S)
        await worker.worker.close()
    [line] = map(json.loads, log.read_text().splitlines())
    assert (line["target"], bool(line["error"])) == ("/hold", True)


# Reloads


def reload(worker: Running, text: str, secrets: Sequence[bytes] = (SECRET,), connections: float = OFF) -> Config:
    """Let a worker work by its configuration with other sections."""
    before = worker.worker.config
    config = load_text(text, {}).model_copy(update={"upstreams": before.upstreams})
    if "listeners" not in text:
        config = config.model_copy(update={"listeners": before.listeners})
    worker.worker.reload(config, secrets, connections=connections, contexts={})
    return config


async def test_open_connections_and_tunnels_stay_through_a_reload() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        await client.ask("/")
        async with await open_tunnel(worker) as tunnel:
            listeners = dict(worker.worker.listeners)
            config = reload(worker, "limits: {body: 5B}", connections=77)
            assert worker.worker.config is config
            assert worker.worker.plane.settings == make_settings(config, 77)
            assert worker.worker.listeners == listeners
            assert (await client.ask("/")).status == 200
            assert len(worker.worker.plane.tunnels) == 1
            worker.worker.plane.close()
            await tunnel.receive_end()


async def test_the_next_request_on_an_open_connection_is_under_the_new_limits() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        assert (await client.ask("/", fields={"X-Long": "x" * 2000})).status == 200
        reload(worker, "limits: {line: 1KiB, head: 4KiB}")
        assert (await client.ask("/", fields={"X-Long": "x" * 2000})).status == 431


async def test_cookies_of_the_old_secret_and_attributes_are_understood() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        first = await client.ask("/")
        assert first.cookie is not None
        reload(worker, "affinity: {cookie: {same_site: strict}}", [b"new" + SECRET, SECRET])
        fields = {"Cookie": first.cookie}
        assert (await client.ask("/", fields=fields)).cookie is None  # understood: it need not be set anew
        another = await client.ask("/")
        assert "SameSite=Strict" in another.fields["set-cookie"]
        reload(worker, "", [b"new" + SECRET])
        assert (await client.ask("/", fields=fields)).cookie is not None  # it is a stranger's now
        assert (await client.ask("/", fields={"Cookie": str(another.cookie)})).cookie is None


async def test_a_session_counts_on_through_a_reload() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        cookie = str((await client.ask("/")).cookie)
        await client.ask("/", fields={"Cookie": cookie})
        sessions = worker.worker.plane.sessions
        assert sum(sessions.counts.values()) == 1
        reload(worker, "affinity: {session_idle: 1h}")
        assert worker.worker.plane.sessions is sessions
        assert sum(sessions.counts.values()) == 1


async def test_a_listener_that_is_removed_is_closed_and_one_that_is_added_accepts() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as client:
        await client.ask("/")
        port, link = worker.port, bind(LOOPBACK)
        added = Address("127.0.0.1", link.getsockname()[1])
        link.setblocking(False)
        reload(worker, f"listeners: [{{address: '{added}', redirect_to_https: true}}]")
        with pytest.raises(ConnectionRefusedError):
            await PlainClient.connect(port)
        worker.worker.add_listeners({added: link})
        await worker.worker.accept()
        assert list(worker.worker.listeners) == [added]
        async with await PlainClient.connect(worker.port) as other:
            assert (await other.ask("/")).status in {307, 308}
        assert (await client.ask("/")).status == 200  # of the listener that is gone


async def test_a_listener_that_stays_changes_its_role() -> None:
    async with running() as worker, await PlainClient.connect(worker.port) as before:
        await before.ask("/")
        [written] = worker.worker.config.listeners
        reload(worker, f"listeners: [{{address: '{written.address}', redirect_to_https: true}}]")
        async with await PlainClient.connect(worker.port) as client:
            assert (await client.ask("/")).status in {307, 308}


async def test_another_access_log_is_begun_and_the_former_is_whole(tmp_path: Path) -> None:
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    async with running(f"access_log: {{path: {first}}}") as worker, await PlainClient.connect(worker.port) as client:
        assert worker.worker.access_log is not None
        worker.worker.plane.log = worker.worker.access_log.write
        await client.ask("/first")
        reload(worker, f"access_log: {{path: {second}}}")
        await client.ask("/second")
        reload(worker, "access_log: false")
        await client.ask("/third")
        assert worker.worker.access_log is None
        for log, target in ((first, "/first"), (second, "/second")):  # closed in a thread: it may wait for its reader
            await until(log.read_text, f"a line in {log}")
            assert [json.loads(line)["target"] for line in log.read_text().splitlines()] == [target]


async def test_an_access_log_that_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    async with running(f"access_log: {{path: {tmp_path}/access.log}}") as worker:
        before = worker.worker.config, worker.worker.access_log, worker.worker.plane.settings
        with pytest.raises(UsageError, match="nowhere"):
            reload(worker, f"limits: {{body: 5B}}\naccess_log: {{path: {tmp_path}/nowhere/access.log}}")
        assert (worker.worker.config, worker.worker.access_log, worker.worker.plane.settings) == before


async def test_a_renewed_context_is_for_new_connections(tmp_path: Path) -> None:
    async with running() as worker:
        [(address, listener)] = worker.worker.listeners.items()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        worker.worker.renew(address, context)
        assert listener.role.tls is context
        worker.worker.renew(Address("127.0.0.1", 1), context)  # one that is gone


class Held:
    """A tunnel that never ends, and notes when it was told to."""

    upstream_id = ""

    def __init__(self, clock: "Clock") -> None:
        self._clock = clock

    def shut(self, code: int, reason: str) -> None:
        assert (code, bool(reason)) == (1001, True)
        self._clock.shut_at.append(self._clock.time() - self._clock.began)

    def abort(self) -> None:
        pass


class Clock:
    """Stands in for the clock of the loop, and goes only where something sleeps."""

    def __init__(self) -> None:
        self.began = self._now = asyncio.get_running_loop().time()
        self.shut_at: list[float] = []

    def time(self) -> float:
        return self._now

    async def sleep(self, delay_s: float) -> None:
        self._now += delay_s


@pytest.mark.parametrize(("grace_s", "pause_s"), [(3600.0, 0.01), (30.0, 0.01), (0.1, 0.1 / 2 / 20)])
async def test_tunnels_are_closed_one_after_the_other_within_half_of_the_grace(
    monkeypatch: pytest.MonkeyPatch, grace_s: float, pause_s: float
) -> None:
    async with running() as worker:
        plane, clock = worker.worker.plane, Clock()
        monkeypatch.setattr(plane, "loop", clock)
        monkeypatch.setattr("stickyproxy.control.worker.asyncio", Namespace(asyncio, sleep=clock.sleep))
        monkeypatch.setattr(plane, "wait_until_empty", lambda: asyncio.sleep(0))
        plane.tunnels = {Held(clock) for _ in range(20)}  # type: ignore[misc]
        await worker.worker.drain(grace_s)
        assert clock.shut_at == pytest.approx([number * pause_s for number in range(20)])
        plane.tunnels = set()
