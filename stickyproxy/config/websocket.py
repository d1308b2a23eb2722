"""The section `websocket`: which pages may open WebSockets, and how silent tunnels are kept open."""

import re
from typing import Annotated, ClassVar

from pydantic import Field

from stickyproxy.config.address import HTTP_PORT, HTTPS_PORT, read_host, read_port
from stickyproxy.config.fields import (
    OrFalse,
    Read,
    Seconds,
    SecondsOrOff,
    Section,
    in_seconds,
    read_items,
    read_text,
)
from stickyproxy.config.units import shown

_WORDS = {"same-host", "absent", "null"}
_DEFAULT_PORTS = {"http": HTTP_PORT, "https": HTTPS_PORT}
_ORIGIN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<rest>.*)", re.DOTALL)
_FORMS = 'an origin such as https://example.org or https://*.example.org, same-host, absent or "null"'


def read_origin(raw: object) -> str:
    """Return an origin as browsers write it (RFC 6454 section 6.2), or a word: `same-host`, `absent`, `null`.

    Names are in lower case, IPv6 addresses compressed, the default port of the scheme is left out. Raises `ValueError`
    with a message for the author of the file; where a password may stand, the message does not repeat the value.
    """
    if raw is None:
        raise ValueError(f'expected {_FORMS}, got nothing; put quotes around "null" for pages without an origin')
    written = read_text(raw)
    if written in _WORDS:
        return written
    if "@" in written:
        raise ValueError("an origin has no user name or password; write https://example.org")
    if written == "*":
        raise ValueError("expected origins, got '*'; for any origin leave the key origins out")
    match = _ORIGIN.fullmatch(written)
    if match is None:
        raise ValueError(f"expected {_FORMS}, got {shown(written)}")
    scheme = match["scheme"].lower()
    if scheme not in _DEFAULT_PORTS:
        hint = "; write that of the page, not of its WebSocket" if scheme in {"ws", "wss"} else ""
        raise ValueError(f"an origin begins with http:// or https://, got {shown(written)}{hint}")
    if match["rest"]:
        raise ValueError(f"an origin ends with its host or port: no path, no slash, no query; got {shown(written)}")
    return f"{scheme}://{_read_authority(match['authority'], _DEFAULT_PORTS[scheme])}"


def _read_authority(authority: str, default_port: int) -> str:
    has_port = not authority.endswith("]") and ":" in authority
    host, _, port = authority.rpartition(":") if has_port else (authority, "", "")
    if not host:
        raise ValueError(f"expected {_FORMS}: the host is missing")
    number = read_port(port, lowest=1) if has_port else default_port
    return _read_pattern(host) + (f":{number}" if number != default_port else "")


def _read_pattern(host: str) -> str:
    name = host.removeprefix("*.")
    if "*" in name:
        raise ValueError(f"a wildcard stands at the beginning, as in https://*.example.org; got {shown(host)}")
    found = read_host(name)
    if name == host:
        return f"[{found}]" if ":" in found else found
    if ":" in found or found.rpartition(".")[2].isdigit():
        raise ValueError(f"a wildcard stands before a name, an IP address has no subdomains; got {shown(host)}")
    return f"*.{found}"


def read_origins(raw: object) -> tuple[str, ...]:
    """Return the origins of a list, each by `read_origin`. Raises `ValueError` and `ValidationError`."""
    if raw == []:
        raise ValueError("expected at least one origin; for any origin leave the key origins out")
    return read_items(raw, read_origin, 'a list, as in ["https://example.org"]')


class Ping(Section):
    """Pings of the proxy's own, so that what stands between does not cut a silent tunnel."""

    expected: ClassVar[str] = "a mapping of keys or false"

    interval_s: Seconds = in_seconds("30s", "After how long a silence a side of a tunnel gets a Ping.")
    timeout_s: SecondsOrOff = in_seconds(
        "20s", "A side that stays silent for so long after a Ping is gone, and its tunnel is closed; off: never."
    )


class WebSocket(Section):
    """Which pages may open WebSockets, and how silent tunnels are kept open."""

    origins: (
        Annotated[tuple[str, ...], Read(read_origins, {"type": "array", "items": {"type": "string"}, "minItems": 1})]
        | None
    ) = Field(
        default=None,
        description="The pages that may open WebSockets, by their Origin: https://example.org, https://*.example.org "
        "(every subdomain), same-host (the Origin is the host and port of the request), absent (requests without an "
        'Origin, which no browser sends) and "null" (sandboxed documents); null without quotes: any.',
    )
    ping: OrFalse[Ping] = Field(
        default=None,
        json_schema_extra={"default": False},
        description="Pings of the proxy's own to each side of a tunnel that was silent for the interval; false: none.",
    )
