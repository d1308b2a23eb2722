"""The proxy runs the app itself: processes come, crash, are replaced, scaled and deployed, and no session is lost."""

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.tasks import spawn
from tests.helpers.operated import Proxy
from tests.helpers.plain_client import PlainClient
from tests.helpers.run_stage import RunStage, states
from tests.helpers.supervised import DEADLINE_S, SECRET, Tunnel, until

TUNNELS = 12


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RunStage]:
    async with RunStage(tmp_path) as stage:
        yield stage


class Visitor:
    """A browser with the affinity cookie and one tunnel."""

    _numbers = itertools.count(1)

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._name = f"visitor-{next(self._numbers)}"
        self._cookie: str | None = None
        self.tunnel: Tunnel | None = None

    async def ask(self, path: str = "/") -> dict[str, Any]:
        """Ask; return what the app says of itself and of this visitor."""
        async with await PlainClient.connect(self._proxy.port) as client:
            cookie = {} if self._cookie is None else {"Cookie": self._cookie}
            answer = await client.ask(path, fields={"X-Visitor": self._name} | cookie)
        assert answer.status == 200, answer
        self._cookie = answer.cookie or self._cookie
        facts: dict[str, Any] = json.loads(answer.body)
        return facts

    async def open_tunnel(self) -> Tunnel:
        self.tunnel = await self._proxy.open_tunnel(self._cookie)
        return self.tunnel


async def arrive(proxy: Proxy, count: int = TUNNELS) -> list[Visitor]:
    """Let visitors come, each with a session in the app and a tunnel."""
    visitors = [Visitor(proxy) for _ in range(count)]
    for visitor in visitors:
        first = await visitor.ask()
        tunnel = await visitor.open_tunnel()
        assert tunnel.app == first["id"]
    return visitors


async def until_both_take_clients(proxy: Proxy) -> None:
    """Let visitors come until there was one for each of the first two processes."""
    found = set[str]()
    async with asyncio.timeout(DEADLINE_S):
        while found != {"g1-1", "g1-2"}:
            [visitor] = await arrive(proxy, 1)
            assert visitor.tunnel is not None
            found.add(visitor.tunnel.app)


async def check_unmoved(visitors: list[Visitor], count: int, version: str = "1") -> None:
    """Check that each is where it was: the app has counted its requests."""
    for visitor in visitors:
        facts = await visitor.ask()
        assert (facts["count"], facts["version"]) == (count, version)
        assert visitor.tunnel is not None
        assert facts["id"] == visitor.tunnel.app
        await visitor.tunnel.echo()


# Running


@pytest.mark.parametrize("place", ["--port={port}", "--socket={socket}"])
async def test_the_app_runs_as_many_times_as_asked(stage: RunStage, place: str) -> None:
    proxy = await stage.run(3, place=place)
    await until_ready(proxy, 3)
    visitors = await arrive(proxy)
    assert {visitor.tunnel.app for visitor in visitors if visitor.tunnel} == {"g1-1", "g1-2", "g1-3"}
    await check_unmoved(visitors, 2)
    assert len(stage.app_processes()) == 3
    assert "g1-1 | listening" in proxy.log
    await proxy.stop()
    await stage.nothing_left()


async def until_so(look: Callable[[], Awaitable[object]]) -> None:
    """Wait until a look finds what it looks for."""
    async with asyncio.timeout(DEADLINE_S):
        while not await look():  # noqa: ASYNC110 -- it is so in another process
            await asyncio.sleep(0.05)


async def until_ready(proxy: Proxy, count: int) -> dict[str, dict[str, Any]]:
    """Wait until so many app processes take clients; return what the proxy says of all."""
    found: dict[str, dict[str, Any]] = {}

    async def look() -> bool:
        found.clear()
        found.update(await states(proxy))
        return [one["process"]["state"] for one in found.values()].count("ready") == count

    await until_so(look)
    return found


async def test_without_a_placeholder_the_variable_names_the_port(stage: RunStage) -> None:
    proxy = await stage.run(2, place="--fault=")
    await until_ready(proxy, 2)
    assert "neither {port} nor {socket}" in proxy.log
    await arrive(proxy, 2)
    await proxy.stop()


@pytest.mark.parametrize(
    ("command", "version", "status", "told"),
    [
        (["/no/such/program"], "1", 2, "no such file"),
        ([sys.executable, "-c", "import sys; print('my last words'); sys.exit(5)"], "1", 1, "exit status 5"),
        (None, "broken", 1, "this version cannot start"),
    ],
)
async def test_an_app_that_does_not_start_ends_the_proxy(
    stage: RunStage, command: list[str] | None, version: str, status: int, told: str
) -> None:
    stage.set_version(version)
    more: dict[str, Any] = {} if command is None else {"command": command}
    proxy = stage.begin_run(2, **more)
    assert await asyncio.to_thread(proxy.child.wait, 60) == status
    assert told in proxy.log.lower()
    assert "Traceback" not in proxy.log
    await stage.nothing_left()


