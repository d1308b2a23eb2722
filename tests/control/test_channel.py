"""Channels: messages come whole, in order and with their descriptors, or the channel ends; nothing stays open."""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import resource
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from stickyproxy.control import channel as channel_module
from stickyproxy.control.channel import MAX_DESCRIPTORS, Channel, Message, TooLargeError
from stickyproxy.errors import ChannelError
from stickyproxy.tasks import spawn
from tests.helpers.loops import no_leak, on_uvloop, open_descriptors
from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HEAD = struct.Struct("!4sII")


def write_frame(envelope: object, count: int = 0) -> bytes:
    """Return a frame as another process would write it."""
    text = json.dumps(envelope).encode()
    return HEAD.pack(b"STK1", count, len(text)) + text


class End:
    """A channel, and what has come over it. It keeps the descriptors that come."""

    def __init__(self, link: socket.socket, received: bytes = b"") -> None:
        self.messages: list[Message] = []
        self.lost: list[str] = []
        self.descriptors: list[list[int]] = []
        self.takes = True
        self.channel = Channel(link, self._on_message, self.lost.append, received)

    def _on_message(self, message: Message) -> None:
        self.messages.append(message)
        if self.takes:
            self.descriptors.append(message.take_descriptors())

    @property
    def kinds(self) -> list[str]:
        return [one.kind for one in self.messages]

    def close(self) -> None:
        self.channel.close()
        for taken in self.descriptors:
            for one in taken:
                os.close(one)


