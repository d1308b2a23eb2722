"""Certificates, in real handshakes: which one is shown, who is let in, what is refused, and how they are renewed."""

import asyncio
import logging
import os
import shutil
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, cast

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typing_extensions import override

from stickyproxy.config import Config, ListenerTls, UpstreamTls
from stickyproxy.control import certificates
from stickyproxy.control.certificates import (
    CertificateWatcher,
    make_listener_context,
    make_upstream_context,
    make_upstream_contexts,
    read_certificate,
)
from stickyproxy.errors import UsageError
from tests.helpers.certificates import Authority, Leaf, write_whole

DEADLINE_S = 30
DAY_S = 86_400
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def leaf(authority: Authority) -> Leaf:
    return authority.issue("app.example")


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


def section(*leaves: Leaf, **more: object) -> ListenerTls:
    return ListenerTls.model_validate({"certificates": [one.section for one in leaves], **more})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- the condition may lie in a thread
            await asyncio.sleep(0.005)


class Echo(asyncio.Protocol):
    """Sends back what comes, after the serial number of the client's certificate."""

    transport: asyncio.Transport

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        shown = self.transport.get_extra_info("peercert")
        self.transport.write(f"{int(shown['serialNumber'], 16) if shown else '-'} ".encode() + data)


class Listener:
    """A TLS listener whose context can be replaced, with the kernel's queue of connections left as it is."""

    def __init__(self) -> None:
        self._link = socket.create_server(("127.0.0.1", 0))
        self._link.setblocking(False)
        self.port: int = self._link.getsockname()[1]
        self._server: asyncio.Server | None = None

    async def serve(self, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        before, self._server = self._server, await loop.create_server(Echo, sock=self._link.dup(), ssl=context)
        if before is not None:
            before.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._link.close()


@asynccontextmanager
async def listening(context: ssl.SSLContext) -> AsyncIterator[Listener]:
    listener = Listener()
    try:
        await listener.serve(context)
        yield listener
    finally:
        listener.close()


@dataclass(frozen=True)
class Seen:
    """What a client saw of the handshake; `said` is the echo."""

    serial: int
    version: str | None
    alpn: str | None
    is_resumed: bool | None
    session: ssl.SSLSession | None
    said: str


class Client:
    """A connection of a client, for a thread."""

    def __init__(
        self, port: int, context: ssl.SSLContext, name: str | None = None, session: ssl.SSLSession | None = None
    ) -> None:
        plain = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        try:
            self.link = context.wrap_socket(plain, server_hostname=name, session=session)
        except BaseException:
            plain.close()
            raise

    def ask(self) -> Seen:
        self.link.sendall(b"hello")
        said = self.link.recv(100).decode()
        if not said:
            raise ConnectionError("closed")
        der = self.link.getpeercert(binary_form=True)
        return Seen(
            x509.load_der_x509_certificate(der).serial_number if der else 0,
            self.link.version(),
            self.link.selected_alpn_protocol(),
            self.link.session_reused,
            self.link.session,
            said,
        )


def ask(
    port: int, context: ssl.SSLContext, name: str | None = "app.example", session: ssl.SSLSession | None = None
) -> Seen:
    client = Client(port, context, name, session)
    with client.link:
        return client.ask()


async def asked(listener: Listener, *how: Any) -> Seen:
    return await asyncio.to_thread(ask, listener.port, *how)


async def is_refused(listener: Listener, *how: Any) -> bool:
    """Say whether the handshake, or in TLS 1.3 what comes after the client's part of it, ends with an error."""
    try:
        await asked(listener, *how)
    except (ssl.SSLError, ConnectionError):
        return True
    return False


def careless() -> ssl.SSLContext:
    """Return the context of a client that believes anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# Which certificate is shown


NAMES = [
    ("app.example", 0),
    ("other.example", 1),
    ("OTHER.example", 1),
    ("x.wild.example", 2),
    ("exact.wild.example", 1),  # an exact name before a wildcard, though its certificate comes first in neither
    ("y.x.wild.example", 0),  # a wildcard stands for one label
    ("wild.example", 0),
    ("unknown.example", 0),
    (None, 0),
]


def test_the_certificate_is_chosen_by_the_name(authority: Authority, leaf: Leaf, run: Run) -> None:
    leaves = [leaf, authority.issue("other.example", "exact.wild.example"), authority.issue("*.wild.example")]

    async def scenario() -> None:
        async with listening(make_listener_context(section(*leaves))) as listener:
            found = [(name, (await asked(listener, careless(), name)).serial) for name, _ in NAMES]
        assert found == [(name, leaves[position].serial) for name, position in NAMES]

    run(scenario())


def test_an_exact_name_comes_before_a_wildcard_whatever_their_order(authority: Authority, leaf: Leaf) -> None:
    wild, exact = authority.issue("*.wild.example"), authority.issue("exact.wild.example", "127.0.0.1")
    context = make_listener_context(section(leaf, wild, exact))
    choose = context.sni_callback.choose  # type: ignore[union-attr]
    assert choose(None) is context
    assert choose(".wild.example") is context
    assert choose("exact.wild.example.") is choose("EXACT.wild.example") is choose("127.0.0.1")
    assert len({id(choose(name)) for name in ("app.example", "exact.wild.example", "x.wild.example")}) == 3


def test_of_two_certificates_for_one_name_the_first_is_shown(authority: Authority, tmp_path: Path, leaf: Leaf) -> None:
    (tmp_path / "more").mkdir()
    second = Authority(tmp_path / "more").issue("app.example", "b.example")
    context = make_listener_context(section(leaf, second))
    choose = context.sni_callback.choose  # type: ignore[union-attr]
    assert choose("app.example") is context
    assert choose("b.example") is not context


def test_one_certificate_needs_no_choice(leaf: Leaf) -> None:
    assert make_listener_context(section(leaf)).sni_callback is None


def test_the_key_may_stand_in_the_file_of_the_certificate(authority: Authority, leaf: Leaf, run: Run) -> None:
    both = leaf.certificate.with_name("both.pem")
    both.write_bytes(leaf.key.read_bytes() + leaf.certificate.read_bytes())

    async def scenario() -> None:
        context = make_listener_context(ListenerTls.model_validate({"certificates": [str(both)]}))
        async with listening(context) as listener:
            assert (await asked(listener, authority.client_context())).serial == leaf.serial

    run(scenario())


# What is spoken


def offering(version: ssl.TLSVersion, ciphers: str) -> ssl.SSLContext:
    context = careless()
    with warnings.catch_warnings():  # versions that nobody should speak
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    return context


def lax(leaf: Leaf) -> ssl.SSLContext:
    """Return the context of a server that takes whatever it is offered: the control."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:eNULL:@SECLEVEL=0")
    context.load_cert_chain(leaf.certificate, leaf.key)
    return context


