"""The recipes for marimo, Dash, Flask-SocketIO and MCP: each, run as it stands, keeps every session where it is."""

from typing import Final

import pytest

from tests.end_to_end.more_recipe_pages import PAGES, DashPage, MarimoPage, McpClient
from tests.end_to_end.recipe_pages import SocketIoPage
from tests.helpers.browser import Visitors
from tests.helpers.browser_relay import Relay
from tests.helpers.recipe import PROCESSES, Recipe

pytestmark = pytest.mark.browser

VISITORS: Final = 6
SWITCHING_PROTOCOLS: Final = 101
EACH: Final = pytest.mark.parametrize("site", PAGES, indirect=True)
STATEFUL: Final = pytest.mark.parametrize("site", ["marimo", "flask-socketio"], indirect=True)
MARIMO: Final = pytest.mark.parametrize("site", ["marimo"], indirect=True)
DASH: Final = pytest.mark.parametrize("site", ["dash"], indirect=True)
SOCKETIO: Final = pytest.mark.parametrize("site", ["flask-socketio"], indirect=True)
MCP: Final = pytest.mark.parametrize("site", ["mcp"], indirect=True)


@EACH
def test_each_visitor_stays_with_one_process(site: Recipe, visitors: Visitors) -> None:
    pages = [PAGES[site.name](visitors.new(site.url)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
    processes = [page.use() for page in pages]
    for _ in range(2):
        assert [page.use() for page in pages] == processes
    assert len(set(processes)) == PROCESSES
    for page in pages:
        page.tab.assert_undisturbed()
        assert not page.has_lost_its_session()
    assert site.metric("affinity_breaks_total") == 0


@STATEFUL
def test_without_affinity_sessions_are_lost(site: Recipe, visitors: Visitors, url_without_affinity: str) -> None:
    """The control: this is what the other tests would see if affinity did not work."""
    pages = [PAGES[site.name](visitors.new(url_without_affinity)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
        if isinstance(page, MarimoPage):  # Socket.IO asks again by itself
            page.process()
            page.act()
    pages[0].tab.wait_until(lambda: any(page.has_lost_its_session() for page in pages), "a session is lost")


@MARIMO
def test_what_is_moved_and_clicked_reaches_one_kernel(site: Recipe, visitors: Visitors) -> None:
    pages = [MarimoPage(visitors.new(site.url)) for _ in range(3)]
    for number, page in enumerate(pages, 1):
        page.open()
        for _ in range(number):
            page.use()
    for number, page in enumerate(pages, 2):
        page.multiply(number)
        page.tab.assert_undisturbed()
        assert page.tab.websockets_opened == 1


@MARIMO
def test_marimo_says_why_it_closes_a_websocket(site: Recipe, visitors: Visitors) -> None:
    """Its pages read the reason of a close, and connect again or give up by it."""
    page = MarimoPage(visitors.new(site.url))
    page.open()
    page.use()
    assert page.end_of_a_websocket_that_is_not_allowed() == [1008, "MARIMO_KIOSK_NOT_ALLOWED"]


@DASH
def test_all_of_a_dash_app_is_below_its_path(site: Recipe, visitors: Visitors) -> None:
    page = DashPage(visitors.new(site.url))
    page.open()
    page.use()
    paths = page.paths() - {"/favicon.ico"}
    assert {path.split("/")[1] for path in paths} == {"tool"}
    assert "/tool/_dash-update-component" in paths
    assert any(path.startswith("/tool/_dash-component-suites/") for path in paths)
    page.tab.assert_undisturbed()


@DASH
def test_dash_finds_again_what_its_process_remembers(site: Recipe, visitors: Visitors) -> None:
    page = DashPage(visitors.new(site.url))
    page.open()
    page.use()
    first = page.calls_of_process
    page.use()
    assert page.calls_of_process == first + 1


@DASH
def test_dash_works_without_affinity_in_many_processes(
    site: Recipe, visitors: Visitors, url_without_affinity: str
) -> None:
    """The control of what affinity is for here: nothing fails, but what a process remembers is met by chance."""
    page = DashPage(visitors.new(url_without_affinity))
    page.open()
    processes = [page.use() for _ in range(2 * PROCESSES)]
    page.tab.assert_undisturbed()
    assert len(set(processes)) > 1


@SOCKETIO
def test_polling_comes_first(site: Recipe, visitors: Visitors) -> None:
    page = SocketIoPage(visitors.new(site.url))
    page.open()
    page.tab.wait_until(lambda: bool(page.tab.websockets_opened), "there is a WebSocket")
    page.use()
    answers = page.engineio_answers()
    assert "transport=polling" in answers[0].url
    assert answers[0].status == 200
    assert [answer.status for answer in answers].count(SWITCHING_PROTOCOLS) == 1


@SOCKETIO
def test_polling_alone_stays_too(site: Recipe, visitors: Visitors) -> None:
    with Relay(site.url, refuse_websockets=True) as relay:
        pages = [SocketIoPage(visitors.new(relay.url)) for _ in range(VISITORS)]
        for page in pages:
            page.open()
        processes = [page.use() for page in pages]
        assert [page.use() for page in pages] == processes
        assert len(set(processes)) == PROCESSES
        for page in pages:
            assert page.tab.websockets_opened == 0
            page.tab.assert_lost_nothing()


@SOCKETIO
def test_without_affinity_a_session_is_invalid(site: Recipe, visitors: Visitors, url_without_affinity: str) -> None:
    page = SocketIoPage(visitors.new(url_without_affinity))
    page.open()
    page.tab.wait_until(page.has_lost_its_session, "the session is refused")
    assert any(answer.status == 400 and "sid=" in answer.url for answer in page.engineio_answers())


@MCP
def test_each_mcp_session_stays_with_one_process(site: Recipe) -> None:
    clients = [McpClient(site.url) for _ in range(VISITORS)]
    for client in clients:
        client.initialize()
    processes = [client.count().removeprefix("1 counted by ") for client in clients]
    assert set(processes) == set(site.pids)
    for number in (2, 3):
        assert [client.count() for client in clients] == [f"{number} counted by {process}" for process in processes]


@MCP
def test_without_affinity_mcp_sessions_are_not_found(site: Recipe, url_without_affinity: str) -> None:
    """The control: the round robin sends what follows `initialize` to processes that do not know it."""
    client = McpClient(url_without_affinity)
    client.initialize()
    assert "Session not found" in {client.count() for _ in range(PROCESSES)}
    assert 404 in client.statuses
