"""Large messages, many clients, backpressure, and data in flight, directly and through the proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from websockets.extensions.permessage_deflate import (
    ClientPerMessageDeflateFactory,
    ServerPerMessageDeflateFactory,
)

from tests.helpers.websocket_cases import (
    MIB,
    by,
    content,
    far_from,
    sides,
)
from tests.helpers.websocket_matrix import (
    Case,
    End,
    digest,
)
from tests.helpers.websocket_site import LARGE, Site, open_site, play_blocked

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.mark.load
@pytest.mark.parametrize("kind", ["random", "text", "deflated"])
async def test_a_message_of_64_mib_both_ways(site: Site, kind: str) -> None:
    # Compressed, it goes over the wire as some 10 MiB. The text has no other characters than ASCII, and there is
    # little compression, because neither is the proxy's matter, and both cost the ends seconds.
    words = "".join(f"word {number} " for number in range(MIB // 8)).encode()[:MIB]
    block = b"".join(content(128, seed=seed) + b"stickyproxy " * 75 for seed in range(MIB // 1024))[:MIB]
    message = {"random": content(MIB), "text": words, "deflated": block}[kind] * 64
    asked: dict[str, Any] = {}
    taken: dict[str, Any] = {}
    if kind == "deflated":
        asked["extensions"] = [ClientPerMessageDeflateFactory(compress_settings={"level": 1})]
        taken["extensions"] = [ServerPerMessageDeflateFactory(compress_settings={"level": 1})]

    async def client(end: End) -> None:
        await end.send(message, text=kind == "text")
        await end.receive()

    verdict = await site.same(Case(client, client_options=asked, server_options=taken))
    name = "text" if kind == "text" else "binary"
    assert verdict["server: messages"] == verdict["client: messages"] == [f"{name} {LARGE} {digest(message)}"]
    assert verdict["upwards, byte for byte"]
    assert verdict["downwards, byte for byte"]


async def test_two_hundred_clients_at_once(site: Site) -> None:
    async def client(end: End) -> None:
        assert end.connection.request is not None
        path = end.connection.request.path
        end.events["open"].set()
        for number in range(5):
            await end.send(f"{path} {number}")
            assert await end.receive() == f"{path} {number}"

    direct, _ = await site.same_for_all(Case(client), [f"/client?number={number}" for number in range(200)])
    assert all(verdict["client: close code"] == 1000 for verdict in direct.values())


@sides
async def test_an_end_that_does_not_read_for_a_while(site: Site, side: str) -> None:
    await play_blocked(site, side)


@sides
async def test_all_that_was_sent_before_a_close_arrives(site: Site, side: str) -> None:
    async def send(end: End) -> None:
        for seed in range(16):
            await end.send(content(MIB, seed=seed))
        await end.connection.close(4999, "that was all")

    verdict = await site.same(by(side, send))
    far = far_from(side)
    assert verdict[f"{far}: messages"] == [f"binary {MIB} {digest(content(MIB, seed=seed))}" for seed in range(16)]
    assert verdict["client: Close received"] == verdict["server: Close received"] == (4999, "that was all")


@sides
async def test_an_end_that_closes_while_data_is_in_flight(site: Site, side: str) -> None:
    """What is under way when Close is sent still arrives whole, and then the Close that answers it."""

    async def send(end: End) -> None:
        for seed in range(12):
            await end.connection.send(content(MIB, seed=seed))
        await end.receive_all()

    async def close(end: End) -> None:
        await end.receive()
        # The script of the far end is not told: it is in the middle of sending.
        end.connection.protocol.send_close(4001, "enough")
        end.connection.send_data()
        await end.receive_all()

    verdict, different = await site.compare(by(side, send, close))
    far = far_from(side)
    # How many messages were under way is another matter each time.
    for name in (f"{side}: frames sent", f"{far}: frames received", f"{far}: messages", f"{side}: errors"):
        different.pop(name, None)
    assert different == {}
    assert verdict[f"{side}: Close received"] == verdict[f"{far}: Close received"] == (4001, "enough")
    assert verdict["upwards, byte for byte"]
    assert verdict["downwards, byte for byte"]
