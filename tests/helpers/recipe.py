"""A recipe that runs: `stickyproxy run` in a copy of its directory, with the interpreter that has its framework."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from stickyproxy.config.document import read_document
from stickyproxy.config.preset import put_presets_under
from tests.helpers.apps import REPOSITORY, find_interpreter
from tests.helpers.metrics import total
from tests.helpers.processes import HTTP, WAIT_TIMEOUT_S, Children, StickyProxy, free_port, wait_until

RECIPES: Final = REPOSITORY / "config" / "recipes"
PROCESSES: Final = 3
READY_TIMEOUT_S: Final = 180.0  # some frameworks take long to import, and three do it at once
NO_AFFINITY: Final = {"cookie": False, "policy": "round_robin"}


class Recipe:
    """The site of a recipe, by its name; a context manager that leaves no process behind.

    `url` is where browsers go, by the name `localhost`; `directory` is the copy in which the app runs.
    """

    def __init__(self, name: str, parent: Path, processes: int = PROCESSES) -> None:
        self.name = name
        self.directory = Path(shutil.copytree(RECIPES / name, parent / name))
        self._children = Children(self.directory)
        self._port, self._admin_port = free_port(), free_port()
        self.url = f"http://localhost:{self._port}"
        home = parent / "home"
        home.mkdir()
        python = find_interpreter(name)
        # What the user has: the framework's environment is active, and nothing else of this machine is told.
        env = {
            "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "XDG_STATE_HOME": str(home),
        }
        words = ["run", "--config", "stickyproxy.yaml", "-w", str(processes)]
        addresses = ["--listen", f"127.0.0.1:{self._port}", "--admin", f"127.0.0.1:{self._admin_port}"]
        program = Path(sys.executable).with_name("stickyproxy")
        self._processes = processes
        self._without_affinity: StickyProxy | None = None
        self._child = self._children.start("stickyproxy", [program, *words, *addresses], env)

    def __enter__(self) -> Self:
        try:
            self._child.wait_until_ready(f"http://127.0.0.1:{self._admin_port}/readyz")
            self.wait_until_all_ready()
        except BaseException:
            self._children.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pids = self.pids.values() if self._child.is_running() else ()
        self._children.__exit__(kind, error, at)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "no app process is left")

    @property
    def pids(self) -> Mapping[str, int]:
        """The process ids of the app processes that clients come to, by upstream id (`g1-1` and so on)."""
        known = self._upstreams().items()
        return {key: one["process"]["pid"] for key, one in known if one["process"]["state"] == "ready"}

    @property
    def log(self) -> str:
        """Everything that the proxy and the app processes have printed so far."""
        return self._child.log.read_text(errors="replace")

    def wait_until_all_ready(self) -> None:
        wait_until(lambda: len(self.pids) == self._processes, "all app processes are ready", READY_TIMEOUT_S)

    def stop_process(self, upstream_id: str) -> None:
        """End an app process as a service manager would, and wait until another one serves in its place."""
        pid = self.pids[upstream_id]
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: self.pids.get(upstream_id, pid) != pid, f"another {upstream_id} is ready", READY_TIMEOUT_S)

    def start_without_affinity(self) -> str:
        """Start a second proxy before the same app processes, which sends each request to another one; return its URL.

        All else is as the recipe says. For controls: this is what the framework does without affinity.
        """
        upstreams = {key: _url_of(one["address"]) for key, one in self._upstreams().items()}
        kept = {key: value for key, value in self._configuration().items() if key not in {"run", "affinity", "presets"}}
        self._without_affinity = StickyProxy(
            self._children, upstreams, affinity=NO_AFFINITY, more=kept, name="no-affinity"
        )
        return self._without_affinity.url

    def stop_without_affinity(self) -> None:
        """End the second proxy, and with it the pages that load themselves again and again."""
        if self._without_affinity:
            self._without_affinity.child.stop()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of `stickyproxy_<name>` that have these labels; 0 if there is none."""
        return total(self._get("/metrics"), name, **labels)

    def reports(self) -> Iterator[tuple[str, str]]:
        """Give what to show of it when a test has failed: title and text."""
        yield from self._children.reports()

    def _configuration(self) -> dict[str, Any]:
        """Return the file of the recipe, with what its presets say."""
        document = put_presets_under(read_document((self.directory / "stickyproxy.yaml").read_text()), (), None)
        assert isinstance(document.value, dict)
        return document.value

    def _upstreams(self) -> dict[str, Any]:
        """Return what the proxy says of its app processes, by id."""
        state = json.loads(self._get("/api/v1/state"))
        return {one["id"]: one for cluster in state["clusters"] for one in cluster["upstreams"]}

    def _get(self, path: str) -> str:
        with HTTP.open(f"http://127.0.0.1:{self._admin_port}{path}", timeout=WAIT_TIMEOUT_S) as response:
            return str(response.read().decode())


def _url_of(address: str) -> str:
    return address if address.startswith("unix:") else f"http://{address}"
