"""Socket.IO over Engine.IO 4, spoken as its clients do: polling, polling with an upgrade, or WebSocket only."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Literal
from urllib.parse import urlencode

from stickyproxy.tasks import spawn
from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site, Socket

Transport = Literal["polling", "upgrade", "websocket"]
SEPARATOR: Final = "\x1e"
UNKNOWN: Final = {400: "Invalid session"}
CLICKS: Final = 24  # of a session: with its handshake about 50 exchanges


class Link:
    """A Socket.IO connection; use `connect` to open one. `query` is what the URL says beside Engine.IO's own."""

    def __init__(self, site: Site, outcome: Outcome, path: str, query: Mapping[str, str]) -> None:
        self._site = site
        self._outcome = outcome
        self._path = path
        self._query: dict[str, str] = {**query, "EIO": "4"}
        self._socket: Socket | None = None
        self._waiting: list[str] = []
        self._is_closed = False

    async def open_polling(self) -> None:
        """Begin a session: Engine.IO makes its sid."""
        self._query["transport"] = "polling"
        answer = await self._site.ask(self._outcome, "GET", self._path, params=self._query, unknown={})
        packet, *self._waiting = answer.text.split(SEPARATOR)
        self._query["sid"] = json.loads(packet.removeprefix("0"))["sid"]

    @asynccontextmanager
    async def open_websocket(self) -> AsyncIterator[None]:
        """Begin a session with a WebSocket alone."""
        async with self._connect_websocket() as self._socket:
            packet = await self._socket.receive()
            if not packet.startswith('0{"sid":"'):
                raise UnexpectedAnswerError(f"no open packet: {packet[:200]}")
            yield

    @asynccontextmanager
    async def upgrade(self) -> AsyncIterator[None]:
        """Go on over a WebSocket, which is tried while a poll is open; the session ends with it."""
        poll = spawn(self._poll(), "poll")
        try:
            async with self._connect_websocket() as socket:
                await socket.send("2probe")
                if (packet := await socket.receive()) != "3probe":
                    raise UnexpectedAnswerError(f"no answer to the probe: {packet[:200]}")
                self._waiting += await poll  # which the probe has ended
                await socket.send("5")
                self._socket = socket
                yield
                await self.close()
        finally:
            poll.cancel()
            await asyncio.wait([poll])

    async def send(self, packet: str) -> None:
        """Send a packet of Socket.IO."""
        if self._socket:
            await self._socket.send(f"4{packet}")
        else:
            await self._post(f"4{packet}")

    async def emit(self, event: str, *data: Any) -> None:
        """Send an event."""
        await self.send(f"2{json.dumps([event, *data])}")

    async def receive(self) -> str:
        """Return the next packet of Socket.IO, and answer Pings."""
        while True:
            while not self._waiting:
                self._waiting += [await self._socket.receive()] if self._socket else await self._poll()
            packet = self._waiting.pop(0)
            if packet == "2":
                await (self._socket.reply("3") if self._socket else self._post("3"))
            elif packet.startswith("4"):
                return packet[1:]
            elif packet != "6":
                raise UnexpectedAnswerError(f"a packet of Engine.IO: {packet[:200]}")

    async def receive_event(self, name: str) -> list[Any]:
        """Return the data of the next event of this name; drop all others."""
        while True:
            packet = await self.receive()
            if packet.startswith("4"):
                raise WrongProcessError(packet[:200])
            if packet.startswith("2"):
                event, *data = json.loads(packet[1:])
                if event == name:
                    return list(data)

    async def connect(self, auth: Mapping[str, Any] | None = None) -> None:
        """Connect to the default namespace, and wait until it is done; events that come before are kept."""
        await self.send("0" + (json.dumps(auth, separators=(",", ":")) if auth else ""))
        before = []
        while not (packet := await self.receive()).startswith("0"):
            if packet.startswith("4"):
                raise WrongProcessError(packet[:200])
            before.append(f"4{packet}")
        self._waiting[:0] = before

    async def close(self) -> None:
        """Say that the session is over; nothing if that was said."""
        if not self._is_closed:
            self._is_closed = True
            await (self._socket.reply("1") if self._socket else self._post("1"))

    def _connect_websocket(self) -> AbstractAsyncContextManager[Socket]:
        query = urlencode({**self._query, "transport": "websocket"})
        # Without a sid, each process takes it.
        refused = "the upgrade" if "sid" in self._query else ""
        return self._site.websocket(self._outcome, f"{self._path}?{query}", refused=refused)

    async def _post(self, packet: str) -> None:
        await self._site.ask(
            self._outcome, "POST", self._path, params=self._query, data=packet.encode(), unknown=UNKNOWN
        )

    async def _poll(self) -> list[str]:
        answer = await self._site.ask(self._outcome, "GET", self._path, params=self._query, unknown=UNKNOWN)
        return answer.text.split(SEPARATOR)


@asynccontextmanager
async def connect(
    site: Site,
    outcome: Outcome,
    transport: Literal["polling", "websocket"],
    *,
    path: str = "/socket.io/",
    query: Mapping[str, str] | None = None,
    auth: Mapping[str, Any] | None = None,
) -> AsyncIterator[Link]:
    """Open a Socket.IO connection; it is closed in the end, unless something went wrong."""
    link = Link(site, outcome, path, query or {})
    if transport == "polling":
        await link.open_polling()
        await link.connect(auth)
        yield link
        await link.close()
        return
    async with link.open_websocket():
        await link.connect(auth)
        yield link
        await link.close()


async def click(link: Link, done: int) -> None:
    """Click once more in the recipe's app, whose count of this session must be one more than `done`."""
    await link.emit("click")
    [count] = await link.receive_event("count")
    if count != done + 1:
        raise WrongProcessError(f"click {done + 1} is counted as {count}")


async def drive_engineio(
    base_url: str, exchanges: int = 10_000, transport: Transport = "polling", at_once: int = AT_ONCE
) -> Outcome:
    """Let sessions of the recipe `fastapi-socketio` click, by one transport."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            way: Literal["polling", "websocket"] = "websocket" if transport == "websocket" else "polling"
            async with connect(site, outcome, way) as link:
                [process] = await link.receive_event("welcome")
                outcome.served.add(process)
                # A click by polling is two exchanges.
                by_polling = {"polling": CLICKS, "upgrade": CLICKS // 2, "websocket": 2 * CLICKS}[transport]
                for done in range(by_polling):
                    await click(link, done)
                if transport == "upgrade":
                    async with link.upgrade():
                        for done in range(by_polling, 2 * CLICKS - by_polling):
                            await click(link, done)

        return await drive(exchanges, session, at_once)
