"""Connections and sessions that go from one worker to another: each is served by exactly one of them, whatever ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.control import channel as channel_module
from stickyproxy.control import transfer as transfer_module
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.transfer import Receiver, Sender
from stickyproxy.errors import ChannelError
from stickyproxy.proxy import arrival as arrival_module
from stickyproxy.proxy.arrival import arrive
from stickyproxy.proxy.departure import BATCH, depart
from stickyproxy.tasks import spawn
from tests.helpers.loops import on_uvloop, open_descriptors
from tests.helpers.plane import PlaneUnderTest, start_plane
from tests.helpers.raw import GET, RawLink, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, connect, frame
from tests.proxy.moving import Pair, start_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from stickyproxy.control.worker import Worker
    from stickyproxy.proxy.departure import Departure

HELLO = frame(b"hello", is_masked=True)


def worker_of(proxy: PlaneUnderTest) -> Worker:
    """Return what of a worker is needed here: the plane and its listeners."""
    listeners = dict(enumerate(proxy.listeners))
    return cast("Worker", SimpleNamespace(plane=proxy.plane, listeners=listeners))


class Transfer:
    """Two planes, and a channel between them. Clients connect to the old one."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.old, self.new = pair, pair.old, pair.new
        self.ends = socket.socketpair()
        self._channels: list[Channel] = []
        self._receivers: list[Receiver] = []

    def sender(self) -> Sender:
        sender = Sender(worker_of(self.old), self.ends[0])
        self._channels.append(sender._channel)
        return sender

    def receiver(self) -> Receiver:
        receiver = Receiver(worker_of(self.new), self.ends[1])
        self._receivers.append(receiver)
        self._channels.append(receiver._channel)
        return receiver

    def both(self) -> tuple[Sender, Receiver]:
        return self.sender(), self.receiver()

    def peer(self, at: int, handle: Callable[[Channel, Message], None] = lambda _, __: None) -> Channel:
        """Return an end that does what the test says: 0 is the sender's, 1 the receiver's."""
        channel = Channel(self.ends[at], lambda message: handle(channel, message))
        self._channels.append(channel)
        return channel

    async def reach(self, old: int, new: int) -> None:
        """Wait until so many connections are at the old and at the new one."""
        planes = self.old.plane, self.new.plane
        await eventually(lambda: (planes[0].connections, planes[1].connections) == (old, new), f"{old} and {new}")

    def count_no_more(self) -> None:
        """Leave out the last checks of both planes: a process that ends records nothing of what ends with it."""
        self.pair._is_settled = True
        for link in [*self.old._clients, *self.old.upstream.links]:
            link.reset()

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for receiver in self._receivers:
            receiver._on_lost("the test has ended")
        for link in self.ends:
            link.close()


def open_sockets() -> set[int]:
    """Return the sockets that this process has open: what else a plane opens, it may keep for a while."""
    return {descriptor for descriptor, what in open_descriptors().items() if what.startswith("socket:")}


@asynccontextmanager
async def two_workers(upstreams: int = 1) -> AsyncIterator[Transfer]:
    """Give two planes; both must be empty afterwards, and nothing may be left open."""
    before = open_sockets()
    async with AsyncExitStack() as stack:

        async def start(*args: Any, **options: Any) -> PlaneUnderTest:
            return await stack.enter_async_context(start_plane(*args, **options))

        transfer = Transfer(await start_pair(start, upstreams))
        stack.callback(transfer.close)
        yield transfer
    await eventually(lambda: open_sockets() <= before, "all that was opened is closed")


async def check_tunnel(client: RawLink, app: RawLink) -> None:
    """Send a message both ways."""
    client.send(HELLO)
    assert await app.read(len(HELLO)) == HELLO
    app.send(frame(b"answer"))
    assert await client.read(8) == frame(b"answer")


async def check_idle(transfer: Transfer, client: RawLink) -> None:
    """Have one more request answered."""
    client.send(request("GET /more"))
    upstream = transfer.old.upstream
    await eventually(lambda: any(b"GET /more" in link.held for link in upstream.links))
    app = next(link for link in upstream.links if b"GET /more" in link.held)
    await app.read_request()
    app.answer(b"more")
    assert (await client.read_response()).body == b"more"


async def open_idle(transfer: Transfer) -> RawLink:
    client, app = await transfer.old.open(GET)
    await app.read_request()
    app.answer(b"one")
    assert (await client.read_response()).body == b"one"
    return client


async def ended(*links: RawLink) -> None:
    for link in links:
        await eventually(lambda link=link: link.is_over)  # type: ignore[misc]


