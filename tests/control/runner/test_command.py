"""The command of an app process: what its placeholders stand for, and what it is told and not told."""

from __future__ import annotations

from pathlib import Path

import pytest

from stickyproxy.control.runner.command import AppCommand, Values, expand, make_command
from stickyproxy.errors import UsageError

BY_PORT = Values("g2-3", 2, port=20_001)
BY_SOCKET = Values("g2-3", 2, socket=Path("/run/apps-7/g2-3.sock"))
TOLD = {"STICKYPROXY_UPSTREAM": "g2-3", "WEB_CONCURRENCY": "1", "PYTHONUNBUFFERED": "1"}
KEPT_BACK = (
    "STICKYPROXY_SECRET",
    "STICKYPROXY_SECRET_OLD",
    "STICKYPROXY_SECRETS",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


def env_of(values: Values, environ: dict[str, str], env: dict[str, str] | None = None) -> dict[str, str]:
    return make_command(("app",), env or {}, None, values, environ).env


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("--port={port}", BY_PORT, "--port=20001"),
        ("unix:{socket}", BY_SOCKET, "unix:/run/apps-7/g2-3.sock"),
        ("{id} of {generation}", BY_PORT, "g2-3 of 2"),
        ("{{port}}", BY_PORT, "{port}"),
        ("", BY_PORT, ""),
    ],
)
def test_placeholders_stand_for_what_the_process_has(text: str, values: Values, expected: str) -> None:
    assert expand(text, values) == expected


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("{port}", BY_SOCKET, "{port} has no value here"),
        ("{socket}", BY_PORT, "{socket} has no value here"),
        ("{HOME}", BY_PORT, "unknown placeholder '{HOME}'"),
        ("{", BY_PORT, 'a single "{"'),
    ],
)
def test_what_stands_for_nothing_is_refused(text: str, values: Values, message: str) -> None:
    for refused in (
        lambda: expand(text, values),
        lambda: make_command(("app", text), {}, None, values, {}),
        lambda: make_command(("app",), {"X": text}, None, values, {}),
        lambda: make_command(("app",), {}, f"/{text}", values, {}),
    ):
        with pytest.raises(UsageError) as error:
            refused()
        assert message in str(error.value)


def test_words_environment_and_directory_are_filled_in() -> None:
    command = make_command(
        ["app", "--port", "{port}", ""], {"ROOT": "/data/{id}"}, Path("/srv/{generation}"), BY_PORT, {"HOME": "/root"}
    )
    assert command == AppCommand(
        words=("app", "--port", "20001", ""),
        env={"HOME": "/root", **TOLD, "PORT": "20001", "ROOT": "/data/g2-3"},
        cwd=Path("/srv/2"),
    )


def test_no_directory_is_that_of_the_proxy() -> None:
    assert make_command(("app",), {}, None, BY_PORT, {}).cwd is None


@pytest.mark.parametrize("name", KEPT_BACK)
def test_what_is_the_proxys_own_is_kept_back(name: str) -> None:
    assert name not in env_of(BY_PORT, {name: "1"})


@pytest.mark.parametrize("name", ["PATH", "STICKYPROXY", "STICKYPROXY_X", "NOTIFY", "LISTEN", "MY_STICKYPROXY_SECRET"])
def test_everything_else_is_inherited_as_it_is(name: str) -> None:
    """The control of the test before; placeholders are not looked for in it."""
    assert env_of(BY_PORT, {name: "{x}"})[name] == "{x}"


def test_an_app_at_a_port_is_told_it_and_no_more_than_that() -> None:
    environ = {"PORT": "8080", "WEB_CONCURRENCY": "4", "STICKYPROXY_UPSTREAM": "g1-1"}
    assert env_of(BY_PORT, environ) == TOLD | {"PORT": "20001"}


def test_an_app_at_a_socket_believes_who_can_reach_it() -> None:
    assert env_of(BY_SOCKET, {}) == TOLD | {"FORWARDED_ALLOW_IPS": "*"}
    assert "FORWARDED_ALLOW_IPS" not in env_of(BY_PORT, {})


@pytest.mark.parametrize(("name", "text"), [("PYTHONUNBUFFERED", ""), ("FORWARDED_ALLOW_IPS", "192.0.2.1")])
def test_a_default_gives_way_to_what_is_set(name: str, text: str) -> None:
    assert env_of(BY_SOCKET, {name: text})[name] == text


@pytest.mark.parametrize("name", ["PORT", "WEB_CONCURRENCY", "STICKYPROXY_UPSTREAM", "NOTIFY_SOCKET", "PATH"])
def test_the_file_has_the_last_word(name: str) -> None:
    assert env_of(BY_PORT, {name: "inherited"}, {name: "{id}!"})[name] == "g2-3!"


def test_the_environment_that_was_given_stays_as_it_is() -> None:
    environ = {"PATH": "/bin", "LISTEN_FDS": "1"}
    env_of(BY_PORT, environ, {"PATH": "/x"})
    assert environ == {"PATH": "/bin", "LISTEN_FDS": "1"}


def test_its_text_shows_no_secret() -> None:
    assert "hidden" not in repr(make_command(("app",), {"TOKEN": "hidden"}, None, BY_PORT, {"KEY": "hidden"}))
