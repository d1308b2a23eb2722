"""The visitors: each has one session, on which numbered messages and counted requests show whether it stays whole.

A session is some tunnels one after the other, each of which its client ends when it has lived long enough, with
requests beside them; or, for half of the requests, requests alone. All of them carry the cookie that the first answer
gave. The app counts the requests of a visitor in its memory: where the count does not go on, the session was moved.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.messages import NUMBER
from tests.bench.results import RunError
from tests.bench.tunnel import NumberedTunnel
from tests.helpers.plain_client import AbortedError, PlainClient

if TYPE_CHECKING:
    from types import TracebackType

_PARTS: Final = (1, 2)  # of a session: so many tunnels one after the other
_BETWEEN_S: Final = (0.0, 0.5)  # between two tunnels of a session
_WITHOUT_TUNNEL_S: Final = 0.5  # between two requests where nothing else keeps the session
_BACK_AFTER_S: Final = 0.1  # of whoever takes the place of a visitor that was lost
_WAIT_S: Final = 30.0
_NORMAL: Final = 1000
_TOLD: Final = 8  # failures that are told in full


@dataclass(frozen=True)
class Habits:
    """What visitors do: so many tunnels are open, so many requests come in a second, half of them beside a tunnel.

    `life_s` are the shortest and the longest life of a tunnel, or of a part of a session without one. `idle_s` is what
    the proxy waits before a session without anything open has ended; `returning` is the part of the visitors that come
    back soon after that, with their cookies.
    """

    sockets: int = 200
    requests_per_s: float = 200.0
    period_s: float = 0.2
    idle_s: float = 2.0
    returning: float = 0.0
    life_s: tuple[float, float] = (2.0, 8.0)

    @property
    def places_without(self) -> int:
        """How many sessions without a tunnel there are at a time."""
        return round(self.requests_per_s / 2 * _WITHOUT_TUNNEL_S)

    @property
    def between_requests_s(self) -> float:
        """What lies between two requests beside one tunnel."""
        return 2 * self.sockets / self.requests_per_s if self.requests_per_s else float("inf")


@dataclass
class Tally:
    """What all visitors saw."""

    requests: int = 0
    failed: int = 0
    opened: int = 0  # tunnels
    refused: int = 0  # tunnels that did not open
    ended: int = 0  # by their clients
    early: Counter[str] = field(default_factory=Counter)  # ended by somebody else, by Close code
    messages: int = 0
    lost: int = 0  # sent, and never come back
    wrong: int = 0  # come back twice, out of order, or never sent
    sessions: int = 0
    moved: int = 0  # while they were open
    moved_at_once: int = 0  # between the first and the second request, when by definition there is no session yet
    unjudged: int = 0  # requests so long after what came before that the session may have ended
    stale: int = 0  # visitors that came with the cookie of a generation that is gone
    longest_request_s: float = 0.0
    longest_echo_s: float = 0.0
    told: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Keep the first few of what went wrong."""
        if len(self.told) < _TOLD:
            self.told.append(text)


class Tunnel(NumberedTunnel):
    """One WebSocket to an app, `app`, that echoes."""

    def __init__(self, tally: Tally, cookie: str, period_s: float) -> None:
        super().__init__(cookie, period_s)
        self.app = ""  # its id
        self._tally = tally

    @override
    def on_open(self, head: bytes) -> None:
        self._tally.opened += 1
        self.app = head.lower().partition(b"x-app: ")[2].partition(b"\r\n")[0].decode()

    @override
    def send(self, number: int) -> None:
        super().send(number)
        self._tally.messages += 1

    @override
    def on_message(self, payload: bytes) -> None:
        away_s = self.take(*NUMBER.unpack(payload)) if len(payload) == NUMBER.size else None
        if away_s is None:
            self._tally.wrong += 1
        else:
            self._tally.longest_echo_s = max(self._tally.longest_echo_s, away_s)
            self._leave_if_quiet()

    @override
    def on_other(self, opcode: int, payload: bytes) -> None:
        self._tally.wrong += 1

    async def leave(self) -> None:
        """End it as a client does, once every message has come back; raise TimeoutError where one does not."""
        self._is_leaving = self._is_silent = True
        self._leave_if_quiet()
        async with asyncio.timeout(_WAIT_S):
            await asyncio.shield(self.ended)

    def _leave_if_quiet(self) -> None:
        if self._is_leaving and self.is_quiet and not self._transport.is_closing():
            self.say_goodbye()

    @override
    def on_end(self, exc: Exception | None) -> None:
        self._tally.lost += len(self._sent_s)
        if self._is_leaving and self._code == _NORMAL and self.is_quiet:
            self._tally.ended += 1
        else:
            code = "none" if self._code is None else str(self._code)
            self._tally.early[code] += 1
            self._tally.tell(f"a tunnel to {self.app} ended early, Close code {code}: {exc}")