WEAK = [
    (ssl.TLSVersion.TLSv1, "ALL"),
    (ssl.TLSVersion.TLSv1_1, "ALL"),
    (ssl.TLSVersion.TLSv1_2, "AES128-GCM-SHA256"),  # RSA key exchange: not forward secret
    (ssl.TLSVersion.TLSv1_2, "AES128-SHA"),
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES128-SHA"),  # CBC
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES256-SHA384"),
    (ssl.TLSVersion.TLSv1_2, "AECDH-AES128-SHA"),  # anonymous
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-NULL-SHA"),
]
STRONG = [
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES128-GCM-SHA256"),
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-CHACHA20-POLY1305"),
    (ssl.TLSVersion.TLSv1_3, "ALL"),
]


@pytest.mark.parametrize(("minimum", "strong"), [("1.2", STRONG), ("1.3", STRONG[-1:])])
async def test_what_is_weak_is_refused(
    authority: Authority, minimum: str, strong: list[tuple[ssl.TLSVersion, str]]
) -> None:
    leaf = authority.issue("app.example", rsa=True)
    async with (
        listening(make_listener_context(section(leaf, minimum_version=minimum))) as listener,
        listening(lax(leaf)) as control,
    ):
        for version, ciphers in WEAK + STRONG:
            assert not await is_refused(control, offering(version, ciphers)), (version, ciphers)
            expected = (version, ciphers) not in strong
            assert await is_refused(listener, offering(version, ciphers)) is expected, (version, ciphers)


