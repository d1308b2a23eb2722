"""How a proxy stops: in good order at the first signal, at once at the second."""

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.helpers.counting import CountingApps
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.processes import Children, wait_until
from tests.helpers.serving import Serving

DEADLINE_S = 60.0
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
def apps(children: Children) -> CountingApps:
    return CountingApps(children, "alpha")


def serve(children: Children, apps: CountingApps, **configuration: Any) -> Serving:
    upstreams = [{"id": name, "url": url} for name, url in apps.upstreams.items()]
    proxy = Serving(children, {"upstreams": upstreams, **configuration})
    wait_until(lambda: proxy.ready_status() == 200, "the proxy is ready")
    return proxy


async def begin_to_stop(proxy: Serving, number: signal.Signals = signal.SIGTERM) -> None:
    """Send the signal, and return when the proxy accepts no client any more."""
    proxy.child.send(number)
    await asyncio.to_thread(wait_until, lambda: proxy.ready_status() == 503, "/readyz says that it stops")
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with suppress(ConnectionResetError):
                try:
                    async with await PlainClient.connect(proxy.port) as late:
                        assert await late.receive_end() == b""
                except ConnectionRefusedError:
                    return


async def open_tunnel(proxy: Serving, path: str) -> ClientConnection:
    return await connect(f"ws://127.0.0.1:{proxy.port}{path}", proxy=None, open_timeout=DEADLINE_S)


