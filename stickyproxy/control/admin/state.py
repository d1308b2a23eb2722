"""The API of the state: what the proxy knows of its upstreams, and what the operator wants of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from stickyproxy.affinity.snapshot import AdminState, upstream_digest
from stickyproxy.control.admin.body import read_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stickyproxy.affinity.snapshot import Upstream
    from stickyproxy.control.readings import Readings
    from stickyproxy.control.routing import Routing

_STATES = ", ".join(AdminState)


class StateApi:
    """The handlers under /api/v1."""

    def __init__(self, readings: Readings, routing: Routing, settle: Callable[[], Awaitable[None]]) -> None:
        self._readings = readings
        self._routing = routing
        self._settle = settle

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the routes of the API."""
        router.add_get("/api/v1/state", self._show)
        router.add_put("/api/v1/clusters/{cluster}/upstreams/{upstream}/state", self._change)
        router.add_put("/api/v1/upstreams/{upstream}/state", self._change)  # ids are those of the whole proxy

    async def _show(self, _: web.Request) -> web.Response:
        return web.json_response(self._readings.describe())

    async def _change(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="expected the content type application/json")
        upstream_id = request.match_info["upstream"]
        cluster = request.match_info.get("cluster", self._routing.clusters.get(upstream_id))
        if cluster is None:
            raise web.HTTPNotFound(text=f"there is no upstream {upstream_id!r}")
        if cluster not in self._routing.snapshots:
            raise web.HTTPNotFound(text=f"there is no cluster {cluster!r}")
        upstream = self._find(cluster, upstream_id)
        if upstream is None:
            raise web.HTTPNotFound(text=f"there is no upstream {upstream_id!r} in the cluster {cluster!r}")
        state = parse_admin_state(await request.read())
        try:
            self._routing.set_admin_state(upstream_id, state)
        except ValueError as error:
            raise web.HTTPConflict(text=str(error)) from error
        await self._settle()  # whoever is told "done" may rely on it
        return web.json_response(self._readings.describe_upstream(self._find(cluster, upstream_id) or upstream))

    def _find(self, cluster: str, upstream_id: str) -> Upstream | None:
        snapshot = self._routing.snapshots.get(cluster)
        return None if snapshot is None else snapshot.by_digest.get(upstream_digest(upstream_id))


def parse_admin_state(body: bytes) -> AdminState:
    """Return the state that a body such as {"state": "drain"} asks for; raise HTTPBadRequest."""
    try:
        return AdminState(read_body(body, {"state"}).get("state", ""))
    except ValueError:
        raise web.HTTPBadRequest(text=f"expected one of the states {_STATES}") from None
