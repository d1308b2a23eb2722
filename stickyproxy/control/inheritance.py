"""What one image of the supervisor leaves to the next: the state as JSON, and the descriptors that stay open.

When the program is replaced, the process executes the new one in place: same process id, same sockets, same children.
The state lies in memory that has no name, and an environment variable says where. Fields that are unknown are ignored
and missing ones have defaults, since another version wrote them.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from stickyproxy import __version__
from stickyproxy.config import Loaded
from stickyproxy.control.messages import PROTOCOL, read_address, write_address
from stickyproxy.errors import ChannelError, UsageError
from stickyproxy.observe.counters import ProbeCounters
from stickyproxy.observe.table import make_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from stickyproxy.config import Address
    from stickyproxy.control.supervisor import Supervisor
    from stickyproxy.observe.counters import Histogram

_VARIABLE: Final = "STICKYPROXY_INHERITED"
_MAX_BYTES: Final = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker process of ours: how it is spoken to, and the descriptors of its channel and its table.

    `received` is what has come over the channel and was no whole message yet. One that `is_retiring` has handed over
    already, and finishes what could not move.
    """

    index: int
    process_id: int
    channel: int
    table: int
    version: str = ""
    received: bytes = b""
    is_retiring: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "index": self.index,
            "process_id": self.process_id,
            "channel": self.channel,
            "table": self.table,
            "version": self.version,
            "received": self.received.hex(),
            "is_retiring": self.is_retiring,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote."""
        return cls(
            index=int(raw["index"]),
            process_id=int(raw["process_id"]),
            channel=int(raw["channel"]),
            table=int(raw["table"]),
            version=str(raw.get("version", "")),
            received=bytes.fromhex(raw.get("received", "")),
            is_retiring=bool(raw.get("is_retiring", False)),
        )


@dataclass(slots=True)
class Inheritance:
    """The state of a supervisor. Sockets are named by descriptors, which the heir owns.

    `private` are those for commands and for hand-over, `lent` the addresses whose files are somebody else's; `board`
    and `keys` are shared memory. `routing` is as `Routing.export` writes it, `totals` as `Totals.to_json`, `counts` are
    counters of the supervisor itself. `serving` are the workers that take over, `leaving` those that have served until
    now; `runner` is as `Runner.leave` returns it.
    """

    loaded: Loaded
    secrets: tuple[bytes, ...]
    version: str = __version__
    sockets: dict[Address, int] = field(default_factory=dict)
    lent: tuple[Address, ...] = ()
    private: dict[str, int] = field(default_factory=dict)
    board: int | None = None
    keys: int | None = None
    routing: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    serving: tuple[WorkerState, ...] = ()
    leaving: tuple[WorkerState, ...] = ()
    runner: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON. It holds secrets."""
        return {
            "protocol": PROTOCOL,
            "version": self.version,
            "loaded": self.loaded.to_json(),
            "secrets": [secret.hex() for secret in self.secrets],
            "sockets": [{"address": write_address(one), "descriptor": at} for one, at in self.sockets.items()],
            "lent": [write_address(address) for address in self.lent],
            "private": self.private,
            "board": self.board,
            "keys": self.keys,
            "routing": self.routing,
            "totals": self.totals,
            "counts": self.counts,
            "serving": [worker.to_json() for worker in self.serving],
            "leaving": [worker.to_json() for worker in self.leaving],
            "runner": self.runner,
        }

    @classmethod
    def from_json(cls, raw: Any, env: Mapping[str, str]) -> Self:
        """Return what `to_json` wrote; raise UsageError where this version cannot go on from it."""
        try:
            if raw["protocol"] != PROTOCOL:
                raise UsageError(
                    f"version {raw.get('version', 'unknown')} leaves a state that {__version__} cannot read"
                )
            return cls(
                loaded=Loaded.from_json(raw["loaded"], env),
                secrets=tuple(bytes.fromhex(secret) for secret in raw["secrets"]),
                version=str(raw["version"]),
                sockets={read_address(one["address"]): int(one["descriptor"]) for one in raw["sockets"]},
                lent=tuple(map(read_address, raw.get("lent", ()))),
                private={str(name): int(at) for name, at in raw.get("private", {}).items()},
                board=None if raw.get("board") is None else int(raw["board"]),
                keys=None if raw.get("keys") is None else int(raw["keys"]),
                routing=dict(raw.get("routing", {})),
                totals=dict(raw.get("totals", {})),
                counts=dict(raw.get("counts", {})),
                serving=tuple(map(WorkerState.from_json, raw.get("serving", ()))),
                leaving=tuple(map(WorkerState.from_json, raw.get("leaving", ()))),
                runner=dict(raw.get("runner", {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ChannelError) as error:
            raise UsageError(f"what the former version left is no state that can be read: {error!r}") from error

    def descriptors(self) -> list[int]:
        """Return all descriptors that must stay open."""
        workers = [one for worker in (*self.serving, *self.leaving) for one in (worker.channel, worker.table)]
        memory = [one for one in (self.board, self.keys) if one is not None]
        return [*self.sockets.values(), *self.private.values(), *memory, *workers]


def export_counts(supervisor: Supervisor) -> dict[str, Any]:
    """Return what the parts of a supervisor have counted, as JSON, for another image of it."""
    return {
        "probes": {
            upstream_id: {"outcomes": dict(one.outcomes), "duration": _write_histogram(one.duration)}
            for upstream_id, one in supervisor.prober.counters.items()
        },
        "lookups": dict(supervisor.resolver.lookups),
        "certificate_reloads": dict(supervisor.certificates.reloads),
        "loop_lag": _write_histogram(supervisor.readings.loop_lag.histogram),
    }


def restore_counts(supervisor: Supervisor, counts: Mapping[str, Any]) -> None:
    """Let the parts of a supervisor count on from what another image of it had counted."""
    for upstream_id, written in counts.get("probes", {}).items():
        counters = supervisor.prober.counters.setdefault(upstream_id, ProbeCounters())
        counters.outcomes.update({name: written["outcomes"].get(name, 0) for name in counters.outcomes})
        _add_histogram(counters.duration, written["duration"])
    supervisor.resolver.lookups.update(counts.get("lookups", {}))
    supervisor.certificates.reloads.update(counts.get("certificate_reloads", {}))
    _add_histogram(supervisor.readings.loop_lag.histogram, counts.get("loop_lag", {}))


def _write_histogram(histogram: Histogram) -> dict[str, Any]:
    return {"bounds": list(histogram.bounds), "counts": histogram.counts, "total_s": histogram.total_s}


def _add_histogram(histogram: Histogram, written: Mapping[str, Any]) -> None:
    """Add what `_write_histogram` wrote; nothing, where another version had other bounds."""
    if written.get("bounds") == list(histogram.bounds):
        histogram.counts = [one + more for one, more in zip(histogram.counts, written["counts"], strict=True)]
        histogram.total_s += written["total_s"]


def leave(inheritance: Inheritance, *, is_check: bool) -> tuple[int, dict[str, str]]:
    """Write the state to memory; return its descriptor, and the environment that names it.

    `is_check` says that the heir only tells whether it could go on.
    """
    descriptor = make_memory("stickyproxy-state")
    text = json.dumps(inheritance.to_json()).encode()
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(text)
    value = f"{'check' if is_check else 'run'}:{descriptor}"
    return descriptor, {**os.environ, _VARIABLE: value}


def take(environ: MutableMapping[str, str] = os.environ) -> tuple[Inheritance, bool] | None:
    """Return what a former image left, and whether that is only to be checked; None where there is none.

    The variable is removed, so that no child takes it for its own. Raises UsageError where it cannot be read.
    """
    value = environ.pop(_VARIABLE, None)
    if value is None:
        return None
    kind, _, number = value.partition(":")
    if kind not in {"check", "run"} or not number.isascii() or not number.isdigit():
        raise UsageError(f"{_VARIABLE} is set by the proxy itself, and is not for anybody else")
    try:
        descriptor = int(number)
        os.set_inheritable(descriptor, False)
        size = os.fstat(descriptor).st_size
        text = os.pread(descriptor, min(size, _MAX_BYTES), 0)
        os.close(descriptor)
        raw = json.loads(text)
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"what the former version left cannot be read: {error}") from error
    return Inheritance.from_json(raw, environ), kind == "check"


def open_socket(descriptor: int) -> socket.socket:
    """Return the socket of an inherited descriptor, for this process alone."""
    os.set_inheritable(descriptor, False)
    link = socket.socket(fileno=descriptor)
    link.setblocking(False)
    return link
