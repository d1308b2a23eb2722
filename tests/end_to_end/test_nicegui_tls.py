"""NiceGUI over https and wss, with the proxy at the edge: TLS ends there, and the cookie is for https only."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.end_to_end.pages import CounterPage
from tests.end_to_end.peers import PROBE
from tests.helpers.apps import NICEGUI, Fleet
from tests.helpers.browser import Visitors
from tests.helpers.certificates import Authority
from tests.helpers.processes import Children, StickyProxy, free_port

pytestmark = pytest.mark.browser

VISITORS = 6


@pytest.fixture(scope="module")
def fleet(children: Children) -> Fleet:
    return Fleet(children, NICEGUI)


@dataclass(frozen=True)
class Edge:
    """A proxy with a listener for TLS, and one that sends its clients there."""

    proxy: StickyProxy
    url: str
    plain_url: str


@pytest.fixture
def edge(children: Children, fleet: Fleet) -> Iterator[Edge]:
    leaf = Authority(children.directory).issue("localhost")
    port, plain_port = free_port(), free_port()
    listeners = [
        {"address": f"127.0.0.1:{port}", "tls": {"certificates": [leaf.section]}},
        {"address": f"127.0.0.1:{plain_port}", "redirect_to_https": port},
    ]
    proxy = StickyProxy(children, fleet.upstreams, probe=PROBE, more={"listeners": listeners}, name="edge")
    yield Edge(proxy, f"https://localhost:{port}", f"http://localhost:{plain_port}")
    proxy.child.stop()


def test_each_visitor_stays_with_one_process_over_tls(visitors: Visitors, edge: Edge, fleet: Fleet) -> None:
    pages = [CounterPage(visitors.new(edge.url)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
    pids = [page.pid for page in pages]
    assert set(pids) == fleet.pids
    for page in pages * 3:
        page.increment()
    for page in pages:
        page.expect_count(3)
        page.expect_ticks()
        page.tab.assert_undisturbed()
        assert page.tab.websockets_opened == 1
        (line,) = {
            line
            for answer in page.tab.answers()
            for line in answer.set_cookies
            if line.partition("=")[0] == "stickyproxy"
        }
        assert line.endswith("; Secure")
    assert [page.pid for page in pages] == pids
    assert edge.proxy.metric("handshakes_total", outcome="tls_completed") >= VISITORS
    assert edge.proxy.metric("affinity_breaks_total") == 0


def test_a_visitor_of_plain_http_is_sent_to_https(visitors: Visitors, edge: Edge) -> None:
    page = CounterPage(visitors.new(edge.url))
    page.tab.page.goto(f"{edge.plain_url}/?from=plain")
    assert page.tab.page.url == f"{edge.url}/?from=plain"
    page.expect_ticks()
