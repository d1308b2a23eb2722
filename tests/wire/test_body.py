"""Bodies: where one ends, what of it is payload, and which framing is refused, at any cut of the bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typing_extensions import override

from stickyproxy.wire.body import (
    BodyError,
    BodyReader,
    ChunkedReader,
    LengthReader,
    UntilCloseReader,
    write_chunk,
    write_last_chunk,
)

INVALID_SIZE = "an invalid chunk size"
TOO_LONG = "chunk extensions are too long"
TOO_LARGE = "the trailer section is too large"
BARE = "a bare CR or LF in the trailer section"


class Facts(NamedTuple):
    """What a reader says of a body once all bytes have come; `error` is empty where there is none."""

    payload: bytes
    trailers: tuple[bytes, ...]
    excess: bytes
    done: bool
    error: str


def read(reader: BodyReader, pieces: list[bytes]) -> Facts:
    """Feed the pieces the way a connection does: once the body is done, what comes next is excess too."""
    payload: list[bytes] = []
    later = b""
    for piece in pieces:
        if reader.done:
            later += piece
            continue
        try:
            payload.append(reader.feed(piece))
        except BodyError as error:
            return Facts(b"", (), b"", done=False, error=str(error))
    return Facts(b"".join(payload), reader.trailers, reader.excess + later, reader.done, "")


def cut(data: bytes, positions: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(position, len(data)) for position in positions), len(data)]
    return [data[start:stop] for start, stop in pairwise(bounds)]


def read_whole(data: bytes) -> Facts:
    return read(ChunkedReader(), [data])


# Length


def test_a_body_of_known_length_ends_with_its_last_byte() -> None:
    reader = LengthReader(5)
    assert (reader.feed(b"ab"), reader.done) == (b"ab", False)
    assert (reader.feed(b"cdeGET"), reader.done, reader.excess) == (b"cde", True, b"GET")


def test_an_exact_body_leaves_no_excess() -> None:
    assert read(LengthReader(2), [b"ab"]) == Facts(b"ab", (), b"", done=True, error="")


def test_an_empty_body_is_done_from_the_start() -> None:
    reader = LengthReader(0)
    assert reader.done
    assert (reader.feed(b"GET"), reader.excess, reader.done) == (b"", b"GET", True)


@settings(deadline=None)
@given(st.binary(max_size=50), st.integers(0, 60), st.lists(st.integers(0, 50), max_size=6))
def test_any_cut_of_a_body_of_known_length_gives_the_same(data: bytes, length: int, positions: list[int]) -> None:
    facts = read(LengthReader(length), cut(data, positions))
    assert facts == Facts(data[:length], (), data[length:], done=len(data) >= length, error="")


def test_a_body_until_the_end_of_the_connection_is_all_payload() -> None:
    reader = UntilCloseReader()
    assert reader.feed(b"0\r\n\r\n") == b"0\r\n\r\n"
    assert (reader.done, reader.excess, reader.trailers) == (False, b"", ())


# Chunks


@pytest.mark.parametrize(
    ("data", "payload", "excess"),
    [
        pytest.param(b"0\r\n\r\n", b"", b"", id="no chunk"),
        pytest.param(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde", b"", id="two chunks"),
        pytest.param(b"3\r\nabc\r\n0\r\n\r\nGET /", b"abc", b"GET /", id="what follows is excess"),
        pytest.param(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2, b"", id="either case"),
        pytest.param(b"003\r\nabc\r\n000\r\n\r\n", b"abc", b"", id="leading zeros"),
        pytest.param(b"0000000000000003\r\nabc\r\n0\r\n\r\n", b"abc", b"", id="16 digits"),
        pytest.param(b"3;a=b\r\nabc\r\n0;c\r\n\r\n", b"abc", b"", id="extensions are dropped"),
        pytest.param(b'3 ;\ta="b;c"\r\nabc\r\n0 \t\r\n\r\n', b"abc", b"", id="white space after a size"),
        pytest.param(b"5\r\n\r\n0\r\n\r\n0\r\n\r\n", b"\r\n0\r\n", b"", id="payload that looks like an end"),
    ],
)
def test_chunks_give_their_payload(data: bytes, payload: bytes, excess: bytes) -> None:
    assert read_whole(data) == Facts(payload, (), excess, done=True, error="")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"\r\n", INVALID_SIZE, id="no size"),
        pytest.param(b";a\r\n", INVALID_SIZE, id="an extension without a size"),
        pytest.param(b"0x3\r\nabc\r\n", INVALID_SIZE, id="0x"),
        pytest.param(b"+3\r\nabc\r\n", INVALID_SIZE, id="a plus"),
        pytest.param(b"-3\r\nabc\r\n", INVALID_SIZE, id="a minus"),
        pytest.param(b"1_0\r\nabc\r\n", INVALID_SIZE, id="an underscore"),
        pytest.param(b" 3\r\nabc\r\n", INVALID_SIZE, id="a space before the size"),
        pytest.param(b"3 3\r\nabc\r\n", INVALID_SIZE, id="two sizes"),
        pytest.param(b"3\x0b\r\nabc\r\n", INVALID_SIZE, id="a vertical tab"),
        pytest.param(b"3\x00\r\nabc\r\n", INVALID_SIZE, id="NUL"),
        pytest.param("٣\r\nabc\r\n".encode(), INVALID_SIZE, id="a digit of another script"),
        pytest.param(b"g\r\n", INVALID_SIZE, id="no hexadecimal digit"),
        pytest.param(b"g", INVALID_SIZE, id="no hexadecimal digit, at once"),
        pytest.param(b"0" * 17 + b"\r\n", INVALID_SIZE, id="17 digits"),
        pytest.param(b"0" * 17, INVALID_SIZE, id="17 digits, at once"),
        pytest.param(b"3\nabc\r\n0\r\n\r\n", INVALID_SIZE, id="a bare LF after the size"),
        pytest.param(b"3\n", INVALID_SIZE, id="a bare LF after the size, at once"),
        pytest.param(b"3\rabc", INVALID_SIZE, id="a bare CR after the size, at once"),
        pytest.param(b"3;a\nabc\r\n", INVALID_SIZE, id="a bare LF in an extension"),
        pytest.param(b"3;a\rb\r\nabc\r\n", INVALID_SIZE, id="a bare CR in an extension"),
        pytest.param(b"3;a\x00\r\nabc\r\n", INVALID_SIZE, id="NUL in an extension"),
        pytest.param(b"3\r\nabcd\r\n", "a chunk longer than its size", id="no CRLF after the payload"),
        pytest.param(b"3\r\nabc\n0\r\n\r\n", "a chunk longer than its size", id="a bare LF after the payload"),
        pytest.param(b"3\r\nabc\rX", "a chunk longer than its size", id="a bare CR after the payload"),
        pytest.param(b"3\r\nabc0\r\n\r\n", "a chunk longer than its size", id="the next size at once"),
        pytest.param(b"0;" + b"a" * 4096 + b"\r\n\r\n", TOO_LONG, id="an extension of 4,097 bytes"),
        pytest.param(b"0;" + b"a" * 5000, TOO_LONG, id="an extension that does not end"),
        pytest.param(b"1;aaaaaaaa\r\nx\r\n" * 500, TOO_LONG, id="many extensions together"),
        pytest.param(b"1 \r\nx\r\n" * 5000, TOO_LONG, id="much white space together"),
        pytest.param(b"0\r\nX\r\n\r\n", "a header line without a colon in the trailer section", id="a bad trailer"),
        pytest.param(
            b"0\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            BARE,
            id="a bare LF as the end",
        ),
        pytest.param(b"0\r\n\n", BARE, id="a bare LF as the end, at once"),
        pytest.param(b"0\r\n\rX", BARE, id="a bare CR as the end, at once"),
        pytest.param(b"0\r\nA: b\n\n", BARE, id="bare LF after a trailer, at once"),
        pytest.param(b"0\r\nA: b\rC: d\r\n\r\n", BARE, id="a bare CR in a trailer"),
        pytest.param(b"0\r\nA: " + b"b" * 8189 + b"\n", BARE, id="a bare LF at the limit"),
        pytest.param(b"0\r\nA: " + b"b" * 9000 + b"\n", TOO_LARGE, id="a bare LF beyond the limit"),
        pytest.param(b"0\r\nA: b\r\n c\r\n\r\n", "a folded header line (obs-fold) in the trailer section", id="a fold"),
        pytest.param(b"0\r\nA: " + b"b" * 8192 + b"\r\n\r\n", TOO_LARGE, id="trailers over 8 KiB"),
        pytest.param(b"0\r\nA: " + b"b" * 8200, TOO_LARGE, id="trailers that do not end"),
    ],
)
def test_broken_framing_is_refused_at_any_cut(data: bytes, error: str) -> None:
    assert read_whole(data).error == error
    assert read(ChunkedReader(), [data[at : at + 1] for at in range(len(data))]).error == error


def test_the_largest_size_is_no_number_of_python_text() -> None:
    reader = ChunkedReader()
    assert reader.feed(b"ffffffffffffffff\r\nabc") == b"abc"
    assert not reader.done


def test_all_extensions_together_may_have_exactly_their_limit() -> None:
    limited = [b"1;aaaaaaa\r\nx\r\n", b"0;aaaaaaaa\r\n\r\n"]
    assert read(ChunkedReader(max_extensions=17), limited).done
    assert read(ChunkedReader(max_extensions=16), limited).error == TOO_LONG


def test_short_extensions_count_as_more_than_they_are() -> None:
    """Each costs the same, and 4 KiB of the shortest would be 2,000 of them."""
    short = [b"1;\r\nx\r\n", b"1\r\nx\r\n" * 50, b"0;aaa\r\n\r\n"]
    assert read(ChunkedReader(max_extensions=16), short).done
    assert read(ChunkedReader(max_extensions=15), short).error == TOO_LONG
    padded = [b"1  \r\nx\r\n"] * 8  # no extension, but what some servers write
    assert read(ChunkedReader(max_extensions=16), [*padded, b"0\r\n\r\n"]).done


@pytest.mark.parametrize("position", range(3, 16))
def test_trailers_of_exactly_their_limit_are_taken_at_any_cut(position: int) -> None:
    data = b"0\r\nA: 56789\r\n\r\n"
    assert read(ChunkedReader(max_trailers=8), cut(data, [position])).trailers == (b"A: 56789",)
    assert read(ChunkedReader(max_trailers=7), cut(data, [position])).error == TOO_LARGE


def test_trailers_are_kept_in_canonical_form() -> None:
    assert read_whole(b"0\r\nA:1 \r\nb: \r\n\r\n").trailers == (b"A: 1", b"b: ")


@pytest.mark.parametrize(
    "name",
    [
        "Content-Length", "Transfer-Encoding", "Host", "Cookie", "Connection", "TE", "Expect", "Upgrade", "Via",
        "X-Forwarded-For", "Forwarded", "Content_Length", "Keep-Alive", "Cache-Control", "Authorization",
        "Content-Encoding", "Content-Type", "Content-Range", "Range", "Max-Forwards", "Set-Cookie", "Trailer",
        "WWW-Authenticate", "Proxy-Authenticate", "Proxy-Authorization",
    ],
)  # fmt: skip
def test_what_the_head_has_decided_is_no_trailer(name: str) -> None:
    data = f"0\r\nA: 1\r\n{name}: 1\r\n{name.upper()}:1\r\nZ: 1\r\n\r\n".encode()
    assert read_whole(data) == Facts(b"", (b"A: 1", b"Z: 1"), b"", done=True, error="")


def test_a_body_that_has_not_come_whole_is_not_done() -> None:
    data = b"3;x\r\nabc\r\n0\r\nA: b\r\n\r\n"
    for stop in range(len(data)):
        assert not read_whole(data[:stop]).done
    assert read_whole(data).done


PIECES = st.sampled_from(
    [b"3\r\nabc\r\n", b"1;a=b\r\nx\r\n", b"0\r\n", b"\r\n", b"A: b\r\n", b"\n", b"\r", b"3", b";", b"z", b"abc", b" "]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 60), max_size=8))
@example([b"0\r\n", b"\r\n"], [1, 2, 3, 4])
def test_any_cut_of_a_chunked_body_gives_the_same(parts: list[bytes], positions: list[int]) -> None:
    data = b"".join(parts)
    whole, pieces = read_whole(data), read(ChunkedReader(), cut(data, positions))
    if whole.done or whole.error or pieces.error:
        assert pieces == whole
    else:
        assert (pieces.payload, pieces.done) == (whole.payload, whole.done)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 30), max_size=6), st.data())
def test_tight_limits_are_the_same_at_any_cut(positions: list[int], data: st.DataObject) -> None:
    body = data.draw(
        st.sampled_from([b"1;ab\r\nx\r\n0\r\nA: b\r\n\r\n", b"00000000001 \t\r\nx\r\n0\r\nAb: cd\r\n\r\n"])
    )
    extensions, trailers = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 10))
    whole = read(ChunkedReader(extensions, trailers), [body])
    assert read(ChunkedReader(extensions, trailers), cut(body, positions)) == whole


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    facts = read_whole(data)
    assert facts.error or facts.payload in data


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=4), st.booleans(), st.binary(max_size=4))
def test_what_is_written_is_read_again(payloads: list[bytes], has_trailers: bool, excess: bytes) -> None:  # noqa: FBT001
    trailers = (b"A: 1", b"B: 2") if has_trailers else ()
    data = b"".join(write_chunk(payload) for payload in payloads) + write_last_chunk(trailers) + excess
    assert read_whole(data) == Facts(b"".join(payloads), trailers, excess, done=True, error="")


def test_the_last_chunk_without_trailers() -> None:
    assert write_last_chunk() == b"0\r\n\r\n"
    assert write_last_chunk((b"A: 1",)) == b"0\r\nA: 1\r\n\r\n"


def test_a_wrong_reader_would_be_found_by_the_cuts() -> None:
    """A reader that forgets what it held between two feeds differs from itself at some cut."""

    class Forgetful(ChunkedReader):
        __slots__ = ()

        @override
        def feed(self, data: bytes) -> bytes:
            self._held = b""
            return super().feed(data)

    data = b"3\r\nabc\r\n0\r\n\r\n"
    assert any(read(Forgetful(), cut(data, [at])) != read(Forgetful(), [data]) for at in range(len(data)))
    assert all(read(ChunkedReader(), cut(data, [at])) == read_whole(data) for at in range(len(data)))


# Small chunks


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 9, 10, 15, 16, 17, 170, 255, 256, 300]), st.sampled_from("xX0e"))),
    st.lists(st.integers(0, 3000), max_size=6),
    st.binary(max_size=6),
)
def test_small_chunks_are_read_as_all_others(chunks: list[tuple[int, str]], positions: list[int], fill: bytes) -> None:
    """Sizes in small and capital letters, with zeros before them and with extensions, in any order and cut."""
    forms = {"x": b"%x", "X": b"%X", "0": b"0%x", "e": b"%x;a=b"}
    payload, data = b"", b""
    for size, form in chunks:
        piece = ((fill or b"\r\n") * size)[:size]
        payload += piece
        data += forms[form] % size + b"\r\n" + piece + b"\r\n"
    data += b"0\r\n\r\n"
    facts = read(ChunkedReader(), cut(data + b"next", positions))
    assert facts == read_whole(data + b"next")
    assert (facts.payload, facts.excess, facts.error) == (payload, b"next", "")


@pytest.mark.parametrize("end", [b"\n\r", b"\rx", b"xx", b"\r\r"])
def test_a_small_chunk_longer_than_its_size_is_refused(end: bytes) -> None:
    assert read_whole(b"1\r\na\r\n2\r\nab" + end + b"0\r\n\r\n").error == "a chunk longer than its size"
