"""What the command line says over the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.config.address import Address
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.load import load_text
from stickyproxy.config.overrides import with_overrides
from stickyproxy.config.preset import PRESETS
from stickyproxy.config.run import Processes, Reload, Run, read_command
from stickyproxy.config.schema import Config

FROM_FILE = load_text(
    """
    listeners: [":80", ":81"]
    upstreams: ["http://a", "http://b"]
    admin: {address: "127.0.0.1:1", token: 0123456789abcdef}
    """,
    {},
)

FORMS = "expected an address such as 127.0.0.1:8080, :8080 (all interfaces), [::1]:8080 or unix:/run/proxy.sock"


def test_nothing_given_changes_nothing() -> None:
    assert with_overrides(FROM_FILE) == FROM_FILE


def test_what_is_given_replaces_what_the_file_says() -> None:
    config = with_overrides(
        FROM_FILE, urls=["http://c", "unix:/d"], listen=":82", admin=":2", workers=3, control="/run/c.sock"
    )
    assert [upstream.id for upstream in config.upstreams] == ["c:80", "/d"]
    assert [listener.address for listener in config.listeners] == [Address(port=82)]
    assert config.admin is not None
    assert config.admin.address == Address(port=2)
    assert config.admin.token == "0123456789abcdef"
    assert (config.workers, config.control) == (3, Path("/run/c.sock"))
    assert config.timeouts == FROM_FILE.timeouts


def test_admin_can_be_switched_off_and_on() -> None:
    without = with_overrides(FROM_FILE, admin="off")
    assert without.admin is None
    config = with_overrides(without, admin="127.0.0.1:3")
    assert config.admin is not None
    assert config.admin.address == Address("127.0.0.1", 3)


def test_every_mistake_names_its_option() -> None:
    with pytest.raises(ConfigErrors) as raised:
        with_overrides(
            Config(), urls=["http://a", "ftp://b", "http://a/"], listen="80", admin=":2", workers=0, control="c"
        )
    assert sorted(str(error) for error in raised.value.errors) == [
        "--admin: an admin address that is not loopback needs a token; set admin.token in the file",
        "--control: expected the absolute path of a socket, as in /run/stickyproxy.sock",
        f"--listen: {FORMS}",
        "--workers: expected auto or a whole number from 1 to 64, got 0",
        "URL 2: expected a URL such as http://127.0.0.1:8001 or unix:/run/app.sock",
        "URL 3: a:80 is listed twice; for a larger share of clients set its weight",
    ]


def test_control_can_be_switched_off() -> None:
    assert with_overrides(Config(), control="off").control is False
    assert with_overrides(load_text("control: false", {}), control="/run/c").control == Path("/run/c")


def test_a_path_that_has_another_use_in_the_file_is_refused() -> None:
    from_file = load_text("{control: /run/c, hand_over: /run/h, admin: {address: 'unix:/run/a'}}", {})
    with pytest.raises(ConfigErrors, match=r"^--control: /run/a is the path of admin too$"):
        with_overrides(from_file, control="/run/a")
    with pytest.raises(ConfigErrors, match=r"^hand_over: /run/h is the path of control too$"):
        with_overrides(from_file, control="/run/h")
    with pytest.raises(ConfigErrors, match=r"^control: /run/c is the path of a listener too$"):
        with_overrides(from_file, listen="unix:/run/c")


def test_an_admin_address_that_is_none() -> None:
    with pytest.raises(ConfigErrors, match=r"^--admin: expected an address such as "):
        with_overrides(Config(), admin="x")


def test_presets_replace_those_of_the_file() -> None:
    from_file = load_text("presets: [panel, shiny]", {})
    assert with_overrides(from_file, presets=("gradio", "panel")).presets == ("gradio", "panel")
    assert with_overrides(from_file, presets=()).presets == ("panel", "shiny")
    with pytest.raises(ConfigErrors) as raised:
        with_overrides(from_file, presets=("nope", "panel", ""))
    assert [str(error) for error in raised.value.errors] == [
        f"--preset: there is no preset {name}; there are {', '.join(PRESETS)}" for name in ("'nope'", "''")
    ]


def test_too_many_urls() -> None:
    with pytest.raises(ConfigErrors, match=r"^URL: expected at most 1000 upstreams, got 1001$"):
        with_overrides(Config(), urls=[f"http://a:{port}" for port in range(1, 1002)])


RUN = load_text("run: {command: 'from-file {port}', processes: {min: 2, max: 8}, env: {A: '1'}, ready: /healthz}", {})


def test_a_command_alone_is_run_once_with_the_defaults() -> None:
    run = with_overrides(Config(), command=["app", "--port", "{port}"]).run
    assert run == Run(command=read_command("app --port {port}"))
    assert with_overrides(Config()).run is None


def test_a_command_and_a_number_replace_no_more_than_those() -> None:
    both = with_overrides(RUN, command=("app", "a b", "{port}"), processes=4).run
    assert both is not None
    assert (both.command, both.processes) == (("app", "a b", "{port}"), Processes(min=4, max=4))
    assert (both.env, both.ready.path) == ({"A": "1"}, "/healthz")
    command = with_overrides(RUN, command=("app",)).run
    assert command is not None
    assert (command.command, command.processes) == (("app",), Processes(min=2, max=8))
    number = with_overrides(RUN, processes=1).run
    assert number is not None
    assert (number.command, number.processes) == (("from-file", "{port}"), Processes(min=1, max=1))


def test_files_are_watched_as_the_command_line_says_over_the_file() -> None:
    def reload_of(config: Config, **given: Any) -> Reload | None:
        run = with_overrides(config, **given).run
        assert run is not None
        assert run.command[0] in {"app", "from-file"}
        return run.reload

    command = ["app", "{port}"]
    assert reload_of(Config(), command=command) is None
    assert reload_of(Config(), command=command, reload=True) == Reload()
    assert reload_of(RUN, reload=True) == Reload()
    assert reload_of(RUN, reload_directories=["/a", "/b"]) == Reload.model_validate(
        {"directories": [Path("/a"), Path("/b")]}
    )
    assert reload_of(RUN, reload_include=["*.html"]) == Reload.model_validate({"include": ["*.html"]})
    both = load_text("run: {command: app, env: {A: '1'}, reload: {directories: [/srv], include: ['*.css']}}", {})
    of_file = Reload.model_validate({"directories": [Path("/srv")], "include": ["*.css"]})
    assert reload_of(both) == reload_of(both, reload=True) == reload_of(both, processes=3) == of_file
    assert reload_of(both, reload_include=["*.html"]) == of_file.model_copy(update={"include": ("*.html",)})
    assert reload_of(both, reload_directories=["/a"]) == of_file.model_copy(update={"directories": (Path("/a"),)})
    run = with_overrides(both, reload=True).run
    assert run is not None
    assert run.env == {"A": "1"}


def test_mistakes_about_the_files_to_watch_name_their_option(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigErrors) as raised:
        with_overrides(RUN, reload_directories=["/a", "b"], reload_include=["/c"])
    assert sorted(str(error) for error in raised.value.errors) == [
        "--reload-dir: expected an absolute path, got 'b'",
        "--reload-include: expected a pattern of files such as *.html, not from \"/\" on, got '/c'",
    ]
    for given in ({"reload": True}, {"reload_directories": ["/a"]}, {"reload_include": ["*.html"]}):
        with pytest.raises(ConfigErrors, match=NO_COMMAND.replace("--processes", "^--reload")):
            with_overrides(Config(), **given)
    apart = load_text("run: {command: app, cwd: '/srv/{id}'}", {})
    with pytest.raises(ConfigErrors, match=r"^--reload: cwd has placeholders: say in directories where "):
        with_overrides(apart, reload=True)
    assert with_overrides(apart, reload_directories=["/srv"]).run is not None
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(ConfigErrors, match=r"^--reload: to watch files needs .* pip install 'stickyproxy\[reload\]'$"):
        with_overrides(RUN, reload=True)


def test_a_word_of_the_command_line_need_not_be_utf_8() -> None:
    run = with_overrides(Config(), command=["app", "caf\udce9"]).run
    assert run is not None
    assert run.command == ("app", "caf\udce9")


NUMBER = "expected a whole number from 1 to 256"
UNKNOWN = (
    "unknown placeholder '{prot}': there are {port}, {socket}, {id} and {generation}; write \"{{\" for a literal brace"
)
NO_COMMAND = "--processes: there is no command to run: give one after --, or as run.command in the file"


@pytest.mark.parametrize(
    ("command", "processes", "expected"),
    [
        (["a"], 0, [f"--processes: {NUMBER}, got 0"]),
        (["a"], 10_000, [f"--processes: {NUMBER}, got 10000"]),
        (["a"], "many", [f"--processes: {NUMBER}, got 'many'"]),
        ([""], None, ["COMMAND: expected a program as the first word, got an empty one"]),
        (
            ["a", "{prot}"],
            257,
            [
                f"--processes: {NUMBER}, got 257",
                f"COMMAND: {UNKNOWN}",
            ],
        ),
        (
            ["a", "{port}", "{socket}"],
            None,
            ["COMMAND: {port} and {socket} together: an app process listens at one of them"],
        ),
        (None, 4, [NO_COMMAND]),
        ((), 4, [NO_COMMAND]),
    ],
)
def test_mistakes_of_what_is_run_name_their_option(
    command: list[str] | None, processes: int | str | None, expected: list[str]
) -> None:
    with pytest.raises(ConfigErrors) as raised:
        with_overrides(Config(), command=command, processes=processes)
    assert sorted(str(error) for error in raised.value.errors) == expected


def test_a_number_without_a_command_is_refused_where_the_file_lists_upstreams() -> None:
    with pytest.raises(ConfigErrors, match=f"^{NO_COMMAND}$"):
        with_overrides(FROM_FILE, processes=4)


def test_an_app_is_either_run_or_listed() -> None:
    message = "an app is either run here or listed: where there is run, there are no upstreams"
    with pytest.raises(ConfigErrors, match=f"^COMMAND: {message}$"):
        with_overrides(FROM_FILE, command=["a"])
    for config, command in ((RUN, None), (Config(), ["a"])):
        with pytest.raises(ConfigErrors, match=f"^URL: {message}$"):
            with_overrides(config, urls=["http://a"], command=command)


def test_a_key_of_the_file_that_does_not_go_with_the_command_is_named() -> None:
    from_file = load_text("run: {command: 'a {socket}', env: {A: '{socket}'}}", {})
    with pytest.raises(ConfigErrors, match=r"^run\.env\.A: \{port\} and \{socket\} together: "):
        with_overrides(from_file, command=["a", "{port}"])
