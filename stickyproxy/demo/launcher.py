"""Keeps the demo's apps running: starts them, brings back what ended, and leaves none behind."""

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import click

from stickyproxy.demo.app import ADMIN_ENV, LISTENING, Process
from stickyproxy.tasks import spawn

NAMES: Final = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
"""What the processes are called, in this order; the page knows a colour for each, so there are at most 8."""

START_TIMEOUT_S: Final = 30.0
"""How long all apps together may take until they listen: a fraction of a second, but a busy machine may need more."""

RESTART_DELAY_S: Final = 3.0
"""How long an app that ended stays away: long enough to watch what the page does without it."""

STOP_TIMEOUT_S: Final = 3.0
"""How long an app may take after SIGTERM before it gets SIGKILL; it closes its sockets within 1 s."""

Say = Callable[[str], None]


class DemoError(Exception):
    """The demo's apps did not start; the text says which and why."""


class Demo:
    """N app processes on free ports of 127.0.0.1, each brought back after it ended.

    async with Demo(count=3) as demo:
        ...  # every one of demo.urls answers

    `count` is from 1 to `len(NAMES)`. `admin_url` is where the page says that the metrics are. `say` takes each line
    that an app prints, and what the launcher has to say about it. Entering raises `DemoError` when an app ends
    before it listens or needs longer than `START_TIMEOUT_S`; leaving takes up to `STOP_TIMEOUT_S`.
    """

    def __init__(
        self,
        count: int = 3,
        *,
        admin_url: str | None = None,
        restart_delay_s: float = RESTART_DELAY_S,
        say: Say | None = None,
    ) -> None:
        if not 1 <= count <= len(NAMES):
            raise ValueError(f"count must be from 1 to {len(NAMES)}, not {count}")
        self.names = NAMES[:count]
        self._env = dict(os.environ) if admin_url is None else {**os.environ, ADMIN_ENV: admin_url}
        self._restart_delay_s = restart_delay_s
        self._say = say or _say
        self._apps: list[_App] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def urls(self) -> list[str]:
        """Where the apps answer, as `http://127.0.0.1:PORT`; the same ones through every restart."""
        return [app.url for app in self._apps]

    async def __aenter__(self) -> Self:
        self._apps = [_App(name, self._env, self._restart_delay_s, self._say, self._publish) for name in self.names]
        self._tasks = [spawn(app.keep_running(), name=f"demo {app.name}") for app in self._apps]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.gather(*(app.first_start for app in self._apps))
        except TimeoutError as error:
            late = ", ".join(app.name for app in self._apps if app.pid is None)
            await self._stop()
            raise DemoError(f"did not listen within {START_TIMEOUT_S:.0f} s: {late}") from error
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for app in self._apps:
            app.close()

    def _publish(self) -> None:
        """Tell every app, and so every page, which processes run."""
        processes: list[Process] = [{"name": app.name, "pid": app.pid} for app in self._apps]
        for app in self._apps:
            app.tell(processes)


class _App:
    """One app and its present process, if it has one; `pid` is set from when it listens until it ends."""

    def __init__(
        self, name: str, env: dict[str, str], restart_delay_s: float, say: Say, on_change: Callable[[], None]
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self.first_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._env = env
        self._restart_delay_s = restart_delay_s
        self._say = say
        self._on_change = on_change
        self._stdin: asyncio.StreamWriter | None = None
        self._reservation, self._port = _reserve_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def keep_running(self) -> None:
        """Run one process after the other until cancelled; then end the present one."""
        while True:
            status = await self._run_once()
            if not self.first_start.done():
                self.first_start.set_exception(DemoError(f"{self.name} {_ending(status)} before it listened"))
                return
            self._report(f"{_ending(status)}; comes back in {self._restart_delay_s:g} s")
            await asyncio.sleep(self._restart_delay_s)

    def tell(self, processes: list[Process]) -> None:
        """Send the list of processes to the present process, if there is one that listens."""
        if self.pid is not None and self._stdin is not None and not self._stdin.is_closing():
            self._stdin.write(json.dumps(processes).encode() + b"\n")

    def close(self) -> None:
        """Give the port back."""
        self._reservation.close()

    async def _run_once(self) -> int:
        # A session of its own, so that Ctrl-C reaches the launcher alone. Its end closes the pipe, whatever ended it.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stickyproxy.demo.app", "--follow-stdin"),
            *("--port", str(self._port), "--name", self.name),
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env=self._env,
            start_new_session=True,
        )
        self._stdin = process.stdin
        output = spawn(self._follow_output(process), name=f"demo {self.name} output")
        try:
            return await process.wait()
        finally:
            await _end(process)
            await output
            self.pid = None
            self._on_change()

    async def _follow_output(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what the process prints, until it ends, and notice the line that says that it listens."""
        if process.stdout is None:
            return
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self._report(f"{line} (pid {process.pid})" if line.startswith(LISTENING) else line)
            if line.startswith(LISTENING):
                self.pid = process.pid
                self._on_change()
                if not self.first_start.done():
                    self.first_start.set_result(None)

    def _report(self, text: str) -> None:
        self._say(f"{self.name:<8}| {text}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process if it still runs: SIGTERM, and SIGKILL after `STOP_TIMEOUT_S` or when cancelled meanwhile."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        # Whoever ends it may have been cancelled: a timeout would then cancel once more (Python 3.11.2, of Debian 12).
        await asyncio.wait([spawn(process.wait(), name="end of a demo app")], timeout=STOP_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
    await process.wait()


def _reserve_port() -> tuple[socket.socket, int]:
    """Bind a free port without listening: connections are refused, but nobody else gets the port while an app is away.

    Without this, the kernel may give the port to an outgoing connection meanwhile; the proxy that dials the absent app
    could even be connected to itself.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    return holder, port


def _ending(status: int) -> str:
    """Say how a process ended, from its return code (negative: the signal that killed it)."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _say(line: str) -> None:
    click.echo(line, err=True)


def banner(url: str, admin_url: str, names: tuple[str, ...] | list[str]) -> str:
    """Return the text that greets whoever started the demo: where to look and what to try."""
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    processes = "processes" if len(names) > 1 else "process"
    return f"""
  stickyproxy demo: {len(names)} stateful app {processes} ({listed}) behind one address

    Open     {url}
    Metrics  {admin_url.rstrip("/")}/metrics

  Try this
    - Send a few messages: the counter lives in the memory of one process.
    - Reload, or open a second tab: the cookie keeps this browser on its process.
    - Open a private window: another visitor, another process.
    - Press "Stop this process" or "Kill -9 it" and watch the page find the next one.

  Ctrl-C stops the proxy and the apps.
"""
