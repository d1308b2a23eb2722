"""The directory in which the sockets of one proxy's app processes stand: its own as long as it lives, then removed.

It is locked, and the system ends the lock with the process that has it, however that ends. A process id would say less:
it may be another's by now, or that of another container with the same runtime directory.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

_OURS: Final = re.compile(r"apps-[0-9]{1,10}(-[0-9]{1,10})?", re.ASCII)


class SocketDirectory:
    """A private directory in the runtime directory, and the lock on it, a descriptor."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, parent: Path) -> Self:
        """Return one that no other process has, named after this one; raise UsageError where there can be none.

        What a dead proxy with the same process id has left is taken over. It has another name where that one lives:
        a container of its own, say.
        """
        paths = (parent / f"apps-{os.getpid()}{f'-{number}' if number > 1 else ''}" for number in count(1))
        locked = ((path, _make_and_lock(path)) for path in paths)
        return next(cls(path, lock) for path, lock in locked if lock is not None)

    def close(self) -> None:
        """Remove the directory, where nothing is left in it, and part from it."""
        if self._lock >= 0:
            with suppress(OSError):
                self.path.rmdir()
            os.close(self._lock)
            self._lock = -1

    # Another image of this process

    def leave(self) -> dict[str, Any]:
        """Return what `adopt` needs; the lock outlives the execution, and must get into no other process until then."""
        os.set_inheritable(self._lock, True)
        return {"path": str(self.path), "lock": self._lock}

    @classmethod
    def adopt(cls, left: Mapping[str, Any]) -> Self:
        """Return the directory that a former image has left."""
        lock = int(left["lock"])
        os.set_inheritable(lock, False)
        return cls(Path(left["path"]), lock)

    @override
    def __repr__(self) -> str:
        return f"<SocketDirectory {self.path}>"


def remove_dead_directories(parent: Path) -> None:
    """Remove the directories of proxies that are gone, with the sockets in them; one with other files stays."""
    with suppress(OSError):
        for path in [one for one in parent.iterdir() if _OURS.fullmatch(one.name)]:
            with suppress(OSError):
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    lock = _try_lock(path)
    if lock is None:
        return
    try:
        if not _is_there(path, lock):
            return  # what has come in its place is another's
        for name in os.listdir(lock):  # noqa: PTH208 -- of what is locked
            if stat.S_ISSOCK(os.stat(name, dir_fd=lock, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=lock)
        path.rmdir()
        logger.info("removed %s, which a proxy that was killed has left", path)
    finally:
        os.close(lock)


def _make_and_lock(path: Path) -> int | None:
    """Make a directory where there is none; return the lock as a descriptor, None where another process has it.

    Raises UsageError where it cannot be, or where others could put sockets of theirs into it.
    """
    while True:
        try:
            with suppress(FileExistsError):  # whatever it is, and if it is still there a moment later
                path.mkdir(mode=0o700)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise UsageError(f"{path} is no directory of this user alone; remove it")
            lock = _try_lock(path)
            if lock is None or _is_there(path, lock):
                return lock
            os.close(lock)
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise UsageError(f"cannot make the directory {path}: {_explain(error)}") from error
        except OSError as error:
            raise UsageError(f"cannot make the directory {path}: {_explain(error)}") from error


def _try_lock(path: Path) -> int | None:
    """Return the lock of a directory as a descriptor, None where another process has it; raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_there(path: Path, descriptor: int) -> bool:
    """Say whether a path leads to what a descriptor was opened for: it was not removed in between."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
