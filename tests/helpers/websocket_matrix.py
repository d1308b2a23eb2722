"""One WebSocket conversation between the `websockets` library's client and server, with all that both ends can see.

A `Case` says what each end does. `observe` plays it through a door, which is the address that the client connects to,
and returns the verdict: plain values by name, so that two verdicts can be compared and a difference reads well. The
client names the server's own address whatever the door, so that the request is the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from tests.helpers.raw import eventually
from tests.helpers.websocket_wire import RecordedClient, RecordedServer, set_own_pings_aside

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping

    from websockets.asyncio.server import ServerConnection
    from websockets.frames import Close

    from tests.helpers.websocket_wire import Wire

DEADLINE_S: Final = 120.0

Verdict = dict[str, Any]
Script = Callable[["End"], Any]


@dataclass(frozen=True)
class Door:
    """Where the client connects to: with TLS if there is a context; `has_pings` if a proxy there sends its own."""

    host: str
    port: int
    context: ssl.SSLContext | None = None
    has_pings: bool = False

    def connect(self, listening: socket.socket, path: str, options: Mapping[str, Any]) -> connect:
        """Return what connects a client; it names the address of the server whatever the door is."""
        scheme = "ws" if self.context is None else "wss"
        host, port = listening.getsockname()[:2]
        return connect(
            f"{scheme}://{host}:{port}{path}",
            host=self.host,
            port=self.port,
            ssl=self.context,
            proxy=None,
            open_timeout=DEADLINE_S,
            **options,
        )


def digest(data: bytes) -> str:
    """Return a short name of some bytes."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


