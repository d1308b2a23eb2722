"""Upstreams whose drain timeout is over: their tunnels are closed at a pace, and their clients are pinned anew."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from stickyproxy.affinity.sessions import Session
from stickyproxy.affinity.snapshot import Snapshot, upstream_digest
from stickyproxy.affinity.token import Token, TokenCodec
from stickyproxy.config import Config
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker import Worker
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.tunnel import Tunnel
from tests.helpers.plain_client import PlainClient
from tests.helpers.supervised import until
from tests.helpers.worker import DEADLINE_S, HANDSHAKE, SECRET, Namespace, Running, Upstream, running

OLD, NEW = upstream_digest("old"), upstream_digest("new")
FAST = 10_000.0  # clients a second


class Replaced:
    """A worker with an old upstream and a new one, which are told apart by who has received what."""

    def __init__(self, worker: Running, new: Upstream) -> None:
        self.worker = worker.worker
        self.port = worker.port
        self.old, self.new = worker.upstream, new
        self.clients: list[PlainClient] = []
        self.asked = 0

    def publish(self, *, is_closing: bool, has_new: bool = True) -> None:
        before, endpoints = self.worker.plane.default.snapshot, self.worker._endpoints
        states = tuple(
            replace(one, is_closing=is_closing and one.id == "old")
            for one in before.upstreams
            if has_new or one.id == "old"
        )
        self.worker.publish([Snapshot(before.cluster, states, before.rules)], endpoints)

    async def open(self, cookie: str) -> "Client":
        client = await PlainClient.connect(self.port)
        self.clients.append(client)
        client.send("/ws", fields=HANDSHAKE | {"Cookie": cookie})
        status, fields = await client.receive_head()
        assert status == 101
        return Client(client, fields.get("set-cookie", ""))

    async def ask(self, cookie: str) -> str:
        """Return the name of the upstream that a request with a cookie goes to."""
        self.asked += 1
        mark = f"GET /{self.asked} ".encode()
        async with await PlainClient.connect(self.port) as client:
            assert (await client.ask(f"/{self.asked}", fields={"Cookie": cookie})).status == 200
        (name,) = [
            name
            for name, upstream in (("old", self.old), ("new", self.new))
            if any(head.startswith(mark) for head in upstream.received)
        ]
        return name

    @property
    def open_at(self) -> list[bytes]:
        """The upstreams of the tunnels that were not told to end."""
        return sorted(one.pool.digest for one in self.worker.plane.tunnels if not one.is_ending)


@dataclass
class Client:
    """The client of a tunnel, and the cookie that came with its 101."""

    link: PlainClient
    set_cookie: str

    async def receive_close(self) -> tuple[int, bytes]:
        async with asyncio.timeout(DEADLINE_S):
            first, size = await self.link._reader.readexactly(2)
            assert first == 0x88
            payload = await self.link._reader.readexactly(size)
        return int.from_bytes(payload[:2], "big"), payload[2:]


def cookie_of(number: int, digest: bytes = OLD) -> str:
    """Return the cookie of a client that was pinned a minute ago."""
    made = int(time.time()) - 60  # noqa: TID251 -- tokens use it
    token = Token(digest, b"client%04d" % number, made, made)
    return f"stickyproxy={TokenCodec([SECRET]).write(token).decode()}"


@asynccontextmanager
async def replaced(text: str = "") -> AsyncIterator[Replaced]:
    new = Upstream()
    server = await asyncio.start_server(new.serve, "127.0.0.1", 0)
    async with running(text) as worker:
        [before] = worker.worker.config.upstreams
        urls = {"old": f"http://{before.address}", "new": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}
        written = [{"id": upstream_id, "url": url} for upstream_id, url in urls.items()]
        Routing(Config.model_validate({"upstreams": written}), worker.worker.publish)
        made = Replaced(worker, new)
        yield made
        for client in made.clients:
            await client.__aexit__(None, None, None)
    server.close()
    async with asyncio.timeout(DEADLINE_S):
        await server.wait_closed()


async def test_clients_of_a_closed_upstream_hear_why_and_are_at_another_from_then_on() -> None:
    async with replaced() as under:
        clients = [await under.open(cookie_of(number)) for number in range(5)]
        await under.open(cookie_of(9, NEW))
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], FAST, "another version") == 5
        for number, client in enumerate(clients):
            assert await client.receive_close() == (1012, b"another version")
            # Its tunnel is there yet: the client has not answered.
            assert await under.ask(cookie_of(number)) == "new"
            again = await under.open(cookie_of(number))
            assert again.set_cookie.startswith("stickyproxy=")
        await until(lambda: under.open_at == [NEW] * 6, "only tunnels to the other upstream are open")
        assert under.worker.plane.counters.breaks == {"closed": 5}
        assert under.worker.plane.sessions.counts == {NEW: 6}
        assert len([one for one in under.new.received if one.startswith(b"GET /ws ")]) == 6, "each of them came once"


async def test_the_pin_holds_until_the_turn_of_its_client() -> None:
    async with replaced() as under:
        await under.open(cookie_of(1))
        await under.open(cookie_of(2))
        under.publish(is_closing=True)
        under.worker.shut_upstreams([OLD], 1e-6, "slowly")
        await until(lambda: under.open_at == [OLD], "one has had its turn")
        assert sorted([await under.ask(cookie_of(number)) for number in (1, 2)]) == ["new", "old"]


async def test_all_tunnels_of_a_client_have_one_turn() -> None:
    """A page of which a part is here and a part there does not work."""
    async with replaced() as under:
        for number in (1, 1, 2, 2):
            await under.open(cookie_of(number))
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], 1e-6, "slowly") == 4
        await until(lambda: len(under.open_at) < 4, "a turn")
        assert under.open_at == [OLD] * 2
        assert sorted([await under.ask(cookie_of(number)) for number in (1, 2)]) == ["new", "old"]


async def test_a_frame_that_has_begun_is_never_cut() -> None:
    async with replaced() as under:
        client = await under.open(cookie_of(1))
        client.link._writer.write(b"\x82\x85\x00\x00\x00\x00he")  # 2 bytes of 5
        await until(lambda: under.worker.plane.tunnels and _passed(under.worker) >= 8, "the frame has begun")
        under.publish(is_closing=True)
        under.worker.shut_upstreams([OLD], FAST, "later")
        assert (await client.receive_close())[0] == 1012
        client.link._writer.write(b"llo")
        client.link._writer.write(b"\x88\x80\x00\x00\x00\x00")
        await until(lambda: len(under.old.received) == 2, "the tunnel has ended")
        sent = under.old.received[1]
        assert sent.startswith(b"\x82\x85\x00\x00\x00\x00hello\x88")


def _passed(worker: Worker) -> int:
    (tunnel,) = worker.plane.tunnels
    return tunnel.passed_bytes


async def test_tunnels_that_come_later_have_their_turn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stickyproxy.control.closing._LOOK_S", 0.01)
    async with replaced() as under:
        client = await PlainClient.connect(under.port)
        under.clients.append(client)
        client.send("/hold", fields={"Cookie": cookie_of(1)})
        await asyncio.wait_for(under.old.has_request.wait(), DEADLINE_S)
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], FAST, "over") == 0
        late = await under.open(cookie_of(1))  # the request that is under way holds the pin
        assert await late.receive_close() == (1012, b"over")
        again = await under.open(cookie_of(1))
        under.old.released.set()
        answer = await client.receive()
        assert (answer.status, answer.body) == (200, b"ok"), "never in the middle of a response"
        await until(lambda: under.open_at == [NEW], "it is at the other one")
        assert again.set_cookie
        under.publish(is_closing=False)
        await until(lambda: not under.worker._closings, "it is over")


async def test_without_the_state_only_what_is_open_is_closed_and_the_pins_hold() -> None:
    """A client that comes back must not be sent away again and again."""
    async with replaced() as under:
        client = await under.open(cookie_of(1))
        assert under.worker.shut_upstreams([OLD, b"unknown!"], FAST, "once") == 1
        assert await client.receive_close() == (1012, b"once")
        await until(lambda: not under.worker._closings, "it is over")
        again = await under.open(cookie_of(1))
        assert under.open_at == [OLD]
        assert again.set_cookie == ""
        assert under.worker.plane.counters.breaks == {}


async def test_where_there_is_no_other_upstream_the_tunnels_end_all_the_same() -> None:
    async with replaced() as under:
        client = await under.open(cookie_of(1))
        under.publish(is_closing=True, has_new=False)
        under.worker.shut_upstreams([OLD], FAST, "over")
        assert (await client.receive_close())[0] == 1012
        assert under.worker.plane.counters.breaks == {}


async def test_tunnels_of_no_session_are_closed_too() -> None:
    async with replaced("affinity: {cookie: false}") as under:
        clients = [await under.open("") for _ in range(4)]
        under.publish(is_closing=True)
        assert under.worker.shut_upstreams([OLD], FAST, "over") == 2
        await until(lambda: under.open_at == [NEW] * 2, "those of the other one stay")
        assert len(clients) == 4


async def test_what_is_no_pace_is_refused() -> None:
    async with replaced() as under:
        for pace in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="no pace"):
                under.worker.shut_upstreams([OLD], pace, "never")
        assert under.worker._closings == []


async def test_the_end_of_the_worker_ends_what_goes_on_slowly() -> None:
    async with replaced() as under:
        for number in range(3):
            await under.open(cookie_of(number))
        under.publish(is_closing=True)
        under.worker.shut_upstreams([OLD], 1e-6, "slowly")
        await until(lambda: len(under.open_at) == 2, "the first")
        await under.worker.close()
        await until(lambda: not under.worker._closings, "no task is left")


class Turns:
    """Stands in for the clock of the loop, which goes only where something sleeps, and notes who was told when."""

    def __init__(self, plane: Plane) -> None:
        self._loop = plane.loop
        self._plane = plane
        self.now = 1000.0
        self.late_s = 0.0
        self.told: list[tuple[float, str]] = []
        self.on_turn: Callable[[int], object] = lambda _: None

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(0)
        self.now += delay_s + self.late_s

    def add(self, name: str, digest: bytes, session: Session | None = None) -> "Open":
        tunnel = Open(self, name, digest, session)
        self._plane.tunnels.add(tunnel)  # type: ignore[arg-type]
        return tunnel


class Open:
    """A tunnel that notes when it was told to end."""

    upstream_id = ""

    def __init__(self, turns: Turns, name: str, digest: bytes, session: Session | None) -> None:
        self._turns = turns
        self.session = session
        self.name = name
        self.pool = SimpleNamespace(digest=digest)
        self.is_ending = False

    def shut(self, code: int, reason: str) -> None:
        assert (code, self.is_ending) == (1012, False), reason
        self.is_ending = True
        self._turns.told.append((self._turns.now - 1000, self.name))
        self._turns.on_turn(len(self._turns.told))

    def abort(self) -> None:
        pass


@asynccontextmanager
async def turning(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Worker, Turns]]:
    async with running() as worker:
        plane = worker.worker.plane
        turns = Turns(plane)
        with monkeypatch.context() as patched:
            patched.setattr(plane, "loop", turns)
            patched.setattr("stickyproxy.control.closing.asyncio", Namespace(asyncio, sleep=turns.sleep))
            yield worker.worker, turns
            plane.tunnels = set[Tunnel]()


async def test_so_many_clients_a_second_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(10):
            turns.add(f"{number}", OLD)
        turns.add("of another upstream", NEW)
        assert worker.shut_upstreams([OLD], 20.0, "over") == 10
        assert turns.told == [], "it goes on in the background"
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([number / 20 for number in range(10)])
        assert {name for _, name in turns.told} == {f"{number}" for number in range(10)}


async def test_timers_that_are_late_do_not_make_it_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        turns.late_s = 0.003
        for number in range(50):
            turns.add(f"{number}", OLD)
        worker.shut_upstreams([OLD], 100.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert turns.told[-1][0] == pytest.approx(49 / 100, abs=0.01)


async def test_after_a_long_pause_there_is_no_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(10):
            turns.add(f"{number}", OLD)

        def stall(turn: int) -> None:
            if turn == 3:
                turns.now += 60

        turns.on_turn = stall
        worker.shut_upstreams([OLD], 20.0, "over")
        await until(lambda: not worker._closings, "it is over")
        pauses = [later[0] - before[0] for before, later in itertools.pairwise(turns.told)]
        assert pauses == pytest.approx([0.05] * 2 + [60] + [0.05] * 6)


async def test_a_tunnel_that_has_ended_by_itself_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        tunnels = [turns.add(f"{number}", OLD) for number in range(6)]
        order = sorted(tunnels, key=list[object](worker.plane.tunnels).index)  # that of the set

        def end_two(turn: int) -> None:
            if turn == 2:
                for one in order[2:4]:
                    one.is_ending = True

        turns.on_turn = end_two
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([0, 1, 2, 3])


async def test_the_tunnels_of_one_session_count_for_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(3):
            session = Session(b"client%04d" % number, OLD, 0)
            session.open = 2
            for tab in "ab":
                turns.add(f"{number}{tab}", OLD, session)
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        times = [at for at, _ in turns.told]
        assert times == pytest.approx([0, 0, 1, 1, 2, 2])
        assert [len({name[0] for _, name in turns.told[at : at + 2]}) for at in (0, 2, 4)] == [1, 1, 1]


async def test_a_second_pace_takes_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(8):
            turns.add(f"{number}", OLD)

        def hurry(turn: int) -> None:
            if turn == 3:
                assert worker.shut_upstreams([OLD], 10.0, "faster") == 5

        turns.on_turn = hurry
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([0, 1, 2, 2.1, 2.2, 2.3, 2.4, 2.5])


async def test_being_told_again_and_again_is_no_way_round_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(6):
            turns.add(f"{number}", OLD)
        turns.on_turn = lambda turn: [worker.shut_upstreams([OLD], 1.0, "over") for _ in range(3)] if turn < 6 else 0
        worker.shut_upstreams([OLD], 1.0, "over")
        await until(lambda: not worker._closings, "it is over")
        assert [at for at, _ in turns.told] == pytest.approx([0, 1, 2, 3, 4, 5])


async def test_other_upstreams_keep_their_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with turning(monkeypatch) as (worker, turns):
        for number in range(3):
            turns.add(f"old {number}", OLD)
            turns.add(f"new {number}", NEW)
        assert worker.shut_upstreams([OLD, NEW], 1.0, "both") == 6
        assert worker.shut_upstreams([NEW], 10.0, "one") == 3
        first, second = worker._closings
        assert (first.digests, second.digests) == ({OLD}, {NEW})
        await until(lambda: not worker._closings, "it is over")
        assert len(turns.told) == 6
