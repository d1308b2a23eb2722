"""WebSocket frames seen from beside the stream: counts, boundaries and close codes at any cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode
from websockets.streams import StreamReader

from stickyproxy.wire.frames import (
    CLOSE,
    GOING_AWAY,
    NO_STATUS,
    OPCODES,
    SERVICE_RESTART,
    FrameScanner,
    write_close,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

MASK = b"\x01\x02\x03\x04"


def scan(pieces: Iterable[bytes], *, peer: FrameScanner | None = None) -> FrameScanner:
    """Scan a stream, of a client where its first frame is masked."""
    pieces = list(pieces)
    stream = b"".join(pieces)
    scanner = FrameScanner([0] * 16, is_masked=bool(stream[1:2] >= b"\x80"))
    scanner.peer = peer
    for piece in pieces:
        scanner.feed(piece)
    return scanner


def serialise(opcode: int, payload: bytes, *, mask: bool, fin: bool = True) -> bytes:
    return Frame(Opcode(opcode), payload, fin).serialize(mask=mask)


def read_frame(data: bytes, *, mask: bool) -> Frame:
    """Return the one frame that `data` is, as websockets reads it."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    parsing = Frame.parse(reader.read_exact, mask=mask)
    with pytest.raises(StopIteration) as stop:
        next(parsing)
    assert not reader.buffer
    frame = stop.value.value
    assert isinstance(frame, Frame)
    return frame


@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_a_frame_of_any_length_ends_where_it_ends(size: int, mask: bool) -> None:  # noqa: FBT001
    data = serialise(2, b"x" * size, mask=mask)
    scanner = scan([data])
    assert (sum(scanner.counts), scanner.counts[2], scanner.is_at_boundary) == (1, 1, True)
    assert not scan([data[:-1]]).is_at_boundary
    assert not scan([data, b"\x82"]).is_at_boundary
    for position in {1, 2, 3, 4, 5, 9, 10, 11, 13, len(data) // 2} & set(range(len(data))):
        pieces = scan([data[:position], data[position:], data])
        assert (sum(pieces.counts), pieces.counts[2], pieces.is_at_boundary) == (2, 2, True)


FRAMES = st.one_of(
    st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 300).map(bytes)),
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([65535, 65536]).map(bytes)),
    st.tuples(st.sampled_from([8, 9, 10]), st.binary(max_size=125)),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(FRAMES, st.booleans()), max_size=8), st.data())
def test_any_cut_of_any_frames_gives_what_websockets_wrote(
    frames: list[tuple[tuple[int, bytes], bool]], data: st.DataObject
) -> None:
    mask = data.draw(st.booleans())
    counts = [0] * 16
    ends = {0}
    stream = b""
    close_code = 0
    for (opcode, payload), fin in frames:
        counts[opcode] += 1
        stream += serialise(opcode, payload, mask=mask, fin=fin or opcode >= CLOSE)
        ends.add(len(stream))
        if opcode == CLOSE and not close_code:
            close_code = (int.from_bytes(payload[:2], "big") if len(payload) > 1 else 0) or NO_STATUS
    near = [st.integers(max(0, end - 14), min(len(stream), end + 14)) for end in ends]
    bounds = sorted(data.draw(st.lists(st.one_of(st.integers(0, len(stream)), *near), max_size=8)))
    scanner = FrameScanner([0] * 16, is_masked=mask)
    before = 0
    for bound in [*bounds, len(stream)]:
        scanner.feed(stream[before:bound])
        before = bound
        assert scanner.is_at_boundary == (bound in ends)
    assert scanner.counts == counts
    assert sum(scanner.counts) == len(frames)
    assert scanner.close_code == close_code
    assert scanner.is_first == bool(counts[CLOSE])


def test_each_byte_by_itself_gives_the_same() -> None:
    stream = b"".join(serialise(opcode, b"\x03\xe9" * 60, mask=True) for opcode in (1, 9, 0, 8, 10))
    whole, pieces = scan([stream]), scan(stream[at : at + 1] for at in range(len(stream)))
    assert pieces.counts == whole.counts == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert pieces.close_code == whole.close_code == GOING_AWAY
    assert pieces.is_at_boundary


def test_a_scanner_that_loses_its_place_is_found() -> None:
    """One byte too many or too few puts the counts wrong: the comparison above can fail."""
    stream = serialise(1, b"\x88" * 40, mask=False) * 2
    assert scan([stream[:-3]]).counts == scan([stream]).counts
    assert not scan([stream[:-3]]).is_at_boundary
    assert scan([stream[1:]]).counts != scan([stream]).counts


@pytest.mark.parametrize("data", [b"", b"\x81"], ids=["nothing", "one byte"])
def test_nothing_new_changes_nothing(data: bytes) -> None:
    scanner = scan([data, b"", b""])
    assert sum(scanner.counts) == 0
    assert scanner.is_at_boundary == (data == b"")


