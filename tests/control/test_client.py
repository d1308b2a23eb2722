"""What a command says of a proxy that answers, refuses, is not there, or goes away in the middle."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from stickyproxy.control import client
from stickyproxy.control.client import ControlClient, ControlError, ControlLost, ControlUnreachable
from stickyproxy.control.runtime import bind_private
from stickyproxy.errors import UsageError

DEADLINE_S = 30
Run = Callable[[Coroutine[Any, Any, None]], None]
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path() -> Iterator[Path]:
    """Give a short path: that of a Unix socket has at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="sp-"))
    yield directory / "s"
    shutil.rmtree(directory)


@asynccontextmanager
async def serving(path: Path, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[None]:
    """Serve all paths on a Unix socket."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.SockSite(runner, bind_private(path)).start()
    try:
        yield
    finally:
        await runner.cleanup()
        path.unlink()  # noqa: ASYNC240 -- at once, and only a test waits


@asynccontextmanager
async def talking(path: Path, talk: Talk) -> AsyncIterator[None]:
    """Serve connections by hand; each is closed when `talk` returns."""

    async def on_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(on_connected, sock=bind_private(path))
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 -- as above


async def answer_echo(request: web.Request) -> web.Response:
    body = await request.text()
    facts = {"method": request.method, "path": request.path_qs, "host": request.host, "body": body}
    return web.json_response({**facts, "type": request.content_type if body else None})


# Calls


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_calls_and_their_answers(path: Path, run: Run) -> None:
    async def call() -> None:
        async with serving(path, answer_echo), ControlClient(path) as control:
            told = {"method": "GET", "path": "/api/v1/state?all=1", "host": "localhost", "body": "", "type": None}
            assert await control.get("/api/v1/state?all=1") == told
            told = {"method": "POST", "path": "/a", "host": "localhost", "body": '{"b": 1}', "type": "application/json"}
            assert await control.post("/a", {"b": 1}) == told
            assert (await control.post("/a"))["body"] == "{}"
            assert (await control.put("/a", [1]))["method"] == "PUT"

    run(call())


async def test_what_is_no_json_is_text(path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="{broken", content_type=request.query["type"])

    async with serving(path, answer), ControlClient(path) as control:
        assert await control.get("/?type=text/plain") == "{broken"
        assert await control.get("/?type=application/json") == "{broken"


@pytest.mark.parametrize(
    ("status", "body", "kind", "expected"),
    [
        (409, '{"error": "an upgrade is under way"}', "application/json", "an upgrade is under way"),
        (422, '{"error": "a\\nb", "more": 1}', "application/json", "a\nb"),
        (400, '{"error": 1}', "application/json", "the proxy answered with status 400"),
        (400, "[" * 100_000, "application/json", "[" * 500),
        (404, "not\n here\n", "text/plain", "not here"),
        (500, "", "text/plain", "the proxy answered with status 500"),
        (302, "", "text/plain", "the proxy answered with status 302"),
    ],
)
async def test_an_error_has_the_word_of_the_proxy(path: Path, status: int, body: str, kind: str, expected: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        headers = {"Location": "/elsewhere"} if status == 302 else None
        return web.Response(status=status, text=body, content_type=kind, headers=headers)

    async with serving(path, answer), ControlClient(path) as control:
        with pytest.raises(ControlError) as caught:
            await control.post("/upgrade")
    assert not isinstance(caught.value, ControlLost)
    assert str(caught.value) == expected
    assert caught.value.status == status
    if status == 422:
        assert caught.value.answer == json.loads(body)


# Nobody there


async def test_without_a_proxy(path: Path) -> None:
    async with ControlClient(path) as control:
        with pytest.raises(UsageError) as caught:
            await control.get("/")
        assert str(caught.value) == f"no proxy listens at {path}"
        bind_private(path).close()
        with pytest.raises(ControlUnreachable, match=f"no proxy listens at {path}"):
            await control.get("/")


async def test_a_path_that_cannot_be_connected_to(path: Path) -> None:
    async with ControlClient(path.with_name("s" * 120)) as control:
        with pytest.raises(ControlUnreachable, match=r"cannot reach the proxy at .*: af_unix path too long"):
            await control.get("/")


async def test_a_client_is_used_within_its_context(path: Path) -> None:
    control = ControlClient(path)
    with pytest.raises(RuntimeError, match="within"):
        await control.get("/")


# Going away


@pytest.mark.parametrize("method", ["get", "post"])
@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"],
    ids=["nothing", "a part of the head", "a part of the body"],
)
async def test_a_connection_that_is_cut_is_told_from_an_error(path: Path, method: str, answer: bytes) -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async with talking(path, talk), ControlClient(path) as control:
        with pytest.raises(ControlLost, match=rf"the proxy at {path} closed the connection before it answered"):
            await getattr(control, method)("/")
    if method == "post":
        assert connections == 1  # an upgrade must not be asked for twice


async def test_one_that_is_reset_is_lost_too(path: Path) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()  # with the request unread, which the kernel tells by a reset

    async with talking(path, talk), ControlClient(path) as control:
        with pytest.raises(ControlLost):
            await control.post("/", "x" * 1_000_000)


async def test_what_is_no_http_is_no_proxy(path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.example ESMTP\r\n")

    async with talking(path, talk), ControlClient(path) as control:
        with pytest.raises(ControlError, match=rf"what listens at {path} is no proxy") as caught:
            await control.get("/")
    assert not isinstance(caught.value, ControlLost)


async def test_one_that_is_silent_is_given_up(path: Path) -> None:
    with bind_private(path):
        async with ControlClient(path) as control:
            with pytest.raises(ControlError, match=rf"the proxy at {path} did not answer within 0\.05 s") as caught:
                await control.get("/", timeout_s=0.05)
    assert not isinstance(caught.value, ControlLost)
    assert caught.value.status is None


async def test_each_call_has_its_own_connection(path: Path) -> None:
    """A connection that was kept would make the first call after a re-execution fail."""
    seen = set()

    async def answer(request: web.Request) -> web.Response:
        seen.add(id(request.transport))
        kept.append(request.transport)
        return web.json_response(request.keep_alive)

    kept: list[object] = []  # so that no id comes twice
    async with serving(path, answer), ControlClient(path) as control:
        for _ in range(3):
            await control.get("/")
    assert len(seen) == 3


# Waiting


def skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of the loop jump over the deadline."""
    loop = asyncio.get_running_loop()
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + DEADLINE_S)


