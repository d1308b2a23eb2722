"""Upstreams that were removed are shown for some time, and never too many of them."""

import json

import pytest

from stickyproxy.observe import removed as removed_module
from stickyproxy.observe.removed import KEPT_S, Removed


def test_one_that_was_removed_is_shown_for_some_time() -> None:
    removed = Removed()
    removed.note(dict.fromkeys(["a", "b"], "default"), ["a"], 1000.0)
    assert list(removed.clusters(1000.0)) == ["b"]
    removed.note(dict.fromkeys(["a"], "default"), ["a"], 1100.0)
    removed.note(dict.fromkeys(["a"], "default"), [], 1200.0)
    assert list(removed.clusters(1000.0 + KEPT_S - 0.1)) == ["b", "a"]
    assert list(removed.clusters(1000.0 + KEPT_S)) == ["a"]
    assert list(removed.clusters(1200.0 + KEPT_S)) == []
    removed.note(dict.fromkeys([], "default"), [], 1200.0 + KEPT_S)
    assert repr(removed) == "<Removed []>"


def test_one_that_is_back_is_not_removed_and_can_be_so_again() -> None:
    removed = Removed()
    removed.note(dict.fromkeys(["a", "b"], "default"), [], 1000.0)
    removed.note(dict.fromkeys([], "default"), ["a"], 1001.0)
    assert list(removed.clusters(1001.0)) == ["b"]
    removed.note(dict.fromkeys(["a"], "default"), [], 1002.0)
    assert list(removed.clusters(1002.0)) == ["b", "a"]


def test_of_too_many_those_removed_last_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removed_module, "MAX_REMOVED", 3)
    removed = Removed()
    for number in range(5):
        removed.note(dict.fromkeys([f"g{number}-1"], "default"), [], 1000.0 + number)
    assert list(removed.clusters(1005.0)) == ["g2-1", "g3-1", "g4-1"]


def test_another_process_goes_on_by_its_own_clock() -> None:
    removed = Removed()
    removed.note(dict.fromkeys(["a"], "default"), [], 1000.0)
    removed.note(dict.fromkeys(["b"], "default"), [], 1100.0)
    again = Removed.from_json(json.loads(json.dumps(removed.to_json(1200.0))), 50.0)
    assert list(again.clusters(50.0)) == ["a", "b"]
    assert list(again.clusters(50.0 + KEPT_S - 150.0)) == ["b"]
