"""What the frameworks of the recipes do at their largest: uploads, messages, cookies, many requests, and an end."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import expect

from tests.cookieless.fleet import Fleet as CookielessFleet
from tests.end_to_end.data_app_pages import GradioPage, PanelPage, StreamlitPage
from tests.end_to_end.peers import NO_AFFINITY
from tests.end_to_end.recipe_pages import TIMEOUT_MS
from tests.helpers.apps import APPS, find_interpreter
from tests.helpers.browser import Tab, Visitors
from tests.helpers.processes import Children, StickyProxy, free_port
from tests.helpers.recipe import PROCESSES, Recipe

pytestmark = pytest.mark.browser

UPLOAD_BYTES: Final = 50_000_000
MESSAGE_BYTES: Final = 60_000_000
COOKIES_BYTES: Final = 8_000
ATTEMPTS: Final = 100
# Asks a dynamic route of a Shiny session many times, one after the other; returns what each answer was.
ATTEMPT: Final = """async ([path, attempts]) => {
  const answers = [];
  for (let number = 0; number < attempts; number++) {
    const answer = await fetch(path, {cache: "no-store"});
    answers.push([answer.status, answer.ok ? await answer.json() : null]);
  }
  return answers;
}"""
STREAMLIT: Final = pytest.mark.parametrize("site", ["streamlit"], indirect=True)
GRADIO: Final = pytest.mark.parametrize("site", ["gradio"], indirect=True)
PANEL: Final = pytest.mark.parametrize("site", ["panel"], indirect=True)


@STREAMLIT
def test_streamlit_takes_a_large_upload(site: Recipe, visitors: Visitors, tmp_path: Path) -> None:
    """Use all that a session has: three counts, an upload of 50 MB, a download."""
    file = tmp_path / "large.bin"
    file.write_bytes(os.urandom(1_000_000) * (UPLOAD_BYTES // 1_000_000))
    pages = [StreamlitPage(visitors.new(site.url)) for _ in range(3)]
    for page in pages:
        page.open()
        [process] = {page.use() for _ in range(3)}
        assert page.upload(file) == process
        assert page.download() == process
        page.tab.assert_undisturbed()


@pytest.fixture
def document_site(children: Children) -> Iterator[StickyProxy]:
    """Run a Streamlit app with a large document, in two processes behind a proxy."""
    app = APPS / "streamlit_large_app.py"
    program = find_interpreter("streamlit").with_name("streamlit")
    upstreams = {}
    for number in (1, 2):
        port = free_port()
        env = {
            "STREAMLIT_SERVER_ADDRESS": "127.0.0.1",
            "STREAMLIT_SERVER_PORT": str(port),
            "STREAMLIT_SERVER_HEADLESS": "true",
            "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
        }
        children.start(f"document-{number}", [program, "run", app], env).wait_until_ready(
            f"http://127.0.0.1:{port}/_stcore/health"
        )
        upstreams[f"document-{number}"] = f"http://127.0.0.1:{port}"
    proxy = StickyProxy(children, upstreams, more={"presets": "streamlit"}, name="document-site")
    yield proxy
    proxy.child.stop()


def test_streamlit_sends_a_large_message(document_site: StickyProxy, visitors: Visitors) -> None:
    tab = visitors.new(document_site.url).new_tab()
    tab.page.goto(document_site.url)
    expect(tab.page.get_by_text("0 after the document")).to_be_visible(timeout=TIMEOUT_MS)
    expect(tab.page.get_by_test_id("stJson")).to_be_visible(timeout=TIMEOUT_MS)
    tab.page.get_by_role("button", name="Count").click()
    expect(tab.page.get_by_text("1 after the document")).to_be_visible(timeout=TIMEOUT_MS)
    tab.assert_undisturbed()
    assert tab.websockets_opened == 1
    assert document_site.metric("tunnel_bytes_total") > MESSAGE_BYTES


@GRADIO
def test_a_gradio_page_whose_process_is_killed_is_told_so(site: Recipe, visitors: Visitors) -> None:
    """An answer that breaks off reaches the page as one: not as the end of a whole one."""
    page = GradioPage(visitors.new(site.url))
    page.open()
    process = page.use()
    pid = site.pids[process]
    page.work()
    page.wait_for_step(1)
    os.kill(pid, signal.SIGKILL)
    page.tab.wait_for_reload()
    expect(page.tab.page.get_by_text("0 counted by")).to_be_visible(timeout=TIMEOUT_MS)
    assert page.tab.page.get_by_text("step 5 of 5").count() == 0
    page.act()
    expect(page.tab.page.get_by_text("1 counted by")).to_be_visible(timeout=TIMEOUT_MS)
    site.wait_until_all_ready()


@PANEL
def test_panel_connects_with_large_cookies(site: Recipe, visitors: Visitors) -> None:
    """The token in the handshake of the WebSocket holds all cookies, so that one field is larger than they are."""
    pages = [PanelPage(visitors.new(site.url)) for _ in range(3)]
    for page in pages:
        half = COOKIES_BYTES // 2 - 10
        page.tab.page.context.add_cookies(
            [{"name": name, "value": name * half, "url": site.url} for name in ("a", "b")],
        )
        page.open()
        [process] = {page.use() for _ in range(2)}
        assert process in site.pids
        page.cut()
        assert page.use() == process
        page.tab.assert_lost_nothing()


@pytest.fixture(scope="module")
def shiny_fleet(children: Children) -> CookielessFleet:
    return CookielessFleet(children, "shiny")


def attempt(visitors: Visitors, site_url: str) -> tuple[Tab, list[Any]]:
    """Ask the dynamic route of a Shiny session many times; return its page, and status and body of each answer."""
    tab = visitors.new(site_url).new_tab()
    tab.page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    tab.page.goto(site_url)
    route = tab.page.locator("#route")
    expect(route).to_contain_text("dynamic_route", timeout=TIMEOUT_MS)
    return tab, list(tab.page.evaluate(ATTEMPT, [route.inner_text().strip(), ATTEMPTS]))


def test_a_shiny_session_answers_each_of_many_attempts(
    shiny_fleet: CookielessFleet, children: Children, visitors: Visitors
) -> None:
    """What Posit's own test of a load balancer does: each attempt meets the session that the page has."""
    proxy = StickyProxy(children, shiny_fleet.upstreams, name="shiny")
    served = set()
    for _ in range(PROCESSES):
        tab, answers = attempt(visitors, proxy.url)
        process = answers[0][1]["process"]
        assert answers == [[200, {"count": number, "process": process}] for number in range(1, ATTEMPTS + 1)]
        tab.assert_undisturbed()
        served.add(process)
    assert len(served) == PROCESSES
    proxy.child.stop()


def test_without_affinity_shiny_does_not_know_the_session(
    shiny_fleet: CookielessFleet, children: Children, visitors: Visitors
) -> None:
    """The control: all but every third attempt comes to a process that has no such session."""
    proxy = StickyProxy(children, shiny_fleet.upstreams, affinity=NO_AFFINITY, name="shiny-round-robin")
    _, answers = attempt(visitors, proxy.url)
    assert [status for status, _ in answers].count(404) > ATTEMPTS // 2
    proxy.child.stop()