class Raw:
    """An end whose every byte the test sends."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        assert self.link.sendmsg([data], ancillary) == len(data)

    def read(self) -> dict[str, Any]:
        """Return the next message, which must have come already."""
        magic, _, size = HEAD.unpack(self.link.recv(HEAD.size, socket.MSG_WAITALL))
        assert magic == b"STK1"
        found: dict[str, Any] = json.loads(self.link.recv(size, socket.MSG_WAITALL))
        return found


@contextmanager
def ends() -> Iterator[tuple[End, End]]:
    """Give both ends of a channel."""
    ours, theirs = socket.socketpair()
    one, other = End(ours), End(theirs)
    yield one, other
    one.close()
    other.close()


@contextmanager
def raw_end() -> Iterator[tuple[Raw, End]]:
    """Give a channel whose other end is raw."""
    ours, theirs = socket.socketpair()
    end = End(theirs)
    with ours:
        yield Raw(ours), end
    end.close()


def memory(text: bytes) -> int:
    """Return a descriptor that tells who it is."""
    descriptor = os.memfd_create("test")
    os.write(descriptor, text)
    return descriptor


@contextmanager
def memories(count: int) -> Iterator[list[int]]:
    """Give descriptors that tell their number."""
    made = [memory(b"%d" % number) for number in range(count)]
    yield made
    for one in made:
        os.close(one)


def text_of(descriptor: int) -> bytes:
    return os.pread(descriptor, 100, 0)


# Messages


@on_uvloop
async def test_a_message_comes_with_its_body_and_its_descriptors() -> None:
    with no_leak(), ends() as (one, other), memories(3) as descriptors:
        one.channel.send("hello", {"text": "grüße", "list": [1, None, 2.5]}, descriptors)
        one.channel.send("bare")
        await eventually(lambda: len(other.messages) == 2)
        message, bare = other.messages
        assert (message.kind, message.body, message.number) == (
            "hello",
            {"text": "grüße", "list": [1, None, 2.5]},
            None,
        )
        assert (bare.kind, bare.body, bare.descriptors) == ("bare", {}, [])
        assert [text_of(each) for each in other.descriptors[0]] == [b"0", b"1", b"2"]
        assert not set(other.descriptors[0]) & set(descriptors), "they are duplicates"
        assert not any(os.get_inheritable(each) for each in other.descriptors[0])
        assert [text_of(each) for each in descriptors] == [b"0", b"1", b"2"], "the sender's stay open"


@on_uvloop
async def test_descriptors_that_nobody_takes_are_closed() -> None:
    with no_leak(), ends() as (one, other), memories(3) as descriptors:
        other.takes = False
        one.channel.send("keep", {}, descriptors)
        await eventually(lambda: other.messages)
        assert other.messages[0].descriptors == []


@on_uvloop
async def test_unknown_keys_are_ignored() -> None:
    with raw_end() as (raw, end):
        raw.send(write_frame({"kind": "news", "body": {"a": 1}, "since": 2, "number": 7}))
        end.channel.read_rest()
        assert (end.kinds, end.messages[0].number) == (["news"], 7)


# Frames


@on_uvloop
async def test_a_frame_may_be_cut_anywhere() -> None:
    with no_leak(), raw_end() as (raw, end), memories(2) as descriptors:
        frame = write_frame({"kind": "cut", "body": {"x": "y" * 20}}, 2) + write_frame({"kind": "next"})
        first = len(frame) - len(write_frame({"kind": "next"}))
        for cut in range(1, len(frame)):
            raw.send(frame[:cut], descriptors)
            end.channel.read_rest()
            assert end.kinds == (["cut"] if cut >= first else [])
            raw.send(frame[cut:])
            end.channel.read_rest()
            assert end.kinds == ["cut", "next"]
            (taken, nothing) = end.descriptors
            assert ([text_of(one) for one in taken], nothing) == ([b"0", b"1"], [])
            for one in taken:
                os.close(one)
            end.messages.clear()
            end.descriptors.clear()
        for byte in frame[:first]:
            raw.send(bytes([byte]), descriptors if end.channel._received == b"" else ())
            end.channel.read_rest()
        assert end.kinds == ["cut"]
        assert end.lost == []


MESSAGES = st.lists(
    st.tuples(st.text(max_size=8), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=300)),
              st.integers(0, 3)), max_size=6
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES, sizes=st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_any_cut_gives_the_same_messages(messages: list[tuple[str, dict[str, Any], int]], sizes: list[int]) -> None:
    async def scenario() -> None:
        with raw_end() as (raw, end), memories(3) as descriptors:
            at = 0
            for kind, body, count in messages:
                frame = memoryview(write_frame({"kind": kind, "body": body}, count))
                theirs = descriptors[:count]
                while frame:
                    size = sizes[at % len(sizes)]
                    raw.send(bytes(frame[:size]), theirs)
                    frame, theirs, at = frame[size:], [], at + 1
                    if at % 3 == 0:
                        end.channel.read_rest()
            end.channel.read_rest()
            assert [(one.kind, one.body) for one in end.messages] == [(kind, body) for kind, body, _ in messages]
            assert [[text_of(each) for each in taken] for taken in end.descriptors] == [
                [b"0", b"1", b"2"][:count] for _, _, count in messages
            ]
            assert end.lost == []

    with no_leak():
        uvloop.run(scenario())


DEEP = b"[" * 100_000
GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "zeros": bytes(12),
    "another version": HEAD.pack(b"STK2", 0, 2) + b"{}",
    "too many descriptors": HEAD.pack(b"STK1", MAX_DESCRIPTORS + 1, 2) + b"{}",
    "too long": HEAD.pack(b"STK1", 0, 32 * 1024 * 1024 + 1),
    "no JSON": HEAD.pack(b"STK1", 0, 2) + b"{]",
    "no text": HEAD.pack(b"STK1", 0, 2) + b"\xff\xff",
    "nothing": HEAD.pack(b"STK1", 0, 0),
    "too deep": HEAD.pack(b"STK1", 0, len(DEEP)) + DEEP,
    "a list": write_frame([1]),
    "a text": write_frame("kind"),
    "a number": write_frame(5),
    "nothing at all": write_frame(None),
    "no kind": write_frame({}),
    "a body that is none": write_frame({"kind": "x", "body": 5}),
    "a number that is none": write_frame({"kind": "x", "number": "5"}),
    "an answer to none": write_frame({"kind": "answer", "to": [1]}),
    "descriptors that did not come": write_frame({"kind": "x"}, 1),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("count", [0, 1])
@on_uvloop
async def test_what_is_no_message_ends_the_channel(garbage: bytes, count: int) -> None:
    with no_leak(), raw_end() as (raw, end), memories(1) as descriptors:
        raw.send(write_frame({"kind": "before"}))
        is_short = garbage == GARBAGE["descriptors that did not come"] and count == 1
        raw.send(garbage, descriptors[:count])
        raw.send(write_frame({"kind": "behind"}))
        await eventually(lambda: end.lost or (is_short and len(end.messages) == 3))
        if is_short:
            return  # with its descriptor it is one
        assert end.kinds == ["before"]
        assert len(end.lost) == 1
        assert end.channel.is_closed
        end.channel.send("after", {}, descriptors)
        with pytest.raises(ChannelError, match="gone"):
            await end.channel.request("after")
        assert "closed" in repr(end.channel)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60) | st.binary(max_size=40).map(lambda text: HEAD.pack(b"STK1", 0, len(text)) + text))
def test_any_bytes_are_a_message_or_the_end(data: bytes) -> None:
    async def scenario() -> None:
        with raw_end() as (raw, end):
            raw.link.sendall(data)
            end.channel.read_rest()
            assert len(end.lost) <= 1
            assert end.channel.is_closed == bool(end.lost)

    uvloop.run(scenario())


# Descriptors


@on_uvloop
async def test_descriptors_that_belong_to_no_message_end_the_channel() -> None:
    with no_leak(), raw_end() as (raw, end), memories(3) as descriptors:
        raw.send(write_frame({"kind": "two"}, 2), descriptors)
        await eventually(lambda: end.lost)
        assert end.kinds == ["two"]
        assert end.lost == ["descriptors came that belong to no message"]


@on_uvloop
async def test_descriptors_do_not_pile_up_behind_a_frame_that_never_ends() -> None:
    with no_leak(), raw_end() as (raw, end), memories(1) as descriptors:
        raw.send(HEAD.pack(b"STK1", 1, 1000), descriptors)
        end.channel.read_rest()
        assert end.lost == []
        raw.send(b"{", descriptors)
        end.channel.read_rest()
        assert len(end.lost) == 1


@on_uvloop
async def test_more_descriptors_than_a_message_may_have_end_the_channel() -> None:
    with no_leak(), raw_end() as (raw, end), memories(1) as descriptors:
        raw.send(write_frame({"kind": "many"}, MAX_DESCRIPTORS), descriptors * (MAX_DESCRIPTORS + 3))
        await eventually(lambda: end.lost)
        assert end.messages == []
        assert "too many" in end.lost[0]


@on_uvloop
async def test_as_many_descriptors_as_a_message_may_have_come() -> None:
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        one.channel.send("many", {}, descriptors * MAX_DESCRIPTORS)
        await eventually(lambda: other.descriptors)
        assert len(other.descriptors[0]) == MAX_DESCRIPTORS


@contextmanager
def few_left(count: int) -> Iterator[None]:
    """Let no more than so many descriptors be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + count + 2, hard))
    try:
        while True:
            try:
                fillers.append(os.dup(fillers[0]))
            except OSError:
                break
        for _ in range(count):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in fillers:
            os.close(one)


