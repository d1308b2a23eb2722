"""A TCP relay between browser and proxy that can be cut, as a network can.

`BrowserContext.set_offline` refuses new connections only: a WebSocket that is open stays open and works on. This relay
resets what is open, and until it is mended it resets what comes new.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from tests.helpers.processes import free_port

T = TypeVar("T")

CHUNK_BYTES = 65536
STOP_TIMEOUT_S = 30.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s


class Link:
    """One connection of the browser and the one behind it; both are reset together."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._writers = [writer]
        self._is_reset = False

    async def relay(self, target_port: int, *, refuse_websockets: bool) -> None:
        """Copy both ways until both sides have ended, or one has failed."""
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", target_port)
        except OSError:
            self.reset()
            return
        self._writers.append(target_writer)
        if self._is_reset:
            self.reset()
        await asyncio.gather(
            self._copy(self._reader, target_writer, refuse_websockets=refuse_websockets),
            self._copy(target_reader, self._writer),
        )

    def reset(self) -> None:
        self._is_reset = True
        for writer in self._writers:
            if not writer.transport.is_closing():
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, refuse_websockets: bool = False
    ) -> None:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                if refuse_websockets and b"\r\nupgrade: websocket\r\n" in chunk.lower():
                    self.reset()
                    return
                writer.write(chunk)
                await writer.drain()
            writer.write_eof()
        except OSError:
            self.reset()


class Relay:
    """A relay at `url` to the site at `target_url`: a context manager that runs it in a thread of its own.

    With `refuse_websockets` it resets each connection that asks for a WebSocket, as some middleboxes do.
    """

    def __init__(self, target_url: str, *, refuse_websockets: bool = False) -> None:
        self._target_port = urlsplit(target_url).port or 80
        self._refuse_websockets = refuse_websockets
        self._port = free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay")
        self._links: set[Link] = set()
        self._is_cut = False
        self.url = f"http://localhost:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._on_connection, "127.0.0.1", self._port))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()

    def cut(self) -> None:
        """Reset what is open and, until `mend`, what comes new."""
        self._run(self._cut())

    def mend(self) -> None:
        self._is_cut = False

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(STOP_TIMEOUT_S)

    async def _cut(self) -> None:
        self._is_cut = True
        for link in tuple(self._links):
            link.reset()

    async def _stop(self) -> None:
        self._server.close()
        await self._cut()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer)
        if self._is_cut:
            link.reset()
            return
        self._links.add(link)
        try:
            await link.relay(self._target_port, refuse_websockets=self._refuse_websockets)
        finally:
            self._links.discard(link)
            await link.close()
