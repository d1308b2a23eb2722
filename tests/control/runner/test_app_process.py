"""One app process: it is started or it is said why not, nothing that it wrote is lost, and nothing of it stays."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from stickyproxy.control.runner import app_process as app_process_module
from stickyproxy.control.runner.app_process import AppProcess
from stickyproxy.control.runner.launch import LINK
from stickyproxy.control.runner.program import start_program
from stickyproxy.control.runner.warden import Warden
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn
from tests.helpers.app_processes import (
    FORK,
    IGNORE_TERM,
    PYTHON,
    WAIT,
    Mark,
    Written,
    make_process,
    marked,
    on_each_loop,
)
from tests.helpers.loops import no_leak
from tests.helpers.processes import wait_until
from tests.helpers.raw import eventually
from tests.helpers.supervised import is_running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60
PR_SET_CHILD_SUBREAPER = 36


class Watchful(Warden):
    """A warden that only takes notes."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Any, ...]] = []
        self.known: set[int] = set()

    @override
    def add(self, group: int, number: int, timeout_s: float) -> None:
        self.told.append((group, number, timeout_s, read_command(group)))
        self.known.add(group)

    @override
    def remove(self, group: int) -> None:
        self.known.discard(group)


def wait_for(process_id: int, what: int = os.WEXITED) -> None:
    """Wait for the end of a process, or for what else becomes of it; the loop sees nothing in it."""
    os.waitid(os.P_PID, process_id, what | os.WNOWAIT)


def read_command(process_id: int) -> bytes:
    """Return the words that a process was executed with."""
    return Path(f"/proc/{process_id}/cmdline").read_bytes()


def has_zombie(process_id: int) -> bool:
    """Say whether a child has ended that nobody has waited for."""
    with suppress(ChildProcessError):
        return os.waitpid(process_id, os.WNOHANG) is not None
    return False


