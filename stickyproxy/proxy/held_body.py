"""The body of a request that says where its client belongs: held until it has come whole, and then sent as it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.proxy.relay import Relay

if TYPE_CHECKING:
    from stickyproxy.proxy.settings import Settings

MAX_HELD_BYTES: Final = 1 << 20  # Gradio sends whole chats in one


class HeldBody:
    """What has come of a body: `raw` with its framing and what came behind it, `payload` the content."""

    __slots__ = ("_reader", "payload", "raw")

    def __init__(self, length: int, settings: Settings) -> None:
        """Hold a body of `length` bytes, or CHUNKED."""
        self._reader = Relay(length, settings, is_chunked=False)
        self.raw = bytearray()
        self.payload = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what came next; raise BodyError where that is no body."""
        self.raw += data
        self.payload += self._reader.feed(data)

    @property
    def is_whole(self) -> bool:
        """Say whether the body has come whole."""
        return self._reader.is_done

    @property
    def is_too_long(self) -> bool:
        """Say whether more has come than is held."""
        return len(self.raw) > MAX_HELD_BYTES

    @override
    def __repr__(self) -> str:
        return f"<HeldBody {len(self.payload)} bytes{' whole' if self.is_whole else ''}>"
