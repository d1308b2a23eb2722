"""Crowds: more connections ready at once than the loop takes in a round, and a loop that turns nonetheless.

What is shown here does not depend on speed. The far ends of all tunnels are in this process too, and send the next
message at the very moment at which the proxy has passed on the one before; so each connection is always ready.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import pytest

from stickyproxy.proxy import crowd as crowd_module
from stickyproxy.proxy.crowd import CALM, RESUMED, ROUND, Crowd
from stickyproxy.proxy.departure import depart
from stickyproxy.proxy.settings import Settings
from stickyproxy.proxy.side import Side
from stickyproxy.proxy.socket_state import is_reset
from stickyproxy.proxy.tunnel import Tunnel
from tests.helpers.raw import DEADLINE_S, GET, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, connect, frame, the_tunnel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stickyproxy.proxy.departure import Departure
    from tests.helpers.plane import PlaneUnderTest, Start

TUNNELS = 600  # 1,200 connections that are always ready, more than a round
BOUND = CALM + 3 * ROUND  # reads in a turn: until a crowd shows, until fewer than a round are ready, and a last round

BODY = bytes(range(256)) * 80_000  # 20 MB: more than the kernel takes

# The crowd by itself


class _Loop:
    """Keeps what is to be called in the next turn until the test says that this has come."""

    def __init__(self) -> None:
        self.due: list[Callable[[], object]] = []
        self.asked = 0

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.due.append(callback)
        self.asked += 1

    def turn(self) -> None:
        due, self.due = self.due, []
        for callback in due:
            callback()


class _Transport:
    def __init__(self) -> None:
        self.is_paused = self.is_closed = False
        self.calls: list[str] = []

    def is_reading(self) -> bool:
        return not (self.is_paused or self.is_closed)

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        self.is_paused = True
        self.calls.append("pause")

    def resume_reading(self) -> None:
        assert not self.is_closed
        self.is_paused = False
        self.calls.append("resume")


class _Crowd:
    """A crowd whose loop turns when the test wants it to."""

    def __init__(self) -> None:
        self.loop = _Loop()
        self.crowd = Crowd(cast("asyncio.AbstractEventLoop", self.loop))

    def read(self, transport: _Transport, times: int = 1) -> None:
        """Do what everybody does who is read."""
        for _ in range(times):
            self.crowd.left -= 1
            if self.crowd.left < 0:
                self.crowd.on_spent(cast("asyncio.Transport", transport))

    def gather(self) -> None:
        """Come to where the next read shows a crowd."""
        self.read(_Transport(), CALM + 1 + ROUND)

    def pause(self, transport: _Transport) -> None:
        self.crowd.pause(cast("asyncio.Transport", transport))

    def resume(self, transport: _Transport) -> None:
        self.crowd.resume(cast("asyncio.Transport", transport))

    def holds(self, transport: _Transport) -> bool:
        return self.crowd.holds(cast("asyncio.Transport", transport))


def test_nothing_is_paused_while_the_loop_turns() -> None:
    crowd, one = _Crowd(), _Transport()
    for _ in range(200):
        crowd.read(one, ROUND)
        crowd.loop.turn()
    assert one.calls == []
    assert crowd.loop.asked <= 200
    for _ in range(20 * CALM):
        crowd.read(one)
        crowd.loop.turn()
    assert crowd.loop.asked <= 200 + 21, "a turn is not asked for at each read"


def test_a_read_more_than_a_round_pauses_its_connection_until_the_next_turn() -> None:
    crowd, one = _Crowd(), _Transport()
    crowd.read(one, CALM + 1 + ROUND)
    assert not one.is_paused
    crowd.read(one)
    assert one.is_paused
    assert crowd.holds(one)
    assert repr(crowd.crowd) == "<Crowd left=-1 held=1>"
    crowd.read(one)  # a rest that came with it, say
    crowd.loop.turn()
    assert one.calls == ["pause", "resume"]
    assert not crowd.holds(one)
    crowd.loop.turn()
    assert crowd.loop.due == [], "a loop with nothing to do is let sleep"
    assert repr(crowd.crowd) == f"<Crowd left={CALM} held=0>"


def test_with_each_turn_some_go_on_those_first_that_were_paused_first() -> None:
    crowd = _Crowd()
    crowd.gather()
    many = [_Transport() for _ in range(2 * RESUMED + 1)]
    for one in many:
        crowd.read(one)
    for turn in (1, 2, 3):
        assert all(one.is_paused for one in many[(turn - 1) * RESUMED :])
        crowd.loop.turn()
        assert not any(one.is_paused for one in many[: turn * RESUMED])
    crowd.loop.turn()
    assert crowd.loop.due == []


def test_what_is_paused_for_another_reason_too_is_not_resumed_for_the_crowd() -> None:
    crowd, before, meanwhile = _Crowd(), _Transport(), _Transport()
    crowd.gather()
    crowd.pause(before)
    crowd.read(before)
    crowd.read(meanwhile)
    crowd.pause(meanwhile)
    assert not crowd.holds(before)
    assert not crowd.holds(meanwhile)
    crowd.loop.turn()
    assert before.is_paused
    assert meanwhile.is_paused
    crowd.resume(meanwhile)
    assert not meanwhile.is_paused


def test_what_is_resumed_for_another_reason_is_not_resumed_again() -> None:
    crowd, one = _Crowd(), _Transport()
    crowd.gather()
    crowd.read(one)
    crowd.resume(one)
    one.pause_reading()  # as the loop does at an end of file, which must not be read twice
    crowd.loop.turn()
    assert one.calls == ["pause", "resume", "pause"]


def test_what_is_closing_is_not_touched() -> None:
    crowd, before, meanwhile = _Crowd(), _Transport(), _Transport()
    crowd.gather()
    before.is_closed = True
    crowd.read(before)
    crowd.read(meanwhile)
    meanwhile.is_closed = True
    crowd.loop.turn()
    assert (before.calls, meanwhile.calls) == ([], ["pause"])
    assert not crowd.holds(meanwhile)


# A crowd of tunnels


class _Far:
    """The far ends of one side: it sends a message, takes it at the other side's far end, and sends the next."""

    def __init__(self, side: Side, sender: socket.socket, receiver: socket.socket) -> None:
        self.side = side
        self.transport = side.transport
        self.is_client = side is side.tunnel.client
        self.sender = sender
        self.receiver = receiver
        self.count = 0
        self.expected = b""

    def send(self) -> None:
        self.count += 1
        self.expected = frame(b"%08d" % self.count, is_masked=self.is_client)
        assert self.sender.send(self.expected) == len(self.expected)

    def take(self) -> None:
        """Take the one message that is under way; it blocks for the kernel only: what the proxy wrote is written."""
        assert self.receiver.recv(65536) == self.expected


