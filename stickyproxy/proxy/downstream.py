"""A client's connection: reads request heads, one exchange after the other, and closes in an orderly way.

| state     | what it is                                    | ends with                                   |
|-----------|-----------------------------------------------|---------------------------------------------|
| idle      | no exchange, nothing held                     | first byte of a head; keep-alive timeout    |
| head      | part of a head is held                        | a whole head; head timeout (408)            |
| exchange  | an exchange is under way                      | its end                                     |
| lingering | answered and half-closed; what comes is lost  | the client's end of file; linger timeout    |
"""

from __future__ import annotations

import asyncio
import math
import re
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.errors import RequestError
from stickyproxy.observe.record import Record
from stickyproxy.proxy.closing import Closing, close_broken
from stickyproxy.proxy.exchange import Exchange
from stickyproxy.proxy.handover import DownstreamState
from stickyproxy.proxy.respond import REDIRECT, write_error, write_redirect
from stickyproxy.wire.head import MAX_PIECES, find_head_end
from stickyproxy.wire.request_head import RequestHeadReader, find_head_error

if TYPE_CHECKING:
    from stickyproxy.errors import ExchangeError
    from stickyproxy.proxy.listener import Listener
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter
    from stickyproxy.wire.proxy_protocol import ProxyHeader
    from stickyproxy.wire.request_head import RequestHead

_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)+")


