"""What the admin listener reads: copies of the numbers, the state as JSON, and why a proxy is not ready."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio

from stickyproxy import __version__
from stickyproxy.affinity.choose import BreakReason, Outcome
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.snapshot import AdminState, Health
from stickyproxy.config import Config
from stickyproxy.control import readings as readings_module
from stickyproxy.control.certificates import CertificateFacts
from stickyproxy.control.readings import LoopLag
from stickyproxy.observe.counters import (
    ACCEPT_PAUSES,
    ACCESS_LOG_DROPPED,
    AFFINITY,
    BREAKS,
    CONNECTIONS,
    DIGEST,
    DOWNSTREAMS,
    HANDED,
    HANDSHAKES,
    HITS,
    IDLE_CONNECTIONS,
    IN_FLIGHT,
    IS_ACCEPTING,
    KEY_CONFLICTS,
    KEYS_EVICTED,
    KEYS_LEARNED,
    TICKED_AT,
    TUNNELS_OPEN,
    UPSTREAM,
    ProbeCounters,
    UpstreamCounters,
)
from stickyproxy.observe.metrics import UpstreamNumbers
from tests.helpers.stub_supervisor import StubSupervisor

DEADLINE_S = 30


class Proxy(StubSupervisor):
    """A proxy with two upstreams that nobody probes, and two workers."""

    def __init__(self) -> None:
        upstreams = [
            {"id": "app-1", "url": "http://127.0.0.1:8001", "weight": 3},
            {"id": "app-2", "url": "unix:/run/app.sock"},
        ]
        super().__init__(Config.model_validate({"upstreams": upstreams, "listeners": ["127.0.0.1:8443"]}))

    def numbers(self, upstream_id: str = "app-1") -> UpstreamNumbers:
        [found] = [one for one in self.readings.take_numbers().upstreams if one.id == upstream_id]
        return found

    def refuse(self, *upstream_ids: str) -> None:
        for upstream_id in upstream_ids:
            self.routing.report(upstream_id, HealthEvent.REFUSED)

    def end(self, worker: int) -> None:
        """Let a worker end."""
        link = self.fleet.links[worker]
        link.is_leaving = True
        self.fleet._on_end(link)


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


# Ready or not


async def test_a_proxy_is_starting_then_ready_then_stopping(proxy: Proxy) -> None:
    assert proxy.readings.explain_unready() == "the proxy is starting"
    assert not proxy.readings.is_ready
    proxy.readings.is_ready = True
    assert proxy.readings.explain_unready() is None
    proxy.readings.is_ready = False
    assert proxy.readings.explain_unready() == "the proxy is stopping"


async def test_one_upstream_that_keeps_its_clients_is_enough(proxy: Proxy) -> None:
    proxy.readings.is_ready = True
    proxy.refuse("app-1")
    proxy.routing.set_admin_state("app-2", AdminState.DRAIN)
    assert proxy.readings.explain_unready() is None


async def test_failing_probes_alone_do_not_make_a_proxy_unready(proxy: Proxy) -> None:
    proxy.readings.is_ready = True
    for upstream_id in ("app-1", "app-2"):
        for _ in range(3):
            proxy.routing.report(upstream_id, HealthEvent.PROBE_FAILED)
        assert proxy.routing.observed[upstream_id].health is Health.UNHEALTHY
    assert proxy.readings.explain_unready() is None


async def test_without_any_usable_upstream_the_reason_says_so(proxy: Proxy) -> None:
    proxy.readings.is_ready = True
    proxy.refuse("app-1")
    proxy.routing.set_admin_state("app-2", AdminState.MAINT)
    assert proxy.readings.explain_unready() == "no upstream can be used: 1 refuse connections, 1 in maintenance"


# The state


async def test_an_upstream_is_idle_when_nothing_is_under_way_whatever_sessions_it_has(proxy: Proxy) -> None:
    proxy.begin_sessions("app-1", 4)
    assert proxy.readings.is_idle("app-1")
    assert not proxy.readings.is_empty("app-1")
    for cell in (TUNNELS_OPEN, IN_FLIGHT):
        proxy.counters("app-1", 1).cells[cell] = 1
        assert not proxy.readings.is_idle("app-1")
        proxy.counters("app-1", 1).cells[cell] = 0
    assert proxy.readings.is_idle("app-1")


async def test_nothing_is_empty_while_the_sessions_of_a_dead_worker_may_come_back(proxy: Proxy) -> None:
    assert proxy.readings.is_empty("app-1")
    proxy.fleet._lost_at = asyncio.get_running_loop().time()
    assert not proxy.readings.is_empty("app-1")
    proxy.fleet._lost_at -= proxy.config.affinity.session_idle_s
    assert proxy.readings.is_empty("app-1")


async def test_the_state_names_every_worker_and_upstream(proxy: Proxy) -> None:
    proxy.readings.is_ready = True
    proxy.counters("app-1").cells[TUNNELS_OPEN] = 1
    proxy.counters("app-1", 1).cells[TUNNELS_OPEN] = 3
    proxy.counters("app-1", 1).cells[IN_FLIGHT] = 5
    proxy.begin_sessions("app-1", 4)
    proxy.begin_sessions("app-1", 2, worker=1)
    proxy.refuse("app-2")
    state = json.loads(json.dumps(proxy.readings.describe()))
    assert state.pop("uptime_s") >= 0
    assert state == {
        "version": __version__,
        "is_ready": True,
        "run": None,
        "workers": [
            {"index": 0, "pid": 1000, "version": "1.2.3", "is_leaving": False},
            {"index": 1, "pid": 1001, "version": "1.2.3", "is_leaving": False},
        ],
        "clusters": [
            {
                "name": "default",
                "is_guarded": False,
                "upstreams": [
                    {
                        "id": "app-1",
                        "address": "127.0.0.1:8001",
                        "weight": 3,
                        "max_sessions": None,
                        "admin_state": "ready",
                        "health": "unknown",
                        "is_refused": False,
                        "is_leaving": False,
                        "accepts_new": True,
                        "accepts_pinned": True,
                        "sessions": 6,
                        "tunnels": 4,
                        "in_flight": 5,
                    },
                    {
                        "id": "app-2",
                        "address": "unix:/run/app.sock",
                        "weight": 1,
                        "max_sessions": None,
                        "admin_state": "ready",
                        "health": "unhealthy",
                        "is_refused": True,
                        "is_leaving": False,
                        "accepts_new": False,
                        "accepts_pinned": False,
                        "sessions": 0,
                        "tunnels": 0,
                        "in_flight": 0,
                    },
                ],
            }
        ],
    }


async def test_workers_and_upstreams_that_are_leaving_say_so(proxy: Proxy) -> None:
    proxy.fleet.leaving.append(proxy.fleet.links.pop(0))
    proxy.routing.reload(Config.model_validate({"upstreams": ["http://127.0.0.1:1"]}), {})
    described = cast("dict[str, Any]", proxy.readings.describe())
    assert {one["index"]: one["is_leaving"] for one in described["workers"]} == {0: True, 1: False}
    [cluster] = described["clusters"]
    leaving = {one["id"]: (one["is_leaving"], one["admin_state"]) for one in cluster["upstreams"]}
    assert leaving == {"127.0.0.1:1": (False, "ready"), "app-1": (True, "drain"), "app-2": (True, "drain")}


async def test_a_guarded_cluster_says_so(proxy: Proxy) -> None:
    proxy.refuse("app-1", "app-2")
    [cluster] = cast("list[dict[str, Any]]", proxy.readings.describe()["clusters"])
    assert cluster["is_guarded"] is True


@pytest.mark.parametrize("cell", [TUNNELS_OPEN, IN_FLIGHT])
async def test_an_upstream_is_empty_when_no_worker_has_anything_of_it(proxy: Proxy, cell: int) -> None:
    assert proxy.readings.is_empty("app-1")
    proxy.counters("app-1", 1).cells[cell] = 1
    assert not proxy.readings.is_empty("app-1")
    assert proxy.readings.is_empty("app-2")
    proxy.counters("app-1", 1).cells[cell] = 0
    proxy.begin_sessions("app-1", 1)
    assert not proxy.readings.is_empty("app-1")
    proxy.refuse("app-1")  # its process is gone, and with it the sessions
    assert proxy.readings.is_empty("app-1")


# The numbers


async def test_the_numbers_of_an_upstream_are_gathered(proxy: Proxy) -> None:
    proxy.prober.counters["app-1"] = ProbeCounters()
    proxy.prober.counters["app-1"].outcomes["passed"] = 2
    proxy.begin_sessions("app-1", 3)
    proxy.counters("app-1").cells[IDLE_CONNECTIONS] = 1
    proxy.counters("app-1", 1).cells[IDLE_CONNECTIONS] = 2
    proxy.routing.set_admin_state("app-1", AdminState.DRAIN)
    proxy.refuse("app-2")
    found = proxy.numbers()
    assert (found.labels, found.health, found.admin) == (("default", "app-1"), Health.UNKNOWN, AdminState.DRAIN)
    assert (found.sessions, found.idle_connections, found.probes.outcomes["passed"]) == (3, 3, 2)
    assert not found.is_refused
    assert proxy.numbers("app-2").is_refused
    assert proxy.numbers("app-2").probes.outcomes["passed"] == 0  # not probed yet


async def test_the_numbers_of_the_planes_are_added_up(proxy: Proxy) -> None:
    for worker, times in enumerate((1, 2)):
        counters = proxy.links[worker].table.plane
        counters.cells[HITS] = 7 * times
        counters.cells[AFFINITY[Outcome.NEW]] = times
        counters.cells[BREAKS[BreakReason.REFUSED]] = 2 * times
        counters.cells[KEY_CONFLICTS], counters.cells[KEYS_LEARNED], counters.cells[KEYS_EVICTED] = times, 5, 4 * times
        counters.cells[CONNECTIONS] = 9 * times
        counters.cells[DOWNSTREAMS] = times
        counters.cells[HANDED["tunnels"]] = times
        counters.none.count_exchange(b"GET", 503)
        counters.observe_lag(0.1)
    proxy.refuse("app-1", "app-2")
    proxy.readings.loop_lag.histogram.observe(0.1)
    numbers = proxy.readings.take_numbers()
    assert numbers.version == __version__
    assert numbers.affinity == {"hit": 21, "new": 3}
    assert (numbers.key_conflicts, numbers.keys_learned, numbers.keys_evicted) == (3, 10, 12)
    assert numbers.breaks == {"refused": 6}
    assert (numbers.downstream_connections, numbers.downstream_connections_total) == (3, 27)
    assert sum(numbers.none["default"].exchanges) == 2
    assert numbers.guarded == {"default": True}
    assert {process: sum(lag.counts) for process, lag in numbers.event_loop_lag.items()} == {
        "supervisor": 1,
        "worker": 2,
    }
    assert numbers.access_log_dropped == 0
    assert numbers.handed_over == {"connections": 0, "tunnels": 3}
    assert (numbers.name_lookups, numbers.certificate_reloads, numbers.certificates) == ({}, {}, {})


async def test_the_numbers_of_connections_names_and_certificates_are_gathered(proxy: Proxy) -> None:
    plane = proxy.links[1].table.plane
    plane.cells[HANDSHAKES["tls_failed"]] = 3
    plane.cells[ACCEPT_PAUSES] = 2
    plane.cells[ACCESS_LOG_DROPPED] = 4
    plane.cells[IS_ACCEPTING] = 1
    proxy.readings.is_ready = True
    proxy.resolver.lookups["changed"] = 4
    proxy.certificates.facts = {0: (CertificateFacts(Path("/a.pem"), ("example.org",), 0.0, 99.0),)}
    proxy.certificates.reloads["ok"] = 5
    numbers = proxy.readings.take_numbers()
    assert (numbers.handshakes, numbers.accept_pauses, numbers.is_accepting) == ({"tls_failed": 3}, 2, True)
    assert numbers.access_log_dropped == 4
    assert (numbers.name_lookups, numbers.certificate_reloads) == ({"changed": 4}, {"ok": 5})
    assert numbers.certificates == {("127.0.0.1:8443", "/a.pem"): 99.0}
    plane.cells[IS_ACCEPTING] = 0  # and the other worker never did
    assert not proxy.readings.take_numbers().is_accepting


async def test_the_numbers_of_workers_and_reloads_are_gathered(proxy: Proxy) -> None:
    proxy.fleet.restarts = 6
    proxy.reloader.outcomes["failed"] = 2
    proxy.reloader.succeeded_at = 1234.5
    proxy.links[1].table.plane.cells[TICKED_AT] = time.monotonic_ns() - 10_000_000_000
    numbers = proxy.readings.take_numbers()
    assert (numbers.workers, numbers.worker_restarts) == (2, 6)
    assert (numbers.reloads, numbers.reloaded_at) == ({"failed": 2}, 1234.5)
    [(worker, ago_s)] = numbers.ticks.items()  # the other has not ticked yet
    assert worker == "1"
    assert 10 <= ago_s < 10 + DEADLINE_S


async def test_what_a_worker_had_counted_outlives_it(proxy: Proxy) -> None:
    for worker in range(2):
        counters = proxy.counters("app-1", worker)
        counters.count_exchange(b"GET", 200)
        counters.cells[TUNNELS_OPEN] = 1
        proxy.links[worker].table.plane.cells[DOWNSTREAMS] = 1
        proxy.begin_sessions("app-1", 1, worker)
    assert proxy.numbers().sessions == 2
    proxy.end(0)
    found = proxy.numbers()
    assert (sum(found.counters.exchanges), found.counters.tunnels_open) == (2, 1)
    assert proxy.readings.take_numbers().downstream_connections == 1
    assert proxy.numbers().sessions == 1


def change_all(counters: UpstreamCounters | ProbeCounters) -> None:
    """Change all that is counted."""
    if isinstance(counters, UpstreamCounters):
        for at in range(DIGEST + 1, UPSTREAM.size):
            counters.cells[at] += 1
    else:
        counters.duration.observe(1.0)
        counters.outcomes["passed"] += 1


def facts(counters: UpstreamCounters | ProbeCounters) -> object:
    if isinstance(counters, UpstreamCounters):
        return counters.cells[DIGEST + 1 :].tolist()
    return list(counters.duration.counts), counters.duration.total_s, dict(counters.outcomes)


async def test_the_numbers_do_not_change_afterwards(proxy: Proxy) -> None:
    probes = proxy.prober.counters["app-1"] = ProbeCounters()
    counters = proxy.counters("app-1")
    change_all(counters)
    change_all(probes)
    taken = proxy.numbers()
    before = facts(taken.counters), facts(taken.probes)
    assert before == (facts(counters), facts(probes))
    change_all(counters)
    change_all(probes)
    assert (facts(taken.counters), facts(taken.probes)) == before
    after = proxy.numbers()
    assert facts(after.counters) == facts(counters) != before[0]
    assert facts(after.probes) == facts(probes) != before[1]


async def test_what_was_counted_for_an_upstream_that_was_removed_is_there(proxy: Proxy) -> None:
    probes = proxy.prober.counters["app-2"] = ProbeCounters()
    for counters in (proxy.counters("app-2", 0), proxy.counters("app-2", 1), probes):
        change_all(counters)
    expected = proxy.numbers("app-2")
    upstreams = proxy.config.upstreams
    proxy.routing.reload(proxy.config.model_copy(update={"upstreams": upstreams[:1]}), {})
    proxy.routing.drop(["app-2"])
    now = asyncio.get_running_loop().time()
    proxy.fleet.removed.note({"app-1": "default", "app-2": "default"}, ["app-1"], now)
    taken = proxy.readings.take_numbers()
    [removed] = taken.removed
    assert [one.id for one in taken.upstreams] == ["app-1"]
    assert removed.labels == ("default", "app-2")
    assert (facts(removed.counters), facts(removed.probes)) == (facts(expected.counters), facts(expected.probes))
    proxy.routing.reload(proxy.config, {})  # it is back, before the workers know of it
    assert [one.id for one in proxy.readings.take_numbers().upstreams] == ["app-1", "app-2"]
    assert proxy.readings.take_numbers().removed == ()


# The lag of the loop


async def test_the_lag_is_measured_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings_module, "_LAG_PERIOD_S", 0.001)
    lag = LoopLag()
    lag.stop()
    lag.start()
    async with asyncio.timeout(DEADLINE_S):
        while sum(lag.histogram.counts) < 3:  # noqa: ASYNC110 -- a histogram tells nobody
            await asyncio.sleep(0)
    assert lag.histogram.total_s >= 0
    lag.stop()
    seen = sum(lag.histogram.counts)
    await asyncio.sleep(0.02)
    assert sum(lag.histogram.counts) == seen


@pytest.fixture
def frozen_loop(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for a loop whose clock the test moves; its timers fire by hand."""
    loop = SimpleNamespace(now=0.0, timers=[])
    loop.time = lambda: loop.now
    loop.call_at = lambda due, call, *given: loop.timers.append((due, call, given))
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


@pytest.mark.parametrize(("fires_at", "lag_s"), [(100.75, 0.25), (100.5, 0.0), (100.499, 0.0)])
def test_the_lag_is_how_late_a_timer_fires(frozen_loop: SimpleNamespace, fires_at: float, lag_s: float) -> None:
    frozen_loop.now = 100.0
    lag = LoopLag()
    lag.start()
    [(due, call, given)] = frozen_loop.timers
    assert due == 100.5
    frozen_loop.now = fires_at
    call(*given)
    assert lag.histogram.total_s == pytest.approx(lag_s)
    assert len(frozen_loop.timers) == 2


async def test_the_keys_that_are_remembered_are_counted_when_it_is_asked_for(proxy: Proxy) -> None:
    numbers = proxy.readings.take_numbers()
    assert numbers.count_keys() == 0
    for name in (b"1", b"2"):
        proxy.fleet.keys.learn(name, b"12345678", 100.0, time.monotonic())
    assert numbers.count_keys() == 2
