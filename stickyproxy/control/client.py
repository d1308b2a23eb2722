"""How a command speaks with a running proxy: HTTP on its control socket."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final, Self

import aiohttp

from stickyproxy.errors import StickyproxyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_TIMEOUT_S: Final = 10.0
_CONNECT_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.02
_LAST_PAUSE_S: Final = 0.5
_MAX_WORDS: Final = 500  # characters of an error that is no JSON
_OK: Final = 200
_REDIRECT: Final = 300
_SERVER_ERROR: Final = 500
_AWAY_S: Final = 30.0  # a proxy that re-executes itself is back in about a second; on a busy machine in a few


class ControlError(StickyproxyError):
    """A call was not carried out; the text says why in one line.

    `status` is the HTTP status of the answer, None where there is none; `answer` is its JSON, which may say more.
    """

    def __init__(self, text: str, status: int | None = None, answer: Any = None) -> None:
        super().__init__(text)
        self.status = status
        self.answer = answer


class ControlLost(ControlError):  # noqa: N818 -- names the state, as UpstreamUnavailable does
    """The proxy closed the connection before its answer was whole, as it does when it re-executes itself.

    Whether the call took effect is not known.
    """


class ControlUnreachable(UsageError):  # noqa: N818 -- as above
    """Nobody listens at the control socket, or this user may not use it."""


class ControlClient:
    """A proxy by the path of its control socket: `async with ControlClient(path) as control`.

    Each call is a connection of its own, so that one which breaks says something about this call alone. All raise
    ControlUnreachable (a UsageError), ControlLost and ControlError. Those that may be repeated, all but `post`, are
    tried once more by aiohttp itself before they are lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(path=str(self._path), force_close=True)
        self._session = aiohttp.ClientSession("http://localhost", connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, path: str, *, timeout_s: float = _TIMEOUT_S) -> Any:
        """Return the answer: what its JSON holds, or its text where it is none."""
        return await self._call("GET", path, None, timeout_s)

    async def post(self, path: str, body: Any = None, *, timeout_s: float = _TIMEOUT_S) -> Any:
        """Send a body as JSON (None: an empty object) and return the answer, as `get` does. It is never sent twice."""
        return await self._call("POST", path, {} if body is None else body, timeout_s)

    async def put(self, path: str, body: Any, *, timeout_s: float = _TIMEOUT_S) -> Any:
        """Send a body as JSON and return the answer, as `get` does."""
        return await self._call("PUT", path, body, timeout_s)

    async def wait_for(self, path: str, predicate: Callable[[Any], bool], deadline: float) -> Any:
        """Get a path again and again until `predicate(answer)` holds, and return that answer.

        Goes on while the proxy cannot be reached, does not answer or answers with a server error, as when it
        re-executes itself; any other error is raised at once. After `deadline`, an instant on the loop's clock, raises
        ControlError with the last reason.
        """
        loop = asyncio.get_running_loop()
        pause_s, reason = _FIRST_PAUSE_S, ""
        while (left_s := deadline - loop.time()) > 0:
            try:
                answer = await self.get(path, timeout_s=min(left_s, _TIMEOUT_S))
            except ControlError as error:
                if error.status is not None and error.status < _SERVER_ERROR:
                    raise
                is_cut_short = left_s < _TIMEOUT_S and isinstance(error.__cause__, TimeoutError)
                if not (is_cut_short and reason):  # the deadline says less than what came before
                    reason = str(error)
            except ControlUnreachable as error:
                reason = str(error)
            else:
                if predicate(answer):
                    return answer
                reason = "it is not there yet"
            await asyncio.sleep(max(0.0, min(pause_s, deadline - loop.time())))
            pause_s = min(pause_s * 1.5, _LAST_PAUSE_S)
        raise ControlError(f"waited for the proxy in vain: {reason or 'there was no time'}")

    async def watch(self, path: str, is_enough: Callable[[Any], bool], every_s: float) -> Any:
        """Get a path, and again `every_s` after each answer, until `is_enough(answer)` holds; return that answer.

        Every answer is given to `is_enough` once. Goes on while the proxy is away, as `wait_for` does, for half a
        minute; but not before the first answer.
        """
        loop = asyncio.get_running_loop()
        answer = await self.get(path)
        while not is_enough(answer):
            await asyncio.sleep(every_s)
            answer = await self.wait_for(path, lambda _: True, loop.time() + _AWAY_S)
        return answer

    async def _call(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        if self._session is None:
            raise RuntimeError("a ControlClient is used within `async with`")
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=min(timeout_s, _CONNECT_S))
        sent = {} if method == "GET" else {"json": body}
        try:
            async with self._session.request(method, path, timeout=timeout, allow_redirects=False, **sent) as response:
                status, content, kind = response.status, await response.read(), response.content_type
        except aiohttp.ClientConnectorError as error:
            raise ControlUnreachable(self._explain(error.os_error)) from error
        except TimeoutError as error:
            raise ControlError(f"the proxy at {self._path} did not answer within {round(timeout_s, 2):g} s") from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError) as error:
            raise ControlLost(f"the proxy at {self._path} closed the connection before it answered") from error
        except aiohttp.ClientError as error:
            raise ControlError(f"what listens at {self._path} is no proxy: {error}") from error
        answer = _read(content, kind)
        if not _OK <= status < _REDIRECT:
            raise ControlError(_word(answer, status), status, answer)
        return answer

    def _explain(self, error: OSError) -> str:
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return f"no proxy listens at {self._path}"
        return f"cannot reach the proxy at {self._path}: {(error.strerror or str(error)).lower()}"


def _read(content: bytes, kind: str) -> Any:
    """Return what JSON holds; text as it is, and so what only claims to be JSON."""
    text = content.decode(errors="replace")
    if kind != "application/json":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _word(answer: Any, status: int) -> str:
    """Return the proxy's own word for an error, in one line where it is plain text."""
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return str(answer["error"])
    words = " ".join(answer.split())[:_MAX_WORDS] if isinstance(answer, str) else ""
    return words or f"the proxy answered with status {status}"
