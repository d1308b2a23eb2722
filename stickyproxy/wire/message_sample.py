"""The first messages of a WebSocket direction, to look for an id in (RFC 6455, section 5; RFC 7692, section 7).

A sample is fed with bytes that were relayed already. It changes nothing, holds nothing back and never raises: where
the stream makes no sense, it says nothing more. The frame scanner tells where frames begin and end.
"""

from __future__ import annotations

import zlib
from typing import Final

from typing_extensions import override

from stickyproxy.wire.frames import FrameScanner

# First bytes of frames (RFC 6455, section 5.2): FIN, RSV1 to RSV3, the opcode. All others end the reading: a Close
# frame, after which nothing comes, an extension that is not known, a control frame in fragments, an unknown opcode.
_BEGINS: Final = frozenset({0x01, 0x02, 0x41, 0x42, 0x81, 0x82, 0xC1, 0xC2})  # text and binary
_CONTINUES: Final = frozenset({0x00, 0x80})
_SKIPPED: Final = frozenset({0x89, 0x8A})  # Ping and Pong: they may stand between fragments (section 5.4)
_FIN: Final = 0x80
_RSV1: Final = 0x40  # of a message's first frame: it is compressed (RFC 7692, section 6)
_MASK_BYTES: Final = 4
_RAW: Final = -15  # window bits as zlib takes them: a DEFLATE stream without header (RFC 1951)
_CUT_OFF: Final = b"\x00\x00\xff\xff"  # what the sender takes off each message (RFC 7692, section 7.2.1)


class MessageSample:
    """Reads the beginning of one direction: at most `limit` bytes are read of it, and at most `limit` are given.

    `is_masked` says that the frames come from a client (RFC 6455, section 5.1). `is_open` says that the last message
    given has not ended: a match that touches its end may be cut off there. `is_done` says that nothing more will be
    given, because of `limit`, because `messages` have ended, or because of a Close frame or of nonsense.
    """

    __slots__ = (
        "_first", "_inflater", "_is_compressed", "_is_touched", "_mask", "_message", "_messages_left", "_room",
        "_scanner", "_unread", "is_done", "is_open",
    )  # fmt: skip

    def __init__(self, *, is_masked: bool, limit: int = 4096, messages: int = 4) -> None:
        self._scanner = FrameScanner([0] * 16, is_masked=is_masked)
        self._inflater: _Inflater | None = None
        self._unread = limit  # bytes of the stream that may still be read
        self._room = limit  # bytes of messages that may still be given
        self._messages_left = messages
        self._first = 0  # the first byte of the current frame
        self._mask = b""  # its mask, turned so that the next byte of the payload belongs to the first of it
        self._message = b""
        self._is_compressed = False  # the current message
        self._is_touched = False  # something of it came since it was given
        self.is_open = False
        self.is_done = limit < 1 or messages < 1

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that have begun, grown or ended with `data`, each from its beginning as far as it came.

        `data` is what came next on the connection, in any cut, the first time what follows the head of the `101`. If a
        message was open before, the first one returned is that. Where compressed data breaks, what else came of it in
        the same `data` may be missing.
        """
        changed: list[bytes] = []
        scanner = self._scanner
        end = min(len(data), self._unread)
        self._unread -= end
        at = 0
        while at < end and not self.is_done:
            left_bytes = scanner.left_bytes
            if left_bytes:
                piece = data[at : min(at + left_bytes, end)]
                self._read_payload(piece)
            else:
                piece = data[at : at + 1]  # of a frame header; with its last byte, `left_bytes` is known
                if scanner.is_at_boundary:
                    self._begin_frame(piece[0])
            scanner.feed(piece)
            at += len(piece)
            if scanner.is_lost:
                self.is_done = True
            elif scanner.is_at_boundary and not self.is_done:
                self._end_frame(changed)
        if self._is_touched:
            self._is_touched = False
            changed.append(self._message)
        if not self._unread:
            self.is_done = True
        return changed

    def _begin_frame(self, first: int) -> None:
        self._first = first
        self._mask = b""
        if first in _SKIPPED:
            return
        if first not in (_CONTINUES if self.is_open else _BEGINS):
            self.is_done = True
            return
        if not self.is_open:
            self.is_open = True
            self._message = b""
            self._is_compressed = bool(first & _RSV1)
        self._is_touched = True

    def _read_payload(self, piece: bytes) -> None:
        """Take what came of the mask and the payload of the current frame."""
        if self._first in _SKIPPED:
            return
        if self._scanner.mask_bit:
            lacking = _MASK_BYTES - len(self._mask)
            if lacking:
                self._mask += piece[:lacking]
                piece = piece[lacking:]
            piece, self._mask = _unmask(piece, self._mask)
        self._add(piece)

    def _end_frame(self, changed: list[bytes]) -> None:
        if self._first in _SKIPPED or not self._first & _FIN:
            return
        if self._inflater is not None and self._is_compressed and not self._inflater.is_at_end:
            self._add(_CUT_OFF)
            if self.is_done:
                return
        changed.append(self._message)
        self.is_open = self._is_touched = False
        self._messages_left -= 1
        self.is_done = not self._messages_left

    def _add(self, piece: bytes) -> None:
        """Let the current message grow, as far as there is room."""
        if self._is_compressed:
            if self._inflater is None:
                self._inflater = _Inflater()
            try:
                piece = self._inflater.inflate(piece, self._room)
            except zlib.error:
                self.is_done = True
                return
        piece = piece[: self._room]
        self._room -= len(piece)
        self._message += piece
        self._is_touched = True
        if not self._room:
            self.is_done = True  # whether the message goes on is not known: it stays open

    @override
    def __repr__(self) -> str:
        return f"<MessageSample unread={self._unread} room={self._room} open={self.is_open} done={self.is_done}>"


class _Inflater:
    """Inflates the compressed messages of one direction (RFC 7692, section 7.2.2), all with one window.

    That is right whether context takeover was agreed or not: messages without it refer to nothing before themselves. A
    DEFLATE stream may end within a message (BFINAL, section 7.2.3.4); another one follows, with the same window.
    """

    __slots__ = ("_stream", "_window")

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(_RAW)
        self._window = b""  # all that was inflated; zlib takes the last 32 KiB of it

    @property
    def is_at_end(self) -> bool:
        """Say whether the DEFLATE stream has ended: then there is nothing to put back at the end of a message."""
        return self._stream.eof

    def inflate(self, piece: bytes, room: int) -> bytes:
        """Return at most `room` bytes, which is 1 or more; raise zlib.error."""
        found = b""
        while piece and len(found) < room:
            if self.is_at_end:
                self._stream = zlib.decompressobj(_RAW, zdict=self._window)
            inflated = self._stream.decompress(piece, room - len(found))
            self._window += inflated
            found += inflated
            piece = self._stream.unused_data
        return found


def _unmask(piece: bytes, mask: bytes) -> tuple[bytes, bytes]:
    """Return the payload (RFC 6455, section 5.3), and the mask turned for what comes after it."""
    size = len(piece)
    key = (mask * (size // _MASK_BYTES + 1))[:size]
    payload = (int.from_bytes(piece, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
    turn = size % _MASK_BYTES
    return payload, mask[turn:] + mask[:turn]
