"""The whole configuration as one frozen value, `Config`, and its smaller sections.

The larger sections stand in files of their own: affinity, cluster, health, limits, listener, route, run, tls, trust,
upstream, websocket.
An attribute has the name of its YAML key, with the unit of its value where it has one: `interval: 5s` is
`interval_s = 5.0`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import override

from stickyproxy.config.address import parse_listener
from stickyproxy.config.affinity import Affinity
from stickyproxy.config.cluster import DEFAULT_CLUSTER, ByName, Cluster, find_shared_upstreams, read_clusters
from stickyproxy.config.errors import Mistake
from stickyproxy.config.fields import (
    PATH_PATTERN,
    AbsolutePath,
    AlsoWritten,
    Flag,
    ListenerAddress,
    OrFalse,
    Read,
    SecondsOrOff,
    SecondsOrZero,
    Section,
    SocketOrFalse,
    in_seconds,
    or_word,
    refuse,
    text,
    whole_number,
)
from stickyproxy.config.health import Health
from stickyproxy.config.limits import Limits, Timeouts
from stickyproxy.config.listener import Listener, read_listeners
from stickyproxy.config.preset import PRESETS, read_presets
from stickyproxy.config.route import MAX_ROUTES, Route, find_route_mistakes, read_routes
from stickyproxy.config.run import Run
from stickyproxy.config.secret import Sources, read_token
from stickyproxy.config.trust import Forwarded, TrustedProxies, read_trusted_proxies
from stickyproxy.config.upstream import MAX_UPSTREAMS, Upstream, read_upstreams
from stickyproxy.config.websocket import WebSocket

DEFAULT_LISTENER = "127.0.0.1:8080"
DEFAULT_ADMIN = "127.0.0.1:9090"
DEFAULT_COOKIE = "stickyproxy"
# Browsers keep cookies by host and not by port. These ports are those of sites, of which a host has one.
_PORTS_OF_SITES = frozenset({0, 80, 443, 8080})

RUN_OR_LISTED = "an app is either run here or listed: where there is run, there are no upstreams"
NEEDS_TOKEN = "an admin address that is not loopback needs a token"  # noqa: S105 - no token, a message about it


def _read_token(raw: object, info: ValidationInfo) -> str:
    return read_token(raw, Sources.of(info))


class Admin(Section):
    """The listener for operators: metrics, health of the proxy, API and dashboard."""

    expected: ClassVar[str] = "a mapping of keys or false"

    address: ListenerAddress = Field(
        default=parse_listener(DEFAULT_ADMIN),
        json_schema_extra={"default": DEFAULT_ADMIN},
        description="Where operators connect; in the forms that a listener takes.",
    )
    token: Annotated[str, PlainValidator(_read_token), WithJsonSchema({"type": "string"})] | None = Field(
        default=None,
        repr=False,
        description="The bearer token that the API asks for, 16 characters or more: env:NAME, file:/path or the token "
        "itself. Needed where the address is not loopback.",
    )

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.token is None and not self.address.is_loopback:
            refuse([(("address",), NEEDS_TOKEN)])
        return self


class AccessLog(Section):
    """One line for each exchange and each tunnel."""

    expected: ClassVar[str] = "json, combined, false or a mapping of keys"

    format: Literal["json", "combined"] = Field(
        default="json", description="json: one object a line; combined: the format of Apache's and nginx's logs."
    )
    path: Annotated[str, text(f"-|{PATH_PATTERN}", "an absolute path, or - for standard output")] = Field(
        default="-", description="The file; - is standard output."
    )

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain format for a log to standard output."""
        return {"format": raw} if isinstance(raw, str) else raw


MAX_WORKERS = 64  # the supervisor talks to each and sums the counters of all; more cores call for several proxies

_read_workers = or_word("auto", whole_number(1, MAX_WORKERS))


def read_workers(raw: object) -> object:
    """Return a number from 1 to 64, or `auto`: how many that is, the machine says. Raises `ValueError`."""
    return "auto" if raw == "auto" else _read_workers.read(raw)


