"""The application behind the proxy: it answers as a well-behaved one does, or, by path, as none should.

Each answer holds `MARK` as its last bytes of payload, so that whoever reads knows that it is whole. Run as a program:
`python -m tests.bench.abuse.app PORT`.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Final, cast

import uvloop
from typing_extensions import override

MARK: Final = b"@END@"
FIELDS: Final = 200  # the proxy's limit for one head
HINTS: Final = 31  # one less than the interim responses that the proxy relays for one request
PIECE_S: Final = 0.002  # between two pieces of an answer that comes in pieces
_BACKLOG: Final = 4096
_LENGTH: Final = re.compile(rb"\ncontent-length: ([0-9]+)\r", re.IGNORECASE)
_LAST_CHUNK: Final = re.compile(rb"\n0\r\n(?:[^\r\n]+\r\n)*\r\n")


def _ok(body: bytes, fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (fields, len(body), body)


def _body(size_bytes: int) -> bytes:
    return b"x" * (size_bytes - len(MARK)) + MARK


_HINT: Final = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload; as=style\r\n\r\n"
_CHUNKED: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_LAST: Final = b"%x\r\n%b\r\n0\r\n\r\n" % (len(MARK), MARK)
_COOKIES: Final = b"".join(b"Set-Cookie: name%d=value; Path=/\r\n" % number for number in range(FIELDS - 1))
ANSWERS: Final = {
    b"/plain": _ok(_body(1024)),
    b"/large": _ok(_body(8 * 2**20)),
    b"/tiny-chunks": _CHUNKED + b"1\r\nx\r\n" * 8192 + _LAST,
    b"/set-cookies": _ok(_body(1024), _COOKIES),
    b"/large-head": _ok(_body(1024), b"".join(b"F%d: %b\r\n" % (number, b"x" * 60_000) for number in range(2))),
    b"/hints": _HINT * HINTS + _ok(_body(1024)),
    b"/interim": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    b"/endless-head": b"HTTP/1.1 200 OK\r\n" + b"Field: value\r\n" * 20_000,
    b"/until-close": b"HTTP/1.1 200 OK\r\n\r\n" + _body(1024),
}
# These come byte by byte, or chunk by chunk, each in a write of its own.
IN_PIECES: Final = {
    b"/slow-head": [bytes((byte,)) for byte in _ok(MARK, b"Field: value\r\n" * 20)],
    b"/slow-body": [_ok(_body(256))[: -len(_body(256))], *(bytes((byte,)) for byte in _body(256))],
    b"/slow-chunks": [
        _CHUNKED,
        *([b"1\r\nx\r\n"] * 256),
        _LAST,
    ],
    b"/slow-interim": [*([_HINT] * HINTS), _ok(_body(1024))],
}
_SWITCH: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"  # to the key of RFC 6455, section 1.3
)
_FRAME: Final = bytes((0x82, len(MARK))) + MARK


class Connection(asyncio.Protocol):
    """One connection of the proxy; after a WebSocket handshake it answers each `MARK` among what comes with another."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._is_tunnel = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._held += data
        if self._is_tunnel:
            marks = self._held.count(MARK)
            if marks:
                self._transport.write(_FRAME * marks)
                self._held.clear()
            else:
                del self._held[: 1 - len(MARK)]
            return
        end = self._held.find(b"\r\n\r\n") + 4
        if end >= 4 and self._is_whole(end):
            path = self._held.split(b" ", 2)[1].partition(b"?")[0]
            self._held.clear()
            self._answer(bytes(path))

    def _is_whole(self, end: int) -> bool:
        """Say whether the body of the request has come; what comes is well-formed, for the proxy has seen to it."""
        length = _LENGTH.search(self._held, 0, end)
        if length is not None:
            return len(self._held) - end >= int(length[1])
        if b"\r\nTransfer-Encoding: chunked\r\n" not in self._held[:end]:
            return True
        return self._held.endswith(b"\r\n\r\n") and _LAST_CHUNK.search(self._held, end - 1) is not None

    def _answer(self, path: bytes) -> None:
        if path == b"/ws":
            self._is_tunnel = True
            self._transport.write(_SWITCH)
        elif path in IN_PIECES:
            self._send_piece(IN_PIECES[path], 0)
        else:
            self._transport.write(ANSWERS[path])
            if path == b"/until-close":
                self._transport.close()

    def _send_piece(self, pieces: list[bytes], at: int) -> None:
        if self._transport.is_closing() or at == len(pieces):
            return
        self._transport.write(pieces[at])
        asyncio.get_running_loop().call_later(PIECE_S, self._send_piece, pieces, at + 1)


async def serve(port: int) -> None:
    """Answer until the process is ended."""
    await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=_BACKLOG)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
