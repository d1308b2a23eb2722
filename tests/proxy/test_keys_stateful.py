"""Any order of requests, restarts, drains and expiry: a learned key leads to its own upstream while that one lives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from typing_extensions import override

from stickyproxy.affinity.choose import Outcome
from stickyproxy.affinity.keys import Found, GoneAnswer, Key
from stickyproxy.affinity.sessions import SessionTable
from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot, Upstream, upstream_digest
from stickyproxy.affinity.token import Lifetimes
from stickyproxy.errors import UpstreamGone, UpstreamUnavailable
from stickyproxy.observe.counters import PLANE, UpstreamCounters, make_cells
from stickyproxy.proxy import placement as placement_module
from stickyproxy.proxy.cluster import Cluster
from stickyproxy.proxy.key_table import KeyTable
from stickyproxy.proxy.placement import Placement
from stickyproxy.proxy.settings import ClusterSettings
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import parse_request_head
from tests.helpers.plane import CODEC

if TYPE_CHECKING:
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.wire.forwarded import ForwardedWriter

IDLE_S: Final = 100.0
MADE: Final = Key("made", "learn", queries=("made",), idle_s=IDLE_S)
LOST: Final = Key("lost", "learn", queries=("lost",), idle_s=IDLE_S, gone=GoneAnswer(400, "text/plain", ""))
HASHED: Final = Key("hashed", "hash", queries=("hashed",), idle_s=IDLE_S)
KEYS: Final = (MADE, LOST, HASHED)
IDS: Final = ("a", "b", "c", "d")
VALUES: Final = st.sampled_from(["1", "2", "3"])
CARRIED: Final = st.dictionaries(st.sampled_from([one.name for one in KEYS]), VALUES)


class Pool:
    """What a placement asks of a pool."""

    def __init__(self, upstream_id: str) -> None:
        self.upstream_id, self.digest = upstream_id, upstream_digest(upstream_id)
        self.counters = UpstreamCounters()
        self.strangers = self.placed = 0

    def on_return(self, _: float) -> None:
        """Take no notice."""


class Worker:
    """A plane without connections; several share one table of keys."""

    def __init__(self, index: int, keys: KeyTable, pools: dict[bytes, Any]) -> None:
        self.keys = keys
        self.pools = pools
        self.sessions = SessionTable(CODEC, Lifetimes(), idle_s=50.0)
        self.counters = SimpleNamespace(cells=make_cells(PLANE.size))
        self.now = self.wall = 1000.0
        self.settings = SimpleNamespace(trusted=())
        self._clients = index * 1_000_000
        self.cluster = Cluster("default", ClusterSettings(keys=KEYS), lambda: 0.5)

    def load(self, upstream: Upstream) -> float:
        return self.sessions.counts.get(upstream.digest, 0)

    def find_cluster(self, digest: bytes) -> Cluster | None:
        return self.cluster if digest in self.cluster.snapshot.by_digest else None

    def show_load(self, _: object) -> None:
        """Take no notice."""

    def new_client_id(self) -> bytes:
        self._clients += 1
        return b"%010d" % self._clients


class KeyMachine(RuleBasedStateMachine):
    """Two workers, four upstreams, and where each key leads, as anybody would think of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.table = KeyTable.create(1000)
        pools = {upstream_digest(one): Pool(one) for one in IDS}
        self.workers = [Worker(index, self.table, pools) for index in range(2)]
        self.admin = dict.fromkeys(IDS, AdminState.READY)
        self.refused: set[str] = set()
        self.unhealthy: set[str] = set()
        self.removed: set[str] = set()
        self.homes: dict[tuple[str, str], tuple[str, float]] = {}  # of each key: its upstream, and its last use
        self.tokens: list[bytes] = []
        self.publish()

    @override
    def teardown(self) -> None:
        self.table.close()

    def publish(self) -> None:
        states = tuple(
            Upstream(
                one,
                1,
                self.admin[one],
                Health.UNHEALTHY if one in self.unhealthy | self.refused else Health.HEALTHY,
                one in self.refused,
            )
            for one in IDS
            if one not in self.removed
        )
        for worker in self.workers:
            worker.cluster.snapshot = Snapshot("default", states, Rules(is_shared=True))
            worker.now = worker.wall = self.now

    def lives(self, upstream_id: str) -> bool:
        """Say whether an upstream can answer for what it has made."""
        return not (
            upstream_id in self.removed or upstream_id in self.refused or self.admin[upstream_id] is AdminState.MAINT
        )

    def home_of(self, name: str, value: str) -> tuple[str, bool]:
        """Return where a key leads, nothing where it is unknown, and whether that is sure."""
        home, used_at = self.homes.get((name, value), ("", 0.0))
        idle = self.now - used_at
        if not home or idle > IDLE_S * 17 / 16 + 1:
            return "", True
        return home, idle < IDLE_S

    # What happens

    @rule(which=st.integers(0, 1), carried=CARRIED, token=st.integers(0, 9), teaches=st.none() | VALUES,
          finds_dead=st.booleans(), order=st.sampled_from(["", "", "", "release", *IDS]))  # fmt: skip
    def ask(
        self, which: int, carried: dict[str, str], token: int, teaches: str | None, *, finds_dead: bool, order: str
    ) -> None:
        """Let a client send some keys, perhaps with a token; its app may make another key, or move it."""
        worker = self.workers[which]
        finds_dead = finds_dead and len(worker.cluster.snapshot.candidates) > 1  # else it is not placed at all
        target = "/?" + "&".join(f"{name}={value}" for name, value in carried.items())
        data = f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        head = parse_request_head(data, len(data), HeadLimits())
        if token < len(self.tokens):
            head.token = self.tokens[token]
        place = Placement(
            cast("Plane", worker),
            worker.cluster,
            head,
            cast("ForwardedWriter", SimpleNamespace(is_https=lambda _: False)),
        )
        place.read_pin()
        known = [(one, *self.home_of(one.name, carried[one.name])) for one in KEYS if one.name in carried]
        learned = [one for one in known if one[0].mode == "learn" and one[1]]
        lead = learned[0] if learned else None
        try:
            pool = place.choose()
            if pool is not None and finds_dead and (lead is None or not lead[2]):
                place.give_up(pool)
                pool = place.choose()
        except UpstreamGone:
            assert place.outcome is Outcome.GONE
            assert lead is not None
            assert lead[0] is LOST
            assert not self.lives(lead[1])
            self.note_uses()
            return
        except UpstreamUnavailable:
            assert not any(self.lives(one) for one in IDS) or not worker.cluster.snapshot.candidates or finds_dead
            place.leave()
            self.note_uses()
            return
        assert pool is not None
        where = pool.upstream_id
        self.note_uses()
        if lead is not None and all(sure for _, _, sure in learned):
            if self.lives(lead[1]):
                # It never leads to another upstream than its own while that one lives.
                assert (where, place.outcome) == (lead[1], Outcome.LEARNED)
            else:
                assert lead[0] is not LOST or where == lead[1], "it would have been answered"
        self.note_leads(place, carried, where)
        if teaches is not None:
            place.learn(Found(MADE, teaches.encode()))
            self.homes["made", teaches] = (where, self.now)
        if order:
            self.obey(place, order)
        line = place.write_cookie(None)
        if line:
            self.tokens = [*self.tokens, line.partition(b"=")[2].partition(b";")[0]][-10:]
        place.leave()

    def note_uses(self) -> None:
        """Take over what the table has: a look-up is a use, and what may have expired is known or not."""
        for name, value in list(self.homes):
            digest = self.table.find(name.encode() + b"\0" + value.encode(), self.now)
            home, sure = self.home_of(name, value)
            if home and sure:
                assert digest is not None, f"{name}={value} was forgotten"
            if digest is None:
                del self.homes[name, value]

    def note_leads(self, place: Placement, carried: dict[str, str], where: str) -> None:
        for one in KEYS:
            if one.name in carried:
                key = (one.name, carried[one.name])
                digest = self.table.find(one.name.encode() + b"\0" + key[1].encode(), self.now)
                if digest is None:
                    self.homes.pop(key, None)
                    continue
                now_at = next(each for each in IDS if upstream_digest(each) == digest)
                before, sure = self.home_of(*key)
                if before and sure and now_at != before:
                    assert not self.lives(before) or place.outcome is Outcome.REDISPATCHED
                    assert now_at == where
                self.homes[key] = (now_at, self.now)

    def obey(self, place: Placement, order: str) -> None:
        key = place._key
        place.obey(order.encode())
        if key is None or place.session is None:
            return
        name = (key.key.name, key.value.decode())
        if order == "release":
            self.homes.pop(name, None)
        elif order not in self.removed and self.lives(order):
            digest = self.table.find(key.stored, self.now)
            assert digest is not None
            self.homes[name] = (next(each for each in IDS if upstream_digest(each) == digest), self.now)

    @rule(upstream_id=st.sampled_from(IDS))
    def die(self, upstream_id: str) -> None:
        """Let it refuse connections: what it has made is lost."""
        self.refused.add(upstream_id)
        self.publish()

    @rule(upstream_id=st.sampled_from(IDS))
    def come_back(self, upstream_id: str) -> None:
        self.refused.discard(upstream_id)
        self.removed.discard(upstream_id)
        self.publish()

    @rule(upstream_id=st.sampled_from(IDS), state=st.sampled_from([*AdminState]))
    def set_state(self, upstream_id: str, state: AdminState) -> None:
        self.admin[upstream_id] = state
        self.publish()

    @rule(upstream_id=st.sampled_from(IDS))
    def be_unhealthy(self, upstream_id: str) -> None:
        self.unhealthy ^= {upstream_id}
        self.publish()

    @rule(upstream_id=st.sampled_from(IDS))
    def remove(self, upstream_id: str) -> None:
        if len(self.removed) < len(IDS) - 1:
            self.removed.add(upstream_id)
            self.publish()

    @rule(seconds=st.sampled_from([0.5, 10.0, 60.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.publish()
        for worker in self.workers:
            worker.sessions.expire(self.now)

    # What must always hold

    @invariant()
    def nothing_is_left_under_way(self) -> None:
        for pool in self.workers[0].pools.values():
            assert pool.counters.in_flight == 0
            assert pool.strangers == 0
        for worker in self.workers:
            counts: dict[bytes, int] = {}
            for session in worker.sessions._active.values():
                assert session.open == 0
                counts[session.digest] = counts.get(session.digest, 0) + 1
            assert worker.sessions.counts == counts


TestKeyMachine = KeyMachine.TestCase
TestKeyMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_control_a_ladder_with_the_token_first_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def climb(place: Placement, found: list[Found]) -> None:
        for one in found if place.session is None else ():
            digest = place._plane.keys.find(one.stored, place._plane.now, one.key.idle_s)
            if digest is not None and place._key is None:
                place._follow(one, digest, Outcome.LEARNED)

    monkeypatch.setattr(placement_module.Placement, "_climb", climb)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            KeyMachine, settings=settings(max_examples=500, deadline=None, database=None, report_multiple_bugs=False)
        )
