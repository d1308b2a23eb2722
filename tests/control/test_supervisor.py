"""The supervisor: what it starts in which order, what it leaves where it cannot start, and how it stops."""

import asyncio
import json
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from stickyproxy.config import Address, Loaded, load_text
from stickyproxy.control.admin.app import AdminListener
from stickyproxy.control.fleet import Fleet
from stickyproxy.control.inheritance import Inheritance
from stickyproxy.control.process import count_workers
from stickyproxy.control.runner.socket_directory import SocketDirectory
from stickyproxy.control.supervisor import Supervisor, find_secrets, serve
from stickyproxy.errors import UsageError
from stickyproxy.proxy.listener import bind
from tests.helpers.plain_client import AbortedError, PlainClient, ask
from tests.helpers.processes import free_port
from tests.helpers.runner import running_app
from tests.helpers.serving import can_listen
from tests.helpers.supervised import (
    DEADLINE_S,
    App,
    is_running,
    load,
    open_tunnel,
    pids,
    port_of,
    read_admin,
    read_metric,
    read_state,
    running,
    until,
)


@pytest.fixture
async def upstream() -> AsyncIterator[App]:
    app = await App("ok").start()
    yield app
    app.stop()


async def fail_to_start(loaded: Loaded) -> str:
    """Run a supervisor that cannot start, and return why; no process of it is left."""
    before = children()
    supervisor = Supervisor(loaded)
    with pytest.raises(UsageError) as error:
        await supervisor.run(lambda _: supervisor.stop())
    await until(lambda: children() <= before, "the workers have ended")
    return str(error.value)


def children() -> set[str]:
    """Return the process ids of the children, those included that have ended and were not waited for."""
    return {one for task in Path("/proc/self/task").glob("*/children") for one in task.read_text().split()}


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Starting


def test_without_upstreams_there_is_nothing_to_supervise() -> None:
    with pytest.raises(UsageError, match="no upstreams"):
        Supervisor(load(upstreams=[]))


async def test_it_serves_and_says_where(upstream: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loaded = load(listeners=["127.0.0.1:0", "localhost:0"], upstreams=[upstream.url])
    async with running(loaded) as supervisor:
        first, second = supervisor.addresses
        assert 0 != first.port != second.port != 0
        for address in (first, second):
            assert (await ask(address.port, "/")).body == b"ok"
        assert f"serving 1 upstreams on {first}, {second}" in caplog.messages
    assert can_listen(first.port)
    assert can_listen(second.port)


async def test_on_ready_is_called_with_the_real_addresses(upstream: App) -> None:
    supervisor = Supervisor(load(upstreams=[upstream.url]))
    given: list[Address] = []
    real: list[Address] = []

    def on_ready(addresses: list[Address]) -> None:
        given.extend(addresses)
        real.extend(supervisor.addresses)
        supervisor.stop()

    async with asyncio.timeout(DEADLINE_S):
        await supervisor.run(on_ready)
    assert given == real
    assert given[0].port


async def test_a_stop_before_the_start_ends_it_at_once() -> None:
    supervisor = Supervisor(load())
    supervisor.stop()
    async with asyncio.timeout(DEADLINE_S):
        await supervisor.run()
    assert list(supervisor.fleet) == []


async def test_what_killed_proxies_left_is_removed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="sp-") as short:
        monkeypatch.setenv("RUNTIME_DIRECTORY", short)
        left = ["1.control", "1.hand-over", "apps-1/g1-1.sock"]
        os.mkdir(f"{short}/apps-1", mode=0o700)  # noqa: PTH102
        for name in left:
            with socket.socket(socket.AF_UNIX) as link:
                link.bind(f"{short}/{name}")
        living = SocketDirectory.make(Path(short))
        async with running_app(tmp_path, 1):
            assert names_in(Path(short)) == {living.path.name, f"{os.getpid()}.hand-over"}
        living.close()


