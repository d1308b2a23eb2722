"""Several processes of the counting app, and what reached them."""

import json
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from tests.helpers.processes import HTTP, REPOSITORY, Child, Children, free_port, wait_until


class CountingApps:
    """One process for each name, each at a port that it keeps when it is started again."""

    program: ClassVar = "counting_app"

    def __init__(self, children: Children, *names: str, start: bool = True) -> None:
        self._children = children
        self._ports = {name: free_port() for name in names}
        self._generations: Counter[str] = Counter()
        self._running: dict[str, Child] = {}
        if start:
            for name in names:
                self.start(name)
            for name in names:
                self.wait_until_ready(name)

    @property
    def upstreams(self) -> Mapping[str, str]:
        """URL by name, as a proxy's configuration takes them."""
        return {name: f"http://127.0.0.1:{port}" for name, port in self._ports.items()}

    def start(self, name: str) -> None:
        """Start a process, at first or again; its generation counts up."""
        self._generations[name] += 1
        url = urlsplit(self.upstreams[name])
        options = {
            "host": url.hostname,
            "port": url.port,
            "name": name,
            "generation": self._generations[name],
            "log": self._log(name),
        }
        arguments = [f"--{option}={value}" for option, value in options.items()]
        command = [sys.executable, "-m", f"tests.helpers.{self.program}", *arguments]
        self._running[name] = self._children.start(name, command, {"PYTHONPATH": str(REPOSITORY)})

    def wait_until_ready(self, name: str) -> None:
        self._running[name].wait_until_ready(f"{self.upstreams[name]}/healthz")

    def kill(self, name: str) -> None:
        """End a process with SIGKILL, and return when it and its connections are gone."""
        self._running[name].send(signal.SIGKILL)
        self._running[name].wait()

    def received(self) -> Counter[tuple[str, str]]:
        """Return how often each request reached an app, by method and id."""
        logs = [self._log(name).read_text() for name in self._ports if self._log(name).exists()]
        lines = [line.split() for log in logs for line in log.splitlines()]
        return Counter((method, request_id) for method, request_id in lines)

    def wait_until_held(self, name: str, gate: str, count: int = 1) -> None:
        """Wait until so many requests wait in an app under the name `gate`."""
        wait_until(lambda: self._held(name, gate) == count, f"{count} requests wait for {gate} at {name}")

    def release(self, name: str, gate: str) -> None:
        """Let the requests go that wait in an app under the name `gate`."""
        with HTTP.open(urllib.request.Request(f"{self.upstreams[name]}/release/{gate}", method="POST"), timeout=30):
            pass

    def _held(self, name: str, gate: str) -> int:
        with HTTP.open(f"{self.upstreams[name]}/waiting/{gate}", timeout=30) as response:
            return int(json.load(response))

    def _log(self, name: str) -> Path:
        return self._children.directory / f"{name}-received"