@pytest.mark.parametrize("left", [0, 3])
@on_uvloop
async def test_without_descriptors_left_to_receive_the_channel_ends(left: int) -> None:
    with no_leak(), raw_end() as (raw, end), memories(5) as descriptors:
        raw.send(write_frame({"kind": "five"}, 5), descriptors)
        with few_left(left):
            end.channel.read_rest()
        assert end.messages == []
        assert end.lost == ["descriptors were lost: too many at once, or too many open"]


@on_uvloop
async def test_without_descriptors_left_to_send_nothing_is_sent_and_the_channel_lives() -> None:
    with no_leak(), ends() as (one, other), memories(5) as descriptors:
        with few_left(3):
            with pytest.raises(ChannelError, match="cannot be sent: too many open files"):
                one.channel.send("five", {}, descriptors)
            with pytest.raises(ChannelError, match="cannot be sent"):
                await one.channel.request("five", {}, descriptors)
        assert one.channel._answers == {}
        one.channel.send("five", {}, descriptors)
        await eventually(lambda: other.messages)
        assert other.kinds == ["five"]


@pytest.mark.parametrize("way", ["descriptors", "text"])
@on_uvloop
async def test_what_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(channel_module, "_MAX_BYTES", 1000)
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        too_large: tuple[Any, ...] = (
            ({}, descriptors * (MAX_DESCRIPTORS + 1)) if way == "descriptors" else ({"x": "y" * 1000}, descriptors)
        )
        with pytest.raises(TooLargeError):
            one.channel.send("large", *too_large)
        with pytest.raises(TooLargeError):
            await one.channel.request("large", *too_large)
        one.channel.send("small")
        await eventually(lambda: other.messages)
        assert other.kinds == ["small"]


# A full socket


