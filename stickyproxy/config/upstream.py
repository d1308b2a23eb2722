"""The section `upstreams`: the app processes that serve requests."""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import override

from stickyproxy.config.address import Address
from stickyproxy.config.errors import Mistake
from stickyproxy.config.explain import read_sections
from stickyproxy.config.fields import Section, UpstreamAddress, refuse, text, whole_number
from stickyproxy.config.tls import UpstreamTls

MAX_UPSTREAMS = 1000  # each has probes, a pool and metrics in one process; more call for several proxies

_TLS_BY_DEFAULT = UpstreamTls()


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
        alias="url",
        description="Where it is reached: http://host:port, https://host:port, unix:/path or http+unix:///path.",
    )
    weight: Annotated[int, whole_number(1, 256)] = Field(
        default=1, description="Its share of new clients, relative to the other upstreams."
    )
    explicit_tls: UpstreamTls | None = Field(
        default=None, alias="tls", description="How TLS is spoken where the URL begins with https://."
    )
    max_sessions: Annotated[int, whole_number(1, 1_000_000)] | None = Field(
        default=None, description="The sessions beyond which it takes no new client; null: any number."
    )

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if self.explicit_tls is not None and not self.address.is_tls:
            refuse([(("tls",), "tls needs a url that begins with https://")])
        return self

    @property
    def id(self) -> str:
        """The id from the file, or one made from the address: `127.0.0.1:8001`, or the path of the socket."""
        return self.explicit_id or self.address.path or str(self.address)

    @property
    def tls(self) -> UpstreamTls | None:
        """How TLS is spoken to it, the defaults where the file says nothing; None where the URL is not https."""
        return (self.explicit_tls or _TLS_BY_DEFAULT) if self.address.is_tls else None

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain URL for an upstream."""
        return {"url": raw} if isinstance(raw, str) else raw


def read_upstreams(raw: object) -> object:
    """Return the upstreams of a list. Raises `ValueError` and `ValidationError`, the latter with all mistakes."""
    if isinstance(raw, list) and len(raw) > MAX_UPSTREAMS:
        raise ValueError(f"expected at most {MAX_UPSTREAMS} upstreams, got {len(raw)}")
    return read_sections(raw, Upstream, _find_repeated_upstreams)


def _find_repeated_upstreams(upstreams: dict[int, Upstream]) -> Iterable[Mistake]:
    addresses = set[Address]()
    ids = set[str]()
    for position, upstream in upstreams.items():
        if upstream.address in addresses:
            yield (position, "url"), f"{upstream.address} is listed twice; for a larger share of clients set its weight"
        elif upstream.id in ids:
            yield (position, "id"), f"the id '{upstream.id}' is taken by an upstream above"
        addresses.add(upstream.address)
        ids.add(upstream.id)
