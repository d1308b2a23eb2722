"""The steps of an upgrade alone; whole upgrades of real processes are in end_to_end/test_upgrade.py."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from stickyproxy import __version__
from stickyproxy.control import upgrade as upgrade_module
from stickyproxy.control.inheritance import Inheritance
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.control.upgrade import (
    HELD_SIGNALS,
    Upgrader,
    ask_new_version,
    check,
    describe,
    keep_signals_from_threads,
    program_command,
)
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn
from tests.helpers.loops import no_leak, on_uvloop
from tests.helpers.serving import REPOSITORY
from tests.helpers.supervised import DEADLINE_S, is_running, load, until

if TYPE_CHECKING:
    from stickyproxy.control.supervisor import Supervisor

ANSWER = {"protocol": PROTOCOL, "version": "9.9", "command": ["python", "-m", "worker"], "environment": {"A": "b"}}


def state(**more: Any) -> Inheritance:
    return Inheritance(load(**more), (b"secret",))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def saying(answer: object) -> list[str]:
    return python(f"print({json.dumps(answer)!r})")


# What the new version says


async def test_the_new_version_is_asked_with_the_state() -> None:
    command = python(
        f"""
        import json, os
        kind, number = os.environ["STICKYPROXY_INHERITED"].split(":")
        state = json.loads(os.pread(int(number), 1 << 20, 0))
        print(json.dumps({ANSWER!r} | {{"version": kind + " " + state["secrets"][0]}}))
        """
    )
    with no_leak():
        version, program = await ask_new_version(command, state())
    assert version == "check " + b"secret".hex()
    assert program.command == ("python", "-m", "worker")
    assert program.environment == {"A": "b"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import sys; sys.exit('stickyproxy: it wants more')",
            "the new version cannot start: stickyproxy: it wants more",
        ),
        ("import sys; sys.exit(3)", "the new version cannot start: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "the new version cannot start: exit status -9"),
        (
            "def f(): raise ValueError('no such thing')\nf()",
            'ValueError: no such thing (File "<string>", line 1, in f)',
        ),
        ("def f(:", "SyntaxError: "),
        ("print('usage: stickyproxy [OPTIONS]')", "what is installed now knows no upgrades: it said b'usage: stickyp"),
        ("print('[]')", "knows no upgrades"),
        ("print('{}')", "knows no upgrades"),
        (f'print(\'{{"protocol": {PROTOCOL}, "version": "9", "command": 5}}\')', "knows no upgrades"),
        ('print(\'{"protocol": 0, "version": "9.9"}\')', "version 9.9 cannot take over from 0.1.0: restart the proxy"),
    ],
)
async def test_whatever_it_says_instead_is_told_in_one_line(code: str, said: str) -> None:
    with no_leak(), pytest.raises(UsageError) as error:
        await ask_new_version([sys.executable, "-c", code], state())
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


async def test_long_words_are_cut_to_the_last() -> None:
    with pytest.raises(UsageError) as error:
        await ask_new_version(python("import sys; sys.exit('a' * 100_000 + 'z')"), state())
    assert 2000 <= len(str(error.value)) < 2100
    assert str(error.value).endswith("az")


async def test_a_program_that_is_not_there_is_told() -> None:
    with no_leak(), pytest.raises(UsageError, match="cannot run /no/such/program: no such file or directory"):
        await ask_new_version(["/no/such/program"], state())


@on_uvloop
async def test_a_version_that_hangs_is_ended() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upgrade_module, "_CHECK_S", 1.0)
        with pytest.raises(UsageError, match="the new version said nothing within 1 s"):
            await ask_new_version(python("import time; time.sleep(3600)"), state())
    await until(lambda: children_of(os.getpid()) == set(), "the child is gone")


@on_uvloop
async def test_who_does_not_wait_for_it_any_more_ends_it() -> None:
    task = spawn(ask_new_version(python("import time; time.sleep(3600)"), state()), "ask")
    await until(lambda: len(children_of(os.getpid())) == 1, "the child runs")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: children_of(os.getpid()) == set(), "the child is gone")


def children_of(pid: int) -> set[int]:
    found = {int(one) for task in Path(f"/proc/{pid}/task").glob("*/children") for one in task.read_text().split()}
    return {one for one in found if is_running(one)}


def test_this_version_says_what_another_one_asks_for() -> None:
    answer = json.loads(json.dumps(check(state())))
    assert (answer["protocol"], answer["version"]) == (PROTOCOL, __version__)
    assert answer["command"][-2:] == ["-m", "stickyproxy.control.worker_process"]
    with pytest.raises(UsageError, match="no upstreams"):
        check(state(upstreams=[]))


# What is executed


@pytest.mark.parametrize("is_script", [True, False])
def test_the_program_is_run_as_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_script: bool) -> None:
    script = tmp_path / "stickyproxy"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    link = tmp_path / "current"
    link.symlink_to(script)
    monkeypatch.chdir(tmp_path)
    if is_script:
        monkeypatch.setattr(sys, "argv", ["current", "serve", "--workers", "2"])
        monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "current", "serve", "--workers", "2"])
        assert program_command() == [str(link), "serve", "--workers", "2"]  # the link, not what it points to now
        script.chmod(0o644)
        assert program_command() == [sys.executable, "current", "serve", "--workers", "2"]
    else:
        monkeypatch.setattr(sys, "argv", [str(script), "serve"])
        monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "stickyproxy", "serve"])
        assert program_command() == [sys.executable, "-m", "stickyproxy", "serve"]


EXECUTE = """
    import asyncio, os, signal, sys, time
    import uvloop
    from stickyproxy.control.inheritance import Inheritance
    from stickyproxy.control.upgrade import HELD_SIGNALS, execute, keep_signals_from_threads
    from tests.helpers.supervised import load

    NEXT = '''
    import json, os, signal, sys
    from stickyproxy.control.inheritance import take
    inheritance, is_check = take()
    pending = sorted(one.name for one in signal.sigpending())
    opened = [os.fstat(one).st_ino for one in inheritance.descriptors()]
    print(json.dumps([os.getpid(), is_check, inheritance.secrets[0].decode(), pending, opened]))
    '''

    async def main():
        await keep_signals_from_threads()
        await asyncio.to_thread(time.sleep, 0)
        read, write = os.pipe()
        print(os.getpid(), os.fstat(read).st_ino, os.fstat(write).st_ino, flush=True)
        for number in HELD_SIGNALS:
            os.kill(os.getpid(), number)
        execute([sys.executable, "-c", NEXT.replace("\\n    ", "\\n")], Inheritance(load(), (b"s",), board=read,
                private={"control": write}))

    uvloop.run(main())