# What moves


@on_uvloop
async def test_connections_and_tunnels_move_and_go_on() -> None:
    async with two_workers() as transfer:
        tunnels = [await connect(transfer.old) for _ in range(3)]
        idle = await open_idle(transfer)
        sender, receiver = transfer.both()
        assert await sender.send() == Counter()
        assert sender.moved == {"tunnel": 3, "downstream": 1}
        await transfer.reach(0, 4)
        assert "moved=4" in repr(sender)
        assert "prepared=0" in repr(receiver)
        for client, app in tunnels:
            await check_tunnel(client, app)
        await check_idle(transfer, idle)
        await sender.close()


@on_uvloop
async def test_more_than_one_batch_moves() -> None:
    async with two_workers() as transfer:
        tunnels = [await connect(transfer.old) for _ in range(BATCH + 5)]
        sender, _ = transfer.both()
        assert await sender.send() == Counter()
        await transfer.reach(0, BATCH + 5)
        for client, app in tunnels:
            await check_tunnel(client, app)


@on_uvloop
async def test_what_is_busy_moves_later() -> None:
    async with two_workers() as transfer:
        client, app = await transfer.old.open(GET)
        await app.read_request()
        sender, _ = transfer.both()
        assert await sender.send() == {"exchange": 1}
        finishing = spawn(sender.finish(30), "finish")
        app.answer(b"one")
        assert (await client.read_response()).body == b"one"
        assert await finishing == Counter()
        await transfer.reach(0, 1)
        await sender.close()
        await check_idle(transfer, client)


@on_uvloop
async def test_what_cannot_move_in_time_stays() -> None:
    async with two_workers() as transfer:
        client, app = await transfer.old.open(GET)
        await app.read_request()
        sender, _ = transfer.both()
        assert await sender.send() == {"exchange": 1}
        assert await sender.finish(0.05) == {"exchange": 1}
        await sender.close()
        app.answer(b"one")
        assert (await client.read_response()).body == b"one"
        await transfer.reach(1, 0)


# Sessions


def fill_sessions(proxy: PlaneUnderTest, count: int) -> None:
    table, digest, now = proxy.plane.sessions, proxy.pool().digest, proxy.plane.now
    for number in range(count):
        table.touch(table.find(number.to_bytes(10, "big"), digest, 1_700_000_000 + number), now - 100)


@on_uvloop
async def test_sessions_move() -> None:
    async with two_workers() as transfer:
        fill_sessions(transfer.old, 2500)
        digest = transfer.old.pool().digest
        sender, _ = transfer.both()
        await sender.send()
        assert (len(transfer.old.sessions), len(transfer.new.sessions)) == (0, 2500)
        assert transfer.new.sessions.counts == {digest: 2500}
        session = transfer.new.sessions._active[(7).to_bytes(10, "big")]
        assert (session.digest, session.pinned_at) == (digest, 1_700_000_007)
        assert transfer.new.plane.now - session.active_at == pytest.approx(100, abs=2)


NO_SESSIONS: dict[str, Any] = {
    "nothing": {},
    "none": {"sessions": None},
    "no list": {"sessions": 5},
    "no session": {"sessions": [5]},
    "too short": {"sessions": [["00" * 10, "00" * 8, 1]]},
    "no id": {"sessions": [[5, "00" * 8, 1, 1.0]]},
    "an id that is no number": {"sessions": [["zz" * 10, "00" * 8, 1, 1.0]]},
    "a short id": {"sessions": [["00" * 9, "00" * 8, 1, 1.0]]},
    "a long digest": {"sessions": [["00" * 10, "00" * 9, 1, 1.0]]},
    "a time before 1970": {"sessions": [["00" * 10, "00" * 8, -1, 1.0]]},
    "a time that no token holds": {"sessions": [["00" * 10, "00" * 8, 1 << 32, 1.0]]},
    "a time that is none": {"sessions": [["00" * 10, "00" * 8, float("inf"), 1.0]]},
    "idle for ever": {"sessions": [["00" * 10, "00" * 8, 1, float("inf")]]},
    "idle for no time": {"sessions": [["00" * 10, "00" * 8, 1, float("nan")]]},
    "active in the future": {"sessions": [["00" * 10, "00" * 8, 1, -1.0]]},
    "a good one before a bad one": {"sessions": [["00" * 10, "00" * 8, 1, 1.0], ["00" * 10]]},
}


