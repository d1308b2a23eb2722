"""People in browsers while an app is deployed that the proxy itself runs: nobody notices, or each once at most.

Their pages are NiceGUI's and Chainlit's, as the frameworks make them. Where the drain timeout is longer than the
sessions nobody notices; where it is shorter each page is loaded again, or connects again, once. A rolling restart,
which is what one has without a deploy, disturbs all, and some more than once: they come to a process that is next.
"""

import itertools
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from playwright.sync_api import WebSocket, expect
from typing_extensions import override

from tests.end_to_end.pages import TIMEOUT_MS, ChatPage, CounterPage
from tests.helpers.apps import CHAINLIT, NICEGUI, Framework
from tests.helpers.browser import Tab, Visitor, Visitors
from tests.helpers.deployed_site import DeployedSite
from tests.helpers.processes import Children

pytestmark = pytest.mark.browser

GUESTS = 12
NEWCOMERS = 3
PROCESSES = 3
OLD, NEW = {f"g1-{number + 1}" for number in range(PROCESSES)}, {f"g2-{number + 1}" for number in range(PROCESSES)}
DEPLOY_TIMEOUT_S = 180.0  # three Chainlits start one after the other
NUMBERS = itertools.count(1)
TOLD = re.compile(r"version=(\S+) upstream=(\S+)")


class Told(NamedTuple):
    """What an answer tells of the process that gave it."""

    version: str
    upstream: str


class Guest(ABC):
    """Somebody at a page, who does one thing after the other; the app numbers what they do."""

    def __init__(self, page: CounterPage | ChatPage) -> None:
        self.tab: Tab = page.tab
        self.sockets: list[WebSocket] = []
        self.asked = 0
        self.tab.page.on("websocket", self._on_websocket)
        page.open()

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

    def wait_until_disturbed(self, since: int) -> None:
        """Wait for another disturbance than those that were counted before, and until the page can be used again."""
        self.tab.wait_until(lambda: self.disturbances > since, "the page is disturbed")
        self.begin_anew()

    def _on_websocket(self, socket: WebSocket) -> None:
        self.sockets.append(socket)

    def assert_noticed_nothing(self) -> None:
        """Assert that the page was never loaded again, and has used one WebSocket all the time, which is open."""
        self.tab.assert_undisturbed()
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
        return Told(self._read("version"), self._read("upstream"))

    def _read(self, label: str) -> str:
        return self.tab.page.get_by_test_id(label).inner_text().removeprefix(f"{label}=")

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
        newest = self.tab.page.locator(".ai-message").last
        text = re.compile(rf"message {self._messages}: reply {self.asked} {TOLD.pattern}")
        expect(newest).to_contain_text(text, timeout=TIMEOUT_MS)
        [told] = TOLD.findall(newest.inner_text())
        return Told(*told)

    @property
    @override
    def disturbances(self) -> int:
        return self.tab.page_loads + len(self.sockets) - 2

    @override
    def begin_anew(self) -> None:
        self.page.expect_no_banner()
        self.asked = 0


GUESTS_OF: Final[Mapping[str, Callable[[Visitor], Guest]]] = {NICEGUI.name: Clicker, CHAINLIT.name: Talker}


@pytest.fixture(params=[NICEGUI, CHAINLIT], ids=lambda framework: framework.name)
def framework(request: pytest.FixtureRequest) -> Framework:
    assert isinstance(request.param, Framework)
    return request.param


@pytest.fixture
def site(children: Children, framework: Framework) -> Iterator[DeployedSite]:
    site = DeployedSite(children, framework, f"{framework.name}-{next(NUMBERS)}", PROCESSES)
    yield site
    site.stop()


def welcome(visitors: Visitors, site: DeployedSite, framework: Framework, count: int) -> list[Guest]:
    """Let guests come one after the other."""
    return [GUESTS_OF[framework.name](visitors.new(site.url)) for _ in range(count)]


def settle(visitors: Visitors, site: DeployedSite, framework: Framework, count: int) -> list[Guest]:
    """Let guests come to the first generation and do something twice."""
    guests = welcome(visitors, site, framework, count)
    let_all_work(guests)
    told = let_all_work(guests)
    print(f"{count} guests at {sorted(Counter(one.upstream for one in told).items())}")
    assert {one.version for one in told} == {"1"}
    assert len({one.upstream for one in told} & OLD) > 1
    return guests


def let_all_work(guests: list[Guest]) -> list[Told]:
    """Let all do something at the same time; return what the answers tell."""
    for guest in guests:
        guest.ask()
    return [guest.answer() for guest in guests]


def work_until(guests: list[Guest], told: list[Told], is_over: Callable[[], bool], what: str) -> None:
    """Let all work until something is so, answered as told; then once more."""

    def work() -> bool:
        was_over = is_over()
        assert let_all_work(guests) == told
        return was_over

    guests[0].tab.wait_until(work, what, DEPLOY_TIMEOUT_S)


