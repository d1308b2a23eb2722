"""Many WebSockets that stay idle, as two programs: a light app, and light clients that all ask when SIGUSR1 comes.

    python fault_proxy_websockets.py app --port 8001
    python fault_proxy_websockets.py clients --port 8080 --count 9000

The clients say `open N` when so many are open, and `answered N of M, lost L` for each signal.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import TYPE_CHECKING, Final, cast

import uvloop
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

_DIALS_AT_ONCE: Final = 100
_MASK: Final = b"\x00\x00\x00\x00"  # RFC 6455, section 5.3: a mask of zeros leaves the payload as it is
_REQUEST: Final = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_SWITCH: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


class Link(asyncio.Protocol):
    """One end of a WebSocket whose messages are all 8 bytes long; `on_message` gets each."""

    __slots__ = ("_head", "_held", "_is_masked", "_transport")

    def __init__(self, *, is_masked: bool) -> None:
        self._is_masked = is_masked  # what comes to this end
        self._held = b""
        self._head = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        held = self._held + data
        if not self._head:
            end = held.find(b"\r\n\r\n") + 4
            if end < 4:
                self._held = held
                return
            self._head = True
            self.on_head(held[:end])
            held = held[end:]
        size = 14 if self._is_masked else 10
        while len(held) >= size:
            self.on_message(held[size - 8 : size])
            held = held[size:]
        self._held = held

    def say(self, message: bytes) -> None:
        self._transport.write((b"\x82\x08" if self._is_masked else b"\x82\x88" + _MASK) + message)

    def on_head(self, head: bytes) -> None: ...

    def on_message(self, message: bytes) -> None: ...


class Answering(Link):
    """The app's end: gives back each message; a probe's connection ends without a head."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(is_masked=True)

    @override
    def on_head(self, head: bytes) -> None:
        self._transport.write(_SWITCH)

    @override
    def on_message(self, message: bytes) -> None:
        self.say(message)


class Clients:
    """All clients, and what they have seen."""

    def __init__(self) -> None:
        self.open = 0
        self.lost = 0
        self.answered = 0
        self.on_change: Callable[[], None] = lambda: None


class Asking(Link):
    """A client's end; its message is its number."""

    __slots__ = ("_all", "_is_asking", "_message")

    def __init__(self, clients: Clients, number: int) -> None:
        super().__init__(is_masked=False)
        self._all = clients
        self._message = b"%08d" % number
        self._is_asking = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._transport.write(_REQUEST)

    @override
    def on_head(self, head: bytes) -> None:
        self._all.open += head.startswith(b"HTTP/1.1 101 ")
        self._all.on_change()

    def ask(self) -> None:
        self._is_asking = True
        self.say(self._message)

    @override
    def on_message(self, message: bytes) -> None:
        self._all.answered += self._is_asking and message == self._message
        self._is_asking = False
        self._all.on_change()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._all.lost += 1
        self._all.on_change()


async def serve(port: int) -> None:
    """Be the app until a signal ends the process."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


async def ask(port: int, count: int) -> None:
    """Be the clients: open all, then let all ask at each signal."""
    loop = asyncio.get_running_loop()
    clients, links = Clients(), list[Asking]()
    wake = asyncio.Event()
    asked = asyncio.Event()
    clients.on_change = wake.set
    loop.add_signal_handler(signal.SIGUSR1, asked.set)
    while len(links) < count:
        some = range(len(links), min(len(links) + _DIALS_AT_ONCE, count))
        made = [Asking(clients, number) for number in some]
        await asyncio.gather(*(loop.create_connection(lambda one=one: one, "127.0.0.1", port) for one in made))  # type: ignore[misc]
        links += made
        while clients.open + clients.lost < len(links):
            wake.clear()
            await wake.wait()
    print(f"open {clients.open}", flush=True)
    while await asked.wait():
        asked.clear()
        clients.answered = 0
        for link in links:
            link.ask()
        while clients.answered + clients.lost < count:
            wake.clear()
            await wake.wait()
        print(f"answered {clients.answered} of {count}, lost {clients.lost}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Many idle WebSockets")
    parser.add_argument("role", choices=["app", "clients"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, default=0)
    options = parser.parse_args()
    uvloop.run(serve(options.port) if options.role == "app" else ask(options.port, options.count))


if __name__ == "__main__":
    main()
