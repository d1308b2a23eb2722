"""What upstreams send: each case of `responses/` through a real data plane, and what the client sees of it.

Each case runs in one piece and cut into single bytes.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Literal

import pytest

from tests.conformance.conversation import (
    Client,
    Recorder,
    canary,
    check_canary,
    check_fresh_canary,
    send_cut,
    start_conversation,
    until,
)
from tests.conformance.corpus import ResponseCase, load_response_cases, name_of
from tests.conformance.strict import read_partial_response

if TYPE_CHECKING:
    from tests.helpers.raw import RawLink

Mode = Literal["whole", "cut"]
CASES = load_response_cases()


def modes(case: ResponseCase) -> list[Mode]:
    """Return the ways to send a case that make sense for it."""
    return ["whole"] if case.whole_only else ["whole", "cut"]


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(case, mode, id=f"{name_of(case)}-{mode}") for case in CASES for mode in modes(case)],
)
async def test_a_response(case: ResponseCase, mode: Mode) -> None:
    rng = random.Random(case.name) if mode == "cut" else None
    async with start_conversation(timeouts=case.timeouts) as (proxy, upstream):
        recorder = Recorder(upstream, silent=0 if case.at == "idle" else 1)
        before = 1 if case.prior or case.at == "idle" else 0
        client = Client(await proxy.client(), (before,) if case.head else ())
        if before:
            client.link.send(canary("prior"))
            await client.finals(1)
            check_canary(client.final[0], "prior")
        if case.at == "idle":
            link = upstream.links[0]
            await play(case, link, client, rng, recorder)
            await until(lambda: link.is_over, lambda: "the end of an idle connection that spoke")
            await client.talk(case.request, None, recorder)
        else:
            _, link = await asyncio.gather(
                client.talk(case.request, None, recorder), answer(case, client, rng, recorder)
            )
        await check_client(case, client, before)
        if case.at != "connect":  # there it may have closed before anything came
            assert len(recorder.of_case) == case.seen
            assert (recorder.of_case[0].link is link) == (case.at != "idle")
        if not case.reusable:
            await until(lambda: link.is_over, lambda: "the end of a connection that is not to be used again")
        if case.stays_open:
            await send_cut(client.link, canary("same"), None)
            await client.finals(before + 2)
            check_canary(client.final[-1], "same")
            assert not client.link.is_over
        else:
            await client.ends()
        await check_fresh_canary(proxy, "fresh")
        following = [one for one in recorder.requests if one.message.target in {"/canary/same", "/canary/fresh"}]
        assert {one.link is link for one in following} == {case.reusable}
        assert recorder.faults == []


async def answer(case: ResponseCase, client: Client, rng: random.Random | None, recorder: Recorder) -> RawLink:
    """Wait for the instant at which the upstream is to speak, and let it; return its connection."""
    if case.at == "connect":
        link = await recorder.upstream.accept()
    else:
        await until(lambda: any(one.is_whole or case.at == "head" for one in recorder.of_case), lambda: "the request")
        link = recorder.of_case[0].link
    await play(case, link, client, rng, recorder)
    return link


async def play(
    case: ResponseCase, link: RawLink, client: Client, rng: random.Random | None, recorder: Recorder
) -> None:
    """Let the upstream say its lines."""
    for step in case.upstream:
        if step.kind == "send":
            await send_cut(link, step.data, rng)
        elif step.kind == "await_upstream":
            await until(lambda: recorder.has_received(step.data), lambda: f"{step} at {link}")  # noqa: B023
        else:
            await until(lambda: step.data in client.link.all_received, lambda: f"{step} at {client}")  # noqa: B023
    if case.then == "close":
        link.close()
    elif case.then == "reset":
        link.reset()


async def check_client(case: ResponseCase, client: Client, before: int) -> None:
    """Check what the client got: the whole response, or the part of one that it cannot take for whole."""
    if case.end == "clean":
        await client.finals(before + 1)
        response = client.final[before]
    else:
        await client.ends()
        assert len(client.final) == before, "it looks whole"
        assert client.link.ending == "reset", "an end of file could be taken for a clean end"
        response = read_partial_response(client.rest)
    assert response.status == case.status
    assert tuple(one.status for one in client.interim) == case.interim
    if case.body is not None:
        assert response.body == case.body
    assert [f"{name}: {value}" for name, value in response.trailers] == list(case.trailers)
    names = {line.partition(":")[0].lower() for line in case.present}
    found = [
        f"{name}: {'<AFFINITY>' if value.startswith('stickyproxy=') else value}"
        for name, value in response.fields
        if name.lower() in names
    ]
    assert sorted(found) == sorted(case.present)
    for name in case.absent:
        assert response.all(name) == [], name
    if not case.stays_open:
        assert response.all("connection") == ["close"] or case.end == "broken"
