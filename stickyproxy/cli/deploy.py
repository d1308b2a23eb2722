"""The command that deploys: a new generation of app processes beside the old one, which is then drained."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from stickyproxy.cli.control import COMMAND_S, control_option, refusals, speak
from stickyproxy.cli.errors import FAILED, INTERRUPTED, clear_errors, complain
from stickyproxy.cli.progress import Progress
from stickyproxy.cli.words import count, say_duration
from stickyproxy.config import parse_duration
from stickyproxy.config.run import read_pace
from stickyproxy.control.client import ControlError
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from stickyproxy.control.client import ControlClient

_PATH: Final = "/api/v1/deploy"
_EVERY_S: Final = 0.5  # between two looks
_UNDER_WAY: Final = frozenset({"starting", "watching", "draining"})
_SURGE: Final = re.compile(r"[0-9]{1,4}")


@click.command()
@click.option("--drain-timeout", metavar="30m|off", help="After this, clients of the old generation are closed.")
@click.option("--pace", metavar="20/s", help="How many of them a second.")
@click.option("--surge", metavar="N|all", help="How many processes start at a time.")
@click.option("--watch", metavar="10s", help="How long the new generation must live to be kept.")
@click.option("--detach", is_flag=True, help="Return once the deploy has begun.")
@control_option
def deploy(control: Path | None, detach: bool, **given: str | None) -> None:  # noqa: FBT001 -- an option
    """Start the app anew beside the old one, and let the old processes go as their sessions end.

    Exits with 1 where the new generation does not get ready, or ends while it is watched: then the old one serves on.
    Exits with 2 where there is nothing to deploy, or a deploy is under way. What no option says is as in the file.
    """
    with clear_errors():
        following = Following(read_options(given))
    try:
        status = speak(control, following.begin if detach else following.run)
    except KeyboardInterrupt:
        complain(following.interrupted)
        sys.exit(INTERRUPTED)
    if detach:
        click.echo(f"the deploy of generation {status['generation']} has begun")
    elif status["state"] == "ok":
        click.echo(f"generation {status['generation']} is deployed")
    else:
        complain(f"the deploy has failed: {status.get('reason') or 'no reason given'}")
        for line in status.get("last_lines") or ():
            click.echo(f"  | {line}", err=True)
        sys.exit(FAILED)


class Following:
    """One deploy with its options, from when it is asked for until it is over."""

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = options
        self.interrupted = "interrupted before the proxy has said whether the deploy begins; `stickyproxy status` shows"

    async def begin(self, client: ControlClient) -> Any:
        """Let the proxy begin; return the status."""
        with refusals():
            status = await client.post(_PATH, dict(self._options), timeout_s=COMMAND_S)
        self.interrupted = f"interrupted: the deploy of generation {status['generation']} goes on"
        return status

    async def run(self, client: ControlClient) -> Any:
        """Let the proxy begin, show how it goes, and return the last status. Raises ControlError where it is lost."""
        last = await self.begin(client)
        number = last["number"]
        with Progress() as progress:

            def is_over(status: Any) -> bool:
                nonlocal last
                if status.get("number") != number:
                    if (
                        last["state"] == "draining" and status.get("number", 0) > number
                    ):  # it serves, or none could begin
                        return True
                    raise ControlError("what became of the deploy is not known: the proxy tells of another one")
                if status["state"] in _UNDER_WAY:
                    progress.show(*describe(status))
                last = status
                return status["state"] not in _UNDER_WAY

            await client.watch(_PATH, is_over, _EVERY_S)
        return last | {"state": "ok"} if last["state"] == "draining" else last


def describe(status: Any) -> tuple[str, str]:
    """Return where a deploy stands, and what changes all the time beside that."""
    name, of_all = f"generation {status['generation']}", f"{status['ready']} of {status['processes']} ready"
    if status.get("reason"):
        return f"{name} is taken back: {status['reason']}", ""
    if status["state"] == "starting":
        return f"{name} starts: {of_all}", ""
    if status["state"] == "watching":
        return f"{name} takes the new clients: {of_all}; watching it", ""
    left, eta_s = status["sessions_left"], status.get("eta_s")
    text = f"{name} serves, the old processes drain: {count(left, 'session')} left"
    return text, "" if eta_s is None else f", about {say_duration(eta_s)}"


def read_options(given: Mapping[str, str | None]) -> dict[str, object]:
    """Return the body of the call: what was given, as the proxy takes it. Raises UsageError naming the option."""
    body: dict[str, object] = {}
    for name, text in given.items():
        if text is not None:
            field, read = _READERS[name]
            try:
                body[field] = read(text)
            except ValueError as error:
                raise UsageError(f"--{name.replace('_', '-')}: {error}") from error
    return body


def _read_surge(text: str) -> int:
    if text == "all":
        return 0
    if not _SURGE.fullmatch(text) or int(text) == 0:
        raise ValueError(f"expected all or a whole number above 0, got {text[:60]!r}")
    return int(text)


_READERS: Final[dict[str, tuple[str, Callable[[str], object]]]] = {
    "drain_timeout": ("drain_timeout_s", lambda text: None if text == "off" else parse_duration(text)),
    "pace": ("pace_per_s", read_pace),
    "surge": ("surge", _read_surge),
    "watch": ("watch_s", parse_duration),
}
