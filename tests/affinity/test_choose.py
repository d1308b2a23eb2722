"""The ladder: each rung, each way out of a pin that cannot be used, and what is never chosen."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest

from stickyproxy.affinity.choose import ALL_FULL, NO_CHOICE, BreakReason, Choice, Outcome, Question, choose, why_broken
from stickyproxy.affinity.policy import Chance, choose_rendezvous
from stickyproxy.affinity.sessions import Session
from stickyproxy.affinity.snapshot import AdminState, Health, OnUnavailable, Rules, Snapshot, Upstream

PINNED = Upstream("pinned")
OTHER = Upstream("other")
THIRD = Upstream("third")
SESSION = Session(b"0123456789", PINNED.digest, 0)


def first() -> float:
    return 0.0


def ask(
    question: Question,
    *upstreams: Upstream,
    on_unavailable: OnUnavailable = "redispatch",
    has_cookie: bool = True,
) -> Choice:
    """Choose with the policy "random", whose draw is always the first candidate."""
    rules = Rules(policy="random", on_unavailable=on_unavailable, has_cookie=has_cookie)
    return choose(Snapshot("default", upstreams, rules), question, Chance(first), lambda _: 0)


# A pin


class Pin(NamedTuple):
    """The pinned upstream as it stands, and why its pin ends, if it does."""

    upstream: Upstream | None
    tried: frozenset[bytes]
    broken: BreakReason | None


NOT_TRIED: frozenset[bytes] = frozenset()
PINS = {
    "ready": Pin(PINNED, NOT_TRIED, None),
    "healthy": Pin(Upstream("pinned", health=Health.HEALTHY), NOT_TRIED, None),
    "unhealthy": Pin(Upstream("pinned", health=Health.UNHEALTHY), NOT_TRIED, None),
    "drained": Pin(Upstream("pinned", admin=AdminState.DRAIN), NOT_TRIED, None),
    "drained and unhealthy": Pin(Upstream("pinned", admin=AdminState.DRAIN, health=Health.UNHEALTHY), NOT_TRIED, None),
    "another was tried": Pin(PINNED, frozenset({OTHER.digest}), None),
    "in maintenance": Pin(Upstream("pinned", admin=AdminState.MAINT), NOT_TRIED, BreakReason.MAINT),
    "refused": Pin(Upstream("pinned", is_refused=True), NOT_TRIED, BreakReason.REFUSED),
    "drained and refused": Pin(
        Upstream("pinned", admin=AdminState.DRAIN, is_refused=True), NOT_TRIED, BreakReason.REFUSED
    ),
    "in maintenance and refused": Pin(
        Upstream("pinned", admin=AdminState.MAINT, is_refused=True), NOT_TRIED, BreakReason.MAINT
    ),
    "tried in vain": Pin(PINNED, frozenset({PINNED.digest}), BreakReason.UNREACHABLE),
    "removed": Pin(None, NOT_TRIED, BreakReason.REMOVED),
}
MODES: dict[tuple[OnUnavailable, bool], Outcome] = {
    ("redispatch", False): Outcome.REDISPATCHED,
    ("redispatch", True): Outcome.REDISPATCHED,
    ("wait", False): Outcome.WAIT,
    ("wait", True): Outcome.REDISPATCHED,
    ("refuse", False): Outcome.REFUSED,
    ("refuse", True): Outcome.REFUSED,
}


@pytest.mark.parametrize("pin", PINS)
@pytest.mark.parametrize(("on_unavailable", "has_waited"), MODES)
def test_a_pin_that_holds_and_one_that_breaks(
    pin: str,
    on_unavailable: OnUnavailable,
    has_waited: bool,  # noqa: FBT001
) -> None:
    upstream, tried, broken = PINS[pin]
    upstreams = (THIRD,) if upstream is None else (upstream, THIRD)
    choice = ask(Question(SESSION, tried=tried, has_waited=has_waited), *upstreams, on_unavailable=on_unavailable)
    # One that is gone from the configuration will not come back: waiting for it or refusing would be for ever.
    outcome = Outcome.REDISPATCHED if upstream is None else MODES[on_unavailable, has_waited]
    if broken is None:
        assert choice == Choice(upstream, Outcome.HIT)
    elif outcome is Outcome.REDISPATCHED:
        assert choice == Choice(THIRD, Outcome.REDISPATCHED, broken)
    else:
        assert choice == Choice(None, outcome)


# An upstream that is closing


def session_with(count: int) -> Session:
    """Return a session at the pinned upstream of which so much is open."""
    session = Session(b"0123456789", PINNED.digest, 0)
    session.open = count
    return session


CLOSING = Upstream("pinned", admin=AdminState.DRAIN, is_closing=True)
DEAD = {
    BreakReason.MAINT: Pin(replace(CLOSING, admin=AdminState.MAINT), NOT_TRIED, BreakReason.MAINT),
    BreakReason.REFUSED: Pin(replace(CLOSING, is_refused=True), NOT_TRIED, BreakReason.REFUSED),
    BreakReason.UNREACHABLE: Pin(CLOSING, frozenset({CLOSING.digest}), BreakReason.UNREACHABLE),
}


@pytest.mark.parametrize(("on_unavailable", "has_waited"), MODES)
@pytest.mark.parametrize("admin", [AdminState.READY, AdminState.DRAIN])
@pytest.mark.parametrize("health", Health)
def test_a_pin_to_one_that_is_closing_holds_while_something_is_open_and_then_moves(
    on_unavailable: OnUnavailable,
    has_waited: bool,  # noqa: FBT001
    admin: AdminState,
    health: Health,
) -> None:
    """It is a planned end: nobody waits for it to be back, and nobody is refused."""
    closing = replace(CLOSING, admin=admin, health=health)
    for count, choice in (
        (1, Choice(closing, Outcome.HIT)),
        (0, Choice(THIRD, Outcome.REDISPATCHED, BreakReason.CLOSED)),
    ):
        question = Question(session_with(count), has_waited=has_waited)
        assert ask(question, closing, THIRD, on_unavailable=on_unavailable) == choice


@pytest.mark.parametrize(("on_unavailable", "has_waited"), MODES)
@pytest.mark.parametrize("reason", DEAD)
@pytest.mark.parametrize("count", [0, 2])
def test_one_that_is_closing_and_dead_holds_nobody(
    on_unavailable: OnUnavailable,
    has_waited: bool,  # noqa: FBT001
    reason: BreakReason,
    count: int,
) -> None:
    upstream, tried, _ = DEAD[reason]
    assert upstream is not None
    question = Question(session_with(count), tried=tried, has_waited=has_waited)
    choice = ask(question, upstream, THIRD, on_unavailable=on_unavailable)
    assert choice == Choice(THIRD, Outcome.REDISPATCHED, reason)


def test_nobody_is_placed_at_one_that_is_closing() -> None:
    closing = replace(CLOSING, admin=AdminState.READY)
    assert ask(Question(None), closing, OTHER).upstream is OTHER
    assert ask(Question(None, address_key=b"x"), closing, OTHER).upstream is OTHER
    assert ask(Question(None), closing) == NO_CHOICE
    assert ask(Question(session_with(0)), closing) == NO_CHOICE
    assert ask(Question(session_with(1)), closing) == Choice(closing, Outcome.HIT)
    tried = frozenset({OTHER.digest})
    assert ask(Question(None, tried=tried), closing, OTHER) == NO_CHOICE, "nor once all others were tried"
    assert ask(Question(None, tried=tried), PINNED, OTHER).upstream is PINNED


def test_all_processes_move_the_client_of_one_that_is_closing_to_the_same_upstream() -> None:
    snapshot = Snapshot("default", (CLOSING, OTHER, THIRD), Rules(is_shared=True))
    for number in range(50):
        session = Session(b"%010d" % number, CLOSING.digest, 0)
        chosen = {choose(snapshot, Question(session), Chance(first), lambda _: 0).upstream for _ in range(4)}
        assert chosen == {choose_rendezvous((OTHER, THIRD), session.client_id)}


@pytest.mark.parametrize("pin", [name for name, pin in PINS.items() if pin.broken is not None])
def test_a_broken_pin_without_another_upstream_is_no_choice(pin: str) -> None:
    upstream, tried, _ = PINS[pin]
    drained = Upstream("other", admin=AdminState.DRAIN)
    upstreams = (drained,) if upstream is None else (drained, upstream)
    choice = ask(Question(SESSION, tried=tried), *upstreams)
    if upstream is not None and upstream.admin is AdminState.READY and upstream.digest not in tried:
        # The guard: it was refused a moment ago, but so was every other, and the pin is not broken for nothing.
        assert choice == Choice(upstream, Outcome.HIT)
    else:
        assert choice == NO_CHOICE


def test_a_pin_needs_no_cookie_and_no_token() -> None:
    question = Question(SESSION, token=Outcome.INVALID, address_key=b"1.2.3.4")
    assert ask(question, OTHER, PINNED, has_cookie=False) == Choice(PINNED, Outcome.HIT)


# No pin


@pytest.mark.parametrize("token", [Outcome.NEW, Outcome.INVALID, Outcome.EXPIRED])
def test_a_client_without_a_pin_is_placed_by_the_policy(token: Outcome) -> None:
    assert ask(Question(None, token=token), OTHER, PINNED) == Choice(OTHER, token)


@pytest.mark.parametrize("token", [Outcome.NEW, Outcome.INVALID])
def test_without_the_cookie_nobody_is_pinned(token: Outcome) -> None:
    assert ask(Question(None, token=token), OTHER, has_cookie=False) == Choice(OTHER, Outcome.UNPINNED)


@pytest.mark.parametrize("has_cookie", [True, False])
def test_the_address_is_hashed(has_cookie: bool) -> None:  # noqa: FBT001
    upstreams = (PINNED, OTHER, THIRD)
    chosen = set()
    for number in range(50):
        key = b"192.0.2.%d" % number
        choice = ask(Question(None, address_key=key), *upstreams, has_cookie=has_cookie)
        assert choice == Choice(choose_rendezvous(upstreams, key), Outcome.ADDRESS)
        chosen.add(choice.upstream)
    assert chosen == set(upstreams)


@pytest.mark.parametrize("has_cookie", [True, False])
@pytest.mark.parametrize("address_key", [None, b"192.0.2.1"])
def test_a_key_that_the_client_has_made_is_hashed_before_its_address(
    has_cookie: bool,  # noqa: FBT001
    address_key: bytes | None,
) -> None:
    upstreams = (PINNED, OTHER, THIRD)
    chosen = set()
    for number in range(50):
        key = b"Gradio session\0%d" % number
        question = Question(None, token=Outcome.INVALID, key=key, address_key=address_key)
        choice = ask(question, *upstreams, has_cookie=has_cookie)
        assert choice == Choice(choose_rendezvous(upstreams, key), Outcome.HASHED)
        chosen.add(choice.upstream)
    assert chosen == set(upstreams), "whatever the address is"


def test_a_key_is_hashed_over_those_that_may_be_chosen() -> None:
    """One that fails moves its own keys alone, and one that is full or was tried gets none."""
    upstreams = (PINNED, OTHER, THIRD)
    tried = frozenset({THIRD.digest})
    for number in range(50):
        key = b"key %d" % number
        before = ask(Question(None, key=key), *upstreams).upstream
        for left in (
            ask(Question(None, key=key), PINNED, OTHER, replace(THIRD, health=Health.UNHEALTHY)),
            ask(Question(None, key=key), PINNED, OTHER, replace(THIRD, admin=AdminState.DRAIN)),
            ask(Question(None, key=key, tried=tried), *upstreams),
            ask_with_load(Question(None, key=key), {"third": 1}, PINNED, OTHER, replace(THIRD, max_sessions=1)),
        ):
            assert left == Choice(choose_rendezvous((PINNED, OTHER), key), Outcome.HASHED)
            assert before is THIRD or left.upstream is before
    full = Upstream("full", max_sessions=1)
    assert ask_with_load(Question(None, key=b"k"), {"full": 1}, full) == ALL_FULL
    assert ask(Question(None, key=b"k")) == NO_CHOICE


def test_a_pin_that_holds_comes_before_a_key_and_one_that_breaks_moves_without_it() -> None:
    assert ask(Question(SESSION, key=b"k"), OTHER, PINNED) == Choice(PINNED, Outcome.HIT)
    dead = replace(PINNED, is_refused=True)
    choice = ask(Question(SESSION, key=b"k"), OTHER, dead)
    assert choice == Choice(OTHER, Outcome.REDISPATCHED, BreakReason.REFUSED)


@pytest.mark.parametrize("pin", PINS)
def test_why_a_pin_does_not_hold(pin: str) -> None:
    upstream, tried, broken = PINS[pin]
    snapshot = Snapshot("default", (THIRD,) if upstream is None else (upstream, THIRD), Rules())
    assert why_broken(snapshot, SESSION, tried) is broken


def test_why_a_pin_to_one_that_is_closing_does_not_hold() -> None:
    snapshot = Snapshot("default", (CLOSING, THIRD), Rules())
    assert why_broken(snapshot, session_with(1), NOT_TRIED) is None
    assert why_broken(snapshot, session_with(0), NOT_TRIED) is BreakReason.CLOSED


def test_what_the_ladder_adds_has_its_names() -> None:
    """They are the values of labels, which dashboards know."""
    assert [str(one) for one in Outcome][:4] == ["hit", "learned", "hashed", "gone"]
    assert (BreakReason.RELEASED.value, BreakReason.MOVED.value) == ("released", "moved")


def test_no_upstream_is_no_choice() -> None:
    assert ask(Question(None)) == NO_CHOICE
    assert ask(Question(None, address_key=b"x")) == NO_CHOICE
    assert ask(Question(SESSION)) == NO_CHOICE


# What was tried


def test_what_was_tried_is_not_tried_again() -> None:
    tried = frozenset({PINNED.digest})
    assert ask(Question(None, tried=tried), PINNED, OTHER) == Choice(OTHER, Outcome.NEW)
    assert ask(Question(None, tried=tried | {OTHER.digest}), PINNED, OTHER) == NO_CHOICE
    assert ask(Question(None, tried=tried, address_key=b"x"), PINNED, OTHER) == Choice(OTHER, Outcome.ADDRESS)


def test_once_all_were_tried_a_doubtful_one_is() -> None:
    doubtful = Upstream("doubtful", health=Health.UNHEALTHY)
    drained = Upstream("drained", admin=AdminState.DRAIN)
    tried = frozenset({PINNED.digest})
    assert ask(Question(None), PINNED, doubtful, drained).upstream is PINNED
    assert ask(Question(None, tried=tried), PINNED, doubtful, drained).upstream is doubtful
    assert ask(Question(SESSION, tried=tried), PINNED, doubtful) == Choice(
        doubtful, Outcome.REDISPATCHED, BreakReason.UNREACHABLE
    )
    assert ask(Question(None, tried=tried | {doubtful.digest}), PINNED, doubtful, drained) == NO_CHOICE


# Full upstreams


def ask_with_load(question: Question, load: dict[str, int], *upstreams: Upstream) -> Choice:
    """Choose while the upstreams named hold so many sessions."""
    return choose(Snapshot("default", upstreams, Rules()), question, Chance(first), lambda one: load.get(one.id, 0))


def test_a_full_upstream_gets_no_new_client() -> None:
    full, other = Upstream("full", max_sessions=2), Upstream("other", max_sessions=100)
    assert ask_with_load(Question(None), {"full": 1, "other": 50}, full, other).upstream is full
    assert ask_with_load(Question(None), {"full": 2, "other": 50}, full, other).upstream is other
    assert ask_with_load(Question(None, address_key=b"any"), {"full": 2}, full, other).upstream is other
    unbounded = Upstream("unbounded")
    assert ask_with_load(Question(None), {"full": 2, "unbounded": 1_000_000}, full, unbounded).upstream is unbounded


def test_a_full_upstream_keeps_its_own_clients() -> None:
    full = Upstream("pinned", max_sessions=1)
    assert ask_with_load(Question(SESSION), {"pinned": 5}, full, OTHER) == Choice(full, Outcome.HIT)


def test_where_all_are_full_nobody_is_placed() -> None:
    one, two = Upstream("one", max_sessions=1), Upstream("two", max_sessions=1)
    load = {"one": 1, "two": 1}
    assert ask_with_load(Question(None), load, one, two) == ALL_FULL
    assert ask_with_load(Question(None, address_key=b"any"), load, one, two) == ALL_FULL
    dead = Upstream("pinned", is_refused=True)
    assert ask_with_load(Question(SESSION), load, one, two, dead) == ALL_FULL
    assert ask_with_load(Question(SESSION), {"one": 1}, one, two, dead).upstream is two


def test_a_guard_does_not_pass_the_bound() -> None:
    """Better a doubtful upstream than none, but not one that has no room."""
    doubtful = Upstream("doubtful", health=Health.UNHEALTHY, max_sessions=1)
    assert ask_with_load(Question(None), {}, doubtful).upstream is doubtful
    assert ask_with_load(Question(None), {"doubtful": 1}, doubtful) == ALL_FULL


# Several processes


def redispatch(
    number: int, upstreams: list[Upstream], *, is_shared: bool, turn: int = 0, load: dict[str, int] | None = None
) -> Upstream:
    """Choose for a client whose upstream is gone, in a process that has chosen `turn` times before."""
    chance = Chance(first)
    chance.turn = turn
    question = Question(Session(b"%010d" % number, b"nowhere!", 0))
    snapshot = Snapshot("default", tuple(upstreams), Rules(is_shared=is_shared))
    choice = choose(snapshot, question, chance, lambda one: (load or {}).get(one.id, 0))
    assert choice.outcome is Outcome.REDISPATCHED
    assert choice.upstream is not None
    return choice.upstream


def test_all_processes_move_a_client_to_the_same_upstream() -> None:
    """Whatever they have chosen before, and whatever load they see: its requests come to several at once."""
    upstreams = [PINNED, OTHER, THIRD]
    views: list[tuple[int, dict[str, int]]] = [(0, {}), (1, {}), (2, {"other": 50}), (7, {"pinned": 9, "third": 3})]
    alike, apart = [], []
    for number in range(100):
        alike.append({redispatch(number, upstreams, is_shared=True, turn=turn, load=load) for turn, load in views})
        apart.append({redispatch(number, upstreams, is_shared=False, turn=turn, load=load) for turn, load in views})
    assert all(len(one) == 1 for one in alike)
    assert any(len(one) > 1 for one in apart), "a process alone chooses by load and turn"
    assert set.union(*alike) == set(upstreams)


def test_clients_that_all_processes_move_are_shared_by_weight() -> None:
    upstreams = [PINNED, OTHER, Upstream("heavy", 2)]
    chosen = [redispatch(number, upstreams, is_shared=True).id for number in range(4000)]
    assert [chosen.count(one.id) / 1000 for one in upstreams] == pytest.approx([1, 1, 2], abs=0.15)


def test_clients_that_all_processes_move_go_where_there_is_room() -> None:
    full = Upstream("full", max_sessions=5)
    upstreams = [PINNED, full, THIRD]
    free = [redispatch(number, upstreams, is_shared=True, load={"full": 4}) for number in range(200)]
    left = [redispatch(number, upstreams, is_shared=True, load={"full": 5}) for number in range(200)]
    assert full in free
    assert full not in left
    assert all(before is after for before, after in zip(free, left, strict=True) if before is not full)
    dead = Upstream("pinned", is_refused=True)
    choice = choose(
        Snapshot("default", (dead, full), Rules(is_shared=True)), Question(SESSION), Chance(first), lambda _: 5
    )
    assert choice == ALL_FULL


def test_new_clients_are_placed_by_the_policy_in_each_process() -> None:
    """They come to one process only; what the others have placed is in the load."""
    snapshot = Snapshot("default", (PINNED, OTHER), Rules(is_shared=True))
    for least in (PINNED, OTHER):
        load = {PINNED.id: 1, OTHER.id: 1} | {least.id: 0}
        choice = choose(snapshot, Question(None), Chance(first), lambda one, load=load: load[one.id])  # type: ignore[misc]
        assert choice == Choice(least, Outcome.NEW)


def test_nothing_selects_what_the_operator_took_out() -> None:
    """No token and no address leads to an upstream in maintenance, and a drained one gets only its own clients."""
    sessions = [None, SESSION, Session(b"0123456789", b"nowhere!", 0)]
    states = list(product(AdminState, Health, (False, True), (False, True)))
    for mine, other in product(states, states):
        upstreams = [
            Upstream(name, admin=admin, health=health, is_refused=is_refused, is_closing=is_closing)
            for name, (admin, health, is_refused, is_closing) in (("pinned", mine), ("other", other))
        ]
        for session, key, tried in product(sessions, (None, b"k"), (NOT_TRIED, frozenset({PINNED.digest}))):
            chosen = ask(Question(session, address_key=key, tried=tried), *upstreams).upstream
            if chosen is None:
                continue
            assert chosen.admin is not AdminState.MAINT
            assert chosen.digest not in tried
            is_own = session is not None and session.digest == chosen.digest
            assert chosen.admin is AdminState.READY or is_own
            assert not chosen.is_closing  # nothing of the sessions is open


def test_choosing_changes_nothing_but_the_turn() -> None:
    session = Session(b"0123456789", b"nowhere!", 5)
    chance = Chance(first)
    snapshot = Snapshot("default", (OTHER,), Rules())
    assert choose(snapshot, Question(session), chance, lambda _: 0).broken is BreakReason.REMOVED
    assert (session.digest, session.pinned_at, session.open, chance.turn) == (b"nowhere!", 5, 0, 1)
