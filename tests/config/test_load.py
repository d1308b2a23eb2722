"""From a file to a Config, or to every mistake with its line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.load import MAX_FILE_BYTES, json_schema, load_file, load_text
from stickyproxy.config.schema import Config

if TYPE_CHECKING:
    from pathlib import Path

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall
TOP_LEVEL = [str(field.alias) for field in Config.model_fields.values()]


def mistakes(text: str) -> list[tuple[int | None, str, str]]:
    with pytest.raises(ConfigErrors) as raised:
        load_text(text, {})
    return [(error.line, error.path_in_file, error.message) for error in raised.value.errors]


def test_an_empty_text_gives_the_defaults() -> None:
    assert load_text("", {}) == Config()


def test_env_is_where_secrets_come_from() -> None:
    config = load_text("affinity: {secrets: ['env:NAME']}", {"NAME": "s" * 32})
    assert config.affinity.secrets == (b"s" * 32,)


EVERYTHING_WRONG = """\
listeners: [":80", {address: ":80"}]
upstreams:
  - http://127.0.0.1:8001
  - {url: "http://127.0.0.1:8001", wieght: 3}
  - url: http://127.0.0.1:8001
    weight: 1
  - url: http://127.0.0.1:8002
    weight: abc
  - ftp://127.0.0.1:8003
afinity: {}
affinity:
  cookie:
    name: "a b"
  secrets:
    - env:NOT_SET
    - short
  policy: first
  policy: random
  on_unavailable: {wait: 10}
health: {probe: {jitter: 51}}
access_log: xml
timeouts:
  head: off
  tunnel_idle: off
