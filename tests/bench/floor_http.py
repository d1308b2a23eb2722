"""The floor for HTTP: the least that a relay on uvloop must do. No features, no checks; GET only, one upstream.

Heads are parsed by httptools both ways, the affinity cookie is looked up, hop-by-hop headers are dropped, connections
to the application are reused; what a body holds beyond the first read is counted, not parsed. The distance to the
product is the price of the features. Run as a program:
`python -m tests.bench.floor_http PORT UPSTREAM_PORT [CERTIFICATE KEY]`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final, cast

import httptools
import uvloop
from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.apps import BACKLOG
from tests.bench.certificate import server_context

_HOP_BY_HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"proxy-connection", b"te", b"trailer")
)


class Pool:
    """Idle connections to the application."""

    def __init__(self, port: int) -> None:
        self.idle: list[Upstream] = []
        self._port = port

    def send(self, head: bytes, downstream: Downstream) -> None:
        if self.idle:
            self.idle.pop().send(head, downstream)
        else:
            spawn(self._dial(head, downstream), "dial")

    async def _dial(self, head: bytes, downstream: Downstream) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(self), "127.0.0.1", self._port)
        upstream.send(head, downstream)


class Upstream(asyncio.Protocol):
    """A connection to the application; `_downstream` is who waits for the response that comes, if anyone."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._downstream: Downstream | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._out: list[bytes] = []
        self._left_bytes = 0  # of the body
        self._is_counting = False
        self._is_done = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def send(self, head: bytes, downstream: Downstream) -> None:
        self._downstream = downstream
        downstream.upstream = self
        self._is_done = False
        self.transport.write(head)

    @override
    def data_received(self, data: bytes) -> None:
        downstream = self._downstream
        if downstream is None:
            self.transport.close()
            return
        if self._is_counting:
            downstream.transport.write(data)
            self._count(len(data))
        else:
            self._parser.feed_data(data)
            downstream.transport.write(b"".join(self._out))
            self._out.clear()
            self._is_counting = not self._is_done and self._left_bytes > 0
        if self._is_done:
            self._downstream = downstream.upstream = None
            if downstream.is_full:
                self.transport.resume_reading()
            self._pool.idle.append(self)
            if not downstream.is_kept:
                downstream.transport.close()

    def _count(self, received_bytes: int) -> None:
        self._left_bytes -= received_bytes
        if not self._left_bytes:
            self._is_done = True
            self._is_counting = False
            self._parser = httptools.HttpResponseParser(self)  # the old one still waits for the body

    def on_message_begin(self) -> None:
        self._headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._downstream is not None
        out = self._out
        out.append(b"HTTP/1.1 %d OK\r\n" % self._parser.get_status_code())
        for name, value in self._headers:
            lower = name.lower()
            if lower == b"content-length":
                self._left_bytes = int(value)
            if lower not in _HOP_BY_HOP:
                out.append(b"%b: %b\r\n" % (name, value))
        if not self._downstream.is_kept:
            out.append(b"Connection: close\r\n")
        if self._downstream.is_new:
            out.append(b"Set-Cookie: floor=a; Path=/; HttpOnly\r\n")
        out.append(b"\r\n")

    def on_body(self, body: bytes) -> None:
        self._out.append(body)
        self._left_bytes -= len(body)

    def on_message_complete(self) -> None:
        self._is_done = True

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._downstream is not None:
            self._downstream.transport.abort()
        elif self in self._pool.idle:
            self._pool.idle.remove(self)


class Downstream(asyncio.Protocol):
    """A connection of a client; `upstream` is where its request is being answered."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser = httptools.HttpRequestParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self.is_full = False
        self.is_kept = True
        self.is_new = True
        self.upstream: Upstream | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._address: bytes = transport.get_extra_info("peername")[0].encode()

    @override
    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._headers.clear()

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.is_new = True
        self.is_kept = self._parser.should_keep_alive()
        out = [b"%b %b HTTP/1.1\r\n" % (self._parser.get_method(), self._url)]
        for name, value in self._headers:
            lower = name.lower()
            if lower in _HOP_BY_HOP:
                continue
            if lower == b"cookie" and b"floor=" in value:
                self.is_new = False
            out.append(b"%b: %b\r\n" % (name, value))
        out.append(b"X-Forwarded-For: %b\r\n\r\n" % self._address)
        self._pool.send(b"".join(out), self)

    @override
    def pause_writing(self) -> None:
        self.is_full = True
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    @override
    def resume_writing(self) -> None:
        self.is_full = False
        if self.upstream is not None:
            self.upstream.transport.resume_reading()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self.upstream is not None:
            self.upstream.transport.abort()


async def serve(port: int, upstream_port: int, *files: str) -> None:
    """Relay until the process is ended; `files`, certificate and key, make it a listener over TLS."""
    context = server_context(*files) if files else None
    pool = Pool(upstream_port)
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Downstream(pool), "127.0.0.1", port, backlog=BACKLOG, ssl=context)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
