"""Who may use the admin listener."""

from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.control.routing import Routing

Connect = Callable[..., Awaitable[TestClient[web.Request, web.Application]]]
TOKEN = "0123456789abcdef"
CHANGE = "/api/v1/clusters/default/upstreams/app-1/state"
JSON = {"Content-Type": "application/json"}
DRAIN = b'{"state": "drain"}'


def is_drained(routing: Routing) -> bool:
    return routing.upstreams[0].admin is AdminState.DRAIN


# The token


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/v1/state", "/nowhere"])
@pytest.mark.parametrize(
    "sent", [None, "", TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}0", f"Bearer {TOKEN[:-1]}", "Bearer é"]
)
async def test_without_the_token_nothing_is_told(connect: Connect, path: str, sent: str | None) -> None:
    client = await connect(token=TOKEN)
    response = await client.get(path, headers={} if sent is None else {"Authorization": sent})
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="stickyproxy"'
    assert await response.json() == {"error": "a valid token is needed: Authorization: Bearer TOKEN"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
async def test_with_the_token_all_is_open(connect: Connect, scheme: str, routing: Routing) -> None:
    client = await connect(token=TOKEN)
    authorization = {"Authorization": f"{scheme} {TOKEN}"}
    assert (await client.get("/api/v1/state", headers=authorization)).status == 200
    assert (await client.put(CHANGE, data=DRAIN, headers=JSON | authorization)).status == 200
    assert is_drained(routing)


async def test_a_change_needs_the_token_too(connect: Connect, routing: Routing) -> None:
    client = await connect(token=TOKEN)
    assert (await client.put(CHANGE, data=DRAIN, headers=JSON)).status == 401
    assert not is_drained(routing)


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_orchestrators_need_no_token(connect: Connect, path: str) -> None:
    client = await connect(token=TOKEN)
    assert (await client.get(path)).status == 200


# The name that the listener is called by


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:9090", "127.9.9.9:1", "localhost", "localhost:9090", "LocalHost.", "[::1]", "[::1]:9090"],
)
async def test_on_loopback_it_answers_to_loopback_names(connect: Connect, host: str) -> None:
    client = await connect(address="127.0.0.1:9090")
    assert (await client.get("/livez", headers={"Host": host})).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "rebound.example",
        "rebound.example:9090",
        "10.0.0.1:9090",
        "127.0.0.1.example",
        "localhost.example",
        "[::2]",
        "::1",
        "[localhost]",
        "localhost:",
        "localhost:9090:9090",
        "user@localhost",
        "",
    ],
)
async def test_on_loopback_it_refuses_other_names(connect: Connect, host: str) -> None:
    client = await connect(address="127.0.0.1:9090")
    for path in ("/livez", "/metrics"):
        response = await client.get(path, headers={"Host": host})
        assert response.status == 403
        assert "loopback" in (await response.json())["error"]


@pytest.mark.parametrize(
    "keys", [{"address": "0.0.0.0:9090", "token": TOKEN}, {"address": "unix:/run/admin.sock"}], ids=["public", "unix"]
)
async def test_elsewhere_any_name_will_do(connect: Connect, keys: dict[str, str]) -> None:
    client = await connect(**keys)
    assert (await client.get("/livez", headers={"Host": "proxy.example"})).status == 200


# Pages of others


@pytest.mark.parametrize(
    "sent",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
    ],
)
async def test_a_page_of_another_site_changes_nothing(connect: Connect, routing: Routing, sent: dict[str, str]) -> None:
    client = await connect()
    response = await client.put(CHANGE, data=DRAIN, headers=JSON | sent)
    assert response.status == 403
    assert await response.json() == {"error": "a request of another site may change nothing here"}
    assert not is_drained(routing)


@pytest.mark.parametrize("site", [None, "none", "same-origin"])
@pytest.mark.parametrize("has_origin", [True, False])
async def test_a_tool_or_the_own_page_may_change(
    connect: Connect,
    routing: Routing,
    site: str | None,
    has_origin: bool,  # noqa: FBT001
) -> None:
    client = await connect()
    origin = {"Origin": f"http://{client.host}:{client.port}"} if has_origin else {}
    fetch_site = {} if site is None else {"Sec-Fetch-Site": site}
    assert (await client.put(CHANGE, data=DRAIN, headers=JSON | origin | fetch_site)).status == 200
    assert is_drained(routing)


async def test_reading_is_not_a_change(connect: Connect) -> None:
    client = await connect()
    assert (await client.get("/readyz", headers={"Sec-Fetch-Site": "cross-site"})).status == 200
