"""The field types: what each takes, says, and shows in the JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from stickyproxy.config import fields
from stickyproxy.config.fields import AlsoWritten, OrFalse, Section, in_bytes, in_seconds, read_items, refuse

if TYPE_CHECKING:
    from collections.abc import Iterable


ONE_TO_FIVE = Annotated[int, fields.whole_number(1, 5)]


class Inner(Section):
    expected: ClassVar[str] = "a mapping or false"

    wait_s: fields.Seconds = in_seconds("5s", "how long")
    idle_s: fields.SecondsOrOff = in_seconds("off", "how long")
    head_bytes: Annotated[int, fields.size("1KiB", "1MiB")] = in_bytes("64KiB", "how large")
    share_percent: Annotated[int, fields.whole_number(1, 5)] = 2


class Outer(Section):
    inner: OrFalse[Inner] = None
    short: Annotated[Inner, AlsoWritten({"type": "string"})] = Inner()


def messages(error: ValidationError) -> Iterable[str]:
    return [str(details.get("ctx", {}).get("error", details["msg"])) for details in error.errors()]


def read(kind: Any, raw: object) -> object:
    return TypeAdapter(kind).validate_python(raw)


def test_keys_leave_the_unit_to_the_value() -> None:
    config = Inner.model_validate({"wait": "1s", "idle": False, "head": "1MiB", "share": 5})
    assert (config.wait_s, config.idle_s, config.head_bytes, config.share_percent) == (1.0, None, 1 << 20, 5)


def test_a_key_with_nothing_after_it_has_its_default() -> None:
    assert Inner.model_validate({"wait": None, "head": None}) == Inner()


def test_an_unknown_key_is_refused_even_with_nothing_after_it() -> None:
    with pytest.raises(ValidationError):
        Inner.model_validate({"wieght": None})


def test_a_section_is_frozen() -> None:
    config = Inner()
    with pytest.raises(ValidationError):
        config.wait_s = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("raw", "got"),
    [(None, "nothing"), ([1], "a list"), ("secret", "text"), (7, "a number"), (1.5, "a number"), (True, "true")],
)
def test_what_is_no_section_is_named_but_not_repeated(raw: object, got: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Inner.model_validate(raw)
    assert messages(raised.value) == [f"expected a mapping or false, got {got}"]


def test_false_switches_a_section_off_and_true_on() -> None:
    assert Outer.model_validate({"inner": False}).inner is None
    assert Outer.model_validate({"inner": True}).inner == Inner()
    assert Outer.model_validate({"inner": {"wait": "1s"}}).inner == Inner.model_validate({"wait": "1s"})
    assert Outer.model_validate({"short": Inner()}).short == Inner()


def test_the_json_schema_is_about_the_file() -> None:
    schema = Outer.model_json_schema()
    assert schema["properties"]["inner"]["anyOf"] == [{"type": "boolean"}, {"$ref": "#/$defs/Inner"}]
    assert schema["properties"]["short"]["anyOf"] == [{"type": "string"}, {"$ref": "#/$defs/Inner"}]
    inner = schema["$defs"]["Inner"]["properties"]
    assert {key: inner[key]["default"] for key in inner} == {"wait": "5s", "idle": "off", "head": "64KiB", "share": 2}
    assert inner["share"]["minimum"] == 1


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (fields.Flag, True, True),
        (fields.Seconds, "1s", 1.0),
        (fields.SecondsOrZero, 0, 0.0),
        (fields.SecondsOrOff, "off", None),
        (fields.SecondsOrOff, False, None),
        (fields.SecondsOrOff, "1s", 1.0),
        (fields.AbsolutePath, "/a/é", Path("/a/é")),
        (fields.AbsolutePath, Path("/a/é"), Path("/a/é")),
        (fields.SocketOrFalse, False, False),
        (fields.SocketOrFalse, "/a/é", Path("/a/é")),
        (fields.SocketOrFalse, Path("/a"), Path("/a")),
        (Annotated[str, fields.text("a|bc", "letters")], "bc", "bc"),
    ],
)
def test_a_value_is_read(kind: object, raw: object, value: object) -> None:
    assert read(kind, raw) == value


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        (fields.Flag, "yes", "expected true or false, got 'yes'"),
        (fields.Flag, 1, "expected true or false, got 1"),
        (fields.Seconds, "0s", "expected a duration above 0, got '0s'"),
        (fields.SecondsOrOff, 0, "expected a duration above 0, got 0"),
        (fields.SecondsOrOff, None, "expected a duration such as 500ms, 30s, 10m, 1h or 2d, got nothing"),
        (fields.AbsolutePath, "a", "expected an absolute path, got 'a'"),
        (fields.AbsolutePath, Path("a"), "expected an absolute path, got 'a'"),
        (fields.AbsolutePath, "/a\n", "expected an absolute path, got '/a\\n'"),
        (fields.AbsolutePath, 7, "expected text, got 7; put quotes around it"),
        (
            fields.AbsolutePath,
            True,
            "expected text, got true or false (YAML reads yes, no, on, off so); put quotes around it",
        ),
        (fields.AbsolutePath, [], "expected text, got a list"),
        (fields.SocketOrFalse, "a", "expected the absolute path of a socket, as in /run/stickyproxy.sock"),
        (
            fields.SocketOrFalse,
            Path("/" + "x" * 107),
            "the path of a socket has at most 107 bytes; the kernel takes no more",
        ),
        (fields.SocketOrFalse, None, "expected text, got nothing"),
        (
            fields.SocketOrFalse,
            True,
            "expected the absolute path of a socket or false, got true; for the usual place leave it out",
        ),
        (fields.UpstreamAddress, 7, "expected text, got 7; put quotes around it"),
        (fields.ListenerAddress, 8080, "expected text, got 8080; put quotes around it"),
        (Annotated[str, fields.text("a|bc", "letters")], "ac", "expected letters, got 'ac'"),
        (ONE_TO_FIVE, 6, "expected a whole number from 1 to 5, got 6"),
        (ONE_TO_FIVE, True, "expected a whole number from 1 to 5, got true"),
        (ONE_TO_FIVE, 1.0, "expected a whole number from 1 to 5, got 1.0"),
        (ONE_TO_FIVE, "abc", "expected a whole number from 1 to 5, got 'abc'"),
        (ONE_TO_FIVE, "2", "expected a whole number from 1 to 5, got '2'; remove the quotes"),
        (Annotated[int, fields.size("1KiB", "1MiB")], "1B", "expected a size from 1KiB to 1MiB, got '1B'"),
        (Annotated[int, fields.size("1KiB", "1MiB")], "2MiB", "expected a size from 1KiB to 1MiB, got '2MiB'"),
    ],
)
def test_a_wrong_value_is_refused(kind: object, raw: object, message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        read(kind, raw)
    assert messages(raised.value) == [message]


def test_items_of_a_list_are_read_one_by_one() -> None:
    assert read_items(["1", "2"], lambda item: int(str(item)), "numbers") == (1, 2)
    with pytest.raises(ValueError, match=r"^expected numbers, got text$"):
        read_items("1", str, "numbers")
    with pytest.raises(ValidationError) as raised:
        read_items(["1s", "2", False], fields.read_seconds, "durations")
    assert [details["loc"] for details in raised.value.errors()] == [(1,), (2,)]


def test_mistakes_are_raised_at_once_with_their_text_as_it_is() -> None:
    with pytest.raises(ValidationError) as raised:
        refuse([(("a", 1), "{x} is wrong"), ((), "wrong")])
    found = [(details["type"], details["loc"], details["msg"]) for details in raised.value.errors()]
    assert found == [(fields.MISTAKE, ("a", 1), "{x} is wrong"), (fields.MISTAKE, (), "wrong")]


def test_markers_can_stand_in_a_union() -> None:
    assert hash(get_args(fields.Flag)[1]) is not None


@pytest.mark.parametrize(
    ("word", "marker", "raw", "value"),
    [
        ("off", fields.whole_number(1, 5), "off", None),
        ("off", fields.whole_number(1, 5), False, None),
        ("off", fields.whole_number(0, 5), 0, 0),
        ("auto", fields.whole_number(1, 5), "auto", None),
        ("auto", fields.whole_number(1, 5), 5, 5),
        ("off", fields.size("0B", "1MiB"), 0, 0),
    ],
)
def test_a_word_may_stand_for_no_value(word: str, marker: fields.Read, raw: object, value: object) -> None:
    assert read(Annotated[int | None, fields.or_word(word, marker)], raw) == value


@pytest.mark.parametrize(
    ("word", "raw", "got"),
    [
        ("off", "auto", "'auto'"),
        ("off", True, "true"),
        ("off", 0, "0"),
        ("auto", "off", "'off'"),
        ("auto", False, "false"),
        ("auto", ["auto"], "a list"),
    ],
)
def test_no_other_word_may(word: str, raw: object, got: str) -> None:
    with pytest.raises(ValidationError) as raised:
        read(Annotated[int | None, fields.or_word(word, fields.whole_number(1, 5))], raw)
    assert messages(raised.value) == [f"expected {word} or a whole number from 1 to 5, got {got}"]


def test_the_json_schema_of_a_list_that_one_item_may_stand_for() -> None:
    class Several(Section):
        plain: Annotated[tuple[ONE_TO_FIVE, ...], fields.OneOrMore()] = ()
        short: Annotated[tuple[Annotated[Inner, AlsoWritten({"type": "string"})], ...], fields.OneOrMore()] = ()

    properties = Several.model_json_schema()["properties"]
    number = {"type": "integer", "minimum": 1, "maximum": 5}
    assert properties["plain"]["anyOf"] == [number, {"type": "array", "items": number, "minItems": 1}]
    items = [{"type": "string"}, {"$ref": "#/$defs/Inner"}]
    assert properties["short"]["anyOf"] == [*items, {"type": "array", "items": {"anyOf": items}, "minItems": 1}]
