"""One exchange: the path of a request, in the order of the methods.

    start -> _present -> _choose -> _attempt -> _send -> on_request_body
          -> on_response_head -> on_response_body -> _finish -> _record          and nothing else when all is well
    _wait, _dial, _retry, fail, on_timeout, on_client_lost                       when something is not

With a pooled connection at hand the whole path runs in the callbacks of the two connections: no task, no future, no
timer. Only waiting makes a task: a dial, or an upstream that is to come back.
"""

from __future__ import annotations

import logging
import math
from time import perf_counter
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.affinity.choose import Outcome, Question, choose
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.errors import RequestError, ResponseError, UpstreamUnavailable
from stickyproxy.observe.record import Record
from stickyproxy.proxy.relay import Relay
from stickyproxy.proxy.respond import write_error
from stickyproxy.proxy.tunnel import Tunnel
from stickyproxy.tasks import spawn
from stickyproxy.wire.body import BodyError
from stickyproxy.wire.cookies import is_shared_cacheable
from stickyproxy.wire.forwarded import client_address
from stickyproxy.wire.head import CHUNKED, UNTIL_CLOSE
from stickyproxy.wire.headers import find_field

if TYPE_CHECKING:
    from stickyproxy.affinity.choose import Choice
    from stickyproxy.affinity.sessions import Session
    from stickyproxy.errors import ExchangeError
    from stickyproxy.proxy.downstream import Downstream
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool
    from stickyproxy.proxy.upstream import UpstreamConnection
    from stickyproxy.wire.head import RequestHead, ResponseHead

logger = logging.getLogger(__name__)

# RFC 9110, section 9.2.2: these may be sent again when nobody knows whether they arrived.
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
_CLIENT_GONE: Final = 499  # nginx's number for a client that went away before its answer
_MAX_INTERIM: Final = 32  # interim responses to one request; nobody needs more than two
_SWITCHING: Final = 101


