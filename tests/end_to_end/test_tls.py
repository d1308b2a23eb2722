"""TLS at the edge: what `openssl` and browsers would see of it, and certificates renewed under load."""

import asyncio
import itertools
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from stickyproxy.tasks import spawn
from tests.helpers.certificates import Authority, Leaf, write_whole
from tests.helpers.counting import CountingApps
from tests.helpers.metrics import total
from tests.helpers.plain_client import AbortedError, PlainClient
from tests.helpers.processes import HTTP, Children, free_port, wait_until
from tests.helpers.serving import Serving

DEADLINE_S = 60.0
RENEWALS = 5
KEPT, FRESH, TUNNELS = 4, 2, 6
PAUSE_S = 0.02  # between two requests of one client: a load, not a benchmark


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
def apps(children: Children) -> CountingApps:
    return CountingApps(children, "alpha", "beta")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Site:
    """A proxy that serves the apps over TLS at `port`; `more` are keys of its listener's section `tls`."""

    def __init__(self, children: Children, apps: CountingApps, *leaves: Leaf, **more: Any) -> None:
        self.port, self.plain_port = free_port(), free_port()
        tls = {"certificates": [leaf.section for leaf in leaves], **more}
        self._children = children
        self._starts = itertools.count(1)
        self._configuration = {
            "listeners": [
                {"address": f"127.0.0.1:{self.port}", "tls": tls},
                {"address": f"127.0.0.1:{self.plain_port}", "redirect_to_https": self.port},
            ],
            "upstreams": [{"id": name, "url": url} for name, url in apps.upstreams.items()],
            "grace": "5s",
        }
        self.start()

    def start(self) -> None:
        """Start the proxy, at first or again."""
        self.proxy = Serving(self._children, self._configuration, name=f"proxy-{self.port}-{next(self._starts)}")
        self.proxy.wait_until_serving()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a metric that have these labels."""
        with HTTP.open(f"http://127.0.0.1:{self.proxy.admin_port}/metrics", timeout=DEADLINE_S) as response:
            return total(response.read().decode(), name, **labels)

    @asynccontextmanager
    async def client(self, context: ssl.SSLContext, name: str = "localhost") -> Any:
        """Connect; give the client and the serial number of the certificate that it was shown."""
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name)
        async with PlainClient(reader, writer) as client:
            yield client, int(writer.get_extra_info("peercert")["serialNumber"], 16)

    async def shown(self, context: ssl.SSLContext, name: str = "localhost") -> int:
        """Return the serial number that a new connection is shown for a name."""
        async with self.client(context, name) as (client, serial):
            assert (await client.ask("/count")).status == 200
        return int(serial)


# What is spoken


def s_client(port: int, *options: str) -> tuple[int, str]:
    """Do a handshake with `openssl s_client`; return its exit status and all that it says."""
    arguments = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", *options]
    done = subprocess.run(
        arguments, input=b"", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE_S, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


def test_openssl_agrees(children: Children, apps: CountingApps, authority: Authority) -> None:
    site = Site(children, apps, authority.issue("localhost"))
    trust = ("-CAfile", str(authority.file), "-verify_return_error", "-verify_hostname", "localhost", "-brief")
    for option, version in (("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")):
        status, text = s_client(site.port, option, *trust, "-alpn", "h2,http/1.1")
        assert status == 0, text
        assert f"Protocol version: {version}" in text
        assert "Verification: OK" in text
    for weak in (("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"), ("-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0")):
        status, text = s_client(site.port, *weak, "-msg")
        assert ">>> TLS" in text, "the client itself would speak it"
        assert "ClientHello" in text
        assert status != 0
        assert "Cipher is (NONE)" in text
    status, text = s_client(site.port, "-alpn", "h2,http/1.1")
    assert "ALPN protocol: http/1.1" in text
    assert site.metric("handshakes_total", outcome="tls_completed") == 3
    assert site.metric("handshakes_total", outcome="tls_failed") == 2


def test_tls_1_3_alone(children: Children, apps: CountingApps, authority: Authority) -> None:
    site = Site(children, apps, authority.issue("localhost"), minimum_version="1.3")
    assert s_client(site.port, "-tls1_3")[0] == 0
    assert s_client(site.port, "-tls1_2")[0] != 0


async def test_the_certificate_is_chosen_by_name(children: Children, apps: CountingApps, authority: Authority) -> None:
    leaves = [authority.issue(name) for name in ("localhost", "a.example", "*.b.example")]
    site = Site(children, apps, *leaves)
    trusting = authority.client_context()
    for name, leaf in (("localhost", 0), ("a.example", 1), ("x.b.example", 2), ("y.b.example", 2), ("A.Example", 1)):
        assert await site.shown(trusting, name) == leaves[leaf].serial, name
    with pytest.raises(ssl.SSLCertVerificationError):
        await site.shown(trusting, "other.example")
    trusting.check_hostname = False
    assert await site.shown(trusting, "other.example") == leaves[0].serial


async def test_a_client_certificate_is_required_or_optional(
    children: Children, apps: CountingApps, authority: Authority, tmp_path: Path
) -> None:
    leaf = authority.issue("localhost")
    (tmp_path / "clients").mkdir()
    (tmp_path / "strangers").mkdir()
    clients, strangers = Authority(tmp_path / "clients"), Authority(tmp_path / "strangers")
    one, stranger = clients.issue("client.example"), strangers.issue("client.example")
    for policy in ("required", "optional"):
        site = Site(children, apps, leaf, client_ca=str(clients.file), client_certificates=policy)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for shown, is_let_in in ((one, True), (stranger, False), (None, policy == "optional")):
                context = authority.client_context(shown)
                context.maximum_version = version
                if is_let_in:
                    assert await site.shown(context) == leaf.serial
                else:
                    with pytest.raises((OSError, AbortedError)):
                        await site.shown(context)
        site.proxy.child.stop()
    assert all(method == "GET" for method, _ in apps.received())
    assert sum(apps.received().values()) == 2 * 1 + 2 * 2


async def test_plain_http_is_sent_to_https(children: Children, apps: CountingApps, authority: Authority) -> None:
    site = Site(children, apps, authority.issue("localhost"))
    async with await PlainClient.connect(site.plain_port) as plain:
        for _ in range(2):
            answer = await plain.ask("/count?a=b")
            assert answer.status == 308
            assert answer.fields["location"] == f"https://localhost:{site.port}/count?a=b"
    assert sum(apps.received().values()) == 0
    async with site.client(authority.client_context()) as (client, _):
        answer = await client.ask("/count?a=b")
        assert answer.status == 200
        assert "; Secure" in answer.fields["set-cookie"]


# Renewal


class Load:
    """Clients that come and stay: each id is asked once, each message of a tunnel is answered in its order."""

    def __init__(self, site: Site, context: ssl.SSLContext) -> None:
        self._site = site
        self._context = context
        self._ids = itertools.count()
        self._is_over = False
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.echoes = [0] * TUNNELS
        self.failures: list[str] = []
        self.serials: set[int] = set()

    @asynccontextmanager
    async def running(self) -> Any:
        """Run while the context lasts; then let each client have its answer."""
        async with AsyncExitStack() as stack:
            kept = [await stack.enter_async_context(self._site.client(self._context)) for _ in range(KEPT)]
            uri = f"wss://localhost:{self._site.port}/ws"
            options: Mapping[str, Any] = {"host": "127.0.0.1", "proxy": None, "open_timeout": DEADLINE_S}
            tunnels = [
                await stack.enter_async_context(connect(uri, ssl=self._context, **options)) for _ in range(TUNNELS)
            ]
            tasks = [spawn(self._guard(self._keep_asking(client)), "kept") for client, _ in kept]
            tasks += [spawn(self._guard(self._come_anew()), "fresh") for _ in range(FRESH)]
            tasks += [spawn(self._guard(self._talk(at, one)), "tunnel") for at, one in enumerate(tunnels)]
            try:
                yield
            finally:
                self._is_over = True
                await asyncio.gather(*tasks)

    async def _guard(self, work: Any) -> None:
        try:
            async with asyncio.timeout(10 * DEADLINE_S):
                await work
        except (OSError, AbortedError, AssertionError, WebSocketException) as error:
            self.failures.append(f"{work.__name__}: {error!r}")

    async def _ask(self, client: PlainClient) -> None:
        name = str(next(self._ids))
        self.asked.append(name)
        answer = await client.ask("/count", method="POST", fields={"X-Id": name})
        assert answer.status == 200, answer
        self.answered.append(name)
        await asyncio.sleep(PAUSE_S)

    async def _keep_asking(self, client: PlainClient) -> None:
        while not self._is_over:
            await self._ask(client)

    async def _come_anew(self) -> None:
        while not self._is_over:
            async with self._site.client(self._context) as (client, serial):
                self.serials.add(serial)
                await self._ask(client)

    async def _talk(self, at: int, tunnel: ClientConnection) -> None:
        while not self._is_over:
            message = f"{at}-{self.echoes[at]}"
            await tunnel.send(message)
            async with asyncio.timeout(DEADLINE_S):
                assert str(await tunnel.recv()).endswith(f" {message}")
            self.echoes[at] += 1
            await asyncio.sleep(PAUSE_S)

    async def goes_on(self) -> None:
        """Wait until each kind of client was served once more."""
        before, echoes = len(self.answered), list(self.echoes)

        def has_moved() -> bool:
            moved = all(now > then for now, then in zip(self.echoes, echoes, strict=True))
            return bool(self.failures) or (moved and len(self.answered) > before + KEPT + FRESH)

        await asyncio.to_thread(wait_until, has_moved, "the load goes on")


async def wait_for_serial(site: Site, context: ssl.SSLContext, serial: int) -> None:
    """Wait until new connections are shown a certificate."""
    async with asyncio.timeout(DEADLINE_S):
        while await site.shown(context) != serial:  # noqa: ASYNC110 -- the proxy is another process
            await asyncio.sleep(0.1)


async def test_a_renewed_certificate_is_served_without_one_dropped_connection(
    children: Children, apps: CountingApps, authority: Authority
) -> None:
    leaf = authority.issue("localhost")
    site = Site(children, apps, leaf)
    context = authority.client_context()
    load = Load(site, context)
    serials = [leaf.serial]
    async with load.running():
        await load.goes_on()
        for number in range(RENEWALS):
            serials.append(leaf.renew())
            await wait_for_serial(site, context, serials[-1])
            await load.goes_on()
            if number == 1:  # a file that was written badly changes nothing
                write_whole(leaf.certificate, b"-----BEGIN CERTIFICATE-----\nbroken\n")
                await asyncio.to_thread(
                    wait_until,
                    lambda: site.metric("certificate_reloads_total", outcome="failed") >= 1,
                    "the broken file is noticed",
                )
                assert await site.shown(context) == serials[-1]
                await load.goes_on()
    assert load.failures == []
    assert load.answered
    assert sorted(load.answered) == sorted(load.asked)
    received = apps.received()
    assert {name: received["POST", name] for name in load.asked} == dict.fromkeys(load.asked, 1)
    assert len(set(serials)) == RENEWALS + 1
    assert load.serials == set(serials)
    assert site.metric("certificate_reloads_total", outcome="ok") >= RENEWALS
    assert site.metric("handshakes_total", outcome="tls_failed") == 0
    assert "localhost.pem" in site.proxy.log, "the log names the file that could not be taken"


async def test_a_certificate_renewed_by_a_restart_is_felt(
    children: Children, apps: CountingApps, authority: Authority
) -> None:
    """The control of the test above: its load sees what it is to see."""
    leaf = authority.issue("localhost")
    site = Site(children, apps, leaf)
    context = authority.client_context()
    load = Load(site, context)
    async with load.running():
        await load.goes_on()
        serial = leaf.renew()
        await asyncio.to_thread(site.proxy.child.stop)
        await asyncio.to_thread(site.start)
        await wait_for_serial(site, context, serial)
    assert sum(one.startswith("_talk") for one in load.failures) == TUNNELS
    assert sum(one.startswith("_keep_asking") for one in load.failures) == KEPT