class Lost(Exception):  # noqa: N818 -- no error of this program
    """A request or a tunnel of the visitor failed; it is counted, and the visitor comes back as another."""


class Visitor:
    """One session, from its first request to its end: a context manager that closes its connection."""

    _numbers = itertools.count(1)

    def __init__(self, port: int, tally: Tally, habits: Habits, cookie: str = "") -> None:
        self.cookie = cookie
        self.generation = 0  # of the app process that answered last
        self.tunnel: Tunnel | None = None
        self._port, self._tally, self._habits = port, tally, habits
        self._name = f"visitor-{next(self._numbers)}"
        self._client: PlainClient | None = None
        self._facts: dict[str, Any] = {}
        self._asked = 0
        self._kept_s = 0.0  # when the session was surely open: the last request was sent, or the last tunnel ended
        tally.sessions += 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.hang_up()
        if self.tunnel is not None and not self.tunnel.ended.done():
            self.tunnel.abort()

    def hang_up(self) -> None:
        """Close the visitor's own connection; the next request makes another."""
        if self._client is not None:
            self._client._writer.transport.abort()
            self._client = None

    async def ask(self) -> None:
        """Ask on the visitor's own connection, and judge where the answer comes from; raise Lost."""
        tally, loop = self._tally, asyncio.get_running_loop()
        sent_s = loop.time()
        tally.requests += 1
        has_tunnel = self.tunnel is not None and self.tunnel.is_open
        try:
            if self._client is None:
                self._client = await PlainClient.connect(self._port)
            fields = {"X-Visitor": self._name} | ({"Cookie": self.cookie} if self.cookie else {})
            answer = await self._client.ask("/", fields=fields)
        except (AbortedError, OSError, TimeoutError) as error:
            tally.failed += 1
            tally.tell(f"a request failed: {type(error).__name__} {error}")
            raise Lost from error
        now_s = loop.time()
        tally.longest_request_s = max(tally.longest_request_s, now_s - sent_s)
        if answer.status != 200:
            tally.failed += 1
            tally.tell(f"a request was answered with {answer.status}: {answer.body[:100]!r}")
            raise Lost
        self.cookie = answer.cookie or self.cookie
        self._judge(json.loads(answer.body), is_open=has_tunnel or now_s - self._kept_s < self._habits.idle_s)
        self._kept_s = sent_s

    def _judge(self, facts: dict[str, Any], *, is_open: bool) -> None:
        before, self._facts = self._facts, facts
        self._asked += 1
        self.generation = int(facts["id"][1:].partition("-")[0])
        if not before or (facts["pid"] == before["pid"] and facts["count"] > before["count"]):
            return
        if self._asked == 2 and self.tunnel is None:
            self._tally.moved_at_once += 1
        elif is_open:
            self._tally.moved += 1
            self._tally.tell(f"{self._name} was moved from {before} to {facts}")
        else:
            self._tally.unjudged += 1

    async def open_tunnel(self) -> Tunnel:
        """Open a tunnel; raise Lost."""
        loop = asyncio.get_running_loop()
        make = Tunnel(self._tally, self.cookie, self._habits.period_s)
        try:
            async with asyncio.timeout(_WAIT_S):
                await loop.create_connection(lambda: make, "127.0.0.1", self._port)
                await make.opened
        except (OSError, RunError, TimeoutError) as error:
            self._tally.refused += 1
            self._tally.tell(f"a tunnel did not open: {error}")
            raise Lost from error
        is_first, self.tunnel = self.tunnel is None, make
        if make.app != self._facts["id"]:
            if is_first and self._asked == 1:
                self._tally.moved_at_once += 1
            elif loop.time() - self._kept_s < self._habits.idle_s:
                self._tally.moved += 1
                self._tally.tell(f"{self._name} was moved from {self._facts['id']} to {make.app} by its next tunnel")
            else:
                self._tally.unjudged += 1
            self._facts = {}  # its requests are counted anew there
        return make

    async def close_tunnel(self) -> None:
        """End the tunnel as a client does; raise Lost where it does not end so."""
        assert self.tunnel is not None
        try:
            await self.tunnel.leave()
        except TimeoutError as error:
            raise Lost from error
        self._kept_s = asyncio.get_running_loop().time()


