"""Everything that runs: three apps, the proxy, the load, and between the two a relay where a fault is asked for."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from tests.bench.operations.remote import ask, is_there
from tests.bench.programs import ROOT
from tests.bench.results import RunError
from tests.helpers.proc import session_of
from tests.helpers.processes import Children, StickyProxy, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

APPS: Final = ("alpha", "beta", "gamma")
SPARE: Final = "spare"  # runs too, and is in the configuration after every second reload
_SETTLE_STEP_S: Final = 0.2
_GRACE: Final = "10s"
_STOP_TIMEOUT_S: Final = 30.0
_TUNNELS_AT_MOST: Final = 1000  # of one process of the load
_NUMBERS: Final = 10_000_000  # of tunnels, kept for each process of the load


@dataclass(frozen=True)
class Plan:
    """What is asked for. `pause_s` is what lies between two operations, `quiet_s` the time without any before them."""

    operation: str
    times: int = 50
    tunnels: int = 2000
    period_s: float = 0.1
    requests: float = 200.0
    workers: int = 2
    pause_s: float = 1.0
    quiet_s: float = 10.0
    faults: tuple[str, ...] = ()  # what the relay does wrong, one after the other; none: there is no relay
    settle_s: float = 3.0  # for so long nothing has arrived any more before what is missing counts as lost

    @property
    def has_control(self) -> bool:
        """Say whether the proxy is told what to do over its control socket."""
        return self.operation in {"upgrade", "reload", "mixed"}


def split(tunnels: int) -> list[int]:
    """Return how many tunnels each process of the load opens.

    Where more than 1,024 descriptors are ready at a time, libuv goes on with them for up to 48 rounds before it looks
    at a timer: the load would be late by a second.
    """
    number = math.ceil(tunnels / _TUNNELS_AT_MOST)
    return [tunnels // number + (one < tunnels % number) for one in range(number)]


class Program:
    """A program of the load that is told what to do."""

    def __init__(self, children: Children, name: str, module: str, *arguments: object) -> None:
        self.name = name
        self.words = children.directory / f"{name}.sock"
        self.words.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"tests.bench.operations.{module}", *map(str, arguments)]
        self.child = children.start(name, [*command, "--words", str(self.words)], {"PYTHONPATH": str(ROOT)})

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            if not self.child.is_running():
                raise RunError(f"{self.name} ended before it was ready:\n{self.child.log_tail()}")
            return is_there(self.words)

        wait_until(is_ready, f"{self.name} is ready")

    def ask(self, word: str) -> Any:
        """Tell it something; raise RunError with the end of its output where it cannot do it."""
        try:
            return ask(self.words, word)
        except RunError as error:
            raise RunError(f"{error}\n{self.child.log_tail()}") from error


class Stage:
    """All processes of one run; `Children` ends those that `close` leaves."""

    def __init__(self, children: Children, plan: Plan) -> None:
        self.plan = plan
        self.directory = children.directory
        self.control = children.directory / "control.sock"
        self._children = children
        self._pids: list[int] = []  # of the proxies, one after the other
        self._ports = {name: free_port() for name in (*APPS, SPARE)}
        self._logs = [children.directory / f"{name}.requests" for name in self._ports]
        self.apps = [self._start_app(name, log) for name, log in zip(self._ports, self._logs, strict=True)]
        for app in self.apps:
            app.wait_until_ready()
        self.proxy = self._start_proxy()
        self.remember_proxy()
        self.port = int(self.proxy.url.rpartition(":")[2])
        self.relay = self._start_relay() if plan.faults else None
        entry = ("--port", self.port if self.relay is None else self._relay_port)
        self.loads = [
            Program(
                children, f"load-{number}", "load", *entry, "--period", plan.period_s,
                "--first", number * _NUMBERS + 1, "--tunnels", tunnels,
            )
            for number, tunnels in enumerate(split(plan.tunnels))
        ]  # fmt: skip
        self.requests = Program(
            children, "requests", "requests", *entry, "--rate", plan.requests, "--logs", *self._logs
        )
        for program in (*self.loads, self.requests):
            program.wait_until_ready()

    @property
    def programs(self) -> list[Program]:
        """All that send and receive."""
        return [*self.apps, *self.loads, self.requests]

    @property
    def upstream_ids(self) -> set[str]:
        """The upstreams that the proxy has now, as it says itself."""
        return set(self.proxy.upstreams())

    def _start_app(self, name: str, log: Path) -> Program:
        log.touch()
        options = ("--port", self._ports[name], "--period", self.plan.period_s, "--log", log)
        return Program(self._children, name, "app", name, *options)

    def _start_proxy(self) -> StickyProxy:
        more: dict[str, Any] = {"workers": self.plan.workers, "grace": _GRACE}
        if self.plan.has_control:
            more["control"] = str(self.control)
        proxy = StickyProxy(
            self._children,
            {name: f"http://127.0.0.1:{self._ports[name]}" for name in APPS},
            more=more,
            name="stickyproxy",
        )
        self._pids.append(proxy.child.pid)
        return proxy

    def _start_relay(self) -> Program:
        self._relay_port = free_port()
        arguments = ("--port", self._relay_port, "--to", self.port, "--faults", *self.plan.faults)
        relay = Program(self._children, "relay", "relay", *arguments)
        relay.wait_until_ready()
        return relay

    def remember_proxy(self) -> None:
        """Note how the proxy was started, for `restart_proxy`."""
        proc = Path(f"/proc/{self.proxy.child.pid}")
        self._command = [os.fsdecode(word) for word in (proc / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = (os.fsdecode(pair).partition("=") for pair in (proc / "environ").read_bytes().split(b"\0") if pair)
        self._environment = {name: value for name, _, value in pairs}

    def restart_proxy(self) -> None:
        """Start another proxy in the place of one that is gone, just as that was started."""
        self.proxy.child = self._children.start("stickyproxy", self._command, self._environment)
        self._pids.append(self.proxy.child.pid)
        self.proxy.child.wait_until_ready(f"{self.proxy.admin_url}/readyz")

    def write_configuration(self, changes: Mapping[str, Any], *, has_spare: bool) -> None:
        """Write the proxy's file anew: with these sections, and with or without the spare upstream."""
        configuration = yaml.safe_load(self.proxy.file.read_text())
        names = (*APPS, SPARE) if has_spare else APPS
        configuration["upstreams"] = [{"id": name, "url": f"http://127.0.0.1:{self._ports[name]}"} for name in names]
        for section, keys in changes.items():  # other keys of a section stay, such as the secrets
            configuration[section] = {**configuration.get(section, {}), **keys} if isinstance(keys, dict) else keys
        text = yaml.safe_dump(configuration, sort_keys=False)
        new = self.proxy.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.proxy.file)

    def strike(self) -> None:
        """Let the relay do wrong once, if there is one."""
        if self.relay is not None:
            self.relay.ask("strike")

    def settle(self) -> None:
        """Wait until all that was sent has come, or until nothing has come any more for a while."""
        last, since_s = -1, time.monotonic()
        while True:
            totals = [program.ask("totals") for program in (*self.apps, *self.loads)]
            received = sum(one["received"] for one in totals)
            if received != last:
                last, since_s = received, time.monotonic()
            if received == sum(one["sent"] for one in totals) or time.monotonic() - since_s > self.plan.settle_s:
                return
            time.sleep(_SETTLE_STEP_S)

    def stop_proxy(self) -> int:
        """End the load, let the proxy stop as an operator would, and return how many processes it leaves."""
        for load in self.loads:
            load.child.stop()
        pid = self.proxy.child.pid
        if self.proxy.child.is_running():
            os.kill(pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.proxy.child.wait(_STOP_TIMEOUT_S)
        left = {one for pid in self._pids for one in session_of(pid)}
        for one in left:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        return len(left)
