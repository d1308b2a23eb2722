"""A `stickyproxy run` of a framework's app, whose version is a text in a file, with commands to it."""

import os
import signal
from collections.abc import Sequence

import yaml

from tests.helpers.apps import APPS, Framework
from tests.helpers.proc import mentioning
from tests.helpers.processes import Administered, Child, Children, free_port, wait_until

# Short: a process that is left by its visitors ends soon.
SESSION_IDLE_S = 2
PROBE = {"path": "/healthz", "interval": "1s", "timeout": "2s", "rise": 1, "fall": 2}


class DeployedSite(Administered):
    """A proxy that runs some processes of an app, with `options` on its command line; `stop` ends all of it."""

    def __init__(
        self, children: Children, framework: Framework, name: str, processes: int, options: Sequence[str] = ()
    ) -> None:
        self._children = children
        self._name = name
        self._version_file = children.directory / f"{name}.version"
        self._hold = self._version_file.with_suffix(".hold")
        self._control = children.directory / f"{name}.control"
        self.set_version("1")
        home = children.directory / f"{name}-home"
        for generation in (1, 2):
            for number in range(1, processes + 1):
                (home / f"g{generation}-{number}").mkdir(parents=True)
        port, admin_port = free_port(), free_port()
        self.url = f"http://localhost:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        command = [str(framework.interpreter()), str(APPS / framework.script)]
        run = {
            "command": [*command, "--port={port}", f"--version-file={self._version_file}", *options],
            "processes": processes,
            "env": {framework.storage: f"{home}/{{id}}", framework.secret: "equal in all processes of the app"},
            "ready": {"path": "/healthz", "timeout": "120s"},
        }
        configuration = {
            "listeners": [f"127.0.0.1:{port}"],
            "admin": {"address": f"127.0.0.1:{admin_port}"},
            "control": str(self._control),
            "affinity": {"session_idle": f"{SESSION_IDLE_S}s"},
            "health": {"probe": PROBE},
            "workers": 2,
            "grace": "10s",
            "run": run,
        }
        file = children.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(configuration, sort_keys=False))
        homes = {"HOME": str(home), "XDG_STATE_HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
        self.child = children.start_stickyproxy(name, "run", "--config", str(file), env=homes)
        self.child.wait_until_ready(f"{self.admin_url}/readyz")
        wait_until(lambda: len(self.ready()) == processes, "all app processes are ready")

    def set_version(self, version: str) -> None:
        """Let processes that start from now on be of another version."""
        self._version_file.write_text(version)

    def deploy(self, *options: str) -> Child:
        """Start a deploy; its command ends when the old generation has ended."""
        return self._children.start_stickyproxy(
            f"{self._name}-deploy", "deploy", *options, "--control", str(self._control)
        )

    def ready(self) -> dict[str, int]:
        """Return the process ids of the app processes that new clients come to, by id."""
        known = self.upstreams().items()
        return {name: one["process"]["pid"] for name, one in known if one["process"]["state"] == "ready"}

    def kill(self, upstream_id: str) -> None:
        """Kill an app process; the one that the proxy starts in its place waits for `let_start`."""
        self._hold.touch()
        os.kill(self.ready()[upstream_id], signal.SIGKILL)

    def let_start(self) -> None:
        self._hold.unlink()

    def app_processes(self) -> set[int]:
        """Return the process ids of all processes that were started as one of the app."""
        return mentioning(f"--version-file={self._version_file}")

    def stop(self) -> None:
        """Stop the proxy as an operator does; no process of the app may be left."""
        self.child.stop()
        wait_until(lambda: not self.app_processes(), "no process of the app is left")
