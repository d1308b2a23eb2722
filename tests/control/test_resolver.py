"""The resolver: whose names are followed, what an answer changes, and that a failure changes nothing."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import pytest
import pytest_asyncio

from stickyproxy.config import Address
from stickyproxy.control import resolver
from stickyproxy.control.resolver import Resolver, is_followed, look_up

DEADLINE_S = 30
NAME = "app.internal"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- the condition may lie in a thread
            await asyncio.sleep(0.005)


class Names:
    """A name server in memory. An answer may be an error; names in `silent` are answered never."""

    def __init__(self) -> None:
        self.answers: dict[str, Sequence[str] | Exception] = {}
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self.open = 0
        self.most_open = 0

    async def look_up(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(0)
            if name in self.silent:
                await asyncio.Event().wait()
        finally:
            self.open -= 1
        answer = self.answers.get(name, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Bench:
    """A resolver, the names that it asks for, and what it published."""

    resolver: Resolver

    def __init__(self) -> None:
        self.names = Names()
        self.published: list[Mapping[str, str]] = []

    async def start(self, *, refresh_s: float | None = 0.01, **hosts: str) -> Resolver:
        addresses = {upstream_id: Address(host, 8001) for upstream_id, host in (hosts or {"app_1": NAME}).items()}
        self.resolver = Resolver(addresses, refresh_s, self.published.append, lookup=self.names.look_up)
        await self.resolver.start()
        return self.resolver

    async def some_rounds(self, number: int = 3) -> None:
        """Wait until each outcome of the lookups so far is counted, and some more."""
        asked = len(self.names.asked)
        await until(lambda: len(self.names.asked) > asked + number)


@pytest_asyncio.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    if hasattr(made, "resolver"):
        await made.resolver.stop()
    assert not [task for task in asyncio.all_tasks() if "names" in task.get_name()]
    assert made.names.open == 0


# Whose names


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (Address("app.internal", 8001), True),
        (Address("app", 8001), True),
        (Address("localhost.example", 8001), True),
        (Address("localhost", 8001), False),
        (Address("app.localhost", 8001), False),
        (Address("10.0.0.1", 8001), False),
        (Address("::1", 8001), False),
        (Address(path="/run/app.sock"), False),
    ],
)
def test_names_are_followed_and_nothing_else(address: Address, *, expected: bool) -> None:
    assert is_followed(address) is expected


async def test_without_names_nothing_is_done(bench: Bench) -> None:
    found = await bench.start(a="10.0.0.1", b="localhost")
    assert bench.published == []
    assert bench.names.asked == []
    assert found.resolved == {}
    assert not found.is_missing("a")


# The start


async def test_all_names_are_looked_up_at_the_start(bench: Bench) -> None:
    bench.names.answers = {NAME: ["10.0.0.6", "10.0.0.5"], "other.internal": ["fd00::1"]}
    found = await bench.start(a=NAME, b="other.internal", c="10.0.0.9", refresh_s=None)
    assert found.resolved == {"a": "10.0.0.6", "b": "fd00::1"}
    assert bench.published == [found.resolved]
    assert not any(found.is_missing(one) for one in "abc")
    assert found.lookups == {"changed": 2, "same": 0, "failed": 0}


async def test_upstreams_of_one_name_share_its_lookup(bench: Bench) -> None:
    bench.names.answers = {NAME: ["10.0.0.6"]}
    found = await bench.start(a=NAME, b=NAME, refresh_s=None)
    assert bench.names.asked == [NAME]
    assert found.resolved == {"a": "10.0.0.6", "b": "10.0.0.6"}


async def test_a_name_that_is_not_found_at_the_start_has_no_address(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.names.answers = {NAME: ["10.0.0.6"]}
    found = await bench.start(a=NAME, b="no.internal")
    assert found.resolved == {"a": "10.0.0.6"}
    assert found.is_missing("b")
    await bench.some_rounds(5)
    assert caplog.text.count("cannot look up no.internal of upstream b: Name or service not known; it has no") == 1
    bench.names.answers["no.internal"] = ["10.0.0.7"]
    await until(lambda: not found.is_missing("b"))
    assert bench.published[-1] == {"a": "10.0.0.6", "b": "10.0.0.7"}


async def test_the_start_waits_for_no_name_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resolver, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr(resolver, "_AT_ONCE", 1)
    bench.names.silent = {"silent.internal"}
    bench.names.answers = {"late.internal": ["10.0.0.8"]}
    found = await bench.start(a="silent.internal", b="late.internal")
    assert found.is_missing("a")
    await until(lambda: not found.is_missing("b"))  # in its turn, if not at the start
    assert caplog.text.count("cannot look up silent.internal of upstream a: no answer within 0.05 s") == 1


async def test_the_start_waits_for_many_names_no_longer_than_for_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr(resolver, "_AT_ONCE", 1)
    hosts = {f"app_{one}": f"app-{one}.internal" for one in range(40)}
    bench.names.silent = set(hosts.values())
    found = await bench.start(refresh_s=None, **hosts)
    assert len(bench.names.asked) < 40  # one after the other takes a turn of 0.05 s each
    assert found.lookups["failed"] >= 40
    assert all(found.is_missing(one) for one in hosts)


@pytest.mark.parametrize("number", [5, 50])
async def test_few_lookups_are_under_way_at_once(bench: Bench, number: int) -> None:
    hosts = {f"app_{one}": f"app-{one}.internal" for one in range(number)}
    bench.names.answers = {name: ["10.0.0.1"] for name in hosts.values()}
    found = await bench.start(refresh_s=None, **hosts)
    assert len(found.resolved) == number
    assert bench.names.most_open == min(20, number)


# Later


async def test_a_change_is_followed_and_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench.names.answers = {NAME: ["10.0.0.6"], "other.internal": ["10.0.0.9"]}
    found = await bench.start(app_1=NAME, app_2="other.internal")
    bench.names.answers[NAME] = ["10.0.0.7", "10.0.0.8"]
    await until(lambda: found.resolved["app_1"] == "10.0.0.7")
    assert bench.published == [
        {"app_1": "10.0.0.6", "app_2": "10.0.0.9"},
        {"app_1": "10.0.0.7", "app_2": "10.0.0.9"},
    ]
    assert "upstream app_1: app.internal is now 10.0.0.7 (was 10.0.0.6)" in caplog.text
    await bench.some_rounds()
    assert len(bench.published) == 2
    assert found.lookups["changed"] == 3


async def test_rotating_answers_move_nobody(bench: Bench) -> None:
    bench.names.answers = {NAME: ["10.0.0.6", "10.0.0.7", "10.0.0.8"]}
    found = await bench.start()
    for answer in (["10.0.0.7", "10.0.0.8", "10.0.0.6"], ["10.0.0.8", "10.0.0.6"], ["10.0.0.6"]):
        bench.names.answers[NAME] = answer
        await bench.some_rounds()
    assert bench.published == [{"app_1": "10.0.0.6"}]
    assert found.lookups["same"] > 3
    assert found.lookups["changed"] == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "Temporary failure"),
        (OSError("odd"), "odd"),
        ([], "the answer holds no address"),
        (RuntimeError("a fault"), "the lookup crashed"),
    ],
)
async def test_a_failure_keeps_the_last_good_answer(
    bench: Bench, caplog: pytest.LogCaptureFixture, answer: Sequence[str] | Exception, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    bench.names.answers = {NAME: ["10.0.0.6"]}
    found = await bench.start()

    async def fail_and_recover() -> None:
        before, logged = found.lookups["failed"], caplog.text.count("is found again")
        bench.names.answers[NAME] = answer
        await until(lambda: found.lookups["failed"] > before + 3)
        assert found.resolved == {"app_1": "10.0.0.6"}
        bench.names.answers[NAME] = ["10.0.0.6"]
        await until(lambda: caplog.text.count("app.internal is found again") == logged + 1)

    for number in (1, 2):
        await fail_and_recover()
        assert caplog.text.count(f"cannot look up app.internal of upstream app_1: {reason}") == number
    assert "; 10.0.0.6 stays" in caplog.text
    assert bench.published == [{"app_1": "10.0.0.6"}]


async def test_silence_keeps_the_last_good_answer_and_stops_no_other_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.names.answers = {NAME: ["10.0.0.6"], "other.internal": ["10.0.0.9"]}
    found = await bench.start(app_1=NAME, app_2="other.internal")
    monkeypatch.setattr(resolver, "_TIMEOUT_S", 0.05)
    bench.names.silent = {NAME}
    bench.names.answers["other.internal"] = ["10.0.0.10"]
    await until(lambda: found.lookups["failed"] and found.resolved["app_2"] == "10.0.0.10")
    assert found.resolved["app_1"] == "10.0.0.6"
    bench.names.silent = set()
    bench.names.answers[NAME] = ["10.0.0.7"]
    await until(lambda: found.resolved["app_1"] == "10.0.0.7")


async def test_without_a_refresh_names_are_looked_up_until_they_have_an_address(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_RETRY_S", 0.01)
    bench.names.answers = {NAME: ["10.0.0.6"]}
    found = await bench.start(app_1=NAME, app_2="late.internal", refresh_s=None)
    await bench.some_rounds()
    bench.names.answers |= {NAME: ["10.0.0.7"], "late.internal": ["10.0.0.8"]}
    await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "follow names"])
    assert found.resolved == {"app_1": "10.0.0.6", "app_2": "10.0.0.8"}
    assert bench.names.asked.count(NAME) == 1


async def test_a_subscriber_that_fails_does_not_end_the_lookups(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.names.answers = {NAME: ["10.0.0.6"]}
    found = await bench.start()

    def fail(_: object) -> None:
        raise RuntimeError("a fault")

    found._on_change = fail
    bench.names.answers[NAME] = ["10.0.0.7"]
    await until(lambda: "RuntimeError: a fault" in caplog.text)
    await bench.some_rounds()
    assert found.resolved == {"app_1": "10.0.0.7"}


@pytest.mark.parametrize(("end", "expected_s"), [(0, 0.09), (1, 0.11)])
async def test_the_pause_varies_by_a_tenth(monkeypatch: pytest.MonkeyPatch, end: int, expected_s: float) -> None:
    names = Names()
    names.answers = {NAME: ["10.0.0.6"]}
    found = Resolver(
        {"app_1": Address(NAME, 8001)}, 0.1, lambda _: None, lookup=names.look_up, uniform=lambda *ends: ends[end]
    )
    paused = []
    real = asyncio.sleep

    async def sleep(delay_s: float) -> None:
        if delay_s:
            paused.append(delay_s)
        await real(delay_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await found.start()
    async with asyncio.timeout(DEADLINE_S):
        while not paused:
            await real(0.005)
    await found.stop()
    assert paused[0] == pytest.approx(expected_s)


async def test_stop_ends_lookups_that_are_under_way(bench: Bench) -> None:
    bench.names.answers = {NAME: ["10.0.0.6"]}
    found = await bench.start()
    bench.names.silent = {NAME}
    await until(lambda: bench.names.open)
    await found.stop()
    assert bench.names.open == 0
    asked = len(bench.names.asked)
    await asyncio.sleep(0.1)
    assert len(bench.names.asked) == asked


# The lookup itself


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the system answer once the gate is open."""
    event = threading.Event()

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        assert event.wait(DEADLINE_S)
        if host == "no.internal":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if host == "odd.internal":
            raise UnicodeError("label too long")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.6", 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return event


