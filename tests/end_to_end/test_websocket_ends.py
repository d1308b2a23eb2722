"""How WebSocket conversations end, directly and through the proxy: Close frames, cuts, and frames that are wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers.websocket_cases import (
    DEFLATE,
    INSIDE,
    MIB,
    OVERLONG,
    WHERE,
    by,
    far_from,
    frame,
    heed,
    sides,
    vanish,
    wrong,
)
from tests.helpers.websocket_matrix import (
    Case,
    End,
    Script,
    digest,
    receive_all,
)
from tests.helpers.websocket_site import Site, open_site

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


# Close frames and cuts (RFC 6455, sections 5.5.1 and 7)

CODES = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3001, 3999, 4000, 4001, 4321, 4999]


@sides
@pytest.mark.parametrize("code", CODES)
async def test_each_close_code_with_its_reason(site: Site, side: str, code: int) -> None:
    far = far_from(side)
    for reason in ("", "done", "€" * 41, "x" * 123):

        async def close(end: End, reason: str = reason) -> None:
            await end.connection.close(code, reason)

        verdict = await site.same(by(side, close))
        assert verdict[f"{far}: Close received"] == verdict[f"{side}: Close received"] == (code, reason)
        assert verdict[f"{side}: was closed first by"] == "itself"
        assert verdict[f"{far}: was closed first by"] == "the other"


@sides
async def test_a_close_frame_without_a_code(site: Site, side: str) -> None:
    async def close(end: End) -> None:
        end.connection.protocol.send_close()
        end.connection.send_data()
        await end.receive_all()

    verdict = await site.same(by(side, close))
    assert verdict["client: close code"] == verdict["server: close code"] == 1005


@sides
@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x0f\xa0bye", b"\x00\x00", b"\x03\xed"], ids=bytes.hex)
async def test_an_end_that_sends_close_and_then_nothing_more(site: Site, side: str, payload: bytes) -> None:
    """A Close frame with a code that must not be sent is a Close frame all the same: nothing comes after it."""

    async def close(end: End) -> None:
        end.write(frame(8, payload, is_masked=side == "client"))
        end.connection.transport.write_eof()
        await end.receive_all()

    verdict = await site.same(by(side, close))
    far = far_from(side)
    (got,) = verdict[f"{far}: frames received"]
    assert got.startswith("close ")
    assert verdict[f"{far}: Close sent"] is not None


async def test_both_ends_close_at_once(site: Site) -> None:
    def closing(name: str, code: int) -> Script:
        async def close(end: End) -> None:
            end.connection.protocol.send_close(code, f"by the {name}")
            end.events[f"{name} is ready"].set()
            await end.events["client is ready"].wait()
            await end.events["server is ready"].wait()
            end.connection.send_data()  # neither has read what the other sent
            await end.receive_all()

        return close

    verdict = await site.same(Case(closing("client", 4001), closing("server", 4002)))
    assert verdict["client: Close received"] == (4002, "by the server")
    assert verdict["server: Close received"] == (4001, "by the client")
    assert verdict["client: was closed first by"] == verdict["server: was closed first by"] == "itself"


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_client_that_vanishes(site: Site, how: str, where: str) -> None:
    script = vanish(how, where, is_masked=True)
    direct, different = await site.compare(Case(script, heed if where in INSIDE else receive_all))
    assert direct["server: close code"] == direct["client: close code"] == 1006
    assert direct["server: messages"] == [f"text 6 {digest(b'before')}"]
    if how == "reset":  # passed on as an end of file, which is as abnormal
        errors = different.pop("server: errors")
        assert ["ConnectionResetError" in errors[0][0], "EOFError" in errors[1][0]] == [True, True]
    assert different == {}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("how", "code"), [("fin", 1012), ("reset", 1014)])
async def test_a_server_that_vanishes_is_told_by_a_close_frame_where_a_frame_has_ended(
    site: Site, how: str, code: int, where: str
) -> None:
    script = vanish(how, where, is_masked=False)
    direct, different = await site.compare(Case(heed if where in INSIDE else receive_all, script))
    assert direct["client: close code"] == direct["server: close code"] == 1006
    assert direct["client: messages"] == [f"text 6 {digest(b'before')}"]
    if where not in INSIDE:
        assert different.pop("client: close code") == (1006, code)
        told, got = different.pop("client: Close received")
        assert (told, got[0]) == (None, code)
        for name in ("close reason", "Close sent", "errors", "frames sent", "frames received", "was closed first by"):
            del different[f"client: {name}"]
        for name in ("upwards", "downwards"):  # the server neither sent the Close nor sees the answer
            assert different.pop(f"{name}, byte for byte") == (True, False)
    elif how == "reset":
        errors = different.pop("client: errors")
        assert ["ConnectionResetError" in errors[0][0], "EOFError" in errors[1][0]] == [True, True]
    assert different == {}


# Frames that are wrong: the far end says so, and the proxy does not


@sides
@pytest.mark.parametrize("name", wrong(is_masked=True))
async def test_a_wrong_frame(site: Site, side: str, name: str) -> None:
    async def send(end: End) -> None:
        await end.send("before")
        end.write(wrong(is_masked=side == "client")[name])
        if name != OVERLONG:
            await end.receive_all()

    far = far_from(side)
    verdict = await site.same(by(side, send, options={"max_size": MIB}))
    assert verdict[f"{far}: messages"][0] == f"text 6 {digest(b'before')}"
    if name == OVERLONG:  # the library takes it (RFC 6455, section 5.2: MUST NOT be sent)
        assert len(verdict[f"{far}: messages"]) == 2
    else:
        assert verdict[f"{side}: Close received"][0] in {1002, 1007, 1009}


@sides
async def test_deflated_data_that_cannot_be_inflated(site: Site, side: str) -> None:
    async def send(end: End) -> None:
        end.write(frame(1, b"\xff\xff\xff\xff", first=0xC0, is_masked=side == "client"))
        await end.receive_all()

    verdict = await site.same(by(side, send, options=DEFLATE))
    assert verdict[f"{side}: Close received"] is not None
