"""A client's WebSocket on which numbered messages are sent, and are to come back one after the other."""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from collections import deque
from typing import Final, cast

from typing_extensions import override

from tests.bench.messages import BINARY, CLOSE, HEAD_END, NUMBER, FrameReader, parse_head, write_frame
from tests.bench.results import RunError

_SWITCHING: Final = 101
_NORMAL: Final = struct.pack("!H", 1000)
_NO_CODE: Final = 1005  # RFC 6455, section 7.1.5: of a Close frame without one


class NumberedTunnel(asyncio.Protocol, ABC):
    """One WebSocket; `opened` and `ended` are done when it is, and `opened` fails with RunError if it never is.

    What is counted is the matter of the class that derives from this one.
    """

    def __init__(self, cookie: str, period_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.cookie = cookie
        self._period_s = period_s
        self._head = bytearray()
        self._frames = FrameReader()
        self._sent_s = deque[float]()  # of the messages that have not come back
        self._next = 0  # number of the next that comes back
        self._code: int | None = None  # of the Close frame that came
        self._is_leaving = self._is_silent = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self.opened.done() and not self.ended.done()

    @property
    def is_quiet(self) -> bool:
        """Return whether nothing that was sent has still to come back."""
        return not self._sent_s

    @abstractmethod
    def on_open(self, head: bytes) -> None:
        """Note the head of the 101; messages are sent from now on."""

    @abstractmethod
    def on_message(self, payload: bytes) -> None:
        """Judge what came; `take` says whether it is the next."""

    @abstractmethod
    def on_other(self, opcode: int, payload: bytes) -> None:
        """Judge a frame that is neither a message nor a Close frame."""

    @abstractmethod
    def on_end(self, exc: Exception | None) -> None:
        """Count the end of a WebSocket that was open."""

    def be_silent(self) -> None:
        """Send no more messages."""
        self._is_silent = True

    def abort(self) -> None:
        """End it at once."""
        self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
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
            if opcode == BINARY:
                self.on_message(payload)
            elif opcode == CLOSE:
                self._on_close(payload)
            else:
                self.on_other(opcode, payload)

    def _on_head(self, head: bytes) -> None:
        if parse_head(head).status != _SWITCHING:
            self.opened.set_exception(RunError(f"no 101 but {head[:100]!r}"))
            self._transport.abort()
            return
        self.on_open(head)
        self.opened.set_result(None)
        self._tick()

    def _tick(self) -> None:
        """Send a message now, and another one after each period."""
        if self._is_silent or self._transport.is_closing():
            return
        self.send(self._next + len(self._sent_s))
        self._sent_s.append(self._loop.time())
        self._timer = self._loop.call_later(self._period_s, self._tick)

    def send(self, number: int) -> None:
        """Send a message."""
        self._transport.write(write_frame(BINARY, NUMBER.pack(number), is_masked=True))

    def take(self, number: int) -> float | None:
        """Return how long (s) a message was away that has come back; None if it is not the next, or was never sent."""
        if number != self._next or not self._sent_s:
            return None
        self._next += 1
        return self._loop.time() - self._sent_s.popleft()

    def _on_close(self, payload: bytes) -> None:
        self._code = int.from_bytes(payload[:2], "big") if payload else _NO_CODE
        if not self._is_leaving:
            self._transport.write(write_frame(CLOSE, payload, is_masked=True))
        self._transport.close()

    def say_goodbye(self) -> None:
        """Send the Close frame of a client that leaves."""
        self._transport.write(write_frame(CLOSE, _NORMAL, is_masked=True))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self.opened.done():
            self.opened.set_exception(RunError(f"closed before it was open: {exc}"))
        elif self.opened.exception() is None:
            self.on_end(exc)
        self.ended.set_result(None)
