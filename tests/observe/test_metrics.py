"""The names, labels and values of the metrics, in both text formats."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from stickyproxy.affinity.snapshot import AdminState, Health
from stickyproxy.observe.counters import (
    DURATION_BOUNDS_S,
    IN_FLIGHT,
    LAG_BOUNDS_S,
    NS,
    RECEIVED_BYTES,
    SENT_BYTES,
    TUNNEL_BOUNDS_S,
    TUNNEL_RECEIVED_BYTES,
    TUNNEL_SENT_BYTES,
    TUNNELS,
    TUNNELS_OPEN,
    Histogram,
    ProbeCounters,
    UpstreamCounters,
)
from stickyproxy.observe.metrics import Numbers, UpstreamCounts, UpstreamNumbers, write_metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def make_upstream(
    upstream_id: str = "app-1",
    *,
    cluster: str = "default",
    health: Health = Health.HEALTHY,
    admin: AdminState = AdminState.READY,
    count: Callable[[UpstreamCounters], None] = lambda _: None,
) -> UpstreamNumbers:
    counters = UpstreamCounters()
    count(counters)
    return UpstreamNumbers(
        cluster=cluster,
        id=upstream_id,
        health=health,
        admin=admin,
        is_refused=False,
        sessions=0,
        idle_connections=0,
        counters=counters,
        probes=ProbeCounters(),
    )


def make_numbers(*upstreams: UpstreamNumbers, none: UpstreamCounters | None = None) -> Numbers:
    return Numbers(
        version="1.2.3",
        upstreams=upstreams,
        none={"default": none or UpstreamCounters()},
        guarded={"default": False},
        affinity={"hit": 0},
        breaks={},
        downstream_connections=0,
        downstream_connections_total=0,
        access_log_dropped=0,
        event_loop_lag={"worker": Histogram(LAG_BOUNDS_S)},
        handshakes={},
        is_accepting=True,
        accept_pauses=0,
        name_lookups={},
        certificate_reloads={},
        certificates={},
    )


def read(numbers: Numbers, accept: str = "") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the value of each series of our own; fail where one is there twice."""
    text, content_type = write_metrics(numbers, accept)
    parse: Callable[[str], Iterable[Metric]] = parse_openmetrics if "openmetrics" in content_type else parse_text
    series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in parse(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in series
            series[key] = sample.value
    return series


class Exposed:
    """The series of both formats: call it for the value of the one with exactly these labels; None without one."""

    def __init__(self, numbers: Numbers) -> None:
        self._text = read(numbers)
        self._openmetrics = read(numbers, OPENMETRICS)

    def __call__(self, name: str, **labels: str) -> float | None:
        key = (f"stickyproxy_{name}", frozenset(labels.items()))
        found = self._text.get(key)
        assert self._openmetrics.get(key) == found
        return found


APP_1 = {"cluster": "default", "upstream": "app-1"}


def count_exchanges(counters: UpstreamCounters) -> None:
    counters.count_exchange(b"GET", 200)
    counters.count_exchange(b"GET", 204)
    counters.count_exchange(b"BREW", 418)
    for outcome in ("ok", "ok", "ok", "refused"):
        counters.count_attempt(outcome)
    counters.cells[RECEIVED_BYTES] = 10
    counters.cells[SENT_BYTES] = 20
    counters.cells[IN_FLIGHT] = 2


def test_exchanges_are_counted_by_method_and_status_class() -> None:
    numbers = make_numbers(make_upstream(count=count_exchanges))
    value = Exposed(numbers)
    assert value("exchanges_total", **APP_1, method="GET", status_class="2xx") == 2
    assert value("exchanges_total", **APP_1, method="other", status_class="4xx") == 1
    assert value("exchanges_total", **APP_1, method="POST", status_class="2xx") is None
    assert value("attempts_total", **APP_1, outcome="ok") == 3
    assert value("attempts_total", **APP_1, outcome="refused") == 1
    assert value("relayed_bytes_total", **APP_1, direction="received") == 10
    assert value("relayed_bytes_total", **APP_1, direction="sent") == 20
    assert value("exchanges_in_flight", **APP_1) == 2


def test_exchanges_that_reached_no_upstream_have_an_empty_one() -> None:
    none = UpstreamCounters()
    none.count_exchange(b"GET", 503)
    none.observe_duration(NS // 2)
    numbers = make_numbers(make_upstream(), none=none)
    nowhere = {"cluster": "default", "upstream": ""}
    value = Exposed(numbers)
    assert value("exchanges_total", **nowhere, method="GET", status_class="5xx") == 1
    assert value("exchange_duration_seconds_count", **nowhere) == 1
    assert value("tunnels_total", **nowhere) is None


@pytest.mark.parametrize(
    ("name", "observe", "bounds"),
    [
        ("exchange_duration_seconds", UpstreamCounters.observe_duration, DURATION_BOUNDS_S),
        ("upstream_response_seconds", UpstreamCounters.observe_response, DURATION_BOUNDS_S),
        ("tunnel_duration_seconds", UpstreamCounters.observe_tunnel, TUNNEL_BOUNDS_S),
    ],
)
def test_the_buckets_of_a_histogram_add_up(
    name: str, observe: Callable[[UpstreamCounters, int], None], bounds: tuple[float, ...]
) -> None:
    def count(counters: UpstreamCounters) -> None:
        for bound in (*bounds, bounds[-1] + 1):  # a bucket holds its own bound
            observe(counters, round(bound * NS))

    value = Exposed(make_numbers(make_upstream(count=count)))
    for position, bound in enumerate(bounds):
        assert value(f"{name}_bucket", **APP_1, le=str(bound)) == position + 1
    assert value(f"{name}_bucket", **APP_1, le="+Inf") == len(bounds) + 1
    assert value(f"{name}_count", **APP_1) == len(bounds) + 1
    assert value(f"{name}_sum", **APP_1) == pytest.approx(sum(bounds) + bounds[-1] + 1)


def test_affinity_and_breaks_are_by_outcome_and_reason() -> None:
    numbers = replace(make_numbers(), affinity={"hit": 7, "new": 2}, breaks={"refused": 1})
    value = Exposed(numbers)
    assert value("affinity_total", outcome="hit") == 7
    assert value("affinity_total", outcome="new") == 2
    assert value("affinity_breaks_total", reason="refused") == 1


def test_keys_are_counted_from_zero_and_those_that_are_remembered_are_looked_up() -> None:
    value = Exposed(make_numbers())
    names = ("keys_learned_total", "keys_evicted_total", "key_conflicts_total", "keys")
    assert [value(name) for name in names] == [0, 0, 0, 0]
    value = Exposed(replace(make_numbers(), keys_learned=5, keys_evicted=2, key_conflicts=1, count_keys=lambda: 3))
    assert [value(name) for name in names] == [5, 2, 1, 3]


def count_tunnels(counters: UpstreamCounters) -> None:
    counters.cells[TUNNELS] = 5
    counters.cells[TUNNELS_OPEN] = 2
    counters.cells[TUNNEL_RECEIVED_BYTES] = 100
    counters.cells[TUNNEL_SENT_BYTES] = 200
    counters.frames_received[1] = 4
    counters.frames_sent[2] = 6
    counters.frames_sent[3] = counters.frames_sent[11] = 1
    for code in (1001, 4000, 4999):
        counters.count_close("client", code, "close_frame")


def test_tunnels_are_counted_with_their_bytes() -> None:
    numbers = make_numbers(make_upstream(count=count_tunnels))
    value = Exposed(numbers)
    assert value("tunnels_open", **APP_1) == 2
    assert value("tunnels_total", **APP_1) == 5
    assert value("tunnel_bytes_total", **APP_1, direction="received") == 100
    assert value("tunnel_bytes_total", **APP_1, direction="sent") == 200


def test_frames_are_counted_by_opcode_and_reserved_ones_together() -> None:
    numbers = make_numbers(make_upstream(count=count_tunnels))
    value = Exposed(numbers)
    assert value("tunnel_frames_total", **APP_1, direction="received", opcode="text") == 4
    assert value("tunnel_frames_total", **APP_1, direction="received", opcode="binary") is None
    assert value("tunnel_frames_total", **APP_1, direction="sent", opcode="binary") == 6
    assert value("tunnel_frames_total", **APP_1, direction="sent", opcode="other") == 2


def test_close_codes_with_one_label_are_added() -> None:
    numbers = make_numbers(make_upstream(count=count_tunnels))
    by_client = {**APP_1, "initiator": "client", "cause": "close_frame"}
    value = Exposed(numbers)
    assert value("tunnel_closes_total", **by_client, code="1001") == 1
    assert value("tunnel_closes_total", **by_client, code="4xxx") == 2


def test_health_and_admin_state_are_one_for_what_is_and_zero_for_the_rest() -> None:
    numbers = make_numbers(make_upstream(health=Health.UNHEALTHY, admin=AdminState.MAINT))
    value = Exposed(numbers)
    assert value("upstream_health", **APP_1, health="unhealthy") == 1
    assert value("upstream_health", **APP_1, health="healthy") == 0
    assert value("upstream_health", **APP_1, health="unknown") == 0
    assert value("upstream_admin_state", **APP_1, admin_state="maint") == 1
    assert value("upstream_admin_state", **APP_1, admin_state="ready") == 0
    assert value("upstream_admin_state", **APP_1, admin_state="drain") == 0


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_refusing_upstream_and_a_guarded_cluster_are_said(is_refused: bool) -> None:  # noqa: FBT001
    numbers = replace(make_numbers(replace(make_upstream(), is_refused=is_refused)), guarded={"default": is_refused})
    value = Exposed(numbers)
    assert value("upstream_refused", **APP_1) == is_refused
    assert value("upstream_guarded", cluster="default") == is_refused


def test_connections_to_an_upstream_are_idle_or_busy() -> None:
    def count(counters: UpstreamCounters) -> None:
        counters.cells[IN_FLIGHT] = 3
        counters.cells[TUNNELS_OPEN] = 4

    numbers = make_numbers(replace(make_upstream(count=count), idle_connections=5))
    value = Exposed(numbers)
    assert value("upstream_connections", **APP_1, state="idle") == 5
    assert value("upstream_connections", **APP_1, state="busy") == 7


def test_sessions_that_remain_are_told_of_upstreams_in_drain_only() -> None:
    numbers = make_numbers(
        replace(make_upstream(), sessions=1), replace(make_upstream("app-2", admin=AdminState.DRAIN), sessions=2)
    )
    value = Exposed(numbers)
    assert value("sessions_active", **APP_1) == 1
    assert value("sessions_active", cluster="default", upstream="app-2") == 2
    assert value("drain_sessions_remaining", **APP_1) is None
    assert value("drain_sessions_remaining", cluster="default", upstream="app-2") == 2


def test_probes_are_counted_by_outcome_from_zero() -> None:
    upstream = make_upstream()
    upstream.probes.outcomes["passed"] += 2
    upstream.probes.duration.observe(0.004)
    numbers = make_numbers(upstream)
    value = Exposed(numbers)
    assert value("probes_total", **APP_1, outcome="passed") == 2
    for outcome in ("failed", "refused", "timeout"):
        assert value("probes_total", **APP_1, outcome=outcome) == 0
    assert value("probe_duration_seconds_count", **APP_1) == 1
    assert value("probe_duration_seconds_bucket", **APP_1, le="0.005") == 1


def test_of_an_upstream_that_was_removed_only_what_was_counted_is_shown() -> None:
    def count(counters: UpstreamCounters) -> None:
        count_exchanges(counters)
        count_tunnels(counters)

    present = make_upstream("app-2", count=count)
    gone = UpstreamCounts("default", "app-1", make_upstream(count=count).counters, ProbeCounters())
    names: dict[str, set[str]] = {"app-1": set(), "app-2": set()}
    kinds = {}
    for family in parse_text(write_metrics(replace(make_numbers(present), removed=(gone,)), "")[0].decode()):
        for sample in family.samples:
            names.get(sample.labels.get("upstream", ""), set()).add(family.name)
            kinds[family.name] = family.type
    assert names["app-1"] == {name for name in names["app-2"] if kinds[name] != "gauge"}
    assert {"stickyproxy_exchanges", "stickyproxy_tunnels", "stickyproxy_probes"} <= names["app-1"]
    value = Exposed(replace(make_numbers(present), removed=(gone,)))
    assert value("exchanges_total", **APP_1, method="GET", status_class="2xx") == 2
    assert value("tunnels_total", **APP_1) == 5


def test_numbers_of_the_proxy_itself() -> None:
    numbers = replace(make_numbers(), downstream_connections=3, downstream_connections_total=9, access_log_dropped=4)
    numbers = replace(
        numbers, event_loop_lag={"worker": Histogram(LAG_BOUNDS_S), "supervisor": Histogram(LAG_BOUNDS_S)}
    )
    numbers.event_loop_lag["worker"].observe(0.02)
    value = Exposed(numbers)
    assert value("downstream_connections") == 3
    assert value("downstream_connections_accepted_total") == 9
    assert value("access_log_dropped_total") == 4
    assert value("event_loop_lag_seconds_bucket", process="worker", le="0.01") == 0
    assert value("event_loop_lag_seconds_bucket", process="worker", le="0.025") == 1
    assert value("event_loop_lag_seconds_sum", process="worker") == pytest.approx(0.02)
    assert value("event_loop_lag_seconds_count", process="supervisor") == 0


def test_workers_and_how_long_ago_they_ticked_are_told() -> None:
    numbers = replace(make_numbers(), workers=2, worker_restarts=3, ticks={"0": 0.125, "1": 7.5})
    value = Exposed(replace(numbers, connections_open={"0": 5, "1": 0}))
    assert (value("workers"), value("worker_restarts_total")) == (2, 3)
    assert value("worker_last_tick_age_seconds", worker="0") == 0.125
    assert value("worker_last_tick_age_seconds", worker="1") == 7.5
    assert [value("worker_connections", worker=one) for one in "01"] == [5, 0]
    assert Exposed(make_numbers())("worker_last_tick_age_seconds", worker="0") is None


def test_reloads_upgrades_and_what_was_handed_over_are_told_from_zero() -> None:
    numbers = replace(make_numbers(), reloads={"failed": 2}, reloaded_at=1.5e9, upgrades={"ok": 4})
    value = Exposed(replace(numbers, handed_over={"tunnels": 5}))
    assert value("config_last_reload_success_timestamp_seconds") == 1.5e9
    for name, label, expected in (
        ("reloads_total", "outcome", {"ok": 0, "failed": 2, "unchanged": 0}),
        ("upgrades_total", "outcome", {"ok": 4, "failed": 0}),
        ("handed_over_total", "kind", {"connections": 0, "tunnels": 5}),
    ):
        assert {key: value(name, **{label: key}) for key in expected} == expected
    assert Exposed(make_numbers())("config_last_reload_success_timestamp_seconds") is None


def test_what_comes_before_a_first_request_is_counted_from_zero() -> None:
    value = Exposed(replace(make_numbers(), handshakes={"tls_failed": 3}))
    assert value("handshakes_total", outcome="tls_failed") == 3
    assert value("handshakes_total", outcome="tls_completed") == 0
    assert value("handshakes_total", outcome="proxy_protocol_refused") == 0


@pytest.mark.parametrize("is_accepting", [True, False])
def test_whether_clients_are_accepted_is_told(is_accepting: bool) -> None:  # noqa: FBT001
    value = Exposed(replace(make_numbers(), is_accepting=is_accepting, accept_pauses=4))
    assert value("accepting") == is_accepting
    assert value("accept_pauses_total", reason="connections") == 4


def test_certificates_and_names_are_told() -> None:
    certificates = {("127.0.0.1:443", "/a.pem"): 1e9, ("127.0.0.1:443", "/b.pem"): 2e9}
    value = Exposed(
        replace(
            make_numbers(),
            certificates=certificates,
            certificate_reloads={"ok": 1, "failed": 2},
            name_lookups={"changed": 3},
        )
    )
    for (listener, path), not_after in certificates.items():
        name = "certificate_not_after_timestamp_seconds"
        assert value(name, listener=listener, certificate=path) == not_after
    assert value("certificate_reloads_total", outcome="failed") == 2
    assert value("name_lookups_total", outcome="changed") == 3


def test_the_build_and_the_process_are_described() -> None:
    text, _ = write_metrics(make_numbers(), "")
    assert b'stickyproxy_build_info{python="3.' in text
    assert b'version="1.2.3"} 1.0' in text
    assert b"\npython_info{" in text
    assert b"\nprocess_open_fds " in text


def test_clusters_and_awkward_ids_stay_apart() -> None:
    numbers = make_numbers(make_upstream('/run/a"b\\.sock'), make_upstream("app-1", cluster="other"), make_upstream())
    value = Exposed(numbers)
    assert value("tunnels_total", cluster="default", upstream='/run/a"b\\.sock') == 0
    assert value("tunnels_total", cluster="other", upstream="app-1") == 0


def test_every_name_has_a_help_text_and_the_prefix_and_counters_end_in_total() -> None:
    text, _ = write_metrics(make_numbers(make_upstream(count=count_tunnels)), "")
    for family in parse_text(text.decode()):
        assert family.documentation
        if family.name.startswith(("process_", "python_")):
            continue
        assert family.name.startswith("stickyproxy_")
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/html, " + OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text; version=none", "text/plain; version=0.0.4"),
    ],
)
def test_the_format_follows_the_accept_header(accept: str, content_type: str) -> None:
    text, answered = write_metrics(make_numbers(), accept)
    assert answered.startswith(content_type)
    assert text.endswith(b"# EOF\n") == ("openmetrics" in content_type)


def test_the_global_registry_is_left_alone() -> None:
    write_metrics(make_numbers(make_upstream()), "")
    assert not any(family.name.startswith("stickyproxy") for family in REGISTRY.collect())
