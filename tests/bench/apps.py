"""The application behind every target, on two ports, as two upstreams: nginx with files, or an echo of WebSockets.

Both cost as little as possible, because they share a core with the load. Run as a program, this is the echo:
`python -m tests.bench.apps SIZE PORT...`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import sys
from typing import TYPE_CHECKING, Final, cast

import uvloop
from typing_extensions import override

from tests.bench.frames import write_frame

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.bench.scenarios import Scenario

BACKLOG: Final = 4096  # all connections of a scenario may come at once
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_KEY: Final = re.compile(rb"^sec-websocket-key:[ \t]*(\S+)", re.IGNORECASE | re.MULTILINE)

# Shared with the nginx under test. Its own directories for temporary files, so that it runs under any user.
NGINX_BASE = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {directory}/{name}.pid;
error_log stderr error;
events {{ worker_connections {files}; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  client_body_temp_path {directory}/{name}-body;
  proxy_temp_path {directory}/{name}-proxy;
  fastcgi_temp_path {directory}/{name}-fastcgi;
  uwsgi_temp_path {directory}/{name}-uwsgi;
  scgi_temp_path {directory}/{name}-scgi;
{rest}
}}
"""
NGINX_FILES: Final = 16000


def file_server_config(directory: Path, ports: Sequence[int]) -> str:
    """Return the configuration of an nginx that serves `<directory>/www` on `ports`."""
    listen = "\n".join(f"    listen 127.0.0.1:{port} backlog={BACKLOG};" for port in ports)
    rest = f"  keepalive_timeout 600s;\n  sendfile on;\n  server {{\n{listen}\n    root {directory}/www;\n  }}"
    return NGINX_BASE.format(directory=directory, name="application", files=NGINX_FILES, rest=rest)


def application_command(scenario: Scenario, nginx: str, directory: Path, ports: Sequence[int]) -> list[str]:
    """Write what the application of a scenario needs below `directory`, and return the command that starts it."""
    if scenario.is_websocket:
        return [sys.executable, "-m", "tests.bench.apps", str(scenario.size_bytes), *map(str, ports)]
    files = directory / "www"
    files.mkdir(exist_ok=True)
    (files / str(scenario.size_bytes)).write_bytes(b"x" * scenario.size_bytes)
    config = directory / "application.conf"
    config.write_text(file_server_config(directory, ports))
    return [nginx, "-e", "stderr", "-c", str(config)]


class Echo(asyncio.Protocol):
    """Answers each message of one size with one of the same size, and every plain request with `ok`."""

    __slots__ = ("_answer", "_is_open", "_received_bytes", "_size_bytes", "_transport")

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = len(write_frame(size_bytes, is_masked=True))
        self._answer = write_frame(size_bytes, is_masked=False)
        self._is_open = False
        self._received_bytes = 0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        if not self._is_open:
            self._answer_head(data)
            return
        self._received_bytes += len(data)
        whole, self._received_bytes = divmod(self._received_bytes, self._size_bytes)
        if whole:
            self._transport.write(self._answer * whole)

    def _answer_head(self, head: bytes) -> None:
        key = _KEY.search(head)
        if key is None:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            return
        digest = hashlib.sha1(key[1] + _GUID, usedforsecurity=False).digest()
        self._transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        self._is_open = True


async def serve(size_bytes: int, ports: Sequence[int]) -> None:
    """Echo on each port until the process is ended."""
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(lambda: Echo(size_bytes), "127.0.0.1", port, backlog=BACKLOG)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