async def test_an_app_that_listens_elsewhere_is_told_of(stage: RunStage) -> None:
    proxy = stage.begin_run(1, fault="elsewhere", ready={"timeout": "2s"})
    assert await asyncio.to_thread(proxy.child.wait, 60) == 1
    assert "does not get ready" in proxy.log
    await stage.nothing_left()


@pytest.mark.parametrize("fault", ["deaf", "children"])
async def test_nothing_is_left_of_an_app_that_ignores_the_signal(stage: RunStage, fault: str) -> None:
    proxy = await stage.run(2, fault=fault, stop={"timeout": "1s"})
    await until_ready(proxy, 2)
    await proxy.stop()
    await stage.nothing_left()


@pytest.mark.parametrize("fault", ["", "deaf", "children"])
async def test_nothing_is_left_when_the_supervisor_is_killed(stage: RunStage, fault: str) -> None:
    proxy = await stage.run(2, fault=fault, stop={"timeout": "1s"})
    await until_ready(proxy, 2)
    assert len(stage.app_processes()) >= 2
    os.kill(proxy.pid, signal.SIGKILL)
    await stage.nothing_left()


# A crash


async def test_one_that_is_killed_is_started_again_and_only_its_clients_are_placed_anew(stage: RunStage) -> None:
    proxy = await stage.run(3)
    known = await until_ready(proxy, 3)
    visitors = await arrive(proxy)
    victim = "g1-2"
    os.kill(known[victim]["process"]["pid"], signal.SIGKILL)
    await until(lambda: f"app process {victim} ended: killed by SIGKILL" in proxy.log)
    hit = [visitor for visitor in visitors if visitor.tunnel and visitor.tunnel.app == victim]
    others = [visitor for visitor in visitors if visitor not in hit]
    assert hit
    assert others
    for visitor in hit:
        facts = await visitor.ask()
        assert facts["pid"] != known[victim]["process"]["pid"]
    await check_unmoved(others, 2)
    after = await until_ready(proxy, 3)
    assert after[victim]["process"]["restarts"] == 1
    assert after[victim]["process"]["pid"] != known[victim]["process"]["pid"]
    await proxy.stop()
    await stage.nothing_left()


# A deploy


async def test_a_deploy_keeps_every_session_until_it_ends(stage: RunStage) -> None:
    proxy = await stage.run(3, affinity={"secrets": [SECRET], "session_idle": "10s"})
    old = await until_ready(proxy, 3)
    visitors = await arrive(proxy)
    stage.set_version("2")
    deploying = spawn(proxy.command("deploy", "--watch", "1s"), "deploy")
    await until_serving(proxy, "2")
    await check_unmoved(visitors, 2)
    news = await arrive(proxy, 6)
    for visitor in news:
        assert visitor.tunnel is not None
        assert visitor.tunnel.app.startswith("g2-")
    await check_unmoved(visitors, 3)
    assert not deploying.done()
    for visitor in visitors:
        await leave(visitor)
    # Their sessions end when nothing came for as long as the file says.
    done = await deploying
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(await until_ready(proxy, 3)) == {"g2-1", "g2-2", "g2-3"}
    await check_unmoved(news, 2, "2")
    await until(lambda: not {one["process"]["pid"] for one in old.values()} & stage.app_processes())
    await proxy.stop()
    await stage.nothing_left()


async def leave(visitor: Visitor) -> None:
    assert visitor.tunnel is not None
    visitor.tunnel.client._writer.transport.abort()


async def until_serving(proxy: Proxy, version: str) -> None:
    """Wait until new clients meet a version."""

    async def look() -> bool:
        return bool((await Visitor(proxy).ask())["version"] == version)

    await until_so(look)


async def test_at_the_drain_timeout_each_client_is_closed_once_and_lands_on_the_new_generation(stage: RunStage) -> None:
    proxy = await stage.run(2)
    await until_ready(proxy, 2)
    visitors = await arrive(proxy)
    stage.set_version("2")
    deploying = spawn(proxy.command("deploy", "--watch", "0.5s", "--drain-timeout", "1s", "--pace", "50/s"), "deploy")
    for visitor in visitors:
        assert visitor.tunnel is not None
        assert await visitor.tunnel.receive_close() == 1012
        visitor.tunnel.client._writer.transport.abort()
        facts = await visitor.ask()
        assert facts["version"] == "2"
        tunnel = await visitor.open_tunnel()
        assert tunnel.app == facts["id"]
    done = await deploying
    assert done.returncode == 0, done.stdout + done.stderr
    await check_unmoved(visitors, 2, "2")
    await proxy.stop()
    await stage.nothing_left()


