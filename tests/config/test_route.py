"""The section `routes`: what it reads, and what it refuses with which words."""

from __future__ import annotations

import pytest

from stickyproxy.config.affinity import Cookie
from stickyproxy.config.load import load_text
from stickyproxy.config.route import RouteCookie
from tests.config.test_cluster import mistakes

CLUSTERS = """
upstreams: [http://a:1]
clusters:
  shop: {upstreams: [http://a:2]}
  bare: {upstreams: [http://a:3], affinity: {cookie: false}}
"""
REST = "{path: /1, cluster: shop}, {path: /2, cluster: bare}"


def read(route: str) -> tuple[str | None, str | None, str]:
    found = load_text(f"{CLUSTERS}\nroutes: [{REST}, {route}]", {}).routes[-1]
    return found.host, found.path, found.place


@pytest.mark.parametrize(
    ("route", "found"),
    [
        ("{cluster: shop}", (None, None, "*")),
        (
            "{host: Shop.Example.ORG., path: /tool/, cluster: shop}",
            ("shop.example.org", "/tool", "shop.example.org/tool"),
        ),
        ("{host: '*.Example.org', cluster: default}", ("*.example.org", None, "*.example.org")),
        ("{host: '[0:0::1]', path: /, cluster: shop}", ("[::1]", "/", "[::1]/")),
        ("{host: 127.0.0.1, path: /a//b, cluster: shop}", ("127.0.0.1", "/a//b", "127.0.0.1/a//b")),
    ],
)
def test_a_route_is_read(route: str, found: tuple[str | None, str | None, str]) -> None:
    assert read(route) == found


@pytest.mark.parametrize(
    ("route", "mistake"),
    [
        ("{path: /x}", ": the key 'cluster' is missing"),
        ("{path: /x, cluster: chat}", ".cluster: there is no cluster 'chat'; there are default, bare, shop"),
        ("{path: x, cluster: shop}", '.path: expected a path that begins with "/"'),
        ("{path: '/x?y', cluster: shop}", '.path: expected a path that begins with "/"'),
        ("{host: 'a:80', cluster: shop}", ".host: expected a host without a port, such as example.org"),
        ("{host: '*.', cluster: shop}", ".host: expected a host without a port"),
        ("{host: 'a.*', cluster: shop}", ".host: expected a host without a port"),
        ("{path: /1/, cluster: default}", ": there is a route for /1 above"),
        ("{cluster: shop, strip_prefix: true}", ".strip_prefix: strip_prefix needs a path that can be taken off"),
        ("{cluster: shop, path: /, strip_prefix: true}", ".strip_prefix: strip_prefix needs a path"),
        ("{cluster: shop, cookie: {name: x}}", ".cookie.name: unknown key 'name'"),
        ("{cluster: bare, cookie: {path: /}}", ".cookie: the cluster bare has no affinity cookie"),
        (
            "{cluster: shop, cookie: {same_site: none, secure: false}}",
            ".cookie.same_site: browsers refuse same_site: none",
        ),
        ("5", ": expected a mapping of keys, got a number"),
    ],
)
def test_a_mistake_is_told_with_its_place(route: str, mistake: str) -> None:
    [found] = mistakes(f"{CLUSTERS}\nroutes: [{REST}, {route}]")
    assert found.startswith(f"routes[2]{mistake}")


def test_where_there_is_no_default_cluster_no_route_leads_there() -> None:
    text = "clusters: {a: {upstreams: [http://a:1]}}\nroutes: [{cluster: a}, {path: /x, cluster: default}]"
    assert mistakes(text) == [
        "routes[1].cluster: there is no cluster default: it is that of upstreams or run at the top of the file"
    ]


def test_too_many_routes_are_refused() -> None:
    assert mistakes(f"routes: [{', '.join(['{}'] * 1001)}]") == ["routes: expected at most 1000 routes, got 1001"]


def test_what_a_route_says_of_the_cookie_goes_over_the_cluster_s() -> None:
    said = RouteCookie.model_validate({"same_site": "none", "partitioned": True, "path": "/chat", "max_age": "1h"})
    made = said.over(Cookie.model_validate({"name": "mine", "http_only": False, "path": "/", "domain": "a.org"}))
    assert made == Cookie.model_validate(
        {"name": "mine", "http_only": False, "path": "/chat", "domain": "a.org", "same_site": "none",
         "partitioned": True, "max_age": "1h"}
    )  # fmt: skip


def test_routes_to_the_default_cluster_alone_are_right() -> None:
    config = load_text("upstreams: [http://a:1]\nroutes: [{path: /x, cluster: default, strip_prefix: true}]", {})
    assert config.routes[0].strip_prefix
