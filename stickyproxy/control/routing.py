"""The routing state: what the operator wants and what was observed, put together into a snapshot of each cluster.

Every change ends in one `publish` of all snapshots, so that nobody ever sees half of it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Self

from stickyproxy.affinity.health import HealthEvent, Observed, Thresholds, observe
from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot, Upstream
from stickyproxy.config import DEFAULT_CLUSTER, ConfigErrors, Probe, load_text
from stickyproxy.config.written import write_section
from stickyproxy.control.certificates import make_upstream_contexts
from stickyproxy.control.process import count_workers
from stickyproxy.proxy.endpoint import Endpoint

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from stickyproxy import config as config_values
    from stickyproxy.config import Address, Config

    Publish = Callable[[tuple[Snapshot, ...], Mapping[str, Endpoint]], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _ClusterSettings:
    """What the configuration says of a cluster beside its upstreams."""

    rules: Rules
    thresholds: Thresholds
    probe: Probe | None

    @classmethod
    def of(cls, cluster: config_values.Cluster, config: Config) -> Self:
        affinity, probe = cluster.affinity, cluster.health.probe
        rules = Rules(
            policy=affinity.policy,
            on_unavailable=affinity.on_unavailable.action,
            wait_s=affinity.on_unavailable.wait_s,
            has_cookie=affinity.cookie is not None,
            uses_client_address=affinity.client_address,
            is_shared=count_workers(config) > 1,
        )
        return cls(rules, Thresholds(probe.rise, probe.fall) if probe else Thresholds(), probe)


_UNKNOWN: Final = _ClusterSettings(Rules(), Thresholds(), Probe())
"""Those of a cluster that upstreams leave, and that only the process before this one had in its configuration."""


class Routing:
    """Admin state and health of each upstream of all clusters; `publish` is called with each new routing state.

    `contexts` are those of the upstreams that TLS is spoken to, by id. An upstream that a reload takes out of the
    configuration is `leaving`: in drain, until nothing of it is in use or its process is gone; a cluster that is taken
    out is there as long as it has such upstreams. Upstreams that the proxy itself started are `processes`: they stand
    beside those of the configuration, and a reload leaves them alone.
    """

    def __init__(self, config: Config, publish: Publish, contexts: Mapping[str, ssl.SSLContext] | None = None) -> None:
        self._publish = publish
        self._upstreams: dict[str, config_values.Upstream] = {}
        self.leaving: dict[str, config_values.Upstream] = {}
        """Upstreams that are no longer in the configuration, but still in use, by id."""
        self.processes: dict[str, config_values.Upstream] = {}
        """Upstreams that the proxy itself started, by id."""
        self.clusters: dict[str, str] = {}
        """The cluster of each upstream, by id."""
        self._closing: set[str] = set()  # of them
        self.on_change: Callable[[], None] | None = None
        """Called when an upstream has come, moved or gone, but for a reload, after which everybody looks anew."""
        self.is_retired: Callable[[str], bool] = lambda _: False
        """Says of an app process whether it is to end, whatever operators want of it."""
        self.endpoints: dict[str, Endpoint] = {}
        self._admin: dict[str, AdminState] = {}
        self.observed: dict[str, Observed] = {}
        self._settings: dict[str, _ClusterSettings] = {}  # of clusters in the configuration, in its order, and others
        self._written: tuple[str, ...] = ()  # the clusters in the configuration
        self._take(config, contexts or {})
        self.snapshots = self._build()
        """The routing state of each cluster, by name."""
        self._publish_now()

    def _take(self, config: Config, contexts: Mapping[str, ssl.SSLContext]) -> None:
        """Take in a configuration; what is known of the upstreams that stay is kept."""
        gone, self._upstreams = self._upstreams, {}
        before, clusters = self._settings, config.every_cluster
        self._written = tuple(one.name for one in clusters)
        self._settings = {one.name: _ClusterSettings.of(one, config) for one in clusters}
        known = set(self.clusters.values())  # some may be leaving
        self._settings |= {name: one for name, one in before.items() if name in known and name not in self._settings}
        for cluster in clusters:
            for one in cluster.upstreams:
                if not self._is_taken(one.id):
                    self._take_upstream(cluster.name, one, contexts)
        for upstream_id, one in gone.items():
            if upstream_id not in self._upstreams:
                self.leaving[upstream_id] = one
                if self._admin[upstream_id] is AdminState.READY:
                    self._admin[upstream_id] = AdminState.DRAIN

    def _take_upstream(self, cluster: str, one: config_values.Upstream, contexts: Mapping[str, ssl.SSLContext]) -> None:
        self._upstreams[one.id] = one
        self.clusters[one.id] = cluster
        if self.leaving.pop(one.id, None) is not None:
            self._admin[one.id] = AdminState.READY
        self._admin.setdefault(one.id, AdminState.READY)
        before = self.endpoints.get(one.id)
        is_same = before is not None and before.address == one.address
        if not is_same:
            self.observed[one.id] = Observed()
        self.endpoints[one.id] = make_endpoint(one, contexts, before.ip if before is not None and is_same else "")

    def probe_of(self, upstream_id: str) -> Probe | None:
        """Return how an upstream is probed, as the configuration says of its cluster; None: not from time to time."""
        return self._settings_of(self.clusters[upstream_id]).probe

    def _settings_of(self, cluster: str) -> _ClusterSettings:
        """Return the settings of a cluster; the defaults, where another process knew it and this one does not."""
        return self._settings.get(cluster) or _UNKNOWN

    def _is_taken(self, upstream_id: str) -> bool:
        if upstream_id in self.processes:
            logger.error("upstream %s of the configuration is left out: an app process has that id", upstream_id)
        return upstream_id in self.processes

    def export(self) -> dict[str, Any]:
        """Return what is known of the upstreams, as JSON, for another process that goes on from it."""
        return {
            "admin": dict(self._admin),
            "observed": {
                upstream_id: [one.health, one.is_refused, one.streak, one.last_passed]
                for upstream_id, one in self.observed.items()
            },
            "ips": {upstream_id: endpoint.ip for upstream_id, endpoint in self.endpoints.items()},
            "leaving": [write_section(one) for one in self.leaving.values()],
            "clusters": {upstream_id: self.clusters[upstream_id] for upstream_id in self.leaving},
            "processes": [write_section(one) for one in self.processes.values()],
            "closing": sorted(self._closing),
        }

    def restore(self, exported: Mapping[str, Any]) -> None:
        """Go on from what another process knew of the upstreams; what cannot be read is left out."""
        for name, ours, state in (
            ("leaving", self.leaving, AdminState.DRAIN),
            ("processes", self.processes, AdminState.READY),
        ):
            for one in _read_upstreams(exported.get(name, ()), self.endpoints):
                ours[one.id] = one
                self._begin(one, state, str(exported.get("clusters", {}).get(one.id, DEFAULT_CLUSTER)))
        self._closing.update(self.processes.keys() & exported.get("closing", ()))
        for upstream_id, state in exported.get("admin", {}).items():
            is_back = upstream_id in self.leaving and state == AdminState.READY
            if upstream_id in self._admin and state in tuple(AdminState) and not is_back:
                self._admin[upstream_id] = AdminState(state)
        for upstream_id, (health, *rest) in exported.get("observed", {}).items():
            if upstream_id in self.observed and health in tuple(Health):
                self.observed[upstream_id] = Observed(Health(health), *rest)
        for upstream_id, ip in exported.get("ips", {}).items():
            if upstream_id in self.endpoints:
                self.endpoints[upstream_id] = replace(self.endpoints[upstream_id], ip=ip)
        self._renew()
        self._tell_change()

    def _begin(self, upstream: config_values.Upstream, state: AdminState, cluster: str = DEFAULT_CLUSTER) -> None:
        """Know an upstream that is not of the configuration; nothing was observed of it yet."""
        self.clusters[upstream.id] = cluster
        self._admin[upstream.id] = state
        self.observed[upstream.id] = Observed()
        self.endpoints[upstream.id] = make_endpoint(upstream, make_upstream_contexts([upstream]))

    def _forget(self, upstream_id: str) -> None:
        del self.endpoints[upstream_id], self._admin[upstream_id], self.observed[upstream_id]
        del self.clusters[upstream_id]

    def _tell_change(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def reload(self, config: Config, contexts: Mapping[str, ssl.SSLContext]) -> None:
        """Work by another configuration; upstreams that it keeps keep their admin state and health."""
        self._take(config, contexts)
        self._renew()

    def drop(self, upstream_ids: Collection[str]) -> None:
        """Forget upstreams that were leaving."""
        for upstream_id in upstream_ids:
            del self.leaving[upstream_id]
            self._forget(upstream_id)
            logger.info("upstream %s, which is no longer in the configuration, is empty: removed", upstream_id)
        if upstream_ids:
            self._renew()
            self._tell_change()

    # App processes

    def add_process(self, upstream: config_values.Upstream) -> None:
        """Take in an upstream that the proxy itself started, and that is ready for clients.

        One that is there already was started anew, at the same address or another: what was observed of it says nothing
        any more, what the operator wants of it holds. Raises ValueError where the id is one of the configuration.
        """
        if upstream.id in self.endpoints and upstream.id not in self.processes:
            raise ValueError(f"the upstream {upstream.id!r} is in the configuration; no app process can have its id")
        self.processes[upstream.id] = upstream
        self._begin(upstream, self._admin.get(upstream.id, AdminState.READY))
        self._renew()
        self._tell_change()

    def remove_process(self, upstream_id: str) -> None:
        """Forget an upstream that the proxy itself started, with its pins; one that is not there is ignored."""
        if self.processes.pop(upstream_id, None) is not None:
            self._closing.discard(upstream_id)
            self._forget(upstream_id)
            self._renew()
            self._tell_change()

    def set_closing(self, upstream_ids: Iterable[str]) -> None:
        """Let pins to these app processes hold only while something of their session is open, from now to their end.

        Those that are not there are ignored. Tunnels are not closed by it.
        """
        closing = self.processes.keys() & set(upstream_ids)
        if not closing <= self._closing:
            self._closing |= closing
            self._renew()

    def report_gone(self, upstream_id: str) -> None:
        """Take in that the process of an upstream has ended: its pins end at once."""
        self.report(upstream_id, HealthEvent.REFUSED)

    @property
    def admin_states(self) -> dict[str, AdminState]:
        """Return what the operator wants of each upstream, by id."""
        return dict(self._admin)

    def _build(self) -> dict[str, Snapshot]:
        """Return the routing state of each cluster: those of the configuration, then those that upstreams leave."""
        by_cluster: dict[str, list[Upstream]] = {name: [] for name in self._written}
        for one in (*self._upstreams.values(), *self.leaving.values(), *self.processes.values()):
            by_cluster.setdefault(self.clusters[one.id], []).append(
                Upstream(
                    one.id,
                    one.weight,
                    self._admin[one.id],
                    self.observed[one.id].health,
                    self.observed[one.id].is_refused,
                    one.max_sessions,
                    one.id in self._closing,
                )
            )
        return {
            name: Snapshot(name, tuple(upstreams), self._settings_of(name).rules)
            for name, upstreams in by_cluster.items()
        }

    def _renew(self) -> None:
        before, self.snapshots = self.snapshots, self._build()
        for name, snapshot in self.snapshots.items():
            was_guarded = name in before and before[name].is_guarded
            where = "" if name == DEFAULT_CLUSTER else f" of the cluster {name}"
            if snapshot.is_guarded and not was_guarded:
                logger.error("no upstream%s is healthy: new clients are placed all the same", where)
            elif was_guarded and not snapshot.is_guarded:
                logger.info("an upstream%s is healthy again", where)
        self._publish_now()

    def _publish_now(self) -> None:
        self._publish(tuple(self.snapshots.values()), self.endpoints)

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        """Return the upstreams of all clusters, as they stand now."""
        return tuple(one for snapshot in self.snapshots.values() for one in snapshot.upstreams)

    def report(self, upstream_id: str, event: HealthEvent) -> None:
        """Take in what was observed of an upstream; one that is no longer there is ignored."""
        before = self.observed.get(upstream_id)
        if before is None:
            return
        after = observe(before, event, self._settings_of(self.clusters[upstream_id]).thresholds)
        self.observed[upstream_id] = after
        if (after.health, after.is_refused) != (before.health, before.is_refused):
            level = logging.WARNING if after.health is Health.UNHEALTHY else logging.INFO
            logger.log(level, "upstream %s %s", upstream_id, _say(after))
            self._renew()

    @property
    def addresses(self) -> dict[str, Address]:
        """Return the addresses of the upstreams as they are written, by id."""
        return {upstream_id: endpoint.address for upstream_id, endpoint in self.endpoints.items()}

    def resolve(self, addresses: Mapping[str, str]) -> None:
        """Take in what the names of upstreams stand for now: IP addresses by id."""
        for upstream_id, ip in addresses.items():
            if upstream_id in self.endpoints:
                self.endpoints[upstream_id] = replace(self.endpoints[upstream_id], ip=ip)
        self._publish_now()

    def set_admin_state(self, upstream_id: str, state: AdminState) -> None:
        """Take in what the operator wants of an upstream; raise KeyError where there is none of that id.

        One that is leaving, or that is to end, takes no new client whatever is wanted: ValueError. It can be set to
        maintenance: its clients are placed anew with their next request, and it ends the sooner.
        """
        is_retired = upstream_id in self.processes and self.is_retired(upstream_id)
        if state is AdminState.READY and (is_retired or upstream_id in self._closing):
            raise ValueError(
                f"the app process {upstream_id!r} ends once its sessions have; it takes no new client. "
                "For more processes: stickyproxy scale"
            )
        if upstream_id in self.leaving and state is AdminState.READY:
            raise ValueError(f"the upstream {upstream_id!r} is no longer in the configuration; it can only drain")
        if self._admin[upstream_id] is not state:
            self._admin[upstream_id] = state
            logger.info("upstream %s is set to %s", upstream_id, state)
            self._renew()


def _read_upstreams(written: Iterable[str], known: Collection[str]) -> Iterator[config_values.Upstream]:
    """Yield the upstreams that `write_section` wrote, but for those that are known or cannot be read."""
    for text in written:
        with suppress(ConfigErrors):
            yield from (one for one in load_text(f"upstreams: [{text}]", {}).upstreams if one.id not in known)


def make_endpoint(upstream: config_values.Upstream, contexts: Mapping[str, ssl.SSLContext], ip: str = "") -> Endpoint:
    """Return how an upstream is reached; `ip` is what its name stands for, where that is known."""
    server_name = (upstream.tls.server_name or "") if upstream.tls is not None else ""
    return Endpoint(upstream.address, ip, tls=contexts.get(upstream.id), server_name=server_name)


def _say(observed: Observed) -> str:
    if observed.is_refused:
        return "is refusing connections"
    # From something known to unknown there is one way: a connection to one that had refused them.
    return "accepts connections again" if observed.health is Health.UNKNOWN else f"is {observed.health}"
