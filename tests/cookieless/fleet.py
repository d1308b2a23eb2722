"""The apps that clients without cookies come to: several processes of each, which name themselves in their answers."""

import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.cookieless.outcome import Outcome
from tests.helpers.apps import REPOSITORY, find_interpreter
from tests.helpers.processes import Child, Children, free_port, wait_until

HERE: Final = Path(__file__).parent
RECIPES: Final = REPOSITORY / "config" / "recipes"
END_TO_END: Final = REPOSITORY / "tests" / "end_to_end" / "apps"
PROCESSES: Final = 3
READY_TIMEOUT_S: Final = 180.0  # some frameworks take long to import, and several do it at once


@dataclass(frozen=True)
class App:
    """How one process of an app is started: `{python}`, `{bin}`, `{port}` and `{storage}` stand for its own."""

    environment: str  # whose Python has the framework, as `find_interpreter` knows it
    command: tuple[str | Path, ...]
    env: Mapping[str, str] = field(default_factory=dict)


APPS: Final[Mapping[str, App]] = {
    "fastapi-socketio": App(
        "fastapi-socketio",
        ("{bin}/uvicorn", "--app-dir", RECIPES / "fastapi-socketio", "main:app", "--port", "{port}"),
    ),
    "chainlit": App(
        "chainlit",
        ("{python}", END_TO_END / "chainlit_app.py", "--port", "{port}"),
        {"CHAINLIT_APP_ROOT": "{storage}", "CHAINLIT_AUTH_SECRET": "equal in all processes of the app"},
    ),
    "nicegui": App(
        "nicegui",
        ("{python}", END_TO_END / "nicegui_app.py", "--port", "{port}"),
        {"NICEGUI_STORAGE_PATH": "{storage}", "STORAGE_SECRET": "equal in all processes of the app"},
    ),
    "streamlit": App(
        "streamlit",
        ("{bin}/streamlit", "run", RECIPES / "streamlit" / "app.py"),
        {
            "STREAMLIT_SERVER_ADDRESS": "127.0.0.1",
            "STREAMLIT_SERVER_PORT": "{port}",
            "STREAMLIT_SERVER_HEADLESS": "true",
            "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
        },
    ),
    "gradio": App(
        "gradio",
        ("{python}", RECIPES / "gradio" / "app.py"),
        {
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": "{port}",
            "GRADIO_NUM_PORTS": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": "{storage}",
        },
    ),
    "shiny": App("shiny", ("{python}", HERE / "apps" / "shiny_app.py", "--port", "{port}")),
    "mcp": App("mcp", ("{bin}/uvicorn", "--app-dir", RECIPES / "mcp", "server:app", "--port", "{port}")),
    "marimo": App(
        "marimo",
        ("{bin}/marimo", "run", HERE / "apps" / "marimo_app.py", "--headless", "--no-token", "--port", "{port}"),
        # The page's token against old code is a hash of the source.
        {"PYTHONHASHSEED": "1"},
    ),
}


class Fleet:
    """Several processes of one app, `app-1` and so on, each started in a directory of its own."""

    def __init__(self, children: Children, name: str, size: int = PROCESSES) -> None:
        self._children = children
        self._app = APPS[name]
        self._python = find_interpreter(self._app.environment)
        self._ports = {f"app-{number}": free_port() for number in range(1, size + 1)}
        running = {key: self._start(f"{name}-{key}", key) for key in self._ports}
        for key, child in running.items():
            wait_until(partial(self._accepts, child, self._ports[key]), f"{child!r} accepts", READY_TIMEOUT_S)

    @property
    def upstreams(self) -> Mapping[str, str]:
        """The URL of each process, by the name that its answers bear."""
        return {key: f"http://127.0.0.1:{port}" for key, port in self._ports.items()}

    def _start(self, name: str, key: str) -> Child:
        storage = self._children.directory / f"{name}-storage"
        storage.mkdir()
        own = {
            "python": str(self._python),
            "bin": str(self._python.parent),
            "port": str(self._ports[key]),
            "storage": str(storage),
        }
        command = [str(word).format_map(own) for word in self._app.command]
        env = {variable: value.format_map(own) for variable, value in self._app.env.items()}
        return self._children.start(name, command, {**env, "STICKYPROXY_UPSTREAM": key})

    @staticmethod
    def _accepts(child: Child, port: int) -> bool:
        """Say whether it can be connected to, which each of the frameworks is ready for."""
        assert child.is_running(), child.log_tail()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False


def run_program(children: Children, environment: str, program: str, *words: str, timeout_s: float = 600) -> Outcome:
    """Run a program of `programs/` with the Python of an environment to its end, and return what it counted.

    It connects to this machine only, whatever proxy the environment names. Raises AssertionError when it fails.
    """
    name = f"{program}-{len(list(children.directory.glob(f'{program}-*.log')))}"
    env = {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "NO_PROXY": "*", "no_proxy": "*"}
    path = HERE / "programs" / f"{program}.py"
    child = children.start(name, [find_interpreter(environment), path, *words], env)
    assert child.wait(timeout_s) == 0, child.log_tail()
    return Outcome.load(child.log.read_text().splitlines()[-1])
