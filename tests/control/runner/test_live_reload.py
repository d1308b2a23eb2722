"""Live reload: the app is deployed anew when its files change, once for what changes together."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.config import Run
from stickyproxy.control.runner.deploy import DeployOptions
from stickyproxy.control.runner.live_reload import LiveReload
from stickyproxy.control.runner.runner import Runner
from stickyproxy.control.supervisor import Supervisor
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn
from tests.helpers.plain_client import ask
from tests.helpers.runner import command_of, running_app
from tests.helpers.supervised import load, open_tunnel, port_of, running, until

BY_HAND = DeployOptions(drain_timeout_s=None, pace_per_s=20.0, surge=0, watch_s=0.0)


@pytest.fixture(autouse=True)
def _shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def states(runner: Runner) -> dict[str, str]:
    return {seat.id: seat.state for seat in runner.seats.values()}


class App:
    """The app of a test, whose version is what the file says: a change of it is one of the app's files."""

    def __init__(self, directory: Path) -> None:
        self._version = directory / "version"
        self._source = directory / "main.py"

    def change(self, version: str = "1") -> None:
        """Save another version."""
        self._version.write_text(version)
        self._source.write_text(version)


@asynccontextmanager
async def reloading(directory: Path, processes: int = 1) -> AsyncIterator[tuple[Supervisor, Runner, App]]:
    """Run an app with live reload until the end of the block."""
    reload = {"directories": [str(directory)]}
    async with running_app(directory, processes, reload=reload) as (supervisor, runner):
        yield supervisor, runner, App(directory)


async def begun(runner: Runner, number: int) -> None:
    """Wait until a deploy of this number has begun."""
    await until(lambda: runner.deploy is not None and runner.deploy.number == number, f"deploy {number}")


async def deployed(runner: Runner, number: int, state: str = "ok") -> None:
    """Wait until the deploy of this number is over."""
    await begun(runner, number)
    assert runner.deploy is not None
    deploy = runner.deploy
    await until(lambda: deploy.state == state, f"deploy {number} {state}")


async def test_a_change_is_deployed_and_pages_reconnect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with reloading(tmp_path, 2) as (supervisor, runner, app):
        tunnel = await open_tunnel(port_of(supervisor))
        app.change("2")
        assert await tunnel.receive_close() == 1012
        await tunnel.client.__aexit__(None, None, None)
        assert b'"version": "2"' in (await ask(port_of(supervisor), "/")).body
        await deployed(runner, 1)
        assert states(runner) == {"g2-1": "ready", "g2-2": "ready"}
        app.change("3")
        await deployed(runner, 2)
        assert b'"version": "3"' in (await ask(port_of(supervisor), "/")).body
    assert "live reload: main.py changed" in caplog.text


async def test_without_it_nothing_is_watched(tmp_path: Path) -> None:
    async with running_app(tmp_path, 1) as (_, runner):
        assert not runner.live_reload.is_on
        assert runner.live_reload._watcher is None
        App(tmp_path).change("2")
        runner.live_reload.deploy_if_due()
        assert runner.deploy is None


async def test_a_burst_is_one_deploy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with reloading(tmp_path) as (_, runner, app):
        for number in range(9):
            (tmp_path / f"module_{number}.py").write_text("1")
        app.change("2")
        await deployed(runner, 1)
        app.change("3")
        await deployed(runner, 2)
    assert "live reload: main.py, module_0.py, module_1.py and 7 more changed" in caplog.text


async def test_what_does_not_start_leaves_the_old_one_and_what_is_mended_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reloading(tmp_path) as (supervisor, runner, app):
        app.change("broken")
        await deployed(runner, 1, "failed")
        await until(lambda: "waiting for the next change" in caplog.text)
        assert "this version cannot start" in caplog.text
        assert b'"version": "1"' in (await ask(port_of(supervisor), "/")).body
        app.change("2")
        await deployed(runner, 2)
        assert b'"version": "2"' in (await ask(port_of(supervisor), "/")).body


async def test_a_change_while_a_generation_starts_gives_that_one_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reloading(tmp_path) as (_, runner, app):
        app.change("silent")  # it never gets ready
        await begun(runner, 1)
        first = runner.deploy
        assert first is not None
        await until(lambda: is_starting_silent(runner))
        app.change("2")
        await deployed(runner, 2)
        assert first.state == "failed"
        assert first.status["reason"] == "files have changed again"
        assert runner.generation == 2
    assert "waiting for the next change" not in caplog.text
    assert [record for record in caplog.records if record.name.endswith("deploy") and record.levelname == "ERROR"] == []


async def test_a_deploy_by_hand_is_not_given_up_and_what_changes_meanwhile_is_deployed_after_it(tmp_path: Path) -> None:
    async with reloading(tmp_path) as (_, runner, app):
        (tmp_path / "version").write_text("silent")  # so that it lasts
        by_hand = runner.begin_deploy(BY_HAND)
        await until(lambda: is_starting_silent(runner))
        app.change("2")
        await until(lambda: runner.live_reload.has_changed)
        runner.live_reload.deploy_if_due()
        assert runner.deploy is by_hand
        assert not by_hand._given_up.done()
        by_hand.give_up("the test has seen it")
        await deployed(runner, 2)
        assert list(states(runner).values()) == ["ready"]


