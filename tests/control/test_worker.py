"""A worker: the data plane that a configuration asks for, its listeners, and its orderly end."""

import asyncio
import itertools
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace

import pytest

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.sessions import Session
from stickyproxy.affinity.snapshot import Snapshot, upstream_digest
from stickyproxy.affinity.token import Token, TokenCodec
from stickyproxy.config import Address, Config, load_text
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker import Worker, make_sessions, make_settings
from stickyproxy.errors import UsageError
from stickyproxy.observe.record import Record
from stickyproxy.proxy.listener import bind
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.settings import Pings, Settings, Timeouts
from stickyproxy.proxy.tunnel import Tunnel
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.head import HeadLimits
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.supervised import until

SECRET = b"0123456789abcdef0123456789abcdef"
OFF = float("inf")
DEADLINE_S = 60.0
LOOPBACK = Address("127.0.0.1", 0)
HANDSHAKE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}


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
        cookie=CookieAttributes(name="stickyproxy"),
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
        cookie=CookieAttributes(
            name="pin",
            path="/app",
            domain="example.org",
            max_age_s=60,
            http_only=False,
            same_site="none",
            secure=True,
            partitioned=True,
        ),
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
    assert make_settings(load_text("affinity: {cookie: false}", {})).cookie is None


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


