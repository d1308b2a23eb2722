"""When an app process is ready: it is asked again and again, by the ways of the probes, until it answers well."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from stickyproxy.config.health import Probe
from stickyproxy.control.probe import Asking, Connecting, ProbeFailedError
from stickyproxy.errors import StickyproxyError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from stickyproxy.config.run import Ready
    from stickyproxy.proxy.endpoint import Endpoint

_PAUSE_S: Final = 0.1  # nothing tells when a process begins to listen
# What has taken the connection may never answer it (an app that starts itself anew): it is asked once more then.
_TRY_S: Final = 5.0


class NotReadyError(StickyproxyError):
    """An app process ended before it was ready, or was not ready in time; `reason` is for a person."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


async def wait_until_ready(endpoint: Endpoint, ready: Ready, ended: asyncio.Future[str]) -> None:
    """Return as soon as an app process answers at its endpoint as `ready` says.

    Raises NotReadyError at the timeout, with what was seen last, and when the process ends before; `ended` is never
    cancelled. Whoever cancels this leaves nothing open.
    """
    watch = _Watch(endpoint, ready)
    task = spawn(watch.look(), f"ready probe {endpoint.address}")
    try:
        await asyncio.wait((task, ended), timeout=ready.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():  # first: what answers may be another process, which has its port
            raise NotReadyError(f"it ended: {_how(ended)}")
        if not task.done():
            raise NotReadyError(f"no good answer within {ready.timeout_s:g} s ({watch.reason})")
        if (error := task.exception()) is not None:
            raise NotReadyError(f"the probe crashed: {error!r}") from error
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await watch.close()


def _how(ended: asyncio.Future[str]) -> str:
    if ended.cancelled():
        return "nobody looks after it any more"
    error = ended.exception()
    return ended.result() if error is None else str(error)


def _explain(error: OSError) -> str:
    # The text of the system: that of a loop for a refused connection names the address, or calls a method.
    text = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
    return text.lower()


class _Watch:
    """The probes of one app process; `reason` is why the last one failed."""

    def __init__(self, endpoint: Endpoint, ready: Ready) -> None:
        self.reason = "it has not answered yet"
        self._way: Connecting | Asking
        if ready.path is None:
            self._way = Connecting(lambda: endpoint)
        else:
            # Both were read by the same rules already.
            self._way = Asking(lambda: endpoint, Probe.model_construct(path=ready.path, expect=ready.expect))

    async def look(self) -> None:
        """Return when a probe has passed."""
        while (reason := await self._try()) is not None:
            self.reason = reason
            await asyncio.sleep(_PAUSE_S)

    async def _try(self) -> str | None:
        """Probe once; return why it failed."""
        try:
            async with asyncio.timeout(_TRY_S):
                await self._way.probe()
        except TimeoutError:
            return f"no answer within {_TRY_S:g} s"
        except OSError as error:
            return _explain(error)
        except ProbeFailedError as error:
            return str(error)
        return None

    async def close(self) -> None:
        """Close the connections of the probes."""
        await self._way.close()
