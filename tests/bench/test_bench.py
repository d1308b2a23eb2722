"""The benchmark itself: what it reads, what it writes for the targets, what it reports, and one short run."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from stickyproxy.config import load_file
from tests.bench import __main__ as command_line
from tests.bench import load
from tests.bench.__main__ import parse_options
from tests.bench.apps import file_server_config
from tests.bench.certificate import Certificate, make_certificate
from tests.bench.floor_tunnel import Side
from tests.bench.frames import write_frame
from tests.bench.load import parse_wrk, run_load, visit, wrk_command
from tests.bench.process import (
    Cores,
    choose_cores,
    cpu_s,
    held_to,
    parse_pss_kib,
    parse_schedstat,
    process_tree,
    pss_kib,
)
from tests.bench.programs import ROOT, find_program
from tests.bench.report import Facts, as_json, cells, cpu_model, markdown, terminal
from tests.bench.results import Row, RunError, Sample, ratio_to_base
from tests.bench.rounds import Plan, run_scenario
from tests.bench.scenarios import SCENARIOS
from tests.bench.tables import write_table
from tests.bench.targets import TARGETS, Site, Target, caddy_config, haproxy_config, nginx_config, stickyproxy_config
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SMOKE_TIMEOUT_S = 120.0

WRK = """\
Running 2s test @ http://127.0.0.1:8080/1024
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.35ms    1.02ms  13.11ms   88.00%
    Req/Sec    27.51k     1.03k   28.90k    70.00%
  Latency Distribution
     50%  629.00us
     75%    2.91ms
     90%    3.50ms
     99%    1.25s
  54759 requests in 2.01s, 69.03MB read
Requests/sec:  27243.18
Transfer/sec:     34.34MB
"""
FACTS = Facts("2026-01-02 03:04 UTC", "A CPU", 2, "6.1", "3.11.7", 0.1, "proxy on core 0", 3, 4.0, {"haproxy": "2.6"})


class TwoCookies(BaseHTTPRequestHandler):
    """Answers every GET with two cookies."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Set-Cookie", "SP=a; Path=/; HttpOnly")
        self.send_header("Set-Cookie", "other=b")
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"yes")

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, 21000, 21001, (21002, 21003), is_websocket=False)


@pytest.fixture
def server_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), TwoCookies) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def row(scenario: str, target: str, *figures: float, errors: int = 0, failures: tuple[str, ...] = ()) -> Row:
    samples = tuple(Sample(cpu_us=figure, per_s=1000.0, p50_us=1.0, p99_us=2.0, errors=errors) for figure in figures)
    return Row(SCENARIOS[scenario], target, samples, failures)


def test_the_output_of_wrk_becomes_facts() -> None:
    output = parse_wrk(WRK)
    assert (output.requests, output.per_s) == (54759, 27243.18)
    assert (output.p50_us, output.p99_us) == (629.0, 1.25e6)
    assert (output.socket_errors, output.refused) == (0, 0)


def test_errors_in_the_output_of_wrk_are_counted() -> None:
    output = parse_wrk(
        WRK + "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 7\n"
    )
    assert (output.socket_errors, output.refused) == (4321, 7)


def test_other_output_is_no_measurement() -> None:
    with pytest.raises(RunError, match="requests in"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


@pytest.mark.skipif(find_program("wrk") is None, reason="wrk is not installed")
def test_the_affinity_cookie_goes_with_every_request() -> None:
    command = wrk_command(SCENARIOS["close"], 8080, "SP=a", 4)
    assert {"Cookie: SP=a", "Connection: close", "-c16", "-d4"} <= set(command)
    assert command[-1] == "http://127.0.0.1:8080/1024"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (WRK + "  Non-2xx or 3xx responses: 7\n", "7 of 54759 responses were not 2xx"),
        (WRK.replace("54759", "0"), "0 of 0"),
    ],
)
def test_a_run_without_good_responses_is_invalid(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "wrk_command", lambda *_: [])
    monkeypatch.setattr(load, "_output_of", lambda *_: text)
    with pytest.raises(RunError, match=reason):
        run_load(SCENARIOS["http"], 1, "", os.getpid(), 1)


def test_a_refused_websocket_is_invalid(server_port: int) -> None:
    with pytest.raises(RunError, match="no 101 but"):
        run_load(SCENARIOS["ws"], server_port, "", os.getpid(), 0.1)


def test_a_visit_returns_the_cookies_to_send_back(server_port: int) -> None:
    answer = visit(server_port, "/1024")
    assert (answer.status, answer.body_bytes, answer.cookie) == (200, 3, "SP=a; other=b")


def test_the_first_field_of_schedstat_is_nanoseconds_on_a_core() -> None:
    assert parse_schedstat("1500000000 26468874 97\n") == 1.5


