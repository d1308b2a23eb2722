"""Reloads: what each key of the file does to a proxy that runs, what stays as it is, and what changes nothing."""

import asyncio
import json
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.snapshot import AdminState, Health
from stickyproxy.config import Address
from stickyproxy.control import reload as reload_module
from stickyproxy.control import supervisor as supervisor_module
from stickyproxy.control.reload import watch_file
from stickyproxy.control.supervisor import Supervisor
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn
from tests.helpers.certificates import Authority
from tests.helpers.plain_client import AbortedError, Answer, PlainClient, ask
from tests.helpers.processes import free_port
from tests.helpers.serving import can_listen
from tests.helpers.supervised import (
    DEADLINE_S,
    SECRET,
    App,
    File,
    Tunnel,
    close_server,
    is_running,
    open_tunnel,
    pids,
    port_of,
    read_admin,
    read_metric,
    read_state,
    running,
    until,
)

TOKEN = "0123456789abcdef"
LONG = {"X-Long": "x" * 2000}  # over the limits of SHORT
SHORT = {"line": "1KiB", "head": "4KiB"}
Apps = dict[str, App]


class Proxy:
    """A proxy of two workers that is started from a file, over three apps, and what its clients hold open."""

    def __init__(self, supervisor: Supervisor, file: File, apps: Apps, stack: AsyncExitStack) -> None:
        self.supervisor = supervisor
        self.file = file
        self.apps = apps
        self._stack = stack

    @property
    def port(self) -> int:
        return port_of(self.supervisor)

    @property
    def admin(self) -> Address:
        admin = self.supervisor.config.admin
        assert admin is not None
        return admin.address

    async def reload(self, **sections: Any) -> list[str]:
        """Write sections into the file and reload; return the changes as they are told."""
        self.file.write(**sections)
        return [str(change) for change in await self.supervisor.reloader.reload()]

    async def refused(self, **sections: Any) -> str:
        """Write sections into the file, see that nothing changes, and return the reason."""
        before, pid, addresses = self.supervisor.loaded, pids(self.supervisor), self.supervisor.addresses
        failed = self.supervisor.reloader.outcomes["failed"]
        self.file.write(**sections)
        with pytest.raises(UsageError) as error:
            await self.supervisor.reloader.reload()
        assert self.supervisor.loaded is before
        assert pids(self.supervisor) == pid
        assert self.supervisor.addresses == addresses
        assert self.supervisor.reloader.outcomes["failed"] == failed + 1
        return str(error.value)

    async def ask(self, cookie: str | None = None) -> Answer:
        """Ask over a connection of its own."""
        return await ask(self.port, "/", fields={} if cookie is None else {"Cookie": cookie})

    async def ask_all(self, count: int = 24, fields: Mapping[str, str] | None = None) -> set[str]:
        """Let new clients ask, over a connection each, so that both workers answer; return who answered."""
        answers = [await ask(self.port, "/", fields=fields) for _ in range(count)]
        assert {answer.status for answer in answers} == {200}
        return {answer.body.decode() for answer in answers}

    async def pin(self, app: str) -> str:
        """Return the cookie of a new client that is pinned to an app."""
        async with asyncio.timeout(DEADLINE_S):
            while (answer := await self.ask()).body.decode() != app:
                pass
        assert answer.cookie is not None
        return answer.cookie

    async def client(self, port: int | None = None) -> PlainClient:
        """Return a connection that is closed in the end."""
        return await self._stack.enter_async_context(await PlainClient.connect(port or self.port))

    async def tunnel(self, cookie: str | None = None, port: int | None = None) -> Tunnel:
        """Return a tunnel that is closed in the end."""
        tunnel = await open_tunnel(port or self.port, cookie)
        await self._stack.enter_async_context(tunnel.client)
        return tunnel


@pytest.fixture
async def apps() -> AsyncIterator[Apps]:
    made = {name: await App(name).start() for name in ("a", "b", "c")}
    yield made
    for app in made.values():
        app.stop()


@asynccontextmanager
async def started(tmp_path: Path, apps: Apps, **sections: Any) -> AsyncIterator[Proxy]:
    basis: dict[str, Any] = {
        "upstreams": [apps["a"].upstream, apps["b"].upstream],
        "affinity": {"secrets": [SECRET], "policy": "round_robin"},
        "admin": {"address": f"unix:{tmp_path}/admin.sock"},
        "workers": 2,
        "grace": "1h",
    }
    file = File(tmp_path / "proxy.yaml", **basis | sections)
    async with running(file.load()) as supervisor, AsyncExitStack() as stack:
        yield Proxy(supervisor, file, apps, stack)


@pytest.fixture
async def proxy(tmp_path: Path, apps: Apps) -> AsyncIterator[Proxy]:
    async with started(tmp_path, apps) as made:
        yield made


def affinity(**keys: Any) -> dict[str, Any]:
    return {"affinity": {"secrets": [SECRET], "policy": "round_robin"} | keys}


# Nothing changes where nothing was changed


