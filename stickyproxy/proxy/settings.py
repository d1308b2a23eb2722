"""What the data plane is told when it starts, and with each reload: limits, timeouts, how clients are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from stickyproxy.config import DEFAULT_CLUSTER
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.head import HeadLimits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stickyproxy.affinity.keys import Key
    from stickyproxy.affinity.routes import Route
    from stickyproxy.wire.forwarded import Network
    from stickyproxy.wire.origin import OriginRules

OFF: Final = float("inf")
"""A timeout or a limit that never comes."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Lengths in seconds; infinity is "off". All are checked by one coarse sweep: early or late by up to 0.25 s."""

    head_s: float = 10.0  # a whole request head, from its first byte (Apache's mod_reqtimeout: 20 s)
    body_idle_s: float = 60.0  # between two reads of a request body (nginx: client_body_timeout 60 s)
    keep_alive_s: float = 75.0  # between two requests (nginx: keepalive_timeout 75 s)
    connect_s: float = 5.0
    response_s: float = 300.0  # from the request to the head of its response: an LLM may think
    response_idle_s: float = 300.0  # between two reads of a response body; none for event streams
    send_s: float = 60.0  # for a client to take anything of what waits for it (nginx: send_timeout 60 s)
    websocket_handshake_s: float = 60.0  # from a WebSocket handshake to its answer
    # An idle upstream connection is not used again after this. uvicorn and Node close theirs after 5 s; a request
    # that meets the close fails if it may not be repeated.
    upstream_keep_alive_s: float = 4.0
    tls_handshake_s: float = 10.0  # and the PROXY protocol header before it (HAProxy's documentation: 10 s and less)
    tunnel_idle_s: float = OFF
    tunnel_max_age_s: float = OFF
    tunnel_max_age_jitter_percent: float = 10  # by which the age of each tunnel varies, so that not all end together
    linger_s: float = 2.0  # how long a refused client may go on sending before it is cut (nginx: 5 s)


@dataclass(frozen=True, slots=True)
class Pings:
    """The proxy's own Pings in tunnels, in seconds; `timeout_s` may be infinity."""

    interval_s: float = 30.0
    timeout_s: float = 20.0


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """How the clients of one cluster are known. `cookie` None is none; `keys` are other rungs of the ladder."""

    cookie: CookieAttributes | None = field(default_factory=CookieAttributes)
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a data plane; every value has the default of the configuration file.

    Counts and sizes may be infinity, which is "off". Without `routes` all requests are for the cluster "default".
    """

    head: HeadLimits = field(default_factory=HeadLimits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    handshake_bytes: int = 128 * 1024  # the head of a WebSocket handshake; Bokeh's subprotocol alone reached 12 KB
    body_bytes: float = OFF
    trailers_bytes: int = 8 * 1024
    chunk_extensions_bytes: int = 4 * 1024
    buffer_bytes: int = 64 * 1024
    connections: float = OFF  # of clients, tunnels included
    connections_per_address: float = OFF
    idle_connections: int = 256  # for each upstream (HAProxy's pool-max-conn is unlimited, nginx's keepalive has none)
    clusters: Mapping[str, ClusterSettings] = field(default_factory=lambda: {DEFAULT_CLUSTER: ClusterSettings()})
    routes: tuple[Route, ...] = ()
    trusted: tuple[Network, ...] = ()
    trusts_unix: bool = False
    forwarded: bool = False
    prefix: str | None = None
    origins: OriginRules | None = None
    pings: Pings | None = None