class Scene:
    """What a test has at hand: it makes app processes, and sees what they write and which are left."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self.warden = Watchful()
        self.written = Written()
        self.made: list[AppProcess] = []

    def make(self, words: Sequence[str] | str, **more: Any) -> AppProcess:
        """Return an app process; a text is a program in Python."""
        if isinstance(words, str):
            words = [*PYTHON, words]
        env = {**self.mark.env, **more.pop("env", {})}
        process = make_process(words, self.warden, self.written, env=env, **more)
        self.made.append(process)
        return process

    async def start(self, words: Sequence[str] | str, **more: Any) -> AppProcess:
        """Start one."""
        process = self.make(words, **more)
        await process.start()
        return process

    async def see(self, line: str) -> None:
        """Wait until a line was written."""
        await eventually(lambda: line in self.written.lines, f"{line!r} in {self.written.lines}")

    async def see_child(self) -> int:
        """Wait until a child of the app runs; return its process id."""
        await eventually(lambda: self.written.numbers("child"))
        return self.written.numbers("child")[0]


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    """Give a scene; in the end no process may be left, the warden must know it, and nothing may be open."""
    await asyncio.sleep(0)
    with marked() as mark, no_leak():
        it = Scene(mark)
        try:
            yield it
        finally:
            for process in it.made:
                await process.stop(signal.SIGKILL)
        await eventually(lambda: not mark.find(), "nothing is left")
        assert it.warden.known == set()


# Its start


@on_each_loop
async def test_it_runs_and_ends() -> None:
    text = "import os, sys; print(os.getpid(), os.getsid(0), sys.stdin.read() == '', flush=True); sys.exit(3)"
    async with scene() as it:
        before = asyncio.get_running_loop().time()
        process = it.make(text)
        assert repr(process) == "<AppProcess g1-1 pid=0 new>"
        assert not process.is_running
        await process.start()
        assert process.process_id > 1
        assert before <= process.started_at <= asyncio.get_running_loop().time()
        assert await process.ended == "exit status 3"
        assert process.exit_status == 3
        assert it.written.lines == list(process.last_lines) == [f"{process.process_id} {process.process_id} True"]
        assert repr(process) == f"<AppProcess g1-1 pid={process.process_id} exit status 3>"
        assert not has_zombie(process.process_id)


@on_each_loop
async def test_a_process_that_is_killed_says_by_what() -> None:
    async with scene() as it:
        process = await it.start(WAIT)
        assert process.is_running
        os.kill(process.process_id, signal.SIGSEGV)
        assert await process.ended == "killed by SIGSEGV"
        assert process.exit_status == -signal.SIGSEGV


CANNOT = [
    (["no-such-program", "x"], None, "cannot run 'no-such-program': no such file or directory"),
    (["/etc/passwd"], None, "cannot run '/etc/passwd': permission denied"),
    (["true"], "/nowhere", "cannot run 'true': its directory /nowhere: no such file or directory"),
    (["true"], "/etc/passwd", "cannot run 'true': its directory /etc/passwd: not a directory"),
    (
        ["./script"],
        "here",
        "cannot run './script': no such file or directory: the interpreter that its first line names",
    ),
    (["./plain"], "here", "cannot run './plain': it is no program, and its first line names no interpreter"),
    (["a\0b"], None, r"cannot run 'a\x00b': embedded null byte"),
    (["true", "x" * 10_000_000], None, "cannot run 'true': argument list too long"),
    ([""], None, "cannot run '': no such file or directory"),
]


@pytest.mark.parametrize(("words", "cwd", "reason"), CANNOT)
@on_each_loop
async def test_what_cannot_be_run_is_told_at_once(
    words: list[str], cwd: str | None, reason: str, tmp_path: Path
) -> None:
    for name, text in {"script": "#!/nowhere/python\n", "plain": "echo\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    async with scene() as it:
        process = it.make(words, cwd=tmp_path if cwd == "here" else None if cwd is None else Path(cwd))
        with pytest.raises(UsageError) as caught:
            await process.start()
        assert str(caught.value).startswith(reason)
        assert it.mark.find() == set(), "without waiting"
        assert not process.is_running
        await process.stop()


@on_each_loop
async def test_a_python_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as it:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(UsageError, match="cannot run 'true': no such file or directory"):
            await it.start(["true"])


@on_each_loop
async def test_a_program_of_ours_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_process_module, "_PROGRAM", "nothing.py")
    async with scene() as it:
        with pytest.raises(UsageError, match=r"cannot run 'true': exit status 2 before it could begin: .*nothing\.py"):
            await it.start(["true"])


@on_each_loop
async def test_the_warden_is_told_before_the_app_begins() -> None:
    async with scene() as it:
        process = await it.start(WAIT, stop_signal=signal.SIGINT, stop_timeout_s=7.0)
        assert it.warden.known == {process.process_id}
        [(group, number, timeout_s, command)] = it.warden.told
        assert (group, number, timeout_s) == (process.process_id, signal.SIGINT, 7.0)
        assert b"launch.py" in command
        assert b"launch.py" not in read_command(group)  # the control


@on_each_loop
async def test_the_loop_goes_on_during_a_start_which_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start_stopped(*args: Any) -> int:
        started.append(start_program(*args))
        os.kill(started[0], signal.SIGSTOP)
        return started[0]

    monkeypatch.setattr(app_process_module, "start_program", start_stopped)
    async with scene() as it:
        process = it.make(["touch", "/nowhere/x"])
        task = spawn(process.start(), "start")
        await eventually(lambda: started)
        await asyncio.sleep(0.05)
        assert not task.done()
        with pytest.raises(ValueError, match="not been started yet"):
            process.leave()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.wait_for(process.ended, DEADLINE_S) == "killed by SIGKILL"


@pytest.mark.parametrize("moment", ["before", "after"])
@on_each_loop
async def test_a_start_that_is_killed_is_told_or_is_an_end(moment: str) -> None:
    """From the word on, the end of the socket means that the app runs."""
    async with scene() as it:
        process = it.make(WAIT)
        add = it.warden.add

        def add_and_kill(group: int, number: int, timeout_s: float) -> None:
            add(group, number, timeout_s)
            os.kill(group, signal.SIGKILL)
            wait_for(group)

        if moment == "after":
            it.warden.add = add_and_kill  # type: ignore[method-assign]
            await process.start()
        else:
            task = spawn(process.start(), "start")
            await eventually(lambda: process.process_id)
            os.kill(process.process_id, signal.SIGSTOP)
            os.kill(process.process_id, signal.SIGKILL)
            with suppress(UsageError):  # it may have been quicker
                await task
        assert await process.ended == "killed by SIGKILL"


def list_inherited() -> str:
    """Return what a child has open that inherits all: the control."""
    command = "ls", "/proc/self/fd"
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, close_fds=False).stdout


@on_each_loop
async def test_the_app_has_three_descriptors_whatever_this_process_has() -> None:
    opened = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(opened, True)
    try:
        async with scene() as it:
            process = await it.start(["ls", "/proc/self/fd"])
            await process.ended
            assert it.written.lines == ["0", "1", "2", "3"], "3 is that of the listing"
        assert str(opened) in list_inherited().split()
    finally:
        os.close(opened)


@on_each_loop
async def test_its_directory_is_its_own(tmp_path: Path) -> None:
    async with scene() as it:
        process = await it.start(["pwd"], cwd=tmp_path)
        await process.ended
        other = await it.start(["pwd"])
        await other.ended
        assert it.written.lines == [str(tmp_path), str(Path.cwd())]


@on_each_loop
async def test_it_works_where_the_system_tells_less(monkeypatch: pytest.MonkeyPatch) -> None:
    posix_spawn = os.posix_spawn

    def fail(_: int) -> int:
        raise OSError("no such system call")

    def refuse(*arguments: Any, **more: Any) -> int:
        if more.pop("setsid", False):
            raise NotImplementedError
        return posix_spawn(*arguments, **more)

    monkeypatch.setattr(os, "pidfd_open", fail)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    async with scene() as it:
        process = await it.start(f"{FORK}\nfork(wait_deaf)\nprint('ready')\n{WAIT}")
        await it.see("ready")
        assert os.getpgid(await it.see_child()) == process.process_id
        await process.stop(timeout_s=0.2)
        assert await process.ended == "killed by SIGTERM"
        assert it.mark.find() == set()


# What it writes


@on_each_loop
async def test_both_outputs_come_line_by_line_in_their_order() -> None:
    text = "import os\nfor n in range(5000): os.write(1 + n % 2, b'n %d\\n' % n)\n"
    async with scene() as it:
        process = await it.start(text)
        await process.ended
        assert it.written.numbers("n") == list(range(5000))
        assert list(process.last_lines) == it.written.lines[-200:]


@on_each_loop
async def test_the_last_words_count_though_they_end_no_line() -> None:
    async with scene() as it:
        process = await it.start("import os; os.write(2, b'x' * 60000 + b'\\n\\x1b[2JFatal: \\xff'); os.abort()")
        wait_for(process.process_id)
        assert it.written.lines == []
        assert await process.ended == "killed by SIGABRT"
        assert process.last_lines[-1] == "Fatal: \ufffd"
        assert sum(map(len, it.written.lines[:-1])) == 60_000
        assert {len(line) for line in it.written.lines[:7]} == {8192}


@on_each_loop
async def test_an_app_that_closes_its_output_runs_on() -> None:
    async with scene() as it:
        process = await it.start(f"import os\nprint('bye', end='', flush=True)\nos.close(1)\nos.close(2)\n{WAIT}")
        await it.see("bye")
        await eventually(lambda: process._output is None)
        assert process.is_running
        await process.stop()
        assert await process.ended == "killed by SIGTERM"


@on_each_loop
async def test_what_has_left_the_group_and_writes_on_does_not_keep_the_end_from_being_seen() -> None:
    flood = "def flood(begun):\n    os.setsid()\n    os.write(begun, b'.')\n    while True: os.write(1, b'flood\\n')\n"
    async with scene() as it:
        process = await it.start(f"{FORK}{flood}fork(flood)\n")
        assert await asyncio.wait_for(process.ended, DEADLINE_S) == "exit status 0"
        assert process._output is None
        await eventually(lambda: not it.mark.find(), "it got SIGPIPE")


@on_each_loop
async def test_a_line_that_cannot_be_shown_does_not_keep_the_end_from_being_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no screen")

    async with scene() as it:
        process = AppProcess("g1-1", ["echo"], {**os.environ, **it.mark.env}, None, it.warden, fail)
        it.made.append(process)
        await process.start()
        assert await asyncio.wait_for(process.ended, DEADLINE_S) == "exit status 0"
        process._on_line = it.written
    assert "no screen" in caplog.text


# Its end


@on_each_loop
async def test_it_is_stopped_by_its_signal() -> None:
    text = "import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: (print('bye'), sys.exit(4)))\nprint('ready')\n"
    async with scene() as it:
        process = await it.start(text + WAIT, stop_signal=signal.SIGUSR1, stop_timeout_s=DEADLINE_S)
        await it.see("ready")
        await process.stop()
        assert await process.ended == "exit status 4"
        assert it.written.lines == ["ready", "bye"]
        assert it.mark.find() == set()
        await process.stop()


@on_each_loop
async def test_another_signal_may_be_asked_for() -> None:
    async with scene() as it:
        process = await it.start(IGNORE_TERM + "print('ready')\n" + WAIT)
        await it.see("ready")
        await process.stop(signal.SIGQUIT, DEADLINE_S)
        assert await process.ended == "killed by SIGQUIT"


@on_each_loop
async def test_one_that_ignores_its_signal_is_killed_after_the_timeout() -> None:
    async with scene() as it:
        process = await it.start(IGNORE_TERM + "print('ready')\n" + WAIT, stop_timeout_s=0.3)
        await it.see("ready")
        began = asyncio.get_running_loop().time()
        await process.stop()
        assert asyncio.get_running_loop().time() - began >= 0.29
        assert await process.ended == "killed by SIGKILL"


@on_each_loop
async def test_a_stopped_one_ends_by_its_signal() -> None:
    async with scene() as it:
        process = await it.start(WAIT)
        os.kill(process.process_id, signal.SIGSTOP)
        wait_for(process.process_id, os.WSTOPPED)
        await asyncio.wait_for(process.stop(timeout_s=10 * DEADLINE_S), DEADLINE_S)
        assert await process.ended == "killed by SIGTERM"


@on_each_loop
async def test_when_it_ends_by_itself_its_group_is_killed() -> None:
    stray = "def stray(begun):\n    os.setsid()\n    wait(begun)\n"
    async with scene() as it:
        process = await it.start(f"{FORK}{stray}fork(wait_deaf)\nfork(stray)\n")
        assert await process.ended == "exit status 0"
        _, free = it.written.numbers("child")
        await eventually(lambda: it.mark.find() == {free}, "what is in its group")
        it.mark.kill()  # what has left it is the control


@on_each_loop
async def test_what_it_started_has_the_rest_of_the_timeout_to_end() -> None:
    """A shell ends at once by SIGTERM; the app that it runs has something to store yet."""
    slow = """