@pytest.mark.parametrize("body", NO_SESSIONS.values(), ids=NO_SESSIONS)
@on_uvloop
async def test_what_are_no_sessions_is_refused(body: dict[str, Any]) -> None:
    async with two_workers() as transfer:
        transfer.receiver()
        sender = transfer.peer(0)
        with pytest.raises(ChannelError, match="no sessions"):
            await sender.request("sessions", body)
        assert len(transfer.new.sessions) == 0
        written = ["ab" * 10, transfer.new.pool().digest.hex(), 1_700_000_000, 1]
        await sender.request("sessions", {"sessions": [written]})
        assert len(transfer.new.sessions) == 1


@on_uvloop
async def test_sessions_that_nobody_took_stay() -> None:
    async with two_workers() as transfer:
        fill_sessions(transfer.old, 3)
        sender = transfer.sender()
        transfer.ends[1].close()
        with pytest.raises(ChannelError, match="gone"):
            await sender.send()
        assert len(transfer.old.sessions) == 3


# The receiver ends


def end_process(channel: Channel, message: Message) -> None:
    """End as a process does: all that it has is closed."""
    message.close()
    channel.close()


def end_instead_of_an_answer(channel: Channel, message: Message) -> None:
    if message.kind == "connections":
        end_process(channel, message)
    channel.answer(message)


def end_behind_the_answer(channel: Channel, message: Message) -> None:
    channel.answer(message)
    if message.kind == "connections":
        end_process(channel, message)


def never_answer(channel: Channel, message: Message) -> None:
    if message.kind != "connections":
        channel.answer(message)


@pytest.mark.parametrize(
    "end", [end_instead_of_an_answer, end_behind_the_answer], ids=["before its answer", "before it hears go"]
)
@on_uvloop
async def test_the_receiver_ends_before_it_is_told_to_go(end: Callable[[Channel, Message], None]) -> None:
    """All stays here."""
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        idle = await open_idle(transfer)
        for session in list(transfer.old.sessions._active.values()):
            session.active_at -= 1
        sender = transfer.sender()
        transfer.peer(1, end)
        with pytest.raises(ChannelError):
            await sender.send()
        await sender.close()
        await transfer.reach(2, 0)
        assert not transfer.old.plane.departing
        await check_tunnel(client, app)
        await check_idle(transfer, idle)


@on_uvloop
async def test_the_receiver_ends_after_it_was_told_to_go() -> None:
    """From then on the connections are its own, and end with it."""
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        sender = transfer.sender()
        kept = list[int]()

        def take_and_end_at_go(channel: Channel, message: Message) -> None:
            kept.extend(message.take_descriptors())
            channel.answer(message)
            if message.kind == "go":
                end_process(channel, message)
                while kept:
                    os.close(kept.pop())

        transfer.peer(1, take_and_end_at_go)
        assert await sender.send() == Counter()
        await transfer.reach(0, 0)
        await ended(client, app)
        transfer.count_no_more()


@on_uvloop
async def test_a_receiver_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "_BATCH_S", 0.1)
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        fill = len(transfer.old.sessions)
        sender = transfer.sender()
        transfer.peer(1, never_answer)
        with pytest.raises(ChannelError, match=r"no answer within 0\.1 s"):
            await sender.send()
        await transfer.reach(1, 0)
        assert len(transfer.old.sessions) == fill
        await check_tunnel(client, app)


