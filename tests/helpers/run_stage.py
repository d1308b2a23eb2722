"""A proxy that runs an app itself, and what its processes do."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.helpers.operated import Proxy, Stage
from tests.helpers.proc import mentioning
from tests.helpers.supervised import until

APP = Path(__file__).with_name("run_app.py")


class RunStage(Stage):
    """Where the version of the app is a file that a test writes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.version_file = directory / "version"
        self.set_version("1")

    def set_version(self, version: str) -> None:
        """Have processes that start from now on be another version."""
        self.version_file.write_text(version)

    def command(self, *more: str, place: str = "--port={port}") -> list[str]:
        """Return the command of the app."""
        return [sys.executable, str(APP), place, "--version-file", str(self.version_file), *more]

    def begin_run(self, processes: Any = 2, *, fault: str = "", place: str = "--port={port}", **run: Any) -> Proxy:
        """Start a proxy that runs the app; `run` are more keys of that section."""
        sections = {key: run.pop(key) for key in ("affinity", "grace", "workers", "health") if key in run}
        command = self.command(*(["--fault", fault] if fault else []), place=place)
        return self.begin(run={"command": command, "processes": processes, **run}, upstreams=[], **sections)

    async def run(self, processes: Any = 2, **more: Any) -> Proxy:
        """Start a proxy as `begin_run` does, and wait until it serves."""
        return await self.begin_run(processes, **more).serving()

    def app_processes(self) -> set[int]:
        """Return the process ids of everything that was started as an app process of this stage."""
        return mentioning(str(self.version_file))

    async def nothing_left(self) -> None:
        """Wait until no app process is left."""
        await until(lambda: not self.app_processes(), f"no app process is left: {self.app_processes()}")


async def states(proxy: Proxy) -> dict[str, dict[str, Any]]:
    """Return what the proxy says of its app processes that are ready, by id."""
    state = json.loads(await proxy.get("/api/v1/state"))
    return {one["id"]: one for one in state["clusters"][0]["upstreams"]}
