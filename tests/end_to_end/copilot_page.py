"""A page of another site that embeds Chainlit's Copilot, the web server that gives it, and what its visitor sees."""

import ssl
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Any, Final, Self

from typing_extensions import override

from tests.end_to_end.pages import ChatPage
from tests.helpers.browser import Visitor
from tests.helpers.certificates import Leaf

COOKIE: Final = "stickyproxy="
PAGE: Final = """<!doctype html>
<meta charset="utf-8">
<title>A page of another site</title>
<link rel="icon" href="data:,">
<p>This page is of another site than its chat.</p>
<script src="{server}/copilot/index.js"></script>
<script>mountChainlitWidget({{chainlitServer: "{server}"}});</script>
"""


class EmbeddingSite:
    """A web server at `url`, over TLS, with a page for each chat that it embeds."""

    def __init__(self, leaf: Leaf) -> None:
        self.pages: dict[str, bytes] = {}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf.certificate, leaf.key)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self.pages))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = Thread(target=self._server.serve_forever, name="embedding site")
        self.url = f"https://{leaf.names[0]}:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def embed(self, chat_url: str) -> str:
        """Return the URL of a page that embeds the chat of this URL."""
        path = f"/{len(self.pages)}"
        self.pages[path] = PAGE.format(server=chat_url).encode()
        return f"{self.url}{path}"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, pages: Mapping[str, bytes], *given: Any) -> None:
        self._pages = pages
        super().__init__(*given)

    def do_GET(self) -> None:
        body = self._pages.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


class CopilotPage(ChatPage):
    """The chat in a corner of a page of another site; `cookies_sent` are those that came to the site of the chat."""

    def __init__(self, visitor: Visitor, page_url: str) -> None:
        super().__init__(visitor)
        self._page_url = page_url
        self._authority = self.tab.site_url.removeprefix("https://")
        self.requests_sent = 0
        self.cookies_sent: list[str] = []
        session = visitor.context.new_cdp_session(self.tab.page)
        session.on("Network.requestWillBeSentExtraInfo", self._on_request)
        session.on("Network.webSocketWillSendHandshakeRequest", self._on_handshake)
        session.send("Network.enable")

    @override
    def open(self) -> None:
        self.load()
        self.tab.page.locator("#chat-input").wait_for()

    def load(self) -> None:
        """Load the page and open the chat, whatever becomes of it."""
        self.tab.page.goto(self._page_url)
        self.tab.page.locator("#chainlit-copilot-button").click()

    def cookies_of_answers(self) -> list[str]:
        """Return the lines by which the proxy has set its cookie."""
        lines = [line for answer in self.tab.answers() for line in answer.set_cookies]
        return [line for line in lines if line.startswith(COOKIE)]

    def socketio_statuses(self) -> list[int]:
        return [answer.status for answer in self.tab.answers() if "/ws/socket.io/" in answer.url]

    def is_refused(self) -> bool:
        """Say whether a process did not know the Engine.IO session."""
        return 400 in self.socketio_statuses()

    def _on_request(self, event: Mapping[str, Any]) -> None:
        self._note(event["headers"])

    def _on_handshake(self, event: Mapping[str, Any]) -> None:
        self._note(event["request"]["headers"])

    def _note(self, headers: Mapping[str, str]) -> None:
        fields = {name.lower(): value for name, value in headers.items()}
        if fields.get("host", fields.get(":authority")) == self._authority:
            self.requests_sent += 1
            self.cookies_sent += [cookie.strip() for cookie in fields.get("cookie", "").split(";") if cookie.strip()]
