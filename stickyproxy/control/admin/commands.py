"""The commands that a running proxy takes on its control socket, beside the API of the state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from stickyproxy.control.supervisor import Supervisor


class Commands:
    """The handlers of commands."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the routes of the commands."""
        router.add_post("/api/v1/reload", self._reload)
        router.add_get("/api/v1/upgrade", self._show_upgrade)
        router.add_post("/api/v1/upgrade", self._upgrade)

    async def _reload(self, _: web.Request) -> web.Response:
        try:
            changes = await self._supervisor.reloader.reload()
        except UsageError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        return web.json_response({"changes": [str(change) for change in changes]})

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
