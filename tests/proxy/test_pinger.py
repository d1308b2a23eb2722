"""Pings of the proxy's own: who gets one, whose Pong it was, and who is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stickyproxy.proxy.pinger import Pinger, PingerState, PulseState
from stickyproxy.proxy.settings import Pings, Settings
from tests.helpers.raw import eventually
from tests.helpers.tunnels import close_of, connect, ended, frame, the_tunnel

if TYPE_CHECKING:
    from tests.helpers.plane import Start


def pinging(timeout_s: float = 20.0) -> Settings:
    return Settings(pings=Pings(30.0, timeout_s))


def ping_of(data: bytes) -> bytes:
    """Return the payload of a Ping, which must be all of `data`."""
    assert data[0] == 0x89
    if data[1] & 0x80:
        return bytes(octet ^ data[2 + (at & 3)] for at, octet in enumerate(data[6:]))
    return data[2:]


async def test_silent_sides_get_pings_and_their_pongs_go_no_further(start: Start) -> None:
    proxy = await start(settings=pinging())
    client, app = await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    tunnel.sweep(now + 29)
    tunnel.sweep(now + 30)
    to_client, to_app = ping_of(await client.read(10)), ping_of(await app.read(14))
    assert len(to_client) == 8
    tunnel.sweep(now + 31)
    client.send(frame(to_client, 10, is_masked=True) + frame(b"from the client", is_masked=True))
    assert await app.read(6 + 15) == frame(b"from the client", is_masked=True)
    pong = frame(to_app, 10)
    app.send(pong[:5])
    app.send(pong[5:] + frame(b"from the app"))
    assert await client.read(2 + 12) == frame(b"from the app")
    assert (tunnel.client.filter, tunnel.upstream.filter) == (None, None)
    counters = proxy.pool().counters
    assert (sum(counters.frames_received), sum(counters.frames_sent)) == (1, 1)
    tunnel.sweep(now + 45)  # heard: the next Ping is due 30 s from here
    tunnel.sweep(now + 74)
    tunnel.sweep(now + 75)
    assert ping_of(await client.read(10)) == to_client


async def test_no_ping_where_a_frame_is_not_whole(start: Start) -> None:
    proxy = await start(settings=pinging())
    client, app = await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    whole = frame(b"x" * 100)
    app.send(whole[:50])
    assert await client.read(50) == whole[:50]
    tunnel.sweep(now)
    tunnel.sweep(now + 40)
    assert ping_of(await app.read(14))
    app.send(whole[50:])
    assert await client.read(len(whole) - 50) == whole[50:]
    tunnel.sweep(now + 41)
    assert ping_of(await client.read(10))


@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_a_side_that_does_not_answer_a_ping_is_gone(start: Start, who: str) -> None:
    proxy = await start(settings=pinging(), linger_s=0.3)
    client, app = await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    tunnel.sweep(now + 30)
    to_client, to_app = ping_of(await client.read(10)), ping_of(await app.read(14))
    if who == "client":
        app.send(frame(to_app, 10))
        await eventually(lambda: tunnel.upstream.filter is None)
    else:
        client.send(frame(to_client, 10, is_masked=True))
        await eventually(lambda: tunnel.client.filter is None)
    tunnel.sweep(now + 49)
    assert proxy.plane.tunnels
    tunnel.sweep(now + 50)
    if who == "client":
        await app.read_rest()
    else:
        assert close_of(await client.read_rest())[0] == 1012
    initiator, _, cause = await ended(proxy)
    assert (initiator, cause) == (who, "ping_timeout")


async def test_without_a_timeout_pings_cut_nobody(start: Start) -> None:
    proxy = await start(settings=pinging(float("inf")))
    await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    for number in range(10):
        tunnel.sweep(now + number * 100)
    assert proxy.plane.tunnels == {tunnel}


async def test_a_side_that_is_not_read_is_not_taken_for_gone(start: Start) -> None:
    """Its Pong cannot be seen while the other side takes nothing."""
    proxy = await start(settings=pinging())
    client, app = await connect(proxy)
    app.stop_reading()
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    client.send(frame(b"x" * 20_000_000, is_masked=True))
    await eventually(lambda: not tunnel.client.transport.is_reading())
    for number in range(10):
        tunnel.sweep(now + number * 29)
        app_is_silent = tunnel._pinger is not None and tunnel._pinger._upstream.pinged_at is not None
        if app_is_silent:
            break
    assert tunnel._pinger is not None
    assert tunnel._pinger._client.pinged_at is None
    assert proxy.plane.tunnels == {tunnel}


async def test_no_ping_goes_where_nothing_can_be_sent_any_more(start: Start) -> None:
    """To the upstream of a client that has closed its half; what was asked before must still be answered in time."""
    proxy = await start(settings=pinging())
    client, app = await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    client.half_close()
    assert await app.read_rest() == b""
    for later in (30, 60, 90):
        tunnel.sweep(now + later)
    assert client.held == b""
    app.send(frame(b"still here"))
    assert await client.read(12) == frame(b"still here")


async def test_where_the_pings_stand_is_known_elsewhere(start: Start) -> None:
    proxy = await start(settings=pinging())
    client, app = await connect(proxy)
    tunnel, now = the_tunnel(proxy), proxy.plane.now
    client.send(frame(b"hello", is_masked=True))
    await app.read(11)
    tunnel.sweep(now + 10)
    tunnel.sweep(now + 30)
    prefix = ping_of(await app.read(14))
    assert tunnel._pinger is not None
    state = tunnel._pinger.export(now + 35)
    assert state == PingerState(prefix, PulseState(25.0, 11), PulseState(35.0, 0, 5.0))
    other = Pinger(Pings(30.0, 20.0), 1000.0)
    other.go_on_from(state, 1000.0)
    assert other.export(1000.0) == state
    assert repr(other) == "<Pinger client=None upstream=995.0>"
