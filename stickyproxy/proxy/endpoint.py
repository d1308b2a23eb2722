"""Where and how an upstream is reached: its address, what its name stands for now, and TLS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

    from stickyproxy.config import Address


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How an upstream is reached. Two that are equal are reached in the same way: connections of one serve the other.

    `ip` is what the name in `address` stands for now, empty where it is none or is to be looked up by each dial.
    `tls` is None for plain HTTP; else `server_name` is sent (SNI) and verified, empty for the host of `address`.
    """

    address: Address
    ip: str = ""
    tls: ssl.SSLContext | None = None
    server_name: str = ""

    @property
    def authority(self) -> bytes:
        """Return what stands for a Host that a request lacks."""
        return b"localhost" if self.address.is_unix else str(self.address).encode("ascii")
