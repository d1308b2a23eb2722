"""Bodies: where one ends, and what of the bytes is payload (RFC 9112, sections 6 and 7).

A reader takes the bytes of a connection as they come, in any cut, and gives back payload; it never holds more than
the part of a framing line that has not arrived whole. After the last byte `done` is true and what follows on the
connection is in `excess`.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from stickyproxy.wire.headers import REQUEST_SPECIALS, RESPONSE_SPECIALS, FieldError, canonicalise

_SIZE_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t -~\x80-\xff]*)?"
)  # RFC 9112, section 7.1; the white space is "bad" but met in the wild
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_LEAST_COUNTED: Final = 8  # bytes of an extension, however short it is: each costs 2 microseconds
_NO_TRAILERS: Final[tuple[bytes, ...]] = ()
# What a trailer must not carry because the head has decided it (RFC 9110, section 6.5.1).
_NOT_IN_TRAILERS: Final = frozenset(
    {
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-range",
        b"content-type",
        b"expect",
        b"max-forwards",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"range",
        b"set-cookie",
        b"trailer",
        b"www-authenticate",
    }
)


class BodyError(ValueError):
    """The framing of a body is broken; the text says how. The connection cannot be used any more."""


class BodyReader(Protocol):
    """What the three kinds of framing have in common."""

    done: bool
    excess: bytes
    trailers: tuple[bytes, ...]

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; raise BodyError."""
        ...


