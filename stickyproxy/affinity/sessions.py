"""The sessions known here: which client is pinned where, and who is active.

A session is a pin in use. It begins when its client comes back with the token that it was given (a first hit alone is
no session: probes and crawlers never come back) or opens a tunnel, and ends `idle_s` after its last request once
nothing of it is open. The table also spares the MAC: a token value seen before is found by a dictionary.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from typing_extensions import override

from stickyproxy.affinity.token import Token

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stickyproxy.affinity.token import Lifetimes, TokenCodec

_MAX_VERIFIED: Final = 1 << 16  # token values remembered; 0.55 KiB each, 36 MB; beyond it one MAC is computed again
_MAX_EXPIRED_AT_ONCE: Final = 10_000  # a few ms


class Session:
    """One client's pin, as this process knows it.

    `digest` names its upstream, `pinned_at` is wall-clock seconds, `open` counts its exchanges and tunnels under way,
    `active_at` is the coarse monotonic time of its last request.
    """

    __slots__ = ("active_at", "client_id", "digest", "open", "pinned_at")

    def __init__(self, client_id: bytes, digest: bytes, pinned_at: int) -> None:
        self.client_id = client_id
        self.digest = digest
        self.pinned_at = pinned_at
        self.open = 0
        self.active_at = 0.0

    @override
    def __repr__(self) -> str:
        return f"<Session {self.client_id.hex()} at {self.digest.hex()} open={self.open}>"


class ActiveSession(NamedTuple):
    """A session as another table can take it in; `idle_s` are the seconds since its last request."""

    client_id: bytes
    digest: bytes
    pinned_at: int
    idle_s: float


class Presented:
    """A token value that was verified: its session, and what the token itself says."""

    __slots__ = ("digest", "expires_at", "refresh_at", "session")

    def __init__(self, session: Session, digest: bytes, expires_at: float, refresh_at: float) -> None:
        self.session = session
        self.digest = digest
        self.expires_at = expires_at
        self.refresh_at = refresh_at


class SessionTable:
    """All sessions of one cluster. Times called `now` are coarse monotonic seconds, `wall` seconds since 1970.

    `refresh_s` is the age at which a token is written anew, so that idle and cookie lifetimes count from the last
    visit; None when nothing needs it.
    """

    def __init__(
        self, codec: TokenCodec, lifetimes: Lifetimes, *, idle_s: float, refresh_s: float | None = None
    ) -> None:
        self._codec = codec
        self._lifetimes = lifetimes
        self._idle_s = idle_s
        self._refresh_s = refresh_s if refresh_s is not None else float("inf")
        self._verified: OrderedDict[bytes, Presented] = OrderedDict()
        self._active: OrderedDict[bytes, Session] = OrderedDict()  # by client id, longest unused first
        self.counts: dict[bytes, int] = {}
        """Active sessions by upstream digest."""
        self._changed: set[bytes] | None = None
        self._reported: dict[bytes, int] = {}

    def adopt(self, other: SessionTable) -> None:
        """Work by the secrets and lifetimes of another table from now on; the sessions stay."""
        self._codec = other._codec
        self._lifetimes = other._lifetimes
        self._idle_s = other._idle_s
        self._refresh_s = other._refresh_s
        self._verified.clear()

    def take_changes(self) -> tuple[list[Session], list[bytes]]:
        """Return the sessions that began or were moved since the last call, and the ids of the clients that ended.

        The first call begins to note them, and returns all.
        """
        changed, self._changed = self._changed, set()
        self._reported = dict(self.counts)
        if changed is None:
            return list(self._active.values()), []
        began = [self._active[client_id] for client_id in changed if client_id in self._active]
        return began, [client_id for client_id in changed if client_id not in self._active]

    def count_unreported(self, digest: bytes) -> int:
        """Return by how many the active sessions of an upstream have grown since the last `take_changes`."""
        return self.counts.get(digest, 0) - self._reported.get(digest, 0)

    def forget_changes(self) -> None:
        """Let the next `take_changes` return all sessions again."""
        self._changed = None

    def __len__(self) -> int:
        return len(self._active)

    def present(self, value: bytes, wall: float) -> Presented | None:
        """Return what a token value stands for, or None where it is invalid; one look-up if it was seen before."""
        presented = self._verified.get(value)
        if presented is None:
            token = self._codec.parse(value, wall)
            if token is None:
                return None
            presented = self._remember(value, token)
        return presented

    def _remember(self, value: bytes, token: Token) -> Presented:
        session = self.find(token.client_id, token.digest, token.pinned_at)
        presented = Presented(session, token.digest, self._lifetimes.expires_at(token), token.seen_at + self._refresh_s)
        if len(self._verified) >= _MAX_VERIFIED:
            self._verified.popitem(last=False)
        self._verified[value] = presented
        return presented

    def find(self, client_id: bytes, digest: bytes, pinned_at: int) -> Session:
        """Return the session of a client that somebody else knows to be pinned; a new one counts once it is touched.

        What is known here holds, unless the other has pinned the client later: another replica has moved it since.
        """
        session = self._active.get(client_id)
        if session is None:
            return Session(client_id, digest, pinned_at)
        if pinned_at > session.pinned_at:
            self.move(session, digest, pinned_at)
        return session

    def hold(self, client_id: bytes, digest: bytes, wall: float) -> Session:
        """Return the session of a client that is pinned to `digest`, as something else than a token says."""
        session = self._active.get(client_id)
        if session is None:
            return Session(client_id, digest, int(wall))
        if session.digest != digest:
            self.move(session, digest, wall)
        return session

    def end(self, session: Session) -> None:
        """Count the session as active no more, unless more of it is open than one exchange."""
        if self._active.get(session.client_id) is session and session.open <= 1:
            del self._active[session.client_id]
            self._count(session.digest, -1)
            self._note(session)

    def touch(self, session: Session, now: float) -> bool:
        """Count the session as active now, and say whether it was not before; at most once for each tick of `now`."""
        session.active_at = now
        known = self._active.get(session.client_id)
        if known is session:
            self._active.move_to_end(session.client_id)
            return False
        if known is not None:  # the same client, forgotten and known again by another of its tokens
            session.digest, session.pinned_at = known.digest, known.pinned_at
            self._count(known.digest, -1)
        self._active[session.client_id] = session
        self._active.move_to_end(session.client_id)
        self._count(session.digest, +1)
        self._note(session)
        return known is None

    def begin(self, client_id: bytes, digest: bytes, wall: float) -> Session:
        """Return a new session that is not counted as active until it is touched."""
        return Session(client_id, digest, int(wall))

    def move(self, session: Session, digest: bytes, wall: float) -> None:
        """Pin the session to another upstream."""
        if self._active.get(session.client_id) is session:
            self._count(session.digest, -1)
            self._count(digest, +1)
            self._note(session)
        session.digest = digest
        session.pinned_at = int(wall)

    def write_token(self, session: Session, wall: float) -> bytes:
        """Return the cookie value for the session as it is pinned now."""
        token = Token(session.digest, session.client_id, session.pinned_at, int(wall))
        return self._codec.write(token)

    def export(self, now: float, *, at_once: int) -> Iterator[tuple[ActiveSession, ...]]:
        """Yield the active sessions, longest unused first, in pieces of at most `at_once`; O(1) for each session.

        The table may be used between two pieces: what is active throughout comes at least once.
        """
        ids = iter(tuple(self._active))
        while piece := tuple(islice(ids, at_once)):
            known = (self._active.get(client_id) for client_id in piece)
            yield tuple(
                ActiveSession(one.client_id, one.digest, one.pinned_at, max(0.0, now - one.active_at))
                for one in known
                if one is not None
            )

    def take_in(self, sessions: Iterable[ActiveSession], now: float) -> None:
        """Count sessions as active that were so in another table; those used here since then are left alone.

        They come longest unused first, as `export` gives them, and count as used no earlier than all that are here
        already. O(1) for each session.
        """
        for one in sessions:
            session = self.find(one.client_id, one.digest, one.pinned_at)
            active_at = now - one.idle_s
            known = self._active.get(one.client_id)
            if known is None or active_at > known.active_at:
                last = next(reversed(self._active.values())).active_at if self._active else active_at
                self.touch(session, max(active_at, last))

    def forget_idle(self) -> None:
        """Count only the sessions of which something is open: another table has taken in the others. O(n)."""
        for session in [one for one in self._active.values() if not one.open]:
            del self._active[session.client_id]
            self._count(session.digest, -1)
            self._note(session)

    def expire(self, now: float) -> None:
        """End the sessions that have been idle too long; bounded work, so it is called again and again."""
        for _ in range(min(_MAX_EXPIRED_AT_ONCE, len(self._active))):
            client_id, session = next(iter(self._active.items()))
            if session.active_at + self._idle_s > now:
                return
            if session.open:
                session.active_at = now
                self._active.move_to_end(client_id)
            else:
                del self._active[client_id]
                self._count(session.digest, -1)
                self._note(session)

    def _note(self, session: Session) -> None:
        if self._changed is not None:
            self._changed.add(session.client_id)

    def _count(self, digest: bytes, change: int) -> None:
        count = self.counts.get(digest, 0) + change
        if count:
            self.counts[digest] = count
        else:
            self.counts.pop(digest, None)
