"""What the file would say: each value is written so that it is read as the same again, secrets apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from stickyproxy.config import fields
from stickyproxy.config.address import parse_listener, parse_upstream_url
from stickyproxy.config.fields import OrFalse, Section
from stickyproxy.config.health import StatusRange
from stickyproxy.config.keys import AffinityKey, KeyLesson
from stickyproxy.config.listener import Listener
from stickyproxy.config.load import load_text
from stickyproxy.config.run import Command, PortRange, Processes, Run
from stickyproxy.config.schema import Admin, Config
from stickyproxy.config.tls import Certificate
from stickyproxy.config.trust import TrustedProxies, read_trusted_proxies
from stickyproxy.config.units import MAX_DURATION_S
from stickyproxy.config.upstream import Upstream
from stickyproxy.config.written import (
    describe_item,
    is_secret,
    is_whole,
    items_of,
    name_item,
    write_section,
    write_value,
)
from tests.config.every_key import ROWS, RUN_ROWS, RUN_TEXT, Row, config_with

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall


class Inner(Section):
    wait_s: fields.Seconds = 5.0
    needed: int


class Every(Section):
    wait_s: fields.SecondsOrOff = 10.0
    age_s: fields.Seconds | None = None
    head_bytes: Annotated[int | None, fields.or_word("auto", fields.size("1B", "1GiB"))] = 1
    share_percent: Annotated[int, fields.whole_number(0, 100)] = 0
    flag: fields.Flag = False
    word: Literal["a", "b"] = "a"
    text: str = ""
    place: fields.SocketOrFalse | None = None
    origins: tuple[str, ...] = ()
    inner: OrFalse[Inner] = None
    listener: fields.ListenerAddress = parse_listener(":80")
    upstream: fields.UpstreamAddress = Field(default=parse_upstream_url("http://a"), alias="url")


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("wait_s", 90.0, "90s"),
        ("wait_s", None, "off"),
        ("age_s", 3600.0, "1h"),
        ("age_s", None, "null"),
        ("head_bytes", 65536, "64KiB"),
        ("head_bytes", None, "auto"),
        ("share_percent", 10, "10"),
        ("flag", True, "true"),
        ("flag", False, "false"),
        ("word", "b", "b"),
        ("text", "a", "a"),
        ("text", "a, b", "a, b"),
        ("text", "a: b", "'a: b'"),
        ("text", "null", "'null'"),
        ("text", "1.2", "'1.2'"),
        ("text", "", "''"),
        ("text", "a\nb\x1b[0m é", '"a\\nb\\e[0m \\xE9"'),
        ("text", "x " * 200, f"'{'x ' * 200}'"),
        ("place", Path("/x"), "/x"),
        ("place", False, "false"),
        ("place", None, "null"),
        ("origins", ("x y " * 40, "b"), f"['{'x y ' * 40}', b]"),
        ("inner", None, "false"),
        ("inner", Inner.model_validate({"needed": 1}), "{needed: 1}"),
        ("inner", Inner.model_validate({"needed": 1, "wait": "1s"}), "{wait: 1s, needed: 1}"),
        ("listener", parse_listener("127.0.0.1:1"), "127.0.0.1:1"),
        ("listener", parse_listener("[::1]:1"), "'[::1]:1'"),
        ("upstream", parse_upstream_url("https://a"), "https://a:443"),
    ],
)
def test_a_value_is_written_as_in_the_file(name: str, value: object, written: str) -> None:
    assert write_value(Every().model_copy(update={name: value}), name) == written


def test_a_section_is_written_without_its_defaults() -> None:
    assert write_section(Every()) == "{}"
    every = Every().model_copy(update={"text": "a, b", "wait_s": None, "upstream": parse_upstream_url("unix:/x")})
    assert write_section(every) == "{wait: off, text: 'a, b', url: 'unix:/x'}"


def test_true_stands_for_a_section_that_false_switches_off() -> None:
    assert write_value(Config(), "admin") == "true"
    assert write_value(Config(), "affinity") == "{}"
    assert write_value(load_text("admin: false", {}), "admin") == "false"


def test_a_secret_is_not_shown() -> None:
    config = load_text(
        "{admin: {token: first-secret-here}, affinity: {secrets: [first-secret-here-0123456789-0123]}}", {}
    )
    assert config.admin is not None
    assert write_value(config.admin, "token") == "(not shown)"
    assert write_value(config.affinity, "secrets") == "(not shown)"
    assert "first-secret" not in write_section(config)


def test_the_secrets_are_the_token_the_keys_that_sign_and_the_environment() -> None:
    assert secrets_of(Config) == []
    assert secrets_of(Admin) == ["token"]
    assert secrets_of(type(Config().affinity)) == ["secrets"]
    assert secrets_of(Run) == ["env"]


def secrets_of(section: type[Section]) -> list[str]:
    known: dict[str, FieldInfo] = section.model_fields
    return [name for name, field in known.items() if is_secret(field)]


NOT_AS_THEY_ARE = {("affinity", "secrets"), ("admin", "token"), ("presets",)}  # presets bring keys when they are read
PUBLIC_ROWS = [row for row in ROWS if row.path not in NOT_AS_THEY_ARE]
SOME_ROWS = st.sets(st.sampled_from(range(len(PUBLIC_ROWS)))).map(
    lambda found: [PUBLIC_ROWS[number] for number in found]
)


@UNHURRIED
@given(SOME_ROWS)
def test_a_configuration_that_was_written_is_read_as_the_same(rows: list[Row]) -> None:
    config = without_secrets(config_with(rows))
    assert load_text(write_section(config), {}) == config


RUN_TEXT_WITHOUT_ENV = "\n".join(line for line in RUN_TEXT.splitlines() if "env:" not in line)
PUBLIC_RUN_ROWS = [row for row in RUN_ROWS if row.path != ("run", "env")]


@UNHURRIED
@given(st.sets(st.sampled_from(range(len(PUBLIC_RUN_ROWS)))))
def test_what_was_written_of_run_is_read_as_the_same(numbers: set[int]) -> None:
    config = config_with([PUBLIC_RUN_ROWS[number] for number in sorted(numbers)], RUN_TEXT_WITHOUT_ENV)
    assert load_text(write_section(config), {}) == config


WORDS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0{}"), min_size=1), min_size=1)


@UNHURRIED
@given(WORDS, st.floats(0.01, 10_000), st.integers(1, 256))
def test_values_of_run_are_read_as_the_same(words: list[str], pace: float, processes: int) -> None:
    config = Config.model_validate({"run": {"command": words, "pace": pace, "processes": processes}})
    assert load_text(write_section(config), {}) == config


def test_which_section_is_one_value_in_the_file() -> None:
    assert is_whole(Processes(min=4, max=4))
    for other in (Processes(min=4, max=5), Processes(min=4, max=4, sessions_each=1), Config(), 4, None):
        assert not is_whole(other)


def without_secrets(config: Config) -> Config:
    assert config.admin is not None
    affinity = config.affinity.model_copy(update={"secrets": ()})
    return config.model_copy(update={"affinity": affinity, "admin": config.admin.model_copy(update={"token": None})})


ORIGINS = ["same-host", "absent", "null", "https://*.example.org", "http://[::1]:8000"]


@UNHURRIED
@given(
    st.floats(0.001, MAX_DURATION_S),
    st.lists(st.sampled_from(ORIGINS), min_size=1),
    st.text(st.characters(min_codepoint=0x20, exclude_characters="\x7f", codec="utf-8")),
)
def test_values_of_many_kinds_are_read_as_the_same(wait_s: float, origins: list[str], path: str) -> None:
    wait_s = round(wait_s, 3)
    raw = {
        "affinity": {"on_unavailable": {"wait": f"{wait_s:.3f}s"}},
        "websocket": {"origins": origins},
        "access_log": {"path": f"/{path}"},
        "state_directory": f"/{path}",
    }
    config = Config.model_validate(raw)
    assert load_text(write_section(config), {}) == config


@pytest.mark.parametrize(
    ("value", "items"),
    [
        (("a", "b"), ("a", "b")),
        ((), ()),
        (read_trusted_proxies(["unix"]), ("unix",)),
        (TrustedProxies(), ()),
        (StatusRange(200, 399), None),
        (PortRange(20000, 29999), None),
        (Command(["a", "b"]), None),
        ("text", None),
        (None, None),
    ],
)
def test_what_is_a_list_in_the_file(value: object, items: object) -> None:
    assert items_of(value) == items


@pytest.mark.parametrize(
    ("item", "name", "description"),
    [
        (Upstream.model_validate("http://a"), "a:80", "http://a:80"),
        (Upstream.model_validate({"id": "x", "url": "unix:/a", "weight": 2}), "x", "unix:/a, weight: 2"),
        (Listener.model_validate(":80"), ":80", ""),
        (Listener.model_validate({"address": ":80", "proxy_protocol": True}), ":80", "proxy_protocol: true"),
        (Certificate.model_validate("/a.pem"), "/a.pem", ""),
        (Certificate.model_validate({"certificate": "/a.pem", "key": "/a: b"}), "/a.pem", "key: '/a: b'"),
        (AffinityKey.model_validate({"mode": "hash", "query": "q"}), "query q", "mode: hash, query: [q]"),
        (
            AffinityKey.model_validate({"name": "k", "mode": "learn", "header": "X", "idle": "1h"}),
            "k",
            "mode: learn, header: [X], idle: 1h",
        ),
        (KeyLesson.model_validate({"in": "request", "json": "a: b"}), "request", "in: request, json: 'a: b'"),
        (KeyLesson.model_validate({"header": "X"}), "X", "header: X"),
        (KeyLesson.model_validate({"cookie": "c"}), "c", "cookie: c"),
        (StatusRange(200, 200), "200", ""),
        (StatusRange(200, 399), "200-399", ""),
        (read_trusted_proxies(["::1"]).networks[0], "::1/128", ""),
        ("same-host", "same-host", ""),
    ],
)
def test_an_item_has_a_name_and_a_description(item: object, name: str, description: str) -> None:
    assert (name_item(item), describe_item(item)) == (name, description)
