"""The floor for WebSocket: bytes relayed as they came, beside which the header of each frame is read. No checks.

The first bytes of a client open the connection to the application, whose first bytes are taken for its `101`; from then
on both are sides of a tunnel. Run as a program:
`python -m tests.bench.floor_tunnel PORT UPSTREAM_PORT [CERTIFICATE KEY]`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop
from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.apps import BACKLOG
from tests.bench.certificate import server_context


class Side(asyncio.Protocol):
    """One connection of a tunnel; `other` is the transport that its bytes go to."""

    __slots__ = ("_partial", "_skip_bytes", "frames", "other")

    def __init__(self, other: asyncio.Transport) -> None:
        self.other = other
        self.frames = 0
        self._partial = b""  # a frame header of which only a part has come
        self._skip_bytes = 0  # what is still to come of a payload

    @override
    def data_received(self, data: bytes) -> None:
        self.other.write(data)
        self._count_frames(data)

    def _count_frames(self, data: bytes) -> None:
        """Go from header to header (RFC 6455, section 5.2), whatever the cuts between the reads."""
        at = self._skip_bytes
        if self._partial:
            data = self._partial + data
            at = 0
        end = len(data)
        while at + 2 <= end:
            second = data[at + 1]
            size = second & 0x7F
            extended = 0 if size < 126 else 2 if size == 126 else 8
            if at + 2 + extended > end:
                break
            if extended:
                size = int.from_bytes(data[at + 2 : at + 2 + extended], "big")
            at += 2 + extended + (4 if second & 0x80 else 0) + size
            self.frames += 1
        self._partial = data[at:]
        self._skip_bytes = max(at - end, 0)

    @override
    def pause_writing(self) -> None:
        self.other.pause_reading()

    @override
    def resume_writing(self) -> None:
        self.other.resume_reading()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.other.close()


class Downstream(asyncio.Protocol):
    """A client that has sent no request yet."""

    __slots__ = ("_transport", "_upstream_port")

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        spawn(self._dial(data), "dial")

    async def _dial(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: Handshake(self._transport, request), "127.0.0.1", self._upstream_port)


class Handshake(asyncio.Protocol):
    """The connection to the application until its response has come."""

    __slots__ = ("_client", "_request", "_transport")

    def __init__(self, client: asyncio.Transport, request: bytes) -> None:
        self._client = client
        self._request = request

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    @override
    def data_received(self, data: bytes) -> None:
        self._client.set_protocol(Side(self._transport))
        self._transport.set_protocol(Side(self._client))
        self._client.write(data)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._client.close()


async def serve(port: int, upstream_port: int, *files: str) -> None:
    """Relay until the process is ended; `files`, certificate and key, make it a listener over TLS."""
    context = server_context(*files) if files else None
    await asyncio.get_running_loop().create_server(
        lambda: Downstream(upstream_port), "127.0.0.1", port, backlog=BACKLOG, ssl=context
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
