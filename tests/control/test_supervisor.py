"""The supervisor: what it starts in which order, what it leaves where it cannot start, and how it stops."""

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import yaml

from stickyproxy.config import Address, Config, load_text
from stickyproxy.control.admin.app import AdminListener
from stickyproxy.control.supervisor import Supervisor, log_unraisable, serve
from stickyproxy.control.worker import Worker
from stickyproxy.errors import UsageError
from stickyproxy.observe.access_log import AccessLog
from stickyproxy.proxy.listener import bind
from tests.helpers.plain_client import AbortedError, Answer, PlainClient, ask
from tests.helpers.processes import free_port
from tests.helpers.serving import can_listen

DEADLINE_S = 60.0
SECRET = "0123456789abcdef0123456789abcdef"


def configure(**sections: Any) -> Config:
    """Return a configuration that listens on any free port and needs no state directory, with sections of one's own."""
    basis = {
        "listeners": ["127.0.0.1:0"],
        "upstreams": ["http://127.0.0.1:9"],
        "admin": False,
        "affinity": {"secrets": [SECRET]},
    }
    return load_text(yaml.safe_dump({**basis, **sections}), {})


class Upstream:
    """An app that answers when it is released."""

    def __init__(self) -> None:
        self.url = ""
        self.released = asyncio.Event()
        self.has_request = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.has_request.set()
                await self.released.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    app = Upstream()
    server = await asyncio.start_server(app.serve, "127.0.0.1", 0)
    app.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield app
    app.released.set()
    server.close()


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Supervisor]:
    """Run a supervisor; stop it in the end, unless the test did."""
    supervisor = Supervisor(config)
    is_ready = asyncio.Event()
    task = asyncio.get_running_loop().create_task(supervisor.run(lambda _: is_ready.set()))
    ready = asyncio.get_running_loop().create_task(is_ready.wait())
    try:
        await asyncio.wait((task, ready), timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        assert is_ready.is_set()
        yield supervisor
        supervisor.stop()
        async with asyncio.timeout(DEADLINE_S):
            await task
    finally:
        for one in (task, ready):
            one.cancel()
        await asyncio.gather(task, ready, return_exceptions=True)


async def fail_to_start(config: Config) -> str:
    with pytest.raises(UsageError) as error:
        await Supervisor(config).run()
    return str(error.value)


async def read_admin(address: Address, path: str) -> Answer:
    return await ask(address.path or address.port, path)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Starting


def test_without_upstreams_there_is_nothing_to_supervise() -> None:
    with pytest.raises(UsageError, match="no upstreams"):
        Supervisor(configure(upstreams=[]))


async def test_it_serves_and_says_where(upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    upstream.released.set()
    config = configure(listeners=["127.0.0.1:0", "127.0.0.1:0"], upstreams=[upstream.url])
    async with running(config) as supervisor:
        first, second = supervisor.addresses
        assert 0 != first.port != second.port != 0
        for address in (first, second):
            assert (await ask(address.port, "/")).body == b"ok"
        assert f"serving 1 upstreams on {first}, {second}" in caplog.messages
    assert can_listen(first.port)
    assert can_listen(second.port)


async def test_on_ready_is_called_with_the_real_addresses(upstream: Upstream) -> None:
    supervisor = Supervisor(configure(upstreams=[upstream.url]))
    given: list[Address] = []

    def on_ready(addresses: list[Address]) -> None:
        given.extend(addresses)
        supervisor.stop()

    async with asyncio.timeout(DEADLINE_S):
        await supervisor.run(on_ready)
    assert given == supervisor.addresses
    assert given[0].port


async def test_a_stop_before_the_start_ends_it_at_once() -> None:
    supervisor = Supervisor(configure())
    supervisor.stop()
    async with asyncio.timeout(DEADLINE_S):
        await supervisor.run()


async def test_without_secrets_one_is_made(tmp_path: Path) -> None:
    async with running(configure(affinity={}, state_directory=str(tmp_path / "state"))):
        assert (tmp_path / "state" / "secret").exists()


async def test_with_secrets_none_is_made(tmp_path: Path) -> None:
    async with running(configure(state_directory=str(tmp_path / "state"))):
        assert not (tmp_path / "state").exists()


async def test_the_admin_listener_reads_what_runs(tmp_path: Path, upstream: Upstream) -> None:
    upstream.released.set()
    path = tmp_path / "admin.sock"
    config = configure(upstreams=[upstream.url], admin={"address": f"unix:{path}"})
    async with running(config) as supervisor:
        admin = Address(path=str(path))
        assert (await read_admin(admin, "/readyz")).status == 200
        await ask(supervisor.addresses[0].port, "/")
        state = json.loads((await read_admin(admin, "/api/v1/state")).body)
        assert [one["address"] for one in state["clusters"][0]["upstreams"]] == [upstream.url.removeprefix("http://")]
        metrics = (await read_admin(admin, "/metrics")).body.decode()
        assert 'status_class="2xx",upstream=' in metrics.replace(" ", "")
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_the_access_log_is_whole_in_the_end(tmp_path: Path, upstream: Upstream) -> None:
    upstream.released.set()
    log = tmp_path / "access.log"
    config = configure(upstreams=[upstream.url], access_log={"path": str(log)})
    async with running(config) as supervisor:
        for _ in range(20):
            await ask(supervisor.addresses[0].port, "/")
    assert len(log.read_text().splitlines()) == 20


async def test_what_the_data_plane_finds_dead_is_known_to_the_control_plane(tmp_path: Path) -> None:
    admin = Address(path=str(tmp_path / "admin.sock"))
    upstreams = [f"http://127.0.0.1:{free_port()}"]
    config = configure(upstreams=upstreams, health={"probe": False}, admin={"address": str(admin)})
    async with running(config) as supervisor:
        assert (await read_admin(admin, "/readyz")).status == 200
        assert (await ask(supervisor.addresses[0].port, "/")).status == 503
        answer = await read_admin(admin, "/readyz")
        assert (answer.status, answer.body) == (
            503,
            b"no upstream can be used: 1 refuse connections, 0 in maintenance\n",
        )


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
    config = (
        configure(listeners=[*listeners, address])
        if which == "listener"
        else configure(listeners=listeners, admin={"address": address})
    )
    assert (
        await fail_to_start(config) == f"cannot listen on {address}: the address is in use; is another proxy running?"
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
            patched.setattr("stickyproxy.control.supervisor.bind", bind_late)
            said = await fail_to_start(configure(listeners=[f"127.0.0.1:{port}"]))
    assert said == f"cannot listen on 127.0.0.1:{port}: the address is in use; is another proxy starting?"


async def test_a_listener_may_not_be_the_admin_listener_too() -> None:
    port = free_port()
    config = configure(listeners=[f"127.0.0.1:{port}"], admin={"address": f"127.0.0.1:{port}"})
    assert "the address is in use" in await fail_to_start(config)
    assert can_listen(port)


@pytest.mark.parametrize("failing", ["secret", "access log", "admin", "listen"])
async def test_whatever_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    port, path = free_port(), tmp_path / "proxy.sock"
    sections: dict[str, Any] = {"listeners": [f"127.0.0.1:{port}", f"unix:{path}"]}
    if failing == "secret":
        (tmp_path / "secret").mkdir()
        sections |= {"affinity": {}, "state_directory": str(tmp_path)}
    if failing == "access log":
        sections |= {"access_log": {"path": str(tmp_path / "nowhere" / "access.log")}}

    async def fail(*_: object) -> NoReturn:
        raise UsageError("it fails")

    if failing == "admin":
        sections |= {"admin": {"address": f"unix:{tmp_path}/admin.sock"}}
        monkeypatch.setattr(AdminListener, "start", fail)
    if failing == "listen":
        monkeypatch.setattr(Worker, "listen", fail)
    assert await fail_to_start(configure(**sections))
    assert can_listen(port)
    assert names_in(tmp_path) <= {"secret"}
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert [name for name in left if name.startswith(("probe", "look", "drain"))] == []


# Stopping


async def test_it_finishes_what_is_open_and_takes_nobody_more(
    upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    admin = Address(path=str(tmp_path / "admin.sock"))
    config = configure(upstreams=[upstream.url], admin={"address": str(admin)}, grace="1h")
    async with running(config) as supervisor:
        port = supervisor.addresses[0].port
        async with await PlainClient.connect(port) as client:
            client.send("/")
            await upstream.has_request.wait()
            supervisor.stop()
            async with asyncio.timeout(DEADLINE_S):
                while (answer := await read_admin(admin, "/readyz")).status == 200:
                    pass
            assert answer.body == b"the proxy is stopping\n"
            assert (await read_admin(admin, "/livez")).status == 200
            with pytest.raises(ConnectionRefusedError):
                await PlainClient.connect(port)
            upstream.released.set()
            assert (await client.receive()).body == b"ok"
    assert any(message.startswith("stopping: 1 connections and 0 tunnels are open") for message in caplog.messages)


async def test_the_second_stop_cuts_what_is_open_and_logs_it(upstream: Upstream, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    config = configure(upstreams=[upstream.url], grace="1h", access_log={"path": str(log)})
    async with running(config) as supervisor, await PlainClient.connect(supervisor.addresses[0].port) as client:
        client.send("/cut")
        await upstream.has_request.wait()
        supervisor.stop()
        supervisor.stop()
        with pytest.raises(AbortedError):
            await client.receive()
    [line] = map(json.loads, log.read_text().splitlines())
    assert line["target"] == "/cut"
    assert line["error"]


async def test_the_end_of_the_grace_is_the_end(upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(upstreams=[upstream.url], grace="0s")
    async with running(config) as supervisor, await PlainClient.connect(supervisor.addresses[0].port) as client:
        client.send("/")
        await upstream.has_request.wait()
        supervisor.stop()
        with pytest.raises(AbortedError):
            await client.receive()
    assert "the grace period is over: 0 tunnels and 1 connections are cut" in caplog.messages


async def test_the_parts_end_before_the_log_that_they_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []
    close_worker, close_log = Worker.close, AccessLog.close

    async def note_worker(worker: Worker) -> None:
        await close_worker(worker)
        order.append("worker")

    def note_log(log: AccessLog) -> None:
        order.append("log")
        close_log(log)

    monkeypatch.setattr(Worker, "close", note_worker)
    monkeypatch.setattr(AccessLog, "close", note_log)
    async with running(configure(access_log={"path": str(tmp_path / "access.log")})):
        pass
    assert order == ["worker", "log"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_serve_stops_at_a_signal_and_gives_the_signals_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    async with asyncio.timeout(DEADLINE_S):
        await serve(configure(), lambda _: os.kill(os.getpid(), number))
    assert signal.getsignal(number) in {before, signal.SIG_DFL, signal.default_int_handler}


async def test_serve_gives_the_signals_back_where_it_cannot_start(taken: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UsageError):
        await serve(configure(listeners=[f"127.0.0.1:{taken}"]))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "level"),
    [(UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"), logging.DEBUG), (ValueError(), logging.ERROR)],
)
def test_what_can_be_raised_nowhere_is_logged(error: Exception, level: int, caplog: pytest.LogCaptureFixture) -> None:
    """A client whose TLS hello holds a name that is not ASCII causes the first; it must not fill the log."""
    caplog.set_level(logging.DEBUG)
    log_unraisable(cast("Any", SimpleNamespace(exc_value=error, err_msg="Exception ignored in")))
    [record] = caplog.records
    assert record.levelno == level
