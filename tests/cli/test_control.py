"""How a command finds its proxy, and which answers are mistakes of the operator."""

from pathlib import Path
from typing import Any

import pytest

from stickyproxy.cli.control import refusals, speak
from stickyproxy.control.client import ControlClient, ControlError, ControlLost
from stickyproxy.errors import UsageError
from tests.cli.running import run, run_process
from tests.cli.stub import Answer, StubProxy

COMMANDS = (
    *(("status",), ("deploy",), ("scale", "2"), ("drain", "a"), ("ready", "a"), ("restart", "a"), ("logs", "a")),
    *(("reload",), ("upgrade",)),
)


async def get_nothing(client: ControlClient) -> Any:
    return await client.get("/nothing")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_proxy_that_is_not_there_is_one_clear_line(command: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "nobody.control"
    result = run(*command, "--control", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"stickyproxy: no proxy listens at {path}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_proxy_at_all_a_command_says_how_to_name_one(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    result = run(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("stickyproxy: no proxy is running")
    assert result.stderr.endswith("name it by --control PATH\n")


def test_the_only_proxy_is_found(proxy: StubProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(proxy.path.parent))
    proxy.answer("POST", "/api/v1/reload", {"changes": []})
    assert run("reload").stderr.startswith("stickyproxy: no proxy is running")  # no control socket has this name
    proxy.path.rename(proxy.path.with_name("123.control"))
    assert run("reload").stdout == "nothing has changed\n"


@pytest.mark.parametrize(
    ("status", "kind"), [(400, UsageError), (404, UsageError), (409, UsageError), (422, UsageError)]
)
def test_a_refusal_is_a_mistake_of_the_operator(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="no such thing"), refusals():
        raise ControlError("no such thing", status)


@pytest.mark.parametrize(
    "error", [ControlError("no", 500), ControlError("no", 503), ControlError("no"), ControlLost("no")]
)
def test_what_the_proxy_cannot_do_is_none(error: ControlError) -> None:
    with pytest.raises(ControlError) as caught, refusals():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(404, {"error": "it is not here"}), "it is not here"),
        (
            Answer(500, {"error": "an error of the proxy; its log says more"}),
            "an error of the proxy; its log says more",
        ),
        (Answer(0), "the proxy at {path} closed the connection before it answered"),
    ],
)
def test_an_error_ends_the_command(
    proxy: StubProxy, answer: Answer, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.answer("GET", "/nothing", answer)
    with pytest.raises(SystemExit) as caught:
        speak(proxy.path, get_nothing)
    assert caught.value.code == 1
    assert tuple(capsys.readouterr()) == ("", f"stickyproxy: {said.format(path=proxy.path)}\n")


def test_an_answer_is_returned(proxy: StubProxy) -> None:
    proxy.answer("GET", "/nothing", {"a": 1})
    assert speak(proxy.path, get_nothing) == {"a": 1}


def test_a_command_in_a_process_of_its_own(proxy: StubProxy) -> None:
    proxy.answer("POST", "/api/v1/scale", Answer(202, {"from": 2, "to": 4}))
    done = run_process("scale", "4", "--control", proxy.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "growing from 2 to 4 app processes\n", "")
