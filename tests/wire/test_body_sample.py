"""The beginning of a body, decoded: at any cut, within its bounds, and never an error."""

from __future__ import annotations

import gzip
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.wire.body_sample import BodySample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OPEN = b'0{"sid":"2SLcp-8R5yG-zYxeAAAA","upgrades":["websocket"],"pingTimeout":20000,"pingInterval":25000}'


def encode_plain(text: bytes) -> bytes:
    return text


def encode_raw(text: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(text) + compressor.flush()


CODINGS: dict[bytes, Callable[[bytes], bytes]] = {
    b"": encode_plain,
    b"identity": encode_plain,
    b"Identity": encode_plain,
    b"gzip": gzip.compress,
    b"GZIP ": gzip.compress,
    b"x-gzip": gzip.compress,
    b"deflate": zlib.compress,
    b"Deflate": encode_raw,
}
EACH_CODING = pytest.mark.parametrize("coding", CODINGS)


def feed(sample: BodySample, piece: bytes) -> bytes | None:
    """Return what is known now; what the sample returns is its own, and grows."""
    known = sample.feed(piece)
    return None if known is None else bytes(known)


def read(sample: BodySample, pieces: Iterable[bytes]) -> bytes:
    """Return the last that was known; what is known only grows."""
    known = b""
    for piece in pieces:
        was_done = sample.is_done
        now = feed(sample, piece)
        if now is not None:
            assert not was_done
            assert len(now) > len(known)
            assert now.startswith(known)
            known = now
    return known


def one_by_one(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def cut(data: bytes, bounds: list[int]) -> list[bytes]:
    """Cut `data` at the bounds, those beyond its end included: empty pieces are pieces too."""
    edges = [0, *sorted(bounds), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@EACH_CODING
def test_a_body_in_one_piece_is_known_at_once(coding: bytes) -> None:
    sample = BodySample(coding)
    assert feed(sample, CODINGS[coding](OPEN)) == OPEN


@EACH_CODING
def test_a_body_that_comes_byte_by_byte_is_known_in_the_end(coding: bytes) -> None:
    assert read(BodySample(coding), one_by_one(CODINGS[coding](OPEN))) == OPEN


@given(
    st.sampled_from(sorted(CODINGS)),
    st.one_of(st.binary(max_size=300), st.integers(0, 6000).map(lambda size: (OPEN * 60)[:size])),
    st.integers(1, 5000),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_any_cut_of_any_body_gives_the_same_beginning(
    coding: bytes, text: bytes, limit: int, bounds: list[int]
) -> None:
    body = CODINGS[coding](text)
    whole, pieces = BodySample(coding, limit), BodySample(coding, limit)
    expected = read(whole, [body])
    assert read(pieces, cut(body, bounds)) == expected
    assert pieces.is_done == whole.is_done
    assert text.startswith(expected)
    assert len(expected) <= limit
    if len(body) <= limit:
        assert expected == text[:limit]


@given(st.sampled_from([*sorted(CODINGS), b"br"]), st.binary(max_size=200), st.integers(0, 100), st.data())
def test_any_bytes_are_taken_within_the_limit(coding: bytes, body: bytes, limit: int, data: st.DataObject) -> None:
    """Where a stream breaks, pieces may tell more than the whole, never something else."""
    if data.draw(st.booleans()) and coding in CODINGS:
        encoded = bytearray(CODINGS[coding](body))
        at = data.draw(st.integers(0, len(encoded)))
        encoded[at : at + 1] = data.draw(st.binary(max_size=3))
        body = bytes(encoded)
    bounds = data.draw(st.lists(st.integers(0, len(body)), max_size=5))
    whole = read(BodySample(coding, limit), [body])
    pieces = read(BodySample(coding, limit), cut(body, bounds))
    assert pieces.startswith(whole)
    assert len(pieces) <= limit


@EACH_CODING
def test_what_was_flushed_is_known_before_the_body_ends(coding: bytes) -> None:
    """A stream that is never whole, as of Server-Sent Events, tells what its sender has flushed."""
    compressors = {"gzip": 31, "x-gzip": 31, "deflate": 15 if coding == b"deflate" else -15}
    window_bits = compressors.get(coding.strip().lower().decode())
    first, second = OPEN[:40], OPEN[40:]
    if window_bits is not None:
        compressor = zlib.compressobj(wbits=window_bits)
        first, second = (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH) for text in (first, second))
    sample = BodySample(coding)
    assert (feed(sample, first), sample.is_done) == (OPEN[:40], False)
    assert (feed(sample, second), sample.is_done) == (OPEN, False)


def test_nothing_new_is_told_apart() -> None:
    sample = BodySample(b"gzip")
    body = gzip.compress(OPEN)
    assert feed(sample, b"") is None
    assert feed(sample, body[:10]) is None  # the header of the member
    assert feed(sample, body[10:]) == OPEN
    assert sample.is_done
    assert feed(sample, body) is None


# Bounds


@EACH_CODING
def test_no_more_is_given_than_the_limit(coding: bytes) -> None:
    sample = BodySample(coding, limit=90)
    assert feed(sample, CODINGS[coding](b"x" * 200)) == b"x" * 90
    assert sample.is_done
    assert feed(sample, b"more") is None


@EACH_CODING
def test_a_body_of_exactly_the_limit_is_whole(coding: bytes) -> None:
    text = OPEN * 3
    sample = BodySample(coding, limit=len(text))
    assert read(sample, [CODINGS[coding](text)]) == text
    assert sample.is_done


def test_no_more_is_read_than_the_limit() -> None:
    """A gzip header may carry a name of any length before the first byte of the text."""
    body = gzip.compress(OPEN)
    named = body[:3] + b"\x08" + body[4:10] + b"n" * 5000 + b"\x00" + body[10:]
    assert gzip.decompress(named) == OPEN
    sample = BodySample(b"gzip", limit=4096)
    assert read(sample, [named[:4000], named[4000:]]) == b""
    assert sample.is_done
    assert read(BodySample(b"gzip", limit=len(named)), [named]) == OPEN


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"Deflate"])
def test_a_bomb_fills_the_limit_and_no_more(coding: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 KiB of each of these hold some 4 MB; the decoder is never asked for more than there is room for."""
    bomb = CODINGS[coding](bytes(16 << 20))
    assert len(bomb) < 17000
    asked: list[int] = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, window_bits: int) -> None:
            self._decoder = real(window_bits)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            asked.append(max_length)
            return self._decoder.decompress(data, max_length)

        @property
        def eof(self) -> bool:
            return self._decoder.eof

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    for pieces in ([bomb], one_by_one(bomb[:5000])):
        sample = BodySample(coding)
        assert read(sample, pieces) == bytes(4096)
        assert sample.is_done
    assert 1 <= min(asked) <= max(asked) <= 4096


@pytest.mark.parametrize("coding", [b"", b"gzip", b"deflate"])
def test_a_limit_of_nothing_gives_nothing(coding: bytes) -> None:
    sample = BodySample(coding, limit=0)
    assert (sample.is_done, feed(sample, CODINGS[coding](OPEN))) == (True, None)


# What cannot be read


@pytest.mark.parametrize(
    "coding", [b"br", b"zstd", b"compress", b"gzip, br", b"gzip, gzip", b"gzip;q=1", b"\xff", b","]
)
def test_a_coding_that_cannot_be_read_is_left_alone(coding: bytes) -> None:
    sample = BodySample(coding)
    assert sample.is_done
    assert feed(sample, gzip.compress(OPEN)) is None


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        pytest.param(b"gzip", OPEN, id="no gzip at all"),
        pytest.param(b"gzip", zlib.compress(OPEN), id="zlib for gzip"),
        pytest.param(b"deflate", b"\x78\x9d" + zlib.compress(OPEN)[2:], id="a zlib header with a wrong check"),
        pytest.param(b"deflate", b"\xff" * 30, id="a block of no type"),
        pytest.param(b"deflate", gzip.compress(OPEN), id="gzip for deflate"),
    ],
)
def test_a_broken_body_gives_nothing(coding: bytes, body: bytes) -> None:
    for pieces in ([body], one_by_one(body)):
        sample = BodySample(coding)
        assert read(sample, pieces) == b""
        assert sample.is_done


def test_what_came_before_a_body_broke_stays_known() -> None:
    compressor = zlib.compressobj(wbits=31)
    sound = compressor.compress(OPEN) + compressor.flush(zlib.Z_SYNC_FLUSH)
    sample = BodySample(b"gzip")
    assert feed(sample, sound) == OPEN
    assert not sample.is_done
    assert feed(sample, b"\xff" * 20) is None
    assert sample.is_done


def test_what_follows_the_end_of_a_coding_is_not_read() -> None:
    sample = BodySample(b"gzip")
    assert feed(sample, gzip.compress(OPEN) + gzip.compress(b"another member")) == OPEN
    assert sample.is_done


@given(st.binary(max_size=400), st.integers(-1, 9), st.integers(9, 15))
def test_both_kinds_of_deflate_are_told_apart(text: bytes, level: int, window_bits: int) -> None:
    for bits in (window_bits, -window_bits):
        compressor = zlib.compressobj(level, wbits=bits)
        body = compressor.compress(text) + compressor.flush()
        assert read(BodySample(b"deflate"), one_by_one(body)) == text


def test_repr_shows_the_state() -> None:
    sample = BodySample(b"", limit=10)
    feed(sample, b"abc")
    assert repr(sample) == "<BodySample known=3 unread=7 done=False>"
