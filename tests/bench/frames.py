"""The frames that the WebSocket load and the application exchange: whole binary messages of one size."""

from __future__ import annotations

from typing import Final

_FIN_BINARY: Final = 0x82
_MASK: Final = b"\1\2\3\4"  # of a client's frames; the payload is not really masked, nobody here looks into it


def write_frame(size_bytes: int, *, is_masked: bool) -> bytes:
    """Return one binary frame with a payload of `size_bytes` (RFC 6455, section 5.2)."""
    bit = 0x80 if is_masked else 0
    if size_bytes < 126:
        head = bytes([_FIN_BINARY, bit | size_bytes])
    elif size_bytes < 2**16:
        head = bytes([_FIN_BINARY, bit | 126]) + size_bytes.to_bytes(2, "big")
    else:
        head = bytes([_FIN_BINARY, bit | 127]) + size_bytes.to_bytes(8, "big")
    return head + (_MASK if is_masked else b"") + b"x" * size_bytes
