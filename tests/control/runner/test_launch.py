"""The program that becomes an app process: only when it is told to, and with nothing of its own left over."""

from __future__ import annotations

import ast
import errno
import os
import signal
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.control.runner import launch
from stickyproxy.control.runner.program import start_program
from tests.helpers.app_processes import PYTHON

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEADLINE_S = 30


class Launched:
    """The program, and what the supervisor holds of it."""

    def __init__(self, words: Sequence[str], directory: str, env: Mapping[str, str], *, locale: str = "") -> None:
        self.link, theirs = socket.socketpair()
        self.link.settimeout(DEADLINE_S)
        self._output, written = os.pipe()
        descriptors = {1: written, 2: written, 3: theirs.fileno()}
        self.process_id = start_program("launch.py", [locale, directory, *words], env, descriptors)
        self.status: int | None = None
        theirs.close()
        os.close(written)

    def go(self) -> bytes:
        """Let it become the app; return what it says then."""
        assert self.link.recv(10) == b"."
        self.link.sendall(b"g")
        return self.link.recv(100)

    def read(self) -> str:
        """Return all output, up to the end of the process."""
        with os.fdopen(self._output, closefd=False) as file:
            said = file.read()
        self.wait()
        return said

    def wait(self) -> int:
        """Wait for the end; return the exit status, below 0 for a signal."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])
        return self.status

    def close(self) -> None:
        """End it, and leave nothing open."""
        self.link.close()
        if self.status is None:
            os.kill(self.process_id, signal.SIGKILL)
        self.wait()
        os.close(self._output)


@contextmanager
def launched(
    *words: str, directory: str = "", env: Mapping[str, str] | None = None, locale: str = ""
) -> Iterator[Launched]:
    one = Launched(words, directory, dict(os.environ) if env is None else env, locale=locale)
    try:
        yield one
    finally:
        one.close()


def test_it_becomes_the_app_when_it_is_told_to() -> None:
    with launched(*PYTHON, "import os, sys; print(os.getpid(), sys.argv[1:])", "a b", "") as one:
        assert one.go() == b""
        assert one.read() == f"{one.process_id} ['a b', '']\n"
        assert one.wait() == 0


def test_it_runs_nothing_when_the_supervisor_is_gone(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for is_control in (False, True):
        with launched("touch", str(made)) as one:
            if is_control:
                assert one.go() == b""
            one.link.close()
            assert one.read() == ""
            assert one.wait() == 0
        assert made.exists() == is_control


def test_it_ends_quietly_when_the_supervisor_goes_while_it_waits() -> None:
    with launched("touch", "/nowhere/x") as one:
        assert one.link.recv(10) == b"."
        one.link.close()
        assert (one.read(), one.wait()) == ("", 0)


@pytest.mark.parametrize(
    ("words", "number", "step", "status"),
    [
        (["no-such-program"], errno.ENOENT, "exec", 127),
        (["/nowhere/program"], errno.ENOENT, "exec", 127),
        (["/etc/passwd"], errno.EACCES, "exec", 126),
        (["/etc"], errno.EACCES, "exec", 126),
        (["./no-interpreter"], errno.ENOENT, "interpreter", 127),
        (["./no-program"], errno.ENOEXEC, "exec", 126),
    ],
)
def test_it_says_why_it_cannot_become_the_app(
    words: list[str], number: int, step: str, status: int, tmp_path: Path
) -> None:
    for name, text in {"no-interpreter": "#!/nowhere/python\n", "no-program": "echo\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    with launched(*words, directory=str(tmp_path)) as one:
        assert one.go().decode() == f"{number} {step}"
        assert (one.read(), one.wait()) == ("", status)


@pytest.mark.parametrize(("directory", "number"), [("/nowhere", errno.ENOENT), ("/etc/passwd", errno.ENOTDIR)])
def test_it_says_that_there_is_no_such_directory(directory: str, number: int) -> None:
    with launched("true", directory=directory) as one:
        assert one.go().decode() == f"{number} chdir"
        assert one.wait() in {126, 127}


def test_the_app_runs_in_its_directory_and_is_found_there(tmp_path: Path) -> None:
    (tmp_path / "app").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "app").chmod(0o700)
    with launched("./app", directory=str(tmp_path)) as one:
        assert one.go() == b""
        assert one.read() == f"{tmp_path}\n"


def test_the_app_is_found_by_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "my-app").symlink_to("/bin/echo")
    with launched("my-app", "hello", env={"PATH": str(tmp_path)}) as one:
        assert one.go() == b""
        assert one.read() == "hello\n"


@pytest.mark.parametrize("env", [{"A": "b"}, {"LC_CTYPE": "C.UTF-8"}, {"LANG": "C", "PYTHONUNBUFFERED": "1"}])
def test_the_app_has_its_own_environment_and_nothing_else(env: dict[str, str]) -> None:
    """Python sets LC_CTYPE by itself where no locale is set (PEP 538)."""
    with launched("/usr/bin/env", env=env, locale="LC_CTYPE" if "LC_CTYPE" in env else "") as one:
        assert one.go() == b""
        assert sorted(one.read().splitlines()) == sorted(f"{name}={value}" for name, value in env.items())


def test_words_that_are_no_text_stay_as_they_are() -> None:
    word = os.fsdecode(b"\xff\xfe \xc3\xa9")
    with launched("printf", "%s", word, env={"PATH": os.environ["PATH"]}) as one:
        assert one.go() == b""
        with os.fdopen(one._output, "rb", closefd=False) as file:
            assert file.read() == b"\xff\xfe \xc3\xa9"


def test_the_app_has_three_descriptors() -> None:
    with launched("ls", "/proc/self/fd") as one:
        assert one.go() == b""
        assert one.read().split() == ["0", "1", "2", "3"], "3 is that of the listing"


def read_masks(status: str) -> set[int]:
    """Return the sets of signals, without two that the C library has for itself, and lets `posix_spawn` ignore."""
    return {int(line.split()[1], 16) & ~(0b11 << 31) for line in status.splitlines()}


def test_the_app_ignores_and_blocks_no_signal() -> None:
    command = "grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"
    changed = signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM
    before = {number: signal.signal(number, signal.SIG_IGN) for number in changed}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with launched(*command) as one:
            assert one.go() == b""
            assert read_masks(one.read()) == {0}
        control = subprocess.run(command, capture_output=True, text=True, check=True)
        assert len(read_masks(control.stdout) - {0}) == 2
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_app_leads_a_group_where_it_was_not_started_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = os.posix_spawn

    def spawn_plainly(*args: Any, **more: Any) -> int:
        return spawn(*args, **{**more, "setsid": False})

    monkeypatch.setattr(os, "posix_spawn", spawn_plainly)
    with launched(*PYTHON, "import os; print(os.getpgrp() == os.getsid(0) == os.getpid())") as one:
        assert one.go() == b""
        assert one.read() == "True\n"


def test_it_imports_little() -> None:
    """Each app process waits for it."""
    tree = ast.parse(Path(launch.__file__).read_text())
    found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found <= {"__future__", "errno", "os", "signal", "sys"}
