"""What goes over a channel, as JSON: addresses and snapshots. Unknown keys are ignored: another version wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot, Upstream
from stickyproxy.config import Address
from stickyproxy.errors import ChannelError
from stickyproxy.proxy.endpoint import Endpoint

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

PROTOCOL = 1
"""The version of what workers, supervisors and installations say to each other; another is refused."""


def write_address(address: Address) -> dict[str, Any]:
    """Return an address as JSON."""
    return {"host": address.host, "port": address.port, "path": address.path, "tls": address.is_tls}


def read_address(raw: Any) -> Address:
    """Return the address that `write_address` wrote; raise ChannelError."""
    try:
        return Address(str(raw["host"]), int(raw["port"]), str(raw["path"]), is_tls=bool(raw.get("tls", False)))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ChannelError(f"what came is no address: {raw!r}") from error


def write_snapshot(snapshot: Snapshot, endpoints: Mapping[str, Endpoint]) -> dict[str, Any]:
    """Return a snapshot and where its upstreams are reached, as JSON."""
    rules = snapshot.rules
    return {
        "cluster": snapshot.cluster,
        "rules": {
            "policy": rules.policy,
            "on_unavailable": rules.on_unavailable,
            "wait_s": rules.wait_s,
            "has_cookie": rules.has_cookie,
            "uses_client_address": rules.uses_client_address,
        },
        "upstreams": [
            {
                "id": upstream.id,
                "weight": upstream.weight,
                "admin": upstream.admin,
                "health": upstream.health,
                "is_refused": upstream.is_refused,
                "max_sessions": upstream.max_sessions,
                **_write_endpoint(endpoints[upstream.id]),
            }
            for upstream in snapshot.upstreams
        ],
    }


def _write_endpoint(endpoint: Endpoint) -> dict[str, Any]:
    return {"address": write_address(endpoint.address), "ip": endpoint.ip, "server_name": endpoint.server_name}


def read_snapshot(
    raw: Mapping[str, Any], contexts: Mapping[str, ssl.SSLContext]
) -> tuple[Snapshot, dict[str, Endpoint]]:
    """Return the snapshot and the endpoints that `write_snapshot` wrote; raise ChannelError.

    `contexts` are those of the upstreams that TLS is spoken to, by id: they never travel.
    """
    try:
        rules = raw["rules"]
        snapshot = Snapshot(
            raw["cluster"],
            tuple(
                Upstream(
                    one["id"],
                    one["weight"],
                    AdminState(one["admin"]),
                    Health(one["health"]),
                    one["is_refused"],
                    one.get("max_sessions"),
                )
                for one in raw["upstreams"]
            ),
            Rules(
                policy=rules["policy"],
                on_unavailable=rules["on_unavailable"],
                wait_s=rules["wait_s"],
                has_cookie=rules["has_cookie"],
                uses_client_address=rules["uses_client_address"],
            ),
        )
        endpoints = {
            one["id"]: Endpoint(read_address(one["address"]), one["ip"], contexts.get(one["id"]), one["server_name"])
            for one in raw["upstreams"]
        }
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ChannelError(f"what came is no snapshot: {error!r}") from error
    return snapshot, endpoints