"""


def run(code: str) -> list[str]:
    done = subprocess.run(
        python(code), cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_new_version_has_the_process_the_state_the_descriptors_and_the_signals() -> None:
    first, second = run(EXECUTE)
    pid, *inodes = map(int, first.split())
    same_pid, is_check, secret, pending, opened = json.loads(second)
    assert (same_pid, is_check, secret) == (pid, False, "s")
    assert sorted(opened) == sorted(inodes)
    assert pending == ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR2"]


@on_uvloop
async def test_no_thread_takes_a_held_signal() -> None:
    """The control: a thread that was there before does not hold them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    release = threading.Event()
    masks: list[set[Any]] = []
    threads = [threading.Thread(target=release.wait)]
    threads[0].start()
    known = set(threads_of())
    try:
        await keep_signals_from_threads()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= HELD_SIGNALS
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        masks.append(await asyncio.to_thread(signal.pthread_sigmask, signal.SIG_BLOCK, ()))
        new = threads_of().keys() - known
        assert new  # the pool of the executor; that of the loop, where no test before has made it
        held = sum(1 << (number - 1) for number in HELD_SIGNALS)
        assert [mask & held for one, mask in threads_of().items() if one in new] == [held] * len(new)
        assert masks[0] >= HELD_SIGNALS
        assert threads_of()[cast("int", threads[0].native_id)] & held == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        release.set()
        threads[0].join()