async def test_the_client_chooses_among_strong_ciphers(authority: Authority, leaf: Leaf) -> None:
    async with listening(make_listener_context(section(leaf))) as listener:
        found = []
        for chosen, other in (("CHACHA20-POLY1305", "AES128-GCM-SHA256"), ("AES128-GCM-SHA256", "CHACHA20-POLY1305")):
            context = offering(ssl.TLSVersion.TLSv1_2, f"ECDHE-ECDSA-{chosen}:ECDHE-ECDSA-{other}")
            client = await asyncio.to_thread(Client, listener.port, context)
            with client.link:
                found.append((client.link.cipher() or ("",))[0])
    assert found == ["ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"]


@pytest.mark.parametrize("name", ["app.example", "other.example"])
@pytest.mark.parametrize(("offered", "expected"), [(["h2", "http/1.1"], "http/1.1"), (["h2"], None)])
async def test_only_http_1_1_is_agreed_on(
    authority: Authority, leaf: Leaf, name: str, offered: list[str], expected: str | None
) -> None:
    client = authority.client_context()
    client.set_alpn_protocols(offered)
    async with listening(make_listener_context(section(leaf, authority.issue("other.example")))) as listener:
        assert (await asked(listener, client, name)).alpn == expected


def test_no_connection_is_negotiated_anew_nor_compressed(leaf: Leaf) -> None:
    for context in (make_listener_context(section(leaf)), make_upstream_context(UpstreamTls())):
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION


# A client that comes back


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed_whatever_name_was_asked_for(
    authority: Authority, leaf: Leaf, run: Run, version: ssl.TLSVersion
) -> None:
    other = authority.issue("other.example")
    client = authority.client_context()
    client.minimum_version = client.maximum_version = version

    async def scenario() -> None:
        async with listening(make_listener_context(section(leaf, other))) as listener:
            for name in ("app.example", "other.example"):
                first = await asked(listener, client, name)
                assert first.session is not None
                assert first.session.has_ticket
                assert not first.is_resumed
                assert (await asked(listener, client, name, first.session)).is_resumed

    run(scenario())


# Certificates of clients


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["app.example", "other.example"])
@pytest.mark.parametrize("mode", ["required", "optional"])
async def test_certificates_of_clients(
    authority: Authority, leaf: Leaf, tmp_path: Path, mode: str, name: str, version: ssl.TLSVersion
) -> None:
    good = authority.issue("client.example")
    wrong = Authority(tmp_path, "stranger").issue("stranger.example")
    over = authority.issue("over.example", days=-1)
    tls = section(
        leaf, authority.issue("other.example"), client_ca=str(authority.file), client_certificates=mode
    )  # the second one is switched to, and must ask for the same
    async with listening(make_listener_context(tls)) as listener:

        async def come(shown: Leaf | None) -> str:
            context = authority.client_context(shown)
            context.minimum_version = context.maximum_version = version
            with suppress(ssl.SSLError, ConnectionError):
                return (await asked(listener, context, name)).said
            return "refused"

        assert await come(good) == f"{good.serial} hello"
        assert await come(wrong) == "refused"
        assert await come(over) == "refused"
        assert await come(None) == ("refused" if mode == "required" else "- hello")


async def test_without_an_authority_no_client_is_asked_for_a_certificate(authority: Authority, leaf: Leaf) -> None:
    shown = authority.issue("client.example")
    async with listening(make_listener_context(section(leaf))) as listener:
        assert (await asked(listener, authority.client_context(shown))).said == "- hello"


# Towards an upstream


