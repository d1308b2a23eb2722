"""What a reload and an upgrade of a running proxy say."""

from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import run, run_process
from tests.cli.stub import Answer, StubProxy


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
def test_reload_says_what_has_changed(proxy: StubProxy, changes: list[str], said: str) -> None:
    proxy.answer("POST", "/api/v1/reload", {"changes": changes})
    result = run("reload", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    assert proxy.calls == [("POST", "/api/v1/reload", {})]


def test_a_reload_that_changes_nothing_says_why(proxy: StubProxy) -> None:
    proxy.answer("POST", "/api/v1/reload", Answer(422, {"error": "a.yaml: line 1: no\na.yaml: line 2: no"}))
    result = run("reload", "--control", proxy.path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "stickyproxy: a.yaml: line 1: no\nstickyproxy: a.yaml: line 2: no\n"


@pytest.mark.parametrize(
    ("last", "status", "stdout", "stderr"),
    [
        ({"number": 4, "state": "ok", "from": "1.0", "to": "1.1"}, 0, "upgraded from version 1.0 to 1.1: ", ""),
        (
            {"number": 4, "state": "failed", "reason": "it cannot be imported"}, 1,
            "", "stickyproxy: cannot upgrade, the old version goes on: it cannot be imported\n",
        ),
        (
            {"number": 5, "state": "running"}, 1,
            "", "stickyproxy: cannot upgrade, the old version goes on: no reason given\n",
        ),
    ],
    ids=["ok", "failed", "another one"],
)  # fmt: skip
def test_upgrade_says_what_came_of_it(
    proxy: StubProxy, last: dict[str, Any], status: int, stdout: str, stderr: str
) -> None:
    """While the proxy re-executes itself, it answers nothing."""
    path = "/api/v1/upgrade"
    under_way = {"number": 4, "state": "running"}
    proxy.answer("POST", path, Answer(202, under_way))
    proxy.answer("GET", path, under_way, Answer(0), Answer(0), Answer(503, {"error": "soon"}), last)
    result = run("upgrade", "--control", proxy.path)
    assert result.exit_code == status
    assert result.stdout.startswith(stdout)
    assert result.stderr == stderr
    assert [call[0] for call in proxy.calls].count("POST") == 1
