"""Output as lines: the same however the bytes came, and harmless on any terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.control.runner.lines import MAX_LINE_BYTES, Lines, clean

LONG = MAX_LINE_BYTES


def read(*chunks: bytes) -> list[str]:
    lines = Lines()
    found = [line for chunk in chunks for line in lines.feed(chunk)]
    return found + lines.finish()


def test_lines_end_where_they_end() -> None:
    assert read(b"one\ntw", b"", b"o\r\n\nthree") == ["one", "two", "", "three"]
    assert read() == []


def test_what_has_not_ended_is_kept_and_can_be_passed_on() -> None:
    lines = Lines()
    assert lines.feed(b"one\nhal") == ["one"]
    assert lines.partial == b"hal"
    other = Lines(lines.partial)
    assert other.feed(b"f\n") == ["half"]
    assert other.finish() == []


@pytest.mark.parametrize(
    ("line", "lengths"),
    [
        (b"x" * LONG, [LONG]),
        (b"x" * (LONG + 1), [LONG, 1]),
        (b"x" * (2 * LONG + 7), [LONG, LONG, 7]),
        (b"x" + "é".encode() * LONG, [LONG // 2, LONG // 2, 1]),  # no character is cut in two
        (b"xyz" + "😀".encode() * (LONG // 4), [3 + LONG // 4 - 1, 1]),
    ],
)
def test_a_long_line_is_cut_into_pieces(line: bytes, lengths: list[int]) -> None:
    found = read(line + b"\n")
    assert [len(piece) for piece in found] == lengths
    assert "".join(found) == line.decode()
    assert read(line) == found


def test_bytes_that_are_no_text_are_cut_too() -> None:
    found = read(b"\x80" * (LONG + 3))
    assert [len(piece) for piece in found] == [LONG, 3]


def test_no_more_than_one_piece_is_kept() -> None:
    lines = Lines()
    for _ in range(100):
        lines.feed(b"x" * 1000)
        assert len(lines.partial) <= LONG


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"a\tb", "a\tb"),
        (b"\x1b[1;31mred\x1b[0m \x1b[38:5:1mx\x1b[m", "\x1b[1;31mred\x1b[0m \x1b[38:5:1mx\x1b[m"),
        (b"\x1b[2J\x1b[1;1Hgone\x1b[?25l", "gone"),
        (b"\x1b]0;a title\x07one\x1b]8;;http://x\x1b\\two", "onetwo"),
        (b"\x1b]0;never ended", "0;never ended"),
        (b"\x1b(Bplain\x1bc\x1b", "plain"),
        (b"a\x00\x07\x08\x0b\x7f\rb", "ab"),
        ("a\x85\x9bb".encode(), "ab"),
        (b"\xff\xfea", "\ufffd\ufffda"),
        ("größer 😀".encode(), "größer 😀"),
        (b"\x1b[31\x1b[0mx", "31\x1b[0mx"),
    ],
)
def test_only_text_tabs_and_colours_are_shown(line: bytes, text: str) -> None:
    assert clean(line) == text


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", "é".encode(), "😀".encode(), b"\xff", b"\x1b[31m", b"x" * 5000])))
def test_any_cut_of_the_output_gives_the_same_lines(parts: list[bytes]) -> None:
    whole = read(b"".join(parts))
    assert read(*parts) == whole
    if sum(map(len, parts)) < 100:
        assert read(*(bytes([one]) for part in parts for one in part)) == whole


@given(st.binary())
def test_no_control_character_is_left(line: bytes) -> None:
    text = clean(line)
    without = text.replace("\x1b[", "")
    assert all(one == "\t" or (one >= " " and not "\x7f" <= one <= "\x9f") for one in without)
