"""An HTTP/1.1 client that sends what it is told and hides nothing: no retry, no pool, no cookie of its own.

The clients of libraries repeat a request whose connection broke; a test that counts requests must not.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

DEADLINE_S = 60.0
COOKIE = "stickyproxy"
_NAME = re.compile(f"{COOKIE}(?:-[0-9]+)?=")  # with the port of the listener, or without


class AbortedError(Exception):
    """The connection ended before a whole response had come; the text says where."""


@dataclass(frozen=True)
class Answer:
    """A whole response; the names of `fields` are in lower case."""

    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def cookie(self) -> str | None:
        """The affinity cookie that the response sets, as a client sends it back; None if it sets none."""
        return read_cookie(self.fields.get("set-cookie", ""))


def read_cookie(set_cookie: str) -> str | None:
    """Return `name=value` of the affinity cookie in a Set-Cookie field; None if it is another or none."""
    pair = set_cookie.partition(";")[0]
    return pair if _NAME.match(pair) else None


class PlainClient:
    """One connection to a TCP port of 127.0.0.1, or to a Unix socket; a context manager that closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, where: int | str) -> Self:
        """Connect to a port or to the path of a socket; raise OSError."""
        async with asyncio.timeout(DEADLINE_S):
            if isinstance(where, str):
                return cls(*await asyncio.open_unix_connection(where))
            return cls(*await asyncio.open_connection("127.0.0.1", where))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._writer.transport.abort()

    async def ask(self, target: str, *, method: str = "GET", fields: Mapping[str, str] | None = None) -> Answer:
        """Send a request and return the response; raise AbortedError where none comes whole."""
        self.send(target, method=method, fields=fields)
        return await self.receive()

    def send(self, target: str, *, method: str = "GET", fields: Mapping[str, str] | None = None) -> None:
        """Send a request; the body of a POST is one word."""
        body = b"word" if method == "POST" else b""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self._writer.write("\r\n".join([*lines, "\r\n"]).encode() + body)

    async def receive(self) -> Answer:
        """Return the response to a request that was sent; raise AbortedError where none comes whole."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                status, fields = await self.receive_head()
                return Answer(status, fields, await self._receive_body(fields))
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise AbortedError(str(error)) from error

    async def receive_head(self) -> tuple[int, Mapping[str, str]]:
        """Return status and fields; raise IncompleteReadError or ConnectionError."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        return int(first.split(" ")[1]), {name.lower(): value for name, _, value in pairs}

    async def _receive_body(self, fields: Mapping[str, str]) -> bytes:
        if fields.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(fields["content-length"]))
        chunks = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunks.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readexactly(2)
        return b"".join(chunks)

    async def receive_end(self) -> bytes:
        """Wait until the connection is closed, and return what came before that."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""


async def ask(where: int | str, target: str, *, method: str = "GET", fields: Mapping[str, str] | None = None) -> Answer:
    """Ask over a connection of its own."""
    async with await PlainClient.connect(where) as client:
        return await client.ask(target, method=method, fields=fields)
