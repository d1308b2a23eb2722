"""Conversations through a proxy that sends Pings of its own: both ends come to the verdict that they come to directly.

The proxy's Pings, and the Pongs with which the `websockets` library answers them, are told by themselves
(`set_own_pings_aside`); all else must be as without the proxy. A script waits for a Ping by `pause`, or leaves one
unanswered by `hold`, so that what it does next meets a proxy that takes a Pong out of the stream.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.websocket_cases import (
    DEFLATE,
    INSIDE,
    MASK,
    MIB,
    OVERLONG,
    SIZES,
    WHERE,
    by,
    content,
    far_from,
    frame,
    heed,
    sides,
    text,
    vanish,
    wrong,
)
from tests.helpers.websocket_matrix import Case, Door, differences, observe, receive_all
from tests.helpers.websocket_relay import PingingRelay
from tests.helpers.websocket_site import Site, open_site, play_blocked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from tests.helpers.websocket_matrix import End, Script, Verdict

# With these a stream turns out to be no WebSocket for the proxy, from one of the ends at least.
LOST = ["Close of 126 bytes", "Close of 70000 bytes", "wrong masking", "the head of a TLS record"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site"), has_pings=True) as site:
        yield site


def name_of(end: End) -> str:
    """Return which of the scripts an end follows."""
    assert end.connection.request is not None
    return end.connection.request.path[1:]


def check_pings(verdict: Verdict, *pinged: str) -> None:
    """Hold that these ends got Pings, that all Pings have the payload of the tunnel, and what answered them."""
    payloads = verdict["client: payloads: added"] | verdict["server: payloads: added"]
    assert len(payloads) == 1
    for end in ("client", "server"):
        pings, pongs = verdict[f"{end}: Pings: added"], verdict[f"{end}: Pongs: added"]
        assert pings >= (end in pinged)
        assert pongs <= pings


async def play(site: Site, side: str, scripts: Mapping[str, Script], other: Script = receive_all, **more: Any) -> None:
    """Let `side` follow each script in a conversation of its own, both ways; the verdicts must be the same.

    `side` must have got a Ping in each.
    """

    async def follow(end: End) -> None:
        await scripts[name_of(end)](end)

    client, server = (follow, other) if side == "client" else (other, follow)
    case = Case(client, server, **more)
    _, proxied = await site.same_for_all(case, [f"/{name}" for name in scripts])
    for verdict in proxied.values():
        check_pings(verdict, side)


@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
async def test_silent_ends_get_pings_and_nothing_else(site: Site, options: Mapping[str, Any]) -> None:
    async def client(end: End) -> None:
        for _ in range(3):
            await end.pause()
            await end.send("hello")
            await end.receive()
        await end.pause()

    verdict = await site.same(Case(client, client_options=options, server_options=options))
    assert len(verdict["client: messages"]) == 3
    proxied = await observe(Case(client, client_options=options, server_options=options), site.listening, site.proxied)
    check_pings(proxied, "client", "server")
    for end in ("client", "server"):
        assert proxied[f"{end}: Pongs: added"] == proxied[f"{end}: Pings: added"] > 1


@sides
async def test_pings_to_an_end_that_only_listens(site: Site, side: str) -> None:
    async def stream(end: End) -> None:
        for number in range(200):
            await end.send(content(number * 10))
            await asyncio.sleep(0.005)
        await end.pause()

    client, server = (receive_all, stream) if side == "client" else (stream, receive_all)
    _, proxied = await site.same_for_all(Case(client, server), ["/"])
    check_pings(proxied["/"], "client", "server")


@sides
@pytest.mark.parametrize("options", [{}, DEFLATE], ids=["plain", "deflate"])
async def test_pings_between_fragments(site: Site, side: str, options: Mapping[str, Any]) -> None:
    async def short(end: End) -> None:
        async def fragments() -> AsyncIterator[str]:
            for fragment in ("a", "", "ü" * 100):
                yield fragment
                await end.pause()

        await end.send(fragments())

    async def long(end: End) -> None:
        async def fragments() -> AsyncIterator[bytes]:
            for seed in range(3):
                yield content(100_000, seed=seed)
                await end.ping(b"my own")
                await end.pause()
                await end.ping(content(8))

        await end.send(fragments())

    await play(site, side, {"short": short, "long": long}, client_options=options, server_options=options)


@sides
async def test_what_is_sent_while_a_ping_is_unanswered(site: Site, side: str) -> None:
    async def messages(end: End) -> None:
        await end.hold()
        for size in SIZES:
            for message in (content(size), text(size)):
                await end.send(message)
        end.release()

    async def control_frames(end: End) -> None:
        await end.hold()
        for size in (0, 1, 7, 8, 9, 20, 124, 125):
            await end.connection.ping(content(size))
            await end.connection.pong(content(size))
            await end.connection.pong(b"\0" * size)
        end.release()
        await end.ping(b"last")

    async def byte_by_byte(end: End) -> None:
        await end.hold()
        for opcode, size in ((1, 3), (10, 0), (10, 7), (10, 8), (10, 125), (9, 8), (2, 125), (10, 9)):
            for octet in frame(opcode, b"x" * size, is_masked=side == "client"):
                end.write(bytes((octet,)))
                await end.flushed()
        end.release()

    await play(site, side, {"messages": messages, "control": control_frames, "byte-by-byte": byte_by_byte})


@sides
async def test_a_ping_in_the_middle_of_a_frame_of_the_other_direction(site: Site, side: str) -> None:
    """The proxy begins to look for its Pong in the middle of a frame: in its head, its length, its payload."""
    flag, mask = (0x80, MASK) if side == "client" else (0, b"")
    frames = {
        "short": frame(2, content(100), is_masked=side == "client"),
        "middle": bytes((0x82, flag | 126, 2, 0)) + mask + content(512),
        "long": bytes((0x82, flag | 127, 0, 0, 0, 0, 0, 1, 0, 0)) + mask + content(65536),
        "pong": frame(10, content(8), is_masked=side == "client"),
        "ping": frame(9, content(20), is_masked=side == "client"),
        "close": frame(8, b"\x0f\xa0reason", is_masked=side == "client"),
    }

    def cut(one: bytes, at: int) -> Script:
        async def send(end: End) -> None:
            end.write(one[:at])
            await end.flushed()
            await end.hold()
            end.write(one[at:])
            end.release()
            if one[0] & 0x0F == 8:
                await end.receive_all()
            else:
                await end.send("after")

        return send

    # A Close frame that has begun is not known as one: it may get a Ping as any other.
    await play(
        site,
        side,
        {f"{name}-{at}": cut(one, at) for name, one in frames.items() for at in (*range(1, 16), 50) if at < len(one)},
    )


def wrong_after_a_ping(name: str, data: bytes) -> Script:
    """Return the script of an end that sends something wrong before it answers a Ping."""

    async def script(end: End) -> None:
        await end.send("before")
        await end.hold()
        end.write(data)
        end.release()
        if name != OVERLONG:
            await end.receive_all()

    return script


@sides
async def test_wrong_frames_while_a_ping_is_unanswered(site: Site, side: str) -> None:
    scripts = {
        str(number): wrong_after_a_ping(name, data)
        for number, (name, data) in enumerate(wrong(is_masked=side == "client").items())
        # Read as a frame, HTTP begins one that is not whole: the Pong falls into it.
        if name not in {*LOST, "HTTP"}
    }
    await play(site, side, scripts, client_options={"max_size": MIB}, server_options={"max_size": MIB})


@sides
@pytest.mark.parametrize("name", LOST)
async def test_behind_what_is_no_websocket_only_the_pong_of_the_proxy_may_pass(
    site: Site, side: str, name: str
) -> None:
    """The proxy passes all on from there, so the Pong may reach the far end, which has failed the connection."""
    script = wrong_after_a_ping(name, wrong(is_masked=side == "client")[name])
    case = by(side, script, options={"max_size": MIB})
    direct = await observe(case, site.listening, site.direct)
    proxied = await observe(case, site.listening, site.proxied)
    check_pings(proxied, side)
    different = differences(direct, proxied)
    if different:
        before, after = different.pop(f"{far_from(side)}: frames received")
        (pong,) = set(after) - set(before)
        assert pong.startswith("pong fin=1 rsv=0 ")
        assert pong.endswith(f" 8 {proxied[f'{side}: payloads: added'].pop()}")
        assert [one for one in after if one != pong] == before
        assert list(different) == ["upwards, byte for byte" if side == "client" else "downwards, byte for byte"]


@sides
async def test_closes_while_a_ping_is_unanswered(site: Site, side: str) -> None:
    def close(payload: bytes, *, at_once: bool) -> Script:
        async def script(end: End) -> None:
            await (end.pause() if at_once else end.hold())  # who sends no more cannot answer a Ping
            end.write(frame(8, payload, is_masked=side == "client"))
            if at_once:
                end.connection.transport.write_eof()
            end.release()
            await end.receive_all()

        return script

    payloads = (b"", b"\x03\xe8", b"\x0f\xa0bye", b"\x13\x87" + b"x" * 123, b"\x03\xf4", b"\0\0", b"\x03\xed")
    scripts = {
        f"{number}-{at_once:d}": close(payload, at_once=at_once)
        for number, payload in enumerate(payloads)
        for at_once in (False, True)
    }
    await play(site, side, scripts)


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_client_that_vanishes_after_pings(site: Site, how: str) -> None:
    for where in WHERE:
        script = vanish(how, where, is_masked=True)
        case = Case(script, heed if where in INSIDE else receive_all)
        direct = await observe(case, site.listening, site.direct)
        proxied = await observe(case, site.listening, site.proxied)
        check_pings(proxied, "client")
        different = differences(direct, proxied)
        if how == "reset":  # passed on as an end of file, which is as abnormal
            del different["server: errors"]
        assert different == {}


@pytest.mark.parametrize(("how", "code"), [("fin", 1012), ("reset", 1014)])
async def test_a_server_that_vanishes_after_pings(site: Site, how: str, code: int) -> None:
    for where in WHERE:
        script = vanish(how, where, is_masked=False)
        case = Case(heed if where in INSIDE else receive_all, script)
        direct = await observe(case, site.listening, site.direct)
        proxied = await observe(case, site.listening, site.proxied)
        check_pings(proxied, "server")
        different = differences(direct, proxied)
        assert proxied["client: close code"] == (1006 if where in INSIDE else code)
        # What the client is told is another thing than directly; the server sees the same.
        names = ("upwards, byte for byte", "downwards, byte for byte")
        assert [name for name in different if not name.startswith("client: ") and name not in names] == []


@sides
async def test_an_end_that_does_not_read_for_a_while(site: Site, side: str) -> None:
    await play_blocked(site, side)


# Controls: relays with Pings of their own, with and without a fault


async def through_relay(site: Site, relay: PingingRelay, case: Case) -> Verdict:
    async with await asyncio.start_server(relay.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        return await observe(case, site.listening, Door(host, port, has_pings=True))


def case_for_relays() -> Case:
    async def client(end: End) -> None:
        await end.send("hello")
        await end.receive()
        await end.connection.ping(b"my own 8")
        await end.send("again")  # the Pong is not waited for: a relay may have lost it
        await end.receive()

    return Case(client)


async def test_a_relay_whose_pings_do_no_harm_leaves_a_conversation_as_it_is(site: Site) -> None:
    direct = await observe(case_for_relays(), site.listening, site.direct)
    pinged = await through_relay(site, PingingRelay(site.direct), case_for_relays())
    assert differences(direct, pinged) == {}
    check_pings(pinged, "client")


@pytest.mark.parametrize(
    ("fault", "shows_in"),
    [
        ({"passes_its_pongs": True}, "server: frames received"),
        ({"loses_all_pongs": True}, "client: frames received"),
        ({"payload": b"too long a payload"}, "client: frames received"),
        ({"opcode": 10}, "client: frames received"),
    ],
)
async def test_a_relay_with_pings_and_a_fault_is_found_out(site: Site, fault: dict[str, Any], shows_in: str) -> None:
    direct = await observe(case_for_relays(), site.listening, site.direct)
    pinged = await through_relay(site, PingingRelay(site.direct, **fault), case_for_relays())
    assert shows_in in differences(direct, pinged)
