"""Where the sockets of a running proxy stand, who may use them, and how a command finds them.

A proxy has two Unix sockets beside its listeners: one for commands, one for handing over to another proxy. Both are
named after its process id, in a directory that belongs to its user alone; being able to connect is the permission.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import struct
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stickyproxy.config.address import MAX_SOCKET_PATH_BYTES
from stickyproxy.errors import StickyproxyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTROL: Final = ".control"
_HAND_OVER: Final = ".hand-over"
_OURS: Final = re.compile(r"(?P<pid>[0-9]{1,10})(?P<kind>\.control|\.hand-over)", re.ASCII)
_LONGEST_NAME: Final = len("/4194304") + len(_HAND_OVER)  # 4194304: the highest process id of Linux
_SERVICE_DIRECTORY = Path("/run/stickyproxy")  # RuntimeDirectory=stickyproxy
_BACKLOG: Final = 128
_LOCK_TRIES: Final = 100
_LOCK_PAUSE_S: Final = 0.01

# getsockopt of BSD and macOS: unix(4), and `struct xucred` of sys/ucred.h, whose first group is the effective one
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1
_XUCRED: Final = struct.Struct("=IIhxxI")
_XUCRED_BYTES: Final = 128


class ForeignPeerError(StickyproxyError):
    """Who has connected is neither this user nor root."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a Unix socket; `pid` is 0 where the system does not tell."""

    pid: int
    uid: int
    gid: int


def runtime_directory() -> Path:
    """Return the directory for the sockets of this user's proxies, making it where it is not there.

    It is the one that systemd made ($RUNTIME_DIRECTORY), else $XDG_RUNTIME_DIR/stickyproxy, else stickyproxy-<uid> in
    the directory for temporary files. Raises UsageError where it cannot be made, or is not this user's alone.
    """
    directory = _choose_directory()
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # a file or a dangling link, which the check tells of
    except OSError as error:
        raise UsageError(f"cannot make the runtime directory {directory}: {_explain(error)}") from error
    _check_directory(directory)
    return directory


def control_path(pid: int) -> Path:
    """Return where a proxy listens for commands; raise UsageError as `runtime_directory`."""
    return runtime_directory() / f"{pid}{_CONTROL}"


def hand_over_path(pid: int) -> Path:
    """Return where a proxy listens for one that takes over; raise UsageError as `runtime_directory`."""
    return runtime_directory() / f"{pid}{_HAND_OVER}"


def _choose_directory() -> Path:
    if directory := os.environ.get("RUNTIME_DIRECTORY"):  # systemd.exec(5); several are separated by colons
        return Path(directory.split(":", maxsplit=1)[0])
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    # The specification asks for an absolute path of the user's own: su keeps the variable of another one. Where the
    # paths of the sockets would not fit, every proxy and every command of the user falls back alike.
    if base.is_absolute() and _is_own(base):
        own = base / "stickyproxy"
        if len(os.fsencode(own)) + _LONGEST_NAME <= MAX_SOCKET_PATH_BYTES:
            return own
    try:
        return Path(tempfile.gettempdir()) / f"stickyproxy-{os.geteuid()}"
    except FileNotFoundError as error:
        raise UsageError("no directory for temporary files can be written: set RUNTIME_DIRECTORY") from error


def _is_own(directory: Path) -> bool:
    try:
        return directory.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _check_directory(directory: Path) -> None:
    """Raise UsageError where others could put sockets of theirs into a directory; systemd's own is trusted."""
    if os.environ.get("RUNTIME_DIRECTORY") and directory.is_dir():
        return
    found = directory.lstat()
    wrong = None
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is no directory; remove it"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to another user (uid {found.st_uid}); remove it"
    elif found.st_mode & 0o077:
        wrong = f"is open to others (mode {stat.S_IMODE(found.st_mode):04o}); remove it"
    if wrong is not None:
        raise UsageError(f"the runtime directory {directory} {wrong}, or set XDG_RUNTIME_DIR to one of your own")


