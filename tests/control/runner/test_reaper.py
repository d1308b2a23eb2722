"""Orphans that have become children of this process: waited for, and nobody else's children with them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stickyproxy.control.runner import reaper as reaper_module
from stickyproxy.control.runner.reaper import Reaper, gets_orphans
from tests.helpers.app_processes import PYTHON, WAIT, on_each_loop
from tests.helpers.processes import wait_until
from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(params=["listed", "not listed"])
def subreaper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let orphans become children of this process, where children are listed, or not."""
    if request.param == "not listed":
        monkeypatch.setattr(reaper_module, "_list_children", lambda: None)
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def make_orphans(count: int = 1) -> list[int]:
    """Return processes whose parent has ended."""
    text = f"import os\nfor _ in range({count}):\n    one = os.fork()\n    if not one: break\n    print(one)\n"
    text += f"if not one:\n    os.close(1)\n    {WAIT.replace(chr(10), chr(10) + '    ')}"
    made = subprocess.run([*PYTHON, text], stdout=subprocess.PIPE, text=True, check=True, timeout=30).stdout
    return [int(line) for line in made.split()]


def end(process_id: int) -> None:
    """End a child, and wait until it has ended; it stays as a zombie."""
    os.kill(process_id, signal.SIGKILL)
    os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)


def is_there(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


def test_an_orphan_is_waited_for_at_the_second_look(subreaper: None) -> None:
    reaper = Reaper(list)
    [orphan] = make_orphans()
    assert reaper.look() == []
    end(orphan)
    assert reaper.look() == []
    assert is_there(orphan)
    assert reaper.look() == [orphan]
    assert not is_there(orphan)
    assert reaper.look() == []


def test_many_orphans_are_waited_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        reaper = Reaper(list)
        orphans = make_orphans(20)
        for one in orphans:
            end(one)
        reaper.look()
        assert reaper.look() == sorted(orphans)
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_those_that_others_wait_for_are_left_alone(subreaper: None) -> None:
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    reaper = Reaper(lambda: {child.pid, None})
    for _ in range(3):
        assert reaper.look() == []
    assert child.wait() == 7
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])  # the control
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    reaper.look()
    assert reaper.look() == [other.pid]
    other.wait()


@on_each_loop
async def test_a_child_that_the_loop_waits_for_keeps_its_exit_status(
    subreaper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper_module, "_LOOK_S", 0.05)
    reaper = Reaper(list)
    reaper.start()
    [orphan] = make_orphans()
    os.kill(orphan, signal.SIGKILL)
    for status in range(5):
        process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", f"raise SystemExit({status})")
        assert await process.wait() == status
    await eventually(lambda: not is_there(orphan))
    reaper.stop()
    reaper.stop()


@on_each_loop
async def test_it_looks_no_more_when_it_is_stopped(subreaper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper_module, "_LOOK_S", 0.01)
    reaper = Reaper(list)
    looks: list[int] = []
    monkeypatch.setattr(reaper, "look", lambda: looks.append(1))
    reaper.start()
    await eventually(lambda: len(looks) > 2)
    reaper.stop()
    before = len(looks)
    await asyncio.sleep(0.1)
    assert len(looks) == before


@on_each_loop
async def test_it_does_not_look_where_orphans_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    reaper = Reaper(list)
    reaper.start()
    assert (reaper._timer is None) == (not gets_orphans())
    reaper.stop()


def test_it_is_seen_who_gets_the_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    prctl = ctypes.CDLL(None).prctl
    assert not gets_orphans()
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        assert gets_orphans()
        [orphan] = make_orphans()
        wait_until(lambda: Path(f"/proc/{orphan}/stat").read_text().split()[3] == str(os.getpid()), "it is ours")
        end(orphan)
        os.waitpid(orphan, 0)
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert not gets_orphans()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert gets_orphans()


def test_where_there_is_no_such_call_there_are_no_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not gets_orphans()


def test_where_nothing_lists_the_children_one_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reaper_module, "Path", lambda _: tmp_path)
    assert reaper_module._list_children() is None
    assert reaper_module._find_ended() == set()
