"""Which sites may open a WebSocket: the Origin of a handshake against a list (RFC 6455, section 10.2).

A browser sends cookies with a WebSocket handshake from any page and asks no one before (there is no CORS for it), but
it says which page it was. Other clients can say what they like.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import Final

# A host of RFC 6454, section 6.2, in ASCII, with the underscore that container names use. No label is empty, so what a
# wildcard stands for is one at least. A name with a dot at its end is another origin, as it is for browsers.
_HOST: Final = rb"([A-Za-z0-9_\-]++(?:\.[A-Za-z0-9_\-]++)*+\.?|\[[0-9A-Fa-f:.]++\])"
_PORT: Final = rb"0|[1-9][0-9]{0,4}"
_ORIGIN: Final = re.compile(rb"((?i:https?))://" + _HOST + rb"(?::(" + _PORT + rb"))?")
_HOST_FIELD: Final = re.compile(_HOST + rb"(?::(" + _PORT + rb")?)?")  # RFC 9110, section 7.2: a port may be empty
_DEFAULT_PORTS: Final = {b"http": 80, b"https": 443}
_WILDCARD: Final = b"://*."

_Origin = tuple[bytes, bytes, int]
"""Scheme, host and port in one form: lower case, the default port written out."""


class OriginRules:
    """The origins that may open a WebSocket.

    `items` are origins (`https://example.org:8443`), those of all subdomains (`https://*.example.org`, at any depth,
    not the bare domain), `same-host` (the Origin's host and port are those of Host), `absent` (no Origin field, as of
    clients that are no browsers) and `null` (what a browser says of a page without an origin). Raises ValueError at
    any other item. Without items, nothing is allowed.
    """

    __slots__ = ("_allows_absent", "_allows_null", "_allows_same_host", "_domains", "_origins")

    def __init__(self, items: tuple[str, ...]) -> None:
        self._allows_absent = "absent" in items
        self._allows_null = "null" in items
        self._allows_same_host = "same-host" in items
        self._origins: set[_Origin] = set()
        self._domains: dict[tuple[bytes, int], tuple[bytes, ...]] = {}  # with their dots, by scheme and port
        for item in items:
            if item not in {"absent", "null", "same-host"}:
                self._add(item)

    def _add(self, item: str) -> None:
        text = item.encode("ascii", "replace")  # "?" is none of the grammar
        is_domain = _WILDCARD in text
        origin = _parse_origin(text.replace(_WILDCARD, b"://", 1))
        if origin is None or (is_domain and origin[1][:1] == b"["):
            raise ValueError(f"no origin: {item}")
        if is_domain:
            scheme, host, port = origin
            self._domains[scheme, port] = (*self._domains.get((scheme, port), ()), b"." + host)
        else:
            self._origins.add(origin)

    def allows(self, origin: bytes | None, host: bytes) -> bool:
        """Say whether a handshake with these values of Origin (None: no such field) and Host is allowed.

        An Origin is one scheme, host and port (RFC 6454, section 6.2) in any case; a default port may be written out.
        Several, or anything else, are not allowed. Several fields must be given joined by commas.
        """
        if origin is None:
            return self._allows_absent
        if origin == b"null":
            return self._allows_null
        parsed = _parse_origin(origin)
        if parsed is None:
            return False
        if parsed in self._origins or (self._allows_same_host and _is_same_host(parsed, host)):
            return True
        scheme, name, port = parsed
        return name.endswith(self._domains.get((scheme, port), ()))


def _parse_origin(text: bytes) -> _Origin | None:
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return None
    scheme = match[1].lower()
    return _read_authority(scheme, match[2], match[3])


def _read_authority(scheme: bytes, host: bytes, port: bytes | None) -> _Origin | None:
    number = _DEFAULT_PORTS[scheme] if port is None else int(port)
    if number > 65535:  # noqa: PLR2004 -- 16 bits
        return None
    if host[:1] == b"[":
        try:
            host = b"[%x]" % int(IPv6Address(host[1:-1].decode("ascii")))  # there are several ways to write it
        except ValueError:
            return None
    return scheme, host.lower(), number


def _is_same_host(origin: _Origin, host: bytes) -> bool:
    """Compare with a Host whose missing port is the default of the Origin's scheme, whatever the listener speaks."""
    match = _HOST_FIELD.fullmatch(host)
    return match is not None and _read_authority(origin[0], match[1], match[2]) == origin
