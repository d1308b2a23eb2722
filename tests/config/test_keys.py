"""The keys of the section `affinity`: each form, each mistake, and what the data plane gets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stickyproxy.affinity.keys import GoneAnswer, Key, Lesson, member_pattern, path_pattern
from stickyproxy.config.affinity import Affinity
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.explain import explain
from stickyproxy.config.keys import MAX_KEYS, AffinityKey, KeyLesson, read_keys
from stickyproxy.config.load import load_text
from stickyproxy.config.schema import Config
from stickyproxy.config.written import write_section

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        AffinityKey.model_validate(raw)
    return list(explain(raised.value, AffinityKey))


def compiled(raw: object) -> Key:
    return AffinityKey.model_validate(raw).compile()


def lesson_of(raw: dict[str, Any]) -> Lesson:
    (lesson,) = compiled({"mode": "learn", "query": "q", "learn": [raw]}).lessons
    return lesson


# What the data plane gets


def test_the_least_that_is_a_key() -> None:
    key = compiled({"mode": "hash", "query": "session_hash"})
    assert key == Key("query session_hash", "hash", queries=("session_hash",))


def test_every_key_is_read() -> None:
    key = compiled(
        {
            "name": "My app 1.0_b-c",
            "mode": "learn",
            "header": ["X-Session", "X-Other"],
            "header_pattern": "id=([0-9]+)",
            "query": ["sid", "a[b]"],
            "path": ["/session/{id}/", "/call/*/{id}"],
            "cookie": ["app", "APP2"],
            "member": ["session_hash", "é"],
            "on": ["/api/", "transport=polling"],
            "idle": "90s",
            "learn": [
                {"header": "X-Session", "on": "/login"},
                {"cookie": "app"},
                {"in": "response", "json": "id", "on": ["/a", "/b"], "given": "Content-Type: text/css", "within": "1B"},
                {"in": "request", "pattern": "x=(y)"},
                {"in": "upstream_messages", "json": "sessionId"},
                {"in": "client_messages", "pattern": "é(.)"},
            ],
            "gone": {"status": 404, "content_type": "application/json", "body": '{"é": 1}'},
        }
    )  # fmt: skip
    assert key == Key(
        name="My app 1.0_b-c",
        mode="learn",
        headers=(("X-Session", b"id=([0-9]+)"), ("X-Other", b"id=([0-9]+)")),
        queries=("sid", "a[b]"),
        paths=(path_pattern("/session/{id}/"), path_pattern("/call/*/{id}")),
        cookies=("app", "APP2"),
        members=("session_hash", "é"),
        on=(b"/api/", b"transport=polling"),
        lessons=(
            Lesson("header", "X-Session", on=(b"/login",)),
            Lesson("cookie", "app"),
            Lesson("response", "", member_pattern("id"), (b"/a", b"/b"), ("Content-Type", "text/css"), 1),
            Lesson("request", "", b"x=(y)"),
            Lesson("upstream_messages", "", member_pattern("sessionId")),
            Lesson("client_messages", "", "é(.)".encode()),
        ),
        idle_s=90.0,
        gone=GoneAnswer(404, "application/json", '{"é": 1}'),
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [("header", "A"), ("query", "a"), ("path", "/a/{id}"), ("cookie", "a"), ("member", "a"), ("on", "/a")],
)
def test_a_text_stands_for_a_list_of_one(place: str, value: str) -> None:
    base: dict[str, object] = {"name": "k", "mode": "hash", "query": "q", "on": "/"}
    assert compiled({**base, place: value}) == compiled({**base, place: [value]})
    assert lesson_of({"header": "A", "on": "/a"}) == lesson_of({"header": "A", "on": ["/a"]})


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        ("header", ["X-A", "X-B"], "header X-A"),
        ("query", "sid", "query sid"),
        ("path", "/a/{id}", "path /a/{id}"),
        ("cookie", "c", "cookie c"),
        ("member", "m", "member m"),
    ],
)
def test_a_key_without_a_name_is_called_by_where_it_stands(place: str, value: object, name: str) -> None:
    raw = {"mode": "hash", "on": "/", place: value}
    assert compiled(raw).name == name
    assert compiled({**raw, "name": None}).name == name
    assert compiled({**raw, "name": "own"}).name == "own"
    if place != "header":
        assert compiled({**raw, "header": "X"}).name == "header X"


@pytest.mark.parametrize(
    ("raw", "lessons"),
    [
        ({"header": "X-A"}, (Lesson("header", "X-A"),)),
        ({"header": ["X-A", "X-B"]}, (Lesson("header", "X-A"), Lesson("header", "X-B"))),
        ({"cookie": "c"}, (Lesson("cookie", "c"),)),
        ({"cookie": "c", "header": "X-A", "query": "q"}, (Lesson("header", "X-A"), Lesson("cookie", "c"))),
        ({"header": "X-A", "learn": []}, (Lesson("header", "X-A"),)),
        ({"header": "X-A", "learn": None}, (Lesson("header", "X-A"),)),
        ({"header": "X-A", "learn": [{"header": "X-B"}]}, (Lesson("header", "X-B"),)),
    ],
)
def test_a_header_or_a_cookie_is_learned_from_the_one_of_the_same_name(
    raw: dict[str, object], lessons: tuple[Lesson, ...]
) -> None:
    assert compiled({"mode": "learn", **raw}).lessons == lessons
    assert compiled({**raw, "mode": "hash", "learn": None}).lessons == ()


def test_the_defaults() -> None:
    key = compiled({"mode": "learn", "header": "A"})
    assert (key.idle_s, key.gone, key.on, key.members) == (86400.0, None, (), ())
    assert compiled({"mode": "learn", "header": "A", "gone": {}}).gone == GoneAnswer(
        400, "text/plain; charset=utf-8", ""
    )
    assert lesson_of({"in": "response", "json": "id"}).within_bytes == 4096
    affinity = Affinity()
    assert (affinity.keys, affinity.max_keys) == ((), 65_536)


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ("X-NiceGUI-Content", ("X-NiceGUI-Content", "")),
        ("X-A:", None),
        ("Content-Type: text/html", ("Content-Type", "text/html")),
        ("Content-Type:\ttext/html; charset=utf-8", ("Content-Type", "text/html; charset=utf-8")),
        ("A:b:c", ("A", "b:c")),
    ],
)
def test_a_field_that_is_given(written: str, given: tuple[str, str] | None) -> None:
    raw = {"in": "response", "json": "id", "given": written}
    if given is None:
        with pytest.raises(ValidationError):
            KeyLesson.model_validate(raw)
    else:
        assert lesson_of(raw).given == given


# Mistakes


NAME = "expected 1 to 64 letters, digits, dots, spaces, underscores or hyphens"
ON = "expected a text of 1 to 256 characters that the request target contains, such as /api/"
PATH = "expected a path with one {id} in it, as in /session/{id}/"
REGEX = "expected a regular expression"
GIVEN = "expected a header field, as in Content-Type: text/html"
LEARN = "expected where it is learned from, as in [{in: response, json: id, on: /start}]"
NEEDED = "expected where requests carry it: header, query, path, cookie or member"


@pytest.mark.parametrize(
    ("key", "raw", "path", "message"),
    [
        ("name", "", (), f"{NAME}, got ''"),
        ("name", "a:b", (), f"{NAME}, got 'a:b'"),
        ("name", "é", (), f"{NAME}, got 'é'"),
        ("name", "a\0b", (), f"{NAME}, got 'a\\x00b'"),
        ("name", 7, (), "expected text, got 7; put quotes around it"),
        ("mode", "guess", (), "expected learn or hash, got 'guess'"),
        ("mode", True, (), "expected learn or hash, got true"),
        ("header", "X A", (0,), "expected the name of a header field, got 'X A'"),
        ("header", ["X-A", "X:"], (1,), "expected the name of a header field, got 'X:'"),
        ("header", 7, (), "expected a text or a list of texts, got a number"),
        ("header", {"X": 1}, (), "expected a text or a list of texts, got a mapping"),
        ("header_pattern", "a", (), "expected one group (...) around the key, got 0 in 'a'"),
        ("header_pattern", "(a)(b)", (), "expected one group (...) around the key, got 2 in '(a)(b)'"),
        ("header_pattern", "(a", (), f"{REGEX}, got '(a': missing ), unterminated subpattern at position 0"),
        ("header_pattern", "(a{99999999999999999999})", (),
         f"{REGEX}, got '(a{{99999999999999999999}})': the repetition number is too large"),
        ("header_pattern", 7, (), "expected text, got 7; put quotes around it"),
        ("query", "a=b", (0,), "expected the name of a query parameter, got 'a=b'"),
        ("query", ["a", "a&b", "#"], (1,), "expected the name of a query parameter, got 'a&b'"),
        ("query", "", (0,), "expected the name of a query parameter, got ''"),
        ("path", "/a/", (0,), f"{PATH}; got '/a/'"),
        ("path", ["/a/{id}", "/{id}"], (1,), f"{PATH}; got '/{{id}}'"),
        ("path", "/a*/{id}", (0,), "expected * in place of a whole segment, as in /call/*/{id}; got '/a*/{id}'"),
        ("path", 7, (), "expected a text or a list of texts, got a number"),
        ("path", [7], (0,), "expected text, got 7; put quotes around it"),
        ("cookie", "a;b", (0,), "expected the name of a cookie, got 'a;b'"),
        ("member", 'a"b', (0,), "expected the name of a member of a JSON object, got 'a\"b'"),
        ("on", "/a b", (0,), f"{ON}, got '/a b'"),
        ("on", "", (0,), f"{ON}, got ''"),
        ("idle", 0, (), "expected a duration above 0, got 0"),
        ("gone", {"status": 200}, ("status",), "expected a whole number from 400 to 599, got 200"),
        ("gone", {"content_type": "a\r\nX: y"}, ("content_type",), "expected a media type, got 'a\\r\\nX: y'"),
        ("gone", {"body": {"code": 1}}, ("body",), "expected text, got a mapping"),
        ("gone", 400, (), "expected a mapping of keys, got a number"),
        ("gone", {"code": 1}, ("code",), "unknown key 'code'; known here: status, content_type, body"),
        ("quary", "a", (), "unknown key 'quary'; did you mean 'query'?"),
    ],
)  # fmt: skip
def test_a_wrong_value(key: str, raw: object, path: tuple[object, ...], message: str) -> None:
    found = mistakes({"mode": "learn", "header": "X-A", "on": "/", key: raw})
    assert found[0] == ((key, *path), message)


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({}, (), "expected one of header, cookie and in"),
        ({"json": "id"}, (), "expected one of header, cookie and in"),
        ({"header": "A", "in": "response", "json": "id"}, (), "expected one of header, cookie and in"),
        ({"header": "A", "cookie": "b"}, (), "expected one of header, cookie and in"),
        ({"in": "response"}, ("in",), "in needs either json or pattern, which say what to look for there"),
        ({"in": "response", "json": "a", "pattern": "(b)"}, ("in",),
         "in needs either json or pattern, which say what to look for there"),
        ({"header": "A", "json": "a"}, (), "json and pattern go with in"),
        ({"cookie": "a", "pattern": "(b)"}, (), "json and pattern go with in"),
        ({"in": "body", "json": "a"}, ("in",),
         "expected response, request, upstream_messages or client_messages, got 'body'"),
        ({"in": "response", "pattern": "x"}, ("pattern",), "expected one group (...) around the key, got 0 in 'x'"),
        ({"in": "response", "json": "a\\b"}, ("json",), "expected the name of a member of a JSON object, got 'a\\\\b'"),
        ({"in": "response", "json": "a", "given": "A B: c"}, ("given",), f"{GIVEN}, got 'A B: c'"),
        ({"in": "response", "json": "a", "given": "A:"}, ("given",), f"{GIVEN}, got 'A:'"),
        ({"in": "response", "json": "a", "within": "2MiB"}, ("within",), "expected a size from 1B to 1MiB, got '2MiB'"),
        ({"in": "response", "json": "a", "within": 0}, ("within",), "expected a size from 1B to 1MiB, got 0"),
        ({"header": "A", "on": ["/a", ""]}, ("on", 1), f"{ON}, got ''"),
        ("header", (), "expected a mapping of keys, got text"),
    ],
)  # fmt: skip
def test_a_wrong_lesson(raw: object, path: tuple[object, ...], message: str) -> None:
    good = {"header": "A"}
    assert mistakes({"mode": "learn", "query": "q", "learn": [good, raw]}) == [(("learn", 1, *path), message)]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"mode": "hash"}, [((), NEEDED)]),
        ({"mode": "hash", "query": [], "on": "/a"}, [((), NEEDED)]),
        ({}, [((), "the key 'mode' is missing")]),
        ({"mode": "hash", "query": "q", "header_pattern": "(a)"}, [
            (("header_pattern",), "header_pattern goes with header"),
        ]),
        ({"mode": "hash", "member": "m"}, [
            (("member",), "member needs on: the bodies of these requests alone are looked into"),
        ]),
        ({"mode": "hash", "query": "q", "learn": [{"header": "A"}], "gone": {}}, [
            (("learn",), "learn goes with mode: learn; what a client makes is hashed"),
            (("gone",), "gone goes with mode: learn; what a client makes is hashed"),
        ]),
        ({"mode": "learn", "query": "q"}, [(("learn",), LEARN)]),
        ({"mode": "learn", "path": "/a/{id}", "learn": []}, [(("learn",), LEARN)]),
        ({"mode": "learn", "member": "m", "header_pattern": "(a)"}, [
            (("header_pattern",), "header_pattern goes with header"),
            (("member",), "member needs on: the bodies of these requests alone are looked into"),
            (("learn",), LEARN),
        ]),
    ],
)  # fmt: skip
def test_what_does_not_go_together(raw: object, expected: list[tuple[object, str]]) -> None:
    assert mistakes(raw) == expected


def test_a_key_is_learned_from_16_places_at_most() -> None:
    lessons = [{"header": f"A{number}"} for number in range(17)]
    assert len(compiled({"mode": "learn", "query": "q", "learn": lessons[:16]}).lessons) == 16
    assert [path for path, _ in mistakes({"mode": "learn", "query": "q", "learn": lessons})] == [("learn",)]


# In the file


WRONG = """\
affinity:
  keys:
    - {mode: hash, query: ok}
    - mode: learn
      query: sid
      learn:
        - {in: response, json: sid}
        - in: response
          on: [/a, "/ b"]
    - mode: hash
      learn: [{header: A}]
      path:
        - /a/{id}
        - /b/
    - mode: hash
      query: q
      gone:
        status: 200
    - text
    - mode: hash
      on: /x
  max_keys: 0
