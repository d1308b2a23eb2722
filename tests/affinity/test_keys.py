"""Keys: where requests carry them, what is taken for one and what is not, and what each leads to."""

from __future__ import annotations

from time import perf_counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.keys import (
    MAX_KEY_BYTES,
    Found,
    GoneAnswer,
    Key,
    KeyReader,
    Lesson,
    Lessons,
    member_pattern,
    path_pattern,
)
from stickyproxy.affinity.token import CLIENT_ID_BYTES
from stickyproxy.wire.cookies import CookieReader
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import RequestHead, RequestHeadReader, parse_request_head

LIMITS = HeadLimits()
LONGEST = b"x" * MAX_KEY_BYTES
TOO_LONG = b"x" * (MAX_KEY_BYTES + 1)
HUGE = b"x" * 10_240


def parse(target: bytes = b"/", *fields: bytes) -> RequestHead:
    data = b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"
    return parse_request_head(data, len(data), LIMITS)


def read(key: Key, target: bytes = b"/", *fields: bytes) -> bytes | None:
    """Return what a head carries of one key."""
    found = KeyReader([key]).read(parse(target, *fields))
    assert all(one.key is key for one in found)
    return found[0].value if found else None


def body_of(key: Key, body: bytes, target: bytes = b"/") -> bytes | None:
    found = KeyReader([key]).read_body(target, body)
    assert all(one.key is key for one in found)
    return found[0].value if found else None


# In a query


SID = Key("sid", "learn", queries=("sid",))


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (b"/?sid=a", b"a"),
        (b"/socket.io/?EIO=4&transport=polling&sid=a-_b&t=1", b"a-_b"),
        (b"/?sid=a&sid=b", b"a"),
        (b"/?sid=&sid=b", b"b"),
        (b"/?sid=a=b", b"a=b"),
        (b"/?sid=a?b/c", b"a?b/c"),
        (b"/?&&sid=a", b"a"),
        (b"/??sid=a", None),
        (b"/?a=1?sid=2", None),
        (b"/?a=1?&sid=2", b"2"),
        (b"/&sid=a", None),
        (b"/sid=a", None),
        (b"/&sid=a?b=1", None),
        (b"/?", None),
        (b"/?sid", None),
        (b"/?sid=", None),
        (b"/?sid=&a=1", None),
        (b"/?xsid=a", None),
        (b"/?sidx=a", None),
        (b"/?SID=a", None),
        (b"/?a=sid=b", None),
        (b"/?a%26sid=b", None),
    ],
)
def test_a_query_parameter(target: bytes, value: bytes | None) -> None:
    assert read(SID, target) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (b"%61%2Db", b"a-b"),
        (b"a%2fb%26c%3D", b"a/b&c="),
        (b"a+b", b"a+b"),
        (b"%00%0d%0A", b"\0\r\n"),
        (b"%zz%", b"%zz%"),
        (b"%ff", b"\xff"),
    ],
)
def test_what_is_percent_encoded_is_the_same_key(written: bytes, value: bytes) -> None:
    """Control bytes too: a key is compared and hashed, and never written anywhere."""
    assert read(SID, b"/?sid=" + written) == value
    assert read(Key("p", "hash", paths=(path_pattern("/s/{id}/"),)), b"/s/" + written + b"/") == value


def test_the_name_of_a_parameter_is_no_expression() -> None:
    assert read(Key("k", "hash", queries=("a.b[]",)), b"/?axb[]=1&a.b[]=2") == b"2"


def test_the_first_parameter_of_the_key_that_is_there_counts() -> None:
    key = Key("k", "hash", queries=("a", "b"))
    assert read(key, b"/?b=1&a=2") == b"2"
    assert read(key, b"/?b=1&a=") == b"1"


# In a path


