"""The share of sessions that work: what is counted, and a short run with its control."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from tests.bench.programs import ROOT
from tests.bench.sessions import __main__ as command_line
from tests.bench.sessions.__main__ import Plan, Row, cells, is_shown, write_report
from tests.bench.sessions.browser import Browser, Outcome
from tests.bench.sessions.servers import SERVERS, Pythons
from tests.helpers.apps import CHAINLIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SID = "abc"
HANDSHAKE = f"0{json.dumps({'sid': SID, 'upgrades': ['websocket']})}"


class Site:
    """What answers like Chainlit, as far as a client sees; `refuse` names what it answers with 400 so many times."""

    def __init__(self) -> None:
        self.url = ""
        self.refuse: dict[str, int] = {}
        self.asked: list[str] = []
        self._replies = iter(["40{}", "6", '42["new_message", {"output": "reply 1 pid=7"}]'])

    def _is_refused(self, what: str) -> bool:
        self.asked.append(what)
        self.refuse[what] = self.refuse.get(what, 0) - 1
        return self.refuse[what] >= 0

    async def page(self, _: web.Request) -> web.Response:
        return web.Response(status=400 if self._is_refused("page") else 200)

    async def cookie(self, request: web.Request) -> web.Response:
        response = web.Response()
        response.set_cookie("X-Chainlit-Session-id", (await request.json())["session_id"])
        return response

    async def socket(self, request: web.Request) -> web.StreamResponse:
        assert "X-Chainlit-Session-id" in request.cookies
        if request.query["transport"] == "websocket":
            return web.Response(status=403) if self._is_refused("websocket") else await self._talk(request)
        what = request.method if "sid" in request.query else "handshake"
        if self._is_refused(what):
            return web.Response(status=400)
        if what == "handshake":
            self._replies = iter(["40{}", "6", '42["new_message", {"output": "reply 1 pid=7"}]'])
            return web.Response(text=HANDSHAKE)
        return web.Response(text="ok" if what == "POST" else next(self._replies))

    async def _talk(self, request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        async for message in websocket:
            if message.data == "2probe":
                await websocket.send_str("3probe")
            elif "client_message" in message.data:
                await websocket.send_str('42["new_message", {"output": "reply 1 pid=9"}]')
        return websocket


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_route("*", "/chat/ws/socket.io/", site.socket)
    app.router.add_post("/chat/set-session-cookie", site.cookie)
    app.router.add_get("/chat/{rest:.*}", site.page)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.url = "http://{}:{}".format(*runner.addresses[0][:2])
    yield site
    await runner.cleanup()


async def chat(site: Site, patience_s: float = 0.0, *, keeps_connections: bool = False) -> Outcome:
    async with Browser(site.url, keeps_connections=keeps_connections) as browser:
        return await browser.chat(patience_s, Random(1))


@pytest.mark.parametrize("connections", ["new", "kept"])
async def test_a_session_works_when_the_reply_arrives(site: Site, connections: str) -> None:
    outcome = await chat(site, keeps_connections=connections == "kept")
    assert outcome == Outcome(attempts=1, pid=9)
    assert outcome.works_at_once
    assert Counter(site.asked) == {"page": 4, "handshake": 1, "GET": 2, "POST": 1, "websocket": 1}


@pytest.mark.parametrize(
    ("what", "text"),
    [("page", "400 (page)"), ("handshake", "400 (handshake)"), ("GET", "400 (polling)"), ("POST", "400 (polling)")],
)
async def test_a_refusal_ends_the_attempt(site: Site, what: str, text: str) -> None:
    site.refuse = {what: 1}
    assert await chat(site) == Outcome(refusals=[text])


async def test_a_refused_websocket_leaves_polling(site: Site) -> None:
    site.refuse = {"websocket": 1}
    outcome = await chat(site)
    assert outcome == Outcome(attempts=1, pid=7, refusals=["403 (WebSocket)"])
    assert not outcome.works_at_once


async def test_the_client_begins_again(site: Site) -> None:
    site.refuse = {"POST": 1}
    outcome = await chat(site, 60.0)
    assert (outcome.attempts, outcome.refusals, outcome.works_at_once) == (2, ["400 (polling)"], False)


async def test_nobody_there_is_told() -> None:
    site = Site()
    site.url = "http://127.0.0.1:1"
    assert await chat(site) == Outcome(refusals=["ClientConnectorError (page)"])


def rows() -> list[Row]:
    good, late = Outcome(1, 11), Outcome(3, 12, ["400 (polling)", "403 (WebSocket)"])
    bad = Outcome(0, 0, ["403 (WebSocket)"])
    return [
        Row(SERVERS["uvicorn"], 2, [good, late, bad, bad]),
        Row(SERVERS["stickyproxy"], 2, [good, good]),
        Row(SERVERS["gunicorn"], 2, failure="not installed: pip"),
    ]


def test_the_table() -> None:
    uvicorn, sticky, gunicorn = rows()
    assert cells(uvicorn) == [
        "uvicorn --workers 2", "2", "2", "4", "1 (25%)", "2 (50%)", "403 (WebSocket): 2, 400 (polling): 1",
    ]  # fmt: skip
    assert cells(sticky)[2:] == ["1", "2", "2 (100%)", "2 (100%)", "-"]
    for is_markdown in (True, False):
        text = write_report([uvicorn, sticky, gunicorn], ["a fact"], is_markdown=is_markdown)
        assert text.startswith("- a fact\n\n")
        assert text.endswith("\ngunicorn: not installed: pip")
        assert ("| ---" in text) == is_markdown


def test_what_shows_nothing_is_told() -> None:
    uvicorn, sticky, gunicorn = rows()
    assert is_shown([uvicorn, sticky, gunicorn])
    assert not is_shown([replace(uvicorn, outcomes=uvicorn.outcomes[:1]), sticky])
    assert not is_shown([uvicorn, replace(sticky, outcomes=uvicorn.outcomes)])
    assert not is_shown([uvicorn, replace(sticky, outcomes=[], failure="it ended")])


def test_options() -> None:
    options = command_line.parse_options(["--servers=uvicorn,stickyproxy", "--clients=3"])
    assert (options.servers, options.clients, options.processes) == (["uvicorn", "stickyproxy"], 3, Plan.processes)
    for wrong in (["--servers=x"], ["--clients=0"], ["--patience=-1"]):
        with pytest.raises(SystemExit) as ended:
            command_line.parse_options(wrong)
        assert ended.value.code == 2


def test_gunicorn_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    nowhere = Pythons(tmp_path / "chainlit", tmp_path / "gunicorn")
    assert [name for name, server in SERVERS.items() if server.is_installed(nowhere)] == []


def test_without_chainlit_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([f"--chainlit={tmp_path / 'python'}"]) == 2
    assert "pip install -r tests/end_to_end/requirements-chainlit.txt" in capsys.readouterr().err


@pytest.mark.load
def test_sessions_work_behind_the_proxy_and_not_behind_processes_that_share_a_port(tmp_path: Path) -> None:
    """The control is uvicorn: were nothing sticky, or nothing counted, the two would be the same."""
    python = CHAINLIT.interpreter()
    words = ["--servers=stickyproxy,uvicorn", "--processes=2", "--clients=12", "--patience=0", f"--chainlit={python}"]
    command = [sys.executable, "-m", "tests.bench.sessions", *words, f"--directory={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=400, cwd=ROOT, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"stickyproxy run -w 2 .* 12 \(100%\) +12 \(100%\) +-\n", done.stdout)
    at_once = re.search(r"uvicorn --workers 2 +2 +[0-2] +12 +([0-9]+) \(.* 400 \(polling\): [0-9]+", done.stdout)
    assert at_once
    assert int(at_once[1]) < 12
