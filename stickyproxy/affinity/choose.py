"""The choice of an upstream for one exchange: the ladder, from the token down to the policy.

`choose` decides and returns; it writes no cookie, moves no session and opens no connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.policy import choose_rendezvous
from stickyproxy.affinity.snapshot import AdminState

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy.affinity.policy import Chance
    from stickyproxy.affinity.sessions import Session
    from stickyproxy.affinity.snapshot import Snapshot, Upstream


class Outcome(StrEnum):
    """How the upstream of an exchange was found; the label values of `affinity_total`."""

    HIT = "hit"  # the token's upstream
    LEARNED = "learned"  # where a key was made by the app
    HASHED = "hashed"  # where a key that the client has made leads to
    GONE = "gone"  # the upstream that has made the key is gone: answered in its place
    NEW = "new"  # no token: placed by the policy and pinned
    INVALID = "invalid"  # forged, cut or unknown token: treated as new
    EXPIRED = "expired"  # the token's lifetime is over: treated as new
    REDISPATCHED = "redispatched"  # the pin was broken and another upstream chosen
    ADDRESS = "address"  # hashed from the client's address
    UNPINNED = "unpinned"  # affinity by cookie is off: placed by the policy alone
    WAIT = "wait"  # the pinned upstream cannot be used: hold the request until it is back
    REFUSED = "refused"  # the pinned upstream cannot be used, and the file says not to look for another
    FULL = "full"  # every upstream that can be used holds as many sessions as it may
    NONE = "none"  # no upstream can be used


class BreakReason(StrEnum):
    """Why a pin was broken; the label values of `affinity_breaks_total`."""

    REFUSED = "refused"  # nothing listens at its address any more
    REMOVED = "removed"  # it is no longer in the configuration
    MAINT = "maint"  # the operator took it out
    UNREACHABLE = "unreachable"  # this exchange tried it in vain
    RELEASED = "released"  # the app has said so
    MOVED = "moved"  # the app has named another upstream
    CLOSED = "closed"  # the time that it had to drain is over, and nothing of the session is open


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided: `upstream` is None for WAIT, REFUSED, FULL and NONE; `broken` says why a pin ends."""

    upstream: Upstream | None
    outcome: Outcome
    broken: BreakReason | None = None


NO_CHOICE: Final = Choice(None, Outcome.NONE)
ALL_FULL: Final = Choice(None, Outcome.FULL)


@dataclass(frozen=True, slots=True)
class Question:
    """What the slow path asks: who is it, and what was tried already.

    `token` says how the token looked where there is no session; `key` is one that the client has made, `address_key`
    its address where the last rung of the ladder may be used; `tried` holds the digests of upstreams that this exchange
    found dead.
    """

    session: Session | None
    token: Outcome = Outcome.NEW
    key: bytes | None = None
    address_key: bytes | None = None
    tried: frozenset[bytes] = frozenset()
    has_waited: bool = False


def choose(snapshot: Snapshot, question: Question, chance: Chance, load: Callable[[Upstream], float]) -> Choice:
    """Choose an upstream; `load` gives the sessions of one. O(1) for a pin that holds, O(n) for a new client."""
    if question.session is None:
        return _place(snapshot, question, chance, load)
    pinned = snapshot.by_digest.get(question.session.digest)
    reason = why_broken(snapshot, question.session, question.tried)
    if reason is None:
        return Choice(pinned, Outcome.HIT)
    if pinned is not None and not pinned.is_closing:  # else it will not come back
        if snapshot.rules.on_unavailable == "refuse":
            return Choice(None, Outcome.REFUSED)
        if snapshot.rules.on_unavailable == "wait" and not question.has_waited:
            return Choice(None, Outcome.WAIT)
    candidates = _untried(snapshot, question)
    if not candidates:
        return NO_CHOICE
    if pinned in candidates:  # none is better off: the pin holds until one is
        return Choice(pinned, Outcome.HIT)
    candidates = _with_room(snapshot, candidates, load)
    if not candidates:
        return ALL_FULL
    if snapshot.rules.is_shared:
        return Choice(choose_rendezvous(candidates, question.session.client_id), Outcome.REDISPATCHED, reason)
    return Choice(chance.choose(snapshot, candidates, load), Outcome.REDISPATCHED, reason)


def why_broken(snapshot: Snapshot, session: Session, tried: frozenset[bytes]) -> BreakReason | None:
    """Return why the pin of a session does not hold, or None where it does; O(1)."""
    pinned = snapshot.by_digest.get(session.digest)
    if pinned is None:
        return BreakReason.REMOVED
    if pinned.admin is AdminState.MAINT:
        return BreakReason.MAINT
    if pinned.is_refused:
        return BreakReason.REFUSED
    if pinned.digest in tried:
        return BreakReason.UNREACHABLE
    return BreakReason.CLOSED if pinned.is_closing and not session.open else None


def _place(snapshot: Snapshot, question: Question, chance: Chance, load: Callable[[Upstream], float]) -> Choice:
    candidates = _untried(snapshot, question)
    if not candidates:
        return NO_CHOICE
    candidates = _with_room(snapshot, candidates, load)
    if not candidates:
        return ALL_FULL
    if question.key is not None:
        return Choice(choose_rendezvous(candidates, question.key), Outcome.HASHED)
    if question.address_key is not None:
        return Choice(choose_rendezvous(candidates, question.address_key), Outcome.ADDRESS)
    outcome = question.token if snapshot.rules.has_cookie else Outcome.UNPINNED
    return Choice(chance.choose(snapshot, candidates, load), outcome)


def _with_room(
    snapshot: Snapshot, candidates: tuple[Upstream, ...], load: Callable[[Upstream], float]
) -> tuple[Upstream, ...]:
    """Return the upstreams that hold fewer sessions than they may."""
    if not snapshot.may_be_full:
        return candidates
    return tuple(u for u in candidates if u.max_sessions is None or load(u) < u.max_sessions)


def _untried(snapshot: Snapshot, question: Question) -> tuple[Upstream, ...]:
    """Return the upstreams for a new client; once all were tried, the wanted ones that the guard left out."""
    if not question.tried:
        return snapshot.candidates
    left = tuple(u for u in snapshot.candidates if u.digest not in question.tried)
    return left or tuple(u for u in snapshot.upstreams if u.is_wanted and u.digest not in question.tried)
