"""Keys of a running proxy: what one worker has learned all know, over reload, upgrade and the death of workers."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.operated import Proxy, Stage
from tests.helpers.plain_client import ask
from tests.helpers.supervised import until

IDS = 12
KEY = {"name": "id", "mode": "learn", "query": "id", "learn": [{"header": "X-Id"}]}
AFFINITY = {"cookie": False, "policy": "round_robin", "keys": [KEY]}


class Maker:
    """An app that makes an id when it is asked for one, and says its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> dict[str, str]:
        """Listen; return what the configuration says of it."""
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return {"id": self.name, "url": f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"}

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                target = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                made = f"X-Id: {target[5:]}\r\n" if target.startswith("/new/") else ""
                head = f"HTTP/1.1 200 OK\r\n{made}Content-Length: {len(self.name)}\r\n\r\n"
                writer.write(f"{head}{self.name}".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            self._writers.discard(writer)

    def stop(self) -> None:
        """End all."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(tmp_path) as stage:
        yield stage


@pytest.fixture
async def upstreams() -> AsyncIterator[list[dict[str, str]]]:
    makers = [Maker(name) for name in ("a", "b", "c")]
    yield [await maker.start() for maker in makers]
    for maker in makers:
        maker.stop()


async def learn(proxy: Proxy) -> dict[str, str]:
    """Let the apps make ids; return which has made which."""
    return {f"n{number}": (await ask(proxy.port, f"/new/n{number}")).body.decode() for number in range(IDS)}


async def places(proxy: Proxy) -> dict[str, str]:
    """Return where the ids lead, each time from new connections; fail where two disagree."""
    found: dict[str, str] = {}
    for _ in range(4):
        for number in range(IDS):
            where = (await ask(proxy.port, f"/?id=n{number}")).body.decode()
            assert found.setdefault(f"n{number}", where) == where
    return found


async def test_what_was_learned_is_known_to_all_workers_over_everything(
    stage: Stage, upstreams: list[dict[str, str]]
) -> None:
    proxy = await stage.serve(upstreams=upstreams, affinity=AFFINITY, workers=2)
    made = await learn(proxy)
    assert set(made.values()) == {"a", "b", "c"}
    assert await places(proxy) == made
    # A reload, with one key more.
    raw = yaml.safe_load(proxy.file.read_text())
    raw["affinity"]["keys"].append({"name": "other", "mode": "hash", "query": "other"})
    proxy.file.write_text(yaml.safe_dump(raw))
    done = await proxy.command("reload")
    assert done.returncode == 0, done.stderr
    assert await places(proxy) == made
    # The death of both workers.
    before = proxy.workers
    for process_id in before:
        os.kill(process_id, signal.SIGKILL)
    await until(lambda: len(proxy.workers) == 2 and not proxy.workers & before, "both are replaced")
    assert await places(proxy) == made
    # An upgrade.
    before = proxy.workers
    await proxy.upgrade()
    await proxy.replaced(before)
    assert await places(proxy) == made
    assert await proxy.metric("keys") == IDS
    assert await proxy.metric("keys_learned_total") == IDS
    assert await proxy.metric("keys_evicted_total") == 0
    assert await proxy.metric("key_conflicts_total") == 0
    await proxy.stop()


async def test_control_without_the_key_they_go_anywhere(stage: Stage, upstreams: list[dict[str, str]]) -> None:
    proxy = await stage.serve(upstreams=upstreams, affinity={**AFFINITY, "keys": []}, workers=2)
    await learn(proxy)
    assert {(await ask(proxy.port, "/?id=n1")).body for _ in range(12)} == {b"a", b"b", b"c"}
