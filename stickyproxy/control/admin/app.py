"""The admin listener: metrics, the health of the proxy itself, and the API. Not on the path of any client."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING, Final, cast

from aiohttp import web

from stickyproxy.control.admin.state import StateApi
from stickyproxy.observe.metrics import write_metrics
from stickyproxy.proxy.listener import UNIX_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.typedefs import Handler, Middleware

    from stickyproxy.control.readings import Readings
    from stickyproxy.control.routing import Routing

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES: Final = 4 * 1024  # {"state": "maint"} has 18
_SHUTDOWN_S: Final = 1.0  # for a scrape under way
_BACKLOG: Final = 128
_INDEX: Final = """\
stickyproxy

GET /metrics         metrics for Prometheus
GET /livez           whether the proxy runs
GET /readyz          whether it can serve clients, and if not, why
GET /api/v1/state    clusters and upstreams
PUT /api/v1/clusters/{cluster}/upstreams/{id}/state, or without the cluster: PUT /api/v1/upstreams/{id}/state
                     {"state": "ready"}, "drain" (no new clients) or "maint" (no clients)
"""


class AdminListener:
    """Serves operators on one bound socket."""

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_S)
        self._server: asyncio.Server | None = None

    async def start(self, link: socket.socket) -> None:
        """Begin to accept on a bound socket, which stays its owner's."""
        link = link.dup()
        await self._runner.setup()
        server = cast("web.Server", self._runner.server)  # it is there from `setup` on
        loop = asyncio.get_running_loop()
        if link.family == socket.AF_UNIX:
            os.chmod(link.getsockname(), 0o600)  # noqa: PTH101 -- as for every socket path here: no objects
            self._server = await loop.create_unix_server(server, sock=link, backlog=_BACKLOG, **UNIX_OPTIONS)
        else:
            self._server = await loop.create_server(server, sock=link, backlog=_BACKLOG)

    async def stop(self) -> None:
        """Accept nobody any more and end what is under way."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


def make_app(
    guard: Middleware, readings: Readings, routing: Routing, settle: Callable[[], Awaitable[None]]
) -> web.Application:
    """Return the application with all routes; `guard` lets in who may come in.

    `settle` waits until the data plane works by the latest routing state.
    """
    app = web.Application(middlewares=[_say_errors_in_json, guard], client_max_size=_MAX_BODY_BYTES)
    app.on_response_prepare.append(_forbid_storing)
    pages = Pages(readings)
    app.router.add_get("/", pages.index)
    app.router.add_get("/livez", pages.livez)
    app.router.add_get("/readyz", pages.readyz)
    app.router.add_get("/metrics", pages.metrics)
    StateApi(readings, routing, settle).add_routes(app.router)
    return app


class Pages:
    """The handlers outside of the API."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings
        self._one_at_a_time = asyncio.Lock()

    async def index(self, _: web.Request) -> web.Response:
        """Name the routes."""
        return web.Response(text=_INDEX)

    async def livez(self, _: web.Request) -> web.Response:
        """Answer: that is all there is to it."""
        return web.Response(text="alive\n")

    async def readyz(self, _: web.Request) -> web.Response:
        """Say whether clients can be served, and if not, why."""
        reason = self._readings.explain_unready()
        return web.Response(text="ready\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def metrics(self, request: web.Request) -> web.Response:
        """Copy the numbers here and write the text in a thread: 500 upstreams make some ten thousand lines."""
        accept = ",".join(request.headers.getall("Accept", []))
        async with self._one_at_a_time:
            body, content_type = await asyncio.to_thread(write_metrics, self._readings.take_numbers(), accept)
        return web.Response(body=body, headers={"Content-Type": content_type})


@web.middleware
async def _say_errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        headers = {name: value for name, value in error.headers.items() if name in {"Allow", "WWW-Authenticate"}}
        return web.json_response({"error": _word(error, request)}, status=error.status, headers=headers)
    except Exception:
        logger.exception("the admin listener failed at %s %s", request.method, request.path)
        return web.json_response({"error": "an error of the proxy; its log says more"}, status=500)


def _word(error: web.HTTPException, request: web.Request) -> str:
    """Return the text of an error; those that aiohttp raises itself say little."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{error.method} is not possible here, only {', '.join(sorted(error.allowed_methods))}"
    if error.text == f"{error.status}: {error.reason}":
        return f"there is no {request.path}; GET / names what there is"
    return error.text or error.reason


async def _forbid_storing(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
