"""A small app that fails as it is told: it holds requests, blocks its event loop, and breaks off responses.

Each request but those of the test itself is logged before it is answered, and each answer carries a receipt (see
ledger.py) in its head: on a 101 and on a response that breaks off, too.

    python -m tests.helpers.fault_app --port 8001 --name alpha --log arrivals.log
"""

import asyncio
import json
import os
import socket
import struct
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

from aiohttp import WSMsgType, web
from typing_extensions import override

from tests.helpers.base_app import BaseApp, serve
from tests.helpers.ledger import RECEIPT, Arrival, Receipt

LAG_PERIOD_S: Final = 0.01
PART: Final = b"0123456789"

# What stands of a response when it breaks off; the body is longer by what `PART` lacks.
FRAMINGS: Final = {
    "length": (b"Content-Length: 1000\r\n", PART),
    "chunk": (b"Transfer-Encoding: chunked\r\n", b"A\r\n" + PART + b"\r\n"),
    "in-chunk": (b"Transfer-Encoding: chunked\r\n", b"100\r\n" + PART),
    "until-close": (b"Connection: close\r\n", PART),
}


class LoopLag:
    """How late the timers of the loop fire; the last 100,000 readings."""

    def __init__(self) -> None:
        self._readings_s: deque[float] = deque(maxlen=100_000)

    async def measure(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self._readings_s.append(max(0.0, loop.time() - due))

    def take(self) -> dict[str, float]:
        """Return the median, the 99th percentile and the maximum in seconds since the last call."""
        readings = sorted(self._readings_s) or [0.0]
        self._readings_s.clear()
        return {"p50": readings[len(readings) // 2], "p99": readings[len(readings) * 99 // 100], "max": readings[-1]}


class FaultApp(BaseApp):
    """The state of one process."""

    def __init__(self, name: str, generation: int, log: Path) -> None:
        super().__init__(name, generation, log)
        self._connections: WeakKeyDictionary[asyncio.BaseTransport, int] = WeakKeyDictionary()
        self._lag = LoopLag()
        self._measuring: asyncio.Task[None]

    @override
    def application(self) -> web.Application:
        app = super().application()
        app.router.add_route("*", "/take", self.on_take)
        app.router.add_route("*", "/hold/{gate}", self.on_hold)
        app.router.add_route("*", "/block/{milliseconds}", self.on_block)
        app.router.add_get("/break/{framing}/{ending}/{gate}", self.on_break)
        app.router.add_get("/ws", self.on_websocket)
        app.router.add_get("/lag", self.on_lag)
        app.on_startup.append(self.on_startup)
        return app

    async def on_startup(self, _: web.Application) -> None:
        self._measuring = asyncio.get_running_loop().create_task(self._lag.measure())

    # For clients

    async def on_take(self, request: web.Request) -> web.Response:
        """Answer at once, or after `?ms=`."""
        receipt = self._receive(request)
        await asyncio.sleep(int(request.query.get("ms", "0")) / 1000)
        return _answer(receipt)

    async def on_hold(self, request: web.Request) -> web.Response:
        """Answer once the gate is opened here; at once where `?at=` names another process."""
        receipt = self._receive(request)
        if request.query.get("at", self._name) == self._name:
            await self._hold(request)
        return _answer(receipt)

    async def on_block(self, request: web.Request) -> web.Response:
        """Answer after this process has done nothing else for a while."""
        receipt = self._receive(request)
        time.sleep(int(request.match_info["milliseconds"]) / 1000)  # noqa: ASYNC251 -- this is what it is for
        return _answer(receipt)

    async def on_break(self, request: web.Request) -> web.Response:
        """Send a part of a response, or of its `head`; once the gate is opened, break off by `fin`, `rst` or `half`."""
        receipt = self._receive(request)
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        framing = request.match_info["framing"]
        if framing == "head":
            transport.write(b"HTTP/1.1 200 OK\r\nContent-")
        else:
            field, part = FRAMINGS[framing]
            head = b"HTTP/1.1 200 OK\r\n%s: %s\r\n%s\r\n" % (RECEIPT.encode(), _line(receipt), field)
            transport.write(head + part)
        await self._hold(request)
        match request.match_info["ending"]:
            case "fin":
                transport.close()
            case "rst":
                link = transport.get_extra_info("socket")
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
            case _:
                transport.write_eof()
                await self._wait_for_end(request, transport)
        raise web.HTTPInternalServerError  # nobody is there to read it

    async def on_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Answer each message with the name, how many came over this tunnel, and the message."""
        receipt = self._receive(request)
        tunnel = web.WebSocketResponse()
        tunnel.headers[RECEIPT] = _line(receipt).decode()
        await tunnel.prepare(request)
        count = 0
        async for message in tunnel:
            if message.type is WSMsgType.TEXT:
                count += 1
                await tunnel.send_str(f"{self._name} {count} {message.data}")
        return tunnel

    # For the test

    async def on_lag(self, _: web.Request) -> web.Response:
        """Say how late the timers fired since the last time that it was asked."""
        return web.json_response(self._lag.take())

    def _receive(self, request: web.Request) -> Receipt:
        """Log a request, and return the receipt for its answer."""
        request_id, client = request.headers.get("X-Id", "-"), request.headers.get("X-Client", "-")
        os.write(self._log, Arrival(self._name, self._generation, request.method, request_id, client).write())
        self._counts[client] += 1
        assert request.transport is not None
        connection = self._connections.setdefault(request.transport, len(self._connections) + 1)
        return Receipt(
            app=self._name,
            generation=self._generation,
            pid=os.getpid(),
            request_id=request_id,
            client=client,
            count=self._counts[client],
            connection=connection,
        )

    async def _wait_for_end(self, request: web.Request, transport: asyncio.Transport) -> None:
        """Wait under the gate `<gate>-end` until the other side has closed the connection."""
        gate = f"{request.match_info['gate']}-end"
        self._waiting[gate] += 1
        while not transport.is_closing():  # noqa: ASYNC110 -- aiohttp tells nobody
            await asyncio.sleep(LAG_PERIOD_S)
        self._waiting[gate] -= 1


def _line(receipt: Receipt) -> bytes:
    return json.dumps(asdict(receipt)).encode()


def _answer(receipt: Receipt) -> web.Response:
    line = _line(receipt)
    return web.Response(body=line, headers={RECEIPT: line.decode()}, content_type="application/json")


if __name__ == "__main__":
    serve(FaultApp, "A small app that fails as it is told")
