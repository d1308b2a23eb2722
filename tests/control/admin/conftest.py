"""A proxy without listeners, and clients of its admin application."""

from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from stickyproxy.config import Admin, Config
from stickyproxy.control.admin.app import make_app
from stickyproxy.control.probe import Prober
from stickyproxy.control.readings import Readings
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker import make_sessions, make_settings
from stickyproxy.proxy.plane import Plane

Client = TestClient[web.Request, web.Application]


@pytest.fixture
def config() -> Config:
    upstreams = [{"id": "app-1", "url": "http://127.0.0.1:8001"}, "http://127.0.0.1:8002", "unix:/run/app one.sock"]
    return Config.model_validate({"upstreams": upstreams})


@pytest_asyncio.fixture
async def plane(config: Config) -> AsyncIterator[Plane]:
    made = Plane(make_settings(config), make_sessions(config, [b"x" * 32]), report=lambda *_: None, random=lambda: 0.0)
    yield made
    made.close()


@pytest.fixture
def routing(config: Config, plane: Plane) -> Routing:
    return Routing(config, plane.publish)


@pytest_asyncio.fixture
async def readings(config: Config, plane: Plane, routing: Routing) -> Readings:
    made = Readings(cast("Any", SimpleNamespace(plane=plane)), routing, Prober(config.health, routing), None)
    made.is_ready = True
    return made


@pytest.fixture
def connect(aiohttp_client: AiohttpClient, readings: Readings, routing: Routing) -> Callable[..., Awaitable[Client]]:
    """Return what makes a client of an admin application with the given keys of its configuration."""

    async def make(**keys: str) -> Client:
        return await aiohttp_client(make_app(Admin.model_validate(keys), readings, routing))

    return make


@pytest_asyncio.fixture
async def client(connect: Callable[..., Awaitable[Client]]) -> Client:
    return await connect()
