"""What each process of the proxy sets up for itself. The log and the collector are those of the process: a child's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stickyproxy.config import Config
from stickyproxy.config.schema import MAX_WORKERS
from stickyproxy.control.process import count_workers

ROOT = Path(__file__).parent.parent.parent


def run(text: str) -> tuple[str, str]:
    """Run Python text in a process of its own; return what it wrote to standard output and to the log."""
    done = subprocess.run(
        [sys.executable, "-c", f"import gc, logging\nfrom stickyproxy.control.process import *\n{text}"],
        capture_output=True, text=True, check=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_the_log_goes_to_standard_error_from_its_level_on() -> None:
    out, err = run(
        "set_up_log('warning')\nlog = logging.getLogger('a.b')\nlog.info('one')\nlog.warning('two')\n"
        "set_log_level('debug')\nlog.debug('three')\n"
        "logging.getLogger('aiohttp.access').info('each request')"
    )
    assert out == ""
    assert [line.split(" ", 2)[2] for line in err.splitlines()] == ["WARNING a.b: two", "DEBUG a.b: three"]


def test_the_name_of_a_process_is_in_each_line() -> None:
    _, err = run("set_up_log('info', 'worker 3')\nlogging.getLogger('a').info('here')")
    assert err.rstrip().endswith("INFO [worker 3] a: here")


def test_the_log_is_set_up_anew_with_a_name() -> None:
    _, err = run("set_up_log('info', 'worker')\nset_up_log('info', 'worker 1')\nlogging.getLogger('a').info('here')")
    assert err.count("\n") == 1
    assert "[worker 1]" in err


UNRAISABLE = """
class Bad:
    def __del__(self):
        raise {error}
set_up_log({level!r})
Bad()
"""


def test_what_can_be_raised_nowhere_is_logged() -> None:
    _, err = run(UNRAISABLE.format(error="ValueError('lost')", level="info"))
    assert "ERROR stickyproxy.control.process:" in err
    assert "ValueError('lost')" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("level", "is_seen"), [("info", False), ("debug", True)])
def test_what_a_client_can_cause_is_no_error(level: str, *, is_seen: bool) -> None:
    error = "UnicodeDecodeError('ascii', b'x', 0, 1, 'a name')"
    _, err = run(UNRAISABLE.format(error=error, level=level))
    assert ("DEBUG" in err and "UnicodeDecodeError" in err) == is_seen
    assert "ERROR" not in err


def test_the_collector_looks_no_more_at_what_was_made_at_the_start() -> None:
    out, _ = run("before = gc.get_freeze_count()\ntune_collector()\nprint(before, gc.get_freeze_count() > 1000)")
    assert out == "0 True\n"
    out, _ = run("tune_collector()\nprint(gc.get_threshold()[0] > 700, gc.isenabled())")
    assert out == "True True\n"


@pytest.mark.parametrize(("workers", "expected"), [(1, 1), (3, 3)])
def test_as_many_workers_as_the_configuration_says(workers: int, expected: int) -> None:
    assert count_workers(Config.model_validate({"workers": workers})) == expected


def test_auto_is_one_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"workers": "auto"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert count_workers(config) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)), raising=False)
    assert count_workers(config) == MAX_WORKERS
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_workers(config) == 1
