"""Counting: where a duration and an exchange go."""

import pytest

from stickyproxy.observe.counters import (
    METHOD_NAMES,
    STATUS_CLASSES,
    Histogram,
    PlaneCounters,
    ProbeCounters,
    UpstreamCounters,
)


@pytest.mark.parametrize(("duration_s", "place"), [(0.0, 0), (1.0, 0), (1.1, 1), (2.0, 1), (2.1, 2)])
def test_a_bucket_holds_its_own_bound(duration_s: float, place: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(duration_s)
    assert histogram.counts == [int(place == at) for at in range(3)]
    assert histogram.total_s == duration_s


@pytest.mark.parametrize("method", [*METHOD_NAMES[:-1], "BREW", ""])
@pytest.mark.parametrize("status", [100, 204, 302, 499, 599])
def test_an_exchange_is_counted_by_method_and_class(method: str, status: int) -> None:
    counters = UpstreamCounters()
    counters.count_exchange(method.encode(), status)
    row = METHOD_NAMES.index(method if method in METHOD_NAMES else "other")
    place = row * len(STATUS_CLASSES) + STATUS_CLASSES.index(f"{status // 100}xx")
    assert counters.exchanges.index(1) == place
    assert sum(counters.exchanges) == 1


def test_the_outcomes_of_probes_begin_at_zero() -> None:
    assert ProbeCounters().outcomes == {"passed": 0, "failed": 0, "refused": 0, "timeout": 0}
    assert set(ProbeCounters().outcomes) == {"passed", "failed", "refused", "timeout"}


def test_the_counters_of_the_plane_begin_at_zero() -> None:
    counters = PlaneCounters()
    assert (counters.hits, counters.connections, counters.affinity, counters.breaks) == (0, 0, {}, {})
    assert sum(counters.none.exchanges) == 0
