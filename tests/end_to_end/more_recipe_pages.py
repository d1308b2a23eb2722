"""The pages of the recipes for marimo, Dash and Flask-SocketIO as a visitor uses them; a client of the MCP server."""

import http.client
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit

from playwright.sync_api import Locator, expect
from typing_extensions import override

from tests.end_to_end.recipe_pages import TIMEOUT_MS, RecipePage, SocketIoPage
from tests.helpers.browser import Visitor
from tests.helpers.processes import WAIT_TIMEOUT_S


class MarimoPage(RecipePage):
    """A notebook: its kernel is begun by the page's WebSocket, and told by POST what was clicked."""

    @override
    def act(self) -> None:
        self.tab.page.get_by_role("button", name="Count").click()

    @override
    def wait_for_count(self, count: int) -> None:
        expect(self._counted).to_contain_text(f"{count} counted by ", timeout=TIMEOUT_MS)

    @override
    def process(self) -> str:
        return self._read_process(self._counted, "counted by PROCESS")

    @override
    def has_lost_its_session(self) -> bool:
        """Say whether a process did not know the kernel of this page."""
        return any("/api/kernel/" in answer.url for answer in self.tab.bad_answers())

    def multiply(self, factor: int) -> None:
        """Move the slider, which stands at 1, and wait for the product."""
        slider = self.tab.page.get_by_role("slider")
        slider.focus()
        for _ in range(factor - 1):
            slider.press("ArrowRight")
        expect(self._counted).to_contain_text(f"times {factor} is {self._done * factor}", timeout=TIMEOUT_MS)

    def websocket_ends(self) -> list[str]:
        """Return code and reason of each close of a WebSocket of this page."""
        return [line.partition(" closed ")[2] for line in self.tab.console if "WebSocket closed" in line]

    def end_of_a_websocket_that_is_not_allowed(self) -> list[Any]:
        """Open another WebSocket, of a kind that is for editors only; return the code and the reason of its end."""
        script = """() => new Promise(resolve => {
          const url = location.origin.replace("http", "ws") + "/ws?session_id=s_second&kiosk=true";
          new WebSocket(url).addEventListener("close", event => resolve([event.code, event.reason]));
        })"""
        return list(self.tab.page.evaluate(script))

    @property
    def _counted(self) -> Locator:
        return self.tab.page.get_by_text("counted by")


class DashPage(RecipePage):
    """A count that the page brings with each callback, below `/tool/`."""

    @override
    def open(self) -> None:
        self.tab.page.goto(f"{self.tab.site_url}/tool/")

    @override
    def act(self) -> None:
        self.tab.page.get_by_role("button", name="Count").click()

    @override
    def wait_for_count(self, count: int) -> None:
        expect(self.tab.page.locator("#counted")).to_contain_text(f"{count} counted by g", timeout=TIMEOUT_MS)

    @override
    def process(self) -> str:
        return self._read_process(self.tab.page.locator("#counted"), "counted by PROCESS")

    @override
    def has_lost_its_session(self) -> bool:
        """Say whether a callback has failed, which none does: there is no session."""
        return bool(self.tab.bad_answers())

    @property
    def calls_of_process(self) -> int:
        """How often the process has answered anybody, by what it keeps in its memory."""
        return int((self.tab.page.locator("#remembered").text_content() or "").split()[-2])

    def paths(self) -> set[str]:
        """Return the paths of all that the site has answered."""
        return {urlsplit(answer.url).path for answer in self.tab.answers()}


PAGES: Final[Mapping[str, Callable[[Visitor], RecipePage]]] = {
    "marimo": MarimoPage,
    "dash": DashPage,
    "flask-socketio": SocketIoPage,
}


class McpClient:
    """A client of an MCP server at `/mcp` of a site: it keeps no cookies, and sends each request by a connection."""

    def __init__(self, site_url: str) -> None:
        self._port = urlsplit(site_url).port or 0
        self._id = 0
        self._session: str | None = None
        self.statuses: list[int] = []

    def initialize(self) -> None:
        """Begin a session."""
        client = {"name": "a test", "version": "1"}
        self._post("initialize", {"protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": client})
        self._post("notifications/initialized")

    def count(self) -> str:
        """Call the tool of the recipe's server; return its answer, or the message of the error."""
        answer = self._post("tools/call", {"name": "count", "arguments": {}})
        return str(answer["error"]["message"] if "error" in answer else answer["result"]["content"][0]["text"])

    def _post(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": dict(params or {})}
        if params is not None:
            self._id += 1
            message["id"] = self._id
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if self._session is not None:
            headers["Mcp-Session-Id"] = self._session
        with closing(http.client.HTTPConnection("localhost", self._port, timeout=WAIT_TIMEOUT_S)) as connection:
            connection.request("POST", "/mcp", json.dumps(message), headers)
            answer = connection.getresponse()
            self.statuses.append(answer.status)
            self._session = self._session or answer.getheader("Mcp-Session-Id")
            text = answer.read().decode()
        data = text.partition("data: ")[2] if text.startswith("event:") else text
        return json.loads(data) if data else None
