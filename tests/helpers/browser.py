"""Chromium, and what each page of it has seen: answers, page loads, WebSockets, console messages."""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Playwright, Request

from tests.helpers.apps import lacking

TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.05
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # The apps' pages name fonts and style sheets elsewhere: nothing is looked up beyond this machine.
    "--host-resolver-rules=MAP localhost 127.0.0.1, MAP * ~NOTFOUND",
)
# DevTools tells that a WebSocket closed, but not with which code.
REPORT_WEBSOCKET_CLOSES = """
window.WebSocket = class extends window.WebSocket {
  constructor(...given) {
    super(...given);
    this.addEventListener("close", event => console.debug("WebSocket closed", event.code, event.reason));
  }
};
"""
WEBSOCKET_CLOSED = re.compile(r"WebSocket closed (\d+)")
# An answer to a handshake that is not 101 is seen only as the text of an error.
WEBSOCKET_REFUSED = re.compile(r"Unexpected response code: (\d+)")


def launch_chromium(playwright: Playwright) -> Browser:
    """Start Debian's Chromium; skip or fail the test if there is none."""
    path = shutil.which("chromium")
    if path is None:
        lacking("no chromium on PATH: install the package of that name")
    return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)


@dataclass(frozen=True)
class Answer:
    """A response as the network layer saw it, the handshake of a WebSocket included."""

    status: int
    url: str
    set_cookies: tuple[str, ...]

    def cookie(self, name: str) -> str | None:
        """Return the value that this answer gives to a cookie; None if it leaves it alone."""
        pairs = (line.partition(";")[0].partition("=") for line in self.set_cookies)
        return next((value for key, _, value in pairs if key.strip() == name), None)


