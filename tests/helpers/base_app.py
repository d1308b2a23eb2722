"""What the counting app and the fault app have in common: a log of what arrived, counts of clients, and gates.

A request may wait at a gate until the test opens it, with a POST to `/release/GATE` of the same process.
"""

import argparse
import asyncio
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from aiohttp import web


class BaseApp:
    """The state of one process; `X-Client` names a client, `X-Id` a request."""

    def __init__(self, name: str, generation: int, log: Path) -> None:
        self._name = name
        self._generation = generation
        # Not buffered: what SIGKILL leaves behind is complete.
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._counts: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._released: dict[str, asyncio.Event] = {}

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", self.on_healthz)
        app.router.add_get("/waiting/{gate}", self.on_waiting)
        app.router.add_post("/release/{gate}", self.on_release)
        return app

    async def on_healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"name": self._name, "pid": os.getpid()})

    async def on_waiting(self, request: web.Request) -> web.Response:
        """Say how many requests wait at a gate."""
        return web.json_response(self._waiting[request.match_info["gate"]])

    async def on_release(self, request: web.Request) -> web.Response:
        """Open a gate, for those that wait and those that are still to come."""
        self._gate(request.match_info["gate"]).set()
        return web.Response()

    def _gate(self, name: str) -> asyncio.Event:
        return self._released.setdefault(name, asyncio.Event())

    async def _hold(self, request: web.Request) -> None:
        gate = request.match_info["gate"]
        self._waiting[gate] += 1
        try:
            await self._gate(gate).wait()
        finally:
            self._waiting[gate] -= 1


def serve(make: Callable[[str, int, Path], BaseApp], description: str) -> None:
    """Serve the app that the command line asks for, until the process is ended."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1", help="where it listens")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--name", required=True, help="what its answers call it")
    parser.add_argument("--generation", type=int, default=1, help="counted up by whoever starts it again")
    parser.add_argument("--log", type=Path, required=True, help="file for the requests that arrived")
    options = parser.parse_args()
    # Signals keep their default action: SIGTERM ends it at once, whatever is open.
    web.run_app(
        make(options.name, options.generation, options.log).application(),
        host=options.host,
        port=options.port,
        access_log=None,
        handle_signals=False,
        print=None,
        keepalive_timeout=3600,
        backlog=1024,
    )