@on_uvloop
async def test_a_batch_that_was_given_up_is_dropped_by_the_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still preparing when the sender has lost its patience, and must not go on with it."""
    going = asyncio.Event()

    async def arrive_late(*args: Any) -> Any:
        await going.wait()
        return await arrive(*args)

    monkeypatch.setattr(transfer_module, "arrive", arrive_late)
    monkeypatch.setattr(transfer_module, "_BATCH_S", 0.05)
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        sender, receiver = transfer.both()
        with pytest.raises(ChannelError, match="no answer"):
            await sender.send()
        going.set()
        await eventually(lambda: receiver._channel.is_closed and not receiver._is_preparing)
        assert receiver._prepared == []
        await transfer.reach(1, 0)
        await check_tunnel(client, app)


@on_uvloop
async def test_the_grace_that_is_over_in_the_middle_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_workers() as transfer:
        client, app = await transfer.old.open(HANDSHAKE)
        await app.read_request()
        sender = transfer.sender()
        asked = list[Message]()

        def note(channel: Channel, message: Message) -> None:
            never_answer(channel, message)
            if message.kind == "connections":
                asked.append(message)

        transfer.peer(1, note)
        assert await sender.send() == {"exchange": 1}
        finishing = spawn(sender.finish(3), "finish")
        app.send(ACCEPT)
        assert (await client.read_message()).status == 101
        await eventually(lambda: asked)
        assert await finishing == {"waiting": 1}
        assert sender._channel.is_closed, "the receiver can never be told to go on with it"
        await sender.close()
        await check_tunnel(client, app)


# The sender ends


async def part(transfer: Transfer) -> tuple[Departure, dict[str, Any]]:
    """Part from the only connection of the old plane, and return what would be sent."""
    (one,) = transfer.old.plane.tunnels
    departure = depart(transfer.old.plane, one)
    assert departure is not None
    await departure.parted
    return departure, {"states": [departure.state.to_json()], "counts": [len(departure.descriptors)]}


@pytest.mark.parametrize("is_told", [False, True])
@on_uvloop
async def test_the_sender_ends_after_the_answer(*, is_told: bool) -> None:
    """Before "go" the connection ends with the sender's process, after it the receiver serves it."""
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        receiver = transfer.receiver()
        sender = transfer.peer(0)
        departure, body = await part(transfer)
        answer = await sender.request("connections", body, departure.descriptors)
        assert answer.body == {}
        await transfer.reach(1, 0)
        if is_told:
            sender.send("go")
        sender.close()
        departure.confirm()  # as the end of the process would close them
        await eventually(lambda: receiver._channel.is_closed)
        if is_told:
            await transfer.reach(0, 1)
            await check_tunnel(client, app)
        else:
            await transfer.reach(0, 0)
            await ended(client, app)
            transfer.count_no_more()


@on_uvloop
async def test_the_sender_ends_in_the_middle_of_a_message() -> None:
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        receiver = transfer.receiver()
        departure, _ = await part(transfer)
        socket.send_fds(transfer.ends[0], [b"STK1" + bytes(7)], list(departure.descriptors))
        transfer.ends[0].close()
        await eventually(lambda: receiver._channel.is_closed)
        await departure.come_back()
        await transfer.reach(1, 0)
        await check_tunnel(client, app)


@on_uvloop
async def test_garbage_behind_a_batch_gives_it_up() -> None:
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        receiver = transfer.receiver()
        sender = transfer.peer(0)
        departure, body = await part(transfer)
        await sender.request("connections", body, departure.descriptors)
        assert "prepared=1" in repr(receiver)
        transfer.ends[0].send(b"go on with it")
        await eventually(lambda: receiver._channel.is_closed)
        assert "prepared=0" in repr(receiver)
        await departure.come_back()
        await check_tunnel(client, app)


# What the receiver refuses


@on_uvloop
async def test_one_that_is_refused_stays_and_the_others_move() -> None:
    async with two_workers(2) as transfer:
        ends = [await connect_to(transfer, number) for number in (0, 1, 0, 1)]
        transfer.new.remove(transfer.new.upstreams[1])
        sender, _ = transfer.both()
        assert await sender.send() == {"refused": 2}
        await transfer.reach(2, 2)
        for client, app in ends:
            await check_tunnel(client, app)


async def connect_to(transfer: Transfer, number: int) -> tuple[RawLink, RawLink]:
    """Open a tunnel to one of the upstreams."""
    chosen = transfer.old.upstreams[number]
    for upstream in transfer.old.upstreams:
        transfer.old.set_admin(upstream, AdminState.READY if upstream is chosen else AdminState.DRAIN)
    client = await transfer.old.client()
    client.send(HANDSHAKE)
    app = await chosen.accept()
    await app.read_request()
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    return client, app


NO_CONNECTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no states": {"counts": [2]},
    "states that are none": {"states": [5], "counts": [2]},
    "a state of another kind": {"states": [{"kind": "exchange"}], "counts": [2]},
    "no list of states": {"states": {"a": 1}, "counts": [2]},
    "no list of counts": {"states": [{}], "counts": 2},
    "too few counts": {"states": [{}, {}], "counts": [2]},
    "too many descriptors": {"states": [{}], "counts": [1]},
    "too few descriptors": {"states": [{}], "counts": [3]},
    "fewer than none": {"states": [{}, {}], "counts": [3, -1]},
    "a count that is none": {"states": [{}], "counts": ["2"]},
    "for another": {"states": [{"kind": "downstream", "listener": "192.0.2.1:80"}], "counts": [2]},
}


