"""The program of the warden: at the end of its input each group is ended in its way, and no other process."""

from __future__ import annotations

import ast
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stickyproxy.control.runner import warden_process
from stickyproxy.control.runner.program import start_program
from stickyproxy.control.runner.warden_process import Ending, follow, read_groups
from tests.helpers.app_processes import FORK, IGNORE_TERM, PYTHON, WAIT, marked
from tests.helpers.processes import wait_until
from tests.helpers.supervised import is_running

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 30
TELL = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(3)))\n"


class Watching:
    """A warden, and the end of its pipe that the supervisor holds."""

    def __init__(self) -> None:
        theirs, self._pipe = os.pipe()
        self.process_id = start_program("warden_process.py", [], os.environ, {0: theirs})
        os.close(theirs)

    def say(self, text: str) -> None:
        os.write(self._pipe, text.encode())

    def leave(self) -> None:
        """Be gone."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def wait(self) -> int:
        """Wait for its end; return the exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])

    def has_read(self) -> bool:
        """Say whether it has read all."""
        return not struct.unpack("i", fcntl.ioctl(self._pipe, termios.FIONREAD, bytes(4)))[0]


@contextmanager
def watching() -> Iterator[Watching]:
    one = Watching()
    try:
        yield one
    finally:
        one.leave()
        if is_running(one.process_id):
            os.kill(one.process_id, signal.SIGKILL)
            one.wait()


@contextmanager
def running(text: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python text in a group of its own, once it has said that it is ready."""
    text = f"{text}\nprint('ready', flush=True)\n{WAIT}"
    with subprocess.Popen([*PYTHON, text], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            while process.stdout.readline() != "ready\n":
                assert process.poll() is None
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_each_group_gets_its_signal_and_what_was_taken_back_is_left_alone() -> None:
    with (
        watching() as warden,
        running(TELL) as told,
        running("") as other,
        running("") as ended,
        running("") as unknown,
    ):
        warden.say(f"+{told.pid} {signal.SIGTERM:d} 30\n+{other.pid} {signal.SIGINT:d} 30\n")
        warden.say(f"+{ended.pid} {signal.SIGTERM:d} 30\n-{ended.pid}\n")
        warden.leave()
        assert told.wait(DEADLINE_S) == 3
        assert other.wait(DEADLINE_S) != 0
        assert warden.wait() == 0
        assert ended.poll() is None
        assert unknown.poll() is None
        assert told.stdout is not None
        assert told.stdout.read() == "asked\n"


def test_nothing_happens_while_the_supervisor_lives() -> None:
    with watching() as warden, running(TELL) as told:
        warden.say(f"+{told.pid} {signal.SIGTERM:d} 0\n")
        wait_until(warden.has_read, "the warden has read")
        assert told.poll() is None
        warden.leave()  # the control
        assert told.wait(DEADLINE_S) in {3, -signal.SIGKILL}


def test_what_ignores_its_signal_is_killed_after_its_timeout() -> None:
    with watching() as warden, running(IGNORE_TERM) as deaf:
        warden.say(f"+{deaf.pid} {signal.SIGTERM:d} 0.2\n")
        warden.leave()
        assert deaf.wait(DEADLINE_S) == -signal.SIGKILL
        assert warden.wait() == 0


def test_what_ends_in_time_is_not_killed() -> None:
    slow = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(7)))\n"
    with watching() as warden, running(slow) as process:
        warden.say(f"+{process.pid} {signal.SIGTERM:d} 30\n")
        warden.leave()
        assert process.wait(DEADLINE_S) == 7


def test_a_stopped_process_ends_by_its_signal() -> None:
    with watching() as warden, running(TELL) as told:
        told.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, told.pid, os.WSTOPPED | os.WNOWAIT)
        warden.say(f"+{told.pid} {signal.SIGTERM:d} 60\n")
        warden.leave()
        assert told.wait(DEADLINE_S) == 3


@pytest.mark.parametrize("child", ["wait", "wait_deaf"])
def test_the_whole_group_ends(child: str) -> None:
    with marked() as mark, watching() as warden:
        leader = subprocess.Popen(
            [*PYTHON, f"{FORK}\nfork({child})\nprint('ready', flush=True)\n{WAIT}"],
            stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, **mark.env},
        )  # fmt: skip
        assert leader.stdout is not None
        with leader.stdout as output:
            assert [output.readline().split()[0] for _ in range(2)] == ["child", "ready"]
            assert len(mark.find()) == 2
            warden.say(f"+{leader.pid} {signal.SIGTERM:d} 0.2\n")
            warden.leave()
            assert leader.wait(DEADLINE_S) == -signal.SIGTERM
            assert warden.wait() == 0
        assert mark.find() == set()


@pytest.mark.parametrize("number", ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_no_signal_but_one_ends_it(number: str) -> None:
    with watching() as warden, running(TELL) as told:
        warden.say(f"+{told.pid} {signal.SIGTERM:d} 30\n")
        wait_until(warden.has_read, "the warden has read")
        os.kill(warden.process_id, getattr(signal, number))
        warden.leave()
        assert told.wait(DEADLINE_S) == 3
        assert warden.wait() == 0


def test_it_stands_apart_from_the_supervisor() -> None:
    with watching() as warden:
        warden.say("-1\n")
        wait_until(warden.has_read, "the warden has read")
        assert os.getsid(warden.process_id) == warden.process_id
        assert Path(f"/proc/{warden.process_id}/cwd").readlink() == Path("/")
        assert [one.name for one in Path(f"/proc/{warden.process_id}/fd").iterdir()] == ["0"]


def test_a_group_that_is_gone_already_is_no_error() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    done.wait()
    with watching() as warden:
        warden.say(f"+{done.pid} {signal.SIGTERM:d} 600\n")
        warden.leave()
        assert warden.wait() == 0


@pytest.mark.parametrize(
    "line",
    [b"", b"?12", b"+", b"+12", b"+12 15", b"+12 15 1 1", b"+a 15 1", b"-", b"-x", b"+0 15 1", b"+1 15 1", b"+-5 15 1"],
)
def test_a_line_that_says_nothing_changes_nothing(line: bytes) -> None:
    groups = {7: Ending(15, 1.0)}
    follow(groups, line)
    assert groups == {7: Ending(15, 1.0)}
    follow(groups, b"+8 2 0.5")  # the control
    follow(groups, b"-7")
    assert groups == {8: Ending(2, 0.5)}


def test_what_came_last_counts_and_half_a_line_does_not() -> None:
    theirs, ours = os.pipe()
    os.write(ours, b"+5 15 10\n+6 15 10\n+5 2 1e+09\n-6\n+7 15 1")
    os.close(ours)
    assert read_groups(theirs) == {5: Ending(2, 1e9)}
    os.close(theirs)


def test_it_imports_little() -> None:
    """It stays in memory as long as the proxy."""
    tree = ast.parse(Path(warden_process.__file__).read_text())
    found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found <= {"__future__", "contextlib", "os", "signal", "sys", "time", "typing"}
