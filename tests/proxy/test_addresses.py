"""Connections by client address: what is counted, and who is apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.proxy.addresses import AddressCounts
from stickyproxy.proxy.board import Board
from stickyproxy.proxy.settings import OFF, Settings
from stickyproxy.wire.forwarded import ConnectionOrigin
from tests.helpers.raw import GET, eventually
from tests.helpers.tunnels import ACCEPT, HANDSHAKE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.plane import PlaneUnderTest, Start


def origin(address: str, *, is_trusted: bool = False) -> ConnectionOrigin:
    return ConnectionOrigin(address, "80", is_https=False, is_trusted=is_trusted)


def test_an_address_has_its_places_and_no_more() -> None:
    counts, one, other = AddressCounts(2), origin("10.0.0.1"), origin("10.0.0.2")
    assert [counts.admit(one) for _ in range(3)] == [True, True, False]
    assert counts.admit(other)
    counts.release(one)
    assert not counts.admit(one)
    for _ in range(2):
        counts.release(one)
    assert counts.admit(one)
    for _ in range(2):
        counts.release(one)
    counts.release(other)
    assert repr(counts) == "<AddressCounts of 0 addresses>"


@pytest.mark.parametrize("apart", [origin("10.0.0.1", is_trusted=True), origin("unix"), origin("unknown")])
def test_those_who_stand_for_many_are_not_counted(apart: ConnectionOrigin) -> None:
    counts = AddressCounts(1)
    assert [counts.admit(apart) for _ in range(3)] == [True, True, True]
    counts.release(apart)
    assert repr(counts) == "<AddressCounts of 0 addresses>"


def test_without_a_limit_nothing_is_counted() -> None:
    counts = AddressCounts(OFF)
    assert counts.admit(origin("10.0.0.1"))
    assert repr(counts) == "<AddressCounts of 0 addresses>"
    counts.release(origin("10.0.0.1"))


async def test_a_client_with_too_many_connections_hears_so_and_comes_again_when_one_ends(start: Start) -> None:
    proxy = await start(settings=Settings(connections_per_address=2))
    first = await proxy.client()
    tunnel, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(ACCEPT)
    assert (await tunnel.read_message()).status == 101
    refused = await proxy.client()
    response = await refused.read_response()
    assert (response.status, response["Connection"]) == (503, "close")
    assert "http_request_denied" in response["Proxy-Status"]
    refused.close()
    tunnel.reset()
    await eventually(lambda: not proxy.plane.tunnels and len(proxy.plane.downstreams) == 1)
    again, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"served")
    assert (await again.read_response()).body == b"served"
    first.send(GET)
    (await proxy.upstream.accept() if app.is_over else app).answer(b"still served")
    assert (await first.read_response()).body == b"still served"


def test_what_is_released_without_having_been_counted_is_nothing() -> None:
    """As of a connection that was opened while there was no limit."""
    counts = AddressCounts(1)
    counts.release(origin("10.0.0.1"))
    assert [counts.admit(origin("10.0.0.1")) for _ in range(2)] == [True, False]


def test_another_limit_counts_what_is_open(board: Board) -> None:
    counts, other = workers(board, 2, OFF)
    one = origin("10.0.0.1")
    assert counts.admit(one)
    counts.recount(2, [one, one, origin("unix"), origin("10.0.0.2")])
    other.recount(3, [])
    assert counts._counts == {"10.0.0.1": 2, "10.0.0.2": 1}
    assert [other.admit(one) for _ in range(2)] == [True, False]
    counts.recount(OFF, [one, one])
    assert counts._counts == {}
    assert other.admit(one), "those of a worker without a limit are unknown"


# Several workers


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


def workers(board: Board, count: int, limit: float) -> list[AddressCounts]:
    made = [AddressCounts(limit) for _ in range(count)]
    for index, one in enumerate(made):
        one.share(board.place(index).addresses)
    return made


def test_an_address_has_its_places_at_all_workers_together(board: Board) -> None:
    first, second, third = workers(board, 3, 3)
    one, other = origin("10.0.0.1"), origin("10.0.0.2")
    assert [counts.admit(one) for counts in (first, second, third)] == [True, True, True]
    assert [counts.admit(one) for counts in (first, second, third)] == [False, False, False]
    assert [counts.admit(other) for counts in (first, second, third)] == [True, True, True]
    for counts in (first, second, third):
        counts.release(one)
    assert not second.admit(one), "those that were refused are open still"
    for counts in (first, second, third, second):
        counts.release(one)
    assert second.admit(one)


def test_so_many_times_the_limit_is_of_all_together_too(board: Board) -> None:
    first, second = workers(board, 2, 2)
    one = origin("10.0.0.1")
    assert [counts.admit(one, times=2) for counts in (first, second, first, second, first)] == [True] * 4 + [False]


def test_without_a_board_each_worker_counts_alone() -> None:
    """What the others do is known by the board alone."""
    first, second = AddressCounts(1), AddressCounts(1)
    assert first.admit(origin("10.0.0.1"))
    assert second.admit(origin("10.0.0.1"))


def test_what_was_counted_before_the_board_is_there_is_shown_on_it(board: Board) -> None:
    first, second = AddressCounts(2), AddressCounts(2)
    one = origin("10.0.0.1")
    assert [first.admit(one) for _ in range(2)] == [True, True]
    first.share(board.place(0).addresses)
    second.share(board.place(1).addresses)
    assert not second.admit(one)
    second.share(None)
    assert second.admit(one), "alone again"


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["10.0.0.1", "10.0.0.2"]), st.booleans()), max_size=60)
)
def test_any_order_of_coming_and_going_is_counted_exactly(steps: list[tuple[int, str, bool]]) -> None:
    board = Board.create()
    made = workers(board, 3, 4)
    open_now: list[tuple[int, str]] = []
    for worker, address, is_coming in steps:
        if is_coming:
            is_admitted = made[worker].admit(origin(address))
            open_now.append((worker, address))
            assert is_admitted == (sum(one == address for _, one in open_now) <= 4)
        elif (worker, address) in open_now:
            made[worker].release(origin(address))
            open_now.remove((worker, address))
    for worker, address in open_now:
        made[worker].release(origin(address))
    assert all(not one._counts for one in made)
    assert all(cells.count_elsewhere("10.0.0.1") == 0 for cells in (board.place(9).addresses,))
    board.close()


async def refused(proxy: PlaneUnderTest) -> bool:
    """Connect; say whether the connection is one too many, else it stays open and idle."""
    before = proxy.plane.counters.connections
    client = await proxy.client()
    await eventually(lambda: proxy.plane.counters.connections > before)
    client.send(GET)
    await eventually(lambda: client.received_bytes or any(link.held for link in proxy.upstream.links))
    if client.received_bytes:
        assert (await client.read_response()).status == 503
        client.close()
        await eventually(lambda: client.is_lost)
        return True
    link = next(link for link in proxy.upstream.links if link.held)
    await link.read_request()
    link.answer()
    assert (await client.read_response()).status == 200
    return False


async def test_a_client_has_its_connections_at_two_workers_and_no_more(start: Start, board: Board) -> None:
    limited = Settings(connections_per_address=2)
    first, second = await start(settings=limited), await start(settings=limited)
    first.plane.place, second.plane.place = board.place(0), board.place(1)
    assert not await refused(first)
    assert not await refused(second)
    assert await refused(first)
    assert await refused(second)
    first._clients[0].close()
    await eventually(lambda: not first.plane.connections)
    await eventually(lambda: len(second.plane.downstreams) == 1)
    assert not await refused(second)
    first.plane.place = None
    assert not await refused(first), "alone it knows of no other"
