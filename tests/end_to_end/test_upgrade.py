"""An upgrade of a running proxy: nobody who is connected notices, and what goes wrong leaves the old version in place.

Another version is a copy of the package that the test changes, and that the proxy finds in place of its own.
"""

import asyncio
import hashlib
import json
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.operations.tree import workers_of
from tests.helpers.certificates import Authority
from tests.helpers.operated import DEADLINE_S, GatedApp, Proxy, Stage, Tree, describe_body, open_tunnel, until
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.processes import free_port
from tests.helpers.supervised import Tunnel

UPGRADES = 3
BODY = bytes(range(256)) * 400


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(tmp_path) as stage:
        yield stage


async def whole(client: PlainClient, size: int) -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        return await client._reader.readexactly(size)


async def until_waiting(app: GatedApp, path: str, count: int = 1) -> None:
    await until(lambda: app.waiting[path] == count, f"{count} requests for {path} are under way")


async def tell(proxy: Proxy, upstream_id: str, state: str) -> None:
    """Set an admin state over the control socket."""
    path, body = f"/api/v1/clusters/default/upstreams/{upstream_id}/state", json.dumps({"state": state})
    async with await PlainClient.connect(str(proxy.control)) as client:
        client._writer.write(
            f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert (await client.receive()).status == 200


async def upstreams_of(proxy: Proxy) -> dict[str, dict[str, Any]]:
    [cluster] = json.loads(await proxy.get("/api/v1/state"))["clusters"]
    return {one["id"]: one for one in cluster["upstreams"]}


# Nobody notices


async def test_whoever_is_connected_stays_connected(stage: Stage) -> None:
    """Same process, other workers; tunnels and idle connections go on, and nobody is refused meanwhile."""
    app = await stage.app()
    proxy = await stage.serve(app)
    refused: list[Exception] = []
    answered = 0
    is_over = False

    async def connect_again_and_again() -> None:
        nonlocal answered
        while not is_over:
            try:
                assert (await proxy.ask())[0] == 200
                answered += 1
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is a client that noticed
                refused.append(error)

    kept = [await proxy.connect() for _ in range(6)]
    cookies = [(await client.ask("/")).cookie for client in kept]
    tunnels = [await open_tunnel(await proxy.connect(), cookie) for cookie in cookies]
    connecting = asyncio.get_running_loop().create_task(connect_again_and_again())
    for _ in range(UPGRADES):
        before = proxy.workers
        said = await proxy.upgrade()
        assert said.startswith("upgraded from version 0.1.0 to 0.1.0: 6 tunnels and "), said
        await proxy.replaced(before)
        await until(lambda: len(proxy.workers) == 2, "there are two workers")
        for client in kept:
            answer = await client.ask("/")
            assert (answer.status, answer.body) == (200, b"app")
        for tunnel in tunnels:
            await tunnel.echo()
    is_over = True
    await connecting
    assert refused == []
    assert answered
    for client in (*kept, *(tunnel.client for tunnel in tunnels)):
        client._writer.close()
    await proxy.stop()


async def test_what_is_known_and_counted_goes_on(stage: Stage) -> None:
    """Admin states, health, sessions; and no counter ever falls."""
    app, drained = await stage.app("app"), await stage.app("drained")
    gone = {"id": "gone", "url": f"http://127.0.0.1:{free_port()}"}
    proxy = await stage.serve(
        app, drained, upstreams=[app.upstream, drained.upstream, gone], health={"probe": {"interval": "1s"}}
    )
    for _ in range(5):
        async with await proxy.connect() as client:
            cookie = (await client.ask("/")).cookie
            assert (await proxy.ask(cookie=cookie))[0] == 200
    tunnel = await open_tunnel(await proxy.connect(), cookie)
    await tell(proxy, "drained", "drain")
    await until_state(proxy, "gone", health="unhealthy")
    await until_metric(proxy, "sessions_active", 5)
    known = await upstreams_of(proxy)
    assert known["drained"]["admin_state"] == "drain"
    sessions = {name: one["sessions"] for name, one in known.items()}
    assert sum(sessions.values()) == 5
    for number in range(1, UPGRADES + 1):
        before = await proxy.samples()
        old = proxy.workers
        await proxy.upgrade()
        for _ in range(3):  # at once, and when the old workers are gone
            now = await upstreams_of(proxy)
            assert {name: one["sessions"] for name, one in now.items()} == sessions
            assert {name: (one["admin_state"], one["health"], one["is_refused"]) for name, one in now.items()} == {
                name: (one["admin_state"], one["health"], one["is_refused"]) for name, one in known.items()
            }
            after = await proxy.samples()
            fallen = {
                name: (value, after.get(name))
                for name, value in before.items()
                if name[0].endswith(("_total", "_count", "_sum", "_bucket"))
                and not name[0].startswith(("python_", "process_"))
                and not dict(name[1]).get("process") == "supervisor"
                and after.get(name, 0.0) < value
            }
            assert fallen == {}
            before = after
            await proxy.replaced(old)
        assert await proxy.metric("exchanges_total", status_class="2xx") == 10
        assert await proxy.metric("upgrades_total", outcome="ok") == number
        assert await proxy.metric("tunnels_open") == 1
    tunnel.client._writer.close()
    await until_metric(proxy, "tunnels_open", 0)
    assert await proxy.metric("tunnel_duration_seconds_count") == 1
    assert await proxy.metric("worker_restarts_total") == 0


async def until_state(proxy: Proxy, upstream_id: str, **wanted: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while wanted.items() - (await upstreams_of(proxy))[upstream_id].items():
            await asyncio.sleep(0.1)


async def until_metric(proxy: Proxy, name: str, value: float) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await proxy.metric(name) != value:
            await asyncio.sleep(0.1)


async def test_an_exchange_under_way_ends_well_and_then_its_connection_moves(stage: Stage) -> None:
    """A slow answer, half an upload, events, half a head."""
    app = await stage.app()
    proxy = await stage.serve(app)
    slow, upload, events, partial = [await proxy.connect() for _ in range(4)]
    slow.send("/hold", fields={"X-Id": "slow"})
    head = f"POST /upload HTTP/1.1\r\nHost: localhost\r\nX-Id: upload\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    upload._writer.write(head + BODY[: len(BODY) // 2])
    events.send("/events", fields={"X-Id": "events"})
    await until_waiting(app, "/hold")
    await until_waiting(app, "/upload")
    assert (await events.receive_head())[0] == 200
    app.emit(b"data: 1\n\n")
    assert await whole(events, 14) == b"9\r\ndata: 1\n\n\r\n"
    partial._writer.write(b"GET / HTTP/1.1\r\nHost: loc")
    before = proxy.workers
    said = await proxy.upgrade()
    assert "3 in an exchange cannot, and have 30 s to end in the old workers" in said, said
    partial._writer.write(b"alhost\r\nX-Id: partial\r\n\r\n")
    assert (await partial.receive()).body == b"app"
    app.emit(b"data: 2\n\n")
    assert await whole(events, 14) == b"9\r\ndata: 2\n\n\r\n"
    upload._writer.write(BODY[len(BODY) // 2 :])
    assert (await upload.receive()).body == describe_body(BODY)
    app.gate.set()
    assert (await slow.receive()).body == b"app"
    app.emit(None)
    assert (await whole(events, 5)) == b"0\r\n\r\n"
    await proxy.replaced(before)
    for client in (slow, upload, events, partial):
        assert (await client.ask("/", fields={"X-Id": "again"})).status == 200
    assert app.ids == {"slow": 1, "upload": 1, "events": 1, "partial": 1, "again": 4}
    assert await proxy.metric("exchanges_total", status_class="2xx") == 8
    for client in (slow, upload, events, partial):
        client._writer.close()
    await proxy.stop()
