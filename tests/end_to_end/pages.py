"""The two sample apps as a visitor sees and uses them."""

import re
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import expect

from tests.helpers.browser import TIMEOUT_S, Answer, Visitor

TIMEOUT_MS = TIMEOUT_S * 1000
CONNECTION_LOST = "Could not reach the server"
TOLD = r"pid=(\d+)(?: version=(\S+) upstream=(\S+))?"
# NiceGUI forgets a page 3 s after its socket broke, in which its client tries once or twice. More patience, so that a
# slow machine does not decide how a test ends.
PATIENT = ("--reconnect-timeout-s", "20")


class Told(NamedTuple):
    """What an answer tells of the process that gave it; the last two only where the proxy itself runs the app."""

    pid: int
    version: str = ""
    upstream: str = ""


class CounterPage:
    """The NiceGUI page: a counter, a clock that ticks, an upload, and the pid that holds them."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.tab = visitor.new_tab()

    def open(self) -> None:
        """Load the page and wait until it lives: its clock ticks as soon as its socket is there."""
        self.tab.page.goto(self.tab.site_url)
        self.expect_ticks()

    @property
    def pid(self) -> int:
        return int(self._text("pid"))

    @property
    def count(self) -> int:
        return int(self._text("count"))

    def told(self) -> Told:
        return Told(self.pid, self._text("version"), self._text("upstream"))

    def increment(self) -> None:
        self.tab.page.get_by_role("button", name="inc").click()

    def block(self) -> None:
        self.tab.page.get_by_role("button", name="block").click()

    def upload(self, file: Path) -> None:
        self.tab.page.locator("input[type=file]").set_input_files(file)

    def expect_count(self, count: int) -> None:
        expect(self.tab.page.get_by_test_id("count")).to_have_text(f"count={count}", timeout=TIMEOUT_MS)

    def expect_upload(self, pid: int, size: int) -> None:
        label = self.tab.page.get_by_test_id("uploaded")
        expect(label).to_have_text(f"uploaded by pid={pid} size={size}", timeout=TIMEOUT_MS)

    def expect_ticks(self) -> None:
        """Wait until the page's clock goes on from where it stands."""
        label = self.tab.page.get_by_test_id("tick")
        label.wait_for()
        expect(label).not_to_have_text(label.inner_text(), timeout=TIMEOUT_MS)

    def _text(self, label: str) -> str:
        return self.tab.page.get_by_test_id(label).inner_text().removeprefix(f"{label}=")


class ChatPage:
    """The Chainlit chat: each reply tells its number in this session and the pid that holds the session."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.tab = visitor.new_tab()

    def open(self) -> None:
        self.tab.page.goto(f"{self.tab.site_url}/chat/")
        self.tab.page.locator("#chat-input").wait_for()

    def say(self, text: str) -> None:
        """Send a message as soon as the chat lets one."""
        self.tab.page.locator("#chat-input").fill(text)
        self.tab.page.locator("#chat-submit").click()

    def attach(self, file: Path) -> None:
        """Attach a file to the next message and wait until the app has it."""
        before = len(self._uploads())
        self.tab.page.locator("#upload-button-input").set_input_files(file)
        self.tab.wait_until(lambda: len(self._uploads()) > before, "the file is uploaded")

    def pid_of_reply(self, number: int, files: int = 0) -> int:
        """Wait for the newest reply to be this one of its session; return the pid in it."""
        return self.told_by_reply(number, files=files).pid

    def told_by_reply(self, number: int, message: str = "", files: int = 0) -> Told:
        """Wait for the newest reply to be this one of its session, to this message; return what it tells."""
        suffix = f" files={files}" if files else ""
        text = re.compile(rf"{message}: reply {number} {TOLD}{suffix}\s*$")
        newest = self.tab.page.locator(".ai-message").last
        expect(newest).to_contain_text(text, timeout=TIMEOUT_MS)
        [(pid, version, upstream)] = text.findall(newest.inner_text())
        return Told(int(pid), version, upstream)

    def shows_connection_lost(self) -> bool:
        return self.tab.page.get_by_text(CONNECTION_LOST).is_visible()

    def expect_connection_lost(self) -> None:
        expect(self.tab.page.get_by_text(CONNECTION_LOST)).to_be_visible(timeout=TIMEOUT_MS)

    def expect_no_banner(self) -> None:
        expect(self.tab.page.get_by_text(CONNECTION_LOST)).to_be_hidden(timeout=TIMEOUT_MS)

    def _uploads(self) -> list[Answer]:
        return [answer for answer in self.tab.answers() if "/project/file" in answer.url and answer.status == 200]
