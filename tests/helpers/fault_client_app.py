"""An app in the test's own event loop: what it takes and gives, and when, is the test's to say; it notes each arrival.

| target       | what it does                                                                                   |
|--------------|------------------------------------------------------------------------------------------------|
| /word        | takes the body and answers with a word                                                         |
| /bytes/N     | answers with N bytes as fast as they are taken                                                 |
| /hold/GATE   | takes the body and answers once the gate is open                                               |
| /slow/GATE   | takes nothing of the body until the gate is open, then answers                                 |
| /halves/GATE | answers the first half of a body at once, the second once the gate is open                     |
| /end/GATE    | the same, of a body that ends with an end of file; it goes on reading                          |
| /early/GATE  | answers before the body has come whole, sends an end of file, and goes on reading              |
| /tunnel/GATE | a WebSocket: half of a frame at once, the other half once the gate is open; then it only reads |
| /flood/N     | a WebSocket: one message of N bytes as fast as it is taken; then it only reads                 |
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from types import TracebackType

BLOCK_BYTES = 64 * 1024
HALVES = (b"the first half, ", b"the second half")
FRAME = b"\x82\x7e\x04\x00" + b"x" * 1024  # RFC 6455, section 5.2: a whole binary message of 1 KiB
_LENGTH = f"Content-Length: {len(HALVES[0] + HALVES[1])}"
_SWITCH = (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
           b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")  # fmt: skip


@dataclass(eq=False)
class Arrival:
    """A request that reached the app; `end` is how its body ended: `whole`, `aborted`, or nothing as yet."""

    method: str
    target: str
    request_id: str
    length: int | None
    is_chunked: bool
    body_bytes: int = 0
    crc: int = 0
    end: str = ""
    sent_bytes: int = 0
    sent_crc: int = 0

    @property
    def gate(self) -> str:
        return self.target.rpartition("/")[2]

    def take(self, data: bytes) -> None:
        self.body_bytes += len(data)
        self.crc = zlib.crc32(data, self.crc)


def block(number: int) -> bytes:
    """Return the block of this number; no two are alike."""
    return (b"%015d\n" % number) * (BLOCK_BYTES // 16)


class FaultApp:
    """The app at `port` of 127.0.0.1; a context manager that ends all its connections."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.port = 0
        self._gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        serving = tuple(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    @property
    def upstreams(self) -> dict[str, str]:
        return {"app": f"http://127.0.0.1:{self.port}"}

    @property
    def received(self) -> Counter[tuple[str, str]]:
        """Return how often each request arrived, by method and id."""
        return Counter((arrival.method, arrival.request_id) for arrival in self.arrivals)

    def of(self, request_id: str) -> Arrival:
        """Return the one arrival of a request."""
        [arrival] = [one for one in self.arrivals if one.request_id == request_id]
        return arrival

    async def arrived(self, request_id: str) -> Arrival:
        """Wait until a request has arrived."""
        await eventually(lambda: any(one.request_id == request_id for one in self.arrivals), f"{request_id} arrives")
        return self.of(request_id)

    def open(self, gate: str) -> None:
        """Let go on what waits at a gate, and what is still to come to it."""
        self._gates[gate].set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while await self._take_request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the proxy closed a connection that it does not need any more, or the test is over
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def _take_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Take one request and answer it; False where none can follow."""
        arrival = _parse(await reader.readuntil(b"\r\n\r\n"))
        self.arrivals.append(arrival)
        gate = self._gates[arrival.gate]
        kind = arrival.target.split("/")[1]
        if kind in {"tunnel", "flood"}:
            await self._serve_tunnel(arrival, reader, writer)
            return False
        if kind == "slow":
            await gate.wait()
        if kind == "early":
            writer.write(_head("Content-Length: 4") + b"word")
            writer.write_eof()
        if not await _take_body(arrival, reader):
            return False
        await self._answer(kind, arrival, reader, writer)
        return kind not in {"end", "early"}

    async def _answer(
        self, kind: str, arrival: Arrival, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        gate = self._gates[arrival.gate]
        if kind == "bytes":
            writer.write(_head(f"Content-Length: {arrival.gate}"))
            await _send_blocks(arrival, writer)
        elif kind in {"halves", "end"}:
            writer.write(_head(_LENGTH if kind == "halves" else "Connection: close") + HALVES[0])
            await gate.wait()
            writer.write(HALVES[1])
            if kind == "end":
                writer.write_eof()
                while await reader.read(BLOCK_BYTES):
                    pass
        elif kind != "early":
            if kind == "hold":
                await gate.wait()
            writer.write(_head("Content-Length: 4") + b"word")
        await writer.drain()

    async def _serve_tunnel(self, arrival: Arrival, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_SWITCH)
        if arrival.target.startswith("/flood/"):
            writer.write(b"\x82\x7f" + int(arrival.gate).to_bytes(8, "big"))
            await _send_blocks(arrival, writer)
        else:
            writer.write(FRAME[:500])
            await self._gates[arrival.gate].wait()
            writer.write(FRAME[500:])
        while await reader.read(BLOCK_BYTES):
            pass


def _parse(head: bytes) -> Arrival:
    start, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = start.split(" ")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    length = fields.get("content-length")
    is_chunked = fields.get("transfer-encoding") == "chunked"
    return Arrival(method, target, fields.get("x-id", "-"), None if length is None else int(length), is_chunked)


def _head(*lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode()


async def _take_body(arrival: Arrival, reader: asyncio.StreamReader) -> bool:
    """Take the body of a request, and note how it ends; False where it is not whole."""
    arrival_is_whole = False
    try:
        if arrival.is_chunked:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                arrival.take((await reader.readexactly(size + 2))[:-2])
            await reader.readexactly(2)
        else:
            while (left := (arrival.length or 0) - arrival.body_bytes) > 0:
                data = await reader.read(min(left, BLOCK_BYTES))
                if not data:
                    return False
                arrival.take(data)
        arrival_is_whole = True
    except (asyncio.IncompleteReadError, ConnectionError):
        return False
    finally:
        arrival.end = "whole" if arrival_is_whole else "aborted"
    return True


async def _send_blocks(arrival: Arrival, writer: asyncio.StreamWriter) -> None:
    for number in range(int(arrival.gate) // BLOCK_BYTES):
        data = block(number)
        writer.write(data)
        arrival.sent_bytes += len(data)
        arrival.sent_crc = zlib.crc32(data, arrival.sent_crc)
        await writer.drain()
