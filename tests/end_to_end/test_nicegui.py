"""NiceGUI, whose page lives in one process before its socket is opened: the socket finds that process, and stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.pages import PATIENT, CounterPage
from tests.end_to_end.peers import Peer, start_peer
from tests.helpers.apps import NICEGUI, Fleet
from tests.helpers.browser import Visitors
from tests.helpers.browser_relay import Relay
from tests.helpers.processes import Children, StickyProxy

pytestmark = pytest.mark.browser

VISITORS = 8
CUT_S = 2.0
UPLOAD_BYTES = 20_000_000


@pytest.fixture(scope="module")
def fleet(children: Children) -> Fleet:
    return Fleet(children, NICEGUI, options=PATIENT)


@pytest.fixture(scope="module")
def peer(children: Children, fleet: Fleet) -> Peer:
    return start_peer(children, fleet.upstreams)


@pytest.fixture
def round_robin(children: Children, fleet: Fleet) -> Iterator[Peer]:
    peer = start_peer(children, fleet.upstreams, sticky=False, name="round-robin")
    yield peer
    peer.child.stop()


@pytest.fixture
def peer_before_removal(children: Children, fleet: Fleet) -> Iterator[Peer]:
    """Start a proxy with the same secret, with upstreams that the other one does not have."""
    upstreams = {f"removed-{name}": url for name, url in fleet.upstreams.items()}
    peer = start_peer(children, upstreams, name="before-removal")
    yield peer
    peer.child.stop()


def open_pages(visitors: Visitors, site_url: str) -> list[CounterPage]:
    """Let visitors come one after the other."""
    pages = [CounterPage(visitors.new(site_url)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
    return pages


def increment(pages: list[CounterPage], times: int) -> None:
    """Let all click at the same time, some times, and see that all of it was counted."""
    expected = [page.count + times for page in pages]
    for page in pages * times:
        page.increment()
    for page, count in zip(pages, expected, strict=True):
        page.expect_count(count)


def pids_of(pages: list[CounterPage]) -> list[int]:
    return [page.pid for page in pages]


def test_each_visitor_stays_with_one_process(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    pages = open_pages(visitors, peer.url)
    pids = pids_of(pages)

    increment(pages, 5)
    assert pids_of(pages) == pids
    assert set(pids) == fleet.pids
    for page in pages:
        page.expect_ticks()
        assert page.count == 5
        page.tab.assert_undisturbed()
        assert page.tab.websockets_opened == 1
    if isinstance(peer, StickyProxy):
        assert peer.metric("affinity_total", outcome="new") >= len(pages)
        assert peer.metric("affinity_breaks_total") == 0
        assert peer.metric("tunnels_total") >= len(pages)


def test_without_affinity_the_pages_break(visitors: Visitors, round_robin: Peer) -> None:
    """The control: this is what the other tests would see if affinity did not work.

    A page whose socket comes to another process reloads itself; one whose scripts come from there lacks some of them.
    """
    pages = [CounterPage(visitors.new(round_robin.url)) for _ in range(VISITORS)]
    for page in pages:
        page.tab.page.goto(page.tab.site_url)
    tabs = [page.tab for page in pages]
    tabs[0].wait_until(
        lambda: any(tab.page_loads > 1 or tab.bad_answers() for tab in tabs), "a page reloads itself or lacks a script"
    )
    print(f"{[tab.page_loads for tab in tabs]} page loads, {[len(tab.bad_answers()) for tab in tabs]} refusals")


def test_polling_stays_too(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    with Relay(peer.url, refuse_websockets=True) as relay:
        pages = open_pages(visitors, relay.url)
        pids = pids_of(pages)

        increment(pages, 5)
        assert pids_of(pages) == pids
        assert set(pids) == fleet.pids
        for page in pages:
            assert page.tab.websockets_opened == 0
            page.tab.assert_lost_nothing()


def test_an_upload_reaches_the_process_of_the_page(
    visitors: Visitors, peer: Peer, fleet: Fleet, tmp_path: Path
) -> None:
    file = tmp_path / "upload.bin"
    file.write_bytes(bytes(UPLOAD_BYTES))
    pages = open_pages(visitors, peer.url)
    pids = pids_of(pages)

    for page in pages:
        page.upload(file)
    for page, pid in zip(pages, pids, strict=True):
        page.expect_upload(pid, UPLOAD_BYTES)
        page.tab.assert_undisturbed()
    assert set(pids) == fleet.pids


def test_two_tabs_of_one_visitor_share_a_process(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    first_tabs = open_pages(visitors, peer.url)
    second_tabs = [CounterPage(page.visitor) for page in first_tabs]
    for page in second_tabs:
        page.open()

    pids = pids_of(first_tabs)
    assert pids_of(second_tabs) == pids
    assert set(pids) == fleet.pids
    increment(first_tabs, 2)
    assert [page.count for page in second_tabs] == [0] * VISITORS
    for page in first_tabs + second_tabs:
        page.tab.assert_undisturbed()


def test_a_page_goes_on_after_a_cut_of_the_network(visitors: Visitors, peer: Peer, fleet: Fleet) -> None:
    with Relay(peer.url) as relay:
        pages = open_pages(visitors, relay.url)
        pids = pids_of(pages)
        increment(pages, 2)
        relay.cut()
        for page in pages:
            assert page.tab.wait_for_websocket_close() == 1006
        pages[0].tab.sleep(CUT_S)
        relay.mend()

        for page in pages:
            page.expect_ticks()
        increment(pages, 1)
        assert pids_of(pages) == pids
        assert set(pids) == fleet.pids
        for page in pages:
            assert page.count == 3
            page.tab.assert_lost_nothing()


def test_a_useless_cookie_is_replaced(visitors: Visitors, peer: Peer, peer_before_removal: Peer) -> None:
    known = CounterPage(visitors.new(peer.url))
    known.open()
    genuine = known.visitor.cookie("stickyproxy") or ""
    removed = CounterPage(visitors.new(peer_before_removal.url))
    removed.open()
    of_removed_upstreams = removed.visitor.cookie("stickyproxy") or ""

    tampered = genuine[:-1] + ("A" if genuine[-1] != "A" else "B")
    for useless in ("garbage", "v1.", "v1.AAAA", "x" * 3000, "%00%ff", '"quoted"', tampered, of_removed_upstreams):
        visitor = visitors.new(peer.url)
        visitor.context.add_cookies([{"name": "stickyproxy", "value": useless, "url": peer.url}])
        page = CounterPage(visitor)
        page.open()
        increment([page], 1)
        page.tab.assert_undisturbed()
        first_answer = page.tab.answers()[0]
        assert first_answer.status == 200
        assert first_answer.cookie("stickyproxy") not in {None, useless}
