"""One process of the demo: its page, its sessions, its chat, and the ways in which it ends."""

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from stickyproxy.demo import app as demo_app
from stickyproxy.demo.app import LISTENING, DemoApp, Sessions, main

DEADLINE_S = 30.0

Client = TestClient[web.Request, web.Application]


class Recorder(DemoApp):
    """A demo app that writes down how it was asked to end, instead of ending the tests."""

    def __init__(self, name: str = "alpha", admin_url: str | None = None, token_delay_s: float = 0.0) -> None:
        self.asked = asyncio.Event()
        self.ends: list[str] = []
        super().__init__(
            name,
            admin_url=admin_url,
            stop=lambda: self._record("stop"),
            crash=lambda: self._record("crash"),
            token_delay_s=token_delay_s,
        )

    def _record(self, end: str) -> None:
        self.ends.append(end)
        self.asked.set()


async def boot_of(client: Client) -> dict[str, Any]:
    """Load the page and return the facts that it starts with."""
    async with client.get("/") as response:
        assert response.status == 200
        page = await response.text()
    found = re.search(r'<script id="boot" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    facts: dict[str, Any] = json.loads(found[1])
    return facts


async def receive_until(socket: aiohttp.ClientWebSocketResponse, kind: str) -> list[dict[str, Any]]:
    """Return the messages up to and with the first of this type."""
    messages: list[dict[str, Any]] = []
    async with asyncio.timeout(DEADLINE_S):
        while not messages or messages[-1]["type"] != kind:
            messages.append(await socket.receive_json())
    return messages


async def test_each_page_gets_a_session_of_its_own(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(Recorder(admin_url="http://127.0.0.1:9090").application())
    first, second = await boot_of(client), await boot_of(client)
    assert first["session"] != second["session"]
    assert {**first, "session": ""} == {
        "name": "alpha",
        "pid": os.getpid(),
        "session": "",
        "count": 0,
        "resumed": False,
        "admin": "http://127.0.0.1:9090",
    }


async def test_the_page_is_never_cached_and_asks_nothing_of_other_sites(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(Recorder().application())
    async with client.get("/") as response:
        page = await response.text()
        assert response.headers["Cache-Control"] == "no-store"
    assert re.findall(r'(?:src|href)="https?:|url\(|@import', page) == []


async def test_a_name_cannot_break_out_of_the_page(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(Recorder(name="</script><b>").application())
    assert (await boot_of(client))["name"] == "</script><b>"


async def test_healthz_says_which_process_answers(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(Recorder(name="beta").application())
    async with client.get("/healthz") as response:
        assert await response.json() == {"status": "ok", "name": "beta", "pid": os.getpid()}


async def test_the_chat_counts_and_streams_word_by_word(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(Recorder().application())
    session = (await boot_of(client))["session"]
    async with client.ws_connect(f"/ws?session={session}") as socket:
        hello, processes = await receive_until(socket, "processes")
        assert (hello["type"], hello["session"], hello["count"]) == ("hello", session, 0)
        assert processes["processes"] == [{"name": "alpha", "pid": os.getpid()}]
        answers: list[str] = []
        for count in (1, 2, 3, 4):
            await socket.send_str("is {this} safe?")
            messages = await receive_until(socket, "end")
            tokens = [message["token"] for message in messages if message["type"] == "token"]
            assert messages[0] == {"type": "count", "count": count}
            assert len(tokens) > 10
            answers.append("".join(tokens))
        assert all("alpha" in answer for answer in answers)
        assert "“is {this} safe?”" in answers[0]


async def test_a_session_outlives_its_socket(aiohttp_client: AiohttpClient) -> None:
    client = await aiohttp_client(Recorder().application())
    session = (await boot_of(client))["session"]
    async with client.ws_connect(f"/ws?session={session}") as socket:
        await receive_until(socket, "processes")
        await socket.send_str("hello")
        await receive_until(socket, "end")
    async with client.post(f"/session?resume={session}") as response:
        facts = await response.json()
        assert (facts["session"], facts["count"], facts["resumed"]) == (session, 1, True)
    async with client.ws_connect(f"/ws?session={session}") as socket:
        assert (await receive_until(socket, "hello"))[0]["count"] == 1


async def test_another_process_refuses_the_websocket(aiohttp_client: AiohttpClient) -> None:
    alpha = await aiohttp_client(Recorder("alpha").application())
    beta = await aiohttp_client(Recorder("beta").application())
    session = (await boot_of(alpha))["session"]
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await beta.ws_connect(f"/ws?session={session}")
    assert refusal.value.status == 403


async def test_another_process_gives_the_page_a_new_session(aiohttp_client: AiohttpClient) -> None:
    alpha = await aiohttp_client(Recorder("alpha").application())
    beta = await aiohttp_client(Recorder("beta").application())
    session = (await boot_of(alpha))["session"]
    async with beta.post(f"/session?resume={session}") as response:
        facts = await response.json()
    assert (facts["name"], facts["resumed"]) == ("beta", False)
    assert facts["session"] != session


async def test_stop_answers_and_then_ends_the_process(aiohttp_client: AiohttpClient) -> None:
    demo = Recorder()
    client = await aiohttp_client(demo.application())
    async with client.post("/stop") as response:
        assert await response.json() == {"name": "alpha", "pid": os.getpid()}
    async with asyncio.timeout(DEADLINE_S):
        await demo.asked.wait()
    assert demo.ends == ["stop"]


async def test_crash_ends_the_process(aiohttp_client: AiohttpClient) -> None:
    demo = Recorder()
    client = await aiohttp_client(demo.application())
    async with client.post("/crash"):
        assert demo.ends == ["crash"]


@pytest.mark.parametrize("path", ["/stop", "/crash"])
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_no_other_site_may_end_the_process(aiohttp_client: AiohttpClient, path: str, site: str) -> None:
    demo = Recorder()
    client = await aiohttp_client(demo.application())
    async with client.post(path, headers={"Sec-Fetch-Site": site}) as response:
        assert response.status == 403
    assert demo.ends == []


async def test_every_open_page_learns_which_processes_run(aiohttp_client: AiohttpClient) -> None:
    demo = Recorder()
    client = await aiohttp_client(demo.application())
    session = (await boot_of(client))["session"]
    async with client.ws_connect(f"/ws?session={session}") as socket:
        await receive_until(socket, "processes")
        await demo.show([{"name": "alpha", "pid": 1}, {"name": "beta", "pid": None}])
        [message] = await receive_until(socket, "processes")
    assert message["processes"][1] == {"name": "beta", "pid": None}


async def test_the_end_closes_with_1012_even_in_the_middle_of_an_answer(aiohttp_client: AiohttpClient) -> None:
    demo = Recorder(token_delay_s=0.01)
    client = await aiohttp_client(demo.application())
    session = (await boot_of(client))["session"]
    async with client.ws_connect(f"/ws?session={session}") as socket:
        await socket.send_str("hello")
        await receive_until(socket, "token")
        _, closed = await asyncio.gather(demo.end_chats(), until_closed(socket))
        assert closed == (1012, "app restarts")
        assert socket.close_code == 1012


async def test_a_page_that_goes_away_in_the_middle_of_an_answer_is_let_go(aiohttp_client: AiohttpClient) -> None:
    demo = Recorder(token_delay_s=0.001)
    client = await aiohttp_client(demo.application())
    session = (await boot_of(client))["session"]
    socket = await client.ws_connect(f"/ws?session={session}")
    await socket.send_str("hello")
    await receive_until(socket, "token")
    [chat] = demo._chats.values()
    await client.session.close()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.wait({chat})
    assert chat.cancelled() or chat.exception() is None
    assert demo._chats == {}


async def until_closed(socket: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str | None]:
    """Return the code and the reason that the socket is closed with."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            message = await socket.receive()
            if message.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}:
                return socket.close_code, message.extra


def test_the_session_unused_for_longest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_app, "SESSIONS_MAX", 2)
    sessions = Sessions()
    first, second = sessions.create(), sessions.create()
    assert sessions.find(first.id) is first
    third = sessions.create()
    assert sessions.find(second.id) is None
    assert sessions.find(first.id) is first
    assert sessions.find(third.id) is third


# The process itself


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[tuple[Process, str]]:
    """Run the app as a process of its own; yield it and where it says that it listens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "stickyproxy.demo.app", *arguments, stdin=PIPE, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = (await process.stdout.readline()).decode().strip()
        assert line.startswith(LISTENING)
        yield process, line.removeprefix(LISTENING)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def status_of(process: Process) -> int:
    """Wait for the process to end, and return its status."""
    async with asyncio.timeout(DEADLINE_S):
        return await process.wait()


@pytest.fixture
def free_port(unused_tcp_port: int) -> str:
    return str(unused_tcp_port)


async def test_sigterm_closes_every_page_with_1012(free_port: str) -> None:
    async with running("--port", free_port) as (process, url), aiohttp.ClientSession(url) as client:
        async with client.post("/session") as response:
            session = (await response.json())["session"]
        async with client.ws_connect(f"/ws?session={session}") as socket:
            await receive_until(socket, "processes")
            process.send_signal(signal.SIGTERM)
            assert await until_closed(socket) == (1012, "app restarts")
        assert await status_of(process) == 0


async def test_stop_ends_the_process_in_good_order(free_port: str) -> None:
    async with running("--port", free_port) as (process, url), aiohttp.ClientSession(url) as client:
        async with client.post("/stop") as response:
            assert (await response.json())["pid"] == process.pid
        assert await status_of(process) == 0


async def test_crash_is_an_abrupt_death(free_port: str) -> None:
    async with running("--port", free_port) as (process, url), aiohttp.ClientSession(url) as client:
        with pytest.raises(aiohttp.ClientError):
            await client.post("/crash")
        assert await status_of(process) == -signal.SIGKILL


async def test_it_serves_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "demo.sock"
    async with running("--uds", str(path), "--name", "beta") as (_, where):
        assert str(path) in where
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client,
            client.get("http://demo/healthz") as response,
        ):
            assert (await response.json())["name"] == "beta"


async def test_it_shows_what_standard_input_brings_and_ends_with_it(free_port: str) -> None:
    async with (
        running("--port", free_port, "--follow-stdin") as (process, url),
        aiohttp.ClientSession(url) as client,
    ):
        async with client.post("/session") as response:
            session = (await response.json())["session"]
        async with client.ws_connect(f"/ws?session={session}") as socket:
            await receive_until(socket, "processes")
            assert process.stdin is not None
            process.stdin.write(b'[{"name": "gamma", "pid": null}]\n')
            [message] = await receive_until(socket, "processes")
            assert message["processes"] == [{"name": "gamma", "pid": None}]
            process.stdin.close()
            assert (await until_closed(socket))[0] == 1012
        assert await status_of(process) == 0


def test_it_needs_to_know_where_to_listen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--port" in capsys.readouterr().err
