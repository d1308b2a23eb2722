"""The routing state: what the operator wants and what was observed, put together into snapshots.

Every change ends in one `publish` of a whole snapshot, so that nobody ever sees half of it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stickyproxy.affinity.health import HealthEvent, Observed, Thresholds, observe
from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stickyproxy.config import Address, Config

    Publish = Callable[[Snapshot, Mapping[str, Address]], None]

logger = logging.getLogger(__name__)
CLUSTER = "default"


class Routing:
    """Admin state and health of each upstream of the cluster; `publish` is called with each new snapshot."""

    def __init__(self, config: Config, publish: Publish) -> None:
        self._publish = publish
        self._upstreams = config.upstreams
        self.addresses: dict[str, Address] = {one.id: one.address for one in config.upstreams}
        self._admin = dict.fromkeys(self.addresses, AdminState.READY)
        self.observed = dict.fromkeys(self.addresses, Observed())
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
        publish(self.snapshot, self.addresses)

    def _build(self) -> Snapshot:
        upstreams = tuple(
            Upstream(
                one.id,
                one.weight,
                self._admin[one.id],
                self.observed[one.id].health,
                self.observed[one.id].is_refused,
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
        self._publish(self.snapshot, self.addresses)

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