def slow(begun):
    def end(*_):
        time.sleep(0.3)
        print("stored", flush=True)
        os._exit(0)
    signal.signal(signal.SIGTERM, end)
    wait(begun)
"""
    async with scene() as it:
        process = await it.start(f"{FORK}{slow}fork(slow)\n{WAIT}")
        await it.see_child()
        await process.stop(timeout_s=DEADLINE_S)
        assert await process.ended == "killed by SIGTERM"
        assert it.written.lines[1:] == ["stored"]
        assert it.mark.find() == set()


@on_each_loop
async def test_what_it_started_is_killed_after_the_timeout() -> None:
    async with scene() as it:
        process = await it.start(f"{FORK}fork(wait_deaf)\n{WAIT}")
        child = await it.see_child()
        stopping = spawn(process.stop(timeout_s=0.3), "stop")
        assert await process.ended == "killed by SIGTERM"
        assert is_running(child)
        await stopping
        assert not is_running(child)


@on_each_loop
async def test_the_shortest_timeout_counts() -> None:
    async with scene() as it:
        process = await it.start(IGNORE_TERM + "print('ready')\n" + WAIT)
        await it.see("ready")
        slow = spawn(process.stop(timeout_s=10 * DEADLINE_S), "slow")
        await asyncio.sleep(0)
        await asyncio.wait_for(process.stop(timeout_s=0), DEADLINE_S)
        await asyncio.wait_for(slow, DEADLINE_S)
        assert await process.ended == "killed by SIGKILL"


@pytest.mark.parametrize("has_leader", [True, False])
@on_each_loop
async def test_a_stop_that_is_given_up_leaves_no_group_without_its_leader(*, has_leader: bool) -> None:
    text = FORK + (IGNORE_TERM if has_leader else "") + f"fork(wait_deaf)\n{WAIT}"
    async with scene() as it:
        process = await it.start(text)
        child = await it.see_child()
        stopping = spawn(process.stop(timeout_s=10 * DEADLINE_S), "stop")
        await (asyncio.sleep(0.05) if has_leader else process.ended)
        assert is_running(child)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        if has_leader:
            assert process.is_running
            os.kill(process.process_id, signal.SIGKILL)
        await eventually(lambda: not it.mark.find(), "the group is killed")


@on_each_loop
async def test_kill_waits_for_nothing() -> None:
    async with scene() as it:
        process = it.make(f"{FORK}fork(wait_deaf)\n{WAIT}")
        process.kill()
        await process.start()
        await it.see_child()
        process.kill()
        assert await process.ended == "killed by SIGKILL"
        process.kill()
        await eventually(lambda: not it.mark.find(), "the group is killed")


@on_each_loop
async def test_one_that_was_never_started_needs_no_stop() -> None:
    async with scene() as it:
        await it.make(["true"]).stop()


@on_each_loop
async def test_orphans_that_become_children_of_this_process_are_waited_for() -> None:
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        async with scene() as it:
            process = await it.start(f"{FORK}fork(wait)\n{WAIT}")
            child = await it.see_child()
            await asyncio.wait_for(process.stop(timeout_s=10 * DEADLINE_S), DEADLINE_S)
            assert not has_zombie(child)
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# Another image of the supervisor goes on


async def pass_on(it: Scene, process: AppProcess) -> tuple[AppProcess, dict[str, Any]]:
    """Leave a process, and adopt it; return it, and the state."""
    state = json.loads(json.dumps(process.leave()))
    adopted = AppProcess.adopt(state, it.warden, it.written)
    it.made.append(adopted)
    assert it.warden.told[-1][:3] == (process.process_id, process.stop_signal, process.stop_timeout_s)
    return adopted, state


@on_each_loop
async def test_another_image_goes_on_with_it() -> None:
    text = "import os\nos.write(1, b'one\\nhal')\nos.read(0, 1)\n"
    async with scene() as it:
        former = await it.start(text + WAIT, stop_signal=signal.SIGINT, stop_timeout_s=3.0)
        await it.see("one")
        await eventually(lambda: former._lines.partial)
        process, state = await pass_on(it, former)
        assert (process.process_id, process.started_at) == (former.process_id, former.started_at)
        assert (process.upstream_id, process.stop_signal, process.stop_timeout_s) == ("g1-1", signal.SIGINT, 3.0)
        assert list(process.last_lines) == ["one"]
        assert not os.get_inheritable(state["output"])
        former.kill()
        await former.stop()
        assert process.is_running
        os.kill(process.process_id, signal.SIGKILL)
        assert await process.ended == "killed by SIGKILL"
        assert it.written.lines == ["one", "hal"]
        assert not former.ended.done()


@on_each_loop
async def test_the_other_image_sees_that_it_ended_on_the_way() -> None:
    async with scene() as it:
        former = await it.start(
            "import sys, time\nprint('one', flush=True)\nsys.stdin.read()\nprint('two')\nsys.exit(9)"
        )
        state = former.leave()
        wait_for(former.process_id)
        process = AppProcess.adopt(state, it.warden, it.written)
        it.made.append(process)
        assert await process.ended == "exit status 9"
        assert it.written.lines[-1:] == ["two"]


@on_each_loop
async def test_one_that_has_ended_before_stays_so() -> None:
    async with scene() as it:
        former = await it.start("print('one'); raise SystemExit(9)")
        await former.ended
        process = AppProcess.adopt(former.leave(), it.warden, it.written)
        assert process.ended.result() == "exit status 9"
        assert (process.exit_status, list(process.last_lines)) == (9, ["one"])
        assert not process.is_running
        await process.stop()


@on_each_loop
async def test_what_is_left_of_its_group_is_not_forgotten() -> None:
    async with scene() as it:
        former = await it.start(f"{FORK}fork(wait_deaf)\n{WAIT}")
        child = await it.see_child()
        stopping = spawn(former.stop(timeout_s=10 * DEADLINE_S), "stop")
        await former.ended
        assert is_running(child)
        state = former.leave()
        await eventually(lambda: not is_running(child))
        assert AppProcess.adopt(state, it.warden, it.written).ended.result() == "killed by SIGTERM"
        await stopping


NUMBERS = """
import os, signal, sys, time
at = 0
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
while not stopped:
    os.write(1, b"n %d" % at)
    time.sleep(0.002)
    os.write(1, b" whole\\n")
    at += 1
