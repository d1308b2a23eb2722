"""Numbers and tables as a person reads them."""

import pytest

from stickyproxy.cli.words import count, say_duration, say_size, table

KIB, MIB, GIB, TIB = (1 << power for power in (10, 20, 30, 40))


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (64 * KIB, "64.0 KiB"),
        (99.94 * MIB, "99.9 MiB"),
        (99.96 * MIB, "100 MiB"),
        (340.4 * MIB, "340 MiB"),
        (1023.4 * MIB, "1023 MiB"),
        (1023.6 * MIB, "1.0 GiB"),
        (1.2 * GIB, "1.2 GiB"),
        (2 * TIB, "2.0 TiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_sizes(size_bytes: float, said: str) -> None:
    assert say_size(size_bytes) == said


@pytest.mark.parametrize(
    ("duration_s", "said"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (45.2, "45 s"),
        (59.99, "59 s"),
        (60, "1m 0s"),
        (200, "3m 20s"),
        (3599, "59m 59s"),
        (3600, "1h 0m"),
        (3 * 3600 + 12 * 60 + 59, "3h 12m"),
        (86400 - 1, "23h 59m"),
        (5 * 86400 + 3600, "5d 1h"),
        (400 * 86400, "400d 0h"),
    ],
)
def test_durations(duration_s: float, said: str) -> None:
    assert say_duration(duration_s) == said


@pytest.mark.parametrize(
    ("number", "name", "said"),
    [(0, "session", "0 sessions"), (1, "session", "1 session"), (2, "app process", "2 app processes")],
)
def test_counts(number: int, name: str, said: str) -> None:
    assert count(number, name) == said


def test_a_table_has_aligned_columns_and_no_space_at_the_end() -> None:
    rows = [("ID", "N", "WHAT"), ("g1-1", "10", "all"), ("g1", "9", "")]
    assert table(rows, right=[1]) == ["ID     N  WHAT", "g1-1  10  all", "g1     9"]


def test_a_table_of_titles() -> None:
    assert table([("ID", "N")]) == ["ID  N"]
