"""How a command shows what is under way: one line that is rewritten on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Final, Self, TextIO

if TYPE_CHECKING:
    from types import TracebackType

_BACK: Final = "\r"
_ERASE: Final = "\x1b[K"  # to the end of the line
_HOME: Final = "\x1b[H"
_ERASE_BELOW: Final = "\x1b[J"


class Progress:
    """One line on standard output, or another stream: `with Progress() as progress`. It is gone when that ends."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._shown: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_terminal and self._shown is not None:
            self._write(f"{_BACK}{_ERASE}")

    def show(self, text: str, detail: str = "") -> None:
        """Say where things stand. A change of nothing but `detail` is no reason for another line off a terminal."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap, and could not be rewritten
            self._write(f"{_BACK}{(text + detail)[:width]}{_ERASE}")
        elif text != self._shown:
            self._write(f"{text}{detail}\n")
        self._shown = text

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Screen:
    """A text of several lines on standard output, or another stream, that is drawn again in its own place.

    Off a terminal each text follows the one before, after an empty line.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._is_first = True

    def draw(self, text: str) -> None:
        """Draw a text in place of the one before."""
        if self._is_terminal:
            lines = "".join(f"{line}{_ERASE}\n" for line in text.splitlines())  # erased line by line: no flicker
            self._stream.write(f"{_HOME}{lines}{_ERASE_BELOW}")
        else:
            self._stream.write(f"{text}\n" if self._is_first else f"\n{text}\n")
        self._stream.flush()
        self._is_first = False
