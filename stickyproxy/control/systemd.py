"""What systemd hands over and is told: sockets (sd_listen_fds(3)), how the process fares (sd_notify(3)), a watchdog.

The protocols are environment variables and datagrams, so no library is needed; where systemd is not there, nothing
happens. NOTIFY_SOCKET and WATCHDOG_* stay in the environment, and all goes on when the process re-executes itself: it
makes these objects anew, and its process id is the same. LISTEN_* is taken out at the first start, because whoever has
taken over the sockets keeps them by means of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import stat
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from stickyproxy.errors import UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping

    from stickyproxy.config import Address

logger = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_LISTEN_VARIABLES: Final = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
_MAX_WAITING: Final = 64  # messages; a manager that reads none for so long is not helped by older ones
_RETRY_S: Final = 0.1
_WATCHDOG_PART: Final = 1 / 3  # sd_watchdog_enabled(3) asks for half of the interval at the latest
_DUAL: Final = frozenset({"", "::"})  # how the configuration writes all interfaces, IPv6 and IPv4


class Notifier:
    """Tells the service manager named by NOTIFY_SOCKET how the process fares; without one it does nothing.

    No method raises or waits: what the manager does not take at once is sent later, as long as a loop runs.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = _read_notify_socket(environ.get("NOTIFY_SOCKET", ""))
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING)
        self._retry: asyncio.TimerHandle | None = None
        self._has_failed = False
        self._link: socket.socket | None = None
        if self._address is not None:
            try:  # now and for good: the watchdog must be told when no descriptor is left, too
                self._link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._link.setblocking(False)
            except OSError as error:
                logger.warning("cannot notify the service manager: %s", error)

    @property
    def is_connected(self) -> bool:
        """Say whether there is a service manager to tell."""
        return self._link is not None

    def ready(self, status: str = "") -> None:
        """Say that the start, or a reload, is complete."""
        self._send("READY=1", *_status(status))

    def reloading(self, status: str = "") -> None:
        """Say that a reload, or a re-execution, begins; `ready` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", *_status(status))

    def stopping(self, status: str = "", *, within_s: float = 0.0) -> None:
        """Say that the process stops; it may take `within_s` seconds where TimeoutStopSec= would cut it earlier."""
        extension = [f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}"] if within_s > 0 else []
        self._send("STOPPING=1", *extension, *_status(status))

    def status(self, text: str) -> None:
        """Show a line in `systemctl status`."""
        self._send(*_status(text))

    def main_pid(self, pid: int) -> None:
        """Say that another process is the service from now on; with NotifyAccess=main only the one before may."""
        self._send(f"MAINPID={pid}")

    def watchdog(self) -> None:
        """Say that the process is alive."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Send nothing more."""
        self._waiting.clear()
        if self._retry is not None:
            self._retry.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None

    def _send(self, *lines: str) -> None:
        if self._link is not None and lines:
            self._waiting.append("\n".join(lines).encode(errors="replace"))
            self._flush()

    def _flush(self) -> None:
        """Send what waits, in its order, and come back later where the manager's queue is full."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        while self._waiting and self._link is not None and self._address is not None:
            try:
                self._link.sendto(self._waiting[0], self._address)
            except BlockingIOError:
                self._retry_later()
                return
            except OSError as error:
                level = logging.DEBUG if self._has_failed else logging.WARNING
                logger.log(level, "cannot notify the service manager: %s", error)
                self._has_failed = True
            self._waiting.popleft()

    def _retry_later(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # the next message takes these along
            return
        self._retry = loop.call_later(_RETRY_S, self._flush)


def _read_notify_socket(text: str) -> str | None:
    """Return the address to send to; None where there is none, or one of a kind that is not known."""
    if text.startswith("/"):
        return text
    if text.startswith("@"):
        return f"\0{text[1:]}"
    if text:
        logger.warning("NOTIFY_SOCKET names no Unix socket: the service manager is told nothing")
    return None


def _status(text: str) -> list[str]:
    """Return the line of a status, which is one line; none for an empty one."""
    return [f"STATUS={' '.join(text.split())}"] if text else []


class Watchdog:
    """Tells the service manager that the process is alive, as long as it asks for it and `is_alive()` says so.

    It runs on the loop, so that a loop which hangs is told of by silence. `interval_s` is how long the manager waits
    before it ends the process, None where nobody waits.
    """

    def __init__(
        self, notifier: Notifier, is_alive: Callable[[], bool], environ: Mapping[str, str] = os.environ
    ) -> None:
        self.interval_s = _read_watchdog(environ)
        self._notifier = notifier
        self._is_alive = is_alive
        self._was_alive = True
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell."""
        if self.interval_s is not None:
            self._task = spawn(self._tell(self.interval_s * _WATCHDOG_PART), "watchdog")

    async def stop(self) -> None:
        """Tell no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _tell(self, pause_s: float) -> None:
        while True:
            is_alive = self._ask()
            if is_alive:
                self._notifier.watchdog()
            elif self._was_alive:
                logger.error("not all of the proxy is alive: unless that changes, the service manager will restart it")
            self._was_alive = is_alive
            await asyncio.sleep(pause_s)

    def _ask(self) -> bool:
        try:
            return self._is_alive()
        except Exception:
            logger.exception("the watchdog cannot see whether the proxy is alive")
            return False


def _read_watchdog(environ: Mapping[str, str]) -> float | None:
    """Return the seconds of WATCHDOG_USEC; None without it, or where it is meant for another process."""
    text = environ.get("WATCHDOG_USEC", "")
    if not text or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) == 0:
        logger.warning("WATCHDOG_USEC is no number of microseconds: the watchdog is off")
        return None
    return int(text) / 1e6


@dataclass(frozen=True, slots=True, eq=False)
class InheritedSocket:
    """A socket that the service manager opened; `name` is its FileDescriptorName=, by default its unit's."""

    name: str
    link: socket.socket


