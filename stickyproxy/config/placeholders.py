"""Placeholders in what the file says of an app process: `{port}`, `{socket}`, `{id}` and `{generation}`.

Pure text: what they stand for is known only when a process is started. `{{` and `}}` are literal braces.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from stickyproxy.config.units import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAMES: Final = ("port", "socket", "id", "generation")

_FORMS: Final = "{port}, {socket}, {id} and {generation}"
# Read from left to right as `str.format` does: `{{{port}}}` is a brace, a placeholder, a brace.
_PIECE: Final = re.compile(r"(?P<literal>[^{}]+|\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<single>[{}])")


def placeholders(text: str) -> frozenset[str]:
    """Return the names of the placeholders in a text.

    Raises `ValueError` with a message for the author of the file: for an unknown name, a single brace, and for what
    no command line or environment can hold (NUL, half of a surrogate pair).
    """
    if "\0" in text:
        raise ValueError(f"expected a text without NUL characters, got {shown(text)}")
    try:
        text.encode("utf-8", "surrogateescape")  # an argument that is no UTF-8 comes so from the command line
    except UnicodeEncodeError:
        raise ValueError(f"expected a text that can be written as UTF-8, got {shown(text)}") from None
    return frozenset(name for name, _ in _pieces(text) if name)


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return the text with its placeholders replaced and literal braces single; a value is taken as it is.

    Raises `ValueError` for an unknown placeholder, a single brace, and for a placeholder that has no value.
    """
    return "".join(_value_of(name, values) if name else literal for name, literal in _pieces(text))


def _value_of(name: str, values: Mapping[str, str]) -> str:
    if name not in values:
        raise ValueError(f"{{{name}}} has no value here")
    return values[name]


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Give the name of each placeholder, or an empty one and the literal text that stands there."""
    for match in _PIECE.finditer(text):
        if match["single"]:
            brace = match["single"]
            raise ValueError(f'a single "{brace}" in {shown(text)}: write "{brace * 2}" for a literal brace')
        name = match["name"]
        if name is None:
            yield "", match["literal"][:1] if match["literal"][0] in "{}" else match["literal"]
        elif name in NAMES:
            yield name, ""
        else:
            raise ValueError(
                f'unknown placeholder {shown("{" + name + "}")}: there are {_FORMS}; write "{{{{" for a literal brace'
            )
