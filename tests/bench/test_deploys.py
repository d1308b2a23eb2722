"""The load that proves that deploys lose nothing: a small run against a real proxy, and each loss found and named."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.bench.deploys import __main__ as command_line
from tests.bench.deploys.report import is_good, verdicts, write_report
from tests.bench.deploys.run import Footprint, Plan, Result, Seen, perform
from tests.bench.deploys.visitors import Habits, Load, Lost, Tally, Visitor
from tests.bench.messages import BINARY, CLOSE, NUMBER, write_frame
from tests.bench.programs import ROOT
from tests.helpers.proc import mentioning
from tests.helpers.run_app import App
from tests.helpers.run_stage import APP
from tests.helpers.supervised import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HABITS = Habits(sockets=12, requests_per_s=24, period_s=0.1, idle_s=1.0, life_s=(1.0, 3.0))
SMALL = Plan(times=1, habits=HABITS, processes=2, pause_s=0.5)
QUIET = Habits(sockets=1, requests_per_s=0, period_s=0.05)


def bad(result: Result) -> set[str]:
    return {line.name for line in verdicts(result) if line.is_bad}


# Whole runs


async def test_a_deploy_loses_nothing(tmp_path: Path) -> None:
    result = await perform(SMALL, tmp_path)
    tally = result.tally
    assert bad(result) == set(), write_report(result, [], is_markdown=False)
    assert is_good(result)
    assert len(result.seconds) == 1
    assert tally.requests > HABITS.sockets
    assert tally.opened == tally.ended >= HABITS.sockets
    assert tally.messages > tally.opened
    assert result.exit_status == 0
    assert all(one.supervisor_kib and one.workers_kib and one.descriptors for one in result.footprints)


@pytest.mark.parametrize("fault", ["kill", "hurry"])
async def test_each_fault_is_found(fault: str, tmp_path: Path) -> None:
    """The controls: an old process is killed, or no session is waited for."""
    result = await perform(replace(SMALL, fault=fault), tmp_path)
    assert bad(result) & {"tunnels closed early", "sessions moved while open"}
    assert not bad(result) & {"processes left at the end", "old app processes left after a deploy"}
    assert "NOT GOOD" in write_report(result, [], is_markdown=True)


async def test_a_version_that_does_not_start_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.run_stage.RunStage.set_version", write_broken)
    result = await perform(SMALL, tmp_path)
    assert bad(result) == {"deploys that failed, and other faults"}, write_report(result, [], is_markdown=False)
    assert "this version cannot start" in result.problems[0]


def write_broken(stage: Any, version: str) -> None:
    stage.version_file.write_text(version if version == "1" else "broken")


@pytest.mark.parametrize(("more", "status"), [([], 0), (["--fault=kill"], 1)])
def test_the_command_exits_with_the_verdict(more: list[str], status: int, tmp_path: Path) -> None:
    words = ["--times=1", "--sockets=8", "--requests=16", "--processes=2", f"--directory={tmp_path}", *more]
    command = [sys.executable, "-m", "tests.bench.deploys", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("NOT GOOD: " if status else "good: ")


def test_when_it_is_ended_all_that_it_started_ends(tmp_path: Path) -> None:
    words = ["--times=3", "--sockets=4", "--requests=8", f"--directory={tmp_path}"]
    bench = subprocess.Popen([sys.executable, "-m", "tests.bench.deploys", *words], cwd=ROOT)
    try:
        deadline_s = time.monotonic() + 60
        while not mentioning(APP.name, str(tmp_path)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert mentioning(APP.name, str(tmp_path))
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(120) == 128 + signal.SIGTERM
    finally:
        bench.kill()
        bench.wait()
    deadline_s = time.monotonic() + 60
    while mentioning(str(tmp_path)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert mentioning(str(tmp_path)) == set()


# The visitors, with an app in place of the proxy


class Site:
    """The app itself on a port; `app` may be another one from one moment to the next."""

    def __init__(self) -> None:
        self.app = App("1")
        self.name("g1-1")
        self.port = 0
        self.answer: bytes | None = None  # to every connection, instead of the app's

    def name(self, name: str, pid: int = 1) -> None:
        """Let the app be another process, with nothing in its memory."""
        self.app = App("1")
        self.app._facts |= {"id": name, "pid": pid}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.answer is None:
            await self.app.serve(reader, writer)
            return
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        writer.close()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0)
    site.port = server.sockets[0].getsockname()[1]
    yield site
    server.close()


async def test_a_session_that_stays_is_not_counted_as_moved(site: Site) -> None:
    tally = Tally()
    async with Visitor(site.port, tally, QUIET) as visitor:
        await visitor.ask()
        tunnel = await visitor.open_tunnel()
        await visitor.ask()
        await until(lambda: tally.messages > 3)
        await visitor.close_tunnel()
        await visitor.open_tunnel()
        await visitor.ask()
        await visitor.close_tunnel()
    assert tunnel.ended.done()
    assert (tally.moved, tally.moved_at_once, tally.unjudged) == (0, 0, 0)
    assert (tally.opened, tally.ended, tally.early, tally.lost, tally.wrong) == (2, 2, {}, 0, 0)
    assert (tally.requests, tally.failed) == (3, 0)


@pytest.mark.parametrize(("name", "pid"), [("g1-2", 2), ("g1-1", 2), ("g1-1", 1)])
async def test_a_move_is_seen_by_the_process_or_by_its_memory(site: Site, name: str, pid: int) -> None:
    tally = Tally()
    async with Visitor(site.port, tally, QUIET) as visitor:
        await visitor.ask()
        await visitor.ask()
        site.name(name, pid)
        visitor.hang_up()
        await visitor.ask()
    assert (tally.moved, tally.moved_at_once, tally.unjudged) == (1, 0, 0)


async def test_a_move_of_the_next_tunnel_is_seen(site: Site) -> None:
    tally = Tally()
    async with Visitor(site.port, tally, QUIET) as visitor:
        await visitor.ask()
        await visitor.open_tunnel()
        await visitor.close_tunnel()
        site.name("g1-2", 2)
        await visitor.open_tunnel()
    assert tally.moved == 1


async def test_a_first_contact_is_no_session_and_an_old_one_has_ended(site: Site) -> None:
    tally = Tally()
    for habits in (QUIET, replace(QUIET, idle_s=0.0)):
        async with Visitor(site.port, tally, habits) as visitor:
            await visitor.ask()
            if habits.idle_s == 0:
                await visitor.ask()
            site.name("g1-2" if habits.idle_s else "g1-3", 2)
            visitor.hang_up()
            await visitor.ask()
    assert (tally.moved, tally.moved_at_once, tally.unjudged) == (0, 1, 1)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"])
async def test_a_request_that_fails_is_counted(site: Site, answer: bytes) -> None:
    tally = Tally()
    site.answer = answer
    async with Visitor(site.port, tally, QUIET) as visitor:
        with pytest.raises(Lost):
            await visitor.ask()
        with pytest.raises(Lost):
            await visitor.open_tunnel()
    assert (tally.failed, tally.refused, len(tally.told)) == (1, 1, 2)


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nX-App: g1-1\r\n\r\n"


@pytest.mark.parametrize(
    ("frames", "code", "wrong"),
    [
        ([], "none", 0),
        ([(CLOSE, b"\x03\xf4")], "1012", 0),
        ([(CLOSE, b"\x03\xe8")], "1000", 0),
        ([(BINARY, NUMBER.pack(0)), (BINARY, NUMBER.pack(0))], "none", 1),
        ([(BINARY, NUMBER.pack(1))], "none", 1),
    ],
)
async def test_whatever_the_client_did_not_ask_for_is_counted(
    site: Site, frames: list[tuple[int, bytes]], code: str, wrong: int
) -> None:
    tally = Tally()
    async with Visitor(site.port, tally, QUIET) as visitor:
        await visitor.ask()
        site.answer = SWITCH + b"".join(write_frame(*frame, is_masked=False) for frame in frames)
        tunnel = await visitor.open_tunnel()
        await until(tunnel.ended.done)
    assert (tally.early, tally.ended, tally.wrong) == ({code: 1}, 0, wrong)
    assert tally.lost == tally.messages - (len(frames) == 2)


async def test_the_load_keeps_its_tunnels_and_its_cookies(site: Site) -> None:
    habits = Habits(sockets=5, requests_per_s=20, period_s=0.05, life_s=(0.2, 1.0))
    load = Load(site.port, habits)
    await load.all_open()
    await until(lambda: len(load._left) > 0)
    load.retire(1)
    await until(lambda: load.tally.stale > 0)
    await load.stop()
    tally = load.tally
    assert tally.opened == tally.ended >= 5
    assert (tally.failed, tally.refused, tally.moved, tally.lost, tally.wrong) == (0, 0, 0, 0, 0)
    assert load.open_tunnels == 0


# Its parts


def result_of(**changes: Any) -> Result:
    tally = Tally()
    for name, value in changes.items():
        setattr(tally, name, value)
    prints = [Footprint(1024 * number, 2048 * number, 30 + number) for number in (1, 2, 3, 4)]
    return Result(SMALL, tally, [3.0, 1.0, 2.0], prints)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("failed", "failed requests"),
        ("refused", "tunnels that did not open"),
        ("lost", "messages lost"),
        ("wrong", "messages doubled or out of order"),
        ("moved", "sessions moved while open"),
    ],
)
def test_each_loss_is_named(field: str, name: str) -> None:
    assert bad(result_of(**{field: 2})) == {name}


def test_the_report() -> None:
    result = result_of(requests=1234)
    for is_markdown in (True, False):
        text = write_report(result, ["a fact"], is_markdown=is_markdown)
        assert "1,234" in text
        assert "1.0, 2.0, 3.0" in text
        assert "1.0 → 2.0 → 4.0" in text
        assert "31 → 32 → 34" in text
        assert text.endswith("good: all is zero that must be")
    result.tally.early["1012"] += 2
    result.problems.append("deploy 1: it had no effect")
    result.left, result.old_left = 1, 1
    assert bad(result) == {
        "tunnels closed early",
        "deploys that failed, and other faults",
        "processes left at the end",
        "old app processes left after a deploy",
    }
    assert "2 (Close codes: 1012: 2) (!)" in write_report(result, [], is_markdown=False)


def test_a_process_that_ended_is_not_left() -> None:
    seen = Seen()
    with subprocess.Popen(["sleep", "300"]) as child:
        seen.add([child.pid, os.getpid()])
        assert seen.left == {child.pid, os.getpid()}
        child.kill()
        child.wait()
        assert seen.left == {os.getpid()}


def test_options() -> None:
    plan = command_line.make_plan(command_line.parse_options(["--times=3", "--sockets=7", "--fault=kill"]))
    assert (plan.times, plan.habits.sockets, plan.fault, plan.processes, plan.workers) == (3, 7, "kill", 3, 1)
    for wrong in (["--times=0"], ["--period=0.001"], ["--fault=x"], ["--returning=2"], ["--drain-timeout=100"]):
        with pytest.raises(SystemExit) as ended:
            command_line.parse_options(wrong)
        assert ended.value.code == 2


def test_half_of_the_requests_come_beside_tunnels() -> None:
    habits = Habits(sockets=200, requests_per_s=200)
    assert habits.sockets / habits.between_requests_s == 100
    assert habits.places_without / 0.5 == 100
    assert json.dumps(Habits(requests_per_s=0).between_requests_s) == "Infinity"
