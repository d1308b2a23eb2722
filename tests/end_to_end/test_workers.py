"""Two workers behind one address: what one's death costs, what is counted over both, and how new clients are spread."""

import asyncio
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stickyproxy.tasks import spawn
from tests.helpers.operated import Proxy, Stage, until_so
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.proc import listens, ports_held, zombies_of
from tests.helpers.supervised import until

CLIENTS = 16
BEFORE, AFTER = 200, 400  # requests before the kill, and in all
SHARED, PARALLEL = 12, 6  # clients, and the connections of each
MOST = 300  # clients, until one of them has connections to both workers
NEW = 40


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(tmp_path) as stage:
        yield stage


def own_port(client: PlainClient) -> int:
    return int(client._writer.get_extra_info("sockname")[1])


async def index_of(proxy: Proxy, process_id: int) -> str:
    [index] = [
        one["index"] for one in json.loads(await proxy.get("/api/v1/state"))["workers"] if one["pid"] == process_id
    ]
    return str(index)


class Load:
    """Clients that ask again and again, each over one connection until that breaks."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._numbers = itertools.count()
        self.answered = 0
        self.aborted: list[int] = []  # ports of connections that broke
        self.refused = 0
        self.is_over = False

    async def run(self) -> None:
        while not self.is_over:
            try:
                client = await self._proxy.connect()
            except OSError:
                self.refused += 1
                continue
            port = own_port(client)
            try:
                while not self.is_over:
                    answer = await client.ask("/", fields={"X-Id": str(next(self._numbers))})
                    assert answer.status == 200
                    self.answered += 1
            except AbortedError:
                self.aborted.append(port)


async def test_a_worker_that_is_killed_takes_only_its_connections_along(stage: Stage) -> None:
    """It is replaced, and what it had counted is not lost; at no moment do the metrics fail."""
    app = await stage.app()
    proxy = await stage.serve(app)
    tunnels = [await proxy.open_tunnel() for _ in range(CLIENTS)]
    load = Load(proxy)
    tasks = [spawn(load.run(), "load") for _ in range(CLIENTS)]
    await until(lambda: load.answered > BEFORE, "there is a load")
    before = proxy.workers
    victim = max(before, key=lambda one: len(ports_held(one, proxy.port)))
    os.kill(victim, signal.SIGSTOP)  # so that nothing changes between the look and the kill
    doomed = ports_held(victim, proxy.port)
    began_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    scrapes = 0
    while not is_replaced(proxy, victim, before - {victim}):
        for path in ("/metrics", "/api/v1/state"):
            await proxy.get(path)
            scrapes += 1
    print(f"the worker was replaced within {time.monotonic() - began_s:.2f} s, with {scrapes} scrapes meanwhile")
    await until(lambda: load.answered > AFTER, "the load goes on")
    load.is_over = True
    await asyncio.gather(*tasks)
    assert scrapes
    assert load.refused == 0
    assert set(load.aborted) <= doomed
    ended = 0
    for tunnel in tunnels:
        if own_port(tunnel.client) in doomed:
            assert await tunnel.client.receive_end() == b""
            ended += 1
        else:
            await tunnel.echo()
    assert len(load.aborted) + ended == len(doomed)
    await until_counted(proxy, load.answered, len(load.aborted))
    assert max(app.ids.values()) == 1
    await proxy.until_metric("worker_restarts_total", 1)
    await proxy.until_metric("tunnels_total", CLIENTS)
    await proxy.until_metric("tunnels_open", CLIENTS - ended)
    assert zombies_of(proxy.pid) == set()
    await proxy.stop()


def is_replaced(proxy: Proxy, victim: int, others: set[int]) -> bool:
    now = proxy.workers
    return victim not in now and len(now) == 2 and all(listens(one, proxy.port) for one in now - others)


async def until_counted(proxy: Proxy, answered: int, aborted: int) -> None:
    """Wait until all answers are counted, give or take those of the connections that were cut."""

    async def is_so() -> bool:
        return abs(await proxy.metric("exchanges_total", status_class="2xx") - answered) <= aborted

    await until_so(is_so)


async def test_when_the_supervisor_is_killed_no_process_is_left(stage: Stage) -> None:
    app = await stage.app()
    proxy = await stage.serve(app, workers=3)
    tunnel, held = await proxy.open_tunnel(), await proxy.connect()
    held.send("/hold")
    await until(lambda: app.waiting["/hold"] == 1, "an exchange is under way")
    assert len(proxy.processes) == 4
    os.kill(proxy.pid, signal.SIGKILL)
    assert await tunnel.receive_close() == 1012
    app.gate.set()
    await until(lambda: not proxy.processes, "no process is left")


async def test_a_worker_that_stands_still_is_seen(stage: Stage) -> None:
    """It is not ended: its clients would lose their connections. The other one serves."""
    app = await stage.app()
    proxy = await stage.serve(app)
    tunnels = [await proxy.open_tunnel() for _ in range(CLIENTS)]
    for tunnel in tunnels:
        await tunnel.echo()
    before = proxy.workers
    victim, other = sorted(before, key=lambda one: len(ports_held(one, proxy.port)), reverse=True)
    assert len(before) == 2

    async def have_ticked() -> bool:
        return sum(name == "worker_last_tick_age_seconds" for name, _ in await proxy.samples()) == 2

    await until_so(have_ticked)
    stopped, running = await index_of(proxy, victim), await index_of(proxy, other)
    os.kill(victim, signal.SIGSTOP)
    try:

        async def is_seen() -> bool:
            return await proxy.metric("worker_last_tick_age_seconds", worker=stopped) > 3

        await until_so(is_seen)

        async def is_fresh() -> bool:
            return await proxy.metric("worker_last_tick_age_seconds", worker=running) < 3

        await until_so(is_fresh)
        assert (await proxy.ask())[0] == 200
    finally:
        os.kill(victim, signal.SIGCONT)

    async def is_back() -> bool:
        return await proxy.metric("worker_last_tick_age_seconds", worker=stopped) < 3

    await until_so(is_back)
    assert proxy.workers == before
    for tunnel in tunnels:
        await tunnel.echo()
    await proxy.stop()


async def test_a_client_with_connections_to_both_workers_is_one_session(stage: Stage) -> None:
    app = await stage.app()
    proxy = await stage.serve(app)
    clients: list[list[PlainClient]] = []
    workers, shared = proxy.workers, 0
    while len(clients) < SHARED or (not shared and len(clients) < MOST):  # who accepts is as it happens
        first = await proxy.connect()
        cookie = (await first.ask("/")).cookie
        assert cookie is not None
        clients.append([first, *[await proxy.connect() for _ in range(PARALLEL - 1)]])
        for client in clients[-1]:
            assert (await client.ask("/", fields={"Cookie": cookie})).status == 200
        held = {one: ports_held(one, proxy.port) for one in workers}
        owners = {one for one in workers for link in clients[-1] if own_port(link) in held[one]}
        shared += len(owners) == 2
    assert shared, "nobody had connections to both workers"
    await until_sessions(proxy, len(clients))
    await proxy.until_metric("exchanges_total", len(clients) * (PARALLEL + 1), status_class="2xx")


async def until_sessions(proxy: Proxy, count: int) -> None:
    async def is_so() -> bool:
        return await proxy.metric("sessions_active") == count

    await until_so(is_so)


async def test_new_clients_are_spread_evenly_whichever_worker_they_come_to(stage: Stage) -> None:
    """Each worker knows of the other's clients: alone it would place its own half of them at either app."""
    apps = [await stage.app("one"), await stage.app("two")]
    proxy = await stage.serve(*apps)
    first, second = sorted(proxy.workers)
    await proxy.set_state("two", "drain")
    with standing_still(second):
        await come(proxy, "one")
        assert len(ports_held(first, proxy.port)) == NEW // 2
    await proxy.set_state("two", "ready")
    with standing_still(first):
        await come(proxy, "two")
        assert len(ports_held(second, proxy.port)) == NEW // 2
    await proxy.stop()


@contextmanager
def standing_still(process_id: int) -> Iterator[None]:
    """Let a process stand still meanwhile."""
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


async def come(proxy: Proxy, app: str) -> None:
    """Let half of the new clients come, who are all placed at one app."""
    tunnels = [await proxy.open_tunnel() for _ in range(NEW // 2)]
    assert Counter(tunnel.app for tunnel in tunnels) == {app: NEW // 2}
