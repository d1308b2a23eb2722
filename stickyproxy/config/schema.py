"""The whole configuration as one frozen value, `Config`, and its smaller sections.

The larger sections stand in files of their own: affinity, health, limits, trust. An attribute has the name of its YAML
key, with the unit of its value where it has one: `interval: 5s` is `interval_s = 5.0`.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import override

from stickyproxy.config.address import Address, parse_listener
from stickyproxy.config.affinity import Affinity
from stickyproxy.config.errors import Mistake
from stickyproxy.config.explain import explain
from stickyproxy.config.fields import (
    PATH_PATTERN,
    AbsolutePath,
    AlsoWritten,
    ListenerAddress,
    OrFalse,
    Read,
    SecondsOrZero,
    Section,
    UpstreamAddress,
    as_list,
    in_seconds,
    refuse,
    text,
    whole_number,
)
from stickyproxy.config.health import Health
from stickyproxy.config.limits import Limits, Timeouts
from stickyproxy.config.secret import Sources, read_token
from stickyproxy.config.trust import Forwarded, TrustedProxies, read_trusted_proxies
from stickyproxy.config.units import shown

S = TypeVar("S", bound=Section)

MAX_UPSTREAMS = 1000  # each has probes, a pool and metrics in one process; more call for several proxies
DEFAULT_LISTENER = "127.0.0.1:8080"
DEFAULT_ADMIN = "127.0.0.1:9090"


class Listener(Section):
    """One address that clients connect to."""

    expected: ClassVar[str] = "an address or a mapping of keys"

    address: ListenerAddress = Field(
        description="Where to listen: 127.0.0.1:8080, :8080 (all interfaces), [::1]:8080 or unix:/run/proxy.sock."
    )

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain address for a listener."""
        return {"address": raw} if isinstance(raw, str) else raw


class Upstream(Section):
    """One app process that serves requests."""

    expected: ClassVar[str] = "a URL or a mapping of keys"

    explicit_id: (
        Annotated[str, text(r"[A-Za-z0-9._-]{1,64}", "1 to 64 letters, digits, dots, underscores or hyphens")] | None
    ) = Field(
        default=None,
        alias="id",
        description="The name in tokens, logs and metrics; null: made from the address. To change it ends its pins.",
    )
    address: UpstreamAddress = Field(
        alias="url", description="Where it is reached: http://host:port, unix:/path or http+unix:///path."
    )
    weight: Annotated[int, whole_number(1, 256)] = Field(
        default=1, description="Its share of new clients, relative to the other upstreams."
    )

    @property
    def id(self) -> str:
        """The id from the file, or one made from the address: `127.0.0.1:8001`, or the path of the socket."""
        return self.explicit_id or self.address.path or str(self.address)

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain URL for an upstream."""
        return {"url": raw} if isinstance(raw, str) else raw


def _read_sections(raw: object, section: type[S], find_repeated: Callable[[dict[int, S]], Iterable[Mistake]]) -> object:
    """Return a list of sections. Raises `ValidationError` with the mistakes of all of them, and with what repeats."""
    found: dict[int, S] = {}
    mistakes: list[Mistake] = []
    for position, item in enumerate(as_list(raw)):
        try:
            found[position] = section.model_validate(item)
        except ValidationError as error:
            mistakes.extend(((position, *path), message) for path, message in explain(error, section))
    mistakes.extend(find_repeated(found))
    if mistakes:
        refuse(mistakes)
    return tuple(found.values())


def _read_listeners(raw: object) -> object:
    if raw == []:
        raise ValueError("expected at least one listener")
    return _read_sections(raw, Listener, _find_repeated_listeners)


def _find_repeated_listeners(listeners: dict[int, Listener]) -> Iterable[Mistake]:
    seen: set[Address] = set()
    for position, listener in listeners.items():
        if listener.address in seen:
            yield (position, "address"), f"{listener.address} is listed twice"
        if listener.address.is_unix or listener.address.port:  # with port 0 each listener gets a port of its own
            seen.add(listener.address)


def _read_upstreams(raw: object) -> object:
    if isinstance(raw, list) and len(raw) > MAX_UPSTREAMS:
        raise ValueError(f"expected at most {MAX_UPSTREAMS} upstreams, got {len(raw)}")
    return _read_sections(raw, Upstream, _find_repeated_upstreams)


def _find_repeated_upstreams(upstreams: dict[int, Upstream]) -> Iterable[Mistake]:
    addresses: set[Address] = set()
    ids: set[str] = set()
    for position, upstream in upstreams.items():
        if upstream.address in addresses:
            yield (position, "url"), f"{upstream.address} is listed twice; for a larger share of clients set its weight"
        elif upstream.id in ids:
            yield (position, "id"), f"the id '{upstream.id}' is taken by an upstream above"
        addresses.add(upstream.address)
        ids.add(upstream.id)


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


def read_workers(raw: object) -> int | str:
    """Return 1 or `auto`. Raises `ValueError`."""
    match raw:
        case "auto":
            return "auto"
        case int() if raw == 1 and raw is not True:
            return 1
        case int() if raw > 1:
            raise ValueError("this version runs one worker; expected 1 or auto")
        case _:
            raise ValueError(f"expected 1 or auto, got {shown(raw)}")


class Config(Section):
    """The configuration of one proxy. The defaults alone are a valid one, but without upstreams it serves nobody."""

    listeners: Annotated[
        tuple[Annotated[Listener, AlsoWritten({"type": "string"})], ...], BeforeValidator(_read_listeners)
    ] = Field(
        default_factory=lambda: (Listener.model_validate(DEFAULT_LISTENER),),
        min_length=1,
        description=f"Where clients connect; by default one listener on {DEFAULT_LISTENER}.",
    )
    upstreams: Annotated[
        tuple[Annotated[Upstream, AlsoWritten({"type": "string"})], ...], BeforeValidator(_read_upstreams)
    ] = Field(default=(), max_length=MAX_UPSTREAMS, description="The app processes, each by its URL or with more keys.")
    affinity: Affinity = Field(default_factory=Affinity, description="Which client goes to which upstream.")
    health: Health = Field(default_factory=Health, description="Whether an upstream can serve.")
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
    workers: Annotated[int | Literal["auto"], Read(read_workers, {"enum": [1, "auto"]})] = Field(
        default=1, description="Processes of the data plane; this version runs one."
    )
