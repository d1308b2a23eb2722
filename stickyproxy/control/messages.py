"""What goes over a channel, as JSON: addresses and snapshots. Unknown keys are ignored: another version wrote them.

What an upstream needs for TLS does not travel. Nothing is ever spoken in plain text to one whose address asks for TLS.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, get_args

from stickyproxy.affinity.snapshot import AdminState, Health, OnUnavailable, Policy, Rules, Snapshot, Upstream
from stickyproxy.config import Address, UpstreamTls
from stickyproxy.control.certificates import make_upstream_context
from stickyproxy.errors import ChannelError
from stickyproxy.proxy.endpoint import Endpoint

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping

_MAX_PORT: Final = 65535
PROTOCOL = 2
"""The version of what workers, supervisors and installations say to each other; another is refused."""


def write_address(address: Address) -> dict[str, Any]:
    """Return an address as JSON."""
    return {"host": address.host, "port": address.port, "path": address.path, "tls": address.is_tls}


def read_address(raw: Any) -> Address:
    """Return the address that `write_address` wrote; raise ChannelError."""
    try:
        host, port, path = _get(raw, "host", str), _get(raw, "port", int), _get(raw, "path", str)
        if not 0 <= port <= _MAX_PORT:
            raise ValueError("no port")  # noqa: TRY301 -- all that is wrong ends in one place
        return Address(host, port, path, is_tls="tls" in raw and _get(raw, "tls", bool))
    except (TypeError, KeyError, ValueError) as error:
        raise ChannelError(f"what came is no address: {raw!r}") from error


def _get(raw: Any, name: str, *wanted: type[Any]) -> Any:
    """Return a value of just the type that is wanted; raise TypeError or KeyError."""
    value = raw[name]
    if type(value) not in wanted:
        raise TypeError(f"{name} is {value!r}")
    return value


def _choose(value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is not known to this version")
    return value


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
            "is_shared": rules.is_shared,
        },
        "upstreams": [
            {
                "id": upstream.id,
                "weight": upstream.weight,
                "admin": upstream.admin,
                "health": upstream.health,
                "is_refused": upstream.is_refused,
                "max_sessions": upstream.max_sessions,
                "is_closing": upstream.is_closing,
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

    `contexts` are those of the upstreams that TLS is spoken to, by id. One that has none here, because it is no longer
    in the configuration of this process, gets what a configuration asks for that says nothing: its certificate must be
    for its name, and of an authority that the system trusts.
    """
    try:
        snapshot = Snapshot(
            _get(raw, "cluster", str), tuple(map(_read_upstream, raw["upstreams"])), _read_rules(raw["rules"])
        )
        endpoints = {one["id"]: _read_endpoint(one, contexts) for one in raw["upstreams"]}
    except (TypeError, KeyError, ValueError) as error:
        raise ChannelError(f"what came is no snapshot: {error!r}") from error
    return snapshot, endpoints


def write_snapshots(snapshots: Iterable[Snapshot], endpoints: Mapping[str, Endpoint]) -> list[dict[str, Any]]:
    """Return the snapshots of all clusters, and where their upstreams are reached, as JSON."""
    return [write_snapshot(one, endpoints) for one in snapshots]


def read_snapshots(
    raw: Any, contexts: Mapping[str, ssl.SSLContext]
) -> tuple[tuple[Snapshot, ...], dict[str, Endpoint]]:
    """Return what `write_snapshots` wrote, the endpoints of all clusters as one; as `read_snapshot`."""
    if not isinstance(raw, list) or not all(isinstance(one, dict) for one in raw):
        raise ChannelError(f"what came is no list of snapshots: {raw!r}")
    read = [read_snapshot(one, contexts) for one in raw]
    return tuple(snapshot for snapshot, _ in read), {name: one for _, found in read for name, one in found.items()}


def _read_upstream(raw: Any) -> Upstream:
    weight, most = _get(raw, "weight", int), raw.get("max_sessions")
    if weight < 1 or not (most is None or (type(most) is int and most >= 0)):
        raise ValueError(f"weight is {weight!r}, max_sessions is {most!r}")
    return Upstream(
        _get(raw, "id", str),
        weight,
        AdminState(raw["admin"]),
        Health(raw["health"]),
        _get(raw, "is_refused", bool),
        most,
        is_closing="is_closing" in raw and _get(raw, "is_closing", bool),
    )


def _read_rules(raw: Any) -> Rules:
    return Rules(
        policy=_choose(raw["policy"], get_args(Policy)),
        on_unavailable=_choose(raw["on_unavailable"], get_args(OnUnavailable)),
        wait_s=float(_get(raw, "wait_s", int, float)),
        has_cookie=_get(raw, "has_cookie", bool),
        uses_client_address=_get(raw, "uses_client_address", bool),
        is_shared="is_shared" in raw and _get(raw, "is_shared", bool),
    )


def _read_endpoint(raw: Any, contexts: Mapping[str, ssl.SSLContext]) -> Endpoint:
    address = read_address(raw["address"])
    context = (contexts.get(raw["id"]) or _strict_context()) if address.is_tls else None
    return Endpoint(address, _get(raw, "ip", str), context, _get(raw, "server_name", str))


@cache
def _strict_context() -> ssl.SSLContext:
    """Return the context of an upstream of which the configuration says nothing."""
    return make_upstream_context(UpstreamTls())
