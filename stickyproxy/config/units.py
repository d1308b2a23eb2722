"""Read and write the units of the configuration: `30s` and `64KiB`.

The lowest file of `config/`; the field types build on it. A number without its unit is refused, because `30` reads as
seconds to one person and as milliseconds to the next. Only 0 is the same in every unit.
"""

from __future__ import annotations

import re
from decimal import Decimal

MAX_DURATION_S = 3650 * 86400.0  # ten years: over any sensible timeout, and far from what a timer's float loses
MAX_SIZE_BYTES = 1 << 40  # 1 TiB: over any sensible buffer, and below what a C `ssize_t` holds

_SECONDS_IN = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_BYTES_IN = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

DURATION_PATTERN = r"[0-9]{1,12}(\.[0-9]{1,9})?(ms|s|m|h|d)"
SIZE_PATTERN = r"[0-9]{1,15}(B|KiB|MiB|GiB)"
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB)")

_SHOWN_CHARACTERS = 60  # enough to recognise the value; a message stays one line


def shown(value: object) -> str:
    """Return how a message names a value of the file: as YAML writes it, cut after 60 characters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN_CHARACTERS + 2 else text[:_SHOWN_CHARACTERS] + "..."


def parse_duration(value: object) -> float:
    """Return the seconds that a duration such as `30s` or `500ms` means.

    Takes the value as YAML gave it; 0 is the only number that needs no unit. Raises `ValueError` with a message for
    the author of the file, also for more than ten years.
    """
    if _is_zero(value):
        return 0.0
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(_refusal("a duration such as 500ms, 30s, 10m, 1h or 2d", "ms, s, m, h or d", value))
    duration_s = float(Decimal(match[1]) * _SECONDS_IN[match[2]])
    if duration_s > MAX_DURATION_S:
        raise ValueError(f"expected a duration of at most 3650d, got {shown(value)}")
    return duration_s


def parse_size(value: object) -> int:
    """Return the bytes that a size such as `64KiB` or `512B` means.

    Takes the value as YAML gave it; 0 is the only number that needs no unit. Raises `ValueError` with a message for
    the author of the file, also for more than 1 TiB.
    """
    if _is_zero(value):
        return 0
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(_refusal("a size such as 512B, 64KiB or 1MiB", "B, KiB, MiB or GiB", value))
    size_bytes = int(match[1]) * _BYTES_IN[match[2]]
    if size_bytes > MAX_SIZE_BYTES:
        raise ValueError(f"expected a size of at most 1024GiB, got {shown(value)}")
    return size_bytes


def write_duration(duration_s: float) -> str:
    """Return a length in seconds as the file writes it: whole, in the largest unit that allows it, else parts of ms.

    `parse_duration` reads it as the same number again.
    """
    exact_s = Decimal(repr(float(duration_s)))  # the decimal digits that were written, not those of the binary float
    for unit in ("d", "h", "m", "s"):
        if exact_s and exact_s % _SECONDS_IN[unit] == 0:
            return f"{exact_s / _SECONDS_IN[unit]:.0f}{unit}"
    return f"{(exact_s / _SECONDS_IN['ms']).normalize():f}ms" if exact_s else "0s"


def write_size(size_bytes: int) -> str:
    """Return a number of bytes as the file writes it, in the largest unit in which it is whole."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _BYTES_IN[unit] == 0:
            return f"{size_bytes // _BYTES_IN[unit]}{unit}"
    return f"{size_bytes}B"


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _refusal(expected: str, units: str, value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_digits = isinstance(value, str) and value.isascii() and value.isdigit()
    if is_number or is_digits:
        return f"expected {expected}, got {shown(value)}; a number needs its unit ({units})"
    if value is False or value == "off":
        return f"expected {expected}; this cannot be switched off"
    return f"expected {expected}, got {shown(value)}"
