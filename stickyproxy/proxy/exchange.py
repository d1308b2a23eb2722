"""One exchange: the path of a request, in the order of the methods.

    start -> _attempt -> _send -> on_request_body
          -> on_response_head -> on_response_body -> _finish -> _record          and nothing else when all is well
    _wait, _dial, on_upstream_lost, fail, on_timeout, on_client_lost             when something is not

With a pooled connection at hand the whole path runs in the callbacks of the two connections: no task, no future, no
timer. Only waiting makes a task: a dial, or an upstream that is to come back.
"""

from __future__ import annotations

import errno
import logging
import math
import re
import ssl
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.affinity.choose import Outcome
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.keys import Found
from stickyproxy.errors import RequestError, ResponseError, UpstreamGone, UpstreamUnavailable
from stickyproxy.observe.counters import AFFINITY, HITS, NS, RECEIVED_BYTES, SENT_BYTES
from stickyproxy.observe.record import Record
from stickyproxy.proxy.held_body import MAX_HELD_BYTES, HeldBody
from stickyproxy.proxy.learning import Learning
from stickyproxy.proxy.placement import Placement
from stickyproxy.proxy.relay import Relay
from stickyproxy.proxy.respond import write_error
from stickyproxy.proxy.socket_state import count_taken
from stickyproxy.proxy.tunnel import Tunnel
from stickyproxy.tasks import spawn
from stickyproxy.wire.body import BodyError
from stickyproxy.wire.forwarded import client_address
from stickyproxy.wire.head import CHUNKED, UNTIL_CLOSE
from stickyproxy.wire.headers import count_fields, find_field
from stickyproxy.wire.request_head import write_request_head
from stickyproxy.wire.response_head import write_response_head

if TYPE_CHECKING:
    import asyncio

    from stickyproxy.affinity.keys import Key
    from stickyproxy.errors import ExchangeError
    from stickyproxy.proxy.downstream import Downstream
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool
    from stickyproxy.proxy.upstream import UpstreamConnection
    from stickyproxy.wire.request_head import RequestHead
    from stickyproxy.wire.response_head import ResponseHead

logger = logging.getLogger(__name__)

# RFC 9110, section 9.2.2: these may be sent again when nobody knows whether they arrived.
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
_CLIENT_GONE: Final = 499  # nginx's number for a client that went away before its answer
_MAX_INTERIM: Final = 32  # interim responses to one request; nobody needs more than two
_SWITCHING: Final = 101
_EVENT_STREAM: Final = re.compile(rb"(?i:text/event-stream)")  # may be silent for ever
# What a connection can fail with although the process behind it lives.
_NOT_DEAD: Final = {
    "timeout": (504, "the upstream did not accept a connection in time", "connection_timeout"),
    "tls": (502, "the TLS handshake with the upstream failed", "tls_protocol_error"),
}
_LOOK_AGAIN_S: Final = 0.5  # for an upstream that nobody reports as back, since nobody reported it as gone


