"""The servers: each runs the same ASGI application in several processes, as its documentation says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.programs import ROOT, package_version
from tests.bench.results import RunError
from tests.bench.targets import environment
from tests.helpers.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.helpers.processes import Child, Children

APPLICATION: Final = "chat_app:app"
_FOLDER: Final = Path(__file__).parent
_VERSION: Final = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
_PREPARE_S: Final = 120.0


@dataclass(frozen=True)
class Pythons:
    """The interpreters that have Chainlit: one with uvicorn, one with gunicorn and uvicorn's worker class beside it."""

    chainlit: Path
    gunicorn: Path

    @classmethod
    def find(cls) -> Pythons:
        """Return where they should be: as the environment says, or in `.venvs`."""
        return cls(_find("chainlit"), _find("gunicorn"))


def _find(name: str) -> Path:
    variable = f"STICKYPROXY_{name.upper()}_PYTHON"
    return Path(os.environ.get(variable) or ROOT / ".venvs" / name / "bin" / "python")


HOW_TO_GET: Final = {
    "chainlit": "python3 -m venv .venvs/chainlit;"
    " .venvs/chainlit/bin/pip install -r tests/end_to_end/requirements-chainlit.txt",
    "gunicorn": "python3 -m venv .venvs/gunicorn;"
    " .venvs/gunicorn/bin/pip install -r tests/end_to_end/requirements-chainlit.txt gunicorn uvicorn-worker",
}


@dataclass(frozen=True)
class Server:
    """One of them: its title, the interpreter that must be there, and the command for so many processes at a port."""

    name: str
    title: str
    needs: str
    command: Callable[[Pythons, int, int], list[str]]

    def is_installed(self, pythons: Pythons) -> bool:
        """Say whether it can be run."""
        return self._python(pythons).exists() and (self.needs == "chainlit" or bool(self.version(pythons)))

    def version(self, pythons: Pythons) -> str:
        """Return its version; nothing where it is not installed."""
        if self.name == "stickyproxy":
            return package_version("stickyproxy")
        command = [str(self._python(pythons)), "-c", _VERSION, self.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PREPARE_S)
        return done.stdout.strip()

    def _python(self, pythons: Pythons) -> Path:
        return pythons.chainlit if self.needs == "chainlit" else pythons.gunicorn

    def start(self, children: Children, pythons: Pythons, processes: int) -> tuple[Child, int]:
        """Start it; return it and its port."""
        port = free_port()
        command = self.command(pythons, port, processes)
        return children.start(self.name, command, _environment(children.directory)), port


def _environment(directory: Path) -> Mapping[str, str]:
    return {
        **environment(directory),
        "CHAINLIT_APP_ROOT": str(directory / "chat"),
        "CHAINLIT_AUTH_SECRET": "equal in all processes of the app",
    }


def prepare(directory: Path, pythons: Pythons) -> None:
    """Let Chainlit write its files, which processes that start at once would do all together; raise RunError."""
    (directory / "chat").mkdir(exist_ok=True)
    done = subprocess.run(
        [str(pythons.chainlit), "-c", "import chat_app"],
        env={**os.environ, **_environment(directory)},
        cwd=_FOLDER,
        capture_output=True,
        text=True,
        check=False,
        timeout=_PREPARE_S,
    )
    if done.returncode:
        raise RunError(f"the application cannot be imported:\n{done.stderr}")


def _gunicorn(pythons: Pythons, port: int, processes: int) -> list[str]:
    return [
        str(pythons.gunicorn), "-m", "gunicorn", "-w", str(processes), "-k", "uvicorn_worker.UvicornWorker",
        "-b", f"127.0.0.1:{port}", "--pythonpath", str(_FOLDER), APPLICATION,
    ]  # fmt: skip


def _uvicorn(pythons: Pythons, port: int, processes: int) -> list[str]:
    return [
        str(pythons.chainlit), "-m", "uvicorn", "--workers", str(processes), "--host", "127.0.0.1",
        "--port", str(port), "--app-dir", str(_FOLDER), APPLICATION,
    ]  # fmt: skip


def _stickyproxy(pythons: Pythons, port: int, processes: int) -> list[str]:
    return [
        sys.executable, "-m", "stickyproxy", "run", "-w", str(processes), "--listen", f"127.0.0.1:{port}",
        "--admin", "off", "--", str(pythons.chainlit), "-m", "uvicorn", "--host", "127.0.0.1", "--port", "{port}",
        "--app-dir", str(_FOLDER), APPLICATION,
    ]  # fmt: skip


SERVERS: Final = {
    server.name: server
    for server in (
        Server("gunicorn", "gunicorn -w {} -k uvicorn_worker.UvicornWorker", "gunicorn", _gunicorn),
        Server("uvicorn", "uvicorn --workers {}", "chainlit", _uvicorn),
        Server("stickyproxy", "stickyproxy run -w {} -- uvicorn", "chainlit", _stickyproxy),
    )
}
