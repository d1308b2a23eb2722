"""Clients beside the one that is at fault, and transfers whose every step the test takes."""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from itertools import count
from typing import TYPE_CHECKING, Self

from tests.helpers.fault_client_app import BLOCK_BYTES, block
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

_TCP_STATE_HALF_CLOSED = 5  # TCP_FIN_WAIT2 of Linux: the other side's kernel has taken our end of file
_ids = count(1)


def new_ids(number: int, prefix: str = "other") -> list[str]:
    """Return ids that no other request of this process has."""
    return [f"{prefix}-{next(_ids)}" for _ in range(number)]


async def ask_each(
    port: int, ids: Iterable[str], *, target: str = "/word", method: str = "POST", connections: int = 4
) -> dict[str, int | str]:
    """Ask once for each id; return what each was answered with: a status, or how its connection ended."""
    waiting = iter(ids)
    answers: dict[str, int | str] = {}

    async def ask_some() -> None:
        async with await PlainClient.connect(port) as client:
            for request_id in waiting:
                try:
                    answer = await client.ask(target, method=method, fields={"X-Id": request_id})
                except AbortedError as error:
                    answers[request_id] = f"aborted: {error}"
                    return
                answers[request_id] = answer.status

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(ask_some())
    return answers


async def ask_pipelined(port: int, ids: Sequence[str], *, at_once: int = 50) -> dict[str, int]:
    """GET /word once for each id, several requests on their way at once; return the statuses."""
    answers = {}
    async with await PlainClient.connect(port) as client:
        for some in (ids[at : at + at_once] for at in range(0, len(ids), at_once)):
            for request_id in some:
                client.send("/word", fields={"X-Id": request_id})
            for request_id in some:
                answers[request_id] = (await client.receive()).status
    return answers


class Transfer:
    """One connection of a client that sends or takes a large body, piece by piece; a context manager."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._is_chunked = False
        self.crc = 0
        self.moved_bytes = 0

    @classmethod
    async def connect(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.writer.transport.abort()

    def ask(self, line: str, request_id: str, *fields: str, body: bytes = b"") -> None:
        """Send the head of a request, and a body whose length `fields` tell."""
        head = "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", f"X-Id: {request_id}", *fields, "", ""])
        self.writer.write(head.encode() + body)

    async def open_tunnel(self, target: str, request_id: str) -> None:
        """Ask for a WebSocket, and return when it is open."""
        self.ask(
            f"GET {target}",
            request_id,
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        )
        assert await self.receive_status() == 101

    def begin_upload(self, target: str, request_id: str, length: int | None) -> None:
        """Send the head of a POST; in chunks where the length is None."""
        self._is_chunked = length is None
        self.ask(
            f"POST {target}",
            request_id,
            "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}",
        )

    async def upload(self, first: int, blocks: int) -> None:
        """Send blocks of the body, each as soon as the proxy has taken most of the one before."""
        for number in range(first, first + blocks):
            data = block(number)
            self.writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
            self.crc = zlib.crc32(data, self.crc)
            self.moved_bytes += len(data)
            await self.writer.drain()

    def end_upload(self) -> None:
        """Say that this was all."""
        if self._is_chunked:
            self.writer.write(b"0\r\n\r\n")

    async def receive_status(self) -> int:
        """Return the status of the response, whose head is taken."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1])

    async def download(self, size: int) -> None:
        """Take so many bytes of a body."""
        end = self.moved_bytes + size
        while self.moved_bytes < end:
            data = await self.reader.read(min(BLOCK_BYTES, end - self.moved_bytes))
            assert data, f"the body ended after {self.moved_bytes} of {end} bytes"
            self.crc = zlib.crc32(data, self.crc)
            self.moved_bytes += len(data)

    async def receive_rest(self) -> bytes:
        """Return what comes until the connection ends, however it ends."""
        parts = []
        try:
            while data := await self.reader.read(BLOCK_BYTES):
                parts.append(data)
        except ConnectionError:
            pass
        return b"".join(parts)

    def half_close(self) -> None:
        """Send an end of file, and go on reading."""
        self.writer.write_eof()

    async def was_half_closed(self, port: int) -> None:
        """Wait until the proxy at `port` has seen the end of file.

        Once its kernel has it, the proxy meets it in the next turn of its loop; two answers to another client, asked
        for after that, take two turns more.
        """
        link = self.writer.get_extra_info("socket")
        await eventually(
            lambda: link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_STATE_HALF_CLOSED,
            "the end of file has arrived",
        )
        assert set((await ask_each(port, new_ids(2), connections=1)).values()) == {200}

    def reset(self) -> None:
        """End the connection with a reset."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