def in_s(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def json_answer(status: str, body: object) -> bytes:
    text = json.dumps(body)
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()


async def test_a_wait_goes_on_while_the_proxy_is_away(path: Path) -> None:
    """Nobody listens, connections are cut, it is not ready yet, then it is, and at last it says what is waited for."""
    seen: list[str] = []
    heads = [b"", json_answer("503 Soon", {"error": "starts"}), json_answer("200 OK", 1), json_answer("200 OK", 2)]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readuntil(b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        seen.append(line.decode())
        writer.write(heads[len(seen) - 1])

    async with ControlClient(path) as control:
        waiting = asyncio.gather(control.wait_for("/api/v1/state", lambda state: bool(state == 2), in_s(DEADLINE_S)))
        await asyncio.sleep(0.05)  # for the first look, at which nobody listens
        assert not waiting.done()
        async with talking(path, talk):
            assert (await waiting)[0] == 2
    assert seen == ["GET /api/v1/state HTTP/1.1\r\n"] * 4


async def test_a_wait_ends_at_once_with_an_error_that_will_not_go_away(path: Path) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"error": "there is no /x"}, status=404)

    async with serving(path, answer), ControlClient(path) as control:
        with pytest.raises(ControlError, match="there is no /x") as caught:
            await control.wait_for("/x", bool, in_s(1e6))
    assert caught.value.status == 404


async def test_a_wait_in_vain_says_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def let_time_pass(_: object) -> bool:
        skip(monkeypatch)
        return False

    async with ControlClient(path) as control:
        with pytest.raises(ControlError, match=f"waited for the proxy in vain: no proxy listens at {path}"):
            await control.wait_for("/", bool, in_s(0.1))
        async with serving(path, answer_echo):
            with pytest.raises(ControlError, match="waited for the proxy in vain: it is not there yet"):
                await control.wait_for("/", let_time_pass, in_s(DEADLINE_S))
        with pytest.raises(ControlError, match="in vain: there was no time"):
            await control.wait_for("/", bool, in_s(-1))
        with bind_private(path), pytest.raises(ControlError, match=r"in vain: the proxy at .* did not answer within"):
            await control.wait_for("/", bool, in_s(0.1))


async def test_an_answer_that_the_deadline_cuts_short_does_not_hide_the_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call is answered with an error, the second not at all."""
    answered = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        await reader.readuntil(b"\r\n\r\n")
        answered += 1
        if answered == 1:
            writer.write(json_answer("503 Soon", {"error": "it starts"}))
        else:
            skip(monkeypatch)
            await reader.read()

    async with talking(path, talk), ControlClient(path) as control:
        with pytest.raises(ControlError, match="in vain: it starts"):
            await control.wait_for("/", bool, in_s(9))
    assert answered == 2


# Watching


async def test_each_answer_is_seen_once(path: Path) -> None:
    """Also that of a proxy which was away for a while."""
    numbers = iter(range(1, 6))
    seen: list[int] = []

    def is_enough(answer: int) -> bool:
        seen.append(answer)
        return answer == 5

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        number = next(numbers)
        away = {2: b"", 3: json_answer("503 Soon", {"error": "starts"})}
        writer.write(away.get(number, json_answer("200 OK", number)))

    async with talking(path, talk), ControlClient(path) as control:
        assert await control.watch("/", is_enough, 0) == 5
    assert seen == [1, 4, 5]


async def test_a_first_look_at_nobody_is_the_last_one(path: Path) -> None:
    async with ControlClient(path) as control:
        with pytest.raises(ControlUnreachable, match=f"no proxy listens at {path}"):
            await control.watch("/", bool, 0)


async def test_a_proxy_that_stays_away_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_AWAY_S", 0.1)
    async with ControlClient(path) as control:
        async with serving(path, answer_echo):
            looking = asyncio.Event()

            def is_enough(_: object) -> bool:
                looking.set()
                return False

            watching = asyncio.gather(control.watch("/", is_enough, 0), return_exceptions=True)
            await looking.wait()
        [error] = await watching
    assert isinstance(error, ControlError)
    assert str(error) == f"waited for the proxy in vain: no proxy listens at {path}"


async def test_what_is_no_more_ends_a_watch_at_once(path: Path) -> None:
    answers = [web.json_response(1), web.json_response({"error": "g1-1 has ended"}, status=404)]

    async def answer(_: web.Request) -> web.Response:
        return answers.pop(0)

    async with serving(path, answer), ControlClient(path) as control:
        with pytest.raises(ControlError, match="g1-1 has ended") as caught:
            await control.watch("/", lambda _: False, 0)
    assert caught.value.status == 404
