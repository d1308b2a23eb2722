"""How numbers and tables look to a person. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_BIG: Final = 100  # from here on a fraction says nothing to a person
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_LONGEST_FIRST: Final = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def say_size(size_bytes: float) -> str:
    """Return a number of bytes with three digits or so: `512 B`, `1.2 GiB`, `340 MiB`."""
    size, unit = float(size_bytes), _UNITS[0]
    for unit in _UNITS:
        if size < 1023.5 or unit == _UNITS[-1]:  # noqa: PLR2004 -- what would be written as 1024 is 1.0 of the next
            break
        size /= 1024
    is_whole = unit == _UNITS[0] or round(size, 1) >= _BIG
    return f"{size:.0f} {unit}" if is_whole else f"{size:.1f} {unit}"


def say_duration(duration_s: float) -> str:
    """Return a length of time in its two largest units: `45 s`, `3m 20s`, `3h 12m`, `5d 1h`; under a second: `0 s`."""
    left = int(max(0.0, duration_s))
    for position, (unit, seconds) in enumerate(_LONGEST_FIRST[:-1]):
        if left >= seconds:
            lower, lower_seconds = _LONGEST_FIRST[position + 1]
            return f"{left // seconds}{unit} {left % seconds // lower_seconds}{lower}"
    return f"{left} s"


def count(number: int, name: str) -> str:
    """Return a number of things with their name: `1 session`, `2 sessions`, `3 app processes`."""
    return f"{number} {name if number == 1 else _plural(name)}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return rows of cells as lines with aligned columns, the columns whose positions are in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if position in right else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
