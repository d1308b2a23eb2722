"""Counting: which cell a duration, an exchange or the end of a tunnel goes to, and that nothing is without a place."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stickyproxy
from stickyproxy.affinity.choose import BreakReason, Outcome
from stickyproxy.observe.counters import (
    ACCEPT_PAUSES,
    ACCESS_LOG_DROPPED,
    AFFINITY,
    ATTEMPTS,
    BREAKS,
    CAUSES,
    CLOSE,
    CONNECTIONS,
    DOWNSTREAMS,
    DURATION_BOUNDS_S,
    HANDED,
    HANDSHAKES,
    HITS,
    IDLE_CONNECTIONS,
    IN_FLIGHT,
    INITIATORS,
    IS_ACCEPTING,
    KEY_CONFLICTS,
    KEYS_EVICTED,
    KEYS_LEARNED,
    LAG_BOUNDS_S,
    METHOD_NAMES,
    NS,
    OTHER,
    PLACED,
    PLANE,
    PLANE_CELLS,
    RECEIVED_BYTES,
    SENT_BYTES,
    STATUS_CLASSES,
    STRANGERS,
    TICKED_AT,
    TUNNEL_BOUNDS_S,
    TUNNEL_RECEIVED_BYTES,
    TUNNEL_SENT_BYTES,
    TUNNELS,
    TUNNELS_OPEN,
    UPSTREAM,
    Histogram,
    Layout,
    PlaneCounters,
    ProbeCounters,
    UpstreamCounters,
    make_cells,
    name_close_code,
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
    assert sum(counters.exchanges) == sum(counters.cells) == 1


@pytest.mark.parametrize(
    ("observe", "read", "bounds"),
    [
        (UpstreamCounters.observe_duration, lambda one: one.duration, DURATION_BOUNDS_S),
        (UpstreamCounters.observe_response, lambda one: one.response, DURATION_BOUNDS_S),
        (UpstreamCounters.observe_tunnel, lambda one: one.tunnel_duration, TUNNEL_BOUNDS_S),
    ],
    ids=["duration", "response", "tunnel"],
)
def test_durations_of_an_upstream_are_nanoseconds(
    observe: Callable[[UpstreamCounters, int], None],
    read: Callable[[UpstreamCounters], Histogram],
    bounds: tuple[float, ...],
) -> None:
    counters = UpstreamCounters()
    for at, bound in enumerate(bounds):
        for _ in range(at + 1):
            observe(counters, round(bound * NS))
        observe(counters, round(bound * NS) + 1)  # belongs to the next one
    histogram = read(counters)
    assert histogram.counts == [1, *(at + 2 for at in range(1, len(bounds))), 1]
    assert histogram.total_s == pytest.approx(sum(bound * (at + 2) for at, bound in enumerate(bounds)))
    assert sum(1 for cell in counters.cells if cell) == len(bounds) + 2, "nothing else was counted"


def test_the_lag_is_counted_in_seconds() -> None:
    counters = PlaneCounters()
    for lag_s in (0.0, 0.02, 99.0):
        counters.observe_lag(lag_s)
    assert counters.lag.bounds == LAG_BOUNDS_S
    assert (counters.lag.counts[0], counters.lag.counts[LAG_BOUNDS_S.index(0.025)], counters.lag.counts[-1]) == (
        1,
        1,
        1,
    )
    assert counters.lag.total_s == pytest.approx(99.02)


@pytest.mark.parametrize("outcome", ATTEMPTS)
def test_an_attempt_is_counted_by_its_outcome(outcome: str) -> None:
    counters = UpstreamCounters()
    counters.count_attempt(outcome)
    assert counters.attempts == {outcome: 1}
    assert sum(counters.cells) == 1


def test_what_is_in_no_set_is_counted_as_other() -> None:
    counters = UpstreamCounters()
    counters.count_attempt("surprising")
    counters.count_close("client", 1000, "surprising")
    assert counters.attempts == {OTHER: 1}
    assert counters.closes == {("client", "1000", OTHER): 1}


def test_the_end_of_a_tunnel_is_counted_by_initiator_code_and_cause() -> None:
    counters = UpstreamCounters()
    for initiator in INITIATORS:
        for code in (*range(1000, 1016), 3999, 4000, 0):
            for cause in CAUSES:
                counters.count_close(initiator, code, cause)
    assert counters.closes == dict.fromkeys(CLOSE, 1)
    assert sum(counters.cells) == len(CLOSE) == 3 * 19 * len(CAUSES)


def test_close_codes_are_a_closed_set_of_labels() -> None:
    registered = [str(code) for code in range(1000, 1016)]
    assert {name_close_code(code) for code in range(65536)} == {*registered, "3xxx", "4xxx", "other"}
    assert name_close_code(2999) == name_close_code(5000) == name_close_code(-1) == "other"


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (IN_FLIGHT, "in_flight"),
        (TUNNELS_OPEN, "tunnels_open"),
        (IDLE_CONNECTIONS, "idle_connections"),
        (STRANGERS, "strangers"),
        (PLACED, "placed"),
        (RECEIVED_BYTES, "received_bytes"),
        (SENT_BYTES, "sent_bytes"),
        (TUNNELS, "tunnels"),
        (TUNNEL_RECEIVED_BYTES, "tunnel_received_bytes"),
        (TUNNEL_SENT_BYTES, "tunnel_sent_bytes"),
    ],
)
def test_a_cell_of_an_upstream_is_read_by_its_name(cell: int, name: str) -> None:
    counters = UpstreamCounters()
    counters.cells[cell] += 7
    assert getattr(counters, name) == 7
    [field] = [field for field in UPSTREAM.fields if field.at == cell]
    assert (field.name, field.axes) == (name, ())


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (TICKED_AT, "ticked_at_ns"),
        (DOWNSTREAMS, "downstreams"),
        (IS_ACCEPTING, "is_accepting"),
        (CONNECTIONS, "connections"),
        (ACCEPT_PAUSES, "accept_pauses"),
        (ACCESS_LOG_DROPPED, "access_log_dropped"),
        (HITS, "hits"),
        (KEY_CONFLICTS, "key_conflicts"),
        (KEYS_LEARNED, "keys_learned"),
        (KEYS_EVICTED, "keys_evicted"),
    ],
)
def test_a_cell_of_the_plane_is_read_by_its_name(cell: int, name: str) -> None:
    counters = PlaneCounters()
    counters.cells[cell] += 7
    assert getattr(counters, name) == 7


def test_what_the_plane_counts_by_name() -> None:
    counters = PlaneCounters()
    for name, cells in (
        ("affinity", AFFINITY),
        ("breaks", BREAKS),
        ("handshakes", HANDSHAKES),
        ("handed_over", HANDED),
    ):
        for count, cell in enumerate(cells.values(), 1):
            counters.cells[cell] += count
        assert getattr(counters, name) == {str(key): count for count, key in enumerate(cells, 1)}
    assert set(AFFINITY) == set(Outcome)
    assert set(BREAKS) == set(BreakReason)
    assert counters.none.cells.tolist() == [0] * UPSTREAM.size


def test_frames_are_counted_in_the_cells_of_the_upstream() -> None:
    counters = UpstreamCounters()
    counters.frames_received[1] += 2
    counters.frames_sent[15] += 3
    assert (len(counters.frames_received), len(counters.frames_sent)) == (16, 16)
    assert sorted(counters.cells.tolist())[-2:] == [2, 3]
    read = UpstreamCounters(counters.cells)
    assert (read.frames_received[1], read.frames_sent[15]) == (2, 3)


def test_the_fields_of_a_block_follow_each_other_without_a_gap() -> None:
    for layout in (UPSTREAM, PLANE):
        assert [cell for field in layout.fields for cell in field.cells] == list(range(layout.size))
        assert len({field.name for field in layout.fields}) == len(layout.fields)
    layout = Layout()
    assert (layout.add("gauge", "one"), layout.add("counter", "six", "ab", "xyz"), layout.size) == (0, 1, 7)


def test_memory_that_is_given_is_written_to_and_a_copy_is_not() -> None:
    cells = make_cells(PLANE_CELLS)
    counters = PlaneCounters(cells)
    counters.none.count_exchange(b"GET", 503)
    counters.cells[CONNECTIONS] += 1
    assert sum(cells) == 2
    upstream, copied = UpstreamCounters(), counters.copy()
    of_upstream = upstream.copy()
    counters.none.count_exchange(b"GET", 503)
    counters.cells[CONNECTIONS] += 1
    upstream.frames_sent[1] += 1
    assert (copied.connections, sum(copied.none.exchanges), sum(of_upstream.cells)) == (1, 1, 0)


def test_the_outcomes_of_probes_begin_at_zero() -> None:
    assert ProbeCounters().outcomes == {"passed": 0, "failed": 0, "refused": 0, "timeout": 0}
    assert set(ProbeCounters().outcomes) == {"passed", "failed", "refused", "timeout"}


def test_the_counters_of_the_plane_begin_at_zero() -> None:
    counters = PlaneCounters()
    assert sum(counters.cells) == 0
    assert (counters.hits, counters.connections, counters.affinity, counters.breaks) == (0, 0, {}, {})
    assert counters.handed_over == {"connections": 0, "tunnels": 0}


# That the closed sets hold what the code says


def calls_in_the_package() -> Iterator[ast.Call]:
    for path in sorted(Path(stickyproxy.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield node


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def texts(*nodes: ast.expr) -> set[str]:
    return {one.value for node in nodes for one in ast.walk(node)
            if isinstance(one, ast.Constant) and isinstance(one.value, str)}  # fmt: skip


def test_every_outcome_of_an_attempt_has_its_place() -> None:
    said = set()
    for call in calls_in_the_package():
        if name_of(call) in {"_record", "count_attempt", "_on_unreachable"}:
            said |= texts(*call.args[-1:])
        said |= texts(*(keyword.value for keyword in call.keywords if keyword.arg == "proxy_status"))
    source = Path(stickyproxy.__file__).parent / "errors.py"
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            said |= texts(*(value for one, value in named if one.arg == "proxy_status" and value is not None))
    said |= {"connection_timeout", "tls_protocol_error"}  # from a table of exchange.py
    assert said == set(ATTEMPTS) - {OTHER}


def test_every_cause_of_the_end_of_a_tunnel_has_its_place() -> None:
    said = {"close_frame", "aborted", "stopping"}  # assigned, and a default
    for call in calls_in_the_package():
        if name_of(call).lstrip("_") == "blame":
            said |= texts(*call.args[1:])
        elif name_of(call) == "shut":
            said |= texts(*(keyword.value for keyword in call.keywords if keyword.arg == "cause"), *call.args[2:])
    assert said == set(CAUSES) - {OTHER}
