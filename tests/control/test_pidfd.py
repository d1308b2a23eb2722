"""The end of children: it is told once, whether the system tells or must be asked, and nothing stays open."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from stickyproxy.control import pidfd
from stickyproxy.control.pidfd import Watch, describe, is_alive
from tests.helpers.app_processes import on_each_loop
from tests.helpers.loops import no_leak
from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = (sys.executable, "-I", "-S", "-c")


def start(text: str) -> int:
    return os.posix_spawn(COMMAND[0], [*COMMAND, text], os.environ)


def wait_for(process_id: int, options: int = os.WEXITED | os.WNOWAIT) -> None:
    """Wait for the end of a process, in which the loop sees nothing."""
    os.waitid(os.P_PID, process_id, options)


def fail(_: int) -> int:
    raise OSError("no such system call")


@pytest.fixture(params=["told", "asked"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the system tell of the end of processes, or not."""
    if request.param == "asked":
        monkeypatch.setattr(os, "pidfd_open", fail)
    return str(request.param)


@on_each_loop
async def test_the_end_is_told_once(ways: str) -> None:
    await asyncio.sleep(0)
    with no_leak():
        statuses: list[int | None] = []
        watch = Watch(start("import time; time.sleep(1000)"), statuses.append)
        assert not watch.look()
        os.kill(watch.process_id, signal.SIGTERM)
        await eventually(lambda: statuses)
        assert [describe(one) for one in statuses] == ["killed by SIGTERM"]
        assert watch.look()
        await asyncio.sleep(0.02)
        assert len(statuses) == 1
        with pytest.raises(ChildProcessError):  # no zombie
            wait_for(watch.process_id)


@on_each_loop
async def test_a_look_sees_the_end_before_the_loop_does(ways: str) -> None:
    statuses: list[int | None] = []
    watch = Watch(start("raise SystemExit(3)"), statuses.append)
    wait_for(watch.process_id)
    assert statuses == []
    assert watch.look()
    assert [describe(one) for one in statuses] == ["exit status 3"]
    assert watch.has_ended


@on_each_loop
async def test_the_end_of_one_that_somebody_else_has_waited_for_is_seen(ways: str) -> None:
    statuses: list[int | None] = []
    watch = Watch(start(""), statuses.append)
    wait_for(watch.process_id, os.WEXITED)
    await eventually(lambda: statuses)
    assert statuses == [None]
    assert describe(None) == "unknown how: somebody else has waited for it"


@on_each_loop
async def test_nothing_is_told_once_it_is_closed(ways: str) -> None:
    await asyncio.sleep(0)
    with no_leak():
        statuses: list[int | None] = []
        watch = Watch(start(""), statuses.append)
        watch.close()
        watch.close()
        other = Watch(watch.process_id, statuses.append)  # the control, and who goes on
        wait_for(watch.process_id)
        await eventually(lambda: statuses)
        await asyncio.sleep(2 * pidfd._LOOK_S)
        assert len(statuses) == 1
        assert other.has_ended
        assert not watch.has_ended


def test_signals_without_a_name_have_a_number() -> None:
    assert describe(signal.SIGRTMIN + 3) == f"killed by signal {signal.SIGRTMIN + 3}"


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_alive(1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not is_alive(ended.pid)
    refuse: Callable[[int, int], None] = lambda *_: (_ for _ in ()).throw(PermissionError())  # noqa: E731
    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive(ended.pid)
