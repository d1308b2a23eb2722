"""The admin listener: its routes, its errors, and its beginning and end."""

import logging
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import ClientConnectionError, ClientSession, TCPConnector, UnixConnector, web
from aiohttp.test_utils import TestClient
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from stickyproxy.affinity.health import HealthEvent
from stickyproxy.control.admin import app as app_module
from stickyproxy.control.admin.app import AdminListener
from stickyproxy.control.readings import Readings
from stickyproxy.control.routing import Routing
from stickyproxy.observe.metrics import write_metrics

Client = TestClient[web.Request, web.Application]


def read_openmetrics(text: str) -> Iterable[Metric]:
    parse: Callable[[str], Iterable[Metric]] = parse_openmetrics
    return parse(text)


# The routes


async def test_the_index_names_the_routes(client: Client) -> None:
    response = await client.get("/")
    text = await response.text()
    assert response.status == 200
    assert response.content_type == "text/plain"
    for path in ("/metrics", "/livez", "/readyz", "/api/v1/state"):
        assert path in text


async def test_a_proxy_that_runs_is_alive_whatever_its_state(client: Client, readings: Readings) -> None:
    for is_ready in (True, False):
        readings.is_ready = is_ready
        response = await client.get("/livez")
        assert (response.status, await response.text()) == (200, "alive\n")


async def test_readiness_follows_the_proxy_and_says_why(client: Client, readings: Readings, routing: Routing) -> None:
    response = await client.get("/readyz")
    assert (response.status, await response.text()) == (200, "ready\n")
    for upstream in routing.upstreams:
        routing.report(upstream.id, HealthEvent.REFUSED)
    response = await client.get("/readyz")
    assert response.status == 503
    assert await response.text() == "no upstream can be used: 3 refuse connections, 0 in maintenance\n"
    readings.is_ready = False
    response = await client.get("/readyz")
    assert (response.status, await response.text()) == (503, "the proxy is stopping\n")


async def test_metrics_are_text_for_people_and_older_prometheus(client: Client) -> None:
    response = await client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in parse_text(await response.text())}
    assert {"stickyproxy_sessions_active", "process_open_fds", "python_info"} <= names


async def test_metrics_are_openmetrics_where_it_is_asked_for(client: Client) -> None:
    accept = [("Accept", "text/html"), ("Accept", "application/openmetrics-text; version=1.0.0; q=0.9")]
    response = await client.get("/metrics", headers=accept)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in read_openmetrics(await response.text())}
    assert "stickyproxy_sessions_active" in names


async def test_the_text_of_the_metrics_is_written_beside_the_loop(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def write(*given: Any) -> tuple[bytes, str]:
        threads.append(threading.current_thread())
        return write_metrics(*given)

    monkeypatch.setattr(app_module, "write_metrics", write)
    await client.get("/metrics")
    assert threads != []
    assert threading.main_thread() not in threads


async def test_nothing_is_to_be_stored(client: Client) -> None:
    for path in ("/", "/livez", "/metrics", "/api/v1/state", "/nowhere"):
        response = await client.get(path)
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"


# Errors


async def test_an_unknown_path_is_404_in_json(client: Client) -> None:
    response = await client.get("/nowhere")
    assert response.status == 404
    assert await response.json() == {"error": "there is no /nowhere; GET / names what there is"}


async def test_a_wrong_method_is_405_and_the_right_ones_are_named(client: Client) -> None:
    response = await client.put("/metrics")
    assert response.status == 405
    assert response.headers["Allow"] == "GET,HEAD"
    assert await response.json() == {"error": "PUT is not possible here, only GET, HEAD"}


async def test_a_large_body_is_413(client: Client) -> None:
    path = "/api/v1/clusters/default/upstreams/app-1/state"
    response = await client.put(path, data=b" " * 4097, headers={"Content-Type": "application/json"})
    assert response.status == 413
    assert set(await response.json()) == {"error"}


async def test_an_error_without_text_has_its_reason(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise web.HTTPConflict(text="")

    monkeypatch.setattr(Readings, "describe", fail)
    response = await client.get("/api/v1/state")
    assert (response.status, await response.json()) == (409, {"error": "Conflict"})


async def test_a_crash_is_logged_and_tells_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("what is inside")

    monkeypatch.setattr(Readings, "describe", fail)
    response = await client.get("/api/v1/state")
    assert (response.status, await response.json()) == (500, {"error": "an error of the proxy; its log says more"})
    [record] = [record for record in caplog.records if record.name == app_module.__name__]
    assert (record.levelno, record.message) == (logging.ERROR, "the admin listener failed at GET /api/v1/state")


# The listener


@pytest_asyncio.fixture
async def listen(make: Callable[..., web.Application]) -> AsyncIterator[Callable[..., Any]]:
    listeners: list[AdminListener] = []
    links: list[socket.socket] = []

    async def start(link: socket.socket, **keys: str) -> AdminListener:
        links.append(link)
        link.setblocking(False)
        listeners.append(AdminListener(make(**keys)))
        await listeners[-1].start(link)
        return listeners[-1]

    yield start
    for listener in listeners:
        await listener.stop()
    for link in links:
        link.close()


async def test_it_serves_on_a_bound_socket_until_it_stops(listen: Callable[..., Any]) -> None:
    link = socket.socket()
    link.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{link.getsockname()[1]}/livez"
    listener = await listen(link)
    async with ClientSession(connector=TCPConnector(force_close=True)) as session:
        async with session.get(url) as response:
            assert await response.text() == "alive\n"
        await listener.stop()
        link.close()
        with pytest.raises(ClientConnectionError):
            await session.get(url)


async def test_another_may_take_its_place_on_the_same_socket(listen: Callable[..., Any]) -> None:
    """A reload that changes the token does that: the socket stays its owner's."""
    link = socket.socket()
    link.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{link.getsockname()[1]}/"
    former = await listen(link)
    await listen(link, token="0123456789abcdef")
    await former.stop()
    async with ClientSession(connector=TCPConnector(force_close=True)) as session, session.get(url) as response:
        assert response.status == 401


async def test_it_serves_its_owner_on_a_unix_socket(listen: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    link = socket.socket(socket.AF_UNIX)
    link.bind(str(path))
    listener = await listen(link, address=f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with ClientSession(connector=UnixConnector(str(path))) as session, session.get("http://x/livez") as response:
        assert await response.text() == "alive\n"
    await listener.stop()
    assert path.exists()  # whoever has bound it removes it
    await listener.stop()  # a second time is harmless


async def test_one_that_was_not_started_can_be_stopped(make: Callable[..., web.Application]) -> None:
    await AdminListener(make()).stop()
