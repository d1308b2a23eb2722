"""What the commands to a running proxy share: how it is found, spoken with, and what its refusals mean."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click

from stickyproxy.cli.errors import clear_errors
from stickyproxy.control.client import ControlClient, ControlError
from stickyproxy.control.runtime import find_control
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

T = TypeVar("T")

COMMAND_S: Final = 300.0
"""For a command to be carried out."""

_REFUSALS: Final = range(400, 500)

control_option = click.option(
    "--control", metavar="PATH", type=click.Path(path_type=Path), help="Its control socket; by default the only one."
)


def speak(control: Path | None, talk: Callable[[ControlClient], Awaitable[T]]) -> T:
    """Return what a conversation with a running proxy gives; an error of it ends the command in a clear way."""
    with clear_errors():
        return asyncio.run(_speak(control or find_control(), talk))


async def _speak(path: Path, talk: Callable[[ControlClient], Awaitable[T]]) -> T:
    async with ControlClient(path) as client:
        return await talk(client)


@contextmanager
def refusals() -> Iterator[None]:
    """Take what the proxy refuses to do (409, 422, 404 for an unknown id, ...) for a mistake of the operator."""
    try:
        yield
    except ControlError as error:
        if error.status in _REFUSALS:
            raise UsageError(str(error)) from error
        raise
