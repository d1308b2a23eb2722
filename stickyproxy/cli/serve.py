"""The commands that are a proxy until they are told to stop: before processes of others, or with its own."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import uvloop

from stickyproxy.cli.errors import clear_errors
from stickyproxy.config import ConfigSource, Loaded
from stickyproxy.config.overrides import NO_COMMAND
from stickyproxy.control.inheritance import take
from stickyproxy.control.process import set_up_log
from stickyproxy.control.supervisor import serve as run_proxy
from stickyproxy.control.upgrade import check as check_inheritance
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_LISTEN: Final = "127.0.0.1:8080"
DEFAULT_ADMIN: Final = "127.0.0.1:9090"
_NUMBER: Final = re.compile("[0-9]{1,9}")

F = TypeVar("F", bound="Callable[..., Any]")


def _proxy_options(config_help: str) -> Callable[[F], F]:
    """Return what gives a command the options of every proxy, which stand over its file."""
    options = (
        click.option("--config", "config_file", metavar="FILE", type=click.Path(path_type=Path), help=config_help),
        click.option("--listen", metavar="ADDRESS", help=f"Where clients connect (default {DEFAULT_LISTEN})."),
        click.option("--admin", metavar="ADDRESS", help=f"The admin listener (default {DEFAULT_ADMIN}), or off."),
        click.option("--workers", metavar="N", help="Processes of the data plane: a number, or auto for one a core."),
        click.option(
            "--control", metavar="PATH", help="The Unix socket for commands, or off (default: by process id)."
        ),
        click.option(
            "--preset",
            "presets",
            metavar="NAME",
            multiple=True,
            help="What a framework needs, by its name (see `stickyproxy presets`); may be given more than once.",
        ),
    )

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


@click.command()
@_proxy_options("The YAML file; optional with URLs.")
@click.option(
    "--take-over",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Take the place of the proxy whose hand-over socket this is, with all its connections.",
)
@click.argument("urls", nargs=-1, metavar="[URL ...]")
def serve(urls: tuple[str, ...], take_over: Path | None, **given: Any) -> None:
    """Serve the upstreams of a file, or those named by URL, until SIGTERM or Ctrl-C."""
    with clear_errors():
        if not _went_on():
            _start(Loaded.read(ConfigSource(urls=urls, **_overrides(**given)), os.environ), take_over)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-w", "--processes", metavar="N", help="How many app processes (default 1, or as the file says).")
@click.option(
    "--reload", is_flag=True, default=None, help="For development: deploy the app anew when its *.py files change."
)
@click.option(
    "--reload-dir",
    "reload_directories",
    metavar="DIR",
    multiple=True,
    help="Where its files are (default: the working directory); may be given more than once, as the next.",
)
@click.option(
    "--reload-include", metavar="PATTERN", multiple=True, help="Files that count beside *.py, as in '*.html'."
)
@_proxy_options("The YAML file; optional with a command.")
@click.argument("command", nargs=-1, metavar="[--] [COMMAND ...]", type=click.UNPROCESSED)
def run(command: tuple[str, ...], processes: str | None, **given: Any) -> None:
    """Start an app several times, and serve it, until SIGTERM or Ctrl-C.

    COMMAND starts one process of the app, with ONE worker. {port} and {socket} in it become the place where that
    process is to listen, {id} and {generation} its names; PORT is in its environment. Without COMMAND the file says
    what to run.

    \b
    stickyproxy run -w 4 -- chainlit run app.py --headless --port {port}
    stickyproxy run -w 4 -- uvicorn main:app --uds {socket}
    stickyproxy run -w 4 --preset streamlit -- streamlit run app.py
    stickyproxy run --reload -- uvicorn main:app --port {port}
    """  # noqa: D301 -- click takes a real backspace for "leave these lines alone"
    with clear_errors():
        if not _went_on():
            source = ConfigSource(command=command, processes=_as_number(processes), **_overrides(**given))
            loaded = Loaded.read(source, os.environ)
            if loaded.config.run is None:
                raise UsageError(NO_COMMAND)
            _start(loaded)


def _overrides(config_file: Path | None, workers: str | None, **others: Any) -> dict[str, Any]:
    """Return the fields of a ConfigSource that both commands have."""
    return {"path": config_file, "workers": _as_number(workers), **others}


def _as_number(text: str | None) -> int | str | None:
    """Return a number as one; what is none is refused by the configuration, which knows what is right."""
    return int(text) if text is not None and _NUMBER.fullmatch(text) else text


def _start(loaded: Loaded, take_over: Path | None = None) -> None:
    set_up_log(loaded.config.log_level)
    uvloop.run(run_proxy(loaded, take_over=take_over))


def _went_on() -> bool:
    """Go on in place of a former image of this process, where there was one, or only say whether this version could.

    The former image was started by the very command line that this one has; what counts is what it has left.
    """
    left = take()
    if left is None:
        return False
    inheritance, is_check = left
    if is_check:
        click.echo(json.dumps(check_inheritance(inheritance)))
    else:
        set_up_log(inheritance.loaded.config.log_level)
        uvloop.run(run_proxy(inheritance.loaded, inherited=inheritance))
    return True
