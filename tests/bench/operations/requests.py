"""The requests beside the tunnels, as a program of its own: `python -m tests.bench.operations.requests --port PORT`.

Each client is a session with its cookie and a kept connection; some of its requests take a new one, some clients are
new. What each request was answered stands in a `Ledger`, which is compared with the apps' logs in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from stickyproxy.tasks import spawn
from tests.bench.operations.app import LARGE_BYTES
from tests.bench.operations.remote import serve_words
from tests.helpers.ledger import Arrival, Ledger, Receipt, Verdict
from tests.helpers.plain_client import AbortedError, PlainClient

if TYPE_CHECKING:
    from tests.helpers.plain_client import Answer

PERIOD_S: Final = 0.25  # between two requests of a client
# One after the other, by every client: most are small, one is in flight for a while, one is large.
KINDS: Final = (
    ("GET", "/fast"),
    ("POST", "/fast"),
    ("GET", "/fast"),
    ("POST", "/slow"),
    ("GET", "/fast"),
    ("POST", "/fast"),
    ("GET", "/large"),
    ("POST", "/fast"),
)
_NEW_CONNECTION_EACH: Final = 10  # requests
_NEWCOMER_EACH: Final = 20


class KeptClient(PlainClient):
    """A connection that is used again unless the other side has closed it."""

    @property
    def is_over(self) -> bool:
        return self._reader.at_eof() or self._reader.exception() is not None or self._writer.is_closing()

    def close(self) -> None:
        self._writer.transport.abort()


class Requests:
    """All clients of this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._port = options.port
        self._logs: list[Path] = options.logs
        self._clients = max(1, round(options.rate * PERIOD_S)) if options.rate else 0
        self._ledger = Ledger()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False
        self._moved = 0
        self._new_cookies = 0
        self._connections = 0
        self._slowest_s = 0.0
        self._late = 0
        self._failures: list[tuple[int, str]] = []  # when (ns), and what

    async def _live(self, name: str, delay_s: float) -> None:
        """Send the requests of one client, one after the other."""
        await asyncio.sleep(delay_s)
        loop = asyncio.get_running_loop()
        cookie = app = ""
        kept: KeptClient | None = None
        due_s = loop.time()
        for number in count():
            if self._is_over:
                break
            if kept is not None and (kept.is_over or number % _NEW_CONNECTION_EACH == 0):
                kept.close()
                kept = None
            method, target = KINDS[number % len(KINDS)]
            is_newcomer = number % _NEWCOMER_EACH == _NEWCOMER_EACH - 1
            verdict, kept = await self._ask(kept, method, target, name, "" if is_newcomer else cookie)
            if not is_newcomer and verdict.receipt is not None:
                self._moved += bool(app) and app != verdict.receipt.app
                self._new_cookies += bool(cookie) and verdict.cookie is not None
                app, cookie = verdict.receipt.app, verdict.cookie or cookie
            due_s += PERIOD_S
            if due_s < loop.time():
                self._late += 1
                due_s = loop.time()
            await asyncio.sleep(due_s - loop.time())
        if kept is not None:
            kept.close()

    async def _ask(
        self, kept: KeptClient | None, method: str, target: str, name: str, cookie: str
    ) -> tuple[Verdict, KeptClient | None]:
        """Send one request; return how it ended, and the connection if it can be used again."""
        request_id = self._ledger.begin(method, name)
        fields = {"X-Id": request_id, "X-Client": name, **({"Cookie": cookie} if cookie else {})}
        began_s = time.monotonic()
        try:
            if kept is None:
                kept = await KeptClient.connect(self._port)
                self._connections += 1
            answer = await kept.ask(target, method=method, fields=fields)
            verdict = judge(answer, target)
        except (AbortedError, OSError, TimeoutError) as error:
            verdict = Verdict(broken=type(error).__name__)
        self._slowest_s = max(self._slowest_s, time.monotonic() - began_s)
        self._ledger.end(request_id, verdict)
        if not verdict.is_good:
            self._failures.append((time.monotonic_ns(), f"{method} {target}: {verdict.name}"))
            if kept is not None:
                kept.close()
            kept = None
        return verdict, kept

    # What it is told

    async def on_start(self, _: str) -> None:
        gc.freeze()
        for number in range(self._clients):
            delay_s = PERIOD_S * number / self._clients
            self._tasks.append(spawn(self._live(f"client-{number}", delay_s), f"client {number}"))

    async def on_phase(self, _: str) -> None: ...

    async def on_stop(self, _: str) -> None:
        """Begin no request any more, and wait until those under way have ended."""
        self._is_over = True
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks)

    async def on_totals(self, _: str) -> dict[str, int | float]:
        return {"sent": len(self._ledger), "received": len(self._ledger), "cpu_s": time.process_time()}

    async def on_report(self, _: str) -> dict[str, Any]:
        arrivals = [Arrival.read(line) for log in self._logs for line in log.read_text().splitlines()]
        repeated = self._ledger.repeated(arrivals)
        repeats = [f"{one} arrived {times} times" for one, times in repeated.items()]
        return {
            "requests": len(self._ledger),
            "failed": sum(self._ledger.errors().values()),
            "errors": dict(self._ledger.errors()),
            "failures": self._failures[:100],
            "repeated": repeats,
            "mixed_up": self._ledger.findings(dict.fromkeys(arrivals)),
            "moved": self._moved,
            "new_cookies": self._new_cookies,
            "connections": self._connections,
            "slowest_s": self._slowest_s,
            "late": self._late,
            "cpu_s": time.process_time(),
        }


def judge(answer: Answer, target: str) -> Verdict:
    """Return how a request ended that was answered whole."""
    receipt = Receipt.read(answer.fields)
    is_right = len(answer.body) == LARGE_BYTES if target == "/large" else receipt is not None
    broken = "" if is_right or answer.status != 200 else "another body"
    return Verdict(answer.status, broken, receipt, answer.cookie)


async def run(options: argparse.Namespace) -> None:
    """Do what it is told until the process is ended."""
    await serve_words(options.words, Requests(options))


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests with ids")
    parser.add_argument("--port", type=int, required=True, help="where they connect")
    parser.add_argument("--rate", type=float, required=True, help="requests in a second")
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="the apps' logs")
    parser.add_argument("--words", type=Path, required=True, help="the socket on which it is told what to do")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
