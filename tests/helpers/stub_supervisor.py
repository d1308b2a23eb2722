"""What the admin listener reads of a supervisor, without one: no process, no socket, and workers that only count."""

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from stickyproxy.affinity.snapshot import upstream_digest
from stickyproxy.config import Config, ConfigSource, Loaded
from stickyproxy.control.fleet import Fleet, Orders
from stickyproxy.control.probe import Prober
from stickyproxy.control.readings import Readings
from stickyproxy.control.routing import Routing
from stickyproxy.observe.counters import UpstreamCounters
from stickyproxy.observe.table import Table

if TYPE_CHECKING:
    from stickyproxy.control.supervisor import Supervisor
    from stickyproxy.control.worker_link import WorkerLink


@dataclass(eq=False)
class StubLink:
    """A worker that lives only in its counters."""

    index: int
    process_id: int
    table: Table
    version: str = "1.2.3"
    is_ready: bool = True
    is_leaving: bool = False


class StubSupervisor:
    """The parts of a supervisor that its readings look at."""

    def __init__(self, config: Config, workers: int = 2) -> None:
        self.config = config
        self.loaded = Loaded(ConfigSource(), "", config)
        self.fleet = Fleet(Orders(self.loaded, (), {}, workers), lambda *_: None)
        self.links = [StubLink(index, 1000 + index, Table.create()) for index in range(workers)]
        self.fleet.links = [cast("WorkerLink", link) for link in self.links]
        self.routing = Routing(config, lambda *_: None)
        self.prober = Prober(self.routing)
        self.resolver = SimpleNamespace(lookups=Counter[str]())
        self.certificates = SimpleNamespace(reloads=Counter[str](), facts={})
        self.reloader = SimpleNamespace(outcomes=Counter[str](), succeeded_at=0.0)
        self.upgrader = SimpleNamespace(outcomes=Counter[str]())
        self.runner = None
        self.readings = Readings(cast("Supervisor", self))

    def counters(self, upstream_id: str, worker: int = 0) -> UpstreamCounters:
        """Return what a worker counts for an upstream."""
        return self.links[worker].table.upstream(upstream_digest(upstream_id))

    def begin_sessions(self, upstream_id: str, count: int, worker: int = 0) -> None:
        """Let a worker say that it has so many sessions more at an upstream."""
        digest = upstream_digest(upstream_id).hex()
        began = [[f"{worker}-{digest}-{number}", digest, 1000] for number in range(count)]
        self.fleet.registry.take(self.links[worker].process_id, {"began": began})

    def close(self) -> None:
        """Close what is held."""
        self.fleet.board.close()
        for link in self.links:
            link.table.close()
