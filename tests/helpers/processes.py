"""Child processes of the tests: each in a process group of its own, its output in a file, always stopped by pid."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from prometheus_client.samples import Sample
from typing_extensions import override

from tests.helpers.metrics import samples_of, total
from tests.helpers.proc import workers_of

REPOSITORY = Path(__file__).parents[2]
WAIT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_INTERVAL_S = 0.05
LOG_TAIL_LINES = 60

# Below Linux's ephemeral range (32768-60999): no outgoing connection takes the port of a process that is started again.
PORTS = range(20000, 32000)

# NiceGUI behaves differently where it sees that pytest runs it.
INHERITED_ENV = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}

# The environment may name an HTTP proxy, for other places than this machine.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ChildEndedError(AssertionError):
    """A child ended before it was ready; the text holds the end of its output."""


_given: deque[int] = deque(maxlen=100)


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago, and is none of the last ones returned."""
    for _ in range(100):
        port = PORTS[secrets.randbelow(len(PORTS))]
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given.append(port)
            return port
    raise AssertionError(f"no free port in {PORTS}")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
    """Return as soon as `condition()` is true; raise AssertionError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:g} s still not: {what}"
        time.sleep(POLL_INTERVAL_S)


def http_status(url: str, timeout_s: float = 5.0) -> int | None:
    """Return the status that a GET of `url` is answered with; None if it is not answered."""
    try:
        with HTTP.open(url, timeout=timeout_s) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None


class Child:
    """A running process with its log; `Children` starts and stops it."""

    def __init__(self, name: str, arguments: Sequence[str | Path], directory: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                cwd=directory,
                env={**INHERITED_ENV, "PYTHONUNBUFFERED": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @override
    def __repr__(self) -> str:
        state = "running" if self.is_running() else f"exit {self._process.returncode}"
        return f"<Child {self.name} pid={self.pid} {state}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and to the processes that it started."""
        os.killpg(self.pid, number)

    def wait(self, timeout_s: float = WAIT_TIMEOUT_S) -> int:
        """Wait for the end of the process and return its exit code; negative if a signal ended it."""
        return self._process.wait(timeout_s)

    def wait_until_ready(self, url: str) -> None:
        """Wait until a GET of `url` is answered with 200; raise ChildEndedError if the process ends before."""

        def is_ready() -> bool:
            if not self.is_running():
                raise ChildEndedError(f"{self!r} before it was ready:\n{self.log_tail()}")
            return http_status(url) == 200

        try:
            wait_until(is_ready, f"{self!r} answers {url}")
        except ChildEndedError:
            raise
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_tail()}") from None

    def stop(self) -> None:
        """End the process and those that it started: SIGTERM, and SIGKILL for what is left of the group."""
        if not self.is_running():
            return
        self.send(signal.SIGCONT)  # a stopped process would not see the SIGTERM
        self.send(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.wait()


class Children:
    """The children of one test or module: a context manager that leaves none behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in reversed(self._started):
            child.stop()

    def start(self, name: str, arguments: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Child:
        """Start a process whose output goes to `<directory>/<name>.log`, after what an earlier one wrote there."""
        child = Child(name, arguments, self.directory, env or {})
        self._started.append(child)
        return child

    def start_stickyproxy(self, name: str, *words: str | Path, env: Mapping[str, str] | None = None) -> Child:
        """Start `stickyproxy WORDS` of this repository."""
        paths = {"PYTHONPATH": str(REPOSITORY), **(env or {})}
        return self.start(name, [sys.executable, "-m", "stickyproxy", *words], paths)

    def reports(self) -> Iterator[tuple[str, str]]:
        """Give what to show of each child when a test has failed: title and text."""
        for child in self._started:
            yield f"{child!r}, end of {child.log}", child.log_tail()


class ChildrenUnder(Children):
    """Children whose command stands behind `prefix`, a program that runs it in its own process, with `env` besides."""

    def __init__(self, directory: Path, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        super().__init__(directory)
        self._prefix = prefix
        self._env = env or {}

    @override
    def start(self, name: str, arguments: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Child:
        return super().start(name, [*self._prefix, *arguments], {**(env or {}), **self._env})


class Administered:
    """A proxy whose admin listener is at `admin_url`."""

    admin_url: str

    def metrics(self) -> Iterator[Sample]:
        """Give each sample that `/metrics` shows now."""
        return samples_of(self._get("/metrics"))

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of `stickyproxy_<name>` that have these labels; 0 if there is none."""
        return total(self._get("/metrics"), name, **labels)

    def state(self) -> Any:
        """Return what the admin API says of the clusters and their upstreams."""
        return json.loads(self._get("/api/v1/state"))

    def upstreams(self) -> dict[str, Any]:
        """Return what the admin API says of each upstream, by id."""
        return {one["id"]: one for cluster in self.state()["clusters"] for one in cluster["upstreams"]}

    def _get(self, path: str) -> str:
        with HTTP.open(f"{self.admin_url}{path}", timeout=WAIT_TIMEOUT_S) as response:
            return str(response.read().decode())


class StickyProxy(Administered):
    """A `stickyproxy serve` of its own, with its configuration file, in front of `upstreams` (id to URL).

    `more` are sections of the file that stand beside, or in place of, those that every test has.
    """

    def __init__(
        self,
        children: Children,
        upstreams: Mapping[str, str],
        *,
        affinity: Mapping[str, Any] | None = None,
        probe: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
        name: str = "stickyproxy",
    ) -> None:
        port, admin_port = free_port(), free_port()
        self.url = f"http://localhost:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        configuration = {
            "listeners": [{"address": f"127.0.0.1:{port}"}],
            "upstreams": [{"id": key, "url": url} for key, url in upstreams.items()],
            "affinity": {
                "cookie": {"name": "stickyproxy"},
                "secrets": ["env:STICKYPROXY_SECRET"],
                **(affinity or {}),
            },
            "admin": {"address": f"127.0.0.1:{admin_port}"},
            "grace": "5s",
            "workers": 1,
        }
        if probe is not None:
            configuration["health"] = {"probe": dict(probe)}
        configuration |= more or {}
        self.file = children.directory / f"{name}.yaml"
        self.file.write_text(yaml.safe_dump(configuration, sort_keys=False))
        home = children.directory / f"{name}-home"
        home.mkdir(exist_ok=True)
        self.child = children.start_stickyproxy(
            name,
            "serve",
            "--config",
            self.file,
            env={
                "STICKYPROXY_SECRET": "a-secret-of-the-tests-the-same-for-each-proxy",
                "XDG_RUNTIME_DIR": str(home),
                "XDG_STATE_HOME": str(home),
            },
        )
        self.child.wait_until_ready(f"{self.admin_url}/readyz")

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        return int(self.url.rpartition(":")[2])

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers that live, the oldest first."""
        return sorted(workers_of(self.child.pid))

    @property
    def worker(self) -> int:
        """The process id of the only worker, which has the connections of all clients."""
        [process_id] = self.workers
        return process_id

    def set_state(self, upstream_id: str, state: str) -> None:
        """Set what the operator wants of an upstream: `ready`, `drain` or `maint`."""
        request = urllib.request.Request(
            f"{self.admin_url}/api/v1/clusters/default/upstreams/{upstream_id}/state",
            data=json.dumps({"state": state}).encode(),
            headers={"Content-Type": "application/json"},
            method="PUT",
        )
        with HTTP.open(request, timeout=WAIT_TIMEOUT_S):
            pass