class End:
    """One end of a conversation, as its script uses it. `events` are shared with the other end, by name."""

    def __init__(
        self, connection: RecordedClient | RecordedServer, events: dict[str, asyncio.Event], *, has_pings: bool
    ) -> None:
        self.connection = connection
        self.events = events
        self._has_pings = has_pings
        self.messages: list[str] = []
        self.errors: list[str] = []
        self.notes: dict[str, Any] = {}  # what a script has to say beside
        self.held_pings = 0

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send a message; an iterable is sent in fragments."""
        await self.connection.send(message, text=text)

    async def receive(self) -> str | bytes:
        """Return the next message, after its kind, size and digest have been noted."""
        message: str | bytes = await self.connection.recv()
        content = message.encode() if isinstance(message, str) else message
        kind = "text" if isinstance(message, str) else "binary"
        self.messages.append(f"{kind} {len(content)} {digest(content)}")
        return message

    async def receive_all(self) -> None:
        """Take messages until the connection is closed."""
        try:
            while True:
                await self.receive()
        except ConnectionClosed as error:
            self.fail(error)

    async def echo(self) -> None:
        """Send each message back until the connection is closed."""
        try:
            while True:
                await self.send(await self.receive())
        except ConnectionClosed as error:
            self.fail(error)

    async def ping(self, payload: bytes = b"") -> None:
        """Send a Ping and wait for its Pong."""
        await (await self.connection.ping(payload))

    async def pause(self) -> None:
        """Be silent until a Ping of the proxy's own has come and is answered; straight on where it sends none."""
        if self._has_pings:
            before = len(self._pings())
            await eventually(lambda: len(self._pings()) > before, "a Ping of the proxy's own")

    def _pings(self) -> list[str]:
        return [frame for frame in self.connection.received.frames if frame.startswith("ping ")]

    async def hold(self) -> None:
        """Leave a Ping of the proxy's own unread, and so unanswered, until `release`."""
        self.connection.transport.pause_reading()
        if self._has_pings:
            with self.connection.transport.get_extra_info("socket").dup() as link:
                await eventually(lambda: _waits(link), "an unread Ping of the proxy's own")
            self.held_pings += 1

    def release(self) -> None:
        """Read again."""
        self.connection.transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send bytes that the library would not send."""
        self.connection.transport.write(data)

    def cut(self, how: str) -> None:
        """End the TCP connection without a Close frame: by "fin", "reset", or "close_notify" where there is TLS."""
        if how == "close_notify":
            self.connection.transport.close()
            return
        if how == "reset":
            link = self.connection.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.transport.abort()

    async def flushed(self) -> None:
        """Wait until all that was written has left this process."""
        transport = self.connection.transport
        transport.set_write_buffer_limits(0)
        await self.connection.drain()

    def fail(self, error: BaseException) -> None:
        """Note an exception and what caused it."""
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(f"{type(cause).__name__}({cause})")
            cause = cause.__cause__
        self.errors.append(" <- ".join([f"{type(error).__name__}({error})", *causes]))

    def verdict(self) -> Verdict:
        """Return what this end knows once the connection is closed."""
        connection = self.connection
        protocol = connection.protocol
        return {
            "messages": self.messages,
            "frames sent": connection.sent.frames,
            "frames received": connection.received.frames,
            "close code": int(connection.close_code or 0),
            "close reason": connection.close_reason,
            "Close received": _tell(protocol.close_rcvd),
            "Close sent": _tell(protocol.close_sent),
            "was closed first by": {None: "nobody", True: "the other", False: "itself"}[protocol.close_rcvd_then_sent],
            "errors": self.errors,
            "subprotocol": connection.subprotocol,
            "extensions": [repr(extension) for extension in protocol.extensions],
            "notes": self.notes,
        }


def _waits(link: socket.socket) -> bool:
    """Say whether a Ping has come that was not read."""
    try:
        return link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"\x89"
    except BlockingIOError:
        return False


def _tell(close: Close | None) -> tuple[int, str] | None:
    return None if close is None else (int(close.code), close.reason)


async def do_nothing(end: End) -> None:
    """Leave it to the library: the client closes with 1000."""


async def echo(end: End) -> None:
    """Send each message back."""
    await end.echo()


async def receive_all(end: End) -> None:
    """Take what comes until the connection is closed."""
    await end.receive_all()


@dataclass(frozen=True)
class Case:
    """What both ends do, and the options of the library for each of them.

    `client_tail` and `server_tail` are bytes that go out in one piece with the head of the handshake.
    """

    client: Script = do_nothing
    server: Script = echo
    path: str = "/"
    client_options: Mapping[str, Any] = field(default_factory=dict)
    server_options: Mapping[str, Any] = field(default_factory=dict)
    client_tail: bytes = b""
    server_tail: bytes = b""


BOTH: Final[Mapping[str, Any]] = {
    "compression": None,
    "ping_interval": None,
    "close_timeout": DEADLINE_S,
    "max_size": None,
}


class Conversation:
    """A case under way at one server; `open` may be called for several clients.

    The two ends of one connection find each other by the Sec-WebSocket-Key of its handshake.
    """

    def __init__(self, case: Case, listening: socket.socket, door: Door) -> None:
        self._case = case
        self._door = door
        self._listening = listening
        self._events: dict[str, dict[str, asyncio.Event]] = defaultdict(lambda: defaultdict(asyncio.Event))
        self._served: dict[str, asyncio.Future[End]] = defaultdict(asyncio.get_running_loop().create_future)
        self._made: list[RecordedServer] = []

        class Server(RecordedServer):
            tail = case.server_tail
            made = self._made

            @override
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.made.append(self)
                super().connection_made(transport)

        options = {**BOTH, "create_connection": Server, **case.server_options}
        self.serving = serve(self._serve, sock=listening.dup(), open_timeout=DEADLINE_S, **options)

    async def _serve(self, connection: ServerConnection) -> None:
        assert isinstance(connection, RecordedServer)
        assert connection.request is not None
        key = connection.request.headers["Sec-WebSocket-Key"]
        end = End(connection, self._events[key], has_pings=self._door.has_pings)
        try:
            await self._case.server(end)
        except Exception as error:  # noqa: BLE001 -- whatever it is, it belongs to the verdict
            end.fail(error)
        await connection.close()
        await connection.wait_closed()
        self._served[key].set_result(end)

    async def open(self, path: str) -> Verdict:
        """Let a client do its part, and return the verdict once both ends are done."""
        case, made = self._case, []

        class Client(RecordedClient):
            tail = case.client_tail

            @override
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.append(self)
                super().connection_made(transport)

        options = {**BOTH, "create_connection": Client, **case.client_options}
        try:
            opened = await self._door.connect(self._listening, path, options)
        except (WebSocketException, OSError) as error:
            return self._refused(error, made[-1])
        assert isinstance(opened, RecordedClient)
        assert opened.request is not None
        key = opened.request.headers["Sec-WebSocket-Key"]
        client = End(opened, self._events[key], has_pings=self._door.has_pings)
        try:
            await case.client(client)
        except Exception as error:  # noqa: BLE001 -- as above
            client.fail(error)
        await opened.close()
        await opened.wait_closed()
        server = await self._served[key]
        return self._verdict(client, server)

    def _verdict(self, client: End, server: End) -> Verdict:
        ends = client.connection, server.connection
        return {
            **(set_own_pings_aside(*ends) if self._door.has_pings else {}),
            "client: held: added": client.held_pings,
            "server: held: added": server.held_pings,
            **_compare_heads("request", ends[0].sent, ends[1].received),
            **_compare_heads("response", ends[1].sent, ends[0].received),
            "upwards, byte for byte": ends[0].sent.fact == ends[1].received.fact,
            "downwards, byte for byte": ends[1].sent.fact == ends[0].received.fact,
            **{f"client: {name}": value for name, value in client.verdict().items()},
            **{f"server: {name}": value for name, value in server.verdict().items()},
        }

    def _refused(self, error: Exception, connection: RecordedClient) -> Verdict:
        """Return the verdict of a handshake that failed."""
        verdict: Verdict = {"client: refused": f"{type(error).__name__}({error})"}
        if isinstance(error, InvalidStatus):
            response, served = error.response, self._made[-1]
            verdict["client: status"] = (response.status_code, response.reason_phrase)
            verdict["client: body"] = response.body
            verdict |= _compare_heads("request", connection.sent, served.received)
            verdict |= _compare_heads("response", served.sent, connection.received)
        return verdict


_HOP_BY_HOP: Final = {"connection", "upgrade"}  # written anew by a proxy, whence their place among the fields changes
_RANDOM: Final = {"sec-websocket-key", "sec-websocket-accept", "date"}


def _compare_heads(name: str, sent: Wire, received: Wire) -> Verdict:
    """Tell what became of each line of a head; lines that came beside are told by `added_fields`."""
    left, lines = received.lines[1:], []
    kept = []
    is_upgrade = sent.head.startswith((b"GET ", b"HTTP/1.1 101 "))
    for line in sent.lines[1:]:
        key = line.partition(":")[0]
        if key.lower() in _HOP_BY_HOP and not is_upgrade:
            continue  # they speak of this one connection (RFC 9110, section 7.6.1)
        shown = f"{key}: (as it was sent)" if key.lower() in _RANDOM else line
        if line in left:
            left.remove(line)
            lines.append(shown)
            kept += [line] if key.lower() not in _HOP_BY_HOP else []
        else:
            lines.append(f"lost or changed: {shown}")
    return {
        f"{name}: start": received.lines[0],
        f"{name}: fields": lines,
        f"{name}: in order": kept == [line for line in received.lines[1:] if line in kept],
        f"{name}: added": [line.partition(":")[0] for line in left],
    }


async def observe(case: Case, listening: socket.socket, door: Door) -> Verdict:
    """Play a case once and return its verdict; fail after 120 s."""
    async with asyncio.timeout(DEADLINE_S):
        conversation = Conversation(case, listening, door)
        async with conversation.serving:
            return await conversation.open(case.path)


async def observe_all(case: Case, listening: socket.socket, door: Door, paths: Iterable[str]) -> dict[str, Verdict]:
    """Let a client for each path play the case, all at once; return their verdicts by path; fail after 120 s."""
    conversation, paths = Conversation(case, listening, door), list(paths)
    async with asyncio.timeout(DEADLINE_S), conversation.serving:
        return dict(zip(paths, await asyncio.gather(*map(conversation.open, paths)), strict=True))


def differences(direct: Verdict, proxied: Verdict) -> dict[str, tuple[Any, Any]]:
    """Return what differs, by name; the fields that a proxy adds to a head are its own business."""
    names = [name for name in {**direct, **proxied} if not name.endswith(": added")]
    pairs = {name: (direct.get(name), proxied.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
