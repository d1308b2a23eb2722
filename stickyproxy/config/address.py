"""Where a listener listens and where an upstream is reached: one value, `Address`, for both.

Stands below the schema. Every address of the configuration, from the file or from the command line, is read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from typing_extensions import override

HTTP_PORT = 80
HTTPS_PORT = 443
MAX_PORT = 65535
MAX_SOCKET_PATH_BYTES = 107  # Linux: `sun_path` holds 108 bytes and ends with NUL (unix(7))
MAX_HOST_CHARACTERS = 253  # RFC 1035 section 2.3.4: 255 octets on the wire

_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")  # with "_": names of containers have it
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL
)

_LISTENER_FORMS = "an address such as 127.0.0.1:8080, :8080 (all interfaces), [::1]:8080 or unix:/run/proxy.sock"
_UPSTREAM_FORMS = "a URL such as http://127.0.0.1:8001 or unix:/run/app.sock"


@dataclass(frozen=True, slots=True)
class Address:
    """One end of a connection: a TCP host and port, or the path of a Unix socket.

    `host` is an IPv4 address, an IPv6 address without brackets, a name, or "" for all interfaces. With a Unix socket
    `path` is its absolute path, `host` is "" and `port` is 0; with TCP `path` is "". `is_tls` says whether an upstream
    is spoken to with TLS; the text of an address does not tell. Equal addresses compare equal however they were
    written: names are in lower case, IPv6 is compressed.
    """

    host: str = ""
    port: int = 0
    path: str = ""
    is_tls: bool = False

    @override
    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_unix(self) -> bool:
        """Say whether this is the path of a Unix socket."""
        return bool(self.path)

    @property
    def is_loopback(self) -> bool:
        """Say whether only this machine can connect: 127.0.0.0/8, ::1, localhost, a Unix socket."""
        if self.is_unix or self.host == "localhost":
            return True
        try:
            return IPv6Address(self.host).is_loopback if ":" in self.host else IPv4Address(self.host).is_loopback
        except AddressValueError:
            return False


def parse_listener(text: str) -> Address:
    """Return the address that a listener binds.

    Takes `host:port`, `:port` for all interfaces, `[IPv6]:port` or `unix:/path`; port 0 lets the kernel choose one.
    Raises `ValueError` with a message for the author of the file.
    """
    if text.startswith("unix:"):
        return Address(path=read_socket_path(text.removeprefix("unix:")))
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"expected {_LISTENER_FORMS}")
    return Address(host=read_host(host) if host else "", port=read_port(port, lowest=0))


def parse_upstream_url(text: str) -> Address:
    """Return the address of an upstream from its URL.

    Takes `http://host[:port][/]` (port 80 where none is given), the same with `https` (port 443), `unix:/path` or
    `http+unix:///path`. Raises `ValueError` with a message for the author of the file; the message never repeats the
    URL, which may hold a password.
    """
    if text.startswith("unix:"):
        return Address(path=read_socket_path(text.removeprefix("unix:")))
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(f"expected {_UPSTREAM_FORMS}")
    match match["scheme"].lower():
        case "http":
            _refuse_parts(match, "http://host:port")
            return _read_authority(match["authority"], is_tls=False)
        case "http+unix":
            return _read_unix_url(match)
        case "https":
            _refuse_parts(match, "https://host:port")
            return _read_authority(match["authority"], is_tls=True)
        case _:
            raise ValueError(f"expected {_UPSTREAM_FORMS}")


def write_upstream_url(address: Address) -> str:
    """Return the URL of an upstream, which `parse_upstream_url` reads as this address; with its port, even 80."""
    if address.is_unix:
        return str(address)
    return f"{'https' if address.is_tls else 'http'}://{address}"


def _refuse_parts(url: re.Match[str], form: str) -> None:
    if "@" in url["authority"]:
        raise ValueError(f"the URL of an upstream has no user name or password; write {form}")
    if url["rest"].startswith("?"):
        raise ValueError(f"the URL of an upstream has no query; write {form}")
    if url["rest"]:
        raise ValueError(f"the URL of an upstream has no fragment; write {form}")
    if form.startswith(("http:", "https:")) and url["path"] not in {"", "/"}:
        raise ValueError(f"the URL of an upstream has no path: a request keeps its own; write {form}")


def _read_unix_url(url: re.Match[str]) -> Address:
    _refuse_parts(url, "http+unix:///path")
    if url["authority"]:
        raise ValueError("expected three slashes before the path of the socket, as in http+unix:///run/app.sock")
    if "%" in url["path"]:
        raise ValueError("percent escapes are not read in the path of a socket; write unix:/path")
    return Address(path=read_socket_path(url["path"]))


def _read_authority(authority: str, *, is_tls: bool) -> Address:
    has_port = not authority.endswith("]") and ":" in authority
    host, _, port = authority.rpartition(":") if has_port else (authority, "", "")
    if not host:
        raise ValueError(f"expected {_UPSTREAM_FORMS}: the host is missing")
    default_port = HTTPS_PORT if is_tls else HTTP_PORT
    return Address(read_host(host), read_port(port, lowest=1) if has_port else default_port, is_tls=is_tls)


def read_server_name(text: str) -> str:
    """Return a name for SNI (RFC 6066 section 3: without a dot at its end), or an IP address without brackets.

    Raises `ValueError` with a message for the author of the file.
    """
    if ":" in text:
        bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return _read_ipv6(bare, "an IPv6 address, as in ::1, or a name without a port")
    return read_host(text).removesuffix(".")


def read_port(text: str, lowest: int) -> int:
    """Return a port from the lowest to 65535. Raises `ValueError` with a message for the author of the file."""
    number = int(text) if re.fullmatch("[0-9]{1,5}", text) else -1
    if not lowest <= number <= MAX_PORT:
        raise ValueError(f"expected a port from {lowest} to {MAX_PORT} after the last colon")
    return number


def read_host(text: str) -> str:
    """Return a name in lower case, an IPv4 address, or an IPv6 address of `[...]` without the brackets, compressed.

    Raises `ValueError` with a message for the author of the file.
    """
    if text.startswith("[") and text.endswith("]"):
        return _read_ipv6(text[1:-1], "an IPv6 address between the brackets, as in [::1]:8080")
    if ":" in text:
        raise ValueError("expected an IPv6 address in brackets, as in [::1]:8080")
    labels = text.removesuffix(".").split(".")
    if labels[-1].isdigit():
        return _read_ipv4(text)
    if len(text) > MAX_HOST_CHARACTERS or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("expected a host name of letters, digits, hyphens and dots (IDNA names as xn--...)")
    return text.lower()


def _read_ipv4(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        raise ValueError("expected an IPv4 address of four numbers from 0 to 255, as in 127.0.0.1") from None


def _read_ipv6(text: str, expected: str) -> str:
    if "%" in text:
        raise ValueError("an IPv6 address with a zone (%eth0) is not supported")
    try:
        return IPv6Address(text).compressed
    except AddressValueError:
        raise ValueError(f"expected {expected}") from None


def read_socket_path(path: str, example: str = "unix:/run/app.sock") -> str:
    """Return the path of a Unix socket if it can be one; `example` is how such a value is written.

    Raises `ValueError` with a message for the author of the file.
    """
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError(f"expected the absolute path of a socket, as in {example}")
    if not path.isprintable():
        raise ValueError("the path of a socket has no control characters")
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes; the kernel takes no more")
    return path
