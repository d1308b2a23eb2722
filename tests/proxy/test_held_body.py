"""A body that is held: it comes whole whatever the cut, and stays as it came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.proxy.held_body import MAX_HELD_BYTES, HeldBody
from stickyproxy.proxy.settings import Settings
from stickyproxy.wire.body import BodyError
from stickyproxy.wire.head import CHUNKED

CONTENT = b'{"data": [1, 2], "session_hash": "abc"}'
IN_CHUNKS = b"5\r\n" + CONTENT[:5] + b"\r\n%x\r\n" % (len(CONTENT) - 5) + CONTENT[5:] + b"\r\n0\r\nTrailer: x\r\n\r\n"
NEXT = b"GET / HTTP/1.1\r\n\r\n"


@given(length_and_raw=st.sampled_from([(len(CONTENT), CONTENT), (CHUNKED, IN_CHUNKS)]), data=st.data())
def test_it_is_whole_with_its_last_byte_whatever_the_cut(
    length_and_raw: tuple[int, bytes], data: st.DataObject
) -> None:
    length, raw = length_and_raw
    held = HeldBody(length, Settings())
    at = 0
    while at < len(raw):
        assert not held.is_whole
        size = data.draw(st.integers(1, len(raw) - at))
        held.feed(raw[at : at + size])
        at += size
    assert held.is_whole
    assert (bytes(held.raw), bytes(held.payload)) == (raw, CONTENT)


def test_what_comes_behind_it_is_kept_and_no_part_of_it() -> None:
    held = HeldBody(len(CONTENT), Settings())
    held.feed(CONTENT + NEXT)
    assert held.is_whole
    assert (bytes(held.raw), bytes(held.payload)) == (CONTENT + NEXT, CONTENT)


def test_one_that_does_not_end_becomes_too_long() -> None:
    held = HeldBody(CHUNKED, Settings())
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    while not held.is_too_long:
        assert len(held.raw) <= MAX_HELD_BYTES
        held.feed(piece)
    assert not held.is_whole


def test_what_is_no_body_is_refused() -> None:
    with pytest.raises(BodyError):
        HeldBody(CHUNKED, Settings()).feed(b"zz\r\n")


def test_its_repr_shows_how_much_there_is() -> None:
    held = HeldBody(3, Settings())
    held.feed(b"ab")
    assert repr(held) == "<HeldBody 2 bytes>"
    held.feed(b"c")
    assert repr(held) == "<HeldBody 3 bytes whole>"
