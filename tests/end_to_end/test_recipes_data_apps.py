"""The recipes for Streamlit, Gradio, Panel and Shiny: each, run as it stands, keeps every session where it is."""

import http.client
import re
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from tests.end_to_end.data_app_pages import PAGES, DataAppPage, GradioPage
from tests.helpers.browser import Visitors
from tests.helpers.processes import WAIT_TIMEOUT_S
from tests.helpers.recipe import Recipe

pytestmark = pytest.mark.browser

VISITORS: Final = 6
SIZE: Final = 3_000_000
PAUSES_S: Final = 4 * 0.5  # between the steps of the work in Gradio's app
SWITCHING_PROTOCOLS: Final = 101
PUBLIC_HOST: Final = "app.example.org"
EACH: Final = pytest.mark.parametrize("site", PAGES, indirect=True)
RECONNECTING: Final = pytest.mark.parametrize("site", ["streamlit", "panel"], indirect=True)
STREAMLIT: Final = pytest.mark.parametrize("site", ["streamlit"], indirect=True)
GRADIO: Final = pytest.mark.parametrize("site", ["gradio"], indirect=True)
PANEL: Final = pytest.mark.parametrize("site", ["panel"], indirect=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file to upload."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"x" * SIZE)
    return path


def welcome(site: Recipe, visitors: Visitors, count: int = VISITORS) -> list[DataAppPage]:
    """Let visitors come one after the other."""
    pages = [PAGES[site.name](visitors.new(site.url)) for _ in range(count)]
    for page in pages:
        page.open()
    return pages


def ask(site_url: str, path: str, fields: Mapping[str, str]) -> tuple[int, str]:
    """Return status and body of what a site answers to somebody without cookies; no body after a handshake."""
    with closing(http.client.HTTPConnection("127.0.0.1", urlsplit(site_url).port or 0, WAIT_TIMEOUT_S)) as connection:
        connection.request("GET", path, headers=dict(fields))
        answer = connection.getresponse()
        return answer.status, "" if answer.status == SWITCHING_PROTOCOLS else answer.read().decode()


def shake_hands(site_url: str, path: str, host: str, origin: str, protocols: str) -> int:
    """Return the status that answers the handshake of a WebSocket, for `host`, of a page of `origin`."""
    fields = {
        "Host": host,
        "Origin": origin,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": protocols,
    }
    return ask(site_url, path, fields)[0]


@EACH
def test_each_visitor_stays_with_one_process(site: Recipe, visitors: Visitors, file: Path) -> None:
    pages = welcome(site, visitors)
    processes = [page.use() for page in pages]
    for page, process in zip(pages, processes, strict=True):
        assert page.do_all(file) <= {process}
        assert page.use() == process
        page.tab.assert_undisturbed()
        assert not page.has_lost_its_session()
    assert len(set(processes)) > 1
    assert site.metric("affinity_breaks_total") == 0


@EACH
def test_without_affinity_sessions_are_lost(site: Recipe, visitors: Visitors, file: Path) -> None:
    """The control: this is what the other tests would see if affinity did not work."""
    url = site.start_without_affinity()

    def lose_session(number: int) -> bool:
        page = PAGES[site.name](visitors.new(url))
        page.open()
        page.process()
        for _ in range(number):  # each visitor meets the round robin at another point of its round
            ask(url, page.path, {})
        page.rely_on_affinity(file)
        return page.has_lost_its_session()

    assert any(lose_session(number) for number in range(VISITORS))


@RECONNECTING
def test_a_page_goes_on_with_its_session_after_a_cut(site: Recipe, visitors: Visitors) -> None:
    pages = welcome(site, visitors, 3)
    processes = [page.use() for page in pages]
    for page in pages:
        page.cut()
    assert [page.use() for page in pages] == processes
    for page in pages:
        page.tab.assert_lost_nothing()


@GRADIO
def test_gradio_shows_each_step_as_it_is_done(site: Recipe, visitors: Visitors) -> None:
    [page] = welcome(site, visitors, 1)
    assert isinstance(page, GradioPage)
    page.work()
    page.wait_for_step(1)
    began = time.monotonic()
    page.wait_for_step(5)
    assert time.monotonic() - began > PAUSES_S / 2  # the answer as a whole would come at once
    page.tab.assert_undisturbed()


@GRADIO
def test_each_gradio_has_its_own_files(site: Recipe, visitors: Visitors, tmp_path: Path) -> None:
    file = tmp_path / "own.bin"
    file.write_bytes(b"y" * SIZE)
    [page] = welcome(site, visitors, 1)
    assert isinstance(page, GradioPage)
    process = page.upload(file)
    [stored] = site.directory.rglob(file.name)
    assert stored.is_relative_to(site.directory / "files" / process)


@STREAMLIT
def test_streamlit_accepts_its_pages_under_the_public_name(site: Recipe) -> None:
    answer = shake_hands(site.url, "/_stcore/stream", PUBLIC_HOST, f"https://{PUBLIC_HOST}", "streamlit")
    assert answer == SWITCHING_PROTOCOLS


@PANEL
def test_panel_accepts_its_own_pages_only_under_any_name(site: Recipe) -> None:
    for host in (PUBLIC_HOST, urlsplit(site.url).netloc):
        # Each token is good for one session.
        for origin, status in ((f"http://{host}", SWITCHING_PROTOCOLS), ("http://elsewhere.example", 403)):
            [token] = re.findall(r'"token":"([^"]+)"', ask(site.url, "/app", {"Host": host})[1])
            assert shake_hands(site.url, "/app/ws", host, origin, f"bokeh, {token}") == status, (host, origin)
