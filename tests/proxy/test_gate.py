"""The gate: what is open lives, what is too much waits, and nobody is lost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stickyproxy.proxy.settings import OFF, Settings
from tests.helpers.raw import GET, eventually
from tests.helpers.tunnels import connect, frame

if TYPE_CHECKING:
    import pytest

    from tests.helpers.plane import PlaneUnderTest, Start
    from tests.helpers.raw import RawLink


async def serve_one(proxy: PlaneUnderTest, client: RawLink, app: RawLink | None = None) -> RawLink:
    """Answer a request of a client; return the connection to the upstream."""
    client.send(GET)
    if app is None or app.is_over:
        app = await proxy.upstream.accept()
    await app.read_request()
    app.answer(b"served")
    assert (await client.read_response()).body == b"served"
    return app


async def test_beyond_the_limit_clients_wait_and_are_served_later(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    proxy = await start(settings=Settings(connections=3))
    gate, plane = proxy.plane.gate, proxy.plane
    tunnel, tunnel_app = await connect(proxy)
    busy, busy_app = await proxy.open(GET)
    third = await proxy.client()
    await eventually(lambda: not gate.is_open)
    assert "3 clients are connected" in caplog.text
    waiting = [(await proxy.client()).send(GET) for _ in range(2)]
    tunnel.send(frame(b"still open", is_masked=True))
    assert await tunnel_app.read(6 + 10) == frame(b"still open", is_masked=True)
    await busy_app.read_request()
    busy_app.answer(b"still served")
    assert (await busy.read_response()).body == b"still served"
    assert (plane.connections, len(proxy.upstream.links)) == (3, 2)  # nothing of those who wait has come
    third.close()
    busy.close()
    await eventually(lambda: proxy.plane.connections == 3 and not gate.is_open)
    for client in waiting:
        app = await proxy.upstream.accept()
        await app.read_request()
        app.answer(b"late")
        assert (await client.read_response()).body == b"late"
    assert proxy.plane.counters.accept_pauses >= 2
    assert repr(gate) == "<Gate closed 3/3>"


async def test_idle_connections_make_room(start: Start) -> None:
    """Those that only wait for a next request, the longest first; never one that has not had its first."""
    proxy = await start(settings=Settings(connections=4))
    idle = [await proxy.client(), await proxy.client()]
    app = await serve_one(proxy, idle[0])
    proxy.plane.now += 1
    await serve_one(proxy, idle[1], app)
    fresh = await proxy.client()
    fourth = await proxy.client()
    await eventually(lambda: not proxy.plane.gate.is_open)
    before = proxy.plane.now
    await eventually(lambda: proxy.plane.now > before + 1)
    assert proxy.plane.connections == 4, "nobody waits, so nobody has to go"
    fifth, sixth = await proxy.client(), await proxy.client()
    await serve_one(proxy, fifth, app)
    assert await idle[0].read_rest() == b""
    assert await idle[1].read_rest() == b""
    await eventually(lambda: proxy.plane.connections == 4)
    for client in (fresh, fourth, sixth):
        assert not client.is_over


async def test_without_a_limit_the_gate_stays_open(start: Start) -> None:
    proxy = await start()
    assert proxy.plane.gate._limit == OFF
    clients = [await proxy.client() for _ in range(20)]
    await eventually(lambda: proxy.plane.connections == len(clients))
    assert proxy.plane.gate.is_open
    assert proxy.plane.counters.accept_pauses == 0


async def test_a_closed_gate_keeps_no_idle_connection_to_an_upstream(start: Start) -> None:
    """Their descriptors are needed."""
    proxy = await start(settings=Settings(connections=2))
    client = await proxy.client()
    other = await proxy.client()
    await eventually(lambda: not proxy.plane.gate.is_open)
    await serve_one(proxy, client)
    assert proxy.pool().idle == []
    assert not other.is_over


async def test_a_proxy_that_stops_does_not_open_its_gate_again(start: Start) -> None:
    proxy = await start(settings=Settings(connections=1))
    client, app = await proxy.open(GET)
    await eventually(lambda: not proxy.plane.gate.is_open)
    proxy.plane.stop()
    await app.read_request()
    app.answer()
    await client.read_response()
    await eventually(lambda: proxy.plane.connections == 0)
    proxy.plane.gate.sweep()
    assert not proxy.plane.gate.is_open
