"""A proxy without listeners, and clients of its admin application."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.config import Admin, Config
from stickyproxy.control.admin.app import make_app
from stickyproxy.control.admin.auth import make_guard
from stickyproxy.control.readings import Readings
from stickyproxy.control.routing import Routing
from tests.helpers.stub_supervisor import StubSupervisor

Client = TestClient[web.Request, web.Application]


@pytest.fixture
def config() -> Config:
    upstreams = [{"id": "app-1", "url": "http://127.0.0.1:8001"}, "http://127.0.0.1:8002", "unix:/run/app one.sock"]
    return Config.model_validate({"upstreams": upstreams})


@pytest_asyncio.fixture
async def supervisor(config: Config) -> AsyncIterator[StubSupervisor]:
    made = StubSupervisor(config)
    made.readings.is_ready = True
    yield made
    made.close()


@pytest.fixture
def routing(supervisor: StubSupervisor) -> Routing:
    return supervisor.routing


@pytest.fixture
def readings(supervisor: StubSupervisor) -> Readings:
    return supervisor.readings


@pytest.fixture
def settled() -> list[dict[str, AdminState]]:
    """Return the admin states that there were each time somebody waited until the data plane works by them."""
    return []


@pytest.fixture
def make(readings: Readings, routing: Routing, settled: list[dict[str, AdminState]]) -> Callable[..., web.Application]:
    """Return what makes an admin application with the given keys of its configuration."""

    async def settle() -> None:
        settled.append(routing.admin_states)

    def make(**keys: str) -> web.Application:
        return make_app(make_guard(Admin.model_validate(keys)), readings, routing, settle)

    return make


@pytest.fixture
def connect(aiohttp_client: AiohttpClient, make: Callable[..., web.Application]) -> Callable[..., Awaitable[Client]]:
    """Return what makes a client of such an application."""

    async def connect(**keys: str) -> Client:
        return await aiohttp_client(make(**keys))

    return connect


@pytest_asyncio.fixture
async def client(connect: Callable[..., Awaitable[Client]]) -> Client:
    return await connect()
