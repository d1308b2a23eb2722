"""`stickyproxy demo`, as a visitor meets it: the page, the chat, a process that ends, and Ctrl-C."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.helpers.plain_client import Answer, ask
from tests.helpers.processes import HTTP, Child, Children, free_port, http_status, wait_until

DEADLINE_S = 60.0


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


class RunningDemo:
    """A `stickyproxy demo` on free ports; `pids` are those of its apps."""

    def __init__(self, children: Children) -> None:
        self.port, self.admin_port = free_port(), free_port()
        addresses = ["--listen", f"127.0.0.1:{self.port}", "--admin", f"127.0.0.1:{self.admin_port}"]
        home = {"XDG_STATE_HOME": str(children.directory)}
        self.child: Child = children.start_stickyproxy("demo", "demo", *addresses, env=home)
        wait_until(lambda: "Ctrl-C stops" in self.log or not self.child.is_running(), "the demo greets")
        assert self.child.is_running(), self.log

    @property
    def log(self) -> str:
        return self.child.log.read_text()

    def pids(self) -> Mapping[str, int]:
        """Return the present process of each app, from what the launcher says."""
        return {
            name: int(pid)
            for name, pid in re.findall(r"^(\w+) +\| listening on .* \(pid (\d+)\)$", self.log, re.MULTILINE)
        }

    def metrics(self) -> str:
        with HTTP.open(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=DEADLINE_S) as response:
            return str(response.read().decode())


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Visitor:
    """A browser with the page open; a context manager that closes the chat."""

    def __init__(self, demo: RunningDemo) -> None:
        self._demo = demo
        self.cookie = ""
        self.facts: Mapping[str, Any] = {}
        self._chat: ClientConnection | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._chat is not None:
            await self._chat.close()

    @property
    def pid(self) -> int:
        return int(self.facts["pid"])

    async def open_page(self) -> Answer:
        answer = await ask(self._demo.port, "/", fields={"Cookie": self.cookie} if self.cookie else None)
        self.cookie = answer.cookie or self.cookie
        assert answer.status == 200
        assert answer.fields["content-type"].startswith("text/html")
        [facts] = re.findall(r'id="boot"[^>]*>(.*?)</script>', answer.body.decode(), re.DOTALL)
        self.facts = json.loads(facts)
        return answer

    async def open_chat(self) -> None:
        url = f"ws://127.0.0.1:{self._demo.port}/ws?session={self.facts['session']}"
        self._chat = await connect(
            url, additional_headers={"Cookie": self.cookie}, proxy=None, open_timeout=DEADLINE_S, compression=None
        )

    async def say(self, text: str) -> int:
        """Send a message, wait until the answer has come whole, and return what the app's counter says."""
        assert self._chat is not None
        count, words = 0, ""
        async with asyncio.timeout(DEADLINE_S):
            await self._chat.send(text)
            while (message := json.loads(await self._chat.recv()))["type"] != "end":
                count = message.get("count", count) if message["type"] == "count" else count
                words += message.get("token", "")
        assert str(self.facts["name"]) in words
        return count

    async def wait_closed(self) -> int | None:
        """Return the code of the Close frame that ends the chat."""
        assert self._chat is not None
        async with asyncio.timeout(DEADLINE_S):
            try:
                while True:
                    await self._chat.recv()
            except ConnectionClosed as error:
                return error.rcvd.code if error.rcvd is not None else None


async def find_visitors(demo: RunningDemo) -> list[Visitor]:
    """Return a visitor of each process: who comes new is placed where the fewest are."""
    visitors = [Visitor(demo) for _ in range(3)]
    for visitor in visitors:
        assert (await visitor.open_page()).cookie is not None
    assert {visitor.facts["name"] for visitor in visitors} == {"alpha", "beta", "gamma"}
    return visitors


