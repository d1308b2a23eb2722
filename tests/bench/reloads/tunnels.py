"""The clients that hold WebSockets: each sends a numbered message every 100 ms, and comes back when it is cut.

A cut is every end of an open WebSocket that its client did not ask for, with a Close frame or without one.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.reloads.messages import (
    ANSWER,
    BINARY,
    CLOSE,
    HEAD_END,
    NUMBER,
    PING,
    PONG,
    FrameReader,
    parse_head,
    write_frame,
)
from tests.bench.results import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PERIOD_S: Final = 0.1
WAIT_S: Final = 30.0
_BACK_AFTER_S: Final = 0.1
_SWITCHING: Final = 101
_POLL_S: Final = 0.02
_NORMAL: Final = struct.pack("!H", 1000)


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


class Tunnel(asyncio.Protocol):
    """One WebSocket; `opened` and `ended` are done when it is, and `opened` fails with RunError if it never is."""

    def __init__(self, tally: Tally, cookie: str) -> None:
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.cookie = cookie
        self.port = 0  # of the client's side
        self.upstream_port = 0  # that answered last
        self._loop, self._tally = loop, tally
        self._head = bytearray()
        self._frames = FrameReader()
        self._sent_s: list[float] = []  # of the messages without an answer
        self._next_number = 0  # of the next answer
        self._code: int | None = None
        self._is_leaving = False
        self._is_silent = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self.opened.done() and not self.ended.done()

    @property
    def is_quiet(self) -> bool:
        """Return whether nothing that was sent still waits for its answer."""
        return not self._sent_s

    def be_silent(self) -> None:
        """Send no more messages."""
        self._is_silent = True

    def leave(self) -> None:
        """End it as a browser does that leaves the page; what waits for an answer is waited for."""
        self._is_leaving = self._is_silent = True
        if self.is_quiet and self.is_open:
            self._say_goodbye()

    def abort(self) -> None:
        """End it at once, uncounted."""
        self._is_leaving = True
        self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.port = transport.get_extra_info("sockname")[1]
        cookie = f"Cookie: {self.cookie}\r\n" if self.cookie else ""
        self._transport.write(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n" + cookie.encode() + b"\r\n"
        )

    @override
    def data_received(self, data: bytes) -> None:
        if not self.opened.done():
            self._head += data
            head, end, data = bytes(self._head).partition(HEAD_END)
            if not end:
                return
            self._on_head(head + end)
        for opcode, payload in self._frames.feed(data):
            self._on_frame(opcode, payload)

    def _on_head(self, text: bytes) -> None:
        head = parse_head(text)
        if head.status != _SWITCHING:
            self.opened.set_exception(RunError(f"no 101 but {text[:100]!r}"))
            self._transport.abort()
            return
        self.cookie = head.cookie or self.cookie
        self._tally.opened += 1
        self.opened.set_result(None)
        self._send()

    def _send(self) -> None:
        if self._is_silent or self._transport.is_closing():
            return
        number = self._next_number + len(self._sent_s)
        self._transport.write(write_frame(BINARY, NUMBER.pack(number), is_masked=True))
        self._sent_s.append(self._loop.time())
        self._timer = self._loop.call_later(PERIOD_S, self._send)

    def _on_frame(self, opcode: int, payload: bytes) -> None:
        if opcode == BINARY:
            self._on_answer(*ANSWER.unpack(payload))
        elif opcode == PING:
            self._transport.write(write_frame(PONG, payload, is_masked=True))
        elif opcode == CLOSE:
            self._code = int.from_bytes(payload[:2], "big") if payload else 1005
            if not self._is_leaving:
                self._transport.write(write_frame(CLOSE, payload, is_masked=True))
            self._transport.close()

    def _on_answer(self, number: int, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        if number != self._next_number or not self._sent_s:
            self._tally.wrong += 1
            return
        self._next_number += 1
        self._tally.answered += 1
        self._tally.longest_s = max(self._tally.longest_s, self._loop.time() - self._sent_s.pop(0))
        if self._is_leaving and self.is_quiet:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        self._transport.write(write_frame(CLOSE, _NORMAL, is_masked=True))
        self._transport.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tally.unanswered += len(self._sent_s)
        if not self.opened.done():
            self.opened.set_exception(RunError(f"closed before it was open: {exc}"))
        elif self.opened.exception() is None and not self._is_leaving:
            self._tally.cuts_s.append(self._loop.time())
            self._tally.codes[self._code] += 1
        self.ended.set_result(None)


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
