"""Streamlit as its page speaks it: protobuf over a WebSocket, uploads that name the session, and a reconnect to it.

The few messages that are needed are written and searched as bytes.
"""

import re
import uuid
from typing import Final

from aiohttp import FormData

from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site, Socket

PATH: Final = "/_stcore/stream"
CLICKS: Final = 3  # before the reconnect, and after it
UPLOADS: Final = 20
CONTENT: Final = b"hello"
UNKNOWN: Final = {400: "Invalid session_id"}
NO_TOKEN: Final = "PLACEHOLDER_AUTH_TOKEN"  # what the page says when nobody is logged in

# NewSession.initialize has session_status (field 4) and then session_id (field 6); other ids stand before them.
SESSION_ID: Final = re.compile(rb'"[\x00\x02\x04](?:\x08\x01)?(?:\x10\x01)?2\$([0-9a-f-]{36})')
COUNTED: Final = re.compile(rb"(\d+) counted by ([\w-]+)")
BUTTON: Final = re.compile(rb"(\$\$ID-[0-9a-f]{32}-None)\x12\x05Count")
HAS_ENDED: Final = re.compile(rb"0\x00$")  # script_finished (field 6): finished_successfully


def rerun(widget: bytes = b"") -> bytes:
    """Return a BackMsg that runs the script again (field 11), as after a click on a button if one is given."""
    if not widget:
        return b"\x5a\x00"
    state = b"\x0a" + bytes([len(widget)]) + widget + b"\x10\x01"  # WidgetState: id, trigger_value
    states = b"\x0a" + bytes([len(state)]) + state  # WidgetStates
    client_state = b"\x12" + bytes([len(states)]) + states  # ClientState
    return b"\x5a" + bytes([len(client_state)]) + client_state


class Run:
    """What one run of the script has told the page."""

    def __init__(self) -> None:
        self.session_id = ""
        self.count = -1
        self.process = ""
        self.button = b""

    async def read(self, socket: Socket) -> None:
        """Read until the script has ended."""
        while True:
            message: bytes = await socket.receive()
            if found := SESSION_ID.search(message):
                self.session_id = found[1].decode()
            if (found := COUNTED.search(message)) and b"Download" not in message:
                self.count, self.process = int(found[1]), found[2].decode()
            if found := BUTTON.search(message):
                self.button = found[1]
            if HAS_ENDED.search(message):
                return


async def run(socket: Socket, widget: bytes = b"") -> Run:
    """Run the script once, and return what it told."""
    await socket.send(rerun(widget))
    done = Run()
    await done.read(socket)
    return done


async def upload(site: Site, outcome: Outcome, session_id: str, token: str) -> None:
    """Upload a file, with the token that the page has from a cookie of the app and sends twice."""
    form = FormData()
    form.add_field("file", CONTENT, filename="a.txt", content_type="text/plain")
    fields = {"X-Xsrftoken": token, "Cookie": f"_streamlit_xsrf={token}"}
    path = f"/_stcore/upload_file/{session_id}/{uuid.uuid4()}"
    await site.ask(outcome, "PUT", path, data=form, headers=fields, unknown=UNKNOWN)


async def read_token(site: Site, outcome: Outcome) -> str:
    """Return the token against forged requests, which any process makes and any takes."""
    answer = await site.ask(outcome, "GET", "/_stcore/health", unknown={})
    found = re.search(r"_streamlit_xsrf=([^;]+)", answer.headers.get("Set-Cookie", ""))
    if not found:
        raise UnexpectedAnswerError("no _streamlit_xsrf is set")
    return found[1]


async def drive_streamlit(base_url: str, exchanges: int = 10_000, at_once: int = AT_ONCE) -> Outcome:
    """Let pages of the recipe's Streamlit app click, upload, lose their WebSocket and go on with another one."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            token = await read_token(site, outcome)
            async with site.websocket(outcome, PATH, protocols=("streamlit", NO_TOKEN)) as socket:
                first = await run(socket)
                outcome.served.add(first.process)
                await click(socket, first, first.count)
                for _ in range(UPLOADS):
                    await upload(site, outcome, first.session_id, token)
            async with site.websocket(outcome, PATH, protocols=("streamlit", NO_TOKEN, first.session_id)) as socket:
                again = await run(socket)
                if (again.session_id, again.process) != (first.session_id, first.process):
                    raise WrongProcessError("a new session answers the reconnect")
                await click(socket, first, CLICKS)
                for _ in range(UPLOADS):
                    await upload(site, outcome, first.session_id, token)

        async def click(socket: Socket, first: Run, before: int) -> None:
            for number in range(before + 1, before + CLICKS + 1):
                now = await run(socket, first.button)
                if (now.count, now.process) != (number, first.process):
                    raise WrongProcessError(f"click {number} is counted as {now.count} by {now.process}")

        return await drive(exchanges, session, at_once)
