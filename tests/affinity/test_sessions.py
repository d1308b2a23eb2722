"""The sessions known here, against a simple model: who is active where, whatever happens in whatever order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from stickyproxy.affinity import sessions as sessions_module
from stickyproxy.affinity.sessions import Session, SessionTable
from stickyproxy.affinity.token import Lifetimes, Token, TokenCodec

CODEC = TokenCodec([b"secret"])
IDLE_S = 60.0
HERE, THERE, GONE = b"here....", b"there...", b"gone...."
CLIENT = b"0123456789"
DIGESTS = st.sampled_from([HERE, THERE, GONE])
CLIENTS = st.sampled_from([b"%010d" % number for number in range(4)])


def table_of(lifetimes: Lifetimes | None = None, *, refresh_s: float | None = None) -> SessionTable:
    return SessionTable(CODEC, lifetimes or Lifetimes(), idle_s=IDLE_S, refresh_s=refresh_s)


def value_of(digest: bytes = HERE, client: bytes = CLIENT, *, pinned_at: int = 100, seen_at: int = 100) -> bytes:
    return CODEC.write(Token(digest, client, pinned_at, seen_at))


def present(table: SessionTable, value: bytes, wall: float = 100) -> Session:
    presented = table.present(value, wall)
    assert presented is not None
    return presented.session


# One client


def test_a_token_is_verified_once() -> None:
    table = table_of()
    value = value_of()
    first = table.present(value, 100)
    assert first is not None
    assert (first.session.digest, first.session.client_id, first.session.pinned_at) == (HERE, CLIENT, 100)
    assert table.present(value, 200) is first
    assert (first.digest, first.expires_at, first.refresh_at) == (HERE, float("inf"), float("inf"))


def test_an_invalid_token_stands_for_nothing_and_is_not_kept() -> None:
    table = table_of()
    assert table.present(b"v1.forged", 100) is None
    assert len(table) == 0
    assert not table._verified


def test_a_token_says_when_it_expires_and_when_it_is_to_be_written_anew() -> None:
    table = table_of(Lifetimes(max_idle_s=50, max_life_s=1000), refresh_s=20)
    presented = table.present(value_of(pinned_at=100, seen_at=300), 300)
    assert presented is not None
    assert (presented.expires_at, presented.refresh_at) == (350, 320)


def test_a_first_visit_is_no_session() -> None:
    table = table_of()
    present(table, value_of())
    table.begin(b"9876543210", HERE, 100)
    assert (len(table), table.counts) == (0, {})


def test_a_session_is_active_until_it_was_idle_too_long() -> None:
    table = table_of()
    session = present(table, value_of())
    table.touch(session, 1000.0)
    table.touch(session, 1010.0)
    table.expire(1069.9)
    assert (len(table), table.counts) == (1, {HERE: 1})
    table.expire(1070.0)
    assert (len(table), table.counts) == (0, {})


def test_an_open_session_does_not_end() -> None:
    table = table_of()
    session = present(table, value_of())
    session.open = 1
    table.touch(session, 0.0)
    for now in range(60, 6000, 60):
        table.expire(float(now))
        assert table.counts == {HERE: 1}
    session.open = 0
    table.expire(7000.0)
    assert table.counts == {}


def test_one_open_session_is_looked_at_once() -> None:
    """A sweep must not go round and round over what cannot expire."""
    table = table_of()
    session = table.begin(CLIENT, HERE, 100)
    session.open = 1
    table.touch(session, 0.0)
    moved: list[bytes] = []
    table._active.move_to_end = lambda key, last=True: moved.append(key)  # type: ignore[method-assign]  # noqa: ARG005
    table.expire(IDLE_S - 1)
    assert moved == []
    table.expire(IDLE_S)
    assert moved == [CLIENT]


def test_a_session_moves_with_its_count() -> None:
    table = table_of()
    session = present(table, value_of())
    table.move(session, THERE, 150.9)
    assert (session.digest, session.pinned_at, table.counts) == (THERE, 150, {})
    table.touch(session, 0.0)
    table.move(session, GONE, 160)
    assert table.counts == {GONE: 1}
    assert CODEC.parse(table.write_token(session, 170.5), 170) == Token(GONE, CLIENT, 160, 170)


def test_an_older_token_of_a_moved_session_still_leads_to_it() -> None:
    table = table_of()
    old = value_of(HERE, pinned_at=100)
    session = present(table, old)
    table.touch(session, 0.0)
    table.move(session, THERE, 200)
    presented = table.present(old, 200)
    assert presented is not None
    assert presented.session is session
    assert (presented.digest, session.digest) == (HERE, THERE)
    assert present(table, value_of(HERE, pinned_at=100, seen_at=101), 200).digest == THERE


def test_a_newer_token_tells_what_another_replica_did() -> None:
    table = table_of()
    session = present(table, value_of(HERE, pinned_at=100))
    table.touch(session, 0.0)
    assert present(table, value_of(THERE, pinned_at=150, seen_at=150), 200) is session
    assert (session.digest, session.pinned_at, table.counts) == (THERE, 150, {THERE: 1})


def test_two_tokens_of_one_client_are_one_session() -> None:
    table = table_of()
    first = present(table, value_of(HERE, pinned_at=100))
    second = present(table, value_of(THERE, pinned_at=100, seen_at=101), 101)
    assert first is not second
    table.touch(first, 0.0)
    table.touch(second, 1.0)
    assert (len(table), table.counts, second.digest) == (1, {HERE: 1}, HERE)


# What something else than a token says


def test_a_client_that_a_key_holds_is_a_session_once_it_is_touched() -> None:
    table = table_of()
    session = table.hold(CLIENT, HERE, 100.9)
    assert (session.client_id, session.digest, session.pinned_at) == (CLIENT, HERE, 100)
    assert (len(table), table.counts) == (0, {})
    table.touch(session, 0.0)
    assert table.counts == {HERE: 1}
    assert table.hold(CLIENT, HERE, 200) is session
    assert session.pinned_at == 100, "as it was"


def test_a_key_that_leads_elsewhere_moves_the_session() -> None:
    """Whatever the times are: the key says where the app has it now."""
    table = table_of()
    session = present(table, value_of(HERE, pinned_at=100))
    table.touch(session, 0.0)
    table.take_changes()
    assert table.hold(CLIENT, THERE, 99.5) is session
    assert (session.digest, session.pinned_at, table.counts) == (THERE, 99, {THERE: 1})
    assert table.take_changes() == ([session], [])


@pytest.mark.parametrize(("count", "is_left"), [(0, False), (1, False), (2, True)])
def test_a_session_ends_unless_more_of_it_is_open_than_the_exchange_that_says_so(count: int, *, is_left: bool) -> None:
    table = table_of()
    session = used(table, 1, now=0.0)
    other = used(table, 2, now=0.0)
    session.open = count
    table.take_changes()
    table.end(session)
    assert table.counts == {HERE: 2 if is_left else 1}
    assert table.take_changes() == ([], [] if is_left else [session.client_id])
    assert list(table._active.values())[-1] is other
    session.open = 0
    table.end(session)
    table.end(session)
    assert table.counts == {HERE: 1}, "once"
    table.touch(session, 1.0)
    assert table.counts == {HERE: 2}, "and it may begin again"


def test_what_is_no_active_session_does_not_end() -> None:
    table = table_of()
    session = used(table, 1, now=0.0)
    table.end(table.begin(session.client_id, THERE, 100))
    table.end(table.begin(CLIENT, HERE, 100))
    assert table.counts == {HERE: 1}


# Bounds


@pytest.fixture
def three_verified(monkeypatch: pytest.MonkeyPatch) -> SessionTable:
    monkeypatch.setattr(sessions_module, "_MAX_VERIFIED", 3)
    return table_of()


def test_only_so_many_tokens_are_remembered(three_verified: SessionTable) -> None:
    table = three_verified
    values = [value_of(client=b"%010d" % number) for number in range(10)]
    for value in values:
        table.present(value, 100)
        assert len(table._verified) <= 3
    assert list(table._verified) == values[-3:]


def test_a_forgotten_token_finds_its_session_again(three_verified: SessionTable) -> None:
    table = three_verified
    value = value_of()
    session = present(table, value)
    table.touch(session, 0.0)
    for number in range(5):
        table.present(value_of(client=b"%010d" % number), 100)
    assert value not in table._verified
    assert present(table, value) is session


def test_only_so_many_sessions_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "_MAX_EXPIRED_AT_ONCE", 4)
    table = table_of()
    for number in range(10):
        table.touch(table.begin(b"%010d" % number, HERE, 100), 0.0)
    left = []
    for _ in range(4):
        table.expire(1000.0)
        left.append(len(table))
    assert left == [6, 2, 0, 0]
    assert table.counts == {}


def test_repr_shows_the_state() -> None:
    assert repr(Session(b"\x01", b"\x02", 0)) == "<Session 01 at 02 open=0>"


# From one table to another


def used(table: SessionTable, number: int, now: float, digest: bytes = HERE, pinned_at: int = 100) -> Session:
    session = table.find(b"%010d" % number, digest, pinned_at)
    table.touch(session, now)
    return session


def test_active_sessions_go_to_another_table_in_pieces() -> None:
    old, new = table_of(), table_of()
    for number in range(7):
        used(old, number, now=10.0 + number, digest=HERE if number % 2 else THERE)
    pieces = list(old.export(20.0, at_once=3))
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert pieces[0][0] == (b"%010d" % 0, THERE, 100, 10.0)
    for piece in pieces:
        new.take_in(piece, 1020.0)
    assert new.counts == old.counts == {HERE: 3, THERE: 4}
    new.expire(1010.0 + IDLE_S + 2)
    assert len(new) == 4, "each with the time that it had left"
    assert present(new, value_of(HERE, b"%010d" % 5)) is new._active[b"%010d" % 5]


def test_a_table_may_be_used_while_it_is_exported() -> None:
    table = table_of()
    for number in range(4):
        used(table, number, now=10.0)
    pieces = table.export(20.0, at_once=2)
    assert len(next(pieces)) == 2
    table.expire(10.0 + IDLE_S)
    used(table, 3, now=80.0)
    used(table, 9, now=80.0)
    assert [one.client_id for one in next(pieces)] == [b"%010d" % 3]
    assert next(pieces, None) is None


def test_an_empty_table_exports_nothing() -> None:
    assert list(table_of().export(20.0, at_once=2)) == []


def test_what_is_known_here_is_only_changed_by_what_is_later() -> None:
    old, new = table_of(), table_of()
    used(old, 1, now=10.0, digest=THERE, pinned_at=200)
    used(old, 2, now=10.0, digest=THERE, pinned_at=50)
    used(old, 3, now=19.0)
    moved, kept = used(new, 1, now=15.0), used(new, 2, now=15.0)
    (piece,) = old.export(20.0, at_once=10)
    new.take_in(piece, 20.0)
    assert (moved.digest, moved.pinned_at, moved.active_at) == (THERE, 200, 15.0)
    assert (kept.digest, kept.pinned_at, kept.active_at) == (HERE, 100, 15.0)
    assert new.counts == {THERE: 1, HERE: 2}
    new.take_in(piece, 30.0)
    times = [one.active_at for one in new._active.values()]
    assert times == sorted(times), "the longest unused is first"
    assert moved.active_at == kept.active_at == 20.0
    used(new, 4, now=90.0)
    used(old, 5, now=20.0)
    new.take_in(list(old.export(90.0, at_once=10))[-1], 90.0)
    assert new._active[b"%010d" % 5].active_at == 90.0, "behind the one that was used here just now"
    new.expire(70.0 + IDLE_S)
    assert b"%010d" % 5 in new._active


def test_idle_sessions_are_forgotten_once_another_table_has_them() -> None:
    table = table_of()
    busy = used(table, 1, now=10.0)
    busy.open = 1
    used(table, 2, now=10.0)
    used(table, 3, now=10.0, digest=THERE)
    table.forget_idle()
    assert table.counts == {HERE: 1}
    assert list(table._active.values()) == [busy]


# Other secrets and lifetimes


def test_another_table_gives_its_secrets_and_the_sessions_stay() -> None:
    table = table_of()
    old_value = value_of()
    session = present(table, old_value)
    table.touch(session, 0.0)
    new_codec = TokenCodec([b"new", b"secret"])
    table.adopt(SessionTable(new_codec, Lifetimes(), idle_s=IDLE_S))
    assert table.counts == {HERE: 1}
    assert present(table, old_value) is session, "the old secret verifies still"
    written = table.write_token(session, 100)
    assert CODEC.parse(written, 100) is None, "and the new one signs"
    assert new_codec.parse(written, 100) == Token(HERE, CLIENT, 100, 100)
    table.adopt(SessionTable(TokenCodec([b"new"]), Lifetimes(), idle_s=IDLE_S))
    assert table.present(old_value, 100) is None, "although it was verified before"
    assert present(table, written) is session
    assert table.counts == {HERE: 1}


def test_another_table_gives_its_lifetimes() -> None:
    table = table_of()
    value = value_of(pinned_at=100, seen_at=100)
    table.touch(present(table, value), 0.0)
    table.adopt(SessionTable(CODEC, Lifetimes(max_idle_s=50), idle_s=10.0, refresh_s=20))
    presented = table.present(value, 100)
    assert presented is not None
    assert (presented.expires_at, presented.refresh_at) == (150, 120)
    table.expire(9.9)
    assert len(table) == 1
    table.expire(10.0)
    assert len(table) == 0
    table.adopt(table_of())
    presented = table.present(value, 100)
    assert presented is not None
    assert (presented.expires_at, presented.refresh_at) == (float("inf"), float("inf"))


# What others are told


def names(began: list[Session]) -> set[bytes]:
    return {session.client_id[-1:] for session in began}


def test_the_first_changes_are_all_sessions_and_then_only_what_has_changed() -> None:
    table = table_of()
    used(table, 1, now=0.0)
    used(table, 2, now=0.0)
    table.begin(b"%010d" % 3, HERE, 100)
    began, ended = table.take_changes()
    assert (names(began), ended) == ({b"1", b"2"}, [])
    assert table.take_changes() == ([], [])
    used(table, 1, now=5.0)
    assert table.take_changes() == ([], []), "who goes on has told all already"
    used(table, 3, now=10.0)
    began, ended = table.take_changes()
    assert (names(began), ended) == ({b"3"}, [])
    table.expire(0.0 + IDLE_S)
    assert table.take_changes() == ([], [b"%010d" % 2])


def test_a_session_that_is_moved_has_changed() -> None:
    table = table_of()
    session = used(table, 1, now=0.0)
    table.take_changes()
    table.move(session, THERE, 200)
    (moved,), ended = table.take_changes()
    assert (moved.digest, moved.pinned_at, ended) == (THERE, 200, [])
    idle = table.begin(b"%010d" % 2, HERE, 100)
    table.move(idle, THERE, 200)
    assert table.take_changes() == ([], []), "one that is not active is nobody's business"


def test_a_session_that_began_and_ended_since_is_said_to_have_ended() -> None:
    table = table_of()
    table.take_changes()
    used(table, 1, now=0.0)
    table.expire(IDLE_S)
    assert table.take_changes() == ([], [b"%010d" % 1])
    used(table, 2, now=100.0)
    table.take_changes()
    table.forget_idle()
    used(table, 2, now=101.0)
    began, ended = table.take_changes()
    assert (names(began), ended) == ({b"2"}, []), "one that ended and began again has begun"


def test_after_changes_are_forgotten_all_sessions_are_told_again() -> None:
    table = table_of()
    used(table, 1, now=0.0)
    table.take_changes()
    used(table, 2, now=0.0)
    table.forget_changes()
    used(table, 3, now=0.0)
    began, ended = table.take_changes()
    assert (names(began), ended) == ({b"1", b"2", b"3"}, [])
    assert table.take_changes() == ([], [])


def test_what_is_not_told_yet_is_counted_by_upstream() -> None:
    table = table_of()
    session = used(table, 1, now=0.0)
    assert table.count_unreported(HERE) == 1, "nobody was told anything"
    table.take_changes()
    assert (table.count_unreported(HERE), table.count_unreported(THERE)) == (0, 0)
    used(table, 2, now=0.0)
    used(table, 3, now=0.0, digest=THERE)
    assert (table.count_unreported(HERE), table.count_unreported(THERE)) == (1, 1)
    table.move(session, THERE, 200)
    assert (table.count_unreported(HERE), table.count_unreported(THERE)) == (0, 2)
    table.take_changes()
    table.expire(IDLE_S)
    assert (table.count_unreported(HERE), table.count_unreported(THERE)) == (-1, -2), "less than was told"
    table.take_changes()
    assert (table.count_unreported(HERE), table.count_unreported(THERE)) == (0, 0)


# Any order of events


class Sessions(RuleBasedStateMachine):
    """The model: each session's upstream, and which session of a client is active since when."""

    known = Bundle("known")

    @initialize()
    def start(self) -> None:
        self.table = table_of()
        self.now = 0.0
        self.wall = 100
        self.digest: dict[Session, bytes] = {}
        self.pinned_at: dict[Session, int] = {}
        self.active: dict[bytes, Session] = {}
        self.since: dict[Session, float] = {}
        self.verified: dict[bytes, Session] = {}
        self.told: dict[bytes, tuple[bytes, int]] = {}  # what one knows who takes each change

    @rule(seconds=st.sampled_from([1, 20, 61]))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.wall += seconds

    @rule(target=known, client=CLIENTS, digest=DIGESTS)
    def begin(self, client: bytes, digest: bytes) -> Session:
        session = self.table.begin(client, digest, self.wall)
        self.digest[session], self.pinned_at[session] = digest, self.wall
        return session

    @rule(target=known, client=CLIENTS, digest=DIGESTS, age=st.sampled_from([0, 1, 50]), seen=st.integers(0, 1))
    def present(self, client: bytes, digest: bytes, age: int, seen: int) -> Session:
        pinned_at = self.wall - age
        value = value_of(digest, client, pinned_at=pinned_at, seen_at=pinned_at + seen)
        session = present(self.table, value, self.wall)
        expected = self.verified.get(value) or self.active.get(client)
        if expected is None:
            assert session not in self.digest
            self.digest[session], self.pinned_at[session] = digest, pinned_at
        else:
            assert session is expected
            if value not in self.verified and pinned_at > self.pinned_at[session]:
                self.digest[session], self.pinned_at[session] = digest, pinned_at
        self.verified[value] = session
        return session

    @rule(session=known)
    def touch(self, session: Session) -> None:
        self.table.touch(session, self.now)
        before = self.active.get(session.client_id)
        if before is not None:
            self.digest[session], self.pinned_at[session] = self.digest[before], self.pinned_at[before]
        self.active[session.client_id] = session
        self.since[session] = self.now

    @rule(target=known, client=CLIENTS, digest=DIGESTS)
    def hold(self, client: bytes, digest: bytes) -> Session:
        session = self.table.hold(client, digest, self.wall)
        expected = self.active.get(client)
        assert expected is None or session is expected
        if expected is None or self.digest[session] != digest:
            self.digest[session], self.pinned_at[session] = digest, self.wall
        return session

    @rule(session=known)
    def end(self, session: Session) -> None:
        self.table.end(session)
        if session.open <= 1 and self.active.get(session.client_id) is session:
            del self.active[session.client_id]

    @rule(session=known, digest=DIGESTS)
    def move(self, session: Session, digest: bytes) -> None:
        self.table.move(session, digest, self.wall)
        self.digest[session], self.pinned_at[session] = digest, self.wall

    @rule(session=known)
    def open(self, session: Session) -> None:
        session.open += 1
        self.touch(session)

    @rule(session=known)
    def close(self, session: Session) -> None:
        if session.open:
            session.open -= 1

    @rule()
    def expire(self) -> None:
        self.table.expire(self.now)
        for client, session in list(self.active.items()):
            if self.since[session] + IDLE_S > self.now:
                continue
            if session.open:
                self.since[session] = self.now
            else:
                del self.active[client]

    @rule()
    def tell(self) -> None:
        began, ended = self.table.take_changes()
        self.told |= {one.client_id: (one.digest, one.pinned_at) for one in began}
        for client in ended:
            self.told.pop(client, None)
        assert self.told == {
            client: (self.digest[session], self.pinned_at[session]) for client, session in self.active.items()
        }
        assert all(self.table.count_unreported(digest) == 0 for digest in (HERE, THERE, GONE))

    @rule()
    def tell_all_again(self) -> None:
        self.table.forget_changes()
        self.told.clear()
        self.tell()

    @invariant()
    def what_is_not_told_is_the_difference(self) -> None:
        told = Counter(digest for digest, _ in self.told.values())
        for digest in (HERE, THERE, GONE):
            assert self.table.count_unreported(digest) == self.table.counts.get(digest, 0) - told[digest]

    @invariant()
    def the_counts_are_those_of_the_model(self) -> None:
        assert self.table.counts == Counter(self.digest[session] for session in self.active.values())
        assert len(self.table) == len(self.active)
        assert all(count > 0 for count in self.table.counts.values())

    @invariant()
    def each_session_is_where_the_model_says(self) -> None:
        for session, digest in self.digest.items():
            assert (session.digest, session.pinned_at) == (digest, self.pinned_at[session])

    @invariant()
    def an_active_open_session_has_not_ended(self) -> None:
        for session in self.active.values():
            assert self.table._active[session.client_id] is session

    @invariant()
    def the_longest_unused_is_first(self) -> None:
        times = [session.active_at for session in self.table._active.values()]
        assert times == sorted(times)


Sessions.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestSessions = Sessions.TestCase


def test_the_model_finds_a_table_that_forgets_to_count() -> None:
    machine = Sessions()
    machine.start()
    session = machine.begin(CLIENT, HERE)
    machine.touch(session)
    machine.the_counts_are_those_of_the_model()
    machine.table.counts[HERE] += 1
    with pytest.raises(AssertionError):
        machine.the_counts_are_those_of_the_model()
