"""The commands for single upstreams, app processes or not, and for how many app processes there are."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import click

from stickyproxy.cli.control import COMMAND_S, control_option, refusals, speak
from stickyproxy.cli.errors import INTERRUPTED, complain
from stickyproxy.cli.progress import Progress
from stickyproxy.cli.words import count
from stickyproxy.control.client import ControlError
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from stickyproxy.control.client import ControlClient

_STATE: Final = "/api/v1/state"
_EVERY_S: Final = 0.5  # between two looks at what changes while somebody waits

_upstream_argument = click.argument("upstream_id", metavar="ID")


@click.command()
@click.argument("processes", metavar="N", type=click.IntRange(min=1))
@control_option
def scale(processes: int, control: Path | None) -> None:
    """Let there be N app processes. More are started; of too many, the emptiest are drained and then stopped."""

    async def talk(client: ControlClient) -> Any:
        with refusals():
            return await client.post("/api/v1/scale", {"processes": processes}, timeout_s=COMMAND_S)

    answer = speak(control, talk)
    before, now = answer["from"], answer["to"]
    if before == now:
        click.echo(f"nothing to do: {count(now, 'app process')}")
    else:
        click.echo(f"{'growing' if now > before else 'shrinking'} from {before} to {count(now, 'app process')}")


@click.command()
@_upstream_argument
@click.option("--wait", is_flag=True, help="Return once it has no session, no tunnel and no request.")
@control_option
def drain(upstream_id: str, wait: bool, control: Path | None) -> None:  # noqa: FBT001 -- an option
    """Send no new client to an upstream; its pinned clients keep it. `stickyproxy ready ID` takes that back."""

    async def talk(client: ControlClient) -> str:
        left = await _set_state(client, upstream_id, "drain")
        return await _wait_until_empty(client, upstream_id) if wait else f"takes no new client: {_describe(left)}"

    try:
        click.echo(f"{upstream_id} {speak(control, talk)}")
    except KeyboardInterrupt:
        complain(f"interrupted: {upstream_id} goes on draining; `stickyproxy ready {upstream_id}` takes that back")
        sys.exit(INTERRUPTED)


async def _wait_until_empty(client: ControlClient, upstream_id: str) -> str:
    """Return how it ended, once an upstream has nothing left or is there no more; raise ControlError if it drains not.

    An app process is stopped and removed as soon as it is empty, where it is not to be used again.
    """
    with Progress() as progress:

        def is_empty(state: Any) -> bool:
            found = _find(state, upstream_id)
            if found is None:
                return True
            if found["admin_state"] != "drain":
                raise ControlError(f"somebody has set {upstream_id} to {found['admin_state']}: it drains no more")
            progress.show(f"{upstream_id} is draining: {_describe(found)}")
            return not (found["sessions"] or found["tunnels"] or found["in_flight"])

        return "is gone" if _find(await client.watch(_STATE, is_empty, _EVERY_S), upstream_id) is None else "is empty"


def _find(state: Any, upstream_id: str) -> Any:
    upstreams = (one for cluster in state["clusters"] for one in cluster["upstreams"])
    return next((one for one in upstreams if one["id"] == upstream_id), None)


def _describe(upstream: Any) -> str:
    things = {"session": "sessions", "tunnel": "tunnels", "request": "in_flight"}
    return ", ".join(count(upstream[field], name) for name, field in things.items())


@click.command()
@_upstream_argument
@control_option
def ready(upstream_id: str, control: Path | None) -> None:
    """Send new clients to an upstream again, after `drain`."""

    async def talk(client: ControlClient) -> Any:
        return await _set_state(client, upstream_id, "ready")

    health = speak(control, talk)["health"]
    click.echo(f"{upstream_id} is ready" if health != "unhealthy" else f"{upstream_id} is ready, but unhealthy")


async def _set_state(client: ControlClient, upstream_id: str, state: str) -> Any:
    path = f"/api/v1/upstreams/{quote(upstream_id, safe='')}/state"
    with refusals():
        return await client.put(path, {"state": state})


@click.command()
@_upstream_argument
@control_option
def restart(upstream_id: str, control: Path | None) -> None:
    """Put another app process in the place of one, which is drained and then stopped: no session is cut."""

    async def talk(client: ControlClient) -> Any:
        with refusals():
            return await client.post(_process_path(upstream_id, "restart"), timeout_s=COMMAND_S)

    click.echo(f"{upstream_id} is being replaced by {speak(control, talk)['replacement']}")


@click.command()
@_upstream_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes, until Ctrl-C or until it is gone.")
@control_option
def logs(upstream_id: str, follow: bool, control: Path | None) -> None:  # noqa: FBT001 -- an option
    """Print the last lines that an app process has written."""
    tail = Tail()

    def show(answer: Any) -> bool:
        for line in tail.take(answer) if follow else answer["lines"]:
            click.echo(line)
        return not follow

    async def talk(client: ControlClient) -> None:
        try:
            with refusals():
                await client.watch(_process_path(upstream_id, "log"), show, _EVERY_S)
        except UsageError:
            if not tail.has_begun:
                raise
            complain(f"{upstream_id} is gone")

    try:
        speak(control, talk)
    except KeyboardInterrupt:  # how following is meant to end
        sys.exit(0)


def _process_path(upstream_id: str, what: str) -> str:
    return f"/api/v1/processes/{quote(upstream_id, safe='')}/{what}"


class Tail:
    """What of a log was not shown yet, look by look.

    The proxy gives the last lines, and how many it has had in all (`written`).
    """

    def __init__(self) -> None:
        self._written = 0
        self.has_begun = False

    def take(self, answer: Any) -> list[str]:
        """Return the lines since the last look; at the first one, or where the log has begun anew, all."""
        lines, written = answer["lines"], answer["written"]
        new = written - self._written if written >= self._written else written
        is_first, self.has_begun, self._written = not self.has_begun, True, written
        if new > len(lines) and not is_first:
            return [f"({count(new - len(lines), 'line')} left out)", *lines]
        return list(lines[max(0, len(lines) - new) :])