@pytest.mark.parametrize(
    ("template", "target", "value"),
    [
        ("/session/{id}/", b"/session/abc/upload/1?w=", b"abc"),
        ("/session/{id}/", b"/base/path/session/abc/", b"abc"),
        ("/session/{id}/", b"/session//session/abc/", b"abc"),
        ("/session/{id}/", b"/session/abc", None),
        ("/session/{id}/", b"/session/abc?/", None),
        ("/session/{id}/", b"/session//", None),
        ("/session/{id}/", b"/xsession/abc/", None),
        ("/session/{id}/", b"/x?/session/abc/", None),
        ("/session/{id}/", b"/x?y=/session/abc/", None),
        ("/session/{id}/", b"/x?y?/session/abc/", None),
        ("/session/{id}/", b"/%73ession/abc/", None),
        ("/kernels/{id}", b"/kernels/abc", b"abc"),
        ("/kernels/{id}", b"/kernels/abc/channels", b"abc"),
        ("/kernels/{id}", b"/kernels/abc?session_id=x", b"abc"),
        ("/kernels/{id}", b"/kernels/", None),
        ("/kernels/{id}", b"/kernels?x=/kernels/abc", None),
        ("/call/*/{id}", b"/call/predict/abc", b"abc"),
        ("/call/*/{id}", b"/call/predict", None),
        ("/call/*/{id}", b"/call//abc", None),
        ("/call/*/{id}", b"/call/a?b/abc", None),
        ("/*/{id}/*/end", b"/a/b/c/end", b"b"),
        ("/s-{id}.json", b"/x/s-abc.json", b"abc"),
        ("/s-{id}.json", b"/x/s-abcxjson", None),
        ("/a+b/{id}", b"/aab/c", None),
        ("/a+b/{id}", b"/a+b/c", b"c"),
    ],
)
def test_a_path(template: str, target: bytes, value: bytes | None) -> None:
    assert read(Key("k", "hash", paths=(path_pattern(template),)), target) == value


@pytest.mark.parametrize("template", ["", "/", "/a/", "{id}", "a/{id}", "/{id}", "/a/{id}/{id}", "/a/{ID}", "/a/*"])
def test_a_template_without_one_id_after_something_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"^expected a path with one \{id\} in it, as in /session/\{id\}/$"):
        path_pattern(template)


@pytest.mark.parametrize("template", ["/a/*{id}/", "/a/{id}*", "/*x/{id}", "/a/{id}/x*", "/**/{id}"])
def test_a_star_stands_for_a_whole_segment(template: str) -> None:
    """Else each cut of a segment would be tried: seconds for one long path."""
    with pytest.raises(ValueError, match=r"^expected \* in place of a whole segment, as in /call/\*/\{id\}$"):
        path_pattern(template)


# In a field


def test_a_whole_field() -> None:
    key = Key("k", "learn", headers=(("Mcp-Session-Id", b""),))
    assert read(key, b"/", b"A: 1", b"mcp-session-ID: a b!", b"B: 2") == b"a b!"
    assert read(key, b"/", b"Cookie: a=1", b"Mcp-Session-Id: x") == b"x", "in whatever part of the section"
    assert read(key, b"/", b"Mcp-Session-Id: %61") == b"%61", "which is nothing but itself here"
    assert read(key, b"/", b"Mcp-Session-Id: \xff\x80") == b"\xff\x80"
    assert read(key, b"/", b"Mcp-Session-Id:") is None
    assert read(key, b"/", b"X-Mcp-Session-Id: a") is None
    assert read(key, b"/", b"Mcp-Session-Id-X: a") is None
    assert read(key, b"/", b"X: Mcp-Session-Id: a") is None
    assert read(key) is None


def test_a_part_of_a_field() -> None:
    key = Key("k", "learn", headers=(("Sec-WebSocket-Protocol", rb"bokeh, ?(\w+)"), ("X+Y", b"")))
    assert read(key, b"/", b"Sec-WebSocket-Protocol: bokeh, abc, x") == b"abc"
    assert read(key, b"/", b"Sec-WebSocket-Protocol: other, abc") is None
    assert read(key, b"/", b"X+Y: a", b"Sec-WebSocket-Protocol: other, abc") == b"a", "the first that has it"
    assert read(key, b"/", b"XXY: a") is None, "a name is no expression"


