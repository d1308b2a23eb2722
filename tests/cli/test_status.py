"""The table of what runs, with and without app processes, once and again."""

import json
from typing import Any

import pytest

from stickyproxy.cli.status import Cpu, describe
from tests.cli.running import run
from tests.cli.stub import StubProxy
from tests.cli.test_apps import interrupt_at

PATH = "/api/v1/state"


def upstream(upstream_id: str, **facts: Any) -> dict[str, Any]:
    return {
        "id": upstream_id,
        "address": f"{upstream_id}.sock",
        "admin_state": "ready",
        "health": "healthy",
        "is_refused": False,
        "is_leaving": False,
        "accepts_new": True,
        "accepts_pinned": True,
        "sessions": 0,
        "tunnels": 0,
        "in_flight": 0,
        **facts,
    }


def process(**facts: Any) -> dict[str, Any]:
    return {
        "pid": 100,
        "generation": 1,
        "state": "ready",
        "age_s": 10.0,
        "memory_bytes": 1 << 20,
        "cpu_s": 1.0,
        "restarts": 0,
        **facts,
    }


def state(*upstreams: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {
        "version": "1.2.3",
        "uptime_s": 11532.5,
        "is_ready": True,
        "workers": [{"index": 0, "is_leaving": False}, {"index": 1, "is_leaving": False}],
        "clusters": [{"name": "default", "upstreams": list(upstreams)}],
        "run": None,
        **facts,
    }


RUNNING = state(
    upstream("g1-2", admin_state="drain", sessions=120, tunnels=98,
             process=process(state="draining", age_s=11520, memory_bytes=round(1.2 * (1 << 30)), cpu_s=5760)),
    upstream("g2-1", health="unhealthy", process=process(pid=101, generation=2, age_s=45.4, cpu_s=0.5, restarts=12)),
    upstream("g2-2", is_refused=True, process=process(pid=None, generation=2, state="waiting", age_s=None,
                                                      memory_bytes=None, cpu_s=None, restarts=3)),
    run={"generation": 2, "processes": 3, "min": 3, "max": 3, "starting": [
        {"id": "g2-3", "process": process(pid=103, generation=2, state="starting", age_s=0.0, cpu_s=0.0)},
    ]},
)  # fmt: skip
SHOWN = """\
stickyproxy 1.2.3, up 3h 12m, 2 workers, ready

ID    GENERATION  STATE     HEALTH     ADMIN  SESSIONS  TUNNELS   MEMORY  CPU     AGE  RESTARTS
g1-2           1  draining  healthy    drain       120       98  1.2 GiB  50%  3h 12m         0
g2-1           2  ready     unhealthy  ready         0        0  1.0 MiB   1%    45 s        12
g2-2           2  waiting   refused    ready         0        0        -    -       -         3
g2-3           2  starting  -          -             -        -  1.0 MiB    -     0 s         0
"""


def test_app_processes_are_shown_with_what_they_take(proxy: StubProxy) -> None:
    proxy.answer("GET", PATH, RUNNING)
    result = run("status", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, SHOWN, "")
    assert proxy.calls == [("GET", PATH, None)]


def test_upstreams_of_others_have_no_columns_of_processes() -> None:
    plain = state(upstream("app-1", sessions=7, tunnels=3), upstream("b", is_leaving=True, admin_state="drain"))
    assert describe(plain, Cpu())[2:] == [
        "ID     ADDRESS     HEALTH   ADMIN    SESSIONS  TUNNELS",
        "app-1  app-1.sock  healthy  ready           7        3",
        "b      b.sock      healthy  leaving         0        0",
    ]


def test_app_processes_stand_in_the_order_of_their_ids_and_others_as_in_the_file() -> None:
    ids = ["g2-1", "g1-10", "g1-9"]
    shown = describe(state(*(upstream(one, process=process()) for one in ids), upstream("b"), upstream("a2")), Cpu())
    assert [line.split()[0] for line in shown[3:]] == ["b", "a2", "g1-9", "g1-10", "g2-1"]


def test_an_app_that_is_only_starting_has_its_columns() -> None:
    shown = describe(state(run={"starting": [], "generation": 1}), Cpu())
    assert shown[0].endswith("not ready: no upstream can be used")
    assert "GENERATION" in shown[2]
    assert len(shown) == 3


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "up 3h 12m, 2 workers, ready"),
        ({"is_ready": False}, "not ready: it is starting or stopping"),
        ({"clusters": [{"upstreams": [upstream("a", accepts_pinned=False)]}]}, "not ready: no upstream can be used"),
        ({"workers": [{"is_leaving": True}, {"is_leaving": False}]}, "1 worker, ready"),
        ({"workers": [{"is_leaving": True}]}, "0 workers, not ready: no worker is running"),
        ({"uptime_s": 4.2}, "up 4 s, 2 workers, ready"),
    ],
)
def test_the_first_line_tells_of_the_proxy(facts: dict[str, Any], said: str) -> None:
    line = describe(state(upstream("a"), **facts), Cpu())[0]
    assert line.startswith("stickyproxy 1.2.3, up ")
    assert line.endswith(said)


