"""A proxy that only answers commands, and commands that only say what they would serve."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.cli import apps, demo, deploy, serve, status
from stickyproxy.config import Config, Loaded
from tests.cli.stub import StubProxy


@pytest.fixture
def path() -> Iterator[Path]:
    """Give a short path: that of a Unix socket has at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="sp-"))
    yield directory / "s"
    shutil.rmtree(directory)


@pytest.fixture
def proxy(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubProxy]:
    """Give a proxy to speak with; commands in this process look at it without much of a pause."""
    for module in (apps, deploy, status):
        monkeypatch.setattr(module, "_EVERY_S", 0.001)
    with StubProxy(path) as stub:
        yield stub


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Let `serve`, `run` and `demo` note what they would serve, and return."""
    configs: list[Config] = []

    async def note(loaded: Loaded, on_ready: Any = None, **_: object) -> None:
        configs.append(loaded.config)
        if on_ready is not None:
            on_ready([one.address for one in loaded.config.listeners])

    for module in (serve, demo):
        monkeypatch.setattr(module, "run_proxy", note)
        monkeypatch.setattr(module, "set_up_log", lambda _level: None)
    return configs
