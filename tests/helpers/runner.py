"""A supervisor in the test's own event loop that runs an app of its own."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.supervised import load, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stickyproxy.control.runner.runner import Runner
    from stickyproxy.control.supervisor import Supervisor

APP = Path(__file__).with_name("run_app.py")


def command_of(version_file: Path, *more: str) -> list[str]:
    """Return the command of the app that is as the file says."""
    return [sys.executable, str(APP), "--port={port}", "--version-file", str(version_file), *more]


@asynccontextmanager
async def running_app(directory: Path, processes: Any = 2, **run: Any) -> AsyncIterator[tuple[Supervisor, Runner]]:
    """Run the app until the end of the block; `run` are more keys of that section."""
    version = directory / "version"
    version.write_text("1")
    sections = {"run": {"command": command_of(version), "processes": processes, **run}, "upstreams": []}
    async with running(load(**sections)) as supervisor:
        assert supervisor.runner is not None
        yield supervisor, supervisor.runner
