"""Certificates: TLS contexts made from files, for listeners and towards upstreams, and made anew when the files change.

A connection keeps the context that it began with, so that a renewed certificate ends none of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NoReturn

from cryptography import x509

from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from pathlib import Path

    from stickyproxy.config import ListenerTls, Upstream, UpstreamTls

    Look = tuple[tuple[int, ...] | None, ...]  # for each file what tells one state of it from another; None: not there

logger = logging.getLogger(__name__)

_ALPN: Final = ["http/1.1"]  # RFC 7301, section 6
# Of TLS 1.2 only what is forward secret and authenticated (RFC 9325, section 4.2); TLS 1.3 has nothing else. They are
# all strong, so the client chooses: one without AES instructions prefers ChaCha20.
_CIPHERS: Final = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)
_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_KEY: Final = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
_MAX_FILE_BYTES: Final = 16 * 1024 * 1024  # the bundle of all public authorities has 0.3 MiB; /dev/zero has no end
_DAY_S: Final = 86_400.0
# A certificate is about to expire when so much is left: of one that lasts some days only, the last quarter.
_SOON_S: Final = 14 * _DAY_S
_SOON_PART: Final = 1 / 4


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What is told of the first certificate in a file; times are seconds since 1970, `names` are in lower case.

    `names` are the DNS names (`*.` before some) and the IP addresses that it is for: RFC 5280, section 4.2.1.6.
    """

    path: Path
    names: tuple[str, ...]
    not_before: float
    not_after: float

    @property
    def warn_after(self) -> float:
        """When it is about to expire."""
        return self.not_after - min(_SOON_S, (self.not_after - self.not_before) * _SOON_PART)


def read_certificate(path: Path) -> CertificateFacts:
    """Return what stands in a certificate; raise UsageError where the file holds none that can be read."""
    data = _read(path, "certificate")
    try:
        found = x509.load_pem_x509_certificate(data)
        names = _read_names(found)
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise UsageError(f"the file {path} does not begin with a certificate in PEM that can be read") from error
    return CertificateFacts(path, names, found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp())


def _read_names(found: x509.Certificate) -> tuple[str, ...]:
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:  # a common name is no name of a host any more: RFC 9525, section 2
        return ()
    addresses = (str(one) for one in names.get_values_for_type(x509.IPAddress))
    return (*(name.lower() for name in names.get_values_for_type(x509.DNSName)), *addresses)


def make_listener_context(tls: ListenerTls) -> ssl.SSLContext:
    """Return the context that a listener is started with; it chooses the certificate by the name that is asked for.

    Reads all files, so it may block. Raises UsageError with a line that names the file that cannot be used.
    """
    return _make_listener_context(tls, [read_certificate(one.certificate) for one in tls.certificates])


def _make_listener_context(tls: ListenerTls, facts: Iterable[CertificateFacts]) -> ssl.SSLContext:
    made = [_make_server_context(tls, one.certificate, one.key) for one in tls.certificates]
    first = made[0]
    if len(made) > 1:
        first.sni_callback = _ByName(zip(facts, made, strict=True), first)
    return first


