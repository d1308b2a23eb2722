"""What WebSocket cases are made of: content, frames that a library would not send, scripts of an end."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.helpers.raw import eventually
from tests.helpers.websocket_matrix import Case, End, Script, receive_all

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB: Final = 1 << 20


SIZES = [0, 1, 125, 126, 127, 65535, 65536, MIB]


NO_CODES = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535]


OVERLONG = "a size in more bytes than it needs"


MASK = b"\x11\x22\x33\x44"


DEFLATE: Mapping[str, Any] = {"compression": "deflate"}


def content(size: int, *, seed: int = 1) -> bytes:
    """Return bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def text(size: int) -> str:
    """Return text of `size` bytes in UTF-8, with characters of several bytes where there is room."""
    words = "".join(random.Random(2).choices("abcdefgh ÄÖß€😀", k=size // 2))
    whole = words.encode()[:size].decode(errors="ignore")
    return whole + "." * (size - len(whole.encode()))


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80, is_masked: bool) -> bytes:
    """Return a frame with any first byte; the payload is short."""
    head = bytes((first | opcode, (0x80 if is_masked else 0) | len(payload)))
    if not is_masked:
        return head + payload
    return head + MASK + bytes(octet ^ MASK[at & 3] for at, octet in enumerate(payload))


sides = pytest.mark.parametrize("side", ["client", "server"])


def far_from(side: str) -> str:
    return "server" if side == "client" else "client"


def by(side: str, script: Script, other: Script = receive_all, options: Mapping[str, Any] | None = None) -> Case:
    """Return a case in which `side` follows the script; `options` are for both ends."""
    client, server = (script, other) if side == "client" else (other, script)
    return Case(client, server, client_options=options or {}, server_options=options or {})


INSIDE = ["in a frame", "in a frame's head"]


WHERE = ["at a boundary", "between fragments", *INSIDE]


def vanish(how: str, where: str, *, is_masked: bool) -> Script:
    """Return the script of an end that is gone after its first message, or in the middle of something."""

    async def gone(end: End) -> None:
        await end.send("before")
        await end.pause()
        if where == "in a frame":
            end.write(frame(2, bytes(100), is_masked=is_masked)[:50])
        elif where == "in a frame's head":
            end.write(frame(2, bytes(100), is_masked=is_masked)[:1])
        elif where == "between fragments":
            end.write(frame(1, b"part", first=0, is_masked=is_masked))
        # A reset makes the far end forget what it has not read, so the cut waits for an answer to what came before.
        if where in INSIDE:
            await end.events["read"].wait()
        else:
            await end.ping(b"have you all?")
        end.cut(how)
        await end.receive_all()

    return gone


async def heed(end: End) -> None:
    """Take what comes, and say when the first message and the bytes after it have come."""
    await end.receive()
    await eventually(lambda: end.connection.received.is_inside, "the beginning of a frame")
    end.events["read"].set()
    await end.receive_all()


def wrong(*, is_masked: bool) -> dict[str, bytes]:
    """Return what must not be sent, each with a name."""

    def one(opcode: int, payload: bytes = b"", first: int = 0x80) -> bytes:
        return frame(opcode, payload, first=first, is_masked=is_masked)

    flag, mask = (0x80, MASK) if is_masked else (0, b"")
    return {
        "RSV1": one(1, b"x", 0xC0),
        "RSV2": one(1, b"x", 0xA0),
        "RSV3": one(1, b"x", 0x90),
        "RSV1 of a Ping": one(9, b"x", 0xC0),
        "wrong masking": frame(1, b"x", is_masked=not is_masked),
        "invalid UTF-8": one(1, b"\xc3\x28"),
        "UTF-8 that is cut": one(1, b"\xe2\x82"),
        "reserved opcode 3": one(3, b"x"),
        "reserved opcode 11": one(11, b"x"),
        "continuation of nothing": one(0, b"x"),
        "text in a fragmented text": one(1, b"a", 0) + one(1, b"b"),
        "Close in a fragmented text": one(1, b"a", 0) + one(8, b"\x03\xe8"),
        "fragmented Ping": one(9, b"x", 0),
        "fragmented Close": one(8, b"\x03\xe8", 0),
        "Ping of 126 bytes": bytes((0x89, flag | 126, 0, 126)) + mask + bytes(126),
        "Close of 126 bytes": bytes((0x88, flag | 126, 0, 126)) + mask + bytes(126),
        "Close of 70000 bytes": bytes((0x88, flag | 127, 0, 0, 0, 0, 0, 1, 0x11, 0x70)) + mask + bytes(70000),
        "Close of 1 byte": one(8, b"\x03"),
        "Close with a reason that is no UTF-8": one(8, b"\x03\xe8\xff\xfe"),
        "a size of 2^63": bytes((0x82, flag | 127, 0x80, 0, 0, 0, 0, 0, 0, 0)) + mask,
        "a size of 2^63-1": bytes((0x82, flag | 127, 0x7F, *[255] * 7)) + mask,
        OVERLONG: bytes((0x82, flag | 127, 0, 0, 0, 0, 0, 0, 0, 1)) + mask + b"x",
        "HTTP": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        "the head of a TLS record": bytes((0x16, 3, 1, 2, 0)),
        **{f"Close with code {code}": one(8, code.to_bytes(2, "big") + b"no such code") for code in NO_CODES},
    }
