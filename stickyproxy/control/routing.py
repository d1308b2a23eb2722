"""The routing state: what the operator wants and what was observed, put together into snapshots.

Every change ends in one `publish` of a whole snapshot, so that nobody ever sees half of it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from stickyproxy.affinity.health import HealthEvent, Observed, Thresholds, observe
from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot, Upstream
from stickyproxy.proxy.endpoint import Endpoint

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from stickyproxy.config import Address, Config

    Publish = Callable[[Snapshot, Mapping[str, Endpoint]], None]

logger = logging.getLogger(__name__)
CLUSTER = "default"


class Routing:
    """Admin state and health of each upstream of the cluster; `publish` is called with each new snapshot.

    `contexts` are those of the upstreams that TLS is spoken to, by id.
    """

    def __init__(self, config: Config, publish: Publish, contexts: Mapping[str, ssl.SSLContext] | None = None) -> None:
        self._publish = publish
        self._upstreams = config.upstreams
        contexts = contexts or {}
        self.endpoints = {
            one.id: Endpoint(
                one.address,
                tls=contexts.get(one.id),
                server_name=(one.tls.server_name or "") if one.tls is not None else "",
            )
            for one in config.upstreams
        }
        self._admin = dict.fromkeys(self.endpoints, AdminState.READY)
        self.observed = dict.fromkeys(self.endpoints, Observed())
        probe = config.health.probe
        self._thresholds = Thresholds(probe.rise, probe.fall) if probe else Thresholds()
        affinity = config.affinity
        self._rules = Rules(
            policy=affinity.policy,
            on_unavailable=affinity.on_unavailable.action,
            wait_s=affinity.on_unavailable.wait_s,
            has_cookie=affinity.cookie is not None,
            uses_client_address=affinity.client_address,
        )
        self.snapshot = self._build()
        publish(self.snapshot, self.endpoints)

    def _build(self) -> Snapshot:
        upstreams = tuple(
            Upstream(
                one.id,
                one.weight,
                self._admin[one.id],
                self.observed[one.id].health,
                self.observed[one.id].is_refused,
                one.max_sessions,
            )
            for one in self._upstreams
        )
        return Snapshot(CLUSTER, upstreams, self._rules)

    def _renew(self) -> None:
        before, self.snapshot = self.snapshot, self._build()
        if self.snapshot.is_guarded and not before.is_guarded:
            logger.error("no upstream is healthy: new clients are placed all the same")
        elif before.is_guarded and not self.snapshot.is_guarded:
            logger.info("an upstream is healthy again")
        self._publish(self.snapshot, self.endpoints)

    def report(self, upstream_id: str, event: HealthEvent) -> None:
        """Take in what was observed of an upstream; one that is no longer there is ignored."""
        before = self.observed.get(upstream_id)
        if before is None:
            return
        after = observe(before, event, self._thresholds)
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
            self.endpoints[upstream_id] = replace(self.endpoints[upstream_id], ip=ip)
        self._publish(self.snapshot, self.endpoints)

    def set_admin_state(self, upstream_id: str, state: AdminState) -> None:
        """Take in what the operator wants of an upstream; raise KeyError where there is none of that id."""
        if self._admin[upstream_id] is not state:
            self._admin[upstream_id] = state
            logger.info("upstream %s is set to %s", upstream_id, state)
            self._renew()


def _say(observed: Observed) -> str:
    if observed.is_refused:
        return "is refusing connections"
    # From something known to unknown there is one way: a connection to one that had refused them.
    return "accepts connections again" if observed.health is Health.UNKNOWN else f"is {observed.health}"
