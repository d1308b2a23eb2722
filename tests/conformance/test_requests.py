"""What clients send: each case of `requests/` through a real data plane, and what comes of it at both ends.

Each case runs in one piece, cut into single bytes, and followed at once by another request: one that follows what was
refused must never be served, and one that follows what was served gets its own answer.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest

from tests.conformance.conversation import (
    Client,
    Recorder,
    answer_to,
    canary,
    check_canary,
    check_fresh_canary,
    send_cut,
    start_conversation,
    until,
)
from tests.conformance.corpus import RequestCase, Seen, Step, load_request_cases, name_of

if TYPE_CHECKING:
    from tests.conformance.conversation import Recorded

Mode = Literal["whole", "cut", "followed"]
CASES = load_request_cases()


def modes(case: RequestCase) -> list[Mode]:
    """Return the ways to send a case that make sense for it."""
    found: list[Mode] = ["whole"]
    if not case.whole_only:
        found.append("cut")
    if not case.incomplete and case.send[-1].kind == "send" and 101 not in case.status:
        found.append("followed")
    return found


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(case, mode, id=f"{name_of(case)}-{mode}") for case in CASES for mode in modes(case)],
)
async def test_a_request(case: RequestCase, mode: Mode) -> None:
    async with start_conversation(is_trusted=case.trusted, timeouts=case.timeouts) as (proxy, upstream):
        recorder = Recorder(upstream, case.answer)
        steps = list(case.send)
        if any(b"<TOKEN>" in step.data for step in steps):
            token = (await check_fresh_canary(proxy, "token")).partition("=")[2].encode()
            steps = [replace(step, data=step.data.replace(b"<TOKEN>", token)) for step in steps]
        if mode == "followed":
            steps[-1] = Step("send", steps[-1].data + canary("followed"))
        client = Client(await proxy.client(), case.head)
        rng = random.Random(case.name) if mode == "cut" else None
        await client.talk(steps, rng, recorder)
        await client.finals(len(case.status))
        check_answers(case, client, recorder)
        if 101 in case.status:
            await check_tunnel(case, client)
        elif not case.stays_open:
            await client.ends()
            assert client.link.ending == "eof", "an answer must not be lost in a reset"
            assert len(client.final) == len(case.status), "an answer after the last one"
            assert client.rest == b""
        else:
            if mode != "followed":
                await send_cut(client.link, canary("same"), rng)
            await client.finals(len(case.status) + 1)
            check_canary(client.final[-1], "followed" if mode == "followed" else "same")
            assert not client.link.is_over
        await check_upstream(case, recorder)
        await check_fresh_canary(proxy, "fresh")
        assert recorder.faults == []


def check_answers(case: RequestCase, client: Client, recorder: Recorder) -> None:
    """Check status and order of the responses: each must be the answer to its own request."""
    assert tuple(one.status for one in client.final[: len(case.status)]) == case.status
    assert tuple(one.status for one in client.interim) == case.interim
    if case.status and not (case.stays_open or case.closes_silently):
        assert client.final[len(case.status) - 1].all("connection") == ["close"]
    if case.answer is None:
        served = [one for at, one in enumerate(client.final[: len(case.status)]) if one.status == 200]
        asked = [one for one in recorder.of_case if one.is_whole]
        assert len(served) == len(asked)
        for response, request in zip(served, asked, strict=True):
            expected = b"" if request.message.method == "HEAD" else answer_to(request.message)
            assert response.body == expected
    if case.sets_cookie is not None:
        is_set = any(value.startswith("stickyproxy=") for value in client.final[0].all("set-cookie"))
        assert is_set == case.sets_cookie


async def check_tunnel(case: RequestCase, client: Client) -> None:
    """Check that bytes come back through the tunnel as they were sent."""
    response = client.final[0]
    assert (response.all("connection"), response.all("upgrade")) == (["Upgrade"], ["websocket"])
    before = len(client.rest)
    client.link.send(case.tunnel)
    await until(lambda: len(client.read().rest) >= before + len(case.tunnel), lambda: f"the echo at {client}")
    assert client.rest.endswith(case.tunnel)


async def check_upstream(case: RequestCase, recorder: Recorder) -> None:
    """Check that the upstream saw these requests, whole or not, and nothing else."""
    seen = recorder.of_case
    assert [one.message.start for one in seen] == [one.line for one in case.upstream]
    for expected, recorded in zip(case.upstream, seen, strict=True):
        check_seen(expected, recorded)
        if expected.aborted:
            await until(lambda: recorded.link.is_over, lambda: "the end of what is not whole")  # noqa: B023
    for link in recorder.upstream.links:
        whole = sum(len(one.message.raw) for one in recorder.requests if one.link is link and one.is_whole)
        is_partial = any(one.link is link and not one.is_whole for one in recorder.requests)
        is_tunnel = 101 in case.status
        assert is_partial or is_tunnel or whole == len(link.all_received), "bytes that belong to no request"


def check_seen(expected: Seen, recorded: Recorded) -> None:
    """Check one request that reached the upstream."""
    message = recorded.message
    assert recorded.is_whole is not expected.aborted
    if expected.body is not None:
        assert message.body == expected.body
    assert [f"{name}: {value}" for name, value in message.trailers] == list(expected.trailers)
    names = {line.partition(":")[0].lower() for line in expected.present}
    found = [f"{name}: {value}" for name, value in message.fields if name.lower() in names]
    assert sorted(found) == sorted(expected.present)
    for name in expected.absent:
        assert message.all(name) == [], name
