"""The data plane in the test's own event loop, which is uvloop's as in production."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import uvloop

from tests.helpers.plane import PlaneUnderTest, Start, start_plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Choose the loop of all tests below this folder."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Give a function that starts a plane; each is checked for what it left behind, and ended, after the test."""
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
    async with AsyncExitStack() as stack:

        async def begin(*args: Any, **options: Any) -> PlaneUnderTest:
            return await stack.enter_async_context(start_plane(*args, **options))

        yield begin


@pytest.fixture
async def proxy(start: Start) -> PlaneUnderTest:
    """Give a plane with one upstream, all settings as they come."""
    return await start()