@pytest.mark.parametrize("pattern", [rb"a|(b)", rb"(x*)"])
def test_a_pattern_that_finds_nothing_for_its_group_finds_no_key(pattern: bytes) -> None:
    key = Key("k", "learn", headers=(("A", pattern), ("B", b"")))
    assert read(key, b"/", b"A: a", b"B: 2") == b"2"
    assert read(key, b"/", b"A: a") is None


# In a cookie


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"sid=abc", b"abc"),
        (b"a=1; sid=abc; b=2", b"abc"),
        (b"a=1;sid=abc;b=2", b"abc"),
        (b"a=1;\t sid=abc", b"abc"),
        (b'sid="abc"; b=2', b"abc"),
        (b"sid= abc \t; b=2", b"abc"),
        (b'sid={"a":"b"}; b=2', b'{"a":"b"}'),
        (b"sid=a=b", b"a=b"),
        (b"sid=%61", b"%61"),
        (b"sid=a; sid=b", b"a"),
        (b"sid=", None),
        (b"sid=; b=2", None),
        (b'sid=""', None),
        (b"xsid=a; SID=b; sidx=c; a=sid=d; sid", None),
    ],
)
def test_a_cookie_of_the_app(value: bytes, expected: bytes | None) -> None:
    """As `Set-Cookie` would have it: without quotes, and without the white space around it."""
    key = Key("k", "learn", cookies=("sid",))
    assert read(key, b"/", b"A: 1", b"Cookie: " + value, b"B: 2") == expected
    assert read(key, b"/", b"Cookie: other=1", b"Cookie: " + value) == expected, "in any of several fields"


def test_cookies_are_only_those_of_the_field() -> None:
    key = Key("k", "learn", cookies=("a.b", "second"))
    assert read(key, b"/", b"X: a.b=1") is None
    assert read(key, b"/", b"Cookie: axb=1") is None, "a name is no expression"
    assert read(key, b"/", b"Cookie: second=2; a.b=1") == b"1"
    assert read(key, b"/", b"Cookie: second=2") == b"2"


# In a body


SESSION = Key("k", "hash", members=("session_hash",), on=(b"/queue/",))


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"session_hash":"abc"}', b"abc"),
        (b'{"data":[{}],"session_hash" :\r\n\t "abc","x":1}', b"abc"),
        (b'{"a":{"session_hash":"deep"}}', b"deep"),
        (b'{"data":["x",{"session_hash":"of the user"}],"session_hash":"abc"}', b"abc"),
        (b'{"data":["\\"session_hash\\":\\"of the user\\""],"session_hash":"abc"}', b"abc"),
        (b'{"data":["\\"session_hash\\":\\"of the user\\""]}', None),
        (b'{"session_hash":"abc","data":["session_hash"]}', b"abc"),
        (b'{"session_hash":null}', None),
        (b'{"session_hash":7}', None),
        (b'{"session_hash":""}', None),
        (b'{"session_hash":"cut off', None),
        (b'{"session_hash":"a\\"b"}', None),
        (b"{'session_hash':'abc'}", None),
        (b"session_hash=abc", None),
        (b"", None),
        (b"\xff\0\x1f\x8b", None),
    ],
)
def test_a_member_of_the_json_of_a_body(body: bytes, value: bytes | None) -> None:
    """The last one: what the user has typed stands before it, and what is no JSON is no mistake."""
    assert body_of(SESSION, body, b"/queue/join") == value
    assert KeyReader([SESSION]).read_body(b"/queue/join", bytearray(body)) == (
        [] if value is None else [Found(SESSION, value)]
    )


def test_the_first_member_of_the_key_that_is_there_counts() -> None:
    key = Key("k", "hash", members=("a.b", "c"), on=(b"/",))
    assert body_of(key, b'{"c":"2","a.b":"1"}') == b"1"
    assert body_of(key, b'{"c":"2","axb":"1"}') == b"2"


def test_the_pattern_of_a_member_takes_any_name() -> None:
    assert b"\xc3\xa9" in member_pattern("é")
    assert body_of(Key("k", "hash", members=("é (x)",)), '{"é (x)":"ü"}'.encode()) == "ü".encode()


