"""A relay that does wrong when it is told to: the control that shows that each loss is found and named.

`python -m tests.bench.operations.relay --port PORT --to PORT --faults NAME ... --words SOCKET` stands between the load
and the proxy, and passes everything on as it came. At each word `strike` it does the next of its faults: one of
messages once in each direction.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uvloop
from typing_extensions import override

from stickyproxy.tasks import spawn
from tests.bench.operations.ends import as_transport
from tests.bench.operations.messages import DOWN, UP, is_whole
from tests.bench.operations.remote import serve_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.operations.messages import Direction

DELAY_S: Final = 0.8
_BACKLOG: Final = 4096
_COOKIE: Final = re.compile(rb"\r\nCookie: [^\r\n]*")
_BAD_GATEWAY: Final = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"


class Side(asyncio.Protocol):
    """One connection of a pair. `direction` is what it reads; it writes to `other`."""

    def __init__(self, relay: Relay, direction: Direction, other: Side | None = None) -> None:
        self.direction = direction
        self.other = other
        self.transport: asyncio.Transport | None = None
        self.behind = b""  # goes out behind what comes next
        self.late: list[bytes] | None = None  # while it is delayed: what came
        self._relay = relay

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = as_transport(transport)
        if self.direction is UP:
            self.late = []  # until there is another side
            spawn(self._dial(self.transport), "a relay connects")

    async def _dial(self, transport: asyncio.Transport) -> None:
        self.other = other = Side(self._relay, DOWN, self)
        try:
            await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self._relay.to)
        except OSError:
            transport.abort()
        else:
            self._pass_on_late()

    @override
    def data_received(self, data: bytes) -> None:
        data, self.behind = data + self.behind, b""
        if self.late is not None:
            self.late.append(data)
        else:
            self.pass_on(self._relay.spoil(self, data))

    def pass_on(self, data: bytes) -> None:
        """Write to the other side, unless it is gone."""
        if data and self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def delay(self, data: bytes) -> None:
        """Hold this and what comes behind it for a while."""
        self.late = [data]
        asyncio.get_running_loop().call_later(DELAY_S, self._pass_on_late)

    def _pass_on_late(self) -> None:
        late, self.late = self.late or [], None
        self.pass_on(b"".join(late))

    def cut(self) -> None:
        """End the connection."""
        if self.transport is not None:
            self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Relay:
    """What is to be done wrong: `due` holds the directions in which it still is, `struck` counts what was."""

    def __init__(self, to: int, faults: Sequence[str]) -> None:
        self.to = to
        self.due: set[str] = set()
        self.struck = 0
        self.stray: dict[str, tuple[Side, bytes]] = {}
        self._faults = cycle(faults)
        self._fault = FAULTS["none"][0]

    def spoil(self, side: Side, data: bytes) -> bytes:
        """Return what is passed on instead of what came."""
        if side.direction.name not in self.due:
            return data
        wrong = self._fault(self, side, data)
        if wrong is None:
            return data
        self.struck += 1
        if self._fault is not _forget:
            self.due.discard(side.direction.name)
        return wrong

    async def on_strike(self, _: str) -> None:
        """Do wrong once more."""
        self._fault, directions = FAULTS[next(self._faults)]
        self.due = set(directions)

    async def on_struck(self, _: str) -> int:
        """Return how often it did wrong so far."""
        return self.struck


def _is_message(side: Side, data: bytes) -> bool:
    return is_whole(data, side.direction)


def _is_request(data: bytes) -> bool:
    return data.startswith((b"GET /", b"POST /")) and not data.startswith(b"GET /ws")


def _drop(_: Relay, side: Side, data: bytes) -> bytes | None:
    return b"" if _is_message(side, data) else None


def _double(_: Relay, side: Side, data: bytes) -> bytes | None:
    return data + data if _is_message(side, data) else None


def _swap(_: Relay, side: Side, data: bytes) -> bytes | None:
    if not _is_message(side, data):
        return None
    side.behind = data
    return b""


def _corrupt(_: Relay, side: Side, data: bytes) -> bytes | None:
    return data[:-10] + bytes((data[-10] ^ 1,)) + data[-9:] if _is_message(side, data) else None


def _tear(_: Relay, side: Side, data: bytes) -> bytes | None:
    return data[:-5] if _is_message(side, data) else None


def _delay(_: Relay, side: Side, data: bytes) -> bytes | None:
    if not _is_message(side, data):
        return None
    side.delay(data)
    return b""


def _stray(relay: Relay, side: Side, data: bytes) -> bytes | None:
    """Send a message of one tunnel into another one too."""
    if not _is_message(side, data):
        return None
    first, message = relay.stray.setdefault(side.direction.name, (side, data))
    if first is side:
        return None
    del relay.stray[side.direction.name]
    return message + data


def _cut(_: Relay, side: Side, data: bytes) -> bytes | None:
    if not _is_message(side, data):
        return None
    side.cut()
    return b""


def _forget(_: Relay, __: Side, data: bytes) -> bytes | None:
    """Take the cookie out of each request from now on."""
    return _COOKIE.sub(b"", data, count=1) if _is_request(data) and b"\r\nCookie: " in data else None


def _fail(_: Relay, side: Side, data: bytes) -> bytes | None:
    """Answer a request in place of the app."""
    if not _is_request(data) or side.transport is None:
        return None
    side.transport.write(_BAD_GATEWAY)
    return b""


def _repeat(relay: Relay, _: Side, data: bytes) -> bytes | None:
    """Send a request once more by a connection of its own, whose response nobody reads."""
    if not data.startswith(b"POST /") or not data.endswith(b"word"):
        return None
    spawn(_send(relay.to, data), "a request is repeated")
    return data


async def _send(port: int, data: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()


# What is done wrong, and in which directions.
FAULTS: Final[dict[str, tuple[Callable[[Relay, Side, bytes], bytes | None], tuple[str, ...]]]] = {
    "none": (lambda _, __, ___: None, ()),
    "drop": (_drop, ("up", "down")),
    "double": (_double, ("up", "down")),
    "swap": (_swap, ("up", "down")),
    "corrupt": (_corrupt, ("up", "down")),
    "tear": (_tear, ("up", "down")),
    "stray": (_stray, ("up", "down")),
    "delay": (_delay, ("up", "down")),
    "cut": (_cut, ("down",)),
    "forget": (_forget, ("up",)),
    "fail": (_fail, ("up",)),
    "repeat": (_repeat, ("up",)),
}


async def run(options: argparse.Namespace) -> None:
    """Relay until the process is ended."""
    relay = Relay(options.to, options.faults)
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Side(relay, UP), "127.0.0.1", options.port, backlog=_BACKLOG)
    await serve_words(options.words, relay)


def main() -> None:
    parser = argparse.ArgumentParser(description="A relay that does wrong when it is told to")
    parser.add_argument("--port", type=int, required=True, help="where it listens")
    parser.add_argument("--to", type=int, required=True, help="where it connects")
    parser.add_argument("--faults", choices=FAULTS, nargs="+", required=True)
    parser.add_argument("--words", type=Path, required=True, help="the socket on which it is told what to do")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
