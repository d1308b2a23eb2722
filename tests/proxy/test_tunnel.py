"""Tunnels: bytes as they came, and an end that each side can understand."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from stickyproxy.proxy import tunnel as tunnel_module
from stickyproxy.proxy.settings import Settings
from stickyproxy.proxy.tunnel import _DISCARD
from stickyproxy.wire.frames import write_close
from tests.helpers.raw import eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, KEY, MASK, close_of, connect, ended, frame, the_tunnel

if TYPE_CHECKING:
    from tests.helpers.plane import PlaneUnderTest, Start

# The handshake


async def test_the_handshake_is_passed_on_with_its_subprotocol(proxy: PlaneUnderTest) -> None:
    protocol = "bokeh, " + "t" * 12_000
    lines = HANDSHAKE.decode().removesuffix("\r\n") + f"Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    client, app = await proxy.open(lines.encode())
    asked = await app.read_request()
    assert asked["Sec-WebSocket-Protocol"] == protocol
    assert asked["Sec-WebSocket-Key"] == KEY
    assert asked["Sec-WebSocket-Version"] == "13"
    assert (asked["Connection"], asked["Upgrade"]) == ("Upgrade", "websocket")
    assert proxy.plane.tunnels == set()
    app.send(ACCEPT[:-2] + b"Sec-WebSocket-Accept: x=\r\nSec-WebSocket-Protocol: bokeh\r\n\r\n")
    answer = await client.read_message()
    assert answer.start == "HTTP/1.1 101 Switching Protocols"
    assert (answer["Sec-WebSocket-Accept"], answer["Sec-WebSocket-Protocol"]) == ("x=", "bokeh")
    assert (answer["Connection"], answer["Upgrade"]) == ("Upgrade", "websocket")
    assert answer.cookie, "the pin is given with the 101"
    assert repr(the_tunnel(proxy)) == "<Tunnel app-1 open>"
    assert the_tunnel(proxy).upstream_id == "app-1"


async def test_another_answer_than_101_is_relayed_and_opens_nothing(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.answer(b"no", status="403 Forbidden")
    answer = await client.read_response()
    assert (answer.status, answer.body) == (403, b"no")
    client.send(request("GET /next"))
    assert (await app.read_request()).target == "/next"
    app.answer()
    assert (await client.read_response()).status == 200
    assert proxy.pool().counters.tunnels == 0


@pytest.mark.parametrize("asked", [request(), request("GET /", "Connection: Upgrade", "Upgrade: h2c")])
async def test_a_101_that_was_not_asked_for_is_502(proxy: PlaneUnderTest, asked: bytes) -> None:
    client, app = await proxy.open(asked)
    assert (await app.read_request()).all("upgrade") == []
    app.send(ACCEPT)
    assert (await client.read_response()).status == 502
    await app.read_rest()


async def test_a_101_to_something_else_is_502(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert (await client.read_response()).status == 502


async def test_an_interim_response_may_come_before_the_101(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + ACCEPT + b"first")
    assert (await client.read_message()).status == 103
    assert (await client.read_message()).status == 101
    assert await client.read(5) == b"first"


# Bytes


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


async def test_early_bytes_of_both_sides_pass(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(HANDSHAKE + b"too early")
    await app.read_request()
    assert app.held == b"", "nothing before the 101"
    app.send(ACCEPT + b"at once")
    assert (await client.read_message()).status == 101
    assert await client.read(7) == b"at once"
    assert await app.read(9) == b"too early"


async def test_much_early_data_is_held_back(start: Start) -> None:
    proxy = await start(settings=Settings(buffer_bytes=1000))
    client, app = await proxy.open(HANDSHAKE + b"x" * 2_000_000)
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_paused)
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    assert await app.read(2_000_000) == b"x" * 2_000_000


async def test_a_client_that_half_closed_before_the_101_is_heard_to_have(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(HANDSHAKE + b"all I have")
    client.half_close()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.has_eof)
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    assert await app.read_rest() == b"all I have"
    app.send(frame(b"answer")).half_close()
    assert (await client.read(8)) == frame(b"answer")
    assert close_of(await client.read_rest()) == (1012, False)
    assert await ended(proxy) == ("client", 1006, "eof")


async def test_the_websockets_library_is_content(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.client(), None
    browser = ClientProtocol(parse_uri("ws://example.org/ws"))
    browser.send_request(browser.connect())
    client.send(b"".join(browser.data_to_send()))
    app = await proxy.upstream.accept()
    server = ServerProtocol()
    server.receive_data(await app.read_until(b"\r\n\r\n"))
    (asked,) = server.events_received()
    server.send_response(server.accept(asked))  # type: ignore[arg-type]
    app.send(b"".join(server.data_to_send()))
    browser.receive_data(await client.read_until(b"\r\n\r\n"))
    browser.events_received()
    browser.send_text(b"hello")
    client.send(b"".join(browser.data_to_send()))
    server.receive_data(await app.read(11))
    (heard,) = server.events_received()
    assert (heard.opcode, heard.data) == (Opcode.TEXT, b"hello")  # type: ignore[union-attr]
    proxy.plane.stop()
    the_tunnel(proxy).shut()
    browser.receive_data(await client.read(4 + len("the proxy is going away")))
    server.receive_data(await app.read(8 + len("the proxy is going away")))
    assert browser.close_rcvd is not None
    assert server.close_rcvd is not None
    assert (browser.close_rcvd.code, server.close_rcvd.code) == (1001, 1001)
    client.send(b"".join(browser.data_to_send())).half_close()
    app.send(b"".join(server.data_to_send())).half_close()
    assert await ended(proxy) == ("proxy", 1001, "stopping")
    await proxy.plane.wait_until_empty()


# Backpressure


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
    tunnel.say(tunnel.client, b"a frame of the proxy's own")
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


# Ends


async def test_a_half_close_is_passed_on_and_the_other_way_stays_open(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    client.send(b"bye").half_close()
    assert await app.read_rest() == b"bye"
    app.send(frame(b"still here"))
    assert await client.read(12) == frame(b"still here")
    app.send(frame(b"\x03\xe8", 8)).half_close()
    assert await client.read_rest() == frame(b"\x03\xe8", 8)
    assert await ended(proxy) == ("client", 1000, "eof")


async def test_a_close_of_the_client_is_its_own(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    client.send(write_close(4001, "enough", mask=MASK))
    assert close_of(await app.read(14)) == (4001, True)
    app.send(write_close(4001, "enough")).half_close()
    assert await client.read_rest() == write_close(4001, "enough")
    client.half_close()
    assert await ended(proxy) == ("client", 4001, "close_frame")


async def test_a_close_of_the_upstream_is_its_own_and_nothing_is_added(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    app.send(write_close(1012, "service restart")).half_close()
    assert await client.read_rest() == write_close(1012, "service restart")
    client.send(write_close(1012, "", mask=MASK)).half_close()
    assert await app.read_rest() == write_close(1012, "", mask=MASK)
    assert await ended(proxy) == ("upstream", 1012, "close_frame")


async def test_an_upstream_that_vanishes_at_a_boundary_is_told_as_1012(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    app.send(frame(b"last")).close()
    assert await client.read(6) == frame(b"last")
    assert close_of(await client.read_rest()) == (1012, False)
    client.send(frame(b"to nobody", is_masked=True)).half_close()
    assert await ended(proxy) == ("upstream", 1012, "eof")


async def test_an_upstream_that_resets_at_a_boundary_is_told_as_1014(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    app.reset()
    assert close_of(await client.read_rest()) == (1014, False)
    for _ in range(20):
        client.send(frame(b"to nobody", is_masked=True))
        await asyncio.sleep(0)
    client.half_close()
    assert await ended(proxy) == ("upstream", 1014, "reset")


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_in_the_middle_of_a_frame_nothing_is_injected(start: Start, how: str) -> None:
    proxy = await start(linger_s=0.2)
    client, app = await connect(proxy)
    app.send(frame(b"x" * 100)[:50])
    assert await client.read(50) == frame(b"x" * 100)[:50]
    getattr(app, how)()
    assert await client.read_rest() == b""
    assert await ended(proxy) == ("upstream", 1006, {"close": "eof", "reset": "reset"}[how])


async def test_a_client_that_does_not_follow_is_cut(start: Start) -> None:
    proxy = await start(linger_s=0.2)
    client, app = await connect(proxy)
    app.close()
    assert close_of(await client.read_rest())[0] == 1012
    assert not client.is_lost
    assert await ended(proxy) == ("upstream", 1012, "eof")


async def test_a_client_that_goes_away_ends_the_upstreams_side(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    client.send(frame(b"last", is_masked=True))
    await app.read(10)
    client.reset()
    assert await app.read_rest() == b""
    assert await ended(proxy) == ("client", 1006, "reset")


async def test_data_of_a_dead_upstream_reaches_the_client_first(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    client.stop_reading()
    big = frame(b"x" * 3_000_000, 2)
    app.send(big)
    app.close()
    client.read_again()
    assert await client.read(len(big)) == big
    assert close_of(await client.read_rest()) == (1012, False)


# The proxy ends it


async def test_shut_tells_both_sides(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    tunnel.shut(1012, "new version", "stopping")
    tunnel.shut()
    assert close_of(await client.read(2 + 2 + 11)) == (1012, False)
    assert close_of(await app.read(2 + 4 + 2 + 11)) == (1012, True)
    client.send(frame(b"not heard", is_masked=True))
    app.send(frame(b"not heard"))
    client.send(write_close(1012, "", mask=MASK)).half_close()
    app.send(write_close(1012, "")).half_close()
    assert await client.read_rest() == b""
    assert await app.read_rest() == b""
    assert await ended(proxy) == ("proxy", 1012, "stopping")
    tunnel.shut()
    tunnel.abort()
    assert repr(tunnel) == "<Tunnel app-1 over>"


async def test_shut_waits_for_the_end_of_a_frame(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    whole = frame(b"x" * 100)
    app.send(whole[:50])
    assert await client.read(50) == whole[:50]
    the_tunnel(proxy).shut()
    app.send(whole[50:])
    assert await client.read(len(whole) - 50) == whole[50:]
    assert close_of(await client.read(2 + 2 + 23)) == (1001, False)


async def test_shut_cuts_a_tunnel_that_is_stuck_in_a_frame(start: Start) -> None:
    proxy = await start(linger_s=0.2)
    client, app = await connect(proxy)
    client.send(frame(b"x" * 100, is_masked=True)[:50])
    await app.read(50)
    the_tunnel(proxy).shut()
    assert close_of(await client.read_rest()) == (1001, False)  # its own direction stood at a boundary
    assert await app.read_rest() == b""
    assert await ended(proxy) == ("proxy", 1001, "stopping")


async def test_shut_cuts_an_app_that_is_stuck_in_a_frame(start: Start) -> None:
    proxy = await start(linger_s=0.2)
    client, app = await connect(proxy)
    app.send(frame(b"x" * 100)[:50])
    await client.read(50)
    the_tunnel(proxy).shut()
    assert await client.read_rest() == b""
    assert close_of(await app.read_rest()) == (1001, True)
    assert await ended(proxy) == ("proxy", 1006, "stopping")


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


async def test_shut_while_the_client_sends_its_own_close_adds_no_second_one(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    own = write_close(4001, "bye", mask=MASK)
    client.send(own[:1])
    assert await app.read(1) == own[:1]
    the_tunnel(proxy).shut()
    assert close_of(await client.read(2 + 2 + 23)) == (1001, False)
    client.send(own[1:]).half_close()
    assert await app.read(len(own) - 1) == own[1:]
    app.half_close()
    assert await app.read_rest() == b""
    assert await client.read_rest() == b""
    assert await ended(proxy) == ("proxy", 1001, "stopping")


async def test_a_side_that_ends_while_the_end_of_its_frame_is_awaited(start: Start) -> None:
    proxy = await start(linger_s=0.3)
    client, app = await connect(proxy)
    app.send(frame(b"x" * 100)[:50])
    await client.read(50)
    the_tunnel(proxy).shut()
    app.reset()
    assert await client.read_rest() == b""
    assert (await ended(proxy))[1:] == (1006, "stopping")


async def test_shut_of_sides_that_do_not_follow_cuts_them(start: Start) -> None:
    proxy = await start(linger_s=0.2)
    client, app = await connect(proxy)
    the_tunnel(proxy).shut()
    assert close_of(await client.read_rest())[0] == 1001
    assert close_of(await app.read_rest())[0] == 1001
    assert await ended(proxy) == ("proxy", 1001, "stopping")


async def test_shut_of_a_tunnel_whose_client_has_half_closed(start: Start) -> None:
    proxy = await start(linger_s=0.2)
    client, app = await connect(proxy)
    client.half_close()
    assert await app.read_rest() == b""
    the_tunnel(proxy).shut()
    assert close_of(await client.read_rest()) == (1001, False)
    assert await ended(proxy) == ("client", 1006, "eof")


async def test_shut_of_a_tunnel_whose_upstream_has_ended(start: Start) -> None:
    proxy = await start(linger_s=0.3)
    client, app = await connect(proxy)
    app.half_close()
    assert close_of(await client.read_rest()) == (1012, False)
    the_tunnel(proxy).shut()
    assert await ended(proxy) == ("upstream", 1012, "eof")


async def test_shut_in_the_middle_of_a_closing_handshake_adds_no_second_close(start: Start) -> None:
    proxy = await start(linger_s=0.3)
    client, app = await connect(proxy)
    client.send(write_close(1000, "", mask=MASK))
    assert close_of(await app.read(8)) == (1000, True)
    the_tunnel(proxy).shut()
    assert await app.read_rest() == b""
    assert await client.read_rest() == b""
    assert await ended(proxy) == ("client", 1000, "close_frame")


async def test_a_client_that_goes_on_sending_gets_the_close_of_an_app_that_has_ended(start: Start) -> None:
    """A close with unread bytes is a reset, which overtakes what was sent before it."""
    proxy = await start(linger_s=0.3)
    client, app = await connect(proxy)
    client.stop_reading()
    app.send(write_close(1009, "too big")).half_close()
    tunnel = the_tunnel(proxy)
    await eventually(lambda: tunnel.upstream.is_eof)
    began = proxy.plane.loop.time()
    client.send(frame(b"x" * 100_000, is_masked=True)[:14])
    while proxy.plane.loop.time() < began + 1.5:
        before = tunnel.client.received_bytes
        client.send(b"x")
        await eventually(lambda before=before: tunnel.client.received_bytes > before)  # type: ignore[misc]
    assert not tunnel._is_over
    client.read_again()
    assert close_of(await client.read_rest()) == (1009, False)
    assert await ended(proxy) == ("upstream", 1009, "close_frame")


async def test_a_client_that_never_stops_sending_is_cut_in_the_end(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel_module, "_MAX_LINGERS", 2)
    proxy = await start(linger_s=0.1)
    client, app = await connect(proxy)
    app.send(write_close(1009, "too big")).half_close()
    while proxy.plane.tunnels:
        client.send(b"x" if not client.is_lost else b"")
        await asyncio.sleep(0.001)
    assert await ended(proxy) == ("upstream", 1009, "close_frame")


# Age


async def test_a_tunnel_that_has_reached_its_age_is_closed_with_a_code_that_calls_for_a_new_one(start: Start) -> None:
    proxy = await start(tunnel_max_age_s=100.0, tunnel_max_age_jitter_percent=10)
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    made = proxy.plane.now
    assert 89 <= tunnel._ends_at - made <= 111
    tunnel.sweep(made + 89)
    assert tunnel._shut_as is None
    tunnel.sweep(made + 111)
    assert close_of((await client.read(2))[:2] + await client.read(2 + 34)) == (1012, False)
    client.close()
    app.follow()
    assert await ended(proxy) == ("proxy", 1012, "max_age")


async def test_the_ages_of_tunnels_differ(start: Start) -> None:
    proxy = await start(tunnel_max_age_s=1000.0, tunnel_max_age_jitter_percent=10)
    for _ in range(5):
        await connect(proxy)
    ages = {round(tunnel._ends_at - proxy.plane.now) for tunnel in proxy.plane.tunnels}
    assert len(ages) > 1


async def test_a_busy_tunnel_is_not_idle(start: Start) -> None:
    proxy = await start(tunnel_idle_s=60.0)
    client, app = await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    for number in range(5):
        app.send(frame(b"ping", 9))
        await client.read(6)
        tunnel.sweep(now + number * 100)
    tunnel.sweep(now + 459)
    assert client.held == b""
    tunnel.sweep(now + 460)
    tunnel.sweep(now + 461)
    assert close_of(await client.read(2 + 2 + len("nothing was sent for too long"))) == (1001, False)
    client.half_close()
    app.half_close()
    assert await ended(proxy) == ("proxy", 1001, "idle")


async def test_an_idle_tunnel_is_closed(start: Start) -> None:
    proxy = await start(tunnel_idle_s=0.2, linger_s=0.2)
    client, _ = await connect(proxy)
    assert close_of(await client.read_rest()) == (1001, False)
    assert await ended(proxy) == ("proxy", 1001, "idle")


async def test_an_idle_tunnel_stuck_in_a_frame_is_cut(start: Start) -> None:
    proxy = await start(tunnel_idle_s=0.2, linger_s=1.2)
    client, app = await connect(proxy)
    app.send(frame(b"x" * 100)[:50])
    assert await client.read_rest() == frame(b"x" * 100)[:50]
    assert await ended(proxy) == ("proxy", 1006, "idle")


async def test_a_half_closed_tunnel_that_is_idle_is_closed(start: Start) -> None:
    proxy = await start(tunnel_idle_s=0.2, linger_s=0.2)
    client, app = await connect(proxy)
    client.half_close()
    assert await app.read_rest() == b""
    assert close_of(await client.read_rest())[0] == 1001
    assert await ended(proxy) == ("client", 1006, "eof")


async def test_what_a_side_does_not_take_in_the_end_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_module, "_FLUSH_S", 0.1)
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


async def test_the_bytes_of_an_open_tunnel_are_counted_each_second_and_once(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    counters, up, down = proxy.pool().counters, frame(b"x" * 100, is_masked=True), frame(b"y" * 7)
    client.send(up)
    await app.read(len(up))
    await eventually(lambda: counters.tunnel_received_bytes == len(up))
    assert counters.tunnel_sent_bytes == 0
    app.send(down)
    await client.read(len(down))
    await eventually(lambda: counters.tunnel_sent_bytes == len(down))
    the_tunnel(proxy).count_bytes()
    client.send(up)
    await app.read(len(up))
    client.reset()
    await ended(proxy)
    assert (counters.tunnel_received_bytes, counters.tunnel_sent_bytes) == (2 * len(up), len(down))
    assert (proxy.records[-1].received_bytes, proxy.records[-1].sent_bytes) == (2 * len(up), len(down))


async def test_abort_cuts_both_sides(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    proxy.plane.close()
    await client.read_rest()
    await app.read_rest()
    assert await ended(proxy) == ("proxy", 1006, "aborted")


async def test_a_tunnel_without_a_log_is_counted_all_the_same(proxy: PlaneUnderTest) -> None:
    proxy.plane.log = None
    client, app = await connect(proxy)
    client.reset()
    await app.read_rest()
    await eventually(lambda: not proxy.plane.tunnels)
    counters = proxy.pool().counters
    assert sum(counters.closes.values()) == counters.tunnels == 1
    proxy.forget_counts()


def test_what_is_discarded_goes_nowhere() -> None:
    _DISCARD.write(b"x")
