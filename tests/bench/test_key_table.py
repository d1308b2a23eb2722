"""The cost of learned keys: how it is written, and a short run of the command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.bench.key_table import COLUMNS, Costs, make_keys, parse_options, write_cells
from tests.bench.programs import ROOT

SMOKE_TIMEOUT_S = 120.0


def test_costs_are_written_for_each_key() -> None:
    costs = Costs(keys=1000, kept=999, memory=50_000, file=43_210, hit=1234.5, miss=2, new=3, known=4)
    cells = write_cells("table", costs)
    assert cells == ["table", "1,000", "999", "50.0", "43.2", "1,234 ns", "2 ns", "3 ns", "4 ns"]
    assert len(cells) == len(COLUMNS)


def test_every_number_has_a_key_of_its_own() -> None:
    keys = make_keys(range(1000))
    assert len(set(keys)) == 1000
    assert {len(key) for key in keys} == {29}


def test_mistakes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("0", "1000001", "many"):
        with pytest.raises(SystemExit, match="2"):
            parse_options(["--keys", count])
    assert "--keys must be between 1 and 1000000" in capsys.readouterr().err
    assert parse_options([]).keys == 1_000_000


def test_a_short_run_from_the_command_line_yields_a_table() -> None:
    command = [sys.executable, "-m", "tests.bench.key_table", "--keys", "20000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SMOKE_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    head, _, table, other = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    assert head == list(COLUMNS[1:])  # the first has no name
    assert (table[:2], other[:2]) == (["table, shared", "20,000"], ["dict, of one process", "20,000"])
    assert 19_990 <= int(table[2].replace(",", "")) <= 20_000
    assert other[2] == "20,000", "a dict loses nothing"
    assert 42 < float(table[4]) < 44
    assert all(float(cell) > 0 for cell in (table[3], other[3]))
    assert all(cell.endswith(" ns") for cell in (*table[5:], *other[5:]))
