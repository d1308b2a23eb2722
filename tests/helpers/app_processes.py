"""App processes of the tests: what they run, what they have written, and which of them are left."""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import signal
import sys
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from stickyproxy.control.runner.app_process import AppProcess
from tests.helpers.supervised import is_running

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from stickyproxy.control.runner.warden import Warden

_MARK = "MARK_OF_THE_TEST"
PYTHON = (sys.executable, "-I", "-S", "-u", "-c")
WAIT = "import time\nwhile True: time.sleep(1000)\n"
IGNORE_TERM = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
# A child of the same group, which says its process id when it runs.
FORK = """
import os, signal, time
def fork(work):
    ready, begun = os.pipe()
    if os.fork():
        os.read(ready, 1)
        return
    work(begun)
def wait(begun):
    print("child", os.getpid(), flush=True)
    os.write(begun, b".")
    while True: time.sleep(1000)
def wait_deaf(begun):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait(begun)
"""


def on_each_loop(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a scenario on uvloop, and on the loop of the standard library."""

    @wraps(scenario)
    def run(*args: Any, run_on_loop: Callable[[Coroutine[Any, Any, None]], None], **kwargs: Any) -> None:
        run_on_loop(scenario(*args, **kwargs))

    own = inspect.signature(scenario)
    more = inspect.Parameter("run_on_loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), more])  # type: ignore[attr-defined]
    each: Callable[..., None] = pytest.mark.parametrize(
        "run_on_loop", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"]
    )(run)
    return each


class Mark:
    """A mark in the environment, by which all processes of a test are found, however they were started."""

    def __init__(self) -> None:
        self._text = secrets.token_hex(16)
        self.env = {_MARK: self._text}

    def find(self) -> set[int]:
        """Return the process ids of those that run."""
        found = set()
        wanted = f"{_MARK}={self._text}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if wanted in path.read_bytes().split(b"\0") and is_running(int(path.parent.name)):
                    found.add(int(path.parent.name))
        return found

    def kill(self) -> None:
        """End them all, each by its id, at once."""
        while found := self.find():
            for one in found:
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)


@contextmanager
def marked() -> Iterator[Mark]:
    """Give a mark; what bears it in the end is killed."""
    mark = Mark()
    try:
        yield mark
    finally:
        mark.kill()


class Written:
    """Lines of app processes, as they came."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, _: str, line: str) -> None:
        self.lines.append(line)

    def numbers(self, word: str) -> list[int]:
        """Return the numbers after a word at the beginning of lines."""
        return [int(line.split()[1]) for line in self.lines if line.split()[:1] == [word]]


def make_process(
    words: Sequence[str],
    warden: Warden,
    on_line: Callable[[str, str], None],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    **more: Any,
) -> AppProcess:
    """Return an app process that has this process's environment and what `env` has beside it."""
    return AppProcess("g1-1", words, {**os.environ, **(env or {})}, cwd, warden, on_line, **more)
