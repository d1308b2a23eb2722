"""Durations and sizes: what is read, and what the author of a file is told."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from stickyproxy.config.units import (
    DURATION_PATTERN,
    MAX_DURATION_S,
    MAX_SIZE_BYTES,
    SIZE_PATTERN,
    parse_duration,
    parse_size,
    shown,
    write_duration,
    write_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall
NEEDS_DURATION = "expected a duration such as 500ms, 30s, 10m, 1h or 2d"
NEEDS_SIZE = "expected a size such as 512B, 64KiB or 1MiB"

ANY_YAML_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.text()),
)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30s", 30.0),
        ("500ms", 0.5),
        ("700ms", 0.7),
        ("10m", 600.0),
        ("1h", 3600.0),
        ("2d", 172800.0),
        ("1.5s", 1.5),
        ("0s", 0.0),
        ("3650d", MAX_DURATION_S),
        (0, 0.0),
        (0.0, 0.0),
    ],
)
def test_duration_is_read_as_seconds(written: object, seconds: float) -> None:
    found = parse_duration(written)
    assert found == seconds
    assert isinstance(found, float)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (30, f"{NEEDS_DURATION}, got 30; a number needs its unit (ms, s, m, h or d)"),
        (1.5, f"{NEEDS_DURATION}, got 1.5; a number needs its unit (ms, s, m, h or d)"),
        ("30", f"{NEEDS_DURATION}, got '30'; a number needs its unit (ms, s, m, h or d)"),
        (float("nan"), f"{NEEDS_DURATION}, got nan; a number needs its unit (ms, s, m, h or d)"),
        ("-5s", f"{NEEDS_DURATION}, got '-5s'"),
        ("30 s", f"{NEEDS_DURATION}, got '30 s'"),
        ("30S", f"{NEEDS_DURATION}, got '30S'"),
        ("1h30m", f"{NEEDS_DURATION}, got '1h30m'"),
        ("30s\n", f"{NEEDS_DURATION}, got '30s\\n'"),
        ("٣s", f"{NEEDS_DURATION}, got '٣s'"),
        ("", f"{NEEDS_DURATION}, got ''"),
        (True, f"{NEEDS_DURATION}, got true"),
        (False, f"{NEEDS_DURATION}; this cannot be switched off"),
        ("off", f"{NEEDS_DURATION}; this cannot be switched off"),
        (None, f"{NEEDS_DURATION}, got nothing"),
        ([], f"{NEEDS_DURATION}, got a list"),
        ({}, f"{NEEDS_DURATION}, got a mapping"),
        ("3651d", "expected a duration of at most 3650d, got '3651d'"),
    ],
)
def test_what_is_no_duration_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("512B", 512),
        ("64KiB", 65536),
        ("1MiB", 1048576),
        ("2GiB", 2 << 30),
        ("1024GiB", MAX_SIZE_BYTES),
        (0, 0),
        ("0B", 0),
    ],
)
def test_size_is_read_as_bytes(written: object, size: int) -> None:
    found = parse_size(written)
    assert found == size
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (1024, f"{NEEDS_SIZE}, got 1024; a number needs its unit (B, KiB, MiB or GiB)"),
        ("64", f"{NEEDS_SIZE}, got '64'; a number needs its unit (B, KiB, MiB or GiB)"),
        ("64KB", f"{NEEDS_SIZE}, got '64KB'"),
        ("64k", f"{NEEDS_SIZE}, got '64k'"),
        ("1.5MiB", f"{NEEDS_SIZE}, got '1.5MiB'"),
        ("-1B", f"{NEEDS_SIZE}, got '-1B'"),
        (True, f"{NEEDS_SIZE}, got true"),
        (False, f"{NEEDS_SIZE}; this cannot be switched off"),
        (None, f"{NEEDS_SIZE}, got nothing"),
        ("1025GiB", "expected a size of at most 1024GiB, got '1025GiB'"),
    ],
)
def test_what_is_no_size_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_size(written)


def outcome(parse: Callable[[object], float], value: object) -> tuple[float, str | None]:
    try:
        return parse(value), None
    except ValueError as error:
        return 0, str(error)


@UNHURRIED
@given(ANY_YAML_VALUE | st.from_regex(DURATION_PATTERN, fullmatch=True))
def test_any_value_is_a_duration_within_bounds_or_refused(value: object) -> None:
    found, message = outcome(parse_duration, value)
    assert 0 <= found <= MAX_DURATION_S
    assert message is None or message.startswith("expected a duration")


@UNHURRIED
@given(ANY_YAML_VALUE | st.from_regex(SIZE_PATTERN, fullmatch=True))
def test_any_value_is_a_size_within_bounds_or_refused(value: object) -> None:
    found, message = outcome(parse_size, value)
    assert 0 <= found <= MAX_SIZE_BYTES
    assert message is None or message.startswith("expected a size")


@pytest.mark.parametrize(
    ("duration_s", "written"),
    [
        (0.0, "0s"),
        (30.0, "30s"),
        (90.0, "90s"),
        (300.0, "5m"),
        (3600.0, "1h"),
        (172800.0, "2d"),
        (MAX_DURATION_S, "3650d"),
        (0.5, "500ms"),
        (1.5, "1500ms"),
        (0.1, "100ms"),
        (0.0005, "0.5ms"),
        (1e-12, "0.000000001ms"),
        (30, "30s"),
    ],
)
def test_duration_is_written_with_its_unit(duration_s: float, written: str) -> None:
    assert write_duration(duration_s) == written


@UNHURRIED
@given(st.from_regex(DURATION_PATTERN, fullmatch=True))
def test_a_duration_that_was_written_is_read_as_the_same(text: str) -> None:
    duration_s, message = outcome(parse_duration, text)
    assume(message is None)
    assert parse_duration(write_duration(duration_s)) == duration_s


@pytest.mark.parametrize(
    ("size_bytes", "written"),
    [
        (0, "0B"),
        (512, "512B"),
        (1025, "1025B"),
        (65536, "64KiB"),
        (1 << 20, "1MiB"),
        (3 << 30, "3GiB"),
        (MAX_SIZE_BYTES, "1024GiB"),
    ],
)
def test_size_is_written_with_its_unit(size_bytes: int, written: str) -> None:
    assert write_size(size_bytes) == written


@UNHURRIED
@given(st.integers(0, MAX_SIZE_BYTES) | st.integers(0, 1024).map(lambda number: number << 20))
def test_a_size_that_was_written_is_read_as_the_same(size_bytes: int) -> None:
    assert parse_size(write_size(size_bytes)) == size_bytes


def test_a_long_value_is_cut_in_messages() -> None:
    assert shown("a" * 60) == repr("a" * 60)
    assert shown("a" * 1000) == "'" + "a" * 59 + "..."
    assert shown(10**100) == "1" + "0" * 59 + "..."
