"""Health as a state machine: probes with rise and fall, and what the data plane saw.

| event, health  | unknown                | healthy                | unhealthy            |
|----------------|------------------------|------------------------|----------------------|
| probe passed   | healthy                | healthy                | healthy after `rise` |
| probe failed   | unhealthy after `fall` | unhealthy after `fall` | unhealthy            |
| refused        | unhealthy, refused     | unhealthy, refused     | unhealthy, refused   |
| connected      | unknown                | healthy                | unknown if refused   |

A failed or slow probe closes an upstream to new clients; only a refused connection says that its process is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from stickyproxy.affinity.snapshot import Health


class HealthEvent(StrEnum):
    """What can be observed of an upstream."""

    PROBE_PASSED = "passed"
    PROBE_FAILED = "failed"
    REFUSED = "refused"
    CONNECTED = "connected"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """How many probes in a row change the health: `rise` passed ones, `fall` failed ones."""

    rise: int = 2
    fall: int = 3


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of one upstream; `streak` counts equal probe results in a row."""

    health: Health = Health.UNKNOWN
    is_refused: bool = False
    streak: int = 0
    last_passed: bool = True


def observe(before: Observed, event: HealthEvent, thresholds: Thresholds) -> Observed:
    """Return what is known after an event; see the table in the module's docstring."""
    match event:
        case HealthEvent.REFUSED:
            return Observed(Health.UNHEALTHY, is_refused=True, streak=0, last_passed=False)
        case HealthEvent.CONNECTED:
            return Observed() if before.is_refused else before
        case HealthEvent.PROBE_PASSED:
            streak = before.streak + 1 if before.last_passed else 1
            # A process that was gone and listens again is a new one: it need not prove itself `rise` times.
            rises = before.health is not Health.UNHEALTHY or before.is_refused or streak >= thresholds.rise
            return Observed(Health.HEALTHY if rises else before.health, streak=streak, last_passed=True)
        case HealthEvent.PROBE_FAILED:
            streak = 1 if before.last_passed else before.streak + 1
            health = Health.UNHEALTHY if streak >= thresholds.fall else before.health
            return replace(before, health=health, streak=streak, last_passed=False)