class _Site:
    """Tunnels whose far ends answer at once, and how much is read between two turns of the loop."""

    def __init__(self, proxy: PlaneUnderTest) -> None:
        self.proxy = proxy
        self.crowd = proxy.plane.crowd
        self.fars: dict[Side, _Far] = {}
        self.count = 0
        self.limit = 0  # messages in all, after which nobody sends another
        self.per_turn: Counter[int] = Counter()
        self._links: list[socket.socket] = []
        self._is_counting = True

    async def open(self, tunnels: int) -> None:
        """Open tunnels, and take their far ends out of the loop."""
        for _ in range(tunnels):
            before = set(self.proxy.plane.tunnels)
            client, app = await connect(self.proxy)
            (tunnel,) = self.proxy.plane.tunnels - before
            ends = []
            for link in (client, app):
                link.stop_reading()
                end = socket.socket(fileno=os.dup(link.transport.get_extra_info("socket").fileno()))
                end.settimeout(DEADLINE_S)
                self._links.append(end)
                ends.append(end)
            self.fars[tunnel.client] = _Far(tunnel.client, ends[0], ends[1])
            self.fars[tunnel.upstream] = _Far(tunnel.upstream, ends[1], ends[0])

    def on_read(self, side: Side) -> None:
        """Take what a side was read of, and send the next message to it."""
        far = self.fars.get(side)
        if far is None or not self.limit:
            return
        self.count += 1
        far.take()
        if self.count < self.limit:
            far.send()

    def begin(self, limit: int) -> None:
        """Send the first message to each side, and count from now on."""
        self.limit = limit
        for far in self.fars.values():
            far.send()
        self._look(0, 0)

    def _look(self, turn: int, before: int) -> None:
        self.per_turn[turn] = self.count - before
        if self._is_counting:
            asyncio.get_running_loop().call_soon(self._look, turn + 1, self.count)

    async def end(self) -> None:
        """Wait until all that was sent is taken."""
        await eventually(lambda: self.count >= self.limit + len(self.fars) - 1, "all messages")

    @property
    def worst(self) -> int:
        """Return how much was read at most between two turns of the loop."""
        return max(self.per_turn.values())

    def close(self) -> None:
        self._is_counting = False
        self.limit = 0
        for link in self._links:
            link.close()


