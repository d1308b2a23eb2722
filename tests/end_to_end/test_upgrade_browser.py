"""People in browsers while the proxy is upgraded, reloaded and replaced: nobody notices, but those who came by TLS.

Their pages are NiceGUI's and Chainlit's, as the frameworks make them; NiceGUI's forget who is away for 3 s. What an
upgrade is spared, a restart shows: it closes every socket, and every page opens another.
"""

import re
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from playwright.sync_api import WebSocket
from typing_extensions import override

from tests.bench.operations.tree import ports_held, workers_of
from tests.end_to_end.pages import ChatPage, CounterPage
from tests.end_to_end.peers import PROBE
from tests.helpers.apps import CHAINLIT, NICEGUI, Fleet, Framework
from tests.helpers.browser import Tab, Visitor, Visitors
from tests.helpers.certificates import Authority
from tests.helpers.processes import Child, Children, StickyProxy, free_port, wait_until
from tests.helpers.serving import REPOSITORY

pytestmark = pytest.mark.browser

GUESTS = 6
WORKERS = 2
UPGRADES = 5
OLD_SECRET, NEW_SECRET = "0123456789abcdef" * 2, "fedcba9876543210" * 2
# What reloads change: what is open lives by other settings; of the workers one gives all that it has to the other; and,
# with a second worker again, another secret signs the cookies.
RELOADS: Final[tuple[Mapping[str, Any], ...]] = (
    {"limits": {"body": "100MiB"}, "timeouts": {"tunnel_idle": "1h", "response": "200s"}},
    {"workers": 1},
    {"workers": WORKERS, "affinity": {"cookie": {"name": "stickyproxy"}, "secrets": [NEW_SECRET, OLD_SECRET]}},
)
GRACE_OF_TLS_S = 15
# NiceGUI forgets a page 3 s after its socket broke. More patience where sockets do break, so that a slow machine does
# not decide how the test ends.
PATIENT = ("--reconnect-timeout-s", "20")
# NiceGUI's "Connection lost. Trying to reconnect...": when it is switched on and off; it can be seen 2 s after that.
WATCH_POPUP = """
window.popups = [];
const popup = document.getElementById("popup");
new MutationObserver(() => popups.push({at: performance.now(), isHidden: popup.ariaHidden}))
  .observe(popup, {attributeFilter: ["aria-hidden"]});
"""
UPGRADED = re.compile(r"upgraded from version \S+ to \S+: (\d+) tunnels and \d+ connections have moved")


class OperatedProxy(StickyProxy):
    """A proxy with two workers that is upgraded, reloaded, replaced or restarted; `child` is what serves at last."""

    def __init__(
        self, children: Children, upstreams: Mapping[str, str], name: str, more: Mapping[str, Any] | None = None
    ) -> None:
        self._children = children
        self._name = name
        self.hand_over = children.directory / f"{name}.hand-over"
        self.control = children.directory / f"{name}.control"
        sockets = {"control": str(self.control), "hand_over": str(self.hand_over)}
        super().__init__(
            children,
            upstreams,
            affinity={"secrets": [OLD_SECRET]},
            probe=PROBE,
            more={"workers": WORKERS, **sockets, **(more or {})},
            name=name,
        )

    @property
    def all_workers(self) -> set[int]:
        """The process ids of the workers, those included that only finish what they have."""
        return workers_of(self.child.pid)

    def command(self, *words: str) -> Child:
        """Start a command of an operator."""
        return self._run(f"{self._name}-{words[0]}", *words, "--control", str(self.control))

    def change_file(self, sections: Mapping[str, Any]) -> None:
        configuration = yaml.safe_load(self.file.read_text()) | sections
        self.file.write_text(yaml.safe_dump(configuration, sort_keys=False))

    def serve_again(self, *words: str) -> Child:
        """Start another proxy of the same file."""
        return self._run(f"{self._name}-again", "serve", "--config", str(self.file), *words)

    def _run(self, name: str, *words: str) -> Child:
        command = [sys.executable, "-m", "stickyproxy", *words]
        return self._children.start(name, command, {"PYTHONPATH": str(REPOSITORY)})


