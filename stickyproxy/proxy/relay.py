"""A body on its way through the proxy: read by one framing, written in another, never held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stickyproxy.wire.body import ChunkedReader, LengthReader, UntilCloseReader, write_chunk, write_last_chunk
from stickyproxy.wire.head import CHUNKED, UNTIL_CLOSE

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy.proxy.settings import Settings
    from stickyproxy.wire.body import BodyReader


class Relay:
    """One body. `relayed_bytes` counts its payload; `is_done` turns true with the last byte of its framing."""

    __slots__ = ("_is_chunked", "_reader", "hear", "is_delimited", "relayed_bytes")

    def __init__(self, length: int, settings: Settings, *, is_chunked: bool) -> None:
        """Relay a body of `length` bytes, CHUNKED or UNTIL_CLOSE; `is_chunked` says how it is sent on."""
        self._reader: BodyReader
        if length == CHUNKED:
            self._reader = ChunkedReader(settings.chunk_extensions_bytes, settings.trailers_bytes)
        elif length == UNTIL_CLOSE:
            self._reader = UntilCloseReader()
        else:
            self._reader = LengthReader(length)
        self._is_chunked = is_chunked
        self.is_delimited = is_chunked or length >= 0
        """Whether the receiver can tell a body that was cut from a whole one by its framing."""
        self.relayed_bytes = 0
        self.hear: Callable[[bytes], bool] | None = None
        """Gets the payload before it is passed on, as long as it says that it wants more."""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send on for those that came, perhaps none; raise BodyError."""
        payload = self._reader.feed(data)
        self.relayed_bytes += len(payload)
        if self.hear is not None and payload and not self.hear(payload):
            self.hear = None
        if not self._is_chunked:
            return payload
        framed = write_chunk(payload) if payload else b""
        return framed + write_last_chunk(self._reader.trailers) if self._reader.done else framed

    def end(self) -> bytes:
        """Return the bytes that end a body whose end was the end of its connection."""
        return write_last_chunk() if self._is_chunked else b""

    @property
    def is_done(self) -> bool:
        """Say whether the whole body has come."""
        return self._reader.done

    @property
    def excess(self) -> bytes:
        """Return what came after the body."""
        return self._reader.excess