class Exchange:
    """One request with its response. `is_reading_request` says that its body has not come whole.

    `_idle_s` is the timeout between two reads of a response's body, `_taken` what the slower side had taken of what was
    written to it when it was last looked at; they are there once a body is relayed, or a side has become slow.
    `_sent_head` is the head as the upstream gets it.
    """

    __slots__ = (
        "_attempts",
        "_connection",
        "_error",
        "_held",
        "_idle_s",
        "_interim",
        "_is_over",
        "_keep_alive",
        "_learning",
        "_place",
        "_request",
        "_response",
        "_response_head",
        "_rest",
        "_sent_at",
        "_sent_head",
        "_started_at",
        "_status",
        "_taken",
        "_wait_until",
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
        self.request_id = downstream.forwarded.request_id(head) or plane.new_request_id()
        self.is_reading_request = False
        router = plane.router
        if router is None:
            self._sent_head = head
            self._place = Placement(plane, plane.default, head, downstream.forwarded)
        else:
            found = router.find(head)
            self._sent_head = found.enter(head)
            self._place = Placement(plane, found.cluster, self._sent_head, downstream.forwarded, found.writer)
        self._started_at = self._sent_at = perf_counter_ns()
        self._connection: UpstreamConnection | None = None
        self._attempts = 0
        self._request: Relay | None = None
        self._rest = b""
        self._held: HeldBody | None = None  # while it is to say where the client belongs
        self._learning: Learning | None = None
        self._response: Relay | None = None
        self._response_head: ResponseHead | None = None
        self._interim = 0
        self._keep_alive = head.keep_alive
        self._status = 0
        self._error = ""
        self._is_over = False
        self._wait_until = 0.0

    # The path

    def start(self, rest: bytes) -> None:
        """Go the path; `rest` is what came with the head: body, or the next request."""
        head = self.head
        if head.length:
            self._request = Relay(head.length, self.plane.settings, is_chunked=head.length == CHUNKED)
            self._taken = 0
            self._rest = rest
            self.is_reading_request = True
            if head.length > self.plane.settings.body_bytes:
                self.fail(_too_large())
                return
        elif rest:
            self.downstream.hold(rest)
        self.downstream.deadline = math.inf
        if head.is_upgrade and not self._allows_origin():
            self.fail(RequestError("WebSockets from this origin are not allowed", status=403,
                                   proxy_status="http_request_denied"))  # fmt: skip
            return
        place = self._place
        place.read_pin()
        keys = place.cluster.keys
        lessons = None if keys is None else keys.lessons(self._sent_head.target)
        if lessons is not None:
            self._learning = Learning(lessons, partial(_learn_at, place, None))  # not a method: no cycle to collect
            if self._request is not None and self._learning.begin_request():
                self._request.hear = self._learning.hear_request
        if self._request is not None and self._must_hold_body():
            self._rest = b""
            self._held = HeldBody(head.length, self.plane.settings)
            self._hold_body(self._held, rest)
        else:
            self._choose_and_attempt()

    def _must_hold_body(self) -> bool:
        """Say whether the body is needed to choose; not a large one, nor one that waits to be asked for."""
        head = self.head
        return head.length <= MAX_HELD_BYTES and self._place.needs_body() and not find_field(head.section, b"expect")

    def _hold_body(self, held: HeldBody, data: bytes) -> None:
        """Wait for the whole body of the request, which says where its client belongs; not for a large one."""
        try:
            held.feed(data)
        except BodyError as error:
            self.fail(RequestError(str(error), phase="body"))
            return
        if len(held.payload) > self.plane.settings.body_bytes:
            self.fail(_too_large())
        elif held.is_whole or held.is_too_long:
            self._rest, self._held = bytes(held.raw), None
            if held.is_whole:
                self._place.read_body(held.payload)
            self._choose_and_attempt()
        else:
            self.downstream.deadline = self.plane.now + self.plane.settings.timeouts.body_idle_s

    def _allows_origin(self) -> bool:
        rules, section = self.plane.settings.origins, self.head.section
        if rules is None:
            return True
        count = count_fields(section, b"origin")
        origin = find_field(section, b"origin") if count else None
        return count <= 1 and rules.allows(origin, self.head.host)

    def _choose_and_attempt(self, *, has_waited: bool = False) -> None:
        """Choose an upstream and try it; wait for it, or answer, where there is none."""
        try:
            pool = self._place.choose(has_waited=has_waited)
        except (UpstreamGone, UpstreamUnavailable, RequestError) as error:
            self.fail(error)
            return
        if pool is None:
            self._pause_request()
            spawn(self._wait(), "wait for an upstream")
        else:
            self._attempt(pool)

    def _attempt(self, pool: Pool) -> None:
        """Send the request over a pooled connection, or dial first."""
        self._attempts += 1
        connection = pool.take(is_idempotent=self._is_repeatable)
        if connection is not None:
            self._send(connection)
        else:
            self._pause_request()
            spawn(self._dial(pool), "dial")

    def _send(self, connection: UpstreamConnection) -> None:
        """Send the head and what there is of the body."""
        self._connection = connection
        connection.exchange = self
        self._sent_at = perf_counter_ns()
        connection.transport.write(
            write_request_head(self._sent_head, self.downstream.forwarded, self.request_id, connection.pool.authority)
        )
        self._rearm()
        if self._request is None:
            return
        self.downstream.resume_reading()  # before anything is written, which may pause it again
        rest, self._rest = self._rest, b""
        if rest:
            self.on_request_body(rest)
        if self.is_reading_request and self.downstream.has_eof:  # no more of it will come
            self.on_client_lost()
            self.downstream.abort()

    def on_request_body(self, data: bytes) -> None:
        """Send on what came of the body."""
        connection, relay = self._connection, self._request
        if connection is None or relay is None:
            if self._held is not None:
                self._hold_body(self._held, data)
            else:
                self._rest += data  # no upstream yet, and the client is paused
            return
        try:
            framed = relay.feed(data)
        except BodyError as error:
            self.fail(RequestError(str(error), phase="body"))
            return
        if relay.relayed_bytes > self.plane.settings.body_bytes:
            self.fail(_too_large())
            return
        if framed:
            connection.transport.write(framed)
        if relay.is_done:
            self.is_reading_request = False
            self.downstream.hold(relay.excess)
        self._rearm()

    def _rearm(self) -> None:
        """Set the deadline for what is to come next."""
        timeouts, downstream = self.plane.settings.timeouts, self.downstream
        if self.is_reading_request:
            timeout_s = timeouts.body_idle_s
        elif self._response_head is None:
            timeout_s = timeouts.websocket_handshake_s if self.head.is_upgrade else timeouts.response_s
        elif downstream.is_blocked:
            timeout_s = timeouts.send_s
        else:
            timeout_s = self._idle_s
        downstream.deadline = self.plane.now + timeout_s

    def on_response_head(self, head: ResponseHead, rest: bytes) -> None:
        """Pass on the head, with the affinity cookie where one is due, and what there is of the body."""
        connection, pool = self._connection, self._place.pool
        if connection is None or pool is None:
            return
        if head.status < 200:  # noqa: PLR2004 -- RFC 9110, section 15.2
            self._on_interim(connection, head, rest)
            return
        connection.reads_head = False
        self._response_head = head
        self._status = head.status
        pool.counters.observe_response(perf_counter_ns() - self._sent_at)
        if self.is_reading_request:
            self._keep_alive = False  # the rest of the body may never come
        length = head.length
        is_chunked = length < 0 and not self.head.is_http_10
        plane = self.plane
        is_last = plane.is_stopping or (plane.is_leaving and self.downstream.is_tls)
        if (length < 0 and not is_chunked) or is_last:
            self._keep_alive = False
        hears_body = self._learning is not None and self._learning.hear_head(head)
        out = self._write_response_head(head, is_chunked=is_chunked)
        if length == len(rest):  # the common case: all of it is here
            if hears_body and self._learning is not None:
                self._learning.hear_response(rest)
            self.downstream.transport.write(out + rest if length else out)
            pool.counters.cells[SENT_BYTES] += length
            self._finish(is_reusable=head.keep_alive)
        elif length == 0:  # and yet something came
            self.downstream.transport.write(out)
            self._finish(is_reusable=False)
        else:
            self._response = Relay(length, self.plane.settings, is_chunked=is_chunked)
            if hears_body and self._learning is not None:
                self._response.hear = self._learning.hear_response
            is_event_stream = _EVENT_STREAM.match(find_field(head.section, b"content-type")) is not None
            self._idle_s = math.inf if is_event_stream else self.plane.settings.timeouts.response_idle_s
            self._relay_response(self._response, rest, out)

    def _write_response_head(self, head: ResponseHead, *, is_chunked: bool) -> bytes:
        framing = b"Transfer-Encoding: chunked\r\n" if is_chunked else b""
        if not self._keep_alive:
            framing += b"Connection: close\r\n"
        elif self.head.is_http_10:
            framing += b"Connection: keep-alive\r\n"
        if not head.has_date:
            framing += self.plane.date_line  # RFC 9110, section 6.6.1
        if head.has_cookies:
            self._drop_cookies(head)
        if head.pin is not None:
            self._place.obey(head.pin)
        return write_response_head(head, self._place.write_cookie(head.cache_control), framing)

    def _drop_cookies(self, head: ResponseHead) -> None:
        """Take out what the application sets in place of the affinity cookie."""
        writer = self._place.cookie_writer
        if writer is not None:
            head.section = writer.drop_foreign(head.section)

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
            self.downstream.transport.write(write_response_head(head))
        if rest:
            connection.data_received(rest)

    def _open_tunnel(self, connection: UpstreamConnection, head: ResponseHead, rest: bytes) -> None:
        place, downstream = self._place, self.downstream
        pool = place.pool
        if pool is None:
            return
        self._status = head.status
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        self._drop_cookies(head)
        if head.pin is not None:
            place.obey(head.pin)
        learning = self._learning
        if learning is not None:
            learning.hear_head(head)
        downstream.transport.write(write_response_head(head, place.write_cookie(None), upgrade))
        pool.counters.observe_response(perf_counter_ns() - self._sent_at)
        record = self._describe() if self.plane.log is not None else None
        tunnel = Tunnel(self.plane, pool, place.hold_tunnel(), record, downstream.forwarded.origin)
        self._connection = connection.exchange = None
        self._record("ok")
        early = downstream.become_tunnel()
        tunnel.open(downstream.transport, connection.transport)
        if learning is not None:
            learning.overhear(tunnel, partial(_learn_at, place, pool))
        if rest:
            _receive(connection.transport, rest)
        if early:
            _receive(downstream.transport, early)
        if downstream.has_eof:
            tunnel.client.eof_received()
        if self.plane.is_stopping:
            tunnel.shut()

    def on_response_body(self, data: bytes) -> None:
        """Pass on what came of the body."""
        if self._response is not None:
            self._relay_response(self._response, data, b"")

    def _relay_response(self, relay: Relay, data: bytes, head: bytes) -> None:
        try:
            framed = relay.feed(data)
        except BodyError as error:
            self.downstream.transport.write(head)
            self._truncate(f"the upstream sent {error}")
            return
        downstream = self.downstream
        if not (self.is_reading_request or downstream.is_blocked):
            downstream.deadline = self.plane.now + self._idle_s  # the write below sets another where it is not taken
        if head or framed:
            downstream.transport.write(head + framed if head else framed)
        if relay.is_done:
            response = self._response_head
            self._finish(is_reusable=response is not None and response.keep_alive and not relay.excess)

    def _finish(self, *, is_reusable: bool) -> None:
        """End an exchange whose response was passed on whole."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self.downstream.is_blocked:
                self.plane.crowd.resume(connection.transport)  # it was paused for this client only
            if self._request is not None and connection.transport.get_write_buffer_size():
                is_reusable = False  # the upstream has not taken the body, and perhaps never will
            connection.release(reusable=is_reusable and not self.is_reading_request)
        self._record("ok")
        self.downstream.on_exchange_end(keep_alive=self._keep_alive, is_request_whole=not self.is_reading_request)

    def _record(self, attempt: str) -> None:
        """Count and log the exchange, once."""
        self._is_over = True
        plane, place = self.plane, self._place
        pool = place.pool
        if plane.log is not None and self._status != _SWITCHING:  # a tunnel is logged when it ends
            plane.log(self._describe())
        if pool is None:
            counters = place.cluster.none
        else:
            counters = pool.counters
            counters.count_attempt(attempt)
            place.leave()
        if place.outcome is Outcome.HIT:
            plane.counters.cells[HITS] += 1
        else:
            plane.counters.cells[AFFINITY[place.outcome]] += 1
        if self._request is not None:
            counters.cells[RECEIVED_BYTES] += self._request.relayed_bytes
        if self._response is not None:
            counters.cells[SENT_BYTES] += self._response.relayed_bytes
        counters.count_exchange(self.head.method, self._status)
        if self._status != _SWITCHING:
            counters.observe_duration(perf_counter_ns() - self._started_at)

    def _describe(self) -> Record:
        head, place = self.head, self._place
        return Record(
            kind="exchange",
            request_id=self.request_id.decode("ascii"),
            client=client_address(self.downstream.forwarded.origin, head, self.plane.settings.trusted),
            method=head.method,
            target=head.target,
            host=head.host,
            status=self._status,
            upstream="" if place.pool is None else place.pool.upstream_id,
            affinity=place.outcome,
            attempts=self._attempts,
            duration_s=(perf_counter_ns() - self._started_at) / NS,
            received_bytes=0 if self._request is None else self._request.relayed_bytes,
            sent_bytes=self._sent_bytes,
            referer=find_field(head.section, b"referer"),
            user_agent=find_field(head.section, b"user-agent"),
            error=self._error,
        )

    @property
    def _sent_bytes(self) -> int:
        """Return the body bytes passed on to the client; without a relay all of them went with the head."""
        if self._response is not None:
            return self._response.relayed_bytes
        return 0 if self._response_head is None else self._response_head.length

    # Waiting

    def _pause_request(self) -> None:
        if self.is_reading_request:
            self.downstream.pause_reading()

    async def _wait(self) -> None:
        """Hold the request until its upstream is back, as long as the rules say, then look for another."""
        plane, place = self.plane, self._place
        now = plane.loop.time
        until = self._wait_until = self._wait_until or now() + place.cluster.snapshot.rules.wait_s
        while not self._is_over and (left_s := until - now()) > 0:
            await plane.wait_for_change(min(left_s, _LOOK_AGAIN_S))
            if place.is_back():
                place.start_over()
                break
        if not self._is_over:
            self._choose_and_attempt(has_waited=now() >= until)

    async def _dial(self, pool: Pool) -> None:
        """Open a connection and go on; where there is none to be had, break the pin and choose again."""
        try:
            connection = await pool.dial()
        except (ConnectionRefusedError, FileNotFoundError):
            self.plane.report(pool.upstream_id, HealthEvent.REFUSED)
            self._on_unreachable(pool, "refused")
        except TimeoutError:
            self._on_unreachable(pool, "timeout")
        except OSError as error:
            logger.warning("cannot connect to upstream %s: %s", pool.upstream_id, error)
            self._on_dial_error(pool, error)
        else:
            if pool.digest not in self._place.cluster.snapshot.pinnable:
                self.plane.report(pool.upstream_id, HealthEvent.CONNECTED)
            if self._is_over:
                pool.give_back(connection)
            elif connection.is_closing:
                self.on_upstream_lost(connection, None)  # it accepted and closed at once
            else:
                self._send(connection)

    def _on_dial_error(self, pool: Pool, error: OSError) -> None:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            self.fail(UpstreamUnavailable("the proxy has no descriptor left", proxy_status="proxy_internal_error"))
        else:
            is_alive = isinstance(error, ConnectionError) and pool.endpoint.tls is not None  # it accepted, at least
            self._on_unreachable(pool, "tls" if is_alive or isinstance(error, ssl.SSLError) else "error")

    def _on_unreachable(self, pool: Pool, outcome: str) -> None:
        pool.counters.count_attempt(outcome)
        if self._is_over:
            return
        if self._place.is_pinned and outcome in _NOT_DEAD:
            # The client keeps its pin, and hears what is wrong with its upstream.
            status, reason, proxy_status = _NOT_DEAD[outcome]
            self.fail(ResponseError(reason, status=status, phase="connect", proxy_status=proxy_status))
            return
        self._place.give_up(pool)
        self._choose_and_attempt()

    # When something is not well

    def on_upstream_lost(self, connection: UpstreamConnection, error: Exception | None) -> None:
        """Act on the end of the upstream's connection, which is clean only for a body that ends with it."""
        self._connection = connection.exchange = None
        response, relay = self._response_head, self._response
        if response is None:
            if self._may_retry(connection):
                self._retry()
            else:
                self.fail(ResponseError("the upstream closed the connection without answering",
                                        proxy_status="connection_terminated"))  # fmt: skip
        elif response.length == UNTIL_CLOSE and connection.has_eof and error is None and relay is not None:
            self.downstream.transport.write(relay.end())
            self._finish(is_reusable=False)
        else:
            self._truncate("the upstream broke off its response")

    @property
    def _is_repeatable(self) -> bool:
        return self._request is None and self.head.method in _IDEMPOTENT

    def _may_retry(self, connection: UpstreamConnection) -> bool:
        """Say whether the request may be sent again: it met the end of an idle connection, and is safe to repeat."""
        return connection.is_reused and self._is_repeatable and not self._interim and not connection.has_begun

    def _retry(self) -> None:
        pool = self._place.pool
        if pool is not None:
            pool.counters.count_attempt("closed")
            self._attempts += 1
            spawn(self._dial(pool), "dial again")

    def fail(self, error: ExchangeError) -> None:
        """End the exchange with an error: answered if nothing was passed on yet, else visibly cut."""
        if self._is_over:
            return
        if self._response_head is not None:
            self._truncate(error.reason)
            return
        self._drop_connection()
        self._error = error.reason
        self._status = error.status
        is_whole = not self.is_reading_request
        keep_alive = self._keep_alive and is_whole and not self.plane.is_stopping
        date_line = self.plane.date_line
        self.downstream.transport.write(
            write_error(error, self.head, self.request_id, date_line, keep_alive=keep_alive)
        )
        self._record(error.proxy_status)
        if error.side != "downstream":
            logger.warning("%d for request %s: %s", error.status, self.request_id.decode(), error.reason)
        self.downstream.on_exchange_end(keep_alive=keep_alive, is_request_whole=is_whole)

    def _truncate(self, reason: str) -> None:
        """Cut a response that cannot be completed: the client must not take it for whole (RFC 9112, section 8)."""
        self._drop_connection()
        self._error = reason
        self._record("truncated")
        logger.warning("response cut for request %s: %s", self.request_id.decode(), reason)
        self.downstream.cut(is_delimited=self._response is not None and self._response.is_delimited)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(reusable=False)

    def on_timeout(self) -> None:
        """Act on the deadline of the downstream: what was to come next has not come."""
        if self.is_reading_request and self.downstream.is_paused:
            if not self._is_taken(self._connection):
                self.fail(ResponseError("the upstream did not take the request body in time", status=504,
                                        proxy_status="http_response_timeout"))  # fmt: skip
        elif self.is_reading_request:
            self.fail(RequestError("the request body did not arrive in time", status=408, phase="body"))
        elif self._response_head is None:
            self.fail(ResponseError("the upstream did not answer in time", status=504,
                                    proxy_status="http_response_timeout"))  # fmt: skip
        elif not self.downstream.is_blocked:
            self._truncate("the upstream sent nothing more of its response in time")
        elif not self._is_taken(self.downstream):
            self._give_up("the client took nothing of the response in time")
            self.downstream.abort()

    def _is_taken(self, side: Downstream | UpstreamConnection | None) -> bool:
        """Say whether a side has taken something since it was last looked at: slow, but it goes on."""
        before, self._taken = self._taken, 0 if side is None else count_taken(side.transport)
        if self._taken > before:
            self._rearm()
            return True
        return False

    def on_client_lost(self) -> None:
        """Stop work for a client that went away; its upstream sees the connection close, and is not blamed."""
        if not self._is_over:
            self._give_up("the client went away")

    def _give_up(self, reason: str) -> None:
        self._drop_connection()
        self._status = _CLIENT_GONE
        self._error = reason
        self._record("client_gone")

    def resume_request(self) -> None:
        """Take more of the request, whose upstream has taken what there was; the client's time begins anew."""
        if self.is_reading_request:
            self._rearm()
        self.downstream.resume_reading()

    def pause_request(self) -> None:
        """Take no more of the request while its upstream takes none."""
        self.downstream.pause_reading()
        if self._connection is not None:
            self._taken = count_taken(self._connection.transport)

    def pause_response(self) -> None:
        """Read no more of the response while the client takes none."""
        if self._connection is not None:
            self.plane.crowd.pause(self._connection.transport)
            if not self.is_reading_request:
                self._taken = count_taken(self.downstream.transport)
                self._rearm()

    def resume_response(self) -> None:
        """Read the response again."""
        if self._connection is not None:
            self.plane.crowd.resume(self._connection.transport)
            self._rearm()

    @override
    def __repr__(self) -> str:
        side = "request" if self.is_reading_request else "response" if self._response_head else "waiting"
        return f"<Exchange {self.head.method.decode('latin-1')} {side} attempts={self._attempts}>"


def _learn_at(place: Placement, pool: Pool | None, key: Key, value: bytes) -> None:
    """Remember a key that an exchange has told, at its upstream, or a tunnel, at the one of `pool`."""
    place.learn(Found(key, value), pool)


def _receive(transport: asyncio.Transport, data: bytes) -> None:
    """Give bytes that came early to whom the connection belongs now."""
    cast("asyncio.Protocol", transport.get_protocol()).data_received(data)


def _too_large() -> RequestError:
    return RequestError("the request body is too large", status=413, phase="body")