class Guest(ABC):
    """Somebody at a page, who does one thing after the other and sees each answered by the process of the page."""

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
    def pid_of_answer(self) -> int:
        """Wait for the answer to what was done last; return the pid of the process that gave it."""

    def is_marked(self) -> bool:
        """Say whether the page is the one that was loaded at first: a mark in its memory is still there."""
        return bool(self.tab.page.evaluate("window.loadedOnce === true"))

    def _on_websocket(self, socket: WebSocket) -> None:
        self.sockets.append(socket)

    def wait_for_another_socket(self) -> None:
        self.tab.wait_until(lambda: len(self.sockets) > 1, "the page opens another WebSocket")

    def assert_noticed_nothing(self) -> None:
        """Assert that the page was never loaded again, and has used one WebSocket all the time, which is open."""
        self.tab.assert_undisturbed()
        assert self.is_marked()
        assert self.tab.websockets_opened == 1
        assert [socket.is_closed() for socket in self.sockets] == [False]


class Clicker(Guest):
    """Somebody who counts up in NiceGUI, by a counter that only the process of the page knows."""

    def __init__(self, visitor: Visitor) -> None:
        self.page = CounterPage(visitor)
        super().__init__(self.page)

    @override
    def ask(self) -> None:
        self.asked += 1
        self.page.increment()

    @override
    def pid_of_answer(self) -> int:
        self.page.expect_count(self.asked)
        return self.page.pid


class Talker(Guest):
    """Somebody who chats with Chainlit, whose replies are numbered in the session."""

    def __init__(self, visitor: Visitor) -> None:
        self.page = ChatPage(visitor)
        super().__init__(self.page)

    @override
    def ask(self) -> None:
        self.asked += 1
        self.page.say(f"message {self.asked}")

    @override
    def pid_of_answer(self) -> int:
        return self.page.pid_of_reply(self.asked)


GUESTS_OF: Final[Mapping[str, Callable[[Visitor], Guest]]] = {NICEGUI.name: Clicker, CHAINLIT.name: Talker}


@pytest.fixture(scope="module", params=[NICEGUI, CHAINLIT], ids=lambda framework: framework.name)
def framework(request: pytest.FixtureRequest) -> Framework:
    assert isinstance(request.param, Framework)
    return request.param


@pytest.fixture(scope="module")
def fleet(children: Children, framework: Framework) -> Fleet:
    return Fleet(children, framework)


@pytest.fixture
def proxy(children: Children, fleet: Fleet, framework: Framework) -> Iterator[OperatedProxy]:
    proxy = OperatedProxy(children, fleet.upstreams, f"{framework.name}-proxy")
    yield proxy
    proxy.child.stop()


@pytest.fixture(scope="module")
def patient_fleet(children: Children) -> Fleet:
    return Fleet(children, NICEGUI, options=PATIENT)


@pytest.fixture
def edge(children: Children, patient_fleet: Fleet) -> Iterator[OperatedProxy]:
    """Start a proxy that ends TLS, and whose old workers end soon."""
    leaf = Authority(children.directory).issue("localhost")
    port = free_port()
    listener = {"address": f"127.0.0.1:{port}", "tls": {"certificates": [leaf.section]}}
    more = {"listeners": [listener], "grace": f"{GRACE_OF_TLS_S}s"}
    proxy = OperatedProxy(children, patient_fleet.upstreams, "edge", more)
    proxy.url = f"https://localhost:{port}"
    yield proxy
    proxy.child.stop()


def welcome(visitors: Visitors, site_url: str, make_guest: Callable[[Visitor], Guest], count: int) -> list[Guest]:
    """Let guests come one after the other."""
    return [make_guest(visitors.new(site_url)) for _ in range(count)]


def let_all_work(guests: list[Guest]) -> list[int]:
    """Let all do something at the same time; return the pids of the processes that answer."""
    for guest in guests:
        guest.ask()
    return [guest.pid_of_answer() for guest in guests]


