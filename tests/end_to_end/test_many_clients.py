"""A thousand clients, through a proxy in a process of its own, while upstreams are drained, killed and started again.

Both ends count: the clients what they were answered, the apps the ids that reached them, and the proxy its metrics.
"""

import asyncio
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.helpers.counting import CountingApps
from tests.helpers.plain_client import AbortedError, Answer, PlainClient, read_cookie
from tests.helpers.processes import Children, StickyProxy, wait_until

pytestmark = pytest.mark.load

REQUESTS_EACH = 20
CONNECTIONS = 64
EARLY, LATE = 800, 200
TOTAL = (EARLY + LATE) * REQUESTS_EACH
TUNNELS = 200
DEADLINE_S = 60.0
PROBE = {"interval": "1s", "timeout": "10s", "rise": 1, "fall": 10}


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@dataclass(frozen=True)
class Seen:
    """What an app said of itself in an answer."""

    name: str
    pid: int
    generation: int
    count: int


@dataclass(eq=False)
class Client:
    """A browser: it keeps its cookie, and sends one request after the other."""

    number: int
    cookie: str | None = None
    left: int = REQUESTS_EACH
    seen: list[Seen] = field(default_factory=list)

    @property
    def last(self) -> str:
        return self.seen[-1].name

    @property
    def pids(self) -> list[int]:
        """The processes that answered, in order, without repeats."""
        return [seen.pid for at, seen in enumerate(self.seen) if at == 0 or self.seen[at - 1].pid != seen.pid]

    @property
    def upstreams(self) -> list[str]:
        """The same by the name of the upstream."""
        return [seen.name for at, seen in enumerate(self.seen) if at == 0 or self.seen[at - 1].name != seen.name]


