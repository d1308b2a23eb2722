"""The WebSocket load, as a program of its own; it also reads what the proxy spent, so that both have the same bounds.

`python -m tests.bench.ws_load PORT --size N --connections N --seconds S --watch PID [--cookie C] [--tls] [--hold]`
prints one JSON object, a `Sample`. Each connection sends a message, waits for its echo, and sends the next; with
`--hold` the connections are opened and stay idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final, cast

import uvloop
from typing_extensions import override

from tests.bench.certificate import client_context
from tests.bench.frames import write_frame
from tests.bench.process import cpu_s, pss_kib
from tests.bench.results import RunError, Sample

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

_OPEN_TIMEOUT_S: Final = 60.0
_WARM_UP_S: Final = 0.5
_DIALS_AT_ONCE: Final = 64


class Counts:
    """What all clients saw, and what they send and expect."""

    def __init__(self, size_bytes: int, cookie: str) -> None:
        self.message = write_frame(size_bytes, is_masked=True)
        self.echo = write_frame(size_bytes, is_masked=False)
        self.request = (
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            + (f"Cookie: {cookie}\r\n".encode() if cookie else b"")
            + b"\r\n"
        )
        self.latencies_s: list[float] = []
        self.lost = 0
        self.wrong = 0

    @property
    def errors(self) -> int:
        return self.lost + self.wrong


class Client(asyncio.Protocol):
    """One WebSocket; `opened` is done when the 101 has come, or fails with RunError."""

    __slots__ = ("_counts", "_first", "_received_bytes", "_sent_at", "_transport", "opened")

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._first: bytearray | None = bytearray()  # the first echo, which is compared whole
        self._received_bytes = 0
        self._sent_at = 0.0
        self.opened = asyncio.get_running_loop().create_future()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._counts.request)

    def send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._counts.message)

    @override
    def data_received(self, data: bytes) -> None:
        if not self.opened.done():
            self._on_head(data)
            return
        if self._first is not None:
            self._first += data
        self._received_bytes += len(data)
        if self._received_bytes >= len(self._counts.echo):
            self._on_echo()

    def _on_head(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 101 "):
            self.opened.set_result(None)
        else:
            self.opened.set_exception(RunError(f"no 101 but {data[:100]!r}"))

    def _on_echo(self) -> None:
        counts = self._counts
        counts.latencies_s.append(time.perf_counter() - self._sent_at)
        self._received_bytes -= len(counts.echo)
        if self._first is not None:
            counts.wrong += self._first != counts.echo
            self._first = None
        self.send()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._counts.lost += 1
        if not self.opened.done():
            self.opened.set_exception(RunError(f"closed before it was open: {exc}"))


async def open_all(port: int, connections: int, counts: Counts, context: ssl.SSLContext | None = None) -> list[Client]:
    """Return so many open WebSockets; raise RunError or OSError if one is refused, TimeoutError after 60 s."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    async with asyncio.timeout(_OPEN_TIMEOUT_S):
        while len(clients) < connections:
            number = min(_DIALS_AT_ONCE, connections - len(clients))
            dials = (
                loop.create_connection(lambda: Client(counts), "127.0.0.1", port, ssl=context) for _ in range(number)
            )
            some = [client for _, client in await asyncio.gather(*dials)]
            await asyncio.gather(*(client.opened for client in some))
            clients += some
    return clients


async def echo(clients: Sequence[Client], counts: Counts, watched: int, seconds: float) -> Sample:
    """Send echoes for a while after a warm-up; raise RunError if there was none."""
    for client in clients:
        client.send()
    await asyncio.sleep(min(_WARM_UP_S, seconds))
    counts.latencies_s.clear()
    cpu_before_s, began = cpu_s(watched), time.perf_counter()
    await asyncio.sleep(seconds)
    used_s, took_s = cpu_s(watched) - cpu_before_s, time.perf_counter() - began
    ordered = sorted(counts.latencies_s)
    if not ordered:
        raise RunError("no echo came back")
    number = len(ordered)
    return Sample(
        cpu_us=used_s / number * 1e6,
        per_s=number / took_s,
        p50_us=ordered[number // 2] * 1e6,
        p99_us=ordered[number * 99 // 100] * 1e6,
        errors=counts.errors,
    )


async def run(options: argparse.Namespace) -> Sample:
    counts = Counts(options.size, options.cookie)
    before_kib = pss_kib(options.watch)
    context = client_context() if options.tls else None
    clients = await open_all(options.port, options.connections, counts, context)
    if not options.hold:
        return await echo(clients, counts, options.watch, options.seconds)
    await asyncio.sleep(options.seconds)
    return Sample(kib=(pss_kib(options.watch) - before_kib) / options.connections, errors=counts.errors)


def main() -> None:
    parser = argparse.ArgumentParser(description="WebSocket load")
    parser.add_argument("port", type=int)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--watch", type=int, required=True)
    parser.add_argument("--cookie", default="")
    parser.add_argument("--hold", action="store_true")
    parser.add_argument("--tls", action="store_true")
    try:
        sample = uvloop.run(run(parser.parse_args()))
    except (RunError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
