"""A supervisor of one app process, as a program: it is killed at a chosen moment, or executes itself in place.

`app_supervisor.py LOOP kill MOMENT APP`: it kills itself with SIGKILL at that moment. APP is the app as Python text.
`app_supervisor.py LOOP execute TIMES APP`: it executes itself so often, then stops the app, and prints facts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import uvloop

from stickyproxy.control.runner import app_process as app_process_module
from stickyproxy.control.runner.app_process import AppProcess
from stickyproxy.control.runner.warden import Warden

if TYPE_CHECKING:
    from collections.abc import Callable

_LEFT = "LEFT_BY_THE_FORMER_IMAGE"
DEADLINE_S = 60.0
LINES = 200  # that each image must see


def die(*_: object) -> NoReturn:
    """End as by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- a condition of another process
            await asyncio.sleep(0.001)


def execute(state: dict[str, Any]) -> NoReturn:
    """Become another image, which finds the state."""
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, _LEFT: json.dumps(state)})  # noqa: S606


class Supervisor:
    """One image. Lines of the app go to standard error, as they come."""

    def __init__(self) -> None:
        left = os.environ.pop(_LEFT, None)
        self.left: dict[str, Any] | None = None if left is None else json.loads(left)
        self.warden = Warden()
        self.seen = 0

    def on_line(self, upstream_id: str, line: str) -> None:
        """Pass a line on."""
        self.seen += 1
        os.write(2, f"{upstream_id} {line}\n".encode())

    def make(self, text: str) -> AppProcess:
        """Return the app process, which is not started yet."""
        words = [sys.executable, "-I", "-S", "-u", "-c", text]
        return AppProcess("g1-1", words, dict(os.environ), None, self.warden, self.on_line, signal.SIGTERM, 0.3)

    # kill

    async def kill(self, moment: str, text: str) -> None:  # noqa: C901, PLR0912 -- one branch for each moment
        """Be killed at a moment."""
        if self.left is not None:
            if moment == "executed":
                die()
            await self.warden.adopt(self.left["warden"])
            AppProcess.adopt(self.left["process"], self.warden, self.on_line)
            die()
        if moment == "unguarded":
            self.warden.add = lambda *_: None  # type: ignore[method-assign]
        await self.warden.start()
        app = self.make(text)
        if moment == "spawned":
            app._launch = die  # type: ignore[assignment]
        elif moment == "told":
            add = self.warden.add
            self.warden.add = lambda *args: (add(*args), die())[1]  # type: ignore[method-assign]
        elif moment == "gone":
            receive, calls = app_process_module._receive, list[None]()

            async def counted(link: Any) -> bytes:
                calls.append(None)
                return die() if len(calls) > 1 else await receive(link)

            app_process_module._receive = counted
        await app.start()
        if moment == "at once":
            die()
        await until(lambda: "ready" in app.last_lines)
        if moment == "stopping":
            asyncio.get_running_loop().call_later(0.05, die)
            await app.stop(signal.SIGTERM, DEADLINE_S)
        elif moment == "stopped":
            app._part = die  # type: ignore[method-assign]
            await app.stop(signal.SIGKILL)
        elif moment == "leader ended":
            app._part = die  # type: ignore[method-assign]
            os.kill(app.process_id, signal.SIGKILL)
            await app.ended
        elif moment == "warden replaced":
            former = self.warden.process_id
            assert former is not None
            os.kill(former, signal.SIGKILL)
            await until(lambda: self.warden.process_id not in {None, former})
        elif moment in {"left", "executed", "adopted"}:
            state = {"process": app.leave(), "warden": self.warden.leave()}
            if moment != "left":
                execute(state)
        die()

    # execute

    async def execute(self, times: str, text: str) -> None:
        """Execute itself, and print what became of the app."""
        if self.left is None:
            count = 0
            await self.warden.start()
            app = self.make(text)
            await app.start()
        else:
            count = int(self.left["count"])
            await self.warden.adopt(self.left["warden"])
            app = AppProcess.adopt(self.left["process"], self.warden, self.on_line)
        facts = {
            "pid": os.getpid(),
            "app": app.process_id,
            "warden": self.warden.process_id,
            "started_at": app.started_at,
            "kept": len(app.last_lines),
        }
        os.write(1, f"{json.dumps(facts)}\n".encode())
        await until(lambda: self.seen >= LINES and (app._lines.partial or times == "0"))
        if count < int(times):
            state: dict[str, Any] = {"count": count + 1, "process": app.leave(), "warden": self.warden.leave()}
            if "careless" in os.environ:
                os.set_inheritable(state["process"]["output"], False)
            execute(state)
        await app.stop(signal.SIGTERM, DEADLINE_S)
        await self.warden.stop()
        os.write(1, f"{json.dumps({'ended': app.ended.result(), 'status': app.exit_status})}\n".encode())


if __name__ == "__main__":
    _, loop, what, *arguments = sys.argv
    run = {"uvloop": uvloop.run, "asyncio": asyncio.run}[loop]

    async def main() -> None:
        """Make the supervisor on its loop."""
        await getattr(Supervisor(), what)(*arguments)

    run(main())
