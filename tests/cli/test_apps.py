"""The commands for single app processes, against a proxy that only answers."""

import asyncio
import signal
from typing import Any

import pytest

from stickyproxy.cli.apps import Tail
from tests.cli.running import COMMAND, REPOSITORY, run
from tests.cli.stub import DEADLINE_S, Answer, StubProxy

STATE = "/api/v1/state"


def upstream(upstream_id: str = "g1-1", **facts: Any) -> dict[str, Any]:
    return {
        "id": upstream_id,
        "admin_state": "drain",
        "health": "healthy",
        "sessions": 0,
        "tunnels": 0,
        "in_flight": 0,
        **facts,
    }


def state(*upstreams: dict[str, Any]) -> dict[str, Any]:
    return {"clusters": [{"name": "default", "upstreams": list(upstreams)}]}


def state_path(quoted: str) -> str:
    return f"/api/v1/upstreams/{quoted}/state"


async def interrupt_at(proxy: StubProxy, calls: int, *command: str) -> tuple[int | None, str, str]:
    """Run a command, send it SIGINT once it has asked so many times; return exit status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *command, "--control", str(proxy.path), cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await asyncio.to_thread(proxy.wait_for_calls, calls)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(DEADLINE_S):
            out, error = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode(), error.decode()


# scale


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (2, 6, "growing from 2 to 6 app processes\n"),
        (6, 1, "shrinking from 6 to 1 app process\n"),
        (4, 4, "nothing to do: 4 app processes\n"),
    ],
)
def test_scale(proxy: StubProxy, before: int, now: int, said: str) -> None:
    proxy.answer("POST", "/api/v1/scale", Answer(202, {"from": before, "to": now}))
    result = run("scale", str(now), "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    assert proxy.calls == [("POST", "/api/v1/scale", {"processes": now})]


def test_scale_that_is_refused(proxy: StubProxy) -> None:
    proxy.answer("POST", "/api/v1/scale", Answer(422, {"error": "a deploy is under way: scale after it"}))
    result = run("scale", "3", "--control", proxy.path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "stickyproxy: a deploy is under way: scale after it\n"


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5", ""])
def test_scale_takes_a_number(proxy: StubProxy, number: str) -> None:
    result = run("scale", "--control", proxy.path, "--", number)
    assert (result.exit_code, result.stdout, proxy.calls) == (2, "", [])
    assert "Invalid value for 'N'" in result.stderr


# drain, ready


def test_drain(proxy: StubProxy) -> None:
    proxy.answer("PUT", state_path("g1-1"), upstream(sessions=3, tunnels=1))
    result = run("drain", "g1-1", "--control", proxy.path)
    said = "g1-1 takes no new client: 3 sessions, 1 tunnel, 0 requests\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, said, "")
    assert proxy.calls == [("PUT", state_path("g1-1"), {"state": "drain"})]


@pytest.mark.parametrize("command", ["drain", "ready"])
def test_an_id_may_hold_anything(proxy: StubProxy, command: str) -> None:
    """That of an upstream without a name is its address, or the path of its socket."""
    path = state_path("%2Frun%2Fapp%20one%3F%23%25.sock")
    proxy.answer("PUT", path, upstream("/run/app one?#%.sock"))
    assert run(command, "/run/app one?#%.sock", "--control", proxy.path).exit_code == 0
    assert [call[1] for call in proxy.calls] == [path]


@pytest.mark.parametrize("command", ["drain", "ready", "restart", "logs"])
def test_an_id_that_is_unknown_is_a_mistake_of_the_operator(proxy: StubProxy, command: str) -> None:
    result = run(command, "g9-9", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "stickyproxy: no such thing\n")


@pytest.mark.parametrize(
    ("last", "said"), [(state(upstream()), "g1-1 is empty"), (state(upstream("g1-2")), "g1-1 is gone")]
)
def test_drain_waits_until_nothing_is_left(proxy: StubProxy, last: Any, said: str) -> None:
    proxy.answer("PUT", state_path("g1-1"), upstream(sessions=2))
    looks = [
        state(upstream("g1-2"), upstream(sessions=2, tunnels=2)),
        state(upstream(sessions=1)),
        Answer(0),  # the proxy re-executes itself
        Answer(0),
        state(upstream(sessions=1)),
        state(upstream(tunnels=1)),
        state(upstream(in_flight=1)),
    ]
    proxy.answer("GET", STATE, *looks, last)
    result = run("drain", "g1-1", "--wait", "--control", proxy.path)
    assert (result.exit_code, result.stderr) == (0, "")
    *shown, end = result.stdout.splitlines()
    assert shown[:4] == [
        "g1-1 is draining: 2 sessions, 2 tunnels, 0 requests",
        "g1-1 is draining: 1 session, 0 tunnels, 0 requests",
        "g1-1 is draining: 0 sessions, 1 tunnel, 0 requests",
        "g1-1 is draining: 0 sessions, 0 tunnels, 1 request",
    ]
    assert end == said
    assert len(proxy.calls) == len(looks) + 2


def test_drain_waits_no_more_when_somebody_takes_it_back(proxy: StubProxy) -> None:
    proxy.answer("PUT", state_path("g1-1"), upstream(sessions=2))
    taken_back = state(upstream(sessions=2, admin_state="ready"))
    proxy.answer("GET", STATE, state(upstream(sessions=2)), taken_back, state(upstream()))
    result = run("drain", "g1-1", "--wait", "--control", proxy.path)
    assert result.exit_code == 1
    assert result.stderr == "stickyproxy: somebody has set g1-1 to ready: it drains no more\n"


async def test_drain_that_is_interrupted_says_that_it_goes_on(proxy: StubProxy) -> None:
    proxy.answer("PUT", state_path("g1-1"), upstream(sessions=2))
    proxy.answer("GET", STATE, state(upstream(sessions=2)))
    status, out, error = await interrupt_at(proxy, 2, "drain", "g1-1", "--wait")
    assert (status, out) == (130, "g1-1 is draining: 2 sessions, 0 tunnels, 0 requests\n")
    said = "stickyproxy: interrupted: g1-1 goes on draining; `stickyproxy ready g1-1` takes that back\n"
    assert error == said


@pytest.mark.parametrize(("health", "said"), [("healthy", ""), ("unknown", ""), ("unhealthy", ", but unhealthy")])
def test_ready(proxy: StubProxy, health: str, said: str) -> None:
    proxy.answer("PUT", state_path("g1-1"), upstream(admin_state="ready", health=health))
    result = run("ready", "g1-1", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"g1-1 is ready{said}\n", "")
    assert proxy.calls == [("PUT", state_path("g1-1"), {"state": "ready"})]


def test_a_state_that_cannot_be_set_is_told(proxy: StubProxy) -> None:
    proxy.answer("PUT", state_path("g1-1"), Answer(409, {"error": "g1-1 is leaving"}))
    result = run("ready", "g1-1", "--control", proxy.path)
    assert (result.exit_code, result.stderr) == (2, "stickyproxy: g1-1 is leaving\n")


# restart


def test_restart(proxy: StubProxy) -> None:
    path = "/api/v1/processes/g1-1/restart"
    proxy.answer("POST", path, Answer(202, {"id": "g1-1", "replacement": "g1-5"}))
    result = run("restart", "g1-1", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "g1-1 is being replaced by g1-5\n", "")
    assert proxy.calls == [("POST", path, {})]


# logs

LOG = "/api/v1/processes/g1-1/log"


def test_logs(proxy: StubProxy) -> None:
    proxy.answer("GET", LOG, {"lines": ["one", "", "  two"]})
    result = run("logs", "g1-1", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "one\n\n  two\n", "")
    assert len(proxy.calls) == 1


def test_logs_of_a_silent_process(proxy: StubProxy) -> None:
    proxy.answer("GET", LOG, {"lines": []})
    result = run("logs", "g1-1", "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_logs_follows_until_the_process_is_gone(proxy: StubProxy) -> None:
    looks = [
        {"lines": ["a", "b"], "written": 2},
        {"lines": ["a", "b"], "written": 2},
        {"lines": ["a", "b", "b"], "written": 3},
        Answer(0),  # the proxy re-executes itself
        Answer(0),
        {"lines": ["a", "b", "b", "c", "d"], "written": 5},
    ]
    proxy.answer("GET", LOG, *looks, Answer(404, {"error": "there is no app process 'g1-1'"}))
    result = run("logs", "g1-1", "--follow", "--control", proxy.path)
    assert result.stdout == "a\nb\nb\nc\nd\n"
    assert (result.exit_code, result.stderr) == (0, "stickyproxy: g1-1 is gone\n")


async def test_logs_follows_until_it_is_interrupted(proxy: StubProxy) -> None:
    proxy.answer("GET", LOG, {"lines": ["a"], "written": 1}, {"lines": ["a", "b"], "written": 2})
    assert await interrupt_at(proxy, 3, "logs", "-f", "g1-1") == (0, "a\nb\n", "")


@pytest.mark.parametrize(
    ("looks", "shown"),
    [
        ([(["a", "a"], 2), (["a", "a", "a"], 3)], [["a", "a"], ["a"]]),
        ([(["a", "a"], 2), (["a", "a"], 2)], [["a", "a"], []]),
        ([(["a", "a"], 500), (["a", "a"], 501)], [["a", "a"], ["a"]]),
        ([(["a", "b"], 2), (["c", "d"], 5)], [["a", "b"], ["(1 line left out)", "c", "d"]]),
        ([([], 0), (["a"], 1)], [[], ["a"]]),
        ([([], 0), (["c"], 3)], [[], ["(2 lines left out)", "c"]]),
        ([(["a"], 9), (["x", "b", "c"], 2)], [["a"], ["b", "c"]]),
    ],
    ids=["the same line again", "nothing new", "older ones", "too many", "the first", "too many at first", "anew"],
)
def test_each_line_is_shown_once(looks: list[tuple[list[str], int]], shown: list[list[str]]) -> None:
    tail = Tail()
    assert [tail.take({"lines": lines, "written": written}) for lines, written in looks] == shown