async def reached(context: ssl.SSLContext, listener: Listener, name: str = "app.example") -> str | None:
    """Return what an upstream says of our certificate; None where the handshake fails."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=context, server_hostname=name)
        try:
            writer.write(b"hello")
            return (await reader.read(100)).decode() or None
        finally:
            writer.close()
            with suppress(ssl.SSLError, ConnectionError):
                await writer.wait_closed()
    except (ssl.SSLError, ConnectionError):
        return None


async def test_an_upstream_is_verified(authority: Authority, leaf: Leaf, tmp_path: Path) -> None:
    own = make_upstream_context(UpstreamTls.model_validate({"ca": str(authority.file)}))
    other = make_upstream_context(UpstreamTls.model_validate({"ca": str(Authority(tmp_path, "stranger").file)}))
    pinned = make_upstream_context(UpstreamTls.model_validate({"ca": str(leaf.certificate)}))
    async with listening(make_listener_context(section(leaf))) as listener:
        assert await reached(own, listener) == "- hello"
        assert await reached(own, listener, "other.example") is None
        assert await reached(pinned, listener) == "- hello"  # what the file names is believed, root or not
        assert await reached(other, listener) is None
        assert await reached(make_upstream_context(UpstreamTls()), listener) is None  # the system does not know it
        blind = make_upstream_context(UpstreamTls.model_validate({"verify": False}))
        assert await reached(blind, listener, "other.example") == "- hello"


async def test_the_authorities_of_the_system_are_believed_by_default(
    authority: Authority, leaf: Leaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))  # where OpenSSL looks
    async with listening(make_listener_context(section(leaf))) as listener:
        assert await reached(make_upstream_context(UpstreamTls()), listener) == "- hello"


async def test_an_address_is_verified_too(authority: Authority) -> None:
    context = make_upstream_context(UpstreamTls.model_validate({"ca": str(authority.file)}))
    async with listening(make_listener_context(section(authority.issue("127.0.0.1")))) as listener:
        assert await reached(context, listener, "127.0.0.1") == "- hello"
        assert await reached(context, listener, "127.0.0.2") is None


async def test_an_upstream_sees_the_certificate_of_the_proxy(authority: Authority, leaf: Leaf) -> None:
    shown = authority.issue("proxy.example")
    context = make_upstream_context(
        UpstreamTls.model_validate({"ca": str(authority.file), **shown.section}),
    )
    async with listening(make_listener_context(section(leaf, client_ca=str(authority.file)))) as listener:
        assert await reached(context, listener) == f"{shown.serial} hello"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
async def test_an_upstream_speaks_tls_1_2_at_least(authority: Authority, leaf: Leaf, version: ssl.TLSVersion) -> None:
    old = lax(leaf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.maximum_version = version
    context = make_upstream_context(UpstreamTls.model_validate({"ca": str(authority.file)}))
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the version that is refused
    async with listening(old) as listener:
        assert await reached(context, listener) == ("- hello" if version is ssl.TLSVersion.TLSv1_2 else None)


async def test_an_upstream_is_told_http_1_1(authority: Authority, leaf: Leaf) -> None:
    context = make_upstream_context(UpstreamTls.model_validate({"ca": str(authority.file)}))
    async with listening(make_listener_context(section(leaf))) as listener:
        assert (await asked(listener, context)).alpn == "http/1.1"


def test_upstreams_with_the_same_settings_share_a_context(authority: Authority) -> None:
    own = {"ca": str(authority.file)}
    upstreams = [
        {"id": "a", "url": "https://a.example"},
        {"id": "b", "url": "https://b.example", "tls": {"server_name": "a.example"}},
        {"id": "c", "url": "https://c.example", "tls": own},
        {"id": "d", "url": "http://d.example"},
    ]
    contexts = make_upstream_contexts(Config.model_validate({"upstreams": upstreams}).upstreams)
    assert sorted(contexts) == ["a", "b", "c"]
    assert contexts["a"] is contexts["b"] is not contexts["c"]


# Files that cannot be used


def encrypted(leaf: Leaf, *, is_traditional: bool) -> bytes:
    key = serialization.load_pem_private_key(leaf.key.read_bytes(), None)
    form = serialization.PrivateFormat
    return key.private_bytes(
        serialization.Encoding.PEM,
        form.TraditionalOpenSSL if is_traditional else form.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


def with_two_names(leaf: Leaf) -> bytes:
    """Return a certificate whose list of names stands in it twice, which X.509 forbids."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    made = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example")]), critical=False)
    extension = made.add_extension(x509.IssuerAlternativeName([x509.DNSName("a.example")]), critical=False)
    der = extension.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    # 2.5.29.18, names of the issuer, becomes 2.5.29.17, names of the subject.
    twice = ssl.DER_cert_to_PEM_cert(der.replace(b"\x06\x03\x55\x1d\x12", b"\x06\x03\x55\x1d\x11"))
    return twice.encode()