def work_until_end(guests: list[Guest], pids: list[int], child: Child) -> int:
    """Let all work until a process has ended, answered by these pids; return how often each of them did something.

    Something was done just before its end, and something just after.
    """
    rounds, is_over = 0, False
    while not is_over:
        is_over = not child.is_running()
        assert let_all_work(guests) == pids
        rounds += 1
        assert rounds < 1000, f"{child} does not end:\n{child.log_tail()}"
    return rounds


def port_of(proxy: StickyProxy) -> int:
    return int(proxy.url.rpartition(":")[2])


def take_pictures(guests: list[Guest], directory: Path, name: str) -> None:
    for number, guest in enumerate(guests, 1):
        guest.tab.page.screenshot(path=directory / f"{name}-{number}.png")


def upgrade(proxy: OperatedProxy, guests: list[Guest], pids: list[int]) -> None:
    """Upgrade while all work: the process id stays, the workers are others, and all tunnels are with them."""
    supervisor, before = proxy.child.pid, proxy.all_workers
    command = proxy.command("upgrade")
    rounds = work_until_end(guests, pids, command)
    said = command.log_tail().splitlines()[-1]
    assert command.wait() == 0, said
    assert UPGRADED.match(said)
    print(f"{said}; each worked {rounds} times meanwhile")
    wait_until(lambda: not before & proxy.all_workers, "the old workers have ended")
    assert len(proxy.all_workers) == len(before)
    assert proxy.child.pid == supervisor
    wait_until(lambda: proxy.metric("tunnels_open") == len(guests), "all tunnels are counted")
    assert let_all_work(guests) == pids


def reload(proxy: OperatedProxy, guests: list[Guest], pids: list[int], sections: Mapping[str, Any]) -> None:
    """Reload other sections of the file while all work."""
    proxy.change_file(sections)
    command = proxy.command("reload")
    rounds = work_until_end(guests, pids, command)
    said = command.log_tail()
    assert command.wait() == 0, said
    print(f"reloaded, {said.splitlines()[-1]}; each worked {rounds} times meanwhile")
    wait_until(
        lambda: len(proxy.all_workers) == sections.get("workers", WORKERS), "there are as many workers as written"
    )
    assert let_all_work(guests) == pids


def take_over(proxy: OperatedProxy, guests: list[Guest], pids: list[int]) -> None:
    """Let a second proxy take the place of the first, which ends by itself, while all work."""
    first = proxy.child
    proxy.child = proxy.serve_again("--take-over", str(proxy.hand_over))
    rounds = work_until_end(guests, pids, first)
    assert first.wait() == 0, first.log_tail()
    assert proxy.child.is_running(), proxy.child.log_tail()
    print(f"taken over; each worked {rounds} times meanwhile")
    proxy.child.wait_until_ready(f"{proxy.admin_url}/readyz")
    wait_until(lambda: proxy.metric("tunnels_open") == len(guests), "all tunnels are counted")
    assert let_all_work(guests) == pids


def test_nobody_notices_upgrades_reloads_and_another_proxy(
    visitors: Visitors, proxy: OperatedProxy, fleet: Fleet, framework: Framework, tmp_path: Path
) -> None:
    make_guest = GUESTS_OF[framework.name]
    guests = welcome(visitors, proxy.url, make_guest, GUESTS)
    pids = let_all_work(guests)
    assert set(pids) == fleet.pids
    held = [len(ports_held(worker, port_of(proxy))) for worker in proxy.all_workers]
    assert len(held) == WORKERS
    print(f"the workers hold {held} connections of {GUESTS} guests")
    tunnels = proxy.metric("tunnels_total")
    take_pictures(guests, tmp_path, "before")

    for number in range(UPGRADES):
        upgrade(proxy, guests, pids)
        if number == UPGRADES // 2:
            reload(proxy, guests, pids, RELOADS[0])
    for sections in RELOADS[1:]:
        reload(proxy, guests, pids, sections)
    assert proxy.metric("handed_over_total", kind="tunnels") >= UPGRADES * GUESTS
    assert proxy.metric("tunnels_total") == tunnels
    assert proxy.metric("affinity_breaks_total") == 0
    take_over(proxy, guests, pids)

    take_pictures(guests, tmp_path, "after")
    for guest in guests:
        guest.assert_noticed_nothing()
    again = [make_guest(guest.visitor) for guest in guests]  # a second tab of each: the pins are still there
    assert let_all_work(again) == pids
    newcomers = welcome(visitors, proxy.url, make_guest, len(fleet.pids))
    assert set(let_all_work(newcomers)) <= fleet.pids
    for guest in guests + again + newcomers:
        guest.assert_noticed_nothing()


