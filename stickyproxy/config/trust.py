"""The sections `trusted_proxies` and `forwarded`: whom the proxy believes about a client, and what it passes on."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from typing import Annotated, Literal

from pydantic import Field

from stickyproxy.config.fields import Flag, Section, read_items, read_text, text
from stickyproxy.config.units import shown


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """Whose `X-Forwarded-*` headers are believed.

    `networks` hold the addresses of proxies in front of this one; `unix` says whether every client of a Unix-socket
    listener is one.
    """

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    unix: bool = False


def _read_network(raw: object) -> IPv4Network | IPv6Network | Literal["unix"]:
    written = read_text(raw)
    if written == "unix":
        return "unix"
    try:
        return ip_network(written)
    except ValueError:
        hint = _network_around(written)
    raise ValueError(f"expected a network such as 10.0.0.0/8, an address or unix, got {shown(written)}{hint}")


def _network_around(written: str) -> str:
    try:
        return f"; did you mean {ip_interface(written).network}?"
    except ValueError:
        return ""


def read_trusted_proxies(raw: object) -> TrustedProxies:
    """Return the networks of a list of networks, addresses and `unix`. Raises `ValueError`."""
    items = read_items(raw, _read_network, 'a list, as in ["10.0.0.0/8"]')
    return TrustedProxies(tuple(item for item in items if item != "unix"), unix="unix" in items)


class Forwarded(Section):
    """Which headers tell an upstream about the client, beside `X-Forwarded-For`, `-Proto` and `-Host`."""

    forwarded: Flag = Field(default=False, description="Whether to send `Forwarded` (RFC 7239) too.")
    prefix: Annotated[str, text(r"/[\x21-\x7e]*", 'a path that begins with "/", without spaces')] | None = Field(
        default=None, description="The value of `X-Forwarded-Prefix`; null: the header is not sent."
    )