os.write(2, b"last %d" % at)
"""


def supervise(loop: str, what: str, how: str, text: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """Run a supervisor as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "helpers" / "app_supervisor.py"), loop, what, how, text],
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_nothing_is_lost_and_nothing_is_touched_when_the_supervisor_executes_itself(loop: str) -> None:
    with marked() as mark:
        said, lines = supervise(loop, "execute", "4", NUMBERS, mark.env).communicate(timeout=DEADLINE_S)
        assert mark.find() == set()
    *images, end = map(json.loads, said.splitlines())
    assert len(images) == 5, lines
    assert end == {"ended": "exit status 0", "status": 0}
    for one in ("pid", "app", "warden", "started_at"):
        assert len({image[one] for image in images}) == 1, one
    assert images[1]["kept"] >= 100
    *numbers, last = [line.removeprefix("g1-1 ") for line in lines.splitlines()]
    assert numbers == [f"n {at} whole" for at in range(len(numbers))]
    assert last == f"last {len(numbers)}"


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_an_output_that_does_not_stay_open_is_lost(loop: str) -> None:
    """The control."""
    with marked() as mark:
        env = {**mark.env, "careless": "yes"}
        said, errors = supervise(loop, "execute", "1", NUMBERS, env).communicate(timeout=DEADLINE_S)
    assert '"status": 0' not in said
    assert "Bad file descriptor" in errors


