"""What the kernel knows: what the other end has not taken, and whether it is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import Address
from stickyproxy.proxy.socket_state import count_taken, is_reset
from tests.helpers.plane import LOOPBACK
from tests.helpers.raw import GET, RawUpstream, eventually, request
from tests.helpers.tunnels import connect, frame

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.plane import Start


@pytest.mark.parametrize("is_unix", [False, True], ids=["TCP", "Unix"])
async def test_what_is_taken_counts_although_nothing_moves_in_the_process(
    start: Start, tmp_path: Path, *, is_unix: bool
) -> None:
    proxy = await start(listen=Address(path=str(tmp_path / "proxy.sock")) if is_unix else LOOPBACK)
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    before = count_taken(downstream.transport)
    app.answer(b"x" * 20_000_000)
    await eventually(lambda: downstream.is_blocked)
    blocked = count_taken(downstream.transport)
    if not is_unix:
        assert blocked > before
    client.read_again()
    await eventually(lambda: count_taken(downstream.transport) > blocked)
    await client.read_response()


async def test_where_nothing_is_taken_nothing_counts(start: Start) -> None:
    proxy = await start()
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    app.answer(b"x" * 20_000_000)
    (downstream,) = proxy.plane.downstreams
    await eventually(lambda: downstream.is_blocked)
    taken, since = count_taken(downstream.transport), proxy.plane.now

    def stands_still() -> bool:
        nonlocal taken, since
        if count_taken(downstream.transport) != taken:
            taken, since = count_taken(downstream.transport), proxy.plane.now
        return proxy.plane.now > since + 1

    await eventually(stands_still)
    assert downstream.is_blocked


async def test_of_a_connection_that_is_closed_nothing_is_known(start: Start) -> None:
    proxy = await start()
    client = await proxy.client()
    await eventually(lambda: proxy.plane.downstreams)
    (downstream,) = proxy.plane.downstreams
    client.close()
    await eventually(lambda: not proxy.plane.downstreams)
    assert count_taken(downstream.transport) == 0


# Connections that were reset while nobody read them


async def test_a_client_that_resets_while_its_upload_stands_still_is_noticed(start: Start) -> None:
    upstream = RawUpstream("app-1")
    upstream.reads_at_once = False
    await upstream.start()
    proxy = await start([upstream])
    client = await proxy.client()
    client.send(request("POST /", "Content-Length: 60000000") + b"x" * 60_000_000)
    await eventually(lambda: any(one.is_paused for one in proxy.plane.downstreams))
    (downstream,) = proxy.plane.downstreams
    assert not is_reset(downstream.transport)
    client.reset()
    assert (await proxy.recorded()).status == 499
    await eventually(lambda: not proxy.plane.downstreams)
    assert not is_reset(downstream.transport)  # there is no socket any more


async def test_a_side_of_a_tunnel_that_resets_while_it_is_not_read_is_noticed(start: Start) -> None:
    proxy = await start()
    client, app = await connect(proxy)
    app.stop_reading()
    (tunnel,) = proxy.plane.tunnels
    client.send(frame(b"x" * 60_000_000, is_masked=True))
    await eventually(lambda: not tunnel.client.transport.is_reading())
    client.reset()
    await eventually(lambda: not proxy.plane.tunnels)
    app.follow()


async def test_a_connection_that_stands_still_is_not_taken_for_reset(start: Start) -> None:
    proxy = await start()
    client, app = await connect(proxy)
    app.stop_reading()
    (tunnel,) = proxy.plane.tunnels
    client.send(frame(b"x" * 20_000_000, is_masked=True))
    await eventually(lambda: not tunnel.client.transport.is_reading())
    before = proxy.plane.now
    await eventually(lambda: proxy.plane.now > before + 2.5)
    assert proxy.plane.tunnels == {tunnel}
    assert not is_reset(tunnel.client.transport)
