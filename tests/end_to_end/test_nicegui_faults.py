"""NiceGUI with its own patience of 3 s, in front of processes that pause, block and die."""

import signal
from collections.abc import Iterator

import pytest

from tests.end_to_end.pages import CounterPage
from tests.end_to_end.peers import Peer, start_peer
from tests.helpers.apps import NICEGUI, Fleet
from tests.helpers.browser import Visitors
from tests.helpers.processes import Children, StickyProxy

pytestmark = pytest.mark.browser

VISITORS = 8
PAUSE_S = 2.0


@pytest.fixture(scope="module")
def fleet(children: Children) -> Fleet:
    return Fleet(children, NICEGUI)


@pytest.fixture(scope="module")
def peer(children: Children, fleet: Fleet) -> Peer:
    return start_peer(children, fleet.upstreams)


@pytest.fixture
def mortal_fleet(fleet: Fleet) -> Iterator[Fleet]:
    yield fleet
    fleet.restore()


@pytest.fixture
def pages(visitors: Visitors, peer: Peer) -> list[CounterPage]:
    """Visitors who came one after the other, and have counted to 1."""
    pages = [CounterPage(visitors.new(peer.url)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
        page.increment()
        page.expect_count(1)
    return pages


def test_nobody_leaves_a_process_that_pauses(pages: list[CounterPage], mortal_fleet: Fleet) -> None:
    pids = [page.pid for page in pages]
    assert set(pids) == mortal_fleet.pids

    mortal_fleet.send(pids[0], signal.SIGSTOP)
    pages[0].tab.sleep(PAUSE_S)
    mortal_fleet.send(pids[0], signal.SIGCONT)

    for page in pages:
        page.expect_ticks()
        assert page.count == 1
        page.tab.assert_lost_nothing()
    assert [page.pid for page in pages] == pids


def test_nobody_leaves_a_process_that_blocks(pages: list[CounterPage], peer: Peer, fleet: Fleet) -> None:
    """It blocks for longer than its probe's patience, and for longer than the client waits for a sign of life."""
    pids = [page.pid for page in pages]
    assert set(pids) == fleet.pids

    pages[0].block()
    for page in pages:
        page.increment()
    for page, pid in zip(pages, pids, strict=True):
        if pid != pids[0]:
            page.expect_count(2)
    pages[0].expect_count(2)  # its process is back, and so are the others of that process
    for page in pages:
        page.expect_ticks()

    assert [page.pid for page in pages] == pids
    if isinstance(peer, StickyProxy):
        assert peer.metric("affinity_breaks_total") == 0


def test_a_drained_process_keeps_its_visitors_and_gets_no_new_ones(
    pages: list[CounterPage], peer: Peer, fleet: Fleet, visitors: Visitors
) -> None:
    if not isinstance(peer, StickyProxy):
        pytest.skip("another proxy is drained in another way")
    pids = [page.pid for page in pages]
    drained = fleet.upstream_of(pids[0])

    peer.set_state(drained, "drain")
    try:
        new_pages = [CounterPage(visitors.new(peer.url)) for _ in range(VISITORS // 2)]
        for page in new_pages:
            page.open()
            assert page.pid in fleet.pids - {pids[0]}
        for page in pages:
            page.expect_ticks()
            assert page.count == 1
            page.tab.assert_lost_nothing()
        pages[0].open()
        assert [page.pid for page in pages] == pids
    finally:
        peer.set_state(drained, "ready")


def test_the_visitors_of_a_killed_process_reload_once(
    pages: list[CounterPage], peer: Peer, mortal_fleet: Fleet
) -> None:
    pids = [page.pid for page in pages]
    victim = pids[0]
    moved = [page for page in pages if page.pid == victim]
    others = [page for page in pages if page.pid != victim]

    mortal_fleet.send(victim, signal.SIGKILL)
    for page in moved:
        page.tab.wait_for_reload()
        page.expect_ticks()
        assert page.pid in mortal_fleet.pids - {victim}
        assert page.count == 0
        page.increment()
        page.expect_count(1)
        assert page.tab.page_loads == 2
    for page in others:
        page.expect_ticks()
        assert page.count == 1
        page.tab.assert_lost_nothing()
    if isinstance(peer, StickyProxy):
        assert peer.metric("affinity_breaks_total") >= len(moved)
