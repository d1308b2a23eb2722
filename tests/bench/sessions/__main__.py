"""Which share of sessions works in several processes: `python -m tests.bench.sessions [--clients 40] [--markdown]`.

The same Chainlit application behind gunicorn, behind uvicorn and behind `stickyproxy run`, each with as many processes.
Clients do what Chainlit's page does in a browser; a session works when the reply to its first message arrives. Exit
status 1 where a session does not work behind stickyproxy, or none fails behind the others: then nothing was shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp

from tests.bench.report import describe, gather_facts
from tests.bench.results import RunError
from tests.bench.sessions.browser import Browser, Outcome
from tests.bench.sessions.servers import HOW_TO_GET, SERVERS, Pythons, Server, prepare
from tests.bench.tables import write_table
from tests.helpers.processes import Children

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.helpers.processes import Child

COLUMNS: Final = (
    "server", "processes", "that replied", "sessions", "work at once", "work in the end", "the others saw first",
)  # fmt: skip
_READY_S: Final = 180.0
_LOOK_S: Final = 0.1
_FORGOTTEN_S: Final = 11.0  # for two windows of 5 s, stickyproxy takes whoever came without a cookie for a client


@dataclass(frozen=True)
class Plan:
    """What is asked for: so many clients, so many of them at a time, each of which goes on for `patience_s`."""

    clients: int = 40
    processes: int = 4
    at_a_time: int = 8
    patience_s: float = 15.0
    keeps_connections: bool = False


@dataclass
class Row:
    """What was seen behind one server; `failure` says why nothing was."""

    server: Server
    processes: int
    outcomes: list[Outcome] = field(default_factory=list)
    failure: str = ""

    @property
    def at_once(self) -> int:
        """How many sessions worked and had nothing refused."""
        return sum(one.works_at_once for one in self.outcomes)

    @property
    def in_the_end(self) -> int:
        """How many sessions worked, after whatever the client did again."""
        return sum(one.attempts > 0 for one in self.outcomes)


async def observe(server: Server, plan: Plan, children: Children, pythons: Pythons) -> list[Outcome]:
    """Start a server, let all clients come, and stop it; raise RunError or OSError."""
    child, port = server.start(children, pythons, plan.processes)
    url = f"http://127.0.0.1:{port}"
    try:
        await _wait_for_all(url, plan.processes, child)
        await asyncio.sleep(_FORGOTTEN_S)
        gate, chance = asyncio.Semaphore(plan.at_a_time), random.Random(7)

        async def come() -> Outcome:
            async with gate, Browser(url, keeps_connections=plan.keeps_connections) as browser:
                return await browser.chat(plan.patience_s, chance)

        return await asyncio.gather(*(come() for _ in range(plan.clients)))
    finally:
        await asyncio.to_thread(child.stop)


async def _wait_for_all(url: str, processes: int, child: Child) -> None:
    """Wait until as many processes have answered, each asked over a new connection and without a cookie."""
    pids: set[int] = set()
    try:
        async with asyncio.timeout(_READY_S), aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True), cookie_jar=aiohttp.DummyCookieJar()
        ) as http:  # fmt: skip
            while len(pids) < processes:
                if not child.is_running():
                    raise RunError(f"{child!r} before it was ready:\n{child.log_tail()}")
                try:
                    async with http.get(f"{url}/healthz") as response:
                        pids.add(json.loads(await response.text())["pid"])
                except (aiohttp.ClientError, ValueError):
                    pass
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise RunError(f"{len(pids)} of {processes} processes have answered:\n{child.log_tail()}") from None


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of `COLUMNS`."""
    total = len(row.outcomes)
    if not total:
        return [
            row.server.title.format(row.processes),
            str(row.processes),
            "-",
            "0",
            "-",
            "-",
            row.failure.split("\n")[0],
        ]
    seen = Counter(one.refusals[0] for one in row.outcomes if one.refusals)
    return [
        row.server.title.format(row.processes),
        str(row.processes),
        str(len({one.pid for one in row.outcomes} - {0})),
        str(total),
        f"{row.at_once} ({row.at_once / total:.0%})",
        f"{row.in_the_end} ({row.in_the_end / total:.0%})",
        ", ".join(f"{text}: {number}" for text, number in seen.most_common()) or "-",
    ]


