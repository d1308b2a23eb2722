"""Probes: what each kind of answer, and of silence, says about an upstream."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from stickyproxy import __version__
from stickyproxy.affinity.health import HealthEvent
from stickyproxy.affinity.snapshot import Health
from stickyproxy.config import Config, Upstream, UpstreamTls
from stickyproxy.control import probe
from stickyproxy.control.certificates import make_upstream_context
from stickyproxy.control.probe import Prober
from stickyproxy.control.routing import Routing
from tests.helpers.certificates import Authority

DEADLINE_S = 30
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HTTP = {"path": "/healthz", "interval": "20ms", "timeout": "10s", "rise": 2, "fall": 2}
CONNECT = {"interval": "20ms", "timeout": "10s"}
RARE = {"interval": "1h", "timeout": "10s"}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- the condition may lie in a thread or in the system
            await asyncio.sleep(0.005)


class App:
    """An upstream that sends `answer` to each connection once a head has come, and then closes.

    With `keeps_open` it leaves the closing to the client; without an answer it stays silent.
    """

    def __init__(self, answer: bytes = OK) -> None:
        self.answer: bytes | None = answer
        self.heads: list[bytes] = []
        self.connections = 0
        self.keeps_open = False
        self.waits_for_head = True
        self.left_over = b""
        self.writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.url = ""

    async def start(self, path: Path | None = None, port: int = 0, tls: ssl.SSLContext | None = None) -> "App":
        if path is not None:
            self._server = await asyncio.start_unix_server(self._serve, path)
            self.url = f"unix:{path}"
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=tls)
            self.url = f"http{'' if tls is None else 's'}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            if self.waits_for_head:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            if self.answer is not None:
                writer.write(self.answer)
                await writer.drain()
            if self.answer is None or self.keeps_open:
                self.left_over += await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()

    async def stop(self) -> None:
        self.stop_listening()
        if self._server is not None:
            await self._server.wait_closed()


class Bench:
    """A routing state and its prober; both are made by `run`."""

    routing: Routing
    prober: Prober

    def __init__(self) -> None:
        self.apps: list[App] = []
        self.events: list[tuple[str, HealthEvent]] = []

    async def app(
        self, answer: bytes = OK, *, path: Path | None = None, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> App:
        self.apps.append(await App(answer).start(path, port, tls))
        return self.apps[-1]

    def run(
        self, *urls: str, settings: Mapping[str, object] | bool, ip: str = "", tls: ssl.SSLContext | None = None
    ) -> None:
        upstreams = [{"id": f"app-{number}", "url": url} for number, url in enumerate(urls, 1)]
        config = Config.model_validate({"upstreams": upstreams, "health": {"probe": settings}})
        self.routing = Routing(config, lambda *_: None)
        report = self.routing.report

        def note(upstream_id: str, event: HealthEvent) -> None:
            self.events.append((upstream_id, event))
            report(upstream_id, event)

        self.routing.report = note  # type: ignore[method-assign]
        if urls:
            self.renew(ip=ip, tls=tls)
        self.prober = Prober(self.routing)
        self.prober.start()

    def renew(self, **what: Any) -> None:
        """Let the first upstream be reached in another way."""
        self.routing.endpoints["app-1"] = replace(self.routing.endpoints["app-1"], **what)

    def health(self, upstream_id: str = "app-1") -> Health:
        return self.routing.observed[upstream_id].health

    def is_refused(self, upstream_id: str = "app-1") -> bool:
        return self.routing.observed[upstream_id].is_refused

    def outcomes(self, upstream_id: str = "app-1") -> dict[str, int]:
        return {name: count for name, count in self.prober.counters[upstream_id].outcomes.items() if count}


@pytest_asyncio.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(probe, "_LOOK_S", 0.01)
    made = Bench()
    yield made
    if hasattr(made, "prober"):
        await made.prober.stop()
    for app in made.apps:
        await app.stop()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port: int = link.getsockname()[1]
        return port


# What passes


async def test_a_connection_is_enough_without_a_path(bench: Bench) -> None:
    app = await bench.app()
    bench.run(app.url, settings=CONNECT)
    await until(lambda: bench.outcomes() == {"passed": 3} or app.connections > 3)
    assert bench.health() is Health.HEALTHY
    assert app.heads == []


async def test_a_path_is_asked_for_over_a_connection_of_its_own(bench: Bench) -> None:
    app = await bench.app()
    app.keeps_open = True
    bench.run(app.url, settings=HTTP | {"path": '/a%2Fb/../"?c=d'})
    await until(lambda: len(app.heads) >= 2)
    assert bench.health() is Health.HEALTHY
    assert app.connections >= 2
    assert app.left_over == b""
    lines = app.heads[0].decode().split("\r\n")
    assert lines[0] == 'GET /a%2Fb/../"?c=d HTTP/1.1'
    assert f"Host: {app.url.removeprefix('http://')}" in lines
    assert f"User-Agent: stickyproxy-probe/{__version__}" in lines


@pytest.mark.parametrize("settings", [CONNECT, HTTP])
async def test_unix_sockets_are_probed_both_ways(bench: Bench, tmp_path: Path, settings: dict[str, object]) -> None:
    app = await bench.app(path=tmp_path / "app.sock")
    bench.run(app.url, settings=settings)
    await until(lambda: bench.outcomes().get("passed", 0) >= 2)
    assert bench.health() is Health.HEALTHY
    assert all(b"\r\nHost: localhost\r\n" in head for head in app.heads)


async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    app = await bench.app(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
    bench.run(app.url, settings=HTTP)
    await until(lambda: len(app.heads) >= 2)
    assert all(head.startswith(b"GET /healthz ") for head in app.heads)
    assert bench.health() is Health.HEALTHY


async def test_a_head_that_clients_may_get_passes_too(bench: Bench) -> None:
    app = await bench.app(b"HTTP/1.1 200 OK\r\nLink: " + b"x" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n")
    bench.run(app.url, settings=HTTP)
    await until(bench.outcomes)
    assert set(bench.outcomes()) == {"passed"}


async def test_the_duration_is_counted(bench: Bench) -> None:
    app = await bench.app()
    bench.run(app.url, settings=RARE)
    await until(bench.outcomes)
    histogram = bench.prober.counters["app-1"].duration
    assert sum(histogram.counts) == 1
    assert histogram.total_s > 0


# What fails


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200",
        b"",
    ],
)
async def test_a_wrong_answer_fails_and_counts_up_to_unhealthy(bench: Bench, answer: bytes) -> None:
    app = await bench.app(answer)
    bench.run(app.url, settings=HTTP)
    await until(lambda: bench.health() is Health.UNHEALTHY)
    assert not bench.is_refused()
    assert set(bench.outcomes()) == {"failed"}


async def test_an_upstream_comes_back_after_rise_probes(bench: Bench) -> None:
    app = await bench.app(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n")
    bench.run(app.url, settings=HTTP)
    await until(lambda: bench.health() is Health.UNHEALTHY)
    app.answer = OK
    await until(lambda: bench.health() is Health.HEALTHY)
    assert bench.events[-2:] == [("app-1", HealthEvent.PROBE_PASSED)] * 2


async def test_silence_is_a_timeout_and_never_a_refusal(bench: Bench) -> None:
    app = await bench.app()
    app.answer = None
    bench.run(app.url, settings=HTTP | {"timeout": "10ms"})
    await until(lambda: bench.health() is Health.UNHEALTHY)
    assert not bench.is_refused()
    assert set(bench.outcomes()) == {"timeout"}


async def test_a_name_that_is_not_found_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    async def fail(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", fail)
    bench.run("http://app.invalid:8001", settings=settings | {"fall": 2})
    await until(lambda: bench.health() is Health.UNHEALTHY)
    assert not bench.is_refused()
    assert set(bench.outcomes()) == {"failed"}


@pytest.fixture(params=[CONNECT, HTTP], ids=["connect", "http"])
def settings(request: pytest.FixtureRequest) -> dict[str, object]:
    chosen: dict[str, object] = request.param
    return chosen


async def test_a_full_backlog_of_a_unix_socket_is_no_success(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "app.sock")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        bench.run(f"unix:{path}", settings=CONNECT | {"fall": 2})
        await until(lambda: bench.health() is Health.UNHEALTHY)
    assert not bench.is_refused()
    assert "passed" not in bench.outcomes()


# What is gone


async def test_a_refused_connection_says_that_the_process_is_gone(
    bench: Bench, free_port: int, settings: dict[str, object]
) -> None:
    bench.run(f"http://127.0.0.1:{free_port}", settings=settings)
    await until(bench.is_refused)
    assert bench.events[0] == ("app-1", HealthEvent.REFUSED)
    assert set(bench.outcomes()) == {"refused"}


@pytest.mark.parametrize("is_stale", [True, False])
async def test_a_socket_file_without_a_process_says_the_same(
    bench: Bench,
    tmp_path: Path,
    settings: dict[str, object],
    is_stale: bool,  # noqa: FBT001
) -> None:
    path = tmp_path / "app.sock"
    if is_stale:
        with socket.socket(socket.AF_UNIX) as link:
            link.bind(str(path))
    bench.run(f"unix:{path}", settings=settings)
    await until(bench.is_refused)
    assert set(bench.outcomes()) == {"refused"}


def answer_names(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, int]) -> None:
    """Let app.example have these IPv4 addresses."""
    real = asyncio.get_running_loop().getaddrinfo

    async def getaddrinfo(host: str, *given: Any, **more: Any) -> list[tuple[Any, ...]]:
        if host != "app.example":
            return [*await real(host, *given, **more)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one) for one in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_a_name_is_refused_only_where_all_its_addresses_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    answer_names(monkeypatch, ("127.0.0.1", free_port), ("127.0.0.2", free_port))
    bench.run("http://app.example:8001", settings=CONNECT)
    await until(bench.is_refused)
    assert set(bench.outcomes()) == {"refused"}


async def test_a_name_with_one_address_that_fails_otherwise_is_not_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    answer_names(monkeypatch, ("127.0.0.1", free_port), ("255.255.255.255", free_port))
    bench.run("http://app.example:8001", settings=CONNECT | {"fall": 2})
    await until(lambda: bench.health() is Health.UNHEALTHY)
    assert not bench.is_refused()


async def test_a_name_passes_where_one_of_its_addresses_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await bench.app()
    port = int(app.url.rpartition(":")[2])
    answer_names(monkeypatch, ("127.0.0.2", port), ("127.0.0.1", port))
    bench.run("http://app.example:8001", settings=CONNECT)
    await until(lambda: bench.outcomes().get("passed"))
    assert set(bench.outcomes()) == {"passed"}


async def test_a_restarted_upstream_is_found_long_before_the_next_regular_probe(bench: Bench, free_port: int) -> None:
    bench.run(f"http://127.0.0.1:{free_port}", settings=RARE)
    await until(bench.is_refused)
    await bench.app(port=free_port)
    await until(lambda: bench.health() is Health.HEALTHY)
    assert not bench.is_refused()


async def test_without_probes_only_refused_upstreams_are_tried(bench: Bench, free_port: int) -> None:
    other = await bench.app()
    bench.run(f"http://127.0.0.1:{free_port}", other.url, settings=False)
    bench.routing.report("app-1", HealthEvent.REFUSED)  # as the data plane does
    await until(lambda: bench.outcomes().get("refused", 0) >= 2)
    assert bench.outcomes("app-2") == {}
    app = await bench.app(port=free_port)
    await until(lambda: not bench.is_refused())
    tried = app.connections
    bench.routing.report("app-2", HealthEvent.REFUSED)
    await until(lambda: not bench.is_refused("app-2"))  # some rounds later
    assert app.connections <= tried + 1
    assert app.heads == []
    await until(lambda: other.connections >= 1)  # accepted, if later than the probe was content


# How an upstream is reached


async def test_the_address_of_a_name_is_taken_anew_for_each_probe(bench: Bench, settings: dict[str, object]) -> None:
    app = await bench.app()
    bench.run(app.url.replace("127.0.0.1", "app.invalid"), settings=settings, ip="127.0.0.1")
    await until(lambda: bench.outcomes().get("passed", 0) > 1)
    bench.renew(ip="127.0.0.2")  # nobody listens there
    await until(bench.is_refused)
    assert set(bench.outcomes()) == {"passed", "refused"}
    assert all(b"\r\nHost: app.invalid:" in head for head in app.heads)


class Tls:
    """An authority, what an app has of it, and what its upstream says."""

    def __init__(self, folder: Path, name: str) -> None:
        self.authority = Authority(folder)
        leaf = self.authority.issue(name)
        self.of_app = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.of_app.load_cert_chain(leaf.certificate, leaf.key)

    def client(self, **more: object) -> ssl.SSLContext:
        return make_upstream_context(UpstreamTls.model_validate({"ca": str(self.authority.file), **more}))


async def test_a_path_is_asked_for_over_tls(bench: Bench, tmp_path: Path) -> None:
    tls = Tls(tmp_path, "app.invalid")
    app = await bench.app(tls=tls.of_app)
    bench.run(app.url.replace("127.0.0.1", "app.invalid"), settings=HTTP, ip="127.0.0.1", tls=tls.client())
    await until(lambda: len(app.heads) > 1)
    assert set(bench.outcomes()) == {"passed"}
    assert bench.health() is Health.HEALTHY
    assert f"Host: app.invalid:{app.url.rpartition(':')[2]}".encode() in app.heads[0].split(b"\r\n")


async def test_the_name_in_the_configuration_is_the_one_that_is_asked_for_and_verified(
    bench: Bench, tmp_path: Path
) -> None:
    tls = Tls(tmp_path, "other.invalid")
    asked: list[str | None] = []
    tls.of_app.sni_callback = lambda _, name, __: asked.append(name)
    app = await bench.app(tls=tls.of_app)
    bench.run(app.url.replace("127.0.0.1", "app.invalid"), settings=HTTP, ip="127.0.0.1", tls=tls.client())
    await until(lambda: bench.outcomes().get("failed", 0) > 1)  # the certificate is for another name
    assert not bench.is_refused()
    assert set(asked) == {"app.invalid"}
    bench.renew(server_name="other.invalid")
    await until(lambda: bench.outcomes().get("passed", 0) > 1)
    assert asked[-1] == "other.invalid"


async def test_an_address_with_tls_is_verified(bench: Bench, tmp_path: Path) -> None:
    tls = Tls(tmp_path, "127.0.0.1")
    app = await bench.app(tls=tls.of_app)
    bench.run(app.url, settings=HTTP, tls=tls.client())
    await until(lambda: len(app.heads) > 1)
    assert set(bench.outcomes()) == {"passed"}


@pytest.mark.parametrize("fault", ["stranger", "plain app", "no certificate shown"])
async def test_a_handshake_that_fails_is_a_failed_probe_and_no_refusal(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    caplog.set_level(logging.INFO, logger="stickyproxy")
    tls = Tls(tmp_path, "127.0.0.1")
    if fault == "no certificate shown":
        tls.of_app.verify_mode = ssl.CERT_REQUIRED
    client = tls.client() if fault != "stranger" else make_upstream_context(UpstreamTls())
    app = await bench.app(b"HTTP/1.1 400 Bad Request\r\n\r\n", tls=None if fault == "plain app" else tls.of_app)
    app.waits_for_head = False
    bench.run(app.url.replace("http:", "https:"), settings=HTTP, tls=client)
    await until(lambda: bench.health() is Health.UNHEALTHY)
    assert set(bench.outcomes()) == {"failed"}
    assert not bench.is_refused()
    assert "crashed" not in caplog.text


async def test_a_connection_without_tls_is_enough_without_a_path(bench: Bench, tmp_path: Path) -> None:
    app = await bench.app(tls=Tls(tmp_path, "127.0.0.1").of_app)
    bench.run(app.url, settings=CONNECT, tls=make_upstream_context(UpstreamTls()))  # which believes no such app
    await until(lambda: bench.outcomes().get("passed", 0) > 1)
    assert set(bench.outcomes()) == {"passed"}
    assert app.heads == []


# Each for itself


async def test_a_crash_of_one_probe_stops_no_other_and_blames_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = await bench.app(), await bench.app()
    real_probe = probe.Connecting.probe

    async def crash_for_first(self: probe.Connecting) -> None:
        if f"http://{self._endpoint().address}" == first.url:
            raise RuntimeError("a fault")
        await real_probe(self)

    monkeypatch.setattr(probe.Connecting, "probe", crash_for_first)
    bench.run(first.url, second.url, settings=CONNECT)
    await until(lambda: bench.outcomes("app-2").get("passed", 0) >= 2 and bench.outcomes("app-1").get("failed", 0) >= 2)
    assert {upstream_id for upstream_id, _ in bench.events} == {"app-2"}
    assert "probe of upstream app-1 crashed" in caplog.text
    assert "RuntimeError: a fault" in caplog.text


async def test_a_proxy_without_descriptors_blames_no_upstream(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(probe.Connecting, "probe", fail)
    bench.run((await bench.app()).url, settings=CONNECT)
    await until(lambda: bench.outcomes().get("failed", 0) >= 2)
    assert bench.events == []


async def test_after_stop_there_are_no_tasks_and_no_probes(bench: Bench) -> None:
    silent, app = await bench.app(), await bench.app()
    silent.answer = None
    bench.run(silent.url, app.url, settings=HTTP)
    await until(lambda: bench.outcomes("app-2") and silent.heads)
    await bench.prober.stop()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith(("probe", "look"))]
    seen = bench.outcomes("app-2")
    await asyncio.sleep(0.1)
    assert bench.outcomes("app-2") == seen


# What is logged


async def test_the_log_says_which_upstreams_are_not_there_yet(
    bench: Bench, caplog: pytest.LogCaptureFixture, free_port: int
) -> None:
    ok, bad = await bench.app(), await bench.app(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    bench.run(ok.url, f"http://127.0.0.1:{free_port}", bad.url, settings=HTTP)
    await until(lambda: "not there yet" in caplog.text)
    [record] = [record for record in caplog.records if "not there yet" in record.message]
    assert record.levelno == logging.WARNING
    assert record.message.startswith("2 of 3 upstreams are not there yet: ")
    assert "app-2 (refused)" in record.message
    assert "app-3 (failed)" in record.message
    assert "app-1" not in record.message


async def test_the_log_is_silent_where_all_are_there(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.run((await bench.app()).url, (await bench.app()).url, settings=CONNECT)
    await until(lambda: all(bench.outcomes(one).get("passed", 0) >= 2 for one in ("app-1", "app-2")))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_long_list_of_missing_upstreams_is_cut(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "_SHOWN", 2)
    bench.run(*(f"unix:{tmp_path}/{number}.sock" for number in range(3)), settings=RARE)
    await until(lambda: "not there yet" in caplog.text)
    assert "3 of 3 upstreams are not there yet: app-1 (refused), app-2 (refused), ..." in caplog.text


async def test_the_reason_is_logged_when_it_changes_not_each_time(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = await bench.app(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    bench.run(app.url, settings=HTTP)
    await until(lambda: bench.outcomes().get("failed", 0) >= 3)
    assert caplog.text.count("probe of upstream app-1 failed: status 503") == 1
    app.answer = OK
    await until(lambda: bench.outcomes().get("passed", 0) >= 2)
    assert caplog.text.count("probe of upstream app-1 passed") == 1


# When


@pytest.mark.parametrize(("jitter", "low", "high"), [(0, 10.0, 10.0), (10, 9.0, 11.0), (50, 5.0, 15.0)])
def test_the_interval_varies_within_the_jitter(jitter: int, low: float, high: float) -> None:
    config = Config.model_validate(
        {"health": {"probe": {"interval": "10s", "jitter": jitter}}, "upstreams": ["http://127.0.0.1:1"]}
    )
    prober = Prober(Routing(config, lambda *_: None))
    for end, expected in ((0, low), (1, high)):
        prober._uniform = lambda *bounds, end=end: bounds[end]
        assert prober._pause_s(config.health.probe) == pytest.approx(expected)


# Another prober in its place


async def test_another_prober_counts_on_and_probes_what_was_added(bench: Bench) -> None:
    app, other = await bench.app(), await bench.app()
    bench.run(app.url, settings=CONNECT)
    await until(lambda: bench.outcomes().get("passed", 0) >= 1)
    former, counters = bench.prober, bench.prober.counters["app-1"]
    config = Config.model_validate(
        {
            "upstreams": [{"id": "app-1", "url": app.url}, {"id": "app-2", "url": other.url}],
            "health": {"probe": HTTP},
        }
    )
    bench.routing.reload(config, {})
    bench.prober = Prober(bench.routing, former.counters)
    await former.stop()
    passed = bench.outcomes()["passed"]
    bench.prober.start()
    await until(lambda: bench.outcomes()["passed"] >= passed + 2 and bench.outcomes("app-2").get("passed", 0) >= 2)
    assert bench.prober.counters["app-1"] is counters
    assert app.heads  # by the new settings


async def test_an_upstream_that_is_removed_is_probed_no_more(bench: Bench) -> None:
    app, other = await bench.app(), await bench.app()
    bench.run(app.url, other.url, settings=CONNECT)
    await until(lambda: bench.outcomes("app-2").get("passed", 0) >= 1)
    bench.routing.reload(Config.model_validate({"upstreams": [{"id": "app-1", "url": app.url}]}), {})
    count = bench.outcomes("app-2")["passed"]
    await until(lambda: bench.outcomes("app-2")["passed"] > count)  # as long as it is leaving
    counters = bench.prober.counters["app-2"]
    bench.routing.drop(["app-2"])
    count = sum(counters.outcomes.values())
    passed = bench.outcomes()["passed"]
    await until(lambda: bench.outcomes()["passed"] >= passed + 5)
    assert sum(counters.outcomes.values()) == count
    assert probing() == ["probe app-1"]


# App processes come and go


def probing() -> list[str]:
    """Return the names of the tasks that probe."""
    return sorted(task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("probe"))


def process(url: str, upstream_id: str = "g1-1") -> Upstream:
    return Upstream.model_validate({"id": upstream_id, "url": url})


@pytest.mark.parametrize("is_first", [True, False])
async def test_an_app_process_is_probed_from_the_moment_it_is_added(
    bench: Bench,
    settings: dict[str, object],
    is_first: bool,  # noqa: FBT001
) -> None:
    app, other = await bench.app(), await bench.app()
    bench.run(*([] if is_first else [other.url]), settings=settings)
    if not is_first:
        await until(bench.outcomes)
    bench.routing.add_process(process(app.url))
    await until(lambda: bench.outcomes("g1-1").get("passed", 0) >= 3)
    assert bench.health("g1-1") is Health.HEALTHY
    app.stop_listening()
    await until(lambda: bench.is_refused("g1-1"))


async def test_without_probes_an_app_process_is_tried_while_it_is_refused(bench: Bench) -> None:
    app = await bench.app()
    bench.run(settings=False)
    bench.routing.add_process(process(app.url))
    bench.routing.report_gone("g1-1")
    await until(lambda: not bench.is_refused("g1-1"))
    assert bench.outcomes("g1-1") == {"passed": 1}


async def test_an_app_process_that_is_removed_is_forgotten(bench: Bench, settings: dict[str, object]) -> None:
    silent, app = await bench.app(), await bench.app()
    silent.answer = None
    silent.waits_for_head = "path" in settings
    bench.run(settings=settings)
    bench.routing.add_process(process(silent.url))
    bench.routing.add_process(process(app.url, "g1-2"))
    await until(lambda: silent.connections and bench.outcomes("g1-2"))
    bench.routing.remove_process("g1-1")
    bench.events.clear()
    await until(lambda: probing() == ["probe g1-2"])
    passed = bench.outcomes("g1-2")["passed"]
    await until(lambda: bench.outcomes("g1-2")["passed"] >= passed + 3)
    assert {upstream_id for upstream_id, _ in bench.events} == {"g1-2"}
    bench.routing.remove_process("g1-2")
    await until(lambda: probing() == [])


async def test_what_was_counted_of_the_last_ones_that_are_gone_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_REMOVED", 2)
    app = await bench.app()
    bench.run(settings=CONNECT)
    for number in range(1, 5):
        bench.routing.add_process(process(app.url, f"g1-{number}"))
        await until(lambda number=number: bench.outcomes(f"g1-{number}").get("passed"))  # type: ignore[misc]
    for number in range(1, 4):
        bench.routing.remove_process(f"g1-{number}")
    assert list(bench.prober.counters) == ["g1-2", "g1-3", "g1-4"]
    assert bench.outcomes("g1-3")["passed"] >= 1


@pytest.mark.parametrize("kind", ["port", "socket"])
async def test_one_that_was_started_anew_is_probed_where_it_is_now(
    bench: Bench, settings: dict[str, object], tmp_path: Path, kind: str
) -> None:
    app = await bench.app()
    bench.run(settings=settings)
    bench.routing.add_process(process(app.url))
    await until(lambda: bench.outcomes("g1-1").get("passed"))
    counters = bench.prober.counters["g1-1"]
    app.stop_listening()
    await until(lambda: bench.is_refused("g1-1"))
    anew = await bench.app(path=tmp_path / "g1-1.sock" if kind == "socket" else None)
    bench.routing.add_process(process(anew.url))
    connections, passed = app.connections, counters.outcomes["passed"]
    await until(lambda: anew.connections >= 3 and counters.outcomes["passed"] >= passed + 3)
    assert app.connections == connections
    assert bench.health("g1-1") is Health.HEALTHY
    assert bench.prober.counters["g1-1"] is counters, "it is the same upstream"
    host = "localhost" if kind == "socket" else anew.url.removeprefix("http://")
    assert all(f"\r\nHost: {host}\r\n".encode() in head for head in anew.heads)
    assert probing() == ["probe g1-1"]


async def test_a_probe_of_the_former_process_says_nothing_of_the_new_one(bench: Bench) -> None:
    former, anew = await bench.app(), await bench.app()
    former.answer = None
    bench.run(settings=HTTP | {"fall": 1})
    bench.routing.add_process(process(former.url))
    await until(lambda: former.heads)
    writers = former.writers
    bench.routing.add_process(process(anew.url))
    for writer in writers:  # what the probe would take for a failure
        writer.transport.abort()
    await until(lambda: bench.outcomes("g1-1").get("passed", 0) >= 2)
    assert set(bench.events) == {("g1-1", HealthEvent.PROBE_PASSED)}


async def test_a_prober_that_was_stopped_follows_no_more_and_another_takes_its_place(bench: Bench) -> None:
    app, other = await bench.app(), await bench.app()
    bench.run(settings=CONNECT)
    bench.routing.add_process(process(app.url))
    bench.routing.add_process(process(other.url, "g1-2"))
    await until(lambda: bench.outcomes("g1-1") and bench.outcomes("g1-2"))
    former, bench.prober = bench.prober, Prober(bench.routing, bench.prober.counters)
    await former.stop()
    bench.routing.remove_process("g1-2")
    former.follow()
    assert probing() == []
    bench.prober.start()
    assert probing() == ["probe g1-1"]
    await former.stop()  # it takes nothing from the other one
    bench.routing.add_process(process(other.url, "g1-3"))
    await until(lambda: bench.outcomes("g1-3").get("passed"))
    assert probing() == ["probe g1-1", "probe g1-3"]


async def test_those_that_go_before_their_first_probe_has_ended_are_not_waited_for_to_say_what_is_missing(
    bench: Bench, caplog: pytest.LogCaptureFixture, free_port: int
) -> None:
    silent = await bench.app()
    silent.answer = None
    bench.run(f"http://127.0.0.1:{free_port}", silent.url, settings=HTTP)
    await until(lambda: bench.is_refused() and silent.heads)
    assert "not there yet" not in caplog.text
    bench.routing.reload(
        Config.model_validate({"upstreams": [{"id": "app-1", "url": f"http://127.0.0.1:{free_port}"}]}), {}
    )
    bench.routing.drop(["app-2"])
    assert "1 of 1 upstreams are not there yet: app-1 (refused)" in caplog.text
    bench.routing.add_process(process(silent.url))
    bench.routing.add_process(process(f"http://127.0.0.1:{free_port}", "g1-2"))
    await until(lambda: bench.outcomes("g1-2").get("refused", 0) >= 2)
    assert caplog.text.count("not there yet") == 1, "those that come later say so for themselves"
