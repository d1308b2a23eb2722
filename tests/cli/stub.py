"""A proxy that only listens for commands: it answers what a test tells it to, and notes what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from aiohttp import web

from stickyproxy.control.runtime import bind_private

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 60


@dataclass(frozen=True)
class Answer:
    """An answer that is no plain 200, or none: `status` 0 closes the connection without one."""

    status: int
    body: Any = None


class StubProxy:
    """Listens on a Unix socket, in a thread, so that a command can run in this one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[tuple[str, str, Any]] = []
        """What was asked: method, path as it came, and the body's JSON."""
        self._answers: dict[tuple[str, str], list[Any]] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._started, self._stop = threading.Event(), asyncio.Event()

    def answer(self, method: str, path: str, *answers: Any) -> None:
        """Answer so, one after the other, and from then on always as the last."""
        self._answers[method, path] = list(answers)

    def wait_for_calls(self, number: int, method: str = "GET") -> None:
        """Wait until so many calls with a method have come."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: sum(call[0] == method for call in self.calls) >= number, timeout=DEADLINE_S
            )
        assert came, f"{method} did not come {number} times: {self.calls}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.SockSite(runner, bind_private(self.path)).start()
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        answers = self._answers.get((request.method, request.raw_path), [Answer(404, {"error": "no such thing"})])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        with self._changed:
            self.calls.append((request.method, request.raw_path, json.loads(text) if text else None))
            self._changed.notify_all()
        if not isinstance(found, Answer):
            return web.json_response(found)
        if found.status == 0:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(found.body, status=found.status or 500)