@pytest.fixture
async def site(proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[_Site]:
    """Give a site that hears of each read of a side, once the proxy is through with it."""
    site = _Site(proxy)
    data_received = Side.data_received

    def hear(side: Side, data: bytes) -> None:
        data_received(side, data)
        site.on_read(side)

    monkeypatch.setattr(Side, "data_received", hear)
    yield site
    site.close()


async def test_the_loop_turns_in_a_crowd_and_nothing_is_lost_or_overtaken(site: _Site) -> None:
    await site.open(TUNNELS)
    fired: list[int] = []
    site.begin(30_000)
    asyncio.get_running_loop().call_later(0.001, lambda: fired.append(site.count))
    await site.end()
    assert site.worst <= BOUND
    assert fired[0] < 10 * BOUND, "a timer fires in between"
    counts = [far.count for far in site.fars.values()]
    assert sum(counts) == site.count, "each message was taken as it was sent"
    assert max(counts) <= 3 * min(counts), "and each connection has its turn"
    await eventually(lambda: repr(site.crowd) == f"<Crowd left={site.crowd.left} held=0>")
    assert all(far.transport.is_reading() for far in site.fars.values())


async def test_the_control_without_a_crowd_to_be_seen_the_loop_does_not_turn(site: _Site) -> None:
    site.crowd.left = 1 << 60
    await site.open(TUNNELS)
    site.begin(30_000)
    await site.end()
    assert site.worst > 5 * BOUND


async def test_fewer_connections_than_a_round_are_never_paused(site: _Site, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    on_spent = Crowd.on_spent

    def watch(crowd: Crowd, transport: asyncio.Transport) -> None:
        on_spent(crowd, transport)
        if crowd.holds(transport):
            held.append(transport)

    monkeypatch.setattr(Crowd, "on_spent", watch)
    await site.open(100)
    site.begin(20_000)
    await site.end()
    assert held == []


# Each read held, which is as crowded as it can be


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Transport]:
    """Have each read pause its connection until the next turn; give the list of those that it was done to."""
    held: list[asyncio.Transport] = []
    on_spent = Crowd.on_spent

    def hold(crowd: Crowd, transport: asyncio.Transport) -> None:
        for _ in range(2):  # the first one may ask for a turn
            on_spent(crowd, transport)
        crowd.left = 0
        held.append(transport)

    monkeypatch.setattr(crowd_module, "CALM", 0)
    monkeypatch.setattr(crowd_module, "ROUND", 0)
    monkeypatch.setattr(Crowd, "on_spent", hold)
    return held


async def stays_paused(proxy: PlaneUnderTest, transport: asyncio.Transport) -> None:
    """Let the loop turn, and look in each turn."""
    for _ in range(100):
        assert not transport.is_reading()
        assert not proxy.plane.crowd.holds(transport)
        await asyncio.sleep(0)


async def test_exchanges_of_a_crowd_are_whole_and_wait_for_who_does_not_read(
    holding: list[asyncio.Transport], start: Start
) -> None:
    proxy = await start(settings=Settings(buffer_bytes=10_000))
    client, app = await proxy.open(request("POST /", f"Content-Length: {len(BODY)}"))
    app.stop_reading()
    client.send(BODY)
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_paused)
    await stays_paused(proxy, downstream.transport)
    app.read_again()
    assert (await app.read_request()).body == BODY
    client.stop_reading()
    exchange = downstream.exchange
    assert exchange is not None
    connection = exchange._connection
    assert connection is not None
    app.answer(BODY[::-1])
    await eventually(lambda: downstream.is_blocked)
    await stays_paused(proxy, connection.transport)
    client.read_again()
    assert (await client.read_response()).body == BODY[::-1]
    assert set(holding) == {downstream.transport, connection.transport}
    client.send(GET)
    assert (await app.read_request()).target == "/"
    app.answer(b"again")
    assert (await client.read_response()).body == b"again"


