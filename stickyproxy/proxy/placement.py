"""Where one exchange goes, and why: its client's session, the choice, and what is counted at the upstream chosen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stickyproxy.affinity.choose import Outcome, Question, choose
from stickyproxy.errors import UpstreamUnavailable
from stickyproxy.observe.counters import BREAKS, IN_FLIGHT
from stickyproxy.wire.cookies import is_shared_cacheable
from stickyproxy.wire.forwarded import client_address
from stickyproxy.wire.headers import find_field

if TYPE_CHECKING:
    from stickyproxy.affinity.choose import Choice
    from stickyproxy.affinity.sessions import Session
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool
    from stickyproxy.wire.forwarded import ForwardedWriter
    from stickyproxy.wire.request_head import RequestHead

logger = logging.getLogger(__name__)

_FULL_RETRY_S = 10  # sessions end by the minute


class Placement:
    """The placement of one exchange; `pool` is the upstream's that it is counted at, None before and after."""

    __slots__ = ("_forwarded", "_head", "_is_new", "_is_placed", "_plane", "_sets_cookie", "_token", "_tried",
                 "outcome", "pool", "session")  # fmt: skip

    def __init__(self, plane: Plane, head: RequestHead, forwarded: ForwardedWriter) -> None:
        self._plane = plane
        self._head = head
        self._forwarded = forwarded
        self._is_new = False  # the session was made for this exchange, and its client does not hold the token yet
        self._is_placed = False  # the upstream was chosen for the client just now
        self._token = Outcome.NEW
        self._sets_cookie = False
        self._tried: frozenset[bytes] = frozenset()
        self.session: Session | None = None
        self.outcome = Outcome.NONE
        self.pool: Pool | None = None

    def read_token(self) -> None:
        """Take the client's token for what it is worth."""
        plane, value = self._plane, self._head.token
        if value is None:
            return
        wall = plane.wall
        presented = plane.sessions.present(value, wall)
        if presented is None:
            self._token = Outcome.INVALID
        elif presented.expires_at < wall:
            self._token = Outcome.EXPIRED
        else:
            self.session = session = presented.session
            # The client's token lags behind where its session was moved by another request, or has become old.
            self._sets_cookie = presented.digest != session.digest or presented.refresh_at <= wall

    def choose(self, *, has_waited: bool = False) -> Pool | None:
        """Choose an upstream and return its pool, or None to wait for it; raise UpstreamUnavailable.

        `has_waited` says that the time to wait is over.
        """
        plane, session = self._plane, self.session
        if session is not None and not self._tried and session.digest in plane.snapshot.pinnable:
            self.outcome = Outcome.HIT
            return self._enter(plane.pools[session.digest])
        question = Question(
            session=None if self._is_new else session,
            token=self._token,
            address_key=self._address_key() if session is None else None,
            tried=self._tried,
            has_waited=has_waited,
        )
        return self._act_on(choose(plane.snapshot, question, plane.chance, plane.load))

    def _act_on(self, choice: Choice) -> Pool | None:
        plane = self._plane
        self.outcome = choice.outcome
        if choice.outcome is Outcome.WAIT:
            return None
        if choice.outcome is Outcome.FULL:
            raise UpstreamUnavailable("every upstream holds as many sessions as it may",
                                      proxy_status="connection_limit_reached", retry_after_s=_FULL_RETRY_S)  # fmt: skip
        if choice.upstream is None:
            raise UpstreamUnavailable("no upstream can take the request")
        pool = plane.pools[choice.upstream.digest]
        if choice.outcome is Outcome.HIT:
            # Another request of the same client has moved the session meanwhile; one that is closing keeps what it has.
            self._sets_cookie |= not choice.upstream.is_closing
            return self._enter(pool)
        if choice.broken is not None and self.session is not None:
            plane.counters.cells[BREAKS[choice.broken]] += 1
            logger.info("a client was moved to upstream %s: its own is %s", pool.upstream_id, choice.broken)
            plane.sessions.move(self.session, pool.digest, plane.wall)
            self._sets_cookie = True
        elif plane.cookie_writer is not None:
            self.session = plane.sessions.begin(plane.new_client_id(), pool.digest, plane.wall)
            self._is_new = self._sets_cookie = True
        self._is_placed = True
        return self._enter(pool)

    def _address_key(self) -> bytes | None:
        """Return the client's address where it may stand in for a cookie: not for a navigation, which can get one."""
        if not self._plane.snapshot.rules.uses_client_address:
            return None
        if find_field(self._head.section, b"sec-fetch-dest") == b"document":
            return None
        return client_address(self._forwarded.origin, self._head, self._plane.settings.trusted).encode()

    def is_back(self) -> bool:
        """Say whether the upstream that the exchange waits for can be used again, or never will be."""
        if self.session is None:
            return False
        upstream = self._plane.snapshot.by_digest.get(self.session.digest)
        return upstream is None or upstream.is_closing or upstream.accepts_pinned

    def start_over(self) -> None:
        """Forget what was tried in vain: the upstream that the exchange waited for is back, or gone for good."""
        self._tried = frozenset()

    def give_up(self, pool: Pool) -> None:
        """End the count at an upstream that was tried in vain; the next choice will be another."""
        self._uncount()
        self._tried |= {pool.digest}

    @property
    def is_pinned(self) -> bool:
        """Say whether the client was pinned before this exchange."""
        return self.session is not None and not self._is_new

    def _enter(self, pool: Pool) -> Pool:
        """Count the exchange as under way at an upstream; `leave` undoes it."""
        self.pool = pool
        pool.counters.cells[IN_FLIGHT] += 1
        session = self.session
        if session is None or self._is_new:
            pool.strangers += 1
            if self._is_placed:
                self._plane.show_load(pool)
        else:
            session.open += 1
            is_back = session.active_at != self._plane.now and self._plane.sessions.touch(session, self._plane.now)
            if is_back and not self._is_placed:
                pool.on_return(self._plane.wall - session.pinned_at)
        return pool

    def leave(self) -> None:
        """End the count that `choose` began; a new client then counts as placed just now."""
        pool = self.pool
        self._uncount()
        if pool is not None and self._is_placed and (self.session is None or self._is_new):
            pool.placed += 1

    def _uncount(self) -> None:
        pool, self.pool = self.pool, None
        if pool is None:
            return
        pool.counters.cells[IN_FLIGHT] -= 1
        if self.session is None or self._is_new:
            pool.strangers -= 1
        else:
            self.session.open -= 1

    def hold_tunnel(self) -> Session | None:
        """Count a tunnel in place of an exchange, and return its session: a client that holds a tunnel is one.

        The tunnel undoes it: `open` of the session, or `strangers` of the pool where there is none.
        """
        session, pool = self.session, self.pool
        self._is_placed = False  # the tunnel counts for the client from now on
        if session is None:
            if pool is not None:
                pool.strangers += 1
            return None
        if self._is_new and pool is not None:
            self._is_new = False
            pool.strangers -= 1
            session.open += 1
            self._plane.sessions.touch(session, self._plane.now)
        session.open += 1
        return session

    def write_cookie(self, cache_control: bytes | None) -> bytes:
        """Return the Set-Cookie line with its CRLF, or nothing where none is due or a shared cache would keep it."""
        plane, session = self._plane, self.session
        if not self._sets_cookie or plane.cookie_writer is None or session is None:
            return b""
        if is_shared_cacheable(cache_control):
            return b""
        token = plane.sessions.write_token(session, plane.wall)
        return plane.cookie_writer.write(token, is_https=self._forwarded.is_https(self._head)) + b"\r\n"
