"""Connections from descriptors and states: complete before anything is read, and nothing leaks where that cannot be."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.proxy import arrival as arrival_module
from stickyproxy.proxy.arrival import arrive, arrive_downstream, arrive_tunnel
from stickyproxy.proxy.departure import Departure, depart
from stickyproxy.proxy.handover import DownstreamState, HandOverError, SideState, TunnelState
from stickyproxy.proxy.listener import Role
from tests.helpers.raw import GET, eventually
from tests.helpers.tunnels import connect, frame

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stickyproxy.proxy.tunnel import Tunnel
    from tests.helpers.plane import PlaneUnderTest, Start


def state_for(proxy: PlaneUnderTest) -> TunnelState:
    return TunnelState(SideState(), SideState(), digest=proxy.pool().digest, upstream_id=proxy.pool().upstream_id)


def is_open(descriptor: int) -> bool:
    with suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


@pytest.fixture
def ends() -> Iterator[tuple[list[socket.socket], list[int]]]:
    """Give two connections: the far ends, and the descriptors of the near ones."""
    pairs = [socket.socketpair() for _ in range(2)]
    yield [far for far, _ in pairs], [near.detach() for _, near in pairs]
    for far, _ in pairs:
        far.close()


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def listening() -> int:
    return socket.create_server(("127.0.0.1", 0)).detach()


def datagrams() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("make", [pipe, listening, datagrams])
async def test_what_is_no_connection_is_refused_and_nothing_leaks(
    proxy: PlaneUnderTest, ends: tuple[list[socket.socket], list[int]], make: Any, position: int
) -> None:
    far, descriptors = ends
    os.close(descriptors[position])
    descriptors[position] = make()
    with pytest.raises(HandOverError, match=r"descriptor is no connection|another type"):
        await arrive(proxy.plane, (), state_for(proxy), descriptors)
    assert [is_open(one) for one in descriptors] == [False, False]
    assert far[1 - position].recv(1) == b"", "the good one is closed too"
    assert proxy.plane.connections == 0


async def test_a_closed_descriptor_is_refused(
    proxy: PlaneUnderTest, ends: tuple[list[socket.socket], list[int]]
) -> None:
    far, descriptors = ends
    os.close(descriptors[1])
    with pytest.raises(HandOverError, match="no connection"):
        await arrive(proxy.plane, (), state_for(proxy), descriptors)
    assert far[0].recv(1) == b""


async def test_the_number_of_descriptors_must_fit(
    proxy: PlaneUnderTest, ends: tuple[list[socket.socket], list[int]]
) -> None:
    _, descriptors = ends
    with pytest.raises(HandOverError, match="2 descriptors, not 1"):
        await arrive(proxy.plane, proxy.listeners, DownstreamState("127.0.0.1:0"), descriptors)
    assert [is_open(one) for one in descriptors] == [False, False]


async def test_an_unknown_upstream_is_refused(
    proxy: PlaneUnderTest, ends: tuple[list[socket.socket], list[int]]
) -> None:
    _, descriptors = ends
    state = replace(state_for(proxy), digest=b"12345678", upstream_id="gone")
    with pytest.raises(HandOverError, match="'gone' is not known"):
        await arrive(proxy.plane, (), state, descriptors)
    assert [is_open(one) for one in descriptors] == [False, False]


async def test_an_unknown_listener_is_refused(
    proxy: PlaneUnderTest, ends: tuple[list[socket.socket], list[int]]
) -> None:
    _, descriptors = ends
    os.close(descriptors[1])
    with pytest.raises(HandOverError, match=r"nothing listens at 192\.0\.2\.1:80"):
        await arrive(proxy.plane, proxy.listeners, DownstreamState("192.0.2.1:80"), descriptors[:1])
    assert not is_open(descriptors[0])


async def test_a_listener_that_came_to_speak_tls_is_refused(
    start: Start, ends: tuple[list[socket.socket], list[int]]
) -> None:
    proxy = await start(role=Role(tls=ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)))
    _, descriptors = ends
    os.close(descriptors[1])
    with pytest.raises(HandOverError, match="speaks TLS"):
        await arrive_downstream(proxy.plane, proxy.listeners[0], DownstreamState("127.0.0.1:0"), descriptors[0])
    assert not is_open(descriptors[0])


async def test_a_failure_of_the_second_transport_closes_the_first(
    proxy: PlaneUnderTest, ends: tuple[list[socket.socket], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, descriptors = ends
    connect_one = arrival_module._connect
    asked = list[Any]()

    async def connect_first(*args: Any) -> Any:
        asked.append(args)
        if len(asked) > 1:
            raise OSError("no memory")
        return await connect_one(*args)

    monkeypatch.setattr(arrival_module, "_connect", connect_first)
    with pytest.raises(HandOverError, match="cannot be taken over: no memory"):
        await arrive(proxy.plane, (), state_for(proxy), descriptors)
    await eventually(lambda: not any(is_open(one) for one in descriptors))
    assert [one.recv(1) for one in far] == [b"", b""]


async def parted(proxy: PlaneUnderTest, tunnel: Tunnel) -> Departure:
    departure = depart(proxy.plane, tunnel)
    assert departure is not None
    await departure.parted
    return departure


@pytest.mark.parametrize("is_control", [False, True])
async def test_nothing_is_read_before_it_goes(
    proxy: PlaneUnderTest, monkeypatch: pytest.MonkeyPatch, *, is_control: bool
) -> None:
    """What was sent meanwhile stays in the kernel, where another process can read it. The control reads at once."""
    if is_control:
        monkeypatch.setattr(arrival_module._Waiting, "hold", lambda _: None)
    client, app = await connect(proxy)
    (tunnel,) = proxy.plane.tunnels
    departure = await parted(proxy, tunnel)
    client.send(frame(b"meanwhile", is_masked=True))
    app.send(frame(b"meanwhile"))
    await client.flush()
    await app.flush()
    assert isinstance(departure.state, TunnelState)
    copies = [os.dup(one) for one in departure.descriptors]
    arrival = await arrive_tunnel(proxy.plane, departure.state, copies[0], copies[1])
    for _ in range(20):
        await asyncio.sleep(0)
    early = [waiting.early for waiting in arrival._waiting]
    assert early == ([frame(b"meanwhile", is_masked=True), frame(b"meanwhile")] if is_control else [b"", b""])
    assert app.held + client.held == b""
    assert proxy.plane.tunnels == set(), "not counted either"
    arrival.go()
    departure.confirm()
    assert await app.read(15) == frame(b"meanwhile", is_masked=True), "the control has kept it"
    assert await client.read(11) == frame(b"meanwhile")
    assert proxy.pool().counters.tunnels_open == 1


async def test_what_is_dropped_lives_on_in_the_other_copies(proxy: PlaneUnderTest) -> None:
    client, app = await connect(proxy)
    (tunnel,) = proxy.plane.tunnels
    departure = await parted(proxy, tunnel)
    client.send(frame(b"meanwhile", is_masked=True))
    copies = [os.dup(one) for one in departure.descriptors]
    (await arrive(proxy.plane, (), departure.state, copies)).drop()
    await eventually(lambda: not any(is_open(one) for one in copies))
    assert (client.ending, app.ending) == ("open", "open")
    assert await departure.come_back() in proxy.plane.tunnels
    assert await app.read(15) == frame(b"meanwhile", is_masked=True)


async def test_a_request_that_is_held_begins_at_once(proxy: PlaneUnderTest) -> None:
    """One that came whole, behind the last response of the other process."""
    client = await proxy.client()
    await eventually(lambda: proxy.plane.downstreams)
    (downstream,) = proxy.plane.downstreams
    departure = depart(proxy.plane, downstream)
    assert departure is not None
    await departure.parted
    assert isinstance(departure.state, DownstreamState)
    departure.state = replace(departure.state, held=GET + GET, is_kept=True, pieces=7)
    await departure.come_back()
    for body in (b"one", b"two"):
        app = proxy.upstream.links[0] if proxy.upstream.links else await proxy.upstream.accept()
        await app.read_request()
        app.answer(body)
        assert (await client.read_response()).body == body
