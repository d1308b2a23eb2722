"""The first messages of a WebSocket direction: found at any cut, within their bounds, and never an error."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from stickyproxy.wire.frames import write_close
from stickyproxy.wire.message_sample import MessageSample

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OPEN = b'0{"sid":"2SLcp-8R5yG-zYxeAAAA","upgrades":[],"pingTimeout":20000,"pingInterval":25000}'
PROTOBUF = b"\x0a\x24\x12\x00\x8a\x88\xff\x1a\x24" + b"3f2b8a52-0f4c-4a0e-9a6e-1f7f3a0c9b11" + b"\x22\x00\x00"
TEXT, BINARY = Opcode.TEXT, Opcode.BINARY
MANY = 1 << 20
BOTH = pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
BOTH_TAKEOVERS = pytest.mark.parametrize("takeover", [True, False], ids=["takeover", "no takeover"])


def serialise(opcode: int, payload: bytes, *, mask: bool = False, fin: bool = True, rsv1: bool = False) -> bytes:
    data = Frame(Opcode(opcode), payload, fin).serialize(mask=mask)
    return bytes((data[0] | 0x40 * rsv1,)) + data[1:]


def new_deflate(*, takeover: bool) -> PerMessageDeflate:
    return PerMessageDeflate(not takeover, not takeover, 15, 15)


def serialise_message(
    payload: bytes, *, mask: bool, opcode: int = TEXT, fragments: int = 1, deflate: PerMessageDeflate | None = None,
    between: bytes = b"",
) -> bytes:  # fmt: skip
    """Write a message in so many fragments, with the bytes `between` after each but the last one."""
    frame = Frame(Opcode(opcode), payload)
    if deflate is not None:
        frame = deflate.encode(frame)
    data = bytes(frame.data)
    size = max(1, -(-len(data) // fragments))
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    parts += [b""] * (fragments - len(parts))
    last = len(parts) - 1
    return between.join(
        serialise(0 if at else opcode, part, mask=mask, fin=at == last, rsv1=deflate is not None and not at)
        for at, part in enumerate(parts)
    )


def read(sample: MessageSample, pieces: Iterable[bytes]) -> list[bytes]:
    """Return all messages as they are known in the end; each only grows, and none changes after it ended."""
    messages: list[bytes] = []
    for piece in pieces:
        was_open, was_done = sample.is_open, sample.is_done
        changed = sample.feed(piece)
        assert not (was_done and changed)
        if was_open and changed:
            before = messages.pop()
            assert changed[0].startswith(before)
        messages += changed
    return messages


def one_by_one(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def cut(data: bytes, bounds: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(bounds), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@dataclass
class Written:
    """A message and how it is written."""

    payload: bytes
    opcode: int
    fragments: int
    is_compressed: bool
    between: list[tuple[int, bytes]] = field(default_factory=list)


PAYLOADS = st.one_of(
    st.sampled_from([b"", OPEN, PROTOBUF, OPEN + OPEN]),
    st.binary(max_size=40),
    st.sampled_from([125, 126, 127, 300, 3000]).map(lambda size: (OPEN * 40)[:size]),
)
CONTROLS = st.lists(st.tuples(st.sampled_from([9, 10]), st.binary(max_size=125)), max_size=2)
WRITTEN = st.builds(Written, PAYLOADS, st.sampled_from([1, 2]), st.integers(1, 4), st.booleans(), CONTROLS)


def write(messages: list[Written], *, mask: bool, takeover: bool) -> bytes:
    deflate = new_deflate(takeover=takeover)
    stream = b""
    for message in messages:
        between = b"".join(serialise(opcode, payload, mask=mask) for opcode, payload in message.between)
        stream += between + serialise_message(
            message.payload,
            mask=mask,
            opcode=message.opcode,
            fragments=message.fragments,
            deflate=deflate if message.is_compressed else None,
            between=between,
        )
    return stream


@settings(deadline=None)
@given(st.lists(WRITTEN, max_size=6), st.booleans(), st.booleans(), st.lists(st.integers(0, 900), max_size=8))
def test_any_cut_of_any_messages_gives_what_was_written(
    messages: list[Written],
    mask: bool,  # noqa: FBT001
    takeover: bool,  # noqa: FBT001
    bounds: list[int],
) -> None:
    stream = write(messages, mask=mask, takeover=takeover)
    sample = MessageSample(is_masked=mask, limit=MANY, messages=100)
    assert read(sample, cut(stream, bounds)) == [message.payload for message in messages]
    assert (sample.is_open, sample.is_done) == (False, False)


@settings(deadline=None)
@given(
    st.lists(WRITTEN, max_size=6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
    st.integers(0, 5),
    st.lists(st.integers(0, 900), max_size=8),
)
def test_any_cut_gives_the_same_within_the_bounds(
    messages: list[Written],
    mask: bool,  # noqa: FBT001
    takeover: bool,  # noqa: FBT001
    limit: int,
    count: int,
    bounds: list[int],
) -> None:
    stream = write(messages, mask=mask, takeover=takeover)
    whole, pieces = (MessageSample(is_masked=mask, limit=limit, messages=count) for _ in range(2))
    found = read(whole, [stream])
    assert read(pieces, cut(stream, bounds)) == found
    assert (pieces.is_open, pieces.is_done) == (whole.is_open, whole.is_done)
    assert sum(map(len, found)) <= limit
    ended = len(found) - whole.is_open
    assert ended <= count
    for at, message in enumerate(found):
        payload = messages[at].payload
        assert payload == message if at < ended else payload.startswith(message)


ANY_BYTES = st.one_of(
    st.binary(max_size=60),
    st.tuples(
        st.sampled_from([0x00, 0x01, 0x41, 0x80, 0x81, 0xC1, 0xC2, 0x89]), st.binary(max_size=40), st.booleans()
    ).map(
        lambda parts: serialise(
            parts[0] & 0x0F, parts[1], mask=parts[2], fin=parts[0] > 0x7F, rsv1=bool(parts[0] & 0x40)
        )
    ),
)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(ANY_BYTES, max_size=6).map(b"".join),
    st.booleans(),
    st.integers(0, 80),
    st.lists(st.integers(0, 120), max_size=5),
)
def test_any_bytes_are_taken_within_the_limit(stream: bytes, mask: bool, limit: int, bounds: list[int]) -> None:  # noqa: FBT001
    """Where compressed data breaks, pieces may tell more than the whole, never something else."""
    whole, pieces = (MessageSample(is_masked=mask, limit=limit) for _ in range(2))
    by_whole, by_pieces = read(whole, [stream]), read(pieces, cut(stream, bounds))
    assert sum(map(len, by_pieces)) <= limit
    assert len(by_pieces) <= 5
    if whole._inflater is None:
        assert by_pieces == by_whole
        assert (pieces.is_open, pieces.is_done) == (whole.is_open, whole.is_done)
    else:
        assert len(by_pieces) == len(by_whole)
        assert by_pieces[:-1] == by_whole[:-1]
        assert b"".join(by_pieces[-1:]).startswith(b"".join(by_whole[-1:]))


# One message


@BOTH
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536])
def test_a_message_of_any_length_is_given_whole(size: int, mask: bool) -> None:  # noqa: FBT001
    payload = (OPEN * 800)[:size]
    sample = MessageSample(is_masked=mask, limit=MANY)
    assert sample.feed(serialise(1, payload, mask=mask)) == [payload]
    assert (sample.is_open, sample.is_done) == (False, False)


@BOTH
def test_an_id_within_a_binary_message_is_found(mask: bool) -> None:  # noqa: FBT001
    stream = serialise(2, PROTOBUF, mask=mask)
    assert (PROTOBUF in stream) != mask
    assert read(MessageSample(is_masked=mask), one_by_one(stream)) == [PROTOBUF]


@pytest.mark.parametrize("mask", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\x02\x03\x04", b"\0\0\0\x80", b"\x80\0\0\0"])
def test_each_mask_is_taken_off_at_any_cut(mask: bytes) -> None:
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(PROTOBUF))
    stream = bytes((0x82, 0x80 | len(masked))) + mask + masked
    for bound in range(len(stream) + 1):
        sample = MessageSample(is_masked=True)
        assert read(sample, [stream[:bound], stream[bound:]]) == [PROTOBUF]


def test_a_message_is_given_as_far_as_it_came() -> None:
    stream = serialise(1, OPEN)
    sample = MessageSample(is_masked=False)
    assert (sample.feed(stream[:1]), sample.is_open) == ([b""], True)
    assert (sample.feed(b""), sample.is_open) == ([], True)
    assert (sample.feed(stream[1:22]), sample.is_open) == ([OPEN[:20]], True)
    assert (sample.feed(stream[22:] + serialise(1, b"40")[:3]), sample.is_open) == ([OPEN, b"4"], True)
    assert (sample.feed(b"0"), sample.is_open) == ([b"40"], False)


@BOTH
def test_control_frames_between_fragments_are_no_part_of_the_message(mask: bool) -> None:  # noqa: FBT001
    between = b"".join(serialise(opcode, b"sid=wrong", mask=mask) for opcode in (9, 10, 9))
    stream = between + serialise_message(OPEN, mask=mask, fragments=5, between=between) + between
    for pieces in ([stream], one_by_one(stream)):
        sample = MessageSample(is_masked=mask)
        assert read(sample, pieces) == [OPEN]
        assert not sample.is_open


@BOTH
def test_empty_messages_and_fragments_are_messages(mask: bool) -> None:  # noqa: FBT001
    empty = serialise(1, b"", mask=mask)
    stream = empty + serialise(2, b"", mask=mask, fin=False) + serialise(0, b"", mask=mask) + empty
    for pieces in ([stream], one_by_one(stream)):
        assert read(MessageSample(is_masked=mask), pieces) == [b"", b"", b""]


# Compressed messages


@BOTH
@BOTH_TAKEOVERS
def test_compressed_messages_are_inflated_whatever_was_agreed(mask: bool, takeover: bool) -> None:  # noqa: FBT001
    payloads = [OPEN, b"", PROTOBUF, OPEN]
    deflate = new_deflate(takeover=takeover)
    parts = [serialise_message(payload, mask=mask, fragments=2, deflate=deflate) for payload in payloads]
    assert (len(parts[3]) < len(parts[0]) / 3) == takeover  # the last one refers to the first, or does not
    for pieces in ([b"".join(parts)], one_by_one(b"".join(parts))):
        assert read(MessageSample(is_masked=mask), pieces) == payloads


def test_a_message_that_is_not_compressed_is_no_part_of_the_window() -> None:
    deflate = new_deflate(takeover=True)
    stream = serialise_message(OPEN, mask=False, deflate=deflate) + serialise_message(PROTOBUF * 3, mask=False)
    stream += serialise_message(OPEN, mask=False, deflate=deflate)
    assert read(MessageSample(is_masked=False), [stream]) == [OPEN, PROTOBUF * 3, OPEN]


def test_the_examples_of_the_standard_are_read() -> None:
    """RFC 7692, sections 7.2.3.1 to 7.2.3.5, on one connection."""
    one_block = bytes.fromhex("c1 07 f2 48 cd c9 c9 07 00")
    fragments = bytes.fromhex("41 03 f2 48 cd 80 04 c9 c9 07 00")
    with_window = bytes.fromhex("c1 05 f2 00 11 00 00")
    stored = bytes.fromhex("c1 0b 00 05 00 fa ff 48 65 6c 6c 6f 00")
    final = bytes.fromhex("c1 08 f3 48 cd c9 c9 07 00 00")
    two_blocks = bytes.fromhex("c1 0d f2 48 05 00 00 00 ff ff ca c9 c9 07 00")
    for first in (one_block, fragments, stored, final, two_blocks):
        stream = first + with_window + final + with_window + stored + two_blocks + fragments
        for pieces in ([stream], one_by_one(stream)):
            assert read(MessageSample(is_masked=False, messages=7), pieces) == [b"Hello"] * 7


@pytest.mark.parametrize("extra", [b"\x00", b""], ids=["as in the standard", "without the empty block"])
def test_a_sender_may_end_the_deflate_stream_with_each_message(extra: bytes) -> None:
    stream = b""
    for payload in (OPEN, PROTOBUF, OPEN):
        compressor = zlib.compressobj(wbits=-15)
        stream += serialise(1, compressor.compress(payload) + compressor.flush() + extra, rsv1=True)
    for pieces in ([stream], one_by_one(stream)):
        assert read(MessageSample(is_masked=False), pieces) == [OPEN, PROTOBUF, OPEN]


def deflate_twice(first: bytes, second: bytes) -> bytes:
    """Return two DEFLATE streams that end, of which the second refers to the first, as one compressed message."""
    compressors = zlib.compressobj(wbits=-15), zlib.compressobj(wbits=-15, zdict=first)
    data = b"".join(one.compress(text) + one.flush() for one, text in zip(compressors, (first, second), strict=True))
    return serialise(1, data + b"\x00", rsv1=True)


def test_a_deflate_stream_may_end_within_a_message() -> None:
    stream = deflate_twice(OPEN, OPEN + b"2")
    assert len(stream) < len(OPEN) + 20
    for pieces in ([stream * 2], one_by_one(stream * 2)):
        assert read(MessageSample(is_masked=False), pieces) == [OPEN + OPEN + b"2"] * 2


# Bounds


@BOTH
def test_after_so_many_messages_nothing_more_is_given(mask: bool) -> None:  # noqa: FBT001
    sample = MessageSample(is_masked=mask, messages=2)
    stream = b"".join(serialise(1, b"%d" % number, mask=mask) for number in range(5))
    assert sample.feed(stream) == [b"0", b"1"]
    assert (sample.is_done, sample.is_open) == (True, False)
    assert sample.feed(stream) == []


@BOTH
def test_no_more_is_read_than_the_limit(mask: bool) -> None:  # noqa: FBT001
    head_bytes = 8 if mask else 4
    stream = serialise(1, OPEN * 100, mask=mask)
    for pieces in ([stream], [stream[:50], stream[50:]]):
        sample = MessageSample(is_masked=mask)
        assert read(sample, pieces) == [(OPEN * 100)[: 4096 - head_bytes]]
        assert (sample.is_done, sample.is_open) == (True, True)


@BOTH
def test_what_gives_nothing_comes_to_an_end_too(mask: bool) -> None:  # noqa: FBT001
    """Empty fragments and Pings without end: the work is bounded by what is read."""
    begin = serialise(1, b"", mask=mask, fin=False)
    for frame in (serialise(0, b"", mask=mask, fin=False), serialise(9, b"", mask=mask)):
        sample = MessageSample(is_masked=mask)
        assert sample.feed(begin + frame * 5000) == [b""]
        assert sample.is_done


@BOTH
def test_a_bomb_fills_the_limit_and_no_more(mask: bool) -> None:  # noqa: FBT001
    bomb = serialise_message(bytes(1 << 20), mask=mask, deflate=new_deflate(takeover=True))
    assert len(bomb) < 4096
    for pieces in ([bomb], one_by_one(bomb)):
        sample = MessageSample(is_masked=mask)
        assert read(sample, pieces) == [bytes(4096)]
        assert (sample.is_done, sample.is_open) == (True, True)


def test_the_room_is_that_of_all_messages() -> None:
    stream = serialise_message(b"a" * 3000, mask=False, deflate=new_deflate(takeover=True)) + serialise(1, b"b" * 3000)
    for pieces in ([stream], one_by_one(stream)):
        sample = MessageSample(is_masked=False)
        assert read(sample, pieces) == [b"a" * 3000, b"b" * 1096]
        assert (sample.is_done, sample.is_open) == (True, True)


def test_the_inflater_is_never_asked_for_more_than_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    got: list[int] = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, window_bits: int, zdict: bytes = b"") -> None:
            self._stream = real(window_bits, zdict)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            asked.append(max_length)
            inflated = self._stream.decompress(data, max_length)
            got.append(len(inflated))
            return inflated

        @property
        def eof(self) -> bool:
            return self._stream.eof

        @property
        def unused_data(self) -> bytes:
            return self._stream.unused_data

    bombs = [serialise(1, zlib.compress(bytes(size), wbits=-15), rsv1=True) for size in (1000, 1000, 1 << 20)]
    monkeypatch.setattr(zlib, "decompressobj", Counting)
    for pieces in (bombs, one_by_one(b"".join(bombs))):
        assert read(MessageSample(is_masked=False), pieces) == [bytes(1000), bytes(1000), bytes(2096)]
        assert sum(got) == 4096
        got.clear()
    assert 1 <= min(asked) <= max(asked) <= 4096
    sample = MessageSample(is_masked=False, limit=3000)
    assert read(sample, [deflate_twice(bytes(2000), bytes(2000))]) == [bytes(3000)]
    assert sum(got) == 3000


@pytest.mark.parametrize(("limit", "messages"), [(0, 4), (4096, 0)])
def test_bounds_of_nothing_give_nothing(limit: int, messages: int) -> None:
    sample = MessageSample(is_masked=False, limit=limit, messages=messages)
    assert (sample.is_done, sample.feed(serialise(1, OPEN))) == (True, [])


# What makes no sense


GOOD = serialise(1, b"good")


@pytest.mark.parametrize(
    ("bad", "begun"),
    [
        pytest.param(write_close(1000, ""), [], id="a Close frame"),
        pytest.param(serialise(0, b"x"), [], id="a continuation of nothing"),
        pytest.param(b"\xa1\x01x", [], id="RSV2"),
        pytest.param(b"\x91\x01x", [], id="RSV3"),
        pytest.param(b"\x83\x01x", [], id="a reserved opcode"),
        pytest.param(b"\x09\x01x", [], id="a Ping in fragments"),
        pytest.param(b"\xc9\x01x", [], id="a compressed Ping"),
        pytest.param(b"\x01\x01x" + GOOD, [b"x"], id="a message within another"),
        pytest.param(b"\x01\x01x\xc0\x01x", [b"x"], id="RSV1 on a continuation"),
        pytest.param(b"\x01\x01x" + write_close(1000, ""), [b"x"], id="a Close frame within a message"),
        pytest.param(b"\xc1\x04\xff\xff\xff\xff", [b""], id="compressed data of no type"),
        pytest.param(b"\xc1\x02\x00\x01", [b""], id="compressed data that cannot end there"),
        pytest.param(serialise(1, b"x", mask=True), [b""], id="a mask where none may be"),
    ],
)
def test_after_nonsense_nothing_more_is_given(bad: bytes, begun: list[bytes]) -> None:
    stream = GOOD + bad + GOOD * 2
    for pieces in ([stream], one_by_one(stream)):
        sample = MessageSample(is_masked=False)
        assert read(sample, pieces) == [b"good", *begun]
        assert sample.is_done
        assert sample.is_open == bool(begun)
    assert read(MessageSample(is_masked=False), [GOOD * 3]) == [b"good"] * 3


def test_a_message_without_a_mask_where_one_must_be_is_not_read() -> None:
    sample = MessageSample(is_masked=True)
    assert sample.feed(serialise(1, OPEN)) == [b""]
    assert sample.is_done


def test_what_is_no_websocket_gives_nothing() -> None:
    sample = MessageSample(is_masked=False)
    assert sample.feed(b"HTTP/1.1 200 OK\r\n\r\n") == []
    assert sample.is_done


def test_repr_shows_the_state() -> None:
    sample = MessageSample(is_masked=False)
    sample.feed(b"\x81\x05abc")
    assert repr(sample) == "<MessageSample unread=4091 room=4093 open=True done=False>"
