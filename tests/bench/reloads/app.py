"""The application, a process of its own: `python -m tests.bench.reloads.app PORT...`, each port an upstream.

It answers each WebSocket message with the same number and its port, and each plain request with its port.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, Final, cast

import uvloop
from typing_extensions import override
from websockets.utils import accept_key

from tests.bench.apps import BACKLOG
from tests.bench.messages import (
    ANSWER,
    BINARY,
    CLOSE,
    HEAD_END,
    NUMBER,
    PING,
    PONG,
    FrameReader,
    write_frame,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_KEY: Final = re.compile(rb"^sec-websocket-key:[ \t]*([\x21-\x7e]+)", re.IGNORECASE | re.MULTILINE)


class Upstream(asyncio.Protocol):
    """One connection of the proxy to one port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._head = bytearray()
        self._frames: FrameReader | None = None  # None: before 101

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        if self._frames is not None:
            self._on_frames(self._frames.feed(data))
            return
        self._head += data
        while HEAD_END in self._head:
            head, _, rest = bytes(self._head).partition(HEAD_END)
            self._head = bytearray(rest)
            frames = self._on_head(head)
            if frames is not None:
                self._frames = frames
                self._on_frames(frames.feed(rest))
                return

    def _on_head(self, head: bytes) -> FrameReader | None:
        """Answer a request; return what reads the frames that follow it, if any do."""
        key = _KEY.search(head)
        if key is None:
            body = b"%d" % self._port
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return None
        accept = accept_key(key[1].decode()).encode()
        self._transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + HEAD_END
        )
        return FrameReader()

    def _on_frames(self, frames: Sequence[tuple[int, bytes]]) -> None:
        for opcode, payload in frames:
            if opcode == BINARY:
                answer = ANSWER.pack(*NUMBER.unpack(payload), self._port)
                self._transport.write(write_frame(BINARY, answer, is_masked=False))
            elif opcode == PING:
                self._transport.write(write_frame(PONG, payload, is_masked=False))
            elif opcode == CLOSE:
                self._transport.write(write_frame(CLOSE, payload, is_masked=False))
                self._transport.close()


async def serve(ports: Sequence[int]) -> None:
    """Answer on each port until the process is ended."""
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(lambda port=port: Upstream(port), "127.0.0.1", port, backlog=BACKLOG)  # type: ignore[misc]
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve([int(port) for port in sys.argv[1:]]))
