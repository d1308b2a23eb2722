"""A worker process, spoken to as the supervisor does: what each message does, and how it ends."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy import __version__
from stickyproxy.affinity.snapshot import Rules, Snapshot, Upstream
from stickyproxy.config import Address
from stickyproxy.control.channel import Channel
from stickyproxy.control.messages import PROTOCOL, write_address, write_snapshots
from stickyproxy.control.worker_link import start_process
from stickyproxy.errors import ChannelError
from stickyproxy.observe.table import Table
from stickyproxy.proxy.board import Board
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.proxy.key_table import KeyTable
from tests.helpers.supervised import SECRET, App, load, open_tunnel, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stickyproxy.control.channel import Message

DEADLINE_S = 60.0


class Spoken:
    """A worker process, and what it says by itself."""

    def __init__(self) -> None:
        self.process_id, link = start_process()
        self.said: list[Message] = []
        self.table, self.board = Table.create(), Board.create()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.channel = Channel(link, self.said.append)
        self.exit: int | None = None

    def heard(self, kind: str) -> list[dict[str, Any]]:
        return [one.body for one in self.said if one.kind == kind]

    async def ask(self, kind: str, body: dict[str, Any] | None = None, descriptors: tuple[int, ...] = ()) -> Message:
        return await self.channel.request(kind, body or {}, descriptors, timeout_s=DEADLINE_S)

    async def start(self, **sections: Any) -> None:
        descriptors = (self.table.descriptor, self.board.descriptor, self.listener.fileno())
        await self.ask("start", {"index": 0, **self.orders([LISTENER], **sections)}, descriptors)

    @staticmethod
    def orders(listeners: list[Address], **sections: Any) -> dict[str, Any]:
        return {
            **load(**sections).to_json(),
            "secrets": [SECRET.encode().hex()],
            "listeners": [write_address(one) for one in listeners],
        }

    def publish(self, port: int) -> None:
        upstream = Upstream("app")
        snapshot = Snapshot("default", (upstream,), Rules())
        endpoints = {"app": Endpoint(Address("127.0.0.1", port))}
        slots = {upstream.digest.hex(): 0}
        self.channel.send("publish", {"clusters": write_snapshots([snapshot], endpoints), "slots": slots})

    def count_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process_id}/fd").iterdir()))

    def has_ended(self) -> bool:
        if self.exit is None:
            process_id, status = os.waitpid(self.process_id, os.WNOHANG)
            if process_id:
                self.exit = os.waitstatus_to_exitcode(status)
        return self.exit is not None

    async def get(self, target: str = "/") -> bytes:
        """Return what a client gets, up to the end of its connection."""
        reader, writer = await asyncio.open_connection(*self.listener.getsockname())
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        async with asyncio.timeout(DEADLINE_S):
            answer = await reader.read()
        writer.close()
        return answer

    def close(self) -> None:
        self.channel.close()
        if not self.has_ended():
            with suppress(ProcessLookupError):
                os.kill(self.process_id, 9)
            os.waitpid(self.process_id, 0)
        self.listener.close()
        self.table.close()
        self.board.close()


LISTENER = Address("127.0.0.1", 0)


@asynccontextmanager
async def spoken() -> AsyncIterator[Spoken]:
    made = Spoken()
    try:
        yield made
    finally:
        made.close()


@asynccontextmanager
async def app(text: bytes) -> AsyncIterator[int]:
    """Answer each request with a text; give the port."""
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_it_says_hello_and_serves_what_it_is_told_to() -> None:
    async with spoken() as worker, app(b"from the app") as port:
        await worker.start()
        worker.publish(port)
        await worker.ask("accept")
        assert (await worker.get()).endswith(b"from the app")
        hello = {"protocol": PROTOCOL, "version": __version__, "pid": worker.process_id}
        assert worker.heard("hello") == [hello]
        await worker.ask("stop")
        await until(worker.has_ended, "it has ended")
        assert worker.exit == 0
        assert sum(worker.table.read().upstreams[Upstream("app").digest].exchanges) == 1


async def test_a_dead_upstream_is_reported() -> None:
    async with spoken() as worker:
        await worker.start()
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound, and nobody listens
            worker.publish(unused.getsockname()[1])
            await worker.ask("accept")
            assert (await worker.get()).startswith(b"HTTP/1.1 503")
        await until(lambda: worker.heard("report"), "a report")
        assert worker.heard("report")[0] == {"upstream": "app", "event": "refused"}


async def test_a_reload_takes_effect_with_the_next_request() -> None:
    async with spoken() as worker, app(b"x") as port:
        await worker.start()
        worker.publish(port)
        await worker.ask("accept")
        assert b"set-cookie: stickyproxy=" in (await worker.get()).lower()
        await worker.ask("reload", worker.orders([], affinity={"secrets": [SECRET], "cookie": {"name": "other"}}))
        assert b"set-cookie: other=" in (await worker.get()).lower()


async def test_orders_that_cannot_be_followed_change_nothing() -> None:
    async with spoken() as worker, app(b"x") as port:
        await worker.start()
        worker.publish(port)
        await worker.ask("accept")
        with pytest.raises(ChannelError, match="access log"):
            await worker.ask("reload", worker.orders([], access_log={"path": "/nowhere/at/all"}))
        assert (await worker.get()).endswith(b"x")


def shut(per_s: float, *upstreams: str, reason: str = "another version") -> dict[str, Any]:
    return {"upstreams": [Upstream(one).digest.hex() for one in upstreams], "per_s": per_s, "reason": reason}


async def test_tunnels_of_an_upstream_are_shut_in_the_background() -> None:
    served = await App("app").start()
    async with spoken() as worker:
        await worker.start()
        worker.publish(served.port)
        await worker.ask("accept")
        port = int(worker.listener.getsockname()[1])
        tunnels = [await open_tunnel(port) for _ in range(4)]
        assert (await worker.ask("shut", shut(10_000.0, "another"))).body == {"count": 0}
        for tunnel in tunnels:
            await tunnel.echo()
        assert (await worker.ask("shut", shut(1e-6, "app", "another"))).body == {"count": 4}  # it would take weeks
        await worker.ask("ping")
        closing = [asyncio.get_running_loop().create_task(tunnel.receive_close()) for tunnel in tunnels]
        await asyncio.wait(closing, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        assert sum(task.done() for task in closing) == 1
        assert (await worker.ask("shut", shut(10_000.0, "app"))).body == {"count": 3}
        assert await asyncio.gather(*closing) == [1012] * 4
        for tunnel in tunnels:
            async with tunnel.client:
                pass
    served.stop()


@pytest.mark.parametrize(
    "body",
    [
        {},
        shut(0.0, "app"),
        shut(float("nan"), "app"),
        shut(1.0) | {"upstreams": ["no digest"]},
        shut(1.0) | {"per_s": "fast"},
        shut(1.0) | {"upstreams": 5},
    ],
)
async def test_nonsense_shuts_nothing(body: dict[str, Any]) -> None:
    async with spoken() as worker:
        await worker.start()
        with pytest.raises(ChannelError):
            await worker.ask("shut", body)
        assert not worker.has_ended()


# Keys


KEYS = {"keys": [{"name": "id", "mode": "hash", "query": "id"}], "secrets": [SECRET]}


async def test_two_workers_remember_keys_in_one_memory_which_only_they_and_the_supervisor_have() -> None:
    keys = KeyTable.create(100)
    async with spoken() as first, spoken() as second, app(b"x") as port:
        for number, worker in enumerate((first, second), 1):
            await worker.start(affinity=KEYS)
            await worker.ask("keys", {}, (keys.descriptor,))
            worker.publish(port)
            await worker.ask("accept")
            await worker.get(f"/?id={number}")
            await worker.get("/?id=shared")
            await worker.get(f"/?id={number}")
        digest = Upstream("app").digest
        now = time.monotonic()
        assert [keys.find(b"id\0" + one, now) for one in (b"1", b"2", b"shared")] == [digest] * 3
        assert keys.count(now) == 3
        await until(lambda: first.table.read().plane.keys_learned == 2, "two were new to the first worker")
        await until(lambda: second.table.read().plane.keys_learned == 1, "and one to the second")
    keys.close()


async def test_other_keys_take_the_place_of_those_it_had_and_its_counters_go_on() -> None:
    before, after = KeyTable.create(100), KeyTable.create(100)
    async with spoken() as worker, app(b"x") as port:
        await worker.start(affinity=KEYS)
        worker.publish(port)
        await worker.ask("accept")
        for table in (before, after):
            await worker.ask("keys", {}, (table.descriptor,))
            await worker.get("/?id=1")
            assert table.count(time.monotonic()) == 1
        await until(lambda: worker.table.read().plane.keys_learned == 2, "both are counted")
        before.close()
    after.close()


async def test_memory_that_holds_no_keys_is_refused_and_the_worker_keeps_its_own() -> None:
    keys, other = KeyTable.create(100), Board.create()
    async with spoken() as worker, app(b"x") as port:
        await worker.start(affinity=KEYS)
        worker.publish(port)
        await worker.ask("accept")
        await worker.ask("keys", {}, (keys.descriptor,))
        before = worker.count_descriptors()
        for _ in range(3):
            with pytest.raises(ChannelError, match="no table of keys"):
                await worker.ask("keys", {}, (other.descriptor,))
        with pytest.raises(ChannelError):
            await worker.ask("keys")
        assert worker.count_descriptors() == before
        assert (await worker.get("/?id=1")).endswith(b"x")
        assert keys.count(time.monotonic()) == 1
    keys.close()
    other.close()


@pytest.mark.parametrize("kind", ["accept", "drain", "depart", "arrive", "reload", "shut", "keys"])
async def test_nothing_can_be_asked_before_the_start(kind: str) -> None:
    async with spoken() as worker:
        with pytest.raises(ChannelError):
            await worker.ask(kind, {"grace_s": 1})
        assert not worker.has_ended()


async def test_what_it_does_not_know_is_refused() -> None:
    async with spoken() as worker:
        with pytest.raises(ChannelError, match="knows no 'dance'"):
            await worker.ask("dance")


async def test_signals_of_the_terminal_are_not_for_it() -> None:
    async with spoken() as worker:
        await worker.start()
        for number in (1, 2, 10, 12, 15):
            os.kill(worker.process_id, number)
        await worker.ask("ping")
        assert not worker.has_ended()


async def test_it_ends_when_the_supervisor_is_gone() -> None:
    async with spoken() as worker:
        await worker.start()
        worker.channel.close()
        await until(worker.has_ended, "it has ended")
        assert worker.exit == 0