def write_report(rows: Sequence[Row], facts: Sequence[str], *, is_markdown: bool) -> str:
    """Return the report: facts, the table, and why a server could not be seen."""
    lines = write_table([COLUMNS, *map(cells, rows)], (0, len(COLUMNS) - 1), is_markdown=is_markdown)
    failures = [f"{row.server.name}: {row.failure}" for row in rows if row.failure]
    return "\n".join([*(f"- {fact}" for fact in facts), "", *lines, *(["", *failures] if failures else [])])


def legend(plan: Plan) -> list[str]:
    """Return what was done and what the columns mean."""
    how = "on one that is free, up to six" if plan.keeps_connections else "on a new connection"
    return [
        (
            f"{plan.clients} clients, {plan.at_a_time} at a time, each with its cookies: page, session cookie,"
            f" handshake by polling, connect, WebSocket, message, reply; each request {how}"
        ),
        "work at once: the reply came, and nothing was refused before",
        (
            f"work in the end: the reply came within {plan.patience_s:g} s, in which the client began again as"
            " Socket.IO's does, after 1 s, 2 s, 4 s and then 5 s"
        ),
        "the others saw first: the first refusal of each session that had any",
    ]


def is_shown(rows: Sequence[Row]) -> bool:
    """Say whether all sessions worked at once behind stickyproxy, and some did not behind each of the others."""
    return all(
        (row.at_once == len(row.outcomes)) == (row.server.name == "stickyproxy") for row in rows if row.outcomes
    ) and not any(row.failure for row in rows if row.server.name == "stickyproxy")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exit with status 2 on a mistake."""
    plan, pythons = Plan(), Pythons.find()
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.sessions", description="Which share of sessions works in several processes."
    )
    parser.add_argument("--servers", default=",".join(SERVERS), help="which (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=plan.clients, help="how many (default: %(default)s)")
    parser.add_argument("--at-a-time", type=int, default=plan.at_a_time, help="of the clients (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=plan.processes, help="of each server (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=plan.patience_s, help="seconds that a client tries (default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="let each client use its connections again")
    parser.add_argument("--chainlit", type=Path, default=pythons.chainlit, help="a Python that has it (%(default)s)")
    parser.add_argument(
        "--gunicorn", type=Path, default=pythons.gunicorn, help="a Python with both and uvicorn-worker (%(default)s)"
    )
    parser.add_argument("--directory", type=Path, help="where logs and files are kept (default: nowhere)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    options.servers = options.servers.split(",")
    if unknown := [name for name in options.servers if name not in SERVERS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(SERVERS)}")
    if min(options.clients, options.at_a_time, options.processes) < 1 or options.patience < 0:
        parser.error("--clients, --at-a-time and --processes must be positive, --patience not negative")
    return options


def run(options: argparse.Namespace, plan: Plan, directory: Path) -> list[Row]:
    """Return a row for each server; what cannot be run is in its row."""
    pythons = Pythons(options.chainlit, options.gunicorn)
    rows = []
    with Children(directory) as children:
        for server in map(SERVERS.__getitem__, options.servers):
            row = Row(server, plan.processes)
            rows.append(row)
            if not server.is_installed(pythons):
                row.failure = f"not installed: {HOW_TO_GET[server.needs]}"
                continue
            try:
                row.outcomes = asyncio.run(observe(server, plan, children, pythons))
            except (RunError, OSError) as error:
                row.failure = f"{type(error).__name__}: {error}"
            print("  ".join(cells(row)), file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; return 0, 1 where it did not show what it should, 2 where the application cannot be run."""
    options = parse_options(arguments)
    pythons = Pythons(options.chainlit, options.gunicorn)
    if not options.chainlit.exists():
        print(f"no {options.chainlit}: {HOW_TO_GET['chainlit']}", file=sys.stderr)
        return 2
    plan = Plan(options.clients, options.processes, options.at_a_time, options.patience, options.keep)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is stopped
    versions = {server.name: server.version(pythons) for server in SERVERS.values() if server.is_installed(pythons)}
    facts = gather_facts(versions)
    with tempfile.TemporaryDirectory(prefix="sessions-") as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            prepare(directory, pythons)
        except RunError as error:
            print(error, file=sys.stderr)
            return 2
        rows = run(options, plan, directory)
    print(write_report(rows, [*describe(facts), *legend(plan)], is_markdown=options.markdown))
    return 0 if is_shown(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
