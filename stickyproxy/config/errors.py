"""What is wrong with a configuration, in words for the person who wrote it.

Every reader of `config/` reports here: the document (YAML), the schema, and the options of the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

PathInFile = tuple[str | int, ...]
"""Keys and list positions from the top of the file: `("upstreams", 1, "weight")`."""

Mistake = tuple[PathInFile, str]
"""Where a mistake stands, and the message for its author."""

_SHOWN_KEY_CHARACTERS = 40  # a key longer than any of ours is cut, so that the message stays one line


@dataclass(frozen=True, slots=True)
class ConfigError:
    """One mistake: where it stands, and what to write instead.

    `path_in_file` is like `upstreams[1].weight`, "" for the file as a whole, or the name of an option of the command
    line. `line` counts from 1; None where no line can be named. `preset` names the preset that the value comes from, ""
    where it comes from none.
    """

    path_in_file: str
    line: int | None
    message: str
    preset: str = ""

    @override
    def __str__(self) -> str:
        where = [f"line {self.line}" if self.line else "", f"preset {self.preset}" if self.preset else ""]
        return ": ".join(part for part in (*where, self.path_in_file, self.message) if part)


class ConfigErrors(UsageError):  # noqa: N818 - it carries all mistakes of a file, each a ConfigError
    """All mistakes of one configuration, in the order of the file.

    `errors` is never empty. `source` names the file, "" where the text came from elsewhere. No message holds a secret.
    """

    def __init__(self, errors: Iterable[ConfigError], source: str = "") -> None:
        self.errors = tuple(sorted(errors, key=lambda error: error.line or 0))
        self.source = source
        super().__init__(self.errors, source)

    @override
    def __str__(self) -> str:
        return "\n".join(f"{self.source}: {error}" if self.source else str(error) for error in self.errors)


def render_path(path: PathInFile) -> str:
    """Return the path as messages write it: `upstreams[1].weight`."""
    parts: list[str] = []
    for part in path:
        if isinstance(part, int):
            parts.append(f"[{part}]")
        else:
            parts.append(f".{render_key(part)}" if parts else render_key(part))
    return "".join(parts)


def render_key(key: str) -> str:
    """Return a key on one line: control characters escaped, cut after 40 characters."""
    cut = key if len(key) <= _SHOWN_KEY_CHARACTERS else f"{key[:_SHOWN_KEY_CHARACTERS]}..."
    return cut if cut.isprintable() else repr(cut)[1:-1]
