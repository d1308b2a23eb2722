"""Live reload, for development: the app is deployed anew when its files change."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.config.placeholders import fill
from stickyproxy.config.run import HIGHEST_PACE
from stickyproxy.control.runner.deploy import DeployOptions
from stickyproxy.control.runner.file_watcher import FileWatcher
from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stickyproxy.config import Run
    from stickyproxy.control.runner.deploy import Deploy
    from stickyproxy.control.runner.runner import Runner

logger = logging.getLogger(__name__)

# Who develops waits for the new version: its processes start together, and open pages meet it as soon as it is ready.
OPTIONS: Final = DeployOptions(drain_timeout_s=0.0, pace_per_s=float(HIGHEST_PACE), surge=0, watch_s=0.0)
_PATTERN: Final = "*.py"
_NAMED: Final = 3


class LiveReload:
    """Deploys the app of a runner when its files change, where the settings ask for that.

    What changes while a generation starts has that one given up, and the next begins; what changes while nothing can be
    deployed (an upgrade, a deploy that somebody asked for) is deployed after that. Each deploy takes in all that has
    changed before it began.
    """

    def __init__(self, host: Runner) -> None:
        self._host = host
        self._watcher: FileWatcher | None = None
        self._has_changed = asyncio.Event()  # since the last deploy began
        self._deploy: Deploy | None = None

    @property
    def is_on(self) -> bool:
        """Say whether the settings ask for it."""
        return self._host.settings.reload is not None

    @property
    def has_changed(self) -> bool:
        """Say whether files have changed since the processes were started that are the newest."""
        return self._has_changed.is_set()

    async def wait(self) -> None:
        """Wait until files have changed."""
        await self._has_changed.wait()

    async def start(self) -> None:
        """Begin to watch, where the settings ask for it; raise UsageError where that cannot be."""
        self._watcher = self._make_watcher()
        if self._watcher is not None:
            await self._watcher.start()

    def apply(self, before: Run) -> None:
        """Watch what the settings name, which were others before."""
        settings = self._host.settings
        if (before.reload, before.cwd) != (settings.reload, settings.cwd):
            former, self._watcher = self._watcher, self._make_watcher()
            spawn(self._replace(former, self._watcher), "watch other files")

    async def stop(self) -> None:
        """Watch no more."""
        if self._watcher is not None:
            await self._watcher.stop()

    def _make_watcher(self) -> FileWatcher | None:
        settings = self._host.settings
        if settings.reload is None:
            return None
        # A directory with placeholders does not go with this: the settings name others then.
        own = Path() if settings.cwd is None else Path(fill(str(settings.cwd), {}))
        directories = settings.reload.directories or (own,)
        return FileWatcher(directories, (_PATTERN, *settings.reload.include), self._on_change)

    @staticmethod
    async def _replace(former: FileWatcher | None, watcher: FileWatcher | None) -> None:
        """Let another watcher begin before the former one ends: nothing is missed."""
        try:
            if watcher is not None:
                await watcher.start()
        except UsageError as error:
            logger.error("live reload: %s", error)  # noqa: TRY400 -- the reason is all
        finally:
            if former is not None:
                await former.stop()

    # What changes

    def _on_change(self, files: Iterable[Path]) -> None:
        logger.info("live reload: %s changed", self._describe(files))
        self._has_changed.set()
        if self._host.is_started:
            self.deploy_if_due()

    def _describe(self, files: Iterable[Path]) -> str:
        """Return the names of files, below the directory that is watched."""
        roots = () if self._watcher is None else self._watcher.directories
        names = sorted(str(next((one.relative_to(at) for at in roots if one.is_relative_to(at)), one)) for one in files)
        more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        *first, last = [*names[:_NAMED], *more]
        return f"{', '.join(first)} and {last}" if first else last

    def deploy_if_due(self) -> None:
        """Deploy what has changed, as soon as that can be."""
        host = self._host
        if not self.has_changed:
            return
        if host.is_turning and host.deploy is self._deploy is not None:
            self._deploy.give_up("files have changed again")
        with suppress(UsageError):  # not now
            self._deploy = host.begin_deploy(OPTIONS)

    def take_in(self) -> None:
        """Note that processes are started which will have read all that has changed."""
        self._has_changed.clear()

    def on_deployed(self, deploy: Deploy) -> None:
        """Go on after a deploy, whoever has asked for it."""
        if self._host.is_stopping:
            return
        if deploy is self._deploy and deploy.state == "failed" and not self.has_changed:
            logger.info("live reload: waiting for the next change")
        self.deploy_if_due()

    # Another image of this process

    def leave(self) -> bool:
        """Watch no more, and say whether a deploy is due; another image of this process needs to know."""
        if self._watcher is not None:
            self._watcher.leave()
        return self.has_changed

    def adopt(self, *, is_due: bool) -> None:
        """Go on from what a former image has left: watch again, and deploy, once the upgrade is over, what is due."""
        self._watcher = self._make_watcher()
        spawn(self._replace(None, self._watcher), "watch files")
        if is_due and self.is_on:
            self._has_changed.set()

    @override
    def __repr__(self) -> str:
        return f"<LiveReload {self._watcher}>"
