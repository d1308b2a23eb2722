"""Guests of the two sample apps: people at a page who do one thing after the other, and would notice a disturbance."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from playwright.sync_api import WebSocket
from typing_extensions import override

from tests.end_to_end.pages import ChatPage, CounterPage, Told
from tests.helpers.apps import CHAINLIT, NICEGUI
from tests.helpers.browser import Tab, Visitor, Visitors

WORK_TIMEOUT_S = 180.0  # what is waited for while all work: three Chainlits start one after the other


class Guest(ABC):
    """Somebody at a page, who does one thing after the other; the app numbers what they do."""

    def __init__(self, page: CounterPage | ChatPage) -> None:
        self.visitor: Visitor = page.visitor
        self.tab: Tab = page.tab
        self.sockets: list[WebSocket] = []
        self.asked = 0
        self.tab.page.on("websocket", self._on_websocket)
        page.open()
        self.tab.page.evaluate("window.loadedOnce = true")

    @abstractmethod
    def ask(self) -> None:
        """Do something that the app must answer."""

    @abstractmethod
    def answer(self) -> Told:
        """Wait for the answer to what was done last, which has its number."""

    @property
    @abstractmethod
    def disturbances(self) -> int:
        """How often this page has lost what the process knew of it."""

    @abstractmethod
    def begin_anew(self) -> None:
        """Wait until the page can be used after a disturbance; the app numbers from 1 again."""

    def leave(self) -> None:
        self.tab.page.close()

    def is_marked(self) -> bool:
        """Say whether the page is the one that was loaded at first: a mark in its memory is still there."""
        return bool(self.tab.page.evaluate("window.loadedOnce === true"))

    def _on_websocket(self, socket: WebSocket) -> None:
        self.sockets.append(socket)

    def wait_for_another_socket(self) -> None:
        self.tab.wait_until(lambda: len(self.sockets) > 1, "the page opens another WebSocket")

    def wait_until_disturbed(self, since: int) -> None:
        """Wait for another disturbance than those that were counted before, and until the page can be used again."""
        self.tab.wait_until(lambda: self.disturbances > since, "the page is disturbed")
        self.begin_anew()

    def assert_noticed_nothing(self) -> None:
        """Assert that the page was never loaded again, and has used one WebSocket all the time, which is open."""
        self.tab.assert_undisturbed()
        assert self.is_marked()
        assert self.disturbances == 0
        assert self.tab.websockets_opened == 1
        assert [socket.is_closed() for socket in self.sockets] == [False]

    def assert_disturbed_once(self) -> None:
        """Assert that one WebSocket of the page was closed, and that nothing it has asked for was refused."""
        assert self.disturbances == 1
        assert self.tab.websocket_closes.count(1012) == 1  # NiceGUI's page closes another one itself, and is loaded
        assert self.tab.bad_answers() == []
        assert not self.sockets[-1].is_closed()


class Clicker(Guest):
    """Somebody who counts up in NiceGUI. Where its process is gone, its page loads itself again."""

    def __init__(self, visitor: Visitor) -> None:
        self.page = CounterPage(visitor)
        super().__init__(self.page)

    @override
    def ask(self) -> None:
        self.asked += 1
        self.page.increment()

    @override
    def answer(self) -> Told:
        self.page.expect_count(self.asked)
        return self.page.told()

    @property
    @override
    def disturbances(self) -> int:
        return self.tab.page_loads - 1

    @override
    def begin_anew(self) -> None:
        self.page.expect_count(0)
        self.page.expect_ticks()
        self.asked = 0


class Talker(Guest):
    """Somebody who chats with Chainlit. Where its process is gone, its page goes on with a new session."""

    def __init__(self, visitor: Visitor) -> None:
        self.page = ChatPage(visitor)
        self._messages = 0
        super().__init__(self.page)

    @override
    def ask(self) -> None:
        self.asked += 1
        self._messages += 1
        self.page.say(f"message {self._messages}")

    @override
    def answer(self) -> Told:
        return self.page.told_by_reply(self.asked, f"message {self._messages}")

    @property
    @override
    def disturbances(self) -> int:
        return self.tab.page_loads + len(self.sockets) - 2

    @override
    def begin_anew(self) -> None:
        self.page.expect_no_banner()
        self.asked = 0


GUESTS_OF: Final[Mapping[str, Callable[[Visitor], Guest]]] = {NICEGUI.name: Clicker, CHAINLIT.name: Talker}


def welcome(visitors: Visitors, site_url: str, make_guest: Callable[[Visitor], Guest], count: int) -> list[Guest]:
    """Let guests come one after the other."""
    return [make_guest(visitors.new(site_url)) for _ in range(count)]


def let_all_work(guests: list[Guest]) -> list[Told]:
    """Let all do something at the same time; return what the answers tell."""
    for guest in guests:
        guest.ask()
    return [guest.answer() for guest in guests]


def work_until(guests: list[Guest], told: list[Told], is_over: Callable[[], bool], what: str) -> int:
    """Let all work until something is so, answered as told; then once more. Return how often each did something."""
    rounds = 0

    def work() -> bool:
        nonlocal rounds
        was_over = is_over()
        assert let_all_work(guests) == told
        rounds += 1
        return was_over

    guests[0].tab.wait_until(work, what, WORK_TIMEOUT_S)
    return rounds


def take_pictures(guests: list[Guest], directory: Path, name: str) -> None:
    for number, guest in enumerate(guests, 1):
        guest.tab.page.screenshot(path=directory / f"{name}-{number}.png")
