"""A site as a client without a cookie jar sees it: HTTP on old and on new connections in turn, and WebSockets."""

import gzip
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from socket import AF_INET
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp

from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError

KEPT_S: Final = 2.0  # idle connections are used for so long; uvicorn closes its own after 5 s
TIMEOUT: Final = aiohttp.ClientTimeout(total=60)
DEFLATE_WINDOW_BITS: Final = 15  # what browsers offer: permessage-deflate


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Socket:
    """A WebSocket of a session; each message that is sent is an exchange."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse, outcome: Outcome) -> None:
        self._websocket = websocket
        self._outcome = outcome

    async def send(self, message: str | bytes) -> None:
        self._outcome.exchanges += 1
        if isinstance(message, str):
            await self._websocket.send_str(message)
        else:
            await self._websocket.send_bytes(message)

    async def reply(self, message: str) -> None:
        """Send what only answers the other side, such as a pong of Engine.IO."""
        await self._websocket.send_str(message)

    async def receive(self) -> Any:
        """Return the next message; raise UnexpectedAnswerError if the connection ends."""
        message = await self._websocket.receive()
        if message.type in {aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY}:
            return message.data
        raise UnexpectedAnswerError(f"the WebSocket ended: {message.type.name} {message.data} {message.extra}")


class Site:
    """The site at `url`, for all sessions of a run: a context manager.

    Every second request comes on a TCP connection of its own. No cookie is stored, and none is sent but what a request
    itself names: some apps demand a cookie of theirs with a token that any process takes.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = f"http://127.0.0.1:{parts.port}"
        self.host = parts.netloc
        self._turn = 0
        self._sessions: list[aiohttp.ClientSession] = []

    async def __aenter__(self) -> Self:
        connectors = (
            aiohttp.TCPConnector(family=AF_INET, limit=0, keepalive_timeout=KEPT_S),
            aiohttp.TCPConnector(family=AF_INET, limit=0, force_close=True),
        )
        for connector in connectors:
            self._sessions.append(
                aiohttp.ClientSession(
                    self.url,
                    connector=connector,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    headers={"Host": self.host, "Accept-Encoding": "gzip"},
                    auto_decompress=False,
                    timeout=TIMEOUT,
                )
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for session in self._sessions:
            await session.close()

    async def exchange(self, outcome: Outcome, method: str, path: str, **options: Any) -> Answer:
        """Send a request, and return the whole answer, whatever its status; count it."""
        async with self.stream(outcome, method, path, **options) as response:
            body = await response.read()
            # Some apps compress twice what Engine.IO has compressed, and say so in two fields.
            for _ in response.headers.getall("Content-Encoding", ()):
                body = gzip.decompress(body)
            return Answer(response.status, response.headers, body)

    async def ask(
        self, outcome: Outcome, method: str, path: str, *, unknown: Mapping[int, str], **options: Any
    ) -> Answer:
        """Send a request of a session and return the answer, whose status is 2xx.

        `unknown` is what processes say that do not know the session, a part of the body by status: then raise
        WrongProcessError. Anything else raises UnexpectedAnswerError.
        """
        answer = await self.exchange(outcome, method, path, **options)
        if answer.status // 100 == 2:
            return answer
        told = f"{method} {path}: {answer.status} {answer.text[:200]}"
        if answer.status in unknown and unknown[answer.status] in answer.text:
            raise WrongProcessError(told)
        raise UnexpectedAnswerError(told)

    @asynccontextmanager
    async def stream(
        self, outcome: Outcome, method: str, path: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, and give the response when its head has come; count it."""
        outcome.exchanges += 1
        self._turn += 1
        async with self._sessions[self._turn % 2].request(method, path, **options) as response:
            yield response

    @asynccontextmanager
    async def websocket(
        self, outcome: Outcome, path: str, *, refused: str = "", protocols: tuple[str, ...] = ()
    ) -> AsyncIterator[Socket]:
        """Open a WebSocket on a connection of its own, every second one with compression offered as browsers do.

        With `refused`, a text for the error, a 403 raises WrongProcessError.
        """
        outcome.exchanges += 1
        self._turn += 1
        compress = DEFLATE_WINDOW_BITS if self._turn % 2 else 0
        try:
            websocket = await self._sessions[1].ws_connect(path, protocols=protocols, compress=compress, max_msg_size=0)
        except aiohttp.WSServerHandshakeError as error:
            if refused and error.status in {400, 403}:
                raise WrongProcessError(f"{refused}: the WebSocket is refused with {error.status}") from error
            raise
        async with websocket:
            yield Socket(websocket, outcome)
