"""What a command says where it cannot do its work, and the status that it exits with."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from stickyproxy.demo.launcher import DemoError
from stickyproxy.errors import StickyproxyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILED: Final = 1
MISTAKEN: Final = 2
INTERRUPTED: Final = 130  # as a shell says of what SIGINT has ended: 128 and the number of the signal


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an error into lines on standard error; exit with 2 for what the operator gave, and with 1 for the rest."""
    try:
        yield
    except (StickyproxyError, DemoError) as error:
        complain(str(error))
        sys.exit(MISTAKEN if isinstance(error, UsageError) else FAILED)


def complain(text: str) -> None:
    """Say what is wrong on standard error, each line with the name of the program."""
    for line in text.splitlines():
        click.echo(f"stickyproxy: {line}", err=True)
