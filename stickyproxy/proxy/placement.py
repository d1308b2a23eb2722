"""Where one exchange goes, and why: its client's session, the choice, and what is counted at the upstream chosen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stickyproxy.affinity.choose import BreakReason, Outcome, Question, choose, why_broken
from stickyproxy.errors import RequestError, UpstreamGone, UpstreamUnavailable
from stickyproxy.observe.counters import BREAKS, IN_FLIGHT, KEY_CONFLICTS
from stickyproxy.wire.cookies import is_shared_cacheable
from stickyproxy.wire.forwarded import client_address
from stickyproxy.wire.headers import find_field

if TYPE_CHECKING:
    from stickyproxy.affinity.choose import Choice
    from stickyproxy.affinity.keys import Found
    from stickyproxy.affinity.sessions import Session
    from stickyproxy.proxy.cluster import Cluster
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool
    from stickyproxy.wire.cookies import CookieWriter
    from stickyproxy.wire.forwarded import ForwardedWriter
    from stickyproxy.wire.request_head import RequestHead

logger = logging.getLogger(__name__)

_FULL_RETRY_S = 10  # sessions end by the minute


class Placement:
    """The placement of one exchange; `pool` is the upstream's that it is counted at, None before and after."""

    __slots__ = (
        "_forwarded", "_head", "_is_apart", "_is_new", "_is_placed", "_is_released", "_key", "_new_keys", "_plane",
        "_route_writer", "_rung", "_sets_cookie", "_token", "_tried", "cluster", "outcome", "pool", "session",
    )  # fmt: skip

    def __init__(
        self,
        plane: Plane,
        cluster: Cluster,
        head: RequestHead,
        forwarded: ForwardedWriter,
        cookie_writer: CookieWriter | None = None,
    ) -> None:
        self._plane = plane
        self.cluster = cluster
        self._route_writer = cookie_writer
        self._head = head
        self._forwarded = forwarded
        self._is_new = False  # the session was made for this exchange, and its client does not hold the token yet
        self._is_placed = False  # the upstream was chosen for the client just now
        self._token = Outcome.NEW
        self._rung = Outcome.HIT  # that the session was found by
        self._key: Found | None = None  # that leads to where the session is pinned
        self._new_keys: list[Found] | None = None  # made by the client, and to be remembered where it is placed
        self._is_apart = False  # the key leads elsewhere than the token, which stays what it is
        self._is_released = False
        self._sets_cookie = False
        self._tried: frozenset[bytes] = frozenset()
        self.session: Session | None = None
        self.outcome = Outcome.NONE
        self.pool: Pool | None = None

    @property
    def cookie_writer(self) -> CookieWriter | None:
        """Return what writes the cookie: the writer of the route, if it has one, or that of the cluster."""
        return self._route_writer or self.cluster.cookie_writer

    def read_pin(self) -> None:
        """Find out where the client belongs: by the keys that the request carries, and by its token."""
        self._read_token()
        keys = self.cluster.keys
        if keys is not None:
            self._climb(keys.read(self._head))

    def needs_body(self) -> bool:
        """Say whether the body of the request is needed to find out where the client belongs."""
        keys = self.cluster.keys
        return (
            keys is not None
            and self._rung is not Outcome.LEARNED
            and keys.reads_body(self._head.target, is_pinned=self.session is not None)
        )

    def read_body(self, body: bytes | bytearray) -> None:
        """Look for keys in the body of the request."""
        keys = self.cluster.keys
        if keys is not None:
            self._climb(keys.read_body(self._head.target, body))

    def _climb(self, found: list[Found]) -> None:
        """Look where keys lead: those of the app count before the token, those of the client after it."""
        for one in found:
            digest = self._plane.keys.find(one.stored, self._plane.now, one.key.idle_s)
            is_learned = one.key.mode == "learn"
            if digest is None:
                if not is_learned:
                    self._new_keys = [*(self._new_keys or ()), one]
            elif self.session is None or (is_learned and self._rung is not Outcome.LEARNED):
                self._follow(one, digest, Outcome.LEARNED if is_learned else Outcome.HASHED)
            elif self.session.digest != digest:
                self._plane.counters.cells[KEY_CONFLICTS] += 1

    def _follow(self, found: Found, digest: bytes, rung: Outcome) -> None:
        """Take the client for pinned where a key leads to, whatever its token says."""
        self._key, self._rung = found, rung
        if self.session is None:
            self._sets_cookie = True
        elif self.session.digest == digest:
            return
        else:  # which is of another tab, say
            self._plane.counters.cells[KEY_CONFLICTS] += 1
            self._is_apart = True
        self.session = self._plane.sessions.hold(found.client_id, digest, self._plane.wall)

    def _read_token(self) -> None:
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
        plane, cluster, session = self._plane, self.cluster, self.session
        if session is not None and not self._tried and session.digest in cluster.snapshot.pinnable:
            self.outcome = self._rung
            return self._enter(plane.pools[session.digest])
        if session is not None and self._is_of_another_app(session):
            self.session = self._key = session = None  # as good as none here; there it holds
            self._sets_cookie = self._is_apart = False
        self._check_gone()
        question = Question(
            session=None if self._is_new else session,
            token=self._token,
            # The client id, by which it is placed anew too: who comes first and who comes while its upstream dies meet.
            key=self._new_keys[0].client_id if self._new_keys else None,
            address_key=self._address_key() if session is None else None,
            tried=self._tried,
            has_waited=has_waited,
        )
        return self._act_on(choose(cluster.snapshot, question, cluster.chance, plane.load))

    def _is_of_another_app(self, session: Session) -> bool:
        """Say whether a client is pinned to an upstream of another cluster."""
        if session.digest in self.cluster.snapshot.by_digest:
            return False
        return self._plane.find_cluster(session.digest) is not None

    def _check_gone(self) -> None:
        """Raise UpstreamGone where all that the request is about was in a process that is gone."""
        key, session = self._key, self.session
        if key is None or session is None or (answer := key.key.gone) is None:
            return
        if why_broken(self.cluster.snapshot, session, self._tried) is not None:
            self.outcome = Outcome.GONE
            raise UpstreamGone(f"the upstream of this {key.key.name} is gone", status=answer.status,
                               content_type=answer.content_type, body=answer.body)  # fmt: skip

    def _act_on(self, choice: Choice) -> Pool | None:
        plane = self._plane
        self.outcome = choice.outcome
        if choice.outcome is Outcome.WAIT:
            return None
        if choice.outcome is Outcome.FULL:
            raise UpstreamUnavailable("every upstream holds as many sessions as it may",
                                      proxy_status="connection_limit_reached", retry_after_s=_FULL_RETRY_S)  # fmt: skip
        if choice.upstream is None and not self.cluster.name:
            raise RequestError("no app is here", status=404, phase="choose", proxy_status="destination_not_found")
        if choice.upstream is None:
            raise UpstreamUnavailable("no upstream can take the request")
        pool = plane.pools[choice.upstream.digest]
        if choice.outcome is Outcome.HIT:
            self.outcome = self._rung
            # Another request of the same client has moved the session meanwhile; one that is closing keeps what it has.
            self._sets_cookie |= not choice.upstream.is_closing
            return self._enter(pool)
        if choice.broken is not None and self.session is not None:
            plane.counters.cells[BREAKS[choice.broken]] += 1
            logger.info("a client was moved to upstream %s: its own is %s", pool.upstream_id, choice.broken)
            plane.sessions.move(self.session, pool.digest, plane.wall)
            self._sets_cookie = True
            if self._key is not None:
                self.learn(self._key, pool)
        elif self._new_keys or self.cookie_writer is not None:
            client_id = self._new_keys[0].client_id if self._new_keys else plane.new_client_id()
            self.session = plane.sessions.begin(client_id, pool.digest, plane.wall)
            self._is_new = self._sets_cookie = True
        self._is_placed = True
        return self._enter(pool)

    def _address_key(self) -> bytes | None:
        """Return the client's address where it may stand in for a cookie: not for a navigation, which can get one."""
        if not self.cluster.snapshot.rules.uses_client_address:
            return None
        if find_field(self._head.section, b"sec-fetch-dest") == b"document":
            return None
        return client_address(self._forwarded.origin, self._head, self._plane.settings.trusted).encode()

    def is_back(self) -> bool:
        """Say whether the upstream that the exchange waits for can be used again, or never will be."""
        if self.session is None:
            return False
        upstream = self.cluster.snapshot.by_digest.get(self.session.digest)
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
        if self._new_keys:
            for one in self._new_keys:
                self.learn(one, pool)
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

    def learn(self, found: Found, pool: Pool | None = None) -> None:
        """Remember that a key leads to an upstream, to that of this exchange where none is given."""
        plane, pool = self._plane, pool or self.pool
        if pool is not None and plane.keys.find(found.stored, plane.now) != pool.digest:
            plane.keys.learn(found.stored, pool.digest, found.key.idle_s, plane.now)
            self.cluster.note_key(found.key.name, self._head.target)

    def obey(self, order: bytes) -> None:
        """Do what the app says of the client's pin: `release` it, or move it to the upstream of that id."""
        session = self.session
        if session is None:
            logger.warning("the app says %r of a pin, and the client has none", order[:64])
        elif order.lower() == b"release":
            self._release(session)
        else:
            self._move(session, order)

    def _release(self, session: Session) -> None:
        plane = self._plane
        self._is_released = self._head.token is not None
        self._sets_cookie = False
        plane.counters.cells[BREAKS[BreakReason.RELEASED]] += 1
        plane.sessions.end(session)
        if self._key is not None:
            plane.keys.forget(self._key.stored)

    def _move(self, session: Session, order: bytes) -> None:
        plane = self._plane
        target = next((one for one in self.cluster.snapshot.upstreams if one.id.encode() == order), None)
        if target is None or not target.accepts_pinned:
            logger.warning("the app moves a client to %r, which is no upstream that can take it", order[:64])
        elif target.digest != session.digest:
            plane.counters.cells[BREAKS[BreakReason.MOVED]] += 1
            plane.sessions.move(session, target.digest, plane.wall)
            self._sets_cookie = True
            if self._key is not None:
                self.learn(self._key, plane.pools[target.digest])

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
        if not (self._sets_cookie or self._is_released):
            return b""
        plane, session, writer = self._plane, self.session, self.cookie_writer
        if self._is_released and writer is not None:
            return writer.write_end(is_https=self._forwarded.is_https(self._head)) + b"\r\n"
        if not self._sets_cookie or self._is_apart or writer is None or session is None:
            return b""
        if is_shared_cacheable(cache_control):
            return b""
        token = plane.sessions.write_token(session, plane.wall)
        is_https = self._forwarded.is_https(self._head)
        if writer.is_weakened and not is_https:
            self._tell_weakened(writer)
        return writer.write(token, is_https=is_https) + b"\r\n"

    def _tell_weakened(self, writer: CookieWriter) -> None:
        """Say once for each cluster, or route with a cookie of its own, that the cookie is not as the file asks."""
        writer.is_weakened = False
        logger.warning(
            "the affinity cookie %s falls back to SameSite=Lax: a client came over http, where browsers refuse "
            "SameSite=None and Partitioned: pages of other sites have none. Serve https (tls of the listener), "
            "or name the proxy that does in trusted_proxies, so that its X-Forwarded-Proto is believed",
            writer.name.decode("ascii"),
        )
