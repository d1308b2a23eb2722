"""The router: the cluster of a request, its token there, and the head as its upstream gets it."""

from __future__ import annotations

from stickyproxy.affinity.routes import Route
from stickyproxy.proxy.cluster import Cluster
from stickyproxy.proxy.router import Router
from stickyproxy.proxy.settings import ClusterSettings, Settings
from stickyproxy.wire.cookies import CookieAttributes
from stickyproxy.wire.request_head import RequestHead

NOWHERE = Cluster("", ClusterSettings(None), lambda: 0.0)


def make(*routes: Route, **cookies: str | None) -> Router:
    settings = Settings(
        clusters={
            name: ClusterSettings(None if cookie is None else CookieAttributes(cookie))
            for name, cookie in cookies.items()
        },
        routes=routes,
    )
    clusters = {name: Cluster(name, one, lambda: 0.0) for name, one in settings.clusters.items()}
    return Router(settings, clusters, NOWHERE)


def head(target: str, **tokens: str) -> RequestHead:
    made = RequestHead(b"GET", target.encode(), is_http_10=False)
    made.host = b"a.org"
    made.tokens = {name.encode(): token.encode() for name, token in tokens.items()}
    return made


def test_a_request_has_the_token_of_its_own_cluster() -> None:
    router = make(Route("shop", path="/shop"), Route("bare", path="/bare"), default="first", shop="second", bare=None)
    request = head("/shop/x", first="1", second="2")
    for target, name, token in (("/shop/x", "shop", b"2"), ("/bare", "bare", None), ("/", "default", b"1")):
        request.target = target.encode()
        found = router.find(request)
        assert found.cluster.name == name
        assert found.enter(request) is request
        assert request.token == token


def test_a_prefix_is_taken_off_for_the_upstream_alone() -> None:
    router = make(Route("shop", path="/shop", strips_prefix=True), shop="second")
    request = head("/shop?a=b", second="2")
    request.outgoing, request.is_repeatable = b"for somebody else", True
    sent = router.find(request).enter(request)
    assert (request.target, request.prefix, request.outgoing) == (b"/shop?a=b", b"", b"for somebody else")
    assert (sent.target, sent.prefix, sent.outgoing, sent.is_repeatable) == (b"/?a=b", b"/shop", None, False)
    assert (sent.method, sent.host, sent.token) == (b"GET", b"a.org", b"2")


def test_a_request_without_a_route_and_a_cluster_goes_nowhere() -> None:
    router = make(Route("shop", path="/shop"), shop="second")
    assert router.find(head("/")).cluster is NOWHERE
    assert repr(router) == "<Router <Routes hosts=0 wildcards=0> default=''>"


def test_a_route_may_have_a_cookie_of_its_own() -> None:
    attributes = CookieAttributes("second", path="/shop")
    router = make(Route("shop", path="/shop", cookie=attributes), Route("shop"), shop="second")
    writer = router.find(head("/shop")).writer
    assert writer is not None
    assert b"Path=/shop;" in writer.write(b"T", is_https=True)
    assert router.find(head("/")).writer is None
