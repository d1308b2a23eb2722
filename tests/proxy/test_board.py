"""The board: what workers know of each other, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.snapshot import upstream_digest
from stickyproxy.config.schema import MAX_WORKERS
from stickyproxy.proxy import board as board_module
from stickyproxy.proxy.board import MAX_SLOTS, AddressCells, Board, Place

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE, THERE, NOWHERE = (upstream_digest(name) for name in ("here", "there", "nowhere"))
SLOTS = {HERE: 0, THERE: MAX_SLOTS - 1}


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


def places_of(board: Board, *workers: int) -> list[Place]:
    places = [board.place(worker) for worker in workers]
    for place in places:
        place.slots = SLOTS
    return places


# Upstreams


def test_a_worker_reads_the_sessions_of_all_and_what_the_others_know_beyond(board: Board) -> None:
    first, second, last = places_of(board, 0, 1, MAX_WORKERS - 1)
    for slot, count in ((SLOTS[HERE], 10), (SLOTS[THERE], 20)):
        board.write_sessions(slot, count)
    first.write(HERE, 1)
    second.write(HERE, 2)
    last.write(HERE, 4)
    last.write(THERE, 5)
    assert [place.read(HERE) for place in (first, second, last)] == [16, 15, 13]
    assert [place.read(THERE) for place in (first, second, last)] == [25, 25, 20]
    second.write(HERE, 7)
    assert [place.read(HERE) for place in (first, second, last)] == [21, 15, 18]


def test_what_one_knows_may_be_less_than_nothing(board: Board) -> None:
    """A client that one worker has placed and that came back to another counts below zero there."""
    first, second = places_of(board, 0, 1)
    board.write_sessions(SLOTS[HERE], 5)
    second.write(HERE, -2)
    assert (first.read(HERE), second.read(HERE)) == (3, 5)
    second.write(HERE, -9)
    assert (first.read(HERE), second.read(HERE)) == (0, 5), "but never less in all"


def test_an_upstream_without_a_slot_has_no_load(board: Board) -> None:
    (place,) = places_of(board, 0)
    place.write(NOWHERE, 5)
    assert place.read(NOWHERE) == 0
    assert not any(place._cells)


def test_a_slot_is_cleared_for_another_upstream(board: Board) -> None:
    first, second = places_of(board, 0, 1)
    for digest, slot in SLOTS.items():
        board.write_sessions(slot, 3)
        first.write(digest, 1)
        second.write(digest, 1)
    board.clear_slot(SLOTS[HERE])
    assert (first.read(HERE), second.read(HERE)) == (0, 0)
    assert (first.read(THERE), second.read(THERE)) == (4, 4)


def test_a_worker_that_is_gone_is_forgotten_and_nobody_else(board: Board) -> None:
    first, second, third = places_of(board, 0, 1, 2)
    board.write_sessions(SLOTS[HERE], 1)
    for place in (first, second):
        place.write(HERE, 10)
        place.addresses.begin()
        place.addresses.add("10.0.0.1", 3)
    board.clear_worker(0)
    assert third.read(HERE) == 11
    assert third.addresses.count_elsewhere("10.0.0.1") == 3
    board.clear_worker(1)
    assert third.read(HERE) == 1
    assert third.addresses.count_elsewhere("10.0.0.1") == 0
    assert not any(board._counts[:MAX_WORKERS])


# Addresses


def cells_of(board: Board, *workers: int) -> list[AddressCells]:
    cells = [board.place(worker).addresses for worker in workers]
    for one in cells:
        one.begin()
    return cells


def test_an_address_is_counted_by_all_who_count(board: Board) -> None:
    first, second, last = cells_of(board, 0, 1, MAX_WORKERS - 1)
    first.add("10.0.0.1", 1)
    second.add("10.0.0.1", 2)
    last.add("10.0.0.1", 4)
    last.add("10.0.0.2", 8)
    assert [one.count_elsewhere("10.0.0.1") for one in (first, second, last)] == [6, 5, 3]
    assert [one.count_elsewhere("10.0.0.2") for one in (first, second, last)] == [8, 8, 0]
    second.add("10.0.0.1", -2)
    assert first.count_elsewhere("10.0.0.1") == 4
    last.clear()
    assert [one.count_elsewhere("10.0.0.1") for one in (first, second)] == [0, 1]
    last.add("10.0.0.1", 1)
    assert first.count_elsewhere("10.0.0.1") == 0, "who does not count is not looked at"
    last.begin()
    second.begin()
    assert first.count_elsewhere("10.0.0.1") == 1


def test_a_count_never_goes_below_nothing(board: Board) -> None:
    """What was cleared meanwhile, as that of a worker thought dead, must not hide what comes later."""
    first, second = cells_of(board, 0, 1)
    first.add("10.0.0.1", -1)
    first.add("10.0.0.1", 2)
    assert second.count_elsewhere("10.0.0.1") == 2


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 3)), max_size=60))
def test_addresses_that_share_cells_are_counted_too_often_and_never_too_seldom(
    connections: list[tuple[int, int, int]],
) -> None:
    """With rows so short that most share a cell, and both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board_module, "_COLUMNS", 4)
        board = Board.create()
        cells = cells_of(board, 0, 1, 2)
        for worker, number, count in connections:
            cells[worker].add(f"10.0.0.{number}", count)
        for number in range(41):
            counted = [one.count_elsewhere(f"10.0.0.{number}") for one in cells]
            for worker, count in enumerate(counted):
                real = sum(many for at, which, many in connections if which == number and at != worker)
                everyone = sum(many for at, _, many in connections if at != worker)
                assert real <= count <= everyone
        for worker, number, count in connections:
            cells[worker].add(f"10.0.0.{number}", -count)
        assert not any(board._counts[MAX_WORKERS:])
        board.close()