def threads_of() -> dict[int, int]:
    """Return the signals that each thread of this process holds, as a bit mask."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        found[int(task.name)] = int(lines["SigBlk"], 16)
    return found


# The upgrader


class StubFleet:
    def __init__(self) -> None:
        self.dropped = 0
        self.counts: dict[str, int] | Exception = {"moved_tunnel": 2}

    async def start_successors(self, _: object) -> list[object]:
        return []

    def drop_successors(self) -> None:
        self.dropped += 1

    async def take_over(self, _: float) -> dict[str, int]:
        if isinstance(self.counts, Exception):
            raise self.counts
        return self.counts


class Stub:
    """What an upgrader needs of a supervisor."""

    def __init__(self) -> None:
        self.fleet = StubFleet()
        self.reloader = SimpleNamespace(finish=self._finish)
        self.notifier = SimpleNamespace(reloading=lambda _: None, ready=lambda: None)
        self.config = load().config
        self.is_handing_over = False
        self.is_stopping = False
        self.runner: SimpleNamespace | None = None
        self.freed = 0
        self.left: list[object] = []

    async def _finish(self) -> None:
        pass

    def export(self) -> Inheritance:
        return state()

    def on_free(self) -> None:
        self.freed += 1

    async def leave(self, successors: list[object]) -> Inheritance:
        self.left.append(successors)
        return state()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(upgrade_module, "program_command", lambda: saying(ANSWER))
    monkeypatch.setattr(upgrade_module, "_ANSWER_S", 0.01)
    return Stub()


def make(stub: Stub, **counts: Any) -> Upgrader:
    inherited = Inheritance(load(), (), counts=counts) if counts else None
    return Upgrader(cast("Supervisor", stub), inherited)


async def test_where_all_goes_well_the_new_version_is_executed(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[tuple[list[str], Inheritance]] = []
    held: set[Any] = set()

    def execute(command: list[str], inheritance: Inheritance) -> None:
        executed.append((command, inheritance))
        held.update(signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS))

    monkeypatch.setattr(upgrade_module, "execute", execute)
    upgrader = make(stub)
    await upgrader.upgrade()
    assert upgrader.status == {"number": 1, "state": "running", "from": __version__, "to": "9.9"}
    assert upgrader.is_running
    with pytest.raises(UsageError, match="an upgrade is under way already"):
        await upgrader.upgrade()
    await until(lambda: executed, "it is executed")
    assert executed[0][0] == saying(ANSWER)
    assert held >= HELD_SIGNALS
    assert upgrader.outcomes == {"ok": 0, "failed": 0}
    assert stub.freed == 0


async def test_what_cannot_be_executed_is_gone_on_from(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[list[str]] = []

    def execute(command: list[str], _: Inheritance) -> None:
        executed.append(command)
        if len(executed) == 1:
            raise PermissionError(13, "Permission denied")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)

    monkeypatch.setattr(upgrade_module, "execute", execute)
    await make(stub).upgrade()
    await until(lambda: len(executed) == 2, "this version is executed again")
    assert executed[1] == [sys.executable, *sys.orig_argv[1:]]


async def test_who_is_stopped_is_not_upgraded(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """Neither after the check, nor just before the execution; and the signals are let through again."""
    upgrader = make(stub)
    stub.is_stopping = True
    with pytest.raises(UsageError, match="the proxy is stopping"):
        await upgrader.upgrade()
    stub.is_stopping = False
    await upgrader.upgrade()
    stub.is_stopping = True
    await until(lambda: stub.fleet.dropped, "the new workers are dropped")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & HELD_SIGNALS
    assert (upgrader.status["state"], upgrader.status["reason"]) == ("failed", "the proxy is stopping")
    assert (stub.left, stub.freed, upgrader.outcomes["failed"]) == ([], 2, 2)
    assert caplog.messages.count(f"cannot upgrade, version {__version__} goes on: the proxy is stopping") == 2


async def test_while_a_deploy_is_not_decided_there_is_no_upgrade(stub: Stub) -> None:
    upgrader = make(stub)
    stub.runner = SimpleNamespace(is_turning=True)
    with pytest.raises(UsageError, match="a deploy is under way"):
        await upgrader.upgrade()
    assert upgrader.status == {}


async def test_while_another_proxy_takes_over_there_is_no_upgrade(stub: Stub) -> None:
    upgrader = make(stub)
    stub.is_handing_over = True
    with pytest.raises(UsageError, match="another proxy is taking over"):
        await upgrader.upgrade()
    assert upgrader.status == {}


async def test_what_fails_is_counted_and_may_be_tried_again(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upgrader = make(stub)
    monkeypatch.setattr(upgrade_module, "program_command", lambda: python("import sys; sys.exit('no')"))
    for number in (1, 2):
        with pytest.raises(UsageError, match="the new version cannot start: no"):
            await upgrader.upgrade()
        assert upgrader.status["number"] == number
        assert upgrader.status["state"] == "failed"
        assert (upgrader.outcomes["failed"], stub.freed) == (number, number)
    assert not upgrader.is_running

    async def crash(_: object) -> list[object]:
        raise ZeroDivisionError

    monkeypatch.setattr(upgrade_module, "program_command", lambda: saying(ANSWER))
    monkeypatch.setattr(stub.fleet, "start_successors", crash)
    with pytest.raises(UsageError, match=r"the upgrade crashed: ZeroDivisionError\(\)"):
        await upgrader.upgrade()
    assert "the upgrade crashed" in caplog.messages


async def test_the_new_version_counts_on_and_says_what_has_moved(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = make(stub)
    before.status = {"number": 4, "state": "running", "from": "1.0"}
    before.outcomes = Counter({"ok": 3, "failed": 1})
    after = make(stub, **json.loads(json.dumps(before.export())))
    assert after.is_running
    await after.take_over()
    assert after.outcomes == {"ok": 4, "failed": 1}
    assert not after.is_running
    assert {
        "number": 4,
        "state": "ok",
        "from": "1.0",
        "to": __version__,
        "moved_tunnel": 2,
    }.items() <= after.status.items()
    assert after.status["seconds"] >= 0
    assert caplog.messages == [f"upgraded from version 1.0 to {__version__}: 2 tunnels and 0 connections have moved"]


async def test_where_the_workers_do_not_take_over_that_is_told(stub: Stub) -> None:
    upgrader = make(stub, upgrade={"number": 1, "state": "running"})
    stub.fleet.counts = UsageError("no worker is left")
    await upgrader.take_over()
    assert (upgrader.status["state"], upgrader.status["reason"]) == ("failed", "no worker is left")


NOTHING = "0 tunnels and 0 connections have moved"
REST = "and have 0.5 s to end in the old workers"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({}, NOTHING),
        ({"moved_tunnel": 3, "moved_downstream": 1}, "3 tunnels and 1 connections have moved"),
        (
            {"left_tls": 2, "left_exchange": 1, "grace_s": 30.0},
            f"{NOTHING}; 2 of TLS, 1 in an exchange cannot, and have 30 s to end in the old workers",
        ),
        (
            {"left_waiting": 1, "left_ending": 2, "left_handshake": 3, "left_refused": 4, "grace_s": 0.5},
            f"{NOTHING}; 2 ending, 1 with unsent bytes, 3 in a handshake, 4 that were refused cannot, {REST}",
        ),
        (
            {"failed": 1},
            f"{NOTHING}; 1 old workers could not hand over, and serve on: the log says why",
        ),
    ],
)
def test_what_has_moved_is_said_in_words(status: dict[str, float], words: str) -> None:
    assert describe(status) == words
