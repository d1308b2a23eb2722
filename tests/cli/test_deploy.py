"""What `deploy` asks for, what it shows while it goes on, and how it ends."""

import asyncio
import os
import pty
from collections.abc import Sequence
from typing import Any

import pytest

from stickyproxy.cli.deploy import describe, read_options
from stickyproxy.errors import UsageError
from tests.cli.running import COMMAND, REPOSITORY, run
from tests.cli.stub import DEADLINE_S, Answer, StubProxy
from tests.cli.test_apps import interrupt_at

PATH = "/api/v1/deploy"


def status(state: str, ready: int = 4, left: int = 0, eta_s: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "number": 3,
        "generation": 2,
        "state": state,
        "reason": "",
        "ready": ready,
        "processes": 4,
        "sessions_left": left,
        "eta_s": eta_s,
        "last_lines": [],
        **more,
    }


BEGUN = Answer(202, status("starting", 0))
FAILURE: dict[str, Any] = {"reason": "g2-1: exit status 3", "last_lines": ["Traceback:", "  no module"]}


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ((), {}),
        (("--drain-timeout", "30m"), {"drain_timeout_s": 1800.0}),
        (("--drain-timeout", "off"), {"drain_timeout_s": None}),
        (("--pace", "20/s"), {"pace_per_s": 20.0}),
        (("--pace", "0.5"), {"pace_per_s": 0.5}),
        (("--surge", "all", "--watch", "0s"), {"surge": 0, "watch_s": 0.0}),
        (("--surge", "3", "--watch", "1m"), {"surge": 3, "watch_s": 60.0}),
    ],
)
def test_only_what_was_given_is_sent(proxy: StubProxy, arguments: Sequence[str], body: dict[str, Any]) -> None:
    proxy.answer("POST", PATH, BEGUN)
    result = run("deploy", "--detach", *arguments, "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "the deploy of generation 2 has begun\n", "")
    assert proxy.calls == [("POST", PATH, body)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--drain-timeout", "30"), "--drain-timeout: expected a duration such as"),
        (("--pace", "0"), "--pace: expected a pace such as 20/s"),
        (("--pace", "20/m"), "--pace: expected a pace such as 20/s"),
        (("--pace", "-1/s"), "--pace: expected a pace such as 20/s"),
        (("--surge", "0"), "--surge: expected all or a whole number above 0, got '0'"),
        (("--surge", "-1"), "--surge: expected all or a whole number above 0"),
        (("--surge", "9" * 5000), "--surge: expected all or a whole number above 0"),
        (("--watch", "ten"), "--watch: expected a duration such as"),
    ],
)
def test_an_option_that_is_wrong_is_named_and_nothing_asked_for(
    proxy: StubProxy, arguments: Sequence[str], said: str
) -> None:
    result = run("deploy", *arguments, "--control", proxy.path)
    assert (result.exit_code, result.stdout, proxy.calls) == (2, "", [])
    [line] = result.stderr.splitlines()
    assert line.startswith(f"stickyproxy: {said}")
    assert len(line) < 200


def test_options_that_were_not_given_are_not_read() -> None:
    assert read_options({"pace": None, "surge": "2"}) == {"surge": 2}
    with pytest.raises(UsageError, match="--drain-timeout: "):
        read_options({"drain_timeout": ""})


@pytest.mark.parametrize("options", [(), ("--detach",)])
@pytest.mark.parametrize(
    ("code", "said"),
    [(409, "a deploy is under way already"), (422, "this proxy runs no app"), (400, "surge is a number")],
)
def test_a_deploy_that_is_refused(proxy: StubProxy, options: Sequence[str], code: int, said: str) -> None:
    proxy.answer("POST", PATH, Answer(code, {"error": said}))
    result = run("deploy", *options, "--control", proxy.path)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"stickyproxy: {said}\n")
    assert len(proxy.calls) == 1


# How it goes on