class Downstream(asyncio.Protocol):
    """One client's connection. `deadline` is the coarse monotonic time at which `on_deadline` is due.

    `is_blocked` says that the client does not take what was written: no other exchange begins until it does.
    `is_lingering` says that it was answered for the last time, and what it still sends is lost.
    """

    __slots__ = (
        "_closing",
        "_eof",
        "_header",
        "_heads",
        "_held",
        "_is_kept",
        "_is_next_due",
        "_pieces",
        "deadline",
        "exchange",
        "forwarded",
        "is_blocked",
        "is_lingering",
        "is_paused",
        "listener",
        "plane",
        "transport",
    )

    transport: asyncio.Transport
    forwarded: ForwardedWriter

    def __init__(self, plane: Plane, listener: Listener, header: ProxyHeader | None = None) -> None:
        self.plane = plane
        self.listener = listener
        self._header = header
        self.exchange: Exchange | None = None
        self.deadline = math.inf
        self._heads = RequestHeadReader(plane.settings.head, plane.cookie_reader)
        self._held: bytearray | None = None
        self._pieces = 0
        self._eof = False
        self._closing: Closing | None = None
        self._is_kept = False
        self.is_paused = False
        self.is_blocked = False
        self.is_lingering = False
        self._is_next_due = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plane = self.plane
        self.deadline = plane.now + plane.settings.timeouts.head_s
        is_admitted = self._join(cast("asyncio.Transport", transport))
        if plane.is_stopping:
            self.transport.close()
        elif not is_admitted:
            self.refuse(RequestError("too many connections from one address", status=503,
                                     proxy_status="http_request_denied"))  # fmt: skip

    def _join(self, transport: asyncio.Transport) -> bool:
        """Count the connection; say whether its address may have one more."""
        plane = self.plane
        self.transport = transport
        self.forwarded = self.listener.forwarded_writer(transport, self._header)
        plane.downstreams.add(self)
        transport.set_write_buffer_limits(plane.settings.buffer_bytes)
        is_admitted = plane.addresses.admit(self.forwarded.origin)
        plane.on_accepted()
        return is_admitted

    @override
    def data_received(self, data: bytes) -> None:
        crowd = self.plane.crowd
        crowd.left -= 1
        if crowd.left < 0:
            crowd.on_spent(self.transport)
        exchange = self.exchange
        if exchange is not None:
            if exchange.is_reading_request:
                exchange.on_request_body(data)
            else:
                self.hold(data)
        elif self.is_lingering:
            pass
        elif self.is_blocked or self._is_next_due:
            self.hold(data)
        elif self._held is None:
            self._begin(data, find_head_end(data))
        else:
            start = max(0, len(self._held) - 3)
            self._held += data
            self._pieces += 1
            self._begin_held(start)

    def _begin_held(self, start: int = 0) -> None:
        held = self._held
        if held is None:
            return
        end = find_head_end(held, start)
        if end < 0:
            self._wait_for_head(start)
            return
        self._held = None
        data = bytes(held)
        del held  # a large head is there once, not twice
        self._begin(data, end)

    def _begin(self, data: bytes, end: int) -> None:
        """Begin the exchange whose head ends at `end`, or wait for more of it."""
        empty = _EMPTY_LINES.match(data) if data[:2] == b"\r\n" else None
        if empty is not None:  # empty lines before a request (RFC 9112, section 2.2)
            data = data[empty.end() :]
            end = find_head_end(data)
            if not data:
                return
        if end < 0:
            self._held = bytearray(data)
            self._wait_for_head(0)
            return
        try:
            head = self._heads.read(data, end)
        except RequestError as error:
            self.refuse(error)
            return
        self._is_kept = False
        if head.is_upgrade and end > self.plane.settings.handshake_bytes:
            self.refuse(RequestError("the head of the WebSocket handshake is too large", status=431))
            return
        port = self.listener.role.redirect_to_https
        if port is not None:
            self._redirect(head, port, data[end:])
            return
        self.exchange = exchange = Exchange(self.plane, self, head)
        exchange.start(data[end:])

    def _redirect(self, head: RequestHead, port: int, rest: bytes) -> None:
        """Send a client of plain HTTP to the same target over TLS."""
        if not head.host:
            self.refuse(RequestError("the request names no host to be redirected to"))
            return
        plane = self.plane
        request_id = plane.new_request_id()
        is_whole = not head.length
        keep_alive = head.keep_alive and is_whole and not head.is_http_10 and not plane.is_stopping
        self.transport.write(write_redirect(head, port, request_id, plane.date_line, keep_alive=keep_alive))
        plane.counters.none.count_exchange(head.method, REDIRECT)
        if plane.log is not None:
            address = self.forwarded.origin.address
            plane.log(Record("exchange", request_id.decode(), address, REDIRECT, head.method, head.target, head.host))
        if is_whole:
            self.hold(rest)
        self.on_exchange_end(keep_alive=keep_alive, is_request_whole=is_whole)

    def _wait_for_head(self, checked: int) -> None:
        """Check what has come of a head so far, so that rubbish is refused at once and not at the timeout."""
        plane, held = self.plane, self._held
        if held is None:
            return
        if checked == 0:
            self._pieces = 0
            self.deadline = plane.now + plane.settings.timeouts.head_s
        error = find_head_error(held, checked, plane.settings.head)
        if error is not None:
            self.refuse(error)
        elif self._pieces > MAX_PIECES:
            self.refuse(RequestError("the request head came in too many pieces"))

    def change_settings(self) -> None:
        """Read the next request by the settings that the plane has now."""
        self._heads = RequestHeadReader(self.plane.settings.head, self.plane.cookie_reader)

    def refuse(self, error: ExchangeError) -> None:
        """Answer what is no request, and close: nothing that follows on the connection can be understood."""
        plane = self.plane
        request_id = plane.new_request_id()
        self._held = None
        self.transport.write(write_error(error, None, request_id, plane.date_line, keep_alive=False))
        plane.counters.none.count_exchange(b"", error.status)
        if plane.log is not None:
            address = self.forwarded.origin.address
            plane.log(Record("exchange", request_id.decode(), address, error.status, error=error.reason))
        self._linger()

    def hold(self, data: bytes) -> None:
        """Keep what came after the current request until its exchange has ended; stop reading when it is much."""
        if not data:
            return
        if self._held is None:
            self._held = bytearray(data)
        else:
            self._held += data
        if len(self._held) > self.plane.settings.buffer_bytes:
            self.pause_reading()

    def on_exchange_end(self, *, keep_alive: bool, is_request_whole: bool) -> None:
        """Go on with the next request, or close; a request that has not come whole cannot be followed by another."""
        plane = self.plane
        self.exchange = None
        if keep_alive and is_request_whole and not plane.is_stopping:
            self.deadline = plane.now + plane.settings.timeouts.keep_alive_s
            self._is_kept = True
            if self._held:
                self.deadline = plane.now + plane.settings.timeouts.head_s
            if plane.on_idle is not None and plane.on_idle(self):
                return
            if self._held:
                self._begin_next_soon()
            elif self._eof:
                self._close()
            if self.is_paused:
                self.resume_reading()
        elif is_request_whole and not self._held:
            self._close()
        else:
            self._linger()

    def _begin_next_soon(self) -> None:
        """Begin what is held in the next turn of the loop, or once the client has taken what was written."""
        if not (self.is_blocked or self._is_next_due):
            self._is_next_due = True
            self.plane.loop.call_soon(self._next)

    def _next(self) -> None:
        self._is_next_due = False
        if self.is_lingering or self.transport.is_closing():
            return
        self._begin_held()
        if self._eof and not self._is_busy:
            self._close()

    @property
    def _is_busy(self) -> bool:
        return self.exchange is not None or self.is_lingering or self._is_request_due

    @property
    def _is_request_due(self) -> bool:
        """Say whether what is held waits for its turn, and not for more of it."""
        return self._held is not None and (self._is_next_due or self.is_blocked)

    def _linger(self) -> None:
        """Close in an orderly way: a client still sending must be able to read the answer (RFC 9112, section 9.6)."""
        self.is_lingering = True
        self._held = None
        self._closing = Closing(self)
        if self._eof or self.transport.is_closing():
            self.transport.close()
            return
        if self.is_tls:
            self.transport.close()  # reads on, and drops it, until the client has taken all and closes too
        else:
            self.transport.write_eof()
            self.resume_reading()

    def on_deadline(self) -> None:
        """Act on a timeout, by state."""
        self.deadline = math.inf
        if self.exchange is not None:
            self.exchange.on_timeout()
        elif self.is_lingering or self.transport.is_closing():
            self._closing = self._closing or Closing(self)
            self._closing.look()
        elif self._held and not self.is_blocked:
            self.refuse(RequestError("the request head did not arrive in time", status=408))
        else:
            self._close()

    def _close(self) -> None:
        """Close once all is sent; a client that takes nothing of it for `send_s` is cut."""
        self._closing = Closing(self)
        self.transport.close()

    def stop(self) -> None:
        """Close now if idle; else with the end of the exchange."""
        if self.exchange is None and not self.is_lingering:
            self._close()

    @override
    def eof_received(self) -> bool:
        self._eof = True
        exchange = self.exchange
        if self.is_tls and exchange is not None:  # uvloop ends a TLS connection with its first half
            exchange.on_client_lost()
            self.exchange = None
            self._closing = Closing(self)
            return False
        if exchange is None:
            if self._is_request_due:
                return not self.is_tls
            if not self.is_lingering:
                self._close()
            return False
        if exchange.is_reading_request:
            exchange.on_client_lost()
            return False
        return True  # half-closed: the response is still on its way

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.plane.downstreams.discard(self)
        self.deadline = math.inf
        self._closing = None
        if self.exchange is not None:
            self.exchange.on_client_lost()
            self.exchange = None
        self.plane.on_closed(self.forwarded.origin)

    @property
    def origin(self) -> ConnectionOrigin:
        """Return who the client is, as far as the connection says."""
        return self.forwarded.origin

    @property
    def transports(self) -> tuple[asyncio.Transport, ...]:
        """Return the transport, as that of a tunnel's sides."""
        return (self.transport,)

    @property
    def is_ending(self) -> bool:
        """Say whether the connection ends, if not at once, then with its exchange."""
        return self.is_lingering or self._eof or self.transport.is_closing()

    @property
    def may_leave(self) -> bool:
        """Say whether another process could go on: the connection stands between two exchanges, and all is sent."""
        is_at_work = self.exchange is not None or self._is_next_due or self.is_blocked
        return not (is_at_work or self.is_ending or self.is_tls or self.transport.get_write_buffer_size())

    def leave(self) -> None:
        """Do nothing more: another process goes on. What is counted stays so until `release`."""
        self.plane.downstreams.discard(self)

    def export(self, _unsent_bytes: int = 0) -> DownstreamState:
        """Return where the connection stands; nothing of it is unsent."""
        return DownstreamState(
            listener=str(self.listener.address),
            header=self._header,
            held=bytes(self._held or b""),
            pieces=self._pieces,
            is_kept=self._is_kept,
            left_s=max(0.0, self.deadline - self.plane.now),
        )

    def go_on(self, transport: asyncio.Transport, state: DownstreamState) -> None:
        """Take over a connection from another process; it is not read yet."""
        self._join(transport)
        self._is_kept = state.is_kept
        self.deadline = deadline = self.plane.now + state.left_s
        if state.held:
            self.data_received(state.held)
        if not state.held or (self._held is not None and self.exchange is None):  # it waits on as it did
            self._pieces, self.deadline = state.pieces, deadline
        if not self.is_paused:
            transport.resume_reading()
        if self.plane.is_stopping:
            self.stop()

    def release(self) -> None:
        """Count the connection no more."""
        self.plane.on_closed(self.forwarded.origin)

    def lose(self) -> None:
        """Count a connection as ended that nobody could go on with."""
        self.release()

    def become_tunnel(self) -> bytes:
        """Part from the connection, which a tunnel takes over; return what the client has sent already."""
        self.plane.downstreams.discard(self)
        self.exchange = None
        held, self._held = self._held, None
        return bytes(held or b"")

    @property
    def has_eof(self) -> bool:
        """Say whether the client has sent all that it will ever send."""
        return self._eof

    @property
    def is_tls(self) -> bool:
        """Say whether the proxy itself speaks TLS on the connection."""
        return not self.transport.can_write_eof()

    @property
    def is_idle(self) -> bool:
        """Say whether the connection only waits for a next request after one that it has served."""
        return self._is_kept and self.exchange is None and not self._held

    def cut(self, *, is_delimited: bool) -> None:
        """End the connection after a response that is not whole; see `close_broken`."""
        self.exchange = None
        self.is_lingering = True
        self._closing = Closing(self)
        close_broken(self.transport, is_delimited=is_delimited)

    def abort(self) -> None:
        """Close at once, whatever was not sent."""
        self.transport.abort()

    @override
    def pause_writing(self) -> None:
        self.is_blocked = True
        if self.exchange is not None:
            self.exchange.pause_response()

    @override
    def resume_writing(self) -> None:
        self.is_blocked = False
        if self.exchange is not None:
            self.exchange.resume_response()
        elif self._held and not self.is_lingering:
            self._begin_next_soon()

    def pause_reading(self) -> None:
        """Take nothing more from the client for now."""
        self.is_paused = True
        self.plane.crowd.pause(self.transport)

    def resume_reading(self) -> None:
        """Take from the client again."""
        if self.is_paused:
            self.is_paused = False
            self.plane.crowd.resume(self.transport)

    @override
    def __repr__(self) -> str:
        if self.is_lingering:
            return "<Downstream lingering>"
        return f"<Downstream {self.exchange or ('head' if self._held else 'idle')}>"
