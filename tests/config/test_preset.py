"""What a preset brings, what the user's own file says over it, and how a mistake between them is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.config.document import read_document
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.load import load_text
from stickyproxy.config.preset import PRESETS, describe_preset, preset_text, put_presets_under, read_presets
from stickyproxy.config.source import ConfigSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stickyproxy.config.run import Run
    from stickyproxy.config.schema import Config

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall


def load(text: str, *presets: str, command: Sequence[str] | None = None) -> Config:
    """Load a text as the command line does, with its `--preset` and its command."""
    return ConfigSource(presets=presets, command=None if command is None else tuple(command)).load_text(text, {})


def run_of(text: str, *presets: str, command: Sequence[str] | None = None) -> Run:
    run = load(text, *presets, command=command).run
    assert run is not None
    return run


def probe_path(config: Config) -> str | None:
    assert config.health.probe is not None
    return config.health.probe.path


# The presets that there are


def test_the_frameworks() -> None:
    assert PRESETS == ("chainlit", "engineio", "gradio", "nicegui", "panel", "shiny", "streamlit")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_right_piece_of_a_file_and_says_in_its_first_line_what_it_is(name: str) -> None:
    assert load_text(preset_text(name).replace("run:", "run:\n  command: app"), {}) == load_text(
        f"{{presets: {name}, run: {{command: app}}}}", {}
    ).model_copy(update={"presets": (), **({} if "run:" in preset_text(name) else {"run": None})})
    assert preset_text(name) == f"# {describe_preset(name)}\n{preset_text(name).partition(chr(10))[2]}"
    assert 20 < len(describe_preset(name)) <= 110


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_room_for_more_in_each_section(name: str) -> None:
    """In short forms, such as `ready: /x`, it would be lost as a whole where the user gives one more key."""
    bare, more = (
        load(f"{{run: {{command: app{ready}}}{probe}}}", name)
        for ready, probe in (("", ""), (", ready: {timeout: 5s}", ", health: {probe: {interval: 7s}}"))
    )
    assert bare.run is not None
    assert more.run is not None
    assert (more.run.ready.path, more.run.ready.timeout_s) == (bare.run.ready.path, 5.0)
    assert more.health.probe is not None
    assert (more.health.probe.path, more.health.probe.interval_s) == (probe_path(bare), 7.0)


@pytest.mark.parametrize(
    ("name", "path", "env"),
    [
        ("chainlit", "/health", {"CHAINLIT_HOST": "127.0.0.1", "CHAINLIT_PORT": "{port}"}),
        (
            "gradio",
            "/gradio_api/app_id",
            {
                "GRADIO_SERVER_NAME": "127.0.0.1",
                "GRADIO_SERVER_PORT": "{port}",
                "GRADIO_NUM_PORTS": "1",
                "GRADIO_ANALYTICS_ENABLED": "False",
            },
        ),
        (
            "streamlit",
            "/_stcore/health",
            {
                "STREAMLIT_SERVER_ADDRESS": "127.0.0.1",
                "STREAMLIT_SERVER_PORT": "{port}",
                "STREAMLIT_SERVER_HEADLESS": "true",
                "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
                "STREAMLIT_SERVER_FILE_WATCHER_TYPE": "none",
                "STREAMLIT_LOGGER_HIDE_WELCOME_MESSAGE": "true",
            },
        ),
        ("panel", None, {"BOKEH_ALLOW_WS_ORIGIN": "*"}),
        ("nicegui", None, {}),
        ("shiny", None, {}),
        ("engineio", None, {}),
    ],
)
def test_what_a_preset_brings(name: str, path: str | None, env: dict[str, str]) -> None:
    config = load("", name, command=["app"])
    assert config.run is not None
    assert (config.run.ready.path, probe_path(config), dict(config.run.env)) == (path, path, env)
    assert config.run.uses_port == ("{port}" in env.values())
    assert config.run.stop.signal == ("INT" if name == "gradio" else "TERM")
    assert config.websocket.origins == (("same-host",) if name == "panel" else None)


# In the file


@pytest.mark.parametrize("raw", ["panel", ["panel"], ["engineio", "panel"], []])
def test_the_file_names_one_or_more(raw: object) -> None:
    config = load(f"presets: {json.dumps(raw)}")
    assert config.presets == ((raw,) if isinstance(raw, str) else tuple(raw))  # type: ignore[arg-type]
    assert config.websocket.origins == (("same-host",) if "panel" in config.presets else None)
    assert load("presets:").presets == ()


UNKNOWN = f"there is no preset 'nope'; there are {', '.join(PRESETS)}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grace: 1s\npresets: nope", [f"line 2: presets: {UNKNOWN}"]),
        ("presets:\n  - panel\n  - nope\n  - 7", [
            f"line 3: presets[1]: {UNKNOWN}",
            "line 4: presets[2]: expected text, got 7; put quotes around it",
        ]),
        ("presets: {panel: true}", [
            "line 1: presets: expected the name of a preset or a list of names, got a mapping",
        ]),
        ("presets: 7", ["line 1: presets: expected the name of a preset or a list of names, got a number"]),
    ],
)  # fmt: skip
def test_a_preset_that_is_not_there_is_a_mistake_at_its_line(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load(text)
    assert [str(error) for error in raised.value.errors] == expected


def test_names_are_read_once_or_in_a_list() -> None:
    assert read_presets("panel") == ("panel",)
    assert read_presets(["shiny", "panel"]) == ("shiny", "panel")
    with pytest.raises(ValueError, match=r"there is no preset '\.\./schema'; "):
        read_presets("../schema")


# What the user says goes over it


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("", "/health"),
        (", ready: /own", "/own"),
        (", ready: {path: /own}", "/own"),
        (", ready: {path: null}", None),
        (", ready: null", None),
        (", ready: {}", "/health"),
        (", ready: {timeout: 1s}", "/health"),
    ],
)
def test_mappings_are_merged_and_all_else_wins_as_a_whole(said: str, path: str | None) -> None:
    run = run_of(f"{{presets: chainlit, run: {{command: app{said}}}}}")
    assert run.ready.path == path
    assert run.env["CHAINLIT_PORT"] == "{port}"


def test_what_wins_as_a_whole() -> None:
    assert load("{presets: chainlit, health: {probe: false}}").health.probe is None
    assert probe_path(load("{presets: chainlit, health: {probe: true}}")) is None
    assert probe_path(load("{presets: chainlit, health: null}")) is None
    assert load("{presets: panel, websocket: {origins: null}}").websocket.origins is None
    assert load("{presets: panel, websocket: {origins: [absent]}}").websocket.origins == ("absent",)
    kept = load("{presets: panel, websocket: {ping: true}}").websocket
    assert (kept.origins, kept.ping is None) == (("same-host",), False)


def test_variables_are_merged_by_their_names() -> None:
    env = run_of("{presets: chainlit, run: {command: app, env: {A: b, CHAINLIT_HOST: '::1'}}}").env
    assert env == {"A": "b", "CHAINLIT_HOST": "::1", "CHAINLIT_PORT": "{port}"}
    assert run_of("{presets: chainlit, run: {command: app, env: null}}").env == {}


def test_of_two_presets_the_later_goes_over_the_earlier() -> None:
    for names, path in ((("chainlit", "gradio"), "/gradio_api/app_id"), (("gradio", "chainlit"), "/health")):
        config = load(f"{{presets: [{', '.join(names)}], run: {{command: app}}}}")
        assert config.run is not None
        assert (probe_path(config), config.run.ready.path, config.presets) == (path, path, names)
        assert {"CHAINLIT_PORT", "GRADIO_SERVER_PORT"} <= config.run.env.keys()
    assert probe_path(load("presets: [streamlit, engineio]")) == "/_stcore/health"


# The app that is run


@pytest.mark.parametrize("text", ["", "run: null", "upstreams: ['http://a']"])
def test_a_preset_runs_no_app_by_itself(text: str) -> None:
    config = load(text, "streamlit")
    assert config.run is None
    assert probe_path(config) == "/_stcore/health"


@pytest.mark.parametrize(
    "said",
    ["command: 'app {socket}'", "command: [app, '{socket}']", "command: app, env: {S: 'unix:{socket}'}",
     "command: app, cwd: '/srv{socket}'"],
)  # fmt: skip
def test_a_port_is_left_out_where_the_app_listens_on_a_socket(said: str) -> None:
    run = run_of(f"{{presets: chainlit, run: {{{said}}}}}")
    assert (run.uses_port, run.uses_socket) == (False, True)
    assert run.env["CHAINLIT_HOST"] == "127.0.0.1"
    assert "CHAINLIT_PORT" not in run.env


@pytest.mark.parametrize(
    "said", ["command: 'app {port}'", "command: app", "command: 'app {{socket}}'", "command: a, ready: '/{socket}'"]
)
def test_a_port_stays_where_it_does_not(said: str) -> None:
    assert run_of(f"{{presets: chainlit, run: {{{said}}}}}").env["CHAINLIT_PORT"] == "{port}"


def test_the_command_of_the_command_line_counts_in_place_of_that_of_the_file() -> None:
    text = "{presets: chainlit, run: {command: 'app %s', env: {A: b}, ready: {timeout: 1s}}}"
    to_socket = run_of(text % "{port}", command=["other", "{socket}"])
    assert (to_socket.command, dict(to_socket.env)) == (("other", "{socket}"), {"A": "b", "CHAINLIT_HOST": "127.0.0.1"})
    to_port = run_of(text % "{socket}", command=["other", "{port}"])
    assert (to_port.command, to_port.env["CHAINLIT_PORT"]) == (("other", "{port}"), "{port}")
    assert (to_port.ready.path, to_port.ready.timeout_s) == ("/health", 1.0)


def test_a_command_without_presets_changes_nothing() -> None:
    document = read_document("{run: {command: a}}")
    assert put_presets_under(document, (), ["b"]) is document


def test_the_run_of_a_file_needs_its_own_command() -> None:
    with pytest.raises(ConfigErrors, match=r"^line 1: run: the key 'command' is missing$"):
        load("{presets: chainlit, run: {processes: 2}}", command=["app"])


def test_an_app_is_either_run_or_listed() -> None:
    with pytest.raises(ConfigErrors, match=r"^line 1: upstreams: an app is either run here or listed"):
        load("{presets: chainlit, upstreams: ['http://a']}", command=["app"])


# Mistakes


def test_a_mistake_in_what_comes_from_a_preset_names_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No preset that there is can be mistaken beside a right file, so one is made that expects a status."""
    piece = {"health": {"probe": {"path": "/x", "expect": 204}}, "run": {"cwd": "/{port}"}}
    monkeypatch.setattr("stickyproxy.config.preset._read", lambda name: piece if name == "shiny" else {})
    assert load("presets: shiny").health.probe is not None
    with pytest.raises(ConfigErrors) as raised:
        load("presets: [panel, shiny]\nworkers: 0\nhealth: {probe: {path: null}}\nrun: {command: '{socket}'}")
    assert [str(error) for error in raised.value.errors] == [
        "preset shiny: run.cwd: {port} and {socket} together: an app process listens at one of them",
        "preset shiny: health.probe.expect: expect needs path: without it the probe is a TCP connect and has no status",
        "line 2: workers: expected auto or a whole number from 1 to 64, got 0",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("presets: panel\nwebsocket: {origins: ['*']}", "line 2: websocket.origins[0]: expected origins, got '*'"),
        ("presets: panel\nwebsocket: 7", "line 2: websocket: expected a mapping of keys, got a number"),
        (
            "presets: chainlit\nhealth:\n  probe: 7",
            "line 3: health.probe: expected a mapping of keys or false, got a n",
        ),
        ("presets: chainlit\nrun: app", "line 2: run: expected a mapping of keys, got text"),
        ("presets: chainlit\nrun: {command: ['{x}']}", "line 2: run.command[0]: unknown placeholder"),
        ("presets: chainlit\nrun:\n  command: a\n  env: [A]", "line 4: run.env: expected a mapping of names to texts"),
        ("- presets", "line 1: expected a mapping of keys, got a list"),
        ("presets: [", "line 1: not valid YAML"),
    ],
)
def test_a_mistake_of_the_user_keeps_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load(text)
    [error] = raised.value.errors
    assert str(error).startswith(expected)


