"""Abuses a running proxy and measures what that costs it: for each kind a proxy of its own, fresh and warmed up."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import yaml

from tests.bench.abuse.kinds import Kind, Requests, Until
from tests.bench.abuse.link import Effort, Link
from tests.bench.abuse.usage import Usage, peak_kib, resident_kib, settle, usage
from tests.bench.load import visit
from tests.bench.process import Cores, held_to
from tests.bench.results import RunError
from tests.bench.targets import environment
from tests.helpers.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.bench.certificate import Certificate
    from tests.helpers.processes import Child, Children

_PACE_S: Final = 0.1  # the longest wait for the proxy to read what was sent, before more is sent
_PACE_STEP_S: Final = 0.000_2
_SMALL_BUFFER_BYTES: Final = 4096  # of a client that does not read: the kernel must not take the answer for it
_WARM_UP: Final = 200
_OK: Final = 200
_WITH_STATUS: Final = {Until.ANSWER, Until.END, Until.STATUS}


@dataclass(frozen=True)
class Plan:
    """How long each kind is repeated (s), how many connections and pieces of a message at the most, on which cores."""

    seconds: float
    connections: int
    cores: Cores
    batches: int = 3
    pieces: int = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What one unit costs the proxy, and what of it reached the proxy; `kib` is for each connection open at once."""

    cpu_us: float
    client_us: float  # of the client, for what it sends and reads
    kib: float
    read_bytes: float
    reads: float
    units: int


class Stage:
    """The application, and the proxies that are started before it."""

    def __init__(self, children: Children, plan: Plan, certificate: Certificate | None) -> None:
        self._children = children
        self._plan = plan
        self._certificate = certificate
        self._upstream_port = free_port()
        self._started = 0
        command = [sys.executable, "-m", "tests.bench.abuse.app", str(self._upstream_port)]
        with held_to(plan.cores.rest):
            self._application = children.start("abuse-app", command, environment(children.directory))

    @property
    def has_certificate(self) -> bool:
        return self._certificate is not None

    def start_proxy(self, config: Mapping[str, Any], *, is_tls: bool = False) -> tuple[Child, int]:
        """Start a proxy and return it with its port, once it serves."""
        port, admin_port = free_port(), free_port()
        listener: dict[str, Any] = {"address": f"127.0.0.1:{port}"}
        if is_tls and self._certificate is not None:
            files = {"certificate": str(self._certificate.chain), "key": str(self._certificate.key)}
            listener["tls"] = {"certificates": [files]}
        document = {
            "workers": 1,
            "listeners": [listener],
            "upstreams": [{"id": "app", "url": f"http://127.0.0.1:{self._upstream_port}"}],
            "affinity": {"secrets": ["a-secret-of-the-benchmark-of-32-bytes-or-more"]},
            "admin": {"address": f"127.0.0.1:{admin_port}"},
            "grace": "1s",
            **config,
        }
        self._started += 1
        name = f"abused-{self._started}"
        file = self._children.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        command = [sys.executable, "-m", "stickyproxy", "serve", "--config", str(file)]
        with held_to(self._plan.cores.proxy):
            proxy = self._children.start(name, command, environment(self._children.directory))
        proxy.wait_until_ready(f"http://127.0.0.1:{admin_port}/readyz")
        return proxy, port

    def find_cookie(self) -> bytes:
        """Return an affinity cookie, which every proxy of this stage takes: they all have one secret."""
        proxy, port = self.start_proxy({})
        try:
            return visit(port, "/plain").cookie.encode()
        finally:
            proxy.stop()

    def measure(self, kind: Kind, requests: Requests) -> Cost:
        """Measure one kind on a proxy of its own; raise RunError if it is not answered as it should be."""
        proxy, port = self.start_proxy(kind.config, is_tls=kind.is_tls)
        try:
            if not kind.is_tls:
                warm_up(port, requests.head())
            cost = measure(kind, proxy.pid, port, self._plan)
            if not proxy.is_running():
                raise RunError(f"the proxy ended; its output:\n{proxy.log_tail()}")
            return cost
        finally:
            proxy.stop()


def warm_up(port: int, request: bytes) -> None:
    """Send some plain requests, so that nothing that is made once is counted."""
    with Link(port, Effort()) as link:
        for _ in range(_WARM_UP):
            link.send(request)
            link.receive(Until.ANSWER, _OK)