def test_the_memory_is_the_proportional_share() -> None:
    assert (
        parse_pss_kib("55d0-7ffd ---p 00000000 00:00 0 [rollup]\nRss: 900 kB\nPss:    421 kB\nPss_Dirty: 5 kB\n") == 421
    )
    assert parse_pss_kib("") == 0


def test_a_process_is_counted_with_its_descendants() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        tree = process_tree(os.getpid())
        child.communicate(b"\n")
    assert tree[0] == os.getpid()
    assert child.pid in tree
    assert cpu_s(os.getpid()) > 0
    assert pss_kib(os.getpid()) > 0


def test_a_process_that_ended_costs_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    assert (cpu_s(child.pid), pss_kib(child.pid)) == (0, 0)


def test_the_proxy_has_a_core_of_its_own_where_there_are_two() -> None:
    assert choose_cores({3, 1, 2}) == Cores(proxy=1, rest=2)
    assert choose_cores({5}) == Cores(proxy=None, rest=None)


def test_a_core_is_held_only_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    with held_to(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_the_ratio_is_to_haproxy_in_the_same_scenario() -> None:
    rows = [row("http", "haproxy", 20.0), row("ws", "haproxy", 10.0), row("ws", "floor", 8.0, 12.0, 90.0)]
    assert [ratio_to_base(one, rows) for one in rows] == [1.0, 1.0, 1.2]


def test_without_haproxy_there_is_no_ratio() -> None:
    alone = row("ws", "floor", 8.0)
    assert ratio_to_base(alone, [alone]) is None
    assert ratio_to_base(alone, [alone, row("ws", "haproxy", failures=("it did not come up",))]) is None


def test_errors_are_added_over_the_rounds() -> None:
    one = row("ws", "floor", 8.0, 9.0, 10.0, errors=2)
    assert (one.figure, one.errors, one.is_clean) == (9.0, 6, False)


def test_a_row_without_a_valid_round_says_so() -> None:
    failed = row("http", "caddy", failures=("round 1: it did not come up",))
    assert not failed.is_clean
    assert cells(failed, [failed])[2:5] == ["invalid", "us CPU/request", "-"]
    assert cells(failed, [failed])[-2:] == ["0", "0/1"]


def test_the_report_is_a_markdown_table() -> None:
    rows = [row("http", "haproxy", 20.0), row("http", "floor", 25.0, failures=("round 2: no echo",))]
    text = markdown(rows, FACTS).splitlines()
    assert "- haproxy: 2.6" in text
    assert "| http | floor | 25.0 | us CPU/request | 1.25 | 1,000 | 1 | 2 | 0 | 1/2 |" in text
    assert "    http floor, round 2: no echo" in text
    table = [line for line in text if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_the_report_for_a_terminal_is_aligned() -> None:
    text = terminal([row("http", "haproxy", 20.0), row("http", "stickyproxy", 125.5)], FACTS)
    table = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1
    assert "3.11.7" in text


def test_the_json_holds_the_samples_too() -> None:
    rows = [row("http", "haproxy", 20.0, 22.0)]
    first = json.loads(json.dumps(as_json(rows, FACTS)))["rows"][0]
    assert (first["figure"], first["ratio_to_haproxy"], len(first["samples"])) == (21.0, 1.0, 2)


def test_the_cpu_is_named_even_where_the_kernel_does_not() -> None:
    assert cpu_model("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n") == "A CPU @ 2 GHz"
    assert cpu_model("processor\t: 0\n") == os.uname().machine


@pytest.mark.parametrize("write", [haproxy_config, nginx_config, caddy_config, stickyproxy_config])
def test_every_target_over_tls_shows_the_one_certificate(write: Callable[[Site], str], site: Site) -> None:
    directory = site.directory
    certificate = Certificate(directory / "chain.pem", directory / "key.pem", directory / "both.pem")
    assert ".pem" not in write(site)
    text = write(replace(site, certificate=certificate))
    files = [file for file in (certificate.chain, certificate.key, certificate.both) if str(file) in text]
    assert files in ([certificate.chain, certificate.key], [certificate.both])


@pytest.mark.parametrize("write", [haproxy_config, nginx_config, caddy_config, stickyproxy_config])
def test_every_target_listens_where_it_is_told_and_has_both_upstreams(write: Callable[[Site], str], site: Site) -> None:
    text = write(site)
    assert ":21000" in text
    assert "127.0.0.1:21002" in text
    assert "127.0.0.1:21003" in text


def test_stickyproxy_takes_its_file(site: Site) -> None:
    config = load_file(site.directory / site.write("stickyproxy.yaml", stickyproxy_config(site)), {})
    assert config.workers == 1


def test_the_file_server_listens_on_every_port(tmp_path: Path) -> None:
    text = file_server_config(tmp_path, (21002, 21003))
    assert "listen 127.0.0.1:21002 " in text
    assert "listen 127.0.0.1:21003 " in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(("size_bytes", "head_bytes"), [(125, 2), (126, 4), (65535, 4), (65536, 10)])
def test_a_frame_is_as_long_as_its_size_asks_for(size_bytes: int, head_bytes: int) -> None:
    assert len(write_frame(size_bytes, is_masked=False)) == head_bytes + size_bytes
    assert len(write_frame(size_bytes, is_masked=True)) == head_bytes + 4 + size_bytes


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000, 10**6])
def test_the_floor_counts_frames_whatever_the_cuts(cut: int) -> None:
    side = Side(other=None)  # type: ignore[arg-type]  # nothing is written
    stream = b"".join(write_frame(size, is_masked=masked) for size in (0, 64, 126, 70000) for masked in (True, False))
    for at in range(0, len(stream), cut):
        side._count_frames(stream[at : at + cut])
    assert side.frames == 8


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["htpt"], ["http", "--targets", "haproxy,apache"], ["http", "--rounds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            parse_options(arguments)
    assert "unknown: apache; known: haproxy, nginx" in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_way_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "find_program", lambda _: None)
    assert command_line.main(["http", "--targets", "floor"]) == 2
    assert "wrk is not installed, and the scenarios need it: apt-get install wrk" in capsys.readouterr().err


