"""All commands: their help, and that no mistake of an operator ends in a traceback."""

import pytest

from stickyproxy import __version__
from stickyproxy.cli import main
from tests.cli.running import run, run_process

COMMANDS = (
    *("check", "demo", "deploy", "drain", "logs", "presets", "ready", "reload", "restart"),
    *("run", "scale", "schema", "serve", "status", "upgrade", "version"),
)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert run("-h").stdout == result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_a_help_text(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for option in main.commands[command].params:
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


def test_the_module_is_the_command() -> None:
    done = run_process("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"stickyproxy {__version__}\n", "")
    assert run_process("--help").stdout.startswith("Usage: stickyproxy ")