# CPU


def test_cpu_is_an_average_at_first_and_then_of_the_time_between_two_looks() -> None:
    cpu = Cpu()
    looks = [(100.0, 10.0), (101.0, 10.5), (103.0, 13.5), (104.0, 13.5)]
    assert [cpu.look(process(age_s=age, cpu_s=used)) for age, used in looks] == [10, 50, 150, 0]


def test_cpu_of_a_process_that_has_taken_the_place_of_another() -> None:
    cpu = Cpu()
    assert cpu.look(process(age_s=100, cpu_s=50)) == 50
    assert cpu.look(process(age_s=2, cpu_s=1)) == 50
    assert cpu.look(process(pid=7, age_s=4, cpu_s=1)) == 25


@pytest.mark.parametrize("unknown", ["pid", "age_s", "cpu_s"])
def test_cpu_that_is_not_known(unknown: str) -> None:
    cpu = Cpu()
    assert cpu.look(process(**{unknown: None})) is None
    assert cpu.look(process(age_s=0.0, cpu_s=0.0)) is None


def test_two_looks_at_the_same_moment_say_nothing() -> None:
    cpu = Cpu()
    cpu.look(process())
    assert cpu.look(process()) is None


# JSON, and again and again


def test_json_is_what_the_proxy_gave(proxy: StubProxy) -> None:
    proxy.answer("GET", PATH, RUNNING)
    result = run("status", "--json", "--control", proxy.path)
    assert json.loads(result.stdout) == RUNNING
    assert len(result.stdout.splitlines()) > 10


async def test_watch_goes_on_until_it_is_interrupted(proxy: StubProxy) -> None:
    first = state(upstream("a", process=process(age_s=10, cpu_s=1)))
    then = state(upstream("a", process=process(age_s=20, cpu_s=10)))
    proxy.answer("GET", PATH, first, then)
    status, out, error = await interrupt_at(proxy, 3, "status", "--watch")
    assert (status, error) == (0, "")
    [one, two, *_] = out.split("stickyproxy 1.2.3")[1:]
    assert "  10%  " in one
    assert "  90%  " in two


async def test_watch_gives_a_line_of_json_each_time(proxy: StubProxy) -> None:
    proxy.answer("GET", PATH, RUNNING)
    status, out, error = await interrupt_at(proxy, 3, "status", "--watch", "--json")
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert len(lines) >= 2
    assert all(json.loads(line) == RUNNING for line in lines)


def test_of_several_clusters_each_upstream_is_shown_with_its_own() -> None:
    clusters = [{"name": "default", "upstreams": [upstream("a")]}, {"name": "shop", "upstreams": [upstream("s")]}]
    lines = describe(state(clusters=clusters), Cpu())
    assert [line.split()[:2] for line in lines[2:]] == [["CLUSTER", "ID"], ["default", "a"], ["shop", "s"]]
    assert "CLUSTER" not in "\n".join(describe(state(upstream("a")), Cpu()))
