"""What an exchange teaches: keys in heads, bodies and messages, whatever the cut, and nothing from what refuses."""

from __future__ import annotations

import gzip
import json
import zlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.affinity.keys import MAX_KEY_BYTES, SAMPLE_BYTES, Key, Lesson, Lessons, member_pattern
from stickyproxy.proxy.learning import Learning, Overhearing
from stickyproxy.proxy.side import Side
from stickyproxy.wire.frames import write_close
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.response_head import ResponseHead, parse_response_head
from tests.helpers.tunnels import frame

if TYPE_CHECKING:
    from stickyproxy.affinity.keys import Origin
    from stickyproxy.proxy.tunnel import Tunnel

NAME: Final = "sid"
BODY: Final = b'0{"sid":"abc-DEF_1","upgrades":["websocket"]}'
VALUE: Final = b"abc-DEF_1"
ORIGINS: Final = ("client_messages", "upstream_messages")


def head_of(*fields: str, status: str = "200 OK") -> ResponseHead:
    data = "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode("latin-1")
    return parse_response_head(data, len(data), HeadLimits(), b"GET")


class Taught:
    """A learning by some lessons, and what it has learned, as pairs of the key's name and the value."""

    def __init__(self, *lessons: Lesson) -> None:
        self.learned: list[tuple[str, bytes]] = []
        keys = [Key(NAME if at == 0 else f"{NAME}-{at}", "learn", lessons=(one,)) for at, one in enumerate(lessons)]
        self.learning = Learning(Lessons((key, key.lessons[0]) for key in keys), self.learn)

    def learn(self, key: Key, value: bytes) -> None:
        self.learned.append((key.name, value))

    @property
    def values(self) -> list[bytes]:
        return [value for _, value in self.learned]


def of(origin: Origin, pattern: bytes = b"", **more: Any) -> Taught:
    return Taught(Lesson(origin, pattern=pattern or member_pattern("sid"), **more))


# The head of the response


def test_a_field_of_the_response_tells_the_key() -> None:
    lessons = Taught(Lesson("header", name="Mcp-Session-Id"))
    assert not lessons.learning.hear_head(head_of("Content-Length: 0", "mcp-session-id: one")), "its body tells nothing"
    assert lessons.learned == [(NAME, b"one")]


def test_a_cookie_that_is_set_tells_the_key_among_others() -> None:
    lessons = Taught(Lesson("cookie", name="session"))
    lessons.learning.hear_head(
        head_of("Set-Cookie: a=1", 'Set-Cookie: session="two"; Path=/; HttpOnly', "Set-Cookie: my_session=3")
    )
    assert lessons.learned == [(NAME, b"two")]


@pytest.mark.parametrize("fields", [(), ("X-Id: ",), (f"X-Id: {'x' * (MAX_KEY_BYTES + 1)}",), ("Y-X-Id: 1",)])
def test_a_field_that_is_not_there_empty_or_too_long_tells_nothing(fields: tuple[str, ...]) -> None:
    lessons = Taught(Lesson("header", name="X-Id"))
    lessons.learning.hear_head(head_of(*fields))
    assert lessons.learned == []


def test_the_longest_key_is_learned() -> None:
    lessons = Taught(Lesson("header", name="X-Id"), Lesson("cookie", name="id"))
    longest = "x" * MAX_KEY_BYTES
    lessons.learning.hear_head(head_of(f"X-Id: {longest}", f"Set-Cookie: id={longest}; Path=/"))
    assert lessons.values == [longest.encode()] * 2


@pytest.mark.parametrize("value", ["id=; Path=/", f"id={'x' * (MAX_KEY_BYTES + 1)}", "id", "ID=1"])
def test_a_cookie_that_is_no_key_tells_nothing(value: str) -> None:
    lessons = Taught(Lesson("cookie", name="id"))
    lessons.learning.hear_head(head_of(f"Set-Cookie: {value}"))
    assert lessons.learned == []


@pytest.mark.parametrize(
    ("status", "is_learned"),
    [("200 OK", True), ("201 Created", True), ("101 Switching Protocols", True), ("302 Found", True),
     ("399 Odd", True), ("400 Bad Request", False), ("404 Not Found", False), ("503 Service Unavailable", False)],
)  # fmt: skip
def test_a_refusal_teaches_nothing(status: str, *, is_learned: bool) -> None:
    lessons = Taught(Lesson("header", name="X-Id"), Lesson("response", pattern=b"(.+)"))
    assert lessons.learning.hear_head(head_of("X-Id: 1", status=status)) is is_learned
    assert lessons.learned == ([(NAME, b"1")] if is_learned else [])
    assert lessons.learning.hear_response(b"body") is is_learned


