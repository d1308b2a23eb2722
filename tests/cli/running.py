"""How the tests of the commands run them: in this process, or in one of their own."""

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from stickyproxy.cli import main

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "config").glob("*.yaml"))
COMMAND = (sys.executable, "-m", "stickyproxy")


def run(*arguments: str | Path) -> Result:
    """Run a command in this process; what it does not catch is raised here."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, as a person does."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
