"""Processes of the fault app, and clients that keep a ledger of what they send and are answered."""

import asyncio
import json
import signal
from collections.abc import Mapping
from dataclasses import asdict
from typing import Self

from typing_extensions import override
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from tests.helpers.counting import CountingApps
from tests.helpers.ledger import Arrival, Ledger, Receipt, Verdict
from tests.helpers.plain_client import AbortedError, PlainClient, read_cookie
from tests.helpers.processes import HTTP, Children, StickyProxy, wait_until

DEADLINE_S = 60.0


class FaultApps(CountingApps):
    """One process for each name; with `hosts` (address by name) they share one port."""

    program = "fault_app"

    def __init__(self, children: Children, *names: str, hosts: Mapping[str, str] | None = None) -> None:
        self._hosts = dict.fromkeys(names, "127.0.0.1") | dict(hosts or {})
        super().__init__(children, *names, start=False)
        if hosts:
            self._ports = dict.fromkeys(names, self._ports[names[0]])
        for name in names:
            self.start(name)
        for name in names:
            self.wait_until_ready(name)

    @property
    @override
    def upstreams(self) -> Mapping[str, str]:
        return {name: f"http://{self._hosts[name]}:{port}" for name, port in self._ports.items()}

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process."""
        self._running[name].send(number)

    def restart(self, name: str) -> None:
        """End a process with SIGTERM, and return when another has taken its place."""
        self._running[name].stop()
        self.start(name)
        self.wait_until_ready(name)

    def arrivals(self) -> list[Arrival]:
        """Return what reached the processes; it is complete as soon as they have answered or ended."""
        logs = [self._log(name).read_text() for name in self._ports if self._log(name).exists()]
        return [Arrival.read(line) for log in logs for line in log.splitlines()]

    def wait_for_arrival(self, client: str, method: str) -> str:
        """Wait until a request of a client has reached a process, and return the name of that process."""

        def found() -> list[str]:
            return [one.app for one in self.arrivals() if (one.client, one.method) == (client, method)]

        wait_until(lambda: bool(found()), f"a {method} of {client} arrives")
        return found()[0]

    def take_lag(self, name: str) -> Mapping[str, float]:
        """Return how late the timers of a process fired since the last call: p50, p99 and max, in seconds."""
        with HTTP.open(f"{self.upstreams[name]}/lag", timeout=DEADLINE_S) as response:
            return dict(json.load(response))


class Visitor:
    """A browser: it keeps its cookie and its connection, and repeats nothing by itself.

    `verdicts` are how its requests ended, in the order in which they did.
    """

    def __init__(self, ledger: Ledger, port: int, name: str) -> None:
        self.name = name
        self.cookie: str | None = None
        self.verdicts: list[Verdict] = []
        self._messages = 0
        self._ledger = ledger
        self._port = port
        self._connection: PlainClient | None = None
        self._tunnel: ClientConnection | None = None

    @property
    def processes(self) -> list[tuple[str, int]]:
        """The processes (app and generation) that answered, in order, without repeats."""
        answered = [(one.receipt.app, one.receipt.generation) for one in self.verdicts if one.receipt is not None]
        return [process for at, process in enumerate(answered) if at == 0 or answered[at - 1] != process]

    @property
    def app(self) -> str:
        """The name of the app that answered last."""
        return self.processes[-1][0]

    async def ask(self, target: str, method: str = "GET") -> Verdict:
        """Send a request, and return how it ended; raise TimeoutError if it does not."""
        request_id = self._ledger.begin(method, self.name)
        try:
            if self._connection is None:
                self._connection = await PlainClient.connect(self._port)
            answer = await self._connection.ask(target, method=method, fields=self.fields(request_id))
        except (AbortedError, ConnectionError) as error:
            await self.disconnect()
            broken = "aborted" if isinstance(error, AbortedError) else "no connection"
            return self.note(request_id, Verdict(broken=broken))
        if answer.fields.get("connection") == "close":
            await self.disconnect()
        receipt = Receipt.read(answer.fields)
        if receipt is not None:
            assert json.loads(answer.body) == asdict(receipt)
        return self.note(request_id, Verdict(answer.status, receipt=receipt, cookie=answer.cookie))

    async def open_tunnel(self) -> Verdict:
        """Open a tunnel, and return how its handshake ended."""
        request_id = self._ledger.begin("GET", self.name)
        try:
            self._tunnel = await connect(
                f"ws://127.0.0.1:{self._port}/ws",
                additional_headers=self.fields(request_id),
                proxy=None,
                open_timeout=DEADLINE_S,
                ping_interval=None,
            )
            response = self._tunnel.response
        except InvalidStatus as error:
            response = error.response
        except (InvalidHandshake, ConnectionError):
            return self.note(request_id, Verdict(broken="aborted"))
        assert response is not None
        fields = {name.lower(): value for name, value in response.headers.raw_items()}
        cookie = read_cookie(fields.get("set-cookie", ""))
        return self.note(request_id, Verdict(response.status_code, receipt=Receipt.read(fields), cookie=cookie))

    async def echo(self) -> tuple[str, int]:
        """Send a message over the tunnel; return the app that answered, and which of this tunnel it says it is."""
        assert self._tunnel is not None
        self._messages += 1
        text = f"{self.name} {self._messages}"
        async with asyncio.timeout(DEADLINE_S):
            await self._tunnel.send(text)
            app, count, echoed = str(await self._tunnel.recv()).split(" ", 2)
        assert echoed == text
        return app, int(count)

    async def wait_closed(self) -> int | None:
        """Return the code of the Close frame that ends the tunnel; None where it ends without one."""
        assert self._tunnel is not None
        async with asyncio.timeout(DEADLINE_S):
            try:
                message = await self._tunnel.recv()
            except ConnectionClosed as error:
                return error.rcvd.code if error.rcvd is not None else None
        raise AssertionError(f"a message that nobody asked for: {message!r}")

    async def disconnect(self) -> None:
        """Close the connection; the next request opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.__aexit__(None, None, None)

    async def leave(self) -> None:
        """Close the connection and the tunnel."""
        await self.disconnect()
        if self._tunnel is not None:
            await self._tunnel.close()

    def fields(self, request_id: str) -> dict[str, str]:
        """Return the fields that a request of this client carries."""
        return {"X-Client": self.name, "X-Id": request_id, **({"Cookie": self.cookie} if self.cookie else {})}

    def note(self, request_id: str, verdict: Verdict) -> Verdict:
        """Enter how a request ended."""
        self.verdicts.append(verdict)
        self.cookie = verdict.cookie or self.cookie
        return self._ledger.end(request_id, verdict)