async def test_a_tunnel_of_a_crowd_is_whole_and_waits_for_the_side_that_does_not_read(
    holding: list[asyncio.Transport], proxy: PlaneUnderTest
) -> None:
    client, app = await connect(proxy)
    for sender, receiver, side in (
        (client, app, the_tunnel(proxy).client),
        (app, client, the_tunnel(proxy).upstream),
    ):
        sent = frame(BODY, 2, is_masked=side is the_tunnel(proxy).client)
        receiver.stop_reading()
        sender.send(sent)
        await eventually(lambda side=side: side.tail is not None)  # type: ignore[misc]
        await stays_paused(proxy, side.transport)
        receiver.read_again()
        assert await receiver.read(len(sent)) == sent
        assert side.transport in holding


async def test_a_tunnel_leaves_a_crowd_and_comes_back(
    holding: list[asyncio.Transport], proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Departure | None] = []
    data_received = Side.data_received

    def leave(side: Side, data: bytes) -> None:
        data_received(side, data)
        if not left:
            assert proxy.plane.crowd.holds(side.transport)
            left.append(depart(proxy.plane, side.tunnel))

    monkeypatch.setattr(Side, "data_received", leave)
    client, app = await connect(proxy)
    client.send(frame(b"one", is_masked=True))
    assert await app.read(9) == frame(b"one", is_masked=True)
    (departure,) = left
    assert departure is not None
    await departure.parted
    client.send(frame(b"two", is_masked=True))
    await eventually(lambda: "held=0" in repr(proxy.plane.crowd))
    tunnel = await departure.come_back()
    assert isinstance(tunnel, Tunnel)
    assert await app.read(9) == frame(b"two", is_masked=True)
    app.send(frame(b"three"))
    assert await client.read(7) == frame(b"three")


async def test_a_side_that_was_reset_in_a_crowd_is_read_to_its_end(
    holding: list[asyncio.Transport], proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = False
    data_received = Side.data_received

    def look(side: Side, data: bytes) -> None:
        nonlocal looked
        data_received(side, data)
        if not looked:
            looked = True
            end.send(frame(b"two", is_masked=True))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()
            assert is_reset(side.transport)
            assert not side.transport.is_reading()
            side.drop_reset()

    monkeypatch.setattr(Side, "data_received", look)
    end = socket.create_connection(("127.0.0.1", int(proxy.listeners[0].port)))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the reset would overtake what is sent before it
    end.sendall(HANDSHAKE)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    await eventually(lambda: proxy.plane.tunnels)
    end.sendall(frame(b"one", is_masked=True))
    assert (await app.read_rest())[:18] == frame(b"one", is_masked=True) + frame(b"two", is_masked=True)
    assert looked
    assert holding