def test_a_deploy_is_followed_to_its_end(proxy: StubProxy) -> None:
    proxy.answer("POST", PATH, BEGUN)
    proxy.answer(
        *("GET", PATH, status("starting", 0), status("starting", 1), status("starting", 1), status("starting", 4)),
        *(status("watching"), Answer(0), Answer(0), Answer(503, {"error": "soon"}), status("watching")),
        *(status("draining", left=37), status("draining", left=37, eta_s=251.4), status("draining", left=1, eta_s=5.5)),
        status("ok"),
    )
    result = run("deploy", "--control", proxy.path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "generation 2 starts: 0 of 4 ready",
        "generation 2 starts: 1 of 4 ready",
        "generation 2 starts: 4 of 4 ready",
        "generation 2 takes the new clients: 4 of 4 ready; watching it",
        "generation 2 serves, the old processes drain: 37 sessions left",
        "generation 2 serves, the old processes drain: 1 session left, about 5 s",
        "generation 2 is deployed",
    ]


@pytest.mark.parametrize(
    ("stands", "text", "detail"),
    [
        (status("draining", left=9, eta_s=251.4), "generation 2 serves, the old processes drain: 9 sessions left",
         ", about 4m 11s"),
        (status("draining", left=9), "generation 2 serves, the old processes drain: 9 sessions left", ""),
        (status("watching", 3, reason="g2-1: it crashed"), "generation 2 is taken back: g2-1: it crashed", ""),
    ],
)  # fmt: skip
def test_what_changes_all_the_time_is_no_change(stands: dict[str, Any], text: str, detail: str) -> None:
    assert describe(stands) == (text, detail)


def test_a_deploy_that_fails_says_why_and_what_the_process_said_last(proxy: StubProxy) -> None:
    proxy.answer("POST", PATH, BEGUN)
    proxy.answer("GET", PATH, status("starting", 0), status("starting", 0, **FAILURE), status("failed", 0, **FAILURE))
    result = run("deploy", "--control", proxy.path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "generation 2 starts: 0 of 4 ready",
        "generation 2 is taken back: g2-1: exit status 3",
    ]
    assert result.stderr.splitlines() == [
        "stickyproxy: the deploy has failed: g2-1: exit status 3",
        "  | Traceback:",
        "  |   no module",
    ]


def test_a_deploy_that_nobody_knows_of_any_more(proxy: StubProxy) -> None:
    """Another one has begun between two looks, or another proxy runs by now."""
    proxy.answer("POST", PATH, BEGUN)
    for before, other in (
        ("starting", status("starting", number=4)),
        ("draining", {"number": 0, "state": "none"}),
    ):
        proxy.answer("GET", PATH, status(before), other, status("ok", number=4))
        result = run("deploy", "--control", proxy.path)
        assert result.exit_code == 1
        said = "stickyproxy: what became of the deploy is not known: the proxy tells of another one\n"
        assert result.stderr == said


def test_a_deploy_that_serves_is_none_that_failed_because_another_one_begins(proxy: StubProxy) -> None:
    proxy.answer("POST", PATH, BEGUN)
    proxy.answer("GET", PATH, status("draining"), status("starting", number=4))
    assert run("deploy", "--control", proxy.path).exit_code == 0


def test_a_proxy_that_does_not_say_whether_it_deploys(proxy: StubProxy) -> None:
    proxy.answer("POST", PATH, Answer(0))
    result = run("deploy", "--control", proxy.path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "closed the connection before it answered" in result.stderr
    assert len(proxy.calls) == 1


async def test_a_deploy_goes_on_without_who_follows_it(proxy: StubProxy) -> None:
    proxy.answer("POST", PATH, BEGUN)
    proxy.answer("GET", PATH, status("draining", left=5))
    code, out, error = await interrupt_at(proxy, 2, "deploy")
    assert (code, out) == (130, "generation 2 serves, the old processes drain: 5 sessions left\n")
    assert error == "stickyproxy: interrupted: the deploy of generation 2 goes on\n"


async def test_on_a_terminal_one_line_is_rewritten(proxy: StubProxy) -> None:
    """Of all lines that were shown, the last one alone is left; errors begin on a line of their own."""
    proxy.answer("POST", PATH, BEGUN)
    proxy.answer("GET", PATH, status("starting", 1), status("starting", 2), status("failed", 2, reason="no"))
    master, slave = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "deploy", "--control", str(proxy.path), cwd=REPOSITORY, stdout=slave, stderr=slave
        )
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 1
        shown = os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)
    first, second = "generation 2 starts: 1 of 4 ready", "generation 2 starts: 2 of 4 ready"
    assert shown == f"\r{first}\x1b[K\r{second}\x1b[K\r\x1b[Kstickyproxy: the deploy has failed: no\r\n"
