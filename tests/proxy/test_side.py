"""One side of a tunnel: what it passes on, how it waits for the other one, and the watchers before its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import ListenerTls
from stickyproxy.control.certificates import make_listener_context
from stickyproxy.proxy import side as side_module
from stickyproxy.proxy.handover import SideState
from stickyproxy.proxy.listener import Role
from stickyproxy.proxy.side import DISCARD, Ending, Farewell
from stickyproxy.wire.frames import write_close
from stickyproxy.wire.pings import PongFilter
from tests.helpers.certificates import Authority
from tests.helpers.raw import SealedLink, eventually
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, MASK, close_of, connect, ended, frame, the_tunnel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.plane import PlaneUnderTest, Start


async def test_bytes_pass_unchanged_both_ways_and_are_counted(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    up = [frame(b"hi", is_masked=True), frame(b"x" * 200, 2, is_masked=True), frame(b"y" * 70_000, 2, is_masked=True)]
    down = [frame(b"hello"), frame(b"", 9), frame(b"z" * 70_000, 2)]
    for data in up:
        client.send(data)
        assert await app.read(len(data)) == data
    for data in down:
        app.send(data)
        assert await client.read(len(data)) == data
    assert sum(the_tunnel(proxy).client.scanner.counts) == 3
    app.send(frame(b"\x03\xe8", 8)).half_close()
    client.half_close()
    await ended(proxy)
    counters = proxy.pool().counters
    assert counters.tunnel_received_bytes == sum(map(len, up))
    assert counters.tunnel_sent_bytes == sum(map(len, down)) + 4
    assert (counters.frames_received[1], counters.frames_received[2]) == (1, 2)
    assert (counters.frames_sent[1], counters.frames_sent[2], counters.frames_sent[8]) == (1, 1, 1)
    assert proxy.records[-1].sent_bytes == counters.tunnel_sent_bytes
    assert proxy.pool().idle == []


async def test_pongs_of_our_own_are_taken_out_and_the_filter_with_them(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    side = the_tunnel(proxy).client
    side.filter = PongFilter(b"12345678", side.scanner)
    pong, other = frame(b"12345678", 10, is_masked=True), frame(b"87654321", 10, is_masked=True)
    client.send(other + pong + other)
    assert await app.read(2 * len(other)) == other * 2
    assert side.filter is None
    assert side.received_bytes == 2 * len(other)


async def test_what_a_filter_holds_is_passed_on_at_the_end(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    side = the_tunnel(proxy).client
    side.filter = PongFilter(b"12345678", side.scanner)
    begun = frame(b"12345678", 10, is_masked=True)[:7]
    client.send(begun)
    await eventually(lambda: side.filter is not None and side.filter.held)
    assert app.held == b""
    client.half_close()
    assert await app.read_rest() == begun


# What another process is told


async def test_a_side_goes_on_where_another_stood(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    side = the_tunnel(proxy).client
    side.filter = PongFilter(b"12345678", side.scanner)
    data = frame(b"x" * 100, is_masked=True)
    client.send(data[:50])
    assert await app.read(50) == data[:50]
    state = side.export(0)
    assert (state.received_bytes, state.is_eof, state.unsent) == (50, False, b"")
    await connect(proxy)
    (other,) = [one.client for one in proxy.plane.tunnels if one.client is not side]
    assert other.export(0) != state
    other.go_on_from(state)
    assert other.export(0) == state
    assert (other.scanner.left_bytes, other.scanner.is_at_boundary) == (len(data) - 50, False)
    other.go_on_from(SideState(is_eof=True))
    assert other.is_eof
    other.is_eof = False


async def test_what_is_unsent_goes_on_being_known(proxy: PlaneUnderTest) -> None:
    """All that is passed on while the kernel takes nothing: what came before, from elsewhere, too."""
    client, app = await connect(proxy)
    side = the_tunnel(proxy).upstream
    client.stop_reading()
    assert side.may_leave
    while side.transport.is_reading():
        app.send(bytes(100_000))
        await asyncio.sleep(0)
    assert side.may_leave
    side.pass_on(b"from elsewhere")
    assert side.tail is not None
    assert side.tail.endswith(b"from elsewhere")
    unsent = side.other.get_write_buffer_size()
    assert len(side.export(unsent).unsent) == unsent
    side.tail = None
    assert not side.may_leave, "what is unsent is not known"
    side.tail = bytes(unsent)
    side.other, other = DISCARD, side.other
    assert not side.may_leave, "its end has begun"
    side.other = other


async def test_a_side_that_resets_while_it_is_not_read_is_dropped(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    side = the_tunnel(proxy).client
    proxy.plane._ticker.cancel()
    side.transport.pause_reading()
    side.drop_reset()
    assert not side.transport.is_closing()
    client.reset()

    def look() -> bool:
        side.drop_reset()
        return side.transport.is_closing()

    await eventually(look)
    assert await app.read_rest() == b""


# How the sides wait for each other


@pytest.mark.parametrize("is_down", [True, False])
async def test_a_side_that_does_not_read_stops_the_other(proxy: PlaneUnderTest, *, is_down: bool) -> None:
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    sender, reader, side = (app, client, tunnel.client) if is_down else (client, app, tunnel.upstream)
    reader.stop_reading()
    piece = frame(b"x" * 100_000, 2)
    sent = 0
    while tunnel.opposite(side).transport.is_reading():
        sender.send(piece)
        sent += len(piece)
        await asyncio.sleep(0)
    assert side.transport.get_write_buffer_size() < 1_000_000
    reader.read_again()
    await eventually(lambda: reader.received_bytes >= sent)
    assert tunnel.opposite(side).transport.is_reading()


async def test_what_the_kernel_has_not_taken_is_known(proxy: PlaneUnderTest) -> None:
    """It is the end of `tail`, as long as the transport's buffer; nothing is kept while nothing waits."""
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    app.send(frame(b"first"))
    assert await client.read(7) == frame(b"first")
    assert (tunnel.client.tail, tunnel.upstream.tail) == (None, None)
    client.stop_reading()
    data = frame(bytes(range(256)) * 100_000, 2)
    app.send(data)
    await eventually(lambda: not tunnel.upstream.transport.is_reading())
    passed = tunnel.upstream.received_bytes - 7
    unsent = tunnel.client.transport.get_write_buffer_size()
    assert 0 < unsent <= len(tunnel.upstream.tail or b"")
    tunnel.client.say(b"a frame of the proxy's own")
    assert tunnel.upstream.tail is not None
    own = len(b"a frame of the proxy's own")
    assert tunnel.client.transport.get_write_buffer_size() == unsent + own
    assert tunnel.upstream.export(unsent + own).unsent == data[passed - unsent : passed] + b"a frame of the proxy's own"
    client.read_again()
    await eventually(lambda: client.received_bytes >= len(data))
    await eventually(lambda: tunnel.upstream.tail is None)


