"""The commands, on the control socket of a stub: what is answered, and that nobody else may use it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from stickyproxy.affinity.keys import Found
from stickyproxy.affinity.snapshot import AdminState, upstream_digest
from stickyproxy.affinity.token import Token, TokenCodec
from stickyproxy.config import Change, Config, load_text
from stickyproxy.control.admin.app import AdminListener, make_app
from stickyproxy.control.admin.auth import admit_same_user
from stickyproxy.control.admin.commands import Commands
from stickyproxy.control.runtime import ForeignPeerError, bind_private
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.helpers.stub_supervisor import StubSupervisor

SECRET = b"0123456789abcdef0123456789abcdef"


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

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        given = {} if body is None else {"json": body}
        async with self.session.request(method, f"http://localhost{path}", **given) as response:
            return response.status, await response.json()


@pytest.fixture
def config(request: pytest.FixtureRequest, config: Config) -> Config:
    """Give the configuration of all tests here, or one with the keys that a test names."""
    keys = getattr(request, "param", None)
    if keys is None:
        return config
    upstreams = "[{id: app-1, url: 'http://127.0.0.1:8001'}, {id: app-2, url: 'http://127.0.0.1:8002'}]"
    return load_text(f"{{upstreams: {upstreams}, affinity: {{keys: {keys}}}}}", {})


@pytest_asyncio.fixture
async def proxy(supervisor: StubSupervisor, tmp_path: Path) -> AsyncIterator[Proxy]:
    reloader, upgrader = StubReloader(), StubUpgrader()
    supervisor.reloader, supervisor.upgrader = cast("Any", reloader), cast("Any", upgrader)
    cast("Any", supervisor).signing = (SECRET,)

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


@pytest.mark.parametrize("path", ["/api/v1/reload", "/api/v1/upgrade", "/api/v1/explain", "/api/v1/state"])
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
    assert not paths & {"/api/v1/reload", "/api/v1/upgrade", "/api/v1/explain"}


# Explaining


async def test_where_a_request_would_go_is_said(proxy: Proxy) -> None:
    status, answer = await proxy.ask("POST", "/api/v1/explain", {"line": "GET /path", "headers": ["Host: a:81"]})
    assert (status, answer["request"], answer["host"]) == (200, "GET /path", "a:81")
    assert (answer["outcome"], answer["ladder"][-1]["choices"]) == (
        "new", ["app-1", "127.0.0.1:8002", "/run/app one.sock"],
    )  # fmt: skip
    assert answer["sets_cookie"].endswith("SameSite=Lax")
    secure = {"line": "GET /path", "is_https": True, "body": "", "headers": []}
    assert (await proxy.ask("POST", "/api/v1/explain", secure))[1]["sets_cookie"].endswith("; Secure")


async def test_it_is_explained_by_what_the_proxy_knows_now(proxy: Proxy, supervisor: StubSupervisor) -> None:
    supervisor.routing.set_admin_state("app-1", AdminState.DRAIN)
    _, answer = await proxy.ask("POST", "/api/v1/explain", {"line": "/"})
    assert answer["ladder"][-1]["choices"] == ["127.0.0.1:8002", "/run/app one.sock"]
    at = int(time.time())  # noqa: TID251 -- as the plane reads it
    pinned = Token(upstream_digest("app-1"), b"0123456789", at, at)
    for codec, outcome in ((TokenCodec([SECRET]), "hit"), (TokenCodec([b"s" * 32]), "invalid")):
        headers = [f"Cookie: stickyproxy={codec.write(pinned).decode()}"]
        assert (await proxy.ask("POST", "/api/v1/explain", {"line": "/", "headers": headers}))[1]["outcome"] == outcome


@pytest.mark.parametrize("config", ["[{name: sid, mode: learn, header: X-Sid}]"], indirect=True)
async def test_the_keys_are_those_of_all_workers(proxy: Proxy, supervisor: StubSupervisor) -> None:
    key, keys = supervisor.config.affinity.keys[0].compile(), supervisor.fleet.keys
    keys.learn(Found(key, b"abc").stored, upstream_digest("app-2"), 60.0, time.monotonic())
    memory = bytes(keys._memory)
    for value, outcome in (("abc", "learned"), ("def", "new")):
        _, answer = await proxy.ask("POST", "/api/v1/explain", {"line": "/", "headers": [f"X-Sid: {value}"]})
        assert answer["outcome"] == outcome
    assert bytes(keys._memory) == memory


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"line": 1},
        {"line": "/", "headers": "Host: a"},
        {"line": "/", "headers": [1]},
        {"line": "/", "body": None},
        {"line": "/", "is_https": 1},
        {"line": "/", "more": 1},
        [],
    ],
)
async def test_what_is_no_question(proxy: Proxy, body: Any) -> None:
    status, answer = await proxy.ask("POST", "/api/v1/explain", body)
    assert status == 400
    assert answer["error"].startswith(("line and body are text", "expected an object"))


@pytest.mark.parametrize(
    ("line", "error"), [("GET", "expected a request such as"), ("/\x01", "the proxy would refuse the request with 400")]
)
async def test_what_is_no_request(proxy: Proxy, line: str, error: str) -> None:
    status, answer = await proxy.ask("POST", "/api/v1/explain", {"line": line})
    assert status == 422
    assert answer["error"].startswith(error)


async def test_a_long_question_is_answered(proxy: Proxy) -> None:
    cookie = "Cookie: a=" + "x" * 20_000
    status, answer = await proxy.ask("POST", "/api/v1/explain", {"line": "GET /path", "headers": [cookie]})
    assert (status, answer["outcome"]) == (200, "new")


async def test_what_is_no_text_is_refused(proxy: Proxy) -> None:
    status, answer = await proxy.ask("POST", "/api/v1/explain", {"line": "POST /", "body": "\ud800"})
    assert (status, answer["error"]) == (422, "what was asked is no text that can be sent")
