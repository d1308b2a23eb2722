"""The API of the state."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.config import Admin, Config, load_text
from stickyproxy.control.admin.app import make_app
from stickyproxy.control.admin.auth import make_guard
from stickyproxy.control.admin.state import parse_admin_state
from stickyproxy.control.readings import Readings
from stickyproxy.control.routing import Routing
from stickyproxy.control.runner.deploy import DeployOptions
from stickyproxy.control.runner.runner import Runner
from tests.helpers.runner import running_app
from tests.helpers.supervised import open_tunnel, port_of, until

Client = TestClient[web.Request, web.Application]
IDS = ["app-1", "127.0.0.1:8002", "/run/app one.sock"]
JSON = {"Content-Type": "application/json"}


def path_of(upstream_id: str, cluster: str = "default", *, safe: str = "") -> URL:
    return URL(f"/api/v1/clusters/{cluster}/upstreams/{quote(upstream_id, safe=safe)}/state", encoded=True)


def admin_state(routing: Routing, upstream_id: str) -> AdminState:
    return next(one.admin for one in routing.upstreams if one.id == upstream_id)


async def test_the_state_is_shown(client: Client, readings: Readings) -> None:
    response = await client.get("/api/v1/state")
    assert (response.status, response.content_type) == (200, "application/json")
    shown, expected = await response.json(), readings.describe()
    assert shown.pop("uptime_s") <= expected.pop("uptime_s")
    assert shown == expected
    assert [upstream["id"] for upstream in shown["clusters"][0]["upstreams"]] == IDS


@pytest.mark.parametrize("upstream_id", IDS)
@pytest.mark.parametrize("state", AdminState)
async def test_an_upstream_is_set_to_a_state(
    client: Client, routing: Routing, upstream_id: str, state: AdminState
) -> None:
    routing.set_admin_state(upstream_id, next(one for one in AdminState if one is not state))
    response = await client.put(path_of(upstream_id), json={"state": state})
    changed = await response.json()
    assert response.status == 200
    assert (changed["id"], changed["admin_state"], changed["accepts_new"]) == (upstream_id, state, state == "ready")
    assert admin_state(routing, upstream_id) is state
    others = [admin_state(routing, one) for one in IDS if one != upstream_id]
    assert others == [AdminState.READY] * 2


async def test_whoever_is_answered_may_rely_on_it(client: Client, settled: list[dict[str, AdminState]]) -> None:
    await client.put(path_of("app-1"), json={"state": "maint"})
    assert [states["app-1"] for states in settled] == [AdminState.MAINT]  # once, after the change


async def test_an_upstream_that_is_leaving_takes_nobody_again(
    client: Client, routing: Routing, config: Config, settled: list[dict[str, AdminState]]
) -> None:
    routing.reload(config.model_copy(update={"upstreams": config.upstreams[1:]}), {})
    response = await client.put(path_of("app-1"), json={"state": "ready"})
    assert response.status == 409
    assert await response.json() == {
        "error": "the upstream 'app-1' is no longer in the configuration; it can only drain"
    }
    assert settled == []
    response = await client.put(path_of("app-1"), json={"state": "maint"})
    assert ((await response.json())["admin_state"], (await response.json())["is_leaving"]) == ("maint", True)


async def put(client: Client, upstream_id: str, state: str) -> tuple[int, str]:
    """Ask for a state; return the status, and the state that it has or why not."""
    response = await client.put(path_of(upstream_id), json={"state": state})
    answer = await response.json()
    return response.status, answer.get("error") or answer["admin_state"]


@asynccontextmanager
async def operated(directory: Path, connect: AiohttpClient) -> AsyncIterator[tuple[Client, Runner]]:
    """Run two app processes that are in use, and give a client of the API."""
    async with running_app(directory, 2) as (supervisor, runner):
        await until(lambda: all(seat.state == "ready" for seat in runner.seats.values()))
        tunnels = [await open_tunnel(port_of(supervisor)) for _ in range(2)]
        assert {tunnel.app for tunnel in tunnels} == {"g1-1", "g1-2"}
        guard, settle = make_guard(Admin()), supervisor.fleet.published
        yield await connect(make_app(guard, supervisor.readings, supervisor.routing, settle)), runner
        for tunnel in tunnels:
            await tunnel.client.__aexit__(None, None, None)


def refused(upstream_id: str) -> tuple[int, str]:
    words = f"the app process {upstream_id!r} ends once its sessions have; it takes no new client. "
    return 409, f"{words}For more processes: stickyproxy scale"


async def test_an_app_process_whose_place_another_generation_takes_takes_nobody_again(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    async with operated(tmp_path, aiohttp_client) as (client, runner):
        assert await put(client, "g1-1", "drain") == (200, "drain")
        assert await put(client, "g1-1", "ready") == (200, "ready")  # what an operator drains, an operator takes back
        deploy = runner.begin_deploy(DeployOptions(drain_timeout_s=None, pace_per_s=20.0, surge=0, watch_s=2.0))
        await until(lambda: deploy.state == "watching")
        assert await put(client, "g1-1", "ready") == refused("g1-1")
        await until(lambda: deploy.state == "draining")
        assert await put(client, "g1-1", "ready") == refused("g1-1")
        assert await put(client, "g2-1", "drain") == (200, "drain")
        assert await put(client, "g2-1", "ready") == (200, "ready")
        assert await put(client, "g1-1", "maint") == (200, "maint")
        assert await put(client, "g1-1", "ready") == refused("g1-1")
        assert await put(client, "g1-1", "drain") == (200, "drain")


async def test_an_app_process_that_is_one_too_many_takes_nobody_again(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    async with operated(tmp_path, aiohttp_client) as (client, runner):
        runner.scale(1)
        await until(lambda: "draining" in {seat.state for seat in runner.seats.values()})
        drained = next(seat.id for seat in runner.seats.values() if seat.state == "draining")
        [other] = runner.seats.keys() - {drained}
        assert await put(client, drained, "ready") == refused(drained)
        assert await put(client, other, "ready") == (200, "ready")


async def test_a_colon_need_not_be_escaped(client: Client, routing: Routing) -> None:
    response = await client.put(path_of("127.0.0.1:8002", safe=":"), json={"state": "maint"})
    assert response.status == 200
    assert admin_state(routing, "127.0.0.1:8002") is AdminState.MAINT


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (path_of("app-1", cluster="other"), "there is no cluster 'other'"),
        (path_of("app-9"), "there is no upstream 'app-9' in the cluster 'default'"),
        (path_of("app%2D1"), "there is no upstream 'app%2D1' in the cluster 'default'"),
    ],
)
async def test_what_is_not_there_is_404(client: Client, path: URL, error: str) -> None:
    response = await client.put(path, json={"state": "drain"})
    assert (response.status, await response.json()) == (404, {"error": error})


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
async def test_a_form_of_another_site_could_not_send_json(
    client: Client, routing: Routing, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    skip = {"Content-Type"} if content_type is None else set()
    response = await client.put(path_of("app-1"), data=b'{"state": "drain"}', headers=headers, skip_auto_headers=skip)
    assert response.status == 415
    assert await response.json() == {"error": "expected the content type application/json"}
    assert admin_state(routing, "app-1") is AdminState.READY


async def test_parameters_of_the_content_type_do_not_matter(client: Client) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    response = await client.put(path_of("app-1"), data=b'{"state": "drain"}', headers=headers)
    assert response.status == 200


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"drain", "the body is no JSON"),
        (b'{"state": "drain", "more": 1}', "expected an object with no other keys than state"),
        (b"", "expected one of the states ready, drain, maint"),
        (b"{}", "expected one of the states ready, drain, maint"),
        (b'{"state": "off"}', "expected one of the states ready, drain, maint"),
        (b'{"state": null}', "expected one of the states ready, drain, maint"),
        (b'{"state": ["drain"]}', "expected one of the states ready, drain, maint"),
    ],
)
async def test_a_body_that_says_no_state_is_400(client: Client, routing: Routing, body: bytes, error: str) -> None:
    response = await client.put(path_of("app-1"), data=body, headers=JSON)
    assert (response.status, await response.json()) == (400, {"error": error})
    assert admin_state(routing, "app-1") is AdminState.READY


def refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except web.HTTPBadRequest:
        return True
    return False


@given(st.binary(max_size=100))
def test_any_bytes_are_a_state_or_a_bad_request(body: bytes) -> None:
    assert refuses(lambda: parse_admin_state(body))


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_value_is_a_state_or_a_bad_request(value: object) -> None:
    assert refuses(lambda: parse_admin_state(json.dumps({"state": value}).encode())) == (value not in list(AdminState))


async def test_an_upstream_is_found_without_its_cluster(client: Client, routing: Routing) -> None:
    """Ids are those of the whole proxy."""
    response = await client.put("/api/v1/upstreams/app-1/state", json={"state": "drain"})
    assert (response.status, admin_state(routing, "app-1")) == (200, AdminState.DRAIN)
    response = await client.put("/api/v1/upstreams/app-9/state", json={"state": "drain"})
    assert (response.status, await response.json()) == (404, {"error": "there is no upstream 'app-9'"})


async def test_an_upstream_of_another_cluster_is_not_found(client: Client, routing: Routing) -> None:
    shop = "clusters: {shop: {upstreams: [{id: s, url: 'http://127.0.0.1:8101'}]}}\nroutes: [{path: /s, cluster: shop}]"
    routing.reload(load_text(f"upstreams: [http://127.0.0.1:8001]\n{shop}", {}), {})
    response = await client.put("/api/v1/clusters/default/upstreams/s/state", json={"state": "drain"})
    assert response.status == 404
    response = await client.put("/api/v1/clusters/shop/upstreams/s/state", json={"state": "drain"})
    assert ((await response.json())["id"], admin_state(routing, "s")) == ("s", AdminState.DRAIN)
