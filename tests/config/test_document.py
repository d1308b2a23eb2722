"""YAML to plain values with their lines, and every way in which it can be no YAML."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.config.document import MAX_DEPTH, MAX_VALUES, read_document
from stickyproxy.config.errors import ConfigErrors

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall


def test_each_value_has_the_line_of_its_key_or_item() -> None:
    document = read_document("a: 1\nb:\n  - x\n  - c: y\n    d: {e:\n      z}\n")
    assert document.value == {"a": 1, "b": ["x", {"c": "y", "d": {"e": "z"}}]}
    assert document.lines == {
        (): 1,
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 1): 4,
        ("b", 1, "c"): 4,
        ("b", 1, "d"): 5,
        ("b", 1, "d", "e"): 5,
    }


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~", "null", "\ufeff"])
def test_nothing_is_an_empty_mapping(text: str) -> None:
    assert read_document(text).value == {}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("0", 0),
        ("1.5", 1.5),
        ("yes", True),
        ("Off", False),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("10:30", "10:30"),
        (".nan", ".nan"),
        ("1e5", "1e5"),
        ("9" * 5000, "9" * 5000),
        ("=", "="),
        ("'7'", "7"),
        ("!!str 7", "7"),
        ("!!int x", "x"),
        ("!!bool maybe", "maybe"),
        ("&a [1]", [1]),
    ],
)
def test_scalars_are_read_without_surprises(written: str, value: object) -> None:
    document = read_document(f"a: {written}")
    assert document.value == {"a": value}
    assert document.mistakes == ()


def test_keys_are_text_as_written() -> None:
    assert read_document("on: 1\n2: 3\n~: 4\n").value == {"on": 1, "2": 3, "~": 4}


def test_an_alias_stands_for_its_anchor() -> None:
    assert read_document("a: &x {b: 1}\nc: [*x, *x]").value == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 'x\n", 3, "found unexpected end of stream"),
        ("a: 1\n\tb: 2\n", 2, "a tab where a space belongs; YAML indents with spaces"),
        ("a: b: c", 1, "mapping values are not allowed here"),
        ("a:\n  b: 1\n c: 2\n", 3, "expected <block end>, but found '<block mapping start>'"),
        ("a: 1\nb: \x01\n", 2, "the character U+0001 may not stand in YAML"),
        ("a: 1\n---\nb: 2\n", 2, "a second document begins; a configuration is one document"),
        ('a: "\\UFFFFFFFF"', 1, "a number or an escape that is out of range"),
        ('a: "\\U00110000"', 1, "a number or an escape that is out of range"),
        ("a: &x 1\nb: &x 2", 2, "an anchor (&name) that was given before"),
        ("a:\n - &x [*x]", 2, "an alias that stands inside its own anchor"),
        ("a: " + "[" * (MAX_DEPTH + 5) + "]" * (MAX_DEPTH + 5), 1, "values nest deeper than 50 levels"),
        ("a:\n " + "[" * 5000, 2, "values nest deeper than 50 levels"),
        ("a:\n " + "{x: " * 5000, 2, "values nest deeper than 50 levels"),
        ("[" + "x," * MAX_VALUES + "]", 1, f"more than {MAX_VALUES} values, with aliases written out"),
    ],
)
def test_what_is_no_yaml_is_one_error_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        read_document(text)
    (error,) = raised.value.errors
    assert (error.path_in_file, error.line, error.message) == ("", line, f"not valid YAML: {message}")


@pytest.mark.parametrize("written", ["*hunter2", "!hunter2!x y", "%TAG !hunter2! a\n%TAG !hunter2! a\n--- 1"])
def test_text_of_the_file_is_not_repeated(written: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        read_document(written)
    assert "hunter2" not in str(raised.value)


def test_aliases_that_unfold_without_end_are_refused() -> None:
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    with pytest.raises(ConfigErrors, match="more than 100000 values"):
        read_document(laughs)


@pytest.mark.parametrize(
    ("text", "value", "line", "path", "message"),
    [
        ("b:\n  a: 1\n  a: 2\n", {"b": {"a": 1}}, 3, "b.a", "the key 'a' stands here twice, first in line 2"),
        ("x: 1\n? [a]\n: 1\n", {"x": 1}, 2, "", "a key must be text"),
        (
            "a: &x {b: 1}\nc:\n  <<: *x\n",
            {"a": {"b": 1}, "c": {}},
            3,
            "c",
            "merge keys (<<) are not read; write it out",
        ),
        (
            "a: !secret x",
            {"a": "x"},
            1,
            "a",
            "tags (!name) are not read; text that begins with ! needs quotes",
        ),
        ("a: !!python/name:os.system []", {"a": []}, 1, "a", "tags (!name) are not read"),
        ("a: !!set {}", {"a": {}}, 1, "a", "tags (!name) are not read"),
        ('a: "\\ud800"', {"a": None}, 1, "a", "half of a surrogate pair is not text"),
    ],
)
def test_a_fault_with_a_value_to_go_on_with_is_reported_beside_it(
    text: str, value: object, line: int, path: str, message: str
) -> None:
    document = read_document(text)
    assert document.value == value
    (error,) = document.mistakes
    assert (error.path_in_file, error.line, error.message) == (path, line, message)


YAML_ALPHABET = st.sampled_from(
    [*"ab01:-[]{}&*!%|>'\"\\#?,@ \n\t~<=", "- ", ": ", "\n  ", "---\n", "\\U", "!!", "<<: "]
)


@UNHURRIED
@given(st.lists(YAML_ALPHABET).map("".join) | st.text())
def test_any_text_is_a_document_or_one_error(text: str) -> None:
    lines: list[int | None]
    try:
        lines = list(read_document(text).lines.values())
    except ConfigErrors as errors:
        lines = [error.line for error in errors.errors]
        assert_one(errors)
    assert all(line is not None and line >= 1 for line in lines)


def assert_one(errors: ConfigErrors) -> None:
    assert len(errors.errors) == 1
