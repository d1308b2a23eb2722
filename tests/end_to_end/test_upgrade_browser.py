"""People in browsers while the proxy is upgraded, reloaded and replaced: nobody notices, but those who came by TLS.

Their pages are NiceGUI's and Chainlit's, as the frameworks make them; NiceGUI's forget who is away for 3 s. What an
upgrade is spared, a restart shows: it closes every socket, and every page opens another.
"""

import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.end_to_end.guests import GUESTS_OF, Clicker, Guest, let_all_work, take_pictures, welcome, work_until
from tests.end_to_end.pages import PATIENT, Told
from tests.end_to_end.peers import PROBE
from tests.helpers.apps import CHAINLIT, NICEGUI, Fleet, Framework
from tests.helpers.browser import Visitors
from tests.helpers.certificates import Authority
from tests.helpers.proc import ports_held, workers_of
from tests.helpers.processes import Child, Children, StickyProxy, free_port, wait_until

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
        return self._children.start_stickyproxy(f"{self._name}-{words[0]}", *words, "--control", str(self.control))

    def change_file(self, sections: Mapping[str, Any]) -> None:
        configuration = yaml.safe_load(self.file.read_text()) | sections
        self.file.write_text(yaml.safe_dump(configuration, sort_keys=False))

    def serve_again(self, *words: str) -> Child:
        """Start another proxy of the same file."""
        return self._children.start_stickyproxy(f"{self._name}-again", "serve", "--config", self.file, *words)


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


def work_until_end(guests: list[Guest], told: list[Told], child: Child) -> int:
    """Let all work until a process has ended, answered as told; return how often each of them did something."""
    return work_until(guests, told, lambda: not child.is_running(), f"{child} has ended")


def upgrade(proxy: OperatedProxy, guests: list[Guest], told: list[Told]) -> None:
    """Upgrade while all work: the process id stays, the workers are others, and all tunnels are with them."""
    supervisor, before = proxy.child.pid, proxy.all_workers
    command = proxy.command("upgrade")
    rounds = work_until_end(guests, told, command)
    said = command.log_tail().splitlines()[-1]
    assert command.wait() == 0, said
    assert UPGRADED.match(said)
    print(f"{said}; each worked {rounds} times meanwhile")
    wait_until(lambda: not before & proxy.all_workers, "the old workers have ended")
    assert len(proxy.all_workers) == len(before)
    assert proxy.child.pid == supervisor
    wait_until(lambda: proxy.metric("tunnels_open") == len(guests), "all tunnels are counted")
    assert let_all_work(guests) == told


def reload(proxy: OperatedProxy, guests: list[Guest], told: list[Told], sections: Mapping[str, Any]) -> None:
    """Reload other sections of the file while all work."""
    proxy.change_file(sections)
    command = proxy.command("reload")
    rounds = work_until_end(guests, told, command)
    said = command.log_tail()
    assert command.wait() == 0, said
    print(f"reloaded, {said.splitlines()[-1]}; each worked {rounds} times meanwhile")
    wait_until(
        lambda: len(proxy.all_workers) == sections.get("workers", WORKERS), "there are as many workers as written"
    )
    assert let_all_work(guests) == told


def take_over(proxy: OperatedProxy, guests: list[Guest], told: list[Told]) -> None:
    """Let a second proxy take the place of the first, which ends by itself, while all work."""
    first = proxy.child
    proxy.child = proxy.serve_again("--take-over", str(proxy.hand_over))
    rounds = work_until_end(guests, told, first)
    assert first.wait() == 0, first.log_tail()
    assert proxy.child.is_running(), proxy.child.log_tail()
    print(f"taken over; each worked {rounds} times meanwhile")
    proxy.child.wait_until_ready(f"{proxy.admin_url}/readyz")
    wait_until(lambda: proxy.metric("tunnels_open") == len(guests), "all tunnels are counted")
    assert let_all_work(guests) == told


def test_nobody_notices_upgrades_reloads_and_another_proxy(
    visitors: Visitors, proxy: OperatedProxy, fleet: Fleet, framework: Framework, tmp_path: Path
) -> None:
    make_guest = GUESTS_OF[framework.name]
    guests = welcome(visitors, proxy.url, make_guest, GUESTS)
    told = let_all_work(guests)
    assert {one.pid for one in told} == fleet.pids
    held = [len(ports_held(worker, proxy.port)) for worker in proxy.all_workers]
    assert len(held) == WORKERS
    print(f"the workers hold {held} connections of {GUESTS} guests")
    tunnels = proxy.metric("tunnels_total")
    take_pictures(guests, tmp_path, "before")

    for number in range(UPGRADES):
        upgrade(proxy, guests, told)
        if number == UPGRADES // 2:
            reload(proxy, guests, told, RELOADS[0])
    for sections in RELOADS[1:]:
        reload(proxy, guests, told, sections)
    assert proxy.metric("handed_over_total", kind="tunnels") >= UPGRADES * GUESTS
    assert proxy.metric("tunnels_total") == tunnels
    assert proxy.metric("affinity_breaks_total") == 0
    take_over(proxy, guests, told)

    take_pictures(guests, tmp_path, "after")
    for guest in guests:
        guest.assert_noticed_nothing()
    again = [make_guest(guest.visitor) for guest in guests]  # a second tab of each: the pins are still there
    assert let_all_work(again) == told
    newcomers = welcome(visitors, proxy.url, make_guest, len(fleet.pids))
    assert {one.pid for one in let_all_work(newcomers)} <= fleet.pids
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
    told = let_all_work([guest])
    old_workers = edge.all_workers
    assert any(ports_held(worker, edge.port) for worker in old_workers)

    command = edge.command("upgrade")
    work_until_end([guest], told, command)
    said = command.log_tail().splitlines()[-1]
    assert command.wait() == 0, said
    assert f"of TLS cannot, and have {GRACE_OF_TLS_S} s to end in the old workers" in said
    new_workers = edge.all_workers - old_workers
    assert len(new_workers) == WORKERS
    assert let_all_work([guest]) == told
    assert any(ports_held(worker, edge.port) for worker in old_workers)
    assert not any(ports_held(worker, edge.port) for worker in new_workers)
    guest.assert_noticed_nothing()
    assert guest.tab.page.evaluate("popups") == []

    assert guest.tab.wait_for_websocket_close() == 1012
    assert let_all_work([guest]) == told
    guest.tab.page.screenshot(path=tmp_path / "closed.png")
    assert "debug: WebSocket closed 1012 the proxy was replaced" in guest.tab.console
    guest.wait_for_another_socket()
    shown, hidden = guest.tab.page.evaluate("popups")
    assert (shown["isHidden"], hidden["isHidden"]) == ("false", "true")
    print(f"the page was without a connection for {hidden['at'] - shown['at']:.0f} ms")
    assert let_all_work([guest]) == told
    guest.tab.page.screenshot(path=tmp_path / "reconnected.png")
    assert guest.is_marked()
    guest.tab.assert_lost_nothing()
    assert [socket.is_closed() for socket in guest.sockets] == [True, False]
    wait_until(lambda: edge.all_workers == new_workers, "the old workers have ended")
    assert any(ports_held(worker, edge.port) for worker in new_workers)
    assert edge.metric("tunnel_closes_total", code="1012") == 1
    assert edge.metric("affinity_breaks_total") == 0
