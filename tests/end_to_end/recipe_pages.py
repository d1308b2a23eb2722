"""The pages of the recipes' apps as a visitor sees and uses them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from playwright.sync_api import Locator, expect
from typing_extensions import override

from tests.helpers.apps import find_interpreter
from tests.helpers.browser import TIMEOUT_S, Answer, Tab, Visitor

TIMEOUT_MS: Final = TIMEOUT_S * 1000


class RecipePage(ABC):
    """A page that tells which app process it lives in, and counts what the visitor does, from 1."""

    def __init__(self, visitor: Visitor) -> None:
        self.tab: Tab = visitor.new_tab()
        self._done = 0

    def open(self) -> None:
        """Load the page, but do not wait until it is complete: one without its session loads itself again for ever."""
        self.tab.page.goto(self.tab.site_url, wait_until="commit")

    @abstractmethod
    def act(self) -> None:
        """Do what is counted."""

    @abstractmethod
    def wait_for_count(self, count: int) -> None:
        """Wait until the page shows that so much was done."""

    @abstractmethod
    def process(self) -> str:
        """Wait until the page tells which process it lives in, and return that process's upstream id."""

    @abstractmethod
    def has_lost_its_session(self) -> bool:
        """Say whether the page has met a process that did not know it."""

    def use(self) -> str:
        """Do it once more, wait until it is counted, and return the process in which it was."""
        self.act()
        self._done += 1
        self.wait_for_count(self._done)
        return self.process()

    def _read_process(self, locator: Locator, text: str) -> str:
        """Wait for a text with `PROCESS` in it; return what stands there."""
        pattern = re.compile(text.replace("PROCESS", r"(g\d+-\d+)"))
        expect(locator).to_contain_text(pattern, timeout=TIMEOUT_MS)
        found: list[str] = []

        def is_read() -> bool:  # the page may be drawn anew at this moment
            found[:] = pattern.findall(locator.text_content() or "")
            return bool(found)

        self.tab.wait_until(is_read, "the process is named")
        return found[0]

    def _is_refused(self, *statuses: int) -> bool:
        return any(answer.status in statuses for answer in self.engineio_answers())

    def engineio_answers(self) -> list[Answer]:
        return [answer for answer in self.tab.answers() if "EIO=4" in answer.url]


class NiceGuiPage(RecipePage):
    """A counter, and a name that NiceGUI keeps on the disk."""

    @override
    def act(self) -> None:
        self.tab.page.get_by_role("button", name="Click").click()

    @override
    def wait_for_count(self, count: int) -> None:
        expect(self.tab.page.get_by_text(f"You have clicked {count} times.")).to_be_visible(timeout=TIMEOUT_MS)

    @override
    def process(self) -> str:
        return self._read_process(self.tab.page.get_by_text("This page lives in"), r"PROCESS\.")

    @override
    def has_lost_its_session(self) -> bool:
        return any("implicit handshake failed" in line for line in self.tab.console)

    @property
    def name(self) -> Locator:
        """The field for the visitor's name."""
        return self.tab.page.get_by_label("Your name")


class ChainlitPage(RecipePage):
    """A chat, and the texts that are attached to it."""

    @override
    def act(self) -> None:
        self.process()  # the input is another one as soon as the chat has a message, and what was typed is gone
        self.tab.page.locator("#chat-input").fill("and now?")
        self.tab.page.locator("#chat-submit").click()

    @override
    def wait_for_count(self, count: int) -> None:
        expect(self._newest()).to_contain_text(f"Message {count}, answered by", timeout=TIMEOUT_MS)

    @override
    def process(self) -> str:
        return self._read_process(self._newest(), "(?:answered by|lives in) PROCESS")

    @override
    def has_lost_its_session(self) -> bool:
        return self._is_refused(400, 403)

    def attach(self, file: Path) -> None:
        """Attach a file to the next message and wait until the app has it."""
        before = len(self._uploads())
        self.tab.page.locator("#upload-button-input").set_input_files(file)
        self.tab.wait_until(lambda: len(self._uploads()) > before, "the file is uploaded")

    def expect_in_reply(self, text: str) -> None:
        expect(self._newest()).to_contain_text(text, timeout=TIMEOUT_MS)

    def _newest(self) -> Locator:
        return self.tab.page.locator(".ai-message").last

    def _uploads(self) -> list[Answer]:
        return [answer for answer in self.tab.answers() if "/project/file" in answer.url and answer.status == 200]


class SocketIoPage(RecipePage):
    """A counter on a page whose script is Socket.IO's own; it comes from NiceGUI's package, in place of a CDN."""

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(visitor)
        [script] = (
            find_interpreter("nicegui").parents[1].glob("lib/python*/site-packages/nicegui/static/socket.io.min.js")
        )
        self.tab.page.route("https://cdn.socket.io/**", lambda route: route.fulfill(path=script))

    @override
    def act(self) -> None:
        self.tab.page.get_by_role("button", name="Click").click()

    @override
    def wait_for_count(self, count: int) -> None:
        expect(self.tab.page.locator("#count")).to_have_text(f"You have clicked {count} times.", timeout=TIMEOUT_MS)

    @override
    def process(self) -> str:
        return self._read_process(self.tab.page.locator("#process"), r"lives in PROCESS\.")

    @override
    def has_lost_its_session(self) -> bool:
        return self._is_refused(400, 403)


PAGES: Final[Mapping[str, Callable[[Visitor], RecipePage]]] = {
    "nicegui": NiceGuiPage,
    "chainlit": ChainlitPage,
    "fastapi-socketio": SocketIoPage,
}
