"""What one image of the supervisor leaves to the next, and what is no such thing."""

import json
import os
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stickyproxy import __version__
from stickyproxy.config import Address
from stickyproxy.control import inheritance
from stickyproxy.control.inheritance import (
    Inheritance,
    WorkerState,
    export_counts,
    leave,
    open_socket,
    restore_counts,
    take,
)
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.control.supervisor import Supervisor
from stickyproxy.errors import UsageError
from stickyproxy.observe.counters import LAG_BOUNDS_S, Histogram, ProbeCounters
from stickyproxy.observe.table import make_memory
from tests.helpers.loops import no_leak
from tests.helpers.supervised import load

VARIABLE = "STICKYPROXY_INHERITED"
TCP, UNIX = Address("127.0.0.1", 8080), Address(path="/run/app.sock")
WORKERS = (WorkerState(0, 100, 20, 21), WorkerState(1, 101, 22, 23, "1.2", b"\x00half", is_retiring=True))


def make(**more: Any) -> Inheritance:
    """Return a state in which no field is at its default."""
    return Inheritance(
        loaded=load(),
        secrets=(b"first", b"second"),
        sockets={TCP: 10, UNIX: 11},
        lent=(UNIX,),
        private={"control": 12, "hand_over": 13},
        board=14,
        keys=15,
        routing={"admin": {"a": "drain"}},
        totals={"plane": [1, 2]},
        counts={"restarts": 3},
        serving=WORKERS[:1],
        leaving=WORKERS[1:],
        **more,
    )


def as_json(state: Inheritance) -> Any:
    return json.loads(json.dumps(state.to_json()))


def test_the_next_image_reads_what_this_one_wrote() -> None:
    state = make()
    read = Inheritance.from_json(as_json(state), {})
    assert read == state
    assert read.loaded.config == state.loaded.config
    assert read.version == __version__


@pytest.mark.parametrize("worker", WORKERS, ids=["serving", "retiring"])
def test_a_worker_is_read_as_it_was_written(worker: WorkerState) -> None:
    assert WorkerState.from_json(json.loads(json.dumps(worker.to_json()))) == worker


def test_what_another_version_adds_is_ignored_and_what_it_lacks_is_the_default() -> None:
    raw = as_json(make())
    raw["colour"] = raw["serving"][0]["colour"] = "blue"
    assert Inheritance.from_json(raw, {}) == make()
    for name in ("lent", "private", "board", "keys", "routing", "totals", "counts", "serving", "leaving"):
        del raw[name]
    read = Inheritance.from_json(raw, {})
    assert (read.lent, read.private, read.board, read.keys, read.serving, read.leaving) == ((), {}, None, None, (), ())
    for name in ("version", "received", "is_retiring"):
        worker = WORKERS[1].to_json()
        del worker[name]
        assert WorkerState.from_json(worker).process_id == 101


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, str(PROTOCOL), None])
def test_another_protocol_is_refused_by_name(protocol: object) -> None:
    with pytest.raises(UsageError, match=rf"version 9\.9 leaves a state that {__version__} cannot read"):
        Inheritance.from_json(as_json(make()) | {"protocol": protocol, "version": "9.9"}, {})


