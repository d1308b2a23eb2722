"""The runner of a supervisor: how many processes there are, which serve, and what operators may ask for."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.config import Run
from stickyproxy.control.runner.deploy import DeployOptions
from stickyproxy.errors import AppError, UsageError
from tests.helpers.plain_client import ask
from tests.helpers.runner import command_of, running_app
from tests.helpers.supervised import is_running, kill, load, port_of, running, until

AT_ONCE = DeployOptions(drain_timeout_s=0.0, pace_per_s=1000.0, surge=0, watch_s=0.0)


def states(runner: object) -> dict[str, str]:
    return {seat.id: seat.state for seat in runner.seats.values()}  # type: ignore[attr-defined]


async def test_the_first_process_is_enough_to_serve(tmp_path: Path) -> None:
    async with running_app(tmp_path, 3) as (supervisor, runner):
        assert (await ask(port_of(supervisor), "/")).status == 200
        await until(lambda: states(runner) == {"g1-1": "ready", "g1-2": "ready", "g1-3": "ready"})
        ids = [seat.process.process_id for seat in runner.serving if seat.process]
        assert set(supervisor.routing.processes) == {"g1-1", "g1-2", "g1-3"}
        assert {one.id for one in supervisor.routing.upstreams} == {"g1-1", "g1-2", "g1-3"}
    assert [one for one in ids if is_running(one)] == []


async def test_what_does_not_start_is_told_with_its_last_lines(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("broken")
    loaded = load(run={"command": command_of(version), "processes": 2}, upstreams=[])
    with pytest.raises(AppError, match=r"(?s)the app does not start: g1-.: .*exit status 7.*this version cannot start"):
        async with running(loaded):
            pass


async def test_scaling_up_starts_more_and_down_ends_the_empty_ones(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        runner.scale(3)
        assert runner.processes == 3
        await until(lambda: states(runner) == {"g1-1": "ready", "g1-2": "ready", "g1-3": "ready"})
        runner.scale(1)
        await until(lambda: list(states(runner).values()) == ["ready"])
        runner.scale(2)
        await until(lambda: list(states(runner).values()) == ["ready"] * 2)
        assert "g1-4" in runner.seats, "no number is used again"


async def test_one_that_is_replaced_ends_when_the_other_is_ready(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        new = runner.replace(runner.seats["g1-1"])
        assert new.id == "g1-2"
        assert runner.seats["g1-1"].state == "ready"
        await until(lambda: states(runner) == {"g1-2": "ready"})


async def test_one_whose_replacement_does_not_start_stays(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        (tmp_path / "version").write_text("broken")
        runner.replace(runner.seats["g1-1"])
        await until(lambda: states(runner) == {"g1-1": "ready"})


async def test_a_deploy_takes_the_place_of_the_generation_before(tmp_path: Path) -> None:
    async with running_app(tmp_path, 2) as (supervisor, runner):
        deploy = runner.begin_deploy(AT_ONCE)
        assert runner.is_turning
        with pytest.raises(UsageError, match="under way"):
            runner.begin_deploy(AT_ONCE)
        with pytest.raises(UsageError, match="under way"):
            runner.scale(5)
        await until(lambda: deploy.state == "ok")
        assert states(runner) == {"g2-1": "ready", "g2-2": "ready"}
        assert runner.generation == 2
        assert deploy.status["ready"] == 2
        assert runner.begin_deploy(AT_ONCE).number == 2
        await until(lambda: states(runner) == {"g3-1": "ready", "g3-2": "ready"})
        assert (await ask(port_of(supervisor), "/")).status == 200


async def test_one_is_replaced_once(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        (tmp_path / "version").write_text("silent")
        seat = runner.seats["g1-1"]
        new = runner.replace(seat)
        with pytest.raises(UsageError, match="about to end"):
            runner.replace(seat)
        with pytest.raises(UsageError, match="about to end"):
            runner.replace(new)
        assert runner.serving == (seat,)
        await new.stop()
        await until(lambda: not runner._replaced)
        assert runner.serving == (seat,)


async def test_scaling_down_counts_a_replacement_and_what_it_replaces_as_one(tmp_path: Path) -> None:
    async with running_app(tmp_path, 2) as (_, runner):
        await until(lambda: states(runner) == {"g1-1": "ready", "g1-2": "ready"})
        runner.replace(runner.seats["g1-2"])
        runner.scale(1)  # the last one is retired first
        await until(lambda: states(runner) == {"g1-1": "ready"})
        assert runner._replaced == {}


async def test_a_deploy_leaves_no_replacement_of_the_generation_before(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        (tmp_path / "version").write_text("silent")  # so that the replacement does not get ready
        runner.replace(runner.seats["g1-1"])
        await until(lambda: "starting silent" in runner.seats["g1-2"].last_lines)
        (tmp_path / "version").write_text("2")
        deploy = runner.begin_deploy(AT_ONCE)
        await until(lambda: deploy.state == "ok")
        assert states(runner) == {"g2-1": "ready"}
        assert runner._replaced == {}


async def test_what_is_said_last_of_their_number_counts(tmp_path: Path) -> None:
    """A reload that changes nothing by itself does not undo later what an operator asks for."""
    async with running_app(tmp_path, 2) as (_, runner):
        runner.apply(
            Run.model_validate({"command": command_of(tmp_path / "version"), "processes": {"min": 1, "max": 4}})
        )
        assert runner.processes == 2
        runner.scale(3)
        runner.resize_if_due()
        assert runner.processes == 3
        await until(lambda: list(states(runner).values()) == ["ready"] * 3)


async def test_a_reload_during_a_deploy_takes_effect_after_it(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        deploy = runner.begin_deploy(AT_ONCE)
        with pytest.raises(UsageError, match="restart it after that"):
            runner.replace(runner.seats["g1-1"])
        runner.apply(Run.model_validate({"command": command_of(tmp_path / "version"), "processes": 2}))
        assert runner.processes == 1
        await until(lambda: deploy.state == "ok")
        await until(lambda: states(runner) == {"g2-1": "ready", "g2-2": "ready"})


async def test_what_cannot_be_run_for_whatever_reason_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> None:
                raise OSError("no descriptors are left")

            patch.setattr(runner.places, "take", fail)
            seat = runner.make(1)
            await until(lambda: seat.restarts > 0)
        await until(lambda: seat.state == "ready")


async def test_one_that_dies_is_started_again_under_its_id(tmp_path: Path) -> None:
    async with running_app(tmp_path, 2) as (supervisor, runner):
        seat = runner.seats["g1-1"]
        await until(lambda: seat.state == "ready")
        assert seat.process is not None
        before = seat.process.process_id
        assert before is not None
        kill(before)
        await until(lambda: seat.restarts == 1 and seat.state == "ready")
        assert seat.process is not None
        assert seat.process.process_id != before
        assert (await ask(port_of(supervisor), "/")).status == 200
        assert not supervisor.routing.observed["g1-1"].is_refused


@pytest.mark.parametrize(
    ("policy", "code", "is_again"),
    [("always", 0, True), ("on_failure", 3, True), ("on_failure", 0, False), ("never", 3, False)],
)
async def test_whether_it_is_started_again_is_said_by_the_file(
    tmp_path: Path, policy: str, code: int, *, is_again: bool
) -> None:
    async with running_app(tmp_path, 2, restart=policy) as (supervisor, runner):
        await until(lambda: list(states(runner).values()) == ["ready"] * 2)
        seats = dict(runner.seats)
        with pytest.raises(Exception):  # noqa: B017, PT011 -- it ends before it has answered, or the proxy says so
            assert (await ask(port_of(supervisor), f"/exit?{code}")).status == 200
        await until(lambda: any(seat.restarts or seat.ended.done() for seat in seats.values()))
        assert any(seat.restarts for seat in seats.values()) is is_again
        assert any(seat.ended.done() for seat in seats.values()) is not is_again


async def test_other_settings_count_for_those_that_start_from_then_on(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        wanted = Run.model_validate({"command": command_of(tmp_path / "version"), "processes": 2, "env": {"A": "b"}})
        runner.apply(wanted)
        await until(lambda: list(states(runner).values()) == ["ready"] * 2)
        process = runner.seats["g1-2"].process
        assert process is not None
        environment = await asyncio.to_thread(Path(f"/proc/{process.process_id}/environ").read_bytes)
        assert b"\0A=b\0" in b"\0" + environment + b"\0"


async def test_it_describes_what_runs(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (supervisor, runner):
        told = runner.describe()
        assert (told["generation"], told["processes"], told["starting"]) == (1, 1, [])
        clusters: Any = supervisor.readings.describe()["clusters"]
        [upstream] = clusters[0]["upstreams"]
        process = upstream["process"]
        assert process["pid"] == runner.seats["g1-1"].process.process_id  # type: ignore[union-attr]
        assert process["state"] == "ready"
        assert process["memory_bytes"] > 1 << 20
        assert process["age_s"] >= 0
