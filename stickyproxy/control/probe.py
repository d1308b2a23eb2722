"""Probes: active health checks over connections of their own, one task for each upstream.

A probe that passes or fails moves the health of its upstream by `rise` and `fall`. Only a refused connection, or a
socket file that is not there, says that the process is gone; a slow answer never does.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from random import SystemRandom
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    ThreadedResolver,
    UnixConnector,
)
from typing_extensions import override
from yarl import URL

from stickyproxy import __version__
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.observe.counters import ProbeCounters
from stickyproxy.observe.removed import MAX_REMOVED
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.abc import ResolveResult

    from stickyproxy.config import Probe
    from stickyproxy.control.routing import Routing
    from stickyproxy.proxy.endpoint import Endpoint

logger = logging.getLogger(__name__)

SocketAddress = str | tuple[Any, ...]
Outcome = Literal["passed", "failed", "refused", "timeout"]

_LOOK_S: Final = 1.0  # an upstream that refuses connections is tried this often: its clients wait for it
_CONNECT_TIMEOUT_S: Final = 2.0  # where the file asks for no probes; the default of those that it does
# The proxy has run out of something: that says nothing about an upstream.
_OWN_FAULTS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_GONE: Final = (ConnectionRefusedError, FileNotFoundError)
_FIELD_BYTES: Final = 64 * 1024  # one field of an answer, as the data plane takes it (aiohttp's default: 8 KiB)
_SHOWN: Final = 20  # upstreams named in one log line
_EVENTS: Final = {
    "passed": HealthEvent.PROBE_PASSED,
    "failed": HealthEvent.PROBE_FAILED,
    "refused": HealthEvent.REFUSED,
    "timeout": HealthEvent.PROBE_FAILED,
}


class ProbeFailedError(Exception):
    """An upstream answered a probe, but not well; the text says how."""


class Connecting:
    """The probe that only opens a connection and closes it again, without TLS."""

    def __init__(self, endpoint: Callable[[], Endpoint]) -> None:
        self._endpoint = endpoint

    async def probe(self) -> None:
        """Connect; raise OSError, ConnectionRefusedError only where every address of the name refuses."""
        errors: list[OSError] = []
        for family, address in await _find_addresses(self._endpoint()):
            try:
                return await _connect(family, address)
            except OSError as error:
                errors.append(error)
        raise next((error for error in errors if not isinstance(error, _GONE)), errors[0])

    async def close(self) -> None:
        """Release nothing: nothing is held."""


async def _find_addresses(endpoint: Endpoint) -> list[tuple[socket.AddressFamily, SocketAddress]]:
    if endpoint.address.is_unix:
        return [(socket.AF_UNIX, endpoint.address.path)]
    host, port = endpoint.ip or endpoint.address.host, endpoint.address.port
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


async def _connect(family: socket.AddressFamily, address: SocketAddress) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as link:
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, address)
        # A Unix socket whose backlog is full says EAGAIN, which loops take for "under way", and then for success.
        link.getpeername()


class Asking:
    """The probe that asks for a path over HTTP and looks at the status."""

    def __init__(self, endpoint: Callable[[], Endpoint], settings: Probe) -> None:
        self._endpoint = endpoint
        self._settings = settings
        address = endpoint().address
        self._authority = "localhost" if address.is_unix else str(address)
        self._session = ClientSession(
            connector=UnixConnector(address.path, force_close=True)
            if address.is_unix
            else TCPConnector(force_close=True, use_dns_cache=False, resolver=_EndpointResolver(endpoint)),
            cookie_jar=DummyCookieJar(),
            headers={"Host": self._authority, "User-Agent": f"stickyproxy-probe/{__version__}"},
            timeout=ClientTimeout(total=None),  # the caller has one for every kind of probe
            max_field_size=_FIELD_BYTES,
        )

    async def probe(self) -> None:
        """Ask; raise OSError, or ProbeFailedError for an answer that is not as expected."""
        endpoint = self._endpoint()
        scheme = "http" if endpoint.tls is None else "https"
        # As it stands in the file: nothing in it is escaped anew.
        url = URL(f"{scheme}://{self._authority}{self._settings.path}", encoded=True)
        try:
            async with self._session.get(
                url, allow_redirects=False, ssl=endpoint.tls or True, server_hostname=endpoint.server_name or None
            ) as response:
                status = response.status
        except ClientConnectorError as error:
            raise error.os_error from error
        except ClientError as error:
            raise ProbeFailedError(str(error) or type(error).__name__) from error
        if not self._settings.expects(status):
            raise ProbeFailedError(f"status {status}")

    async def close(self) -> None:
        """Close its connections."""
        await self._session.close()


class _EndpointResolver(ThreadedResolver):
    """Answers with what the name of an upstream stands for now, and asks the system only where nobody follows it."""

    def __init__(self, endpoint: Callable[[], Endpoint]) -> None:
        super().__init__()
        self._endpoint = endpoint

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return await super().resolve(self._endpoint().ip or host, port, family)


class Watch:
    """The probes of one upstream at one address: counted, reported, and logged where the result is a new one.

    `task` probes from time to time, once the prober has begun.
    """

    task: asyncio.Task[None]

    def __init__(self, upstream_id: str, settings: Probe | None, routing: Routing, counters: ProbeCounters) -> None:
        self.upstream_id = upstream_id
        self.settings = settings
        self._routing = routing
        self.address = routing.endpoints[upstream_id].address
        self.counters = counters
        self.is_due = asyncio.Event()
        self._way = self._make_way(settings)
        self._timeout_s = _CONNECT_TIMEOUT_S if settings is None else settings.timeout_s
        self._last = ""

    def _make_way(self, settings: Probe | None) -> Connecting | Asking:
        if settings is None or settings.path is None:
            return Connecting(self._find_endpoint)
        return Asking(self._find_endpoint, settings)

    def _find_endpoint(self) -> Endpoint:
        return self._routing.endpoints[self.upstream_id]

    async def probe(self) -> Outcome:
        """Probe once and report the result; never raises but when cancelled."""
        began_at = perf_counter()
        outcome, reason, is_own_fault = await self._try()
        self.counters.duration.observe(perf_counter() - began_at)
        self.counters.outcomes[outcome] += 1
        if reason != self._last:
            logger.info("probe of upstream %s %s%s", self.upstream_id, outcome, f": {reason}" if reason else "")
            self._last = reason
        if not is_own_fault:
            self._routing.report(self.upstream_id, _EVENTS[outcome])
        return outcome

    async def _try(self) -> tuple[Outcome, str, bool]:
        """Return the outcome, the reason where it is bad, and whether the proxy itself is to blame."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._way.probe()
        except TimeoutError:
            return "timeout", f"no answer within {self._timeout_s:g} s", False
        except _GONE as error:
            return "refused", error.strerror or str(error), False
        except OSError as error:
            return "failed", error.strerror or str(error), error.errno in _OWN_FAULTS
        except ProbeFailedError as error:
            return "failed", str(error), False
        except Exception:
            logger.exception("probe of upstream %s crashed", self.upstream_id)
            return "failed", "the probe crashed", True
        return "passed", "", False

    async def end(self) -> None:
        """Close the connections of the probe, once the task that was cancelled has ended."""
        await asyncio.wait((self.task,))
        await self._way.close()


