"""How the programs of the load are told what to do: a word on a Unix socket of each, answered by one line of JSON."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any, Final

from tests.bench.results import RunError

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S: Final = 120.0


async def serve_words(path: Path, told: object) -> None:
    """Answer the words that come over this socket until the process ends.

    The word `start` is for the method `on_start` of whom is `told`, and so on; it is called with what follows the word.
    """

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word, _, rest = (await reader.readline()).decode().strip().partition(" ")
        if word:  # else somebody looked whether the program is there
            answer = await getattr(told, f"on_{word}")(rest)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(on_connection, path) as server:
        await server.serve_forever()


def is_there(path: Path) -> bool:
    """Say whether a program listens on its socket."""
    with socket.socket(socket.AF_UNIX) as link:
        return link.connect_ex(str(path)) == 0


def ask(path: Path, word: str) -> Any:
    """Say a word to a program, and return its answer; raise RunError where there is none."""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_TIMEOUT_S)
            link.connect(str(path))
            link.sendall(word.encode() + b"\n")
            with link.makefile("rb") as stream:
                line = stream.readline()
    except OSError as error:
        raise RunError(f"{path.name} does not answer {word!r}: {error}") from error
    if not line:
        raise RunError(f"{path.name} failed at {word!r}")
    return json.loads(line)
