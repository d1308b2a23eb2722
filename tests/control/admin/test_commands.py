"""The commands, on the control socket of a stub: what is answered, and that nobody else may use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from stickyproxy.config import Change
from stickyproxy.control.admin.app import AdminListener, make_app
from stickyproxy.control.admin.auth import admit_same_user
from stickyproxy.control.admin.commands import Commands
from stickyproxy.control.runtime import ForeignPeerError, bind_private
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.helpers.stub_supervisor import StubSupervisor


@dataclass
class StubReloader:
    """Reloads nothing, and says what it is told to say."""

    changes: tuple[Change, ...] = ()
    mistake: str = ""
    calls: int = 0

    async def reload(self) -> tuple[Change, ...]:
        self.calls += 1
        if self.mistake:
            raise UsageError(self.mistake)
        return self.changes


@dataclass
class StubUpgrader:
    """Upgrades nothing, and says what it is told to say."""

    status: dict[str, Any] = field(default_factory=dict)
    mistake: str = ""
    calls: int = 0

    @property
    def is_running(self) -> bool:
        return self.status.get("state") == "running"

    async def upgrade(self) -> None:
        self.calls += 1
        if self.mistake:
            raise UsageError(self.mistake)
        self.status = {"number": 1, "state": "running", "from": "1", "to": "2"}


@dataclass
class Proxy:
    """What answers, and a session that is connected to it."""

    reloader: StubReloader
    upgrader: StubUpgrader
    session: aiohttp.ClientSession

    async def ask(self, method: str, path: str) -> tuple[int, Any]:
        async with self.session.request(method, f"http://localhost{path}") as response:
            return response.status, await response.json()


@pytest_asyncio.fixture
async def proxy(supervisor: StubSupervisor, tmp_path: Path) -> AsyncIterator[Proxy]:
    reloader, upgrader = StubReloader(), StubUpgrader()
    supervisor.reloader, supervisor.upgrader = cast("Any", reloader), cast("Any", upgrader)

    async def settle() -> None:
        pass

    app = make_app(admit_same_user, supervisor.readings, supervisor.routing, settle)
    Commands(cast("Any", supervisor)).add_routes(app.router)
    path = tmp_path / "c"
    listener, link = AdminListener(app), bind_private(path)
    await listener.start(link)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        yield Proxy(reloader, upgrader, session)
    await listener.stop()
    link.close()


async def test_a_reload_says_what_has_changed(proxy: Proxy) -> None:
    proxy.reloader.changes = (Change(("timeouts", "head"), "changed", "10s -> 5s"),)
    assert await proxy.ask("POST", "/api/v1/reload") == (200, {"changes": ["timeouts.head: 10s -> 5s"]})
    assert proxy.reloader.calls == 1


async def test_a_reload_that_cannot_be_says_why(proxy: Proxy) -> None:
    proxy.reloader.mistake = "line 3: no such key"
    assert await proxy.ask("POST", "/api/v1/reload") == (422, {"error": "line 3: no such key"})


async def test_an_upgrade_that_begins_is_told_of_and_can_be_asked_for(proxy: Proxy) -> None:
    begun = {"number": 1, "state": "running", "from": "1", "to": "2"}
    assert await proxy.ask("POST", "/api/v1/upgrade") == (202, begun)
    assert await proxy.ask("GET", "/api/v1/upgrade") == (200, begun)


async def test_an_upgrade_that_cannot_be_says_why(proxy: Proxy) -> None:
    proxy.upgrader.mistake = "the new version cannot start"
    assert await proxy.ask("POST", "/api/v1/upgrade") == (422, {"error": "the new version cannot start"})


async def test_the_second_of_two_upgrades_is_refused(proxy: Proxy) -> None:
    await proxy.ask("POST", "/api/v1/upgrade")
    status, answer = await proxy.ask("POST", "/api/v1/upgrade")
    assert (status, proxy.upgrader.calls) == (409, 1)
    assert "under way" in answer["error"]


@pytest.mark.parametrize("path", ["/api/v1/reload", "/api/v1/upgrade", "/api/v1/state"])
async def test_another_user_may_do_nothing(proxy: Proxy, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ForeignPeerError("process 7 of uid 5 has connected; only uid 0 may")

    monkeypatch.setattr("stickyproxy.control.admin.auth.check_peer", refuse)
    method = "GET" if path.endswith("state") else "POST"
    status, answer = await proxy.ask(method, path)
    assert (status, proxy.reloader.calls, proxy.upgrader.calls) == (403, 0, 0)
    assert "uid 5" in answer["error"]


async def test_the_admin_listener_knows_no_commands(make: Any) -> None:
    app = cast("web.Application", make())
    paths = {resource.canonical for resource in app.router.resources()}
    assert "/api/v1/state" in paths
    assert not paths & {"/api/v1/reload", "/api/v1/upgrade"}