class Exchange:
    """One request with its response. `is_reading_request` says that its body has not come whole."""

    __slots__ = (
        "_attempts",
        "_connection",
        "_error",
        "_interim",
        "_is_new",
        "_is_over",
        "_keep_alive",
        "_outcome",
        "_pool",
        "_request",
        "_response",
        "_response_head",
        "_rest",
        "_sent_at",
        "_session",
        "_sets_cookie",
        "_started_at",
        "_status",
        "_token",
        "_tried",
        "downstream",
        "head",
        "is_reading_request",
        "plane",
        "request_id",
    )

    def __init__(self, plane: Plane, downstream: Downstream, head: RequestHead) -> None:
        self.plane = plane
        self.downstream = downstream
        self.head = head
        self.request_id = plane.new_request_id()
        self.is_reading_request = False
        self._started_at = perf_counter()
        self._sent_at = 0.0
        self._session: Session | None = None
        self._is_new = False
        self._token = Outcome.NEW
        self._sets_cookie = False
        self._outcome = Outcome.NONE
        self._tried: frozenset[bytes] = frozenset()
        self._pool: Pool | None = None
        self._connection: UpstreamConnection | None = None
        self._attempts = 0
        self._request: Relay | None = None
        self._rest = b""
        self._response: Relay | None = None
        self._response_head: ResponseHead | None = None
        self._interim = 0
        self._keep_alive = head.keep_alive
        self._status = 0
        self._error = ""
        self._is_over = False

    # The path

    def start(self, rest: bytes) -> None:
        """Go the path; `rest` is what came with the head: body, or the next request."""
        head, plane = self.head, self.plane
        if head.length:
            self._request = Relay(head.length, plane.settings, is_chunked=head.length == CHUNKED)
            self._rest = rest
            self.is_reading_request = True
        elif rest:
            self.downstream.hold(rest)
        self.downstream.deadline = math.inf
        if plane.cookie_reader is not None and head.cookies is not None:
            self._present(plane.cookie_reader.take(head.section, head.cookies))
        pool = self._choose()
        if pool is not None:
            self._attempt(pool)

    def _present(self, value: bytes | None) -> None:
        """Take the client's token for what it is worth."""
        if value is None:
            return
        wall = self.plane.wall
        presented = self.plane.sessions.present(value, wall)
        if presented is None:
            self._token = Outcome.INVALID
        elif presented.expires_at < wall:
            self._token = Outcome.EXPIRED
        else:
            self._session = presented.session
            # The client's token lags behind where its session was moved by another request, or has become old.
            self._sets_cookie = presented.digest != presented.session.digest or presented.refresh_at <= wall

    def _choose(self) -> Pool | None:
        """Choose an upstream and return its pool; None when the exchange waits or was answered."""
        plane, session = self.plane, self._session
        if session is not None and not self._tried and session.digest in plane.snapshot.pinnable:
            self._outcome = Outcome.HIT
            return self._enter(plane.pools[session.digest])
        question = Question(
            session=None if self._is_new else session,
            token=self._token,
            address_key=self._address_key() if session is None else None,
            tried=self._tried,
        )
        return self._act_on(choose(plane.snapshot, question, plane.chance, plane.load))

    def _act_on(self, choice: Choice) -> Pool | None:
        plane = self.plane
        self._outcome = choice.outcome
        if choice.outcome is Outcome.WAIT:
            spawn(self._wait(plane.snapshot.rules.wait_s), "wait for an upstream")
            return None
        if choice.upstream is None:
            self.fail(UpstreamUnavailable("no upstream can take the request"))
            return None
        pool = plane.pools[choice.upstream.digest]
        if choice.broken is not None and self._session is not None:
            plane.counters.breaks[choice.broken] += 1
            logger.info("a client was moved to upstream %s: its own is %s", pool.upstream_id, choice.broken)
            plane.sessions.move(self._session, pool.digest, plane.wall)
            self._sets_cookie = True
        elif plane.cookie_writer is not None:
            self._session = plane.sessions.begin(plane.new_client_id(), pool.digest, plane.wall)
            self._is_new = self._sets_cookie = True
        pool.placed += 1
        return self._enter(pool)

    def _address_key(self) -> bytes | None:
        """Return the client's address where it may stand in for a cookie: not for a navigation, which can get one."""
        if not self.plane.snapshot.rules.uses_client_address:
            return None
        if find_field(self.head.section, b"sec-fetch-dest") == b"document":
            return None
        return client_address(self.downstream.forwarded.origin, self.head, self.plane.settings.trusted).encode()

    def _enter(self, pool: Pool) -> Pool:
        """Count the exchange as under way at an upstream; `_leave` undoes it."""
        self._pool = pool
        pool.counters.in_flight += 1
        session = self._session
        if session is None or self._is_new:
            pool.strangers += 1
        else:
            session.open += 1
            if session.active_at != self.plane.now:
                self.plane.sessions.touch(session, self.plane.now)
        return pool

    def _leave(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.counters.in_flight -= 1
        if self._session is None or self._is_new:
            pool.strangers -= 1
        else:
            self._session.open -= 1

    def _attempt(self, pool: Pool) -> None:
        """Send the request over a pooled connection, or dial first."""
        self._attempts += 1
        connection = pool.take(is_idempotent=self.head.method in _IDEMPOTENT and self._request is None)
        if connection is not None:
            self._send(connection)
            return
        if self.is_reading_request:
            self.downstream.pause_reading()
        spawn(self._dial(pool), "dial")

    def _send(self, connection: UpstreamConnection) -> None:
        """Send the head and what there is of the body."""
        self._connection = connection
        connection.exchange = self
        timeouts = self.plane.settings.timeouts
        self._sent_at = perf_counter()
        if self._request is None:
            connection.transport.write(self._write_request_head(connection))
            self.downstream.deadline = self.plane.now + timeouts.response_s
            return
        head = self._write_request_head(connection)
        rest, self._rest = self._rest, b""
        if not rest:
            connection.transport.write(head)
            self.downstream.deadline = self.plane.now + timeouts.body_idle_s
        else:
            connection.transport.write(head)
            self.on_request_body(rest)
        self.downstream.resume_reading()

    def _write_request_head(self, connection: UpstreamConnection) -> bytes:
        head = self.head
        parts = [
            b"%b %b HTTP/1.1\r\n" % (head.method, head.target),
            *head.section,
            self.downstream.forwarded.write(head, self.request_id),
        ]
        if head.is_http_10 and not head.host:
            parts.append(b"Host: " + connection.pool.authority + b"\r\n")
        if head.length == CHUNKED:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        elif head.length or head.method in {b"POST", b"PUT", b"PATCH"}:
            parts.append(b"Content-Length: %d\r\n" % head.length)
        if head.is_upgrade:
            parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def on_request_body(self, data: bytes) -> None:
        """Send on what came of the body."""
        connection, relay = self._connection, self._request
        if connection is None or relay is None:
            self._rest += data  # the connection is being dialled, and the client's is paused
            return
        try:
            framed = relay.feed(data)
        except BodyError as error:
            self.fail(RequestError(str(error), phase="body"))
            return
        if framed:
            connection.transport.write(framed)
        timeouts = self.plane.settings.timeouts
        if relay.is_done:
            self.is_reading_request = False
            self.downstream.hold(relay.excess)
            self.downstream.deadline = self.plane.now + timeouts.response_s
        else:
            self.downstream.deadline = self.plane.now + timeouts.body_idle_s

    def on_response_head(self, head: ResponseHead, rest: bytes) -> None:
        """Pass on the head, with the affinity cookie where one is due, and what there is of the body."""
        connection = self._connection
        if connection is None or self._pool is None:
            return
        if head.status < 200:  # noqa: PLR2004 -- RFC 9110, section 15.2
            self._on_interim(connection, head, rest)
            return
        connection.reads_head = False
        self._response_head = head
        self._status = head.status
        self._pool.counters.response.observe(perf_counter() - self._sent_at)
        if not self.is_reading_request:
            self.downstream.deadline = math.inf
        length = head.length
        is_chunked = length < 0 and not self.head.is_http_10
        if (length < 0 and not is_chunked) or self.plane.is_stopping:
            self._keep_alive = False
        out = self._write_response_head(head, is_chunked=is_chunked)
        if length == 0 or length == len(rest):  # the common case: all of it is here
            self.downstream.transport.write(out + rest if length else out)
            self._pool.counters.sent_bytes += length
            self._finish(is_reusable=head.keep_alive and len(rest) == length)
            return
        self._response = Relay(length, self.plane.settings, is_chunked=is_chunked)
        if rest:
            self._relay_response(connection, rest, out)
        else:
            self.downstream.transport.write(out)

    def _write_response_head(self, head: ResponseHead, *, is_chunked: bool) -> bytes:
        parts = [b"HTTP/1.1 ", head.status_text, b"\r\n", *head.section]
        if self._sets_cookie:
            self._add_cookie(head, parts)
        if is_chunked:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        if not self._keep_alive:
            parts.append(b"Connection: close\r\n")
        elif self.head.is_http_10:
            parts.append(b"Connection: keep-alive\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def _add_cookie(self, head: ResponseHead, parts: list[bytes]) -> None:
        plane, session = self.plane, self._session
        if plane.cookie_writer is None or session is None or is_shared_cacheable(head.cache_control):
            return
        token = plane.sessions.write_token(session, plane.wall)
        is_https = self.downstream.forwarded.is_https(self.head)
        parts += (plane.cookie_writer.write(token, is_https=is_https), b"\r\n")

    def _on_interim(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        """Relay an interim response (RFC 9110, section 15.2), or open the tunnel after the 101 that was asked for."""
        self._interim += 1
        if head.status == _SWITCHING:
            if self.head.is_upgrade and head.is_upgrade:
                self._open_tunnel(connection, head, rest)
            else:
                self.fail(ResponseError("the upstream switched protocols without being asked"))
            return
        if self._interim > _MAX_INTERIM:
            self.fail(ResponseError("the upstream sent too many interim responses"))
            return
        if not self.head.is_http_10:
            self.downstream.transport.write(b"".join((b"HTTP/1.1 ", head.status_text, b"\r\n", *head.section, b"\r\n")))
        if rest:
            connection.data_received(rest)

    def _open_tunnel(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        pool, downstream = self._pool, self.downstream
        if pool is None:
            return
        self._status = head.status
        parts = [b"HTTP/1.1 ", head.status_text, b"\r\n", *head.section]
        if self._sets_cookie:
            self._add_cookie(head, parts)
        parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        downstream.transport.write(b"".join(parts))
        if self._is_new and self._session is not None:  # a client that holds a tunnel is a session
            self._is_new = False
            pool.strangers -= 1
            self._session.open += 1
            self.plane.sessions.touch(self._session, self.plane.now)
        session = None if self._is_new else self._session
        pool.counters.response.observe(perf_counter() - self._sent_at)
        tunnel = Tunnel(self.plane, pool, session, self._describe())
        self._connection = connection.exchange = None
        if session is not None:
            session.open += 1
        else:
            pool.strangers += 1
        self._record("ok")
        early = downstream.become_tunnel()
        tunnel.open(downstream.transport, connection.transport)
        if downstream.has_eof:
            tunnel.client.eof_received()
        if rest:
            tunnel.upstream.data_received(rest)
        if early:
            tunnel.client.data_received(early)

    def on_response_body(self, data: bytes) -> None:
        """Pass on what came of the body."""
        if self._connection is not None:
            self._relay_response(self._connection, data, b"")

    def _relay_response(self, connection: UpstreamConnection, data: bytes, head: bytes) -> None:
        relay = self._response
        if relay is None:
            return
        try:
            framed = relay.feed(data)
        except BodyError as error:
            self._error = str(error)
            if head:
                self.downstream.transport.write(head)
            self._truncate()
            return
        if head or framed:
            self.downstream.transport.write(head + framed if head else framed)
        if relay.is_done:
            if self._pool is not None:
                self._pool.counters.sent_bytes += relay.relayed_bytes
            response = self._response_head
            is_reusable = response is not None and response.keep_alive and not relay.excess
            self._finish(is_reusable=is_reusable)

    def _finish(self, *, is_reusable: bool) -> None:
        """End an exchange whose response was passed on whole."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(reusable=is_reusable and not self.is_reading_request)
        self._record("ok")
        self.downstream.on_exchange_end(keep_alive=self._keep_alive, is_request_whole=not self.is_reading_request)

    def _record(self, attempt: str) -> None:
        """Count and log the exchange, once."""
        self._is_over = True
        plane, pool = self.plane, self._pool
        counters = plane.counters.none if pool is None else pool.counters
        self._leave()
        if self._outcome is Outcome.HIT:
            plane.counters.hits += 1
        else:
            plane.counters.affinity[self._outcome] += 1
        if pool is not None:
            counters.attempts[attempt] += 1
        if self._request is not None:
            counters.received_bytes += self._request.relayed_bytes
        counters.count_exchange(self.head.method, self._status)
        if self._status != _SWITCHING:
            counters.duration.observe(perf_counter() - self._started_at)
        if plane.log is not None:
            plane.log(self._describe())

    def _describe(self) -> Record:
        head = self.head
        return Record(
            kind="exchange",
            request_id=self.request_id.decode("ascii"),
            client=client_address(self.downstream.forwarded.origin, head, self.plane.settings.trusted),
            method=head.method,
            target=head.target,
            host=head.host,
            status=self._status,
            upstream="" if self._pool is None else self._pool.upstream_id,
            affinity=self._outcome,
            attempts=self._attempts,
            duration_s=perf_counter() - self._started_at,
            received_bytes=0 if self._request is None else self._request.relayed_bytes,
            sent_bytes=0 if self._response is None else self._response.relayed_bytes,
            referer=find_field(head.section, b"referer"),
            user_agent=find_field(head.section, b"user-agent"),
            error=self._error,
        )

    # Waiting

    async def _wait(self, wait_s: float) -> None:
        """Hold the request until its upstream is back, at most `wait_s` seconds, then look for another."""
        plane = self.plane
        until = plane.loop.time() + wait_s
        while not self._is_over:
            left_s = until - plane.loop.time()
            session = self._session
            if session is not None and session.digest in plane.snapshot.pinnable:
                break
            if left_s <= 0:
                question = Question(session, has_waited=True, tried=self._tried)
                pool = self._act_on(choose(plane.snapshot, question, plane.chance, plane.load))
                if pool is not None:
                    self._attempt(pool)
                return
            await plane.wait_for_change(left_s)
        if not self._is_over:
            self._tried = frozenset()
            pool = self._choose()
            if pool is not None:
                self._attempt(pool)

    async def _dial(self, pool: Pool) -> None:
        """Open a connection and go on; where there is none to be had, break the pin and choose again."""
        try:
            connection = await pool.dial()
        except (ConnectionRefusedError, FileNotFoundError):
            self._on_unreachable(pool, "refused")
        except TimeoutError:
            self._on_unreachable(pool, "timeout")
        except OSError as error:
            logger.warning("cannot connect to upstream %s: %s", pool.upstream_id, error)
            self._on_unreachable(pool, "error")
        else:
            if pool.digest not in self.plane.snapshot.pinnable:
                self.plane.report(pool.upstream_id, HealthEvent.CONNECTED)
            if self._is_over:
                pool.give_back(connection)
            else:
                self._send(connection)

    def _on_unreachable(self, pool: Pool, outcome: str) -> None:
        pool.counters.attempts[outcome] += 1
        if outcome == "refused":
            self.plane.report(pool.upstream_id, HealthEvent.REFUSED)
        if self._is_over:
            return
        self._leave()
        self._tried |= {pool.digest}
        if outcome == "timeout" and not self._is_new:
            # Slow is not dead: the client keeps its pin, and hears that its upstream did not answer.
            self.fail(ResponseError("the upstream did not accept a connection in time", status=504, phase="connect",
                                    proxy_status="connection_timeout"))  # fmt: skip
            return
        next_pool = self._choose()
        if next_pool is not None:
            self._attempt(next_pool)

    # When something is not well

    def on_upstream_lost(self, connection: UpstreamConnection, error: Exception | None) -> None:
        """Act on the end of the upstream's connection, which is clean only for a body that ends with it."""
        self._connection = connection.exchange = None
        response = self._response_head
        if response is None:
            if self._may_retry(connection):
                self._retry()
            else:
                self.fail(
                    ResponseError("the upstream closed the connection without answering",
                                  proxy_status="connection_terminated")
                )  # fmt: skip
        elif response.length == UNTIL_CLOSE and error is None and self._response is not None:
            self.downstream.transport.write(self._response.end())
            if self._pool is not None:
                self._pool.counters.sent_bytes += self._response.relayed_bytes
            self._finish(is_reusable=False)
        else:
            self._error = "the upstream broke off its response"
            self._truncate()

    def _may_retry(self, connection: UpstreamConnection) -> bool:
        """Say whether the request may be sent again: it met the end of an idle connection, and is safe to repeat."""
        return (
            connection.is_reused
            and not self._interim
            and self._request is None
            and self.head.method in _IDEMPOTENT
            and not connection.has_begun
        )

    def _retry(self) -> None:
        pool = self._pool
        if pool is None:
            return
        pool.counters.attempts["closed"] += 1
        self._attempts += 1
        spawn(self._dial(pool), "dial again")

    def fail(self, error: ExchangeError) -> None:
        """End the exchange with an error: answered if nothing was passed on yet, else visibly cut."""
        if self._is_over:
            return
        self._error = error.reason
        if self._response_head is not None:
            self._truncate()
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(reusable=False)
        self._status = error.status
        is_whole = not self.is_reading_request
        keep_alive = self._keep_alive and is_whole and not self.plane.is_stopping
        self.downstream.transport.write(write_error(error, self.head, self.request_id, keep_alive=keep_alive))
        self._record(error.proxy_status)
        if error.side == "upstream":
            logger.warning("502 for request %s: %s", self.request_id.decode(), error.reason)
        self.downstream.on_exchange_end(keep_alive=keep_alive, is_request_whole=is_whole)

    def _truncate(self) -> None:
        """Cut a response that cannot be completed: the client must not take it for whole (RFC 9112, section 8)."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(reusable=False)
        if self._pool is not None and self._response is not None:
            self._pool.counters.sent_bytes += self._response.relayed_bytes
        self._record("truncated")
        logger.warning("response cut for request %s: %s", self.request_id.decode(), self._error)
        self.downstream.exchange = None
        self.downstream.cut()

    def on_timeout(self) -> None:
        """Act on the deadline of the downstream: no more of the body, or no head of the response."""
        if self.is_reading_request:
            self.fail(RequestError("the request body did not arrive in time", status=408, phase="body"))
        else:
            self.fail(
                ResponseError("the upstream did not answer in time", status=504,
                              proxy_status="http_response_timeout")
            )  # fmt: skip

    def on_client_lost(self) -> None:
        """Stop work for a client that went away; its upstream sees the connection close, and is not blamed."""
        if self._is_over:
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(reusable=False)
        if self._pool is not None and self._response is not None:
            self._pool.counters.sent_bytes += self._response.relayed_bytes
        self._status = _CLIENT_GONE
        self._error = "the client went away"
        self._record("client_gone")

    def pause_response(self) -> None:
        """Read no more of the response while the client takes none."""
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def resume_response(self) -> None:
        """Read the response again."""
        if self._connection is not None:
            self._connection.transport.resume_reading()

    @override
    def __repr__(self) -> str:
        side = "request" if self.is_reading_request else "response" if self._response_head else "waiting"
        return f"<Exchange {self.head.method.decode('latin-1')} {side} attempts={self._attempts}>"
