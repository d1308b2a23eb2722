"""Which configuration a proxy is started with, and that it goes on from what another image of it has left."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from stickyproxy import __version__
from stickyproxy.cli import serve
from stickyproxy.config import Address, Config, ConfigSource, Loaded
from stickyproxy.config.run import Reload
from stickyproxy.control.inheritance import Inheritance
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.errors import AppError
from tests.cli.running import run, run_process

# serve


def test_serve_without_upstreams_says_where_to_name_them() -> None:
    done = run_process("serve")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "stickyproxy: no upstreams: name them in the file or as URLs, or the command of an app to run\n"
    )


def test_serve_takes_the_file(served: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("upstreams: [http://127.0.0.1:1, http://127.0.0.1:2]\nlog_level: error")
    assert run("serve", "--config", path).exit_code == 0
    [config] = served
    assert [one.id for one in config.upstreams] == ["127.0.0.1:1", "127.0.0.1:2"]
    assert config.listeners == Config().listeners


def test_serve_lets_options_and_urls_stand_over_the_file(served: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("upstreams: [http://127.0.0.1:1]\nlisteners: [127.0.0.1:3]\ngrace: 3s")
    arguments = ["--listen", "unix:/run/x.sock", "--admin", "[::1]:7", "--workers", "auto", "http://localhost:8"]
    assert run("serve", "--config", path, *arguments).exit_code == 0
    [config] = served
    assert [str(one.address) for one in config.upstreams] == ["localhost:8"]
    assert [one.address for one in config.listeners] == [Address(path="/run/x.sock")]
    assert config.admin is not None
    assert str(config.admin.address) == "[::1]:7"
    assert (config.workers, config.grace_s) == ("auto", 3.0)


def test_serve_takes_a_number_of_workers(served: list[Config]) -> None:
    assert run("serve", "--workers", "4", "http://127.0.0.1:1").exit_code == 0
    assert served[0].workers == 4


def test_serve_without_an_admin_listener(served: list[Config]) -> None:
    assert run("serve", "--admin", "off", "--workers", "1", "http://127.0.0.1:1").exit_code == 0
    assert (served[0].admin, served[0].workers) == (None, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ftp://127.0.0.1:1",), "URL 1: expected a URL"),
        (("http://127.0.0.1:1", "nonsense"), "URL 2: expected a URL"),
        (("http://127.0.0.1:1", "http://127.0.0.1:1"), "URL 2: 127.0.0.1:1 is listed twice"),
        (("http://user:pass-7@127.0.0.1:1",), "URL 1: the URL of an upstream has no user name"),
        (("--listen", "8080", "http://127.0.0.1:1"), "--listen: expected an address"),
        (("--listen", "127.0.0.1:99999", "http://127.0.0.1:1"), "--listen: expected a port"),
        (("--admin", "no", "http://127.0.0.1:1"), "--admin: expected an address"),
        (("--admin", ":9090", "http://127.0.0.1:1"), "--admin: an admin address that is not loopback needs a token"),
        (("--workers", "0", "http://127.0.0.1:1"), "--workers: expected auto or a whole number from 1 to 64"),
        (("--workers", "65", "http://127.0.0.1:1"), "--workers: expected auto or a whole number from 1 to 64"),
        (("--workers", "-1", "http://127.0.0.1:1"), "--workers: expected auto or a whole number from 1 to 64"),
        (("--workers", "many", "http://127.0.0.1:1"), "--workers: expected auto or a whole number from 1 to 64"),
        (("--workers", "9" * 5000, "http://127.0.0.1:1"), "--workers: expected auto or a whole number from 1 to 64"),
    ],
)
def test_serve_names_the_argument_that_is_wrong(arguments: Sequence[str], said: str, served: list[Config]) -> None:
    result = run("serve", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"stickyproxy: {said}")
    assert "pass-7" not in line
    assert not served


def test_the_log_has_the_level_of_the_file(monkeypatch: pytest.MonkeyPatch, served: list[Config]) -> None:
    levels: list[str] = []
    monkeypatch.setattr(serve, "set_up_log", levels.append)
    run("serve", "http://127.0.0.1:1")
    assert levels == [Config().log_level]


def test_serve_takes_over_from_the_proxy_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    async def note(_: Loaded, **more: object) -> None:
        given.append(more["take_over"])

    monkeypatch.setattr(serve, "run_proxy", note)
    monkeypatch.setattr(serve, "set_up_log", lambda _level: None)
    assert run("serve", "--take-over", "/run/a.hand-over", "http://127.0.0.1:1").exit_code == 0
    assert run("serve", "http://127.0.0.1:1").exit_code == 0
    assert given == [Path("/run/a.hand-over"), None]


def test_serve_takes_presets_in_place_of_those_of_the_file(served: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("presets: panel\nupstreams: [http://127.0.0.1:1]")
    assert run("serve", "--config", path).exit_code == 0
    assert run("serve", "--config", path, "--preset", "gradio", "--preset", "engineio").exit_code == 0
    of_file, changed = served
    assert (of_file.presets, of_file.websocket.origins) == (("panel",), ("same-host",))
    assert (changed.presets, changed.websocket.origins, changed.run) == (("gradio", "engineio"), None, None)
    assert changed.health.probe is not None
    assert changed.health.probe.path == "/gradio_api/app_id"


# run


def test_run_takes_a_command_with_all_its_options(served: list[Config]) -> None:
    result = run("run", "-w", "3", "--", "uvicorn", "main:app", "--port", "{port}", "--workers", "1", "-w", "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    [config] = served
    assert config.run is not None
    assert config.run.command == ("uvicorn", "main:app", "--port", "{port}", "--workers", "1", "-w", "--help")
    assert (config.run.processes.min, config.run.processes.max) == (3, 3)
    assert (config.upstreams, config.workers) == ((), 1)


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (("app",), ("app",)),
        (("app", "--listen", "{socket}"), ("app", "--listen", "{socket}")),
        (("app", "--", "--listen"), ("app", "--", "--listen")),
        (("--", "app", "--", "-w"), ("app", "--", "-w")),
        (("--", "-app", ""), ("-app", "")),
    ],
)
def test_all_after_the_first_word_of_a_command_belongs_to_it(
    given: Sequence[str], command: Sequence[str], served: list[Config]
) -> None:
    assert run("run", "--processes", "2", *given).exit_code == 0
    run_ = served[0].run
    assert run_ is not None
    assert run_.command == command
    assert run_.processes.max == 2
    assert served[0].listeners == Config().listeners


def test_run_puts_a_preset_under_its_command(served: list[Config]) -> None:
    for command in (("streamlit", "run", "app.py"), ("app", "{socket}")):
        assert run("run", "-w", "3", "--preset", "streamlit", "--", *command).exit_code == 0
    port, socket = (config.run for config in served)
    assert port is not None
    assert socket is not None
    assert (port.command, port.processes.max, port.ready.path) == (("streamlit", "run", "app.py"), 3, "/_stcore/health")
    assert port.env["STREAMLIT_SERVER_PORT"] == "{port}"
    assert dict(socket.env) == {name: text for name, text in port.env.items() if "PORT" not in name}


def test_run_reads_no_option_out_of_the_command(served: list[Config]) -> None:
    assert run("run", "app", "--preset", "panel").exit_code == 0
    assert served[0].presets == ()


def test_run_watches_files_where_it_is_asked_to(
    served: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.yaml").write_text("run: {command: of-file, reload: {include: ['*.css']}}")
    more = ("--reload-dir", "src", "--reload-dir", "/srv", "--reload-include", "*.html")
    for options in ((), ("--reload",), more, ("--config", "app.yaml", "--reload")):
        assert run("run", *options, "--", "app", "--reload").exit_code == 0
    reloads = [config.run.reload for config in served if config.run is not None]
    directories = (tmp_path / "src", Path("/srv"))
    assert reloads == [
        None,
        Reload(),
        Reload.model_validate({"directories": list(directories), "include": ["*.html"]}),
        Reload.model_validate({"include": ["*.css"]}),
    ]


FILE = """\
run:
  command: app --port {port}
  processes: {min: 2, max: 5}
  env: {A: b}