# Close frames


@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(b"", NO_STATUS, id="no payload"),
        pytest.param(b"\x03", NO_STATUS, id="half a code"),
        pytest.param(b"\x03\xe8", 1000, id="a code"),
        pytest.param(b"\x0f\xa0bye", 4000, id="a code with a reason"),
        pytest.param(b"\x03\xf3" + b"r" * 123, 1011, id="the longest reason"),
        pytest.param(b"\x00\x00", NO_STATUS, id="no valid code, but a Close frame"),
    ],
)
def test_the_code_of_a_close_frame_is_read_at_any_cut(payload: bytes, code: int, mask: bool) -> None:  # noqa: FBT001
    data = serialise(8, payload, mask=mask)
    for position in range(len(data) + 1):
        scanner = scan([data[:position], data[position:]])
        assert (scanner.close_code, scanner.counts[CLOSE], scanner.is_at_boundary) == (code, 1, True)


def test_the_first_close_frame_counts() -> None:
    scanner = scan([write_close(4001, ""), write_close(4002, "")])
    assert (scanner.close_code, scanner.counts[CLOSE]) == (4001, 2)


def test_the_answer_to_a_close_frame_is_not_the_first() -> None:
    first = scan([write_close(4001, "")], peer=FrameScanner([0] * 16, is_masked=True))
    answer = scan([write_close(4001, "", mask=MASK)], peer=first)
    assert (first.is_first, answer.is_first) == (True, False)
    assert answer.close_code == 4001


@pytest.mark.parametrize("size", [126, 127, 65536])
@pytest.mark.parametrize("cuts", [1, 2], ids=["whole", "cut"])
def test_after_a_close_frame_that_is_none_nothing_more_is_said(size: int, cuts: int) -> None:
    """A control frame has at most 125 bytes (RFC 6455, section 5.5): the bytes that follow mean nothing."""
    length = b"\x7e" + size.to_bytes(2, "big") if size < 65536 else b"\x7f" + size.to_bytes(8, "big")
    data = b"\x88" + length
    pieces = [data] if cuts == 1 else [data[:3], data[3:]]
    scanner = scan([*pieces, b"x" * 300, serialise(1, b"", mask=False) * 5, write_close(1000, "")])
    assert scanner.is_lost
    assert not scanner.is_at_boundary
    assert (sum(scanner.counts), scanner.close_code) == (0, 0)


def test_what_follows_a_lost_place_in_the_same_bytes_is_not_read() -> None:
    lost = b"\x88\x7e\x00\x7e"
    scanner = scan([serialise(1, b"a", mask=False) + lost + serialise(1, b"a", mask=False) * 3])
    assert (scanner.is_lost, sum(scanner.counts)) == (True, 1)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=6))
def test_any_bytes_are_scanned(pieces: list[bytes]) -> None:
    by_piece, whole = scan(pieces), scan([b"".join(pieces)])
    assert by_piece.counts == whole.counts
    assert by_piece.is_at_boundary == whole.is_at_boundary
    assert (by_piece.close_code, by_piece.is_lost) == (whole.close_code, whole.is_lost)
    assert by_piece.is_lost <= (not by_piece.is_at_boundary)


@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
def test_a_frame_that_is_masked_where_none_may_be_ends_the_reading(mask: bool) -> None:  # noqa: FBT001
    """And one that is not where it must be (RFC 6455, section 5.1): its receiver will close the connection."""
    right, wrong = serialise(1, b"abc", mask=mask), serialise(1, b"abc", mask=not mask)
    scanner = scan([right, wrong, right])
    assert (scanner.counts[1], scanner.is_lost, scanner.is_at_boundary) == (1, True, False)


@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("cut", [0, 1, 2, 17, 31])
def test_runs_of_empty_frames_are_counted_one_by_one(cut: int, mask: bool) -> None:  # noqa: FBT001
    opcodes = [1, 9, 2, 0, 10] * 20
    stream = b"".join(serialise(opcode, b"", mask=mask) for opcode in opcodes)
    stream += serialise(8, b"", mask=mask) + serialise(1, b"", mask=mask) * 10 + serialise(2, b"a", mask=mask)
    scanner = scan([stream[:cut], stream[cut:]] if cut else [stream])
    assert [scanner.counts[opcode] for opcode in (0, 1, 2, 8, 9, 10)] == [20, 30, 21, 1, 20, 20]
    assert (scanner.close_code, scanner.is_at_boundary) == (NO_STATUS, True)


def test_reserved_opcodes_among_empty_frames_are_counted_too() -> None:
    scanner = scan([b"\x81\x00" * 20 + b"\x83\x00" * 3 + b"\x8b\x00" + b"\x81\x00" * 20])
    assert (scanner.counts[1], scanner.counts[3], scanner.counts[11], sum(scanner.counts)) == (40, 3, 1, 44)


