"""The tunnels' clients, as a program of its own: `python -m tests.bench.operations.load --port PORT --tunnels N ...`.

Each client is a session: it keeps its affinity cookie, and opens its tunnel again with it when the connection is lost.
Each tunnel has a number of its own, also one that is opened again, so that both ends can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import re
import time
from pathlib import Path
from typing import Any, Final

import uvloop
from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.operations.ends import End, Pace, as_transport
from tests.bench.operations.messages import DOWN
from tests.bench.operations.remote import serve_words

_DIALS_AT_ONCE: Final = 64
_HANDSHAKE_TIMEOUT_S: Final = 30.0
_RETRY_S: Final = 0.1
_END: Final = b"\r\n\r\n"
_COOKIE: Final = re.compile(rb"\r\nset-cookie: (stickyproxy=[^;\r\n]*)", re.IGNORECASE)
_APP: Final = re.compile(rb"\r\nx-app: ([^\r\n]+)", re.IGNORECASE)
_REQUEST: Final = (
    b"GET /ws?tunnel=%d HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%b\r\n"
)


class Refused(Exception):  # noqa: N818 -- a fact, counted and tried again
    """A handshake was not answered with 101."""


class Opening(asyncio.Protocol):
    """The handshake, after which `end` takes the connection over; `answered` gets the head of the 101, or Refused."""

    def __init__(self, request: bytes, end: End) -> None:
        self._request = request
        self._end = end
        self._held = b""
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = as_transport(transport)
        self._transport.write(self._request)

    @override
    def data_received(self, data: bytes) -> None:
        self._held += data
        head, end, rest = self._held.partition(_END)
        if not end or self.answered.done():
            return
        if head.startswith(b"HTTP/1.1 101 "):
            self._end.open(self._transport, rest)  # at once: the next bytes are messages
            self.answered.set_result(head)
        else:
            self.answered.set_exception(Refused(head.split(b"\r\n")[0].decode("latin-1")))

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(Refused(f"closed before the response: {exc}"))


class Session:
    """A client with its cookie, and the app that it belongs to."""

    def __init__(self) -> None:
        self.cookie = b""
        self.app = b""


class Load:
    """All clients of this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.pace = Pace(options.period)
        self._port = options.port
        self._first = options.first
        self._tunnels = options.tunnels
        self._opened = 0
        self._sessions: dict[int, Session] = {}  # by the number of the tunnel
        self._ends: dict[int, End] = {}
        self._ports: dict[int, int] = {}
        self._reopened_ns: dict[int, int] = {}
        self._dials = asyncio.Semaphore(_DIALS_AT_ONCE)
        self._is_over = False
        self._moved = 0
        self._new_cookies = 0
        self._refused: dict[str, int] = {}

    async def open(self, session: Session) -> None:
        """Open a tunnel; raise Refused, OSError or TimeoutError."""
        tunnel = self._first + self._opened
        self._opened += 1
        cookie = b"Cookie: %b\r\n" % session.cookie if session.cookie else b""
        end = End(tunnel, DOWN, self.pace, self._on_lost)
        opening = Opening(_REQUEST % (tunnel, cookie), end)
        self._sessions[tunnel] = session
        async with self._dials, asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: opening, "127.0.0.1", self._port)
            port = transport.get_extra_info("sockname")[1]
            try:
                head = await opening.answered
            except BaseException:
                transport.abort()
                raise
        self._ends[tunnel] = end
        self._ports[tunnel] = port
        self._note_place(session, head)

    def _note_place(self, session: Session, head: bytes) -> None:
        app, cookie = _APP.search(head), _COOKIE.search(head)
        if session.app and (app is None or app[1] != session.app):
            self._moved += 1
        if session.cookie and cookie is not None:
            self._new_cookies += 1
        session.app = app[1] if app else b""
        session.cookie = cookie[1] if cookie else session.cookie

    def _on_lost(self, end: End) -> None:
        if not self._is_over:
            spawn(self._open_again(end), f"tunnel {end.tunnel} is opened again")

    async def _open_again(self, end: End) -> None:
        while not self._is_over:
            try:
                await self.open(self._sessions[end.tunnel])
            except (Refused, OSError, TimeoutError) as error:
                name = str(error) if isinstance(error, Refused) else type(error).__name__
                self._refused[name] = self._refused.get(name, 0) + 1
                await asyncio.sleep(_RETRY_S)
            else:
                self._reopened_ns[end.tunnel] = time.monotonic_ns()
                return

    # What it is told

    async def on_open(self, _: str) -> int:
        """Open all tunnels, and return how many."""
        await asyncio.gather(*(self.open(Session()) for _ in range(self._tunnels)))
        return len(self._ends)

    async def on_start(self, _: str) -> None:
        gc.collect()
        gc.freeze()  # else a collection would stop all tunnels for a while
        self.pace.start()

    async def on_phase(self, name: str) -> None:
        self.pace.begin_phase(name)

    async def on_stop(self, _: str) -> None:
        """Send no more, and open no tunnel again."""
        self._is_over = True
        self.pace.stop()

    async def on_totals(self, _: str) -> dict[str, int | float]:
        return {**self.pace.totals(), "open": sum(not end.lost_ns for end in self._ends.values())}

    async def on_report(self, _: str) -> dict[str, Any]:
        tunnels = {
            str(number): {**end.report(), "port": self._ports[number], "reopened_ns": self._reopened_ns.get(number, 0)}
            for number, end in self._ends.items()
        }
        counts = {"moved": self._moved, "new_cookies": self._new_cookies, "refused": self._refused}
        return {"tunnels": tunnels, **counts, **self.pace.report()}


async def run(options: argparse.Namespace) -> None:
    """Do what it is told until the process is ended."""
    await serve_words(options.words, Load(options))


def main() -> None:
    parser = argparse.ArgumentParser(description="Clients with numbered messages")
    parser.add_argument("--port", type=int, required=True, help="where they connect")
    parser.add_argument("--tunnels", type=int, required=True)
    parser.add_argument("--first", type=int, required=True, help="the number of the first tunnel")
    parser.add_argument("--period", type=float, required=True, help="between two messages on a tunnel, in seconds")
    parser.add_argument("--words", type=Path, required=True, help="the socket on which it is told what to do")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
