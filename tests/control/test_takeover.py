"""The two sides of a take-over in one process, with real workers; whole ones are in end_to_end/test_take_over.py."""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.config import Address, Loaded
from stickyproxy.control import takeover
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.control.supervisor import Supervisor
from stickyproxy.control.takeover import Predecessor
from stickyproxy.errors import ChannelError, UsageError
from stickyproxy.tasks import spawn
from tests.helpers.loops import no_leak
from tests.helpers.plain_client import PlainClient, ask
from tests.helpers.supervised import DEADLINE_S, App, is_running, load, open_tunnel, pids, port_of, running, until

HEAD = struct.Struct("!4sII")


@pytest.fixture
async def app() -> AsyncIterator[App]:
    app = await App("app").start()
    yield app
    app.stop()


def load_a(app: App, path: Path, **more: Any) -> Loaded:
    return load(**{"upstreams": [app.upstream], "workers": 2, "hand_over": str(path), **more})


@asynccontextmanager
async def taking_over(a: Supervisor, path: Path, loaded: Loaded) -> AsyncIterator[Supervisor]:
    """Run B in place of A, which must end by itself."""
    predecessor = await Predecessor.find(path)
    assert predecessor is not None
    supervisor = Supervisor(loaded, None, predecessor)
    is_ready = asyncio.Event()
    task = spawn(supervisor.run(lambda _: is_ready.set()), "B")
    ready = spawn(is_ready.wait(), "ready")
    await asyncio.wait((task, ready), timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    assert is_ready.is_set()
    await until(lambda: a.is_stopping, "A ends")
    try:
        yield supervisor
    finally:
        supervisor.stop()
        async with asyncio.timeout(DEADLINE_S):
            await task


class Caller:
    """Somebody at the hand-over socket."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.lost: list[str] = []

    @classmethod
    async def connect(cls, path: Path) -> "Caller":
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, str(path))
        lost: list[str] = []
        caller = cls(Channel(link, lambda _: None, lost.append))
        caller.lost = lost
        return caller

    async def ask(self, kind: str, body: dict[str, Any] | None = None, descriptors: tuple[int, ...] = ()) -> Message:
        return await self.channel.request(kind, body, descriptors, timeout_s=DEADLINE_S)

    async def ask_for_state(self) -> Message:
        message = await self.ask("state", {"protocol": PROTOCOL, "version": "9.9"})
        message.close()
        return message


async def test_all_goes_from_one_to_the_other(app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        port, workers = port_of(a), pids(a)
        address = a.config.listeners[0].address
        tunnels = [await open_tunnel(port) for _ in range(6)]
        kept = await PlainClient.connect(port)
        assert (await kept.ask("/")).status == 200
        loaded = load(upstreams=[app.upstream], workers=1, hand_over=str(path))
        assert loaded.config.listeners[0].address == address
        async with taking_over(a, path, loaded) as b:
            assert (port_of(b), len(pids(b))) == (port, 1)
            assert a.is_handed_over
            for tunnel in tunnels:
                await tunnel.echo()
            assert (await kept.ask("/")).body == b"app"
            await until(lambda: not any(map(is_running, workers)), "A's workers are gone")
            assert "took over from a proxy of version 0.1.0: 6 tunnels and 1 connections have moved" in caplog.text
            assert path.stat().st_mode & 0o777 == 0o600  # it is B's now
            for client in (kept, *(tunnel.client for tunnel in tunnels)):
                client._writer.transport.abort()
    assert not path.exists()


async def test_what_a_gives_is_its_state(app: App, tmp_path: Path) -> None:
    path, file = tmp_path / "a", tmp_path / "s"
    async with running(load_a(app, path, listeners=["127.0.0.1:0", f"unix:{file}"])) as a:
        predecessor = await Predecessor.find(path)
        assert predecessor is not None
        assert set(predecessor.sockets) == {one.address for one in a.config.listeners}
        assert predecessor.secrets == a.signing
        assert (predecessor.workers, predecessor.version) == (2, "0.1.0")
        [leaving] = predecessor.routing["leaving"]
        assert app.url in leaving
        assert "version 0.1.0" in repr(predecessor)
        for link in predecessor.sockets.values():
            assert link.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert not link.get_inheritable()
        others = {address: link for address, link in predecessor.sockets.items() if address.is_unix}
        [closed] = [link for address, link in predecessor.sockets.items() if not address.is_unix]
        assert predecessor.choose_sockets([*others, Address("127.0.0.1", 9)]) == others
        assert closed.fileno() == -1
        for link in others.values():
            link.close()
        predecessor.close()
        await until(lambda: not a.is_handing_over, "A goes on")


async def test_where_nobody_is_there_is_no_predecessor(tmp_path: Path) -> None:
    with no_leak():
        assert await Predecessor.find(tmp_path / "nobody") is None
        dead = tmp_path / "dead"
        with socket.socket(socket.AF_UNIX) as link:
            link.bind(str(dead))
        assert await Predecessor.find(dead) is None


async def test_who_cannot_be_taken_over_from_is_told(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 40)
    with no_leak(), pytest.raises(UsageError, match=f"cannot take over from {path}"):
        await Predecessor.find(path)


ANSWERS: dict[str, tuple[bytes, str]] = {
    "foreign": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the other process is gone"),
    "nothing": (b"", "the other process is gone"),
    "error": (b'{"error": "an upgrade is under way"}', "an upgrade is under way"),
    "empty": (b"{}", "'sockets'"),
    "more sockets than came": (
        b'{"sockets": [{"host": "", "port": 1, "path": ""}], "secrets": [], "routing": {}, "upstreams": []}',
        "zip",
    ),
    "no number": (
        b'{"sockets": [], "secrets": [], "routing": {}, "upstreams": [], "workers": "x", "version": 9}',
        "inval",
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
async def test_what_answers_no_state_is_told(tmp_path: Path, kind: str) -> None:
    answer, said = ANSWERS[kind]
    path, is_over = tmp_path / "a", asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, _, size = HEAD.unpack(await reader.readexactly(HEAD.size))
        number = json.loads(await reader.readexactly(size))["number"]
        if answer.startswith(b"{"):
            text = json.dumps({"kind": "answer", "to": number, "body": json.loads(answer)}).encode()
            writer.write(HEAD.pack(b"STK1", 0, len(text)) + text)
        else:
            writer.write(answer)
            writer.write_eof()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    async with await asyncio.start_unix_server(serve, str(path)):
        with pytest.raises(UsageError) as error:
            await Predecessor.find(path)
        await asyncio.wait_for(is_over.wait(), DEADLINE_S)
    assert str(error.value).startswith(f"cannot take over from {path}: ")
    assert said in str(error.value)


async def test_only_one_at_a_time_and_the_next_when_it_is_gone(
    app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        workers = pids(a)
        first = await Caller.connect(path)
        await first.ask_for_state()
        assert a.is_handing_over
        second = await Caller.connect(path)
        await until(lambda: second.lost, "the second is refused")
        assert "hand-over refused: another proxy is taking over already" in caplog.text
        first.channel.close()
        await until(lambda: not a.is_handing_over, "A goes on")
        assert "the proxy that was taking over is gone (the other process closed the channel)" in caplog.text
        third = await Caller.connect(path)
        await third.ask_for_state()
        third.channel.close()
        await until(lambda: not a.is_handing_over, "A goes on")
        assert pids(a) == workers


async def test_who_says_nothing_is_not_waited_for(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(takeover, "_SILENT_S", 0.2)
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        silent = await Caller.connect(path)
        assert not a.is_handing_over
        await until(lambda: silent.lost, "it is let go")
        assert "hand-over refused: nothing was asked for within 0.2 s" in caplog.text
        asking = await Caller.connect(path)
        await asking.ask_for_state()
        await asyncio.sleep(0.5)  # longer than the silent one may
        assert not asking.lost
        asking.channel.close()


async def test_whoever_asks_for_what_cannot_be_is_refused(app: App, tmp_path: Path) -> None:
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        workers = pids(a)
        caller = await Caller.connect(path)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for kind, body, descriptors, said in (
                ("state", {"protocol": PROTOCOL + 1, "version": "9.9"}, 0, "cannot hand over to version 9.9"),
                ("done", {}, 0, "has not asked for the state"),
                ("depart", {"worker": 0, "grace_s": 1.0}, 1, "there is no worker 0 that could hand over to 1 sockets"),
                ("sing", {}, 0, "this version knows no 'sing'"),
                ("state", {"protocol": PROTOCOL}, 0, ""),
                ("depart", {"worker": 2, "grace_s": 1.0}, 1, "there is no worker 2"),
                ("depart", {"worker": -1, "grace_s": 1.0}, 1, "there is no worker -1"),
                ("depart", {"worker": 0, "grace_s": 1.0}, 0, "to 0 sockets"),
                ("depart", {"worker": 0, "grace_s": 1.0}, 2, "to 2 sockets"),
                ("depart", {"worker": 0}, 1, "'grace_s'"),
                ("depart", {"worker": None, "grace_s": 1}, 1, "int()"),
                ("depart", {"worker": 0, "grace_s": "long"}, 1, "could not convert"),
            ):
                asking = caller.ask(kind, body, (theirs.fileno(),) * descriptors)
                if not said:
                    (await asking).close()
                    continue
                with pytest.raises(ChannelError) as error:
                    await asking
                assert said in str(error.value)
        caller.channel.close()
        await until(lambda: not a.is_handing_over, "A goes on")
        assert pids(a) == workers
        assert (await ask(port_of(a), "/")).body == b"app"


async def test_when_a_worker_has_left_for_nothing_another_comes(app: App, tmp_path: Path) -> None:
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        before = pids(a)
        caller = await Caller.connect(path)
        await caller.ask_for_state()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            (await caller.ask("depart", {"worker": 0, "grace_s": 30.0}, (theirs.fileno(),))).close()
        assert len(pids(a)) == 1
        caller.channel.close()
        await until(lambda: not a.is_handing_over, "A goes on")
        await until(lambda: len(pids(a)) == 2, "another worker has come")
        assert len(set(pids(a)) & set(before)) == 1
        for _ in range(10):
            assert (await ask(port_of(a), "/")).body == b"app"


async def test_a_worker_that_cannot_leave_stays_and_none_comes_in_its_place(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor is gone before it is known whether it has left."""
    path = tmp_path / "a"
    async with running(load_a(app, path, workers=1)) as a:
        before = pids(a)
        started: list[object] = []
        monkeypatch.setattr("stickyproxy.control.fleet.start_process", started.append)
        tunnel = await open_tunnel(port_of(a))
        caller = await Caller.connect(path)
        await caller.ask_for_state()
        ours, theirs = socket.socketpair()
        with ours:  # nobody answers what the worker sends there
            leaving = spawn(caller.ask("depart", {"worker": 0, "grace_s": 30.0}, (theirs.fileno(),)), "depart")
            await until(lambda: a.fleet.leaving, "the worker is leaving")
            theirs.close()
            caller.channel.close()
            with pytest.raises(ChannelError):
                await leaving
            await until(lambda: a._hand_over is not None and a._hand_over._restoring is not None, "A knows")
            assert a.is_handing_over
        await until(lambda: not a.is_handing_over, "A goes on")
        assert (pids(a), started) == (before, [])
        await tunnel.echo()
        assert (await ask(port_of(a), "/")).body == b"app"
        tunnel.client._writer.transport.abort()


async def test_during_an_upgrade_the_state_is_not_given(app: App, tmp_path: Path) -> None:
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        a.upgrader.status = {"state": "running"}
        with pytest.raises(UsageError, match=f"cannot take over from {path}: an upgrade is under way"):
            await Predecessor.find(path)
        a.upgrader.status = {}
        found = await Predecessor.find(path)
        assert found is not None
        for link in found.sockets.values():
            link.close()
        found.close()
        await until(lambda: not a.is_handing_over, "A goes on")


async def test_the_listener_says_who_is_there(app: App, tmp_path: Path) -> None:
    path = tmp_path / "a"
    async with running(load_a(app, path)) as a:
        assert repr(a._hand_over) == "<HandOverListener None>"
