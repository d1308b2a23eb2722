"""A deploy decides which generation serves, and says how it stands."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from stickyproxy.affinity.snapshot import AdminState, Snapshot
from stickyproxy.control.runner.deploy import Deploy, DeployOptions
from stickyproxy.control.runner.runner import Runner
from stickyproxy.proxy.endpoint import Endpoint
from tests.helpers.runner import running_app
from tests.helpers.supervised import kill, open_tunnel, port_of, until

OPTIONS = DeployOptions(drain_timeout_s=None, pace_per_s=20.0, surge=1, watch_s=0.0)
WATCHED = DeployOptions(drain_timeout_s=None, pace_per_s=20.0, surge=0, watch_s=600.0)


def states(runner: Runner) -> dict[str, str]:
    return {seat.id: seat.state for seat in runner.seats.values()}


async def test_the_old_generation_serves_until_all_of_the_new_one_are_ready(tmp_path: Path) -> None:
    async with running_app(tmp_path, 2) as (supervisor, runner):
        await until(lambda: states(runner) == {"g1-1": "ready", "g1-2": "ready"})
        seen: list[set[str]] = []
        publish = supervisor.routing._publish

        def note(snapshots: tuple[Snapshot, ...], endpoints: Mapping[str, Endpoint]) -> None:
            seen.append({one.id for snapshot in snapshots for one in snapshot.upstreams if one.accepts_new})
            publish(snapshots, endpoints)

        supervisor.routing._publish = note
        deploy = runner.begin_deploy(WATCHED)
        await until(lambda: deploy.state == "watching")
        states_now = supervisor.routing.admin_states
        assert {name for name, state in states_now.items() if state is AdminState.READY} == {"g2-1", "g2-2"}
        assert all(seen), "somebody takes new clients at every moment"
        assert {"g2-1"} not in seen
        assert {"g1-1", "g1-2"} <= set(states(runner)), "none is stopped as long as they may be needed"


@pytest.mark.parametrize("surge", [0, 1])
async def test_as_many_start_at_once_as_may(tmp_path: Path, surge: int) -> None:
    async with running_app(tmp_path, 2) as (_, runner):
        (tmp_path / "version").write_text("silent")
        runner.begin_deploy(DeployOptions(None, 20.0, surge, 0.0))
        await until(lambda: "g2-1" in runner.seats and "starting silent" in runner.seats["g2-1"].last_lines)
        assert ("g2-2" in runner.seats) is (surge == 0)


async def test_a_crash_within_the_watch_takes_it_back(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (supervisor, runner):
        (tmp_path / "version").write_text("late")
        deploy = runner.begin_deploy(WATCHED)
        await until(lambda: deploy.state == "failed")
        status = deploy.status
        assert "g2-1: it crashed" in status["reason"]
        assert "listening" in status["last_lines"]
        assert states(runner) == {"g1-1": "ready"}
        assert supervisor.routing.admin_states == {"g1-1": AdminState.READY}
        assert (runner.generation, runner.is_turning) == (1, False)
        (tmp_path / "version").write_text("1")
        again = runner.begin_deploy(OPTIONS)
        await until(lambda: again.state == "ok")
        assert runner.generation == 2
        assert list(states(runner).values()) == ["ready"]


async def test_one_that_is_given_up_before_it_serves_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_app(tmp_path, 2) as (supervisor, runner):
        await until(lambda: set(states(runner).values()) == {"ready"})
        (tmp_path / "version").write_text("silent")
        deploy = runner.begin_deploy(WATCHED)
        await until(lambda: "g2-2" in runner.seats)
        assert deploy.give_up("for a reason")
        assert deploy.give_up("for another"), "it is given up already"
        await until(lambda: deploy.state == "failed")
        assert (deploy.status["reason"], runner.generation) == ("for a reason", 1)
        assert states(runner) == {"g1-1": "ready", "g1-2": "ready"}
        assert supervisor.routing.admin_states == {"g1-1": AdminState.READY, "g1-2": AdminState.READY}
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_one_that_serves_is_not_given_up(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        deploy = runner.begin_deploy(WATCHED)
        await until(lambda: deploy.state == "watching")
        assert not deploy.give_up("too late")
        deploy._check()
        assert runner.generation == 2


async def test_it_says_how_many_sessions_are_left_and_how_long_they_take(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (supervisor, runner):
        tunnels = [await open_tunnel(port_of(supervisor)) for _ in range(4)]
        await until(lambda: runner.count_sessions(runner.seats["g1-1"]) == 4)
        deploy = runner.begin_deploy(DeployOptions(600.0, 20.0, 1, 0.0))
        await until(lambda: deploy.state == "draining")
        status = deploy.status
        assert status["sessions_left"] == 4
        assert 0 < status["eta_s"] <= 600.2
        for tunnel in tunnels:
            async with tunnel.client:
                await tunnel.echo()


async def test_another_image_tells_what_became_of_it(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        deploy = runner.begin_deploy(OPTIONS)
        await until(lambda: deploy.state == "ok")
        again = Deploy.adopt(runner, deploy.leave())
        assert again.status == deploy.status
        assert again.options == OPTIONS


async def test_what_operators_want_of_the_old_generation_holds_when_it_is_taken_back(tmp_path: Path) -> None:
    async with running_app(tmp_path, 3) as (supervisor, runner):
        await until(lambda: set(states(runner).values()) == {"ready"})
        supervisor.routing.set_admin_state("g1-1", AdminState.DRAIN)
        (tmp_path / "version").write_text("broken")
        broken = runner.begin_deploy(WATCHED)
        await until(lambda: broken.state == "failed")
        assert supervisor.routing.admin_states["g1-1"] is AdminState.DRAIN
        (tmp_path / "version").write_text("1")
        deploy = runner.begin_deploy(WATCHED)
        await until(lambda: deploy.state == "watching")
        supervisor.routing.set_admin_state("g1-2", AdminState.MAINT)
        process = next(seat.process for seat in runner.seats.values() if seat.generation == deploy.generation)
        assert process is not None
        kill(process.process_id)
        await until(lambda: deploy.state == "failed" and set(runner.seats) == {"g1-1", "g1-2", "g1-3"})
        wanted = {"g1-1": AdminState.DRAIN, "g1-2": AdminState.MAINT, "g1-3": AdminState.READY}
        assert supervisor.routing.admin_states == wanted
