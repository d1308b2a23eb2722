"""A small app that keeps its clients' state in the memory of its process, as the frameworks do whose sessions we pin.

Each answer names the process (name, pid, generation) and how often this client came; each request id is written to a
log before the answer, so that what reached an app can be compared with what the clients saw.

    python counting_app.py --port 8001 --name alpha --log received.log
"""

import argparse
import asyncio
import os
from collections import Counter
from pathlib import Path

from aiohttp import WSMsgType, web


class CountingApp:
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
        app.router.add_route("*", "/count", self.on_count)
        app.router.add_route("*", "/hold/{name}", self.on_hold)
        app.router.add_get("/stream/{name}", self.on_stream)
        app.router.add_get("/waiting/{name}", self.on_waiting)
        app.router.add_post("/release/{name}", self.on_release)
        app.router.add_get("/ws", self.on_websocket)
        app.router.add_get("/hold-ws/{name}", self.on_websocket)
        return app

    async def on_healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"name": self._name, "pid": os.getpid()})

    async def on_count(self, request: web.Request) -> web.Response:
        """Answer at once."""
        return web.json_response(self._take(request))

    async def on_hold(self, request: web.Request) -> web.Response:
        """Answer once `/release/{name}` was called at this process."""
        facts = self._take(request)
        await self._hold(request)
        return web.json_response(facts)

    async def on_stream(self, request: web.Request) -> web.StreamResponse:
        """Answer half at once and half when released."""
        self._take(request)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        await response.write(b"first half, ")
        await self._hold(request)
        await response.write(b"second half")
        await response.write_eof()
        return response

    async def on_waiting(self, request: web.Request) -> web.Response:
        """Say how many requests wait under this name."""
        return web.json_response(self._waiting[request.match_info["name"]])

    async def on_release(self, request: web.Request) -> web.Response:
        """Let all go that wait under this name, and those that are still to come."""
        self._gate(request.match_info["name"]).set()
        return web.Response()

    async def on_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Answer each message with name, pid, count and the message."""
        if "name" in request.match_info:
            await self._hold(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client = request.headers.get("X-Client", "")
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                self._counts[client] += 1
                await socket.send_str(f"{self._name} {os.getpid()} {self._counts[client]} {message.data}")
        return socket

    def _take(self, request: web.Request) -> dict[str, str | int]:
        client = request.headers.get("X-Client", "")
        os.write(self._log, f"{request.method} {request.headers.get('X-Id', '-')}\n".encode())
        self._counts[client] += 1
        return {
            "name": self._name,
            "pid": os.getpid(),
            "generation": self._generation,
            "count": self._counts[client],
        }

    def _gate(self, name: str) -> asyncio.Event:
        return self._released.setdefault(name, asyncio.Event())

    async def _hold(self, request: web.Request) -> None:
        name = request.match_info["name"]
        self._waiting[name] += 1
        try:
            await self._gate(name).wait()
        finally:
            self._waiting[name] -= 1


def main() -> None:
    parser = argparse.ArgumentParser(description="A small app that counts in memory")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--name", required=True, help="what its answers call it")
    parser.add_argument("--generation", type=int, default=1, help="counted up by whoever starts it again")
    parser.add_argument("--log", type=Path, required=True, help="file for the ids of the requests that arrived")
    options = parser.parse_args()
    app = CountingApp(options.name, options.generation, options.log)
    # Signals keep their default action: SIGTERM ends it at once, whatever is open.
    web.run_app(
        app.application(),
        host="127.0.0.1",
        port=options.port,
        access_log=None,
        handle_signals=False,
        print=None,
        keepalive_timeout=3600,
        backlog=1024,
    )


if __name__ == "__main__":
    main()
