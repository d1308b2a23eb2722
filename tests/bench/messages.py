"""The frames that the clients and the application exchange: small, whole, and read without their neighbours' help."""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple

from tests.bench.results import RunError

HEAD_END: Final = b"\r\n\r\n"
BINARY: Final = 2  # opcodes of RFC 6455, section 5.2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

NUMBER: Final = struct.Struct("!Q")  # what a client sends
ANSWER: Final = struct.Struct("!QH")  # the same number, and the port of the upstream that answers

_FIN: Final = 0x80
_MASKED: Final = 0x80
_ZERO_MASK: Final = bytes(4)  # of a client's frames: it leaves the payload as it is
_STATUS: Final = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
_COOKIE: Final = re.compile(rb"\r\nset-cookie:[ \t]*([^;\r\n]+)", re.IGNORECASE)
_CLOSES: Final = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)


class Head(NamedTuple):
    """What is used of a response's head; `cookie` is what to send back."""

    status: int
    length_bytes: int
    cookie: str
    is_last: bool  # the server closes the connection after this response


def parse_head(head: bytes) -> Head:
    """Return the facts of a response's head, its empty line included; raise RunError if it is none."""
    status = _STATUS.match(head)
    if status is None:
        raise RunError(f"no response but {head[:100]!r}")
    length, cookie = _LENGTH.search(head), _COOKIE.search(head)
    return Head(
        int(status[1]),
        int(length[1]) if length else 0,
        cookie[1].decode() if cookie else "",
        bool(_CLOSES.search(head)),
    )


def write_frame(opcode: int, payload: bytes, *, is_masked: bool) -> bytes:
    """Return one whole frame; its payload has at most 125 bytes."""
    head = bytes([_FIN | opcode, (_MASKED if is_masked else 0) | len(payload)])
    return head + (_ZERO_MASK if is_masked else b"") + payload


class FrameReader:
    """Bytes in any pieces to whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return opcode and payload of each frame that is now whole; raise RunError for one that nobody here sends."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= 2:
            first, second = self._buffer[:2]
            start = 2 + (len(_ZERO_MASK) if second & _MASKED else 0)
            length = second & ~_MASKED
            if not first & _FIN or length > 125 or any(self._buffer[2 : min(start, len(self._buffer))]):
                raise RunError(f"a frame that was not sent: {bytes(self._buffer[:100])!r}")
            if len(self._buffer) < start + length:
                break
            frames.append((first & 0xF, bytes(self._buffer[start : start + length])))
            del self._buffer[: start + length]
        return frames
