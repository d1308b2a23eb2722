"""Faults of what the proxy itself stands on: descriptors, memory, the clock, the log, its own life.

The proxy and the apps are processes of their own; clients and apps note the ids of the requests.
"""

import asyncio
import base64
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typing_extensions import override
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.helpers.apps import lacking
from tests.helpers.counting import CountingApps
from tests.helpers.fault_client_app import FRAME, FaultApp
from tests.helpers.fault_client_load import Transfer, ask_each, ask_pipelined, new_ids
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.proc import cpu_s, descriptors, memory_kib
from tests.helpers.processes import Children, ChildrenUnder, StickyProxy, free_port, wait_until
from tests.helpers.raw import eventually
from tests.helpers.serving import can_listen

DEADLINE_S = 120.0
HOUR_S = 3600
WEBSOCKETS = Path(__file__).parents[1] / "helpers" / "fault_proxy_websockets.py"


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
async def app() -> AsyncIterator[FaultApp]:
    async with FaultApp() as app, asyncio.timeout(DEADLINE_S):
        yield app


async def open_tunnel(proxy: StickyProxy, client: str, cookie: str | None = None) -> ClientConnection:
    fields = {"X-Client": client, **({"Cookie": cookie} if cookie else {})}
    url = f"ws://127.0.0.1:{proxy.port}/ws"
    return await connect(url, additional_headers=fields, proxy=None, open_timeout=DEADLINE_S, ping_interval=None)


async def echo(tunnel: ClientConnection, text: str) -> int:
    """Send a message and return which one of this client's the app says it is."""
    await tunnel.send(text)
    _, _, count, said = str(await tunnel.recv()).split(" ", 3)
    assert said == text
    return int(count)


# Out of descriptors

FEW = 128
CROWD = 200
TUNNELS = 10
WINDOW_S = 3.0


@dataclass
class Crowd:
    """Clients that each send one POST, which the app holds; `answers` has a status, or what went wrong, by id.

    They keep their connections when they are answered, until they `leave`.
    """

    proxy: StickyProxy
    apps: CountingApps
    tunnels: list[ClientConnection]
    clients: dict[str, PlainClient] = field(default_factory=dict)
    answers: dict[str, int | str] = field(default_factory=dict)
    receiving: list[asyncio.Task[None]] = field(default_factory=list)

    async def arrive(self, number: int) -> None:
        """Let clients connect, each send its request, and wait until the proxy takes no more of them."""
        for request_id in new_ids(number, "crowd"):
            client = self.clients[request_id] = await PlainClient.connect(self.proxy.port)
            client.send("/hold/gate", method="POST", fields={"X-Id": request_id})
            self.receiving.append(asyncio.get_running_loop().create_task(self._receive(request_id)))
        looks: list[tuple[int, int]] = []

        def is_still() -> bool:
            looks.append((len(self.answers), descriptors(self.proxy.worker)))
            return len(looks) > 20 and len(set(looks[-20:])) == 1

        await eventually(is_still, "the proxy has taken those that it takes", look_s=0.05)

    async def _receive(self, request_id: str) -> None:
        try:
            self.answers[request_id] = (await self.clients[request_id].receive()).status
        except AbortedError as error:
            self.answers[request_id] = f"aborted: {error}"
        except TimeoutError:
            self.answers[request_id] = "nothing"

    async def release(self) -> None:
        """Let the app answer those that it holds, and from now on all at once."""
        await asyncio.to_thread(self.apps.release, "alpha", "gate")

    async def leave(self) -> None:
        """Close the connections of those who have their answer."""
        for request_id in self.answers:
            if (client := self.clients.pop(request_id, None)) is not None:
                await client.__aexit__(None, None, None)

    async def leave_until_all_are_answered(self) -> None:
        """Let each leave who has an answer, which makes room for others."""
        while len(self.answers) < len(self.receiving):
            before = len(self.answers)
            await self.leave()
            await eventually(lambda before=before: len(self.answers) > before, "somebody is answered")  # type: ignore[misc]
        await self.leave()

    async def end(self) -> None:
        """End all, answered or not."""
        for task in self.receiving:
            task.cancel()
        await asyncio.gather(*self.receiving, return_exceptions=True)
        for client in self.clients.values():
            await client.__aexit__(None, None, None)

    @override
    def __repr__(self) -> str:
        waiting = len(self.receiving) - len(self.answers)
        return f"<Crowd {dict(Counter(self.answers.values()))}, {waiting} wait>"


