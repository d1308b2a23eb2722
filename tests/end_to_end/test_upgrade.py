"""An upgrade of a running proxy: nobody who is connected notices, and what goes wrong leaves the old version in place.

Another version is a copy of the package that the test changes, and that the proxy finds in place of its own.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.certificates import Authority
from tests.helpers.operated import (
    GatedApp,
    Proxy,
    Stage,
    Tree,
    describe_body,
    until_so,
)
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.proc import ports_held, zombies_of
from tests.helpers.processes import free_port
from tests.helpers.supervised import DEADLINE_S, Tunnel, until

UPGRADES = 3
BODY = bytes(range(256)) * 400


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(tmp_path) as stage:
        yield stage


async def whole(client: PlainClient, size: int) -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        return await client._reader.readexactly(size)


async def until_waiting(app: GatedApp, path: str, count: int = 1) -> None:
    await until(lambda: app.waiting[path] == count, f"{count} requests for {path} are under way")


async def upstreams_of(proxy: Proxy) -> dict[str, dict[str, Any]]:
    [cluster] = json.loads(await proxy.get("/api/v1/state"))["clusters"]
    return {one["id"]: one for one in cluster["upstreams"]}


# Nobody notices


async def test_whoever_is_connected_stays_connected(stage: Stage) -> None:
    """Same process, other workers; tunnels and idle connections go on, and nobody is refused meanwhile."""
    app = await stage.app()
    proxy = await stage.serve(app)
    refused: list[Exception] = []
    answered = 0
    is_over = False

    async def connect_again_and_again() -> None:
        nonlocal answered
        while not is_over:
            try:
                assert (await proxy.ask())[0] == 200
                answered += 1
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is a client that noticed
                refused.append(error)

    kept = [await proxy.connect() for _ in range(6)]
    cookies = [(await client.ask("/")).cookie for client in kept]
    tunnels = [await proxy.open_tunnel(cookie) for cookie in cookies]
    connecting = asyncio.get_running_loop().create_task(connect_again_and_again())
    for _ in range(UPGRADES):
        before = proxy.workers
        said = await proxy.upgrade()
        assert said.startswith("upgraded from version 0.1.0 to 0.1.0: 6 tunnels and "), said
        await proxy.replaced(before)
        await until(lambda: len(proxy.workers) == 2, "there are two workers")
        for client in kept:
            answer = await client.ask("/")
            assert (answer.status, answer.body) == (200, b"app")
        for tunnel in tunnels:
            await tunnel.echo()
    is_over = True
    await connecting
    assert refused == []
    assert answered
    await proxy.stop()


async def test_what_is_known_and_counted_goes_on(stage: Stage) -> None:
    """Admin states, health, sessions; and no counter ever falls."""
    app, drained = await stage.app("app"), await stage.app("drained")
    gone = {"id": "gone", "url": f"http://127.0.0.1:{free_port()}"}
    proxy = await stage.serve(
        app, drained, upstreams=[app.upstream, drained.upstream, gone], health={"probe": {"interval": "1s"}}
    )
    cookie = None
    for _ in range(5):
        async with await proxy.connect() as client:
            cookie = (await client.ask("/")).cookie
            assert (await proxy.ask(cookie=cookie))[0] == 200
    tunnel = await proxy.open_tunnel(cookie)
    await proxy.set_state("drained", "drain")
    await until_state(proxy, "gone", health="unhealthy")
    await proxy.until_metric("sessions_active", 5)
    known = await upstreams_of(proxy)
    assert known["drained"]["admin_state"] == "drain"
    sessions = {name: one["sessions"] for name, one in known.items()}
    assert sum(sessions.values()) == 5
    for number in range(1, UPGRADES + 1):
        before = await proxy.samples()
        old = proxy.workers
        await proxy.upgrade()
        for _ in range(3):  # at once, and when the old workers are gone
            now = await upstreams_of(proxy)
            assert {name: one["sessions"] for name, one in now.items()} == sessions
            assert {name: (one["admin_state"], one["health"], one["is_refused"]) for name, one in now.items()} == {
                name: (one["admin_state"], one["health"], one["is_refused"]) for name, one in known.items()
            }
            after = await proxy.samples()
            fallen = {
                name: (value, after.get(name))
                for name, value in before.items()
                if name[0].endswith(("_total", "_count", "_sum", "_bucket"))
                and not name[0].startswith(("python_", "process_"))
                and after.get(name, 0.0) < value
            }
            assert fallen == {}
            before = after
            await proxy.replaced(old)
        await proxy.until_metric("exchanges_total", 10, status_class="2xx")
        assert await proxy.metric("upgrades_total", outcome="ok") == number
        await proxy.until_metric("tunnels_open", 1)
    tunnel.client._writer.close()
    await proxy.until_metric("tunnels_open", 0)
    await proxy.until_metric("tunnel_duration_seconds_count", 1)
    assert await proxy.metric("worker_restarts_total") == 0


async def until_state(proxy: Proxy, upstream_id: str, **wanted: Any) -> None:
    async def is_so() -> bool:
        return wanted.items() <= (await upstreams_of(proxy))[upstream_id].items()

    await until_so(is_so)


async def test_an_exchange_under_way_ends_well_and_then_its_connection_moves(stage: Stage) -> None:
    """A slow answer, half an upload, events, half a head."""
    app = await stage.app()
    proxy = await stage.serve(app)
    slow, upload, events, partial = [await proxy.connect() for _ in range(4)]
    slow.send("/hold", fields={"X-Id": "slow"})
    head = f"POST /upload HTTP/1.1\r\nHost: localhost\r\nX-Id: upload\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    upload._writer.write(head + BODY[: len(BODY) // 2])
    events.send("/events", fields={"X-Id": "events"})
    await until_waiting(app, "/hold")
    await until_waiting(app, "/upload")
    assert (await events.receive_head())[0] == 200
    app.emit(b"data: 1\n\n")
    assert await whole(events, 14) == b"9\r\ndata: 1\n\n\r\n"
    partial._writer.write(b"GET / HTTP/1.1\r\nHost: loc")
    before = proxy.workers
    said = await proxy.upgrade()
    assert "3 in an exchange cannot, and have 30 s to end in the old workers" in said, said
    partial._writer.write(b"alhost\r\nX-Id: partial\r\n\r\n")
    assert (await partial.receive()).body == b"app"
    app.emit(b"data: 2\n\n")
    assert await whole(events, 14) == b"9\r\ndata: 2\n\n\r\n"
    upload._writer.write(BODY[len(BODY) // 2 :])
    assert (await upload.receive()).body == describe_body(BODY)
    app.gate.set()
    assert (await slow.receive()).body == b"app"
    app.emit(None)
    assert (await whole(events, 5)) == b"0\r\n\r\n"
    await proxy.replaced(before)
    for client in (slow, upload, events, partial):
        assert (await client.ask("/", fields={"X-Id": "again"})).status == 200
    assert app.ids == {"slow": 1, "upload": 1, "events": 1, "partial": 1, "again": 4}
    await proxy.until_metric("exchanges_total", 8, status_class="2xx")
    await proxy.stop()


async def test_behind_a_proxy_protocol_header_and_on_a_unix_socket(stage: Stage) -> None:
    """What the header said of the client is known to the new worker too; the file of the socket stays where it is."""
    app = await stage.app()
    path, port = stage.short / "s", free_port()
    listeners = [{"address": f"127.0.0.1:{port}", "proxy_protocol": True}, {"address": f"unix:{path}"}]
    proxy = await stage.serve(app, listeners=listeners, trusted_proxies=["127.0.0.0/8"])
    behind, local = await proxy.connect(port), await proxy.connect(str(path))
    behind._writer.write(b"PROXY TCP4 192.0.2.7 192.0.2.1 4321 80\r\n")
    for client in (behind, local):
        assert (await client.ask("/")).status == 200
    tunnels = [await Tunnel.open(await proxy.connect(str(path)))]
    second = await proxy.connect(port)
    second._writer.write(b"PROXY TCP4 192.0.2.8 192.0.2.1 4321 80\r\n")
    tunnels.append(await Tunnel.open(second))
    file, before = path.stat().st_ino, proxy.workers
    await proxy.upgrade()
    await proxy.replaced(before)
    assert (await behind.ask("/")).status == 200
    assert app.forwarded == "192.0.2.7"
    assert (await local.ask("/")).status == 200
    for tunnel in tunnels:
        await tunnel.echo()
    assert path.stat().st_ino == file
    async with await PlainClient.connect(str(path)) as late:
        assert (await late.ask("/")).status == 200
    await proxy.stop()
    assert not path.exists()


async def test_the_access_log_has_one_line_for_a_tunnel_with_its_whole_duration(stage: Stage) -> None:
    app = await stage.app()
    proxy = await stage.serve(app)
    loop = asyncio.get_running_loop()
    tunnel = await proxy.open_tunnel()
    opened_at = loop.time()
    for _ in range(UPGRADES):
        before = proxy.workers
        await proxy.upgrade()
        await proxy.replaced(before)
        await tunnel.echo()
    least_s = loop.time() - opened_at
    await proxy.stop()
    lines = [json.loads(line) for line in proxy.access_log.read_text().splitlines()]
    assert [line["target"] for line in lines] == ["/ws"]
    assert lines[0]["duration_s"] > least_s - 1.0  # less the moments in which it was on its way


# Another version


async def test_what_is_installed_now_runs_afterwards(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree()
    tree.name_version("1.0.0")
    proxy = await stage.serve(app, tree=tree)
    tunnel = await proxy.open_tunnel()
    for old, new in (("1.0.0", "2.0.0a1"), ("2.0.0a1", "3.0")):
        tree.name_version(new)
        assert (await proxy.upgrade()).startswith(f"upgraded from version {old} to {new}: 1 tunnels")
        assert await proxy.metric("build_info", version=new) == 1
        assert await proxy.metric("build_info") == 1
        state = json.loads(await proxy.get("/api/v1/state"))
        assert {one["version"] for one in state["workers"] if not one["is_leaving"]} == {new}
        await tunnel.echo()
    await proxy.stop()


BROKEN = {
    "syntax": ("cli/__init__.py", None, "\n\ndef broken(:\n", "SyntaxError: invalid syntax"),
    "check": (
        "control/upgrade.py",
        "    if not inheritance.loaded.config.has_upstreams:\n        raise UsageError(",
        "    if True:\n        raise UsageError('it wants more') or (",
        "the new version cannot start: stickyproxy: it wants more",
    ),
    "protocol": ("control/messages.py", "PROTOCOL = 2\n", "PROTOCOL = 22\n", "leaves a state that 0.1.0 cannot read"),
    "worker that exits": (
        "control/worker_process.py",
        '    set_up_log("info", "worker")\n',
        '    raise SystemExit("it does not like it here")\n',
        "a worker of the new version cannot start: it ended before it could start",
    ),
    "worker that refuses": (
        "control/worker_process.py",
        "        body = message.body\n        config = _load(body)\n",
        "        raise ChannelError('no such thing')\n",
        "a worker of the new version cannot start: no such thing",
    ),
    "worker that hangs": (
        "control/worker_process.py",
        '    set_up_log("info", "worker")\n',
        "    __import__('time').sleep(3600)\n",
        "a worker of the new version cannot start: no sign of life within 30 s",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_version_that_does_not_come_up_changes_nothing(stage: Stage, kind: str) -> None:
    name, old, new, reason = BROKEN[kind]
    app, tree = await stage.app(), stage.tree()
    proxy = await stage.serve(app, tree=tree)
    kept, held = await proxy.connect(), await proxy.connect()
    tunnel = await proxy.open_tunnel()
    assert (await kept.ask("/")).status == 200
    held.send("/hold", fields={"X-Id": "held"})
    await until_waiting(app, "/hold")
    processes = proxy.processes
    if old is None:
        tree.add(name, new)
    else:
        tree.replace(name, old, new)
    said = await fail_from_here(proxy)
    assert reason in said, said
    assert len(said.splitlines()) == 1
    await until(lambda: proxy.processes == processes, "nothing else runs than before")
    assert zombies_of(proxy.pid) == set()
    app.gate.set()
    assert (await held.receive()).status == 200
    for client in (kept, held):
        assert (await client.ask("/")).status == 200
    await tunnel.echo()
    assert await proxy.metric("upgrades_total", outcome="failed") == 1
    assert await proxy.metric("build_info", version="0.1.0") == 1
    tree.mend(name)
    tree.name_version("2.0")
    said = await proxy.upgrade()
    assert said.startswith("upgraded from version 0.1.0 to 2.0: 1 tunnels and 2 connections have moved"), said
    await tunnel.echo()
    assert await proxy.metric("upgrades_total", outcome="ok") == 1
    await proxy.stop()


async def fail_from_here(proxy: Proxy) -> str:
    """Ask for an upgrade with a command that is whole itself, and return why it failed."""
    proxy._root = Path(__file__).parents[2]
    said = await proxy.fail_to_upgrade()
    assert said.startswith("stickyproxy: ")
    return said


# Commands and signals meanwhile


def hold(tree: Tree, name: str, old: str, flag: Path, seconds: float = 2.0) -> None:
    """Let the code of a tree tell where it is by a file, and wait there."""
    waits = f"(__import__('pathlib').Path({str(flag)!r}).touch(), __import__('time').sleep({seconds}))"
    tree.replace(name, old, f"{old.partition(old.lstrip())[0]}{waits}\n{old}")


async def test_a_second_upgrade_is_refused_and_a_signal_for_one_is_harmless(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree()
    proxy = await stage.serve(app, tree=tree)
    tunnel = await proxy.open_tunnel()
    flag = stage.directory / "checking"
    hold(tree, "control/upgrade.py", "    program = Program.own()\n", flag)
    first = asyncio.get_running_loop().create_task(proxy.upgrade())
    await until(flag.exists, "the first is under way")
    os.kill(proxy.pid, signal.SIGUSR2)
    async with await PlainClient.connect(str(proxy.control)) as client:
        answer = await client.ask("/api/v1/upgrade", method="POST")
    assert (answer.status, answer.body) == (409, b'{"error": "an upgrade is under way already"}')
    assert "an upgrade is under way already" in await proxy.fail_to_upgrade()
    os.kill(proxy.pid, signal.SIGUSR2)
    assert (await first).startswith("upgraded from")
    await tunnel.echo()
    assert await proxy.metric("upgrades_total", outcome="ok") == 1
    assert await proxy.metric("upgrades_total", outcome="failed") == 0
    before = proxy.workers
    os.kill(proxy.pid, signal.SIGUSR2)  # by itself it does upgrade
    await proxy.replaced(before)
    await tunnel.echo()
    await proxy.stop()


# Where an upgrade stands when the signal comes: the code that is held, and whether that is the old version's.
MOMENTS = {
    "check": ("control/upgrade.py", "    program = Program.own()\n", False),
    "start": ("control/worker_process.py", '    set_up_log("info", "worker")\n', False),
    "leave": ("control/upgrade.py", "        inheritance = await self._supervisor.leave(successors)\n", True),
    "execute": ("control/upgrade.py", "    sys.stdout.flush()\n", True),
    "executed": ("control/supervisor.py", "    predecessor = None if take_over is None else ", False),
    "take over": ("control/upgrade.py", "        began = time.monotonic()\n", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_stop_during_an_upgrade_is_not_lost(stage: Stage, moment: str) -> None:
    """It ends in order: the exchange is answered, the tunnel gets its Close frame."""
    name, old, is_of_old = MOMENTS[moment]
    app, tree = await stage.app(), stage.tree()
    flag = stage.directory / "there"
    if is_of_old:
        hold(tree, name, old, flag)
    proxy = await stage.serve(app, tree=tree)
    held, tunnel = await proxy.connect(), await proxy.open_tunnel()
    held.send("/hold", fields={"X-Id": "held"})
    await until_waiting(app, "/hold")
    if not is_of_old:
        hold(tree, name, old, flag)
    os.kill(proxy.pid, signal.SIGUSR2)
    await until(flag.exists, f"the upgrade is at its step {moment}")
    os.kill(proxy.pid, signal.SIGTERM)
    assert await tunnel.receive_close() in {1001, 1012}
    app.gate.set()
    assert (await held.receive()).body == b"app"
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == 0, proxy.log
    await until(lambda: not proxy.processes, "no process is left")
    assert "Traceback" not in proxy.log


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_reload_during_an_upgrade_is_not_lost(stage: Stage, moment: str) -> None:
    """Workers and supervisor of the new version work by the new file in the end."""
    name, old, is_of_old = MOMENTS[moment]
    app, tree = await stage.app(), stage.tree()
    flag = stage.directory / "there"
    if is_of_old:
        hold(tree, name, old, flag)
    proxy = await stage.serve(app, tree=tree)
    tunnel = await proxy.open_tunnel()
    if not is_of_old:
        hold(tree, name, old, flag)
    before = proxy.workers
    port = free_port()
    os.kill(proxy.pid, signal.SIGUSR2)
    await until(flag.exists, f"the upgrade is at its step {moment}")
    text = proxy.file.read_text().replace("listeners:\n", f"listeners:\n- 127.0.0.1:{port}\n")
    assert str(port) in text
    proxy.file.write_text(text)
    os.kill(proxy.pid, signal.SIGHUP)
    await proxy.replaced(before)
    await until_so(lambda: can_ask(port))
    for _ in range(20):  # either worker
        async with await PlainClient.connect(port) as client:
            assert (await client.ask("/")).status == 200
    assert await proxy.metric("upgrades_total", outcome="ok") == 1
    assert await proxy.metric("reloads_total", outcome="ok") == 1
    await tunnel.echo()
    await proxy.stop()


async def can_ask(port: int) -> bool:
    try:
        async with await PlainClient.connect(port) as client:
            return (await client.ask("/")).status == 200
    except (OSError, AbortedError):
        return False


# TLS, which cannot move


class TlsSite:
    """A proxy that listens over TLS on `port`, beside its plain listener."""

    def __init__(self, stage: Stage) -> None:
        authority = Authority(stage.directory)
        self.context = authority.client_context()
        self.port, self.plain_port = free_port(), free_port()
        tls = {"certificates": [authority.issue("localhost").section]}
        self.listeners = [f"127.0.0.1:{self.plain_port}", {"address": f"127.0.0.1:{self.port}", "tls": tls}]


async def test_tls_stays_where_it_is_until_it_ends(stage: Stage) -> None:
    """The command says so; an idle connection learns with its next answer that it is to go, and nobody is cut."""
    app, site = await stage.app(), TlsSite(stage)
    proxy = await stage.serve(app, listeners=site.listeners, grace="1h")
    kept, held = [await proxy.connect(site.port, site.context) for _ in range(2)]
    tunnel = await Tunnel.open(await proxy.connect(site.port, site.context))
    plain = await Tunnel.open(await proxy.connect(site.plain_port))
    assert (await kept.ask("/")).fields.get("connection") != "close"
    held.send("/hold")
    await until_waiting(app, "/hold")
    first = proxy.workers
    said = await proxy.upgrade()
    assert "1 tunnels and " in said, said
    assert "3 of TLS cannot, and have 3600 s to end in the old workers" in said, said
    assert first & proxy.workers
    answer = await kept.ask("/")
    assert (answer.status, answer.fields["connection"]) == (200, "close")
    assert await kept.receive_end() == b""
    await tunnel.echo()
    fresh = await proxy.connect(site.port, site.context)
    assert (await fresh.ask("/")).fields.get("connection") != "close"
    second = proxy.workers - first
    said = await proxy.upgrade()  # while old workers still retire
    assert "3 of TLS cannot" in said, said
    await tunnel.echo()
    await plain.echo()
    app.gate.set()
    answer = await held.receive()
    assert (answer.status, answer.fields["connection"]) == (200, "close")
    assert (await fresh.ask("/")).fields["connection"] == "close"
    tunnel.client._writer.close()
    await proxy.replaced(first | second)
    await plain.echo()
    await proxy.stop()


async def test_when_the_grace_is_over_tunnels_of_tls_are_closed_with_a_reason(stage: Stage) -> None:
    app, site = await stage.app(), TlsSite(stage)
    proxy = await stage.serve(app, listeners=site.listeners, grace="1s")
    tunnels = [await Tunnel.open(await proxy.connect(site.port, site.context)) for _ in range(10)]
    plain = await Tunnel.open(await proxy.connect(site.plain_port))
    before = proxy.workers
    said = await proxy.upgrade()
    assert "10 of TLS cannot, and have 1 s to end in the old workers" in said, said
    assert [await tunnel.receive_close() for tunnel in tunnels] == [1012] * 10
    for tunnel in tunnels:
        tunnel.client._writer.close()
    await proxy.replaced(before)
    await plain.echo()
    assert proxy.child.is_running()
    await proxy.stop()


async def test_an_exchange_may_last_over_two_upgrades_and_then_its_connection_moves(stage: Stage) -> None:
    """The worker that it was to go to has gone itself meanwhile."""
    app, site = await stage.app(), TlsSite(stage)
    proxy = await stage.serve(app, listeners=site.listeners, grace="1h")
    held, handshake = await proxy.connect(site.plain_port), await proxy.connect(site.plain_port)
    held.send("/hold", fields={"X-Id": "held"})
    await until_waiting(app, "/hold")
    first = proxy.workers
    await proxy.upgrade()
    staying = await Tunnel.open(await proxy.connect(site.port, site.context))  # keeps one worker of the second image
    second = proxy.workers - first
    await proxy.upgrade()
    app.gate.set()
    assert (await held.receive()).body == b"app"
    await proxy.replaced(first)
    assert (await held.ask("/", fields={"X-Id": "again"})).body == b"app"
    tunnel = await Tunnel.open(handshake)
    await tunnel.echo()
    staying.client._writer.close()
    await proxy.replaced(second)
    await tunnel.echo()
    assert (await held.ask("/", fields={"X-Id": "once more"})).body == b"app"
    assert app.ids == {"held": 1, "again": 1, "once more": 1}
    await proxy.stop()


# Processes that die, or hang, in the middle


def strike(tree: Tree, name: str, old: str, flag: Path, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the first process of a tree that comes to some code send a signal to itself there."""
    code = (
        f"{old.partition(old.lstrip())[0]}import os as _os, pathlib as _p\n"
        f"{old.partition(old.lstrip())[0]}try:\n"
        f"{old.partition(old.lstrip())[0]}    _p.Path({str(flag)!r}).open('x').write(str(_os.getpid()))\n"
        f"{old.partition(old.lstrip())[0]}    _os.kill(_os.getpid(), {int(number)})\n"
        f"{old.partition(old.lstrip())[0]}except FileExistsError:\n"
        f"{old.partition(old.lstrip())[0]}    pass\n"
    )
    tree.replace(name, old, code + old)