class Config(Section):
    """The configuration of one proxy. The defaults alone are a valid one, but without upstreams it serves nobody."""

    presets: Annotated[
        tuple[str, ...],
        Read(read_presets, {"anyOf": [{"enum": list(PRESETS)}, {"type": "array", "items": {"enum": list(PRESETS)}}]}),
    ] = Field(
        default=(),
        description="What the frameworks of the app need, by their names: each stands under all that the file says, "
        "and those named later go over those named earlier. `stickyproxy presets` lists them.",
    )
    listeners: Annotated[
        tuple[Annotated[Listener, AlsoWritten({"type": "string"})], ...], BeforeValidator(read_listeners)
    ] = Field(
        default_factory=lambda: (Listener.model_validate(DEFAULT_LISTENER),),
        min_length=1,
        description=f"Where clients connect; by default one listener on {DEFAULT_LISTENER}.",
    )
    upstreams: Annotated[
        tuple[Annotated[Upstream, AlsoWritten({"type": "string"})], ...], BeforeValidator(read_upstreams)
    ] = Field(default=(), max_length=MAX_UPSTREAMS, description="The app processes, each by its URL or with more keys.")
    run: Run | None = Field(
        default=None,
        description="The app as processes that the proxy itself starts, in place of upstreams; null: none.",
    )
    affinity: Affinity = Field(default_factory=Affinity, description="Which client goes to which upstream.")
    health: Health = Field(default_factory=Health, description="Whether an upstream can serve.")
    clusters: Annotated[tuple[Cluster, ...], BeforeValidator(read_clusters), ByName()] = Field(
        default=(), json_schema_extra={"default": {}}, description="More apps, each by a name; routes lead to them."
    )
    routes: Annotated[tuple[Route, ...], BeforeValidator(read_routes)] = Field(
        default=(),
        max_length=MAX_ROUTES,
        description="Which requests go to which cluster; the most specific route counts, wherever it stands.",
    )
    admin: OrFalse[Admin] = Field(default_factory=Admin, description="The listener for operators; false: none.")
    trusted_proxies: Annotated[
        TrustedProxies, Read(read_trusted_proxies, {"type": "array", "items": {"type": "string"}})
    ] = Field(
        default=TrustedProxies(),
        json_schema_extra={"default": []},
        description="Networks and addresses of proxies in front of this one, whose X-Forwarded-* headers are believed; "
        "unix: every client of a Unix-socket listener.",
    )
    forwarded: Forwarded = Field(default_factory=Forwarded, description="What an upstream is told about the client.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="How long the proxy waits.")
    limits: Limits = Field(default_factory=Limits, description="How much the proxy takes before it refuses.")
    websocket: WebSocket = Field(
        default_factory=WebSocket, description="Which pages may open WebSockets, and how tunnels are kept open."
    )
    dns_refresh_s: SecondsOrOff = in_seconds(
        "10s", "How often the names of upstreams are looked up again; off: only at the start."
    )
    access_log: Annotated[OrFalse[AccessLog], AlsoWritten({"enum": ["json", "combined"]})] = Field(
        default=None,
        json_schema_extra={"default": False},
        description="One line for each exchange: json, combined or a mapping; false: none.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe messages that the proxy logs about itself."
    )
    grace_s: SecondsOrZero = in_seconds("30s", "How long open exchanges and tunnels get to end when the proxy stops.")
    state_directory: AbsolutePath | None = Field(
        default=None, description="Where the proxy keeps the secret it made; null: the user's state directory."
    )
    workers: Annotated[int | Literal["auto"], Read(read_workers, _read_workers.json_schema)] = Field(
        default=1, description="Processes of the data plane; auto: one for each core that the proxy may use."
    )
    control: SocketOrFalse | None = Field(
        default=None,
        description="The Unix socket on which commands such as reload reach the proxy; null: one in the runtime "
        "directory; false: none.",
    )
    hand_over: SocketOrFalse | None = Field(
        default=None,
        description="The Unix socket on which another installation takes over the connections (serve --take-over); "
        "null: one in the runtime directory; false: none.",
    )
    reload_on_change: Flag = Field(default=False, description="Whether the file is read again when it changes.")

    @property
    def has_upstreams(self) -> bool:
        """Whether there is anything to serve: upstreams that are listed, or an app to run."""
        return bool(self.upstreams or self.clusters) or self.run is not None

    @property
    def has_default(self) -> bool:
        """Whether there is a cluster for the requests that no route names."""
        return bool(self.upstreams) or self.run is not None or not self.clusters

    @property
    def every_cluster(self) -> tuple[Cluster, ...]:
        """All clusters, that of the sections at the top of the file first, if there is one."""
        default = Cluster.of_parts(DEFAULT_CLUSTER, self.upstreams, self.affinity, self.health)
        return (default, *self.clusters) if self.has_default else self.clusters

    @property
    def every_upstream(self) -> tuple[Upstream, ...]:
        """The upstreams of all clusters."""
        return tuple(upstream for cluster in self.every_cluster for upstream in cluster.upstreams)

    @property
    def has_cookie(self) -> bool:
        """Whether any cluster has an affinity cookie."""
        return any(cluster.affinity.cookie is not None for cluster in self.every_cluster)

    def name_cookie(self, cluster: Cluster) -> str:
        """Return the name of a cluster's affinity cookie.

        Where neither it nor secrets are given, the port of the first listener is part of it: another proxy on this host
        would have the same name. Secrets are given to replicas, which must agree.
        """
        given = cluster.affinity.cookie.name if cluster.affinity.cookie is not None else None
        if given is not None:
            return given
        name = DEFAULT_COOKIE if cluster.name == DEFAULT_CLUSTER else f"{DEFAULT_COOKIE}-{cluster.name}"
        port = self.listeners[0].address.port
        return name if self.affinity.secrets or port in _PORTS_OF_SITES else f"{name}-{port}"

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        if mistakes := [*self._find_untrusted(), *self.find_conflicts()]:
            refuse(mistakes)
        return self

    def find_conflicts(self) -> Iterator[Mistake]:
        """Yield a mistake for each key that does not go with another, where the command line may have changed one."""
        yield from self._find_shared_sockets()
        if self.run is not None:
            if self.upstreams:
                yield ("upstreams",), RUN_OR_LISTED
            yield from ((("run", *path), text) for path, text in self.run.find_second_place())
        yield from self._find_cluster_conflicts()

    def _find_cluster_conflicts(self) -> Iterator[Mistake]:
        if not (self.clusters or self.routes):
            return
        clusters = self.every_cluster
        if len(self.every_upstream) > MAX_UPSTREAMS:
            yield ("clusters",), f"expected at most {MAX_UPSTREAMS} upstreams in all clusters together"
        yield from find_shared_upstreams(clusters)
        yield from find_route_mistakes(self.routes, {one.name: one for one in clusters})
        names: dict[str, str] = {}
        for one in clusters:
            if one.affinity.cookie is not None:
                name = self.name_cookie(one)
                if name in names:
                    yield (
                        ("clusters", one.name, "affinity", "cookie", "name"),
                        (f"{name} is the name of the affinity cookie of the cluster {names[name]} too"),
                    )
                names.setdefault(name, one.name)

    def _find_shared_sockets(self) -> Iterator[Mistake]:
        """Yield a mistake for `control` and `hand_over` where their path has another use too."""
        users = {Path(one.address.path): "a listener" for one in self.listeners if one.address.is_unix}
        if self.admin is not None and self.admin.address.is_unix:
            users.setdefault(Path(self.admin.address.path), "admin")
        for key, path in (("control", self.control), ("hand_over", self.hand_over)):
            if path in users:
                yield (key,), f"{path} is the path of {users[path]} too"
            elif path:
                users[path] = key

    def _find_untrusted(self) -> Iterator[Mistake]:
        trusted = self.trusted_proxies
        for position, listener in enumerate(self.listeners):
            is_unix = listener.address.is_unix
            if listener.proxy_protocol and not (trusted.unix if is_unix else trusted.networks):
                needed = "unix" if is_unix else "the networks that send it"
                text = f"proxy_protocol needs {needed} in trusted_proxies; all other connections are refused"
                yield ("listeners", position, "proxy_protocol"), text
