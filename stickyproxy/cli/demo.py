"""The command that shows what affinity is: a proxy with apps of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click
import uvloop

from stickyproxy.cli.errors import clear_errors
from stickyproxy.cli.serve import DEFAULT_ADMIN, DEFAULT_LISTEN
from stickyproxy.config import ConfigSource, Loaded
from stickyproxy.control.process import set_up_log
from stickyproxy.control.supervisor import serve as run_proxy
from stickyproxy.demo.launcher import Demo, banner
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from stickyproxy.config import Address

_DEMO: Final = "{log_level: warning, control: false, hand_over: false}"  # it cannot be upgraded: the apps are its own


@click.command()
@click.option("--listen", metavar="ADDRESS", default=DEFAULT_LISTEN, show_default=True, help="Where to open the demo.")
@click.option("--admin", metavar="ADDRESS", default=DEFAULT_ADMIN, show_default=True, help="The admin listener.")
def demo(listen: str, admin: str) -> None:
    """Run three small stateful apps behind the proxy, and see in a browser what affinity is."""
    with clear_errors():
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