def test_a_body_is_read_where_a_key_may_be_in_it() -> None:
    learned = Key("l", "learn", members=("event_id",), on=(b"/cancel",))
    reader = KeyReader([SESSION, learned, Key("q", "hash", queries=("q",))])
    for target, is_pinned, expected in (
        (b"/queue/join", False, True),
        (b"/queue/join", True, False),  # the token is an earlier rung than what is hashed
        (b"/cancel", False, True),
        (b"/cancel", True, True),
        (b"/other?q=1", False, False),
        (b"/other?q=1", True, False),
    ):
        assert reader.reads_body(target, is_pinned=is_pinned) is expected
    body = b'{"event_id":"e","session_hash":"s"}'
    assert reader.read_body(b"/queue/cancel", body) == [Found(learned, b"e"), Found(SESSION, b"s")]
    assert reader.read_body(b"/cancel", body) == [Found(learned, b"e")]
    assert reader.read_body(b"/other", body) == []


# How long a key may be


@pytest.mark.parametrize("mode", ["learn", "hash"])
def test_a_key_that_is_too_long_is_none(mode: str) -> None:
    """Nor is the beginning of it: two that begin alike are two."""
    key = Key(
        "k",
        mode,  # type: ignore[arg-type]
        headers=(("H", b""), ("P", rb"p(.*)")),
        queries=("q",),
        paths=(path_pattern("/s/{id}/"),),
        cookies=("c",),
        members=("m",),
    )
    for value, expected in ((LONGEST, LONGEST), (TOO_LONG, None), (HUGE, None)):
        assert read(key, b"/?q=" + value) == expected
        assert read(key, b"/?q=" + value + b"&a=1") == expected
        assert read(key, b"/s/" + value + b"/") == expected
        assert read(key, b"/", b"H: " + value) == expected
        assert read(key, b"/", b"P: p" + value) == expected
        assert read(key, b"/", b"Cookie: c=" + value) == expected
        assert read(key, b"/", b"Cookie: a=1; c=" + value + b"; b=2") == expected
        assert body_of(key, b'{"m":"' + value + b'"}') == expected


def test_where_a_key_is_too_long_another_place_may_have_it() -> None:
    key = Key("k", "hash", queries=("q",), cookies=("c",), headers=(("H", b""),))
    assert read(key, b"/?q=" + HUGE, b"H: h") == b"h"
    assert read(key, b"/", b"Cookie: c=" + HUGE, b"H: h") == b"h"


# The ladder


def test_the_target_comes_before_the_fields_and_each_key_is_found_once() -> None:
    key = Key("k", "hash", headers=(("H", b""),), queries=("q",), cookies=("c",), paths=(path_pattern("/s/{id}/"),))
    fields = b"H: of the field", b"Cookie: c=of-the-cookie"
    assert read(key, b"/s/path/?q=query", *fields) == b"query"
    assert read(key, b"/s/path/", *fields) == b"path"
    assert read(key, b"/", *fields) == b"of-the-cookie"
    assert read(key, b"/", fields[0]) == b"of the field"
    assert len(KeyReader([key]).read(parse(b"/s/path/?q=query", *fields))) == 1


def test_learned_keys_come_first_each_kind_in_its_order() -> None:
    keys = [
        Key("h1", "hash", queries=("a",)),
        Key("l1", "learn", queries=("a",)),
        Key("h2", "hash", queries=("a",)),
        Key("l2", "learn", queries=("a",)),
    ]
    reader = KeyReader(keys)
    assert [one.name for one in reader.keys] == ["l1", "l2", "h1", "h2"]
    assert [one.key.name for one in reader.read(parse(b"/?a=1"))] == ["l1", "l2", "h1", "h2"]
    assert reader.read(parse(b"/?b=1")) == []