class Upstream:
    """Answers `/hold` when it is released, `/ws` with 101, and all else at once."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.has_request = asyncio.Event()
        self.received: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.received.append(head)
                self.has_request.set()
                if head.startswith(b"GET /ws "):
                    writer.write(
                        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
                    )
                    self.received.append(await reader.read())
                    break
                if head.startswith(b"GET /hold "):
                    await self.released.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@dataclass
class Running:
    """A worker that listens, with what it reported and logged."""

    worker: Worker
    upstream: Upstream
    reported: list[tuple[str, HealthEvent]]
    logged: list[Record]

    @property
    def port(self) -> int:
        return int(next(iter(self.worker.listeners.values())).port)


@asynccontextmanager
async def running(text: str = "", listen: Address = LOOPBACK) -> AsyncIterator[Running]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = load_text(f"listeners: ['{listen}']\nupstreams: [http://127.0.0.1:{port}]\n{text}", {})
    reported: list[tuple[str, HealthEvent]] = []
    logged: list[Record] = []
    worker = Worker(config, [SECRET], report=lambda *facts: reported.append(facts))
    worker.plane.log = logged.append
    Routing(config, worker.publish)
    link = bind(listen)
    link.setblocking(False)
    try:
        worker.add_listeners({listen: link})
        await worker.accept()
        yield Running(worker, upstream, reported, logged)
    finally:
        await worker.close()
        upstream.released.set()
        server.close()
        async with asyncio.timeout(DEADLINE_S):
            await server.wait_closed()


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
        [before] = worker.worker.plane.snapshot.upstreams
        worker.worker.plane.report(before.id, HealthEvent.REFUSED)
        [after] = worker.worker.plane.snapshot.upstreams
        assert (before.is_refused, after.is_refused) == (False, True)
        worker.worker.plane.report(before.id, HealthEvent.CONNECTED)
        assert not worker.worker.plane.snapshot.upstreams[0].is_refused
        worker.worker.plane.report("removed", HealthEvent.REFUSED)
        worker.worker.plane.report(before.id, HealthEvent.PROBE_FAILED)
        assert worker.worker.plane.snapshot.upstreams == (before,)
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


class Namespace:
    """A module with some of its names replaced."""

    def __init__(self, module: object, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


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


# Upstreams that are closed

OLD, NEW = upstream_digest("old"), upstream_digest("new")
FAST = 10_000.0  # clients a second


class Replaced:
    """A worker with an old upstream and a new one, which are told apart by who has received what."""

    def __init__(self, worker: Running, new: Upstream) -> None:
        self.worker = worker.worker
        self.port = worker.port
        self.old, self.new = worker.upstream, new
        self.clients: list[PlainClient] = []
        self.asked = 0

    def publish(self, *, is_closing: bool, has_new: bool = True) -> None:
        before, endpoints = self.worker.plane.snapshot, self.worker._endpoints
        states = tuple(
            replace(one, is_closing=is_closing and one.id == "old")
            for one in before.upstreams
            if has_new or one.id == "old"
        )
        self.worker.publish(Snapshot(before.cluster, states, before.rules), endpoints)

    async def open(self, cookie: str) -> "Client":
        client = await PlainClient.connect(self.port)
        self.clients.append(client)
        client.send("/ws", fields=HANDSHAKE | {"Cookie": cookie})
        status, fields = await client.receive_head()
        assert status == 101
        return Client(client, fields.get("set-cookie", ""))

    async def ask(self, cookie: str) -> str:
        """Return the name of the upstream that a request with a cookie goes to."""
        self.asked += 1
        mark = f"GET /{self.asked} ".encode()
        async with await PlainClient.connect(self.port) as client:
            assert (await client.ask(f"/{self.asked}", fields={"Cookie": cookie})).status == 200
        (name,) = [
            name
            for name, upstream in (("old", self.old), ("new", self.new))
            if any(head.startswith(mark) for head in upstream.received)
        ]
        return name

    @property
    def open_at(self) -> list[bytes]:
        """The upstreams of the tunnels that were not told to end."""
        return sorted(one.pool.digest for one in self.worker.plane.tunnels if not one.is_ending)


@dataclass
class Client:
    """The client of a tunnel, and the cookie that came with its 101."""

    link: PlainClient
    set_cookie: str

    async def receive_close(self) -> tuple[int, bytes]:
        async with asyncio.timeout(DEADLINE_S):
            first, size = await self.link._reader.readexactly(2)
            assert first == 0x88
            payload = await self.link._reader.readexactly(size)
        return int.from_bytes(payload[:2], "big"), payload[2:]


def cookie_of(number: int, digest: bytes = OLD) -> str:
    """Return the cookie of a client that was pinned a minute ago."""
    made = int(time.time()) - 60  # noqa: TID251 -- tokens use it
    token = Token(digest, b"client%04d" % number, made, made)
    return f"stickyproxy={TokenCodec([SECRET]).write(token).decode()}"


@asynccontextmanager
async def replaced(text: str = "") -> AsyncIterator[Replaced]:
    new = Upstream()
    server = await asyncio.start_server(new.serve, "127.0.0.1", 0)
    async with running(text) as worker:
        [before] = worker.worker.config.upstreams
        urls = {"old": f"http://{before.address}", "new": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}
        written = [{"id": upstream_id, "url": url} for upstream_id, url in urls.items()]
        Routing(Config.model_validate({"upstreams": written}), worker.worker.publish)
        made = Replaced(worker, new)
        yield made
        for client in made.clients:
            await client.__aexit__(None, None, None)
    server.close()
    async with asyncio.timeout(DEADLINE_S):
        await server.wait_closed()


async def test_clients_of_a_closed_upstream_hear_why_and_are_at_another_from_then_on() -> None:
    async with replaced() as under:
        clients = [await under.open(cookie_of(number)) for number in range(5)]
        await under.open(cookie_of(9, NEW))
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], FAST, "another version") == 5
        for number, client in enumerate(clients):
            assert await client.receive_close() == (1012, b"another version")
            # Its tunnel is there yet: the client has not answered.
            assert await under.ask(cookie_of(number)) == "new"
            again = await under.open(cookie_of(number))
            assert again.set_cookie.startswith("stickyproxy=")
        await until(lambda: under.open_at == [NEW] * 6, "only tunnels to the other upstream are open")
        assert under.worker.plane.counters.breaks == {"closed": 5}
        assert under.worker.plane.sessions.counts == {NEW: 6}
        assert len([one for one in under.new.received if one.startswith(b"GET /ws ")]) == 6, "each of them came once"


async def test_the_pin_holds_until_the_turn_of_its_client() -> None:
    async with replaced() as under:
        await under.open(cookie_of(1))
        await under.open(cookie_of(2))
        under.publish(is_closing=True)
        under.worker.shut_upstreams([OLD], 1e-6, "slowly")
        await until(lambda: under.open_at == [OLD], "one has had its turn")
        assert sorted([await under.ask(cookie_of(number)) for number in (1, 2)]) == ["new", "old"]


async def test_all_tunnels_of_a_client_have_one_turn() -> None:
    """A page of which a part is here and a part there does not work."""
    async with replaced() as under:
        for number in (1, 1, 2, 2):
            await under.open(cookie_of(number))
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], 1e-6, "slowly") == 4
        await until(lambda: len(under.open_at) < 4, "a turn")
        assert under.open_at == [OLD] * 2
        assert sorted([await under.ask(cookie_of(number)) for number in (1, 2)]) == ["new", "old"]


async def test_a_frame_that_has_begun_is_never_cut() -> None:
    async with replaced() as under:
        client = await under.open(cookie_of(1))
        client.link._writer.write(b"\x82\x85\x00\x00\x00\x00he")  # 2 bytes of 5
        await until(lambda: under.worker.plane.tunnels and _passed(under.worker) >= 8, "the frame has begun")
        under.publish(is_closing=True)
        under.worker.shut_upstreams([OLD], FAST, "later")
        assert (await client.receive_close())[0] == 1012
        client.link._writer.write(b"llo")
        client.link._writer.write(b"\x88\x80\x00\x00\x00\x00")
        await until(lambda: len(under.old.received) == 2, "the tunnel has ended")
        sent = under.old.received[1]
        assert sent.startswith(b"\x82\x85\x00\x00\x00\x00hello\x88")


def _passed(worker: Worker) -> int:
    (tunnel,) = worker.plane.tunnels
    return tunnel.passed_bytes


async def test_tunnels_that_come_later_have_their_turn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stickyproxy.control.worker._LOOK_S", 0.01)
    async with replaced() as under:
        client = await PlainClient.connect(under.port)
        under.clients.append(client)
        client.send("/hold", fields={"Cookie": cookie_of(1)})
        await asyncio.wait_for(under.old.has_request.wait(), DEADLINE_S)
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], FAST, "over") == 0
        late = await under.open(cookie_of(1))  # the request that is under way holds the pin
        assert await late.receive_close() == (1012, b"over")
        again = await under.open(cookie_of(1))
        under.old.released.set()
        answer = await client.receive()
        assert (answer.status, answer.body) == (200, b"ok"), "never in the middle of a response"
        await until(lambda: under.open_at == [NEW], "it is at the other one")
        assert again.set_cookie
        under.publish(is_closing=False)
        await until(lambda: not under.worker._closings, "it is over")


async def test_without_the_state_only_what_is_open_is_closed_and_the_pins_hold() -> None:
    """A client that comes back must not be sent away again and again."""
    async with replaced() as under:
        client = await under.open(cookie_of(1))
        assert under.worker.shut_upstreams([OLD, b"unknown!"], FAST, "once") == 1
        assert await client.receive_close() == (1012, b"once")
        await until(lambda: not under.worker._closings, "it is over")
        again = await under.open(cookie_of(1))
        assert under.open_at == [OLD]
        assert again.set_cookie == ""
        assert under.worker.plane.counters.breaks == {}


async def test_where_there_is_no_other_upstream_the_tunnels_end_all_the_same() -> None:
    async with replaced() as under:
        client = await under.open(cookie_of(1))
        under.publish(is_closing=True, has_new=False)
        under.worker.shut_upstreams([OLD], FAST, "over")
        assert (await client.receive_close())[0] == 1012
        assert under.worker.plane.counters.breaks == {}


async def test_tunnels_of_no_session_are_closed_too() -> None:
    async with replaced("affinity: {cookie: false}") as under:
        clients = [await under.open("") for _ in range(4)]
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], FAST, "over") == 2
        await until(lambda: under.open_at == [NEW] * 2, "those of the other one stay")
        assert len(clients) == 4


async def test_what_is_no_pace_is_refused() -> None:
    async with replaced() as under:
        for pace in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="no pace"):
                under.worker.shut_upstreams([OLD], pace, "never")
        assert under.worker._closings == []


async def test_the_end_of_the_worker_ends_what_goes_on_slowly() -> None:
    async with replaced() as under:
        for number in range(3):
            await under.open(cookie_of(number))
        under.publish(is_closing=True)
        under.worker.shut_upstreams([OLD], 1e-6, "slowly")
        await until(lambda: len(under.open_at) == 2, "the first")
        await under.worker.close()
        await until(lambda: not under.worker._closings, "no task is left")


class Turns:
    """Stands in for the clock of the loop, which goes only where something sleeps, and notes who was told when."""

    def __init__(self, plane: Plane) -> None:
        self._loop = plane.loop
        self._plane = plane
        self.now = 1000.0
        self.late_s = 0.0
        self.told: list[tuple[float, str]] = []
        self.on_turn: Callable[[int], object] = lambda _: None

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(0)
        self.now += delay_s + self.late_s

    def add(self, name: str, digest: bytes, session: Session | None = None) -> "Open":
        tunnel = Open(self, name, digest, session)
        self._plane.tunnels.add(tunnel)  # type: ignore[arg-type]
        return tunnel


class Open:
    """A tunnel that notes when it was told to end."""

    upstream_id = ""

    def __init__(self, turns: Turns, name: str, digest: bytes, session: Session | None) -> None:
        self._turns = turns
        self._session = session
        self.name = name
        self.pool = SimpleNamespace(digest=digest)
        self.is_ending = False

    def shut(self, code: int, reason: str) -> None:
        assert (code, self.is_ending) == (1012, False), reason
        self.is_ending = True
        self._turns.told.append((self._turns.now - 1000, self.name))
        self._turns.on_turn(len(self._turns.told))

    def abort(self) -> None:
        pass


@asynccontextmanager
async def turning(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Worker, Turns]]:
    async with running() as worker:
        plane = worker.worker.plane
        turns = Turns(plane)
        with monkeypatch.context() as patched:
            patched.setattr(plane, "loop", turns)
            patched.setattr("stickyproxy.control.worker.asyncio", Namespace(asyncio, sleep=turns.sleep))
            yield worker.worker, turns
            plane.tunnels = set[Tunnel]()


async def test_so_many_clients_a_second_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(10):
            turns.add(f"{number}", OLD)
        turns.add("of another upstream", NEW)
        assert worker.shut_upstreams([OLD], 20.0, "over") == 10
        assert turns.told == [], "it goes on in the background"
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([number / 20 for number in range(10)])
        assert {name for _, name in turns.told} == {f"{number}" for number in range(10)}


async def test_timers_that_are_late_do_not_make_it_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        turns.late_s = 0.003
        for number in range(50):
            turns.add(f"{number}", OLD)
        worker.shut_upstreams([OLD], 100.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert turns.told[-1][0] == pytest.approx(49 / 100, abs=0.01)


async def test_after_a_long_pause_there_is_no_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(10):
            turns.add(f"{number}", OLD)

        def stall(turn: int) -> None:
            if turn == 3:
                turns.now += 60

        turns.on_turn = stall
        worker.shut_upstreams([OLD], 20.0, "over")
        await until(lambda: not worker._closings, "it is over")
        pauses = [later[0] - before[0] for before, later in itertools.pairwise(turns.told)]
        assert pauses == pytest.approx([0.05] * 2 + [60] + [0.05] * 6)


async def test_a_tunnel_that_has_ended_by_itself_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        tunnels = [turns.add(f"{number}", OLD) for number in range(6)]
        order = sorted(tunnels, key=list[object](worker.plane.tunnels).index)  # that of the set

        def end_two(turn: int) -> None:
            if turn == 2:
                for one in order[2:4]:
                    one.is_ending = True

        turns.on_turn = end_two
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([0, 1, 2, 3])


async def test_the_tunnels_of_one_session_count_for_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(3):
            session = Session(b"client%04d" % number, OLD, 0)
            session.open = 2
            for tab in "ab":
                turns.add(f"{number}{tab}", OLD, session)
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        times = [at for at, _ in turns.told]
        assert times == pytest.approx([0, 0, 1, 1, 2, 2])
        assert [len({name[0] for _, name in turns.told[at : at + 2]}) for at in (0, 2, 4)] == [1, 1, 1]


async def test_a_second_pace_takes_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(8):
            turns.add(f"{number}", OLD)

        def hurry(turn: int) -> None:
            if turn == 3:
                assert worker.shut_upstreams([OLD], 10.0, "faster") == 5

        turns.on_turn = hurry
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([0, 1, 2, 2.1, 2.2, 2.3, 2.4, 2.5])


async def test_being_told_again_and_again_is_no_way_round_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(6):
            turns.add(f"{number}", OLD)
        turns.on_turn = lambda turn: [worker.shut_upstreams([OLD], 1.0, "over") for _ in range(3)] if turn < 6 else 0
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([0, 1, 2, 3, 4, 5])


async def test_other_upstreams_keep_their_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(3):
            turns.add(f"old {number}", OLD)
            turns.add(f"new {number}", NEW)
        assert worker.shut_upstreams([OLD, NEW], 1.0, "both") == 6
        assert worker.shut_upstreams([NEW], 10.0, "one") == 3
        first, second = worker._closings
        assert (first.digests, second.digests) == ({OLD}, {NEW})
        await until(lambda: not worker._closings, "it is over")
        assert len(turns.told) == 6
