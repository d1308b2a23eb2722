"""NiceGUI as its page speaks it: the page, a Socket.IO connection that names the page's client id, and uploads."""

import re
from typing import Final, Literal

from aiohttp import FormData

from tests.cookieless.engineio import Link, connect
from tests.cookieless.outcome import Outcome, UnexpectedAnswerError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site

PATH: Final = "/_nicegui_ws/socket.io/"
ROUNDS: Final = 15
CONTENT: Final = b"hello"


def find(pattern: str, page: str) -> str:
    """Return what the group of a pattern matches in the page."""
    found = re.search(pattern, page)
    if not found:
        raise UnexpectedAnswerError(f"no {pattern} in the page: {page[:200]}")
    return found[1]


class Page:
    """A page of the tests' NiceGUI app: its button counts, and its upload tells which process has taken it."""

    def __init__(self, html: str) -> None:
        self.client_id = find(r"'client_id': '([0-9a-f-]{36})'", html)
        self.process = find(r'"text":"pid=(\d+)"', html)
        self.upload_path = find(r'"(/_nicegui/client/[^"]+)"', html)
        self._button = find(r'"(\d+)":\{"tag":"q-btn","props":\{[^}]*"label":"inc"\}', html)
        self._listener = find(r'"label":"inc"\},"events":\[\{"listener_id":"([^"]+)"', html)

    @property
    def query(self) -> dict[str, str]:
        """What the page's script says in the URL of its socket."""
        return {
            "implicit_handshake": "true",
            "client_id": self.client_id,
            "next_message_id": "0",
            "document_id": "d",
            "tab_id": self.client_id,
            "old_tab_id": "",
        }

    async def click(self, link: Link, done: int) -> None:
        """Click once more, and wait until the page is told."""
        event = {"id": int(self._button), "client_id": self.client_id, "listener_id": self._listener, "args": ["{}"]}
        await link.emit("event", event)
        await self._wait_for(link, f"count={done + 1}")

    async def upload(self, site: Site, outcome: Outcome, link: Link, number: int) -> None:
        """Upload a file whose size tells it from the others, and wait until the page is told."""
        content = CONTENT + b"!" * number
        form = FormData()
        form.add_field("file", content, filename="a.txt", content_type="text/plain")
        answer = await site.ask(outcome, "POST", self.upload_path, data=form, unknown={404: ""})
        if answer.json != {"upload": "success"}:
            raise UnexpectedAnswerError(answer.text[:200])
        await self._wait_for(link, f"uploaded by pid={self.process} size={len(content)}")

    async def _wait_for(self, link: Link, text: str) -> None:
        while True:
            [elements] = await link.receive_event("update")
            if any(isinstance(element, dict) and element.get("text") == text for element in elements.values()):
                return


async def drive_nicegui(
    base_url: str,
    exchanges: int = 10_000,
    transport: Literal["polling", "websocket"] = "websocket",
    at_once: int = AT_ONCE,
) -> Outcome:
    """Let pages of the tests' NiceGUI app be opened and used, by a WebSocket first, as they come, or by polling."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            page = Page((await site.ask(outcome, "GET", "/", unknown={})).text)
            outcome.served.add(page.process)
            async with connect(site, outcome, transport, path=PATH, query=page.query) as link:
                for done in range(ROUNDS):
                    await page.click(link, done)
                    await page.upload(site, outcome, link, done)

        return await drive(exchanges, session, at_once)