SAID: dict[str, list[Any]] = {
    "websocket": [None, {}, {"origins": None}, {"origins": ["absent"]}, {"ping": True}, 7],
    "health": [None, {}, {"probe": None}, {"probe": False}, {"probe": {"path": None}}, {"probe": {"expect": 200}}, []],
    "run": [
        None,
        {},
        "app",
        {"command": "app"},
        {"command": ["app", "{socket}"], "ready": "/x"},
        {"command": "{port}", "env": {"A": "{socket}"}},
        {"command": "app", "env": {"CHAINLIT_PORT": None}},
        {"command": "app", "ready": {"expect": 200}, "env": {"STREAMLIT_SERVER_PORT": "1"}},
    ],
}
FILES = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(values) for key, values in SAID.items()}
)  # fmt: skip
NAMES = st.lists(st.sampled_from(PRESETS), max_size=3)
COMMANDS = st.sampled_from([None, ["app"], ["app", "{socket}"], ["app", "{port}"], ["{x}"]])


@UNHURRIED
@given(FILES, NAMES, NAMES, COMMANDS)
def test_any_file_with_any_presets_is_a_config_or_its_mistakes(
    file: dict[str, Any], named: list[str], given: list[str], command: list[str] | None
) -> None:
    text = json.dumps({**file, "presets": named})
    try:
        config = load(text, *given, command=command)
    except ConfigErrors as errors:
        told = [error for error in errors.errors if error.path_in_file != "COMMAND"]
        assert all(error.line == 1 or error.preset in PRESETS for error in told) or not (named or given)
    else:
        assert config.presets == tuple(given or named)
        assert config.run is None or not (config.run.uses_port and config.run.uses_socket)


@UNHURRIED
@given(FILES)
def test_what_the_file_says_stands(file: dict[str, Any]) -> None:
    """Whatever presets are under a file, each value that it gives is there, and mappings have more keys."""
    document = read_document(json.dumps(file))
    under = put_presets_under(document, PRESETS, None)
    assert document.value == file
    assert holds(under.value, file)
    assert all(path not in document.lines for path in under.presets)


def holds(merged: Any, said: Any) -> bool:
    if isinstance(said, dict):
        return isinstance(merged, dict) and all(key in merged and holds(merged[key], said[key]) for key in said)
    return bool(merged == said)