def take_listeners(environ: MutableMapping[str, str] = os.environ) -> list[InheritedSocket]:
    """Return the sockets that the service manager passed to this process; none where it passed none.

    They are non-blocking and closed at the next exec. LISTEN_* is removed from the environment, so that no child takes
    them for its own. Variables that are meant for another process (LISTEN_PID) are ignored, as sd_listen_fds(3) says;
    raises UsageError for values that make no sense. The caller passes them all to `match`, or closes them.
    """
    pid, _, count, names = (environ.pop(name, "") for name in _LISTEN_VARIABLES)
    if not pid or not count:
        return []
    if not re.fullmatch("[0-9]{1,10}", pid):
        raise UsageError("LISTEN_PID, set by the service manager, is no process id")
    if int(pid) != os.getpid():
        return []
    if not re.fullmatch("[0-9]{1,6}", count) or int(count) == 0:
        raise UsageError("LISTEN_FDS, set by the service manager, is no number of sockets")
    named = names.split(":") if names else ["unknown"] * int(count)
    if len(named) != int(count):
        raise UsageError(f"LISTEN_FDNAMES has {len(named)} names for the {int(count)} sockets of LISTEN_FDS")
    with ExitStack() as taken:
        found = []
        for descriptor, name in enumerate(named, _FIRST_DESCRIPTOR):
            found.append(InheritedSocket(name, _take_socket(descriptor, name)))
            taken.callback(found[-1].link.close)
        taken.pop_all()
    return found


def _take_socket(descriptor: int, name: str) -> socket.socket:
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError as error:
        raise UsageError(f"descriptor {descriptor} of LISTEN_FDS ({name}) is not open") from error
    if not is_socket:
        raise UsageError(f"descriptor {descriptor} of LISTEN_FDS ({name}) is no socket")
    link = socket.socket(fileno=descriptor)
    link.set_inheritable(False)
    link.setblocking(False)
    return link


def match(addresses: Iterable[Address], inherited: Iterable[InheritedSocket]) -> dict[Address, socket.socket]:
    """Return the inherited sockets by the addresses that they serve; addresses without one are left out.

    A socket that listens on just what an address says comes before one that listens on more or less of all interfaces:
    two sockets cannot share a port there, so a wide one is what the operator means. Sockets that nobody asked for are
    closed, with a warning: clients would wait there for ever. The file of a Unix socket stays the service manager's and
    must not be removed.
    """
    wanted, left = dict.fromkeys(addresses), list(inherited)
    found: dict[Address, socket.socket] = {}
    for is_meant in (_is_exactly, _is_roughly):
        for address in [one for one in wanted if one not in found]:
            served = next((one for one in left if _is_listener(one.link) and is_meant(address, one.link)), None)
            if served is not None:
                found[address] = served.link
                left.remove(served)
                logger.info("the socket %s of %s serves the listener %s", _describe(served.link), served.name, address)
    for one in left:
        what = "is in no listener of the configuration" if _is_listener(one.link) else "is no listening stream socket"
        logger.warning("the socket %s of %s %s: it is closed", _describe(one.link), one.name, what)
        one.link.close()
    return found


def _is_listener(link: socket.socket) -> bool:
    """Say whether a socket takes stream connections; one of Accept=yes is a connection itself."""
    return link.type == socket.SOCK_STREAM and bool(link.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_exactly(address: Address, link: socket.socket) -> bool:
    """Say whether a listening socket is just what binding the address would make."""
    name = link.getsockname()
    if address.is_unix:
        # Not only as text: /var/run is a link to /run. The name of an abstract socket is bytes.
        is_file = link.family == socket.AF_UNIX and isinstance(name, str)
        return is_file and os.path.realpath(name) == os.path.realpath(address.path)
    if not _has_port(address, link):
        return False
    if address.host in _DUAL:
        return name[0] == "::" and not link.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    host = _resolve(address.host)
    return host is not None and ip_address(host) == ip_address(name[0].partition("%")[0])


def _is_roughly(address: Address, link: socket.socket) -> bool:
    """Say whether both are all interfaces, be it of IPv4, of IPv6 or of both, with something in common."""
    if not _has_port(address, link):
        return False
    host = link.getsockname()[0]
    if address.host in _DUAL:
        return host in {"::", "0.0.0.0"}  # noqa: S104
    return (
        address.host == "0.0.0.0"  # noqa: S104
        and host == "::"
        and not link.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )


def _has_port(address: Address, link: socket.socket) -> bool:
    is_ip = link.family in {socket.AF_INET, socket.AF_INET6}
    return is_ip and not address.is_unix and link.getsockname()[1] == address.port


def _resolve(host: str) -> str | None:
    """Return the address that a bind to a host would take; of a name, the first of IPv4."""
    try:
        return host if ":" in host else socket.gethostbyname(host)
    except OSError:
        return None


def _describe(link: socket.socket) -> str:
    name = link.getsockname()
    if link.family == socket.AF_UNIX:
        return f"unix:{name}"
    if link.family in {socket.AF_INET, socket.AF_INET6}:
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return repr(name)