async def fill(one: End, other: End, descriptors: Sequence[int]) -> int:
    """Send until the socket is full and some more; return how many messages were sent."""
    one.channel._loop.remove_reader(other.channel._link.fileno())
    count = 0
    while len(one.channel._unsent) < 5:
        one.channel.send("fill", {"number": count, "text": "x" * 10_000}, [descriptors[count % len(descriptors)]])
        count += 1
    return count


@on_uvloop
async def test_order_and_descriptors_are_kept_when_the_socket_is_full() -> None:
    with no_leak(), ends() as (one, other), memories(7) as descriptors:
        count = await fill(one, other, descriptors)
        assert "unsent=5" in repr(one.channel)
        flushing = [spawn(one.channel.flush(30), "flush") for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in flushing)
        one.channel._loop.add_reader(other.channel._link.fileno(), other.channel._read)
        await asyncio.wait_for(asyncio.gather(*flushing), 20)  # sooner than one of them would give up
        await eventually(lambda: len(other.messages) == count)
        assert [each.body["number"] for each in other.messages] == list(range(count))
        assert [text_of(each) for (each,) in other.descriptors] == [b"%d" % (at % 7) for at in range(count)]


@on_uvloop
async def test_a_message_larger_than_the_socket_comes_whole_both_ways() -> None:
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        text = "z" * 5_000_000
        one.channel.send("large", {"text": text}, descriptors)
        other.channel.send("large", {"text": text}, descriptors)
        one.channel.send("small")
        await eventually(lambda: len(other.messages) == 2 and len(one.messages) == 1)
        assert other.messages[0].body["text"] == one.messages[0].body["text"] == text


@pytest.mark.parametrize("who", ["this", "the other"])
@on_uvloop
async def test_what_was_not_sent_is_closed_with_the_channel(who: str) -> None:
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        await fill(one, other, descriptors)
        flushing = spawn(one.channel.flush(30), "flush")
        await asyncio.sleep(0)
        (one if who == "this" else other).channel.close()
        await asyncio.wait_for(flushing, 20)
        await eventually(lambda: one.channel.is_closed)
        assert one.lost == ([] if who == "this" else one.lost)
        assert not one.channel._unsent


@on_uvloop
async def test_flush_does_not_wait_for_ever() -> None:
    with ends() as (one, other), memories(1) as descriptors:
        await one.channel.flush()
        await fill(one, other, descriptors)
        await one.channel.flush(0.01)
        assert one.channel._unsent


class Crowded(socket.socket):
    """A socket that has too many descriptors on their way, so many times (unix(7), ETOOMANYREFS)."""

    times = 0

    @override
    def sendmsg(self, *args: Any) -> int:
        if self.times and args[1]:
            self.times -= 1
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return super().sendmsg(*args)


@contextmanager
def crowded(times: int) -> Iterator[tuple[End, End]]:
    ours, theirs = socket.socketpair()
    link = Crowded(fileno=ours.detach())
    link.times = times
    one, other = End(link), End(theirs)
    yield one, other
    one.close()
    other.close()


@on_uvloop
async def test_descriptors_wait_while_too_many_are_on_their_way() -> None:
    with no_leak(), crowded(3) as (one, other), memories(2) as descriptors:
        for number in range(3):
            one.channel.send("wait", {"number": number}, descriptors if number % 2 == 0 else ())
        assert len(one.channel._unsent) == 3
        await eventually(lambda: len(other.messages) == 3)
        assert [message.body["number"] for message in other.messages] == [0, 1, 2]
        assert [len(taken) for taken in other.descriptors] == [2, 0, 2]


@pytest.mark.parametrize("end", ["close", "detach"])
@on_uvloop
async def test_what_waits_is_dropped_at_the_end(end: str) -> None:
    with no_leak(), crowded(1) as (one, other), memories(2) as descriptors:
        one.channel.send("wait", {}, descriptors)
        link = None
        if end == "close":
            one.channel.close()
        else:
            link, _ = one.channel.detach()
        await asyncio.sleep(0.05)  # longer than it would wait before it tries again
        other.channel.read_rest()
        assert other.messages == []
        if link is not None:
            link.close()


# Requests


