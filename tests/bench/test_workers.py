"""What a second worker brings: how it is computed, and a short run of the command."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import load_file
from tests.bench.programs import ROOT
from tests.bench.results import RunError, Sample
from tests.bench.scenarios import SCENARIOS
from tests.bench.targets import Site
from tests.bench.workers import COLUMNS, Observed, Row, Stage, cells, observe, parse_options, write_config, write_report
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from pathlib import Path

SMOKE_TIMEOUT_S = 120.0


def row(workers: int, cpu_us: float, *parts: float, errors: int = 0) -> Row:
    sample = Sample(cpu_us=cpu_us, per_s=9000.0, errors=errors)
    return Row(SCENARIOS["http"], workers, [Observed(sample, parts, (64 // workers,) * workers)])


def test_two_workers_carry_twice_as_much_where_a_request_costs_the_same() -> None:
    rows = [row(1, 50.0, 1.0), row(2, 50.0, 0.5, 0.5)]
    assert [one.carried_per_s for one in rows] == [20_000, 40_000]
    assert cells(rows[1], rows)[2:8] == ["50.0", "40,000", "2.00", "40,000", "2.00", "9,000"]


def test_what_a_request_costs_more_and_what_is_spread_unevenly_is_lost() -> None:
    rows = [row(1, 50.0, 1.0), row(2, 62.5, 0.75, 0.2)]
    assert cells(rows[1], rows)[3:7] == ["32,000", "1.60", "21,333", "1.07"]
    assert cells(rows[1], rows)[8:] == ["32+32", "75%+20%+5%", "0"]


def test_without_one_worker_or_a_round_there_is_no_ratio() -> None:
    failed = Row(SCENARIOS["http"], 1, failures=["it did not come up"])
    rows = [failed, row(2, 50.0, 0.5, 0.5)]
    assert [len(cells(one, rows)) for one in rows] == [len(COLUMNS)] * 2
    assert (cells(rows[1], rows)[4], cells(failed, rows)[-1]) == ("-", "invalid")
    assert [one.is_clean for one in (*rows, row(1, 50.0, 1.0, errors=1))] == [False, True, False]
    for is_markdown in (False, True):
        assert "it did not come up" in write_report(rows, [], is_markdown=is_markdown)


def test_the_file_has_the_number_of_workers(tmp_path: Path) -> None:
    site = Site(tmp_path, 21000, 21001, (21002, 21003), is_websocket=False)
    assert load_file(tmp_path / site.write("proxy.yaml", write_config(site, 3)), {}).workers == 3


def test_mistakes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--loads", "http,htpt"], ["--workers", "1,x"], ["--workers", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            parse_options(arguments)
    assert "unknown: htpt; known: http, ws" in capsys.readouterr().err


def test_a_proxy_that_does_not_come_up_gives_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.workers.write_config", lambda *_: "workers: none\n")
    with Children(tmp_path) as children, pytest.raises(RunError, match="workers"):
        observe(SCENARIOS["ws"], 1, Stage(children, (1, 2), 0.1))


def test_a_short_run_from_the_command_line_yields_a_table_without_errors() -> None:
    options = ["--loads", "ws", "--workers", "1,2", "--rounds", "1", "--seconds", "2", "--held", "--markdown"]
    command = [sys.executable, "-m", "tests.bench.workers", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SMOKE_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    one, two = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ws |"))
    assert (one[1], two[1], one[4], one[8]) == ("1", "2", "1.00", "32")
    assert sum(map(int, two[8].split("+"))) == 32
    assert float(two[2]) > 0