class Crowd:
    """Visitors of one proxy with one ledger; an asynchronous context manager that lets them leave."""

    def __init__(self, port: int) -> None:
        self.ledger = Ledger()
        self.visitors: list[Visitor] = []
        self._port = port

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(visitor.leave() for visitor in self.visitors))

    def new(self, count: int) -> list[Visitor]:
        """Return new visitors, who have sent nothing yet."""
        first = len(self.visitors)
        new = [Visitor(self.ledger, self._port, f"client-{first + number}") for number in range(count)]
        self.visitors += new
        return new

    async def arrive(self, count: int) -> list[Visitor]:
        """Let new visitors send a request each, one after the other, so that they are spread evenly."""
        new = self.new(count)
        for visitor in new:
            await visitor.ask("/take")
        return new

    def at(self, app: str) -> list[Visitor]:
        """Return those whom an app answered last."""
        return [visitor for visitor in self.visitors if visitor.processes and visitor.app == app]

    @property
    def moved(self) -> list[Visitor]:
        """Those who were answered by more than one process."""
        return [visitor for visitor in self.visitors if len(visitor.processes) > 1]


class Load:
    """Visitors who send one request after the other, every third a POST, until told to stop; a context manager."""

    def __init__(self, visitors: list[Visitor], target: str) -> None:
        self._visitors = visitors
        self._target = target
        self._is_over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run(visitor)) for visitor in self._visitors]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over.set()
        # Each ends with its request under way: what is not answered is an error here.
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*self._tasks)

    async def go_on(self, count: int) -> None:
        """Wait until each visitor has ended so many more requests."""
        goals = [len(visitor.verdicts) + count for visitor in self._visitors]
        async with asyncio.timeout(DEADLINE_S):
            while any(len(one.verdicts) < goal for one, goal in zip(self._visitors, goals, strict=True)):
                await asyncio.sleep(0.01)
                for task in self._tasks:
                    if task.done():
                        task.result()

    async def _run(self, visitor: Visitor) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            await visitor.ask(self._target, "POST" if number % 3 == 0 else "GET")


def state_of(proxy: StickyProxy, name: str) -> Mapping[str, object]:
    """Return what the admin API says of one upstream."""
    return dict(proxy.upstreams()[name])


async def wait_for_state(proxy: StickyProxy, name: str, **expected: object) -> None:
    """Wait until the admin API says so of an upstream."""
    await asyncio.to_thread(
        wait_until, lambda: expected.items() <= state_of(proxy, name).items(), f"{name} is {expected}"
    )
