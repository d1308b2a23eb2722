"""The section `run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stickyproxy.config.difference import find_changes
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.explain import explain
from stickyproxy.config.health import StatusRange
from stickyproxy.config.load import load_text
from stickyproxy.config.run import (
    Command,
    PortRange,
    Processes,
    Ready,
    Reload,
    Run,
    Stop,
    read_command,
    read_pace,
    read_ports,
    write_pace,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall

PLACEHOLDERS = 'there are {port}, {socket}, {id} and {generation}; write "{{" for a literal brace'


def read(**keys: object) -> Run:
    return Run.model_validate({"command": "app", **keys})


def mistakes(**keys: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        read(**keys)
    return list(explain(raised.value, Run))


def mistakes_in(text: str) -> list[tuple[int | None, str, str]]:
    with pytest.raises(ConfigErrors) as raised:
        load_text(text, {})
    return [(error.line, error.path_in_file, error.message) for error in raised.value.errors]


def test_a_command_is_enough() -> None:
    run = read()
    assert run.command == ("app",)
    assert run.processes == Processes(min=1, max=1)
    assert (run.env, run.cwd, run.ports) == ({}, None, PortRange(20000, 29999))
    assert run.ready == Ready()
    assert (run.ready.path, run.ready.timeout_s, run.ready.expect) == (None, 60.0, (StatusRange(200, 399),))
    assert (run.restart, run.stop) == ("always", Stop())
    assert (run.stop.signal, run.stop.timeout_s) == ("TERM", 10.0)
    assert (run.max_memory_bytes, run.max_age_s, run.drain_timeout_s, run.pace_per_s) == (None, None, 1800.0, 20.0)
    assert run.reload is None
    assert not run.uses_port
    assert not run.uses_socket


def test_a_key_with_nothing_after_it_has_its_default() -> None:
    assert read(**{str(field.alias): None for name, field in Run.model_fields.items() if name != "command"}) == read()


def test_the_command_is_needed() -> None:
    assert mistakes_in("\nrun:\n  processes: 4\n") == [(2, "run", "the key 'command' is missing")]
    assert mistakes_in("run: {command: }") == [(1, "run", "the key 'command' is missing")]
    assert mistakes_in("run: app") == [(1, "run", "expected a mapping of keys, got text")]
    assert load_text("run:\n", {}).run is None


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("app", ["app"]),
        ("  uvicorn main:app\n --port {port} ", ["uvicorn", "main:app", "--port", "{port}"]),
        ("app 'a b' \"c d\" e\\ f '' #g", ["app", "a b", "c d", "e f", "", "#g"]),
        ("app $HOME | a && b", ["app", "$HOME", "|", "a", "&&", "b"]),
        ("app --a \\\n  --b c\\\nd", ["app", "--a", "--b", "cd"]),
        ("app 'a\\\nb' \\\\ \"it's\"", ["app", "a\\\nb", "\\", "it's"]),
        (["app", "a b", "", "{port}"], ["app", "a b", "", "{port}"]),
        (["app", "{{literal}}"], ["app", "{{literal}}"]),
        (Command(["app", "a b"]), ["app", "a b"]),
    ],
)
def test_a_command_is_text_or_words(written: object, words: list[str]) -> None:
    assert read(command=written).command == tuple(words)


@pytest.mark.parametrize(
    ("written", "path", "message"),
    [
        ("", (), "expected at least one word, the program; got none"),
        (" \n ", (), "expected at least one word, the program; got none"),
        ([], (), "expected at least one word, the program; got none"),
        (["", "a"], (), "expected a program as the first word, got an empty one"),
        ("'' a", (), "expected a program as the first word, got an empty one"),
        (
            "app 'a",
            (),
            'a quote that is not closed in "app \'a"; where quoting is hard, write a list of words',
        ),
        ("app \\", (), "a backslash at the end in 'app \\\\'; where quoting is hard, write a list of words"),
        (7, (), "expected text or a list of words, got a number"),
        ({"a": "b"}, (), "expected text or a list of words, got a mapping"),
        (["app", 8000], (1,), "expected text, got 8000; put quotes around it"),
        (["app", ["a"]], (1,), "expected text, got a list"),
        (["app", None], (1,), "expected text, got nothing"),
        (["app", "{prot}"], (1,), f"unknown placeholder '{{prot}}': {PLACEHOLDERS}"),
        ("app --port {prot}", (), f"unknown placeholder '{{prot}}': {PLACEHOLDERS}"),
        ("app ${HOME}", (), f"unknown placeholder '{{HOME}}': {PLACEHOLDERS}"),
        ("app {}", (), f"unknown placeholder '{{}}': {PLACEHOLDERS}"),
        ("app {port", (), 'a single "{" in \'{port\': write "{{" for a literal brace'),
        ("app port}", (), 'a single "}" in \'port}\': write "}}" for a literal brace'),
        (["app", "a\0"], (1,), "expected a text without NUL characters, got 'a\\x00'"),
    ],
)
def test_what_is_no_command(written: object, path: tuple[int, ...], message: str) -> None:
    assert mistakes(command=written) == [(("command", *path), message)]


WORDS = st.lists(st.text(st.characters(exclude_characters="\0{}", codec="utf-8")) | st.sampled_from(["{port}", "{{"]))


@UNHURRIED
@given(WORDS)
@example(["\\\n", "'\\\n", '"\\\n', "a\\", "é\u2028"])
def test_a_command_that_was_written_is_read_as_the_same(rest: list[str]) -> None:
    command = read_command(["app", *rest])
    assert read_command(str(command)) == command


@UNHURRIED
@given(st.lists(st.sampled_from([*"ab '\"\\\n{}$#\0", "{port}", "{{"])).map("".join) | st.text())
def test_any_text_is_a_command_or_refused(text: str) -> None:
    try:
        command = read_command(text)
    except ValueError:
        return
    assert command[0]


@pytest.mark.parametrize(
    ("keys", "uses_port", "uses_socket"),
    [
        ({"command": "app {port}"}, True, False),
        ({"command": "app {socket}"}, False, True),
        ({"command": ["app", "--x={id}"]}, False, False),
        ({"command": "app {{port}} {{socket}}"}, False, False),
        ({"env": {"A": "{port}"}}, True, False),
        ({"env": {"A": "x", "B": "unix:{socket}"}}, False, True),
        ({"cwd": "/srv/{port}"}, True, False),
        ({"command": "app {port}", "env": {"A": "{port}"}, "cwd": "/srv/{id}"}, True, False),
    ],
)
def test_where_it_listens(keys: dict[str, object], *, uses_port: bool, uses_socket: bool) -> None:
    run = read(**keys)
    assert (run.uses_port, run.uses_socket) == (uses_port, uses_socket)


TOGETHER = "{port} and {socket} together: an app process listens at one of them"


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"command": ["app", "{port}", "x", "{socket}"]}, ("command", 3)),
        ({"command": ["app", "{port}{socket}", "{socket}"]}, ("command", 1)),
        ({"command": "app {socket}", "env": {"A": "x", "B": "{port}", "C": "{port}"}}, ("env", "B")),
        ({"env": {"A": "{socket}"}, "cwd": "/{port}"}, ("cwd",)),
    ],
)
def test_an_app_process_listens_at_one_place(keys: dict[str, object], path: tuple[str | int, ...]) -> None:
    assert mistakes(**keys) == [(path, TOGETHER)]


def test_the_mistake_about_two_places_has_the_line_of_the_second() -> None:
    text = "run:\n  command:\n    - app\n    - '{port}'\n    - '{socket}'\n"
    assert mistakes_in(text) == [(5, "run.command[2]", TOGETHER)]
    assert mistakes_in("run:\n  command: app {port} {socket}\n") == [(2, "run.command", TOGETHER)]


@pytest.mark.parametrize(
    ("raw", "expected", "is_fixed"),
    [
        (1, Processes(min=1, max=1), True),
        (256, Processes(min=256, max=256), True),
        ({"min": 2, "max": 2}, Processes(min=2, max=2), True),
        ({"min": 2, "max": 8}, Processes(min=2, max=8), False),
        ({"min": 2, "max": 2, "sessions_each": 50}, Processes(min=2, max=2, sessions_each=50), False),
        ({"min": 1, "max": 256, "sessions_each": None}, Processes(min=1, max=256), False),
    ],
)
def test_processes(raw: object, expected: Processes, *, is_fixed: bool) -> None:
    assert read(processes=raw).processes == expected
    assert expected.is_fixed is is_fixed


NUMBER = "expected a whole number from 1 to 256"


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        (0, (), f"{NUMBER}, got 0"),
        (-1, (), f"{NUMBER}, got -1"),
        (10_000, (), f"{NUMBER}, got 10000"),
        (1.0, (), f"{NUMBER}, got 1.0"),
        ("4", (), f"{NUMBER}, got '4'; remove the quotes"),
        ("auto", (), f"{NUMBER}, got 'auto'"),
        (True, (), "expected a number or {min: 2, max: 8, sessions_each: 50}, got true"),
        ([2, 8], (), "expected a number or {min: 2, max: 8, sessions_each: 50}, got a list"),
        ({"min": 2}, (), "the key 'max' is missing"),
        ({"min": 0, "max": 2}, ("min",), f"{NUMBER}, got 0"),
        ({"min": 1, "max": 257}, ("max",), f"{NUMBER}, got 257"),
        ({"min": 3, "max": 2}, ("max",), "expected at least min, which is 3; got 2"),
        ({"min": 1, "max": 2, "sessions_each": 0}, ("sessions_each",),
         "expected a whole number from 1 to 1000000, got 0"),
        ({"min": 1, "max": 2, "session_each": 9}, ("session_each",),
         "unknown key 'session_each'; did you mean 'sessions_each'?"),
    ],
)  # fmt: skip
def test_wrong_processes(raw: object, path: tuple[str, ...], message: str) -> None:
    assert mistakes(processes=raw) == [(("processes", *path), message)]


def test_the_environment() -> None:
    run = read(env={"A": "1", "B_b": "", "é.x": "{id} = {{}}", "C": "yes\n"})
    assert run.env == {"A": "1", "B_b": "", "é.x": "{id} = {{}}", "C": "yes\n"}
    assert "yes" not in repr(run)
    with pytest.raises(TypeError):
        run.env["A"] = "2"  # type: ignore[index]


NAME = 'expected the name of an environment variable: not empty, without "=" and control characters'
VALUE = (
    'expected text with no placeholders but {port}, {socket}, {id} and {generation}, with "{{" and "}}" for literal '
    "braces, without NUL characters"
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("", "x", NAME),
        ("A=B", "x", NAME),
        ("A\0", "x", NAME),
        ("A\n", "x", NAME),
        ("A", 8000, "expected text, got a number; put quotes around it"),
        ("A", 0.5, "expected text, got a number; put quotes around it"),
        ("A", True, "expected text, got true or false (YAML reads yes, no, on, off so); put quotes around it"),
        ("A", None, 'expected text, got nothing; write "" for an empty value'),
        ("A", ["x"], "expected text, got a list"),
        ("A", {"x": "y"}, "expected text, got a mapping"),
        ("A", "{prot}", VALUE),
        ("A", '{"json": 1}', VALUE),
        ("A", "a\0", VALUE),
    ],
)
def test_a_wrong_environment(name: str, value: object, message: str) -> None:
    assert mistakes(env={"OK": "x", name: value}) == [(("env", name), message)]


def test_all_mistakes_of_the_environment_come_at_once_with_their_lines() -> None:
    text = "run:\n  command: app\n  env:\n    A: 1\n    B=: x\n    C: '{d}'\n"
    assert [(line, path) for line, path, _ in mistakes_in(text)] == [
        (4, "run.env.A"),
        (5, "run.env.B="),
        (6, "run.env.C"),
    ]
    assert mistakes(env=["A=1"]) == [(("env",), "expected a mapping of names to texts, got a list")]
    assert mistakes(env="A=1") == [(("env",), "expected a mapping of names to texts, got text")]


@pytest.mark.parametrize("value", ["{hunter2}", "hunter2}", "hunter2\0", "1234567", "[hunter2]"])
def test_no_message_repeats_a_value_of_the_environment(value: str) -> None:
    text = f"run: {{command: app, env: {{A: {value if value[0] in '1[' else repr(value)}}}}}"
    text = text.replace("'hunter2\\x00'", '"hunter2\\0"')
    found = str(mistakes_in(text))
    assert "hunter2" not in found
    assert "1234567" not in found


def test_the_working_directory() -> None:
    assert read(cwd="/srv/{id}").cwd == Path("/srv/{id}")
    assert read(cwd=Path("/srv")).cwd == Path("/srv")
    assert mistakes(cwd="srv") == [(("cwd",), "expected an absolute path, got 'srv'")]
    assert mistakes(cwd="/srv/{name}") == [(("cwd",), f"unknown placeholder '{{name}}': {PLACEHOLDERS}")]


def test_ports() -> None:
    assert read_ports("1024-65535") == PortRange(1024, 65535)
    assert read(ports="20000-20000").ports == PortRange(20000, 20000)
    assert read(ports=PortRange(1024, 1025)).ports == PortRange(1024, 1025)
    assert str(PortRange(20000, 29999)) == "20000-29999"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("29999-20000", "expected the lower port first, got '29999-20000'"),
        ("1023-2000", "expected ports from 1024 to 65535, got '1023-2000'"),
        ("20000-65536", "expected ports from 1024 to 65535, got '20000-65536'"),
        ("20000", "expected a range of ports such as 20000-29999, got '20000'"),
        ("20000 - 29999", "expected a range of ports such as 20000-29999, got '20000 - 29999'"),
        ("\uff120000-29999", "expected a range of ports such as 20000-29999, got '\uff120000-29999'"),
        (20000, "expected a range of ports such as 20000-29999, got 20000"),
        ([20000, 29999], "expected a range of ports such as 20000-29999, got a list"),
    ],
)
def test_wrong_ports(raw: object, message: str) -> None:
    assert mistakes(ports=raw) == [(("ports",), message)]


def test_ready() -> None:
    assert read(ready="/healthz?full=1").ready == Ready(path="/healthz?full=1")
    ready = read(ready={"path": "/", "timeout": "2m", "expect": [200, "300-399"]}).ready
    assert (ready.path, ready.timeout_s) == ("/", 120.0)
    assert ready.expect == (StatusRange(200, 200), StatusRange(300, 399))
    assert [status for status in (199, 200, 201, 300, 399, 400) if ready.expects(status)] == [200, 300, 399]
    assert read(ready={"path": None, "timeout": "1s"}).ready.path is None


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        (False, (), "expected a path or a mapping of keys, got false"),
        ("healthz", ("path",), "expected a path that begins with \"/\", without spaces, got 'healthz'"),
        ({"timeout": 60}, ("timeout",),
         "expected a duration such as 500ms, 30s, 10m, 1h or 2d, got 60; a number needs its unit (ms, s, m, h or d)"),
        ({"timeout": 0}, ("timeout",), "expected a duration above 0, got 0"),
        ({"expect": 200}, ("expect",), "expect needs path: without it only a connection is made, which has no status"),
        ({"path": "/", "expect": "2xx"}, ("expect",),
         'expected a status such as 200 or a range such as "200-399", got \'2xx\''),
    ],
)  # fmt: skip
def test_wrong_ready(raw: object, path: tuple[str, ...], message: str) -> None:
    assert mistakes(ready=raw) == [(("ready", *path), message)]


def test_a_mistake_in_a_short_form_has_its_line() -> None:
    text = "run:\n  command: app\n  ready: healthz\n  processes: 0\n"
    assert [(line, path) for line, path, _ in mistakes_in(text)] == [(3, "run.ready"), (4, "run.processes")]


@pytest.mark.parametrize("word", ["always", "on_failure", "never"])
def test_restart(word: str) -> None:
    assert read(restart=word).restart == word


@pytest.mark.parametrize("signal", ["TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL"])
def test_stop(signal: str) -> None:
    stop = read(stop={"signal": signal, "timeout": 0}).stop
    assert (stop.signal, stop.timeout_s) == (signal, 0.0)


@pytest.mark.parametrize(
    ("key", "raw", "path", "message"),
    [
        ("restart", "on-failure", (), "expected always, on_failure or never, got 'on-failure'"),
        ("restart", False, (), "expected always, on_failure or never, got false"),
        ("stop", "TERM", (), "expected a mapping of keys, got text"),
        ("stop", {"signal": "SIGTERM"}, ("signal",),
         "expected TERM, INT, QUIT, HUP, USR1, USR2 or KILL, got 'SIGTERM'"),
        ("stop", {"signal": 15}, ("signal",), "expected TERM, INT, QUIT, HUP, USR1, USR2 or KILL, got 15"),
        ("stop", {"timeout": "off"}, ("timeout",),
         "expected a duration such as 500ms, 30s, 10m, 1h or 2d; this cannot be switched off"),
        ("max_memory", "1KiB", (), "expected off or a size from 1MiB to 1024GiB, got '1KiB'"),
        ("max_memory", 0, (), "expected off or a size from 1MiB to 1024GiB, got 0"),
        ("max_memory", 512, (),
         "expected off or a size such as 512B, 64KiB or 1MiB, got 512; a number needs its unit (B, KiB, MiB or GiB)"),
        ("max_age", 0, (), "expected a duration above 0, got 0"),
        ("drain_timeout", 0, (), "expected a duration above 0, got 0"),
        ("processses", 4, (), "unknown key 'processses'; did you mean 'processes'?"),
    ],
)  # fmt: skip
def test_wrong_care(key: str, raw: object, path: tuple[str, ...], message: str) -> None:
    assert mistakes(**{key: raw}) == [((key, *path), message)]


@pytest.mark.parametrize("off", ["off", False])
def test_what_can_be_off(off: object) -> None:
    run = read(max_memory=off, max_age=off, drain_timeout=off)
    assert (run.max_memory_bytes, run.max_age_s, run.drain_timeout_s) == (None, None, None)


def test_limits_of_an_app_process() -> None:
    run = read(max_memory="2GiB", max_age="7d", drain_timeout="90s")
    assert (run.max_memory_bytes, run.max_age_s, run.drain_timeout_s) == (2 << 30, 7 * 86400.0, 90.0)


@pytest.mark.parametrize(
    ("raw", "pace", "written"),
    [
        ("20/s", 20.0, "20/s"),
        ("0.5/s", 0.5, "0.5/s"),
        ("20", 20.0, "20/s"),
        (20, 20.0, "20/s"),
        (0.01, 0.01, "0.01/s"),
        (10_000, 10_000.0, "10000/s"),
    ],
)
def test_pace(raw: object, pace: float, written: str) -> None:
    assert read(pace=raw).pace_per_s == pace
    assert write_pace(pace) == written


@pytest.mark.parametrize(
    ("raw", "got"),
    [
        (0, "0"),
        (-1, "-1"),
        (10_001, "10001"),
        (10**400, "1" + "0" * 59 + "..."),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "true"),
        (False, "false"),
        ("0/s", "'0/s'"),
        ("20/m", "'20/m'"),
        ("20 /s", "'20 /s'"),
        ("٢/s", "'٢/s'"),
        ("off", "'off'"),
        ([], "a list"),
    ],
)
def test_wrong_pace(raw: object, got: str) -> None:
    message = f"expected a pace such as 20/s, from 0.01/s to 10000/s; got {got}"
    assert mistakes(pace=raw) == [(("pace",), message)]


@UNHURRIED
@given(st.floats(0.01, 10_000))
def test_a_pace_that_was_written_is_read_as_the_same(pace: float) -> None:
    assert read_pace(write_pace(pace)) == pace


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (False, None),
        (True, Reload()),
        ({}, Reload()),
        (
            {"directories": ["/srv/app", "/srv/lib"]},
            Reload.model_validate({"directories": [Path("/srv/app"), Path("/srv/lib")]}),
        ),
        (
            {"include": ["*.html", "templates/*.css", ".env"]},
            Reload.model_validate({"include": ["*.html", "templates/*.css", ".env"]}),
        ),
        ({"directories": None, "include": []}, Reload()),
    ],
)
def test_reload(raw: object, expected: Reload | None) -> None:
    assert read(reload=raw).reload == expected


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ("on", (), "expected true, false or a mapping of keys, got text"),
        (["/srv"], (), "expected true, false or a mapping of keys, got a list"),
        ({"exclude": ["*.md"]}, ("exclude",), "unknown key 'exclude'; did you mean 'include'?"),
        ({"directories": "/srv"}, ("directories",), "expected a list of directories, got text"),
        ({"directories": ["/srv", "app"]}, ("directories", 1), "expected an absolute path, got 'app'"),
        ({"include": "*.html"}, ("include",), "expected a list of patterns, got text"),
        (
            {"include": ["*.html", "/srv/*.css"]},
            ("include", 1),
            "expected a pattern of files such as *.html, not from \"/\" on, got '/srv/*.css'",
        ),
        ({"include": [""]}, ("include", 0), "expected a pattern of files such as *.html, not from \"/\" on, got ''"),
    ],
)
def test_wrong_reload(raw: object, path: tuple[str | int, ...], message: str) -> None:
    assert mistakes(reload=raw) == [(("reload", *path), message)]


def test_what_yaml_reads_as_a_switch() -> None:
    for written, expected in (("on", Reload()), ("off", None), ("true", Reload())):
        run = load_text(f"run: {{command: app, reload: {written}}}", {}).run
        assert run is not None
        assert run.reload == expected


def test_files_of_an_app_with_several_directories_must_be_named() -> None:
    message = "cwd has placeholders: say in directories where the files of the app are"
    assert mistakes(cwd="/srv/{id}", reload=True) == [(("reload",), message)]
    assert read(cwd="/srv/{id}", reload={"directories": ["/srv"]}).reload is not None
    assert read(cwd="/srv/{{id}}", reload=True).reload == Reload()
    assert read(cwd="/srv/{id}", reload=False).reload is None


def test_a_package_that_is_missing_is_named_with_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    message = "to watch files needs the package watchfiles: pip install 'stickyproxy[reload]'"
    assert mistakes_in("run:\n  command: app\n  reload: on\n") == [(3, "run.reload", message)]
    assert read(reload=False).reload is None


def test_turning_it_on_is_told_in_the_words_of_the_file() -> None:
    texts = ["reload: off", "reload: on", "reload: {include: ['*.html']}"]
    off, on, more = (load_text(f"run: {{command: app, {text}}}", {}) for text in texts)
    assert [str(change) for change in find_changes(off, on)] == ["run.reload: false -> true"]
    assert [str(change) for change in find_changes(off, more)] == ["run.reload: false -> {include: ['*.html']}"]
    assert [str(change) for change in find_changes(on, more)] == ["run.reload.include: *.html added"]


def test_the_json_schema_has_every_form() -> None:
    schema: dict[str, Any] = Run.model_json_schema()
    properties = schema["properties"]
    assert schema["required"] == ["command"]
    assert properties["command"]["anyOf"] == [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
    ]
    assert properties["processes"]["anyOf"] == [
        {"type": "integer", "minimum": 1, "maximum": 256},
        {"$ref": "#/$defs/Processes"},
    ]
    assert properties["ready"]["anyOf"] == [{"type": "string"}, {"$ref": "#/$defs/Ready"}]
    assert properties["env"]["additionalProperties"] == {"type": "string"}
    assert properties["pace"]["anyOf"][1] == {"type": "number", "minimum": 0.01, "maximum": 10_000}
    defaults = {key: field.get("default") for key, field in properties.items() if "default" in field}
    assert defaults == {
        "processes": 1,
        "env": {},
        "cwd": None,
        "ports": "20000-29999",
        "restart": "always",
        "max_memory": "off",
        "max_age": "off",
        "drain_timeout": "30m",
        "pace": "20/s",
        "reload": False,
    }
    assert {"type": "boolean"} in properties["reload"]["anyOf"]
    assert {"$ref": "#/$defs/Reload"} in properties["reload"]["anyOf"]
    assert read(**defaults) == read()
