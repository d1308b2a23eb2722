"""Several apps behind one listener, by host and path: a client has a pin in each, what happens to one is its own."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.helpers.operated import Proxy, Stage
from tests.helpers.plain_client import Answer, PlainClient
from tests.helpers.supervised import DEADLINE_S, HANDSHAKE, SECRET, App, Tunnel, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

TWICE = 12  # more visits than it takes to meet every upstream of every worker


class Site:
    """A proxy of two workers over the apps of two clusters, `default` with a1 and a2, `shop` with b1 and b2."""

    def __init__(self, proxy: Proxy, apps: Mapping[str, App]) -> None:
        self.proxy = proxy
        self.apps = apps

    async def visit(self, target: str, cookies: Mapping[str, str] | None = None, host: str = "localhost") -> Answer:
        """Ask over a connection of its own."""
        async with await PlainClient.connect(self.proxy.port) as client:
            cookie = "; ".join(f"{name}={value}" for name, value in (cookies or {}).items())
            line = f"Cookie: {cookie}\r\n" if cookie else ""
            client._writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{line}\r\n".encode())
            return await client.receive()

    async def pin(self, target: str, cookies: dict[str, str], host: str = "localhost") -> str:
        """Ask, keep the cookie that is set, and return which app has answered."""
        answer = await self.visit(target, cookies, host)
        assert answer.status == 200, answer
        if set_cookie := answer.fields.get("set-cookie"):
            name, _, value = set_cookie.partition(";")[0].partition("=")
            cookies[name] = value
        return answer.body.decode()

    async def tunnel(self, target: str, cookies: Mapping[str, str] | None = None) -> Tunnel:
        """Open a WebSocket that stays open."""
        client = await self.proxy.connect()
        cookie = "; ".join(f"{name}={value}" for name, value in (cookies or {}).items())
        client.send(target, fields=HANDSHAKE | ({"Cookie": cookie} if cookie else {}))
        async with asyncio.timeout(DEADLINE_S):
            status, fields = await client.receive_head()
        assert status == 101
        return Tunnel(client, fields)

    async def reload(self, **sections: Any) -> str:
        """Write other sections into the file; None takes one out. Reload, and return what the command says."""
        file = yaml.safe_load(self.proxy.file.read_text()) | sections
        self.proxy.file.write_text(yaml.safe_dump({key: value for key, value in file.items() if value is not None}))
        done = await self.proxy.command("reload")
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def clusters(self) -> dict[str, dict[str, Any]]:
        """Return the upstreams of each cluster, by name and id."""
        state = json.loads(await self.proxy.get("/api/v1/state"))
        return {one["name"]: {up["id"]: up for up in one["upstreams"]} for one in state["clusters"]}


def cluster(apps: Mapping[str, App], names: str, **affinity: Any) -> dict[str, Any]:
    return {
        "upstreams": [apps[name].upstream for name in names.split()],
        "affinity": {"policy": "round_robin"} | affinity,
    }


ROUTES = [
    {"path": "/shop", "cluster": "shop", "strip_prefix": True},
    {"host": "*.shop.example", "cluster": "shop"},
]


@asynccontextmanager
async def started(tmp_path: Path, default: str = "a1 a2", **sections: Any) -> AsyncIterator[Site]:
    apps = {name: await App(name).start() for name in ("a1", "a2", "b1", "b2", "c1")}
    try:
        async with Stage(tmp_path) as stage:
            basis = cluster(apps, default)
            basis["affinity"]["secrets"] = [SECRET]
            basis |= {"clusters": {"shop": cluster(apps, "b1 b2")}, "routes": ROUTES}
            yield Site(await stage.serve(**basis | sections), apps)
    finally:
        for app in apps.values():
            app.stop()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with started(tmp_path) as made:
        yield made


async def test_requests_go_by_host_and_path(site: Site) -> None:
    found: dict[str, Counter[str]] = {}
    for target, host in (("/", "localhost"), ("/shop/x", "localhost"), ("/", "a.SHOP.example:80"), ("/shopping", "b")):
        answers = [await site.visit(target, host=host) for _ in range(TWICE)]
        assert {answer.status for answer in answers} == {200}
        found[target + host] = Counter(answer.body.decode()[0] for answer in answers)
    assert found == {
        "/localhost": Counter(a=TWICE),
        "/shop/xlocalhost": Counter(b=TWICE),
        "/a.SHOP.example:80": Counter(b=TWICE),
        "/shoppingb": Counter(a=TWICE),
    }


async def test_without_routes_all_goes_to_one_cluster(tmp_path: Path) -> None:
    """The control of the one above."""
    async with started(tmp_path, clusters={}, routes=[]) as site:
        assert {(await site.visit("/shop/x")).body[:1] for _ in range(TWICE)} == {b"a"}


async def test_a_prefix_is_taken_off_and_told(site: Site) -> None:
    """The access log has the target as the client sent it."""
    for target in ("/shop", "/shop/x?y=/shop"):
        assert (await site.visit(target)).status == 200
    assert (await site.visit("/x", host="a.shop.example")).status == 200
    heads = [head for name in ("b1", "b2") for head in site.apps[name].heads]
    asked = {head.split(" ")[1]: "X-Forwarded-Prefix: /shop\r\n" in head for head in heads}
    assert asked == {"/": True, "/x?y=/shop": True, "/x": False}
    await until(lambda: len(site.proxy.access_log.read_text().splitlines()) == 3, "all is logged")
    logged = [json.loads(line)["target"] for line in site.proxy.access_log.read_text().splitlines()]
    assert sorted(logged) == ["/shop", "/shop/x?y=/shop", "/x"]


async def test_a_request_that_no_app_is_there_for_is_not_found(tmp_path: Path) -> None:
    async with started(tmp_path, upstreams=None) as site:
        answer = await site.visit("/x")
        assert answer.status == 404
        assert "error=destination_not_found" in answer.fields["proxy-status"]
        assert "set-cookie" not in answer.fields
        assert (await site.visit("/shop")).body[:1] == b"b"
        await site.proxy.until_metric("exchanges_total", 1, cluster="default", upstream="", status_class="4xx")


async def test_a_client_of_both_has_a_pin_in_each(site: Site) -> None:
    """All affinity cookies are taken out of every request, those of the app's own are not."""
    clients: list[tuple[dict[str, str], str, str]] = []
    for _ in range(4):
        cookies = {"mine": "1"}
        clients.append((cookies, await site.pin("/", cookies), await site.pin("/shop", cookies)))
        assert set(cookies) == {"mine", "stickyproxy", "stickyproxy-shop"}
    assert {one for _, *both in clients for one in both} == {"a1", "a2", "b1", "b2"}
    for _ in range(TWICE):
        for cookies, first, second in clients:
            before = dict(cookies)
            assert (await site.pin("/", cookies), await site.pin("/shop", cookies)) == (first, second)
            assert cookies == before
    heads = [head for app in site.apps.values() for head in app.heads]
    assert not any("stickyproxy=" in head or "stickyproxy-shop=" in head for head in heads)
    assert sum("Cookie: mine=1\r\n" in head for head in heads) == len(heads)


