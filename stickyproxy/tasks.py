"""The one place that makes asyncio tasks: each has a name, is referenced until it ends, and logs its crash."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

logger = logging.getLogger(__name__)
_running: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Run a coroutine as a task named `name` on the running loop and return the task.

    The task may be awaited or cancelled by the caller, who need not keep it: it is referenced here until it ends.
    An exception that ends it is logged with its traceback.
    """
    task = asyncio.get_running_loop().create_task(coroutine, name=name)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("task %s crashed", task.get_name(), exc_info=error)
