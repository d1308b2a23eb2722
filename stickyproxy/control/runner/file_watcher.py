"""Tells of files that change, by the package `watchfiles`, which is imported only here and only when it is used."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

_STEP_MS: Final = 100  # files that change one after the other within so long change together: an editor saves several
_TURN_MS: Final = 100  # of the thread; the end of the first says that everything is watched
_END_S: Final = 2.0  # for the thread to end: many times a step
# What tools and apps write themselves, and what others have written. Hidden directories go without saying.
_IGNORED: Final = frozenset({"__pycache__", "node_modules", "site-packages", "venv"})


class FileWatcher:
    """Watches directories with all that is below them, in a thread, from `start` to `stop`.

    `on_change` is called on the loop with the files that match one of the `patterns` (as of `PurePath.match`) and have
    come, changed or gone, all at once that do so together. What lies in hidden directories, or in those of tools, does
    not count, nor do hidden files but for a pattern that begins with a dot; the directories themselves may be hidden.
    """

    def __init__(
        self, directories: Sequence[Path], patterns: Sequence[str], on_change: Callable[[frozenset[Path]], None]
    ) -> None:
        self.directories = tuple(directories)
        self._patterns = tuple(patterns)
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()
        self._stop = threading.Event()
        self._has_ended = threading.Event()
        self._thread: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begin to watch; return when nothing that changes from then on is missed.

        Raises UsageError where there is no such directory, or the system cannot watch it.
        """
        # A thread of the loop, not one of watchfiles: these leave the signals to the main thread.
        self._thread = self._loop.run_in_executor(None, self._watch)
        self._thread.add_done_callback(self._on_end)
        await self._begun.wait()
        if self._thread.done() and (error := self._thread.exception()) is not None:
            raise error

    async def stop(self) -> None:
        """Watch no more; return when the thread has ended."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.wait([self._thread])

    def leave(self) -> None:
        """Watch no more, and wait for the thread, a tenth of a second at most: what comes next ends all threads."""
        self._stop.set()
        if self._thread is not None:
            self._has_ended.wait(_END_S)

    def _tell(self, files: frozenset[Path]) -> None:
        self._begun.set()
        if files and not self._stop.is_set():
            self._on_change(files)

    def _on_end(self, thread: asyncio.Future[None]) -> None:
        """Say why nothing is watched any more, unless `start` says it."""
        error = None if thread.cancelled() else thread.exception()
        if error is not None and self._begun.is_set():
            logger.error("files are not watched any more: %s", error)
        self._begun.set()

    # In the thread

    def _watch(self) -> None:
        try:
            self._keep_watching()
        except ImportError as error:
            raise UsageError(f"cannot watch files, watchfiles cannot be imported: {error}") from error
        except (OSError, RuntimeError) as error:  # the latter is what watchfiles calls an internal error
            named = ", ".join(map(str, self.directories))
            hint = "where there are too many files, name those that matter: run.reload.directories or --reload-dir"
            raise UsageError(f"cannot watch {named}: {error}; {hint}") from error
        finally:
            self._has_ended.set()

    def _keep_watching(self) -> None:
        from watchfiles import Change, watch  # noqa: PLC0415 -- an optional package

        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of all that it sees
        self.directories = tuple(directory.resolve() for directory in self.directories)  # as the system names files
        for directory in self.directories:
            if not directory.is_dir():
                raise UsageError(f"cannot watch {directory}: there is no such directory")
        turns = watch(
            *self.directories,
            watch_filter=lambda change, path: self._counts(Path(path), is_new=change is Change.added),
            step=_STEP_MS,
            rust_timeout=_TURN_MS,
            yield_on_timeout=True,
            stop_event=self._stop,
            ignore_permission_denied=True,
        )
        for changes in turns:
            self._loop.call_soon_threadsafe(self._tell, frozenset(Path(path) for _, path in changes))

    def _counts(self, path: Path, *, is_new: bool) -> bool:
        """Say whether a change of this path counts; of a directory only that it is new, with what it came with."""
        if not any(_is_open(path.relative_to(root)) for root in self.directories if path.is_relative_to(root)):
            return False
        if is_new and os.path.isdir(path):  # noqa: PTH112 -- that of Path raises where it may not look
            return not _is_ignored(path.name) and self._holds_files(path)
        return self._matches(path)

    def _holds_files(self, directory: Path) -> bool:
        """Say whether there are files that count: of those that are as old as their directory nobody tells."""
        for place, names, files in os.walk(directory):
            names[:] = [name for name in names if not _is_ignored(name)]
            if any(self._matches(Path(place, name)) for name in files):
                return True
        return False

    def _matches(self, path: Path) -> bool:
        is_hidden = path.name.startswith(".")  # some editors lock main.py by .#main.py
        return any(
            path.match(pattern) for pattern in self._patterns if PurePath(pattern).name.startswith(".") or not is_hidden
        )

    @override
    def __repr__(self) -> str:
        return f"<FileWatcher {', '.join(map(str, self.directories))}>"


def _is_open(below: PurePath) -> bool:
    """Say whether a path lies in no directory that is ignored."""
    return not any(map(_is_ignored, below.parts[:-1]))


def _is_ignored(directory: str) -> bool:
    return directory.startswith(".") or directory in _IGNORED
