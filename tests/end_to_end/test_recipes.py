"""The recipes for NiceGUI, Chainlit and Socket.IO: each, run as it stands, keeps every session where it is.

And the first command of the README, which runs the NiceGUI app without a file.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import expect

from tests.end_to_end.recipe_pages import PAGES, TIMEOUT_MS, ChainlitPage, NiceGuiPage, RecipePage, SocketIoPage
from tests.helpers.apps import REPOSITORY, find_interpreter
from tests.helpers.browser import Visitors
from tests.helpers.browser_relay import Relay
from tests.helpers.processes import Children, free_port, wait_until
from tests.helpers.recipe import RECIPES, Recipe

pytestmark = pytest.mark.browser

VISITORS: Final = 6
LENGTH: Final = 1_000_000
EACH: Final = pytest.mark.parametrize("site", PAGES, indirect=True)
NICEGUI: Final = pytest.mark.parametrize("site", ["nicegui"], indirect=True)
CHAINLIT: Final = pytest.mark.parametrize("site", ["chainlit"], indirect=True)
SOCKETIO: Final = pytest.mark.parametrize("site", ["fastapi-socketio"], indirect=True)


def assert_each_stays_with_one_process(pages: Sequence[RecipePage]) -> None:
    """Let all do something three times; assert that nobody noticed that there are several processes."""
    processes = [page.process() for page in pages]
    for _ in range(3):
        assert [page.use() for page in pages] == processes
    assert len(set(processes)) > 1
    for page in pages:
        page.tab.assert_undisturbed()


@EACH
def test_each_visitor_stays_with_one_process(site: Recipe, visitors: Visitors) -> None:
    pages = [PAGES[site.name](visitors.new(site.url)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
    assert_each_stays_with_one_process(pages)
    assert not any(page.has_lost_its_session() for page in pages)
    assert site.metric("affinity_breaks_total") == 0


@EACH
def test_without_affinity_sessions_are_lost(site: Recipe, visitors: Visitors, url_without_affinity: str) -> None:
    """The control: this is what the other tests would see if affinity did not work."""
    pages = [PAGES[site.name](visitors.new(url_without_affinity)) for _ in range(VISITORS)]
    for page in pages:
        page.open()
    pages[0].tab.wait_until(lambda: any(page.has_lost_its_session() for page in pages), "a session is lost")


@NICEGUI
def test_a_stored_name_is_known_to_the_process_that_comes_next(site: Recipe, visitors: Visitors) -> None:
    """All processes sign with one secret and share the directory of `app.storage.user`."""
    page = NiceGuiPage(visitors.new(site.url))
    page.open()
    page.use()
    page.name.fill("Ada")
    page.tab.wait_until(lambda: any("Ada" in text for text in _stored(site)), "the name is on the disk")
    site.stop_process(page.process())

    page.tab.wait_for_reload()
    expect(page.name).to_have_value("Ada", timeout=TIMEOUT_MS)
    expect(page.tab.page.get_by_text("You have not clicked yet.")).to_be_visible(timeout=TIMEOUT_MS)


def _stored(site: Recipe) -> Iterator[str]:
    return (file.read_text() for file in site.directory.rglob("storage-user-*.json"))


@CHAINLIT
def test_the_end_of_a_process_leaves_the_uploads_of_others(site: Recipe, visitors: Visitors, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("x" * LENGTH)
    pages = [ChainlitPage(visitors.new(site.url)) for _ in range(4)]
    for page in pages:
        page.open()
        page.use()
        page.attach(file)
        expect(page.tab.page).to_have_title("Chat in several processes", timeout=TIMEOUT_MS)  # its root has config.toml
    processes = [page.use() for page in pages]
    victim = processes[0]
    others = [page for page, process in zip(pages, processes, strict=True) if process != victim]
    assert others
    site.stop_process(victim)

    assert [page.use() for page in others] == [process for process in processes if process != victim]
    for page in others:
        page.expect_in_reply(f"notes.txt has {LENGTH} characters")
        page.tab.assert_undisturbed()


@SOCKETIO
def test_polling_comes_first(site: Recipe, visitors: Visitors) -> None:
    page = SocketIoPage(visitors.new(site.url))
    page.open()
    page.tab.wait_until(lambda: bool(page.tab.websockets_opened), "there is a WebSocket")
    page.use()
    answers = page.engineio_answers()
    assert "transport=polling" in answers[0].url
    assert answers[0].status == 200
    assert [answer.status for answer in answers].count(101) == 1


@SOCKETIO
def test_polling_alone_stays_too(site: Recipe, visitors: Visitors) -> None:
    with Relay(site.url, refuse_websockets=True) as relay:
        pages = [SocketIoPage(visitors.new(relay.url)) for _ in range(VISITORS)]
        for page in pages:
            page.open()
        processes = [page.use() for page in pages]
        assert [page.use() for page in pages] == processes
        assert len(set(processes)) > 1
        for page in pages:
            assert page.tab.websockets_opened == 0
            page.tab.assert_lost_nothing()


def test_the_first_command_of_the_readme(visitors: Visitors, tmp_path: Path) -> None:
    """Run its last part, at ports of the test's own and with the interpreter that has NiceGUI."""
    block = re.search(r"```console\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert block
    program, run, *words = shlex.split(block[1].rpartition("&&")[2])
    assert (program, run) == (".venv/bin/stickyproxy", "run")
    assert ".venv/bin/python" in words
    python = str(find_interpreter("nicegui"))
    port, admin_port = free_port(), free_port()
    command: list[str | Path] = [
        Path(sys.executable).with_name("stickyproxy"),
        *(run, "--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin_port}"),
        *(python if word == ".venv/bin/python" else word for word in words),
    ]
    shutil.copytree(RECIPES / "nicegui", tmp_path / "config/recipes/nicegui")
    homes = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"), str(tmp_path))
    with Children(tmp_path) as children:
        child = children.start("stickyproxy", command, homes)
        child.wait_until_ready(f"http://127.0.0.1:{admin_port}/readyz")
        wait_until(lambda: child.log.read_text().count(" is ready at ") == 4, "the app runs four times")
        pages = [NiceGuiPage(visitors.new(f"http://localhost:{port}")) for _ in range(VISITORS)]
        for page in pages:
            page.open()
        assert_each_stays_with_one_process(pages)