class Crowd:
    """Clients that take turns over a bounded number of connections, every fifth request a POST."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._turns: deque[Client] = deque()
        self._sleepers: list[Client] = []
        self._marks: list[tuple[int, asyncio.Event]] = []
        self._ids = 0
        self.clients: list[Client] = []
        self.asleep: set[int] = set()
        self.under_way: dict[str, Client] = {}
        self.done = 0
        self.without_cookie = 0
        self.statuses: Counter[int] = Counter()
        self.answered: dict[str, Seen] = {}
        self.failed: dict[str, str] = {}
        self.set_cookies = 0

    def arrive(self, count: int) -> list[Client]:
        """Let new clients begin."""
        new = [Client(len(self.clients) + number) for number in range(count)]
        self.clients += new
        self._turns.extend(new)
        return new

    def wake(self) -> None:
        """Let the clients go on that were `asleep`."""
        self.asleep.clear()
        self._turns.extend(self._sleepers)
        self._sleepers.clear()

    async def reach(self, count: int) -> None:
        """Wait until so many requests have ended."""
        event = asyncio.Event()
        self._marks.append((count, event))
        async with asyncio.timeout(DEADLINE_S):
            await event.wait()

    async def run(self) -> None:
        """Go on until every client that is awake has sent all its requests."""
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(self._take_turns(), name=f"connection {number}")

    async def _take_turns(self) -> None:
        connection = await PlainClient.connect(self._port)
        try:
            while self._turns:
                client = self._turns.popleft()
                if client.number in self.asleep:
                    self._sleepers.append(client)
                    continue
                try:
                    await self._ask(client, connection)
                except AbortedError:
                    await connection.__aexit__(None, None, None)
                    connection = await PlainClient.connect(self._port)
                client.left -= 1
                if client.left:
                    self._turns.append(client)
        finally:
            await connection.__aexit__(None, None, None)

    async def _ask(self, client: Client, connection: PlainClient) -> None:
        self._ids += 1
        request_id = str(self._ids)
        fields = {"X-Client": str(client.number), "X-Id": request_id}
        if client.cookie is None:
            self.without_cookie += 1
        else:
            fields["Cookie"] = client.cookie
        self.under_way[request_id] = client
        try:
            method = "POST" if self._ids % 5 == 0 else "GET"
            answer = await connection.ask("/count", method=method, fields=fields)
        except AbortedError as error:
            self.failed[request_id] = str(error)
            raise
        else:
            self._note(client, request_id, answer)
        finally:
            del self.under_way[request_id]
            self.done += 1
            for count, event in self._marks:
                if self.done >= count:
                    event.set()

    def _note(self, client: Client, request_id: str, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        if answer.cookie is not None:
            client.cookie = answer.cookie
            self.set_cookies += 1
        if answer.status == 200:
            seen = Seen(**json.loads(answer.body))
            client.seen.append(seen)
            self.answered[request_id] = seen
        else:
            self.failed[request_id] = str(answer.status)


def accepts_pinned(proxy: StickyProxy, name: str) -> bool:
    return bool(proxy.upstreams()[name]["accepts_pinned"])


class Aftermath:
    """What is left to look at after the apps were drained, killed and started again: see `run`."""

    def __init__(self, children: Children) -> None:
        self.reports = children.reports
        self.apps = CountingApps(children, "alpha", "beta", "gamma", "delta")
        self.proxy = StickyProxy(children, self.apps.upstreams, probe=PROBE)
        self.crowd = Crowd(self.proxy.port)
        self.late: list[Client] = []
        self.of_gamma: list[Client] = []
        self.slept: list[Client] = []
        self.at_the_kill: dict[str, Client] = {}

    @property
    def moved(self) -> list[Client]:
        """The clients that were answered by more than one upstream."""
        return [client for client in self.crowd.clients if len(client.upstreams) > 1]

    @property
    def restarted(self) -> list[Client]:
        """The clients that were answered by two processes of one upstream."""
        return [client for client in self.crowd.clients if len(client.upstreams) == 1 < len(client.pids)]

    async def run(self) -> None:
        apps, crowd = self.apps, self.crowd
        crowd.arrive(EARLY)
        running = asyncio.get_running_loop().create_task(crowd.run())

        # beta is drained; then come those who do not know any upstream yet.
        await crowd.reach(EARLY * 5)
        await asyncio.to_thread(self.proxy.set_state, "beta", "drain")
        self.late = crowd.arrive(LATE)

        # gamma is killed. Half of its clients do nothing until it was started again.
        await crowd.reach(EARLY * 5 + LATE * 20)
        self.of_gamma = [client for client in crowd.clients if client.seen and client.last == "gamma"]
        crowd.asleep = {client.number for client in self.of_gamma if client.number % 2}
        # Nothing is sent meanwhile: this thread stands still until the process and its connections are gone.
        apps.kill("gamma")
        self.at_the_kill = dict(crowd.under_way)
        busy = set(self.at_the_kill.values())
        self.slept = [client for client in self.of_gamma if client.number in crowd.asleep and client not in busy]

        await crowd.reach(EARLY * 5 + LATE * 20 + 1000)
        apps.start("gamma")
        await asyncio.to_thread(apps.wait_until_ready, "gamma")
        await asyncio.to_thread(wait_until, lambda: accepts_pinned(self.proxy, "gamma"), "gamma is back")
        async with asyncio.timeout(DEADLINE_S):
            await running
        crowd.wake()
        async with asyncio.timeout(DEADLINE_S):
            await crowd.run()


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    with Children(tmp_path_factory.mktemp("crowd")) as children:
        aftermath = Aftermath(children)
        asyncio.run(aftermath.run())
        yield aftermath


def test_only_requests_under_way_at_the_kill_fail_and_none_is_lost(aftermath: Aftermath) -> None:
    crowd, at_the_kill = aftermath.crowd, aftermath.at_the_kill
    print(f"{crowd.done} requests, {dict(crowd.statuses)}; under way at the kill: {len(at_the_kill)}; "
          f"failed: {sorted(crowd.failed.values())}; clients of gamma: {len(aftermath.of_gamma)}; "
          f"moved: {len(aftermath.moved)}; met the restarted process: {len(aftermath.restarted)}")  # fmt: skip
    assert crowd.done == TOTAL == len(crowd.answered) + len(crowd.failed)
    assert crowd.failed.keys() <= at_the_kill.keys()
    assert crowd.statuses.keys() <= {200, 502}


def test_only_clients_of_the_killed_process_are_moved_and_each_once(aftermath: Aftermath) -> None:
    moved, restarted = aftermath.moved, aftermath.restarted
    assert moved
    for client in aftermath.crowd.clients:
        if client in moved:
            assert client.upstreams[0] == "gamma"
            assert len(client.upstreams) == len(client.pids) == 2
            assert client.upstreams[1] in {"alpha", "delta"}
        elif client not in restarted:
            assert len(client.pids) == 1


def test_a_client_that_comes_after_the_restart_stays_with_its_upstream(aftermath: Aftermath) -> None:
    assert aftermath.slept
    assert set(aftermath.slept) <= set(aftermath.restarted)
    for client in aftermath.restarted:
        assert client.upstreams == ["gamma"]
        assert [client.seen[0].generation, client.seen[-1].generation] == [1, 2]


def test_the_state_of_each_client_is_where_its_requests_go(aftermath: Aftermath) -> None:
    for client in aftermath.crowd.clients:
        assert client.seen[0].count == 1
        for before, after in zip(client.seen, client.seen[1:], strict=False):
            assert after.count == (before.count + 1 if after.pid == before.pid else 1)


def test_clients_of_the_drained_upstream_stay_and_no_new_one_comes(aftermath: Aftermath) -> None:
    clients = aftermath.crowd.clients
    drained = [client for client in clients if "beta" in client.upstreams]
    assert len(drained) >= EARLY // 8
    assert not set(drained) & set(aftermath.late)
    assert all(client.upstreams == ["beta"] and len(client.seen) == REQUESTS_EACH for client in drained)
    assert aftermath.proxy.metric("drain_sessions_remaining", upstream="beta") == len(drained)


def test_what_was_answered_arrived_and_no_post_arrived_twice(aftermath: Aftermath) -> None:
    crowd = aftermath.crowd
    received = aftermath.apps.received()
    arrived = {request_id for _, request_id in received}
    assert crowd.answered.keys() <= arrived
    assert arrived - crowd.answered.keys() <= crowd.failed.keys()
    posts = [count for (method, _), count in received.items() if method == "POST"]
    assert set(posts) == {1}
    assert TOTAL // 5 - len(crowd.failed) <= len(posts) <= TOTAL // 5
    # A GET may be repeated where its process died before it answered.
    assert {request_id for (_, request_id), count in received.items() if count > 1} <= aftermath.at_the_kill.keys()


def test_the_metrics_agree_with_what_the_clients_saw(aftermath: Aftermath) -> None:
    crowd, metric, moved = aftermath.crowd, aftermath.proxy.metric, len(aftermath.moved)
    assert metric("exchanges_total") == TOTAL
    assert metric("exchanges_total", status_class="2xx") == crowd.statuses[200]
    assert metric("exchanges_total", status_class="5xx") == crowd.statuses[502]
    for name, count in Counter(seen.name for seen in crowd.answered.values()).items():
        assert metric("exchanges_total", upstream=name, status_class="2xx") == count
    # Refused, but for a connection that the process took and never served: it is reset.
    refused, unreachable = (metric("affinity_breaks_total", reason=reason) for reason in ("refused", "unreachable"))
    assert refused + unreachable == metric("affinity_breaks_total") == moved
    assert refused
    assert metric("affinity_total", outcome="redispatched") == moved
    assert metric("affinity_total", outcome="new") == crowd.without_cookie
    assert metric("affinity_total", outcome="hit") == TOTAL - crowd.without_cookie - moved
    assert metric("affinity_total") == TOTAL
    for name, count in Counter(client.last for client in crowd.clients).items():
        assert metric("sessions_active", upstream=name) == count
    assert metric("exchanges_in_flight") == 0
    assert metric("downstream_connections") == 0


async def test_without_affinity_one_client_is_answered_by_several_processes(children: Children) -> None:
    """The control: the test above could fail."""
    apps = CountingApps(children, "alpha", "beta", "gamma", "delta")
    proxy = StickyProxy(children, apps.upstreams, affinity={"cookie": False, "policy": "round_robin"}, probe=PROBE)
    crowd = Crowd(proxy.port)
    crowd.arrive(20)
    async with asyncio.timeout(DEADLINE_S):
        await crowd.run()
    assert crowd.statuses == {200: 20 * REQUESTS_EACH}
    assert crowd.set_cookies == 0
    assert any(len(set(client.pids)) > 1 for client in crowd.clients)
    shares = Counter(seen.name for seen in crowd.answered.values())
    assert shares == dict.fromkeys(apps.upstreams, 20 * REQUESTS_EACH // 4)
    assert proxy.metric("affinity_total", outcome="unpinned") == 20 * REQUESTS_EACH


class Chat:
    """A client with a tunnel; `process` is the name and pid that answers it."""

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self.cookie: str | None = None
        self.process: tuple[str, str] = ("", "")
        self._url = url
        self._tunnel: ClientConnection

    async def open(self) -> str | None:
        """Open a tunnel and return the cookie that its 101 sets."""
        fields = {"X-Client": str(self.number), **({"Cookie": self.cookie} if self.cookie else {})}
        self._tunnel = await connect(self._url, additional_headers=fields, proxy=None, open_timeout=DEADLINE_S)
        response = self._tunnel.response
        cookie = read_cookie(response.headers.get("Set-Cookie", "")) if response else None
        self.cookie = cookie or self.cookie
        await self.echo()
        return cookie

    async def echo(self) -> int:
        """Send a message, and return which one the app says it is."""
        async with asyncio.timeout(DEADLINE_S):
            await self._tunnel.send(f"from {self.number}")
            name, pid, count, text = str(await self._tunnel.recv()).split(" ", 3)
        assert text == f"from {self.number}"
        self.process = (name, pid)
        return int(count)

    async def wait_closed(self) -> int | None:
        """Return the code of the Close frame that ends the tunnel; None where it ends without one."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                await self._tunnel.recv()
            except ConnectionClosed as error:
                return error.rcvd.code if error.rcvd is not None else None
        raise AssertionError("a message that nobody asked for")

    async def close(self) -> None:
        await self._tunnel.close()


