"""The commands that a running proxy takes on its control socket, beside the API of the state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from aiohttp import web

from stickyproxy.config import MAX_PROCESSES
from stickyproxy.control.admin.body import read_body
from stickyproxy.control.explain import Asked, State, explain
from stickyproxy.control.runner.deploy import DeployOptions
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from stickyproxy.config import Run
    from stickyproxy.control.runner.runner import Runner
    from stickyproxy.control.runner.seat import Seat
    from stickyproxy.control.supervisor import Supervisor

_WATCH_S: Final = 10.0
_MAX_QUESTION_BYTES: Final = 1 << 20  # a head with the cookies of a browser, and a body with a key in it


class Commands:
    """The handlers of commands."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the routes of the commands."""
        router.add_post("/api/v1/reload", self._reload)
        router.add_post("/api/v1/explain", self._explain)
        router.add_get("/api/v1/upgrade", self._show_upgrade)
        router.add_post("/api/v1/upgrade", self._upgrade)
        router.add_get("/api/v1/deploy", self._show_deploy)
        router.add_post("/api/v1/deploy", self._deploy)
        router.add_post("/api/v1/scale", self._scale)
        router.add_post("/api/v1/processes/{id}/restart", self._restart)
        router.add_get("/api/v1/processes/{id}/log", self._show_log)

    async def _reload(self, _: web.Request) -> web.Response:
        try:
            changes = await self._supervisor.reloader.reload()
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        return web.json_response({"changes": [str(change) for change in changes]})

    async def _explain(self, request: web.Request) -> web.Response:
        """Say where a request would go; nothing is sent, and nothing changes."""
        content = await request.clone(client_max_size=_MAX_QUESTION_BYTES).read()
        given = read_body(content, {"line", "headers", "body", "is_https"})
        line, headers, body = given.get("line"), given.get("headers", []), given.get("body", "")
        are_texts = isinstance(headers, list) and all(isinstance(one, str) for one in (line, body, *headers))
        if not are_texts or type(given.get("is_https", False)) is not bool:
            raise web.HTTPBadRequest(text="line and body are text, headers a list of texts, is_https true or false")
        supervisor = self._supervisor
        routing = supervisor.routing
        state = State(
            supervisor.config,
            tuple(routing.snapshots.values()),
            routing.endpoints,
            supervisor.signing,
            supervisor.fleet.keys,
            supervisor.fleet.registry.counts,
        )
        try:
            asked = Asked(str(line), tuple(headers), str(body).encode(), bool(given.get("is_https", False)))
            return web.json_response(explain(asked, state))
        except UnicodeEncodeError as error:
            raise web.HTTPUnprocessableEntity(text="what was asked is no text that can be sent") from error
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error

    async def _show_upgrade(self, _: web.Request) -> web.Response:
        return web.json_response(self._supervisor.upgrader.status)

    async def _upgrade(self, _: web.Request) -> web.Response:
        """Answer once the new version is about to be executed, or cannot be; what becomes of it is to be asked for."""
        upgrader = self._supervisor.upgrader
        if upgrader.status.get("state") == "running":
            raise web.HTTPConflict(text="an upgrade is under way already")
        try:
            await upgrader.upgrade()
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        return web.json_response(upgrader.status, status=202)

    # The app processes

    @property
    def _runner(self) -> Runner:
        runner = self._supervisor.runner
        if runner is None:
            raise web.HTTPUnprocessableEntity(text="this proxy runs no app; somebody else starts its upstreams")
        return runner

    def _seat(self, request: web.Request) -> Seat:
        seat = self._runner.seats.get(request.match_info["id"])
        if seat is None:
            raise web.HTTPNotFound(text=f"there is no app process {request.match_info['id']!r}")
        return seat

    async def _show_deploy(self, _: web.Request) -> web.Response:
        deploy = self._runner.deploy
        return web.json_response({"number": 0, "state": "none"} if deploy is None else deploy.status)

    async def _deploy(self, request: web.Request) -> web.Response:
        """Answer once it has begun; what becomes of it is to be asked for."""
        runner = self._runner
        options = read_deploy_options(await request.read(), runner.settings)
        if runner.is_turning:
            raise web.HTTPConflict(text="a deploy is under way already")
        try:
            deploy = runner.begin_deploy(options)
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        return web.json_response(deploy.status, status=202)

    async def _scale(self, request: web.Request) -> web.Response:
        runner = self._runner
        before, wanted = runner.processes, read_body(await request.read(), {"processes"}).get("processes")
        if type(wanted) is not int or not 1 <= wanted <= MAX_PROCESSES:
            raise web.HTTPBadRequest(text=f"expected a number of processes from 1 to {MAX_PROCESSES}")
        try:
            runner.scale(wanted)
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        return web.json_response({"from": before, "to": wanted}, status=202)

    async def _restart(self, request: web.Request) -> web.Response:
        seat = self._seat(request)
        try:
            replacement = self._runner.replace(seat)
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        return web.json_response({"id": seat.id, "replacement": replacement.id}, status=202)

    async def _show_log(self, request: web.Request) -> web.Response:
        seat = self._seat(request)
        return web.json_response({"lines": seat.last_lines, "written": seat.written})


def read_deploy_options(body: bytes, settings: Run) -> DeployOptions:
    """Return the options of a deploy; what the body does not say, the settings do. Raises HTTPBadRequest."""
    given = read_body(body, {"drain_timeout_s", "pace_per_s", "surge", "watch_s"})
    drain_timeout_s = given.get("drain_timeout_s", settings.drain_timeout_s)
    pace_per_s, surge = given.get("pace_per_s", settings.pace_per_s), given.get("surge", 1)
    watch_s = given.get("watch_s", _WATCH_S)
    if not (drain_timeout_s is None or _is_number(drain_timeout_s)) or not _is_number(watch_s):
        raise web.HTTPBadRequest(text="drain_timeout_s and watch_s are seconds, not negative")
    if not _is_number(pace_per_s) or pace_per_s <= 0:
        raise web.HTTPBadRequest(text="pace_per_s is a number of clients, above 0")
    if type(surge) is not int or not 0 <= surge <= MAX_PROCESSES:
        raise web.HTTPBadRequest(text=f"surge is a number of processes from 1 to {MAX_PROCESSES}, or 0 for all")
    return DeployOptions(drain_timeout_s, pace_per_s, surge, watch_s)


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]