def test_a_missing_target_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    missing = Target("caddy", "no-such-program", lambda _: [], ())
    assert command_line.leave_out_missing([missing, TARGETS["floor"]]) == [TARGETS["floor"]]
    assert "caddy is not installed, left out: " in capsys.readouterr().err


@pytest.mark.skipif(find_program("openssl") is None, reason="openssl is not installed")
def test_a_run_over_tls_is_clean(tmp_path: Path) -> None:
    plan = Plan(rounds=1, seconds=0.2, cores=Cores(None, None), certificate=make_certificate(tmp_path))
    with Children(tmp_path) as children:
        (row,) = run_scenario(SCENARIOS["ws-tls"], [TARGETS["floor"]], plan, children)
    assert row.is_clean, row.failures


def test_a_target_without_tls_is_not_measured_over_tls(server_port: int) -> None:
    assert visit(server_port, "/1024").status == 200
    with pytest.raises(ssl.SSLError):
        visit(server_port, "/1024", is_tls=True)
    with pytest.raises(RunError, match="SSL"):
        run_load(SCENARIOS["ws-tls"], server_port, "", os.getpid(), 0.1)


def test_the_scenarios_over_tls_are_those_without_it() -> None:
    for name in ("http", "single", "close", "ws", "idle"):
        assert (
            replace(SCENARIOS[f"{name}-tls"], name=name, title=SCENARIOS[name].title, is_tls=False) == SCENARIOS[name]
        )


@pytest.mark.skipif(find_program("wrk") is None, reason="wrk is not installed")
def test_wrk_speaks_tls_where_the_scenario_does() -> None:
    assert wrk_command(SCENARIOS["close-tls"], 8080, "", 4)[-1] == "https://127.0.0.1:8080/1024"


def test_all_scenarios_and_targets_can_be_named() -> None:
    options = parse_options([*SCENARIOS, "--targets", ",".join(TARGETS)])
    assert [scenario.name for scenario in options.scenarios] == list(SCENARIOS)
    assert [target.name for target in options.targets] == list(TARGETS)


def test_a_target_that_does_not_come_up_is_reported_with_its_output_and_the_rest_goes_on(tmp_path: Path) -> None:
    broken = Target("broken", None, lambda _: [sys.executable, "-c", "raise SystemExit('no such option')"], ())
    plan = Plan(rounds=1, seconds=0.2, cores=Cores(None, None))
    with Children(tmp_path) as children:
        failed, measured = run_scenario(SCENARIOS["ws"], [broken, TARGETS["floor"]], plan, children)
    assert failed.samples == ()
    assert "no such option" in failed.failures[0]
    assert measured.is_clean


def test_a_short_run_from_the_command_line_yields_a_row_without_errors(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.bench", "ws", "--targets", "floor", "--rounds", "1", "--seconds", "0.3"]
    done = subprocess.run(
        [*command, "--json", file], cwd=ROOT, capture_output=True, text=True, check=False, timeout=SMOKE_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    (only,) = json.loads(file.read_text())["rows"]
    assert (only["scenario"], only["target"], only["errors"], only["failures"]) == ("ws", "floor", 0, [])
    assert only["cpu_us"] > 0


def test_a_table_has_its_figures_on_the_right() -> None:
    rows = [["name", "us", "note"], ["one", "1,000", "fast"], ["other", "2", ""]]
    assert write_table(rows, (0, 2), is_markdown=True)[:2] == ["| name | us | note |", "| --- | ---: | --- |"]
    assert write_table(rows, (0, 2), is_markdown=False) == ["name      us  note", "one    1,000  fast", "other      2"]
