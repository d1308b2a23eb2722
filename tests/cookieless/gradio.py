"""Gradio as its page and as curl speak it: events are put into a queue, their results fetched by another request."""

import asyncio
import json
import re
import secrets
from typing import Any, Final

import aiohttp

from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site

API: Final = "/gradio_api"
EVENTS: Final = 24  # of a page; each is two exchanges
CALLS: Final = 12
COUNTED: Final = re.compile(r"(\d+) counted by ([\w-]+)")
NOT_FOUND: Final = "404: Not Found"


def check(told: str, number: int, outcome: Outcome) -> None:
    """Note the process of an answer; raise WrongProcessError if another one has the state of the session."""
    if NOT_FOUND in told:
        raise WrongProcessError(told[:200])
    counted = COUNTED.search(told)
    if not counted:
        raise UnexpectedAnswerError(told[:200])
    outcome.served.add(counted[2])
    if int(counted[1]) != number:
        raise WrongProcessError(f"event {number} is counted as {counted[0]}")


async def join(site: Site, outcome: Outcome, path: str, body: dict[str, Any]) -> str:
    """Put an event into the queue, and return its id."""
    answer = await site.ask(outcome, "POST", f"{API}{path}", json=body, unknown={404: "Session not found"})
    return str(answer.json["event_id"])


async def read(site: Site, outcome: Outcome, path: str) -> str:
    """Return all events of a stream, up to its end; one that breaks off has said why before."""
    told = b""
    async with site.stream(outcome, "GET", f"{API}{path}") as stream:
        try:
            async for data in stream.content.iter_any():
                told += data
        except aiohttp.ClientPayloadError:
            if NOT_FOUND.encode() not in told:
                raise
    return told.decode()


async def drive_gradio(base_url: str, exchanges: int = 10_000, at_once: int = AT_ONCE) -> Outcome:
    """Let pages of the recipe's Gradio app count, each with a session hash of its own and an open heartbeat."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            page = secrets.token_hex(6)
            async with site.stream(outcome, "GET", f"{API}/heartbeat/{page}") as heartbeat:
                await heartbeat.content.readany()
                for number in range(1, EVENTS + 1):
                    said = {"data": [None], "event_data": None, "fn_index": 0, "trigger_id": 2, "session_hash": page}
                    await join(site, outcome, "/queue/join?", said)
                    check(await read(site, outcome, f"/queue/data?session_hash={page}"), number, outcome)

        return await drive(exchanges, session, at_once)


async def drive_gradio_calls(base_url: str, exchanges: int = 10_000, at_once: int = AT_ONCE) -> Outcome:
    """Let programs call the recipe's Gradio app in two steps, as its guide for curl says: no session, only an event."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            for _ in range(CALLS):
                event = await join(site, outcome, "/call/count", {"data": []})
                check(await read(site, outcome, f"/call/count/{event}"), 1, outcome)

        return await drive(exchanges, session, at_once)


async def drive_gradio_curl(base_url: str, exchanges: int = 40, at_once: int = 2) -> Outcome:
    """Do the same with curl itself."""

    async def curl(outcome: Outcome, *words: str) -> str:
        outcome.exchanges += 1
        process = await asyncio.create_subprocess_exec(
            "curl", "--silent", "--no-buffer", "--noproxy", "*", *words, stdout=asyncio.subprocess.PIPE
        )
        told, _ = await process.communicate()
        return told.decode()

    async def session(outcome: Outcome) -> None:
        url = f"{base_url}{API}/call/count"
        fields = ("--header", "Content-Type: application/json")
        event = json.loads(await curl(outcome, "--request", "POST", url, *fields, "--data", '{"data": []}'))["event_id"]
        check(await curl(outcome, f"{url}/{event}"), 1, outcome)

    return await drive(exchanges, session, at_once)