async def receive_close(tunnel: ClientConnection, question: str | None = None) -> int | None:
    """Return the code of the Close frame that comes next, even where an app would have answered the question."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            if question is not None:
                await tunnel.send(question)
            answer = await tunnel.recv()
        except ConnectionClosed as error:
            return error.rcvd.code if error.rcvd is not None else None
    raise AssertionError(f"the tunnel is open: {answer!r}")


async def wait_for_end(proxy: Serving) -> int:
    return await asyncio.to_thread(proxy.child.wait, DEADLINE_S)


@SIGNALS
async def test_what_is_open_ends_well_before_the_proxy_does(
    children: Children, apps: CountingApps, number: signal.Signals
) -> None:
    proxy = serve(children, apps)
    async with (
        await PlainClient.connect(proxy.port) as answered,
        await PlainClient.connect(proxy.port) as streaming,
        await PlainClient.connect(proxy.port) as idle,
        await PlainClient.connect(proxy.port) as silent,
        await open_tunnel(proxy, "/ws") as tunnel,
    ):
        assert (await idle.ask("/count")).status == 200
        await tunnel.send("hello")
        assert str(await tunnel.recv()).endswith("hello")
        answered.send("/hold/gate", method="POST", fields={"X-Id": "answered"})
        streaming.send("/stream/gate", fields={"X-Id": "streaming"})
        head = await streaming.receive_head()
        await asyncio.to_thread(apps.wait_until_held, "alpha", "gate", 2)

        await begin_to_stop(proxy, number)
        assert await idle.receive_end() == b""
        assert await silent.receive_end() == b""
        assert await receive_close(tunnel) == 1001
        assert proxy.child.is_running()

        await asyncio.to_thread(apps.release, "alpha", "gate")
        answer = await answered.receive()
        assert (answer.status, answer.fields["connection"]) == (200, "close")
        assert json.loads(answer.body)["name"] == "alpha"
        assert head[0] == 200
        rest = await streaming.receive_end()
        assert rest.replace(b"\r\n", b"").endswith(b"second half0")
        assert await answered.receive_end() == b""
        assert await wait_for_end(proxy) == 0
    assert "Traceback" not in proxy.log
    assert " and 1 tunnels are open" in proxy.log
    assert apps.received()["POST", "answered"] == 1


async def test_under_load_every_request_that_reached_the_app_is_answered(
    children: Children, apps: CountingApps
) -> None:
    proxy = serve(children, apps)
    answered: set[str] = set()
    broken: set[str] = set()
    is_busy = asyncio.Event()

    async def load(number: int) -> None:
        with suppress(ConnectionError):
            while True:
                async with await PlainClient.connect(proxy.port) as client:
                    for request in range(1000):
                        request_id = f"{number}-{len(answered)}-{request}"
                        try:
                            answer = await client.ask("/count", method="POST", fields={"X-Id": request_id})
                        except AbortedError:
                            broken.add(request_id)
                            break
                        assert answer.status == 200
                        answered.add(request_id)
                        if len(answered) > 1000:
                            is_busy.set()
                        if answer.fields.get("connection") == "close":
                            break

    async with asyncio.timeout(DEADLINE_S):
        clients = [asyncio.get_running_loop().create_task(load(number)) for number in range(32)]
        await is_busy.wait()
        proxy.child.send(signal.SIGTERM)
        await asyncio.gather(*clients)
    assert await wait_for_end(proxy) == 0
    received = apps.received()
    print(f"answered {len(answered)}, closed before they were read {len(broken)}")
    assert {request_id for _, request_id in received} == answered
    assert set(received.values()) == {1}


@SIGNALS
async def test_the_second_signal_stops_at_once(children: Children, apps: CountingApps, number: signal.Signals) -> None:
    log = children.directory / "access.log"
    proxy = serve(children, apps, grace="1h", access_log={"format": "json", "path": str(log)})
    async with await PlainClient.connect(proxy.port) as client:
        client.send("/hold/gate", method="POST", fields={"X-Id": "held"})
        await asyncio.to_thread(apps.wait_until_held, "alpha", "gate")
        await begin_to_stop(proxy, number)
        assert proxy.child.is_running()
        proxy.child.send(number)
        assert await wait_for_end(proxy) == 0
        with pytest.raises(AbortedError):
            await client.receive()
    assert "Traceback" not in proxy.log
    [line] = [json.loads(line) for line in log.read_text().splitlines()]
    assert (line["target"], line["upstream"]) == ("/hold/gate", "alpha")


async def test_what_does_not_end_within_the_grace_is_cut(children: Children, apps: CountingApps) -> None:
    proxy = serve(children, apps, grace="1s")
    async with await PlainClient.connect(proxy.port) as client:
        client.send("/stream/gate")
        await client.receive_head()
        await begin_to_stop(proxy)
        assert await wait_for_end(proxy) == 0
        assert not (await client.receive_end()).endswith(b"0\r\n\r\n")
    assert "the grace period is over: 0 tunnels and 1 connections are cut" in proxy.log


async def test_a_tunnel_that_opens_while_the_proxy_stops_is_closed_too(children: Children, apps: CountingApps) -> None:
    proxy = serve(children, apps, grace="1h")
    opening = asyncio.get_running_loop().create_task(open_tunnel(proxy, "/hold-ws/gate"))
    await asyncio.to_thread(apps.wait_until_held, "alpha", "gate")
    await begin_to_stop(proxy)
    await asyncio.to_thread(apps.release, "alpha", "gate")
    async with await opening as tunnel:
        assert await receive_close(tunnel, "still there?") == 1001
    assert await wait_for_end(proxy) == 0


async def test_the_socket_of_a_proxy_that_takes_over_is_left_alone(children: Children, apps: CountingApps) -> None:
    """The next proxy may listen on a Unix socket as soon as the one before has stopped listening there."""
    file = children.directory / "proxy.sock"
    path = str(file)
    upstreams = list(apps.upstreams.values())
    old = Serving(children, {"listeners": [f"unix:{path}"], "upstreams": upstreams}, name="old")
    await asyncio.to_thread(old.wait_until_serving)
    async with await PlainClient.connect(path) as client:
        client.send("/hold/gate")
        await asyncio.to_thread(apps.wait_until_held, "alpha", "gate")
        old.child.send(signal.SIGTERM)
        await asyncio.to_thread(wait_until, lambda: not file.exists(), "the old proxy has left its socket")
        new = Serving(children, {"listeners": [f"unix:{path}"], "upstreams": upstreams}, name="new")
        await asyncio.to_thread(new.wait_until_serving)
        await asyncio.to_thread(apps.release, "alpha", "gate")
        assert (await client.receive()).status == 200
    assert await wait_for_end(old) == 0
    async with await PlainClient.connect(path) as client:
        assert (await client.ask("/count")).status == 200
    new.child.send(signal.SIGTERM)
    assert await wait_for_end(new) == 0
    assert not file.exists()