@asynccontextmanager
async def crowded(children: Children, limit: int) -> AsyncIterator[Crowd]:
    """Run a proxy with so many descriptors, open tunnels, and then let the crowd come that is too large for 128."""
    apps = await asyncio.to_thread(CountingApps, children, "alpha")
    prefix = ["prlimit", f"--nofile={limit}"]
    async with AsyncExitStack() as stack:
        limited = stack.enter_context(ChildrenUnder(children.directory, prefix))
        proxy = await asyncio.to_thread(StickyProxy, limited, apps.upstreams)
        assert resource.prlimit(proxy.worker, resource.RLIMIT_NOFILE) == (limit, limit)
        tunnels = [
            await stack.enter_async_context(await open_tunnel(proxy, f"tunnel-{number}")) for number in range(TUNNELS)
        ]
        crowd = Crowd(proxy, apps, tunnels)
        for tunnel in tunnels:
            assert await echo(tunnel, "before") == 1
        stack.push_async_callback(crowd.end)
        await crowd.arrive(CROWD)
        yield crowd


async def use_tunnels(crowd: Crowd, seconds: float) -> tuple[float, float]:
    """Let the tunnels echo now and then for a while; return the CPU seconds and the seconds that it took."""
    before_s, began = used_by(crowd.proxy), time.monotonic()
    number = 1
    while time.monotonic() - began < seconds:
        number += 1
        for tunnel in crowd.tunnels:
            assert await echo(tunnel, f"message {number}") == number
        await asyncio.sleep(0.1)
    return used_by(crowd.proxy) - before_s, time.monotonic() - began


def used_by(proxy: StickyProxy) -> float:
    return sum(map(cpu_s, (proxy.child.pid, proxy.worker)))


async def test_out_of_descriptors_open_connections_live_and_no_loop_is_busy(children: Children) -> None:
    async with asyncio.timeout(DEADLINE_S), crowded(children, FEW) as crowd:
        used_s, took_s = await use_tunnels(crowd, WINDOW_S)
        print(f"{crowd}, {descriptors(crowd.proxy.worker)} of {FEW} descriptors, "
              f"{used_s:.2f} s of CPU in {took_s:.1f} s")  # fmt: skip
        assert used_s < 0.5 * took_s
        assert crowd.answers == {}  # nobody was refused or cut
        assert 0 < sum(crowd.apps.received().values()) < CROWD


async def test_out_of_descriptors_the_proxy_accepts_again_and_nobody_is_lost(children: Children) -> None:
    async with asyncio.timeout(DEADLINE_S), crowded(children, FEW) as crowd:
        taken = sum(crowd.apps.received().values())
        await crowd.release()
        await eventually(lambda: len(crowd.answers) >= taken, "those that were held are answered")
        before, began = len(crowd.answers), time.monotonic()
        assert before < CROWD
        await crowd.leave()
        await eventually(lambda: len(crowd.answers) > before, "somebody else is answered")
        print(f"accepted again after {time.monotonic() - began:.2f} s; {taken} were taken before")
        await crowd.leave_until_all_are_answered()
        # Each request is answered, none is refused or cut, and each reached the app once.
        assert crowd.answers == dict.fromkeys(crowd.answers, 200)
        assert len(crowd.answers) == CROWD
        assert crowd.apps.received() == {("POST", request_id): 1 for request_id in crowd.answers}
        for tunnel in crowd.tunnels:
            assert await echo(tunnel, "after") == 2


async def test_out_of_descriptors_a_metric_says_so(children: Children) -> None:
    async with asyncio.timeout(DEADLINE_S), crowded(children, FEW) as crowd:
        assert "stickyproxy_accepting" in {sample.name for sample in crowd.proxy.metrics()}
        assert crowd.proxy.metric("accepting") == 0
        assert crowd.proxy.metric("accept_pauses_total") >= 1
        await crowd.release()
        await crowd.leave_until_all_are_answered()
        await eventually(lambda: crowd.proxy.metric("accepting") == 1, "it accepts again", look_s=0.1)


