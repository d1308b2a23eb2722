"""The measurement of abuse: what it reads, what it judges, and one short run of every kind against a real proxy."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.bench.abuse import __main__ as command_line
from tests.bench.abuse import app
from tests.bench.abuse.kinds import (
    HEAD_BYTES,
    TARGET_BYTES,
    Kind,
    Requests,
    Until,
    all_kinds,
    client_hello,
    plain_kinds,
)
from tests.bench.abuse.link import Effort, Link
from tests.bench.abuse.measure import Cost, Plan, Stage, measure
from tests.bench.abuse.table import COLUMNS, Row, cells, write_report
from tests.bench.abuse.usage import Usage, parse_io, peak_kib, resident_kib, settle, usage
from tests.bench.abuse.verdict import Bases, compare
from tests.bench.certificate import make_certificate
from tests.bench.process import Cores, process_tree
from tests.bench.programs import find_program
from tests.bench.results import RunError
from tests.helpers.proc import parse_status
from tests.helpers.processes import Children, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS = Requests(b"stickyproxy=v1." + b"A" * 56)
KINDS = {kind.name: kind for kind in (*plain_kinds(REQUESTS), *all_kinds(REQUESTS))}
SHORT = Plan(seconds=0.001, connections=2, cores=Cores(None, None), batches=1, pieces=5)
PLAIN = Cost(cpu_us=30.0, client_us=10.0, kib=2.0, read_bytes=1000.0, reads=2.0, units=10)
BASES = Bases(PLAIN, replace(PLAIN, kib=4.0))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("abuse")
    with Children(directory) as children:
        yield Stage(children, SHORT, make_certificate(directory) if find_program("openssl") else None)


@pytest.fixture(scope="module")
def requests(stage: Stage) -> Requests:
    return Requests(stage.find_cookie())


@pytest.fixture(scope="module")
def proxies(stage: Stage) -> dict[str, tuple[int, int]]:
    """Return the process and port of each proxy so far, by its configuration: the kinds share them."""
    return {}


def proxy_for(kind: Kind, stage: Stage, proxies: dict[str, tuple[int, int]]) -> tuple[int, int]:
    key = f"{kind.is_tls} {kind.config}"
    if key not in proxies:
        child, port = stage.start_proxy(kind.config, is_tls=kind.is_tls)
        proxies[key] = child.pid, port
    return proxies[key]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_runs_and_yields_figures(
    name: str, stage: Stage, requests: Requests, proxies: dict[str, tuple[int, int]]
) -> None:
    kind = next(kind for kind in (*plain_kinds(requests), *all_kinds(requests)) if kind.name == name)
    if kind.is_tls and not stage.has_certificate:
        pytest.skip("openssl is not installed")
    pid, port = proxy_for(kind, stage, proxies)
    cost = measure(kind, pid, port, SHORT)
    assert cost.cpu_us > 0
    assert cost.client_us > 0
    assert cost.kib >= 0
    assert cost.units >= SHORT.connections * kind.requests
    if name not in {"opened", "closed", "tls-idle"}:
        assert cost.reads > 0
        assert cost.read_bytes > 0


def test_a_kind_that_is_not_answered_as_it_should_be_fails(
    stage: Stage, requests: Requests, proxies: dict[str, tuple[int, int]]
) -> None:
    wrong = replace(next(kind for kind in all_kinds(requests) if kind.name == "refused"), status=431)
    with pytest.raises(RunError, match="answered with 400, not 431"):
        measure(wrong, *proxy_for(wrong, stage, proxies), SHORT)


def test_a_connection_that_ends_before_its_answer_fails(
    stage: Stage, requests: Requests, proxies: dict[str, tuple[int, int]]
) -> None:
    refused = next(kind for kind in all_kinds(requests) if kind.name == "refused")
    _, port = proxy_for(refused, stage, proxies)
    with Link(port, Effort()) as link:
        link.send(refused.message(0))
        with pytest.raises(RunError, match="closed before its answer was whole; the last status was 400"):
            link.receive(Until.ANSWER, 200)


def test_what_is_sent_byte_by_byte_is_read_byte_by_byte(
    stage: Stage, requests: Requests, proxies: dict[str, tuple[int, int]]
) -> None:
    kinds = {kind.name: kind for kind in (*plain_kinds(requests), *all_kinds(requests))}
    pid, port = proxy_for(kinds["plain"], stage, proxies)
    plan = replace(SHORT, pieces=1000)
    whole, cut = (measure(kinds[name], pid, port, plan) for name in ("plain", "head-bytes"))
    # A machine that stalls for longer than the pace may put some bytes together, not many of them.
    assert cut.reads > 0.8 * len(kinds["head-bytes"].message(0))
    assert whole.reads < 10
    assert cut.read_bytes == pytest.approx(whole.read_bytes, rel=0.05)


@pytest.mark.parametrize("name", ["head-large", "head-unfinished", "target-large"])
def test_what_is_at_a_limit_is_just_below_it(name: str) -> None:
    message = KINDS[name].message(12_345)
    if name == "target-large":
        assert len(message.split(b" ")[1]) == TARGET_BYTES
    else:
        assert HEAD_BYTES - 8 <= len(message) + (4 if name == "head-unfinished" else 0) <= HEAD_BYTES


@pytest.mark.parametrize("name", KINDS)
def test_a_cut_loses_nothing(name: str) -> None:
    message = KINDS[name].message(7)
    assert b"".join(KINDS[name].cut(message)) == message


def test_a_client_hello_is_a_handshake_record() -> None:
    assert client_hello(0)[:2] == b"\x16\x03"


@pytest.mark.parametrize("path", app.IN_PIECES)
def test_answers_in_pieces_end_with_the_mark(path: bytes) -> None:
    assert b"".join(app.IN_PIECES[path]).count(app.MARK) == 1


def test_one_unit_is_judged_by_request() -> None:
    ratios = compare(replace(PLAIN, cpu_us=3300.0, read_bytes=90_000.0), BASES)
    assert (ratios.by_request, ratios.by_read, ratios.by_client) == (110.0, 110.0, 330.0)
    assert ratios.by_byte == pytest.approx(110 / 90)
    assert (ratios.cpu, ratios.is_too_much, ratios.is_notable) == (110.0, True, True)


@pytest.mark.parametrize("size", [{"read_bytes": 200_000.0}, {"reads": 400.0}])
def test_an_input_as_large_as_100_requests_is_judged_by_its_size(size: dict[str, float]) -> None:
    large = replace(PLAIN, cpu_us=9_000.0, **size)  # type: ignore[arg-type]  # of the fields that are floats
    assert compare(large, BASES).cpu == 1.5
    assert not compare(large, BASES).is_too_much
    assert compare(large, BASES).is_notable
    assert compare(replace(large, cpu_us=900_000.0), BASES).is_too_much


def test_memory_is_judged_by_connection_and_by_all_its_requests() -> None:
    held = replace(PLAIN, kib=400.0)
    assert compare(held, BASES).memory == 100.0
    assert compare(held, BASES).is_too_much
    assert compare(held, BASES, requests=1000).memory == 0.1
    assert not compare(replace(held, kib=399.0), BASES).is_too_much


def test_a_connection_that_sends_nothing_has_no_ratio_by_size() -> None:
    ratios = compare(replace(PLAIN, read_bytes=0.0, reads=0.0), BASES)
    assert (ratios.by_byte, ratios.by_read, ratios.memory_by_byte) == (None, None, None)
    assert ratios.cpu == 1.0


def test_the_table_names_what_is_too_much_and_what_failed() -> None:
    bad = replace(PLAIN, cpu_us=3300.0)
    rows = [
        Row(KINDS["plain"], PLAIN, compare(PLAIN, BASES)),
        Row(KINDS["chunks"], bad, compare(bad, BASES)),
        Row(KINDS["refused"], failure="RunError: answered with 200, not 400"),
    ]
    assert [row.verdict for row in rows] == ["ok", "TOO MUCH", "FAILED"]
    assert [row.is_good for row in rows] == [True, False, False]
    assert len({len(cells(row)) for row in rows} | {len(COLUMNS)}) == 1
    for is_markdown in (False, True):
        text = write_report(rows, ["a fact"], is_markdown=is_markdown)
        assert "a fact" in text
        assert "too much: chunks" in text.splitlines()
        assert "refused: RunError: answered with 200, not 400" in text.splitlines()


def test_reads_and_memory_are_found_in_proc() -> None:
    assert parse_io("rchar: 323934931\nwchar: 323929600\nsyscr: 632687\nsyscw: 632675\n") == (632687, 323934931)
    status = "VmPeak:\t  1000 kB\nVmHWM:\t   900 kB\nVmRSS:\t   800 kB\n"
    assert (parse_status(status, "VmHWM"), parse_status(status, "VmRSS"), parse_status("", "VmRSS")) == (900, 800, 0)
    assert Usage(3.0, 20, 100).since(Usage(1.0, 5, 40)) == (2.0, 15, 60)


def test_a_process_is_seen_to_read_and_to_grow() -> None:
    program = "import os, sys; os.read(0, 7); kept = bytearray(50_000_000); os.write(1, b'.'); os.read(0, 1)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        before_kib, before = resident_kib(child.pid), usage(child.pid)
        child.stdin.write(b"x" * 7)
        child.stdin.flush()
        assert child.stdout.read(1) == b"."
        used = usage(child.pid).since(before)
        grown_kib = peak_kib(child.pid) - before_kib
        child.stdin.write(b"x")
    assert used.read_bytes >= 7
    assert used.reads >= 1
    assert grown_kib >= 48_000


def test_what_the_workers_of_a_proxy_do_is_its_own() -> None:
    worker = "import os; os.read(0, 7); kept = bytearray(50_000_000); os.write(1, b'.'); os.read(0, 1)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}], check=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        wait_until(lambda: len(process_tree(child.pid)) == 2, "the worker runs")
        settle(child.pid)
        before_kib, before = resident_kib(child.pid), usage(child.pid)
        child.stdin.write(b"x" * 7)
        child.stdin.flush()
        assert child.stdout.read(1) == b"."
        used = usage(child.pid).since(before)
        grown_kib = peak_kib(child.pid) - before_kib
        child.stdin.write(b"x")
    assert (used.reads >= 1, used.read_bytes >= 7, grown_kib >= 48_000) == (True, True, True)


def test_unknown_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["slow-loris"], ["--seconds", "0"], ["--connections", "0"]):
        with pytest.raises(SystemExit, match="2"):
            command_line.parse_options(arguments)
    assert "unknown: slow-loris; known: head-bytes, head-lines" in capsys.readouterr().err


def test_what_fails_is_in_the_rows_and_the_rest_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(kind: Kind, _: Requests) -> Cost:
        if kind.name == "chunks":
            raise RunError("no answer")
        return PLAIN

    monkeypatch.setattr(stage, "measure", measured)
    rows = command_line.run(argparse.Namespace(kinds=["chunks", "refused"]), stage)
    assert [(row.kind.name, row.is_good) for row in rows] == [
        ("plain", True),
        ("idle", True),
        ("refused", True),
        ("chunks", False),
    ]
    assert "chunks: FAILED, RunError: no answer" in capsys.readouterr().err
