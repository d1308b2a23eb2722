"""How many descriptors the process may have open, and how many clients that is good for."""

from __future__ import annotations

import logging
import resource
from typing import Final

logger = logging.getLogger(__name__)

_RESERVED: Final = 64  # for everything but clients and upstreams: listeners, logs, probes, the admin listener
_RESERVED_PART: Final = 1 / 4  # at most, where there are few


def raise_descriptor_limit() -> int:
    """Let the process open as many descriptors as it may ever (RLIMIT_NOFILE), and return how many that are.

    Shells and service managers often start with 1,024, which are 480 clients.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.info("the limit of %d descriptors stays: %s", soft, error)
        return soft
    return hard


def choose_connection_limit(descriptors: int, wanted: int | None) -> int:
    """Return how many clients may be connected: as many as wanted, by default half of the descriptors.

    Each client may need a connection to an upstream too. More than that is warned of, and served as far as it goes.
    """
    most = max(1, (descriptors - min(_RESERVED, int(descriptors * _RESERVED_PART))) // 2)
    if wanted is None:
        return most
    if wanted > most:
        logger.warning(
            "limits.connections is %d, but %d descriptors are enough for %d: raise the limit of the process (nofile)",
            wanted,
            descriptors,
            most,
        )
    return wanted