class Load:
    """As many places as there are tunnels, and some without; one visitor after the other takes a place."""

    def __init__(self, port: int, habits: Habits) -> None:
        self.tally = Tally()
        self._port, self._habits = port, habits
        self._random = random.Random(7)
        self._stopping = asyncio.Event()
        self._left = deque[tuple[str, int]](maxlen=1000)  # cookies of visitors that are gone, with their generations
        self._gone = 0  # up to this generation, no process is left
        self._present: set[Visitor] = set()
        kinds = [True] * habits.sockets + [False] * habits.places_without
        self._tasks = [spawn(self._fill_place(has_tunnel=kind), "place of visitors") for kind in kinds]

    @property
    def open_tunnels(self) -> int:
        """How many tunnels are open now."""
        return sum(one.tunnel is not None and one.tunnel.is_open for one in self._present)

    def retire(self, generation: int) -> None:
        """Note that nothing is left of a generation: from now on some visitors come with cookies of it."""
        self._gone = generation

    def _take_cookie(self) -> str:
        """Return the cookie of a generation that is gone, for every second visitor, as far as there are any."""
        while self._left and self._left[0][1] <= self._gone and self._random.getrandbits(1):
            self.tally.stale += 1
            return self._left.popleft()[0]
        return ""

    async def _fill_place(self, *, has_tunnel: bool) -> None:
        cookie = ""
        await self._pause(self._random.uniform(0.0, 2.0))
        while not self._stopping.is_set():
            visitor = Visitor(self._port, self.tally, self._habits, cookie or self._take_cookie())
            cookie = ""
            self._present.add(visitor)
            try:
                async with visitor:
                    await self._visit(visitor, has_tunnel=has_tunnel)
            except Lost:
                await self._pause(_BACK_AFTER_S)
            else:
                if self._random.uniform(0.0, 1.0) < self._habits.returning:
                    cookie = visitor.cookie
                    await self._pause(self._habits.idle_s + 1.0)
                else:
                    self._left.append((visitor.cookie, visitor.generation))
            finally:
                self._present.discard(visitor)

    async def _visit(self, visitor: Visitor, *, has_tunnel: bool) -> None:
        loop = asyncio.get_running_loop()
        between_s = self._habits.between_requests_s if has_tunnel else _WITHOUT_TUNNEL_S
        await visitor.ask()
        for _ in range(self._random.choice(_PARTS)):
            if self._stopping.is_set():
                break
            if has_tunnel:
                await visitor.open_tunnel()
            until_s = loop.time() + self._random.uniform(*self._habits.life_s)
            ask_at_s = loop.time() + self._random.uniform(0.0, min(between_s, self._habits.life_s[1]))
            while loop.time() < until_s and not self._stopping.is_set():
                await self._pause(min(ask_at_s, until_s) - loop.time(), visitor.tunnel)
                if has_tunnel and visitor.tunnel is not None and visitor.tunnel.ended.done():
                    raise Lost
                if ask_at_s <= loop.time() < until_s:
                    ask_at_s += between_s
                    await visitor.ask()
            if has_tunnel:
                await visitor.close_tunnel()
                await self._pause(self._random.uniform(*_BETWEEN_S))

    async def _pause(self, seconds: float, tunnel: Tunnel | None = None) -> None:
        """Wait, but not on when the load is stopping or a tunnel has ended."""
        waits: list[asyncio.Future[Any]] = [spawn(self._stopping.wait(), "the end of the load")]
        if tunnel is not None:
            waits.append(tunnel.ended)
        try:
            await asyncio.wait(waits, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waits[0].cancel()

    async def all_open(self) -> None:
        """Return when nearly all tunnels are open; raise TimeoutError after a while."""
        async with asyncio.timeout(2 * _WAIT_S):
            while self.open_tunnels < 0.9 * self._habits.sockets:  # noqa: ASYNC110 -- each has its own events
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Let all visitors end what they do, and come back no more."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def abort(self) -> None:
        """End all at once."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
