"""The section `listeners`: where clients connect, and what they speak there."""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import override

from stickyproxy.config.address import HTTPS_PORT, MAX_PORT, Address
from stickyproxy.config.errors import Mistake
from stickyproxy.config.explain import read_sections
from stickyproxy.config.fields import Flag, ListenerAddress, Read, Section, refuse
from stickyproxy.config.tls import ListenerTls
from stickyproxy.config.units import shown


def read_redirect(raw: object) -> int | None:
    """Return the port that `true` (443) or a number stands for; None for `false`. Raises `ValueError`."""
    if isinstance(raw, bool):
        return HTTPS_PORT if raw else None
    if isinstance(raw, int) and 1 <= raw <= MAX_PORT:
        return raw
    raise ValueError(f"expected true, false or a port from 1 to {MAX_PORT}, got {shown(raw)}")


class Listener(Section):
    """One address that clients connect to."""

    expected: ClassVar[str] = "an address or a mapping of keys"

    address: ListenerAddress = Field(
        description="Where to listen: 127.0.0.1:8080, :8080 (all interfaces), [::1]:8080 or unix:/run/proxy.sock."
    )
    tls: ListenerTls | None = Field(default=None, description="TLS towards clients; null: none.")
    proxy_protocol: Flag = Field(
        default=False,
        description="Whether the first bytes of each connection are a PROXY protocol header, version 1 or 2, which "
        "only trusted_proxies may send.",
    )
    redirect_to_https: Annotated[
        int | None,
        Read(read_redirect, {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": MAX_PORT}]}),
    ] = Field(
        default=None,
        json_schema_extra={"default": False},
        description="Whether requests by plain HTTP are redirected to https:// of their host: true for port 443, or a "
        "port.",
    )

    @model_validator(mode="after")
    def _check_redirect(self) -> Self:
        if self.tls is not None and self.redirect_to_https is not None:
            refuse([(("redirect_to_https",), "a listener with tls has nothing to redirect: its clients came by https")])
        return self

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain address for a listener."""
        return {"address": raw} if isinstance(raw, str) else raw


def read_listeners(raw: object) -> object:
    """Return the listeners of a list. Raises `ValueError` and `ValidationError`, the latter with all mistakes."""
    if raw == []:
        raise ValueError("expected at least one listener")
    return read_sections(raw, Listener, _find_repeated_listeners)


def _find_repeated_listeners(listeners: dict[int, Listener]) -> Iterable[Mistake]:
    seen: set[Address] = set()
    for position, listener in listeners.items():
        if listener.address in seen:
            yield (position, "address"), f"{listener.address} is listed twice"
        if listener.address.is_unix or listener.address.port:  # with port 0 each listener gets a port of its own
            seen.add(listener.address)