workers: 65
"""


def test_every_mistake_is_reported_at_once_with_its_line() -> None:
    duration = "expected a duration such as 500ms, 30s, 10m, 1h or 2d"
    assert mistakes(EVERYTHING_WRONG) == [
        (1, "listeners[1].address", ":80 is listed twice"),
        (4, "upstreams[1].wieght", "unknown key 'wieght'; did you mean 'weight'?"),
        (5, "upstreams[2].url", "127.0.0.1:8001 is listed twice; for a larger share of clients set its weight"),
        (8, "upstreams[3].weight", "expected a whole number from 1 to 256, got 'abc'"),
        (9, "upstreams[4]", "expected a URL such as http://127.0.0.1:8001 or unix:/run/app.sock"),
        (10, "afinity", "unknown key 'afinity'; did you mean 'affinity'?"),
        (
            13,
            "affinity.cookie.name",
            "expected a cookie name of 1 to 64 characters without spaces and separators, got 'a b'",
        ),
        (15, "affinity.secrets[0]", "the environment variable NOT_SET is not set"),
        (16, "affinity.secrets[1]", "a secret has at least 32 bytes, this one has 5"),
        (17, "affinity.policy", "expected least_sessions, round_robin or random, got 'first'"),
        (18, "affinity.policy", "the key 'policy' stands here twice, first in line 17"),
        (19, "affinity.on_unavailable.wait", f"{duration}, got 10; a number needs its unit (ms, s, m, h or d)"),
        (20, "health.probe.jitter", "expected a whole number from 0 to 50, got 51"),
        (21, "access_log", "expected json or combined, got 'xml'"),
        (23, "timeouts.head", f"{duration}; this cannot be switched off"),
        (25, "workers", "expected auto or a whole number from 1 to 64, got 65"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "path", "message"),
    [
        ("- a\n", 1, "", "expected a mapping of keys, got a list"),
        ("text", 1, "", "expected a mapping of keys, got text"),
        ("\n\nworkers: 1\nworkers: 1\n", 4, "workers", "the key 'workers' stands here twice, first in line 3"),
        ("on: 1\n", 1, "on", f"unknown key 'on'; known here: {', '.join(TOP_LEVEL)}"),
        ("workers: 1\n  grace: 1s\n", 2, "", "not valid YAML: mapping values are not allowed here"),
        ("upstreams:\n -\n", 2, "upstreams[0]", "expected a URL or a mapping of keys, got nothing"),
        (
            "affinity:\n  cookie:\n    name: on\n",
            3,
            "affinity.cookie.name",
            "expected text, got true or false (YAML reads yes, no, on, off so); put quotes around it",
        ),
        ("limits: {fields: .nan}", 1, "limits.fields", "expected a whole number from 1 to 10000, got '.nan'"),
        ("limits: {fields: 1e3}", 1, "limits.fields", "expected a whole number from 1 to 10000, got '1e3'"),
        (
            "grace: 2024-01-01",
            1,
            "grace",
            "expected a duration such as 500ms, 30s, 10m, 1h or 2d, got '2024-01-01'",
        ),
        ("admin:\n  address: :9090\n", 2, "admin.address", "an admin address that is not loopback needs a token"),
    ],
)
def test_one_mistake(text: str, line: int, path: str, message: str) -> None:
    assert mistakes(text) == [(line, path, message)]


def test_a_mistake_of_the_yaml_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "stickyproxy.yaml"
    path.write_text("a: [\n")
    with pytest.raises(ConfigErrors) as raised:
        load_file(path, {})
    assert raised.value.source == str(path)
    assert str(raised.value).startswith(f"{path}: line 2: not valid YAML: ")


def test_secrets_that_are_known_are_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"s" * 32)
    text = f"affinity: {{secrets: ['env:NAME', 'file:{path}']}}"
    known: dict[str, bytes] = {}
    first = load_text(text, {"NAME": "e" * 32}, known=known)
    assert known == {"env:NAME": b"e" * 32, f"file:{path}": b"s" * 32}
    path.unlink()
    assert load_text(text, {}, known=known) == first
    assert mistakes(text) == [
        (1, "affinity.secrets[0]", "the environment variable NAME is not set"),
        (1, "affinity.secrets[1]", f"cannot read {path}: No such file or directory"),
    ]


def test_a_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "stickyproxy.yaml"
    path.write_text("upstreams: ['http://a'] # é\n", encoding="utf-8")
    assert [upstream.id for upstream in load_file(path, {}).upstreams] == ["a:80"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\x00", "the file is not UTF-8: byte 1 is wrong"),
        (b"# " + b"x" * MAX_FILE_BYTES, f"the file is longer than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_a_file_that_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "stickyproxy.yaml"
    path.write_bytes(content)
    assert file_mistake(path) == message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert file_mistake(tmp_path / "missing") == "cannot read the file: No such file or directory"
    assert file_mistake(tmp_path) == "cannot read the file: Is a directory"


def file_mistake(path: Path) -> str:
    with pytest.raises(ConfigErrors) as raised:
        load_file(path, {})
    (error,) = raised.value.errors
    assert (raised.value.source, error.line, error.path_in_file) == (str(path), None, "")
    return error.message


SECRET = "correct-horse-battery"  # shorter than a secret may be: every use of it is a mistake


@pytest.mark.parametrize(
    "text",
    [
        "affinity: {secrets: [@]}",
        "affinity: {secrets: @}",
        "affinity: {secrets: {a: @}}",
        "affinity: {secrets: [[@]]}",
        "affinity: {secrets: ['env:@']}",
        "affinity: {secrets: [!@ x]}",
        "affinity: {secrets: [*@]}",
        "affinity: {secrets: [@, x: &@ y, z: &@ y]}",
        "affinity: @",
        "admin: @",
        "admin: {token: 'a @'}",
        "admin: {token: [@]}",
        "upstreams: ['http://me:@@a']",
        "upstreams: ['https://me:@@a']",
        "upstreams: ['me:@@a']",
        "websocket: {origins: ['https://me:@@a']}",
    ],
)
def test_no_error_repeats_a_secret(text: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load_text(text.replace("@", SECRET, 1).replace("@", SECRET if "&" in text else "@"), {})
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(raised.value)


def every_property(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    models = {"": schema, **schema["$defs"]}
    return {f"{name}.{key}": field for name, model in models.items() for key, field in model["properties"].items()}


def test_the_json_schema_describes_every_key() -> None:
    schema = json_schema()
    fields = every_property(schema)
    assert schema["title"] == "stickyproxy configuration"
    assert schema["additionalProperties"] is False
    assert [name for name, field in fields.items() if not (field.get("description") or "$ref" in field)] == []
    assert [name for name, model in schema["$defs"].items() if not model.get("description")] == []
    assert fields["Timeouts.head"]["default"] == "10s"
    assert fields["Limits.head"]["default"] == "128KiB"
    assert fields[".listeners"]["items"]["anyOf"] == [{"type": "string"}, {"$ref": "#/$defs/Listener"}]
    assert fields[".access_log"]["anyOf"][:2] == [{"enum": ["json", "combined"]}, {"type": "boolean"}]


def test_the_defaults_of_the_json_schema_are_the_defaults() -> None:
    for name, field in every_property(json_schema()).items():
        section, key = name.split(".")
        if section == "" and "default" in field:
            assert Config.model_validate({key: field["default"]}) == Config(), name


ALIASES = sorted({name.split(".")[1] for name in every_property(json_schema())})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(
        ["1s", "off", "auto", "1KiB", "http://a", "env:HOME", "json", "random", "127.0.0.1:1", "/x", "200"]
    ),
)
KEYS = st.sampled_from(ALIASES) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5))


def load_any(text: str) -> None:
    try:
        found = load_text(text, {"HOME": "h" * 40})
    except ConfigErrors as errors:
        lines = [error.line for error in errors.errors]
    else:
        lines = [1]
        assert isinstance(found, Config)
    assert lines
    assert all(line is not None and line >= 1 for line in lines)


@UNHURRIED
@given(st.text())
def test_any_text_is_a_config_or_its_mistakes(text: str) -> None:
    load_any(text)


@UNHURRIED
@given(st.dictionaries(st.sampled_from(TOP_LEVEL), VALUES))
def test_any_values_are_a_config_or_their_mistakes(value: object) -> None:
    load_any(as_yaml(value))


def as_yaml(value: object) -> str:
    """Write flow YAML with texts in double quotes, and plain where a person would leave the quotes out."""
    match value:
        case None:
            return "null"
        case bool():
            return "yes" if value else "off"
        case str():
            plain = value.isascii() and value.isalnum()
            return value if plain else '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
        case list():
            return "[" + ", ".join(map(as_yaml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{as_yaml(key)} : {as_yaml(item)}" for key, item in value.items()) + "}"
        case _:
            return str(value)
