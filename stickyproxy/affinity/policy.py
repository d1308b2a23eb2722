"""Policies: how an upstream is chosen for a client without a pin."""

from __future__ import annotations

from bisect import bisect_right
from hashlib import blake2b
from itertools import accumulate
from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stickyproxy.affinity.snapshot import Snapshot, Upstream


def choose_least_sessions(candidates: Sequence[Upstream], load: Callable[[Upstream], float], turn: int) -> Upstream:
    """Choose the upstream with the fewest sessions for its weight; those that are level take turns. O(n)."""
    scores = [(load(upstream) + 1) / upstream.weight for upstream in candidates]
    least = min(scores)
    level = [upstream for upstream, score in zip(candidates, scores, strict=True) if score == least]
    return level[turn % len(level)]


def choose_round_robin(candidates: Sequence[Upstream], rotation: Sequence[int], turn: int) -> Upstream:
    """Choose by turn, each upstream as often as its weight says."""
    return candidates[rotation[turn % len(rotation)]]


def choose_random(candidates: Sequence[Upstream], draw: float) -> Upstream:
    """Choose by a draw from [0, 1), each upstream as likely as its weight says. O(n)."""
    bounds = list(accumulate(upstream.weight for upstream in candidates))
    return candidates[min(bisect_right(bounds, draw * bounds[-1]), len(candidates) - 1)]


def choose_rendezvous(candidates: Sequence[Upstream], key: bytes) -> Upstream:
    """Choose by weighted rendezvous hashing: the same key, the same upstream; one removed moves only its own keys.

    O(n) hashes; only requests without a token come here.
    """

    def score(upstream: Upstream) -> float:
        drawn = blake2b(key, key=upstream.digest, digest_size=8).digest()
        # 53 bits: what a float can hold, so that the quotient is never rounded to 0 or 1.
        return -upstream.weight / log(((int.from_bytes(drawn, "big") >> 11) + 1) / (2**53 + 1))

    return max(candidates, key=score)


class Chance:
    """Where a choice takes its turns and draws from: `turn` counts up, `draw` comes from the random source given."""

    __slots__ = ("_random", "turn")

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.turn = 0

    def choose(self, snapshot: Snapshot, candidates: Sequence[Upstream], load: Callable[[Upstream], float]) -> Upstream:
        """Choose among `candidates`, which must not be empty, by the policy of the snapshot."""
        self.turn += 1
        if snapshot.rules.policy == "least_sessions":
            return choose_least_sessions(candidates, load, self.turn)
        if snapshot.rules.policy == "round_robin":
            whole = candidates is snapshot.candidates
            return choose_round_robin(candidates, snapshot.rotation if whole else range(len(candidates)), self.turn)
        return choose_random(candidates, self._random())
