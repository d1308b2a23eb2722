"""Controls of the comparisons: relays that do not leave a conversation as it is must be found out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.helpers.websocket_matrix import (
    Case,
    Door,
    End,
    differences,
    observe,
)
from tests.helpers.websocket_relay import FAULTS, Fault, FaultyRelay, OneFrame, same_head
from tests.helpers.websocket_site import Site, open_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

    from tests.helpers.websocket_matrix import Verdict


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


def rich_case() -> Case:
    """Return a case in which each fault shows."""

    def answer(_: ServerConnection, request: Request, response: Response) -> None:
        response.headers["X-App"] = "a"
        response.headers["X-App"] = "second"

    async def client(end: End) -> None:
        await end.send("hello")
        await end.receive()
        await end.connection.ping(b"one")
        await end.connection.ping(b"two")
        await end.send("both Pongs are on their way")  # not waited for: a relay may have lost them
        await end.receive_all()

    async def server(end: End) -> None:
        await end.send(await end.receive())
        await end.receive()
        await end.send(["a", "", "b"])
        await end.connection.pong(b"for nothing")
        await end.send("last")
        await end.connection.close(4321, "a reason")

    options = {"subprotocols": ["chat"]}
    return Case(client, server, "/?a=%20", options, {**options, "process_response": answer})


async def through_relay(site: Site, on_head: Callable[[bytes], bytes], on_frame: Fault, case: Case) -> Verdict:
    relay = FaultyRelay(site.direct, on_head, on_frame)
    async with await asyncio.start_server(relay.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        return await observe(case, site.listening, Door(host, port))


async def test_the_proxy_and_a_relay_without_a_fault_leave_the_rich_case_as_it_is(site: Site) -> None:
    case = rich_case()
    verdict = await site.same(case)
    assert differences(verdict, await through_relay(site, same_head, OneFrame.write, case)) == {}
    assert verdict["client: subprotocol"] == "chat"
    assert verdict["client: Close received"] == (4321, "a reason")


@pytest.mark.parametrize("name", FAULTS)
async def test_a_relay_with_a_fault_is_found_out(site: Site, name: str) -> None:
    on_head, on_frame, shows_in = FAULTS[name]
    case = rich_case()
    direct = await observe(case, site.listening, site.direct)
    assert shows_in in differences(direct, await through_relay(site, on_head, on_frame, case))
