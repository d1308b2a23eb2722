"""When an app process is ready: not before it answers well, and never after it has ended."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.config import Address
from stickyproxy.config.run import Ready
from stickyproxy.control.probe import Connecting
from stickyproxy.control.runner import readiness
from stickyproxy.control.runner.readiness import NotReadyError, wait_until_ready
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.tasks import spawn
from tests.helpers.loops import on_uvloop, open_descriptors
from tests.helpers.processes import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

DEADLINE_S = 30


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- nothing tells
            await asyncio.sleep(0.005)


class App:
    """Answers each connection with the next of its answers, the last one from then on; None: not at all."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.heads: list[bytes] = []
        self.address = Address("127.0.0.1", free_port())
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        if self.address.is_unix:
            self._server = await asyncio.start_unix_server(self._serve, self.address.path)
        else:
            self._server = await asyncio.start_server(self._serve, self.address.host, self.address.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self.answers:
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                if answer is None:
                    await reader.read()
                else:
                    writer.write(answer)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


@pytest.fixture
async def app() -> AsyncIterator[App]:
    app = App()
    yield app
    await app.stop()


@pytest.fixture
async def ended() -> asyncio.Future[str]:
    return asyncio.get_running_loop().create_future()


def answer(status: int) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status


def ready(**settings: Any) -> Ready:
    return Ready.model_validate({"timeout": "1h", **settings})


async def reason_of(app: App, settings: Ready, ended: asyncio.Future[str]) -> str:
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(NotReadyError) as error:
            await wait_until_ready(Endpoint(app.address), settings, ended)
    assert str(error.value) == error.value.reason
    return error.value.reason


async def check_it_waits(app: App, settings: Ready, ended: asyncio.Future[str]) -> None:
    """Check that it waits while nobody listens, and returns when the app does."""
    waiting = spawn(wait_until_ready(Endpoint(app.address), settings, ended), "wait")
    done, _ = await asyncio.wait((waiting,), timeout=0.3)
    assert not done
    await app.start()
    async with asyncio.timeout(DEADLINE_S):
        await waiting
    assert not ended.done()


async def test_it_waits_until_a_port_is_listened_at(app: App, ended: asyncio.Future[str]) -> None:
    await check_it_waits(app, ready(), ended)


async def test_it_waits_until_a_socket_is_listened_at(app: App, ended: asyncio.Future[str], tmp_path: Path) -> None:
    app.address = Address(path=str(tmp_path / "app.sock"))
    with socket.socket(socket.AF_UNIX) as bound:  # the file is there, and refuses
        bound.bind(app.address.path)
        assert "connection refused" in await reason_of(app, ready(timeout="100ms"), ended)
    await check_it_waits(app, ready(), ended)


@pytest.mark.parametrize("is_unix", [False, True])
async def test_it_waits_until_the_path_is_answered_well(
    app: App, ended: asyncio.Future[str], tmp_path: Path, *, is_unix: bool
) -> None:
    if is_unix:
        app.address = Address(path=str(tmp_path / "app.sock"))
    app.answers = [answer(503), b"", b"nonsense\r\n\r\n", answer(404), answer(302), answer(500)]
    await check_it_waits(app, ready(path="/ready?x=%20"), ended)
    assert app.connections == 5
    assert all(head.startswith(b"GET /ready?x=%20 HTTP/1.1\r\n") for head in app.heads)


async def test_the_expected_statuses_are_those_of_the_file(app: App, ended: asyncio.Future[str]) -> None:
    app.answers = [answer(200), answer(403), answer(500)]
    await check_it_waits(app, ready(path="/", expect=[204, "401-403"]), ended)
    assert app.connections == 2


async def test_it_runs_on_the_loop_of_production() -> None:
    @on_uvloop
    async def scenario() -> None:
        ended = asyncio.get_running_loop().create_future()
        for settings in (ready(), ready(path="/")):
            app = App(answer(200))
            await check_it_waits(app, settings, ended)
            await app.stop()

    await asyncio.to_thread(scenario)


# What does not get ready


async def test_the_timeout_says_what_was_seen_last(app: App, ended: asyncio.Future[str]) -> None:
    for path in (None, "/"):
        reason = await reason_of(app, ready(path=path, timeout="300ms"), ended)
        assert reason == "no good answer within 0.3 s (connection refused)"
    app.answers = [answer(503)]
    await app.start()
    assert await reason_of(app, ready(path="/", timeout="1s"), ended) == "no good answer within 1 s (status 503)"
    app.answers = [None]
    reason = await reason_of(app, ready(path="/", timeout="300ms"), ended)
    assert reason == "no good answer within 0.3 s (it has not answered yet)"
    app.address = Address(path="/nowhere/app.sock")
    reason = await reason_of(app, ready(timeout="300ms"), ended)
    assert reason == "no good answer within 0.3 s (no such file or directory)"
    assert not ended.done()


async def test_it_does_not_wait_for_one_that_has_ended(app: App, ended: asyncio.Future[str]) -> None:
    asyncio.get_running_loop().call_later(0.05, ended.set_result, "exit status 3")
    assert await reason_of(app, ready(), ended) == "it ended: exit status 3"


async def test_one_that_has_ended_is_not_ready_though_another_answers(app: App, ended: asyncio.Future[str]) -> None:
    await app.start()
    await wait_until_ready(Endpoint(app.address), ready(), ended)  # the control
    ended.set_result("killed by SIGKILL")
    assert await reason_of(app, ready(), ended) == "it ended: killed by SIGKILL"


async def test_one_that_nobody_looks_after_is_not_ready(app: App, ended: asyncio.Future[str]) -> None:
    ended.cancel()
    assert "nobody looks after it" in await reason_of(app, ready(), ended)
    failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    failed.set_exception(OSError("lost"))
    assert await reason_of(app, ready(), failed) == "it ended: lost"


async def test_an_answer_that_never_comes_is_asked_for_once_more(
    app: App, ended: asyncio.Future[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "_TRY_S", 0.3)
    app.answers = [None, answer(200)]
    await app.start()
    async with asyncio.timeout(DEADLINE_S):
        await wait_until_ready(Endpoint(app.address), ready(path="/"), ended)
    assert app.connections == 2
    app.answers = [None]
    reason = await reason_of(app, ready(path="/", timeout="1s"), ended)
    assert reason == "no good answer within 1 s (no answer within 0.3 s)"


async def test_a_crash_of_the_probe_is_no_readiness(
    app: App, ended: asyncio.Future[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def crash(_: object) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(Connecting, "probe", crash)
    assert await reason_of(app, ready(), ended) == "the probe crashed: ZeroDivisionError('x')"
    assert "crashed" in caplog.text


@pytest.mark.parametrize("path", [None, "/"])
async def test_whoever_is_cancelled_leaves_nothing_open(app: App, ended: asyncio.Future[str], path: str | None) -> None:
    app.answers = [None]
    if path is not None:
        await app.start()
    before = open_descriptors()
    waiting = spawn(wait_until_ready(Endpoint(app.address), ready(path=path), ended), "wait")
    await (until(lambda: app.connections) if path is not None else asyncio.sleep(0))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    # The app's own end of the connection is among them, and the task that serves it.
    await until(lambda: open_descriptors() == before and len(asyncio.all_tasks()) == 1)
    assert not ended.cancelled()