async def test_what_was_counted_for_a_removed_upstream_is_shown_by_another_image_too(upstream: App) -> None:
    async with running(load(upstreams=[upstream.url])) as supervisor:
        now = asyncio.get_running_loop().time()
        supervisor.fleet.removed.note({"gone": "shop"}, [], now)
        written = json.loads(json.dumps(supervisor.export().to_json()))
        another = Fleet(supervisor.fleet.orders, lambda *_: None)
        another.board.close()
        another.adopt(Inheritance.from_json(written | {"board": None}, os.environ))
        assert another.removed.clusters(now) == {"gone": "shop"}


async def test_the_workers_share_one_address(upstream: App, tmp_path: Path) -> None:
    admin = Address(path=str(tmp_path / "admin.sock"))
    async with running(load(upstreams=[upstream.url], workers=3, admin={"address": str(admin)})) as supervisor:
        processes = pids(supervisor)
        assert len(set(processes)) == 3
        assert os.getpid() not in processes
        assert all(map(is_running, processes))
        for _ in range(30):
            assert (await ask(port_of(supervisor), "/")).body == b"ok"
        status, body = await read_admin(admin, "/api/v1/state")
        workers = json.loads(body)["workers"]
        assert (status, [one["index"] for one in workers]) == (200, [0, 1, 2])
        assert [one["pid"] for one in workers] == processes
    assert not any(map(is_running, processes))


def test_auto_is_a_worker_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert count_workers(load(workers="auto").config) == 3
    assert count_workers(load(workers=2).config) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100_000)))
    assert 2 < count_workers(load(workers="auto").config) < 100_000


async def test_without_secrets_one_is_made(tmp_path: Path) -> None:
    async with running(load(affinity={}, state_directory=str(tmp_path / "state"))):
        assert (tmp_path / "state" / "secret").exists()


async def test_with_secrets_none_is_made(tmp_path: Path) -> None:
    async with running(load(state_directory=str(tmp_path / "state"))):
        assert not (tmp_path / "state").exists()


def test_without_a_cookie_none_is_kept(tmp_path: Path) -> None:
    config = load_text(f"affinity: {{cookie: false}}\nstate_directory: {tmp_path}/state", {})
    [secret] = find_secrets(config)
    assert len(secret) == 32
    assert not (tmp_path / "state").exists()


async def test_the_admin_listener_reads_what_runs(tmp_path: Path, upstream: App) -> None:
    path = tmp_path / "admin.sock"
    loaded = load(upstreams=[upstream.url], admin={"address": f"unix:{path}"})
    async with running(loaded) as supervisor:
        admin = Address(path=str(path))
        assert (await read_admin(admin, "/readyz"))[0] == 200
        await ask(port_of(supervisor), "/")
        [shown] = (await read_state(admin)).values()
        assert shown["address"] == upstream.url.removeprefix("http://")
        async with asyncio.timeout(DEADLINE_S):
            while not await read_metric(admin, "exchanges_total", status_class="2xx"):  # noqa: ASYNC110 -- from outside
                await asyncio.sleep(0.01)
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_the_lag_of_its_loop_is_measured_while_it_runs() -> None:
    async with running(load()) as supervisor:
        lag = supervisor.readings.loop_lag
        await until(lambda: sum(lag.histogram.counts), "the lag was measured")
    assert lag._timer is None


async def test_the_access_log_is_whole_in_the_end(tmp_path: Path, upstream: App) -> None:
    log = tmp_path / "access.log"
    loaded = load(upstreams=[upstream.url], access_log={"path": str(log)}, workers=2)
    async with running(loaded) as supervisor:
        for _ in range(20):
            await ask(port_of(supervisor), "/")
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 20


async def test_what_the_data_plane_finds_dead_is_known_to_the_control_plane(tmp_path: Path) -> None:
    admin = Address(path=str(tmp_path / "admin.sock"))
    upstreams = [f"http://127.0.0.1:{free_port()}"]
    loaded = load(upstreams=upstreams, health={"probe": False}, admin={"address": str(admin)}, workers=2)
    async with running(loaded) as supervisor:
        assert (await read_admin(admin, "/readyz"))[0] == 200
        assert (await ask(port_of(supervisor), "/")).status == 503
        async with asyncio.timeout(DEADLINE_S):
            while (answer := await read_admin(admin, "/readyz"))[0] == 200:  # noqa: ASYNC110 -- from outside
                await asyncio.sleep(0.01)
        assert answer == (503, b"no upstream can be used: 1 refuse connections, 0 in maintenance\n")