async def test_a_client_that_half_closed_is_not_read_again(proxy: PlaneUnderTest) -> None:
    """When its upstream takes what waited: its end would be heard twice."""
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    app.stop_reading()
    client.send(frame(b"x" * 20_000_000, 2, is_masked=True))
    await eventually(lambda: not tunnel.client.transport.is_reading())
    tunnel.client.is_eof = True
    tunnel.upstream.resume_writing()
    assert not tunnel.client.transport.is_reading()
    tunnel.client.is_eof = False
    tunnel.upstream.resume_writing()
    assert tunnel.client.transport.is_reading()


async def test_data_of_a_dead_upstream_reaches_the_client_first(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    client.stop_reading()
    big = frame(b"x" * 3_000_000, 2)
    app.send(big)
    app.close()
    client.read_again()
    assert await client.read(len(big)) == big
    assert close_of(await client.read_rest()) == (1012, False)


async def test_what_a_side_does_not_take_in_the_end_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_module, "_FLUSH_S", 0.1)
    proxy = await start(linger_s=0.1)
    client, app = await connect(proxy)
    client.stop_reading()
    tunnel = the_tunnel(proxy)
    while tunnel.upstream.transport.is_reading():
        app.send(frame(b"x" * 100_000))
        await asyncio.sleep(0)
    side = tunnel.client.transport
    tunnel.shut()
    await ended(proxy)
    await eventually(lambda: side.get_write_buffer_size() == 0, "the connection is cut")


def test_what_is_discarded_goes_nowhere() -> None:
    DISCARD.write(b"x")


# The watchers