def test_a_request_that_no_key_names_costs_one_look_and_has_none() -> None:
    named, plain = Key("n", "hash", queries=("q",), on=(b"/a.b?",)), Key("p", "hash", queries=("q",))
    assert KeyReader([named]).read(parse(b"/x?q=1")) == []
    assert KeyReader([named]).read(parse(b"/axb?q=1")) == [], "a text is no expression"
    assert KeyReader([named]).read(parse(b"/a.b?q=1")) == [Found(named, b"1")]
    assert KeyReader([named, plain]).read(parse(b"/x?q=1")) == [Found(plain, b"1")]
    field = Key("f", "hash", headers=(("H", b""),))
    assert KeyReader([named, field]).read(parse(b"/x?q=1", b"H: 1")) == [Found(field, b"1")]
    assert KeyReader([named, field]).read(parse(b"/a.b?q=1")) == [Found(named, b"1")]


def test_only_requests_that_a_key_concerns_carry_it() -> None:
    key = Key("k", "hash", queries=("q",), headers=(("H", b""),), on=(b"/api/", b"transport=polling"))
    assert read(key, b"/api/x?q=1", b"H: h") == b"1"
    assert read(key, b"/x?transport=polling", b"H: h") == b"h"
    assert read(key, b"/x?q=1", b"H: h") is None
    assert key.concerns(b"/api/")
    assert not key.concerns(b"/API/")
    assert Key("k", "hash").concerns(b"")


# A section that is repeated


def test_the_fields_of_a_section_are_read_once_by_each_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("k", "hash", headers=(("H", b""),), queries=("q",), on=(b"/api",))
    other = Key("o", "hash", cookies=("c",))
    reader = KeyReader([key, other, Key("third", "hash", queries=("z",))])
    data = b"GET %s HTTP/1.1\r\nHost: a\r\nH: h\r\nCookie: c=1; sp=T\r\n\r\n"
    heads = RequestHeadReader(LIMITS, CookieReader("sp"))
    first = heads.read(data % b"/api/1", len(data % b"/api/1"))
    assert [one.value for one in reader.read(first)] == [b"h", b"1"]
    assert first.key_fields == (reader, (b"h", b"1", None))
    repeated = first.repeat(b"POST", b"/api/2?q=2")
    assert repeated.key_fields is first.key_fields
    monkeypatch.setattr(repeated, "section", [])
    monkeypatch.setattr(repeated, "cookies", None)
    assert [one.value for one in reader.read(repeated)] == [b"2", b"1"], "the target is read again, the section is not"
    assert [one.value for one in reader.read(first.repeat(b"GET", b"/"))] == [b"1"], "and what concerns it is asked"
    assert repeated.key_fields is first.key_fields
    assert KeyReader([other]).read(repeated) == [], "another reader reads anew"


def test_a_reader_of_targets_alone_leaves_the_section_alone() -> None:
    head = parse(b"/?sid=1", b"Cookie: sid=2")
    assert KeyReader([SID]).read(head) == [Found(SID, b"1")]
    assert head.key_fields is None


# What a key leads to


def test_two_keys_of_one_name_are_one_space_and_two_names_are_two() -> None:
    in_query, in_header = Key("marimo", "hash", queries=("q",)), Key("marimo", "hash", headers=(("H", b""),))
    other = Key("other", "hash", queries=("q",))
    one, same, another, third = (
        Found(in_query, b"1"),
        Found(in_header, b"1"),
        Found(other, b"1"),
        Found(in_query, b"2"),
    )
    assert one.stored == same.stored == b"marimo\x001"
    assert one.client_id == same.client_id
    assert len(one.client_id) == CLIENT_ID_BYTES
    assert len({one.stored, another.stored, third.stored}) == 3
    assert len({one.client_id, another.client_id, third.client_id}) == 3


def test_no_value_is_taken_for_one_of_another_key() -> None:
    assert Found(Key("a", "hash"), b"b\0c").stored != Found(Key("a b", "hash"), b"\0c").stored
    assert Found(Key("a", "hash"), b"\0x").stored != Found(Key("a", "hash"), b"x").stored


def test_the_client_of_a_key_is_the_same_in_every_version() -> None:
    """Else an upgrade, or another proxy beside this one, would place each client anew."""
    assert Found(Key("Gradio session", "hash"), b"abc").client_id.hex() == "adbe2dbc98d613462a9c"


