"""The resolver: follows the names of upstreams, so that one whose address changes is found without a restart.

Each name has one address at a time, which stays for as long as the answers hold it: a name server that rotates its
answers moves nobody. What goes wrong with a lookup changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections import Counter
from contextlib import suppress
from ipaddress import ip_address
from random import SystemRandom
from typing import TYPE_CHECKING, Final

from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from stickyproxy.config import Address

    Lookup = Callable[[str], Awaitable[Sequence[str]]]

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 5.0  # the first of the two tries that resolv.conf(5) makes by default
_AT_ONCE: Final = 20  # lookups
_JITTER: Final = 0.1  # so that several proxies do not ask in the same moment
_RETRY_S: Final = 10.0  # for names without an address, where the others are not looked up again


def is_followed(address: Address) -> bool:
    """Say whether the host of an address is a name that a resolver looks up.

    Whoever connects to localhost tries each of its addresses: apps listen on 127.0.0.1 or on ::1 (RFC 6761, section
    6.3, has them never change).
    """
    if address.is_unix or address.host == "localhost" or address.host.endswith(".localhost"):
        return False
    try:
        ip_address(address.host)
    except ValueError:
        return True
    return False


async def look_up(name: str) -> list[str]:
    """Return the IP addresses of a name in the order of getaddrinfo(3), RFC 6724; raise OSError where it has none.

    In a thread of its own, which may outlast the caller: the threads of the event loop are few, and name servers that
    do not answer would keep whoever connects to an upstream waiting for one.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(found: list[str] | OSError) -> None:
        if answer.done():
            return
        if isinstance(found, OSError):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def ask() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread, which may wait
        found: list[str] | OSError
        try:
            found = [str(one[4][0]) for one in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        except OSError as error:
            found = error
        except UnicodeError as error:  # a label that IDNA refuses
            found = OSError(None, str(error))
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=ask, name=f"look up {name}", daemon=True).start()
    return await answer


class Resolver:
    """Follows the names of upstreams from `start` to `stop`; upstreams that have none are left out.

    `on_change` gets the address of each upstream that has one, by id, whenever one of them is another: once at the end
    of `start`, and later for each name. `refresh_s` None: a name that has an address is not looked up again. `lookups`
    counts by "changed", "same" and "failed".
    """

    def __init__(
        self,
        addresses: Mapping[str, Address],
        refresh_s: float | None,
        on_change: Callable[[Mapping[str, str]], None],
        *,
        lookup: Lookup = look_up,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        self._names: dict[str, list[str]] = {}  # to the ids of their upstreams, which share a lookup
        for upstream_id, address in addresses.items():
            if is_followed(address):
                self._names.setdefault(address.host, []).append(upstream_id)
        self._name_of = {upstream_id: name for name, ids in self._names.items() for upstream_id in ids}
        self._refresh_s = refresh_s
        self._on_change = on_change
        self._lookup = lookup
        self._uniform = uniform or SystemRandom().uniform
        self._found: dict[str, str] = {}  # by name
        self._failing: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_started = False
        self.lookups = Counter({"changed": 0, "same": 0, "failed": 0})

    @property
    def resolved(self) -> dict[str, str]:
        """The address of each upstream whose name has one, by id."""
        return {one: self._found[name] for one, name in self._name_of.items() if name in self._found}

    def is_missing(self, upstream_id: str) -> bool:
        """Say whether an upstream cannot be reached because its name has no address yet."""
        name = self._name_of.get(upstream_id)
        return name is not None and name not in self._found

    async def start(self) -> None:
        """Look up all names, for 5 seconds at most, and go on in the background."""
        if not self._names:
            return
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._look_up_all()
        except TimeoutError:
            for name in self._names.keys() - self._found.keys() - self._failing:
                self._fail(name, f"no answer within {_TIMEOUT_S:g} s")
        self._is_started = True
        self._on_change(self.resolved)
        self._task = spawn(self._follow(), "follow names")

    async def stop(self) -> None:
        """Look up no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _follow(self) -> None:
        while self._refresh_s is not None or len(self._found) < len(self._names):
            pause_s = _RETRY_S if self._refresh_s is None else self._refresh_s
            await asyncio.sleep(pause_s * self._uniform(1 - _JITTER, 1 + _JITTER))
            await self._look_up_all()

    async def _look_up_all(self) -> None:
        """Look up the names that are due, several at once."""
        due = [name for name in self._names if self._refresh_s is not None or name not in self._found]
        names = iter(due)
        tasks = [spawn(self._work(names), "look up names") for _ in range(min(_AT_ONCE, len(due)))]
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, names: Iterator[str]) -> None:
        for name in names:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    found = await self._lookup(name)
            except TimeoutError:
                self._fail(name, f"no answer within {_TIMEOUT_S:g} s")
            except OSError as error:
                self._fail(name, error.strerror or str(error))
            except Exception:
                logger.exception("the lookup of %s crashed", name)
                self._fail(name, "the lookup crashed")
            else:
                self._take(name, found)

    def _take(self, name: str, found: Sequence[str]) -> None:
        if not found:
            self._fail(name, "the answer holds no address")
            return
        if name in self._failing:
            self._failing.remove(name)
            logger.info("%s is found again", name)
        before = self._found.get(name)
        if before in found:
            self.lookups["same"] += 1
            return
        self.lookups["changed"] += 1
        self._found[name] = found[0]
        for upstream_id in self._names[name] if self._is_started else ():
            was = "" if before is None else f" (was {before})"
            logger.info("upstream %s: %s is now %s%s", upstream_id, name, found[0], was)
        if self._is_started:
            self._on_change(self.resolved)

    def _fail(self, name: str, reason: str) -> None:
        self.lookups["failed"] += 1
        if name in self._failing:
            return
        self._failing.add(name)
        kept = f"{self._found[name]} stays" if name in self._found else "it has no address"
        logger.warning("cannot look up %s of upstream %s: %s; %s", name, ", ".join(self._names[name]), reason, kept)
