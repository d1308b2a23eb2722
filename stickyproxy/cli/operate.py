"""The commands that change a running proxy itself: its configuration, and its version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from stickyproxy.cli.control import COMMAND_S, control_option, speak
from stickyproxy.cli.errors import clear_errors
from stickyproxy.control.client import ControlError
from stickyproxy.control.upgrade import describe

if TYPE_CHECKING:
    from pathlib import Path

    from stickyproxy.control.client import ControlClient


@click.command()
@control_option
def reload(control: Path | None) -> None:
    """Let a running proxy read its file again, and say what has changed. A file with mistakes changes nothing."""
    changes = speak(control, _reload)["changes"]
    click.echo("\n".join(changes) if changes else "nothing has changed")


async def _reload(client: ControlClient) -> Any:
    return await client.post("/api/v1/reload", timeout_s=COMMAND_S)


@click.command()
@control_option
def upgrade(control: Path | None) -> None:
    """Replace a running proxy by the version that is installed now; nobody who is connected notices."""
    status = speak(control, _upgrade)
    with clear_errors():
        if status.get("state") != "ok":
            raise ControlError(f"cannot upgrade, the old version goes on: {status.get('reason', 'no reason given')}")
        click.echo(f"upgraded from version {status.get('from')} to {status.get('to')}: {describe(status)}")


async def _upgrade(client: ControlClient) -> Any:
    """Ask for an upgrade, and for what became of it: the proxy re-executes itself meanwhile."""
    started = await client.post("/api/v1/upgrade", timeout_s=COMMAND_S)
    number = started["number"]

    def is_over(status: Any) -> bool:
        return bool(status.get("number") != number or status.get("state") != "running")

    deadline = asyncio.get_running_loop().time() + COMMAND_S
    return await client.wait_for("/api/v1/upgrade", is_over, deadline)
