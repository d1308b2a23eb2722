"""An app for `run` to start, in plain Python: it counts in memory, echoes, and misbehaves as it is asked to.

    python run_app.py (--port N | --socket PATH) --version-file FILE [--fault FAULT]

`/` answers with a JSON object: its process id, upstream id, version (what the file held when it started) and how many
requests came with the same `X-Visitor`. `/ws` echoes after a 101, `/hold` answers after as many seconds as its
query says, `/grow` takes as many MiB of memory, and `/exit` ends the process. Where the version is "broken" it ends at
once, "late" dies one second after the first connection, "silent" never listens. Faults: `deaf` ignores SIGTERM,
`children` starts a child that ignores SIGTERM too, `elsewhere` listens on a port of its own choice.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--port", type=int)
PARSER.add_argument("--socket")
PARSER.add_argument("--version-file", type=Path)
PARSER.add_argument("--fault", default="")
CLOSE = 0x88


class App:
    """One process of the app."""

    def __init__(self, version: str) -> None:
        self._facts = {"pid": os.getpid(), "id": os.environ.get("STICKYPROXY_UPSTREAM"), "version": version}
        self._counts = Counter[str]()
        self._ballast: list[bytearray] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        if self._facts["version"] == "late":
            asyncio.get_running_loop().call_later(1.0, os._exit, 9)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                target = head.split(" ", 2)[1]
                if target.startswith("/ws"):
                    await self._echo(reader, writer)
                    return
                await self._answer(target, head, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, target: str, head: str, writer: asyncio.StreamWriter) -> None:
        path, _, query = target.partition("?")
        if path == "/hold":
            await asyncio.sleep(float(query))
        elif path == "/grow":
            self._ballast.append(bytearray(os.urandom(1 << 20) * int(query)))
        elif path == "/exit":
            os._exit(int(query or 3))
        visitor = head.partition("\r\nX-Visitor: ")[2].partition("\r\n")[0]
        self._counts[visitor] += 1
        body = json.dumps({**self._facts, "count": self._counts[visitor]}).encode()
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await writer.drain()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send back short masked frames, unmasked; the Close frame is the last."""
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-App: "
            + str(self._facts["id"]).encode()
            + b"\r\n\r\n"
        )
        opcode = 0
        while opcode != CLOSE:
            opcode, size = await reader.readexactly(2)
            mask, masked = await reader.readexactly(4), await reader.readexactly(size & 0x7F)
            payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked))
            writer.write(bytes((opcode, len(payload))) + payload)


async def main() -> None:
    """Serve until SIGTERM."""
    options = PARSER.parse_args()
    version = options.version_file.read_text().strip() if options.version_file else ""
    print(f"starting {version}", flush=True)
    if version == "broken":
        print("this version cannot start", file=sys.stderr)
        sys.exit(7)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if options.fault == "deaf" else ended.set)
    if options.fault == "children":
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
        subprocess.Popen([sys.executable, "-c", code, *sys.argv[1:]])  # noqa: ASYNC220 -- it starts but once
    app = App(version)
    if version == "silent":
        await ended.wait()
        return
    if options.socket:
        await asyncio.start_unix_server(app.serve, options.socket)
    else:
        port = 0 if options.fault == "elsewhere" else options.port or int(os.environ["PORT"])
        await asyncio.start_server(app.serve, "127.0.0.1", port)
    print("listening", flush=True)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(main())
