"""marimo as its page speaks it: a WebSocket with an id that the page made, and HTTP with the same id in a header.

The page's token against old code must be the same in all processes: give them one PYTHONHASHSEED.
"""

import json
import re
import secrets
import string
from typing import Final

from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site, Socket

CLICKS: Final = 24
UNKNOWN: Final = {500: "Invalid session id", 401: "Invalid server token"}
COUNTED: Final = re.compile(r"(\d+) counted by ([\w-]+)")
BUTTON: Final = re.compile(r"object-id='([\w-]+)'")
LETTERS: Final = string.ascii_lowercase + string.digits


class Run:
    """What the cells have told the page, up to the end of a run."""

    def __init__(self) -> None:
        self.count = -1
        self.process = ""
        self.button = ""

    async def read(self, socket: Socket) -> None:
        while True:
            message = json.loads(await socket.receive())
            text = json.dumps(message)
            if found := BUTTON.search(text):
                self.button = found[1]
            if message["op"] == "cell-op" and (found := COUNTED.search(text)):
                self.count, self.process = int(found[1]), found[2]
            if message["op"] == "completed-run":
                return


async def drive_marimo(base_url: str, exchanges: int = 2_000, at_once: int = AT_ONCE) -> Outcome:
    """Let pages of the tests' notebook click its button."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            page = (await site.ask(outcome, "GET", "/", unknown={})).text
            token = re.search(r'data-token="([^"]+)"', page)
            if not token:
                raise UnexpectedAnswerError(f"no token in the page: {page[:200]}")
            own = "s_" + "".join(secrets.choice(LETTERS) for _ in range(6))
            fields = {"Marimo-Session-Id": own, "Marimo-Server-Token": token[1]}
            async with site.websocket(outcome, f"/ws?session_id={own}") as socket:
                shown = Run()
                await shown.read(socket)
                outcome.served.add(shown.process)
                for number in range(1, CLICKS + 1):
                    said = {"objectIds": [shown.button], "values": [number]}
                    path = "/api/kernel/set_ui_element_value"
                    await site.ask(outcome, "POST", path, json=said, headers=fields, unknown=UNKNOWN)
                    await shown.read(socket)
                    if shown.count != number:
                        raise WrongProcessError(f"click {number} is counted as {shown.count}")

        return await drive(exchanges, session, at_once)
