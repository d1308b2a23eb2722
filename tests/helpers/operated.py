"""A proxy that is operated while clients hold connections: apps in the test's own loop, commands, and trees of code.

What a proxy does with its clients' connections is seen from both ends: by raw clients, and by apps that wait for the
test before they answer.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from typing_extensions import override

from tests.helpers.metrics import samples_of, total
from tests.helpers.plain_client import PlainClient, ask
from tests.helpers.proc import session_of, workers_of
from tests.helpers.processes import HTTP, WAIT_TIMEOUT_S, Children
from tests.helpers.serving import REPOSITORY, Serving
from tests.helpers.supervised import DEADLINE_S, SECRET, App, Tunnel, until

_COMMAND_S = 150.0
_LOOK_S = 0.1


class GatedApp(App):
    """An app that waits for the test. `ids` counts what came by `X-Id`, `forwarded` holds the last X-Forwarded-For.

    `/hold` is answered when `gate` is set, `/events` sends what `emit` is given until that is None, `/ws` echoes, a
    body is answered with its length and its digest, and everything else with the name of the app.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.gate = self.released
        self.ids: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()  # requests under way, by path
        self.forwarded = ""
        self._events: list[asyncio.Queue[bytes | None]] = []

    @override
    def stop(self) -> None:
        """Refuse connections, and end those that are open."""
        self.crash()

    def emit(self, data: bytes | None) -> None:
        """Send an event to all that listen to events; None ends their responses."""
        for queue in self._events:
            queue.put_nowait(data)

    @override
    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        path = head.split(" ")[1]
        pairs = [line.partition(": ") for line in head.split("\r\n")[1:]]
        fields = {name.lower(): value for name, _, value in pairs}
        if "x-id" in fields:
            self.ids[fields["x-id"]] += 1
        self.forwarded = fields.get("x-forwarded-for", self.forwarded)
        self.waiting[path] += 1
        try:
            return await self._respond(path, fields, reader, writer)
        finally:
            self.waiting[path] -= 1

    async def _respond(
        self, path: str, fields: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        if path == "/ws":
            await self.switch(reader, writer)
            return False
        if path == "/events":
            await self._send_events(writer)
            return True
        body = self.name.encode()
        if "content-length" in fields:
            received = await reader.readexactly(int(fields["content-length"]))
            body = describe_body(received)
        if path == "/hold":
            await self.gate.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return True

    async def _send_events(self, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._events.append(queue)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (data := await queue.get()) is not None:
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")


async def until_so(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds that takes a while to look at; raise TimeoutError after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(_LOOK_S)


def describe_body(body: bytes) -> bytes:
    """Return what an app says of a body that it received."""
    return f"{len(body)} {hashlib.sha256(body).hexdigest()}".encode()


class Tree:
    """A copy of the package that a test changes: what an installation finds there is another version.

    The text that is put in has another length, so that no compiled file is taken for the changed one's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(REPOSITORY / "stickyproxy", root / "stickyproxy")

    def _path(self, name: str) -> Path:
        return self.root / "stickyproxy" / name

    def replace(self, name: str, old: str, new: str) -> None:
        """Put `new` in place of `old`, which the file must hold exactly once."""
        text = self._path(name).read_text()
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        self._path(name).write_text(text.replace(old, new))

    def add(self, name: str, text: str) -> None:
        """Add text to the end of a file."""
        with self._path(name).open("a") as file:
            file.write(text)

    def mend(self, name: str) -> None:
        """Put a file back to what it was copied from."""
        shutil.copy2(REPOSITORY / "stickyproxy" / name, self._path(name))

    def keep_connections(self) -> None:
        """Let no worker even out its connections, so that each keeps those that it has."""
        self.replace("control/balance.py", "LOOK_S: Final = 1.0", "LOOK_S: Final = 3600.0")

    def name_version(self, version: str) -> None:
        """Let the package be of another version."""
        self._path("__init__.py").write_text(f'"""Another version of stickyproxy."""\n\n__version__ = "{version}"\n')


class Proxy:
    """A `stickyproxy serve` with sockets for commands and for hand-over, run from a tree of code."""

    def __init__(self, serving: Serving, directory: Path, root: Path, name: str) -> None:
        self._serving = serving
        self._root = root
        self.child = serving.child
        self.port = serving.port
        self.control, self.hand_over = directory / f"{name}.c", directory / f"{name}.h"
        self.file = serving.home.parent / f"{name}.yaml"
        self.access_log = serving.home.parent / f"{name}.access.log"
        self._clients: list[PlainClient] = []

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        return self.child.pid

    @property
    def log(self) -> str:
        """Everything that it has printed so far."""
        return self._serving.log

    @property
    def workers(self) -> set[int]:
        """The process ids of all its workers."""
        return workers_of(self.pid)

    @property
    def processes(self) -> set[int]:
        """The process ids of everything that it has left, itself included."""
        return session_of(self.pid)

    async def serving(self) -> Self:
        """Wait until it accepts clients."""
        await asyncio.to_thread(self._serving.wait_until_serving)
        return self

    async def logged(self, text: str) -> None:
        """Wait until it has printed a text."""
        await asyncio.to_thread(self._serving.wait_for_log, text)

    async def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `stickyproxy WORDS --control PATH` to its end."""
        arguments = [sys.executable, "-m", "stickyproxy", *words, "--control", str(self.control)]
        return await asyncio.to_thread(
            subprocess.run,
            arguments,
            env={**os.environ, "PYTHONPATH": str(self._root)},
            cwd=self._serving.home,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )

    async def upgrade(self) -> str:
        """Upgrade, and return what the command says, which must succeed."""
        before = self.pid
        done = await self.command("upgrade")
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.log}"
        assert self.child.is_running()
        assert self.child.pid == before
        return done.stdout

    async def fail_to_upgrade(self) -> str:
        """Ask for an upgrade that must fail, and return the reason."""
        done = await self.command("upgrade")
        assert (done.returncode, done.stdout) == (1, ""), f"{done.stdout}{done.stderr}{self.log}"
        return done.stderr

    async def replaced(self, before: set[int]) -> None:
        """Wait until none of some processes is left."""
        await until(lambda: not before & self.processes, f"{before} are gone")

    async def get(self, path: str) -> str:
        """Return what the admin listener answers."""

        def read() -> str:
            with HTTP.open(f"http://127.0.0.1:{self._serving.admin_port}{path}", timeout=WAIT_TIMEOUT_S) as response:
                return str(response.read().decode())

        return await asyncio.to_thread(read)

    async def set_state(self, upstream_id: str, state: str) -> None:
        """Set what the operator wants of an upstream, over the control socket."""
        path, body = f"/api/v1/clusters/default/upstreams/{upstream_id}/state", json.dumps({"state": state})
        async with await PlainClient.connect(str(self.control)) as client:
            client._writer.write(
                f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert (await client.receive()).status == 200

    async def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return all samples of the metrics, by name and labels."""
        return {
            (sample.name.removeprefix("stickyproxy_"), tuple(sorted(sample.labels.items()))): sample.value
            for sample in samples_of(await self.get("/metrics"))
        }

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a name that have these labels; 0 if there is none."""
        return total(await self.get("/metrics"), name, **labels)

    async def until_metric(self, name: str, value: float, **labels: str) -> None:
        """Wait for a metric's value: what a client has received whole may be counted an instant later."""

        async def is_so() -> bool:
            return await self.metric(name, **labels) == value

        await until_so(is_so)

    async def connect(self, where: int | str | None = None, context: ssl.SSLContext | None = None) -> PlainClient:
        """Connect, over TLS where a context is given, until `leave` is called; to the first port, or elsewhere."""
        if isinstance(where, str):
            client = await PlainClient.connect(where)
        else:
            async with asyncio.timeout(DEADLINE_S):
                name = None if context is None else "localhost"
                streams = await asyncio.open_connection(
                    "127.0.0.1", where or self.port, ssl=context, server_hostname=name
                )
            client = PlainClient(*streams)
        self._clients.append(client)
        return client

    def leave(self) -> None:
        """End all connections that were made."""
        for client in self._clients:
            client._writer.transport.abort()
        self._clients.clear()

    async def open_tunnel(self, cookie: str | None = None) -> Tunnel:
        """Open a tunnel over a connection of its own."""
        return await Tunnel.open(await self.connect(), cookie)

    async def ask(self, path: str = "/", *, cookie: str | None = None) -> tuple[int, bytes]:
        """Ask over a connection of its own; return status and body."""
        answer = await ask(self.port, path, fields={} if cookie is None else {"Cookie": cookie})
        return answer.status, answer.body

    async def stop(self) -> None:
        """Stop it as an operator does, without clients; it must end in order and leave nothing."""
        self.leave()
        os.kill(self.pid, signal.SIGTERM)
        assert await asyncio.to_thread(self.child.wait, DEADLINE_S) == 0, self.log
        await until(lambda: not self.processes, "no process of it is left")
        assert "Traceback" not in self.log, self.log

    @override
    def __repr__(self) -> str:
        return repr(self.child)


def _first_port(listeners: Sequence[Any]) -> int:
    first = listeners[0]
    return int((first if isinstance(first, str) else first["address"]).rpartition(":")[2])


class Stage:
    """Everything that one test runs: apps, proxies, and a directory whose path is short enough for sockets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.apps: list[GatedApp] = []
        self._proxies: list[Proxy] = []
        self._children = Children(directory)
        self._short = tempfile.TemporaryDirectory(prefix="sp-")
        self.short = Path(self._short.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for app in self.apps:
            app.stop()
        for proxy in self._proxies:
            proxy.leave()
        await asyncio.sleep(0)  # for the transports to close
        await asyncio.to_thread(self._children.__exit__, None, None, None)
        for proxy in self._proxies:  # of the sessions that these processes led, nobody else's
            for one in proxy.processes:
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
        self._short.cleanup()

    def reports(self) -> Iterator[tuple[str, str]]:
        """Give what to show of each process when a test has failed: title and text."""
        yield from self._children.reports()

    async def app(self, name: str = "app") -> GatedApp:
        """Start an app."""
        app = await GatedApp(name).start()
        self.apps.append(app)
        return app

    def tree(self, name: str = "tree") -> Tree:
        """Return a copy of the package."""
        return Tree(self.directory / name)

    def begin(
        self, *apps: GatedApp, name: str = "proxy", tree: Tree | None = None, options: Sequence[str] = (), **more: Any
    ) -> Proxy:
        """Start a proxy in front of apps, of two workers; `more` are sections of its file."""
        root = REPOSITORY if tree is None else tree.root
        sections: dict[str, Any] = {
            "upstreams": [app.upstream for app in apps],
            "workers": 2,
            "grace": "30s",
            "affinity": {"secrets": [SECRET]},
            "control": str(self.short / f"{name}.c"),
            "hand_over": str(self.short / f"{name}.h"),
            "access_log": {"path": str(self.directory / f"{name}.access.log")},
        }
        serving = Serving(
            self._children, {**sections, **more}, name=name, options=options, env={"PYTHONPATH": str(root)}
        )
        proxy = Proxy(serving, self.short, root, name)
        if "listeners" in more:
            proxy.port = _first_port(more["listeners"])
        self._proxies.append(proxy)
        return proxy

    async def serve(self, *apps: GatedApp, **more: Any) -> Proxy:
        """Start a proxy as `begin` does, and wait until it serves."""
        return await self.begin(*apps, **more).serving()
