"""The first bytes of a body without its content coding, to look for an id in (RFC 9110, section 8.4).

A sample is fed with payload that was relayed already. It changes nothing, holds nothing back and never raises: what it
cannot read, it leaves alone. The work and the memory for a body are bounded, whatever the body is.
"""

from __future__ import annotations

import zlib
from typing import Final

from typing_extensions import override

_PLAIN: Final = frozenset({b"", b"identity"})
# Formats by their window bits, as zlib takes them: RFC 1951, RFC 1950, RFC 1952.
_RAW: Final = -15
_ZLIB: Final = 15
_GZIP: Final = 31
_WINDOW_BITS: Final = {b"deflate": _ZLIB, b"gzip": _GZIP, b"x-gzip": _GZIP}
_METHOD: Final = 8  # in the low half of a zlib header's first byte (RFC 1950, section 2.2)


class BodySample:
    """Decodes the beginning of one body: at most `limit` bytes are read of it, and at most `limit` are given.

    `content_encoding` is the value of that field, empty where there is none. A coding other than gzip and deflate, or
    several of them, cannot be read. `is_done` says that nothing more will be given, so that feeding may end.
    """

    __slots__ = ("_decoder", "_known", "_room", "_unread", "_window_bits", "is_done")

    def __init__(self, content_encoding: bytes, limit: int = 4096) -> None:
        coding = content_encoding.strip(b" \t").lower()
        self._window_bits = _WINDOW_BITS.get(coding)
        self._decoder: zlib._Decompress | None = None
        self._known = bytearray()  # not bytes: a page may come in a thousand pieces
        self._unread = limit  # bytes of the body that may still be read
        self._room = limit  # bytes that may still be given
        self.is_done = limit < 1 or (self._window_bits is None and coding not in _PLAIN)

    def feed(self, payload: bytes) -> bytearray | None:
        """Return the decoded beginning of the body as far as it is known; None where `payload` adds nothing to it.

        `payload` comes without the framing of chunks, in any cut. A match that touches the end of what is returned may
        be cut off there, unless the body has ended. Where the stream breaks, what else came in the same `payload` may
        be missing. What is returned is the sample's own, and grows with the next call.
        """
        if self.is_done:
            return None
        piece = payload[: self._unread]
        self._unread -= len(piece)
        if self._window_bits is not None:
            piece = self._decode(piece, self._window_bits)
        if not self._unread or len(piece) == self._room:
            self.is_done = True
        if not piece:
            return None
        self._room -= len(piece)
        self._known += piece
        return self._known

    def _decode(self, piece: bytes, window_bits: int) -> bytes:
        """Return what `piece` adds; of a bomb, no more than there is room for."""
        if not piece:
            return b""
        if self._decoder is None:
            # `deflate` means the zlib format, but some send it raw, and browsers take both (RFC 9110, section
            # 8.4.1.2). A raw stream never begins like a zlib header: there, the bit of the method is padding.
            if window_bits == _ZLIB and piece[0] & 0x0F != _METHOD:
                window_bits = _RAW
            self._decoder = zlib.decompressobj(window_bits)
        try:
            piece = self._decoder.decompress(piece, self._room)
        except zlib.error:
            self.is_done = True
            return b""
        self.is_done = self._decoder.eof  # what may follow, such as a second gzip member, is not read
        return piece

    @override
    def __repr__(self) -> str:
        return f"<BodySample known={len(self._known)} unread={self._unread} done={self.is_done}>"
