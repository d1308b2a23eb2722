"""Which cluster an exchange is for, where there are several, and what its route says of the cookie and the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from stickyproxy.affinity.routes import Routes, strip_prefix
from stickyproxy.config import DEFAULT_CLUSTER
from stickyproxy.wire.cookies import CookieWriter
from stickyproxy.wire.request_head import StrippedHead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stickyproxy.affinity.routes import Route
    from stickyproxy.proxy.cluster import Cluster
    from stickyproxy.proxy.settings import Settings
    from stickyproxy.wire.request_head import RequestHead


class Destination:
    """Where the requests of one route go. `writer` writes the cookie that the route asks for; None: the cluster's.

    `place` is what the route is for, in words; None where there is no route.
    """

    __slots__ = ("_name", "_prefix", "cluster", "place", "writer")

    def __init__(self, cluster: Cluster, route: Route | None = None) -> None:
        self.cluster = cluster
        self.writer: CookieWriter | None = None
        self._prefix = b""
        self.place = None if route is None else route.place
        if route is not None:
            self.writer = None if route.cookie is None else CookieWriter(route.cookie)
            self._prefix = route.path.encode("ascii") if route.strips_prefix else b""
        cookie = cluster.settings.cookie
        self._name = b"" if cookie is None else cookie.name.encode("ascii")

    def enter(self, head: RequestHead) -> RequestHead:
        """Let the head have the token of this cluster; return it as the upstream gets it."""
        head.token = None if head.tokens is None else head.tokens.get(self._name)
        if self._prefix:
            return StrippedHead(head, self._prefix, strip_prefix(head.target, self._prefix))
        return head


class Router:
    """The routes of a configuration in force: each with its cluster.

    Requests without a route are for the cluster "default", or where there is none for `nowhere`, which has no name and
    no upstream.
    """

    __slots__ = ("_default", "_routes")

    def __init__(self, settings: Settings, clusters: Mapping[str, Cluster], nowhere: Cluster) -> None:
        self._default = Destination(clusters[DEFAULT_CLUSTER] if DEFAULT_CLUSTER in settings.clusters else nowhere)
        self._routes = Routes([(route, Destination(clusters[route.cluster], route)) for route in settings.routes])

    def find(self, head: RequestHead) -> Destination:
        """Return where a request goes."""
        return self._routes.find(head.host, head.target) or self._default

    @override
    def __repr__(self) -> str:
        return f"<Router {self._routes} default={self._default.cluster.name!r}>"
