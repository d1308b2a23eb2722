"""Chainlit as its page speaks it: Socket.IO with a session id of the page's own in the auth, uploads that name it."""

import re
import uuid
from typing import Any, Final, Literal

from aiohttp import FormData

from tests.cookieless.engineio import Link, connect
from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site

MOUNTED: Final = "/chat"  # where the tests' app has it
ROUNDS: Final = 4
FILES: Final = 7  # after each message
UNKNOWN: Final = {404: "Session not found", 401: "Unauthorized"}
CONTENT: Final = b"hello"


async def say(link: Link, done: int) -> str:
    """Send a message, and return the pid of the process that answers."""
    message: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "threadId": "",
        "name": "User",
        "type": "user_message",
        "output": "hello",
        "createdAt": "2026-01-01T00:00:00.000Z",
    }
    await link.emit("client_message", {"message": message, "fileReferences": []})
    while True:
        [step] = await link.receive_event("new_message")
        if answered := re.search(r"reply (\d+) pid=(\d+)", step["output"]):
            if int(answered[1]) != done + 1:
                raise WrongProcessError(f"message {done + 1} is answered by {answered[0]}")
            return answered[2]


async def upload(site: Site, outcome: Outcome, session_id: str) -> None:
    """Upload a file, and get it back."""
    form = FormData()
    form.add_field("file", CONTENT, filename="a.txt", content_type="text/plain")
    path, query = f"{MOUNTED}/project/file", {"session_id": session_id}
    stored = (await site.ask(outcome, "POST", path, params=query, data=form, unknown=UNKNOWN)).json["id"]
    answer = await site.ask(outcome, "GET", f"{path}/{stored}", params=query, unknown=UNKNOWN)
    if answer.body != CONTENT:
        raise UnexpectedAnswerError(f"another file: {answer.text[:200]}")


async def drive_chainlit(
    base_url: str,
    exchanges: int = 10_000,
    transport: Literal["polling", "upgrade", "websocket"] = "upgrade",
    at_once: int = AT_ONCE,
) -> Outcome:
    """Let pages of the tests' Chainlit app chat, upload and download; `upgrade` is how they come."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            session_id = str(uuid.uuid4())
            # The page does this before each connect, for a cookie; these clients keep none.
            said = {"session_id": session_id}
            await site.ask(outcome, "POST", f"{MOUNTED}/set-session-cookie", json=said, unknown={})
            auth = {"clientType": "webapp", "sessionId": session_id, "threadId": "", "userEnv": "{}", "chatProfile": ""}
            way: Literal["polling", "websocket"] = "websocket" if transport == "websocket" else "polling"
            async with connect(site, outcome, way, path=f"{MOUNTED}/ws/socket.io/", auth=auth) as link:
                await link.emit("connection_successful")
                if transport == "upgrade":
                    async with link.upgrade():
                        await chat(outcome, link, session_id)
                else:
                    await chat(outcome, link, session_id)

        async def chat(outcome: Outcome, link: Link, session_id: str) -> None:
            for done in range(ROUNDS):
                outcome.served.add(await say(link, done))
                for _ in range(FILES):
                    await upload(site, outcome, session_id)

        return await drive(exchanges, session, at_once)