@pytest.mark.parametrize(
    "change",
    [
        {"secrets": ["no hexadecimal"]},
        {"secrets": None},
        {"sockets": [{"descriptor": 3}]},
        {"sockets": [{"address": {"host": "", "port": 70000, "path": ""}, "descriptor": 3}]},
        {"sockets": [{"address": {"host": "", "port": 1, "path": ""}, "descriptor": "x"}]},
        {"private": []},
        {"board": "x"},
        {"keys": "x"},
        {"routing": 5},
        {"serving": [{}]},
        {"serving": [7]},
        {"loaded": {}},
        {"loaded": {"source": {}, "text": "no_such_key: 1", "known": {}}},
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Inheritance.from_json(as_json(make()) | change, {})


@pytest.mark.parametrize("raw", [[], "text", 5, None, {}])
def test_what_is_no_object_is_refused(raw: object) -> None:
    with pytest.raises(UsageError, match="is no state that can be read"):
        Inheritance.from_json(raw, {})


def test_all_descriptors_stay_open() -> None:
    assert sorted(make().descriptors()) == [10, 11, 12, 13, 14, 15, 20, 21, 22, 23]
    assert Inheritance(load(), ()).descriptors() == []


# From one image to the next


@pytest.mark.parametrize("is_check", [True, False])
def test_the_state_lies_where_the_variable_says(*, is_check: bool) -> None:
    with no_leak():
        _, environment = leave(make(), is_check=is_check)
        assert environment.items() >= {name: value for name, value in os.environ.items() if name != VARIABLE}.items()
        environ = {VARIABLE: environment[VARIABLE]}
        assert take(environ) == (make(), is_check)
        assert environ == {}


def test_without_the_variable_nothing_was_left() -> None:
    assert take({}) is None


@pytest.mark.parametrize(
    "value", ["", "run", "run:", "run:x", "walk:3", "run:-1", "run:٣", "run:3 ", "run:9999999999999"]
)
def test_a_variable_that_somebody_else_has_set_is_refused(value: str) -> None:
    with pytest.raises(UsageError):
        take({VARIABLE: value})


def test_memory_that_holds_no_state_is_refused_and_closed() -> None:
    with no_leak():
        descriptor = make_memory("test")
        os.write(descriptor, b'{"protocol": ')
        with pytest.raises(UsageError, match="what the former version left cannot be read"):
            take({VARIABLE: f"run:{descriptor}"})
    with pytest.raises(UsageError, match="cannot be read"):
        take({VARIABLE: f"run:{descriptor}"})  # no such descriptor any more


def test_a_state_that_was_written_by_a_process_is_only_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, environment = leave(make(), is_check=False)
    monkeypatch.setenv(VARIABLE, environment[VARIABLE])
    assert take(os.environ) is not None
    assert VARIABLE not in os.environ
    assert take(os.environ) is None


def test_an_inherited_socket_is_for_this_process_alone() -> None:
    ours, theirs = socket.socketpair()
    number = os.dup(ours.fileno())
    os.set_inheritable(number, True)
    with ours, theirs, open_socket(number) as link:
        assert (link.fileno(), link.family, link.getblocking()) == (number, socket.AF_UNIX, False)
        assert not link.get_inheritable()
        theirs.send(b"x")
        assert link.recv(1) == b"x"


def test_memory_has_no_name_elsewhere() -> None:
    descriptor = make_memory("test")
    assert "test" in str(Path(f"/proc/self/fd/{descriptor}").readlink())
    assert Path(f"/proc/self/fd/{descriptor}").stat().st_nlink == 0
    os.close(descriptor)


# What is counted


def counting(**outcomes: int) -> Supervisor:
    """Return what has counted some outcomes, and in part by the same name."""
    probes = ProbeCounters()
    probes.outcomes.update({"passed": outcomes.get("passed", 0)})
    for _ in range(outcomes.get("passed", 0)):
        probes.duration.observe(0.01)
    lag = Histogram(LAG_BOUNDS_S)
    lag.observe(0.002)
    parts = SimpleNamespace(
        prober=SimpleNamespace(counters={"a": probes} if outcomes else {}),
        resolver=SimpleNamespace(lookups=Counter({"same": outcomes.get("same", 0), "failed": 0})),
        certificates=SimpleNamespace(reloads=Counter({"ok": outcomes.get("ok", 0)})),
        readings=SimpleNamespace(loop_lag=SimpleNamespace(histogram=lag)),
    )
    return cast("Supervisor", parts)


def test_the_next_image_counts_on() -> None:
    before = counting(passed=3, same=4, ok=5)
    after = counting()
    restore_counts(after, json.loads(json.dumps(export_counts(before))))
    assert after.prober.counters["a"].outcomes["passed"] == 3
    assert sum(after.prober.counters["a"].duration.counts) == 3
    assert after.prober.counters["a"].duration.total_s == pytest.approx(0.03)
    assert after.resolver.lookups == {"same": 4, "failed": 0}
    assert after.certificates.reloads == {"ok": 5}
    assert sum(after.readings.loop_lag.histogram.counts) == 2
    assert export_counts(before)["loop_lag"]["counts"] != export_counts(after)["loop_lag"]["counts"]


def test_a_version_that_left_no_counts_or_others_is_gone_on_from() -> None:
    after = counting(passed=1)
    restore_counts(after, {})
    written = export_counts(counting(passed=3))
    written["loop_lag"]["bounds"] = [1.0, 2.0]
    written["probes"]["a"]["outcomes"]["confused"] = 7
    restore_counts(after, json.loads(json.dumps(written)))
    assert sum(after.readings.loop_lag.histogram.counts) == 1
    assert after.prober.counters["a"].outcomes["passed"] == 4
    assert "confused" not in after.prober.counters["a"].outcomes


def test_a_state_may_be_larger_than_one_write() -> None:
    text = "x" * 3_000_000
    state = make()
    state.routing = {"text": text}
    _, environment = leave(state, is_check=False)
    taken = take({VARIABLE: environment[VARIABLE]})
    assert taken is not None
    assert taken[0].routing == {"text": text}
    assert len(text) < inheritance._MAX_BYTES