@pytest.mark.parametrize(
    ("given_", "fields", "is_heard"),
    [
        (None, (), True),
        (("Content-Type", "text/html"), ("content-type: Text/HTML; charset=utf-8",), True),
        (("Content-Type", "text/html"), ("Content-Type: application/json",), False),
        (("Content-Type", "text/html"), (), False),
        (("Content-Type", "html"), ("Content-Type: text/html",), False),
        (("X-App", ""), ("X-App: any",), True),
        (("X-App", ""), (), False),
    ],
)
def test_only_responses_that_have_the_given_field_are_heard(
    given_: tuple[str, str] | None, fields: tuple[str, ...], *, is_heard: bool
) -> None:
    lessons = of("response", given=given_)
    assert lessons.learning.hear_head(head_of(*fields)) is is_heard
    lessons.learning.hear_response(BODY)
    assert lessons.values == ([VALUE] if is_heard else [])


# The body of the response


def test_a_body_that_comes_whole_tells_the_key() -> None:
    lessons = of("response")
    assert lessons.learning.hear_head(head_of())
    assert lessons.learning.hear_response(BODY), "more may be told"
    assert lessons.learned == [(NAME, VALUE)]


@pytest.mark.parametrize("cut", range(1, len(BODY)))
def test_a_body_in_two_pieces_tells_the_key(cut: int) -> None:
    lessons = of("response")
    lessons.learning.hear_head(head_of())
    lessons.learning.hear_response(BODY[:cut])
    lessons.learning.hear_response(BODY[cut:])
    assert set(lessons.values) == {VALUE}


@pytest.mark.parametrize("coding", ["gzip", "deflate", "x-gzip"])
def test_a_compressed_body_tells_the_key_byte_by_byte(coding: str) -> None:
    body = gzip.compress(BODY) if "gzip" in coding else zlib.compress(BODY)
    lessons = of("response")
    lessons.learning.hear_head(head_of(f"Content-Encoding: {coding}"))
    for octet in body:
        lessons.learning.hear_response(bytes([octet]))
    assert set(lessons.values) == {VALUE}


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "nonsense"])
def test_a_body_that_cannot_be_read_teaches_nothing(coding: str) -> None:
    lessons = of("response")
    lessons.learning.hear_head(head_of(f"Content-Encoding: {coding}"))
    assert not lessons.learning.hear_response(BODY)
    assert lessons.learned == []


@pytest.mark.parametrize("body", [b"", b"\x00\xff" * 300, b'{"sid": 5}', b'{"sid":null}', b'{"sid":""}', b'{"sid":"a'])
def test_a_body_that_is_not_what_is_expected_is_ignored(body: bytes) -> None:
    lessons = of("response")
    lessons.learning.hear_head(head_of())
    lessons.learning.hear_response(body)
    assert lessons.learned == []


def test_what_stands_behind_the_sample_is_not_looked_for() -> None:
    for before, is_learned in ((SAMPLE_BYTES - len(BODY), True), (SAMPLE_BYTES, False)):
        lessons = of("response")
        lessons.learning.hear_head(head_of())
        is_wanted = lessons.learning.hear_response(b" " * before + BODY)
        assert (lessons.values, is_wanted) == ([VALUE] if is_learned else [], False)


def test_a_lesson_may_look_further() -> None:
    lessons = Taught(Lesson("response", pattern=b"first=([0-9]+);"),
                      Lesson("response", pattern=b"far=([0-9]+);", within_bytes=100_000))  # fmt: skip
    lessons.learning.hear_head(head_of())
    page = b"first=1;" + b" " * 60_000 + b"far=22;" + b" " * 60_000
    for at in range(0, len(page), 1000):
        if not lessons.learning.hear_response(page[at : at + 1000]):
            break
    assert set(lessons.learned) == {(NAME, b"1"), (f"{NAME}-1", b"22")}
    assert at < 101_000, "it was not read to its end"


def test_a_match_across_two_pieces_far_from_the_beginning_is_found() -> None:
    lessons = Taught(Lesson("response", pattern=b'far="([^"]{1,1024})"', within_bytes=100_000))
    lessons.learning.hear_head(head_of())
    value = b"v" * MAX_KEY_BYTES
    page = b" " * 50_000 + b'far="' + value + b'"'
    cut = 50_000 + 5 + 700
    lessons.learning.hear_response(page[:cut])
    assert lessons.learned == []
    lessons.learning.hear_response(page[cut:])
    assert lessons.values == [value]


