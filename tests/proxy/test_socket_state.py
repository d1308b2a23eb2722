"""What the kernel knows: what the other end has not taken, and whether it is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stickyproxy.proxy.socket_state import count_unsent, is_reset
from tests.helpers.raw import GET, RawUpstream, eventually, request
from tests.helpers.tunnels import connect, frame

if TYPE_CHECKING:
    from tests.helpers.plane import Start


async def test_what_waits_in_the_kernel_is_counted(start: Start) -> None:
    proxy = await start()
    client, app = await proxy.open(GET)
    client.stop_reading()
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    assert count_unsent(downstream.transport) == 0
    app.answer(b"x" * 20_000_000)
    await eventually(lambda: downstream.is_blocked)
    blocked = count_unsent(downstream.transport)
    assert blocked > downstream.transport.get_write_buffer_size() > 0
    client.read_again()
    await client.read_response()
    await eventually(lambda: count_unsent(downstream.transport) == 0)


async def test_of_a_connection_that_is_closed_nothing_is_known(start: Start) -> None:
    proxy = await start()
    client = await proxy.client()
    await eventually(lambda: proxy.plane.downstreams)
    (downstream,) = proxy.plane.downstreams
    client.close()
    await eventually(lambda: not proxy.plane.downstreams)
    assert count_unsent(downstream.transport) == 0


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