async def ended(*names: str) -> None:
    threads = {f"look up {name}" for name in names}
    await until(lambda: not threads & {one.name for one in threading.enumerate()})


async def test_signals_are_left_to_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[int]] = []

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        held.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await look_up(NAME) == []
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2} <= held[0]


async def test_the_answer_of_the_system_keeps_its_order(gate: threading.Event) -> None:
    gate.set()
    assert await look_up(NAME) == ["fd00::1", "10.0.0.6"]


@pytest.mark.parametrize(("name", "reason"), [("no.internal", "not known"), ("odd.internal", "label too long")])
async def test_what_the_system_does_not_find_is_an_error(gate: threading.Event, name: str, reason: str) -> None:
    gate.set()
    with pytest.raises(OSError, match=reason):
        await look_up(name)


async def test_silent_lookups_take_no_thread_of_the_loop(gate: threading.Event) -> None:
    """Far more of them than the loop has threads; the control is the lookup of the loop itself, which takes them."""
    loop = asyncio.get_running_loop()
    names = [f"app-{one}.internal" for one in range(100)]
    waiting = asyncio.gather(*(look_up(name) for name in names))
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.to_thread(int)
    assert not waiting.done()

    blocked = asyncio.gather(*(loop.getaddrinfo(name, 80) for name in names))
    free = asyncio.gather(asyncio.to_thread(int))
    await asyncio.wait([free], timeout=0.2)
    assert not free.done()
    gate.set()
    await asyncio.gather(waiting, blocked, free)


async def test_an_answer_that_comes_too_late_is_no_fault(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await look_up(NAME)
    gate.set()
    await ended(NAME)
    await asyncio.sleep(0)  # what the thread left for the loop, which logs what fails there
    assert caplog.records == []


def test_an_answer_after_the_end_of_the_loop_is_no_fault(gate: threading.Event) -> None:
    async def ask() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await look_up(NAME)

    asyncio.run(ask())
    gate.set()
    asyncio.run(ended(NAME))


async def test_localhost_is_found_by_the_system() -> None:
    assert set(await look_up("localhost")) <= {"127.0.0.1", "::1"}


async def test_a_resolver_asks_the_system_by_default(gate: threading.Event) -> None:
    gate.set()
    found = Resolver({"a": Address(NAME, 8001)}, None, lambda _: None)
    await found.start()
    assert found.resolved == {"a": "fd00::1"}
    await found.stop()
