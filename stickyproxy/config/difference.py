"""What a reload changes: from two configurations to one line for each difference.

Stands beside the schema and walks it, so that a new key needs nothing here. What the lines call a key is what the
file calls it, and values are as the file writes them; upstreams are matched by id and listeners by address, not by
where they stand. A secret is never shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from stickyproxy.config.fields import Section
from stickyproxy.config.written import describe_item, is_secret, is_whole, items_of, name_item, write_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stickyproxy.config.schema import Config

Path = tuple[str, ...]

_SOCKET_STAYS = "the socket is made once, at the start: restart the proxy"

_UNRELOADABLE = {
    ("run",): "whether the proxy runs the app itself is settled at the start: restart the proxy",
    ("affinity", "max_keys"): "the room for keys is taken once, at the start: restart the proxy",
    ("control",): _SOCKET_STAYS,
    ("hand_over",): _SOCKET_STAYS,
}
"""Paths of whole keys: what changes within `run` can be reloaded, that it comes or goes cannot."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two configurations; `str()` gives its line.

    `path` holds the keys of the file from its top, and the names of items where there are lists:
    `("upstreams", "app-2", "weight")`. What was added or removed is an item of a list and ends its path. `detail` is
    `1 -> 2` for a change, and for what was added what it is.
    """

    path: Path
    kind: Literal["added", "removed", "changed"]
    detail: str = ""

    @override
    def __str__(self) -> str:
        if self.kind == "changed":
            return f"{_render(self.path)}: {self.detail}"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{_render(self.path[:-1])}: {_render(self.path[-1:])} {self.kind}{detail}"


@dataclass(frozen=True, slots=True)
class Unreloadable:
    """A change that a reload cannot bring about; `reason` says what can."""

    change: Change
    reason: str

    @override
    def __str__(self) -> str:
        return f"{self.change}; {self.reason}"


def find_changes(before: Config, after: Config) -> tuple[Change, ...]:
    """Return every difference, in the order of the file; none if and only if the two are equal.

    A secret that is another one is `changed` and no more. Costs time with the number of differences, 0.2 ms each.
    """
    return tuple(_compare_sections((), before, after))


def find_unreloadable(before: Config, after: Config) -> tuple[Unreloadable, ...]:
    """Return those of the differences that take effect only when the proxy is started again, each with the reason."""
    return tuple(
        Unreloadable(change, _UNRELOADABLE[change.path])
        for change in find_changes(before, after)
        if change.path in _UNRELOADABLE
    )


def _compare_sections(path: Path, before: Section, after: Section) -> Iterator[Change]:
    for name, field in type(before).model_fields.items():
        old, new = getattr(before, name), getattr(after, name)
        below = (*path, str(field.alias))
        old_items, new_items = items_of(old), items_of(new)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _compare_names(below, old, new)
        elif is_secret(field):
            yield Change(below, "changed", "changed")
        elif isinstance(old, Section) and isinstance(new, Section) and not (is_whole(old) or is_whole(new)):
            yield from _compare_sections(below, old, new)
        elif old_items is not None and new_items is not None:
            yield from _compare_items(below, old_items, new_items)
        else:
            yield Change(below, "changed", f"{write_value(before, name)} -> {write_value(after, name)}")


def _compare_items(path: Path, old: Iterable[object], new: Iterable[object]) -> Iterator[Change]:
    before, after = _number(old), _number(new)
    for key, item in before.items():
        name, _ = key
        if key not in after:
            yield Change((*path, name), "removed")
        elif isinstance(item, Section) and isinstance(other := after[key], Section):
            yield from _compare_sections((*path, name), item, other)
    for key, item in after.items():
        if key not in before:
            yield Change((*path, key[0]), "added", describe_item(item))
    if [key for key in before if key in after] != [key for key in after if key in before]:
        yield Change(path, "changed", "in another order")


def _compare_names(path: Path, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Change]:
    """Compare environment variables. Their values may be secrets and are not told."""
    yield from (Change((*path, name), "removed") for name in old if name not in new)
    yield from (Change((*path, name), "changed", "changed") for name in new if name in old and old[name] != new[name])
    yield from (Change((*path, name), "added") for name in new if name not in old)


def _number(items: Iterable[object]) -> dict[tuple[str, int], object]:
    """Return the items by their names, and by their turn where a name stands in a list more than once."""
    seen = Counter[str]()
    numbered: dict[tuple[str, int], object] = {}
    for item in items:
        name = name_item(item)
        numbered[name, seen[name]] = item
        seen[name] += 1
    return numbered


def _render(path: Path) -> str:
    """Return a path on one line, whatever stands in the name of a file."""
    return ".".join(part if part.isprintable() else repr(part)[1:-1] for part in path)
