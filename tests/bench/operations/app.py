"""The app behind the proxy, as a program of its own: `python -m tests.bench.operations.app NAME --port PORT ...`.

It takes tunnels (`GET /ws?tunnel=N`), on each of which it sends and receives numbered messages, and requests with ids
(`GET` and `POST` of `/fast`, `/slow` and `/large`), each of which it writes to its log before it answers.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import uvloop
from typing_extensions import override

from tests.bench.operations.ends import End, Pace, as_transport
from tests.bench.operations.messages import UP
from tests.bench.operations.remote import serve_words
from tests.helpers.ledger import RECEIPT, Arrival, Receipt

SLOW_S: Final = 0.2  # between the arrival of a request for /slow and its response
LARGE_BYTES: Final = 256 * 1024
_BACKLOG: Final = 4096
_END: Final = b"\r\n\r\n"
_START: Final = re.compile(rb"(GET|POST) /([a-z]+)(?:\?tunnel=([0-9]{1,10}))? HTTP/1\.1\r\n")
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ([0-9]{1,9})\r\n", re.IGNORECASE)
_FIELD: Final = re.compile(rb"^(x-id|x-client): ([\x21-\x7e]+)\r$", re.IGNORECASE | re.MULTILINE)
_SWITCH: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"  # to the key of RFC 6455, section 1.3
    b"X-App: %b\r\n\r\n"
)
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n%b: %b\r\n\r\n%b"


class App:
    """What one process holds: its tunnels, also those that have ended, and the log of requests."""

    def __init__(self, name: str, log: Path, pace: Pace) -> None:
        self.name = name
        self.pace = pace
        self.ends: dict[int, End] = {}
        self.doubled_tunnels = 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._requests = 0

    def open_tunnel(self, tunnel: int, transport: asyncio.Transport, rest: bytes) -> None:
        """Answer a handshake, and send messages from now on."""
        self.doubled_tunnels += tunnel in self.ends
        self.ends[tunnel] = end = End(tunnel, UP, self.pace, lambda _: None)
        transport.write(_SWITCH % self.name.encode())
        end.open(transport, rest)

    def receive(self, method: str, fields: dict[bytes, bytes]) -> bytes:
        """Log a request and return the receipt for its answer."""
        request_id, client = (fields.get(name, b"-").decode("ascii") for name in (b"x-id", b"x-client"))
        os.write(self._log, Arrival(self.name, 1, method, request_id, client).write())
        self._requests += 1
        receipt = Receipt(self.name, 1, os.getpid(), request_id, client, self._requests, 0)
        return json.dumps(asdict(receipt)).encode()

    async def on_start(self, _: str) -> None:
        self.pace.start()

    async def on_freeze(self, _: str) -> None:
        """Look no more at what is there now when garbage is collected: that would stop all tunnels for a while."""
        gc.collect()
        gc.freeze()

    async def on_phase(self, name: str) -> None:
        self.pace.begin_phase(name)

    async def on_stop(self, _: str) -> None:
        self.pace.stop()

    async def on_totals(self, _: str) -> dict[str, int | float]:
        return self.pace.totals()

    async def on_report(self, _: str) -> dict[str, Any]:
        tunnels = {str(number): end.report() for number, end in self.ends.items()}
        return {"tunnels": tunnels, "doubled_tunnels": self.doubled_tunnels, **self.pace.report()}


class Front(asyncio.Protocol):
    """A connection of the proxy before it is a tunnel: one request after the other, each answered in turn."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._held = bytearray()
        self._is_answering = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = as_transport(transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._held += data
        self._go_on()

    def _go_on(self) -> None:
        end = self._held.find(_END)
        if end < 0 or self._is_answering:
            return
        head = bytes(self._held[: end + 2])
        length = _LENGTH.search(head)
        size = end + len(_END) + (int(length[1]) if length else 0)
        if len(self._held) < size:
            return
        rest = bytes(self._held[size:])
        start = _START.match(head)
        if start is None:
            self._transport.abort()
        elif start[2] == b"ws":
            self._app.open_tunnel(int(start[3]), self._transport, rest)
        else:
            self._held[:] = rest
            self._answer(start[1].decode(), start[2], head)

    def _answer(self, method: str, path: bytes, head: bytes) -> None:
        fields = {name.lower(): value for name, value in _FIELD.findall(head)}
        receipt = self._app.receive(method, fields)
        body = b"x" * LARGE_BYTES if path == b"large" else receipt
        response = _OK % (len(body), RECEIPT.encode(), receipt, body)
        if path == b"slow":
            self._is_answering = True
            asyncio.get_running_loop().call_later(SLOW_S, self._write_late, response)
        else:
            self._transport.write(response)
            self._go_on()

    def _write_late(self, response: bytes) -> None:
        self._is_answering = False
        if not self._transport.is_closing():
            self._transport.write(response)
            self._go_on()


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process is ended."""
    app = App(options.name, options.log, Pace(options.period))
    await asyncio.get_running_loop().create_server(lambda: Front(app), "127.0.0.1", options.port, backlog=_BACKLOG)
    await serve_words(options.words, app)


def main() -> None:
    parser = argparse.ArgumentParser(description="An app with numbered messages")
    parser.add_argument("name")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--period", type=float, required=True, help="between two messages on a tunnel, in seconds")
    parser.add_argument("--log", type=Path, required=True, help="file for the requests that arrived")
    parser.add_argument("--words", type=Path, required=True, help="the socket on which it is told what to do")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
