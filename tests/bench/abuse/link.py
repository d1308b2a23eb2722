"""A client's connection that sends each piece in a write of its own, and reads as much as its kind of abuse wants."""

from __future__ import annotations

import re
import select
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Self

from tests.bench.abuse.app import MARK
from tests.bench.abuse.kinds import Until
from tests.bench.certificate import client_context
from tests.bench.results import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_TIMEOUT_S: Final = 30.0
_READ_BYTES: Final = 2**18
_SIP_BYTES: Final = 4096
_SIPS: Final = 64
_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_OVERLAP_BYTES: Final = 12  # of two reads: the longest part of a status line or a mark that the first may end with


class Effort:
    """The CPU time of the clients for what they send and read, without what it takes to think of it."""

    def __init__(self) -> None:
        self.cpu_ns = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add what this thread spends meanwhile."""
        before_ns = time.thread_time_ns()
        try:
            yield
        finally:
            self.cpu_ns += time.thread_time_ns() - before_ns


class Link:
    """One connection. What the proxy does not take at once is kept, and sent while the answer is read."""

    def __init__(self, port: int, effort: Effort, *, shakes_hands: bool = False, receive_bytes: int = 0) -> None:
        self._effort = effort
        with effort.counted():
            self._link = _connect(port, shakes_hands=shakes_hands, receive_bytes=receive_bytes)
        self._unsent = memoryview(b"")
        self._status = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._effort.counted():
            self._link.close()

    def send(self, piece: bytes) -> None:
        """Send a piece in one write as far as that goes; a proxy that has closed is no error."""
        self._unsent = memoryview(bytes(self._unsent) + piece if self._unsent else piece)
        with self._effort.counted():
            self._push()

    def _push(self) -> None:
        if self._unsent:
            with suppress(BlockingIOError):
                try:
                    self._unsent = self._unsent[self._link.send(self._unsent) :]
                except ConnectionError:  # answered and closed before it had all: the answer tells
                    self._unsent = memoryview(b"")

    def receive(self, until: Until, status: int, marks: int = 1) -> int:
        """Read until the unit is over and return the status of the last response.

        `status` is the one that is waited for, `marks` how many answers of the application are. Raises RunError after
        30 s without an end of it, and where the connection ends too early.
        """
        with self._effort.counted():
            if until is Until.NOTHING:
                self._send_rest()
            else:
                self._receive(until, status, marks)
        return self._status

    def _send_rest(self) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while self._unsent:
            self._wait(select.POLLOUT, deadline)
            self._push()

    def _receive(self, until: Until, status: int, marks: int) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        tail, sips = b"", 0
        while data := self._read(_SIP_BYTES if until is Until.SIPS else _READ_BYTES, deadline):
            text = tail + data
            marks -= text.count(MARK)
            statuses = _STATUS.findall(text)
            if statuses:
                self._status = int(statuses[-1])
            tail = text.rpartition(MARK)[2][-_OVERLAP_BYTES:]  # no mark is counted twice
            sips += 1
            if until is Until.ANSWER:
                is_over = marks <= 0
            elif until is Until.STATUS:
                is_over = self._status == status
            else:
                is_over = until is Until.BYTE or (until is Until.SIPS and sips == _SIPS)
            if is_over:
                return
        if until is not Until.END:
            raise RunError(f"closed before its answer was whole; the last status was {self._status}")

    def _read(self, size_bytes: int, deadline: float) -> bytes:
        while True:
            try:
                return self._link.recv(size_bytes)
            except BlockingIOError:
                self._wait(select.POLLIN | (select.POLLOUT if self._unsent else 0), deadline)
                self._push()
            except ConnectionError:
                return b""

    def _wait(self, events: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._link, events)
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise RunError(f"nothing more came for {_TIMEOUT_S:g} s; the last status was {self._status}")


def _connect(port: int, *, shakes_hands: bool, receive_bytes: int) -> socket.socket:
    link = socket.socket()
    try:
        if receive_bytes:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        link.settimeout(_TIMEOUT_S)
        link.connect(("127.0.0.1", port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if shakes_hands:
            link = client_context().wrap_socket(link)
        link.setblocking(False)
    except BaseException:
        link.close()
        raise
    return link
