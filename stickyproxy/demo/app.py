"""The demo's app: one process that keeps its visitors' sessions in memory, as the stateful frameworks do.

It stands behind the proxy, knows nothing of it, and fails as those frameworks fail: a WebSocket that brings the id of
a session which lives in another process is refused with 403. The page that it serves makes that visible.

    python -m stickyproxy.demo.app --port 8001 --name alpha
"""

import argparse
import asyncio
import json
import logging
import os
import secrets
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypedDict

from aiohttp import WSCloseCode, WSMsgType, web

from stickyproxy.tasks import spawn

log: Final = logging.getLogger("stickyproxy.demo")

ADMIN_ENV: Final = "STICKYPROXY_DEMO_ADMIN"
"""The environment variable with the URL of the proxy's admin listener, for the page's link to the metrics."""

LISTENING: Final = "listening on "
"""How the line starts that this process prints once it accepts connections; the launcher waits for it."""

SESSIONS_MAX: Final = 10_000
"""Sessions kept in one process; then the one unused for longest goes. A probe of `/` makes one each time it asks, and
at about 300 bytes each this stays below 4 MiB (NiceGUI and Streamlit end idle ones by time instead)."""

MESSAGE_MAX_BYTES: Final = 4096
"""Longest message of a visitor; the page stops at 500 characters, of up to 4 bytes each in UTF-8."""

TOKEN_DELAY_S: Final = 0.045
"""Pause after each word of an answer: about 20 words a second, the pace of a language model."""

CLOSE_TIMEOUT_S: Final = 1.0
"""How long a page may take to answer our Close frame; the launcher kills what has not ended after 3 s."""

_BOOT: Final = "__BOOT__"
_ANSWERS: Final = (
    (
        "I am {name}, process {pid}. You said “{text}”, and I count it as message {count} of this session. "
        "That number lives in my memory and nowhere else."
    ),
    (
        "Message {count}, and still {name}: the proxy pinned this browser to me, so every request of yours arrives "
        "here. Another process would not know you."
    ),
    (
        "“{text}” is message {count}. Stop {name} while I am talking and see: this sentence breaks off, the page "
        "finds another process within a second, and its counter starts at zero."
    ),
)


class Process(TypedDict):
    """One process of the demo as the page shows it; `pid` is None while it does not run."""

    name: str
    pid: int | None


@dataclass(slots=True)
class Session:
    """What this process knows of one page."""

    id: str
    count: int = 0


@dataclass(slots=True)
class Sessions:
    """The sessions of this process, the one used last at the end; at most `SESSIONS_MAX`."""

    _by_id: OrderedDict[str, Session] = field(default_factory=OrderedDict)

    def create(self) -> Session:
        """Make a session, and forget the one unused for longest where there are too many."""
        session = Session(secrets.token_urlsafe(12))
        self._by_id[session.id] = session
        if len(self._by_id) > SESSIONS_MAX:
            self._by_id.popitem(last=False)
        return session

    def find(self, session_id: str) -> Session | None:
        """Return the session with this id, or None where this process does not know it."""
        session = self._by_id.get(session_id)
        if session is not None:
            self._by_id.move_to_end(session_id)
        return session


