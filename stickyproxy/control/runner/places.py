"""Where app processes listen: a free port that is held for them, or a Unix socket in a private directory."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import socket
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.config.address import MAX_SOCKET_PATH_BYTES, Address
from stickyproxy.control.runner.socket_directory import SocketDirectory
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stickyproxy.config.run import PortRange

logger = logging.getLogger(__name__)

_HOST: Final = "127.0.0.1"
_TAKEN: Final = frozenset({errno.EADDRINUSE, errno.EACCES})  # the second: below 1024, or kept back by the system
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")


class Place:
    """Where one app process listens: at `address`, which is a `port` of this machine or the path of a `socket`.

    A port is held, so that nobody else gets it, until `let_go`; and it is not given to another process of ours before
    `release`, nor is a socket's path.
    """

    def __init__(self, owner: Places, port: int | None, path: Path | None, hold: socket.socket | None = None) -> None:
        self.port = port
        self.socket = path
        self.address = Address(_HOST, port) if port is not None else Address(path=str(path))
        self._owner = owner
        self._hold = hold
        self._is_released = False

    @property
    def is_held(self) -> bool:
        """Say whether the port is still bound by us."""
        return self._hold is not None

    def let_go(self) -> None:
        """Let the process bind the port: to be called just before it starts. A socket's path needs none of this."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.close()

    def release(self) -> None:
        """Give the place back, when its process has ended: the port may be given again, the socket's file is removed.

        Does nothing the second time.
        """
        self.let_go()
        if not self._is_released:  # else another process may be there by now
            self._is_released = True
            self._owner._release(self)  # noqa: SLF001 -- one thing in two classes

    def leave(self) -> dict[str, Any]:
        """Return what `Places.adopt` of another image of this process needs; the process stays where it is."""
        return {"port": self.port, "socket": None if self.socket is None else str(self.socket)}

    @override
    def __repr__(self) -> str:
        return f"<Place {self.address}{' held' if self.is_held else ''}>"


class Places:
    """The places of one proxy's app processes: ports of a range, and sockets in a directory of its own.

    `ports` may be set to another range; what is taken stays where it is.

    That directory is made when a socket is first asked for, below `directory`, which is the runtime directory of the
    proxy: this user's alone.
    """

    def __init__(self, ports: PortRange, directory: Path) -> None:
        self.ports = ports
        self._runtime_directory = directory
        self._directory: SocketDirectory | None = None
        self._taken_ports: set[int] = set()
        self._used_paths: set[Path] = set()
        # Somewhere in the range, and from there on round: two proxies with one range that start at once do not look
        # at the same ports while their apps are not listening yet, and a port rests before it is given again.
        self._next = secrets.randbelow(ports.last - ports.first + 1)
        self._family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def take(self, upstream_id: str, *, uses_socket: bool) -> Place:
        """Return a place for one app process; raise UsageError where there is none.

        A few system calls where ports are free; one for each port of the range where others have all of them.
        """
        if uses_socket:
            path = self._choose_path(upstream_id)
            return Place(self, None, path)
        port, hold = self._find_port()
        self._taken_ports.add(port)
        return Place(self, port, None, hold)

    def adopt(self, upstream_id: str, left: Mapping[str, Any]) -> Place:
        """Return the place of a process that runs there already, as `Place.leave` of a former image told it.

        Raises UsageError where it is none.
        """
        match left:
            case {"port": int(port), "socket": None}:
                self._taken_ports.add(port)
                return Place(self, port, None)
            case {"port": None, "socket": str(path)}:
                self._used_paths.add(Path(path))
                return Place(self, None, Path(path))
            case _:
                raise UsageError(f"where app process {upstream_id} listens cannot be told: {left!r}")

    def close(self) -> None:
        """Remove the directory of the sockets, when all places are released; with a file of another it stays."""
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.close()

    def leave(self) -> dict[str, Any]:
        """Return what another image of this process needs besides the places: `resume` takes it."""
        return {"directory": None if self._directory is None else self._directory.leave()}

    def resume(self, left: Mapping[str, Any]) -> None:
        """Go on with the directory that a former image of this process has left."""
        if left.get("directory") is not None:
            self._directory = SocketDirectory.adopt(left["directory"])

    def _release(self, place: Place) -> None:
        if place.port is not None:
            self._taken_ports.discard(place.port)
        if place.socket is not None:
            try:
                place.socket.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("cannot remove the socket %s: %s", place.socket, _explain(error))

    # Ports

    def _find_port(self) -> tuple[int, socket.socket]:
        """Return a port and what holds it. One that still has ends of old connections is taken only if no other is."""
        refusals: set[int] = set()
        size = self.ports.last - self.ports.first + 1
        for is_last_choice in (False, True):
            for _ in range(size):
                port = self.ports.first + self._next % size  # the range may have been another before
                self._next = (self._next + 1) % size
                if port in self._taken_ports:
                    continue
                try:
                    return port, self._bind(port, reuses=is_last_choice)
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise UsageError(f"cannot look for a free port: {_explain(error)}") from error
                    refusals.add(error.errno)
        wanted = f"no port from {self.ports.first} to {self.ports.last} is free"
        if refusals == {errno.EACCES}:
            raise UsageError(f"{wanted}: this user may not bind any; change ports: of the section run")
        own = f"app processes have {len(self._taken_ports)}, and others the rest; " if self._taken_ports else ""
        raise UsageError(f"{wanted}: {own}widen ports: of the section run, or use {{socket}} in the command")

    def _bind(self, port: int, *, reuses: bool) -> socket.socket:
        """Return a socket that is bound to a port of all interfaces; raise OSError where anybody has it on any.

        It does not listen: a probe, or a client of whatever was there before, is refused. What Linux calls TIME_WAIT
        stands in the way only without `reuses`.
        """
        hold = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            if self._family == socket.AF_INET6:
                hold.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if reuses:
                hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            hold.bind(("", port))
            # With it, others that ask for it, as most servers do, could bind the port too, and listen.
            hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            hold.close()
            raise
        return hold

    # Sockets

    def _choose_path(self, upstream_id: str) -> Path:
        if self._directory is None:
            self._directory = SocketDirectory.make(self._runtime_directory)
        directory = self._directory.path
        name = _UNSAFE.sub("_", upstream_id)
        free = (directory / f"{name}{f'-{number}' if number > 1 else ''}.sock" for number in count(1))
        # One that was used before may belong to an upstream that is waited for: it would seem to be back too soon.
        path = next(path for path in free if path not in self._used_paths)
        self._used_paths.add(path)
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(
                f"the path of the socket {path} has more than {MAX_SOCKET_PATH_BYTES} bytes; "
                "set RUNTIME_DIRECTORY to a shorter one, or use {port} in the command"
            )
        try:
            path.unlink(missing_ok=True)  # of a proxy that was killed and had the same process id
        except OSError as error:
            raise UsageError(f"cannot remove {path}, which is in the way: {_explain(error)}") from error
        return path


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