async def test_a_file_that_says_the_same_changes_nothing(proxy: Proxy) -> None:
    before = proxy.supervisor.loaded
    proxy.file.path.write_text("# a comment\n" + proxy.file.path.read_text())
    assert await proxy.supervisor.reloader.reload() == ()
    assert proxy.supervisor.loaded.config is before.config
    assert dict(proxy.supervisor.reloader.outcomes) == {"ok": 0, "unchanged": 1, "failed": 0}


async def test_what_changes_is_told_logged_and_counted(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = proxy.supervisor.reloader.succeeded_at
    changes = await proxy.reload(limits=SHORT, grace="59m")
    assert changes == ["limits.head: 128KiB -> 4KiB", "limits.line: 64KiB -> 1KiB", "grace: 1h -> 59m"]
    for change in changes:
        assert f"reloaded: {change}" in caplog.messages
    assert proxy.supervisor.reloader.succeeded_at > before
    for outcome, count in (("ok", 1), ("unchanged", 0), ("failed", 0)):
        assert await read_metric(proxy.admin, "reloads_total", outcome=outcome) == count


async def test_what_is_open_and_pinned_stays(proxy: Proxy) -> None:
    """Through reloads that touch all else: connections, tunnels, pins, workers, and a request under way."""
    pinned = {name: await proxy.pin(name) for name in ("a", "b")}
    tunnels = [(name, await proxy.tunnel(cookie)) for name, cookie in pinned.items() for _ in range(4)]
    clients = [(name, await proxy.client()) for name in pinned for _ in range(4)]
    for name, client in clients:
        assert (await client.ask("/", fields={"Cookie": pinned[name]})).body.decode() == name
    busy = await proxy.client()
    busy.send("/hold", fields={"Cookie": pinned["a"]})
    await until(lambda: any(head.startswith("GET /hold") for head in proxy.apps["a"].heads), "it has arrived")
    workers = pids(proxy.supervisor)
    for number in range(5):
        assert await proxy.reload(
            limits={"body": f"{number + 1}MiB"},
            timeouts={"head": f"{number + 5}s"},
            health={"probe": {"interval": f"{number + 2}s"}},
            upstreams=[app.upstream | {"weight": number + 2} for app in (proxy.apps["a"], proxy.apps["b"])],
        )
        for name, tunnel in tunnels:
            assert tunnel.app == name
            await tunnel.echo()
        for name, client in clients:
            answer = await client.ask("/", fields={"Cookie": pinned[name]})
            assert (answer.status, answer.body.decode(), answer.cookie) == (200, name, None)
    proxy.apps["a"].released.set()
    assert (await busy.receive()).body == b"a"
    assert pids(proxy.supervisor) == workers


async def test_health_and_admin_states_stay(proxy: Proxy) -> None:
    routing = proxy.supervisor.routing
    routing.set_admin_state("a", AdminState.DRAIN)
    for _ in range(3):
        routing.report("b", HealthEvent.PROBE_FAILED)
    await proxy.reload(
        health={"probe": {"interval": "1h"}}, upstreams=[app.upstream for app in reversed(proxy.apps.values())]
    )
    state = await read_state(proxy.admin)
    assert list(state) == ["c", "b", "a"]
    assert {name: one["admin_state"] for name, one in state.items()} == {"a": "drain", "b": "ready", "c": "ready"}
    assert routing.observed["b"].health in {Health.UNHEALTHY, Health.HEALTHY}  # never unknown: it was known


# Upstreams


async def test_an_upstream_that_is_added_serves_at_once(proxy: Proxy) -> None:
    assert await proxy.ask_all() == {"a", "b"}
    changes = await proxy.reload(upstreams=[app.upstream for app in proxy.apps.values()])
    assert [change.partition(" (")[0] for change in changes] == ["upstreams: c added"]
    assert await proxy.ask_all() == {"a", "b", "c"}
    assert (await read_state(proxy.admin))["c"]["health"] in {"unknown", "healthy"}
    await until(lambda: proxy.supervisor.prober.counters["c"].outcomes["passed"], "it is probed")


async def test_an_upstream_that_is_removed_keeps_its_clients_and_tunnels_until_it_is_idle(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    tunnel, client = await proxy.tunnel(cookie), await proxy.client()
    assert await proxy.reload(upstreams=[proxy.apps["a"].upstream]) == ["upstreams: b removed"]
    assert await proxy.ask_all() == {"a"}
    for _ in range(8):  # over both workers
        answer = await proxy.ask(cookie)
        assert (answer.body, answer.cookie) == (b"b", None)
    await tunnel.echo()
    assert (await client.ask("/", fields={"Cookie": cookie})).body == b"b"
    await until(lambda: len(proxy.supervisor.fleet.registry), "its session is reported")
    shown = (await read_state(proxy.admin))["b"]
    assert (shown["is_leaving"], shown["admin_state"], shown["sessions"] > 0) == (True, "drain", True)
    # Its session ends, but the tunnel is still there.
    await proxy.reload(**affinity(session_idle="1s"))
    await asyncio.sleep(2.5)
    assert "b" in await read_state(proxy.admin)
    await tunnel.echo()
    await tunnel.client.__aexit__(None, None, None)
    await wait_until_gone(proxy, "b")
    answer = await proxy.ask(cookie)
    assert answer.body == b"a"
    assert answer.cookie is not None


async def wait_until_gone(proxy: Proxy, upstream_id: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while upstream_id in await read_state(proxy.admin):  # noqa: ASYNC110 -- it is looked at from outside
            await asyncio.sleep(0.05)
        await proxy.supervisor.fleet.published()  # the workers know it a moment after the state says it


async def test_an_upstream_that_is_removed_and_dead_is_gone_at_once(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    proxy.apps["b"].crash()
    await proxy.reload(upstreams=[proxy.apps["a"].upstream])
    assert (await proxy.ask(cookie)).body == b"a"
    await wait_until_gone(proxy, "b")


async def test_an_upstream_that_comes_back_before_it_is_gone_is_the_same(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    tunnel = await proxy.tunnel(cookie)
    both = proxy.file.sections["upstreams"]
    await proxy.reload(upstreams=both[:1])
    await proxy.reload(upstreams=both)
    assert await proxy.ask_all() == {"a", "b"}
    answer = await proxy.ask(cookie)
    assert (answer.body, answer.cookie) == (b"b", None)
    await tunnel.echo()
    state = await read_state(proxy.admin)
    assert [(one["is_leaving"], one["admin_state"]) for one in state.values()] == [(False, "ready")] * 2


async def test_an_upstream_at_another_address_keeps_its_pins_and_its_tunnels(proxy: Proxy) -> None:
    """The id is the same: it is another process of the same upstream."""
    cookie = await proxy.pin("b")
    tunnel = await proxy.tunnel(cookie)
    await proxy.reload(upstreams=[proxy.apps["a"].upstream, {"id": "b", "url": proxy.apps["c"].url}])
    for _ in range(8):
        answer = await proxy.ask(cookie)
        assert (answer.body, answer.cookie) == (b"c", None)
    await tunnel.echo()


async def test_weights_count_from_now_on(proxy: Proxy) -> None:
    a, b = proxy.file.sections["upstreams"]
    await proxy.reload(upstreams=[a | {"weight": 9}, b])
    names = [(await proxy.ask()).body.decode() for _ in range(60)]
    assert names.count("a") > 2 * names.count("b") > 0


async def test_the_most_sessions_of_an_upstream_count_from_now_on(proxy: Proxy) -> None:
    cookies = [str((await proxy.ask()).cookie) for _ in range(6)]
    for cookie in cookies:
        await proxy.ask(cookie)
    registry = proxy.supervisor.fleet.registry
    await until(lambda: sum(registry.counts.values()) == 6, "all sessions are counted")
    a, b = proxy.file.sections["upstreams"]
    await proxy.reload(upstreams=[a | {"max_sessions": 1}, b])
    assert await proxy.ask_all() == {"b"}
    assert {(await proxy.ask(cookie)).status for cookie in cookies} == {200}
    await proxy.reload(upstreams=[a | {"max_sessions": 1}, b | {"max_sessions": 1}])
    assert (await proxy.ask()).status == 503


async def test_an_upstream_begins_to_speak_tls(tmp_path: Path, apps: Apps) -> None:
    authority = Authority(tmp_path)
    leaf = authority.issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.certificate, leaf.key)
    secure = App("secure")
    server = await asyncio.start_server(secure.serve, "127.0.0.1", 0, ssl=context)
    secure.port = server.sockets[0].getsockname()[1]
    async with started(tmp_path, apps) as proxy:
        ca, address = {"ca": str(authority.file), "server_name": "localhost"}, f"127.0.0.1:{secure.port}"
        await proxy.reload(upstreams=[{"id": "secure", "url": f"https://{address}", "tls": ca}])
        assert await proxy.ask_all() == {"secure"}
        await proxy.reload(upstreams=[{"id": "secure", "url": f"https://{address}"}])  # nobody vouches for it
        assert (await proxy.ask()).status in {502, 503}
    await close_server(server)


# Affinity


async def test_the_policy_is_another(proxy: Proxy) -> None:
    assert await proxy.reload(**affinity(policy="least_sessions")) == ["affinity.policy: round_robin -> least_sessions"]
    assert proxy.supervisor.routing.snapshots["default"].rules.policy == "least_sessions"
    assert await proxy.ask_all() == {"a", "b"}


async def test_what_is_done_without_the_upstream_is_another(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    await proxy.reload(**affinity(on_unavailable="refuse"))
    proxy.apps["b"].crash()
    assert {(await proxy.ask(cookie)).status for _ in range(8)} == {503}
    await proxy.reload(**affinity())
    assert {(await proxy.ask(cookie)).body for _ in range(8)} == {b"a"}


async def test_the_cookie_has_other_attributes(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    await proxy.reload(**affinity(cookie={"same_site": "strict", "path": "/app", "max_age": "1h"}))
    for _ in range(8):
        answer = await proxy.ask()
        assert {"Path=/app", "SameSite=Strict", "Max-Age=3600"} <= set(answer.fields["set-cookie"].split("; "))
        assert (await proxy.ask(cookie)).body == b"b"


async def test_the_cookie_is_switched_off_and_on(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    await proxy.reload(**affinity(cookie=False))
    assert {(await proxy.ask()).cookie for _ in range(8)} == {None}
    assert {(await proxy.ask(cookie)).body for _ in range(8)} == {b"a", b"b"}
    await proxy.reload(**affinity())
    assert {(await proxy.ask(cookie)).body for _ in range(8)} == {b"b"}


async def test_secrets_are_rotated_without_losing_a_pin(
    tmp_path: Path, apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    new = "a new secret, which is long enough"
    async with started(tmp_path, apps) as proxy:
        old_cookie = await proxy.pin("b")
        assert await proxy.reload(**affinity(secrets=[new, SECRET])) == ["affinity.secrets: changed"]
        for _ in range(8):
            assert (await proxy.ask(old_cookie)).body == b"b"
        new_cookie = await proxy.pin("b")
        await proxy.reload(**affinity(secrets=[new]))
        for _ in range(8):
            answer = await proxy.ask(new_cookie)
            assert (answer.body, answer.cookie) == (b"b", None)
            assert (await proxy.ask(old_cookie)).cookie is not None  # a stranger's by now
    assert new not in caplog.text


async def test_a_secret_in_a_file_is_read_again(tmp_path: Path, apps: Apps) -> None:
    """All workers get what the supervisor has read."""
    secret = tmp_path / "a.secret"
    secret.write_text(SECRET)
    async with started(tmp_path, apps, **affinity(secrets=[f"file:{secret}"])) as proxy:
        cookie = await proxy.pin("b")
        secret.write_text("another secret, which is long enough")
        assert await proxy.reload() == ["affinity.secrets: changed"]
        assert all([(await proxy.ask(cookie)).cookie is not None for _ in range(8)])


async def test_the_secret_that_was_made_at_the_start_stays(tmp_path: Path, apps: Apps) -> None:
    sections = {"affinity": {"policy": "round_robin"}, "state_directory": str(tmp_path / "state")}
    async with started(tmp_path, apps, **sections) as proxy:
        cookie = await proxy.pin("b")
        await proxy.reload(affinity={"policy": "random"})
        for _ in range(8):
            answer = await proxy.ask(cookie)
            assert (answer.body, answer.cookie) == (b"b", None)


# Limits, timeouts, and whom to believe


async def test_limits_are_others_on_open_connections_too(proxy: Proxy) -> None:
    clients = [await proxy.client() for _ in range(8)]
    assert {(await client.ask("/", fields=LONG)).status for client in clients} == {200}
    await proxy.reload(limits=SHORT)
    assert {(await client.ask("/", fields=LONG)).status for client in clients} == {431}
    await proxy.reload(limits={})
    assert await proxy.ask_all(fields=LONG) == {"a", "b"}


async def test_timeouts_are_others_for_what_begins_now(proxy: Proxy) -> None:
    await proxy.reload(timeouts={"response": "300ms"})
    clients = [await proxy.client() for _ in range(4)]
    for client in clients:
        client.send("/hold")
    assert {(await client.receive()).status for client in clients} == {504}


async def test_proxies_are_trusted_from_now_on(proxy: Proxy) -> None:
    seen = {"X-Forwarded-For": "203.0.113.7"}
    await proxy.ask_all(fields=seen)
    assert not any("203.0.113.7" in head for app in proxy.apps.values() for head in app.heads)
    await proxy.reload(trusted_proxies=["127.0.0.0/8"])
    for app in proxy.apps.values():
        app.heads.clear()
    await proxy.ask_all(fields=seen)
    heads = [head for app in proxy.apps.values() for head in app.heads if "User-Agent: stickyproxy" not in head]
    assert heads
    assert all("203.0.113.7" in head for head in heads)


async def cut(proxy: Proxy, capfd: pytest.CaptureFixture[str]) -> str:
    """Stop while a request is under way, without grace; return what the workers print, who warn of what they cut."""
    client = await proxy.client()
    client.send("/hold")
    await until(lambda: any(app.has_request.is_set() for app in proxy.apps.values()), "it has arrived")
    capfd.readouterr()
    proxy.supervisor.stop()
    with pytest.raises(AbortedError):
        await client.receive()
    await until(lambda: not any(map(is_running, pids(proxy.supervisor))), "the workers have ended")
    return capfd.readouterr().err


async def test_the_grace_is_another(tmp_path: Path, apps: Apps, capfd: pytest.CaptureFixture[str]) -> None:
    async with started(tmp_path, apps) as proxy:
        await proxy.reload(grace="0s")
        assert "the grace period is over" in await cut(proxy, capfd)


async def test_the_log_level_is_another_in_all_processes(
    tmp_path: Path, apps: Apps, capfd: pytest.CaptureFixture[str]
) -> None:
    """The supervisor's is that of this process; that of the workers shows in what they do not say."""
    async with started(tmp_path, apps, grace="0s") as proxy:
        await proxy.reload(log_level="error")
        assert logging.getLogger().level == logging.ERROR
        assert "the grace period is over" not in await cut(proxy, capfd)


async def test_the_access_log_is_another(tmp_path: Path, apps: Apps) -> None:
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    async with started(tmp_path, apps, access_log={"path": str(first)}) as proxy:
        await proxy.ask_all(12)
        await proxy.reload(access_log={"path": str(second)})
        await proxy.ask_all(8)
        await proxy.reload(access_log=False)
        await proxy.ask_all(4)
        for log, count in ((first, 12), (second, 8)):
            await until(lambda log=log, count=count: len(log.read_text().splitlines()) >= count, f"{log} is whole")  # type: ignore[misc]
            assert len([json.loads(line) for line in log.read_text().splitlines()]) == count


# Probes


async def test_probes_are_others_and_count_on(proxy: Proxy) -> None:
    counters = proxy.supervisor.prober.counters["a"]
    await until(lambda: counters.outcomes["passed"], "it was probed")
    await proxy.reload(health={"probe": {"path": "/healthz", "interval": "50ms", "timeout": "1s"}})
    app = proxy.apps["a"]
    await until(lambda: sum(head.startswith("GET /healthz ") for head in app.heads) >= 3, "its path is asked for")
    assert proxy.supervisor.prober.counters["a"] is counters
    assert counters.outcomes["passed"] >= 3
    await proxy.reload(health={"probe": False})
    count = len(app.heads)
    await asyncio.sleep(0.5)
    assert len(app.heads) <= count + 1  # one may have been under way


# Listeners


async def test_a_listener_is_added_and_another_removed(proxy: Proxy) -> None:
    before, added = proxy.port, free_port()
    client, tunnel = await proxy.client(), await proxy.tunnel()
    await client.ask("/")
    await proxy.reload(listeners=["127.0.0.1:0", f"127.0.0.1:{added}"])
    assert [one.port for one in proxy.supervisor.addresses] == [before, added]
    for port in (before, added):
        assert {(await ask(port, "/")).status for _ in range(12)} == {200}
    await proxy.reload(listeners=[f"127.0.0.1:{added}"])
    assert can_listen(before)
    assert (await client.ask("/")).status == 200
    await tunnel.echo()
    assert await proxy.ask_all() == {"a", "b"}


async def test_a_unix_socket_is_added_and_removed(proxy: Proxy, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    await proxy.reload(listeners=["127.0.0.1:0", f"unix:{path}"])
    assert {(await ask(str(path), "/")).status for _ in range(12)} == {200}
    await proxy.reload(listeners=["127.0.0.1:0"])
    assert not path.exists()


async def test_a_listener_that_is_untouched_refuses_nobody(proxy: Proxy) -> None:
    """Not even while others come and go: connections are opened all the time."""
    is_over, asked = asyncio.Event(), 0

    async def keep_asking() -> None:
        nonlocal asked
        while not is_over.is_set():
            assert (await proxy.ask()).status == 200
            asked += 1

    asking = [spawn(keep_asking(), "keep asking") for _ in range(4)]
    port = proxy.port
    for number in range(10):
        await proxy.reload(
            listeners=["127.0.0.1:0", *([f"127.0.0.1:{free_port()}"] if number % 2 == 0 else [])],
            upstreams=[app.upstream for app in proxy.apps.values()][: 2 + number % 2],
        )
        before = asked
        await until(lambda before=before: asked > before, "clients are served")  # type: ignore[misc]
    is_over.set()
    await asyncio.gather(*asking)
    assert proxy.port == port


async def test_a_listener_has_another_role(proxy: Proxy) -> None:
    client = await proxy.client()
    await client.ask("/")
    await proxy.reload(listeners=[{"address": "127.0.0.1:0", "redirect_to_https": True}])
    for _ in range(12):
        assert (await proxy.ask()).status in {307, 308}
    await proxy.reload(listeners=[{"address": "127.0.0.1:0", "proxy_protocol": True}], trusted_proxies=["127.0.0.1"])
    for _ in range(12):
        async with await PlainClient.connect(proxy.port) as one:
            one._writer.write(b"PROXY TCP4 203.0.113.7 127.0.0.1 5000 80\r\n")
            assert (await one.ask("/")).status == 200
    await proxy.reload(listeners=["127.0.0.1:0"])
    assert await proxy.ask_all() == {"a", "b"}


async def test_a_listener_begins_and_ends_to_speak_tls(proxy: Proxy, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    leaf = authority.issue("localhost")
    client, tunnel = await proxy.client(), await proxy.tunnel()
    await client.ask("/")
    tls = {"certificates": [leaf.section]}
    await proxy.reload(listeners=[{"address": "127.0.0.1:0", "tls": tls}])
    context = ssl.create_default_context(cafile=str(authority.file))
    for _ in range(12):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", proxy.port, ssl=context, server_hostname="localhost"
        )
        async with PlainClient(reader, writer) as secure:
            answer = await secure.ask("/")
            assert answer.status == 200
            assert "Secure" in answer.fields["set-cookie"]
    assert (await client.ask("/")).status == 200  # as it was opened: without TLS
    await tunnel.echo()
    assert await read_metric(proxy.admin, "certificate_not_after_timestamp_seconds") > 0
    await proxy.reload(listeners=["127.0.0.1:0"])
    assert await proxy.ask_all() == {"a", "b"}


# The admin listener


def has_file(address: Address) -> bool:
    return Path(address.path).exists()


async def test_the_admin_listener_moves_and_gets_a_token(proxy: Proxy, tmp_path: Path) -> None:
    first, second = proxy.admin, Address(path=str(tmp_path / "other.sock"))
    await proxy.reload(admin={"address": str(second)})
    assert not has_file(first)
    assert (await read_admin(second, "/api/v1/state"))[0] == 200
    await proxy.reload(admin={"address": str(second), "token": TOKEN})
    assert (await read_admin(second, "/api/v1/state"))[0] == 401
    assert (await read_admin(second, "/api/v1/state", TOKEN))[0] == 200
    assert (await read_admin(second, "/readyz"))[0] == 200
    changes = await proxy.reload(admin={"address": str(second), "token": TOKEN[::-1]})
    assert changes == ["admin.token: changed"]
    assert (await read_admin(second, "/api/v1/state", TOKEN))[0] == 401
    await proxy.reload(admin=False)
    assert not has_file(second)
    await proxy.reload(admin={"address": str(first)})
    assert (await read_admin(first, "/api/v1/state"))[0] == 200


async def test_what_was_counted_is_kept_when_the_admin_listener_moves(proxy: Proxy, tmp_path: Path) -> None:
    await proxy.ask_all(10)
    await until(lambda: proxy.supervisor.fleet.count_open() == (0, 0), "all have ended")
    await proxy.reload(admin={"address": f"unix:{tmp_path}/other.sock"})
    assert await read_metric(proxy.admin, "exchanges_total") == 10
    assert await read_metric(proxy.admin, "reloads_total", outcome="ok") == 1


# Workers


async def test_more_and_fewer_workers(proxy: Proxy) -> None:
    cookie = await proxy.pin("b")
    tunnels = [await proxy.tunnel(cookie) for _ in range(12)]
    for count in (1, 3, 1, 2):
        assert await proxy.reload(workers=count)
        processes = pids(proxy.supervisor)
        assert len(processes) == count
        assert all(map(is_running, processes))
        for tunnel in tunnels:
            await tunnel.echo()
        for _ in range(6):
            answer = await proxy.ask(cookie)
            assert (answer.body, answer.cookie) == (b"b", None)
        assert await proxy.ask_all() == {"a", "b"}
        await until(lambda: not proxy.supervisor.fleet.leaving, "those that went have ended")
    assert proxy.supervisor.fleet.restarts == 0


def count_held(apps: Apps) -> int:
    return sum(head.startswith("GET /hold") for app in apps.values() for head in app.heads)


async def test_a_request_under_way_is_finished_by_a_worker_that_goes(proxy: Proxy) -> None:
    clients = [await proxy.client() for _ in range(12)]
    for client in clients:
        client.send("/hold")
    await until(lambda: count_held(proxy.apps) == len(clients), "all have arrived")
    await proxy.reload(workers=1)
    for app in proxy.apps.values():
        app.released.set()
    assert {(await client.receive()).status for client in clients} == {200}
    await until(lambda: not proxy.supervisor.fleet.leaving, "it has ended")
    for client in clients:
        try:
            assert (await client.ask("/")).status == 200
        except (AbortedError, ConnectionError):
            raise AssertionError(
                "an idle connection was closed with its worker, instead of being handed over"
            ) from None


async def test_a_listener_is_closed_by_workers_too_that_are_leaving(proxy: Proxy) -> None:
    """Whoever connects to an address that is no longer served must be refused, not left waiting."""
    clients = [await proxy.client() for _ in range(12)]
    for client in clients:
        client.send("/hold")
    await until(lambda: count_held(proxy.apps) == len(clients), "all have arrived")
    before = proxy.port
    await proxy.reload(workers=1)
    assert proxy.supervisor.fleet.leaving, "the test needs one that cannot end yet"
    await proxy.reload(listeners=[f"127.0.0.1:{free_port()}"])
    is_closed = can_listen(before)
    for app in proxy.apps.values():
        app.released.set()
    assert is_closed
    assert {(await client.receive()).status for client in clients} == {200}


# What changes nothing


async def test_a_broken_file_changes_nothing_and_names_the_line(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    tunnel = await proxy.tunnel()
    text = proxy.file.path.read_text()
    proxy.file.path.write_text(f"{text}limits:\n  body: 5 parsecs\nnonsense: 1\n")
    with pytest.raises(UsageError) as error:
        await proxy.supervisor.reloader.reload()
    first, second = str(error.value).splitlines()
    line = text.count("\n") + 2
    assert first.startswith(f"{proxy.file.path}: line {line}: limits.body: ")
    assert second.startswith(f"{proxy.file.path}: line {line + 1}: nonsense: ")
    for said in (first, second):
        assert f"cannot reload, nothing has changed: {said}" in caplog.messages
    assert await read_metric(proxy.admin, "reloads_total", outcome="failed") == 1
    assert await proxy.ask_all() == {"a", "b"}
    await tunnel.echo()
    proxy.file.path.write_text(text)
    assert await proxy.reload(grace="2h")  # and it can still be reloaded


@pytest.mark.parametrize("what", ["gone", "no YAML", "not UTF-8", "no upstreams"])
async def test_a_file_that_cannot_be_served_changes_nothing(proxy: Proxy, what: str) -> None:
    path, text = proxy.file.path, proxy.file.path.read_text()
    path.unlink()
    if what != "gone":
        wrong = {"no YAML": b"upstreams: [", "not UTF-8": b"\xff", "no upstreams": b"upstreams: []"}
        path.write_bytes(wrong[what])
    with pytest.raises(UsageError) as error:
        await proxy.supervisor.reloader.reload()
    assert (str(path) in str(error.value)) == (what != "no upstreams")
    assert await proxy.ask_all() == {"a", "b"}
    path.write_text(text)
    assert await proxy.supervisor.reloader.reload() == ()


async def test_an_address_that_cannot_be_bound_changes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    free, path = free_port(), tmp_path / "proxy.sock"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        listeners = [f"127.0.0.1:{free}", f"unix:{path}", taken]
        assert f"cannot listen on {taken}" in await proxy.refused(listeners=listeners, limits=SHORT)
        assert can_listen(free)
        assert not path.exists()
        said = await proxy.refused(listeners=["127.0.0.1:0"], admin={"address": taken})
        assert f"cannot listen on {taken}" in said
    assert await proxy.ask_all(fields=LONG) == {"a", "b"}
    assert (await read_admin(proxy.admin, "/readyz"))[0] == 200


async def test_the_admin_listener_cannot_move_to_where_clients_connect(proxy: Proxy) -> None:
    said = await proxy.refused(admin={"address": proxy.file.sections.get("listeners", ["127.0.0.1:0"])[0]})
    assert "the address is in use" in said
    assert await proxy.ask_all() == {"a", "b"}


async def test_an_access_log_that_cannot_be_opened_changes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "access.log"
    port = free_port()
    said = await proxy.refused(
        access_log={"path": str(missing)}, listeners=["127.0.0.1:0", f"127.0.0.1:{port}"], limits=SHORT
    )
    assert str(missing) in said
    assert can_listen(port)
    assert await proxy.ask_all(fields=LONG) == {"a", "b"}


@pytest.mark.parametrize("where", ["listener", "upstream"])
async def test_a_certificate_that_cannot_be_read_changes_nothing(proxy: Proxy, tmp_path: Path, where: str) -> None:
    missing = str(tmp_path / "missing.pem")
    tls: dict[str, Any] = {"certificates": [{"certificate": missing, "key": missing}]}
    port = free_port()
    sections: dict[str, Any] = {"listeners": ["127.0.0.1:0", {"address": f"127.0.0.1:{port}", "tls": tls}]}
    if where == "upstream":
        sections = {"upstreams": [{"id": "a", "url": "https://127.0.0.1:1", "tls": {"ca": missing}}]}
    assert missing in await proxy.refused(**sections)
    assert can_listen(port)
    assert await proxy.ask_all() == {"a", "b"}


async def test_a_secret_that_cannot_be_kept_changes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "state" / "secret").mkdir(parents=True)
    port = free_port()
    await proxy.refused(
        affinity={"policy": "random"},
        state_directory=str(tmp_path / "state"),
        listeners=["127.0.0.1:0", f"127.0.0.1:{port}"],
    )
    assert can_listen(port)
    assert await proxy.ask_all() == {"a", "b"}


async def test_what_needs_a_restart_says_so_and_changes_nothing(proxy: Proxy, tmp_path: Path) -> None:
    said = await proxy.refused(control=str(tmp_path / "control.sock"), limits=SHORT)
    assert said.startswith("control: ")
    assert "restart the proxy" in said
    assert await proxy.ask_all(fields=LONG) == {"a", "b"}


async def test_a_worker_that_refuses_changes_nothing(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the supervisor could do, a worker may still not be able to: the others go back."""
    tunnel, port = await proxy.tunnel(), free_port()
    request = proxy.supervisor.fleet.links[1].channel.request

    async def refuse(kind: str, *given: Any, **more: Any) -> Any:
        if kind == "reload":
            monkeypatch.undo()
            return await request("sing")
        return await request(kind, *given, **more)

    monkeypatch.setattr(proxy.supervisor.fleet.links[1].channel, "request", refuse)
    said = await proxy.refused(listeners=[f"127.0.0.1:{port}"], limits=SHORT, upstreams=[proxy.apps["c"].upstream])
    assert "a worker cannot work by it" in said
    assert can_listen(port)
    links = proxy.supervisor.fleet.links
    before = [link.table.read().plane.connections for link in links]
    assert await proxy.ask_all(60, fields=LONG) == {"a", "b"}
    after = [link.table.read().plane.connections for link in links]
    assert all(now > then for now, then in zip(after, before, strict=True)), "both workers still accept"
    await tunnel.echo()


# One after the other


async def test_reloads_at_once_happen_one_after_the_other(proxy: Proxy) -> None:
    reloader = proxy.supervisor.reloader
    proxy.file.write(grace="2h")
    first = asyncio.get_running_loop().create_task(reloader.reload())
    results = await asyncio.gather(first, *(reloader.reload() for _ in range(5)))
    assert sorted(map(len, results)) == [0, 0, 0, 0, 0, 1]
    assert dict(reloader.outcomes) == {"ok": 1, "unchanged": 5, "failed": 0}


async def test_many_reloads_leave_nothing_open(proxy: Proxy) -> None:
    """Descriptors of the supervisor and of its workers, and tasks: as many as before."""

    def count() -> list[int]:
        return [len(list(Path(f"/proc/{one}/fd").iterdir())) for one in (os.getpid(), *pids(proxy.supervisor))]

    async def change_all(number: int) -> None:
        await proxy.reload(
            listeners=["127.0.0.1:0", f"127.0.0.1:{free_port()}"],
            upstreams=[app.upstream | {"weight": number + 1} for app in proxy.apps.values()],
            limits={"body": f"{number + 1}MiB"},
            admin={"address": proxy.file.sections["admin"]["address"], "token": f"{number:016}"},
            health={"probe": {"interval": f"{number + 60}s"}},
        )

    await change_all(0)
    await proxy.ask_all(12)
    await until(lambda: proxy.supervisor.fleet.count_open() == (0, 0), "all have ended")
    before, tasks = count(), len(asyncio.all_tasks())
    for number in range(1, 16):
        await change_all(number)
    await until(lambda: all(now <= then + 2 for now, then in zip(count(), before, strict=True)), f"as before: {before}")
    await until(lambda: len(asyncio.all_tasks()) <= tasks + 1, f"{tasks} tasks")


# Signals and the file itself


async def test_a_signal_reloads(proxy: Proxy) -> None:
    proxy.file.write(grace="2h")
    proxy.supervisor.on_reload()
    await until(lambda: proxy.supervisor.reloader.outcomes["ok"] == 1, "it has been reloaded")
    assert proxy.supervisor.config.grace_s == 7200
    proxy.file.path.write_text("nonsense: 1")
    proxy.supervisor.on_reload()
    await until(lambda: proxy.supervisor.reloader.outcomes["failed"] == 1, "it was refused")


async def test_a_signal_before_it_serves_is_not_lost(tmp_path: Path, apps: Apps) -> None:
    file = File(tmp_path / "proxy.yaml", upstreams=[apps["a"].upstream])
    supervisor = Supervisor(file.load())
    file.write(grace="2h")
    supervisor.on_reload()
    serving = spawn(supervisor.run(), "serve")
    await until(lambda: supervisor.config.grace_s == 7200, "it was reloaded")
    supervisor.stop()
    await asyncio.wait_for(serving, DEADLINE_S)


async def test_a_file_that_changes_is_read_where_that_is_asked_for(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = proxy.supervisor.reloader.outcomes
    proxy.file.write(grace="2h")
    await asyncio.sleep(3)
    assert sum(outcomes.values()) == 0
    await proxy.reload(reload_on_change=True)
    proxy.file.write(grace="3h")
    await until(lambda: proxy.supervisor.config.grace_s == 3 * 3600, "the change is taken")


async def test_a_file_is_watched_until_it_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload_module, "_LOOK_S", 0.02)
    path, other, seen = tmp_path / "a.yaml", tmp_path / "b.yaml", list[str]()
    path.write_text("0")

    async def on_change() -> None:
        seen.append(path.read_text())

    watching = spawn(watch_file(path, on_change), "watch")
    await asyncio.sleep(0.2)
    assert seen == []
    path.write_text("one")
    await until(lambda: seen == ["one"], "a change is seen")
    other.write_text("another")
    other.replace(path)
    await until(lambda: seen == ["one", "another"], "a rename is seen")
    path.unlink()
    await asyncio.sleep(0.2)  # a file that is gone is no change
    other.write_text("linked")
    path.symlink_to(other)
    await until(lambda: seen == ["one", "another", "linked"], "a link is seen")
    await asyncio.sleep(0.2)
    assert len(seen) == 3
    watching.cancel()


# What was taken over stays


async def test_secrets_of_a_proxy_that_was_taken_over_are_kept(
    tmp_path: Path, apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not in the file, and the clients of that proxy come with tokens that they have signed."""
    theirs = b"the secret of the proxy that was before"
    monkeypatch.setattr(supervisor_module.Supervisor, "_find_secrets", lambda _: (SECRET.encode(), theirs))
    async with started(tmp_path, apps) as proxy:
        assert proxy.supervisor.signing == (SECRET.encode(), theirs)
        await proxy.reload(grace="2h")
        assert theirs in proxy.supervisor.signing
        assert theirs in proxy.supervisor.fleet.orders.secrets
