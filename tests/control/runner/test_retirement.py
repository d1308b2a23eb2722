"""Processes end when nothing of them is in use, or at the drain timeout."""

import asyncio
import math
from collections.abc import Sequence

from stickyproxy.control.runner.retirement import Retirement
from stickyproxy.tasks import spawn
from tests.helpers.supervised import until


class Seat:
    """A process as a retirement sees it."""

    def __init__(self, name: str, sessions: int = 0, tunnels: int = 0) -> None:
        self.id = name
        self.state = "ready"
        self.sessions, self.tunnels = sessions, tunnels
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        self.ended.set_result(None)


class Host:
    """A runner with a clock of the test's own, that notes what it is asked to do."""

    grace_s = 5.0

    def __init__(self) -> None:
        self.now = 1000.0
        self.seats: dict[str, Seat] = {}
        self.noted: list[str] = []
        self.pace_per_s = 0.0

    def drain(self, seats: Sequence[Seat]) -> None:
        self.noted.extend(f"{seat.id} drain" for seat in seats)

    def is_empty(self, seat: Seat) -> bool:
        return not (seat.sessions or seat.tunnels)

    def is_idle(self, seat: Seat) -> bool:
        return not seat.tunnels

    def count_sessions(self, seat: Seat) -> int:
        return seat.sessions

    def close_pins(self, seats: Sequence[Seat]) -> None:
        self.noted.extend(f"{seat.id} closing" for seat in seats)

    async def settle(self) -> None:
        """Nobody has to be told."""

    async def shut_tunnels(self, seats: Sequence[Seat], per_s: float, _: str) -> int:
        self.pace_per_s = per_s
        self.noted.extend(f"{seat.id} shut" for seat in seats)
        return sum(seat.tunnels for seat in seats)


def retire(host: Host, seats: list[Seat], drain_timeout_s: float | None = 60.0) -> Retirement:
    return Retirement(host, seats, drain_timeout_s, 20.0)  # type: ignore[arg-type]  # all that it asks a runner for


async def test_an_empty_one_ends_at_once_and_the_others_when_their_sessions_have() -> None:
    host, empty, used = Host(), Seat("empty"), Seat("used", sessions=2, tunnels=1)
    retirement = retire(host, [empty, used])
    running = spawn(retirement.run(), "retire")
    await until(empty.ended.done)
    assert (empty.state, used.state) == ("draining", "draining")
    assert host.noted[:2] == ["empty drain", "used drain"]
    assert retirement.sessions_left == 2
    used.sessions = used.tunnels = 0
    await asyncio.wait_for(running, 60)
    assert used.ended.done()
    assert "used shut" not in host.noted
    assert retirement.left == ()


async def test_at_the_drain_timeout_the_rest_is_closed_at_its_pace() -> None:
    host, used = Host(), Seat("used", sessions=2, tunnels=2)
    retirement = retire(host, [used])
    running = spawn(retirement.run(), "retire")
    await until(lambda: "used drain" in host.noted)
    host.now += 61
    await until(lambda: "used shut" in host.noted)
    assert host.pace_per_s == 20.0
    assert host.noted.index("used closing") < host.noted.index("used shut")
    assert not used.ended.done()
    used.tunnels = 0  # a session does not keep it, what is under way does
    await asyncio.wait_for(running, 60)
    assert used.ended.done()


async def test_what_never_ends_has_the_grace_and_no_more() -> None:
    host, used = Host(), Seat("used", sessions=1, tunnels=40)
    running = spawn(retire(host, [used], 0.0).run(), "retire")
    await until(lambda: "used shut" in host.noted)
    host.now += 40 / 20 + host.grace_s - 1
    await asyncio.sleep(0.5)  # some looks
    assert not used.ended.done()
    host.now += 2
    await asyncio.wait_for(running, 60)
    assert used.ended.done()


async def test_without_a_drain_timeout_it_waits_as_long_as_it_takes() -> None:
    host, used = Host(), Seat("used", sessions=1)
    retirement = retire(host, [used], None)
    assert math.isinf(retirement.close_at)
    running = spawn(retirement.run(), "retire")
    await until(lambda: "used drain" in host.noted)
    host.now += 1e9
    await asyncio.sleep(0.5)  # some looks
    assert not used.ended.done()
    used.sessions = 0
    await asyncio.wait_for(running, 60)


async def test_one_that_dies_needs_no_more() -> None:
    host, used = Host(), Seat("used", sessions=1)
    running = spawn(retire(host, [used], None).run(), "retire")
    await until(lambda: "used drain" in host.noted)
    used.ended.set_result(None)
    await asyncio.wait_for(running, 60)
    assert "used closing" not in host.noted


async def test_another_image_goes_on_with_what_is_left() -> None:
    host, used, gone = Host(), Seat("used", sessions=1), Seat("gone")
    host.seats = {"used": used}
    retirement = retire(host, [used, gone])
    gone.ended.set_result(None)
    host.now += 20
    left = retirement.leave()
    assert left == {"ids": ["used"], "left_s": 40.0, "pace_per_s": 20.0}
    again = Retirement.adopt(host, left | {"ids": ["used", "who"]})  # type: ignore[arg-type]
    assert [seat.id for seat in again.seats] == ["used"]
    assert again.close_at == host.now + 40.0
    assert retire(host, [used], None).leave()["left_s"] is None