BAD = [
    ("certificate", None, "cannot read the certificate {}: no such file or directory"),
    ("certificate", b"", "the file {} does not begin with a certificate in PEM"),
    ("certificate", b"\x30\x82 not PEM", "the file {} does not begin with a certificate in PEM"),
    ("certificate", with_two_names, "the file {} does not begin with a certificate in PEM that can be read"),
    (
        "certificate",
        lambda leaf: leaf.certificate.read_bytes() + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "cannot use the certificate {} with the key ",
    ),
    (
        "certificate",
        lambda leaf: leaf.authority.issue("b.example").certificate.read_bytes(),
        "does not match the first",
    ),
    ("key", None, "cannot read the key {}: no such file or directory"),
    ("key", b"", "the file {} holds no private key in PEM"),
    ("key", lambda leaf: leaf.certificate.read_bytes(), "the file {} holds no private key in PEM"),
    ("key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "with the key {}: "),
    (
        "key",
        lambda leaf: leaf.authority.issue("b.example").key.read_bytes(),
        "the key {} does not match the first certificate in ",
    ),
    ("key", lambda leaf: encrypted(leaf, is_traditional=False), "the key {} has a passphrase"),
    ("key", lambda leaf: encrypted(leaf, is_traditional=True), "the key {} has a passphrase"),
    ("ca", None, "cannot read the authorities {}: no such file or directory"),
    ("ca", b"", "cannot take the authorities in {}: "),
    ("ca", lambda leaf: leaf.key.read_bytes(), "cannot take the authorities in {}: "),
]


@pytest.mark.parametrize("is_upstream", [False, True])
@pytest.mark.parametrize(("which", "content", "expected"), BAD)
def test_a_file_that_cannot_be_used_is_named(
    authority: Authority,
    leaf: Leaf,
    which: str,
    content: Any,
    expected: str,
    *,
    is_upstream: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = {"certificate": leaf.certificate, "key": leaf.key, "ca": authority.file}[which]
    data = content(leaf) if callable(content) else content
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    upstream_tls = UpstreamTls.model_validate({"ca": str(authority.file), **leaf.section})
    listener_tls = section(leaf, client_ca=str(authority.file))
    with pytest.raises(UsageError) as caught:
        _ = make_upstream_context(upstream_tls) if is_upstream else make_listener_context(listener_tls)
    assert expected.format(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # nobody is asked for a passphrase


def test_a_directory_or_an_endless_file_is_no_certificate(
    leaf: Leaf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        read_certificate(tmp_path)
    monkeypatch.setattr(certificates, "_MAX_FILE_BYTES", 100)
    with pytest.raises(UsageError, match="too long to be one: more than 100 bytes"):
        read_certificate(leaf.certificate)


def test_a_revocation_list_is_no_authority(authority: Authority, leaf: Leaf) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")]), now, now + timedelta(days=1)
    )
    authority.file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(UsageError, match="there is no certificate in it"):
        make_listener_context(section(leaf, client_ca=str(authority.file)))


def test_a_file_that_goes_while_it_is_read_is_named(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", fail)
    with pytest.raises(UsageError, match=f"cannot read {leaf.certificate} or {leaf.key}: no such file"):
        make_listener_context(section(leaf))


# What is told of them


def test_the_names_and_the_end_of_a_certificate(authority: Authority) -> None:
    leaf = authority.issue("App.example", "*.wild.example", "10.0.0.1", "::1", days=10)
    facts = read_certificate(leaf.certificate)
    assert facts.path == leaf.certificate
    assert set(facts.names) == {"app.example", "*.wild.example", "10.0.0.1", "::1"}
    assert facts.not_after == pytest.approx(datetime.now(UTC).timestamp() + 10 * DAY_S, abs=3600)


def test_a_common_name_is_no_name(leaf: Leaf) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "app.example")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1)).sign(
        key, hashes.SHA256()
    )
    leaf.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    assert read_certificate(leaf.certificate).names == ()


# Renewal


class Watching:
    """A watcher with a short interval, a listener that takes what it makes, and a wall clock of its own."""

    def __init__(self, tls: ListenerTls, *, interval_s: float = 0.02) -> None:
        self.wall = datetime.now(UTC).timestamp()
        self.watcher = CertificateWatcher({0: tls}, self.take, interval_s=interval_s, now=lambda: self.wall)
        self.listener = Listener()
        self.taken = 0
        self.fault: Exception | None = None

    async def take(self, position: int, context: ssl.SSLContext) -> None:
        assert position == 0
        if self.fault is not None:
            raise self.fault
        await self.listener.serve(context)
        self.taken += 1

    async def __aenter__(self) -> Self:
        await self.listener.serve(self.watcher.make_contexts()[0])
        self.watcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.watcher.stop()
        self.listener.close()

    async def counted(self, outcome: str, number: int) -> None:
        await until(lambda: self.watcher.reloads[outcome] >= number)
        assert self.watcher.reloads[outcome] == number


def test_a_renewed_certificate_is_served_and_open_connections_go_on(authority: Authority, leaf: Leaf, run: Run) -> None:
    other = authority.issue("other.example")

    async def scenario() -> None:
        first = leaf.serial
        async with Watching(section(leaf, other)) as watching:
            port = watching.listener.port
            client = await asyncio.to_thread(Client, port, authority.client_context(), "app.example")
            with client.link:
                assert (await asyncio.to_thread(client.ask)).serial == first
                for number in (1, 2, 3):
                    serial = leaf.renew(days=90 + number)
                    await watching.counted("ok", number)
                    assert (await asked(watching.listener, authority.client_context())).serial == serial != first
                    assert (await asked(watching.listener, authority.client_context(), "other.example")).serial == (
                        other.serial
                    )
                    seen = await asyncio.to_thread(client.ask)
                    assert (seen.serial, seen.said) == (first, "- hello")
            assert watching.watcher.facts[0] == (
                read_certificate(leaf.certificate),
                read_certificate(other.certificate),
            )
            assert watching.watcher.reloads["failed"] == 0

    run(scenario())


def test_no_connection_is_refused_while_certificates_are_renewed(authority: Authority, leaf: Leaf) -> None:
    """On uvloop, as the proxy runs: asyncio itself loses what it has accepted when it closes a server."""

    async def scenario() -> None:
        async with Watching(section(leaf)) as watching:
            context = authority.client_context()

            def come_again_and_again() -> int:
                count = 0
                while watching.taken < 5:
                    ask(watching.listener.port, context)
                    count += 1
                return count

            coming = asyncio.ensure_future(asyncio.to_thread(come_again_and_again))  # noqa: TID251 -- no proxy here
            for number in range(1, 6):
                leaf.renew()
                await watching.counted("ok", number)
            assert await coming > 0

    uvloop.run(scenario())


async def test_nothing_is_made_anew_without_a_change(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = count_looks(monkeypatch)
    async with Watching(section(leaf)) as watching:
        await until(lambda: len(looks) > 5)
        assert watching.taken == 0


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    looks: list[object] = []
    real = certificates._look_at

    def look_at(files: Any) -> Any:
        looks.append(found := real(files))
        return found

    monkeypatch.setattr(certificates, "_look_at", look_at)
    return looks


async def test_a_writer_who_is_half_way_is_waited_for(
    authority: Authority, leaf: Leaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look but the last ones sees another file, which is half of a certificate."""
    whole = leaf.certificate.read_bytes()
    real = certificates._look_at
    looks = 0

    def look_at(files: Any) -> Any:
        nonlocal looks
        looks += 1
        if 2 <= looks <= 8:
            leaf.certificate.write_bytes(whole[: 100 + looks])
        elif looks == 9:
            leaf.renew()
        return real(files)

    monkeypatch.setattr(certificates, "_look_at", look_at)
    async with Watching(section(leaf)) as watching:
        await watching.counted("ok", 1)
        assert (await asked(watching.listener, authority.client_context())).serial == leaf.serial
        assert watching.watcher.reloads["failed"] == 0


async def test_a_bad_file_changes_nothing_and_is_logged_once(
    authority: Authority, leaf: Leaf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count_looks(monkeypatch)
    first = leaf.serial
    async with Watching(section(leaf)) as watching:
        write_whole(leaf.certificate, b"nonsense")
        await watching.counted("failed", 1)
        before = len(looks)
        await until(lambda: len(looks) > before + 5)
        assert watching.watcher.reloads == {"ok": 0, "failed": 1}
        assert caplog.text.count("does not begin with a certificate") == 1
        assert (await asked(watching.listener, authority.client_context())).serial == first
        leaf.certificate.unlink()
        await watching.counted("failed", 2)
        assert caplog.text.count("no such file or directory") == 1
        serial = leaf.renew()
        await watching.counted("ok", 1)
        assert (await asked(watching.listener, authority.client_context())).serial == serial


async def test_what_failed_for_another_reason_than_the_files_is_tried_again(
    authority: Authority, leaf: Leaf, caplog: pytest.LogCaptureFixture
) -> None:
    async with Watching(section(leaf)) as watching:
        watching.fault = OSError(24, "Too many open files")
        serial = leaf.renew()
        await watching.counted("failed", 1)
        assert "Traceback" not in caplog.text
        watching.fault = RuntimeError("a fault")
        await watching.counted("failed", 2)
        assert "RuntimeError: a fault" in caplog.text
        watching.fault = None
        await watching.counted("ok", 1)
        assert (await asked(watching.listener, authority.client_context())).serial == serial


async def test_links_are_followed(authority: Authority, leaf: Leaf, tmp_path: Path) -> None:
    """As Kubernetes does it: the file is a link through a directory that is a link, and only that one changes."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for path in (leaf.certificate, leaf.key):
        shutil.copy(path, tmp_path / "one" / path.name)
    serial = leaf.renew()
    for path in (leaf.certificate, leaf.key):
        shutil.copy(path, tmp_path / "two" / path.name)
        path.unlink()
        path.symlink_to(Path("..data") / path.name)
    (tmp_path / "..data").symlink_to("one")
    async with Watching(section(leaf)) as watching:
        assert (await asked(watching.listener, authority.client_context())).serial != serial
        (tmp_path / "..new").symlink_to("two")
        os.replace(tmp_path / "..new", tmp_path / "..data")  # noqa: PTH105
        await watching.counted("ok", 1)
        assert (await asked(watching.listener, authority.client_context())).serial == serial


async def test_a_copy_with_the_old_time_and_size_is_a_change(leaf: Leaf) -> None:
    """As `cp --preserve` makes it: the file is the same one, and so are its size and time."""
    async with Watching(section(leaf)) as watching:
        before = leaf.certificate.stat()
        leaf.certificate.write_bytes(leaf.certificate.read_bytes())
        os.utime(leaf.certificate, ns=(before.st_atime_ns, before.st_mtime_ns))
        await watching.counted("ok", 1)


async def test_the_authorities_of_clients_are_renewed_too(authority: Authority, leaf: Leaf, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    shown = stranger.issue("client.example")
    client_ca = tmp_path / "clients.pem"
    shutil.copy(authority.file, client_ca)
    async with Watching(section(leaf, client_ca=str(client_ca))) as watching:
        assert await is_refused(watching.listener, authority.client_context(shown))
        write_whole(client_ca, stranger.file.read_bytes())
        await watching.counted("ok", 1)
        assert (await asked(watching.listener, authority.client_context(shown))).said == f"{shown.serial} hello"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_does_not_outlive_the_authority_of_its_client(
    authority: Authority, leaf: Leaf, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    client_ca = tmp_path / "clients.pem"
    shutil.copy(authority.file, client_ca)
    client = authority.client_context(authority.issue("client.example"))
    client.minimum_version = client.maximum_version = version
    async with Watching(section(leaf, client_ca=str(client_ca))) as watching:
        session = (await asked(watching.listener, client)).session
        assert (await asked(watching.listener, client, "app.example", session)).is_resumed
        write_whole(client_ca, Authority(tmp_path, "stranger").file.read_bytes())
        await watching.counted("ok", 1)
        assert await is_refused(watching.listener, client, "app.example", session)


def test_a_first_context_that_cannot_be_made_is_said_at_once(leaf: Leaf) -> None:
    async def take(*_: object) -> None: ...

    leaf.key.unlink()
    with pytest.raises(UsageError, match="cannot read the key"):
        CertificateWatcher({3: section(leaf)}, take).make_contexts()


async def test_after_stop_nobody_looks(leaf: Leaf, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = count_looks(monkeypatch)
    async with Watching(section(leaf)) as watching:
        await until(lambda: len(looks) > 2)
        await watching.watcher.stop()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "watch certificates"]
        seen = len(looks)
        await asyncio.sleep(0.1)
        assert len(looks) <= seen + 1  # one may have been under way in its thread


async def test_without_files_there_is_no_task() -> None:
    async def take(*_: object) -> None: ...

    watcher = CertificateWatcher({}, take)
    assert watcher.make_contexts() == {}
    watcher.start()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "watch certificates"]
    await watcher.stop()


# Certificates that are about to expire


@pytest.mark.parametrize(
    ("days", "expected"), [(15, None), (13, "(app.example) expires on "), (-1, "(app.example) expired on ")]
)
def test_the_log_warns_of_the_end(
    authority: Authority, caplog: pytest.LogCaptureFixture, days: int, expected: str | None
) -> None:
    async def take(*_: object) -> None: ...

    leaf = authority.issue("app.example", days=days)
    CertificateWatcher({0: section(leaf)}, take).make_contexts()
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [expected in record.message for record in warned] == ([True] if expected else [])  # type: ignore[operator]


def test_a_certificate_for_some_days_only_is_not_always_about_to_expire(authority: Authority) -> None:
    facts = read_certificate(authority.issue("app.example", days=-83).certificate)  # of 7 days
    assert facts.not_after - facts.warn_after == pytest.approx(7 * DAY_S / 4, rel=0.01)


async def test_the_warning_comes_once_a_day_until_it_is_renewed(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count_looks(monkeypatch)
    leaf = authority.issue("app.example", days=20)

    def warned() -> int:
        return caplog.text.count(" expires on ")

    async def look_again() -> None:
        seen = len(looks)
        await until(lambda: len(looks) > seen + 5)

    async with Watching(section(leaf)) as watching:
        assert warned() == 0
        watching.wall += 7 * DAY_S
        await until(warned)
        await look_again()
        assert warned() == 1
        watching.wall += DAY_S
        await until(lambda: warned() > 1)
        await look_again()
        assert warned() == 2
        leaf.renew(days=100)
        await watching.counted("ok", 1)
        watching.wall += DAY_S
        await look_again()
        assert warned() == 2
