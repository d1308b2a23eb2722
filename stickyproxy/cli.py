"""The commands. Errors are one clear line on standard error: exit 2 for what the operator gave, 1 for the rest."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import uvloop

from stickyproxy import __version__
from stickyproxy.config import ConfigSource, Loaded, json_schema, load_file
from stickyproxy.control.certificates import make_listener_context, make_upstream_context
from stickyproxy.control.client import ControlClient, ControlError
from stickyproxy.control.inheritance import take
from stickyproxy.control.process import set_up_log
from stickyproxy.control.runtime import find_control
from stickyproxy.control.supervisor import serve as run_proxy
from stickyproxy.control.upgrade import check as check_inheritance
from stickyproxy.control.upgrade import describe
from stickyproxy.demo.launcher import Demo, DemoError, banner
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Sized

    from stickyproxy.config import Address, Config
    from stickyproxy.control.inheritance import Inheritance

_COMMAND_S = 300.0  # for a command to be carried out
_DEFAULT_LISTEN = "127.0.0.1:8080"
_DEFAULT_ADMIN = "127.0.0.1:9090"
_DEMO = "{log_level: warning, control: false, hand_over: false}"  # it cannot be upgraded: the apps are its own


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Let several single-worker processes of a stateful web app serve one site.

    Each client is pinned to one of them; HTTP and WebSocket are relayed.
    """


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn an error of the operator into lines on standard error and exit status 2."""
    try:
        yield
    except UsageError as error:
        for line in str(error).splitlines():
            click.echo(f"stickyproxy: {line}", err=True)
        sys.exit(2)
    except (DemoError, ControlError) as error:
        click.echo(f"stickyproxy: {error}", err=True)
        sys.exit(1)


@main.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="The YAML file; optional with URLs.")
@click.option("--listen", metavar="ADDRESS", help=f"Where clients connect (default {_DEFAULT_LISTEN}).")
@click.option("--admin", metavar="ADDRESS", help=f"The admin listener (default {_DEFAULT_ADMIN}), or off.")
@click.option("--workers", metavar="N", help="Processes of the data plane: a number, or auto for one a core.")
@click.option("--control", metavar="PATH", help="The Unix socket for commands, or off (default: one by process id).")
@click.option(
    "--take-over",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Take the place of the proxy whose hand-over socket this is, with all its connections.",
)
@click.argument("urls", nargs=-1, metavar="[URL ...]")
def serve(
    urls: tuple[str, ...],
    config_file: Path | None,
    workers: str | None,
    take_over: Path | None,
    **addresses: str | None,
) -> None:
    """Serve the upstreams of a file, or those named by URL, until SIGTERM or Ctrl-C."""
    with _clear_errors():
        left = take()
        if left is not None:
            _go_on(*left)
            return
        number = int(workers) if workers is not None and re.fullmatch("[0-9]{1,9}", workers) else workers
        source = ConfigSource(path=config_file, urls=urls, workers=number, **addresses)
        loaded = Loaded.read(source, os.environ)
        set_up_log(loaded.config.log_level)
        uvloop.run(run_proxy(loaded, take_over=take_over))


def _go_on(inheritance: Inheritance, is_check: bool) -> None:  # noqa: FBT001 -- as it was left
    """Go on in place of a former image of this process, or only say whether this version could."""
    if is_check:
        click.echo(json.dumps(check_inheritance(inheritance)))
        return
    set_up_log(inheritance.loaded.config.log_level)
    uvloop.run(run_proxy(inheritance.loaded, inherited=inheritance))


_control_option = click.option(
    "--control", metavar="PATH", type=click.Path(path_type=Path), help="Its control socket; by default the only one."
)


@main.command()
@_control_option
def reload(control: Path | None) -> None:
    """Let a running proxy read its file again, and say what has changed. A file with mistakes changes nothing."""
    with _clear_errors():
        answer = asyncio.run(_post(control, "/api/v1/reload"))
        changes = answer["changes"]
        click.echo("\n".join(changes) if changes else "nothing has changed")


@main.command()
@_control_option
def upgrade(control: Path | None) -> None:
    """Replace a running proxy by the version that is installed now; nobody who is connected notices."""
    with _clear_errors():
        status = asyncio.run(_upgrade(control or find_control()))
        if status.get("state") != "ok":
            raise ControlError(f"cannot upgrade, the old version goes on: {status.get('reason', 'no reason given')}")
        click.echo(f"upgraded from version {status.get('from')} to {status.get('to')}: {describe(status)}")


async def _post(control: Path | None, path: str) -> Any:
    async with ControlClient(control or find_control()) as client:
        return await client.post(path, timeout_s=_COMMAND_S)


async def _upgrade(control: Path) -> Any:
    """Ask for an upgrade, and for what became of it: the proxy re-executes itself meanwhile."""
    async with ControlClient(control) as client:
        started = await client.post("/api/v1/upgrade", timeout_s=_COMMAND_S)
        number = started["number"]

        def is_over(status: Any) -> bool:
            return bool(status.get("number") != number or status.get("state") != "running")

        deadline = asyncio.get_running_loop().time() + _COMMAND_S
        return await client.wait_for("/api/v1/upgrade", is_over, deadline)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Say whether a configuration file is right; if not, every mistake with its line (exit status 2).

    The certificates and keys that it names are read too.
    """
    with _clear_errors():
        config = load_file(file, os.environ)
        _check_certificates(config)
        click.echo(f"{file}: right; {_count(config.upstreams, 'upstream')}, {_count(config.listeners, 'listener')}")


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}" if len(things) == 1 else f"{len(things)} {name}s"


def _check_certificates(config: Config) -> None:
    """Read all certificates and keys; raise UsageError with a line for each that cannot be used."""
    makers: list[Callable[[], ssl.SSLContext]] = [
        *(partial(make_listener_context, one.tls) for one in config.listeners if one.tls is not None),
        *(partial(make_upstream_context, one.tls) for one in config.upstreams if one.tls is not None),
    ]
    mistakes = []
    for make in makers:
        try:
            make()
        except UsageError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UsageError("\n".join(dict.fromkeys(mistakes)))


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"stickyproxy {__version__}")


@main.command()
@click.option("--listen", metavar="ADDRESS", default=_DEFAULT_LISTEN, show_default=True, help="Where to open the demo.")
@click.option("--admin", metavar="ADDRESS", default=_DEFAULT_ADMIN, show_default=True, help="The admin listener.")
def demo(listen: str, admin: str) -> None:
    """Run three small stateful apps behind the proxy, and see in a browser what affinity is."""
    with _clear_errors():
        set_up_log("warning")
        uvloop.run(_run_demo(listen, admin))


async def _run_demo(listen: str, admin: str) -> None:
    source = ConfigSource(listen=listen, admin=admin)
    config = source.load_text("", os.environ)  # mistakes are told before anything starts
    if config.listeners[0].address.is_unix:
        raise UsageError("--listen: a browser cannot open a Unix socket; name a port")
    if config.admin is None or not config.admin.address.port:
        raise UsageError("--admin: the page links to the metrics; name a port")
    admin_url = _url(config.admin.address)
    async with Demo(admin_url=admin_url) as apps:

        def greet(addresses: list[Address]) -> None:
            click.echo(banner(_url(addresses[0]), admin_url, apps.names))

        await run_proxy(Loaded.of_text(replace(source, urls=tuple(apps.urls)), _DEMO, os.environ), greet)


def _url(address: Address) -> str:
    """Return what a browser on this machine opens."""
    return f"http://localhost:{address.port}" if address.host in {"", "0.0.0.0", "::"} else f"http://{address}"  # noqa: S104
