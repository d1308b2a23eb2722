"""WebSocket conversations, each played directly and through the proxy: both ends must come to the same verdict.

The verdict (`tests/helpers/websocket_matrix.py`) holds what the `websockets` library sees at both ends, and the frames
as they were framed. What the proxy changes on purpose is written out where it does. `test_websocket_controls.py` plays
a case through relays with faults.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import (
    ClientPerMessageDeflateFactory,
    ServerPerMessageDeflateFactory,
)

from tests.helpers.websocket_cases import (
    DEFLATE,
    MIB,
    SIZES,
    by,
    content,
    far_from,
    sides,
    text,
)
from tests.helpers.websocket_matrix import (
    Case,
    End,
    digest,
)
from tests.helpers.websocket_site import Site, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
async def test_messages_of_each_size_both_ways(site: Site, options: Mapping[str, Any]) -> None:
    async def client(end: End) -> None:
        for size in SIZES:
            for message in (content(size), text(size), b"\0" * size):
                await end.send(message)
                assert await end.receive() == message

    verdict = await site.same(Case(client, client_options=options, server_options=options))
    assert len(verdict["client: messages"]) == len(verdict["server: messages"]) == 3 * len(SIZES)
    assert f"text {MIB} {digest(text(MIB).encode())}" in verdict["client: messages"]
    assert ("permessage-deflate" in str(verdict["response: fields"])) == bool(options)
    assert any(" rsv=4 " in one for one in verdict["server: frames received"]) == bool(options)
    assert verdict["upwards, byte for byte"]
    assert verdict["downwards, byte for byte"]


@sides
async def test_a_message_that_the_far_end_finds_too_big(site: Site, side: str) -> None:
    async def send(end: End) -> None:
        try:
            await end.send(content(2 * MIB))
        except ConnectionClosed as error:
            end.fail(error)
        await end.receive_all()

    verdict = await site.same(by(side, send, options={"max_size": MIB}))
    assert verdict[f"{side}: Close received"][0] == 1009


# permessage-deflate (RFC 7692)

DEFLATE_PARAMETERS: list[dict[str, Any]] = [
    {},
    {"client_no_context_takeover": True},
    {"server_no_context_takeover": True},
    {"client_no_context_takeover": True, "server_no_context_takeover": True},
    {"client_max_window_bits": 9},
    {"server_max_window_bits": 9},
    {"client_max_window_bits": 10, "server_max_window_bits": 12, "client_no_context_takeover": True},
]


@pytest.mark.parametrize("asked", DEFLATE_PARAMETERS, ids=lambda asked: "+".join(asked) or "none")
async def test_the_parameters_of_deflate(site: Site, asked: dict[str, Any]) -> None:
    async def client(end: End) -> None:
        for _ in range(3):  # with context takeover the later ones are shorter
            await end.send("the same text again, " * 50)
            await end.receive()

    offer = ClientPerMessageDeflateFactory(**{"client_max_window_bits": True, **asked})
    taken = ServerPerMessageDeflateFactory(compress_settings={"level": 9})
    case = Case(client, client_options={"extensions": [offer]}, server_options={"extensions": [taken]})
    verdict = await site.same(case)
    (extension,) = verdict["client: extensions"]
    assert "PerMessageDeflate" in extension
    for name in asked:
        assert name in str(verdict["request: fields"])
    sizes = {
        end: [int(re.findall(r" (\d+) ", one)[0]) for one in verdict[f"{end}: frames sent"][:3]]
        for end in ("client", "server")
    }
    for end, lengths in sizes.items():
        assert (lengths[0] > lengths[2]) == (f"{end}_no_context_takeover" not in asked)


@pytest.mark.parametrize(("offer", "taken"), [(DEFLATE, {}), ({}, DEFLATE)], ids=["offered only", "supported only"])
async def test_deflate_that_one_end_does_not_want(
    site: Site, offer: Mapping[str, Any], taken: Mapping[str, Any]
) -> None:
    async def client(end: End) -> None:
        await end.send("hello")
        await end.receive()

    verdict = await site.same(Case(client, client_options=offer, server_options=taken))
    assert verdict["client: extensions"] == []
    assert " rsv=0 " in verdict["client: frames received"][0]


# Fragments, Pings and Pongs (RFC 6455, sections 5.4 and 5.5)

FRAGMENTS: dict[str, Sequence[str] | Sequence[bytes]] = {
    "text": ["a", "", "bc", "ü" * 100, "", "d" * 70000],
    "all empty": [b""] * 5,
    "many": [bytes((at & 255,)) for at in range(3000)],
    "long": [content(100_000, seed=seed) for seed in range(10)],
}


@sides
@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
@pytest.mark.parametrize("name", FRAGMENTS)
async def test_fragments_stay_as_they_were_framed(site: Site, side: str, name: str, options: Mapping[str, Any]) -> None:
    fragments = FRAGMENTS[name]

    async def send(end: End) -> None:
        await end.send(fragments)

    verdict = await site.same(by(side, send, options=options))
    sent = verdict[f"{side}: frames sent"]
    far = far_from(side)
    assert verdict[f"{far}: frames received"] == sent
    assert len(sent) == len(fragments) + 2  # an empty one, which is the last, and Close
    assert len(verdict[f"{far}: messages"]) == 1


@sides
@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
async def test_pings_between_fragments(site: Site, side: str, options: Mapping[str, Any]) -> None:
    async def send(end: End) -> None:
        async def fragments() -> AsyncIterator[bytes]:
            for at in range(20):
                yield content(at * 50)
                await end.ping(b"after %d" % at)

        await end.send(fragments())

    verdict = await site.same(by(side, send, options=options))
    names = [one.split()[0] for one in verdict[f"{side}: frames sent"]]
    assert names == ["binary", "ping", *["continuation", "ping"] * 19, "continuation", "close"]
    far = far_from(side)
    assert [one.split()[0] for one in verdict[f"{far}: frames sent"]] == ["pong"] * 20 + ["close"]


async def test_a_character_may_be_cut_between_fragments(site: Site) -> None:
    async def client(end: End) -> None:
        await end.send([bytes((octet,)) for octet in "ä€😀".encode()], text=True)
        await end.receive()

    verdict = await site.same(Case(client))
    assert verdict["client: messages"] == [f"text 9 {digest('ä€😀'.encode())}"]


@sides
async def test_pings_with_payloads_of_each_size(site: Site, side: str) -> None:
    async def send(end: End) -> None:
        for size in range(126):
            await end.ping(content(size))
        pongs = [await end.connection.ping(content(20, seed=seed)) for seed in range(50)]
        await asyncio.gather(*pongs)

    verdict = await site.same(by(side, send))
    pings = [one for one in verdict[f"{side}: frames sent"] if one.startswith("ping")]
    pongs = [one for one in verdict[f"{side}: frames received"] if one.startswith("pong")]
    assert [one.split()[-2:] for one in pings[1:]] == [one.split()[-2:] for one in pongs[1:]]
    assert len(pings) == len(pongs) == 176


@sides
async def test_pongs_that_nobody_asked_for(site: Site, side: str) -> None:
    async def send(end: End) -> None:
        for size in (0, 1, 125):
            await end.connection.pong(content(size))
        await end.send("between")
        await end.connection.pong(b"last")

    verdict = await site.same(by(side, send))
    far = far_from(side)
    names = [one.split()[0] for one in verdict[f"{far}: frames received"]]
    assert names == ["pong", "pong", "pong", "text", "pong", "close"]