@pytest.mark.parametrize("origin", ["response", *ORIGINS])
def test_a_pattern_for_the_beginning_is_found_however_long_it_is(origin: Origin) -> None:
    """What a client says of itself when it connects may be longer than one packet."""
    lessons = of(origin, rb'\A40.*?"sid":"([^"]+)"')
    text = b'40{"token":"' + b"t" * 3500 + b'","sid":"x"}'
    if origin == "response":
        lessons.learning.hear_head(head_of())
        for at in range(0, len(text), 1400):
            lessons.learning.hear_response(text[at : at + 1400])
    else:
        tunnel, data = StubTunnel(lessons), frame(text, is_masked=origin == "client_messages")
        for at in range(0, len(data), 1400):
            tunnel.feed(origin, data[at : at + 1400])
    assert lessons.values == [b"x"]


def test_several_matches_are_learned_and_more_than_anybody_tells_are_not() -> None:
    lessons = Taught(Lesson("response", pattern=b'"id":"([0-9]+)"'))
    lessons.learning.hear_head(head_of())
    lessons.learning.hear_response(json.dumps([{"id": str(one)} for one in range(100)]).replace(" ", "").encode())
    assert lessons.values == [b"%d" % one for one in range(16)]


def test_two_lessons_of_one_body_are_both_learned() -> None:
    lessons = Taught(Lesson("response", pattern=member_pattern("sid")), Lesson("response", pattern=b"0(.)"))
    lessons.learning.hear_head(head_of())
    lessons.learning.hear_response(BODY)
    assert lessons.learned == [(NAME, VALUE), (f"{NAME}-1", b"{")]


def test_a_dot_matches_the_end_of_a_line() -> None:
    lessons = Taught(Lesson("response", pattern=rb"\Astart.*?id=(\w+);"))
    lessons.learning.hear_head(head_of())
    lessons.learning.hear_response(b"start\r\n\r\nid=x;")
    assert lessons.values == [b"x"]


# The body of the request


def test_the_body_of_the_request_is_heard_where_a_lesson_says_so() -> None:
    lessons = of("request")
    assert lessons.learning.begin_request()
    assert lessons.learning.hear_request(BODY[:10])
    assert lessons.learning.hear_request(BODY[10:])
    assert set(lessons.values) == {VALUE}
    assert not lessons.learning.hear_head(head_of()), "the response is of no interest"


def test_nothing_is_heard_that_no_lesson_is_about() -> None:
    lessons = of("response")
    assert not lessons.learning.begin_request()
    assert not lessons.learning.hear_request(BODY)
    assert not lessons.learning.hear_response(BODY), "its head was not heard"
    assert lessons.learned == []


# Messages


class Transport:
    """A transport that knows its protocol."""

    def __init__(self) -> None:
        self.protocol: Any = None

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


class StubSide:
    """A side that keeps what it gets, and what had been learned by then."""

    def __init__(self, lessons: Taught) -> None:
        self.transport = Transport()
        self.transport.protocol = self
        self._lessons = lessons
        self.got: list[bytes] = []
        self.learned: list[int] = []

    def data_received(self, data: bytes) -> None:
        self.got.append(data)
        self.learned.append(len(self._lessons.learned))


class StubTunnel:
    """A tunnel of two such sides that is overheard."""

    def __init__(self, lessons: Taught) -> None:
        self.client, self.upstream = StubSide(lessons), StubSide(lessons)
        lessons.learning.overhear(cast("Tunnel", self), lessons.learn)

    def side(self, origin: str) -> StubSide:
        return self.client if origin == "client_messages" else self.upstream

    def feed(self, origin: str, data: bytes) -> None:
        self.side(origin).transport.protocol.data_received(data)


