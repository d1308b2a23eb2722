"""What the admin listener reads: copies of the numbers, the state as JSON, and why a proxy is not ready."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
from typing_extensions import override

from stickyproxy import __version__, config
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.snapshot import AdminState, Health, upstream_digest
from stickyproxy.config import Address
from stickyproxy.control import readings as readings_module
from stickyproxy.control.certificates import CertificateFacts
from stickyproxy.control.probe import Prober
from stickyproxy.control.readings import LoopLag, Readings
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker import Worker, make_sessions, make_settings
from stickyproxy.observe.access_log import AccessLog
from stickyproxy.observe.counters import Histogram, ProbeCounters, UpstreamCounters
from stickyproxy.observe.metrics import UpstreamNumbers
from stickyproxy.proxy.plane import Plane

DEADLINE_S = 30


class Stub(SimpleNamespace):
    """Any object, as a member of a set."""

    @override
    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class Proxy:
    """The parts of a proxy that listens nowhere, with two upstreams that nobody probes."""

    def __init__(self, access_log: AccessLog | None = None) -> None:
        upstreams = [
            {"id": "app-1", "url": "http://127.0.0.1:8001", "weight": 3},
            {"id": "app-2", "url": "unix:/run/app.sock"},
        ]
        settings = config.Config.model_validate({"upstreams": upstreams})
        self.plane = Plane(
            make_settings(settings), make_sessions(settings, [b"x" * 32]), report=lambda *_: None, random=lambda: 0.0
        )
        self.routing = Routing(settings, self.plane.publish)
        self.prober = Prober(settings.health, self.routing)
        self.readings = Readings(cast("Worker", Stub(plane=self.plane)), self.routing, self.prober, access_log)

    def counters(self, upstream_id: str = "app-1") -> UpstreamCounters:
        return self.plane.pools[upstream_digest(upstream_id)].counters

    def numbers(self, upstream_id: str = "app-1") -> UpstreamNumbers:
        [found] = [one for one in self.readings.take_numbers().upstreams if one.id == upstream_id]
        return found

    def refuse(self, *upstream_ids: str) -> None:
        for upstream_id in upstream_ids:
            self.routing.report(upstream_id, HealthEvent.REFUSED)


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[Proxy]:
    made = Proxy()
    yield made
    made.plane.close()


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


async def test_the_state_names_every_upstream(proxy: Proxy) -> None:
    proxy.readings.is_ready = True
    proxy.counters().tunnels_open = 4
    proxy.counters().in_flight = 5
    proxy.plane.sessions.counts[upstream_digest("app-1")] = 6
    proxy.refuse("app-2")
    state = json.loads(json.dumps(proxy.readings.describe()))
    assert state.pop("uptime_s") >= 0
    assert state == {
        "version": __version__,
        "is_ready": True,
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


async def test_a_guarded_cluster_says_so(proxy: Proxy) -> None:
    proxy.refuse("app-1", "app-2")
    [cluster] = cast("list[dict[str, Any]]", proxy.readings.describe()["clusters"])
    assert cluster["is_guarded"] is True


# The numbers


async def test_the_numbers_of_an_upstream_are_gathered(proxy: Proxy) -> None:
    proxy.prober.counters["app-1"] = ProbeCounters()
    proxy.prober.counters["app-1"].outcomes["passed"] = 2
    proxy.plane.sessions.counts[upstream_digest("app-1")] = 3
    proxy.plane.pools[upstream_digest("app-1")].idle.append(cast("Any", SimpleNamespace(close=lambda: None)))
    proxy.routing.set_admin_state("app-1", AdminState.DRAIN)
    proxy.refuse("app-2")
    found = proxy.numbers()
    assert (found.labels, found.health, found.admin) == (("default", "app-1"), Health.UNKNOWN, AdminState.DRAIN)
    assert (found.sessions, found.idle_connections, found.probes.outcomes["passed"]) == (3, 1, 2)
    assert not found.is_refused
    assert proxy.numbers("app-2").is_refused
    assert proxy.numbers("app-2").probes.outcomes["passed"] == 0  # not probed yet


async def test_the_numbers_of_the_plane_are_gathered(proxy: Proxy) -> None:
    counters = proxy.plane.counters
    counters.hits = 7
    counters.affinity["new"] = 1
    counters.breaks["refused"] = 2
    counters.connections = 9
    counters.none.count_exchange(b"GET", 503)
    proxy.plane.downstreams.add(cast("Any", Stub(abort=lambda: None)))
    proxy.refuse("app-1", "app-2")
    proxy.readings.loop_lag.histogram.observe(0.1)
    numbers = proxy.readings.take_numbers()
    assert numbers.version == __version__
    assert numbers.affinity == {"hit": 7, "new": 1}
    assert numbers.breaks == {"refused": 2}
    assert (numbers.downstream_connections, numbers.downstream_connections_total) == (1, 9)
    assert sum(numbers.none["default"].exchanges) == 1
    assert numbers.guarded == {"default": True}
    assert sum(numbers.event_loop_lag.counts) == 1
    assert numbers.access_log_dropped == 0
    assert (numbers.name_lookups, numbers.certificate_reloads, numbers.certificates) == ({}, {}, {})


async def test_the_numbers_of_connections_names_and_certificates_are_gathered(proxy: Proxy) -> None:
    proxy.plane.counters.handshakes["tls_failed"] = 3
    proxy.plane.gate.pauses = 2
    proxy.readings.is_ready = True
    proxy.readings._resolver = cast("Any", SimpleNamespace(lookups={"changed": 4}))
    facts = {0: (CertificateFacts(Path("/a.pem"), ("example.org",), 0.0, 99.0),), 7: ()}
    proxy.readings._certificates = cast("Any", SimpleNamespace(reloads={"ok": 5}, facts=facts))
    proxy.readings._worker.listeners = [cast("Any", SimpleNamespace(address=Address("127.0.0.1", 8443)))]
    numbers = proxy.readings.take_numbers()
    assert (numbers.handshakes, numbers.accept_pauses, numbers.is_accepting) == ({"tls_failed": 3}, 2, True)
    assert (numbers.name_lookups, numbers.certificate_reloads) == ({"changed": 4}, {"ok": 5})
    assert numbers.certificates == {("127.0.0.1:8443", "/a.pem"): 99.0}
    proxy.plane.gate.is_open = False
    assert not proxy.readings.take_numbers().is_accepting


async def test_dropped_lines_of_the_access_log_are_among_them() -> None:
    proxy = Proxy(cast("AccessLog", SimpleNamespace(dropped=4)))
    assert proxy.readings.take_numbers().access_log_dropped == 4
    proxy.plane.close()


def make_tunnel(upstream_id: str, received_bytes: int, sent_bytes: int) -> Any:
    client, upstream = Stub(received_bytes=received_bytes), Stub(received_bytes=sent_bytes)
    return Stub(upstream_id=upstream_id, client=client, upstream=upstream, abort=lambda: None)


async def test_the_bytes_of_open_tunnels_are_added_up_by_upstream(proxy: Proxy) -> None:
    for upstream_id, received, sent in (("app-1", 1, 10), ("app-1", 2, 20), ("app-2", 4, 40)):
        proxy.plane.tunnels.add(make_tunnel(upstream_id, received, sent))
    assert (proxy.numbers().open_received_bytes, proxy.numbers().open_sent_bytes) == (3, 30)
    assert (proxy.numbers("app-2").open_received_bytes, proxy.numbers("app-2").open_sent_bytes) == (4, 40)


def change_all(counters: UpstreamCounters | ProbeCounters) -> None:
    """Change every attribute in place."""
    for name in counters.__slots__:
        value = getattr(counters, name)
        match value:
            case int():
                setattr(counters, name, value + 1)
            case list():
                value[0] += 1
            case Histogram():
                value.observe(1.0)
            case _:
                value["changed"] += 1


def facts(counters: UpstreamCounters | ProbeCounters) -> dict[str, object]:
    return {
        name: (value.bounds, list(value.counts), value.total_s) if isinstance(value, Histogram) else repr(value)
        for name in counters.__slots__
        for value in [getattr(counters, name)]
    }


async def test_the_numbers_do_not_change_afterwards(proxy: Proxy) -> None:
    probes = proxy.prober.counters["app-1"] = ProbeCounters()
    change_all(proxy.counters())
    change_all(probes)
    taken = proxy.numbers()
    before = facts(taken.counters), facts(taken.probes)
    assert before == (facts(proxy.counters()), facts(probes))
    change_all(proxy.counters())
    change_all(probes)
    assert (facts(taken.counters), facts(taken.probes)) == before
    after = facts(proxy.counters())
    assert all(after[name] != before[0][name] for name in after)


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