class Tab:
    """A page of a browser context, and all that it has seen of the site since it was made."""

    def __init__(self, context: BrowserContext, site_url: str) -> None:
        self.site_url = site_url
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT_S * 1000)
        self.page_loads = 0
        self.websockets_opened = 0
        self.websocket_closes: list[int] = []
        self.console: list[str] = []
        self.errors: list[str] = []
        self._urls: dict[str, str] = {}
        self._answers: list[tuple[str, int, tuple[str, ...]]] = []
        self.page.on("request", self._on_request)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._listen(context)

    def answers(self) -> list[Answer]:
        """Return what the site has answered so far, in order."""
        known = ((self._urls.get(key, ""), status, cookies) for key, status, cookies in self._answers)
        return [Answer(status, url, cookies) for url, status, cookies in known if self._is_of_site(url)]

    def bad_answers(self) -> list[Answer]:
        return [answer for answer in self.answers() if answer.status >= 400]

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Let the page's events arrive until `condition()` is true; raise AssertionError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"after {timeout_s:g} s still not: {what}"
            self.sleep(POLL_INTERVAL_S)

    def wait_for_websocket_close(self) -> int:
        """Wait until a WebSocket of this page has closed; return the newest close code."""
        self.wait_until(lambda: bool(self.websocket_closes), "a WebSocket has closed")
        return self.websocket_closes[-1]

    def wait_for_reload(self) -> None:
        self.wait_until(lambda: self.page_loads > 1, "the page has been loaded again")

    def sleep(self, duration_s: float) -> None:
        """Let time pass where that is what the scenario says; the page's events arrive meanwhile."""
        self.page.wait_for_timeout(duration_s * 1000)

    def assert_lost_nothing(self) -> None:
        """Assert that the app never refused this page, which was loaded once; its socket may have been opened anew."""
        assert self.bad_answers() == []
        assert self.page_loads == 1

    def assert_undisturbed(self) -> None:
        """Assert that nobody at this page could have noticed that there is more than one process."""
        self.assert_lost_nothing()
        assert self.websocket_closes == []
        assert self.errors == []

    def report(self) -> str:
        answers = [f"{answer.status} {answer.url}" for answer in self.answers()]
        return "\n".join([f"{self.page_loads} page loads", *answers, *self.console, *self.errors])

    def _is_of_site(self, url: str) -> bool:
        return urlsplit(url).netloc == urlsplit(self.site_url).netloc

    def _listen(self, context: BrowserContext) -> None:
        session = context.new_cdp_session(self.page)
        session.on("Network.requestWillBeSent", lambda event: self._note_url(event, event["request"]["url"]))
        session.on("Network.webSocketCreated", lambda event: self._note_url(event, event["url"]))
        session.on("Network.responseReceivedExtraInfo", self._on_response)
        session.on("Network.webSocketHandshakeResponseReceived", self._on_handshake)
        session.on("Network.webSocketFrameError", self._on_websocket_error)
        session.send("Network.enable")

    def _note_url(self, event: Mapping[str, Any], url: str) -> None:
        self._urls[event["requestId"]] = url

    def _on_response(self, event: Mapping[str, Any]) -> None:
        self._note_answer(event, event["statusCode"], event["headers"])

    def _on_handshake(self, event: Mapping[str, Any]) -> None:
        self.websockets_opened += 1
        self._note_answer(event, event["response"]["status"], event["response"]["headers"])

    def _on_websocket_error(self, event: Mapping[str, Any]) -> None:
        if refused := WEBSOCKET_REFUSED.search(event["errorMessage"]):
            self._note_answer(event, int(refused[1]), {})

    def _note_answer(self, event: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> None:
        cookies = [value for name, value in headers.items() if name.lower() == "set-cookie"]
        lines = tuple(line for value in cookies for line in value.splitlines())
        self._answers.append((event["requestId"], status, lines))

    def _on_request(self, request: Request) -> None:
        self.page_loads += request.is_navigation_request() and request.frame == self.page.main_frame

    def _on_console(self, message: ConsoleMessage) -> None:
        line = f"{message.type}: {message.text}"
        if line not in self.console[-1:]:
            self.console.append(line)
        if closed := WEBSOCKET_CLOSED.match(message.text):
            self.websocket_closes.append(int(closed[1]))
        elif message.type == "error" and (not message.location["url"] or self._is_of_site(message.location["url"])):
            self.errors.append(message.text)


class Visitor:
    """One browser context, that is one person: cookies of their own, one or more tabs."""

    def __init__(self, context: BrowserContext, site_url: str) -> None:
        self.context = context
        self._site_url = site_url
        self.tabs: list[Tab] = []

    def new_tab(self) -> Tab:
        tab = Tab(self.context, self._site_url)
        self.tabs.append(tab)
        return tab

    def cookie(self, name: str) -> str | None:
        cookies = self.context.cookies(self._site_url)
        return next((cookie.get("value") for cookie in cookies if cookie.get("name") == name), None)


class Visitors:
    """The visitors of one test; a context manager that sends them away."""

    def __init__(self, browser: Browser, directory: Path) -> None:
        self._browser = browser
        self._directory = directory
        self._visitors: list[Visitor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for visitor in self._visitors:
            visitor.context.close()

    def new(self, site_url: str) -> Visitor:
        # A certificate of the tests' own authority is as good as any here.
        context = self._browser.new_context(ignore_https_errors=site_url.startswith("https:"))
        context.add_init_script(REPORT_WEBSOCKET_CLOSES)
        visitor = Visitor(context, site_url)
        self._visitors.append(visitor)
        return visitor

    def reports(self) -> Iterator[tuple[str, str]]:
        """Give what to show of each tab when a test has failed, title and text; save what it looks like."""
        tabs = [tab for visitor in self._visitors for tab in visitor.tabs]
        for number, tab in enumerate(tabs, 1):
            picture = self._directory / f"tab-{number}.png"
            try:
                tab.page.screenshot(path=picture)
            except Error as error:
                yield f"tab {number}, no picture: {error.message}", tab.report()
            else:
                yield f"tab {number}, {picture}", tab.report()
