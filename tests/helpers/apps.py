"""Sample apps, several processes of each, run by the interpreter of the framework's own virtual environment."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.helpers.processes import Child, Children, free_port

REPOSITORY = Path(__file__).parents[2]
APPS = REPOSITORY / "tests" / "end_to_end" / "apps"


def lacking(reason: str) -> NoReturn:
    """Skip the test that needs what is lacking; fail it in CI, where nothing may be lacking."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def find_interpreter(name: str) -> Path:
    """Return the Python that has a framework, by the name of its recipe; skip or fail the test if there is none.

    It is the one that the environment names (STICKYPROXY_NICEGUI_PYTHON and so on), or that of `.venvs/<name>`.
    """
    variable = f"STICKYPROXY_{name.upper().replace('-', '_')}_PYTHON"
    path = Path(os.environ.get(variable) or REPOSITORY / ".venvs" / name / "bin" / "python")
    if not path.exists():
        requirements = f"config/recipes/{name}/requirements.txt"
        lacking(f"no {path}: set {variable}, or make .venvs/{name} with {requirements}")
    return path


@dataclass(frozen=True)
class Framework:
    """A framework of which a sample app exists: `storage` names the variable for its own directory in each process."""

    name: str
    script: str
    storage: str
    secret: str

    def interpreter(self) -> Path:
        """Return the Python that has the framework; skip or fail the test if there is none."""
        return find_interpreter(self.name)


NICEGUI = Framework("nicegui", "nicegui_app.py", storage="NICEGUI_STORAGE_PATH", secret="STORAGE_SECRET")
CHAINLIT = Framework("chainlit", "chainlit_app.py", storage="CHAINLIT_APP_ROOT", secret="CHAINLIT_AUTH_SECRET")


class Fleet:
    """Several processes of one app, `app-1` and so on, each at a port that it keeps when it is started again."""

    def __init__(self, children: Children, framework: Framework, size: int = 3, options: Sequence[str] = ()) -> None:
        self._children = children
        self._framework = framework
        self._interpreter = framework.interpreter()
        self._options = options
        self._ports = {f"app-{number}": free_port() for number in range(1, size + 1)}
        self._running = {name: self._start(name) for name in self._ports}
        self._wait_until_ready()

    @property
    def upstreams(self) -> Mapping[str, str]:
        return {name: f"http://127.0.0.1:{port}" for name, port in self._ports.items()}

    @property
    def pids(self) -> set[int]:
        return {child.pid for child in self._running.values()}

    def send(self, pid: int, number: signal.Signals) -> Child:
        """Send a signal to the process with this pid."""
        child = self._running[self.upstream_of(pid)]
        child.send(number)
        return child

    def upstream_of(self, pid: int) -> str:
        return next(name for name, child in self._running.items() if child.pid == pid)

    def restore(self) -> None:
        """Start again, at their ports, the processes that have ended, and let those go on that were stopped."""
        for name, child in self._running.items():
            if child.is_running():
                child.send(signal.SIGCONT)
            else:
                self._running[name] = self._start(name)
        self._wait_until_ready()

    def _start(self, name: str) -> Child:
        storage = self._children.directory / f"{name}-storage"
        storage.mkdir(exist_ok=True)
        return self._children.start(
            name,
            [self._interpreter, APPS / self._framework.script, "--port", str(self._ports[name]), *self._options],
            env={self._framework.storage: str(storage), self._framework.secret: "equal in all processes of the app"},
        )

    def _wait_until_ready(self) -> None:
        for name, url in self.upstreams.items():
            self._running[name].wait_until_ready(f"{url}/healthz")
