"""Policies: shares by weight, ties, and how little moves when an upstream goes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.affinity import policy
from stickyproxy.affinity.policy import (
    Chance,
    choose_least_sessions,
    choose_random,
    choose_rendezvous,
    choose_round_robin,
)
from stickyproxy.affinity.snapshot import Policy, Rules, Snapshot, Upstream, interleave

A, B, C = Upstream("a"), Upstream("b"), Upstream("c", 2)
KEYS = [b"client %d" % number for number in range(4000)]


def never() -> float:
    raise AssertionError("no draw is needed")


def no_load(_: Upstream) -> float:
    return 0


# Least sessions


def test_the_one_with_the_fewest_sessions_is_chosen() -> None:
    loads = {"a": 3, "b": 2}
    assert {choose_least_sessions([A, B], lambda one: loads[one.id], turn) for turn in range(5)} == {B}


def test_those_that_are_level_take_turns() -> None:
    assert [choose_least_sessions([A, B], no_load, turn).id for turn in range(5)] == ["a", "b", "a", "b", "a"]


def test_sessions_count_by_weight() -> None:
    loads = {"a": 1, "c": 3}
    assert [choose_least_sessions([A, C], lambda one: loads[one.id], turn).id for turn in range(2)] == ["a", "c"]
    loads["c"] = 2
    assert {choose_least_sessions([A, C], lambda one: loads[one.id], turn) for turn in range(5)} == {C}


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_clients_placed_one_by_one_are_shared_by_weight(weights: list[int]) -> None:
    upstreams = [Upstream(str(number), weight) for number, weight in enumerate(weights)]
    loads: Counter[Upstream] = Counter()
    for turn in range(20 * sum(weights)):
        loads[choose_least_sessions(upstreams, loads.__getitem__, turn)] += 1
    for upstream in upstreams:
        assert abs(loads[upstream] - 20 * upstream.weight) <= 1


# Round robin


def test_turns_go_round() -> None:
    rotation = interleave((1, 1, 2))
    assert [choose_round_robin([A, B, C], rotation, turn).id for turn in range(5)] == ["c", "a", "b", "c", "c"]


# Random


@pytest.mark.parametrize(
    ("draw", "chosen"), [(0.0, A), (0.2499, A), (0.25, B), (0.4999, B), (0.5, C), (0.999999, C), (1.0, C)]
)
def test_a_draw_falls_into_the_share_of_one(draw: float, chosen: Upstream) -> None:
    assert choose_random([A, B, C], draw) is chosen


def test_draws_give_shares_by_weight() -> None:
    draw = Random(1).random
    counts = Counter(choose_random([A, B, C], draw()) for _ in range(4000))
    assert [counts[one] / 1000 for one in (A, B, C)] == pytest.approx([1, 1, 2], abs=0.15)


# Rendezvous


def test_the_same_key_gives_the_same_upstream_in_any_order() -> None:
    for key in KEYS[:200]:
        assert choose_rendezvous([A, B, C], key) is choose_rendezvous([C, A, B], key)


def test_keys_are_shared_by_weight() -> None:
    counts = Counter(choose_rendezvous([A, B, C], key) for key in KEYS)
    assert [counts[one] / 1000 for one in (A, B, C)] == pytest.approx([1, 1, 2], abs=0.15)


@pytest.mark.parametrize("removed", [A, B, C])
def test_one_that_goes_moves_only_its_own_keys(removed: Upstream) -> None:
    everyone = [A, B, C, Upstream("d", 3)]
    left = [one for one in everyone if one is not removed]
    before = {key: choose_rendezvous(everyone, key) for key in KEYS}
    moved = {key for key in KEYS if choose_rendezvous(left, key) is not before[key]}
    assert moved == {key for key in KEYS if before[key] is removed}
    assert moved


def test_a_hash_by_position_would_be_found_to_move_more() -> None:
    everyone, left = [A, B, C], [A, B]
    moved = sum(everyone[len(key) % 3] is not left[len(key) % 2] for key in (b"x" * size for size in range(60)))
    assert moved > 20 + 10


@pytest.mark.parametrize("drawn", [b"\x00" * 8, b"\xff" * 8, b"\xff" * 7 + b"\xfe"], ids=["least", "most", "nearly"])
def test_no_hash_is_beyond_what_a_logarithm_takes(monkeypatch: pytest.MonkeyPatch, drawn: bytes) -> None:
    class Fixed:
        def __init__(self, *_: bytes, **__: object) -> None:
            pass

        def digest(self) -> bytes:
            return drawn

    monkeypatch.setattr(policy, "blake2b", Fixed)
    assert choose_rendezvous([A, C], b"key") in {A, C}


# By the rules of a snapshot


def snapshot_of(name: Policy, *upstreams: Upstream) -> Snapshot:
    return Snapshot("default", upstreams, Rules(policy=name))


def test_the_policy_of_the_snapshot_decides() -> None:
    loads = {"a": 0, "b": 1, "c": 9}
    by_load = Chance(never)
    snapshot = snapshot_of("least_sessions", A, B, C)
    assert by_load.choose(snapshot, snapshot.candidates, lambda one: loads[one.id]) is A
    snapshot = snapshot_of("random", A, B, C)
    assert Chance(lambda: 0.3).choose(snapshot, snapshot.candidates, lambda one: loads[one.id]) is B


def test_each_choice_takes_a_turn() -> None:
    chance = Chance(never)
    snapshot = snapshot_of("round_robin", A, B, C)
    chosen = [chance.choose(snapshot, snapshot.candidates, no_load).id for _ in range(8)]
    assert chance.turn == 8
    assert Counter(chosen) == {"a": 2, "b": 2, "c": 4}


def test_round_robin_among_some_of_the_candidates_goes_by_turn_alone() -> None:
    chance = Chance(never)
    snapshot = snapshot_of("round_robin", A, B, C)
    assert [chance.choose(snapshot, (A, C), no_load).id for _ in range(4)] == ["c", "a", "c", "a"]
