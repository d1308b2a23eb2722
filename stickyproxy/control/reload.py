"""Reloads: read the configuration again, and let every part work by it, or let nothing change and say why.

What a configuration does not change stays as it is: listeners, upstreams with their health and admin states, pins,
tunnels. What can fail is tried before anything changes.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from stickyproxy.config import Loaded, find_changes, find_unreloadable
from stickyproxy.control.certificates import make_listener_context, make_upstream_contexts
from stickyproxy.errors import StickyproxyError, UsageError
from stickyproxy.observe.access_log import AccessLog

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from stickyproxy.config import Change, Config
    from stickyproxy.control.supervisor import Supervisor

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0  # between two looks at the file


class Reloader:
    """Reloads the configuration of one supervisor, one reload after the other.

    `outcomes` counts by "ok", "unchanged" and "failed"; `succeeded_at` is when the file was last read without a
    mistake, in seconds since 1970.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._one_at_a_time = asyncio.Lock()
        self.outcomes = Counter({"ok": 0, "unchanged": 0, "failed": 0})
        self.succeeded_at = _wall()

    def export(self) -> dict[str, Any]:
        """Return what is counted, as JSON, for another process that goes on from it."""
        return {"reloads": dict(self.outcomes), "reloaded_at": self.succeeded_at}

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Count on from what another process had counted."""
        self.outcomes.update(counts.get("reloads", {}))
        self.succeeded_at = float(counts.get("reloaded_at", self.succeeded_at))

    async def finish(self) -> None:
        """Wait for the end of a reload that is under way."""
        async with self._one_at_a_time:
            pass

    async def reload(self) -> tuple[Change, ...]:
        """Reload, and return what has changed; raise UsageError, with nothing changed, where something is wrong."""
        async with self._one_at_a_time:
            if self._supervisor.upgrader.is_running:  # the new workers have been told of the configuration
                raise UsageError("an upgrade is under way: reload after it")
            if self._supervisor.is_handing_over:
                raise UsageError("another proxy is taking over")
            notifier = self._supervisor.notifier
            notifier.reloading()
            try:
                changes = await self._reload()
            except StickyproxyError as error:
                self.outcomes["failed"] += 1
                for line in str(error).splitlines():
                    logger.error("cannot reload, nothing has changed: %s", line)  # noqa: TRY400 -- the reason is all
                raise UsageError(str(error)) from error
            finally:
                notifier.ready()
            self.outcomes["ok" if changes else "unchanged"] += 1
            self.succeeded_at = _wall()
            for change in changes:
                logger.info("reloaded: %s", change)
            if not changes:
                logger.info("reloaded: nothing has changed")
            return changes

    async def _reload(self) -> tuple[Change, ...]:
        supervisor, before = self._supervisor, self._supervisor.loaded
        loaded = await asyncio.to_thread(Loaded.read, before.source, os.environ)
        changes = find_changes(before.config, loaded.config)
        if not changes:
            return ()
        lacking = find_unreloadable(before.config, loaded.config)
        if lacking:
            raise UsageError("\n".join(map(str, lacking)))
        if not loaded.config.has_upstreams:
            raise UsageError("no upstreams: the proxy would serve nobody")
        contexts = await asyncio.to_thread(_check, before.config, loaded.config)
        await supervisor.apply(loaded, contexts)
        return changes


def _check(before: Config, after: Config) -> dict[str, ssl.SSLContext]:
    """Open all files that the configuration names, and return the contexts of upstreams; raise UsageError."""
    for listener in after.listeners:
        if listener.tls is not None:
            make_listener_context(listener.tls)
    if after.access_log is not None and after.access_log != before.access_log:
        log = AccessLog(after.access_log)
        log.start()
        log.close()
    return make_upstream_contexts(after.every_upstream)


async def watch_file(path: Path, on_change: Callable[[], Awaitable[None]]) -> None:
    """Call `on_change` each time that a file has become another, and has stayed so from one look to the next.

    Looks each second, and follows links: what a file is exchanged by (a rename, another link) does not matter.
    """
    taken = before = await asyncio.to_thread(_look_at, path)
    while True:
        await asyncio.sleep(_LOOK_S)
        look = await asyncio.to_thread(_look_at, path)
        if look not in (taken, None) and look == before:
            taken = look
            await on_change()
        before = look


def _look_at(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _wall() -> float:
    return datetime.now(UTC).timestamp()