# Lessons


def lessons_of(reader: KeyReader, target: bytes) -> list[tuple[Key, Lesson]]:
    lessons = reader.lessons(target)
    assert lessons is not None
    return list(lessons.pairs)


def test_what_an_exchange_may_teach() -> None:
    first = Lesson("header", "Mcp-Session-Id")
    polling = Lesson("response", pattern=rb'"sid":"(\w+)"', on=(b"transport=polling", b"EIO=4"))
    key = Key("k", "learn", queries=("sid",), lessons=(first, polling), on=(b"/never/",))
    second = Key("l", "learn", cookies=("c",), lessons=(Lesson("cookie", "c", on=(b"/login",)),))
    hashed = Key("h", "hash", queries=("q",), lessons=(first,))
    reader = KeyReader([hashed, key, second])
    assert lessons_of(reader, b"/") == [(key, first)], "what is hashed is never learned"
    assert lessons_of(reader, b"/x?transport=polling") == [(key, first), (key, polling)]
    assert lessons_of(reader, b"/login?EIO=4") == [(key, first), (key, polling), (second, second.lessons[0])]
    for target in (b"/", b"/never/"):
        assert KeyReader([hashed]).lessons(target) is None
        assert KeyReader([second]).lessons(target) is None
    concerned = Key("o", "learn", queries=("q",), on=(b"/later",), lessons=(polling,))
    assert KeyReader([concerned]).lessons(b"/later?q=1") is None, "where it is carried, nothing is learned"


@pytest.mark.parametrize(
    ("lesson", "mark"),
    [
        (Lesson("header", "Mcp-Session-Id"), b"mcp-session-id: "),
        (Lesson("cookie", "App"), b"set-cookie: app="),
        (Lesson("response", given=("X-NiceGUI-Content", "")), b"x-nicegui-content: "),
        (Lesson("response", given=("Content-Type", "Text/HTML")), b"content-type: text/html"),
        (Lesson("response"), None),
        (Lesson("request", given=("X", "")), None),
        (Lesson("client_messages"), None),
        (Lesson("upstream_messages"), None),
    ],
)
def test_what_the_head_of_a_response_has_that_teaches(lesson: Lesson, mark: bytes | None) -> None:
    assert lesson.mark == mark
    lessons = Lessons([(SID, lesson)])
    assert lessons.pairs == ((SID, lesson),)
    for section in ([], [b"A: 1\r\n", b"Content-Type: text/css\r\n"]):
        assert lessons.concern(section) is (mark is None)
    if mark is not None:
        assert lessons.concern([b"A: 1\r\n", b"B: 2\r\n" + mark.upper() + b"; x\r\n"])


def test_one_lesson_that_any_response_may_teach_lets_all_be_heard() -> None:
    named, unnamed = (SID, Lesson("header", "X")), (SID, Lesson("response"))
    assert Lessons([named, named]).marks == (b"x: ",)
    assert not Lessons([named]).concern([b"Y: 1\r\n"])
    assert Lessons([named, unnamed]).concern([b"Y: 1\r\n"])


def test_facts_have_their_defaults() -> None:
    lesson = Lesson("response")
    assert (lesson.name, lesson.pattern, lesson.on, lesson.given, lesson.within_bytes) == ("", b"", (), None, 4096)
    key = Key("k", "learn", gone=GoneAnswer(400, "text/plain", "x"))
    assert (key.idle_s, key.lessons, key.gone) == (86400.0, (), GoneAnswer(400, "text/plain", "x"))


# Whatever comes


