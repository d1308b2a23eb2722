"""Raw ends of a conversation: a client or an upstream whose every byte the test sends and sees."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import ssl
import struct
import termios
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 60.0


async def eventually(is_so: Callable[[], object], what: str = "", *, look_s: float = 0.002) -> None:
    """Wait until a condition holds; fail after a minute.

    `what` names it, where the source line says too little; `look_s` is the time between two looks.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + DEADLINE_S
    while not is_so():
        if loop.time() > until:
            raise AssertionError(f"never came true: {what or is_so}")
        await asyncio.sleep(look_s)


def count_queued(transport: asyncio.WriteTransport) -> int:
    """Return the bytes that the kernel holds for the other end of a connection."""
    link = transport.get_extra_info("socket")
    return 0 if link is None else int(struct.unpack("i", fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


def count_unsent(transport: asyncio.WriteTransport) -> int:
    """Return the bytes that the other end of a connection has not taken, in this process and in the kernel."""
    return transport.get_write_buffer_size() + count_queued(transport)


def request(line: str = "GET /", *fields: str, body: bytes | None = None, version: str = "1.1") -> bytes:
    """Return a request; `body` is sent by its length."""
    lines = [f"{line} HTTP/{version}", "Host: example.org", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


GET = request()


@dataclass
class Message:
    """A request or a response as it was read: start line, fields in order, body, trailers."""

    start: str
    fields: list[tuple[str, str]]
    head: bytes
    body: bytes = b""
    trailers: list[str] | None = None

    @property
    def status(self) -> int:
        """Return the status of a response."""
        return int(self.start.split(" ")[1])

    @property
    def target(self) -> str:
        """Return the target of a request."""
        return self.start.split(" ")[1]

    def all(self, name: str) -> list[str]:
        """Return the values of all fields of a name."""
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def __getitem__(self, name: str) -> str:
        """Return the value of the one field of a name."""
        values = self.all(name)
        assert len(values) == 1, f"{name}: {values}"
        return values[0]

    def __contains__(self, name: str) -> bool:
        return bool(self.all(name))

    @property
    def cookie(self) -> str:
        """Return the affinity cookie that the response sets, as `name=value`; nothing where it sets none."""
        values = self.all("set-cookie")
        ours = [value.partition(";")[0] for value in values if value.startswith("stickyproxy=")]
        assert len(ours) <= 1
        return ours[0] if ours else ""


def parse_message(head: bytes) -> Message:
    """Read a head that ends with its empty line."""
    lines = head.decode("latin-1").split("\r\n")
    assert lines[-2:] == ["", ""], head
    fields = []
    for line in lines[1:-2]:
        name, colon, value = line.partition(": ")
        assert colon, line
        fields.append((name, value))
    return Message(lines[0], fields, head)


class RawLink(asyncio.Protocol):
    """One end of a connection; what comes is kept in `held` until it is read."""

    def __init__(self, on_made: Callable[[RawLink], object] | None = None) -> None:
        self._on_made = on_made
        self.held = bytearray()
        self.received_bytes = 0
        self.has_eof = False
        self.is_lost = False
        self.error: Exception | None = None
        self.keeps = True
        self.transport: asyncio.Transport
        self.is_write_paused = False
        self._follows = False
        self.all_received = bytearray()
        self.on_data: Callable[[RawLink], object] | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._on_made is not None:
            self._on_made(self)

    @override
    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if self.keeps:
            self.held += data
            self.all_received += data
        if self.on_data is not None:
            self.on_data(self)

    @override
    def eof_received(self) -> bool:
        self.has_eof = True
        return not self._follows and self.transport.can_write_eof()  # TLS has no half-closed connections

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.error = exc

    @override
    def pause_writing(self) -> None:
        self.is_write_paused = True

    @override
    def resume_writing(self) -> None:
        self.is_write_paused = False

    # What the test does

    def send(self, data: bytes) -> Self:
        """Send bytes as they are."""
        self.transport.write(data)
        return self

    async def flush(self) -> None:
        """Wait until all that was sent has left this process."""
        await eventually(lambda: self.is_lost or self.transport.get_write_buffer_size() == 0, "all is sent")

    async def ready(self) -> None:
        """Wait until more may be sent; unlike `flush` it does not wait for all."""
        if self.is_write_paused:
            await eventually(lambda: not self.is_write_paused, "more may be sent", look_s=0)

    def half_close(self) -> None:
        """Send an end of file and go on reading."""
        self.transport.write_eof()

    def half_close_at_once(self) -> None:
        """Send an end of file in this very turn of the loop; everything sent before must be flushed."""
        with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as link:
            link.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close in the usual way."""
        self.transport.close()

    def reset(self) -> None:
        """Close with a reset."""
        link = self.transport.get_extra_info("socket")
        if link is not None:  # else it is closed already
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def stop_reading(self) -> None:
        """Read nothing more, so that what the other side sends piles up."""
        self.transport.pause_reading()

    def read_again(self) -> None:
        """Read again."""
        self.transport.resume_reading()

    def follow(self) -> None:
        """From now on drop what comes, and close when the other side does, as programs do."""
        self._follows = True
        self.keeps = False
        if self.has_eof:
            self.transport.close()
        elif not self.is_lost:
            self.transport.resume_reading()

    def upgrade(self, protocol: asyncio.Protocol) -> None:
        """Hand the connection over to another protocol, with what was received and not read."""
        held = bytes(self.held)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if held:
            protocol.data_received(held)

    # What the test reads

    async def read(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        await eventually(lambda: len(self.held) >= size or self.is_over, f"{size} bytes come")
        assert len(self.held) >= size, f"only {bytes(self.held)!r} came, then {self.ending}"
        data = bytes(self.held[:size])
        del self.held[:size]
        return data

    async def read_until(self, end: bytes) -> bytes:
        """Return the bytes up to and with `end`."""
        await eventually(lambda: end in self.held or self.is_over, f"{end!r} comes")
        assert end in self.held, f"only {bytes(self.held)!r} came, then {self.ending}"
        return await self.read(self.held.index(end) + len(end))

    async def read_rest(self) -> bytes:
        """Return all that comes until the end; look at `ending` for how it ended."""
        await eventually(lambda: self.is_over, "the connection ends")
        return await self.read(len(self.held))

    @property
    def is_over(self) -> bool:
        """Say whether nothing more can come."""
        return self.has_eof or self.is_lost

    @property
    def ending(self) -> str:
        """Say how the other side ended: "open", "eof" or "reset"."""
        if self.error is not None:
            return "reset"
        return "eof" if self.is_over else "open"

    async def read_message(self) -> Message:
        """Return the next head, without its body."""
        return parse_message(await self.read_until(b"\r\n\r\n"))

    async def read_request(self) -> Message:
        """Return the next request with its body."""
        message = await self.read_message()
        await self._read_body(message)
        return message

    async def read_response(self, *, to_head: bool = False) -> Message:
        """Return the next response with its body; `to_head` says that it answers a HEAD."""
        message = await self.read_message()
        if to_head or message.status < 200 or message.status in {204, 304}:
            return message
        if not message.all("content-length") and not message.all("transfer-encoding"):
            message.body = await self.read_rest()
            return message
        await self._read_body(message)
        return message

    async def _read_body(self, message: Message) -> None:
        lengths, codings = message.all("content-length"), message.all("transfer-encoding")
        assert len(lengths) + len(codings) <= 1, message.head
        if lengths:
            message.body = await self.read(int(lengths[0]))
        elif codings:
            assert codings == ["chunked"]
            message.body, message.trailers = await self.read_chunked()

    async def read_chunk(self) -> bytes:
        """Return the payload of the next chunk; nothing for the last one, whose trailers are left."""
        size = int(await self.read_until(b"\r\n"), 16)
        if not size:
            return b""
        chunk = await self.read(size + 2)
        assert chunk.endswith(b"\r\n")
        return chunk[:-2]

    async def read_chunked(self) -> tuple[bytes, list[str]]:
        """Return a chunked body with its trailer lines."""
        body = b""
        while chunk := await self.read_chunk():
            body += chunk
        trailers = []
        while (line := await self.read_until(b"\r\n")) != b"\r\n":
            trailers.append(line.decode("latin-1").strip())
        return body, trailers

    # What an upstream says

    def answer(self, body: bytes = b"", *fields: str, status: str = "200 OK") -> Self:
        """Send a whole response with a body of known length."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "", ""]
        return self.send("\r\n".join(lines).encode("latin-1") + body)

    @override
    def __repr__(self) -> str:
        return f"<RawLink {self.ending} held={bytes(self.held[:60])!r}>"


class SealedLink:
    """A client's end of TLS over a link, step by step: nothing is sent, read or answered but what the test says."""

    def __init__(self, link: RawLink, context: ssl.SSLContext, name: str = "localhost") -> None:
        self.link = link
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self.has_close_notify = False

    def hello(self) -> bytes:
        """Return the bytes that begin the handshake."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._outgoing.read()

    async def shake(self) -> bytes:
        """Take what the other end answers to the hello until the handshake is done here; return the last bytes of it.

        They are not sent: over TLS 1.3 the other end waits for them.
        """
        while True:
            assert await self._take(), f"the connection ended: {self.link.ending}"
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.link.send(self._outgoing.read())
            else:
                return self._outgoing.read()

    async def open(self) -> Self:
        """Do the whole handshake."""
        self.link.send(self.hello())
        self.link.send(await self.shake())
        return self

    def seal(self, data: bytes) -> bytes:
        """Return the bytes that carry `data`."""
        self.tls.write(data)
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        """Return the alert that ends this end's half (RFC 8446, section 6.1)."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self._outgoing.read()

    async def read_some(self) -> bytes:
        """Return what comes next; nothing at the end, and then `has_close_notify` tells how it came."""
        while True:
            try:
                data = self.tls.read(65536)
            except ssl.SSLWantReadError:
                if not await self._take():
                    return b""
                continue
            self.has_close_notify = not data
            return data

    async def read_until(self, end: bytes) -> bytes:
        """Return what comes up to and with `end`, and what came together with it."""
        data = bytearray()
        while end not in data:
            piece = await self.read_some()
            assert piece, f"only {bytes(data)!r} came"
            data += piece
        return bytes(data)

    async def read_rest(self) -> bytes:
        """Return all that comes until the end."""
        data = bytearray()
        while piece := await self.read_some():
            data += piece
        return bytes(data)

    async def _take(self) -> int:
        """Wait for bytes and take them; return how many, 0 at the end of the connection."""
        await eventually(lambda: self.link.held or self.link.is_over, "something comes")
        size = self._incoming.write(self.link.held)
        self.link.held.clear()
        return size


class RawUpstream:
    """A listening socket; each connection that it gets is a RawLink, in the order in which they came."""

    def __init__(self, upstream_id: str) -> None:
        self.id = upstream_id
        self.links: list[RawLink] = []
        self.host = ""
        self.port = 0
        self.path = ""
        self.tls: ssl.SSLContext | None = None
        self.reads_at_once = True
        self.on_accept: Callable[[RawLink], object] | None = None
        self._given = 0
        self._server: asyncio.Server | None = None

    async def start(
        self, *, host: str = "127.0.0.1", path: str = "", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> Self:
        """Listen; at a Unix socket if `path` is given, over TLS if `tls` is."""
        loop = asyncio.get_running_loop()
        self.tls = tls
        if path:
            self.path = path
            self._server = await loop.create_unix_server(self._accept, path)
        else:
            self.host = host
            self._server = await loop.create_server(self._accept, host, port, ssl=tls)
            self.port = self._server.sockets[0].getsockname()[1]
        return self

    def _accept(self) -> RawLink:
        return RawLink(self._begin)

    def _begin(self, link: RawLink) -> None:
        self.links.append(link)
        if not self.reads_at_once:
            asyncio.get_running_loop().call_soon(link.stop_reading)  # uvloop reads after `connection_made`
        if self.on_accept is not None:
            self.on_accept(link)

    async def accept(self) -> RawLink:
        """Return the next connection that was not returned yet."""
        await eventually(lambda: len(self.links) > self._given, f"a connection to {self.id}")
        self._given += 1
        return self.links[self._given - 1]

    @property
    def all_bytes(self) -> bytes:
        """Return all bytes that came and were not read, of all connections."""
        return b"".join(bytes(link.held) for link in self.links)

    async def stop(self) -> None:
        """Listen no more: connections are refused. Those that are open stay."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await asyncio.sleep(0)

    async def restart(self) -> None:
        """Listen again at the same place."""
        await self.start(host=self.host, path=self.path, port=self.port, tls=self.tls)

    def close(self) -> None:
        """End all."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for link in self.links:
            link.transport.abort()
