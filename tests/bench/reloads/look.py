"""What a new connection shows of a running proxy."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.bench.reloads.family import Family

HEADER: Final = "X-Generation"  # of responses: the number of the configuration
_TIMEOUT_S: Final = 5.0
_REPLACED: Final = " (deleted)"  # what /proc says of a file that has another in its place


@dataclass(frozen=True)
class Look:
    """The number of the configuration, the process that holds the connection, and whether its file was replaced."""

    generation: str
    pid: int | None
    is_outdated: bool


def look(family: Family, port: int) -> Look:
    """GET on a new connection; raise OSError or HTTPException if that cannot be."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        link.request("GET", "/")
        client_port = link.sock.getsockname()[1]
        response = link.getresponse()
        pid = family.holders(port).get(client_port)  # while it is open
        response.read()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"status {response.status}")
        is_outdated = pid is not None and str(Path(f"/proc/{pid}/exe").readlink()).endswith(_REPLACED)
        return Look(response.headers.get(HEADER, ""), pid, is_outdated)
    finally:
        link.close()
