"""The routing state: the two questions asked of an upstream, the guard, and the order of turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.snapshot import (
    DIGEST_BYTES,
    AdminState,
    Health,
    Rules,
    Snapshot,
    Upstream,
    interleave,
    upstream_digest,
)

READY, DRAIN, MAINT = AdminState.READY, AdminState.DRAIN, AdminState.MAINT
UNKNOWN, HEALTHY, UNHEALTHY = Health.UNKNOWN, Health.HEALTHY, Health.UNHEALTHY


def snapshot_of(*upstreams: Upstream) -> Snapshot:
    return Snapshot("default", upstreams, Rules())


@pytest.mark.parametrize(
    ("admin", "health", "is_refused", "accepts_new", "accepts_pinned"),
    [
        (READY, UNKNOWN, False, True, True),
        (READY, HEALTHY, False, True, True),
        (READY, UNHEALTHY, False, False, True),
        (READY, UNKNOWN, True, False, False),
        (READY, HEALTHY, True, False, False),
        (READY, UNHEALTHY, True, False, False),
        (DRAIN, UNKNOWN, False, False, True),
        (DRAIN, HEALTHY, False, False, True),
        (DRAIN, UNHEALTHY, False, False, True),
        (DRAIN, UNKNOWN, True, False, False),
        (DRAIN, HEALTHY, True, False, False),
        (DRAIN, UNHEALTHY, True, False, False),
        (MAINT, UNKNOWN, False, False, False),
        (MAINT, HEALTHY, False, False, False),
        (MAINT, UNHEALTHY, False, False, False),
        (MAINT, UNKNOWN, True, False, False),
        (MAINT, HEALTHY, True, False, False),
        (MAINT, UNHEALTHY, True, False, False),
    ],
)
def test_the_two_questions(
    admin: AdminState,
    health: Health,
    is_refused: bool,  # noqa: FBT001
    accepts_new: bool,  # noqa: FBT001
    accepts_pinned: bool,  # noqa: FBT001
) -> None:
    upstream = Upstream("a", admin=admin, health=health, is_refused=is_refused)
    assert (upstream.accepts_new, upstream.accepts_pinned) == (accepts_new, accepts_pinned)
    snapshot = snapshot_of(upstream, Upstream("b"))
    assert (upstream in snapshot.candidates) is accepts_new
    assert (upstream.digest in snapshot.pinnable) is accepts_pinned
    assert snapshot.by_digest[upstream.digest] is upstream


@pytest.mark.parametrize(("admin", "health", "is_refused"), list(product(AdminState, Health, (False, True))))
def test_one_that_is_closing_takes_nobody_and_holds_nobody_by_its_pin_alone(
    admin: AdminState,
    health: Health,
    is_refused: bool,  # noqa: FBT001
) -> None:
    closing = Upstream("a", admin=admin, health=health, is_refused=is_refused, is_closing=True)
    assert (closing.is_wanted, closing.accepts_new, closing.accepts_pinned) == (False, False, False)
    alone = snapshot_of(closing)
    assert (alone.candidates, alone.pinnable, alone.is_guarded) == ((), {}, False)
    assert alone.by_digest == {closing.digest: closing}
    doubtful = Upstream("b", health=UNHEALTHY)
    assert snapshot_of(closing, doubtful).candidates == (doubtful,), "the guard takes none that is closing"


@pytest.mark.parametrize(
    ("upstreams", "candidates", "is_guarded"),
    [
        pytest.param([], [], False, id="no upstream"),
        pytest.param([Upstream("a"), Upstream("b", health=UNHEALTHY)], ["a"], False, id="one is healthy"),
        pytest.param(
            [Upstream("a", health=UNHEALTHY), Upstream("b", health=UNHEALTHY)], ["a", "b"], True, id="none is healthy"
        ),
        pytest.param(
            [Upstream("a", health=UNHEALTHY, is_refused=True), Upstream("b", health=UNHEALTHY)],
            ["b"],
            True,
            id="none is healthy, one is reachable",
        ),
        pytest.param([Upstream("a", is_refused=True)], ["a"], True, id="all are refused"),
        pytest.param([Upstream("a", admin=DRAIN)], [], False, id="all are drained: the operator wants none"),
        pytest.param([Upstream("a", admin=MAINT), Upstream("b", admin=DRAIN)], [], False, id="none is ready"),
        pytest.param(
            [Upstream("a", admin=DRAIN), Upstream("b", health=UNHEALTHY)], ["b"], True, id="the guard takes no drained"
        ),
    ],
)
def test_the_guard_uses_what_the_operator_wants_when_nothing_is_healthy(
    upstreams: list[Upstream],
    candidates: list[str],
    is_guarded: bool,  # noqa: FBT001
) -> None:
    snapshot = snapshot_of(*upstreams)
    assert [upstream.id for upstream in snapshot.candidates] == candidates
    assert snapshot.is_guarded is is_guarded


def test_no_state_of_one_upstream_lets_in_what_the_operator_keeps_out() -> None:
    for states in product(product(AdminState, Health, (False, True)), repeat=2):
        upstreams = [
            Upstream(name, admin=admin, health=health, is_refused=is_refused)
            for name, (admin, health, is_refused) in zip("ab", states, strict=True)
        ]
        snapshot = snapshot_of(*upstreams)
        assert all(upstream.admin is READY for upstream in snapshot.candidates)
        assert bool(snapshot.candidates) == any(upstream.admin is READY for upstream in upstreams)
        assert all(upstream.accepts_pinned for upstream in snapshot.pinnable.values())


def test_equal_input_gives_equal_state() -> None:
    one, other = (snapshot_of(Upstream("a", 2), Upstream("b")) for _ in range(2))
    for name in Snapshot.__slots__:
        assert getattr(one, name) == getattr(other, name)


def test_an_upstream_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Upstream("a").weight = 2  # type: ignore[misc]


def test_a_digest_stands_for_the_id_alone() -> None:
    assert upstream_digest("app-1") == Upstream("app-1", 7, DRAIN, UNHEALTHY, is_refused=True).digest
    assert len({upstream_digest(f"app-{number}") for number in range(1000)}) == 1000
    assert len(upstream_digest("é" * 500)) == DIGEST_BYTES
    assert b"app" not in upstream_digest("app-1")
    assert Upstream("a", digest=b"12345678").digest == b"12345678"


def test_the_rotation_is_that_of_the_candidates() -> None:
    snapshot = snapshot_of(Upstream("a", 3), Upstream("gone", 9, MAINT), Upstream("b", 1))
    assert snapshot.rotation == (0, 0, 1, 0)
    assert repr(snapshot) == "<Snapshot default upstreams=3 candidates=2>"


# Turns


@pytest.mark.parametrize(
    ("weights", "order"),
    [
        ((), ()),
        ((5,), (0,)),
        ((2, 2, 2), (0, 1, 2)),
        ((3, 1), (0, 0, 1, 0)),
        ((1, 3), (1, 0, 1, 1)),
        ((2, 1), (0, 1, 0)),
    ],
)
def test_turns_are_spread(weights: tuple[int, ...], order: tuple[int, ...]) -> None:
    assert interleave(weights) == order


WEIGHTS = st.lists(st.integers(1, 256), min_size=1, max_size=12).map(tuple)


@settings(deadline=None)
@given(WEIGHTS)
def test_each_has_its_share_of_turns(weights: tuple[int, ...]) -> None:
    turns = Counter(interleave(weights))
    assert all(turns[position] * weights[0] == turns[0] * weight for position, weight in enumerate(weights))


@settings(deadline=None)
@given(WEIGHTS)
def test_nobody_waits_much_longer_than_its_share(weights: tuple[int, ...]) -> None:
    """Between two turns of one with the share s of the turns there are at most 2 / s others and some."""
    order = interleave(weights) * 2
    for position in range(len(weights)):
        turns = [at for at, chosen in enumerate(order) if chosen == position]
        fair = len(order) / len(turns)
        assert all(later - earlier <= 2 * fair + len(weights) for earlier, later in pairwise(turns))


def test_a_rotation_in_blocks_would_be_found_unfair() -> None:
    blocks = (0,) * 100 + (1,) * 2
    turns = [at for at, chosen in enumerate(blocks * 2) if chosen == 1]
    assert max(later - earlier for earlier, later in pairwise(turns)) > 100
    order = interleave((100, 2)) * 2
    turns = [at for at, chosen in enumerate(order) if chosen == 1]
    assert max(later - earlier for earlier, later in pairwise(turns)) <= 52


def test_large_weights_are_scaled_down() -> None:
    order = interleave((1, 10**6, 2 * 10**6))
    assert len(order) <= (1 << 14) + 3
    turns = Counter(order)
    assert turns[0] == 1
    assert turns[2] == pytest.approx(2 * turns[1], rel=0.01)
