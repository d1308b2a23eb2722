"""Tunnels: the handshake, bytes as they came, their age, and what is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from stickyproxy.proxy.settings import Settings
from tests.helpers.raw import eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, KEY, close_of, connect, ended, frame, the_tunnel

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


# Age


async def test_a_tunnel_that_has_reached_its_age_is_closed_with_a_code_that_calls_for_a_new_one(start: Start) -> None:
    proxy = await start(tunnel_max_age_s=100.0, tunnel_max_age_jitter_percent=10)
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    made = proxy.plane.now
    assert 89 <= tunnel._ends_at - made <= 111
    tunnel.sweep(made + 89)
    assert not tunnel.is_ending
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
