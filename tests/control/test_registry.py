"""The registry of sessions, against one that counts everything anew each time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stickyproxy.control.registry import SessionRegistry

WORKERS = st.integers(1, 3)
CLIENTS = st.sampled_from(["c1", "c2", "c3", "c4"])
DIGESTS = st.sampled_from(["aa", "bb", "cc"])
BEGAN = st.tuples(CLIENTS, DIGESTS, st.integers(0, 4))


class RegistryMachine(RuleBasedStateMachine):
    """All that workers have said and not taken back, in the order in which they said it."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = SessionRegistry()
        self.said: list[tuple[int, str, str, int]] = []  # worker, client, digest, pinned at

    def retract(self, worker: int, client: str | None = None) -> None:
        self.said = [one for one in self.said if one[0] != worker or (client is not None and one[1] != client)]

    @rule(worker=WORKERS, began=st.lists(BEGAN, max_size=3), ended=st.lists(CLIENTS, max_size=2))
    def news(self, worker: int, began: list[tuple[str, str, int]], ended: list[str]) -> None:
        self.registry.take(worker, {"began": [list(one) for one in began], "ended": ended})
        for client in ended:
            self.retract(worker, client)
        for client, digest, pinned_at in began:
            self.retract(worker, client)
            self.said.append((worker, client, digest, pinned_at))

    @rule(worker=WORKERS)
    def dies(self, worker: int) -> None:
        self.registry.forget(worker)
        self.retract(worker)

    @invariant()
    def counts_each_client_once(self) -> None:
        pins: dict[str, tuple[int, str]] = {}
        for _, client, digest, pinned_at in self.said:
            if client not in pins or pins[client][0] <= pinned_at:
                pins[client] = pinned_at, digest
        assert self.registry.counts == dict(Counter(digest for _, digest in pins.values()))
        assert len(self.registry) == len(pins)
        assert self.registry.count(b"\xaa") == self.registry.counts.get("aa", 0)

    @invariant()
    def nothing_is_kept_of_who_is_gone(self) -> None:
        assert sum(map(len, self.registry._pins.values())) == len({one[:2] for one in self.said})
        assert sum(map(len, self.registry._held.values())) == len({one[:2] for one in self.said})


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def test_a_client_of_two_workers_counts_once_and_where_it_was_pinned_last() -> None:
    registry = SessionRegistry()
    registry.take(1, {"began": [["c", "aa", 5]]})
    registry.take(2, {"began": [["c", "bb", 7]]})
    assert registry.counts == {"bb": 1}
    registry.take(1, {"ended": ["c"]})
    assert registry.counts == {"bb": 1}
    registry.forget(2)
    assert (registry.counts, len(registry)) == ({}, 0)
    assert repr(registry) == "<SessionRegistry of 0 sessions>"


def test_a_worker_that_moves_its_client_is_believed_whatever_the_clock_says() -> None:
    """The wall clock may be put back between two pins."""
    registry = SessionRegistry()
    registry.take(1, {"began": [["c", "aa", 5000]]})
    registry.take(1, {"began": [["c", "bb", 1400]]})
    assert registry.counts == {"bb": 1}


def test_what_another_worker_knew_counts_again() -> None:
    registry = SessionRegistry()
    registry.take(1, {"began": [["c", "aa", 5]]})
    registry.take(2, {"began": [["c", "bb", 7]]})
    registry.forget(2)
    assert registry.counts == {"aa": 1}


@pytest.mark.parametrize(
    "news", [{"began": [["d", "aa", 1], ["e", "aa"]]}, {"began": [["d", "aa", "x"]]}, {"began": 5}, {"ended": 5}]
)
def test_nonsense_is_not_taken_in_by_halves(news: dict[str, Any]) -> None:
    registry = SessionRegistry()
    registry.take(1, {"began": [["c", "aa", 5]]})
    with pytest.raises((ValueError, TypeError)):
        registry.take(1, {"ended": ["c"], **news})
    assert registry.counts == {"aa": 1}


def test_other_keys_are_ignored() -> None:
    registry = SessionRegistry()
    registry.take(1, {"new": 1})
    assert len(registry) == 0
