"""Output of an app process, cut into lines of text that can be shown on any terminal."""

from __future__ import annotations

import re
from typing import Final

MAX_LINE_BYTES: Final = 8 * 1024  # what is longer is shown in pieces; a traceback's longest lines are below 1 KiB

_COLOUR: Final = r"\x1b\[[0-9;:]*m"
_NO_TEXT: Final = re.compile(
    rf"({_COLOUR})"  # the only one that is kept
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # other control sequences: ECMA-48, section 5.4
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # control strings, such as a title: section 5.6
    r"|\x1b[ -/]*[0-~]"
    r"|[\x00-\x08\x0a-\x1f\x7f-\x9f]"
)


class Lines:
    """Puts the bytes of one process together to lines. `partial` is the beginning of a line that has not ended yet."""

    def __init__(self, partial: bytes = b"") -> None:
        self.partial = partial

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that end in `data`, and the pieces of one that has grown too long."""
        *whole, rest = (self.partial + data).split(b"\n")
        found = []
        for line in whole:
            pieces, last = _cut(line)
            found += [*pieces, last]
        pieces, self.partial = _cut(rest)
        return [clean(line) for line in (*found, *pieces)]

    def finish(self) -> list[str]:
        """Return what is left, as a line, when nothing follows."""
        rest, self.partial = self.partial, b""
        return [clean(rest)] if rest else []


def _cut(line: bytes) -> tuple[list[bytes], bytes]:
    """Return the pieces that are whole, and the last one, which is short enough to grow or to end."""
    pieces = []
    at = 0
    while len(line) - at > MAX_LINE_BYTES:
        end = _find_character(line, at + MAX_LINE_BYTES)
        pieces.append(line[at:end])
        at = end
    return pieces, line[at:]


def _find_character(line: bytes, at: int) -> int:
    """Return where the UTF-8 character begins that stands at `at`; `at`, where there is no UTF-8."""
    for begin in range(at, at - 4, -1):
        if line[begin] & 0xC0 != 0x80:  # noqa: PLR2004 -- the bits of a byte that continues a character
            return begin
    return at


def clean(line: bytes) -> str:
    """Return a line as text: without control characters but tab and ANSI colours, broken UTF-8 replaced."""
    return _NO_TEXT.sub(lambda found: found[1] or "", line.decode(errors="replace"))