def bind_private(path: Path) -> socket.socket:
    """Return a non-blocking Unix socket that listens at a path and is this user's alone (mode 0600) from the first.

    The file of a dead process is replaced; a living one's is not, nor is a file that is no socket. Raises UsageError.
    Whoever binds removes the file when done.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(f"cannot listen on {path}: the path has more than {MAX_SOCKET_PATH_BYTES} bytes")
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _one_at_a_time(path.parent):
            _remove_dead(path)
            _bind(link, path)
            link.listen(_BACKLOG)
    except OSError as error:
        link.close()
        raise UsageError(f"cannot listen on {path}: {_explain(error)}") from error
    link.setblocking(False)
    return link


def _bind(link: socket.socket, path: Path) -> None:
    if sys.platform == "linux":
        os.fchmod(link.fileno(), 0o600)  # unix(7): bind takes the mode from the socket, less the umask
        link.bind(str(path))
        return
    before = os.umask(0o177)  # of the whole process: other threads make stricter files for a moment
    try:
        link.bind(str(path))
    finally:
        os.umask(before)


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Let no other process look for dead sockets in a directory: one that is bound does not listen yet.

    The lock is held for a few system calls. Whoever can open the directory can hold it longer, where it is not private:
    so it is waited for no more than a second, and what goes on without it is only less sure when two start at once.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # what follows says it better
        yield
        return
    try:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _remove_dead(path: Path) -> None:
    """Remove the socket of a dead process; raise OSError where something else is in the way."""
    if not os.path.lexists(path):
        return
    if not _is_socket(path):
        raise OSError(errno.EEXIST, "a file that is no socket is in its place")
    if not _is_dead(path):
        raise OSError(errno.EADDRINUSE, "another process listens there")
    path.unlink(missing_ok=True)


def _is_socket(path: Path) -> bool:
    """Say whether a socket stands at a path itself; to connect to any other file is refused, too."""
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def _is_dead(path: Path) -> bool:
    """Say whether nobody has bound the socket at a path any more; where that cannot be seen, somebody may.

    A socket of another type is told so by a living one, which hears nothing of it, nor need it listen yet.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def find_control() -> Path:
    """Return the control socket of the one proxy that runs, and remove the files of dead ones.

    Searched are the user's own runtime directory and that of the system service, where this user may look into it.
    Raises UsageError where no proxy runs, or several do.
    """
    searched = [_choose_directory()]
    if searched[0].exists():
        _check_directory(searched[0])
    if _SERVICE_DIRECTORY.is_dir() and not _is_same(_SERVICE_DIRECTORY, searched[0]):
        searched.append(_SERVICE_DIRECTORY)
    found: dict[int, Path] = {}
    for directory in searched:
        with _one_at_a_time(directory):
            found |= dict(_living_controls(directory))
    if not found:
        where = " or ".join(str(directory) for directory in searched)
        raise UsageError(f"no proxy is running (no control socket in {where}); name it by --control PATH")
    if len(found) > 1:
        names = ", ".join(f"{path} (pid {pid})" for pid, path in sorted(found.items()))
        raise UsageError(f"{len(found)} proxies are running; name one by --control PATH: {names}")
    return next(iter(found.values()))


def _is_same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def remove_dead_sockets(directory: Path) -> None:
    """Remove what proxies that were killed have left in a runtime directory."""
    with _one_at_a_time(directory):
        for _ in _living_controls(directory):
            pass


def _living_controls(directory: Path) -> Iterator[tuple[int, Path]]:
    """Give the process id and the path of each control socket that somebody has; remove those of dead proxies."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 -- names are matched, not paths
    except OSError:
        return
    for name in names:
        match, path = _OURS.fullmatch(name), directory / name
        if match is None or not _is_socket(path):
            continue
        if _is_dead(path):
            with suppress(OSError):
                path.unlink()
        elif match["kind"] == _CONTROL:
            yield int(match["pid"]), path


def peer_credentials(link: socket.socket) -> Peer:
    """Return who is at the other end of a connected Unix socket, as of when it connected or began to listen.

    Raises OSError where the system does not tell.
    """
    if hasattr(socket, "SO_PEERCRED"):
        credentials = struct.Struct("iII")
        return Peer(*credentials.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)))
    raw = link.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES)
    if len(raw) < _XUCRED.size:
        raise OSError(errno.EINVAL, "the system does not say who has connected")
    _, uid, _, gid = _XUCRED.unpack_from(raw)
    return Peer(0, uid, gid)


def check_peer(link: socket.socket) -> Peer:
    """Return who is at the other end of a Unix socket; raise ForeignPeerError unless it is this user or root.

    The mode of the socket's file says the same, but it can be changed, and a descriptor can be passed on.
    """
    try:
        peer = peer_credentials(link)
    except OSError as error:
        raise ForeignPeerError(f"cannot see who has connected: {_explain(error)}") from error
    if peer.uid not in {0, os.geteuid()}:
        raise ForeignPeerError(f"process {peer.pid} of uid {peer.uid} has connected; only uid {os.geteuid()} may")
    return peer


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
