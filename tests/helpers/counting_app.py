"""A small app that keeps its clients' state in the memory of its process, as the frameworks do whose sessions we pin.

Each answer names the process (name, pid, generation) and how often this client came; each request id is written to a
log before the answer, so that what reached an app can be compared with what the clients saw.

    python -m tests.helpers.counting_app --port 8001 --name alpha --log received.log
"""

import os

from aiohttp import WSMsgType, web
from typing_extensions import override

from tests.helpers.base_app import BaseApp, serve


class CountingApp(BaseApp):
    """The state of one process."""

    @override
    def application(self) -> web.Application:
        app = super().application()
        app.router.add_route("*", "/count", self.on_count)
        app.router.add_route("*", "/hold/{gate}", self.on_hold)
        app.router.add_get("/stream/{gate}", self.on_stream)
        app.router.add_get("/ws", self.on_websocket)
        app.router.add_get("/hold-ws/{gate}", self.on_websocket)
        return app

    async def on_count(self, request: web.Request) -> web.Response:
        """Answer at once."""
        return web.json_response(self._take(request))

    async def on_hold(self, request: web.Request) -> web.Response:
        """Answer once `/release/{gate}` was called at this process."""
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

    async def on_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Answer each message with name, pid, count and the message."""
        if "gate" in request.match_info:
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


if __name__ == "__main__":
    serve(CountingApp, "A small app that counts in memory")
