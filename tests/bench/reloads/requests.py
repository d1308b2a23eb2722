"""The clients that send requests on keep-alive connections, evenly spread over each second.

A request that meets the close of a connection that was used before is sent again on a new one, once, as browsers do.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stickyproxy.tasks import spawn
from tests.bench.messages import HEAD_END, parse_head
from tests.bench.results import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S: Final = 10.0
_OK: Final = 200


@dataclass
class RequestTally:
    """What all clients saw: `repeated` requests met a close and were sent again; `failed` ones got no whole 200."""

    sent: int = 0
    repeated: int = 0
    failed: int = 0


class Requester:
    """One client with one connection at a time, and a request on it every `period_s`."""

    def __init__(self, port: int, period_s: float, tally: RequestTally) -> None:
        self._port, self._period_s, self._tally = port, period_s, tally
        self._cookie = ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._stopping = asyncio.Event()

    async def run(self, delay_s: float) -> None:
        """Send requests until `stop()`; the first after `delay_s`."""
        loop = asyncio.get_running_loop()
        at_s = loop.time() + delay_s
        while not await self._is_stopped_until(at_s):
            self._tally.sent += 1
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._exchange()
            except (OSError, RunError, EOFError, TimeoutError):
                self._tally.failed += 1
                self._close()
            at_s = max(at_s + self._period_s, loop.time())
        self._close()

    def stop(self) -> None:
        self._stopping.set()

    async def _is_stopped_until(self, at_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(at_s):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def _exchange(self) -> None:
        """Send a request and read its response; raise OSError, RunError or EOFError if it is not a whole 200."""
        if self._streams is not None and self._streams[0].at_eof():
            self._close()  # the proxy closed it while nothing was under way
        if self._streams is not None:
            try:
                await self._ask(*self._streams)
            except (OSError, asyncio.IncompleteReadError) as error:
                if getattr(error, "partial", b""):
                    raise
                self._tally.repeated += 1
                self._close()
            else:
                return
        self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        await self._ask(*self._streams)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cookie = f"Cookie: {self._cookie}\r\n" if self._cookie else ""
        writer.write(f"GET / HTTP/1.1\r\nHost: localhost\r\n{cookie}\r\n".encode())
        head = parse_head(await reader.readuntil(HEAD_END))
        try:
            await reader.readexactly(head.length_bytes)
        except asyncio.IncompleteReadError as error:
            raise RunError("its body is cut") from error
        self._cookie = head.cookie or self._cookie
        if head.status != _OK:
            raise RunError(f"no 200 but {head.status}")
        if head.is_last:
            self._close()

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Requests:
    """Several requesters that together send `per_s` requests a second."""

    def __init__(self, port: int, per_s: float, connections: int = 10) -> None:
        self.tally = RequestTally()
        period_s = connections / per_s
        self._all: Sequence[Requester] = [Requester(port, period_s, self.tally) for _ in range(connections)]
        self._tasks = [
            spawn(one.run(place * period_s / connections), f"requester {place}") for place, one in enumerate(self._all)
        ]

    async def stop(self) -> None:
        """Return when what is under way has its answer, or has failed after 10 s."""
        for one in self._all:
            one.stop()
        await asyncio.gather(*self._tasks)