ACCEPT = ("control/worker_process.py", "        await self._running.accept()\n")
PREPARE = (
    "control/transfer.py",
    "        prepared, self._prepared = self._prepared, []\n        for arrival in prepared:\n            try:\n",
)
BATCH = ("control/transfer.py", "        if self._is_preparing or self._prepared:\n")
START = ("control/worker_process.py", "        tune_collector()\n")


async def hold_connections(proxy: Proxy, count: int) -> tuple[list[PlainClient], list[Any]]:
    """Return idle connections and tunnels, so many of each."""
    kept = [await proxy.connect() for _ in range(count)]
    for client in kept:
        assert (await client.ask("/")).status == 200
    return kept, [await proxy.open_tunnel() for _ in range(count)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("place", [ACCEPT, BATCH], ids=["accepts", "is given connections"])
async def test_a_new_worker_that_is_lost_before_it_has_anything_costs_nothing(
    stage: Stage, place: tuple[str, str], number: signal.Signals
) -> None:
    app, tree = await stage.app(), stage.tree()
    proxy = await stage.serve(app, tree=tree)
    kept, tunnels = await hold_connections(proxy, 8)
    before = proxy.workers
    flag = stage.directory / "struck"
    strike(tree, *place, flag, number)
    said = await proxy.upgrade()
    assert flag.exists()
    assert said.startswith("upgraded from version 0.1.0 to 0.1.0: 8 tunnels and "), said
    await proxy.replaced(before)
    for client in kept:
        assert (await client.ask("/", fields={"X-Id": "again"})).status == 200
    for tunnel in tunnels:
        await tunnel.echo()
    assert app.ids == {"again": 8}
    if number is signal.SIGSTOP and flag.read_text() and int(flag.read_text()) in proxy.workers:
        os.kill(int(flag.read_text()), signal.SIGCONT)
    await until(lambda: len(proxy.workers) == 2, "there are two workers")
    for _ in range(20):
        assert (await proxy.ask())[0] == 200
    before = proxy.workers
    await proxy.upgrade()
    await proxy.replaced(before)
    for tunnel in tunnels:
        await tunnel.echo()
    await proxy.stop()


async def test_a_new_worker_that_dies_before_its_supervisor_is_executed_is_replaced(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree()
    proxy = await stage.serve(app, tree=tree)
    kept, tunnels = await hold_connections(proxy, 4)
    before = proxy.workers
    flag = stage.directory / "struck"
    # It says that it is ready, and dies before the execution.
    tree.replace(
        START[0],
        START[1],
        f"{START[1]}        asyncio.get_running_loop().call_later(0.05, self._die)\n",
    )
    tree.replace(
        START[0],
        "    async def _on_ping(",
        f"    def _die(self):\n        try:\n            open({str(flag)!r}, 'x').close()\n"
        "            os.kill(os.getpid(), 9)\n        except FileExistsError:\n            pass\n\n"
        "    async def _on_ping(",
    )
    await proxy.upgrade()
    assert flag.exists()
    await proxy.replaced(before)
    for client in kept:
        assert (await client.ask("/")).status == 200
    for tunnel in tunnels:
        await tunnel.echo()
    await until(lambda: len(proxy.workers) == 2, "there are two workers")
    assert zombies_of(proxy.pid) == set()
    await proxy.stop()


async def test_with_a_new_worker_only_that_is_lost_which_it_had_taken_over(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree()
    proxy = await stage.serve(app, tree=tree)
    kept, tunnels = await hold_connections(proxy, 60)  # several batches
    before = proxy.workers
    strike(tree, *PREPARE, stage.directory / "struck")
    await proxy.upgrade()
    assert (stage.directory / "struck").exists()
    await proxy.replaced(before)
    lost = 0
    for number, client in enumerate(kept):
        try:
            assert (await client.ask("/", fields={"X-Id": str(number)})).status == 200
        except AbortedError:
            lost += 1
    for tunnel in tunnels:
        try:
            await tunnel.echo()
        except (asyncio.IncompleteReadError, ConnectionError):
            lost += 1
    assert 0 < lost <= 40  # one batch
    assert max(app.ids.values()) == 1
    assert (await proxy.ask())[0] == 200
    await proxy.until_metric("worker_restarts_total", 1)
    await proxy.stop()


async def test_an_old_worker_that_dies_takes_only_its_own_along(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree()
    strike(
        tree,
        "control/worker_process.py",
        "        if self._is_departing or self._is_ending:\n",
        stage.directory / "struck",
    )
    tree.keep_connections()
    proxy = await stage.serve(app, tree=tree)
    kept, tunnels = await hold_connections(proxy, 20)
    before = proxy.workers
    doomed = {one: ports_held(one, proxy.port) for one in before}
    said = await proxy.upgrade()
    struck = int((stage.directory / "struck").read_text())
    assert "1 old workers could not hand over" in said, said
    await proxy.replaced(before)
    for client in (*kept, *(tunnel.client for tunnel in tunnels)):
        own = client._writer.get_extra_info("sockname")[1]
        if own in doomed[struck]:
            assert await client.receive_end() == b""
        elif client in kept:
            assert (await client.ask("/")).status == 200
    for tunnel in tunnels:
        if tunnel.client._writer.get_extra_info("sockname")[1] not in doomed[struck]:
            await tunnel.echo()
    assert sum(map(len, doomed.values())) == 40
    assert (await proxy.ask())[0] == 200
    await proxy.stop()


async def test_an_upgrade_mends_a_proxy_whose_workers_die_at_once(stage: Stage) -> None:
    """One worker ends again and again, and none stands in its place when the new version is executed."""
    app, tree = await stage.app(), stage.tree()
    proxy = await stage.serve(app, tree=tree)
    tunnels = [await proxy.open_tunnel() for _ in range(8)]
    victim = min(proxy.workers)
    doomed = ports_held(victim, proxy.port)
    tree.replace("control/worker_process.py", '    set_up_log("info", "worker")\n', "    raise SystemExit('bad')\n")
    os.kill(victim, signal.SIGKILL)
    await proxy.logged("worker 0 cannot start" if f"worker 0 (pid {victim})" in proxy.log else "cannot start")
    tree.mend("control/worker_process.py")
    await proxy.upgrade()
    await until(lambda: len(proxy.workers) == 2, "there are two workers")
    assert zombies_of(proxy.pid) == set()
    for tunnel in tunnels:
        if tunnel.client._writer.get_extra_info("sockname")[1] not in doomed:
            await tunnel.echo()
    for _ in range(10):
        assert (await proxy.ask())[0] == 200
    await proxy.stop()