@pytest.mark.parametrize("body", NO_CONNECTIONS.values(), ids=NO_CONNECTIONS)
@on_uvloop
async def test_what_are_no_connections_is_refused_and_the_next_ones_are_taken(body: dict[str, Any]) -> None:
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        transfer.receiver()
        sender = transfer.peer(0)
        departure, good = await part(transfer)
        before = len(open_sockets())
        answer = await sender.request("connections", body, departure.descriptors)
        assert answer.body["refused"]
        await eventually(lambda: len(open_sockets()) == before)
        assert (await sender.request("connections", good, departure.descriptors)).body == {}
        sender.send("go")
        departure.confirm()
        await transfer.reach(0, 1)
        await check_tunnel(client, app)


@on_uvloop
async def test_the_good_ones_of_a_bad_batch_are_given_up() -> None:
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        transfer.receiver()
        sender = transfer.peer(0)
        departure, good = await part(transfer)
        before = len(open_sockets())
        bad = {"states": [*good["states"], {"kind": "exchange"}], "counts": [2, 2]}
        answer = await sender.request("connections", bad, departure.descriptors * 2)
        assert "exchange" in answer.body["refused"]
        await eventually(lambda: len(open_sockets()) == before)
        assert await departure.come_back() is not None
        await check_tunnel(client, app)


@on_uvloop
async def test_whatever_goes_wrong_with_a_batch_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module.logger, "exception", transfer_module.logger.warning)  # else the plane complains

    async def fail(*args: Any) -> None:
        for descriptor in args[3]:
            os.close(descriptor)
        raise ZeroDivisionError

    monkeypatch.setattr(transfer_module, "arrive", fail)
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        sender, receiver = transfer.both()
        assert await sender.send() == {"refused": 1}
        assert not receiver._is_preparing
        await transfer.reach(1, 0)
        await check_tunnel(client, app)


@on_uvloop
async def test_a_second_batch_before_the_first_has_gone_on_is_refused() -> None:
    """Which of the two "go" would mean could not be told."""
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        transfer.receiver()
        sender = transfer.peer(0)
        departure, good = await part(transfer)
        first = spawn(sender.request("connections", good, departure.descriptors), "first")
        await asyncio.sleep(0)
        with pytest.raises(ChannelError, match="before these"):
            await sender.request("connections", good, departure.descriptors)
        assert (await first).body == {}
        with pytest.raises(ChannelError, match="before these"):
            await sender.request("connections", good, departure.descriptors)
        for _ in range(3):
            sender.send("go")
        departure.confirm()
        await transfer.reach(0, 1)
        await check_tunnel(client, app)


@on_uvloop
async def test_a_kind_that_is_not_known_is_refused() -> None:
    async with two_workers() as transfer:
        transfer.receiver()
        with pytest.raises(ChannelError, match="knows no 'secrets'"):
            await transfer.peer(0).request("secrets")


@on_uvloop
async def test_what_is_too_large_for_one_message_moves_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_workers() as transfer:
        tunnels = [await connect(transfer.old) for _ in range(4)]
        monkeypatch.setattr(channel_module, "_MAX_BYTES", 2000)
        sender, _ = transfer.both()
        assert await sender.send() == Counter()
        await transfer.reach(0, 4)
        for client, app in tunnels:
            await check_tunnel(client, app)


@on_uvloop
async def test_one_that_is_too_large_by_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_workers() as transfer:
        client, app = await connect(transfer.old)
        sender, _ = transfer.both()
        monkeypatch.setattr(channel_module, "_MAX_BYTES", 300)
        assert await sender.send() == {"refused": 1}
        await transfer.reach(1, 0)
        await check_tunnel(client, app)


@on_uvloop
async def test_one_that_cannot_go_on_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module.logger, "exception", transfer_module.logger.warning)  # else the plane complains
    async with two_workers() as transfer:
        tunnels = [await connect(transfer.old) for _ in range(3)]
        sender, _ = transfer.both()
        go = arrival_module._TunnelArrival.go
        gone = list[Any]()

        def go_but_once(arrival: Any) -> Any:
            gone.append(arrival)
            if len(gone) == 2:
                raise ValueError("no")
            return go(arrival)

        monkeypatch.setattr(arrival_module._TunnelArrival, "go", go_but_once)
        assert await sender.send() == Counter()
        await eventually(lambda: len(gone) == 3)
        await transfer.reach(0, 2)
        lost = 0
        for client, app in tunnels:
            client.send(HELLO)
            await eventually(lambda app=app, client=client: client.is_over or len(app.held) == len(HELLO))  # type: ignore[misc]
            lost += client.is_over
        assert lost == 1
        transfer.count_no_more()
