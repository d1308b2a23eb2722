"""The numbered messages of both ends of a tunnel, as WebSocket frames of one size, and what is known of what came.

The payload has 24 bytes: tunnel, sequence number, when it was sent, direction, and a CRC-32 over all of the frame
before it, mask and head included. So one call tells whether a frame came as it was written: the CRC-32 of data that
ends in its own CRC-32 is always the same number.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from struct import Struct
from typing import Final
from zlib import crc32

PAYLOAD_BYTES: Final = 24
RESIDUE: Final = 0x2144DF1C  # of any data with its CRC-32 behind it, lowest byte first
_BODY: Final = "IIQI"  # tunnel, sequence, sent (ns), direction; then the check sum
_CHECK: Final = Struct("<I")
_FIN_BINARY: Final = 0x82
_CONTROLS: Final = {0x88: "Close", 0x89: "Ping", 0x8A: "Pong"}


class Direction:
    """One way through a tunnel: `start` is what each frame begins with, `number` stands in each payload."""

    def __init__(self, name: str, number: int, mask: bytes) -> None:
        self.name = name
        self.number = number
        # The mask is not applied: nobody but the two ends looks into a payload, and they compare what is on the wire.
        self.start = bytes((_FIN_BINARY, (0x80 if mask else 0) | PAYLOAD_BYTES)) + mask
        self.frame_bytes = len(self.start) + PAYLOAD_BYTES
        self._pack = Struct(f"<{len(self.start)}s{_BODY}").pack
        self.read = Struct(f"<{len(self.start)}x{_BODY}4x").unpack  # of a whole frame

    def write(self, tunnel: int, sequence: int, sent_ns: int) -> bytes:
        """Return the frame of a message."""
        body = self._pack(self.start, tunnel, sequence, sent_ns, self.number)
        return body + _CHECK.pack(crc32(body))


UP: Final = Direction("up", 1, b"\x51\xa7\x0e\xc3")  # from the client to the app
DOWN: Final = Direction("down", 2, b"")
OTHER: Final = {"up": DOWN, "down": UP}


def is_whole(frame: bytes | bytearray | memoryview, direction: Direction) -> bool:
    """Say whether these bytes are a message's frame as it was written, of either direction."""
    return len(frame) == direction.frame_bytes and crc32(frame) == RESIDUE


@dataclass
class Arrivals:
    """The messages of one direction of one tunnel that came, by their numbers: 0, 1, 2 and so on.

    `corrupt` are pieces of the stream that are no message as it was written; `strayed` are whole messages of another
    tunnel or direction. `missing` are numbers that were jumped over and did not come yet.
    """

    received: int = 0  # each number counted once
    expected: int = 0
    doubled: int = 0
    reordered: int = 0
    corrupt: int = 0
    strayed: int = 0
    missing: set[int] = field(default_factory=set)

    def take(self, sequence: int) -> None:
        """Note the number of a message that came."""
        if sequence >= self.expected:
            self.missing.update(range(self.expected, sequence))
            self.expected = sequence + 1
            self.received += 1
        elif sequence in self.missing:
            self.missing.remove(sequence)
            self.reordered += 1
            self.received += 1
        else:
            self.doubled += 1

    def describe(self) -> dict[str, int]:
        """Return the counts, without the numbers."""
        counts = asdict(self)
        del counts["missing"], counts["expected"]
        return counts


class Scanner:
    """Cuts a stream into frames where they do not come one by one, and finds the next whole one after damage."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self._start = re.compile(re.escape(direction.start))
        self._held = bytearray()
        self.is_damaged = False  # what is held begins with bytes that are no frame
        self.controls: list[str] = []  # the control frames that came, which neither end sends: "Close 1012"

    @property
    def is_inside(self) -> bool:
        """Say whether a part of a frame is held."""
        return bool(self._held)

    def feed(self, data: bytes, arrivals: Arrivals) -> list[bytes]:
        """Return the whole frames that are there now; count what is no frame as corrupt, once for each run of it."""
        self._held += data
        frames = []
        while self._held:
            size = self._next_bytes()
            if len(self._held) < size:
                break
            frame = bytes(self._held[:size])
            if self._held[0] in _CONTROLS and not self.is_damaged:
                self.controls.append(_describe_control(frame))
            elif is_whole(frame, self._direction):
                self.is_damaged = False
                frames.append(frame)
            else:
                arrivals.corrupt += not self.is_damaged
                self.is_damaged = True
                found = self._start.search(self._held, 1)
                # Without a start, one may still stand in the last bytes in part.
                size = found.start() if found else max(1, len(self._held) - len(self._direction.start) + 1)
            del self._held[:size]
        return frames

    def _next_bytes(self) -> int:
        """Return the size of the frame that what is held begins with; at least 2 if it is not known yet."""
        if self._held[0] not in _CONTROLS or self.is_damaged:
            return self._direction.frame_bytes
        if len(self._held) < 2:
            return 2
        return 2 + (4 if self._held[1] & 0x80 else 0) + (self._held[1] & 0x7F)


def _describe_control(frame: bytes) -> str:
    """Return the name of a control frame, with the code of a Close (RFC 6455, section 5.5.1)."""
    name = _CONTROLS[frame[0]]
    start = 6 if frame[1] & 0x80 else 2
    code = frame[start : start + 2]
    if name != "Close" or len(code) < 2:
        return name
    mask = frame[2:4] if frame[1] & 0x80 else b"\0\0"
    return f"Close {(code[0] ^ mask[0]) << 8 | code[1] ^ mask[1]}"