def take_pictures(guests: list[Guest], directory: Path, name: str) -> None:
    for number, guest in enumerate(guests, 1):
        guest.tab.page.screenshot(path=directory / f"{name}-{number}.png")


def test_nobody_notices_a_deploy_that_waits_for_the_sessions_to_end(
    visitors: Visitors, site: DeployedSite, framework: Framework, tmp_path: Path
) -> None:
    guests = settle(visitors, site, framework, GUESTS)
    old_processes = site.ready()
    told = let_all_work(guests)
    site.set_version("2")
    deploy = site.deploy("--drain-timeout", "1h", "--watch", "1s")

    work_until(guests, told, lambda: set(site.ready()) == NEW, "the new generation serves")
    newcomers = welcome(visitors, site, framework, NEWCOMERS)
    told_newcomers = let_all_work(newcomers)
    assert {one.version for one in told_newcomers} == {"2"}
    assert {one.upstream for one in told_newcomers} <= NEW
    work_until(guests + newcomers, told + told_newcomers, lambda: True, "all work")
    assert deploy.is_running(), deploy.log_tail()
    take_pictures(guests + newcomers, tmp_path, "draining")

    # The visitors of one old process leave: it ends, and no other one does.
    [*_, empty] = sorted(one.upstream for one in told)
    leaving = [guest for guest, one in zip(guests, told, strict=True) if one.upstream == empty]
    staying = [guest for guest in guests if guest not in leaving]
    told_staying = [one for one in told if one.upstream != empty]
    for guest in guests:
        guest.assert_noticed_nothing()
    for guest in leaving:
        guest.leave()
    left = {one.upstream for one in told_staying} | NEW
    work_until(staying, told_staying, lambda: set(site.upstreams()) == left, "the process without visitors is gone")
    assert old_processes[empty] not in site.app_processes()
    for guest in staying:
        guest.assert_noticed_nothing()

    for guest in staying:
        guest.leave()
    work_until(newcomers, told_newcomers, lambda: not deploy.is_running(), "the deploy is over")
    assert deploy.wait() == 0, deploy.log_tail()
    assert set(site.ready()) == set(site.upstreams()) == NEW
    assert site.app_processes() == set(site.ready().values())
    for guest in newcomers:
        guest.assert_noticed_nothing()
    assert site.metric("affinity_breaks_total") == 0


def test_at_a_short_drain_timeout_each_is_disturbed_once_and_lands_on_the_new_version(
    visitors: Visitors, site: DeployedSite, framework: Framework, tmp_path: Path
) -> None:
    guests = settle(visitors, site, framework, GUESTS)
    site.set_version("2")
    deploy = site.deploy("--drain-timeout", "1s", "--pace", "20/s", "--surge", "all", "--watch", "1s")
    guests[0].tab.wait_until(lambda: not deploy.is_running(), "the deploy is over", DEPLOY_TIMEOUT_S)
    assert deploy.wait() == 0, deploy.log_tail()

    for guest in guests:
        guest.wait_until_disturbed(0)
    told = let_all_work(guests)
    take_pictures(guests, tmp_path, "deployed")
    assert {one.version for one in told} == {"2"}
    assert {one.upstream for one in told} <= NEW
    assert let_all_work(guests) == told
    for guest in guests:
        guest.assert_disturbed_once()
    assert f"{GUESTS} tunnels are closed" in site.child.log.read_text()
    assert site.metric("tunnels_open") == GUESTS
    assert site.app_processes() == set(site.ready().values())


def test_a_rolling_restart_disturbs_all_and_some_twice(
    visitors: Visitors, site: DeployedSite, framework: Framework, tmp_path: Path
) -> None:
    """The control: this is what the other tests would see if a deploy were a restart of one process after another."""
    guests = settle(visitors, site, framework, GUESTS // 2)
    site.set_version("2")
    for upstream in sorted(OLD):
        told = let_all_work(guests)
        hit = [guest for guest, one in zip(guests, told, strict=True) if one.upstream == upstream]
        before = {guest: guest.disturbances for guest in hit}
        site.kill(upstream)
        for guest in hit:
            guest.wait_until_disturbed(before[guest])
        told = let_all_work(guests)
        assert upstream not in {one.upstream for one in told}
        site.let_start()
        guests[0].tab.wait_until(lambda: set(site.ready()) == OLD, "the process serves again", DEPLOY_TIMEOUT_S)

    take_pictures(guests, tmp_path, "restarted")
    disturbances = [guest.disturbances for guest in guests]
    print(f"a rolling restart disturbed the pages {disturbances} times")
    for guest in guests:
        with pytest.raises(AssertionError):
            guest.assert_noticed_nothing()
    twice = [guest for guest in guests if guest.disturbances > 1]
    assert twice
    for guest in twice:
        with pytest.raises(AssertionError):
            guest.assert_disturbed_once()
