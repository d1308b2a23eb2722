"""A browser with a Chainlit page, at the level of the wire: what its client sends, in its order, with its cookies.

Chainlit's client asks for the session cookie, then talks Socket.IO: a handshake by polling, a POST and a poll with the
Engine.IO session, and a WebSocket that takes the place of polling once it has answered a probe. Where any request is
refused, the client begins again after a second, later after up to five. Each request is on a new connection, or, as in
a browser that nobody else uses, on one that is free.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp

if TYPE_CHECKING:
    import random
    from types import TracebackType

_STEP_S: Final = 30.0  # for an answer to any request, and for the reply in the chat
_CONNECTIONS: Final = 6  # of a browser to one host
_FIRST_PAUSE_S: Final = 1.0  # before the client begins again, twice as long each time, half more or less
_LONGEST_PAUSE_S: Final = 5.0
_OK: Final = 200
_SEPARATOR: Final = "\x1e"  # between the packets of a poll
_PAGE: Final = ("/chat/", "/chat/project/translations?language=en-US", "/chat/auth/config",
                "/chat/project/settings?language=en-US")  # fmt: skip
_SOCKET: Final = "/chat/ws/socket.io/"
_REPLY: Final = re.compile(r"reply 1 pid=([0-9]+)")


class RefusedError(Exception):
    """A request was not answered as the client needs it; the text is what a user could see: the status, and of what."""


@dataclass
class Outcome:
    """What became of one session: in how many attempts it worked (0: in none), and what was refused meanwhile."""

    attempts: int = 0
    pid: int = 0
    refusals: list[str] = field(default_factory=list)

    @property
    def works_at_once(self) -> bool:
        """Say whether nothing was refused."""
        return self.attempts == 1 and not self.refusals

    def refuse(self, text: str) -> None:
        """Note what was refused."""
        self.refusals.append(text)


class Browser:
    """One of them, a context manager; `keeps_connections` says whether requests use connections again."""

    def __init__(self, url: str, *, keeps_connections: bool) -> None:
        self._url = url
        self._keeps = keeps_connections
        self._session_id = str(uuid.uuid4())
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        jar = aiohttp.CookieJar(unsafe=True)  # 127.0.0.1 may set cookies
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS, force_close=not self._keeps)
        # Long polls are compressed twice, by Engine.IO and by Chainlit, which browsers undo and this client does not.
        plain = {"Accept-Encoding": "identity"}
        self._http = await self._stack.enter_async_context(
            aiohttp.ClientSession(connector=connector, cookie_jar=jar, headers=plain)
        )
        new = aiohttp.TCPConnector(force_close=True)  # a WebSocket always has a connection of its own
        self._websockets = await self._stack.enter_async_context(aiohttp.ClientSession(connector=new, cookie_jar=jar))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def chat(self, patience_s: float, chance: random.Random) -> Outcome:
        """Open the page, say something and wait for the reply; begin again, as the client does, for a while."""
        outcome, loop = Outcome(), asyncio.get_running_loop()
        until_s = loop.time() + patience_s
        try:
            await self._open_page()
        except RefusedError as error:
            outcome.refuse(str(error))
            return outcome
        pause_s, attempt = _FIRST_PAUSE_S, 0
        while True:
            attempt += 1
            try:
                outcome.pid = await self._talk(outcome)
            except (RefusedError, TimeoutError) as error:
                outcome.refuse(str(error) or "no reply")
            else:
                outcome.attempts = attempt
                return outcome
            pause_s = min(pause_s, _LONGEST_PAUSE_S)
            if loop.time() + pause_s > until_s:
                return outcome
            await asyncio.sleep(pause_s * chance.uniform(0.5, 1.5))
            pause_s *= 2

    async def _open_page(self) -> None:
        for path in _PAGE:
            await self._ask("GET", path, "page")
        await self._ask("POST", "/chat/set-session-cookie", "page", json={"session_id": self._session_id})

    async def _ask(self, method: str, target: str, what: str, **more: Any) -> str:
        """Return the body of an answer; raise RefusedError where the answer is none with 200."""
        try:
            async with self._http.request(method, self._url + target, **more) as response:
                text = await response.text()
        except aiohttp.ClientError as error:
            raise RefusedError(f"{type(error).__name__} ({what})") from error
        if response.status != _OK:
            raise RefusedError(f"{response.status} ({what})")
        return text

    async def _poll(self, sid: str) -> list[str]:
        return (await self._ask("GET", f"{_SOCKET}?{_polling()}&sid={sid}", "polling")).split(_SEPARATOR)

    async def _post(self, sid: str, *packets: str) -> None:
        await self._ask("POST", f"{_SOCKET}?{_polling()}&sid={sid}", "polling", data=_SEPARATOR.join(packets))

    async def _talk(self, outcome: Outcome) -> int:
        """Connect once and wait for the reply; return the process that gave it. Raise RefusedError or TimeoutError."""
        try:
            async with asyncio.timeout(_STEP_S), asyncio.TaskGroup() as group, AsyncExitStack() as stack:
                return await self._converse(group, stack, outcome)
        except ExceptionGroup as errors:
            found, others = errors.split(RefusedError)
            if found is None or others is not None:
                raise
            error: BaseException = found
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        raise AssertionError("unreachable")  # a group may keep an error to itself, for all that a type checker knows

    async def _converse(self, group: asyncio.TaskGroup, stack: AsyncExitStack, outcome: Outcome) -> int:
        text = await self._ask("GET", f"{_SOCKET}?{_polling()}", "handshake")
        sid = str(json.loads(text.partition(_SEPARATOR)[0].removeprefix("0"))["sid"])
        auth = {"clientType": "webapp", "sessionId": self._session_id, "threadId": "", "userEnv": "{}",
                "chatProfile": ""}  # fmt: skip
        # The client connects while it polls; where either is refused it begins again.
        polling = group.create_task(self._poll(sid))
        await self._post(sid, f"40{json.dumps(auth)}")
        packets = await polling
        while not any(packet.startswith("40") for packet in packets):
            packets = await self._poll(sid)
        polling = group.create_task(self._poll(sid))
        websocket = await self._upgrade(sid, stack, outcome)
        events = [f"42{json.dumps(event)}" for event in (["connection_successful"], ["fetch_favorites"], _message())]
        if websocket is None:  # the client goes on with polling
            await self._post(sid, *events)
            packets = await polling
            while not (pid := _find_reply(packets)):
                packets = await self._poll(sid)
            return pid
        await polling  # the server ended it when the probe came
        for packet in ("5", *events):
            await websocket.send_str(packet)
        while not (pid := _find_reply([await _receive(websocket)])):
            pass
        return pid

    async def _upgrade(
        self, sid: str, stack: AsyncExitStack, outcome: Outcome
    ) -> aiohttp.ClientWebSocketResponse | None:
        """Return a WebSocket that has answered the probe; None where it is refused."""
        target = f"{_SOCKET}?EIO=4&transport=websocket&sid={sid}"
        try:
            websocket = await stack.enter_async_context(self._websockets.ws_connect(self._url + target))
        except aiohttp.WSServerHandshakeError as error:
            outcome.refuse(f"{error.status} (WebSocket)")
            return None
        except aiohttp.ClientError as error:
            outcome.refuse(f"{type(error).__name__} (WebSocket)")
            return None
        await websocket.send_str("2probe")
        if await _receive(websocket) != "3probe":
            raise RefusedError("no answer to the probe (WebSocket)")
        return websocket


def _polling() -> str:
    return f"EIO=4&transport=polling&t={uuid.uuid4().hex[:8]}"


def _message() -> list[object]:
    """Return the event that sends a message, as Chainlit's client writes it."""
    message = {
        "id": str(uuid.uuid4()), "threadId": "", "name": "user", "type": "user_message", "output": "message 1",
        "createdAt": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    return ["client_message", {"message": message, "fileReferences": []}]


async def _receive(websocket: aiohttp.ClientWebSocketResponse) -> str:
    message = await websocket.receive()
    if message.type is not aiohttp.WSMsgType.TEXT:
        raise RefusedError(f"closed with {websocket.close_code} (WebSocket)")
    return str(message.data)


def _find_reply(packets: list[str]) -> int:
    """Return the process that the reply in these packets names; 0 where there is none."""
    found = (_REPLY.search(packet) for packet in packets if packet.startswith("42"))
    return next((int(match[1]) for match in found if match), 0)
