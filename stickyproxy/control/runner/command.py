"""The command of one app process: its words, its environment and where it runs. Pure: nothing is started here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stickyproxy.config.placeholders import fill
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

# What systemd tells the proxy alone (sd_notify(3), sd_listen_fds(3)): an app that believed it would answer for the
# proxy, or take descriptors that are not there.
_OF_THE_PROXY: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
)
_SECRETS: Final = "STICKYPROXY_SECRET"  # the beginning of the names of those that sign the affinity cookies


@dataclass(frozen=True, slots=True)
class Values:
    """What the placeholders of one app process stand for; of `port` and `socket` one at most is used."""

    id: str
    generation: int
    port: int | None = None
    socket: Path | None = None


@dataclass(frozen=True, slots=True)
class AppCommand:
    """What is executed: the program and its arguments, its whole environment, and its directory (None: the proxy's)."""

    words: tuple[str, ...]
    env: dict[str, str] = field(repr=False)  # may hold secrets of the app
    cwd: Path | None


def expand(text: str, values: Values) -> str:
    """Return the text with its placeholders filled in; raise UsageError where one is unknown or has no value."""
    known = {"id": values.id, "generation": str(values.generation)}
    if values.port is not None:
        known["port"] = str(values.port)
    if values.socket is not None:
        known["socket"] = str(values.socket)
    try:
        return fill(text, known)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_command(
    words: Sequence[str],
    env: Mapping[str, str],
    cwd: str | PathLike[str] | None,
    values: Values,
    environ: Mapping[str, str],
) -> AppCommand:
    """Return the command of one app process; raise UsageError where a placeholder is unknown or has no value.

    `environ` is the environment of the proxy. The app gets it without what is the proxy's own, with what tells it
    where to listen and that it is one of several, and with `env` of the file over all that.
    """
    return AppCommand(
        words=tuple(expand(word, values) for word in words),
        env=_inherited(environ) | _told(values, environ) | {name: expand(text, values) for name, text in env.items()},
        cwd=None if cwd is None else Path(expand(str(cwd), values)),
    )


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: text
        for name, text in environ.items()
        if name not in _OF_THE_PROXY and not name.startswith(_SECRETS)
    }  # fmt: skip


def _told(values: Values, environ: Mapping[str, str]) -> dict[str, str]:
    # One process holds all of its sessions: gunicorn and uvicorn take the number of theirs from WEB_CONCURRENCY.
    told = {"STICKYPROXY_UPSTREAM": values.id, "WEB_CONCURRENCY": "1"}
    if values.port is not None:
        told["PORT"] = str(values.port)
    defaults = {"PYTHONUNBUFFERED": "1"}  # into a pipe, Python writes its output only in blocks
    if values.socket is not None:
        # uvicorn and gunicorn believe X-Forwarded-* of 127.0.0.1 only; nobody but this user reaches the socket.
        defaults["FORWARDED_ALLOW_IPS"] = "*"
    return told | {name: text for name, text in defaults.items() if name not in environ}
