"""The loop of the conformance tests is uvloop's, as in production."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvloop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Choose the loop of all tests below this folder."""
    return {"uvloop": uvloop.new_event_loop}