async def test_with_enough_descriptors_everybody_reaches_the_app_at_once(children: Children) -> None:
    """The control: it is the descriptors that make the crowd above wait."""
    async with asyncio.timeout(DEADLINE_S), crowded(children, 1024) as crowd:
        await asyncio.to_thread(crowd.apps.wait_until_held, "alpha", "gate", CROWD)
        assert descriptors(crowd.proxy.worker) > FEW
        assert crowd.proxy.metric("accept_pauses_total") == 0
        await crowd.release()
        await eventually(lambda: len(crowd.answers) == CROWD, "all are answered")
        assert crowd.answers == dict.fromkeys(crowd.clients, 200)


# Many idle WebSockets

IDLE = 9000
IDLE_KIB = 4.0


@pytest.mark.load
def test_an_idle_websocket_costs_little_and_all_answer_afterwards(children: Children) -> None:
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = IDLE if limit == resource.RLIM_INFINITY else min(IDLE, limit * 9 // 20)  # two for each, and some to spare
    app_port = free_port()
    many = ["prlimit", f"--nofile={'unlimited' if limit == resource.RLIM_INFINITY else limit}"]
    with ChildrenUnder(children.directory, many) as roomy:
        roomy.start("websocket-app", [sys.executable, WEBSOCKETS, "app", f"--port={app_port}"])
        proxy = StickyProxy(roomy, {"app": f"http://127.0.0.1:{app_port}"})
        wait_until(lambda: proxy.metric("upstream_health", upstream="app") > 0, "the app listens")
        pid, before_kib = proxy.worker, memory_kib(proxy.worker)
        arguments = ["clients", f"--port={proxy.port}", f"--count={count}"]
        clients = roomy.start("websocket-clients", [sys.executable, WEBSOCKETS, *arguments])
        wait_until(lambda: "open " in clients.log.read_text() or not clients.is_running(), "all are open", DEADLINE_S)
        assert f"open {count}\n" in clients.log.read_text(), clients.log_tail()
        each_kib = (memory_kib(pid) - before_kib) / count
        print(f"{count} idle WebSockets: {each_kib:.2f} KiB each, {descriptors(pid)} descriptors")
        assert descriptors(pid) >= 2 * count
        assert proxy.metric("tunnels_open") == count

        for turn in range(1, 3):
            clients.send(signal.SIGUSR1)
            wait_until(
                lambda turn=turn: clients.log.read_text().count("answered ") == turn,  # type: ignore[misc]
                "all have answered",
                DEADLINE_S,
            )
        answered = f"answered {count} of {count}, lost 0"
        assert clients.log.read_text().splitlines() == [f"open {count}", answered, answered]
        assert proxy.metric("tunnel_frames_total", opcode="binary") == 4 * count
        used_kib = (memory_kib(pid) - before_kib) / count
        print(f"after they have answered: {used_kib:.2f} KiB each")
        # The lower bound is the control: a figure below it is not that of two connections with their state.
        assert 0.5 < each_kib <= IDLE_KIB
        assert used_kib <= IDLE_KIB


# SIGTERM under load

TALKERS = 100
LOADERS = 16
PAUSE_S = 0.01  # between two tunnels that are closed


class Talker:
    """A client of a tunnel that talks without a pause; `counts` are what the app said of its messages."""

    def __init__(self, number: int) -> None:
        self.name = f"talker-{number}"
        self.counts: list[int] = []
        self.code: int | None = None
        self.ended_at = 0.0

    async def talk(self, tunnel: ClientConnection) -> None:
        """Go on until the tunnel ends."""
        try:
            while True:
                self.counts.append(await echo(tunnel, f"message {len(self.counts) + 1}"))
        except ConnectionClosed as error:
            self.code = error.rcvd.code if error.rcvd is not None else None
            self.ended_at = time.monotonic()


class Work:
    """Clients of all kinds at work on one proxy, and what came of it."""

    def __init__(self, proxy: StickyProxy) -> None:
        self._proxy = proxy
        self.talkers = [Talker(number) for number in range(TALKERS)]
        self.answers: dict[str, int] = {}
        self.broken: set[str] = set()
        self.held = new_ids(8, "held")

    async def run(self, begin: asyncio.Event) -> None:
        """Work until the proxy lets nobody in; set `begin` when the work is in full swing."""
        async with AsyncExitStack() as stack:
            tunnels = [
                await stack.enter_async_context(await open_tunnel(self._proxy, talker.name)) for talker in self.talkers
            ]
            async with asyncio.TaskGroup() as group:
                for talker, tunnel in zip(self.talkers, tunnels, strict=True):
                    group.create_task(talker.talk(tunnel))
                for _ in range(LOADERS):
                    group.create_task(self._load())
                for request_id in self.held:
                    group.create_task(self._hold(request_id))
                await eventually(
                    lambda: len(self.answers) > 500 and min(len(talker.counts) for talker in self.talkers) >= 5,
                    "all are at work",
                )
                begin.set()

    async def _load(self) -> None:
        with suppress(ConnectionError):
            while True:
                async with await PlainClient.connect(self._proxy.port) as client:
                    for _ in range(50):
                        if not await self._ask(client, "/count", new_ids(1, "load")[0]):
                            break

    async def _hold(self, request_id: str) -> None:
        async with await PlainClient.connect(self._proxy.port) as client:
            await self._ask(client, "/hold/gate", request_id)

    async def _ask(self, client: PlainClient, target: str, request_id: str) -> bool:
        """POST once; say whether the connection can be used again."""
        try:
            answer = await client.ask(target, method="POST", fields={"X-Id": request_id})
        except AbortedError:
            self.broken.add(request_id)
            return False
        self.answers[request_id] = answer.status
        return answer.fields.get("connection") != "close"


async def work_until(children: Children, number: signal.Signals) -> tuple[Work, CountingApps, StickyProxy]:
    """Let clients work, send the signal to the proxy, open the gate for what is held, and wait for the end of all."""
    apps = await asyncio.to_thread(CountingApps, children, "alpha", "beta")
    proxy = await asyncio.to_thread(StickyProxy, children, apps.upstreams, more={"grace": "60s"})
    work, begin = Work(proxy), asyncio.Event()
    async with asyncio.timeout(DEADLINE_S):
        working = asyncio.get_running_loop().create_task(work.run(begin))
        await begin.wait()
        proxy.child.send(number)
        await eventually(lambda: can_listen(proxy.port), "nobody listens any more")
        await eventually(lambda: all(talker.ended_at for talker in work.talkers), "all tunnels have ended")
        for name in apps.upstreams:
            await asyncio.to_thread(apps.release, name, "gate")
        await working
    return work, apps, proxy


async def test_at_sigterm_under_load_nothing_is_lost_and_the_tunnels_are_told_one_by_one(children: Children) -> None:
    work, apps, proxy = await work_until(children, signal.SIGTERM)
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == 0
    assert "Traceback" not in proxy.child.log.read_text()

    assert {talker.code for talker in work.talkers} == {1001}
    for talker in work.talkers:
        assert talker.counts == list(range(1, len(talker.counts) + 1))
    ended = sorted(talker.ended_at for talker in work.talkers)
    print(f"{len(work.answers)} answered, {len(work.broken)} met a closed connection; "
          f"the tunnels ended over {ended[-1] - ended[0]:.2f} s")  # fmt: skip
    assert ended[-1] - ended[0] > PAUSE_S * TALKERS / 4  # the clients may be late to look, but not by so much

    # What reached an app was answered, once; what met a closed connection never reached one.
    received = apps.received()
    assert set(work.answers.values()) == {200}
    assert {request_id for _, request_id in received} == work.answers.keys()
    assert set(received.values()) == {1}
    assert set(work.held) <= work.answers.keys()


async def test_at_sigkill_under_load_tunnels_break_off_and_requests_are_lost(children: Children) -> None:
    """The control: without an orderly stop the same clients see it."""
    work, apps, proxy = await work_until(children, signal.SIGKILL)
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == -signal.SIGKILL
    assert {talker.code for talker in work.talkers} == {None}
    assert set(work.held) <= work.broken
    received = apps.received()
    assert set(received.values()) == {1}
    assert {("POST", request_id) for request_id in work.held} <= received.keys()


async def test_at_sigterm_a_frame_that_is_on_its_way_comes_whole_before_the_close_frame(
    children: Children, app: FaultApp
) -> None:
    proxy = await asyncio.to_thread(StickyProxy, children, app.upstreams, more={"timeouts": {"linger": "60s"}})
    async with await Transfer.connect(proxy.port) as client:
        await client.open_tunnel("/tunnel/gate", "tunnel")
        assert await client.reader.readexactly(500) == FRAME[:500]
        proxy.child.send(signal.SIGTERM)
        await eventually(lambda: can_listen(proxy.port), "nobody listens any more")
        app.open("gate")
        assert await client.reader.readexactly(len(FRAME) - 500) == FRAME[500:]
        close = await client.reader.readexactly(4)
        assert (close[0], int.from_bytes(close[2:], "big")) == (0x88, 1001)
        await client.reader.readexactly(close[1] - 2)
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == 0


# The clock


class Clock:
    """The wall clock of the proxies that are started under it; `jump` sets it, from one moment to the next."""

    def __init__(self, directory: Path, *, with_monotonic: bool = False) -> None:
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not libraries:
            lacking("no libfaketime: install the package faketime")
        self._file = directory / "clock"
        self.jump(0)
        self.children = ChildrenUnder(
            directory,
            env={
                "LD_PRELOAD": str(libraries[0]),
                "FAKETIME_TIMESTAMP_FILE": str(self._file),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "0" if with_monotonic else "1",
                "DONT_FAKE_MONOTONIC": "0" if with_monotonic else "1",  # its name in newer versions
            },
        )

    def jump(self, seconds: int) -> None:
        """Let the clock differ from the real one by so much."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)


@contextmanager
def clock_of(directory: Path, *, with_monotonic: bool = False) -> Iterator[Clock]:
    clock = Clock(directory, with_monotonic=with_monotonic)
    with clock.children:
        yield clock


def seen_at(cookie: str) -> int:
    """Return when a token was written: seconds since 1970 by the clock of the proxy."""
    raw = base64.urlsafe_b64decode(cookie.partition("=v1.")[2])
    return int.from_bytes(raw[22:26], "big")


async def ask(
    proxy: StickyProxy, request_id: str, cookie: str | None = None, method: str = "POST"
) -> tuple[str, str | None]:
    """Ask over a connection of its own; return the name of the app that answered, and the cookie that was set."""
    async with await PlainClient.connect(proxy.port) as client:
        fields = {"X-Id": request_id, **({"Cookie": cookie} if cookie else {})}
        answer = await client.ask("/count", method=method, fields=fields)
        assert answer.status == 200
        return json.loads(answer.body)["name"], answer.cookie


async def jumped(proxy: StickyProxy, clock: Clock, seconds: int) -> None:
    """Set the clock, and return when the proxy has seen it; by then it has looked at all its timeouts, too."""
    real_s = time.time()  # noqa: TID251 -- what the clock of the proxy is compared with
    clock.jump(seconds)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            _, cookie = await ask(proxy, "clock", method="GET")
            assert cookie is not None
            if abs(seen_at(cookie) - real_s - seconds) < HOUR_S / 2:
                return
            await asyncio.sleep(0.05)


# Each is shorter than the jump: it would end what is open, if it followed the wall clock.
LONG = dict.fromkeys(["keep_alive", "response", "tunnel_idle", "body_idle"], "600s")
BOTH_WAYS = pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S], ids=["forward", "back"])


@BOTH_WAYS
async def test_a_jump_of_the_clock_ends_nothing_and_moves_nobody(children: Children, seconds: int) -> None:
    apps = await asyncio.to_thread(CountingApps, children, "alpha", "beta", "gamma")
    async with asyncio.timeout(DEADLINE_S):
        with clock_of(children.directory) as clock:
            more = {"timeouts": LONG, "access_log": {"path": str(children.directory / "access.log")}}
            proxy = await asyncio.to_thread(
                StickyProxy, clock.children, apps.upstreams, affinity={"session_idle": "600s"}, more=more
            )
            ids = new_ids(20, "pinned")
            pins = dict([await ask(proxy, request_id) for request_id in ids[:3]])
            assert len(pins) == 3
            for (name, cookie), request_id in zip(pins.items(), ids[3:6], strict=True):
                assert await ask(proxy, request_id, cookie) == (name, None)
            async with (
                await PlainClient.connect(proxy.port) as held,
                await PlainClient.connect(proxy.port) as idle,
                await open_tunnel(proxy, "tunnel", pins["alpha"]) as tunnel,
            ):
                assert await echo(tunnel, "before") == 1
                held.send("/hold/gate", method="POST", fields={"X-Id": "held", "Cookie": pins["alpha"] or ""})
                await asyncio.to_thread(apps.wait_until_held, "alpha", "gate")
                assert (await idle.ask("/count", method="POST", fields={"X-Id": ids[6]})).status == 200
                for turn, jump in enumerate([seconds, 0], 1):
                    await jumped(proxy, clock, jump)
                    assert await echo(tunnel, "after") == turn + 1
                    answer = await idle.ask("/count", method="POST", fields={"X-Id": ids[6 + turn]})
                    assert answer.status == 200
                    assert proxy.metric("sessions_active") == 3
                    assert proxy.metric("tunnels_open") == 1
                    assert proxy.metric("exchanges_in_flight") == 1
                    for at, (name, cookie) in enumerate(pins.items()):
                        assert await ask(proxy, ids[6 + 3 * turn + at], cookie) == (name, None)
                await asyncio.to_thread(apps.release, "alpha", "gate")
                assert (await held.receive()).status == 200
            assert proxy.metric("affinity_breaks_total") == 0
            assert proxy.metric("affinity_total", outcome="expired") == 0
            assert proxy.metric("affinity_total", outcome="invalid") == 0
            assert proxy.metric("exchanges_total", status_class="5xx") == 0
            assert proxy.metric("upstream_health", state="unhealthy") == 0
    posts = {request_id: count for (method, request_id), count in apps.received().items() if method == "POST"}
    assert posts == dict.fromkeys([*ids[:9], *ids[9:15], "held"], 1)


async def test_if_all_clocks_jump_what_is_open_ends(children: Children) -> None:
    """The control: the timeouts of the test above do fire where their own clock jumps."""
    apps = await asyncio.to_thread(CountingApps, children, "alpha")
    async with asyncio.timeout(DEADLINE_S):
        with clock_of(children.directory, with_monotonic=True) as clock:
            proxy = await asyncio.to_thread(StickyProxy, clock.children, apps.upstreams, more={"timeouts": LONG})
            async with (
                await PlainClient.connect(proxy.port) as held,
                await PlainClient.connect(proxy.port) as idle,
                await open_tunnel(proxy, "tunnel") as tunnel,
            ):
                assert (await idle.ask("/count")).status == 200
                held.send("/hold/gate", method="POST", fields={"X-Id": "held"})
                await asyncio.to_thread(apps.wait_until_held, "alpha", "gate")
                clock.jump(HOUR_S)
                assert (await held.receive()).status == 504
                assert await idle.receive_end() == b""
                with pytest.raises(ConnectionClosed):
                    await tunnel.recv()
    assert apps.received()["POST", "held"] == 1


@BOTH_WAYS
async def test_after_a_jump_of_the_clock_timeouts_fire_all_the_same(children: Children, seconds: int) -> None:
    apps = await asyncio.to_thread(CountingApps, children, "alpha")
    timeouts = {"keep_alive": "6s", "response": "6s", "tunnel_idle": "6s"}
    async with asyncio.timeout(DEADLINE_S):
        with clock_of(children.directory) as clock:
            proxy = await asyncio.to_thread(StickyProxy, clock.children, apps.upstreams, more={"timeouts": timeouts})
            async with (
                await PlainClient.connect(proxy.port) as held,
                await PlainClient.connect(proxy.port) as idle,
                await open_tunnel(proxy, "tunnel") as tunnel,
            ):
                assert (await idle.ask("/count")).status == 200
                assert await echo(tunnel, "before") == 1
                began = time.monotonic()
                held.send("/hold/gate", method="POST", fields={"X-Id": "held"})
                await asyncio.to_thread(apps.wait_until_held, "alpha", "gate")
                clock.jump(seconds)
                assert (await held.receive()).status == 504
                assert time.monotonic() - began > 5
                assert await idle.receive_end() == b""
                with pytest.raises(ConnectionClosed):
                    await tunnel.recv()
    assert apps.received()["POST", "held"] == 1


@pytest.mark.parametrize("limit", ["max_idle", "max_life"])
async def test_the_lifetimes_of_pins_follow_the_wall_clock(children: Children, limit: str) -> None:
    apps = await asyncio.to_thread(CountingApps, children, "alpha", "beta")
    async with asyncio.timeout(DEADLINE_S):
        with clock_of(children.directory) as clock:
            proxy = await asyncio.to_thread(StickyProxy, clock.children, apps.upstreams, affinity={limit: "30m"})
            ids = new_ids(4, limit)
            name, cookie = await ask(proxy, ids[0])
            assert await ask(proxy, ids[1], cookie) == (name, None)
            await jumped(proxy, clock, -HOUR_S)
            assert (await ask(proxy, ids[2], cookie))[0] == name
            assert proxy.metric("affinity_total", outcome="expired") == 0
            await jumped(proxy, clock, HOUR_S)
            _, renewed = await ask(proxy, ids[3], cookie)
            assert renewed is not None
            assert proxy.metric("affinity_total", outcome="expired") == 1
    received = apps.received()
    assert [received["POST", request_id] for request_id in ids] == [1] * len(ids)


async def test_after_a_jump_back_a_client_that_was_not_seen_again_keeps_its_pin(children: Children) -> None:
    """Such is every client that came while the clock of the machine was ahead, once it was put right."""
    apps = await asyncio.to_thread(CountingApps, children, "alpha", "beta", "gamma")
    async with asyncio.timeout(DEADLINE_S):
        with clock_of(children.directory) as clock:
            proxy = await asyncio.to_thread(StickyProxy, clock.children, apps.upstreams)
            pins = [await ask(proxy, request_id) for request_id in new_ids(6, "new")]
            await jumped(proxy, clock, -HOUR_S)
            again = [
                (await ask(proxy, request_id, pin[1]))[0] for pin, request_id in zip(pins, new_ids(6), strict=True)
            ]
            assert again == [name for name, _ in pins]
            assert proxy.metric("affinity_total", outcome="invalid") == 0


# The log


BURST = 12_500  # more than the queue of the log and its thread hold
BURST_CLIENTS = 5


async def work_beside_log(proxy: StickyProxy, app: FaultApp, number: int) -> list[str]:
    """Send so many requests, GET but for one in a hundred; check that each is answered and arrived once."""
    gets, posts = new_ids(number - number // 100, "get"), new_ids(number // 100, "post")
    parts = [gets[at::BURST_CLIENTS] for at in range(BURST_CLIENTS)]
    got, posted = await asyncio.gather(
        asyncio.gather(*(ask_pipelined(proxy.port, part) for part in parts)), ask_each(proxy.port, posts)
    )
    assert [status for some in got for status in some.values()] == [200] * len(gets)
    assert posted == dict.fromkeys(posts, 200)
    received = app.received
    assert {received["GET", request_id] for request_id in gets} == {1}
    assert {received["POST", request_id] for request_id in posts} == {1}
    return gets + posts


async def serve_with_log(children: Children, app: FaultApp, path: Path, format_: str = "json") -> StickyProxy:
    more = {"access_log": {"format": format_, "path": str(path)}, "grace": "30s"}
    return await asyncio.to_thread(StickyProxy, children, app.upstreams, more=more)


async def check_stop(proxy: StickyProxy) -> None:
    proxy.child.send(signal.SIGTERM)
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == 0
    assert "Traceback" not in proxy.child.log.read_text()


async def test_a_log_that_is_written_drops_nothing(children: Children, app: FaultApp) -> None:
    """The control: each request has its line where there is room."""
    path = children.directory / "access.log"
    proxy = await serve_with_log(children, app, path)
    await work_beside_log(proxy, app, 1000)
    assert proxy.metric("access_log_dropped_total") == 0
    await check_stop(proxy)
    assert path.read_text().count('"kind":"exchange"') == 1000


async def test_when_the_disk_is_full_traffic_goes_on_and_each_line_is_counted(
    children: Children, app: FaultApp
) -> None:
    proxy = await serve_with_log(children, app, Path("/dev/full"))
    async with await PlainClient.connect(proxy.port) as client:
        assert (await client.ask("/word")).status == 200
        await work_beside_log(proxy, app, 1000)
        await eventually(lambda: proxy.metric("access_log_dropped_total") == 1001, "all are counted", look_s=0.1)
        assert (await client.ask("/word")).status == 200
    assert "cannot write the access log: no space left on device" in proxy.child.log.read_text()
    await check_stop(proxy)


async def test_when_a_file_has_no_room_left_its_lines_are_whole_and_the_others_are_counted(
    children: Children, app: FaultApp
) -> None:
    """A limit of the size of files, which is met in the middle of a line."""
    path = children.directory / "access.log"
    proxy = await serve_with_log(children, app, path)
    _, hard = resource.prlimit(proxy.worker, resource.RLIMIT_FSIZE)
    resource.prlimit(proxy.worker, resource.RLIMIT_FSIZE, (100_000, hard))  # its counters have their memory already
    await work_beside_log(proxy, app, 1000)
    await eventually(lambda: proxy.metric("access_log_dropped_total") > 0, "lines are dropped", look_s=0.1)
    whole = path.read_text().count("\n")
    await eventually(
        lambda: proxy.metric("access_log_dropped_total") == 1000 - whole, "the others are counted", look_s=0.1
    )
    for line in path.read_text().splitlines()[:whole]:
        assert json.loads(line)["status"] == 200
    await check_stop(proxy)


class Pipe:
    """A FIFO; `lines` are those that were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._reader = -1
        self._held = b""
        self.lines: list[bytes] = []

    def open(self) -> None:
        self._reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> int:
        """Read what there is, and return how many lines came in all."""
        with suppress(BlockingIOError):
            while data := os.read(self._reader, 2**20):
                *lines, self._held = (self._held + data).split(b"\n")
                self.lines += lines
        return len(self.lines)

    def close(self) -> None:
        if self._reader >= 0:
            os.close(self._reader)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    pipe = Pipe(tmp_path / "log.fifo")
    yield pipe
    pipe.close()


async def check_dropped(proxy: StickyProxy, pipe: Pipe, ids: list[str]) -> None:
    """Check that lines were dropped, and that once somebody reads, each line has come or was counted."""
    await eventually(lambda: proxy.metric("access_log_dropped_total") > 0, "lines are dropped", look_s=0.1)
    assert pipe.lines == []
    await eventually(
        lambda: pipe.read() + proxy.metric("access_log_dropped_total") == len(ids), "all are accounted for", look_s=0.1
    )
    dropped = proxy.metric("access_log_dropped_total")
    print(f"{dropped:g} of {len(ids)} lines dropped")
    assert {json.loads(line)["status"] for line in pipe.lines} == {200}
    assert len({json.loads(line)["request_id"] for line in pipe.lines}) == len(pipe.lines)


@pytest.mark.load
async def test_a_pipe_that_nobody_reads_harms_no_traffic_and_each_line_is_counted(
    children: Children, app: FaultApp, pipe: Pipe
) -> None:
    pipe.open()
    proxy = await serve_with_log(children, app, pipe.path)
    ids = await work_beside_log(proxy, app, BURST)
    said = "cannot write the access log: nobody reads it"
    await eventually(lambda: said in proxy.child.log.read_text(), "it is said", look_s=0.1)
    await check_dropped(proxy, pipe, ids)
    await check_stop(proxy)


@pytest.mark.load
async def test_a_proxy_whose_log_nobody_reads_stops_in_good_order(
    children: Children, app: FaultApp, pipe: Pipe
) -> None:
    pipe.open()
    proxy = await serve_with_log(children, app, pipe.path)
    await work_beside_log(proxy, app, BURST)
    await eventually(lambda: proxy.metric("access_log_dropped_total") > 0, "lines are dropped", look_s=0.1)
    await check_stop(proxy)


async def test_a_pipe_that_nobody_has_opened_harms_no_traffic_and_is_written_once_it_is(
    children: Children, app: FaultApp, pipe: Pipe
) -> None:
    proxy = await serve_with_log(children, app, pipe.path)
    await work_beside_log(proxy, app, 1000)
    await eventually(lambda: proxy.metric("access_log_dropped_total") == 1000, "all are counted", look_s=0.1)
    pipe.open()
    asked = 0
    while not pipe.read():
        await work_beside_log(proxy, app, 100)
        asked += 100
    await eventually(
        lambda: pipe.read() + proxy.metric("access_log_dropped_total") == 1000 + asked, "all are accounted for"
    )
    await check_stop(proxy)


@pytest.mark.load
async def test_standard_output_that_nobody_reads_harms_no_traffic(
    children: Children, app: FaultApp, pipe: Pipe
) -> None:
    """What the proxy says about itself goes elsewhere."""
    pipe.open()
    with ChildrenUnder(children.directory, ["sh", "-c", f'exec "$0" "$@" > {pipe.path}']) as piped:
        proxy = await asyncio.to_thread(StickyProxy, piped, app.upstreams, more={"access_log": "json", "grace": "30s"})
        ids = await work_beside_log(proxy, app, BURST)
        await check_dropped(proxy, pipe, ids)
        await check_stop(proxy)