"""


def test_the_mistakes_of_all_keys_come_at_once_each_with_its_line() -> None:
    with pytest.raises(ConfigErrors) as raised:
        load_text(WRONG, {})
    assert [str(error) for error in raised.value.errors] == [
        f"line 9: affinity.keys[1].learn[1].on[1]: {ON}, got '/ b'",
        f"line 14: affinity.keys[2].path[1]: {PATH}; got '/b/'",
        "line 18: affinity.keys[3].gone.status: expected a whole number from 400 to 599, got 200",
        "line 19: affinity.keys[4]: expected a mapping of keys, got text",
        f"line 20: affinity.keys[5]: {NEEDED}",
        "line 22: affinity.max_keys: expected a whole number from 1 to 1000000, got 0",
    ]


def affinity_mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        Affinity.model_validate(raw)
    return list(explain(raised.value, Affinity))


def test_there_are_so_many_keys_at_most() -> None:
    key = {"mode": "hash", "query": "q"}
    assert len(Affinity.model_validate({"keys": [key] * MAX_KEYS}).keys) == MAX_KEYS
    assert affinity_mistakes({"keys": [key] * (MAX_KEYS + 1)}) == [(("keys",), "expected at most 64 keys, got 65")]
    assert affinity_mistakes({"keys": key}) == [(("keys",), "expected a list, got a mapping")]


def test_keys_that_were_read_are_read_as_they_are() -> None:
    key = AffinityKey.model_validate({"mode": "hash", "query": "q"})
    assert read_keys([key]) == (key,)
    assert Affinity.model_validate({"keys": [key]}).keys == (key,)


# Written, and described for editors


PLACES = st.fixed_dictionaries(
    {"mode": st.just("learn"), "header": st.lists(st.sampled_from(["X-A", "~x"]), min_size=1, max_size=2)},
    optional={
        "name": st.sampled_from(["a", "null", "1.0", "a b"]),
        "header_pattern": st.sampled_from(["(.*)", r'a: "(b)" \x1e\\ # é']),
        "query": st.sampled_from(["a", "a[]", ["*", "!x", "~"]]),
        "path": st.sampled_from(["/a/{id}", ["/b: {id}", "/c/*/{id}/ #"]]),
        "cookie": st.sampled_from(["c", ["true"]]),
        "member": st.sampled_from(["m", ["a: b", "{", "é"]]),
        "idle": st.sampled_from(["1ms", "1500ms", "24h", "7d"]),
        "gone": st.sampled_from([{}, {"status": 599, "body": "a: \n\x1b é", "content_type": "a/b; c=d"}]),
        "learn": st.lists(
            st.sampled_from([
                {"header": "A"},
                {"cookie": "a", "on": "/x"},
                {"in": "response", "json": "a", "within": "1MiB", "given": "A: b, c"},
                {"in": "client_messages", "pattern": r'\A40[^{]{0,64}\{.*?"id":"([0-9A-Za-z-]{1,64})"'},
            ]),
            max_size=3,
        ),
    },
)  # fmt: skip


@UNHURRIED
@given(st.lists(PLACES.map(lambda raw: {**raw, "on": ["/a", "x=[y]"]}), max_size=3), st.integers(1, 1_000_000))
def test_keys_that_were_written_are_read_as_the_same(keys: list[dict[str, Any]], max_keys: int) -> None:
    config = Config.model_validate({"affinity": {"keys": keys, "max_keys": max_keys}})
    assert load_text(write_section(config), {}) == config


def test_a_key_is_written_as_in_the_file() -> None:
    key = AffinityKey.model_validate(
        {"mode": "learn", "query": "sid", "on": "/a", "learn": [{"in": "response", "json": "id", "within": "1MiB"}]}
    )
    assert write_section(key) == (
        "{mode: learn, query: [sid], on: [/a], learn: [{in: response, json: id, within: 1MiB}]}"
    )


def test_the_json_schema_has_every_form() -> None:
    schema = Affinity.model_json_schema()
    keys = schema["properties"]["keys"]
    assert (keys["items"], keys["maxItems"], keys["default"]) == ({"$ref": "#/$defs/AffinityKey"}, MAX_KEYS, [])
    assert schema["properties"]["max_keys"]["default"] == 65_536
    key, lesson, gone = (schema["$defs"][name] for name in ("AffinityKey", "KeyLesson", "Gone"))
    assert key["required"] == ["mode"]
    assert key["properties"]["mode"]["enum"] == ["learn", "hash"]
    for name in ("header", "query", "path", "cookie", "member", "on"):
        text, several = key["properties"][name]["anyOf"]
        assert text["type"] == "string"
        assert several == {"type": "array", "items": text}
    assert key["properties"]["path"]["anyOf"][0]["pattern"] == r"^/.*\{id\}"
    assert key["properties"]["idle"]["default"] == "24h"
    assert key["properties"]["learn"]["maxItems"] == 16
    assert key["additionalProperties"] is False
    assert lesson["properties"]["within"]["default"] == "4KiB"
    assert "place" not in lesson["properties"]
    assert lesson["properties"]["in"]["anyOf"][0]["enum"] == [
        "response", "request", "upstream_messages", "client_messages",
    ]  # fmt: skip
    assert gone["properties"]["status"]["default"] == 400
    for one in (key, lesson, gone):
        assert all(field["description"] for field in one["properties"].values())
