"""One app process through its lives, as the runner sees it."""

import asyncio
from pathlib import Path

import pytest

from stickyproxy.affinity.snapshot import AdminState
from tests.helpers.runner import running_app
from tests.helpers.supervised import is_running, kill, until


async def test_one_that_is_held_serves_when_it_is_told_to(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (supervisor, runner):
        seat = runner.make(1, is_held=True)
        assert await asyncio.shield(seat.first) == ""
        assert seat.state == "ready"
        assert seat.id not in supervisor.routing.processes
        assert seat not in runner.serving
        seat.serve()
        assert supervisor.routing.admin_states[seat.id] is AdminState.READY
        assert seat in runner.serving


async def test_one_that_is_held_is_not_started_again(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        (tmp_path / "version").write_text("broken")
        seat = runner.make(2, is_held=True)
        assert "exit status 7" in await asyncio.shield(seat.first)
        await asyncio.shield(seat.ended)
        assert (seat.restarts, seat.state) == (0, "ended")
        assert seat.last_lines[-1] == "this version cannot start"
        assert seat.id not in runner.seats


async def test_one_of_an_older_generation_takes_no_new_clients(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (supervisor, runner):
        runner.generation = 2
        seat = runner.seats["g1-1"]
        assert seat.process is not None
        assert seat.process.process_id is not None
        kill(seat.process.process_id)
        await until(lambda: seat.restarts == 1 and seat.state == "ready")
        assert supervisor.routing.admin_states["g1-1"] is AdminState.DRAIN


async def test_one_that_is_stopped_is_gone_for_good(tmp_path: Path) -> None:
    async with running_app(tmp_path, 2) as (supervisor, runner):
        seat = runner.seats["g1-2"]
        await until(lambda: seat.state == "ready")
        assert seat.process is not None
        process_id = seat.process.process_id
        assert process_id is not None
        await seat.stop()
        assert seat.ended.done()
        assert not is_running(process_id)
        assert "g1-2" not in supervisor.routing.processes
        assert list(runner.seats) == ["g1-1"]


async def test_one_that_is_starting_can_be_stopped(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        (tmp_path / "version").write_text("silent")
        seat = runner.make(1)
        await until(lambda: "starting silent" in seat.last_lines)
        await seat.stop()
        assert "g1-2" not in runner.seats
        assert await asyncio.shield(seat.first) != ""


async def test_one_that_ends_again_and_again_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stickyproxy.control.runner.seat._BACK_OFF_S", (0.01,))
    async with running_app(tmp_path, 1) as (_, runner):
        (tmp_path / "version").write_text("broken")
        seat = runner.make(1)
        await until(lambda: "in a row" in caplog.text)
        assert "g1-2 has ended 4 times in a row" in caplog.text
        (tmp_path / "version").write_text("1")
        await until(lambda: seat.state == "ready")
