"""NiceGUI below a path of a site with another app at its root: the prefix is stripped, and each app has its pins."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.pages import PATIENT, CounterPage
from tests.helpers.apps import NICEGUI, Fleet
from tests.helpers.browser import Visitors
from tests.helpers.processes import Children, StickyProxy

pytestmark = pytest.mark.browser

VISITORS = 6
PREFIX = "/tool"


@pytest.fixture(scope="module")
def fleet(children: Children) -> Fleet:
    return Fleet(children, NICEGUI, options=PATIENT)


@pytest.fixture
def proxy(request: pytest.FixtureRequest, children: Children, fleet: Fleet) -> Iterator[StickyProxy]:
    """Serve the app below the prefix, which is stripped or not as the parameter of this fixture says."""
    first, *others = fleet.upstreams.items()
    upstreams = [{"id": key, "url": url} for key, url in others]
    more = {
        "clusters": {"tool": {"upstreams": upstreams}},
        "routes": [{"path": PREFIX, "cluster": "tool", "strip_prefix": request.param}],
    }
    proxy = StickyProxy(children, dict([first]), more=more, name=f"prefix-{request.param}")
    yield proxy
    proxy.child.stop()


@pytest.mark.parametrize("proxy", [True], indirect=True)
def test_an_app_lives_below_a_prefix(visitors: Visitors, proxy: StickyProxy, fleet: Fleet) -> None:
    below = [CounterPage(visitors.new(f"{proxy.url}{PREFIX}/")) for _ in range(VISITORS)]
    at_root = CounterPage(visitors.new(proxy.url))
    for page in (*below, at_root):
        page.open()
    pids = [page.pid for page in below]
    assert set(pids) | {at_root.pid} == fleet.pids
    assert at_root.pid not in pids

    for page in (*below, at_root) * 3:
        page.increment()
    for page in (*below, at_root):
        page.expect_count(3)
        page.tab.assert_undisturbed()
    assert [page.pid for page in below] == pids


@pytest.mark.parametrize("proxy", [True], indirect=True)
def test_one_visitor_keeps_a_pin_for_each_app(visitors: Visitors, proxy: StickyProxy) -> None:
    visitor = visitors.new(proxy.url)
    at_root = CounterPage(visitor)
    at_root.open()
    below = CounterPage(visitor)
    below.tab.page.goto(f"{proxy.url}{PREFIX}/")
    below.expect_ticks()
    assert below.pid != at_root.pid
    names = {cookie["name"] for cookie in visitor.context.cookies()}
    assert {"stickyproxy", "stickyproxy-tool"} <= {name.partition(":")[0] for name in names}
    pids = (at_root.pid, below.pid)
    for page in (at_root, below):
        page.increment()
        page.expect_count(1)
    assert (at_root.pid, below.pid) == pids


@pytest.mark.parametrize("proxy", [False], indirect=True)
def test_with_the_prefix_the_app_does_not_know_the_page(visitors: Visitors, proxy: StickyProxy) -> None:
    """The control: the app serves its page at its root alone."""
    tab = visitors.new(proxy.url).new_tab()
    response = tab.page.goto(f"{proxy.url}{PREFIX}/")
    assert response is not None
    assert response.status == 404
