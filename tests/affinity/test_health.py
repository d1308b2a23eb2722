"""Health: every pair of event and state of the table in the module's docstring."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.health import HealthEvent, Observed, Thresholds, observe
from stickyproxy.affinity.snapshot import Health

PASSED, FAILED = HealthEvent.PROBE_PASSED, HealthEvent.PROBE_FAILED
REFUSED, CONNECTED = HealthEvent.REFUSED, HealthEvent.CONNECTED
UNKNOWN, HEALTHY, UNHEALTHY = Health.UNKNOWN, Health.HEALTHY, Health.UNHEALTHY
THRESHOLDS = Thresholds(rise=2, fall=3)

FRESH = Observed()
WELL = Observed(HEALTHY, streak=5)
ILL = Observed(UNHEALTHY, streak=3, last_passed=False)
GONE = Observed(UNHEALTHY, is_refused=True, last_passed=False)
GONE_AND_PROBED = Observed(UNHEALTHY, is_refused=True, streak=4, last_passed=False)
STATES = {"fresh": FRESH, "well": WELL, "ill": ILL, "gone": GONE, "gone and probed": GONE_AND_PROBED}

TABLE = {
    (PASSED, "fresh"): Observed(HEALTHY, streak=1),
    (PASSED, "well"): Observed(HEALTHY, streak=6),
    (PASSED, "ill"): Observed(UNHEALTHY, streak=1),
    (PASSED, "gone"): Observed(HEALTHY, streak=1),
    (PASSED, "gone and probed"): Observed(HEALTHY, streak=1),
    (FAILED, "fresh"): Observed(UNKNOWN, streak=1, last_passed=False),
    (FAILED, "well"): Observed(HEALTHY, streak=1, last_passed=False),
    (FAILED, "ill"): Observed(UNHEALTHY, streak=4, last_passed=False),
    (FAILED, "gone"): Observed(UNHEALTHY, is_refused=True, streak=1, last_passed=False),
    (FAILED, "gone and probed"): Observed(UNHEALTHY, is_refused=True, streak=5, last_passed=False),
    (REFUSED, "fresh"): GONE,
    (REFUSED, "well"): GONE,
    (REFUSED, "ill"): GONE,
    (REFUSED, "gone"): GONE,
    (REFUSED, "gone and probed"): GONE,
    (CONNECTED, "fresh"): FRESH,
    (CONNECTED, "well"): WELL,
    (CONNECTED, "ill"): ILL,
    (CONNECTED, "gone"): FRESH,
    (CONNECTED, "gone and probed"): FRESH,
}


@pytest.mark.parametrize(("event", "state"), TABLE)
def test_every_event_in_every_state(event: HealthEvent, state: str) -> None:
    assert observe(STATES[state], event, THRESHOLDS) == TABLE[event, state]


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(product(HealthEvent, STATES))


def follow(events: list[HealthEvent], thresholds: Thresholds = THRESHOLDS) -> list[Health]:
    observed, seen = FRESH, []
    for event in events:
        observed = observe(observed, event, thresholds)
        seen.append(observed.health)
    return seen


@pytest.mark.parametrize(
    ("events", "seen"),
    [
        pytest.param([FAILED] * 4, [UNKNOWN, UNKNOWN, UNHEALTHY, UNHEALTHY], id="falls after three"),
        pytest.param([PASSED] + [FAILED] * 3, [HEALTHY] * 3 + [UNHEALTHY], id="falls from healthy after three"),
        pytest.param([PASSED, FAILED, FAILED, PASSED, FAILED, FAILED], [HEALTHY] * 6, id="failures must be in a row"),
        pytest.param(
            [FAILED] * 3 + [PASSED] * 2, [UNKNOWN, UNKNOWN, UNHEALTHY, UNHEALTHY, HEALTHY], id="rises after 2"
        ),
        pytest.param(
            [FAILED] * 3 + [PASSED, FAILED, PASSED, PASSED],
            [UNKNOWN, UNKNOWN, *[UNHEALTHY] * 4, HEALTHY],
            id="passes must be in a row",
        ),
        pytest.param([REFUSED, PASSED], [UNHEALTHY, HEALTHY], id="a new process need not prove itself"),
        pytest.param([REFUSED, CONNECTED], [UNHEALTHY, UNKNOWN], id="one that listens again is trusted"),
        pytest.param([FAILED] * 3 + [CONNECTED], [UNKNOWN, UNKNOWN, UNHEALTHY, UNHEALTHY], id="connecting is no probe"),
        pytest.param([REFUSED] + [CONNECTED] + [FAILED] * 2, [UNHEALTHY] + [UNKNOWN] * 3, id="and starts from nothing"),
    ],
)
def test_a_course_of_events(events: list[HealthEvent], seen: list[Health]) -> None:
    assert follow(events) == seen


def test_thresholds_of_one_follow_each_probe() -> None:
    assert follow([FAILED, PASSED, FAILED], Thresholds(rise=1, fall=1)) == [UNHEALTHY, HEALTHY, UNHEALTHY]


@settings(deadline=None)
@given(st.lists(st.sampled_from(HealthEvent), max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_only_a_refused_connection_says_that_the_process_is_gone(
    events: list[HealthEvent], rise: int, fall: int
) -> None:
    observed = FRESH
    for event in events:
        observed = observe(observed, event, Thresholds(rise, fall))
        assert not observed.is_refused or observed.health is UNHEALTHY
        assert event is not PASSED or not observed.is_refused
    last = [event for event in events if event in {REFUSED, CONNECTED, PASSED}]
    assert observed.is_refused == (last[-1:] == [REFUSED])