class Prober:
    """Probes all upstreams of the routing state from `start` to `stop`; `counters` are by upstream id.

    How it does so is what the configuration says of the cluster of each, when the probing of the upstream begins.
    Each probe goes to the endpoint that the upstream has at that moment. Upstreams that come are probed from then on,
    those that go no more; what was counted of the last ones stays. `counters` may be those of a prober whose place this
    one takes.
    """

    def __init__(self, routing: Routing, counters: Mapping[str, ProbeCounters] | None = None) -> None:
        self._routing = routing
        self._watches: dict[str, Watch] = {}
        self._looking: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._awaited: set[str] = set()  # those there at the start whose first probe has not ended
        self._first: dict[str, Outcome] = {}
        self._uniform: Callable[[float, float], float] = SystemRandom().uniform
        self.counters = dict(counters or {})

    def start(self) -> None:
        """Begin to probe, all upstreams at once, and follow the routing state."""
        self._looking = spawn(self._look(), "look for refused upstreams")
        self._awaited = set(self._routing.endpoints)
        self._routing.on_change = self.follow
        self.follow()

    async def stop(self) -> None:
        """Probe no more; connections of probes under way are closed."""
        if self._routing.on_change == self.follow:  # else another prober has taken the place
            self._routing.on_change = None
        self._awaited.clear()
        if self._looking is not None:
            self._looking.cancel()
            self._ending.add(self._looking)
            self._looking = None
        for upstream_id in tuple(self._watches):
            self._end(upstream_id)
        await asyncio.gather(*self._ending, return_exceptions=True)

    def follow(self) -> None:
        """Probe the upstreams that there are now: new ones at once, those at another address there."""
        if self._looking is None:
            return
        endpoints = self._routing.endpoints
        for upstream_id, watch in tuple(self._watches.items()):
            if upstream_id not in endpoints or endpoints[upstream_id].address != watch.address:
                self._end(upstream_id)
        for upstream_id in [one for one in self.counters if one not in endpoints][:-MAX_REMOVED]:
            del self.counters[upstream_id]
        for upstream_id in [one for one in endpoints if one not in self._watches]:
            self.counters.setdefault(upstream_id, ProbeCounters())
            settings = self._routing.probe_of(upstream_id)
            self._watches[upstream_id] = watch = Watch(upstream_id, settings, self._routing, self.counters[upstream_id])
            watch.task = spawn(self._keep(watch), f"probe {upstream_id}")

    def _end(self, upstream_id: str) -> None:
        """Probe an upstream no more: a probe that is under way reports nothing."""
        watch = self._watches.pop(upstream_id)
        watch.task.cancel()
        self._ending.add(ending := spawn(watch.end(), f"probe {upstream_id} no more"))
        ending.add_done_callback(self._ending.discard)
        self._note_first(upstream_id, None)

    async def _keep(self, watch: Watch) -> None:
        """Probe one upstream again and again: regularly if the file says so, and whenever it is due."""
        if watch.settings is not None:
            self._note_first(watch.upstream_id, await watch.probe())
        while True:
            try:
                async with asyncio.timeout(self._pause_s(watch.settings)):
                    await watch.is_due.wait()
            except TimeoutError:
                pass
            await watch.probe()
            watch.is_due.clear()

    def _pause_s(self, settings: Probe | None) -> float | None:
        """Return the seconds to the next regular probe; None if there is none."""
        if settings is None:
            return None
        jitter = settings.jitter_percent / 100
        return settings.interval_s * self._uniform(1 - jitter, 1 + jitter)

    async def _look(self) -> None:
        """Let upstreams that refuse connections be probed each second, also where the data plane saw it first."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for upstream_id, watch in self._watches.items():
                observed = self._routing.observed.get(upstream_id)
                if observed is not None and observed.is_refused:
                    watch.is_due.set()

    def _note_first(self, upstream_id: str, outcome: Outcome | None) -> None:
        """Say which upstreams are not there yet, once the first probe of each has ended; None: there will be none."""
        if upstream_id not in self._awaited:
            return
        self._awaited.discard(upstream_id)
        if outcome is not None:
            self._first[upstream_id] = outcome
        if self._awaited:
            return
        missing = [f"{upstream_id} ({first})" for upstream_id, first in self._first.items() if first != "passed"]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            logger.warning("%d of %d upstreams are not there yet: %s", len(missing), len(self._first), shown)
