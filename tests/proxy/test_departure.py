"""Connections that move between two planes: nothing is lost, doubled or reordered, and everything is counted once."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.proxy import arrival as arrival_module
from stickyproxy.proxy import departure as departure_module
from stickyproxy.proxy.departure import BATCH, Mover, depart
from stickyproxy.proxy.settings import Pings, Settings
from stickyproxy.tasks import spawn
from stickyproxy.wire.frames import ScannerState, write_close
from tests.helpers.plane import cluster_settings
from tests.helpers.raw import GET, RawLink, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, MASK, close_of, connect, frame
from tests.proxy.moving import Pair, start_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy.proxy.handover import TunnelState
    from tests.helpers.plane import Start


@pytest.fixture
async def pair(start: Start) -> Pair:
    """Give two planes with the same upstream."""
    return await start_pair(start)


# Tunnels


async def test_a_tunnel_moves_and_goes_on(pair: Pair) -> None:
    client, app = await connect(pair.old)
    client.send(frame(b"before", is_masked=True))
    assert await app.read(12) == frame(b"before", is_masked=True)
    assert await pair.move() == Counter()
    assert pair.mover.moved == {"tunnel": 1}
    assert (pair.old.plane.connections, pair.new.plane.connections) == (0, 1)
    client.send(frame(b"after", is_masked=True))
    assert await app.read(11) == frame(b"after", is_masked=True)
    app.send(frame(b"answer"))
    assert await client.read(8) == frame(b"answer")
    assert "moved=1 left=0" in repr(pair.mover)


def numbered(count: int, *, is_masked: bool) -> list[bytes]:
    """Return frames of many sizes, each with its number in it."""
    sizes = random.Random(count + is_masked)
    frames = []
    for number in range(count):
        payload = b"%08d" % number + bytes(sizes.choice((0, 1, 110, 118, 119, 1000, 65527, 65528, 70_000)))
        frames.append(frame(payload, 2, is_masked=is_masked))
    return frames


async def send_in_pieces(link: RawLink, data: bytes, seed: int) -> None:
    """Send bytes cut anywhere, giving way to others now and then."""
    sizes, at = random.Random(seed), 0
    while at < len(data):
        size = sizes.choice((1, 2, 7, 100, 4096, 50_000))
        await link.ready()
        link.send(data[at : at + size])
        at += size
        if size > 50:
            await asyncio.sleep(0)


async def test_numbered_messages_both_ways_while_the_tunnel_moves_to_and_fro(pair: Pair) -> None:
    client, app = await connect(pair.old)
    up, down = b"".join(numbered(400, is_masked=True)), b"".join(numbered(400, is_masked=False))
    sending = asyncio.gather(send_in_pieces(client, up, 1), send_in_pieces(app, down, 2))
    moves = 0
    while not sending.done():
        await pair.move()
        moves += pair.mover.moved.total()
        pair.turn()
        await asyncio.sleep(0.001)
    await sending
    assert moves >= 20
    assert await app.read(len(up)) == up
    assert await client.read(len(down)) == down
    app.send(frame(b"\x03\xe8", 8)).half_close()
    client.half_close()
    await eventually(lambda: pair.records)
    (record,) = pair.records
    assert (record.received_bytes, record.sent_bytes) == (len(up), len(down) + 4)
    counters = [proxy.pool().counters for proxy in (pair.old, pair.new)]
    assert sum(one.frames_received[2] for one in counters) == 400, "each frame was counted by one of them"
    assert sum(one.frames_sent[2] for one in counters) == 400
    assert sum(one.tunnel_received_bytes for one in counters) == len(up)
    assert sum(one.tunnel_sent_bytes for one in counters) == len(down) + 4


def read_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let arrivals read at once, and drop what they read, as a plain protocol would."""
    monkeypatch.setattr(arrival_module._Waiting, "hold", lambda _: None)
    monkeypatch.setattr(arrival_module._Waiting, "data_received", lambda _, __: None)