async def test_only_the_tunnels_of_a_killed_process_end_and_their_clients_find_another(children: Children) -> None:
    apps = CountingApps(children, "alpha", "beta", "gamma", "delta")
    proxy = StickyProxy(children, apps.upstreams, probe=PROBE)
    chats = [Chat(number, f"{proxy.url.replace('http', 'ws')}/ws") for number in range(TUNNELS)]
    try:
        for at in range(0, TUNNELS, 20):  # not more handshakes at once than the apps' listeners queue
            assert all(await asyncio.gather(*(chat.open() for chat in chats[at : at + 20])))
        ended = [chat for chat in chats if chat.process[0] == "beta"]
        others = [chat for chat in chats if chat.process[0] != "beta"]
        assert len(ended) == TUNNELS // 4
        assert proxy.metric("tunnels_open") == TUNNELS

        apps.kill("beta")
        codes = Counter(await asyncio.gather(*(chat.wait_closed() for chat in ended)))
        print(f"close codes of the {len(ended)} tunnels of the killed process: {dict(codes)}")
        assert codes.keys() <= {1012, 1014}

        before = {chat.number: chat.process for chat in chats}
        assert set(await asyncio.gather(*(chat.echo() for chat in others))) == {2}
        assert all(chat.process == before[chat.number] for chat in others)

        cookies = {chat.number: chat.cookie for chat in ended}
        assert all(await asyncio.gather(*(chat.open() for chat in ended)))
        assert all(chat.cookie != cookies[chat.number] for chat in ended)
        assert {chat.process[0] for chat in ended} == {"alpha", "gamma", "delta"}
        assert set(await asyncio.gather(*(chat.echo() for chat in others))) == {3}

        assert proxy.metric("tunnels_open") == TUNNELS
        assert proxy.metric("tunnels_open", upstream="beta") == 0
        assert proxy.metric("tunnels_total") == TUNNELS + len(ended)
        assert proxy.metric("affinity_breaks_total") == len(ended)
        for code, count in codes.items():
            assert proxy.metric("tunnel_closes_total", upstream="beta", initiator="upstream", code=str(code)) == count
        assert proxy.metric("tunnel_closes_total") == len(ended)
    finally:
        await asyncio.gather(*(chat.close() for chat in chats))
