"""A burst of new connections, which must not starve the tunnels that are open."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from typing import TYPE_CHECKING

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve

from tests.helpers.certificates import Authority
from tests.helpers.processes import Children, StickyProxy, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from websockets.asyncio.server import ServerConnection

CONNECTIONS = 600
# Connects all at once, over TLS where there is an authority, asks one thing each and says when all have their answer.
BURST = """
import asyncio, ssl, sys
count, port, authority = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
async def one(context):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET /none HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 426 ")
    writer.close()
async def main():
    context = ssl.create_default_context(cafile=authority) if authority else None
    print("go", flush=True)
    await asyncio.gather(*(one(context) for _ in range(count)))
    print("done", flush=True)
asyncio.run(main())
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    async def answer(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
async def test_a_tunnel_goes_on_while_hundreds_connect(
    children: Children, echo: str, tmp_path: Path, *, is_tls: bool
) -> None:
    authority, port = Authority(tmp_path), free_port()
    listener = {"address": f"127.0.0.1:{port}", "tls": {"certificates": [authority.issue("127.0.0.1").section]}}
    plain = {"address": f"127.0.0.1:{free_port()}"}
    proxy = StickyProxy(children, {"app": echo}, more={"listeners": [listener, plain], "health": {"probe": False}})
    arguments = [str(CONNECTIONS), str(port), str(authority.file)] if is_tls else [str(CONNECTIONS),
                 plain["address"].rpartition(":")[2], ""]  # fmt: skip
    async with connect(f"ws://{plain['address']}/") as tunnel:
        await tunnel.send("first")
        assert await tunnel.recv() == "first"
        burst = await asyncio.create_subprocess_exec(sys.executable, "-c", BURST, *arguments, stdout=PIPE)
        assert burst.stdout is not None
        assert await burst.stdout.readline() == b"go\n"
        echoes = 0
        while burst.returncode is None:
            await tunnel.send(f"{echoes}")
            assert await tunnel.recv() == f"{echoes}"
            echoes += 1
        assert await burst.stdout.read() == b"done\n"
        assert await burst.wait() == 0
    on_time = proxy.metric("event_loop_lag_seconds_bucket", process="worker", le="0.25")
    looks = proxy.metric("event_loop_lag_seconds_count", process="worker")
    print(f"{echoes} echoes while {CONNECTIONS} connected; late by 0.25 s at most: {on_time:g}/{looks:g}")
    assert echoes >= CONNECTIONS / 10