EVERYWHERE = [
    Key(
        "learned",
        "learn",
        headers=(("X", b""), ("Sec-WebSocket-Protocol", rb"streamlit, ?[^,]*, ?(\w+)|x")),
        queries=("sid", "a"),
        paths=(path_pattern("/session/{id}/"), path_pattern("/call/*/{id}")),
        cookies=("c",),
        members=("m",),
    ),
    Key("hashed", "hash", queries=("a",), headers=(("Host", b""),), on=(b"/", b"?")),
]
READER = KeyReader(EVERYWHERE)
TARGETS = st.lists(
    st.sampled_from([b"/", b"?", b"&", b"=", b"sid=", b"&sid=", b"?a=", b"/session/", b"/call/", b"%", b"%00", b"%ff",
                     b"x", b"*", b"{id}", b"x" * 600, b";", b"//", b"~", b":"]),
    max_size=30,
).map(b"".join) | st.binary(max_size=40)  # fmt: skip
NAMES = st.sampled_from([b"X", b"x", b"Cookie", b"Sec-WebSocket-Protocol", b"Y"])
VALUES = st.lists(
    st.sampled_from([b"c=", b"; ", b";", b'"', b"=", b"a", b" ", b"\t", b"\xff", b",", b"streamlit, ", b"y" * 600]),
    max_size=12,
).map(b"".join)
FIELDS = st.lists(st.tuples(NAMES, VALUES).map(b": ".join), max_size=4)
BODIES = st.lists(
    st.sampled_from([b'"m"', b":", b'"', b" ", b"\\", b"{", b"}", b"x" * 600, b"\0", b"\xff", b'"m":"v"', b"\n"]),
    max_size=30,
).map(b"".join)


@settings(deadline=None, max_examples=400)
@given(TARGETS, FIELDS, BODIES)
@example(b"x?a=1?sid=2", [b"X: \xff"], b'{"m":"\0"}')
def test_of_any_request_only_keys_of_a_right_length_are_read(target: bytes, fields: list[bytes], body: bytes) -> None:
    head = parse(b"/", *fields)
    head.target = target = b"/" + target  # in any bytes, of which the head would refuse some
    found = [*READER.read(head), *READER.read_body(target, body)]
    for key, value in found:
        assert isinstance(value, bytes)
        assert 0 < len(value) <= MAX_KEY_BYTES
        assert key in EVERYWHERE
    assert [*READER.read(head), *READER.read_body(target, body)] == found


LONG_TARGETS = [b"/", b"?", b"&", b"?sid=", b"&sid=", b"&sid=x", b"?sid=x", b"/session/", b"/session/y", b"/call/",
                b"/call/x", b"/call/x/", b"x", b"=", b"%", b"%41", b"&sid=" + b"x" * 1030, b"&a=1", b"/x"]  # fmt: skip
LONG_FIELDS = [b" ", b";", b"; ", b";c=", b';c="', b";\t c", b"streamlit,", b"streamlit, ", b",", b"y", b'"']
LONG_BODIES = [b'"a":"', b'"m":"', b'"m":', b'"m"', b'"m" ', b'"m":"v"', b" ", b'"m"' + b" " * 1000, b"\\", b'"', b"{",
               b'"m":"' + b"x" * 1023]  # fmt: skip


def time_of(target: bytes = b"/", *fields: bytes, body: bytes = b"") -> float:
    head = parse(b"/", *fields)
    head.target = target
    began_at = perf_counter()
    READER.read(head)
    READER.read_body(target, body)
    return perf_counter() - began_at


def stretched(part: bytes, length: int) -> bytes:
    return (part * (length // len(part) + 1))[:length]


@pytest.mark.parametrize("part", LONG_TARGETS)
def test_a_long_target_takes_little_time(part: bytes) -> None:
    """Of 16 KiB, as much as there may be; what tries each cut of it takes seconds, and this a millisecond."""
    assert time_of(b"/" + stretched(part, 16_383)) < 1.0
    assert time_of(b"/?" + stretched(part, 16_382)) < 1.0


@pytest.mark.parametrize("part", LONG_FIELDS)
def test_a_long_field_takes_little_time(part: bytes) -> None:
    for name in (b"X: a", b"Cookie: ", b"Sec-WebSocket-Protocol: "):
        assert time_of(b"/", name + stretched(part, 60_000)) < 1.0


@pytest.mark.parametrize("part", LONG_BODIES)
def test_a_long_body_takes_little_time(part: bytes) -> None:
    assert time_of(body=stretched(part, 1 << 20)) < 1.0
    assert time_of(body=b'"m"' + stretched(part, 1 << 20)) < 1.0