class LengthReader:
    """A body of known length: counted, not parsed."""

    __slots__ = ("done", "excess", "left")
    trailers = _NO_TRAILERS

    def __init__(self, length: int) -> None:
        self.left = length
        self.done = length == 0
        self.excess = b""

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; no error is possible."""
        left = self.left - len(data)
        if left > 0:
            self.left = left
            return data
        self.done = True
        if left < 0:
            self.excess = data[left:]
            data = data[: self.left]
        self.left = 0
        return data


class UntilCloseReader:
    """A response body that ends with its connection (RFC 9112, section 6.3, rule 8); never done by itself."""

    __slots__ = ()
    done = False
    excess = b""
    trailers = _NO_TRAILERS

    def feed(self, data: bytes) -> bytes:
        """Return `data`: all of it is payload."""
        return data


class ChunkedReader:
    """A body in chunks; its framing lines are checked and dropped, its trailers kept in `trailers`.

    `max_extensions` bounds the bytes of all chunk extensions together, of which each counts as 8 at least, and
    `max_trailers` those of the trailer section.
    """

    __slots__ = ("_checked", "_extensions", "_held", "_left", "_max_trailers", "_state", "done", "excess", "trailers")

    _SIZE, _DATA, _DATA_END, _TRAILERS = range(4)

    def __init__(self, max_extensions: int = 4096, max_trailers: int = 8192) -> None:
        self._state = self._SIZE
        self._left = 0
        self._held = b""
        self._checked = 0  # bytes of the trailer section that were looked at, from its beginning
        self._extensions = max_extensions
        self._max_trailers = max_trailers
        self.done = False
        self.excess = b""
        self.trailers = _NO_TRAILERS

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; raise BodyError."""
        if self._held:
            data = self._held + data
            self._held = b""
        payload: list[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._state == self._SIZE:
                at = _read_small_chunks(data, at, payload)
                if at == end:
                    break
            if self._state == self._DATA:
                stop = min(at + self._left, end)
                payload.append(data[at:stop])
                self._left -= stop - at
                if not self._left:
                    self._state = self._DATA_END
            else:
                stop = self._read_framing(data, at)
                if stop < 0:
                    self._held = data[at:]
                    break
            at = stop
        if self.done:
            self.excess = data[at:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _read_framing(self, data: bytes, at: int) -> int:
        """Read the framing at `at` and return where it ends, or -1 when it has not come whole."""
        if self._state == self._SIZE:
            return self._read_size(data, at)
        if self._state == self._TRAILERS:
            return self._read_trailers(data, at)
        if not b"\r\n".startswith(data[at : at + 2]):
            raise BodyError("a chunk longer than its size")
        if len(data) - at < len(b"\r\n"):
            return -1
        self._state = self._SIZE
        return at + 2

    def _read_size(self, data: bytes, at: int) -> int:
        stop = data.find(b"\r\n", at)
        if (stop if stop >= 0 else len(data)) - at > self._extensions + 18:
            raise BodyError("chunk extensions are too long")
        if stop < 0:
            # A bare LF must not wait for a CRLF further on, nor may anything but a size begin here.
            if data.find(b"\n", at) >= 0 or (data[at:] != b"\r" and not _may_begin_size(data[at:])):
                raise BodyError("an invalid chunk size")
            return -1
        match = _SIZE_LINE.fullmatch(data, at, stop)
        if match is None:
            raise BodyError("an invalid chunk size")
        size = stop - at - len(match[1])
        self._extensions -= max(size, _LEAST_COUNTED) if data.find(b";", at, stop) >= 0 else size
        if self._extensions < 0:
            raise BodyError("chunk extensions are too long")
        self._left = int(match[1], 16)
        self._state = self._DATA if self._left else self._TRAILERS
        return stop + 2

    def _read_trailers(self, data: bytes, at: int) -> int:
        if data.startswith(b"\r\n", at):
            self.done = True
            return at + 2
        stop = data.find(b"\r\n\r\n", at)
        # As long as the end has not come whole, up to three bytes of it may have.
        here = stop + 2 if stop >= 0 else len(data)
        unchecked = at + max(0, self._checked - 1)  # what a CR at the end of it means was not known
        if _BARE_LINE_END.search(data, unchecked, min(here, at + self._max_trailers + 3)):  # do not wait for an end
            raise BodyError("a bare CR or LF in the trailer section")
        if (stop if stop >= 0 else len(data) - 3) - at > self._max_trailers:
            raise BodyError("the trailer section is too large")
        if stop < 0:
            self._checked = len(data) - at
            return -1
        lines = data[at : stop + 2]
        try:
            lines = canonicalise(lines, 0, len(lines)) or lines
        except FieldError as error:
            raise BodyError(f"{error} in the trailer section") from error
        self.trailers = tuple(line for line in lines.split(b"\r\n")[:-1] if _may_be_trailer(line))
        self.done = True
        return stop + 4


# Size lines of small chunks, without zeros before them, by their bytes: three of them, or four.
_ONE_DIGIT: Final = {text % size: size for size in range(1, 16) for text in (b"%x\r\n", b"%X\r\n")}
_TWO_DIGITS: Final = {text % size: size for size in range(16, 256) for text in (b"%x\r\n", b"%X\r\n")}


def _read_small_chunks(data: bytes, at: int, payload: list[bytes]) -> int:
    """Read the small chunks that stand whole and plain at `at`; return where they end.

    Thousands may come in one read. Each costs a quarter of a microsecond here, ten times less than by the rules below,
    which are for everything else.
    """
    one, two, append = _ONE_DIGIT.get, _TWO_DIGITS.get, payload.append
    while True:
        start = at + 3
        size = one(data[at:start])
        if size is None:
            start += 1
            size = two(data[at:start])
            if size is None:
                return at
        stop = start + size
        if data[stop : stop + 2] != b"\r\n":
            return at
        append(data[start:stop])
        at = stop + 2


def _may_begin_size(data: bytes) -> bool:
    return _SIZE_LINE.fullmatch(data.removesuffix(b"\r")) is not None


def _may_be_trailer(line: bytes) -> bool:
    lower = b"\n" + line.lower()
    if REQUEST_SPECIALS.match(lower) or RESPONSE_SPECIALS.match(lower):
        return False
    return lower[1:].partition(b":")[0] not in _NOT_IN_TRAILERS


def write_chunk(payload: bytes) -> bytes:
    """Frame a payload, which must not be empty, as one chunk (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def write_last_chunk(trailers: tuple[bytes, ...] = _NO_TRAILERS) -> bytes:
    """Return the last chunk with the trailer section: the clean end of a chunked body."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n" + b"\r\n".join(trailers) + b"\r\n\r\n"