async def test_a_response_under_way_is_not_cut_at_the_drain_timeout(stage: RunStage) -> None:
    proxy = await stage.run(1)
    await until_ready(proxy, 1)
    visitor = Visitor(proxy)
    await visitor.ask()
    holding = spawn(visitor.ask("/hold?5"), "a slow response")
    stage.set_version("2")
    done = await proxy.command("deploy", "--watch", "0s", "--drain-timeout", "0s")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = await holding
    assert facts["version"] == "1"
    assert (await visitor.ask())["version"] == "2"
    await proxy.stop()


@pytest.mark.parametrize(
    ("version", "told"), [("broken", "this version cannot start"), ("late", "it crashed"), ("silent", "not get ready")]
)
async def test_a_version_that_cannot_serve_is_taken_back(stage: RunStage, version: str, told: str) -> None:
    proxy = await stage.run(2, ready={"timeout": "3s"})
    old = await until_ready(proxy, 2)
    visitors = await arrive(proxy)
    stage.set_version(version)
    done = await proxy.command("deploy", "--surge", "all", "--watch", "20s")
    assert done.returncode == 1, done.stdout + done.stderr
    assert told in done.stderr + done.stdout
    await check_unmoved(visitors, 2)
    await until_both_take_clients(proxy)
    now = await until_ready(proxy, 2)
    assert {one["process"]["pid"] for one in now.values()} == {one["process"]["pid"] for one in old.values()}
    await until(lambda: len(stage.app_processes()) == 2)
    await proxy.stop()
    await stage.nothing_left()


async def test_two_deploys_at_once_are_one_too_many(stage: RunStage) -> None:
    proxy = await stage.run(1)
    await until_ready(proxy, 1)
    assert (await proxy.command("deploy", "--watch", "30s", "--detach")).returncode == 0
    done = await proxy.command("deploy")
    assert done.returncode != 0
    assert "under way" in done.stderr
    await proxy.stop()
    await stage.nothing_left()


# Scale, restart, upgrade


async def test_scaling_down_ends_no_session(stage: RunStage) -> None:
    proxy = await stage.run(3)
    await until_ready(proxy, 3)
    visitors = await arrive(proxy, 3)
    assert (await proxy.command("scale", "5")).returncode == 0
    await until_ready(proxy, 5)
    assert (await proxy.command("scale", "2")).returncode == 0
    await until(lambda: len(stage.app_processes()) == 3, "the empty ones have ended; one with a session drains")
    await check_unmoved(visitors, 2)
    for visitor in visitors:
        await leave(visitor)
    await proxy.stop()
    await stage.nothing_left()


async def test_a_process_that_grows_is_replaced_without_a_lost_session(stage: RunStage) -> None:
    proxy = await stage.run(2, max_memory="150MiB")
    await until_ready(proxy, 2)
    visitors = await arrive(proxy, 4)
    grown = await visitors[0].ask("/grow?200")
    await until(lambda: f"app process {grown['id']} is replaced: it uses" in proxy.log)
    await until(lambda: len(stage.app_processes()) == 3)
    assert (await visitors[0].ask())["count"] == 3

    async def is_draining() -> bool:
        return bool((await states(proxy))[grown["id"]]["admin_state"] == "drain")

    await until_so(is_draining)
    await until_ready(proxy, 2)
    assert visitors[0].tunnel is not None
    await visitors[0].tunnel.echo()
    await proxy.stop()
    await stage.nothing_left()


async def test_an_upgrade_keeps_the_app_processes(stage: RunStage) -> None:
    proxy = await stage.run(2)
    before = await until_ready(proxy, 2)
    visitors = await arrive(proxy)
    for number in range(2, 4):
        await proxy.upgrade()
        after = await until_ready(proxy, 2)
        assert {name: one["process"]["pid"] for name, one in after.items()} == {
            name: one["process"]["pid"] for name, one in before.items()
        }
        await check_unmoved(visitors, number)
    os.kill(before["g1-1"]["process"]["pid"], signal.SIGKILL)
    await until(lambda: "app process g1-1 ended: killed by SIGKILL" in proxy.log)
    after = await until_ready(proxy, 2)
    assert after["g1-1"]["process"]["restarts"] == 1
    stage.set_version("2")
    done = await proxy.command("deploy", "--watch", "0s", "--drain-timeout", "0s", "--pace", "1000/s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (await Visitor(proxy).ask())["version"] == "2"
    await proxy.stop()
    await stage.nothing_left()


async def test_a_deploy_that_drains_goes_on_after_an_upgrade(stage: RunStage) -> None:
    proxy = await stage.run(2)
    await until_ready(proxy, 2)
    visitors = await arrive(proxy, 4)
    stage.set_version("2")
    assert (await proxy.command("deploy", "--watch", "0s", "--detach")).returncode == 0
    await until_serving(proxy, "2")

    async def is_upgraded() -> bool:  # once the deploy is decided
        return (await proxy.command("upgrade")).returncode == 0

    await until_so(is_upgraded)
    await check_unmoved(visitors, 2)
    for visitor in visitors:
        await leave(visitor)
    os.kill(proxy.pid, signal.SIGKILL)
    await stage.nothing_left()
