"""The command that shows what runs: the proxy, its upstreams, and the app processes behind them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from stickyproxy.cli.control import control_option, speak
from stickyproxy.cli.progress import Screen
from stickyproxy.cli.words import count, say_duration, say_size, table
from stickyproxy.config import DEFAULT_CLUSTER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stickyproxy.control.client import ControlClient

_PATH: Final = "/api/v1/state"
_EVERY_S: Final = 1.0
_NOTHING: Final = "-"
_DIGITS: Final = re.compile("[0-9]{1,9}")


@click.command()
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the state as the proxy gives it; with --watch, a line each."
)
@control_option
def status(control: Path | None, watch: bool, as_json: bool) -> None:  # noqa: FBT001 -- options
    """Show the proxy and its upstreams: where each stands, what it serves, and what its app process takes.

    CPU is the share of one core since the last look; at the first one, since the process was started.
    """
    cpu = Cpu()
    write = Screen().draw if watch and not as_json else click.echo

    def show(state: Any) -> bool:
        text = json.dumps(state, indent=None if watch else 2) if as_json else "\n".join(describe(state, cpu))
        write(text)
        return not watch

    async def talk(client: ControlClient) -> None:
        await client.watch(_PATH, show, _EVERY_S)

    try:
        speak(control, talk)
    except KeyboardInterrupt:
        if not watch:
            raise
        sys.exit(0)  # how watching is meant to end


def describe(state: Any, cpu: Cpu) -> list[str]:
    """Return the lines that show a state: one on the proxy, then a table of the upstreams and app processes."""
    rows = [Row(one, cpu) for one in _list(state)]
    columns = _OF_PROCESSES if state.get("run") or any(row.process for row in rows) else _OF_UPSTREAMS
    if len(state["clusters"]) > 1:
        columns = (_CLUSTER, *columns)
    cells = [[column.title for column in columns], *([column.show(row) for column in columns] for row in rows)]
    return [_describe_proxy(state), "", *table(cells, [at for at, one in enumerate(columns) if one.is_number])]


def _describe_proxy(state: Any) -> str:
    facts = [
        f"stickyproxy {state['version']}",
        f"up {say_duration(state['uptime_s'])}",
        count(sum(not one["is_leaving"] for one in state["workers"]), "worker"),
        _describe_readiness(state),
    ]
    return ", ".join(facts)


def _describe_readiness(state: Any) -> str:
    """Return whether clients can be served; as /readyz does, by the same facts."""
    if not state["is_ready"]:
        return "not ready: it is starting or stopping"
    if all(one["is_leaving"] for one in state["workers"]):
        return "not ready: no worker is running"
    if not any(one["accepts_pinned"] for cluster in state["clusters"] for one in cluster["upstreams"]):
        return "not ready: no upstream can be used"
    return "ready"


def _list(state: Any) -> list[Any]:
    """Return the upstreams in the order of the file, and then the app processes by generation and number."""
    upstreams = [
        {"cluster": cluster.get("name"), **one} for cluster in state["clusters"] for one in cluster["upstreams"]
    ]
    starting = [{"cluster": DEFAULT_CLUSTER, **one} for one in (state.get("run") or {}).get("starting", ())]
    return sorted([*upstreams, *starting], key=_place)


def _place(found: Any) -> list[int]:
    """Return where one stands: app processes become upstreams in any order, and are easier to find in that of ids."""
    return [int(digits) for digits in _DIGITS.findall(found["id"])] if found.get("process") else []


class Cpu:
    """How much CPU processes take, by two looks at each."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[float, float]] = {}

    def look(self, process: Any) -> float | None:
        """Return the percents of one core since the last look, or since the start; None where that is not known."""
        pid, age_s, cpu_s = process.get("pid"), process.get("age_s"), process.get("cpu_s")
        if pid is None or age_s is None or cpu_s is None:
            return None
        age_before_s, cpu_before_s = self._last.get(pid, (0.0, 0.0))
        if age_before_s > age_s:  # another process with the number of one that has ended
            age_before_s, cpu_before_s = 0.0, 0.0
        self._last[pid] = age_s, cpu_s
        passed_s = age_s - age_before_s
        return max(0.0, 100 * (cpu_s - cpu_before_s) / passed_s) if passed_s > 0 else None


class Row:
    """An upstream, or an app process that is none yet, and what its process takes."""

    def __init__(self, found: Any, cpu: Cpu) -> None:
        self.found = found
        self.process: Any = found.get("process") or {}
        self.cpu_percent = cpu.look(self.process) if self.process else None

    def show(self, name: str, write: Callable[[Any], str] = str) -> str:
        """Return a fact of the upstream as text."""
        return _show(self.found.get(name), write)

    def show_process(self, name: str, write: Callable[[Any], str] = str) -> str:
        """Return a fact of the process as text."""
        return _show(self.process.get(name), write)

    @property
    def health(self) -> str:
        """Return its health; one that refuses connections is known to be gone, whatever the probes have seen."""
        return "refused" if self.found.get("is_refused") else self.show("health")

    @property
    def admin(self) -> str:
        """Return what the operator wants of it."""
        return "leaving" if self.found.get("is_leaving") else self.show("admin_state")


def _show(value: Any, write: Callable[[Any], str]) -> str:
    return _NOTHING if value is None else write(value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table; numbers stand at its right."""

    title: str
    show: Callable[[Row], str]
    is_number: bool = False


_CLUSTER: Final = Column("CLUSTER", lambda row: row.show("cluster"))
_ID: Final = Column("ID", lambda row: row.show("id"))
_HEALTH: Final = (Column("HEALTH", lambda row: row.health), Column("ADMIN", lambda row: row.admin))
_SERVED: Final = (
    Column("SESSIONS", lambda row: row.show("sessions"), is_number=True),
    Column("TUNNELS", lambda row: row.show("tunnels"), is_number=True),
)
_OF_UPSTREAMS: Final = (_ID, Column("ADDRESS", lambda row: row.show("address")), *_HEALTH, *_SERVED)
_OF_PROCESSES: Final = (
    _ID,
    Column("GENERATION", lambda row: row.show_process("generation"), is_number=True),
    Column("STATE", lambda row: row.show_process("state")),
    *_HEALTH,
    *_SERVED,
    Column("MEMORY", lambda row: row.show_process("memory_bytes", say_size), is_number=True),
    Column("CPU", lambda row: _show(row.cpu_percent, "{:.0f}%".format), is_number=True),
    Column("AGE", lambda row: row.show_process("age_s", say_duration), is_number=True),
    Column("RESTARTS", lambda row: row.show_process("restarts"), is_number=True),
)
