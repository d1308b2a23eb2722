"""The load that proves that operations lose nothing: small runs against a real proxy, and each loss found and named."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.bench.operations import __main__ as command_line
from tests.bench.operations.actions import OPERATIONS, Outcome, run_command
from tests.bench.operations.ledger import both, compare
from tests.bench.operations.messages import DOWN, UP, Arrivals, Direction, Scanner, is_whole
from tests.bench.operations.pauses import Span, Worst, cut_up, percentile, spread, worst_in
from tests.bench.operations.relay import DELAY_S, FAULTS
from tests.bench.operations.report import is_good, verdicts, write_report
from tests.bench.operations.run import Result, Run
from tests.bench.operations.stage import Plan, Stage, split
from tests.bench.process import footprint, parse_busy_s
from tests.bench.programs import ROOT
from tests.helpers.proc import session_of
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from pathlib import Path

TIMES = 2
SMALL = Plan("none", times=TIMES, tunnels=20, requests=40, workers=1, pause_s=1.0, quiet_s=1.0)
# What the faults of the relay are counted as, and how often: those of messages happen once in each direction.
FAULTY: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "nothing": (("none",), {}),
    "dropped": (("drop", "none"), {"messages lost": 2}),
    "each of messages": (
        ("double", "swap", "corrupt", "tear", "stray"),
        {"messages doubled": 2, "messages reordered": 2, "messages corrupt": 4, "messages strayed": 2},
    ),
    "delayed": (("none", "delay"), {}),
    "connections and requests": (
        ("cut", "fail", "repeat", "drop"),
        {
            "disconnects": 1,
            "failed requests": 1,
            "requests that reached an app twice": 1,
            "messages lost": 2,
        },
    ),
}


def perform(directory: Path, plan: Plan) -> Result:
    with Children(directory) as children:
        stage = Stage(children, plan)
        try:
            return Run(stage).perform()
        finally:
            stage.stop_proxy()


def bad(result: Result) -> dict[str, int | str]:
    return {line.name: line.value for line in verdicts(result) if line.is_bad}


# Whole runs


@pytest.mark.parametrize("name", FAULTY)
def test_each_fault_is_found_and_named_and_no_other(name: str, tmp_path: Path) -> None:
    faults, expected = FAULTY[name]
    plan = replace(SMALL, faults=faults, times=max(TIMES, len(faults)))
    result = perform(tmp_path, plan)
    assert bad(result) == expected, write_report(result, [], 1, is_markdown=False)
    assert is_good(result) == (not expected)
    assert result.struck == sum(expected.values()) + (2 if name == "delayed" else 0)
    assert result.tally.tunnels == SMALL.tunnels + expected.get("disconnects", 0)
    assert result.requests["requests"] > 0
    assert result.tally.up.received > 0
    assert result.tally.down.received > 0
    assert [outcome.name for outcome in result.outcomes] == ["none"] * plan.times
    if name == "delayed":
        late_ms = (DELAY_S - SMALL.period_s) * 1e3 - 50  # what is sent within one tick may be nearer to the next
        assert max(worst.pause_ms for worst in result.busy) > late_ms
        assert max(worst.delay_ms for worst in result.busy) > late_ms
        assert sum(pause > late_ms for pause in result.tunnels_busy["pause"]) >= 2


def test_sessions_that_lose_their_cookies_are_seen_to_move(tmp_path: Path) -> None:
    result = perform(tmp_path, replace(SMALL, faults=("forget",)))
    assert set(bad(result)) == {"sessions moved", "cookies set anew"}
    assert result.struck > TIMES


@pytest.mark.parametrize("operation", ["upgrade", "reload", "mixed", "kill-worker"])
def test_each_operation_has_its_effect_and_loses_nothing_more_than_it_may(operation: str, tmp_path: Path) -> None:
    result = perform(tmp_path, replace(SMALL, operation=operation, workers=2))
    assert bad(result) == {}, write_report(result, [], 1, is_markdown=False)
    assert len(result.outcomes) == TIMES
    is_kill = operation == "kill-worker"
    assert {port for outcome in result.outcomes for port in outcome.doomed} >= {cut[2] for cut in result.tally.cuts}
    assert bool(result.tally.cuts) == is_kill


def test_the_death_of_the_proxy_is_told_from_other_ends(tmp_path: Path) -> None:
    result = perform(tmp_path, replace(SMALL, operation="kill-supervisor"))
    assert bad(result) == {}, write_report(result, [], 1, is_markdown=False)
    assert len(result.tally.cuts) == TIMES * SMALL.tunnels
    assert len(result.reopened_s) == TIMES * SMALL.tunnels
    assert result.strange_cuts == 0
    assert "disconnects of others than the killed process's" in bad(replace(result, strange_cuts=1))
    assert "disconnects" in bad(replace(result, plan=SMALL))
    assert "processes left over" in bad(replace(result, left=1))


def test_an_operation_that_fails_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: Stage, _: int) -> Outcome:
        run_command(stage, "no-such-command")
        raise AssertionError("it did not fail")

    monkeypatch.setitem(OPERATIONS, "none", fail)
    result = perform(tmp_path, SMALL)
    assert bad(result) == {"operations that failed": TIMES}
    assert "stickyproxy no-such-command: exit 2" in write_report(result, [], 1, is_markdown=True)


def test_the_command_prints_a_report_and_exits_with_the_verdict(tmp_path: Path) -> None:
    common = ["none", "--times=1", "--tunnels=5", "--requests=8", "--workers=1", "--pause=0.5", "--quiet=0.5"]
    for more, status, last in (
        (["--markdown"], 0, "good: all is zero that must be"),
        (["--fault=drop"], 1, "NOT GOOD: messages lost: 2"),
    ):
        command = [sys.executable, "-m", "tests.bench.operations", *common, *more, f"--directory={tmp_path / last[:4]}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
        assert done.returncode == status, done.stdout + done.stderr
        assert done.stdout.rstrip().endswith(last)
        assert ("| messages lost | 0 |" in done.stdout) == (status == 0)


# Its parts


@pytest.mark.parametrize("direction", [UP, DOWN], ids=lambda direction: direction.name)
def test_a_frame_is_whole_only_as_it_was_written(direction: Direction) -> None:
    frame = direction.write(7, 11, 13)
    assert is_whole(frame, direction)
    assert direction.read(frame) == (7, 11, 13, direction.number)
    for position in range(len(frame) * 8):
        changed = bytearray(frame)
        changed[position // 8] ^= 1 << position % 8
        assert not is_whole(changed, direction)
    assert not is_whole(frame[:-1], direction)


def test_arrivals_tell_lost_doubled_and_reordered_apart() -> None:
    arrivals = Arrivals()
    for sequence in (0, 1, 4, 3, 4, 0, 6):
        arrivals.take(sequence)
    assert arrivals.missing == {2, 5}
    assert (arrivals.received, arrivals.doubled, arrivals.reordered) == (5, 2, 1)


@pytest.mark.parametrize("direction", [UP, DOWN], ids=lambda direction: direction.name)
def test_any_cut_of_a_stream_gives_the_same_frames(direction: Direction) -> None:
    close = struct.pack(">BBH", 0x88, 2, 1012) if direction is DOWN else b"\x88\x82\1\2\3\4" + bytes((3 ^ 1, 0xF4 ^ 2))
    frames = [direction.write(1, number, 5) for number in range(4)]
    stream = b"".join((*frames[:2], close, *frames[2:]))
    for size in range(1, len(stream) + 1):
        arrivals, scanner, found = Arrivals(), Scanner(direction), list[bytes]()
        for at in range(0, len(stream), size):
            found += scanner.feed(stream[at : at + size], arrivals)
        assert found == frames
        assert scanner.controls == ["Close 1012"]
        assert arrivals.corrupt == 0
        assert not scanner.is_inside


@pytest.mark.parametrize("direction", [UP, DOWN], ids=lambda direction: direction.name)
def test_damage_is_counted_once_and_ends_at_the_next_whole_frame(direction: Direction) -> None:
    frames = [direction.write(1, number, 5) for number in range(4)]
    for lost in range(1, direction.frame_bytes):
        arrivals, scanner = Arrivals(), Scanner(direction)
        found = scanner.feed(frames[0] + frames[1][:-lost] + frames[2] + frames[3], arrivals)
        assert found == [frames[0], frames[2], frames[3]]
        assert arrivals.corrupt == 1
        assert not scanner.is_inside


def end(sent: int, received: int, **more: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("doubled", "corrupt", "reordered", "strayed", "lost_ns", "controls", "port"), 0)
    return {"sent": sent, "received": received, "end": "", **counts, **more}


def test_both_ends_are_compared() -> None:
    clients = {
        "1": end(10, 20),
        "2": end(10, 18, corrupt=1),
        "3": end(10, 15, lost_ns=5, end="Close 1012", port=77),
        "4": end(1, 0),
        "5": end(10, 20),
    }
    apps = {
        "1": end(20, 10),
        "2": end(20, 9, doubled=3),
        "3": end(20, 6, lost_ns=9, end="end of file"),
        "5": end(20, 10, lost_ns=9, end="ConnectionResetError"),
        "6": end(1, 0),
        "7": end(1, 0, lost_ns=3),
    }
    tally = compare(clients, apps)
    assert (tally.up.lost, tally.down.lost) == (1, 1)
    assert (tally.up.gone, tally.down.gone) == (4, 5)
    assert (both(tally, "corrupt"), both(tally, "doubled")) == (1, 3)
    assert tally.cuts == [(5, 3, 77, "Close 1012"), (9, 5, 0, "at the app: ConnectionResetError")]
    assert tally.unknown == 2


def test_the_worst_of_a_span_is_that_of_all_streams_in_it() -> None:
    second = 10**9
    streams = [
        [(second, 90, 9), (2 * second, 50_000_000, 3_000_000), (3 * second, 99, 9)],
        [(second, 80, 8), (2 * second, 30_000_000, 7_000_000)],
    ]
    worst = worst_in(Span(second + 1, 2 * second - 1), streams, 20_000_000)
    assert (worst.pause_ms, worst.delay_ms) == (30.0, 7.0)
    assert worst_in(Span(5 * second, 6 * second), streams, 0) == Worst(0, 0)
    assert [span.seconds for span in cut_up(Span(0, 7 * second), 2.0)] == [2.0, 2.0, 2.0]
    assert cut_up(Span(0, second), 2.0) == [Span(0, second)]


def test_percentiles() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile([], 50)) == (50, 99, 0)
    assert spread(values).worst == 100
    assert spread([]).worst == 0


def test_a_session_outlives_the_process_that_led_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.Popen(['sleep', '300']); sys.exit()"
    with Children(tmp_path) as children:
        leader = children.start("leader", [sys.executable, "-c", child])
        leader.wait()
        (orphan,) = session_of(leader.pid)
        assert footprint(leader.pid).processes == 1
        os.kill(orphan, signal.SIGKILL)


def test_options() -> None:
    plan = command_line.make_plan(command_line.parse_options(["upgrade", "--times=3", "--period=0.05"]))
    assert (plan.operation, plan.times, plan.period_s, plan.tunnels, plan.workers) == ("upgrade", 3, 0.05, 2000, 2)
    for wrong in (["x"], ["none", "--times=0"], ["none", "--period=0.001"], ["none", "--fault=x"]):
        with pytest.raises(SystemExit) as ended:
            command_line.parse_options(wrong)
        assert ended.value.code == 2


def test_every_fault_has_its_test() -> None:
    assert set(FAULTS) == {"forget", *(fault for faults, _ in FAULTY.values() for fault in faults)}


def test_the_busy_time_of_the_machine_leaves_waiting_out() -> None:
    assert parse_busy_s("cpu  100 10 50 9999 888 20 20 77 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n") == 200 / os.sysconf(
        "SC_CLK_TCK"
    )


def test_no_process_of_the_load_has_more_tunnels_than_it_can_serve_in_turn() -> None:
    assert split(20) == [20]
    assert split(1000) == [1000]
    assert split(2001) == [667, 667, 667]
    assert split(1501) == [751, 750]