def test_everybody_notices_a_restart(
    visitors: Visitors, proxy: OperatedProxy, framework: Framework, tmp_path: Path
) -> None:
    """The control: this is what the other tests would see if an upgrade were a restart."""
    guests = welcome(visitors, proxy.url, GUESTS_OF[framework.name], GUESTS)
    let_all_work(guests)
    for guest in guests:
        guest.assert_noticed_nothing()

    proxy.child.send(signal.SIGTERM)
    assert proxy.child.wait() == 0
    proxy.child = proxy.serve_again()
    proxy.child.wait_until_ready(f"{proxy.admin_url}/readyz")

    for guest in guests:
        guest.wait_for_another_socket()
        assert guest.tab.websocket_closes[0] == 1001
        assert guest.sockets[0].is_closed()
        with pytest.raises(AssertionError):
            guest.assert_noticed_nothing()
    take_pictures(guests, tmp_path, "restarted")
    sockets, loads = [len(guest.sockets) for guest in guests], [guest.tab.page_loads for guest in guests]
    print(f"after a restart: WebSockets {sockets}, page loads {loads}")


def test_over_tls_the_old_worker_goes_on_until_the_grace_is_over(
    visitors: Visitors, edge: OperatedProxy, tmp_path: Path
) -> None:
    """What a visitor sees: nothing until the grace is over, and then an answer that takes a second longer than others.

    A TLS connection cannot move. Its old worker ends the tunnel with Close 1012, and NiceGUI's client connects again
    after 0.5 to 1.5 s, to a new worker. The app still has the page: it is not loaded again, and what is done meanwhile
    is answered then. Only after 2 s would the page say "Connection lost", and after 3 s the app would forget it.
    """
    [guest] = welcome(visitors, edge.url, Clicker, 1)
    guest.tab.page.evaluate(WATCH_POPUP)
    pids = let_all_work([guest])
    old_workers = edge.all_workers
    assert any(ports_held(worker, port_of(edge)) for worker in old_workers)

    command = edge.command("upgrade")
    work_until_end([guest], pids, command)
    said = command.log_tail().splitlines()[-1]
    assert command.wait() == 0, said
    assert f"of TLS cannot, and have {GRACE_OF_TLS_S} s to end in the old workers" in said
    new_workers = edge.all_workers - old_workers
    assert len(new_workers) == WORKERS
    assert let_all_work([guest]) == pids
    assert any(ports_held(worker, port_of(edge)) for worker in old_workers)
    assert not any(ports_held(worker, port_of(edge)) for worker in new_workers)
    guest.assert_noticed_nothing()
    assert guest.tab.page.evaluate("popups") == []

    assert guest.tab.wait_for_websocket_close() == 1012
    assert let_all_work([guest]) == pids
    guest.tab.page.screenshot(path=tmp_path / "closed.png")
    assert "debug: WebSocket closed 1012 the proxy was replaced" in guest.tab.console
    guest.wait_for_another_socket()
    shown, hidden = guest.tab.page.evaluate("popups")
    assert (shown["isHidden"], hidden["isHidden"]) == ("false", "true")
    print(f"the page was without a connection for {hidden['at'] - shown['at']:.0f} ms")
    assert let_all_work([guest]) == pids
    guest.tab.page.screenshot(path=tmp_path / "reconnected.png")
    assert guest.is_marked()
    guest.tab.assert_lost_nothing()
    assert [socket.is_closed() for socket in guest.sockets] == [True, False]
    wait_until(lambda: edge.all_workers == new_workers, "the old workers have ended")
    assert any(ports_held(worker, port_of(edge)) for worker in new_workers)
    assert edge.metric("tunnel_closes_total", code="1012") == 1
    assert edge.metric("affinity_breaks_total") == 0
