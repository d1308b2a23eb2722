"""Processes that are too large or too old are replaced, and their number follows the sessions."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.config import Run
from stickyproxy.control.runner.care import _SHRINK_AFTER_S, Care
from stickyproxy.control.runner.usage import Usage

MIB = 1 << 20


@dataclass(eq=False)
class Seat:
    """A process that is ready, unless a test says otherwise."""

    id: str
    sessions: int = 0
    memory_bytes: int = 10 * MIB
    started_at: float = 0.0
    state: str = "ready"
    ready_at: float = 0.0

    def __post_init__(self) -> None:
        self.process = self
        self.first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()


@dataclass
class Host:
    """A runner that notes what it is asked to do."""

    settings: Run
    serving: list[Seat]
    now: float = 100.0
    is_turning: bool = False
    replaced: list[str] = field(default_factory=list)
    scaled: list[int] = field(default_factory=list)
    admin_states: dict[str, AdminState] = field(default_factory=dict)
    looks_at_changes: int = 0

    @property
    def live_reload(self) -> "Host":
        return self

    def deploy_if_due(self) -> None:
        """Note that somebody asks whether files have changed."""
        self.looks_at_changes += 1

    def resize_if_due(self) -> None:
        """Nothing is due."""

    @property
    def processes(self) -> int:
        return self.scaled[-1] if self.scaled else len(self.serving)

    def measure(self, seat: Seat) -> Usage:
        return Usage(seat.memory_bytes, 0.0)

    def count_sessions(self, seat: Seat) -> int:
        return seat.sessions

    def replace(self, seat: Seat) -> Seat:
        self.replaced.append(seat.id)
        return Seat(f"{seat.id}-new")

    def scale(self, processes: int) -> None:
        self.scaled.append(processes)


def care_for(host: Host) -> Care:
    return Care(host)  # type: ignore[arg-type]  # all that it asks a runner for


def settings(**more: Any) -> Run:
    return Run.model_validate({"command": "app", **more})


async def test_one_that_is_too_large_is_replaced_and_then_the_next() -> None:
    seats = [Seat("a"), Seat("b", memory_bytes=300 * MIB), Seat("c", memory_bytes=400 * MIB)]
    host = Host(settings(processes=3, max_memory="200MiB"), seats)
    care = care_for(host)
    care._look()
    care._look()
    assert host.replaced == ["b"], "one at a time"
    assert care._replaced is not None
    new: Any = care._replaced[1]
    new.first.set_result("")
    host.serving = [seats[0], seats[2], new]
    care._look()
    assert host.replaced == ["b"], "it drains"
    seats[1].ended.set_result(None)
    care._look()
    assert host.replaced == ["b", "c"]


async def test_one_whose_replacement_does_not_start_is_not_replaced_again_and_again() -> None:
    host = Host(settings(max_memory="200MiB"), [Seat("a", memory_bytes=300 * MIB)])
    care = care_for(host)
    care._look()
    assert care._replaced is not None
    care._replaced[1].first.set_result("exit status 1")
    care._look()
    assert host.replaced == ["a"]
    host.now += 61
    care._look()
    assert host.replaced == ["a", "a"]


async def test_one_that_is_too_large_from_its_start_on_is_only_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Another one would be as large."""
    host = Host(settings(max_memory="200MiB"), [Seat("a", memory_bytes=300 * MIB, ready_at=95.0)])
    care = care_for(host)
    for _ in range(3):
        care._look()
    assert host.replaced == []
    assert caplog.text.count("less than the app needs") == 1
    host.now += 10
    care._look()
    assert host.replaced == ["a"]


async def test_one_that_operators_have_drained_does_not_keep_it_from_growing() -> None:
    host = Host(settings(processes=ADAPTIVE), [Seat("a", 10), Seat("b", 10), Seat("c", 0)])
    host.admin_states = {"c": AdminState.DRAIN}
    care_for(host)._look()
    assert host.scaled == [4]


@pytest.mark.parametrize(("age_s", "is_replaced"), [(50.0, False), (61.0, True)])
async def test_one_that_is_too_old_is_replaced(age_s: float, is_replaced: bool) -> None:  # noqa: FBT001
    host = Host(settings(max_age="60s"), [Seat("a", started_at=100.0 - age_s)])
    care_for(host)._look()
    assert host.replaced == (["a"] if is_replaced else [])


async def test_without_a_limit_nothing_is_replaced_and_nothing_scaled() -> None:
    host = Host(settings(), [Seat("a", sessions=10_000, memory_bytes=1 << 40)])
    care_for(host)._look()
    assert (host.replaced, host.scaled) == ([], [])


@pytest.mark.parametrize("state", ["starting", "waiting", "draining"])
async def test_only_one_that_is_ready_is_replaced(state: str) -> None:
    host = Host(settings(max_memory="200MiB"), [Seat("a", memory_bytes=300 * MIB, state=state)])
    care_for(host)._look()
    assert host.replaced == []


async def test_nothing_is_done_while_a_deploy_turns() -> None:
    host = Host(settings(max_memory="200MiB"), [Seat("a", memory_bytes=300 * MIB)], is_turning=True)
    care_for(host)._look()
    assert (host.replaced, host.looks_at_changes) == ([], 0)


async def test_changes_that_had_to_wait_are_deployed() -> None:
    host = Host(settings(), [Seat("a")])
    care_for(host)._look()
    assert host.looks_at_changes == 1


ADAPTIVE = {"min": 2, "max": 4, "sessions_each": 10}


@pytest.mark.parametrize(
    ("sessions", "scaled"),
    [
        ([10, 10], [3]),
        ([10, 9], []),
        ([50, 0], []),
        ([10, 10, 10, 10], []),  # as many as may be
        ([11, 12, 13], [4]),
    ],
)
async def test_it_grows_when_all_are_full(sessions: list[int], scaled: list[int]) -> None:
    host = Host(settings(processes=ADAPTIVE), [Seat(str(at), count) for at, count in enumerate(sessions)])
    care_for(host)._look()
    assert host.scaled == scaled


async def test_it_does_not_grow_while_one_is_starting() -> None:
    host = Host(settings(processes=ADAPTIVE), [Seat("a", 10), Seat("b", 10), Seat("c", 10, state="starting")])
    care_for(host)._look()
    assert host.scaled == []


async def test_it_shrinks_when_there_was_room_for_long_enough() -> None:
    seats = [Seat("a", 3), Seat("b", 3), Seat("c", 3)]
    host = Host(settings(processes=ADAPTIVE), seats)
    care = care_for(host)
    care._look()
    host.now += _SHRINK_AFTER_S / 2
    seats[0].sessions = 100
    care._look()  # for a moment there was none
    seats[0].sessions = 3
    care._look()
    host.now += _SHRINK_AFTER_S / 2
    care._look()
    assert host.scaled == []
    host.now += _SHRINK_AFTER_S / 2
    care._look()
    assert host.scaled == [2]


async def test_it_never_shrinks_below_the_least() -> None:
    host = Host(settings(processes=ADAPTIVE), [Seat("a"), Seat("b")])
    care = care_for(host)
    care._look()
    host.now += 10 * _SHRINK_AFTER_S
    care._look()
    assert host.scaled == []