MOMENTS = [
    "spawned",
    "told",
    "gone",
    "at once",
    "running",
    "stopping",
    "stopped",
    "leader ended",
    "warden replaced",
    "left",
    "executed",
    "adopted",
]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("moment", [*MOMENTS, "unguarded"])
def test_no_process_is_left_whenever_the_supervisor_is_killed(moment: str, loop: str, tmp_path: Path) -> None:
    began = tmp_path / "began"
    text = f"open({str(began)!r}, 'w').close()\n{FORK}{IGNORE_TERM}fork(wait_deaf)\nprint('ready')\n{WAIT}"
    with marked() as mark:
        supervisor = supervise(loop, "kill", moment, text, mark.env)
        with supervisor:
            assert supervisor.wait(DEADLINE_S) == -signal.SIGKILL, supervisor.stderr and supervisor.stderr.read()
        if moment == "unguarded":  # the control: app and child, and the warden that knows of none ends
            wait_until(lambda: len(mark.find()) == 2, "the app lives on")
        else:
            wait_until(lambda: not mark.find(), f"nothing is left of {mark.find()}")
        assert began.exists() or moment in {"spawned", "told", "gone", "at once"}
        assert not (began.exists() and moment in {"spawned", "told"})


def test_the_number_of_the_socket_is_no_standard_one() -> None:
    assert LINK > 2
