"""The commands. Errors are one clear line on standard error: exit 2 for what the operator gave, 1 for the rest.

`serve.py` and `demo.py` run a proxy; `operate.py`, `deploy.py`, `apps.py` and `status.py` speak with a running one;
`explain.py` asks a file or a running one; `files.py` and `presets.py` only read files. They share `errors.py`,
`control.py`, `progress.py` and `words.py`.
"""

from __future__ import annotations

import click

from stickyproxy.cli import apps, demo, deploy, explain, files, operate, presets, serve, status

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Let several single-worker processes of a stateful web app serve one site.

    Each client is pinned to one of them; HTTP and WebSocket are relayed.
    """


for _command in (
    *(serve.run, serve.serve),
    *(status.status, deploy.deploy, apps.scale, apps.drain, apps.ready, apps.restart, apps.logs),
    *(operate.reload, operate.upgrade),
    *(files.check, explain.explain, files.schema, presets.presets, demo.demo, files.version),
):
    main.add_command(_command)