@on_uvloop
async def test_answers_find_their_requests_in_any_order() -> None:
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        asking = [spawn(one.channel.request("ask", {"number": number}), "ask") for number in range(5)]
        await eventually(lambda: len(other.messages) == 5)
        for message in reversed(other.messages):
            other.channel.answer(message, {"echo": message.body["number"]}, descriptors)
        answers = await asyncio.gather(*asking)
        assert [answer.body["echo"] for answer in answers] == list(range(5))
        for answer in answers:
            assert text_of(answer.descriptors[0]) == b"0"
            answer.close()
        assert one.channel._answers == {}
        assert one.messages == []


@on_uvloop
async def test_both_ends_may_ask_at_once() -> None:
    with ends() as (one, other):
        asking = [spawn(end.channel.request("ask"), "ask") for end in (one, other)]
        await eventually(lambda: one.messages and other.messages)
        one.channel.answer(one.messages[0], {"from": "one"})
        other.channel.answer(other.messages[0], {"from": "other"})
        assert [answer.body["from"] for answer in await asyncio.gather(*asking)] == ["other", "one"]


@on_uvloop
async def test_a_refusal_is_an_error_with_its_reason() -> None:
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        asking = spawn(one.channel.request("ask"), "ask")
        await eventually(lambda: other.messages)
        other.channel.answer(other.messages[0], {"error": "the moon is full"}, descriptors)
        with pytest.raises(ChannelError, match="the moon is full"):
            await asking


@on_uvloop
async def test_a_message_that_awaits_no_answer_gets_none() -> None:
    with ends() as (one, other):
        one.channel.send("tell")
        await eventually(lambda: other.messages)
        other.channel.refuse(other.messages[0], "why")
        other.channel.send("next")
        await eventually(lambda: one.messages)
        assert one.kinds == ["next"]


@on_uvloop
async def test_an_answer_that_comes_too_late_is_dropped() -> None:
    with no_leak(), ends() as (one, other), memories(2) as descriptors:
        with pytest.raises(ChannelError, match=r"no answer within 0\.01 s"):
            await one.channel.request("ask", timeout_s=0.01)
        other.channel.read_rest()
        for _ in range(2):
            other.channel.answer(other.messages[0], {}, descriptors)
        other.channel.send("next")
        await eventually(lambda: one.messages)
        assert one.kinds == ["next"]
        assert one.channel._answers == {}


@on_uvloop
async def test_an_answer_that_comes_in_the_moment_of_giving_up_leaves_nothing_open() -> None:
    with no_leak(), ends() as (one, other), memories(2) as descriptors:
        asking = spawn(one.channel.request("ask"), "ask")
        await eventually(lambda: other.messages)
        other.channel.answer(other.messages[0], {}, descriptors)
        one.channel.read_rest()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


@on_uvloop
async def test_the_second_answer_to_a_request_is_dropped() -> None:
    with no_leak(), ends() as (one, other), memories(2) as descriptors:
        asking = spawn(one.channel.request("ask"), "ask")
        await eventually(lambda: other.messages)
        for number in range(2):
            other.channel.answer(other.messages[0], {"number": number}, descriptors)
        one.channel.read_rest()
        answer = await asking
        assert answer.body == {"number": 0}
        answer.close()


@pytest.mark.parametrize("who", ["this", "the other"])
@on_uvloop
async def test_requests_that_wait_hear_of_the_end(who: str) -> None:
    with no_leak(), ends() as (one, other):
        asking = [spawn(one.channel.request("ask"), "ask") for _ in range(3)]
        await eventually(lambda: len(other.messages) == 3)
        (one if who == "this" else other).channel.close()
        for each in asking:
            with pytest.raises(ChannelError, match="gone"):
                await each
        assert one.lost == ([] if who == "this" else ["the other process closed the channel"])


@on_uvloop
async def test_numbers_of_two_images_of_a_process_differ() -> None:
    """An answer to what the former one has asked must not be taken for one to what this one asks."""
    with ends() as (one, other):
        assert one.channel._numbers != other.channel._numbers


# Handlers


