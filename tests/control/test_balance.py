"""Connections that all came to one worker go to those that have fewer."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from typing_extensions import override

from stickyproxy.control import balance as balance_module
from stickyproxy.control.balance import Balancer
from stickyproxy.control.worker_link import WorkerLink
from stickyproxy.errors import ChannelError
from stickyproxy.observe.counters import HANDED
from stickyproxy.tasks import spawn
from tests.helpers.fleet import Apps, Running, started, two_apps
from tests.helpers.plain_client import PlainClient
from tests.helpers.supervised import Tunnel, open_tunnel, until

BURST = 24


@pytest.fixture
async def apps() -> AsyncIterator[Apps]:
    async with two_apps() as apps:
        yield apps


@contextmanager
def stopped(link: WorkerLink) -> Iterator[None]:
    """Let a worker stand still, so that others accept whoever comes."""
    os.kill(link.process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(link.process_id, signal.SIGCONT)


def counts(fleet: Running) -> list[int]:
    return [link.table.read().plane.connections_open for link in fleet.fleet.links]


async def crowd(fleet: Running, count: int = BURST) -> list[Tunnel]:
    """Open tunnels that are all at the first worker."""
    with stopped(fleet.fleet.links[1]):
        tunnels = [await open_tunnel(fleet.port) for _ in range(count)]
    await until(lambda: counts(fleet) == [count, 0], "all are at one worker")
    return tunnels


@contextmanager
def balanced(fleet: Running) -> Iterator[Balancer]:
    balancer = Balancer(fleet.fleet)
    balancer.start()
    try:
        yield balancer
    finally:
        balancer.stop()


async def talk(tunnels: list[Tunnel], is_over: asyncio.Event) -> int:
    """Echo over all tunnels until it is over; return how often each did."""
    rounds = 0
    while not is_over.is_set():
        await asyncio.gather(*(tunnel.echo() for tunnel in tunnels))
        rounds += 1
    return rounds


async def test_tunnels_of_a_burst_are_shared_and_nobody_notices(apps: Apps) -> None:
    async with started(apps) as fleet:
        tunnels = await crowd(fleet)
        is_over = asyncio.Event()
        talking = spawn(talk(tunnels, is_over), "echoes")
        with balanced(fleet):
            await until(lambda: counts(fleet) == [BURST // 2, BURST // 2], "both have as many")
        handed = [link.table.read().plane.cells[HANDED["tunnels"]] for link in fleet.fleet.links]
        assert handed == [BURST // 2, 0]
        is_over.set()
        assert await talking > 0
        for tunnel in tunnels:
            async with tunnel.client:
                await tunnel.echo()


async def test_idle_connections_are_shared_too(apps: Apps) -> None:
    async with started(apps) as fleet:
        with stopped(fleet.fleet.links[1]):
            clients = [await PlainClient.connect(fleet.port) for _ in range(BURST)]
            for client in clients:
                assert (await client.ask("/")).status == 200
        with balanced(fleet):
            await until(lambda: counts(fleet) == [BURST // 2, BURST // 2], "both have as many")
        for client in clients:
            async with client:
                assert (await client.ask("/")).status == 200


async def test_a_worker_that_hangs_is_left_alone(apps: Apps) -> None:
    async with started(apps) as fleet:
        tunnels = await crowd(fleet)
        first, second = fleet.fleet.links
        balancer = Balancer(fleet.fleet)
        await until(lambda: balancer._count() == {first: BURST, second: 0})
        with stopped(second):
            await until(lambda: balancer._count() == {first: BURST}, "it is not counted")
        await until(lambda: balancer._count() == {first: BURST, second: 0}, "it is again")
        for tunnel in tunnels:
            async with tunnel.client:
                await tunnel.echo()


class Looking(Balancer):
    """Decides by numbers that a test gives, and notes what it would move."""

    def __init__(self, *looks: dict[str, int]) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # it is not asked
        self._looks = iter(looks)
        self.moved: list[tuple[Any, Any, int]] = []

    @override
    def _count(self) -> dict[Any, int]:
        return next(self._looks)

    @override
    async def _share(self, most: Any, least: Any, count: int) -> None:
        self.moved.append((most, least, count))


@pytest.mark.parametrize(
    ("first", "second", "moved"),
    [
        ({"a": 32, "b": 0}, {"a": 32, "b": 0}, [("a", "b", 16)]),
        ({"a": 0, "b": 32}, {"a": 0, "b": 32}, [("b", "a", 16)]),
        ({"a": 18, "b": 4, "c": 8}, {"a": 18, "b": 4, "c": 8}, [("a", "b", 7)]),
        ({"a": 2000, "b": 0}, {"a": 2000, "b": 0}, [("a", "b", 200)]),
        # as even as need be
        ({"a": 20, "b": 12}, {"a": 20, "b": 12}, []),
        ({"a": 1100, "b": 995}, {"a": 1100, "b": 995}, []),
        ({"a": 9, "b": 9}, {"a": 9, "b": 9}, []),
        # only for a moment
        ({"a": 12, "b": 12}, {"a": 32, "b": 0}, []),
        ({"a": 0, "b": 32}, {"a": 32, "b": 0}, []),
        ({"a": 24, "b": 12}, {"a": 32, "b": 0}, [("a", "b", 6)]),
        # nobody to share with
        ({"a": 32}, {"a": 32}, []),
        ({}, {}, []),
        ({"a": 32}, {"a": 32, "b": 0}, [("a", "b", 16)]),
    ],
)
async def test_who_gives_how_many_to_whom(
    first: dict[str, int], second: dict[str, int], moved: list[tuple[str, str, int]]
) -> None:
    balancer = Looking({}, first, second)
    await balancer._look()
    await balancer._look()
    balancer.moved.clear()
    await balancer._look()
    assert balancer.moved == moved


@pytest.mark.parametrize("answer", [ChannelError("no"), {"moved": {}}])
async def test_where_nothing_can_move_it_rests(
    apps: Apps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: ChannelError | dict[str, Any]
) -> None:
    async with started(apps) as fleet:
        asked: list[str] = []
        first, second = fleet.fleet.links

        class Answer:
            body = answer

        async def request(kind: str, *_: Any, **__: Any) -> Answer:
            asked.append(kind)
            if isinstance(answer, ChannelError):
                raise answer
            return Answer()

        monkeypatch.setattr(first.channel, "request", request)
        balancer = Balancer(fleet.fleet)
        monkeypatch.setattr(balancer, "_count", lambda: {first: BURST, second: 0})
        for _ in range(4):
            await balancer._look()
        assert asked == ["share"]
        assert ("cannot give connections to worker 1: no" in caplog.text) is isinstance(answer, ChannelError)
        monkeypatch.setattr(balance_module, "_REST_S", 0.0)
        balancer._rests_until = 0.0
        for _ in range(2):
            await balancer._look()
        assert asked == ["share"] * 3
        monkeypatch.undo()


async def test_nothing_moves_while_a_worker_hands_over(apps: Apps) -> None:
    async with started(apps) as fleet:
        tunnels = await crowd(fleet)
        async with fleet.fleet.moving:
            with balanced(fleet) as balancer:
                balancer._before = dict(zip(fleet.fleet.links, [BURST, 0], strict=True))
                looking = balancer._looking
                assert looking is not None
                await until(lambda: fleet.fleet.moving._waiters, "it waits for its turn")
                assert counts(fleet) == [BURST, 0]
        for tunnel in tunnels:
            async with tunnel.client:
                await tunnel.echo()


async def test_a_worker_that_is_leaving_shares_nothing(apps: Apps) -> None:
    async with started(apps) as fleet:
        first, second = fleet.fleet.links
        with pytest.raises(ChannelError, match="one socket is needed"):
            await first.channel.request("share", {"count": 1})
        ours, theirs = socket.socketpair()
        with ours, theirs, stopped(second):
            client = await PlainClient.connect(fleet.port)
            client.send("/hold")  # it cannot move, and keeps the worker
            await until(lambda: any(app.has_request.is_set() for app in apps))
            fleet.fleet.links.remove(first)
            first.is_leaving = True
            departing = spawn(first.channel.request("depart", {"grace_s": 60}, [theirs.fileno()]), "depart")
            sharing = spawn(first.channel.request("share", {"count": 1}, [ours.fileno()]), "share")
            with pytest.raises(ChannelError, match="handing over or ending already"):
                await sharing
            departing.cancel()
            first.kill()
            await until(first.ended.done)
            async with client:
                pass
