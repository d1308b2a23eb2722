"""Tests on the loop of production, in folders whose other tests run on that of the standard library."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

P = ParamSpec("P")


def on_uvloop(scenario: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a scenario on a uvloop of its own."""

    @wraps(scenario)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uvloop.run(scenario(*args, **kwargs))

    return run


def open_descriptors() -> dict[int, str]:
    """Return what this process has open, by descriptor."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[int(link.name)] = str(link.readlink())
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


@contextmanager
def no_leak() -> Iterator[None]:
    """Check that all that is opened is closed again."""
    gc.collect()
    before = open_descriptors()
    yield
    gc.collect()
    left = dict(open_descriptors().items() - before.items())
    assert left == {}, f"left open: {left}"