async def test_shut_waits_for_the_end_of_a_frame(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    whole = frame(b"x" * 100)
    app.send(whole[:50])
    assert await client.read(50) == whole[:50]
    the_tunnel(proxy).shut()
    app.send(whole[50:])
    assert await client.read(len(whole) - 50) == whole[50:]
    assert close_of(await client.read(2 + 2 + 23)) == (1001, False)


@pytest.mark.parametrize("cut", [1, 2, 3, 9, 10, 11, 65_600])
async def test_shut_ends_a_stream_that_is_never_read_at_a_boundary(proxy: PlaneUnderTest, cut: int) -> None:
    """Frames follow each other without a pause, so that no read ends where a frame does."""
    client, app = await connect(proxy)
    whole = frame(b"x" * 70_000)
    app.send(whole + whole[:cut])
    assert await client.read(len(whole) + cut) == whole + whole[:cut]
    the_tunnel(proxy).shut()
    app.send(whole[cut:] + whole + whole[:cut])
    assert await client.read(len(whole) - cut) == whole[cut:]
    assert close_of(await client.read(2 + 2 + 23)) == (1001, False)
    assert close_of(await app.read(2 + 4 + 2 + 23)) == (1001, True)
    client.send(write_close(1001, "", mask=MASK)).half_close()
    app.send(whole[cut:] + write_close(1001, "")).half_close()
    assert await client.read_rest() == b""
    assert await app.read_rest() == b""
    assert await ended(proxy) == ("proxy", 1001, "stopping")


async def test_a_farewell_ends_with_the_answer_of_the_client(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    tunnel._ending.blame(tunnel.upstream, "eof")  # as the tunnel does before it says farewell
    tunnel.client.transport.set_protocol(Farewell(tunnel.client))
    data = frame(b"not the end yet", is_masked=True)
    client.send(data)
    assert await app.read(len(data)) == data
    assert not tunnel.is_ending
    client.send(write_close(1000, "", mask=MASK))
    assert close_of(await app.read_rest()) == (1000, True)
    assert await client.read_rest() == b""
    assert await ended(proxy) == ("upstream", 1000, "eof")


@pytest.mark.parametrize("watcher", [Ending, Farewell])
async def test_a_watched_side_waits_for_the_other_and_is_heard_to_end(
    proxy: PlaneUnderTest, watcher: type[Ending | Farewell]
) -> None:
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    tunnel.client.transport.set_protocol(watcher(tunnel.client))
    client.stop_reading()
    while tunnel.upstream.transport.is_reading():
        app.send(frame(b"x" * 100_000, 2))
        await asyncio.sleep(0)
    client.read_again()
    await eventually(tunnel.upstream.transport.is_reading)
    client.half_close()
    await eventually(lambda: tunnel.client.is_eof)
    client.reset()
    assert (await ended(proxy))[0] == "client"


# TLS


async def test_a_side_over_tls_cannot_leave_nor_end_by_half(start: Start, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    section = {"certificates": authority.issue("localhost").section}
    proxy = await start(role=Role(tls=make_listener_context(ListenerTls.model_validate(section))), linger_s=0.2)
    client = await proxy.client(tls=authority.client_context())
    client.send(HANDSHAKE)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    await client.read_message()
    tunnel = the_tunnel(proxy)
    side = tunnel.client
    assert (side.is_tls, side.may_leave, tunnel.upstream.is_tls) == (True, False, False)
    assert tunnel.is_tls
    side.limit_buffer()
    side.write_eof()
    assert not side.transport.is_closing()
    client.stop_reading()
    while tunnel.upstream.transport.is_reading():
        app.send(frame(bytes(100_000), 2))
        await asyncio.sleep(0)
    assert tunnel.upstream.tail is None, "what the layers hold nobody knows"
    client.read_again()
    await eventually(tunnel.upstream.transport.is_reading)
    app.close()
    assert close_of((await client.read_rest())[-4 - len("the application ended") :]) == (1012, False)
    client.send(write_close(1012, "", mask=MASK))
    assert await ended(proxy) == ("upstream", 1012, "eof")


@pytest.mark.parametrize("is_taken", [True, False])
async def test_a_client_that_never_answers_close_notify_is_cut(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    """After a short time if it has taken all, and after a longer one if not."""
    monkeypatch.setattr(side_module, "is_queued", lambda _: not is_taken)
    monkeypatch.setattr(side_module, "_FLUSH_S", 900.0 if is_taken else 0.2)
    authority = Authority(tmp_path)
    section = {"certificates": authority.issue("localhost").section}
    proxy = await start(
        role=Role(tls=make_listener_context(ListenerTls.model_validate(section))), linger_s=0.2 if is_taken else 900.0
    )
    client = SealedLink(await proxy.client(), authority.client_context())
    await client.open()
    client.link.send(client.seal(HANDSHAKE))
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(ACCEPT)
    await client.read_until(b"\r\n\r\n")
    the_tunnel(proxy).client.close(proxy.plane)
    await client.read_rest()
    assert client.has_close_notify
    await eventually(lambda: client.link.is_over)
    app.close()
