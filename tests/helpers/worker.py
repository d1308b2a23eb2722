"""A worker in the test's own event loop, with one upstream that notes what it receives."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.config import Address, load_text
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker import Worker
from stickyproxy.observe.record import Record
from stickyproxy.proxy.listener import bind

SECRET = b"0123456789abcdef0123456789abcdef"
DEADLINE_S = 60.0
LOOPBACK = Address("127.0.0.1", 0)
HANDSHAKE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}


class Namespace:
    """A module with some of its names replaced."""

    def __init__(self, module: object, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


class Upstream:
    """Answers `/hold` when it is released, `/ws` with 101, and all else at once."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.has_request = asyncio.Event()
        self.received: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.received.append(head)
                self.has_request.set()
                if head.startswith(b"GET /ws "):
                    writer.write(
                        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
                    )
                    self.received.append(await reader.read())
                    break
                if head.startswith(b"GET /hold "):
                    await self.released.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@dataclass
class Running:
    """A worker that listens, with what it reported and logged."""

    worker: Worker
    upstream: Upstream
    reported: list[tuple[str, HealthEvent]]
    logged: list[Record]

    @property
    def port(self) -> int:
        return int(next(iter(self.worker.listeners.values())).port)


@asynccontextmanager
async def running(text: str = "", listen: Address = LOOPBACK) -> AsyncIterator[Running]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = load_text(f"listeners: ['{listen}']\nupstreams: [http://127.0.0.1:{port}]\n{text}", {})
    reported: list[tuple[str, HealthEvent]] = []
    logged: list[Record] = []
    worker = Worker(config, [SECRET], report=lambda *facts: reported.append(facts))
    worker.plane.log = logged.append
    Routing(config, worker.publish)
    link = bind(listen)
    link.setblocking(False)
    try:
        worker.add_listeners({listen: link})
        await worker.accept()
        yield Running(worker, upstream, reported, logged)
    finally:
        await worker.close()
        upstream.released.set()
        server.close()
        async with asyncio.timeout(DEADLINE_S):
            await server.wait_closed()