async def test_control_without_holding_back_the_reading_bytes_are_lost(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_too_early(monkeypatch)
    client, app = await connect(pair.old)
    data = frame(b"lost", is_masked=True)
    pair.carrier.on_send = lambda: client.send(data)  # what comes while nobody reads
    await pair.move()
    client.send(frame(b"seen", is_masked=True))
    await app.read(10)
    await eventually(lambda: app.received_bytes >= 10)
    assert data not in app.all_received


SHAPES = [(size, is_masked) for size in (3, 200, 66_000) for is_masked in (True, False)]


def cuts_of(whole: bytes) -> list[int]:
    """Return every place in the header and the first bytes of the payload, one further on, and the last ones."""
    return [*range(1, 18), len(whole) // 2, len(whole) - 1] if len(whole) > 20 else [*range(1, len(whole))]


@pytest.mark.parametrize(("size", "is_masked"), SHAPES)
async def test_a_frame_may_be_cut_anywhere(pair: Pair, size: int, *, is_masked: bool) -> None:
    """The tunnel moves in the middle of a frame, is asked to end, and ends only behind the frame."""
    whole = frame(bytes(range(256)) * (size // 256 + 1), 2, is_masked=is_masked)
    for cut in cuts_of(whole):
        client, app = await connect(pair.old)
        sender, receiver = (client, app) if is_masked else (app, client)
        sender.send(whole[:cut])
        assert await receiver.read(cut) == whole[:cut]
        await pair.move()
        tunnel = pair.tunnel
        tunnel.shut()
        assert close_of(await sender.read(2 + 2 + 23 + (0 if is_masked else 4)))[0] == 1001
        sender.send(whole[cut:])
        assert await receiver.read(len(whole) - cut) == whole[cut:]
        assert close_of(await receiver.read(2 + 2 + 23 + (4 if is_masked else 0)))[0] == 1001
        for end in (client, app):
            end.half_close()
        await eventually(lambda: not pair.new.plane.tunnels)
        client.close()
        app.close()


@pytest.mark.parametrize("cut", [1, 3, 5, 150])
async def test_control_without_the_scanners_state_a_frame_is_broken(pair: Pair, cut: int) -> None:
    def forget(state: TunnelState) -> TunnelState:
        return replace(state, client=replace(state.client, scanner=ScannerState()))

    pair.carrier.tamper = forget
    client, app = await connect(pair.old)
    whole = frame(b"x" * 200, is_masked=True)
    client.send(whole[:cut])
    await app.read(cut)
    await pair.move()
    pair.tunnel.shut()
    assert close_of(await app.read(2 + 4 + 2 + 23)) == (1001, True), "in the middle of the frame"


# Bytes that one side does not take


async def fill(pair: Pair, *, is_down: bool, size: int = 40_000_000) -> tuple[RawLink, RawLink, bytes]:
    """Open a tunnel and send until one side, which does not read, blocks; return sender, receiver and what was sent."""
    client, app = await connect(pair.old)
    sender, receiver = (app, client) if is_down else (client, app)
    receiver.stop_reading()
    data = frame(random.Random(5).randbytes(size), 2, is_masked=not is_down)
    sender.send(data)
    (tunnel,) = pair.old.plane.tunnels
    side = tunnel.upstream if is_down else tunnel.client
    await eventually(lambda: not side.transport.is_reading())
    assert side.tail
    assert side.other.get_write_buffer_size() <= len(side.tail)
    return sender, receiver, data


@pytest.mark.parametrize("is_down", [True, False])
@pytest.mark.parametrize("reads", ["afterwards", "meanwhile"])
async def test_unsent_bytes_move_too(pair: Pair, reads: str, *, is_down: bool) -> None:
    sender, receiver, data = await fill(pair, is_down=is_down)
    if reads == "meanwhile":
        receiver.read_again()
    await pair.move()
    for _ in range(3):
        pair.turn()
        await pair.move()
    receiver.read_again()
    sender.send(frame(b"last"))
    assert await receiver.read(len(data) + 6) == data + frame(b"last")
    assert receiver.held == b""


async def test_control_without_the_unsent_bytes_the_test_sees_a_loss(pair: Pair) -> None:
    def lose(state: TunnelState) -> TunnelState:
        assert state.upstream.unsent
        return replace(state, upstream=replace(state.upstream, unsent=b""))

    pair.carrier.tamper = lose
    sender, receiver, data = await fill(pair, is_down=True)
    await pair.move()
    receiver.read_again()
    sender.half_close()
    await receiver.read_until(b"the application ended") if not receiver.is_over else None
    assert receiver.received_bytes < len(data)


def drain(link: RawLink) -> None:
    """Take what the kernel holds for an end that does not read, in this very turn of the loop."""
    descriptor = os.dup(link.transport.get_extra_info("socket").fileno())
    with socket.socket(fileno=descriptor) as copy, suppress(BlockingIOError):
        while data := copy.recv(1 << 20):
            link.data_received(data)


@pytest.mark.parametrize("is_control", [False, True])
async def test_what_is_written_while_a_connection_is_parted_from_is_not_written_twice(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, *, is_control: bool
) -> None:
    """The loop writes on until a transport is closed, which is a turn after `abort`; the control measures before it."""
    if is_control:
        part = departure_module._Parting.part

        def measure(self: Any) -> None:
            self.unsent_bytes = self._transport.get_write_buffer_size()
            part(self)

        monkeypatch.setattr(departure_module._Parting, "part", measure)
        monkeypatch.setattr(departure_module._Parting, "connection_lost", lambda self, _: self._departure.on_parted())
    sender, receiver, data = await fill(pair, is_down=True)
    drain(receiver)
    await pair.move()
    receiver.read_again()
    sender.send(frame(b"last"))
    whole = data + frame(b"last")
    if is_control:
        await eventually(lambda: receiver.received_bytes > len(whole) + 1000)
    else:
        assert await receiver.read(len(whole)) == whole
        assert receiver.held == b""


async def test_a_ping_to_a_blocked_side_keeps_its_place(start: Start) -> None:
    pair = await start_pair(start, settings=Settings(pings=Pings(30.0, 20.0)))
    _, client, data = await fill(pair, is_down=True)
    (tunnel,) = pair.old.plane.tunnels
    ping = b"\x89\x08" + b"12345678"
    tunnel.client.say(ping)
    before = tunnel.upstream.tail
    assert before is not None
    assert before.endswith(ping)
    await pair.move()
    client.read_again()
    received = await client.read(len(data) + len(ping))
    at = received.index(ping)
    assert received[:at] + received[at + len(ping) :] == data


async def test_the_session_goes_along_and_is_counted_where_its_tunnel_is(pair: Pair) -> None:
    await connect(pair.old)
    (before,) = pair.old.sessions._active.values()
    digest = pair.old.pool().digest
    await pair.move()
    (session,) = pair.new.sessions._active.values()
    assert session is not before
    assert (session.client_id, session.digest, session.pinned_at) == (before.client_id, digest, before.pinned_at)
    assert (before.open, session.open) == (0, 1)
    assert pair.new.sessions.counts == {digest: 1}


async def test_a_session_that_was_pinned_anew_meanwhile_stays_where_it_is_pinned(start: Start) -> None:
    pair = await start_pair(start, 2)
    pair.old.remove(pair.old.upstreams[1])
    client, app = await pair.old.open(HANDSHAKE)
    await app.read_request()
    app.send(ACCEPT)
    await client.read_message()
    (before,) = pair.old.sessions._active.values()
    other = next(digest for digest in pair.new.plane.pools if digest != before.digest)
    later = pair.new.sessions.find(before.client_id, other, before.pinned_at + 60)
    pair.new.sessions.touch(later, pair.new.plane.now)
    await pair.move()
    assert (later.digest, later.open) == (other, 1)
    client.send(frame(b"hello", is_masked=True))
    assert await app.read(11) == frame(b"hello", is_masked=True), "the tunnel is where it was"


async def test_a_tunnel_without_a_session_moves_as_one(start: Start) -> None:
    pair = await start_pair(start, settings=Settings(clusters=cluster_settings(cookie=None)))
    await connect(pair.old)
    assert pair.old.pool().strangers == 1
    await pair.move()
    assert (pair.old.pool().strangers, pair.new.pool().strangers) == (0, 1)


# Tunnels that are not simply open


async def test_a_half_closed_client_stays_half_closed(pair: Pair) -> None:
    client, app = await connect(pair.old)
    client.send(b"bye").half_close()
    assert await app.read_rest() == b"bye"
    for _ in range(3):
        await pair.move()
        pair.turn()
    assert pair.old.plane.tunnels
    app.send(frame(b"still here"))
    assert await client.read(12) == frame(b"still here")
    app.send(frame(b"\x03\xe8", 8)).half_close()
    assert await client.read_rest() == frame(b"\x03\xe8", 8)
    await eventually(lambda: pair.records)
    assert (pair.records[0].initiator, pair.records[0].close_code, pair.records[0].cause) == ("client", 1000, "eof")


async def test_an_end_behind_unsent_bytes_comes_behind_them(pair: Pair) -> None:
    """The new process still has to write the rest, and then end its direction."""
    client, app = await connect(pair.old)
    app.stop_reading()
    data = frame(random.Random(6).randbytes(40_000_000), 2, is_masked=True)
    client.send(data)
    (tunnel,) = pair.old.plane.tunnels
    await eventually(lambda: not tunnel.client.transport.is_reading())
    tunnel.client.eof_received()  # what a close of the client's half behind those bytes comes to
    assert tunnel.may_leave
    await pair.move()
    app.read_again()
    read = await app.read_rest()
    assert data.startswith(read)
    assert read
    assert pair.tunnel.client.is_eof
    assert pair.new.plane.tunnels


async def test_a_close_frame_in_flight_is_known_to_have_been_first(pair: Pair) -> None:
    client, app = await connect(pair.old)
    client.send(write_close(4001, "enough", mask=MASK))
    assert close_of(await app.read(14)) == (4001, True)
    await pair.move()
    app.send(write_close(4001, "enough")).half_close()
    assert await client.read_rest() == write_close(4001, "enough")
    client.half_close()
    await eventually(lambda: pair.records)
    record = pair.records[0]
    assert (record.initiator, record.close_code, record.cause) == ("client", 4001, "close_frame")
    closes = pair.new.pool().counters.closes
    assert sum(closes.values()) == 1
    assert sum(pair.old.pool().counters.closes.values()) == 0


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("forgets", [False, True])
async def test_a_pong_is_taken_out_by_the_process_it_comes_to(start: Start, *, is_cut: bool, forgets: bool) -> None:
    pair = await start_pair(start, settings=Settings(pings=Pings(30.0, 20.0)))
    if forgets:  # the control
        pair.carrier.tamper = lambda state: replace(state, client=replace(state.client, filter=None))
    client, app = await connect(pair.old)
    (tunnel,) = pair.old.plane.tunnels
    tunnel.sweep(pair.old.plane.now + 30)
    payload = (await client.read(10))[2:]
    await app.read(14)
    pong = frame(payload, 10, is_masked=True)
    if is_cut:
        client.send(pong[:5])
        await eventually(lambda: tunnel.client.filter is not None and tunnel.client.filter.held)
    await pair.move()
    client.send(pong[5:] if is_cut else pong).send(frame(b"next", is_masked=True))
    came = await app.read(10)
    assert (came == frame(b"next", is_masked=True)) is not forgets


async def test_a_ping_without_an_answer_has_no_more_time_for_the_move(start: Start) -> None:
    pair = await start_pair(start, settings=Settings(pings=Pings(30.0, 20.0)), linger_s=0.2)
    client, app = await connect(pair.old)
    (tunnel,) = pair.old.plane.tunnels
    now = pair.old.plane.now
    tunnel.sweep(now + 30)
    await client.read(10)
    to_app = (await app.read(14))[6:]
    assert len(to_app) == 8
    pair.old.plane.now = now + 45  # 15 s later
    await pair.move()
    later = pair.new.plane.now
    moved = pair.tunnel
    app.send(frame(bytes(octet ^ b for octet, b in zip(to_app, bytes(8), strict=True)), 10))
    moved.sweep(later + 4.5)
    assert pair.new.plane.tunnels
    moved.sweep(later + 5.5)
    await eventually(lambda: pair.records)
    assert pair.records[0].cause == "ping_timeout"


async def test_age_and_idle_time_go_on(start: Start) -> None:
    pair = await start_pair(
        start, tunnel_max_age_s=1000.0, tunnel_max_age_jitter_percent=0.0, tunnel_idle_s=100.0, linger_s=0.2
    )
    client, app = await connect(pair.old)
    (tunnel,) = pair.old.plane.tunnels
    tunnel._ends_at = pair.old.plane.now + 50
    tunnel._seen_at = pair.old.plane.now - 70
    tunnel._started_at -= 1000
    await pair.move()
    moved, now = pair.tunnel, pair.new.plane.now
    assert moved._ends_at == pytest.approx(now + 50, abs=1)
    assert moved._seen_at == pytest.approx(now - 70, abs=1)
    moved.sweep(now + 31)
    assert close_of(await client.read(2 + 2 + 29)) == (1001, False)
    client.half_close()
    app.half_close()
    await eventually(lambda: pair.records)
    assert pair.records[0].cause == "idle"
    assert pair.records[0].duration_s >= 1000


async def test_an_ending_tunnel_ends_where_it_is(pair: Pair) -> None:
    client, app = await connect(pair.old)
    app.close()
    assert close_of(await client.read(2 + 2 + 21)) == (1012, False)
    assert await pair.move() == {"ending": 1}
    client.half_close()
    await eventually(lambda: pair.records)
    assert pair.old.records[-1].close_code == 1012


@pytest.mark.parametrize("who", ["client", "app"])
async def test_a_side_that_is_reset_while_the_tunnel_moves_is_found_out(start: Start, who: str) -> None:
    pair = await start_pair(start, linger_s=0.2)
    client, app = await connect(pair.old)
    pair.carrier.on_send = (client if who == "client" else app).reset
    await pair.move()
    if who == "client":
        await app.read_rest()
    else:
        assert close_of(await client.read_rest())[0] in {1012, 1014}
    await eventually(lambda: pair.records)
    assert pair.records[0].initiator == {"client": "client", "app": "upstream"}[who]


# When the other process does not go on with it


@pytest.mark.parametrize("raises", [False, True])
async def test_what_is_refused_comes_back_as_if_nothing_had_happened(pair: Pair, *, raises: bool) -> None:
    client, app = await connect(pair.old)
    whole = frame(b"x" * 100, is_masked=True)
    client.send(whole[:50])
    assert await app.read(50) == whole[:50]
    pair.carrier.refuses = True
    if raises:
        pair.carrier.error = ConnectionResetError("the new worker died")
        with pytest.raises(ConnectionResetError):
            await pair.move()
    else:
        assert await pair.move() == {"refused": 1}
        assert await pair.mover.finish() == {"refused": 1}, "it is not asked for again and again"
        assert pair.carrier.sizes == [1]
    assert (pair.old.plane.connections, pair.new.plane.connections) == (1, 0)
    client.send(whole[50:])
    assert await app.read(len(whole) - 50) == whole[50:]
    app.send(frame(b"answer"))
    assert await client.read(8) == frame(b"answer")
    assert pair.records == []


async def test_unsent_bytes_come_back_too(pair: Pair) -> None:
    pair.carrier.refuses = True
    _, receiver, data = await fill(pair, is_down=True)
    await pair.move()
    receiver.read_again()
    assert await receiver.read(len(data)) == data


async def test_one_that_is_refused_does_not_keep_the_others(start: Start) -> None:
    pair = await start_pair(start, 2)
    ends = []
    for _ in range(6):
        client = await pair.old.client()
        client.send(HANDSHAKE)
        ends.append(client)
    for upstream in pair.old.upstreams:
        await eventually(lambda upstream=upstream: len(upstream.links) == 3)  # type: ignore[misc]
        for link in upstream.links:
            await link.read_request()
            link.send(ACCEPT)
    for client in ends:
        assert (await client.read_message()).status == 101
    pair.new.remove(pair.new.upstreams[1])
    assert await pair.move() == {"refused": 3}
    assert pair.carrier.sizes == [6, 1, 1, 1, 1, 1, 1]
    assert pair.mover.moved == {"tunnel": 3}
    for client in ends:
        client.send(frame(b"hello", is_masked=True))
    for upstream in pair.old.all_upstreams:
        for link in upstream.links:
            assert await link.read(11) == frame(b"hello", is_masked=True)


async def test_a_plane_that_began_to_stop_ends_what_comes_back(pair: Pair) -> None:
    client, app = await connect(pair.old)
    pair.carrier.refuses = True
    pair.carrier.on_send = pair.old.plane.stop
    await pair.move()
    assert close_of(await client.read(2 + 2 + 23)) == (1001, False)
    client.half_close()
    app.half_close()
    await pair.old.plane.wait_until_empty()


async def test_a_stopping_plane_is_not_empty_while_a_connection_is_on_its_way(pair: Pair) -> None:
    await connect(pair.old)
    pair.old.plane.is_stopping = True
    waiting = spawn(pair.old.plane.wait_until_empty(), "wait")
    seen = []
    pair.carrier.on_send = lambda: seen.append(pair.old.plane.connections)
    await asyncio.sleep(0)
    await pair.move()
    assert seen == [1]
    await waiting


async def test_without_a_descriptor_left_everything_stays(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    client, app = await connect(pair.old)
    (tunnel,) = pair.old.plane.tunnels
    dup, made = os.dup, list[int]()

    def dup_once(descriptor: int) -> int:
        if made:
            raise OSError(errno.EMFILE, "no descriptor left")
        made.append(dup(descriptor))
        return made[0]

    monkeypatch.setattr("stickyproxy.proxy.departure.os.dup", dup_once)
    assert depart(pair.old.plane, tunnel) is None
    monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])
    client.send(frame(b"hello", is_masked=True))
    assert await app.read(11) == frame(b"hello", is_masked=True)


async def test_a_connection_that_cannot_come_back_is_counted_as_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, app = await connect(pair.old)
    (tunnel,) = pair.old.plane.tunnels
    departure = depart(pair.old.plane, tunnel)
    assert departure is not None
    assert "Departure of <Tunnel" in repr(departure)
    await departure.parted
    spare = os.open("/dev/null", os.O_RDONLY)
    for descriptor in departure.descriptors:
        os.dup2(spare, descriptor)
    os.close(spare)
    monkeypatch.setattr(departure_module.logger, "error", departure_module.logger.warning)  # else the plane complains
    assert await departure.come_back() is None
    assert "is lost" in caplog.text
    await client.read_rest()
    await app.read_rest()
    assert pair.records[0].cause == "aborted"


# Many


async def test_many_tunnels_move_in_batches(pair: Pair) -> None:
    count = 300
    clients = []
    for _ in range(count):
        client = await pair.old.client()
        clients.append(client.send(HANDSHAKE))
    upstream = pair.old.upstream
    await eventually(lambda: len(upstream.links) == count)
    for app in upstream.links:
        await app.read_request()
        app.send(ACCEPT)
    await eventually(lambda: len(pair.old.plane.tunnels) == count)
    for client in clients:
        await client.read_message()
    for number, client in enumerate(clients):
        client.send(frame(b"%08d" % number, is_masked=True))
    for app in upstream.links:
        app.send(frame(b"from the app"))
    assert await pair.move() == Counter()
    assert sum(pair.carrier.sizes) == count
    assert max(pair.carrier.sizes) == BATCH
    assert pair.new.plane.load(pair.new.plane.default.snapshot.upstreams[0]) == count
    assert len(pair.new.sessions) == count
    for number, client in enumerate(clients):
        client.send(frame(b"%08d" % (number + count), is_masked=True))
        assert await client.read(14) == frame(b"from the app")
    numbers = set()
    for app in upstream.links:
        first, second = await app.read(14), await app.read(14)
        number = next(n for n in range(count) if frame(b"%08d" % n, is_masked=True) == first)
        assert second == frame(b"%08d" % (number + count), is_masked=True)
        numbers.add(number)
    assert len(numbers) == count


# Clients' connections between two exchanges


async def test_an_idle_connection_moves_and_serves_on(pair: Pair) -> None:
    client, app = await pair.old.open(GET)
    await app.read_request()
    app.answer(b"one")
    assert (await client.read_response()).body == b"one"
    (downstream,) = pair.old.plane.downstreams
    left_s = downstream.deadline - pair.old.plane.now
    assert await pair.move() == Counter()
    assert pair.mover.moved == {"downstream": 1}
    (arrived,) = pair.new.plane.downstreams
    assert arrived.is_idle
    assert arrived.deadline - pair.new.plane.now == pytest.approx(left_s, abs=1)
    client.send(request("GET /two"))
    app = await pair.new.upstream.accept()
    assert (await app.read_request()).target == "/two"
    app.answer(b"two")
    assert (await client.read_response()).body == b"two"


@pytest.mark.parametrize("cut", [1, 3, 14, len(GET) - 2])
async def test_a_part_of_a_head_goes_along(pair: Pair, cut: int) -> None:
    client = await pair.old.client()
    client.send(GET[:cut])
    await eventually(lambda: any(one._held for one in pair.old.plane.downstreams))
    (downstream,) = pair.old.plane.downstreams
    deadline = downstream.deadline - pair.old.plane.now
    assert await pair.move() == Counter()
    (arrived,) = pair.new.plane.downstreams
    assert arrived.deadline - pair.new.plane.now == pytest.approx(deadline, abs=1)
    client.send(GET[cut:])
    app = await pair.new.upstream.accept()
    await app.read_request()
    app.answer(b"whole")
    assert (await client.read_response()).body == b"whole"


async def test_pieces_of_a_head_are_counted_on(pair: Pair) -> None:
    client = await pair.old.client()
    for at in range(10):
        client.send(GET[at : at + 1])
        await eventually(lambda at=at: any(len(one._held or b"") > at for one in pair.old.plane.downstreams))  # type: ignore[misc]
    (downstream,) = pair.old.plane.downstreams
    pieces = downstream._pieces
    assert pieces > 5
    await pair.move()
    (arrived,) = pair.new.plane.downstreams
    assert arrived._pieces == pieces


async def test_a_connection_that_is_always_busy_moves_between_two_exchanges(pair: Pair) -> None:
    """Requests follow each other without a pause, several of them held: the connection is never seen idle."""
    client = await pair.old.client()
    for upstream in (pair.old.upstream,):
        upstream.on_accept = answer_by_number
    targets = [f"/{number}" for number in range(300)]
    for target in targets[:3]:
        client.send(request(f"GET {target}"))
    moving: asyncio.Task[Any] | None = None
    for at, target in enumerate(targets):
        assert (await client.read_response()).body == target.encode()
        if at + 3 < len(targets):
            client.send(request(f"GET {targets[at + 3]}"))
        if at == 100:
            moving = spawn(pair.mover.finish(), "finish")
    assert moving is not None
    assert await moving == Counter()
    assert pair.mover.moved == {"downstream": 1}
    assert pair.old.exchanges > 100
    assert pair.new.exchanges > 0
    assert pair.old.exchanges + pair.new.exchanges == 300


def answer_by_number(link: RawLink) -> None:
    """Answer each request with its target."""

    def answer(link: RawLink) -> None:
        while b"\r\n\r\n" in link.held:
            head, _, rest = bytes(link.held).partition(b"\r\n\r\n")
            link.held[:] = rest
            link.answer(head.split(b" ")[1])

    link.on_data = answer


async def test_control_without_the_hook_a_busy_connection_stays(pair: Pair) -> None:
    client = await pair.old.client()
    pair.old.upstream.on_accept = answer_by_number
    for number in range(50):
        client.send(request(f"GET /{number}"))
    (downstream,) = await some(lambda: pair.old.plane.downstreams)
    await eventually(lambda: downstream._held)
    assert not downstream.may_leave
    for number in range(50):
        assert (await client.read_response()).body == b"/%d" % number
    assert pair.new.exchanges == 0


async def some(get: Callable[[], Any]) -> Any:
    await eventually(get)
    return get()


async def test_an_exchange_is_finished_first(pair: Pair) -> None:
    client, app = await pair.old.open(GET)
    await app.read_request()
    assert await pair.move() == {"exchange": 1}
    finishing = spawn(pair.mover.finish(), "finish")
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
    await client.read_until(b"abc")
    assert not finishing.done()
    app.send(b"def")
    assert await client.read(3) == b"def"
    assert await finishing == Counter()
    assert pair.mover.moved == {"downstream": 1}
    assert len(pair.new.plane.downstreams) == 1


async def test_an_exchange_that_becomes_a_tunnel_moves_as_one(pair: Pair) -> None:
    client, app = await pair.old.open(HANDSHAKE)
    await app.read_request()
    finishing = spawn(pair.mover.finish(), "finish")
    await eventually(lambda: pair.old.plane.on_idle is not None)
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    assert await finishing == Counter()
    assert pair.mover.moved == {"tunnel": 1}
    client.send(frame(b"hello", is_masked=True))
    assert await app.read(11) == frame(b"hello", is_masked=True)


async def test_as_many_leave_as_may(pair: Pair) -> None:
    """First those that can at once, then one at the end of its exchange; the others stay, and are not waited for."""
    idle = [await pair.old.client() for _ in range(3)]
    await eventually(lambda: len(pair.old.plane.downstreams) == 3)
    mover = Mover(pair.old.plane, pair.carrier, limit=2)
    assert await mover.finish() == {"waiting": 1}
    assert mover.moved == {"downstream": 2}
    busy = [await pair.old.open(GET) for _ in range(2)]
    mover = Mover(pair.old.plane, pair.carrier, limit=2)
    finishing = spawn(mover.finish(), "finish")
    await eventually(lambda: mover.moved.total() == 1)
    assert not finishing.done()
    for client, app in busy:
        await app.read_request()
        app.answer(b"one")
        assert (await client.read_response()).body == b"one"
    assert (await finishing).total() == 1
    await mover.stop()
    assert mover.moved == {"downstream": 2}
    assert (len(pair.old.plane.downstreams), len(pair.new.plane.downstreams)) == (1, 4)
    assert [client.ending for client in idle] == ["open"] * 3


async def test_stop_lets_connections_stay(pair: Pair) -> None:
    client, app = await pair.old.open(GET)
    await app.read_request()
    await pair.move()
    app.answer(b"one")
    assert (await client.read_response()).body == b"one"
    assert pair.old.plane.departing, "it has left, and nobody has sent it yet"
    client.send(request("GET /two"))
    await pair.mover.stop()
    assert not pair.old.plane.departing
    assert (await app.read_request()).target == "/two"
    app.answer(b"two")
    assert (await client.read_response()).body == b"two"
    assert len(pair.old.plane.downstreams) == 1


async def test_a_response_that_the_client_does_not_take_is_waited_for(pair: Pair) -> None:
    client, app = await pair.old.open(GET)
    await app.read_request()
    client.stop_reading()
    body = random.Random(7).randbytes(30_000_000)
    app.answer(body)
    (downstream,) = pair.old.plane.downstreams
    await eventually(lambda: downstream.is_blocked)
    assert await pair.move() == {"exchange": 1}
    finishing = spawn(pair.mover.finish(), "finish")
    client.read_again()
    assert (await client.read_response()).body == body
    assert await finishing == Counter()
    assert len(pair.new.plane.downstreams) == 1


async def test_a_lingering_connection_ends_where_it_is(pair: Pair) -> None:
    client = await pair.old.client()
    client.send(b"rubbish\r\n\r\n")
    assert (await client.read_response()).status == 400
    assert await pair.move() == {"ending": 1}


async def test_connections_of_an_address_are_counted_where_they_are(start: Start) -> None:
    pair = await start_pair(start, settings=Settings(connections_per_address=2))
    clients = [await pair.old.client() for _ in range(2)]
    await eventually(lambda: len(pair.old.plane.downstreams) == 2)
    await pair.move()
    assert pair.old.plane.addresses._counts == {}
    assert pair.new.plane.addresses._counts == {"127.0.0.1": 2}
    third = await pair.new.client()
    third.send(GET)
    assert (await third.read_response()).status == 503
    assert [client.ending for client in clients] == ["open", "open"]


async def test_a_mover_needs_no_connections(pair: Pair) -> None:
    mover = Mover(pair.old.plane, pair.carrier)
    assert await mover.finish() == Counter()
    await mover.stop()
    assert pair.carrier.sizes == []
