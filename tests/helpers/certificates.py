"""Certificates for tests: an authority that issues them within milliseconds, and writes them where a proxy reads."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import trustme
from cryptography import x509

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step, as careful programs do."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_bytes(data)
    os.replace(draft, path)  # noqa: PTH105 -- one call


@dataclass(frozen=True)
class Leaf:
    """A certificate in two files."""

    authority: Authority
    names: tuple[str, ...]
    certificate: Path
    key: Path

    @property
    def serial(self) -> int:
        """The serial number of what is in the file now."""
        return x509.load_pem_x509_certificate(self.certificate.read_bytes()).serial_number

    @property
    def section(self) -> dict[str, str]:
        """How the configuration names it."""
        return {"certificate": str(self.certificate), "key": str(self.key)}

    def renew(self, days: float = 90) -> int:
        """Put a new certificate with a new key into the files; return its serial number."""
        self.authority.write(self, days=days)
        return self.serial


class Authority:
    """An authority of its own; `file` is its certificate."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, *names: str, days: float = 90, rsa: bool = False) -> Leaf:
        """Write a certificate for DNS names or IP addresses that lasts some days; a negative number: is over."""
        stem = names[0].replace("*", "any")
        leaf = Leaf(self, names, self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        self.write(leaf, days=days, rsa=rsa)
        return leaf

    def write(self, leaf: Leaf, *, days: float = 90, rsa: bool = False) -> None:
        """Issue a certificate anew into its files."""
        now = datetime.now(UTC)
        made = self._ca.issue_cert(
            *leaf.names,
            not_before=now - timedelta(days=90),
            not_after=now + timedelta(days=days),
            key_type=trustme.KeyType.RSA if rsa else trustme.KeyType.ECDSA,
        )
        write_whole(leaf.key, made.private_key_pem.bytes())
        write_whole(leaf.certificate, b"".join(pem.bytes() for pem in made.cert_chain_pems))

    def client_context(self, shown: Leaf | None = None) -> ssl.SSLContext:
        """Return the context of a client that believes this authority, and shows a certificate of its own or none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.file)
        if shown is not None:
            context.load_cert_chain(shown.certificate, shown.key)
        return context