def deflated(text: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return (packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


def compressed_frame(text: bytes, *, is_masked: bool) -> bytes:
    whole = frame(deflated(text), is_masked=is_masked)
    return bytes([whole[0] | 0x40]) + whole[1:]


def fragments(text: bytes, *, is_masked: bool) -> bytes:
    """Return a message in two fragments, with a Ping between them."""
    first, last = frame(text[:12], is_masked=is_masked), frame(text[12:], 0, is_masked=is_masked)
    return bytes([first[0] & 0x7F]) + first[1:] + frame(b"?", 9, is_masked=is_masked) + last


@pytest.mark.parametrize("write", [frame, compressed_frame, fragments])
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_message_tells_the_key_before_it_is_passed_on(origin: Origin, write: Any, step: int) -> None:
    lessons = of(origin)
    tunnel = StubTunnel(lessons)
    side = tunnel.side(origin)
    data = write(BODY, is_masked=origin == "client_messages")
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    for piece in pieces:
        tunnel.feed(origin, piece)
    assert set(lessons.values) == {VALUE}
    assert side.got == pieces, "all was passed on as it came"
    assert side.learned[-1], "and when the message was whole, it was known"


@pytest.mark.parametrize("origin", ORIGINS)
def test_only_the_side_that_may_tell_something_is_overheard(origin: Origin) -> None:
    tunnel = StubTunnel(of(origin))
    other = tunnel.client if origin == "upstream_messages" else tunnel.upstream
    assert isinstance(tunnel.side(origin).transport.protocol, Overhearing)
    assert other.transport.protocol is other


def test_both_sides_may_be_overheard() -> None:
    lessons = Taught(*(Lesson(origin, pattern=member_pattern("sid")) for origin in ORIGINS))
    tunnel = StubTunnel(lessons)
    tunnel.feed("client_messages", frame(BODY, is_masked=True))
    tunnel.feed("upstream_messages", frame(b'{"sid":"other"}'))
    assert lessons.learned == [(NAME, VALUE), (f"{NAME}-1", b"other")]


def test_nobody_is_overheard_where_no_lesson_is_about_messages() -> None:
    tunnel = StubTunnel(of("response"))
    assert [side.transport.protocol for side in (tunnel.client, tunnel.upstream)] == [tunnel.client, tunnel.upstream]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(lambda is_masked: frame(BODY, is_masked=is_masked), id="the key"),
        pytest.param(lambda is_masked: frame(b"nothing", is_masked=is_masked) * 4, id="four other messages"),
        pytest.param(lambda is_masked: frame(b"x" * 5000, is_masked=is_masked), id="4 KiB"),
        pytest.param(lambda is_masked: write_close(1000, "", mask=b"1234" if is_masked else None), id="a Close frame"),
        pytest.param(lambda _: b"\xff\xff" + bytes(20), id="nonsense"),
    ],
)
def test_then_the_side_stands_for_itself(origin: Origin, ending: Any) -> None:
    lessons = of(origin)
    tunnel = StubTunnel(lessons)
    side, data = tunnel.side(origin), ending(origin == "client_messages")
    tunnel.feed(origin, data)
    assert side.transport.protocol is side
    assert side.got == [data]
    learned = list(lessons.learned)
    tunnel.feed(origin, frame(b'{"sid":"later"}', is_masked=origin == "client_messages"))
    assert lessons.learned == learned


def test_the_second_message_tells_it_as_well() -> None:
    lessons = of("upstream_messages", rb'\A42.*?"sid":"([^"]+)"')
    tunnel = StubTunnel(lessons)
    tunnel.feed("upstream_messages", frame(b'0{"sid":"not this"}') + frame(b'42{"sid":"this"}'))
    assert lessons.values == [b"this"]


@given(cut=st.integers(1, 30))
def test_what_is_cut_off_is_not_taken_for_the_key(cut: int) -> None:
    """A pattern need not say what stands behind the key."""
    lessons = of("upstream_messages", b"id=([a-z]+)")
    tunnel = StubTunnel(lessons)
    data = frame(b"id=" + b"k" * 28)
    tunnel.feed("upstream_messages", data[:cut])
    tunnel.feed("upstream_messages", data[cut:])
    assert lessons.values == [b"k" * 28]


def test_one_key_does_not_end_the_search_for_another() -> None:
    lessons = Taught(
        Lesson("upstream_messages", pattern=b"a=([0-9]+);"), Lesson("upstream_messages", pattern=b"b=([0-9]+);")
    )
    tunnel = StubTunnel(lessons)
    tunnel.feed("upstream_messages", frame(b"a=1;"))
    tunnel.feed("upstream_messages", frame(b"b=2;"))
    assert lessons.learned == [(NAME, b"1"), (f"{NAME}-1", b"2")]


def test_a_watch_passes_on_all_that_is_not_bytes() -> None:
    lessons = of("upstream_messages")
    said: list[str] = []

    def say(name: str) -> Any:
        def note(*_: object) -> bool:
            said.append(name)
            return True

        return note

    names = ("eof_received", "connection_lost", "pause_writing", "resume_writing")
    side = SimpleNamespace(transport=Transport(), **{name: say(name) for name in names})
    tunnel = SimpleNamespace(client=side, upstream=side)
    lessons.learning.overhear(cast("Tunnel", tunnel), lessons.learn)
    protocol = side.transport.protocol
    assert protocol.eof_received()
    protocol.connection_lost(None)
    protocol.pause_writing()
    protocol.resume_writing()
    assert said == list(names)
    assert not isinstance(protocol, Side)