listeners: [127.0.0.1:3]
"""


def test_run_takes_what_the_file_says(served: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "app.yaml"
    path.write_text(FILE)
    assert run("run", "--config", path).exit_code == 0
    options = ("--listen", "127.0.0.1:4", "--admin", "off", "--workers", "2", "--control", "off", "-w", "1")
    assert run("run", "--config", path, *options, "--", "other", "{port}").exit_code == 0
    of_file, changed = served
    assert of_file.run is not None
    assert changed.run is not None
    assert (of_file.run.command, of_file.run.processes.max) == (("app", "--port", "{port}"), 5)
    assert (changed.run.command, changed.run.processes.max) == (("other", "{port}"), 1)
    assert of_file.run.env == changed.run.env == {"A": "b"}
    assert [str(one.address) for one in changed.listeners] == ["127.0.0.1:4"]
    assert (changed.admin, changed.workers, changed.control) == (None, 2, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "there is no command to run"),
        (("-w", "2"), "--processes: there is no command to run"),
        (("--reload",), "--reload: there is no command to run"),
        (("--reload-include", "/", "--", "app"), "--reload-include: expected a pattern of files such as *.html"),
        (("-w", "0", "--", "app"), "--processes: expected a whole number from 1 to 256, got 0"),
        (("-w", "-1", "--", "app"), "--processes: expected a whole number from 1 to 256"),
        (("-w", "10000", "--", "app"), "--processes: expected a whole number from 1 to 256, got 10000"),
        (("-w", "9" * 5000, "--", "app"), "--processes: expected a whole number from 1 to 256"),
        (("--processes", "many", "--", "app"), "--processes: expected a whole number from 1 to 256, got 'many'"),
        (("--listen", "8080", "--", "app"), "--listen: expected an address"),
        (("--workers", "0", "--", "app"), "--workers: expected auto or a whole number from 1 to 64"),
        (("--preset", "nope", "--", "app"), "--preset: there is no preset 'nope'; there are auto, chainlit, "),
        (("--preset", "panel"), "there is no command to run"),
        (("--preset", "panel", "--", "app", "{port}", "{socket}"), "COMMAND: {port} and {socket} together"),
        (("--", ""), "COMMAND"),
        (("--", "app", "{prot}"), "COMMAND"),
        (("--", "app", "{port}", "{socket}"), "COMMAND: {port} and {socket} together"),
    ],
)
def test_run_names_the_argument_that_is_wrong(arguments: Sequence[str], said: str, served: list[Config]) -> None:
    result = run("run", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"stickyproxy: {said}")
    assert not served


def test_run_names_the_file_that_is_wrong(served: list[Config], tmp_path: Path) -> None:
    path = tmp_path / "app.yaml"
    path.write_text("upstreams: [http://127.0.0.1:1]")
    assert run("run", "--config", path).stderr.startswith("stickyproxy: there is no command to run")
    result = run("run", "--config", path, "--", "app")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "an app is either run here or listed" in result.stderr
    assert not served


def test_an_app_that_does_not_start_is_no_mistake_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: Loaded, **__: object) -> None:
        raise AppError("the app does not start: g1-1: exit status 3\n    no module named app")

    monkeypatch.setattr(serve, "run_proxy", fail)
    monkeypatch.setattr(serve, "set_up_log", lambda _level: None)
    result = run("run", "--", "app")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "stickyproxy: the app does not start: g1-1: exit status 3",
        "stickyproxy:     no module named app",
    ]


# Another image of a process


LEFT = [("serve", "--config", "/gone.yaml"), ("run", "--config", "/gone.yaml", "--", "app")]


@pytest.mark.parametrize("command", LEFT, ids=lambda command: command[0])
def test_a_proxy_goes_on_from_what_was_left_whatever_the_command_line_says(
    command: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded.of_text(ConfigSource(), "upstreams: [http://127.0.0.1:1]\nlog_level: error", {})
    left = Inheritance(loaded, ())
    levels: list[str] = []
    given: list[object] = []

    async def note(*arguments: object, **more: object) -> None:
        given.append((*arguments, more))

    monkeypatch.setattr(serve, "take", lambda: (left, False))
    monkeypatch.setattr(serve, "run_proxy", note)
    monkeypatch.setattr(serve, "set_up_log", levels.append)
    result = run(*command)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert given == [(loaded, {"inherited": left})]
    assert levels == ["error"]


@pytest.mark.parametrize("command", LEFT, ids=lambda command: command[0])
def test_a_proxy_says_whether_it_could_go_on(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded.of_text(ConfigSource(), "upstreams: [http://127.0.0.1:1]", {})
    monkeypatch.setattr(serve, "take", lambda: (Inheritance(loaded, ()), True))
    monkeypatch.setattr(serve, "run_proxy", None)
    result = run(*command)
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert (answer["version"], answer["protocol"]) == (__version__, PROTOCOL)


@pytest.mark.parametrize("command", ["serve", "run"])
def test_what_was_left_by_nobody_is_one_clear_line(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STICKYPROXY_INHERITED", "nonsense")
    done = run_process(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "stickyproxy: STICKYPROXY_INHERITED is set by the proxy itself, and is not for anybody else\n"