def test_an_address_that_shares_one_of_its_cells_counts_for_itself(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"one": (0, 32768), "other": (0, 32769), "third": (1, 32769)}
    monkeypatch.setattr(AddressCells, "_find", lambda _, address: found[address])
    first, second = cells_of(board, 0, 1)
    second.add("one", 100)
    second.add("third", 100)
    assert [first.count_elsewhere(name) for name in found] == [100, 100, 100]  # "other" shares both, with two
    second.add("third", -100)
    assert [first.count_elsewhere(name) for name in found] == [100, 0, 0]


def test_few_of_many_addresses_are_counted_too_often(board: Board) -> None:
    """The figure of the docstring: 10,000 connections elsewhere are 0.07 too many on average."""
    first, second = cells_of(board, 0, 1)
    for number in range(10_000):
        second.add(f"192.0.{number // 256}.{number % 256}", 1)
    excess = sum(first.count_elsewhere(f"10.0.{number // 256}.{number % 256}") for number in range(2000)) / 2000
    assert 0.03 < excess < 0.12
    one_row = sum(
        board._counts[second._at + first._find(f"10.0.{number // 256}.{number % 256}")[0]] for number in range(2000)
    )
    assert one_row / 2000 > 2 * excess, "with one row there would be many more"


def test_boards_have_keys_of_their_own(board: Board) -> None:
    """Nobody can look for addresses that share their cells with somebody else's."""
    other = Board.create()
    one, two = (made.place(0).addresses for made in (board, other))
    assert any(one._find(f"10.0.0.{number}") != two._find(f"10.0.0.{number}") for number in range(8))
    again = Board(os.dup(board.descriptor))
    assert again.place(5).addresses._find("10.0.0.1") == one._find("10.0.0.1"), "but one for all of its workers"
    again.close()
    other.close()


# The memory


_CHILD = """
import sys
from stickyproxy.proxy.board import Board
board = Board(int(sys.argv[1]))
place = board.place(1)
place.slots = {bytes.fromhex(sys.argv[2]): 7}
digest = bytes.fromhex(sys.argv[2])
place.addresses.begin()
print(place.read(digest), place.addresses.count_elsewhere("10.0.0.1"))
place.write(digest, -3)
place.addresses.add("10.0.0.1", 5)
"""


def test_two_processes_see_the_same_board(board: Board) -> None:
    board.write_sessions(7, 10)
    place = board.place(0)
    place.slots = {HERE: 7}
    place.write(HERE, 2)
    place.addresses.begin()
    place.addresses.add("10.0.0.1", 4)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(board.descriptor), HERE.hex()],
        pass_fds=[board.descriptor],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.split() == [b"12", b"4"]
    assert place.read(HERE) == 7
    assert place.addresses.count_elsewhere("10.0.0.1") == 5


def test_a_smaller_board_of_another_version_is_made_larger() -> None:
    descriptor = os.memfd_create("old")
    os.ftruncate(descriptor, MAX_SLOTS * 65 * 8)
    os.pwrite(descriptor, (42).to_bytes(8, sys.byteorder), 0)
    board = Board(descriptor)
    first, second = places_of(board, 0, 1)
    assert first.read(HERE) == 42
    first.addresses.begin()
    first.addresses.add("10.0.0.1", 2)
    assert second.addresses.count_elsewhere("10.0.0.1") == 2
    board.close()


def test_what_nobody_counts_takes_no_memory(board: Board) -> None:
    before = os.fstat(board.descriptor).st_blocks * 512
    (first, _) = cells_of(board, 0, 1)
    for number in range(1000):
        first.add(f"10.0.{number // 256}.{number % 256}", 1)
        first.count_elsewhere(f"10.0.{number // 256}.{number % 256}")
    assert os.fstat(board.descriptor).st_blocks * 512 - before <= 3 * 256 * 1024
    board.clear_worker(60)
    assert os.fstat(board.descriptor).st_blocks * 512 <= 3 * 256 * 1024 + 1024 * 1024


def test_a_board_is_closed_once(board: Board) -> None:
    descriptor = board.descriptor
    assert repr(board) == f"<Board {descriptor}>"
    assert repr(board.place(3)) == "<Place of worker 3 with 0 slots>"
    assert repr(board.place(3).addresses) == "<AddressCells of worker 3>"
    board.close()
    board.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
