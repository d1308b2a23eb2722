"""Descriptors: as many as the process may have, and the clients that they are good for."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys

import pytest

from stickyproxy.control.descriptors import choose_connection_limit, raise_descriptor_limit


@pytest.mark.parametrize(
    ("descriptors", "connections"), [(20_000, 9_968), (1_024, 480), (128, 48), (64, 24), (4, 1), (1, 1)]
)
def test_by_default_half_of_the_descriptors_are_for_clients(descriptors: int, connections: int) -> None:
    assert choose_connection_limit(descriptors, None) == connections


def test_what_is_wanted_counts_and_too_much_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert choose_connection_limit(1_024, 480) == 480
    assert caplog.records == []
    assert choose_connection_limit(1_024, 481) == 481
    assert "1024 descriptors are enough for 480" in caplog.text


def test_the_limit_is_raised_as_far_as_it_may_be() -> None:
    """In a process of its own, whose limits are nobody else's."""
    program = """
import json, resource
from stickyproxy.control.descriptors import raise_descriptor_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
raised = raise_descriptor_limit()
print(json.dumps([hard, raised, *resource.getrlimit(resource.RLIMIT_NOFILE), raise_descriptor_limit()]))
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60).stdout
    hard, *seen = json.loads(said)
    assert seen == [hard] * 4


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_descriptor_limit() == 100