async def test_a_deploy_by_hand_takes_in_what_has_changed(tmp_path: Path) -> None:
    async with reloading(tmp_path) as (_, runner, app):
        runner.is_started = False  # nothing is deployed by itself
        app.change("2")
        await until(lambda: runner.live_reload.has_changed)
        runner.begin_deploy(BY_HAND)
        assert not runner.live_reload.has_changed
        await deployed(runner, 1)
        runner.live_reload.deploy_if_due()
        assert runner.deploy is not None
        assert runner.deploy.number == 1


# The first processes


async def test_an_app_that_does_not_start_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = App(tmp_path)
    app.change("broken")
    async with running(load(run=run_of(tmp_path), upstreams=[])) as supervisor:
        runner = supervisor.runner
        assert runner is not None
        assert "the app does not start, waiting for a change of its files: g1-" in caplog.text
        assert runner.seats == {}
        assert (await ask(port_of(supervisor), "/")).status == 503
        app.change("broken")
        await deployed(runner, 1, "failed")
        assert "generation 2 is taken back, none serves: " in caplog.text
        assert (await ask(port_of(supervisor), "/")).status == 503
        app.change("2")
        await deployed(runner, 2)
        assert b'"version": "2"' in (await ask(port_of(supervisor), "/")).body


def run_of(directory: Path, **more: Any) -> dict[str, Any]:
    reload = {"directories": [str(directory)]}
    return {"command": command_of(directory / "version"), "processes": 2, "reload": reload, **more}


async def test_a_command_that_cannot_be_run_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        async with running(load(run=run_of(tmp_path, command=["/no/such/program"]), upstreams=[])):
            pass


async def test_a_directory_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot watch /no/such: there is no such directory"):
        async with running(load(run=run_of(tmp_path, reload={"directories": ["/no/such"]}), upstreams=[])):
            pass


async def test_a_change_while_the_first_processes_start_begins_anew(tmp_path: Path) -> None:
    app = App(tmp_path)
    app.change("silent")
    supervisor = Supervisor(load(run=run_of(tmp_path), upstreams=[]))
    serving = asyncio.Event()
    task = spawn(supervisor.run(lambda _: serving.set()), "a proxy that starts")
    try:
        await until(lambda: is_starting_silent(supervisor.runner))
        app.change("2")
        await until(serving.is_set)
        assert b'"version": "2"' in (await ask(port_of(supervisor), "/")).body
        assert supervisor.runner is not None
        assert supervisor.runner.deploy is None
    finally:
        supervisor.stop()
        await task


def is_starting_silent(runner: Runner | None) -> bool:
    return runner is not None and any("starting silent" in seat.last_lines for seat in runner.seats.values())


# Settings


async def test_settings_may_turn_it_on_and_off_and_to_other_directories(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    async with running_app(tmp_path, 1) as (_, runner):
        command = command_of(tmp_path / "version")

        def apply(reload: object) -> None:
            runner.apply(Run.model_validate({"command": command, "reload": reload}))

        app = App(tmp_path / "other")
        apply({"directories": [str(tmp_path / "other")]})
        await until(lambda: watches(runner.live_reload))
        app.change()
        await deployed(runner, 1)
        former = runner.live_reload._watcher
        apply({"directories": [str(tmp_path / "other")]})
        assert runner.live_reload._watcher is former, "nothing has changed"
        apply(False)
        assert runner.live_reload._watcher is None
        assert former is not None
        await until(former._has_ended.is_set)
        apply({"directories": ["/no/such"]})
        await until(lambda: "live reload: cannot watch /no/such: there is no such directory" in caplog.text)
        apply({"directories": [str(tmp_path / "other")], "include": ["*.html"]})
        await until(lambda: watches(runner.live_reload))
        (tmp_path / "other" / "page.html").write_text("1")
        await deployed(runner, 2)


def watches(live_reload: LiveReload) -> bool:
    watcher = live_reload._watcher
    return watcher is not None and watcher._begun.is_set()


async def test_where_nothing_is_said_the_directory_of_the_app_is_watched(tmp_path: Path) -> None:
    (tmp_path / "a{b").mkdir()
    async with running_app(tmp_path, 1, cwd=str(tmp_path / "a{{b"), reload=True) as (_, runner):
        assert runner.live_reload._watcher is not None
        assert runner.live_reload._watcher.directories == (tmp_path / "a{b",)
    async with running_app(tmp_path, 1, reload={"include": ["*.html"]}) as (_, runner):
        assert runner.live_reload._watcher is not None
        assert runner.live_reload._watcher.directories == (Path.cwd(),)


# The end, and another image


async def test_what_is_due_when_the_image_changes_is_deployed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reloading(tmp_path) as (supervisor, runner, app):
        with monkeypatch.context() as patch:
            patch.setitem(supervisor.upgrader.status, "state", "running")
            app.change("2")
            await until(lambda: runner.live_reload.has_changed)
            assert runner.deploy is None
            is_due = runner.live_reload.leave()
            assert is_due
            assert runner.live_reload._watcher is not None
            assert runner.live_reload._watcher._has_ended.is_set()
            runner.live_reload = LiveReload(runner)
            runner.live_reload.adopt(is_due=is_due)
            runner.live_reload.deploy_if_due()
            assert runner.deploy is None, "the upgrade is under way still"
        await deployed(runner, 1)
        await until(lambda: watches(runner.live_reload))
        app.change("3")
        await deployed(runner, 2)
        assert not runner.live_reload.leave()


async def test_its_end_is_the_end_of_the_watch(tmp_path: Path) -> None:
    async with reloading(tmp_path) as (_, runner, app):
        watcher = runner.live_reload._watcher
        app.change("2")
        await begun(runner, 1)
    assert watcher is not None
    assert watcher._has_ended.is_set()
