"""How the small programs are started: with the descriptors that they are given, and with nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import stickyproxy
from stickyproxy.control.runner import program
from stickyproxy.control.runner.program import start_program
from tests.helpers.loops import no_leak

if TYPE_CHECKING:
    from collections.abc import Mapping

REPORT = """
import os, sys
found = {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
         if os.path.exists(f"/proc/self/fd/{name}")}
print(sys.argv[1:], dict(os.environ), os.getsid(0) == os.getpid(), sorted(found.items()), sep="\\n")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a program that says what it was given."""
    (tmp_path / "report.py").write_text(REPORT)
    monkeypatch.setattr(program, "__file__", str(tmp_path / "program.py"))


def run(arguments: list[str], environment: Mapping[str, str], more: Mapping[int, int] | None = None) -> list[Any]:
    """Run the program; return its arguments, its environment, whether it leads a session, and its descriptors."""
    output, written = os.pipe()
    process_id = start_program("report.py", arguments, environment, {1: written, **(more or {})})
    os.close(written)
    with os.fdopen(output) as file:
        said = file.read().splitlines()
    assert os.waitpid(process_id, 0)[1] == 0
    return [eval(line) for line in said]  # noqa: S307 -- as the program above has written it


def test_it_gets_its_arguments_its_environment_and_a_session() -> None:
    with no_leak():
        arguments, environment, leads, descriptors = run(["a b", ""], {"ONE": "1", "LC_ALL": "C.UTF-8"})
    assert arguments == ["a b", ""]
    assert environment == {"ONE": "1", "LC_ALL": "C.UTF-8"}
    assert leads
    open_ones = dict(descriptors)
    assert open_ones["0"] == open_ones["2"] == "/dev/null"
    assert open_ones["1"].startswith("pipe:")
    assert open_ones.keys() == {"0", "1", "2"}


def test_it_gets_no_descriptor_that_this_process_has_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(opened, True)
    try:
        assert "/dev/zero" not in dict(run([], {})[3]).values()
        monkeypatch.setattr(program, "_list_inheritable", list)  # the control
        assert "/dev/zero" in dict(run([], {})[3]).values()
    finally:
        os.close(opened)


def test_descriptors_have_the_numbers_that_are_asked_for() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Path("/dev/zero").open("rb") as zero:
        descriptors = dict(run([], {}, {0: zero.fileno(), 3: theirs.fileno(), 9: zero.fileno()})[3])
    assert descriptors.keys() == {"0", "1", "2", "3", "9"}
    assert descriptors["0"] == descriptors["9"] == "/dev/zero"
    assert descriptors["3"].startswith("socket:")


CLOSED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from stickyproxy.control.runner import program
program.__file__ = sys.argv[2]
output = os.dup(1)
for one in range(0, 10):
    if one != output:
        try: os.close(one)
        except OSError: pass
kept = os.dup2(output, 20, inheritable=False)
os.close(output)
zero = os.open("/dev/zero", os.O_RDONLY)
null = os.open("/dev/null", os.O_RDONLY)
assert (zero, null) == (0, 1)
os.waitpid(program.start_program("report.py", [], {}, {0: null, 1: 20, 3: zero}), 0)
"""


def test_a_process_without_standard_descriptors_can_start_one(tmp_path: Path) -> None:
    root = str(Path(stickyproxy.__file__).parent.parent)
    command = [sys.executable, "-c", CLOSED, root, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    descriptors = dict(eval(done.stdout.splitlines()[3]))  # noqa: S307 -- as the program above has written it
    assert descriptors.keys() == {"0", "1", "2", "3"}
    assert (descriptors["0"], descriptors["3"]) == ("/dev/null", "/dev/zero")


def test_it_is_started_where_the_system_gives_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = os.posix_spawn

    def refuse(*arguments: Any, **more: Any) -> int:
        if more.pop("setsid", False):
            raise NotImplementedError
        return spawn(*arguments, **more)

    monkeypatch.setattr(os, "posix_spawn", refuse)
    assert run([], {})[2] is False


@pytest.mark.parametrize(
    ("executable", "arguments", "environment"),
    [("/nowhere/python", [], {}), (sys.executable, ["\0"], {}), (sys.executable, [], {"A=B": "c"})],
)
def test_what_cannot_be_started_leaves_nothing_open(
    executable: str, arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with no_leak(), pytest.raises((OSError, ValueError)):
        start_program("report.py", arguments, environment, {})


def test_where_descriptors_are_not_listed_it_starts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> list[str]:
        raise OSError("no such folder")

    monkeypatch.setattr(os, "listdir", fail)
    assert run(["x"], {})[0] == ["x"]
