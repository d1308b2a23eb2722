"""A supervisor in the test's own event loop, with worker processes as `serve` starts them, and apps behind them."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import yaml

from stickyproxy.config import Address, ConfigSource, Loaded
from stickyproxy.control.supervisor import Supervisor
from tests.helpers.metrics import total
from tests.helpers.plain_client import PlainClient, ask
from tests.helpers.proc import read_stat

DEADLINE_S = 60.0
SECRET = "0123456789abcdef0123456789abcdef"
_CLOSE = 0x88
HANDSHAKE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Wait until a condition holds; raise AssertionError with `what` after the deadline."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 -- the condition may lie in another process
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"after {DEADLINE_S:g} s still not: {what}") from None


async def close_server(server: asyncio.Server) -> None:
    """Close a server and wait until its connections have ended, those whose handshake failed too.

    Python 3.11 waits for connections only where the wait began before the server was closed.
    """

    async def close() -> None:
        server.close()

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(server.wait_closed(), close())


def is_running(process_id: int) -> bool:
    """Say whether a process lives; one that has ended and that nobody has waited for does not."""
    stat = read_stat(process_id)
    return stat is not None and not stat.has_ended


def write_sections(sections: Mapping[str, Any]) -> str:
    """Return a file that listens on any free port and needs no state directory, with sections of one's own."""
    basis = {
        "listeners": ["127.0.0.1:0"],
        "upstreams": ["http://127.0.0.1:9"],
        "admin": False,
        "affinity": {"secrets": [SECRET]},
        "workers": 1,
        "control": False,
    }
    return yaml.safe_dump({**basis, **sections}, sort_keys=False)


def load(**sections: Any) -> Loaded:
    """Return such a configuration, of no file."""
    return Loaded.of_text(ConfigSource(), write_sections(sections), {})


class File:
    """A configuration file that a supervisor is started from, and that a test writes again."""

    def __init__(self, path: Path, **sections: Any) -> None:
        self.path = path
        self.sections = sections
        self.write()

    def write(self, **sections: Any) -> None:
        """Write the file with other sections; those that are not named stay as they were."""
        self.sections |= sections
        self.path.write_text(write_sections(self.sections))

    def load(self) -> Loaded:
        """Read the file."""
        return Loaded.read(ConfigSource(path=self.path), os.environ)


class App:
    """An upstream that names itself. It answers `/hold` when it is released, and echoes on `/ws` after a 101."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.heads: list[str] = []
        self.released = asyncio.Event()
        self.has_request = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def upstream(self) -> dict[str, Any]:
        """The app as an upstream of a file."""
        return {"id": self.name, "url": self.url}

    async def start(self) -> Self:
        """Begin to listen, at the same port as before if it did."""
        self._server = await asyncio.start_server(self.serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def stop(self) -> None:
        """Refuse connections, and answer what is held."""
        self.released.set()
        if self._server is not None:
            self._server.close()

    def crash(self) -> None:
        """End as a killed process does."""
        App.stop(self)
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self._writers.add(writer)
        try:
            while await self.answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Take one request and answer it; False where none can follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        self.has_request.set()
        if head.startswith("GET /ws "):
            await self.switch(reader, writer)
            return False
        if head.startswith("GET /hold "):
            await self.released.wait()
        body = self.name.encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return True

    async def switch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Open a tunnel and echo until it ends."""
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"X-App: " + self.name.encode() + b"\r\n\r\n"
        )
        await _echo(reader, writer)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back the frames that come, all of them short and masked, unmasked; the Close frame is the last."""
    opcode = 0
    while opcode != _CLOSE:
        opcode, size = await reader.readexactly(2)
        mask, masked = await reader.readexactly(4), await reader.readexactly(size & 0x7F)
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked))
        writer.write(bytes((opcode, len(payload))) + payload)


class Tunnel:
    """A tunnel of a client, opened through the proxy."""

    def __init__(self, client: PlainClient, fields: Mapping[str, str]) -> None:
        self.client = client
        self.app = fields["x-app"]
        self._sent = 0

    @classmethod
    async def open(cls, client: PlainClient, cookie: str | None = None) -> Self:
        """Make a tunnel of a connection."""
        client.send("/ws", fields=HANDSHAKE | ({} if cookie is None else {"Cookie": cookie}))
        async with asyncio.timeout(DEADLINE_S):
            status, fields = await client.receive_head()
        assert status == 101
        return cls(client, fields)

    async def echo(self) -> None:
        """Send a masked text message and take it back."""
        self._sent += 1
        text = f"{self._sent:04}".encode()
        self.client._writer.write(b"\x81\x84\x00\x00\x00\x00" + text)
        async with asyncio.timeout(DEADLINE_S):
            assert await self.client._reader.readexactly(2 + len(text)) == b"\x81\x04" + text

    async def receive_close(self) -> int:
        """Wait for a Close frame, and return its code."""
        async with asyncio.timeout(DEADLINE_S):
            first, size = await self.client._reader.readexactly(2)
            assert first == _CLOSE
            return int.from_bytes((await self.client._reader.readexactly(size))[:2], "big")


async def open_tunnel(port: int, cookie: str | None = None) -> Tunnel:
    """Open a tunnel; whoever does must close its client."""
    return await Tunnel.open(await PlainClient.connect(port), cookie)


@asynccontextmanager
async def running(loaded: Loaded) -> AsyncIterator[Supervisor]:
    """Run a supervisor until it is ready; stop it in the end, unless the test did, and see that its workers ended."""
    supervisor = Supervisor(loaded)
    is_ready = asyncio.Event()
    level = logging.getLogger().level
    process_ids: list[int] = []
    task = asyncio.get_running_loop().create_task(supervisor.run(lambda _: is_ready.set()))
    ready = asyncio.get_running_loop().create_task(is_ready.wait())
    try:
        await asyncio.wait((task, ready), timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        assert is_ready.is_set()
        yield supervisor
        process_ids = [link.process_id for link in supervisor.fleet]
        supervisor.stop()
        async with asyncio.timeout(DEADLINE_S):
            await task
    finally:
        for one in (task, ready):
            one.cancel()
        await asyncio.gather(task, ready, return_exceptions=True)
        logging.getLogger().setLevel(level)
    assert [one for one in process_ids if is_running(one)] == []


def port_of(supervisor: Supervisor) -> int:
    """Return the port of the first listener."""
    return supervisor.addresses[0].port


def pids(supervisor: Supervisor) -> list[int]:
    """Return the process ids of the workers that serve."""
    return [link.process_id for link in supervisor.fleet.links]


def kill(process_id: int) -> None:
    """End a process of one's own at once."""
    os.kill(process_id, signal.SIGKILL)


async def read_admin(address: Address, path: str, token: str | None = None) -> tuple[int, bytes]:
    """Ask an admin listener; return the status and the body."""
    fields = {} if token is None else {"Authorization": f"Bearer {token}"}
    answer = await ask(address.path or address.port, path, fields=fields)
    return answer.status, answer.body


async def read_state(address: Address) -> dict[str, dict[str, Any]]:
    """Return what the state API says of each upstream, by id."""
    _, body = await read_admin(address, "/api/v1/state")
    [cluster] = json.loads(body)["clusters"]
    return {one["id"]: one for one in cluster["upstreams"]}


async def read_metric(address: Address, name: str, **labels: str) -> float:
    """Return the sum of the samples of `stickyproxy_<name>` that have these labels; 0 if there is none."""
    _, body = await read_admin(address, "/metrics")
    return total(body.decode(), name, **labels)
