"""The commands that need no running proxy: what a file says, what it may say, and which version this is."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stickyproxy import __version__
from stickyproxy.cli.errors import clear_errors
from stickyproxy.cli.words import count
from stickyproxy.config import json_schema, load_file
from stickyproxy.control.certificates import make_listener_context, make_upstream_context
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from stickyproxy.config import Config


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Say whether a configuration file is right; if not, every mistake with its line (exit status 2).

    The certificates and keys that it names are read too.
    """
    with clear_errors():
        config = load_file(file, os.environ)
        _check_certificates(config)
        click.echo(f"{file}: right; {_describe_apps(config)}, {count(len(config.listeners), 'listener')}")


def _describe_apps(config: Config) -> str:
    apps = _describe_default(config)
    if not config.clusters:
        return apps
    listed = count(sum(len(one.upstreams) for one in config.clusters), "upstream")
    more = f"{count(len(config.clusters), 'more cluster')} with {listed}" if config.has_default else ""
    return f"{apps}, {more}" if more else f"{count(len(config.clusters), 'cluster')} with {listed}"


def _describe_default(config: Config) -> str:
    if config.run is None:
        return count(len(config.upstreams), "upstream")
    processes = config.run.processes
    if processes.min == processes.max:
        return count(processes.max, "app process")
    return f"{processes.min} to {count(processes.max, 'app process')}"


def _check_certificates(config: Config) -> None:
    """Read all certificates and keys; raise UsageError with a line for each that cannot be used."""
    makers: list[Callable[[], ssl.SSLContext]] = [
        *(partial(make_listener_context, one.tls) for one in config.listeners if one.tls is not None),
        *(partial(make_upstream_context, one.tls) for one in config.every_upstream if one.tls is not None),
    ]
    mistakes = []
    for make in makers:
        try:
            make()
        except UsageError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UsageError("\n".join(dict.fromkeys(mistakes)))


@click.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"stickyproxy {__version__}")
