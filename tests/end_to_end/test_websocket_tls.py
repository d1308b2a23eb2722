"""A small part of the conversations over TLS to the proxy: both ends come to the verdict that they come to without.

The app is spoken to in plain text, so the server's end is the same. What TLS does not have is a half-close: an end that
sends close_notify has ended both ways, hence no case of an end that only stops sending.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.websocket_cases import (
    DEFLATE,
    INSIDE,
    MIB,
    OVERLONG,
    SIZES,
    WHERE,
    by,
    content,
    far_from,
    heed,
    sides,
    text,
    vanish,
    wrong,
)
from tests.helpers.websocket_matrix import Case, digest, receive_all
from tests.helpers.websocket_site import Site, check_same, differences_of_all, open_site, play_blocked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from tests.helpers.websocket_matrix import End


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site"), has_tls=True) as site:
        yield site


@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
async def test_messages_of_each_size_both_ways(site: Site, options: Mapping[str, Any]) -> None:
    over_tls = []

    async def client(end: End) -> None:
        over_tls.append(end.connection.transport.get_extra_info("ssl_object") is not None)
        for size in SIZES:
            for message in (content(size), text(size), b"\0" * size):
                await end.send(message)
                assert await end.receive() == message

    verdict = await site.same(Case(client, client_options=options, server_options=options))
    assert over_tls == [False, True]
    assert len(verdict["client: messages"]) == len(verdict["server: messages"]) == 3 * len(SIZES)
    assert verdict["upwards, byte for byte"]
    assert verdict["downwards, byte for byte"]


@sides
@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
async def test_fragments_with_pings_between_them(site: Site, side: str, options: Mapping[str, Any]) -> None:
    async def send(end: End) -> None:
        async def fragments() -> AsyncIterator[bytes]:
            for at in range(20):
                yield content(at * at * 100)
                await end.ping(b"after %d" % at)

        await end.send(fragments())

    verdict = await site.same(by(side, send, options=options))
    assert len(verdict[f"{far_from(side)}: frames received"]) == 42


@sides
async def test_close_codes_with_their_reasons(site: Site, side: str) -> None:
    closes = [(code, reason) for code in (1000, 1001, 1011, 3000, 4999) for reason in ("", "x" * 123)]

    async def close(end: End) -> None:
        assert end.connection.request is not None
        await end.connection.close(*closes[int(end.connection.request.path[1:])])

    _, proxied = await site.same_for_all(by(side, close), [f"/{number}" for number in range(len(closes))])
    got = [proxied[f"/{number}"][f"{far_from(side)}: Close received"] for number in range(len(closes))]
    assert got == closes


@sides
async def test_all_that_was_sent_before_a_close_arrives(site: Site, side: str) -> None:
    async def send(end: End) -> None:
        for seed in range(8):
            await end.send(content(MIB, seed=seed))
        await end.connection.close(4999, "that was all")

    verdict = await site.same(by(side, send))
    assert verdict[f"{far_from(side)}: messages"] == [
        f"binary {MIB} {digest(content(MIB, seed=seed))}" for seed in range(8)
    ]


@sides
async def test_wrong_frames(site: Site, side: str) -> None:
    frames = wrong(is_masked=side == "client")
    names = list(frames)

    async def send(end: End) -> None:
        assert end.connection.request is not None
        name = names[int(end.connection.request.path[1:])]
        await end.send("before")
        end.write(frames[name])
        if name != OVERLONG:
            await end.receive_all()

    case = by(side, send, options={"max_size": MIB})
    different = differences_of_all(*await site.observe_all(case, [f"/{number}" for number in range(len(names))]))
    for path, each in list(different.items()):
        if side == "client" and set(each) == {"server: frames received", "upwards, byte for byte"}:
            # The library did not know of the Close frame that the case has written, and sends another one. By then
            # both ends have closed, and with them the connection.
            without, over_tls = each["server: frames received"]
            assert without[:-1] == over_tls
            assert [one.partition(" ")[0] for one in without[-2:]] == ["close", "close"]
            del different[path]
    check_same(different)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("how", ["fin", "reset", "close_notify"])
async def test_a_client_that_vanishes(site: Site, how: str, where: str) -> None:
    """Without close_notify ("fin") the stream is cut short for TLS; for the WebSocket each of them is as abnormal."""
    script = vanish(how, where, is_masked=True)
    direct, different = await site.compare(Case(script, heed if where in INSIDE else receive_all))
    assert direct["server: close code"] == direct["client: close code"] == 1006
    if how == "reset":  # passed on as an end of file
        errors = different.pop("server: errors")
        assert ["ConnectionResetError" in errors[0][0], "EOFError" in errors[1][0]] == [True, True]
    assert different == {}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("how", "code"), [("fin", 1012), ("reset", 1014)])
async def test_a_server_that_vanishes(site: Site, how: str, code: int, where: str) -> None:
    script = vanish(how, where, is_masked=False)
    direct, different = await site.compare(Case(heed if where in INSIDE else receive_all, script))
    assert direct["client: close code"] == direct["server: close code"] == 1006
    if where not in INSIDE:
        assert different.pop("client: close code") == (1006, code)
        different = {name: pair for name, pair in different.items() if not name.startswith("client: ")}
        assert set(different) == {"upwards, byte for byte", "downwards, byte for byte"}
    elif how == "reset":
        errors = different.pop("client: errors")
        assert ["ConnectionResetError" in errors[0][0], "EOFError" in errors[1][0]] == [True, True]
        assert different == {}
    else:
        assert different == {}


@sides
async def test_an_end_that_does_not_read_for_a_while(site: Site, side: str) -> None:
    await play_blocked(site, side)


async def test_a_hundred_clients_at_once(site: Site) -> None:
    async def client(end: End) -> None:
        for number in range(5):
            await end.send(f"{number}")
            await end.receive()

    await site.same_for_all(Case(client), [f"/{number}" for number in range(100)])
