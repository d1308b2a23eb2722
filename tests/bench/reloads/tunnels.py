"""The clients that hold WebSockets: each sends a numbered message every 100 ms, and comes back when it is cut.

A cut is every end of an open WebSocket that its client did not ask for, with a Close frame or without one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.messages import ANSWER, PING, PONG, parse_head, write_frame
from tests.bench.results import RunError
from tests.bench.tunnel import NumberedTunnel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PERIOD_S: Final = 0.1
WAIT_S: Final = 30.0
_BACK_AFTER_S: Final = 0.1
_POLL_S: Final = 0.02


@dataclass
class Tally:
    """What all clients saw. `cuts_s` are instants of the loop's clock; `codes` counts their Close codes, None: none."""

    cuts_s: list[float] = field(default_factory=list)
    codes: Counter[int | None] = field(default_factory=Counter)
    opened: int = 0
    refused: int = 0
    answered: int = 0
    unanswered: int = 0  # sent and not answered when the WebSocket ended, whoever ended it
    wrong: int = 0  # answers that were not the next: doubled, out of order, or of another client
    longest_s: float = 0.0  # from a message to its answer

    def cuts_within(self, windows_s: Sequence[tuple[float, float]]) -> int:
        """Return how many cuts came in any of these times, which may overlap: begin and end of each."""
        return sum(any(begin_s <= at_s <= end_s for begin_s, end_s in windows_s) for at_s in self.cuts_s)


class Tunnel(NumberedTunnel):
    """One WebSocket to the application, which adds to each number the port that answers."""

    def __init__(self, tally: Tally, cookie: str) -> None:
        super().__init__(cookie, PERIOD_S)
        self.port = 0  # of the client's side
        self.upstream_port = 0  # that answered last
        self._tally = tally

    def leave(self) -> None:
        """End it as a browser does that leaves the page; what waits for an answer is waited for."""
        self._is_leaving = self._is_silent = True
        if self.is_quiet and self.is_open:
            self._leave_now()

    def _leave_now(self) -> None:
        self.say_goodbye()
        self._transport.close()

    @override
    def abort(self) -> None:
        """End it at once, uncounted."""
        self._is_leaving = True
        super().abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.port = transport.get_extra_info("sockname")[1]
        super().connection_made(transport)

    @override
    def on_open(self, head: bytes) -> None:
        self.cookie = parse_head(head).cookie or self.cookie
        self._tally.opened += 1

    @override
    def on_message(self, payload: bytes) -> None:
        self._on_answer(*ANSWER.unpack(payload))

    @override
    def on_other(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._transport.write(write_frame(PONG, payload, is_masked=True))

    def _on_answer(self, number: int, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        away_s = self.take(number)
        if away_s is None:
            self._tally.wrong += 1
            return
        self._tally.answered += 1
        self._tally.longest_s = max(self._tally.longest_s, away_s)
        if self._is_leaving and self.is_quiet:
            self._leave_now()

    @override
    def on_end(self, exc: Exception | None) -> None:
        self._tally.unanswered += len(self._sent_s)
        if not self._is_leaving:
            self._tally.cuts_s.append(self._loop.time())
            self._tally.codes[self._code] += 1


class Visitor:
    """A client that holds one WebSocket after the other, with the affinity cookie that it was given."""

    def __init__(self, port: int, tally: Tally) -> None:
        self.tunnel: Tunnel | None = None
        self._port, self._tally = port, tally
        self._cookie = ""
        self._is_stopping = False
        self._task = spawn(self._run(), "visitor")

    @property
    def is_open(self) -> bool:
        return self.tunnel is not None and self.tunnel.is_open and self.tunnel.upstream_port > 0

    async def _run(self) -> None:
        while not self._is_stopping:
            try:
                tunnel = await self._open()
            except (OSError, RunError, TimeoutError):
                self._tally.refused += 1
            else:
                self._cookie, self.tunnel = tunnel.cookie, tunnel
                await tunnel.ended
            await asyncio.sleep(_BACK_AFTER_S)

    async def _open(self) -> Tunnel:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT_S):
            _, tunnel = await loop.create_connection(lambda: Tunnel(self._tally, self._cookie), "127.0.0.1", self._port)
            try:
                await tunnel.opened
            except asyncio.CancelledError:
                tunnel.abort()
                raise
        return tunnel

    async def stop(self) -> None:
        """End its WebSocket and come back no more."""
        self._is_stopping = True
        if self.tunnel is not None and self.tunnel.is_open:
            self.tunnel.leave()
        _, late = await asyncio.wait([self._task], timeout=_BACK_AFTER_S * 20)
        for task in late:
            if self.tunnel is not None and self.tunnel.is_open:
                self.tunnel.abort()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def all_open(visitors: Iterable[Visitor]) -> None:
    """Return when each holds a WebSocket that has been answered; raise TimeoutError after 30 s."""
    async with asyncio.timeout(WAIT_S):
        for visitor in visitors:
            while True:
                if visitor.is_open:
                    break
                await asyncio.sleep(_POLL_S)
