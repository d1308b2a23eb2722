"""Chainlit's Copilot, embedded by a page of another site over https: its cookies are those of a third party.

The browser blocks them, as it does by default, unless they are partitioned.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.end_to_end.copilot_page import COOKIE, CopilotPage, EmbeddingSite
from tests.end_to_end.peers import PROBE
from tests.helpers.apps import CHAINLIT, Fleet, lacking
from tests.helpers.browser import ARGUMENTS, Visitors
from tests.helpers.certificates import Authority
from tests.helpers.processes import Children, StickyProxy, free_port

pytestmark = pytest.mark.browser

VISITORS: Final = 6
# Beside the sites that may embed the chat: what Chainlit's defaults are where there is no file.
SETTINGS: Final = (
    "[features.spontaneous_file_upload]",
    "enabled = true",
    'accept = ["text/plain"]',
    "[UI]",
    'name = "Copilot"',
    "[meta]",
    'generated_by = "2.12.0"',
)
RESOLVE_BOTH_SITES: Final = "--host-resolver-rules=MAP a.test 127.0.0.1, MAP b.test 127.0.0.1, MAP * ~NOTFOUND"
THIRD_PARTY: Final = {"name": "stickyproxy", "same_site": "none"}
PARTITIONED: Final = {**THIRD_PARTY, "partitioned": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser that finds both sites on this machine."""
    path = shutil.which("chromium") or lacking("no chromium on PATH: install the package of that name")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=[*ARGUMENTS, RESOLVE_BOTH_SITES]) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def authority(children: Children) -> Authority:
    return Authority(children.directory)


@pytest.fixture(scope="module")
def embedding(authority: Authority) -> Iterator[EmbeddingSite]:
    with EmbeddingSite(authority.issue("a.test")) as site:
        yield site


@pytest.fixture(scope="module")
def fleet(children: Children, embedding: EmbeddingSite) -> Fleet:
    """Run Chainlits that let the embedding site in."""
    for number in range(1, 4):
        settings = children.directory / f"app-{number}-storage" / ".chainlit"
        settings.mkdir(parents=True)
        lines = [*SETTINGS, "[project]", f'allow_origins = ["{embedding.url}"]', ""]
        (settings / "config.toml").write_text("\n".join(lines))
        theme = settings.parent / "public" / "theme.json"  # which the widget asks for, and else complains of
        theme.parent.mkdir()
        theme.write_text("{}")
    return Fleet(children, CHAINLIT)


class Chat:
    """The site with the chat, as one way of affinity gives it to the embedding site."""

    def __init__(self, proxy: StickyProxy, chat_url: str, page_url: str) -> None:
        self.proxy = proxy
        self._chat_url = chat_url
        self._page_url = page_url

    def come(self, visitors: Visitors) -> CopilotPage:
        """Let a visitor come to the page."""
        return CopilotPage(visitors.new(self._chat_url), self._page_url)


@pytest.fixture
def chat(
    request: pytest.FixtureRequest, children: Children, fleet: Fleet, embedding: EmbeddingSite, authority: Authority
) -> Iterator[Chat]:
    """Serve the chat with the presets and the cookie that a test names as the parameter of this fixture."""
    presets, cookie = request.param
    port = free_port()
    tls = {"certificates": [authority.issue("b.test").section]}
    more: dict[str, Any] = {"listeners": [{"address": f"127.0.0.1:{port}", "tls": tls}]}
    if presets:
        more["presets"] = presets
    name = f"chat-{port}"
    proxy = StickyProxy(children, fleet.upstreams, affinity={"cookie": cookie}, probe=PROBE, more=more, name=name)
    url = f"https://b.test:{port}"
    yield Chat(proxy, url, embedding.embed(f"{url}/chat"))
    proxy.child.stop()


def served(presets: str | None, cookie: Mapping[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("chat", [(presets, cookie)], indirect=True, ids=[presets or "no preset"])


def talk(pages: list[CopilotPage], file: Path) -> list[int]:
    """Let all say three things, the last one with a file; return the process of each, which is one for each page."""
    for page in pages:
        page.open()
        page.say("message 1")
    pids = [page.pid_of_reply(1) for page in pages]
    for page in pages:
        page.say("message 2")
    assert [page.pid_of_reply(2) for page in pages] == pids
    for page in pages:
        page.attach(file)
        page.say("message 3")
    assert [page.pid_of_reply(3, files=1) for page in pages] == pids
    return pids


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file to attach."""
    path = tmp_path / "notes.txt"
    path.write_text("text " * 50_000)
    return path


def assert_each_was_with_one_process(pages: list[CopilotPage], pids: list[int], fleet: Fleet) -> None:
    assert set(pids) <= fleet.pids
    assert len(set(pids)) > 1
    for page in pages:
        page.tab.assert_undisturbed()
        statuses = page.socketio_statuses()
        assert statuses[0] == 200, "Chainlit's client begins with polling"
        assert statuses.count(101) == 1


@served(None, PARTITIONED)
def test_a_partitioned_cookie_keeps_each_visitor(chat: Chat, visitors: Visitors, fleet: Fleet, file: Path) -> None:
    pages = [chat.come(visitors) for _ in range(VISITORS)]
    pids = talk(pages, file)
    assert_each_was_with_one_process(pages, pids, fleet)
    for page in pages:
        lines = page.cookies_of_answers()
        assert lines
        for line in lines:
            assert {"SameSite=None", "Secure", "Partitioned"} <= set(line.split("; "))
        assert any(cookie.startswith(COOKIE) for cookie in page.cookies_sent)
    assert chat.proxy.metric("affinity_total", outcome="hit") > 0
    assert chat.proxy.metric("affinity_breaks_total") == 0


@served("chainlit", THIRD_PARTY)
def test_blocked_cookies_are_not_needed(chat: Chat, visitors: Visitors, fleet: Fleet, file: Path) -> None:
    pages = [chat.come(visitors) for _ in range(VISITORS)]
    pids = talk(pages, file)
    assert_each_was_with_one_process(pages, pids, fleet)
    for page in pages:
        assert page.cookies_of_answers()  # they were offered
        assert page.requests_sent > 10
        assert page.cookies_sent == []
    assert chat.proxy.metric("affinity_total", outcome="hit") == 0
    assert chat.proxy.metric("affinity_breaks_total") == 0


@served(None, THIRD_PARTY)
def test_without_the_preset_blocked_cookies_end_the_chat(chat: Chat, visitors: Visitors) -> None:
    """The control: this is what the other tests would see if neither cookie nor session were known."""
    pages = [chat.come(visitors) for _ in range(VISITORS)]
    for page in pages:
        page.load()
    for page in pages:
        page.tab.wait_until(page.is_refused, "the session is invalid")
        assert page.cookies_sent == []
