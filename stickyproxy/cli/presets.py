"""The command that shows the presets: what stickyproxy knows of a framework, where its user need not."""

from __future__ import annotations

import click

from stickyproxy.config import PRESETS, describe_preset, preset_text


@click.command()
@click.argument("name", required=False, metavar="[NAME]", type=click.Choice(PRESETS))
def presets(name: str | None) -> None:
    """List the presets, or print the one of this name as it stands under a configuration file.

    A preset holds what a framework needs of the proxy. Name it with --preset, or by `presets:` in the file; whatever
    the file says itself goes over it.
    """
    if name is not None:
        click.echo(preset_text(name), nl=False)
        return
    width = max(map(len, PRESETS))
    for one in PRESETS:
        click.echo(f"{one:{width}}  {describe_preset(one)}")