def test_counts_may_be_shared() -> None:
    counts = [0] * 16
    for _ in range(2):
        FrameScanner(counts, is_masked=False).feed(serialise(1, b"", mask=False))
    assert counts[1] == 2


@pytest.mark.parametrize(
    ("data", "left_bytes", "begun"),
    [
        pytest.param(b"", 0, b"", id="a boundary"),
        pytest.param(b"\x81", 0, b"\x81", id="half a header"),
        pytest.param(b"\x81\xfe\x01", 0, b"\x81\xfe\x01", id="half a length"),
        pytest.param(b"\x81\x85", 9, b"", id="a header without its mask"),
        pytest.param(b"\x81\x05ab", 3, b"", id="half a payload"),
        pytest.param(b"\x81\x00\x88\x02\x03", 0, b"\x88\x02\x03", id="half a Close frame"),
        pytest.param(b"\x81\x05abcde", 0, b"", id="a whole frame"),
    ],
)
def test_where_a_scanner_stands_is_known(data: bytes, left_bytes: int, begun: bytes) -> None:
    for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
        scanner = scan(pieces)
        assert (scanner.left_bytes, scanner.begun) == (left_bytes, begun)
        assert scanner.is_at_boundary == (not (left_bytes or begun))


def test_a_lost_stream_never_comes_to_an_end() -> None:
    scanner = scan([b"\x88\x7e\x00\x7e", b"x" * 1000])
    assert (scanner.left_bytes > 1 << 63, scanner.begun) == (True, b"")


@given(st.lists(FRAMES, max_size=5), st.booleans(), st.data())
def test_another_scanner_goes_on_where_one_stands(
    frames: list[tuple[int, bytes]],
    mask: bool,  # noqa: FBT001
    data: st.DataObject,
) -> None:
    """At every cut both know the same, and each frame is counted by one of the two."""
    stream = b"".join(serialise(opcode, payload, mask=mask) for opcode, payload in frames)
    at = data.draw(st.integers(0, len(stream)))
    whole, first, second = (FrameScanner([0] * 16, is_masked=mask) for _ in range(3))
    whole.feed(stream[:at])
    whole.feed(stream[at:])
    first.feed(stream[:at])
    second.go_on_from(first.export())
    assert second.export() == first.export()
    assert (second.is_at_boundary, second.left_bytes) == (first.is_at_boundary, first.left_bytes)
    second.feed(stream[at:])
    assert second.export() == whole.export()
    assert [one + other for one, other in zip(first.counts, second.counts, strict=True)] == whole.counts


def test_a_scanner_that_does_not_go_on_loses_its_place() -> None:
    stream = serialise(1, b"\x88\x02\x03\xe8" * 20, mask=False)
    first, second = (FrameScanner([0] * 16, is_masked=False) for _ in range(2))
    first.feed(stream[:6])
    second.feed(stream[6:])
    assert second.close_code == 1000
    second.go_on_from(first.export())
    second.feed(stream[6:])
    assert (second.close_code, second.is_at_boundary) == (0, True)


def test_the_opcodes_have_the_names_of_the_standard() -> None:
    assert {opcode.value: opcode.name.lower().replace("cont", "continuation") for opcode in Opcode} == OPCODES


# Writing


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize(
    ("reason", "sent"),
    [
        pytest.param("", "", id="no reason"),
        pytest.param("going away", "going away", id="a reason"),
        pytest.param("é" * 61 + "a", "é" * 61 + "a", id="123 bytes"),
        pytest.param("é" * 62, "é" * 61, id="cut before half a character"),
        pytest.param("a" * 500, "a" * 123, id="cut to 123 bytes"),
    ],
)
def test_a_close_frame_is_read_by_websockets(reason: str, sent: str, mask: bytes | None) -> None:
    data = write_close(SERVICE_RESTART, reason, mask=mask)
    frame = read_frame(data, mask=mask is not None)
    frame.check()
    assert (frame.opcode, frame.fin) == (Opcode.CLOSE, True)
    assert Close.parse(frame.data) == Close(SERVICE_RESTART, sent)
    scanner = scan([data])
    assert (scanner.close_code, scanner.is_at_boundary) == (SERVICE_RESTART, True)


def test_a_masked_frame_does_not_show_its_payload() -> None:
    assert b"secret" in write_close(1000, "secret")
    assert b"secret" not in write_close(1000, "secret", mask=MASK)


def test_repr_shows_the_state() -> None:
    assert repr(scan([b"\x81\x05ab"])) == "<FrameScanner skip=3 held=0>"
    assert repr(scan([b"\x81"])) == "<FrameScanner skip=0 held=1>"
