"""What the other end has not taken: the kernel's part is counted too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stickyproxy.proxy.unsent import count_unsent
from tests.helpers.raw import GET, eventually

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
