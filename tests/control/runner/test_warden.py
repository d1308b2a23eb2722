"""The warden as the supervisor sees it: there is one at any time, and it knows all groups."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest

from stickyproxy.control.runner import warden as warden_module
from stickyproxy.control.runner.warden import Warden
from stickyproxy.errors import UsageError
from tests.helpers.app_processes import PYTHON, WAIT, marked, on_each_loop
from tests.helpers.loops import no_leak
from tests.helpers.raw import eventually
from tests.helpers.supervised import is_running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

DEADLINE_S = 30


@contextmanager
def group() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that leads a group, and that is waited for at once: a zombie is of its group still."""
    with subprocess.Popen([*PYTHON, WAIT], start_new_session=True) as process:
        thread = threading.Thread(target=process.wait)
        thread.start()
        try:
            yield process
        finally:
            process.kill()
            thread.join()


@asynccontextmanager
async def guarded() -> AsyncIterator[Warden]:
    """Give a warden that has started; in the end nothing of it may be left."""
    await asyncio.sleep(0)
    with marked() as mark, no_leak(), pytest.MonkeyPatch.context() as patch:
        for name, value in mark.env.items():
            patch.setenv(name, value)
        warden = Warden()
        await warden.start()
        for name in mark.env:
            patch.delenv(name)
        try:
            yield warden
        finally:
            await asyncio.wait_for(warden.stop(), DEADLINE_S)
        assert mark.find() - {os.getpid()} == set()


@on_each_loop
async def test_it_ends_without_a_group() -> None:
    async with guarded() as warden:
        process_id = warden.process_id
        assert process_id is not None
        assert is_running(process_id)
        assert f"pid={process_id} groups=0" in repr(warden)
    assert not is_running(process_id)
    assert warden.process_id is None
    await warden.stop()


@on_each_loop
async def test_when_it_stops_it_ends_what_it_knows() -> None:
    with group() as known, group() as removed:
        async with guarded() as warden:
            for one in (known, removed):
                warden.add(one.pid, signal.SIGTERM, 30)
            warden.remove(removed.pid)
            warden.remove(removed.pid)
            await warden.stop()
        assert known.wait(DEADLINE_S) == -signal.SIGTERM
        assert removed.poll() is None


def wait_for(process_id: int, what: int) -> None:
    """Wait until something becomes of a process, in which the loop sees nothing."""
    os.waitid(os.P_PID, process_id, what | os.WNOWAIT)


async def replaced(warden: Warden, former: int | None) -> int:
    """Return the process id of the next warden, when it is there."""
    await eventually(lambda: warden.process_id not in {None, former})
    assert warden.process_id is not None
    return warden.process_id


@pytest.mark.parametrize("age_s", [0, 1000])
@on_each_loop
async def test_one_that_dies_is_replaced_and_told_all(
    age_s: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warden_module, "_AGAIN_S", 0.1 - age_s)
    with group() as before, group() as meanwhile:
        async with guarded() as warden:
            warden.add(before.pid, signal.SIGTERM, 30)
            former = warden.process_id
            assert former is not None
            os.kill(former, signal.SIGKILL)
            await eventually(lambda: warden.process_id != former)
            warden.add(meanwhile.pid, signal.SIGINT, 30)
            assert await replaced(warden, former) != former
            assert before.poll() is None
            await warden.stop()
        assert before.wait(DEADLINE_S) == -signal.SIGTERM
        assert meanwhile.wait(DEADLINE_S) != 0
    assert "has ended (killed by SIGKILL) and is replaced" in caplog.text


@on_each_loop
async def test_one_that_was_told_to_end_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with guarded() as warden:
        await warden.stop()
        assert warden.process_id is None
    assert caplog.text == ""


