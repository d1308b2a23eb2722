"""Placeholders: what is found, what is filled in, and what the author of a file is told."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stickyproxy.config.placeholders import NAMES, fill, placeholders

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall
VALUES = {"port": "20000", "socket": "/run/apps/g1-1.sock", "id": "g1-1", "generation": "1"}
FORMS = r"there are {port}, {socket}, {id} and {generation}"


@pytest.mark.parametrize(
    ("text", "names", "filled"),
    [
        ("", set(), ""),
        ("main:app", set(), "main:app"),
        ("{port}", {"port"}, "20000"),
        ("--port={port}", {"port"}, "--port=20000"),
        ("unix:{socket}?x", {"socket"}, "unix:/run/apps/g1-1.sock?x"),
        ("{id}{id}/{generation}", {"id", "generation"}, "g1-1g1-1/1"),
        ("{{port}}", set(), "{port}"),
        ("{{{port}}}", {"port"}, "{20000}"),
        ("{{}}", set(), "{}"),
        ('{{"a": {{"b": {port}}}}}', {"port"}, '{"a": {"b": 20000}}'),
        ("a\n{port}\n", {"port"}, "a\n20000\n"),
        ("é\udcff{id}", {"id"}, "é\udcffg1-1"),  # the second: a byte of the command line that is no UTF-8
    ],
)
def test_names_are_found_and_filled_in(text: str, names: set[str], filled: str) -> None:
    assert placeholders(text) == names
    assert fill(text, VALUES) == filled


def test_a_value_is_not_read_for_placeholders() -> None:
    assert fill("{id}-{port}", {"id": "{port}}}{", "port": "1"}) == "{port}}}{-1"


@pytest.mark.parametrize(
    "name", ["", "Port", "PORT", " port", "port ", "HOME", "port!r", "port:d", "0", "pört", "id.x"]
)
def test_an_unknown_name_is_refused_and_the_known_ones_are_said(name: str) -> None:
    text = f"--x={{{name}}}"
    for read in (placeholders, lambda text: fill(text, VALUES | {name: "1"})):
        with pytest.raises(ValueError, match=re.escape(f"unknown placeholder '{{{name}}}': {FORMS}")):
            read(text)


@pytest.mark.parametrize(
    ("text", "brace"),
    [
        ("{", "{"),
        ("}", "}"),
        ("{port", "{"),
        ("port}", "}"),
        ("{{port}", "}"),
        ("{port}}", "}"),
        ("{{{port}}", "}"),
        ("{{{port", "{"),
        ("{po{port}", "{"),
        ('{"a": {port}}', "{"),
    ],
)
def test_a_single_brace_is_refused_and_its_double_is_said(text: str, brace: str) -> None:
    for read in (placeholders, lambda text: fill(text, VALUES)):
        with pytest.raises(ValueError, match=re.escape(f'a single "{brace}" in ')) as refused:
            read(text)
        assert f'write "{brace * 2}" for a literal brace' in str(refused.value)


@pytest.mark.parametrize("text", ["a\0b", "\0", "{port}\0"])
def test_nul_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="without NUL characters"):
        placeholders(text)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="can be written as UTF-8") as refused:
        placeholders("a\ud800")
    str(refused.value).encode()


def test_a_message_is_one_short_line() -> None:
    for text in ("{" + "x\n" * 10_000 + "}", "}" + "\n" * 10_000):
        with pytest.raises(ValueError, match="brace") as refused:
            placeholders(text)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 250


@pytest.mark.parametrize("name", NAMES)
def test_a_placeholder_without_a_value_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{{{name}}} has no value here")):
        fill(f"x{{{name}}}", {other: "1" for other in NAMES if other != name})


@UNHURRIED
@given(st.text())
@example("{{{port}}}")
def test_any_text_survives_with_its_braces_doubled(text: str) -> None:
    doubled = text.replace("{", "{{").replace("}", "}}")
    assert fill(doubled, {}) == text


@UNHURRIED
@given(st.lists(st.sampled_from([*"{}", "{{", "}}", "{port}", "port", "id", "x", "!", "\n"])))
def test_any_text_is_filled_as_python_formats_it_or_refused(pieces: list[str]) -> None:
    text = "".join(pieces)
    try:
        names = placeholders(text)
    except ValueError:
        with pytest.raises(ValueError, match="brace"):
            fill(text, VALUES)
        return
    assert fill(text, VALUES) == text.format(**VALUES)
    assert names <= set(NAMES)