@contextmanager
def handling(handle: Callable[[Message], None]) -> Iterator[tuple[Raw, Channel]]:
    """Give a channel with a handler of the test's own, and the raw other end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    channel = Channel(theirs, handle)
    with ours:
        yield Raw(ours), channel
    channel.close()


@on_uvloop
async def test_an_exception_of_a_handler_is_the_answer_and_nothing_stays_open(caplog: pytest.LogCaptureFixture) -> None:
    seen = list[str]()

    def handle(message: Message) -> None:
        seen.append(message.kind)
        raise KeyError("upstream")

    with no_leak(), memories(1) as descriptors, handling(handle) as (raw, channel):
        raw.send(write_frame({"kind": "tell"}, 1), descriptors)
        raw.send(write_frame({"kind": "ask", "number": 5}, 1), descriptors)
        channel.read_rest()
        assert seen == ["tell", "ask"]
        assert raw.read() == {"kind": "answer", "to": 5, "body": {"error": "KeyError: 'upstream'"}}
        assert not channel.is_closed
    assert "cannot handle the message 'tell'" in caplog.text


@on_uvloop
async def test_what_comes_behind_the_message_that_ends_the_channel_is_not_handled() -> None:
    seen = list[str]()

    def handle(message: Message) -> None:
        seen.append(message.kind)
        channel.close()

    with no_leak(), memories(1) as descriptors, handling(handle) as (raw, channel):
        raw.send(write_frame({"kind": "end"}) + write_frame({"kind": "behind"}, 1), descriptors)
        channel.read_rest()
        assert seen == ["end"]


# The end


@on_uvloop
async def test_the_end_is_told_once() -> None:
    with no_leak(), ends() as (one, other):
        other.channel.close()
        await eventually(lambda: one.lost)
        one.channel.send("after")
        one.channel.close()
        one.channel.close()
        await asyncio.sleep(0)
        assert one.lost == ["the other process closed the channel"]
        assert other.lost == []


@on_uvloop
async def test_an_end_that_has_not_read_all_is_an_end_too() -> None:
    with no_leak(), ends() as (one, other):
        one.channel.send("unread")
        other.channel.close()
        await eventually(lambda: one.lost)
        assert one.lost == ["Connection reset by peer"]


@on_uvloop
async def test_the_last_words_count_though_nothing_can_be_sent_any_more() -> None:
    """The other end answers and goes; this end notices when it sends, before it has read."""
    with no_leak(), ends() as (one, other), memories(1) as descriptors:
        asking = spawn(one.channel.request("ask"), "ask")
        await asyncio.sleep(0)
        other.channel.read_rest()
        other.channel.answer(other.messages[0], {"all": "done"})
        other.channel.send("bye", {}, descriptors)
        other.channel.close()
        one.channel.send("news", {}, descriptors)
        assert (one.messages, one.lost) == ([], []), "not from within `send`"
        assert not one.channel.is_open
        with pytest.raises(ChannelError, match="gone"):
            await one.channel.request("more")
        assert (await asking).body == {"all": "done"}
        assert one.kinds == ["bye"]
        assert [text_of(each) for each in one.descriptors[0]] == [b"0"]
        assert len(one.lost) == 1


@on_uvloop
async def test_without_anybody_to_tell_the_end_is_no_error() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, lambda _: None)
    theirs.close()
    await eventually(lambda: channel.is_closed)


# Another image of the process goes on


@on_uvloop
async def test_what_has_come_of_a_message_goes_along() -> None:
    frame = write_frame({"kind": "torn"})
    for cut in range(1, len(frame)):
        with raw_end() as (raw, end):
            raw.send(frame[:cut])
            end.channel.read_rest()
            asking = spawn(end.channel.request("ask"), "ask")
            await asyncio.sleep(0)
            link, received = end.channel.detach()
            with pytest.raises(ChannelError):
                await asking
            raw.send(frame[cut:])
            assert end.channel.is_closed
            heir = End(link, received)
            await eventually(lambda heir=heir: heir.messages)  # type: ignore[misc]
            assert (heir.kinds, end.messages) == (["torn"], [])
            heir.close()


@on_uvloop
async def test_whole_messages_that_were_not_handled_go_along() -> None:
    ours, theirs = socket.socketpair()
    parted = list[tuple[socket.socket, bytes]]()
    channel = Channel(theirs, lambda _: parted.append(channel.detach()))
    with ours:
        Raw(ours).send(write_frame({"kind": "go"}) + write_frame({"kind": "one"}) + write_frame({"kind": "two"}))
        await eventually(lambda: parted)
        heir = End(*parted[0])
        await eventually(lambda: len(heir.messages) == 2)
        assert heir.kinds == ["one", "two"]
        heir.close()


@on_uvloop
async def test_a_channel_that_is_closed_leaves_a_closed_socket() -> None:
    with ends() as (one, _):
        one.channel.close()
        link, received = one.channel.detach()
        assert (link.fileno(), received) == (-1, b"")
