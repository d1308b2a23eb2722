"""The commands: what they print, their exit statuses, and that no mistake of an operator ends in a traceback."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from click.testing import CliRunner, Result

from stickyproxy import __version__, cli
from stickyproxy.config import Address, Config, Loaded
from stickyproxy.demo.launcher import DemoError
from tests.helpers.certificates import Authority
from tests.helpers.json_schema import find_mistakes

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "config").glob("*.yaml"))
COMMANDS = ("check", "demo", "reload", "schema", "serve", "upgrade", "version")


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; what it does not catch is raised here."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stickyproxy", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Let `serve` and `demo` note what they would serve, and return."""
    configs: list[Config] = []

    async def note(loaded: Loaded, on_ready: Any = None, **_: object) -> None:
        configs.append(loaded.config)
        if on_ready is not None:
            on_ready([one.address for one in loaded.config.listeners])

    monkeypatch.setattr(cli, "run_proxy", note)
    monkeypatch.setattr(cli, "set_up_log", lambda _level: None)
    return configs


# All commands


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert run("-h").stdout == result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_a_help_text(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for option in cli.main.commands[command].params:
        if option.param_type_name == "option":
            assert getattr(option, "help", None), option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_clear_error(command: str) -> None:
    result = run(command, "--nonsense")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert result.stdout == ""


def test_an_unknown_command_is_one_clear_error() -> None:
    result = run("sevre")
    assert result.exit_code == 2
    assert "No such command 'sevre'" in result.stderr


def test_version() -> None:
    assert run("version").stdout == f"stickyproxy {__version__}\n"


def test_the_module_is_the_command() -> None:
    done = run_process("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"stickyproxy {__version__}\n", "")
    assert run_process("--help").stdout.startswith("Usage: stickyproxy ")


# check


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_check_of_an_example_says_that_it_is_right(path: Path) -> None:
    result = run("check", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{path}: right; 2 upstreams, 1 listener\n"


def test_check_reads_the_certificates_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    leaf = authority.issue("localhost")
    configuration: dict[str, Any] = {
        "listeners": [{"address": "127.0.0.1:8443", "tls": {"certificates": [leaf.section]}}],
        "upstreams": [{"url": "https://127.0.0.1:8001", "tls": {"ca": str(authority.file)}}],
    }
    file = tmp_path / "proxy.yaml"
    file.write_text(yaml.safe_dump(configuration))
    assert run("check", file).stdout == f"{file}: right; 1 upstream, 1 listener\n"
    gone, empty = str(tmp_path / "gone.pem"), tmp_path / "empty.pem"
    empty.write_text("")
    configuration["listeners"][0]["tls"]["certificates"][0]["key"] = gone
    configuration["upstreams"][0]["tls"]["ca"] = str(empty)
    file.write_text(yaml.safe_dump(configuration))
    result = run("check", file)
    assert (result.exit_code, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert gone in first
    assert str(empty) in second


MISTAKES = """\
listeners:
  - address: 127.0.0.1:99999
upstreams:
  - url: http://127.0.0.1:8001
    weigth: 2
  - http://127.0.0.1:8001/path
affinity:
  policy: fastest
  secrets: [env:NOT_SET_ANYWHERE]
health: {probe: {interval: 5}}
grace: 30 parsecs
"""
MISTAKEN = {
    2: "listeners[0].address",
    5: "upstreams[0].weigth",
    6: "upstreams[1]",
    8: "affinity.policy",
    9: "affinity.secrets[0]",
    10: "health.probe.interval",
    11: "grace",
}


def test_check_names_every_mistake_with_its_line_and_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(MISTAKES)
    result = run("check", path)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == len(MISTAKEN)
    for line, (number, where) in zip(lines, MISTAKEN.items(), strict=True):
        assert line.startswith(f"stickyproxy: {path}: line {number}: {where}"), line


def test_serve_says_the_same_as_check(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(MISTAKES)
    result = run("serve", "--config", path)
    assert result.exit_code == 2
    assert result.stderr == run("check", path).stderr


UNREADABLE = {
    "missing": None,
    "no YAML": b"upstreams: [",
    "not UTF-8": b"upstreams: \xff",
    "a list": b"- http://127.0.0.1:8001",
    "a tag": b"upstreams: !!python/object/apply:os.system [id]",
    "a bomb": b"a: &a [x, x]\nb: &b [*a, *a]\nupstreams: *b",
    "too long": b"# " + b"x" * (1 << 20),
    "NUL": b"upstreams: \x00",
    "deep": b"[" * 5000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("command", [("check",), ("serve", "--config")], ids=lambda command: command[0])
def test_a_file_that_cannot_be_read_is_one_clear_line(
    command: Sequence[str], content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_bytes(content)
    result = run(*command, path)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith(f"stickyproxy: {path}: ") for line in lines)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    result = run("check", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"stickyproxy: {tmp_path}: cannot read the file: Is a directory\n"


@pytest.mark.parametrize("arguments", [("check",), ("check", "one.yaml", "two.yaml"), ("schema", "too much")])
def test_a_wrong_number_of_arguments_is_a_clear_error(arguments: Sequence[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_a_missing_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_process("serve", "--config", tmp_path / "missing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"stickyproxy: {tmp_path}/missing.yaml: cannot read the file: No such file or directory\n"


# schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run("schema").stdout)
    return parsed


def test_the_schema_is_one_that_editors_know(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_accepts_the_examples(path: Path, schema: dict[str, Any]) -> None:
    assert list(find_mistakes(yaml.safe_load(path.read_text()), schema, schema)) == []


def test_the_schema_finds_mistakes(schema: dict[str, Any]) -> None:
    found = set(find_mistakes(yaml.safe_load(MISTAKES), schema, schema))
    assert found >= {
        "$.upstreams[0]: none of its forms",
        "$.affinity.policy: not enum ['least_sessions', 'round_robin', 'random']",
    }
    assert list(find_mistakes({"upstream": []}, schema, schema)) == ["$: unknown key upstream"]


# serve


def test_serve_without_upstreams_says_where_to_name_them() -> None:
    done = run_process("serve")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "stickyproxy: no upstreams: name them in the file or as URLs on the command line\n"


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
    monkeypatch.setattr(cli, "set_up_log", levels.append)
    run("serve", "http://127.0.0.1:1")
    assert levels == [Config().log_level]


def test_serve_takes_over_from_the_proxy_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    async def note(_: Loaded, **more: object) -> None:
        given.append(more["take_over"])

    monkeypatch.setattr(cli, "run_proxy", note)
    monkeypatch.setattr(cli, "set_up_log", lambda _level: None)
    assert run("serve", "--take-over", "/run/a.hand-over", "http://127.0.0.1:1").exit_code == 0
    assert run("serve", "http://127.0.0.1:1").exit_code == 0
    assert given == [Path("/run/a.hand-over"), None]


# reload, upgrade


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_a_command_for_a_proxy_that_is_not_there_is_one_clear_line(command: str, tmp_path: Path) -> None:
    path = tmp_path / "nobody.control"
    done = run_process(command, "--control", path)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("stickyproxy: ")
    assert str(path) in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], "nothing has changed\n"),
        (["grace: 1h -> 2h", "upstreams: b removed"], "grace: 1h -> 2h\nupstreams: b removed\n"),
    ],
)
def test_reload_says_what_has_changed(monkeypatch: pytest.MonkeyPatch, changes: list[str], said: str) -> None:
    asked: list[tuple[Path | None, str]] = []

    async def post(control: Path | None, path: str) -> dict[str, Any]:
        asked.append((control, path))
        return {"changes": changes}

    monkeypatch.setattr(cli, "_post", post)
    result = run("reload", "--control", "/run/a.control")
    assert (result.exit_code, result.stdout) == (0, said)
    assert asked == [(Path("/run/a.control"), "/api/v1/reload")]


def test_upgrade_says_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[dict[str, Any]] = [
        {"state": "ok", "from": "1.0", "to": "1.1", "moved_tunnels": 3},
        {"state": "failed", "reason": "the new version cannot be imported"},
    ]

    async def upgrade(_: Path) -> dict[str, Any]:
        return statuses.pop(0)

    monkeypatch.setattr(cli, "_upgrade", upgrade)
    good = run("upgrade", "--control", "/run/a.control")
    assert good.exit_code == 0
    assert good.stdout.startswith("upgraded from version 1.0 to 1.1: ")
    bad = run("upgrade", "--control", "/run/a.control")
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert bad.stderr == "stickyproxy: cannot upgrade, the old version goes on: the new version cannot be imported\n"


# demo


class FakeDemo:
    """Stands in for the apps."""

    names = ("alpha", "beta")
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    admin_url: str | None = None
    error: DemoError | None = None

    def __init__(self, *, admin_url: str) -> None:
        type(self).admin_url = admin_url

    async def __aenter__(self) -> Self:
        if self.error is not None:
            raise self.error
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


@pytest.fixture
def apps(monkeypatch: pytest.MonkeyPatch) -> type[FakeDemo]:
    class Apps(FakeDemo):
        pass

    monkeypatch.setattr(cli, "Demo", Apps)
    return Apps


def test_the_demo_serves_its_apps_and_says_where(apps: type[FakeDemo], served: list[Config]) -> None:
    result = run("demo", "--listen", "127.0.0.1:81", "--admin", "127.0.0.1:91")
    assert (result.exit_code, apps.admin_url) == (0, "http://127.0.0.1:91")
    assert "http://127.0.0.1:81\n" in result.stdout
    assert "http://127.0.0.1:91/metrics\n" in result.stdout
    [config] = served
    assert [str(one.address) for one in config.upstreams] == ["127.0.0.1:1", "127.0.0.1:2"]
    assert config.admin is not None
    assert str(config.admin.address) == "127.0.0.1:91"


@pytest.mark.parametrize("listen", [":81", "0.0.0.0:81", "[::]:81"])
def test_the_demo_on_all_interfaces_names_one_that_a_browser_can_open(
    listen: str, apps: type[FakeDemo], served: list[Config]
) -> None:
    result = run("demo", "--listen", listen)
    assert "http://localhost:81\n" in result.stdout
    assert str(served[0].listeners[0].address) == listen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--admin", "off"), "--admin: the page links to the metrics"),
        (("--admin", "127.0.0.1:0"), "--admin: the page links to the metrics"),
        (("--admin", "unix:/run/admin.sock"), "--admin: the page links to the metrics"),
        (("--admin", "nonsense"), "--admin: expected an address"),
        (("--listen", "unix:/run/demo.sock"), "--listen: a browser cannot open a Unix socket"),
        (("--listen", "nonsense"), "--listen: expected an address"),
    ],
)
def test_the_demo_refuses_what_it_cannot_show_before_it_starts_anything(
    arguments: Sequence[str], said: str, apps: type[FakeDemo], served: list[Config]
) -> None:
    result = run("demo", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"stickyproxy: {said}")
    assert apps.admin_url is None
    assert not served


def test_a_demo_whose_apps_do_not_start_is_one_clear_line(apps: type[FakeDemo], served: list[Config]) -> None:
    apps.error = DemoError("alpha was killed by SIGKILL before it listened")
    result = run("demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "stickyproxy: alpha was killed by SIGKILL before it listened\n"
