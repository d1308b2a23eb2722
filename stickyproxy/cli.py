"""The commands. Errors are one clear line on standard error: exit 2 for what the operator gave, 1 for the rest."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import uvloop

from stickyproxy import __version__
from stickyproxy.config import Config, json_schema, load_file, with_overrides
from stickyproxy.control.certificates import make_listener_context, make_upstream_context
from stickyproxy.control.supervisor import serve as run_proxy
from stickyproxy.demo.launcher import Demo, DemoError, banner
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Sized

    from stickyproxy.config import Address

_DEFAULT_LISTEN = "127.0.0.1:8080"
_DEFAULT_ADMIN = "127.0.0.1:9090"


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
    except DemoError as error:
        click.echo(f"stickyproxy: {error}", err=True)
        sys.exit(1)


def _set_up_log(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


@main.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="The YAML file; optional with URLs.")
@click.option("--listen", metavar="ADDRESS", help=f"Where clients connect (default {_DEFAULT_LISTEN}).")
@click.option("--admin", metavar="ADDRESS", help=f"The admin listener (default {_DEFAULT_ADMIN}), or off.")
@click.option("--workers", metavar="N", help="Processes of the data plane: 1 or auto; this version runs 1.")
@click.argument("urls", nargs=-1, metavar="[URL ...]")
def serve(
    config_file: Path | None, listen: str | None, admin: str | None, workers: str | None, urls: tuple[str, ...]
) -> None:
    """Serve the upstreams of a file, or those named by URL, until SIGTERM or Ctrl-C."""
    with _clear_errors():
        config = load_file(config_file, os.environ) if config_file is not None else Config()
        number = int(workers) if workers is not None and re.fullmatch("[0-9]{1,9}", workers) else workers
        config = with_overrides(config, urls=urls, listen=listen, admin=admin, workers=number)
        _set_up_log(config.log_level)
        uvloop.run(run_proxy(config))


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
        _set_up_log("warning")
        uvloop.run(_run_demo(listen, admin))


async def _run_demo(listen: str, admin: str) -> None:
    config = with_overrides(Config(), listen=listen, admin=admin)  # mistakes are told before anything starts
    if config.listeners[0].address.is_unix:
        raise UsageError("--listen: a browser cannot open a Unix socket; name a port")
    if config.admin is None or not config.admin.address.port:
        raise UsageError("--admin: the page links to the metrics; name a port")
    admin_url = _url(config.admin.address)
    async with Demo(admin_url=admin_url) as apps:

        def greet(addresses: list[Address]) -> None:
            click.echo(banner(_url(addresses[0]), admin_url, apps.names))

        await run_proxy(with_overrides(config, urls=apps.urls), greet)


def _url(address: Address) -> str:
    """Return what a browser on this machine opens."""
    return f"http://localhost:{address.port}" if address.host in {"", "0.0.0.0", "::"} else f"http://{address}"  # noqa: S104