async def test_a_token_of_another_cluster_is_none(site: Site) -> None:
    """And the pin that it stands for is not moved."""
    cookies: dict[str, str] = {}
    app = await site.pin("/", cookies)
    foreign = {"stickyproxy-shop": cookies["stickyproxy"]}
    assert (await site.pin("/shop", foreign))[0] == "b"
    assert foreign["stickyproxy-shop"] != cookies["stickyproxy"]
    assert {await site.pin("/", cookies) for _ in range(TWICE)} == {app}
    assert await site.proxy.metric("affinity_breaks_total") == 0


async def test_a_drain_of_one_cluster_leaves_the_other_alone(site: Site) -> None:
    done = await site.proxy.command("drain", "b1")
    assert done.returncode == 0, done.stderr
    assert {(await site.visit("/shop")).body for _ in range(TWICE)} == {b"b2"}
    assert {(await site.visit("/")).body for _ in range(TWICE)} == {b"a1", b"a2"}
    status = (await site.proxy.command("status")).stdout
    assert "CLUSTER" in status
    assert [line.split()[0] for line in status.splitlines() if " a1 " in line or " b1 " in line] == ["default", "shop"]
    assert (await site.proxy.command("ready", "b1")).returncode == 0
    assert {(await site.visit("/shop")).body for _ in range(TWICE)} == {b"b1", b"b2"}
    assert await site.proxy.metric("exchanges_total", cluster="shop", upstream="b2") >= TWICE
    assert await site.proxy.metric("exchanges_total", cluster="default", upstream="b2") == 0


async def test_a_cluster_whose_apps_are_gone_leaves_the_other_alone(site: Site) -> None:
    for name in ("b1", "b2"):
        site.apps[name].crash()
    answers = [await site.visit("/shop") for _ in range(TWICE)]
    assert {answer.status for answer in answers} == {503}
    assert {(await site.visit("/")).status for _ in range(TWICE)} == {200}
    await site.proxy.until_metric("exchanges_total", TWICE, cluster="shop", upstream="", status_class="5xx")


async def test_a_reload_adds_a_cluster(site: Site) -> None:
    """No request meets a route whose cluster has no upstream yet."""
    shop = cluster(site.apps, "b1 b2")
    is_over = asyncio.Event()
    statuses = Counter[int]()

    async def ask_all_the_time() -> None:
        while not is_over.is_set():
            statuses[(await site.visit("/new")).status] += 1

    asking = asyncio.get_running_loop().create_task(ask_all_the_time())
    said = await site.reload(
        clusters={"shop": shop, "new": cluster(site.apps, "c1")}, routes=[*ROUTES, {"path": "/new", "cluster": "new"}]
    )
    assert "clusters: new added" in said
    assert {(await site.visit("/new")).body for _ in range(TWICE)} == {b"c1"}
    is_over.set()
    await asking
    assert set(statuses) == {200}
    assert (await site.visit("/")).body[:1] == b"a"


