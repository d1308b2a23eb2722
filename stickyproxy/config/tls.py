"""The sections `tls` of a listener and of an upstream: which certificates are shown, and which are believed.

Only names of files are read here; what stands in them is read where connections are made, and again when it changes.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import override

from stickyproxy.config.address import read_server_name
from stickyproxy.config.fields import (
    AbsolutePath,
    AlsoWritten,
    Flag,
    OneOrMore,
    Read,
    Section,
    read_text,
    refuse,
)
from stickyproxy.config.units import shown


class Certificate(Section):
    """A certificate with its chain, and its private key."""

    expected: ClassVar[str] = "the path of a PEM file or a mapping of keys"

    certificate: AbsolutePath = Field(
        description="The PEM file of the certificate, followed by those of the authorities between it and the root."
    )
    key: AbsolutePath | None = Field(
        default=None, description="The PEM file of its private key, without a passphrase; null: in the same file."
    )

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain path for a file with both."""
        return {"certificate": raw} if isinstance(raw, str) else raw


def _read_certificates(raw: object) -> object:
    if not isinstance(raw, list | tuple):
        return (Certificate.model_validate(raw),)
    if not raw:
        raise ValueError("expected at least one certificate")
    return raw


def read_minimum_version(raw: object) -> str:
    """Return `1.2` or `1.3`; YAML reads it as a number where it has no quotes. Raises `ValueError`."""
    version = str(raw) if isinstance(raw, float | str) else ""
    if version in {"1.2", "1.3"}:
        return version
    raise ValueError(f'expected "1.2" or "1.3", got {shown(raw)}')


class ListenerTls(Section):
    """TLS towards clients: the certificates of the proxy, and those that clients may or must show."""

    certificates: Annotated[
        tuple[Annotated[Certificate, AlsoWritten({"type": "string"})], ...],
        BeforeValidator(_read_certificates),
        OneOrMore(),
    ] = Field(
        description="One certificate or a list. The first is shown to clients that ask for no name (SNI) or for one "
        "that no certificate has, the others by the names in them."
    )
    minimum_version: Annotated[
        Literal["1.2", "1.3"], Read(read_minimum_version, {"enum": ["1.2", "1.3", 1.2, 1.3]})
    ] = Field(default="1.2", description="The lowest version of TLS that is spoken: 1.2 or 1.3.")
    client_ca: AbsolutePath | None = Field(
        default=None,
        description="A PEM file of the authorities whose client certificates are accepted; null: none is asked for.",
    )
    client_certificates: Literal["required", "optional"] = Field(
        default="required", description="Whether a client without a certificate is refused; counts with client_ca only."
    )

    @model_validator(mode="after")
    def _check_client_ca(self) -> Self:
        if "client_certificates" in self.model_fields_set and self.client_ca is None:
            refuse([(("client_certificates",), "client_certificates needs client_ca, which says whose are accepted")])
        return self


class UpstreamTls(Section):
    """TLS towards an upstream: how its certificate is verified, and what the proxy shows of its own."""

    ca: AbsolutePath | None = Field(
        default=None,
        description="A PEM file of the authorities that the upstream's certificate is verified with; null: the "
        "system's.",
    )
    verify: Flag = Field(
        default=True,
        description="Whether the upstream's certificate is verified; false: whoever answers is believed.",
    )
    server_name: Annotated[str, Read(lambda raw: read_server_name(read_text(raw)), {"type": "string"})] | None = Field(
        default=None,
        description="The name that is asked for (SNI) and verified, or an IP address; null: the host of the URL.",
    )
    certificate: AbsolutePath | None = Field(
        default=None,
        description="The PEM file of a certificate, with its chain, that the proxy shows to the upstream; null: none.",
    )
    key: AbsolutePath | None = Field(
        default=None,
        description="The PEM file of that certificate's private key, without a passphrase; null: in the same file.",
    )

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.key is not None and self.certificate is None:
            refuse([(("key",), "key needs certificate: a key alone shows nothing")])
        return self