async def test_an_operator_who_was_answered_can_rely_on_it(tmp_path: Path, upstream: App) -> None:
    """All workers know: no new client goes to a drained upstream any more."""
    admin, other = Address(path=str(tmp_path / "admin.sock")), await App("other").start()
    sections = {"upstreams": [upstream.upstream, other.upstream], "admin": {"address": str(admin)}}
    async with running(load(**sections, workers=2, affinity={"policy": "round_robin"})) as supervisor:
        port = port_of(supervisor)
        assert {(await ask(port, "/")).body for _ in range(20)} == {b"ok", b"other"}
        for state, bodies in (("drain", {b"ok"}), ("ready", {b"ok", b"other"})):
            await put_state(admin, "other", state)
            assert {(await ask(port, "/")).body for _ in range(30)} == bodies
    other.stop()


async def put_state(admin: Address, upstream_id: str, state: str) -> None:
    path, body = f"/api/v1/clusters/default/upstreams/{upstream_id}/state", json.dumps({"state": state})
    async with await PlainClient.connect(admin.path) as client:
        client._writer.write(
            f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert (await client.receive()).status == 200


# Not starting


@pytest.fixture
def taken() -> Any:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("which", ["listener", "admin"])
async def test_it_binds_all_or_nothing(tmp_path: Path, taken: int, which: str) -> None:
    port, path, address = free_port(), tmp_path / "proxy.sock", f"127.0.0.1:{taken}"
    listeners = [f"127.0.0.1:{port}", f"unix:{path}"]
    loaded = (
        load(listeners=[*listeners, address])
        if which == "listener"
        else load(listeners=listeners, admin={"address": address})
    )
    assert (
        await fail_to_start(loaded) == f"cannot listen on {address}: the address is in use; is another proxy running?"
    )
    assert can_listen(port)
    assert not path.exists()


async def test_two_that_start_at_once_do_not_both_believe_that_they_serve() -> None:
    """Both could bind, as neither listens yet."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]

        def bind_late(address: Address) -> socket.socket:
            link = bind(address)
            other.listen()
            return link

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("stickyproxy.control.sockets.bind", bind_late)
            said = await fail_to_start(load(listeners=[f"127.0.0.1:{port}"]))
    assert said == f"cannot listen on 127.0.0.1:{port}: the address is in use; is another proxy starting?"


async def test_a_listener_may_not_be_the_admin_listener_too() -> None:
    """Whoever is a client would reach the API now and then: the socket would be one."""
    port = free_port()
    loaded = load(listeners=[f"127.0.0.1:{port}"], admin={"address": f"127.0.0.1:{port}"})
    assert "the address is in use" in await fail_to_start(loaded)
    assert can_listen(port)


@pytest.mark.parametrize("failing", ["secret", "access log", "admin", "worker", "accept"])
async def test_whatever_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    port, path = free_port(), tmp_path / "proxy.sock"
    sections: dict[str, Any] = {"listeners": [f"127.0.0.1:{port}", f"unix:{path}"], "workers": 2}
    if failing == "secret":
        (tmp_path / "secret").mkdir()
        sections |= {"affinity": {}, "state_directory": str(tmp_path)}
    if failing == "access log":
        sections |= {"access_log": {"path": str(tmp_path / "nowhere" / "access.log")}}
    if failing == "worker":
        monkeypatch.setattr("stickyproxy.control.worker_link._PROGRAM", "stickyproxy.no_such_program")

    async def fail(*_: object) -> NoReturn:
        raise UsageError("it fails")

    if failing == "admin":
        sections |= {"admin": {"address": f"unix:{tmp_path}/admin.sock"}}
        monkeypatch.setattr(AdminListener, "start", fail)
    if failing == "accept":
        monkeypatch.setattr(Fleet, "accept", fail)
    assert await fail_to_start(load(**sections))
    assert can_listen(port)
    assert names_in(tmp_path) <= {"secret"}
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert [name for name in left if name.startswith(("probe", "look", "drain"))] == []


async def test_the_reason_of_a_worker_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "access.log"
    said = await fail_to_start(load(access_log={"path": str(missing)}))
    assert str(missing) in said
    assert "no such file or directory" in said


# Stopping


async def test_it_finishes_what_is_open_and_takes_nobody_more(
    upstream: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    admin = Address(path=str(tmp_path / "admin.sock"))
    loaded = load(upstreams=[upstream.url], admin={"address": str(admin)}, grace="1h")
    async with running(loaded) as supervisor:
        port = port_of(supervisor)
        async with await PlainClient.connect(port) as client:
            client.send("/hold")
            await upstream.has_request.wait()
            await until(lambda: supervisor.fleet.count_open() == (1, 0), "the connection is counted")
            supervisor.stop()
            async with asyncio.timeout(DEADLINE_S):
                while (answer := await read_admin(admin, "/readyz"))[0] == 200:
                    pass
            assert answer[1] == b"the proxy is stopping\n"
            assert (await read_admin(admin, "/livez"))[0] == 200
            await until(lambda: can_listen(port), "the listener is closed")
            upstream.released.set()
            assert (await client.receive()).body == b"ok"
    assert any(message.startswith("stopping: 1 connections and 0 tunnels are open") for message in caplog.messages)


async def test_tunnels_of_all_workers_are_closed_with_a_reason(upstream: App) -> None:
    async with running(load(upstreams=[upstream.url], grace="1h", workers=2)) as supervisor:
        tunnels = [await open_tunnel(port_of(supervisor)) for _ in range(20)]
        for tunnel in tunnels:
            await tunnel.echo()
        supervisor.stop()
        for tunnel in tunnels:
            async with tunnel.client:
                assert await tunnel.receive_close() == 1001


async def test_the_second_stop_cuts_what_is_open_and_logs_it(upstream: App, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    loaded = load(upstreams=[upstream.url], grace="1h", access_log={"path": str(log)})
    async with running(loaded) as supervisor, await PlainClient.connect(port_of(supervisor)) as client:
        client.send("/hold")
        await upstream.has_request.wait()
        supervisor.stop()
        supervisor.stop()
        with pytest.raises(AbortedError):
            await client.receive()
    [line] = map(json.loads, log.read_text().splitlines())
    assert line["target"] == "/hold"
    assert line["error"]


async def test_the_end_of_the_grace_is_the_end(upstream: App, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(upstreams=[upstream.url], grace="0s")
    async with running(loaded) as supervisor, await PlainClient.connect(port_of(supervisor)) as client:
        client.send("/hold")
        await upstream.has_request.wait()
        supervisor.stop()
        with pytest.raises(AbortedError):
            await client.receive()
    assert "the grace period is over: 0 tunnels and 1 connections are cut" in capfd.readouterr().err


async def test_the_parts_end_before_the_workers_that_they_speak_to(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(name: str, owner: type, method: str) -> None:
        original = getattr(owner, method)

        async def noted(self: object) -> None:
            order.append(name)
            await original(self)

        monkeypatch.setattr(owner, method, noted)

    note("fleet", Fleet, "close")
    note("admin", AdminListener, "stop")
    async with running(load(admin={"address": "localhost:0"})):
        pass
    assert order == ["admin", "fleet"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_serve_stops_at_a_signal_and_gives_the_signals_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    async with asyncio.timeout(DEADLINE_S):
        await serve(load(), lambda _: os.kill(os.getpid(), number))
    assert signal.getsignal(number) in {before, signal.SIG_DFL, signal.default_int_handler}


async def test_serve_gives_the_signals_back_where_it_cannot_start(taken: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UsageError):
        await serve(load(listeners=[f"127.0.0.1:{taken}"]))
    assert signal.getsignal(signal.SIGTERM) == before
