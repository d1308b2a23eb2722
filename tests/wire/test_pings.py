"""Pings of the proxy's own: how they are written, and that their Pongs, and nothing else, leave the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from stickyproxy.wire.frames import FrameScanner, write_close
from stickyproxy.wire.pings import FilterState, PongFilter, write_ping

if TYPE_CHECKING:
    from collections.abc import Iterable

MASK = b"\x01\x82\x03\xff"
PREFIX = b"\x8a\x0812345\x89"  # random bytes may look like frame headers
BOTH = pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])


def serialise(opcode: int, payload: bytes, *, mask: bool, fin: bool = True) -> bytes:
    return Frame(Opcode(opcode), payload, fin).serialize(mask=mask)


def scan(*pieces: bytes, is_masked: bool | None = None) -> FrameScanner:
    """Scan a stream, of a client where its first frame is masked and nothing else is said."""
    if is_masked is None:
        is_masked = b"".join(pieces)[1:2] >= b"\x80"
    scanner = FrameScanner([0] * 16, is_masked=is_masked)
    for piece in pieces:
        scanner.feed(piece)
    return scanner


def new_filter(*, is_masked: bool = False) -> PongFilter:
    return PongFilter(PREFIX, scan(is_masked=is_masked))


def pass_through(pong_filter: PongFilter, pieces: Iterable[bytes]) -> bytes:
    """Return what a filter passes on, having held back no more than one control frame at any time."""
    passed = []
    for piece in pieces:
        passed.append(pong_filter.feed(piece))
        assert len(pong_filter.held) <= 130
    return b"".join(passed)


def cut(data: bytes, bounds: Iterable[int]) -> list[bytes]:
    ends = sorted(bounds)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


# Writing


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 9, 125])
def test_a_ping_is_answered_by_websockets_with_a_pong_of_ours(size: int, mask: bytes | None) -> None:
    """An upstream answers what is masked, a client what is not; each refuses the other."""
    payload = (PREFIX + bytes(range(200)))[:size]
    end: ServerProtocol | ClientProtocol
    end = ClientProtocol(parse_uri("ws://a/"), state=State.OPEN) if mask is None else ServerProtocol(state=State.OPEN)
    end.receive_data(write_ping(payload, mask=mask))
    assert end.events_received() == [Frame(Opcode.PING, payload)]
    (answer,) = end.data_to_send()
    pong_filter = new_filter(is_masked=mask is None)
    assert pong_filter.feed(answer) == (b"" if size >= len(PREFIX) else answer)
    assert (pong_filter.pongs, pong_filter.is_at_rest) == (int(size >= len(PREFIX)), True)


def test_a_ping_with_too_much_to_say_is_refused() -> None:
    with pytest.raises(ValueError, match="125"):
        write_ping(bytes(126))


def test_a_masked_ping_does_not_show_its_payload() -> None:
    assert PREFIX in write_ping(PREFIX)
    assert PREFIX not in write_ping(PREFIX, mask=MASK)


# Which frames are Pongs of ours


@BOTH
@pytest.mark.parametrize(
    ("opcode", "payload", "is_ours"),
    [
        pytest.param(10, PREFIX, True, id="the prefix"),
        pytest.param(10, PREFIX + b"\x00", True, id="the prefix and a counter"),
        pytest.param(10, PREFIX + bytes(117), True, id="the prefix and all that fits"),
        pytest.param(10, b"", False, id="an empty Pong"),
        pytest.param(10, PREFIX[:-1], False, id="a Pong too short for the prefix"),
        pytest.param(10, PREFIX[:-1] + b"\x00", False, id="a Pong that differs in the last byte"),
        pytest.param(10, b"\x00" + PREFIX, False, id="the prefix later"),
        pytest.param(10, bytes(125), False, id="the longest Pong"),
        pytest.param(9, PREFIX, False, id="a Ping"),
        pytest.param(2, PREFIX, False, id="a message"),
        pytest.param(1, PREFIX, False, id="a text"),
        pytest.param(0, PREFIX, False, id="a continuation"),
        pytest.param(2, serialise(10, PREFIX, mask=False), False, id="a message that holds a Pong"),
        pytest.param(8, b"\x03\xe8" + PREFIX, False, id="a Close frame"),
    ],
)
def test_a_pong_is_ours_by_its_payload(opcode: int, payload: bytes, is_ours: bool, mask: bool) -> None:  # noqa: FBT001
    data = serialise(opcode, payload, mask=mask)
    for position in range(len(data) + 1):
        pong_filter = new_filter(is_masked=mask)
        assert pass_through(pong_filter, [data[:position], data[position:]]) == (b"" if is_ours else data)
        assert (pong_filter.pongs, pong_filter.is_at_rest, pong_filter.held) == (int(is_ours), True, b"")


@pytest.mark.parametrize("first", [0x0A, 0xCA, 0xAA, 0x9A, 0x8B], ids=hex)
def test_a_pong_in_parts_or_with_reserved_bits_is_not_ours(first: int) -> None:
    """No peer may answer so; what an extension may have made of it is not for the proxy to say."""
    data = bytes((first,)) + serialise(10, PREFIX, mask=False)[1:]
    assert new_filter().feed(data) is data


@pytest.mark.parametrize("size", [126, 200, 65536])
def test_a_pong_longer_than_a_control_frame_is_not_ours(size: int) -> None:
    data = serialise(2, PREFIX + bytes(size - 8), mask=True)
    data = b"\x8a" + data[1:] + serialise(10, PREFIX, mask=True)
    pong_filter = new_filter(is_masked=True)
    assert pass_through(pong_filter, cut(data, range(1, 200))) == data[:-14]
    assert pong_filter.pongs == 1


def test_a_length_that_looks_like_our_payload_is_none() -> None:
    """A Pong of 35336 bytes is no control frame; the two bytes of its length stand where a payload would."""
    data = b"\x8a\x7e" + PREFIX + bytes(35336 - 6)
    assert new_filter().feed(data) is data


@BOTH
def test_pongs_of_ours_leave_from_between_the_fragments_of_a_message(mask: bool) -> None:  # noqa: FBT001
    def ours(counter: int) -> bytes:
        return serialise(10, PREFIX + bytes((counter,)), mask=mask)

    fragments = [
        serialise(1, b"a" * 300, mask=mask, fin=False),
        serialise(0, b"b" * 70000, mask=mask, fin=False),
        serialise(9, b"a Ping of their own", mask=mask),
        serialise(0, b"", mask=mask),
    ]
    data = ours(0) + fragments[0] + ours(1) + ours(2) + fragments[1] + ours(3) + fragments[2] + fragments[3] + ours(4)
    for pieces in ([data], cut(data, range(7, len(data), 7))):
        pong_filter = new_filter(is_masked=mask)
        assert pass_through(pong_filter, pieces) == b"".join(fragments)
        assert (pong_filter.pongs, pong_filter.is_at_rest) == (5, True)


# What is held back, and what is not


@BOTH
def test_only_what_may_become_a_pong_of_ours_is_held_back(mask: bool) -> None:  # noqa: FBT001
    ours, theirs = serialise(10, PREFIX + b"1", mask=mask), serialise(10, b"their own", mask=mask)
    head = 6 if mask else 2
    for size in range(1, len(ours)):
        pong_filter = new_filter(is_masked=mask)
        assert pong_filter.feed(ours[:size]) == b""
        assert (pong_filter.held, pong_filter.is_at_rest) == (ours[:size], False)
    for size in range(1, len(theirs)):
        pong_filter = new_filter(is_masked=mask)
        is_known = size > head  # the first byte of the payload differs
        assert pong_filter.feed(theirs[:size]) == (theirs[:size] if is_known else b"")
        assert (bool(pong_filter.held), pong_filter.is_at_rest) == (not is_known, False)


@pytest.mark.parametrize("opcode", [0, 1, 2, 8, 9])
def test_other_frames_pass_at_once(opcode: int) -> None:
    data = serialise(opcode, PREFIX * 10, mask=True)
    for size in range(len(data) + 1):
        pong_filter = new_filter(is_masked=True)
        begun = data[:size]
        assert pong_filter.feed(begun) is begun
        assert (pong_filter.held, pong_filter.is_at_rest) == (b"", size in {0, len(data)})


def test_what_is_passed_on_untouched_is_not_copied() -> None:
    pong_filter = new_filter(is_masked=True)
    whole = serialise(2, bytes(70000), mask=True)
    for data in (whole, whole[:9], whole[9:3000], whole[3000:] + whole + whole[:1], whole[1:]):
        assert pong_filter.feed(data) is data
    assert pong_filter.is_at_rest


def test_what_is_held_at_the_end_of_the_stream_is_known() -> None:
    data = serialise(2, b"data", mask=False) + serialise(10, PREFIX, mask=False)[:-1]
    pong_filter = new_filter()
    assert pong_filter.feed(data) + pong_filter.held == data


# Where a filter begins


@BOTH
@pytest.mark.parametrize("payload", [PREFIX, b"\x03\xe8" + PREFIX, PREFIX * 20, PREFIX * 9000], ids=len)
@pytest.mark.parametrize("opcode", [2, 8, 10])
def test_a_frame_that_was_begun_before_is_not_ours(opcode: int, payload: bytes, mask: bool) -> None:  # noqa: FBT001
    """Some of it was passed on before there was a Ping of ours, so all of it must be."""
    if opcode >= 8 and len(payload) > 125:
        payload = payload[:125]
    data, ours = serialise(opcode, payload, mask=mask), serialise(10, PREFIX, mask=mask)
    for position in {*range(1, 16), len(data) - 1} & set(range(1, len(data))):
        for pieces in ([data[position:] + ours + data], cut(data[position:] + ours + data, range(1, 16))):
            pong_filter = PongFilter(PREFIX, scan(data[:position], is_masked=mask))
            assert not pong_filter.is_at_rest
            passed = pass_through(pong_filter, pieces)
            again = b"" if payload.startswith(PREFIX) and opcode == 10 else data  # the second time it would be ours
            assert passed == data[position:] + again
            assert pong_filter.is_at_rest


def test_a_filter_at_a_boundary_is_at_rest() -> None:
    assert PongFilter(PREFIX, scan(serialise(1, b"a", mask=True))).is_at_rest


LOST = b"\x88\x7e\x00\x7e"  # a Close frame of 126 bytes


@pytest.mark.parametrize("size", range(len(LOST) + 1))
def test_what_is_no_websocket_passes_for_ever(size: int) -> None:
    """Lost before the filter was there, or before its eyes: what looks like a Pong of ours there is none."""
    ours = serialise(10, PREFIX, mask=False)
    pong_filter = PongFilter(PREFIX, scan(ours, LOST[:size]))
    for data in (LOST[size:] + ours, ours, bytes(200), ours * 3):
        assert pong_filter.feed(data) is data
        assert not pong_filter.is_at_rest
    assert pong_filter.pongs == 0


# The law: what passes is what came, without the Pongs of ours

PAYLOADS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([PREFIX, PREFIX[:4], PREFIX[:-1], PREFIX + b"\x01", b"\x8a\x08" + PREFIX, PREFIX * 3]),
    st.sampled_from([125, 126, 127, 300]).map(lambda size: (PREFIX * 38)[:size]),
)
FRAMES = st.one_of(
    st.tuples(st.sampled_from([0, 1, 2]), PAYLOADS),
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([65535, 65536]).map(lambda size: (PREFIX * 8192)[:size])),
    st.tuples(st.sampled_from([8, 9, 10]), PAYLOADS.map(lambda payload: payload[:125])),
    st.tuples(st.just(10), st.binary(max_size=117).map(lambda counter: PREFIX + counter)),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(FRAMES, st.booleans()), max_size=8), st.data())
def test_any_cut_and_any_start_give_the_stream_without_pongs_of_ours(
    frames: list[tuple[tuple[int, bytes], bool]], data: st.DataObject
) -> None:
    mask = data.draw(st.booleans())
    written = [
        (serialise(opcode, payload, mask=mask, fin=fin or opcode >= 8), opcode == 10 and payload.startswith(PREFIX))
        for (opcode, payload), fin in frames
    ]
    stream = b"".join(frame for frame, _ in written)
    ends = [0]
    for frame, _ in written:
        ends.append(ends[-1] + len(frame))
    near = [st.integers(max(0, end - 16), min(len(stream), end + 16)) for end in ends]
    positions = st.one_of(st.integers(0, len(stream)), *near)
    start = data.draw(positions)
    bounds = [at - start for at in data.draw(st.lists(positions, max_size=8)) if at > start]
    expected, pongs = [], 0
    for (frame, is_ours), end in zip(written, ends[1:], strict=True):
        if is_ours and end - len(frame) >= start:
            pongs += 1
        else:
            expected.append(frame[max(0, start - end + len(frame)) :])

    scanner = scan(stream[:start], is_masked=mask)
    pong_filter = PongFilter(PREFIX, scanner)
    before, passed, at = sum(scanner.counts), [], start
    for piece in cut(stream[start:], bounds):
        passed.append(pong_filter.feed(piece))
        scanner.feed(passed[-1])
        at += len(piece)
        assert pong_filter.is_at_rest == (at in ends)
        assert len(pong_filter.held) <= 130
        assert scanner.is_at_boundary >= pong_filter.is_at_rest
    assert b"".join(passed) == b"".join(expected)
    assert pong_filter.pongs == pongs
    assert pong_filter.is_at_rest
    assert scanner.is_at_boundary
    assert sum(scanner.counts) - before == len([end for end in ends if end > start]) - pongs - (
        # A frame whose length was known at the start was counted before; that of a Close frame is, once it is whole.
        1 if start not in ends and scan(stream[:start], is_masked=mask).left_bytes else 0
    )


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=6), st.binary(max_size=30))
@example([b"\x8a\x08", PREFIX, b"\x88\x7e\xff\xff", b"\x8a\x08" + PREFIX], b"\x8a")
def test_any_bytes_pass_the_same_at_any_cut(pieces: list[bytes], before: bytes) -> None:
    by_piece, whole = PongFilter(PREFIX, scan(before)), PongFilter(PREFIX, scan(before))
    assert pass_through(by_piece, pieces) == whole.feed(b"".join(pieces))
    assert (by_piece.held, by_piece.pongs) == (whole.held, whole.pongs)
    assert by_piece.is_at_rest == whole.is_at_rest
    if not by_piece.pongs:
        assert pass_through(PongFilter(PREFIX, scan(before)), pieces) + by_piece.held == b"".join(pieces)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=6), st.binary(max_size=30))
@example([b"\x8a", b"\x01\x00"], b"")
def test_a_filter_stands_where_a_scanner_would(pieces: list[bytes], before: bytes) -> None:
    """With a prefix that no Pong can hold, both see the same frames; a first byte may wait for the second."""
    scanner = scan(before, is_masked=False)
    pong_filter = PongFilter(bytes(126), scanner)
    for piece in pieces:
        scanner.feed(pong_filter.feed(piece))
        assert pong_filter.held in {b"", b"\x8a"}
        assert pong_filter.is_at_rest == (scanner.is_at_boundary and not pong_filter.held)


@given(st.lists(FRAMES, max_size=5), st.booleans(), st.data())
def test_another_filter_goes_on_where_one_stands(
    frames: list[tuple[int, bytes]],
    mask: bool,  # noqa: FBT001
    data: st.DataObject,
) -> None:
    stream = b"".join(serialise(opcode, payload, mask=mask) for opcode, payload in frames)
    at = data.draw(st.integers(0, len(stream)))
    whole, first = new_filter(is_masked=mask), new_filter(is_masked=mask)
    expected = whole.feed(stream[:at]) + whole.feed(stream[at:])
    passed = first.feed(stream[:at])
    second = PongFilter.going_on_from(first.export(), scan(is_masked=mask))
    assert second.export() == first.export()
    assert second.is_at_rest == first.is_at_rest
    assert passed + second.feed(stream[at:]) == expected
    assert second.export() == whole.export()


def test_a_filter_without_a_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="every Pong"):
        PongFilter.going_on_from(FilterState(), scan(is_masked=False))


def test_a_filter_that_takes_too_much_is_found() -> None:
    """The law above can fail: without a prefix every Pong would be ours."""
    theirs = serialise(10, b"their own", mask=False)
    assert PongFilter(b"", scan()).feed(theirs + write_close(1000, "")) == write_close(1000, "")
    assert new_filter().feed(theirs) == theirs


def test_repr_shows_the_state() -> None:
    pong_filter = new_filter()
    pong_filter.feed(serialise(10, PREFIX, mask=False) + b"\x8a")
    assert repr(pong_filter) == "<PongFilter pongs=1 skip=0 held=1>"
