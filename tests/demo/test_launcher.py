"""The launcher of the demo: its apps come up, come back, and are gone with it."""

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from stickyproxy.demo import launcher
from stickyproxy.demo.launcher import NAMES, Demo, DemoError, banner

DEADLINE_S = 30.0


class Lines:
    """What the launcher says, line by line."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._queue: asyncio.Queue[str] = asyncio.Queue()

    def __call__(self, line: str) -> None:
        self.all.append(line)
        self._queue.put_nowait(line)

    async def until(self, pattern: str) -> str:
        """Wait for a line, not seen yet, that matches the pattern."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                line = await self._queue.get()
                if re.search(pattern, line):
                    return line


async def ask(url: str) -> dict[str, Any]:
    """Return what /healthz answers, on a connection of its own."""
    async with aiohttp.ClientSession() as client, client.get(f"{url}/healthz") as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def post(url: str) -> None:
    """Send a POST that may remain without answer."""
    async with aiohttp.ClientSession() as client:
        try:
            async with client.post(url):
                pass
        except aiohttp.ClientError:
            assert url.endswith("/crash")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_three_processes_answer_and_none_is_left_behind() -> None:
    lines = Lines()
    async with Demo(say=lines) as demo:
        answers = [await ask(url) for url in demo.urls]
        assert [answer["name"] for answer in answers] == ["alpha", "beta", "gamma"] == list(demo.names)
        pids = {answer["pid"] for answer in answers}
        assert len(pids) == len(set(demo.urls)) == 3
        assert all(os.getpgid(pid) == pid for pid in pids)
    assert not any(is_running(pid) for pid in pids)
    assert sum("| stopping" in line for line in lines.all) == 3
    for url in demo.urls:
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(url)


@pytest.mark.parametrize(("path", "ending"), [("/stop", "ended with status 0"), ("/crash", "was killed by SIGKILL")])
async def test_an_app_that_ended_comes_back_at_the_same_address(path: str, ending: str) -> None:
    lines = Lines()
    async with Demo(count=1, restart_delay_s=0.01, say=lines) as demo:
        [url] = demo.urls
        before = await ask(url)
        await lines.until("listening on")
        await post(url + path)
        assert (await lines.until("comes back")).endswith(f"{ending}; comes back in 0.01 s")
        await lines.until("listening on")
        after = await ask(url)
        assert after["name"] == before["name"]
        assert after["pid"] != before["pid"]


async def test_an_app_that_is_away_refuses_connections_and_keeps_its_port() -> None:
    lines = Lines()
    async with Demo(count=1, restart_delay_s=3600, say=lines) as demo:
        [url] = demo.urls
        await post(url + "/crash")
        await lines.until("comes back")
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(url)
        with pytest.raises(OSError, match="in use"):
            await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", int(url.rpartition(":")[2]))


async def test_the_pages_see_an_app_leave_and_come_back() -> None:
    async with (
        Demo(count=2, restart_delay_s=0.01, admin_url="http://127.0.0.1:9090", say=Lines()) as demo,
        aiohttp.ClientSession(demo.urls[0]) as client,
        client.post("/session") as response,
    ):
        facts = await response.json()
        assert facts["admin"] == "http://127.0.0.1:9090"
        old = (await ask(demo.urls[1]))["pid"]
        seen: list[int | None] = []
        async with client.ws_connect(f"/ws?session={facts['session']}") as socket, asyncio.timeout(DEADLINE_S):
            await post(demo.urls[1] + "/crash")
            while not (None in seen and seen[-1] is not None):
                message = await socket.receive_json()
                if message["type"] == "processes":
                    seen.append({item["name"]: item["pid"] for item in message["processes"]}.get("beta"))
        assert seen[-1] not in {None, old}


async def test_no_app_outlives_a_launcher_that_was_killed() -> None:
    program = """
import asyncio, json
from stickyproxy.demo.launcher import Demo
async def main():
    async with Demo(count=2, say=lambda line: None) as demo:
        print(json.dumps(demo.urls), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as client:
        urls: list[str] = json.loads(await process.stdout.readline())
        sockets: list[aiohttp.ClientWebSocketResponse] = []
        for url in urls:
            async with client.post(f"{url}/session") as response:
                session = (await response.json())["session"]
            sockets.append(await client.ws_connect(f"{url}/ws?session={session}"))
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        assert [await close_code(socket) for socket in sockets] == [1012, 1012]


async def close_code(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    """Wait until the socket is closed, and return the code."""
    while not socket.closed:
        await socket.receive()
    return socket.close_code


async def test_an_app_that_cannot_start_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DemoError, match="ended with status 1 before it listened"):
        async with Demo(count=2, say=Lines()):
            pytest.fail("nothing listens")


def stand_in(path: Path, script: str) -> str:
    """Write a shell script to run instead of Python, and return its path."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_an_app_that_never_listens_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path / "python", "exec sleep 3600"))
    monkeypatch.setattr(launcher, "START_TIMEOUT_S", 0.05)
    with pytest.raises(DemoError, match="did not listen within 0 s: alpha, beta"):
        async with Demo(count=2, say=Lines()):
            pytest.fail("nothing listens")


async def test_an_app_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "trap '' TERM; echo listening on nothing; exec sleep 3600"
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path / "python", script))
    monkeypatch.setattr(launcher, "STOP_TIMEOUT_S", 0.05)
    lines = Lines()
    async with Demo(count=1, say=lines):
        found = re.search(r"pid (\d+)", await lines.until("listening on"))
    assert found is not None
    assert not is_running(int(found[1]))


async def test_an_error_inside_still_ends_the_apps() -> None:
    pids: list[int] = []

    async def fail_inside() -> None:
        async with Demo(count=1, say=Lines()) as demo:
            pids.append((await ask(demo.urls[0]))["pid"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_inside()
    assert [is_running(pid) for pid in pids] == [False]


def test_it_runs_on_uvloop() -> None:
    async def restart_once() -> int:
        lines = Lines()
        async with Demo(count=1, restart_delay_s=0.01, say=lines) as demo:
            await lines.until("listening on")
            await post(demo.urls[0] + "/crash")
            await lines.until("listening on")
            pid: int = (await ask(demo.urls[0]))["pid"]
            return pid

    assert not is_running(uvloop.run(restart_once()))


async def test_lines_go_to_standard_error_with_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    async with Demo(count=1):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("alpha   | listening on http://127.0.0.1:")


@pytest.mark.parametrize("count", [0, len(NAMES) + 1])
def test_the_number_of_apps_has_bounds(count: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 8"):
        Demo(count=count)


def test_the_banner_says_where_to_look_and_how_to_stop() -> None:
    text = banner("http://127.0.0.1:8080/", "http://127.0.0.1:9090/", ["alpha", "beta", "gamma"])
    for part in (
        "http://127.0.0.1:8080/",
        "http://127.0.0.1:9090/metrics",
        "3 stateful app processes (alpha, beta and gamma)",
        "private window",
        "Ctrl-C",
    ):
        assert part in text


def test_the_banner_speaks_of_one_process_in_the_singular() -> None:
    assert "1 stateful app process (alpha)" in banner("http://a/", "http://b", ["alpha"])