@pytest.mark.parametrize("how", ["ended", "deaf"])
@on_each_loop
async def test_one_that_takes_no_word_is_replaced_before_the_word_is_lost(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warden_module, "_AGAIN_S", -1)
    with group() as known:
        async with guarded() as warden:
            former = warden.process_id
            assert former is not None
            if how == "ended":
                os.kill(former, signal.SIGKILL)
                wait_for(former, os.WEXITED)
            else:
                os.kill(former, signal.SIGSTOP)
                wait_for(former, os.WSTOPPED)
                for number in range(2, 10_000):  # more than a pipe holds
                    warden.add(2**40 + number, signal.SIGTERM, 10)
                    warden.remove(2**40 + number)
            warden.add(known.pid, signal.SIGTERM, 30)
            assert warden.process_id not in {None, former}, "without a turn of the loop"
            await eventually(lambda: not is_running(former))
            await warden.stop()
        assert known.wait(DEADLINE_S) == -signal.SIGTERM
    assert "takes no word" in caplog.text


@on_each_loop
async def test_where_the_system_can_start_none_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    await asyncio.sleep(0)
    with no_leak(), pytest.raises(UsageError, match="cannot start the warden of the app processes"):
        await Warden().start()


@on_each_loop
async def test_another_one_is_tried_until_the_system_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warden_module, "_AGAIN_S", 0.05)
    with group() as known:
        async with guarded() as warden:
            former = warden.process_id
            assert former is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "executable", "/nowhere/python")
                os.kill(former, signal.SIGKILL)
                await eventually(lambda: caplog.text.count("until there is one") > 1)
                warden.add(known.pid, signal.SIGTERM, 30)
                assert warden.process_id is None
            await replaced(warden, None)
            await warden.stop()
        assert known.wait(DEADLINE_S) == -signal.SIGTERM


@on_each_loop
async def test_while_another_one_is_awaited_it_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden_module, "_AGAIN_S", 1000)
    async with guarded() as warden:
        former = warden.process_id
        assert former is not None
        os.kill(former, signal.SIGKILL)
        await eventually(lambda: warden.process_id is None)
        await warden.stop()
        assert warden._again is None


# Another image


@on_each_loop
async def test_another_image_goes_on_with_it() -> None:
    with group() as known, group() as removed, group() as added:
        async with guarded() as former:
            former.add(known.pid, signal.SIGINT, 30)
            former.add(removed.pid, signal.SIGTERM, 30)
            state = former.leave()
            assert os.get_inheritable(state["pipe"])
            assert former.process_id is None
            warden = Warden()
            await warden.adopt(state)
            assert not os.get_inheritable(state["pipe"])
            assert warden.process_id == state["process_id"]
            warden.remove(removed.pid)
            warden.add(added.pid, signal.SIGTERM, 30)
            await former.stop()
            assert known.poll() is None
            await warden.stop()
        assert known.wait(DEADLINE_S) != 0
        assert added.wait(DEADLINE_S) == -signal.SIGTERM
        assert removed.poll() is None


@on_each_loop
async def test_one_that_died_on_the_way_is_replaced_and_told_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with group() as known:
        async with guarded() as former:
            former.add(known.pid, signal.SIGTERM, 30)
            state = former.leave()
            os.kill(state["process_id"], signal.SIGKILL)
            warden = Warden()
            await warden.adopt(state)
            await replaced(warden, state["process_id"])
            await warden.stop()
        assert known.wait(DEADLINE_S) == -signal.SIGTERM


@on_each_loop
async def test_where_there_was_none_another_image_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden_module, "_AGAIN_S", 1000)
    with group() as known:
        async with guarded() as former:
            former.add(known.pid, signal.SIGTERM, 30)
            assert former.process_id is not None
            os.kill(former.process_id, signal.SIGKILL)
            await eventually(lambda: former.process_id is None)
            state = former.leave()
            assert (state["process_id"], state["pipe"]) == (None, None)
            warden = Warden()
            await warden.adopt(state)
            await warden.stop()
        assert known.wait(DEADLINE_S) == -signal.SIGTERM