def _make_server_context(tls: ListenerTls, certificate: Path, key: Path | None) -> ssl.SSLContext:
    """Return a context with one certificate.

    All contexts of a listener have the same settings. Of the one that SNI switches to, OpenSSL takes the certificate,
    the ciphers, ALPN and the authorities, but not the versions and not whether a client certificate is asked for; and
    tickets stay those of the first one, so that they are good whatever name was asked for.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[tls.minimum_version]
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(_ALPN)
    _load_certificate(context, certificate, key)
    if tls.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED if tls.client_certificates == "required" else ssl.CERT_OPTIONAL
        _load_authorities(context, tls.client_ca)
    return context


class _ByName:
    """The choice of a context by the name in a client's hello (RFC 6066, section 3): exact, by wildcard, the first."""

    def __init__(self, certificates: Iterable[tuple[CertificateFacts, ssl.SSLContext]], first: ssl.SSLContext) -> None:
        self._first = first
        self._exact: dict[str, ssl.SSLContext] = {}
        self._wildcards: dict[str, ssl.SSLContext] = {}
        for facts, context in certificates:
            for name in facts.names:
                if name.startswith("*."):
                    self._wildcards.setdefault(name[2:], context)
                else:
                    self._exact.setdefault(name, context)

    def choose(self, name: str | None) -> ssl.SSLContext:
        """Return the context for a name, or for none. A wildcard stands for one label: RFC 9525, section 6.3."""
        if name is None:
            return self._first
        name = name.lower().removesuffix(".")
        label, _, parent = name.partition(".")
        return self._exact.get(name) or (self._wildcards.get(parent) if label else None) or self._first

    def __call__(self, link: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        """Let a connection go on with the context for its name; OpenSSL calls this, and must see no exception."""
        link.context = self.choose(name)


def make_upstream_context(tls: UpstreamTls) -> ssl.SSLContext:
    """Return the context for connections to an upstream; whoever connects gives the name that is verified.

    Reads all files, so it may block. Raises UsageError with a line that names the file that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(_ALPN)
    context.hostname_checks_common_name = False  # RFC 9525, section 2
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.ca is not None:
        _load_authorities(context, tls.ca)
    else:
        context.load_default_certs()
    if tls.certificate is not None:
        read_certificate(tls.certificate)
        _load_certificate(context, tls.certificate, tls.key)
    return context


def make_upstream_contexts(upstreams: Iterable[Upstream]) -> dict[str, ssl.SSLContext]:
    """Return the context of each upstream that TLS is spoken to, by id; raise UsageError as for one of them.

    Upstreams with the same settings share one: to load the authorities of the system takes some 0.1 s.
    """
    shared: dict[UpstreamTls, ssl.SSLContext] = {}
    found: dict[str, ssl.SSLContext] = {}
    for upstream in upstreams:
        if (tls := upstream.tls) is not None:
            alike = tls.model_copy(update={"server_name": None})
            found[upstream.id] = shared.get(alike) or shared.setdefault(alike, make_upstream_context(tls))
    return found


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    """Give a context a certificate, known to be readable, with its chain and key; raise UsageError."""
    held_in = certificate if key is None else key
    if not _KEY.search(_read(held_in, "key")):
        raise UsageError(f"the file {held_in} holds no private key in PEM")

    def refuse() -> NoReturn:  # without this OpenSSL would ask for the passphrase on the terminal
        raise UsageError(f"the key {held_in} has a passphrase; write it without one: openssl pkey -in {held_in}")

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"the key {held_in} does not match the first certificate in {certificate}") from error
        raise UsageError(f"cannot use the certificate {certificate} with the key {held_in}: {_say(error)}") from error
    except OSError as error:  # gone since it was read
        raise UsageError(f"cannot read {certificate} or {held_in}: {_say(error)}") from error


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    """Let a context believe the certificates in a file, root or not; raise UsageError where there is none in it."""
    _read(path, "authorities")
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(path)
    except OSError as error:  # of OpenSSL too
        raise UsageError(f"cannot take the authorities in {path}: {_say(error)}") from error
    if not context.cert_store_stats()["x509"]:
        raise UsageError(f"cannot take the authorities in {path}: there is no certificate in it")


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {_say(error)}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise UsageError(f"the {what} {path} is too long to be one: more than {_MAX_FILE_BYTES} bytes")
    return data


def _say(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "damaged").replace("_", " ").lower()
    return (error.strerror or str(error)).lower()


@dataclass(slots=True)
class _Watched:
    """The files of one listener: as they were taken, as they were seen last, and the last failure to take them."""

    tls: ListenerTls
    files: tuple[Path, ...]
    taken: Look = ()
    seen: Look = ()
    failure: tuple[Look, str] | None = None
    warned_at: dict[CertificateFacts, float] = field(default_factory=dict)  # wall-clock seconds


def _wall() -> float:
    return datetime.now(UTC).timestamp()


class CertificateWatcher:
    """Makes the contexts of the listeners, given by position, and makes them anew when a file has changed.

    `on_change` is awaited with the position and the new context; what it raises counts as a failure. A context that
    cannot be made, or not be used, is tried again with each look, and the reason is logged once for each change of the
    files. `reloads` counts by "ok" and "failed", `facts` are those of the certificates in use, `now` is the wall clock.
    """

    def __init__(
        self,
        listeners: Mapping[int, ListenerTls],
        on_change: Callable[[int, ssl.SSLContext], Awaitable[None]],
        *,
        interval_s: float = 5.0,
        now: Callable[[], float] = _wall,
    ) -> None:
        self._watched = {position: _Watched(tls, _files(tls)) for position, tls in listeners.items()}
        self._on_change = on_change
        self._interval_s = interval_s
        self._now = now
        self._task: asyncio.Task[None] | None = None
        self.reloads = Counter({"ok": 0, "failed": 0})
        self.facts: dict[int, tuple[CertificateFacts, ...]] = {}

    def make_contexts(self) -> dict[int, ssl.SSLContext]:
        """Return the first context of each listener; call this once, before `start`. Raises UsageError."""
        contexts = {}
        for position, watched in self._watched.items():
            watched.taken = watched.seen = _look_at(watched.files)
            contexts[position], self.facts[position] = _make(watched.tls)
            self._warn(position)
        return contexts

    def start(self) -> None:
        """Begin to look at the files; without any there is nothing to do."""
        if self._watched:
            self._task = spawn(self._watch(), "watch certificates")

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            for position, watched in self._watched.items():
                await self._look(position, watched)
                self._warn(position)

    async def _look(self, position: int, watched: _Watched) -> None:
        """Take the files of a listener if they have changed, but not since the last look: a writer may be half-way."""
        before, watched.seen = watched.seen, await asyncio.to_thread(_look_at, watched.files)
        look = watched.seen
        if look == watched.taken or look != before:
            return
        try:
            context, facts = await asyncio.to_thread(_make, watched.tls)
            await self._on_change(position, context)
        except Exception as error:  # noqa: BLE001 -- whatever it is, what is in use stays
            self._fail(watched, look, error)
            return
        watched.taken, watched.failure = look, None
        self.facts[position] = facts
        self.reloads["ok"] += 1
        logger.info("took the renewed files %s", ", ".join(str(path) for path in watched.files))

    def _fail(self, watched: _Watched, look: Look, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        if watched.failure == (look, reason):
            return
        watched.failure = (look, reason)
        self.reloads["failed"] += 1
        unforeseen = None if isinstance(error, UsageError | OSError) else error
        logger.error("the certificates in use stay, the files have changed but: %s", reason, exc_info=unforeseen)

    def _warn(self, position: int) -> None:
        """Warn once a day of each certificate that is about to expire."""
        now, watched = self._now(), self._watched[position]
        due = [one for one in self.facts[position] if now > one.warn_after]
        watched.warned_at = {one: at for one, at in watched.warned_at.items() if one in due}
        for one in due:
            if now - watched.warned_at.get(one, -_DAY_S) >= _DAY_S:
                watched.warned_at[one] = now
                ends = datetime.fromtimestamp(one.not_after, UTC)
                verb = "expired" if now > one.not_after else "expires"
                logger.warning("the certificate %s (%s) %s on %s", one.path, ", ".join(one.names), verb, ends)


def _files(tls: ListenerTls) -> tuple[Path, ...]:
    found = [path for one in tls.certificates for path in (one.certificate, one.key) if path is not None]
    return tuple(dict.fromkeys(found if tls.client_ca is None else [*found, tls.client_ca]))


def _look_at(files: Iterable[Path]) -> Look:
    """Return what changes with each file, or with what a link of that name leads to; blocks."""
    return tuple(_look_at_one(path) for path in files)


def _look_at_one(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 -- follows links, as those of certbot and of Kubernetes
    except OSError:
        return None
    # The last is for what is no change of the content: a permission that was missing, a copy with an old time.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev, found.st_ctime_ns


def _make(tls: ListenerTls) -> tuple[ssl.SSLContext, tuple[CertificateFacts, ...]]:
    facts = tuple(read_certificate(one.certificate) for one in tls.certificates)
    return _make_listener_context(tls, facts), facts
