"""What passes over a WebSocket connection of the `websockets` library: both heads, and each frame as it was framed."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import Counter
from typing import Any, Final, cast

from typing_extensions import override
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection
from websockets.utils import apply_mask

SHORT_BYTES: Final = 125  # the bound of a control frame (RFC 6455, section 5.5); longer payloads are not shown
OPCODES: Final = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}
HEAD_END: Final = b"\r\n\r\n"
_OWN_PING: Final = re.compile(r"ping fin=1 rsv=0 mask=([01]) width=0 8 ([0-9a-f]{16})")


class Wire:
    """One direction of a connection at one end: the head, then each frame as it was framed, with its checksum.

    `hidden` are frames that are left out of what is told: those that belong to the proxy's own Pings.
    """

    def __init__(self) -> None:
        self.head = b""
        self.hidden: set[str] = set()
        self._frames: list[str] = []
        self._checksums: list[int] = []  # one for each frame: CRC-32 of all of it
        self._held = bytearray()
        self._skip = 0

    @property
    def frames(self) -> list[str]:
        """Each frame that was begun: opcode, flags, size, and the payload if it is short, for which it is waited."""
        return [frame for frame in self._frames if frame not in self.hidden]

    @property
    def is_inside(self) -> bool:
        """Say whether a short frame has come in part."""
        return bool(self._held)

    @property
    def fact(self) -> tuple[list[int], int]:
        """The checksum of each frame, and of what came of one that is not whole, or is no frame."""
        pairs = zip(self._frames, self._checksums, strict=True)
        return [checksum for frame, checksum in pairs if frame not in self.hidden], zlib.crc32(self._held)

    @property
    def lines(self) -> list[str]:
        """The lines of the head."""
        return self.head.decode("latin-1").split("\r\n")[:-2]

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Go on with the bytes that came next."""
        if not self.head:
            self._held += data
            head, end, rest = bytes(self._held).partition(HEAD_END)
            if not end:
                return
            self.head = head + end
            self._held.clear()
            data = rest
        skipped = min(self._skip, len(data))
        if skipped:
            self._skip -= skipped
            self._checksums[-1] = zlib.crc32(memoryview(data)[:skipped], self._checksums[-1])
        self._held += memoryview(data)[skipped:]
        if self.head.startswith((b"GET ", b"HTTP/1.1 101 ")):
            while self._take_frame():
                pass

    def _take_frame(self) -> bool:
        """Note the frame that what is held begins with; say whether there may be another."""
        held = self._held
        if len(held) < 2:
            return False
        size, at = held[1] & 0x7F, 2
        width = {126: 2, 127: 8}.get(size, 0)
        is_masked = bool(held[1] & 0x80)
        start = at + width + (4 if is_masked else 0)
        if len(held) < start:
            return False
        if width:
            size = int.from_bytes(held[at : at + width], "big")
        end = start + size
        if size <= SHORT_BYTES and len(held) < end:
            return False
        payload = bytes(held[start:end]) if size <= SHORT_BYTES else b""
        if is_masked:
            payload = apply_mask(payload, bytes(held[start - 4 : start]))
        name = OPCODES.get(held[0] & 0x0F, str(held[0] & 0x0F))
        flags = f"fin={held[0] >> 7} rsv={held[0] >> 4 & 7} mask={is_masked:d} width={width}"
        self._frames.append(f"{name} {flags} {size} {payload.hex()}")
        self._checksums.append(zlib.crc32(memoryview(held)[:end]))
        self._skip = max(0, end - len(held))
        del held[:end]
        return bool(held)


class _RecordedTransport:
    """A transport that notes what is written; `tail` goes out in one piece with the first write, the head."""

    def __init__(self, transport: asyncio.BaseTransport, wire: Wire, tail: bytes) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._wire = wire
        self._tail = tail

    def write(self, data: bytes) -> None:
        if self._tail:
            data, self._tail = data + self._tail, b""
        if not self._transport.is_closing():
            self._wire.feed(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Recorded(asyncio.Protocol):
    """What the connections of both ends have in common: everything read and written is noted."""

    tail = b""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.sent, self.received = Wire(), Wire()
        recorded = _RecordedTransport(transport, self.sent, self.tail)
        super().connection_made(cast("asyncio.BaseTransport", recorded))

    @override
    def data_received(self, data: bytes) -> None:
        self.received.feed(data)
        super().data_received(data)


class RecordedClient(_Recorded, ClientConnection):
    """The client's end."""


class RecordedServer(_Recorded, ServerConnection):
    """The server's end."""


def set_own_pings_aside(
    client: RecordedClient | RecordedServer, server: RecordedClient | RecordedServer
) -> dict[str, Any]:
    """Leave the Pings of a proxy between two ends out of what they tell, with the Pongs that answer them.

    Its Pings are those that an end received and the other one did not send. A Pong that comes through to the other
    end is none of them. Returns how many there were, and their payloads.
    """
    found: dict[str, Any] = {}
    for name, end, other in (("client", client, server), ("server", server, client)):
        came = Counter(end.received.frames) - Counter(other.sent.frames)
        mask = int(end is server)
        matches = [match for match in map(_OWN_PING.fullmatch, came.elements()) if match and int(match[1]) == mask]
        pongs = {f"pong fin=1 rsv=0 mask={1 - mask} width=0 8 {match[2]}" for match in matches}
        found |= {
            f"{name}: Pings: added": len(matches),
            f"{name}: Pongs: added": sum(frame in pongs for frame in end.sent.frames),
            f"{name}: payloads: added": {match[2] for match in matches},
        }
        end.received.hidden = {match[0] for match in matches}
        end.sent.hidden = pongs
    return found
