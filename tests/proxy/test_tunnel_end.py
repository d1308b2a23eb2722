"""The ends of tunnels: who began, what the other side sees of it, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from stickyproxy.proxy import tunnel_end as end_module
from stickyproxy.wire.frames import write_close
from tests.helpers.raw import eventually
from tests.helpers.tunnels import MASK, close_of, connect, ended, frame, the_tunnel

if TYPE_CHECKING:
    from tests.helpers.plane import PlaneUnderTest, Start

# One of the sides ends it


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
    monkeypatch.setattr(end_module, "_MAX_LINGERS", 2)
    proxy = await start(linger_s=0.1)
    client, app = await connect(proxy)
    app.send(write_close(1009, "too big")).half_close()

    def goes_on() -> bool:
        client.send(b"x" if not client.is_lost else b"")
        return not proxy.plane.tunnels

    await eventually(goes_on)
    assert await ended(proxy) == ("upstream", 1009, "close_frame")


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


async def test_repr_shows_the_state(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    tunnel = the_tunnel(proxy)
    assert tunnel._end is None, "an open tunnel has no end"
    client.half_close()
    assert await app.read_rest() == b""
    assert repr(tunnel._end) == "<TunnelEnd by client: eof>"
    tunnel.shut()
    assert repr(tunnel._end) == "<TunnelEnd by client: eof, awaited>"