def measure(kind: Kind, pid: int, port: int, plan: Plan) -> Cost:
    """Abuse the proxy `pid` on `port` in batches, and return the median of what a unit of them costs."""
    settle(pid)
    before_kib = resident_kib(pid)
    clients = Clients(kind, pid, port, plan)
    batches = [clients.run_batch(plan.seconds / plan.batches) for _ in range(plan.batches)]
    return Cost(
        cpu_us=statistics.median(batch.used.cpu_s / batch.units for batch in batches) * 1e6,
        client_us=statistics.median(batch.client_us / batch.units for batch in batches),
        kib=max(0, peak_kib(pid) - before_kib) / clients.number,
        read_bytes=statistics.median(batch.used.read_bytes / batch.units for batch in batches),
        reads=statistics.median(batch.used.reads / batch.units for batch in batches),
        units=sum(batch.units for batch in batches),
    )


class Batch(NamedTuple):
    """What some rounds of messages used, of the proxy and of the clients."""

    used: Usage
    client_us: float
    units: int


class Clients:
    """So many clients that abuse one proxy in one way; they send rounds of one message each."""

    def __init__(self, kind: Kind, pid: int, port: int, plan: Plan) -> None:
        self.number = min(kind.connections, plan.connections)
        self._max_pieces = plan.pieces
        self._kind = kind
        self._pid = pid
        self._port = port
        self._effort = Effort()
        self._sent = 0  # messages so far: the number of the next

    def run_batch(self, seconds: float) -> Batch:
        """Send rounds for a while, at the least one."""
        kind, pid = self._kind, self._pid
        deadline = time.monotonic() + seconds
        sent = self._sent
        with ExitStack() as stack:
            links = [] if kind.is_new or kind.is_held else [self._open(stack) for _ in range(self.number)]
            settle(pid)
            before, before_ns = usage(pid), self._effort.cpu_ns
            while True:
                if kind.is_held:
                    self._hold(stack)
                elif kind.is_new:
                    with ExitStack() as opened:
                        self._send_round([self._open(opened) for _ in range(self.number)])
                else:
                    self._send_round(links)
                if kind.is_held or time.monotonic() >= deadline:
                    break
            settle(pid)
            client_us = (self._effort.cpu_ns - before_ns) / 1e3
            return Batch(usage(pid).since(before), client_us, (self._sent - sent) * kind.requests)

    def _open(self, stack: ExitStack) -> Link:
        kind = self._kind
        receive_bytes = _SMALL_BUFFER_BYTES if kind.until in {Until.SIPS, Until.NOTHING} else 0
        link = Link(self._port, self._effort, shakes_hands=kind.shakes_hands, receive_bytes=receive_bytes)
        stack.enter_context(link)
        if kind.opening:
            link.send(kind.opening)
            link.receive(Until.STATUS, kind.status)
        return link

    def _next_message(self) -> list[bytes]:
        self._sent += 1
        pieces = self._kind.cut(self._kind.message(self._sent))
        if len(pieces) > self._max_pieces:
            pieces[self._max_pieces - 1 :] = [b"".join(pieces[self._max_pieces - 1 :])]
        return pieces

    def _hold(self, stack: ExitStack) -> None:
        """Open the connections one after the other, so that they do not need an upstream's at the same time."""
        for _ in range(self.number):
            link = self._open(stack)
            for piece in self._next_message():
                link.send(piece)
            self._await_end(link)

    def _send_round(self, links: Sequence[Link]) -> None:
        """Send a message on each connection, piece by piece in turn, and wait until all are answered."""
        messages = [self._next_message() for _ in links]
        reads = 0  # that the proxy must have made before more is sent
        for pieces in zip_longest(*messages, fillvalue=b""):
            if reads:
                self._await_reads(reads)
            reads = usage(self._pid).reads + sum(map(bool, pieces))
            for link, piece in zip(links, pieces, strict=True):
                if piece:
                    link.send(piece)
        for link in links:
            self._await_end(link)

    def _await_reads(self, reads: int) -> None:
        """Wait until the proxy has read so often, or a short while, so that no two pieces come in one read."""
        deadline = time.monotonic() + _PACE_S
        while usage(self._pid).reads < reads and time.monotonic() < deadline:
            time.sleep(_PACE_STEP_S)

    def _await_end(self, link: Link) -> None:
        kind = self._kind
        status = link.receive(kind.until, kind.status, kind.requests)
        if kind.until in _WITH_STATUS and status != kind.status:
            raise RunError(f"answered with {status}, not {kind.status}")
