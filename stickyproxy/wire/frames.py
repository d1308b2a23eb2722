"""WebSocket frames seen from beside the stream (RFC 6455, section 5).

The scanner reads frame headers only, never payloads, but for the two bytes of a close code. It changes nothing: the
bytes are relayed as they came. What it knows makes it possible to count frames, to tell who closed and why, and to
add a frame of the proxy's own where one frame has ended and the next has not begun.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

OPCODES: Final = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}
CLOSE: Final = 8
NO_STATUS: Final = 1005
ABNORMAL: Final = 1006
GOING_AWAY: Final = 1001
SERVICE_RESTART: Final = 1012
BAD_GATEWAY: Final = 1014
_OPCODE_OF: Final = bytes(first & 0x0F for first in range(256))
# A run of empty frames that end nothing, of known opcodes; one by one, 32,768 of them in one read would cost 5 ms.
_EMPTY_FRAMES: Final = re.compile(
    b"(?:["
    + b"".join(b"\\x%02x" % first for first in range(256) if first & 0x0F in OPCODES and first & 0x0F != CLOSE)
    + b"]\\x00){8,}"
)
_FOR_EVER: Final = 1 << 64  # more bytes than any stream has: all of them are skipped


@dataclass(frozen=True, slots=True)
class ScannerState:
    """Where a scanner stands, so that another goes on from there: see the attributes of `FrameScanner`.

    `skip` counts the payload bytes of the current frame that have not come, `held` is what came of a frame header.
    """

    skip: int = 0
    held: bytes = b""
    close_code: int = 0
    is_first: bool = False
    is_lost: bool = False


class FrameScanner:
    """Reads one direction of a tunnel. `counts` are 16 counters, by opcode, that may be shared.

    `is_masked` says that the frames come from a client: those are masked, and no others are (RFC 6455, section 5.1).
    `peer` is the scanner of the other direction, if there is one: it tells which of the two closed first.
    """

    __slots__ = ("_held", "_skip", "close_code", "counts", "is_first", "is_lost", "mask_bit", "peer")

    def __init__(self, counts: list[int] | memoryview[int], *, is_masked: bool) -> None:
        self.mask_bit = 0x80 if is_masked else 0  # of the second byte of each frame
        self._skip = 0  # payload bytes of the current frame that have not come
        self._held = b""  # a frame header, or a close frame, that has not come whole
        self.counts = counts
        self.close_code = 0  # of the first Close frame; 0 while there is none
        self.is_first = False  # this direction had the first Close frame
        self.peer: FrameScanner | None = None
        self.is_lost = False  # what came is no WebSocket stream: nothing more is said of it

    @property
    def is_at_boundary(self) -> bool:
        """Say whether a frame of one's own may be added now."""
        return not (self._skip or self._held or self.is_lost)

    @property
    def left_bytes(self) -> int:
        """Return how many bytes of the current frame have not come; of a lost stream, more than there can be."""
        return self._skip

    @property
    def begun(self) -> bytes:
        """Return what came of a frame whose length, or whose close code, is not known yet: from its first byte on."""
        return self._held

    def feed(self, data: bytes) -> None:  # noqa: C901, PLR0912, PLR0915 -- inlined: it runs for every read of every tunnel
        """Go on with the bytes that came next; constant work for each frame, none for payloads."""
        end = len(data)
        at = self._skip
        mask_bit = self.mask_bit
        if at >= end:
            self._skip = at - end
            return
        if self._held:
            data = self._held + data
            end = len(data)
            at = 0
        while at < end:
            if end - at < 2:  # noqa: PLR2004 -- the two bytes that every frame begins with
                break
            first = data[at]
            size = data[at + 1] ^ mask_bit  # above 127 where the mask is not as it must be
            head = 6 if mask_bit else 2
            if size == 126:  # noqa: PLR2004 -- RFC 6455, section 5.2
                if end - at < 4:  # noqa: PLR2004
                    break
                head += 2
                size = (data[at + 2] << 8) | data[at + 3]
            elif size == 127:  # noqa: PLR2004
                if end - at < 10:  # noqa: PLR2004
                    break
                head += 8
                size = int.from_bytes(data[at + 2 : at + 10], "big")
            elif size > 127:  # noqa: PLR2004
                self.is_lost = True
                at = end + _FOR_EVER
                break
            elif not size and not mask_bit and (run := _EMPTY_FRAMES.match(data, at)) is not None:
                self._count_empty(data[at : run.end() : 2])
                at = run.end()
                continue
            if first & 0x0F == CLOSE:
                if size > 125 or end - at < head + size:  # noqa: PLR2004 -- the bound of control frames
                    if size > 125:  # noqa: PLR2004
                        self.is_lost = True
                        at = end + _FOR_EVER
                    break
                if not self.close_code:
                    self.close_code = _read_close_code(data, at + head, size, is_masked=bool(mask_bit))
                    self.is_first = self.peer is None or not self.peer.close_code
            self.counts[first & 0x0F] += 1
            at += head + size
        if at < end:
            self._held = data[at:]
            self._skip = 0
        else:
            self._held = b""
            self._skip = at - end

    def export(self) -> ScannerState:
        """Return where the scanner stands."""
        return ScannerState(self._skip, self._held, self.close_code, self.is_first, self.is_lost)

    def go_on_from(self, state: ScannerState) -> None:
        """Go on where another scanner of the same direction stands; its frames are not counted again."""
        self._skip, self._held = state.skip, state.held
        self.close_code, self.is_first, self.is_lost = state.close_code, state.is_first, state.is_lost

    def _count_empty(self, heads: bytes) -> None:
        """Count frames by their first bytes."""
        opcodes = heads.translate(_OPCODE_OF)
        for opcode in OPCODES:
            self.counts[opcode] += opcodes.count(opcode)

    @override
    def __repr__(self) -> str:
        return f"<FrameScanner skip={self._skip} held={len(self._held)}>"


def _read_close_code(data: bytes, at: int, size: int, *, is_masked: bool) -> int:
    if size < 2:  # noqa: PLR2004 -- a code has two bytes
        return NO_STATUS
    first, second = data[at], data[at + 1]
    if is_masked:
        first, second = first ^ data[at - 4], second ^ data[at - 3]
    return (first << 8 | second) or NO_STATUS  # 0 is no code, but a Close frame all the same


def write_close(code: int, reason: str, *, mask: bytes | None = None) -> bytes:
    """Return a Close frame; towards an upstream it is masked with the 4 bytes `mask` (RFC 6455, section 5.3).

    `reason` is cut to the 123 bytes that fit.
    """
    payload = code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode()
    if mask is None:
        return bytes((0x80 | CLOSE, len(payload))) + payload
    masked = bytes(byte ^ mask[at & 3] for at, byte in enumerate(payload))
    return bytes((0x80 | CLOSE, 0x80 | len(payload))) + mask + masked