async def test_a_visit(children: Children) -> None:
    demo = await asyncio.to_thread(RunningDemo, children)
    assert f"http://127.0.0.1:{demo.port}\n" in demo.log
    assert f"http://127.0.0.1:{demo.admin_port}/metrics\n" in demo.log
    pids = demo.pids()
    assert pids.keys() == {"alpha", "beta", "gamma"}
    first, second, third = await find_visitors(demo)
    assert first.facts["admin"] == f"http://127.0.0.1:{demo.admin_port}"
    assert {visitor.pid for visitor in (first, second, third)} == set(pids.values())

    # Each has a counter of its own, in the memory of its process.
    async with first, second:
        for visitor in (first, second):
            await visitor.open_chat()
        assert list(await asyncio.gather(first.say("hello"), second.say("hello"))) == [1, 1]
        assert await first.say("again") == 2

        # A chat in the wrong process is refused, as the frameworks do it: the cookie is what holds it together.
        stray = Visitor(demo)
        stray.facts, stray.cookie = first.facts, second.cookie
        with pytest.raises(InvalidStatus) as refused:
            await stray.open_chat()
        assert refused.value.response.status_code == 403

        # One process ends: its visitor is told, and finds another; the others notice nothing.
        stopped = await ask(demo.port, "/stop", method="POST", fields={"Cookie": first.cookie})
        assert json.loads(stopped.body)["pid"] == first.pid
        assert await first.wait_closed() == 1012
        await asyncio.to_thread(wait_until, lambda: not is_running(pids[first.facts["name"]]), "the process is gone")
        before = first.facts
        answer = await first.open_page()
        assert first.pid != before["pid"]
        is_moved = first.facts["name"] != before["name"]
        assert (answer.cookie is not None) == is_moved
        await first.open_chat()
        assert list(await asyncio.gather(first.say("hello"), second.say("again"))) == [1, 2]
        assert second.pid == pids[second.facts["name"]]
        await third.open_page()
        assert third.pid == pids[third.facts["name"]]

        # It comes back, at the same address, and is another process.
        await asyncio.to_thread(wait_until, lambda: demo.pids()[before["name"]] != before["pid"], "it comes back")
        breaks = re.findall(r"^stickyproxy_affinity_breaks_total{.*} (.*)$", demo.metrics(), re.MULTILINE)
        assert sum(map(float, breaks)) == is_moved

        # Ctrl-C in the terminal ends all.
        demo.child.send(signal.SIGINT)
        assert await first.wait_closed() == 1001
    assert await asyncio.to_thread(demo.child.wait, DEADLINE_S) == 0
    assert not [pid for pid in {*pids.values(), *demo.pids().values()} if is_running(pid)]
    assert http_status(f"http://127.0.0.1:{demo.port}/") is None
    assert "Traceback" not in demo.log


async def test_no_app_outlives_a_demo_that_is_killed(children: Children) -> None:
    demo = await asyncio.to_thread(RunningDemo, children)
    pids = demo.pids()
    assert len(pids) == 3
    demo.child.send(signal.SIGKILL)
    demo.child.wait()
    await asyncio.to_thread(wait_until, lambda: not any(map(is_running, pids.values())), "all apps have ended")


def test_a_demo_that_cannot_listen_leaves_no_app_behind(children: Children) -> None:
    demo = RunningDemo(children)
    addresses = ["--listen", f"127.0.0.1:{demo.port}", "--admin", f"127.0.0.1:{free_port()}"]
    second = children.start_stickyproxy("second", "demo", *addresses)
    assert second.wait(DEADLINE_S) == 2
    output = second.log.read_text()
    assert f"stickyproxy: cannot listen on 127.0.0.1:{demo.port}: the address is in use" in output
    assert "Traceback" not in output
    pids = re.findall(r"\(pid (\d+)\)", output)
    assert len(pids) == 3
    assert not [pid for pid in map(int, pids) if is_running(pid)]
    assert http_status(f"http://127.0.0.1:{demo.port}/") == 200