async def test_a_reload_takes_a_cluster_away_and_its_websockets_stay(site: Site) -> None:
    cookies: dict[str, str] = {}
    kept, app = await site.tunnel("/shop/ws", cookies), await site.pin("/", cookies)
    assert kept.app[0] == "b"
    said = await site.reload(clusters=None, routes=None)
    assert "clusters: shop removed" in said
    assert {(await site.visit("/shop")).body[:1] for _ in range(TWICE)} == {b"a"}
    await kept.echo()
    clusters = await site.clusters()
    assert clusters["shop"][kept.app]["is_leaving"]
    assert clusters["shop"][kept.app]["tunnels"] == 1
    assert {await site.pin("/", cookies) for _ in range(TWICE)} == {app}
    await site.reload(clusters={"shop": cluster(site.apps, "b1 b2")}, routes=ROUTES)
    await kept.echo()
    assert {(await site.visit("/shop")).body for _ in range(TWICE)} == {b"b1", b"b2"}


async def test_an_upgrade_keeps_both_clusters(site: Site) -> None:
    """Pins, admin states, tunnels, and what is left of a cluster that was taken away."""
    extra = {"shop": cluster(site.apps, "b1 b2"), "old": cluster(site.apps, "c1")}
    await site.reload(clusters=extra, routes=[*ROUTES, {"path": "/ws", "cluster": "old"}])
    cookies: dict[str, str] = {}
    apps = await site.pin("/", cookies), await site.pin("/shop", cookies)
    kept, leaving = await site.tunnel("/shop/ws", cookies), await site.tunnel("/ws")
    assert (kept.app, leaving.app) == (apps[1], "c1")
    await site.reload(clusters={"shop": cluster(site.apps, "b1 b2")}, routes=ROUTES)
    assert (await site.proxy.command("drain", apps[1])).returncode == 0
    assert "2 tunnels" in await site.proxy.upgrade()
    for tunnel in (kept, leaving):
        await tunnel.echo()
    assert (await site.pin("/", cookies), await site.pin("/shop", cookies)) == apps
    clusters = await site.clusters()
    assert list(clusters) == ["default", "shop", "old"]
    assert (clusters["shop"][apps[1]]["admin_state"], clusters["old"]["c1"]["is_leaving"]) == ("drain", True)


async def test_a_cookie_across_sites_falls_back_to_lax_over_http_and_the_log_says_so(tmp_path: Path) -> None:
    said = {"same_site": "none", "partitioned": True, "path": "/shop", "domain": "shop.example"}
    routes = [{"path": "/shop", "cluster": "shop", "cookie": said}, {"path": "/other", "cluster": "shop"}]
    async with started(tmp_path, routes=routes, trusted_proxies=["127.0.0.1"], workers=1) as site:
        for _ in range(2):
            answer = await site.visit("/shop")
            assert answer.fields["set-cookie"].endswith("; Path=/shop; Domain=shop.example; HttpOnly; SameSite=Lax")
        assert (await site.visit("/other")).fields["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Lax")
        async with await PlainClient.connect(site.proxy.port) as client:
            secure = (await client.ask("/shop", fields={"X-Forwarded-Proto": "https"})).fields["set-cookie"]
        assert secure.endswith("; Path=/shop; Domain=shop.example; HttpOnly; SameSite=None; Secure; Partitioned")
        await site.proxy.logged("the affinity cookie stickyproxy-shop falls back to SameSite=Lax")
        assert site.proxy.log.count("falls back") == 1


async def test_two_proxies_on_one_host_do_not_clash(tmp_path: Path) -> None:
    """Browsers send a cookie to all ports of a host: without names of their own each proxy would end the other's pins.

    Both have the secret of the same user.
    """
    state: dict[str, Any] = {"affinity": {}, "clusters": {}, "routes": [], "state_directory": str(tmp_path / "state")}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    async with started(tmp_path / "1", **state) as one, started(tmp_path / "2", "b1 b2", **state) as other:
        cookies: dict[str, str] = {}
        both = await one.pin("/", cookies), await other.pin("/", cookies)
        assert set(cookies) == {f"stickyproxy-{one.proxy.port}", f"stickyproxy-{other.proxy.port}"}
        for _ in range(TWICE):
            assert (await one.pin("/", cookies), await other.pin("/", cookies)) == both
        assert len(cookies) == 2


async def test_two_proxies_of_one_name_clash(tmp_path: Path) -> None:
    """The control of the one above."""
    state: dict[str, Any] = {"affinity": {"cookie": {"name": "mine"}}, "clusters": {}, "routes": [],
             "state_directory": str(tmp_path / "state")}  # fmt: skip
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    async with started(tmp_path / "1", **state) as one, started(tmp_path / "2", "b1 b2", **state) as other:
        cookies: dict[str, str] = {}
        app = await one.pin("/", cookies)
        before = dict(cookies)
        assert (app[0], (await other.pin("/", cookies))[0]) == ("a", "b")
        assert cookies.keys() == before.keys()
        assert cookies != before
        await one.pin("/", cookies)
        for site in (one, other):
            await site.proxy.until_metric("affinity_breaks_total", 1, reason="removed")