class DemoApp:
    """The handlers of one process, and all that it remembers.

    `stop` is called to end the process in good order, `crash` to end it at once.
    """

    def __init__(
        self,
        name: str,
        *,
        admin_url: str | None = None,
        stop: Callable[[], None],
        crash: Callable[[], None],
        token_delay_s: float = TOKEN_DELAY_S,
    ) -> None:
        self.name = name
        self.sessions = Sessions()
        self.processes: list[Process] = [{"name": name, "pid": os.getpid()}]
        self._admin_url = admin_url
        self._stop = stop
        self._crash = crash
        self._token_delay_s = token_delay_s
        self._chats: dict[web.WebSocketResponse, asyncio.Task[None]] = {}
        self._page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    def application(self) -> web.Application:
        """Return the aiohttp application with the routes of the demo."""
        app = web.Application(client_max_size=MESSAGE_MAX_BYTES)
        app.router.add_get("/", self.on_page)
        app.router.add_get("/healthz", self.on_healthz)
        app.router.add_post("/session", self.on_session)
        app.router.add_get("/ws", self.on_websocket)
        app.router.add_post("/stop", self.on_stop)
        app.router.add_post("/crash", self.on_crash)
        return app

    async def on_page(self, _: web.Request) -> web.Response:
        """Answer with the page, and make the session that it belongs to."""
        facts = self._facts(self.sessions.create(), resumed=False)
        page = self._page.replace(_BOOT, json.dumps(facts).replace("<", "\\u003c"))
        return web.Response(text=page, content_type="text/html", headers={"Cache-Control": "no-store"})

    async def on_healthz(self, _: web.Request) -> web.Response:
        """Answer that this process runs, and which one it is."""
        return web.json_response({"status": "ok", "name": self.name, "pid": os.getpid()})

    async def on_session(self, request: web.Request) -> web.Response:
        """Answer a page that lost its socket: the session `?resume=ID` if it lives here, otherwise a new one."""
        known = self.sessions.find(request.query.get("resume", ""))
        facts = self._facts(known or self.sessions.create(), resumed=known is not None)
        return web.json_response(facts, headers={"Cache-Control": "no-store"})

    async def on_websocket(self, request: web.Request) -> web.StreamResponse:
        """Hold the chat of one page; 403 before the upgrade where the session is not of this process."""
        session = self.sessions.find(request.query.get("session", ""))
        if session is None:
            raise web.HTTPForbidden(text=f"{self.name} does not know this session\n")
        socket = web.WebSocketResponse(timeout=CLOSE_TIMEOUT_S, max_msg_size=MESSAGE_MAX_BYTES)
        await socket.prepare(request)
        chat = spawn(self._chat(socket, session), name=f"chat {session.id}")
        self._chats[socket] = chat
        try:
            await asyncio.wait({chat})
        finally:
            chat.cancel()
            del self._chats[socket]
        return socket

    async def on_stop(self, request: web.Request) -> web.StreamResponse:
        """End this process in good order, once the answer is written."""
        _refuse_other_sites(request)
        response = web.json_response({"name": self.name, "pid": os.getpid()}, headers={"Connection": "close"})
        await response.prepare(request)
        await response.write_eof()
        self._stop()
        return response

    async def on_crash(self, request: web.Request) -> web.Response:
        """End this process at once: no answer, no Close frame, as when the kernel kills it for lack of memory."""
        _refuse_other_sites(request)
        self._crash()
        return web.Response(status=500, text="still here\n")

    async def show(self, processes: list[Process]) -> None:
        """Tell every open page which processes of the demo run now."""
        self.processes = processes
        message = json.dumps({"type": "processes", "processes": processes})
        for socket in list(self._chats):
            with suppress(ConnectionResetError):
                await socket.send_str(message)

    async def end_chats(self) -> None:
        """Close every WebSocket with 1012, and wait up to `CLOSE_TIMEOUT_S` until each page has closed its side too.

        Call it before aiohttp's own shutdown, which stops reading: the answer of the page would never arrive.
        """
        chats = list(self._chats.values())
        for chat in chats:
            chat.cancel()
        await asyncio.gather(*chats, return_exceptions=True)

    def _facts(self, session: Session, *, resumed: bool) -> dict[str, Any]:
        return {
            "name": self.name,
            "pid": os.getpid(),
            "session": session.id,
            "count": session.count,
            "resumed": resumed,
            "admin": self._admin_url,
        }

    async def _chat(self, socket: web.WebSocketResponse, session: Session) -> None:
        try:
            await socket.send_json({"type": "hello", **self._facts(session, resumed=True)})
            await socket.send_json({"type": "processes", "processes": self.processes})
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await self._answer(socket, session, message.data)
        except ConnectionResetError:
            log.debug("a page went away in the middle of an answer")
        except asyncio.CancelledError:
            await socket.close(code=WSCloseCode.SERVICE_RESTART, message=b"app restarts")
            raise

    async def _answer(self, socket: web.WebSocketResponse, session: Session, text: str) -> None:
        session.count += 1
        await socket.send_json({"type": "count", "count": session.count})
        template = _ANSWERS[(session.count - 1) % len(_ANSWERS)]
        for token in _tokens(template.format(name=self.name, pid=os.getpid(), text=text, count=session.count)):
            await socket.send_json({"type": "token", "token": token})
            await asyncio.sleep(self._token_delay_s)
        await socket.send_json({"type": "end"})


def _refuse_other_sites(request: web.Request) -> None:
    """Raise 403 where a browser says that another site's page sent this: it must not end our processes."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        raise web.HTTPForbidden(text="this must come from the demo's own page\n")


def _tokens(text: str) -> Iterator[str]:
    """Cut an answer into words, each with the space after it."""
    for word in text.split(" "):
        yield word + " "


async def serve(name: str, port: int | None, uds: Path | None, *, follow_stdin: bool) -> None:
    """Serve until SIGTERM, SIGINT or `POST /stop`; then close each WebSocket with 1012 and return.

    Exactly one of `port` (on 127.0.0.1) and `uds` (path of a Unix socket) says where. With `follow_stdin`, standard
    input brings the list of the demo's processes, one JSON array a line, and its end stops this process too: whatever
    ends the launcher, no app outlives it.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    demo = DemoApp(name, admin_url=os.environ.get(ADMIN_ENV), stop=stopping.set, crash=_kill_self)
    runner = web.AppRunner(demo.application(), access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S)
    await runner.setup()
    # SO_REUSEPORT, because the launcher holds the port (bound, not listening) while this process is away.
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_port=True) if uds is None else web.UnixSite(runner, uds)
    await site.start()
    log.info("%s%s", LISTENING, site.name)
    if follow_stdin:
        spawn(_follow(_lines_of_stdin(), demo, stopping), name="launcher")
    await stopping.wait()
    log.info("stopping")
    await site.stop()
    await demo.end_chats()
    await runner.cleanup()


async def _follow(lines: AsyncIterator[bytes], demo: DemoApp, stopping: asyncio.Event) -> None:
    async for line in lines:
        await demo.show(json.loads(line))
    stopping.set()


async def _lines_of_stdin() -> AsyncIterator[bytes]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        yield line


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> None:
    """Run one app process from the command line."""
    parser = argparse.ArgumentParser(prog="python -m stickyproxy.demo.app", description="One app of stickyproxy's demo")
    parser.add_argument("--name", default="alpha", help="what the page calls this process")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="port on 127.0.0.1; 0 takes a free one")
    where.add_argument("--uds", type=Path, help="path of a Unix socket")
    parser.add_argument("--follow-stdin", action="store_true", help="stop when standard input ends")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    asyncio.run(serve(options.name, options.port, options.uds, follow_stdin=options.follow_stdin))


if __name__ == "__main__":
    main()
