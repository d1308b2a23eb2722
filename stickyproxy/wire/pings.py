"""WebSocket Pings of the proxy's own, and the Pongs that answer them (RFC 6455, sections 5.5.2 and 5.5.3).

A Ping keeps an idle tunnel open on its way through middleboxes. It may be written where a frame scanner stands at a
boundary. The other end of the tunnel never sent it, so its Pong is taken out of the stream again; this is the one
place where the proxy changes what a tunnel relays, and it stands in the way only while a Ping is unanswered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from typing_extensions import override

from stickyproxy.wire.frames import CLOSE

if TYPE_CHECKING:
    from stickyproxy.wire.frames import FrameScanner

_PING: Final = 0x89  # FIN and the opcode: a control frame is never fragmented (RFC 6455, section 5.5)
_PONG: Final = 0x8A
_MAX_CONTROL_BYTES: Final = 125  # of a control frame's payload (RFC 6455, section 5.5)
_MAX_LENGTH: Final = 127  # what the seven bits of the length can say
_MAX_LENGTH_END: Final = 10  # the bytes of a frame header up to the end of a 64-bit length
_FOR_EVER: Final = 1 << 64  # more bytes than any stream has


def write_ping(payload: bytes, *, mask: bytes | None = None) -> bytes:
    """Return a Ping; towards an upstream it is masked with the 4 bytes `mask` (RFC 6455, section 5.3).

    Raises ValueError where `payload` has more than 125 bytes.
    """
    if len(payload) > _MAX_CONTROL_BYTES:
        raise ValueError("the payload of a Ping has at most 125 bytes")
    if mask is None:
        return bytes((_PING, len(payload))) + payload
    return bytes((_PING, 0x80 | len(payload))) + mask + _mask(payload, mask)


def _mask(payload: bytes, mask: bytes) -> bytes:
    """Mask or unmask a payload, or the beginning of one."""
    return bytes(byte ^ mask[at & 3] for at, byte in enumerate(payload))


@dataclass(frozen=True, slots=True)
class FilterState:
    """Where a filter stands, so that another goes on from there.

    `skip` counts the bytes of the current frame that have not come, `passed` and `held` are the beginning of a frame
    that was passed on, or that was not.
    """

    prefix: bytes = b""
    skip: int = 0
    passed: bytes = b""
    held: bytes = b""
    pongs: int = 0


class PongFilter:
    """Takes the Pongs that answer our Pings out of one direction of a tunnel; all else passes byte for byte.

    A Pong is ours when its payload begins with `prefix`: at least 8 random bytes, that no one else can name. The
    filter starts where `scanner`, that of the same direction, stands: what the scanner has seen was passed on. From
    then on the scanner is to be fed with what `feed` returns, so that it knows nothing of the Pongs of ours. `pongs`
    counts them.
    """

    __slots__ = ("_mask_bit", "_passed", "_prefix", "_skip", "held", "pongs")

    def __init__(self, prefix: bytes, scanner: FrameScanner) -> None:
        self._prefix = prefix
        self._mask_bit = scanner.mask_bit
        self._passed = b""  # the incomplete header of a frame that cannot be ours; it was passed on
        self.held = b""  # an incomplete frame that may become a Pong of ours; it was not passed on
        self.pongs = 0
        # Bytes of the current frame that have not come: they pass unread.
        self._skip = scanner.left_bytes or self._end_of_passed(scanner.begun) - len(scanner.begun)

    @classmethod
    def going_on_from(cls, state: FilterState, scanner: FrameScanner) -> Self:
        """Return a filter that goes on where another of the same direction stands; raise ValueError without prefix."""
        if not state.prefix:
            raise ValueError("a filter without a prefix would take every Pong for one of ours")
        self = cls(state.prefix, scanner)
        self._skip, self._passed, self.held, self.pongs = state.skip, state.passed, state.held, state.pongs
        return self

    def export(self) -> FilterState:
        """Return where the filter stands."""
        return FilterState(self._prefix, self._skip, self._passed, self.held, self.pongs)

    @property
    def is_at_rest(self) -> bool:
        """Say whether the stream stands at a frame boundary with nothing held back: the filter may be taken off.

        Never again where the stream turned out to be no WebSocket; everything is passed on then.
        """
        return not (self._skip or self._passed or self.held)

    def feed(self, data: bytes) -> bytes:
        """Return what is to be passed on, now that `data` came: `data` itself where nothing was taken out or held.

        At most 130 bytes are held back, those of one control frame that may be a Pong of ours. If the connection ends,
        the caller passes on what is `held`. Constant work for each frame, none for payloads.
        """
        end = len(data)
        at = self._skip
        if at >= end:
            self._skip = at - end
            return data
        if self.held:
            data = self.held + data
            self.held = b""
            end = len(data)
        elif self._passed:
            at = self._end_of_passed(data)
        kept = []
        start = 0  # of what was not put into `kept`
        while at < end:
            size = self._size_of_ours(data, at, end) if data[at] == _PONG else 0
            if size > 0:
                kept.append(data[start:at])
                start = at = at + size
                self.pongs += 1
            elif size < 0:
                self.held = data[at:]
                end = at
            else:
                size = _size_of_frame(data, at, end, self._mask_bit)
                if not size:
                    self._passed = data[at:]
                    break
                at += size
        self._skip = at - end if at > end else 0
        if not kept:
            return data if end == len(data) else data[:end]
        kept.append(data[start:end])
        return b"".join(kept)

    def _end_of_passed(self, data: bytes) -> int:
        """Return where in `data` the frame ends that was begun before it; the end of `data` while nothing tells."""
        begun = self._passed + data[:_MAX_LENGTH_END]
        size = _size_of_frame(begun, 0, len(begun), self._mask_bit)
        if not size:
            self._passed = begun
            return len(data)
        end = size - len(self._passed)
        self._passed = b""
        return end

    def _size_of_ours(self, data: bytes, at: int, end: int) -> int:
        """Return the bytes of the Pong of ours that stands at `at`; 0 where it is none, -1 while it may become one."""
        if end - at < 2:  # noqa: PLR2004 -- the two bytes that every frame begins with
            return -1
        size = data[at + 1] ^ self._mask_bit
        if not len(self._prefix) <= size <= _MAX_CONTROL_BYTES:
            return 0
        payload_at = at + (6 if self._mask_bit else 2)
        begun = data[payload_at : payload_at + len(self._prefix)]
        if self._mask_bit:
            begun = _mask(begun, data[at + 2 : payload_at])
        if not self._prefix.startswith(begun):
            return 0
        return payload_at + size - at if payload_at + size <= end else -1

    @override
    def __repr__(self) -> str:
        return f"<PongFilter pongs={self.pongs} skip={self._skip} held={len(self.held)}>"


def _size_of_frame(data: bytes, at: int, end: int, mask_bit: int) -> int:
    """Return the bytes of the whole frame at `at`, as the scanner counts them; 0 while its length has not come.

    A Close frame too long to be one ends the WebSocket, as for the scanner, and so does one with a mask where none may
    be, or without: all that follows counts as that frame.
    """
    if end - at < 2:  # noqa: PLR2004 -- the two bytes that every frame begins with
        return 0
    size = data[at + 1] ^ mask_bit
    head = 6 if mask_bit else 2
    if size > _MAX_LENGTH:
        return _FOR_EVER
    if size > _MAX_CONTROL_BYTES:
        length_bytes = 2 if size == 126 else 8  # noqa: PLR2004 -- RFC 6455, section 5.2
        if end - at < 2 + length_bytes:
            return 0
        head += length_bytes
        size = int.from_bytes(data[at + 2 : at + 2 + length_bytes], "big")
        if data[at] & 0x0F == CLOSE and size > _MAX_CONTROL_BYTES:
            return _FOR_EVER
    return head + size
