"""What it costs to read one request head: httptools with a callback for each field, ours, and ours when it repeats.

Run as a program: `python -m tests.bench.heads`. Prints microseconds for each head, the least of seven runs.
"""

from __future__ import annotations

import sys
from timeit import repeat
from typing import TYPE_CHECKING

import httptools

from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import RequestHeadReader, parse_request_head

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = (
    b"GET /1k HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0 Safari/537.36\r\n"
    b"Accept: text/html,application/xhtml+xml\r\nAccept-Language: en-US,en;q=0.5\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\nReferer: http://localhost/\r\nCookie: a=b; session=0123456789abcdef\r\n\r\n"
)
LIMITS = HeadLimits()
HOP = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"proxy-connection", b"te", b"trailer"}
)
RUNS, HEADS = 7, 20_000


class Callbacks:
    """What httptools calls; keeps the fields and the target."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.url = b""

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))


def read_by_callbacks() -> bytes:
    """Read the head and write its section anew without the fields that concern one connection: the least of it."""
    callbacks = Callbacks()
    httptools.HttpRequestParser(callbacks).feed_data(HEAD)
    return b"".join(b"%b: %b\r\n" % field for field in callbacks.fields if field[0].lower() not in HOP)


def read_by_expressions() -> bytes:
    """Read the head and write its section anew, with every check."""
    return b"".join(parse_request_head(HEAD, len(HEAD), LIMITS).section)


def microseconds(read: Callable[[], object]) -> float:
    """Return the least time for one call."""
    return min(repeat(read, number=HEADS, repeat=RUNS)) / HEADS * 1e6


def main() -> None:
    """Measure and print."""
    reader = RequestHeadReader(LIMITS)
    for name, read in (
        ("httptools, a callback for each field", read_by_callbacks),
        ("two expressions, every check", read_by_expressions),
        ("the same section again", lambda: reader.read(HEAD, len(HEAD))),
    ):
        sys.stdout.write(f"{name:38} {microseconds(read):5.2f} us\n")


if __name__ == "__main__":
    main()
