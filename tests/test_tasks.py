"""Tasks: each has a name, is kept until it ends, and does not crash in silence."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest

from stickyproxy import tasks
from stickyproxy.tasks import spawn


async def crash() -> None:
    raise ValueError("on purpose")


async def answer() -> int:
    return 42


async def test_a_task_has_its_name_and_its_result() -> None:
    task = spawn(answer(), "answer")
    assert task.get_name() == "answer"
    assert await task == 42
    assert task not in tasks._running


async def test_a_task_that_nobody_keeps_runs_to_its_end() -> None:
    """The loop itself keeps only weak references: without ours such a task may vanish half way."""
    reached = asyncio.Event()
    trace: list[weakref.ref[asyncio.Future[None]]] = []

    async def wait_for_what_only_the_task_knows() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        trace.append(weakref.ref(future))
        try:
            await future
        finally:
            reached.set()

    spawn(wait_for_what_only_the_task_knows(), "kept")
    await asyncio.sleep(0)
    gc.collect()
    future = trace[0]()
    assert future is not None
    future.set_result(None)
    await asyncio.wait_for(reached.wait(), 5)


async def test_a_crash_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    task = spawn(crash(), "crashing")
    await asyncio.wait({task})
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "task crashing crashed")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert task not in tasks._running


@pytest.mark.parametrize("ending", ["result", "cancelled"])
async def test_any_other_end_is_quiet(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    task = spawn(answer() if ending == "result" else asyncio.Event().wait(), "quiet")
    if ending == "cancelled":
        task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() is (ending == "cancelled")
    assert caplog.records == []
    assert task not in tasks._running


async def test_an_error_that_was_awaited_is_logged_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        await spawn(crash(), "awaited")
    assert [record.getMessage() for record in caplog.records] == ["task awaited crashed"]
