"""Files that change are told of, with those that change together, and what tools write is not."""

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stickyproxy.control.runner.file_watcher import FileWatcher
from stickyproxy.errors import UsageError
from tests.helpers.supervised import until

PATTERNS = ("*.py", "templates/*.css", ".env")


class Told:
    """What a watcher has told of, below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.calls: list[set[str]] = []

    def __call__(self, files: frozenset[Path]) -> None:
        self.calls.append({str(file.relative_to(self._root)) for file in files})

    @property
    def files(self) -> set[str]:
        return set().union(*self.calls)

    async def until(self, name: str) -> None:
        """Wait until it has told of a file."""
        await until(lambda: name in self.files, f"{name} among {self.calls}")


@asynccontextmanager
async def watching(root: Path, *directories: Path) -> AsyncIterator[Told]:
    """Watch a directory, or several below it, until the end of the block."""
    told = Told(root)
    watcher = FileWatcher(directories or (root,), PATTERNS, told)
    try:
        await watcher.start()
        yield told
    finally:
        await watcher.stop()
        await nothing_left()


def threads_of_watchers() -> list[str]:
    """Return the names of the threads of this process that watch: those of the system's interface come from Rust."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "notify" in name]


async def nothing_left() -> None:
    """Wait until no thread is left: those of the system's interface end a moment after they are told to."""
    await until(lambda: threads_of_watchers() == [], "no thread is left")


async def test_files_that_come_change_and_go_are_told_of(tmp_path: Path) -> None:
    file = tmp_path / "main.py"
    async with watching(tmp_path) as told:
        assert threads_of_watchers() != []
        for act in (lambda: file.write_text("1"), lambda: file.write_text("22"), file.unlink):
            told.calls.clear()
            act()
            await told.until("main.py")


async def test_one_that_takes_the_place_of_another_is_told_of(tmp_path: Path) -> None:
    """As editors save."""
    (tmp_path / "main.py").write_text("1")
    async with watching(tmp_path) as told:
        (tmp_path / "main.py~").write_text("2")
        (tmp_path / "main.py~").rename(tmp_path / "main.py")
        await told.until("main.py")
    assert told.files == {"main.py"}


async def test_what_is_written_together_is_told_of_at_once(tmp_path: Path) -> None:
    async with watching(tmp_path) as told:
        names = {f"module_{number}.py" for number in range(50)}
        for name in names:
            (tmp_path / name).write_text(name)
        await until(lambda: told.files == names)
    assert len(told.calls) == 1


IGNORED = (
    "__pycache__/main.py",
    "sub/__pycache__/main.py",
    ".venv/lib/main.py",
    "venv/lib/main.py",
    "lib/site-packages/main.py",
    "node_modules/main.py",
    ".nicegui/main.py",
    ".#main.py",
    "main.pyc",
    "main.css",
    "database.sqlite",
    "chainlit.md",
    "sub.py/notes.txt",
)
COUNTED = (
    "main.py",
    "sub/main.py",
    "sub/templates/main.css",
    ".env",
    "lib/site-package/main.py",
    "environment/main.py",
)


def write(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")


async def test_what_tools_and_apps_write_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, (*IGNORED, *COUNTED))
    async with watching(tmp_path) as told:
        for name in (*IGNORED, *COUNTED):
            (tmp_path / name).write_text("22")
        await until(lambda: told.files >= set(COUNTED))
    assert told.files == set(COUNTED)


async def test_new_directories_of_tools_and_apps_do_not_count(tmp_path: Path) -> None:
    async with watching(tmp_path) as told:
        write(tmp_path, (".files/a.py", "__pycache__/a.py", "venv/a.py", "uploads/.hidden/a.py", "uploads/a.txt"))
        (tmp_path / "last.py").write_text("1")
        await told.until("last.py")
    assert told.files == {"last.py"}


async def test_a_directory_that_comes_with_its_files_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    write(tmp_path / "elsewhere", ("package/deep/module.py",))
    async with watching(tmp_path, tmp_path / "app") as told:
        (tmp_path / "elsewhere" / "package").rename(tmp_path / "app" / "package")
        await told.until("app/package")
        (tmp_path / "app" / "package" / "deep" / "module.py").write_text("22")
        await told.until("app/package/deep/module.py")


async def test_only_the_directories_that_are_named_are_watched_be_they_hidden_or_links(tmp_path: Path) -> None:
    write(tmp_path, (".hidden/main.py", "real/main.py", "other/main.py"))
    (tmp_path / "link").symlink_to("real")
    async with watching(tmp_path, tmp_path / ".hidden", tmp_path / "link") as told:
        for name in ("other", ".hidden", "real"):
            (tmp_path / name / "main.py").write_text("22")
        await until(lambda: told.files >= {".hidden/main.py", "real/main.py"})
    assert told.files == {".hidden/main.py", "real/main.py"}


async def test_a_directory_below_another_counts_where_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, (".hidden/main.py",))
    async with watching(tmp_path, tmp_path, tmp_path / ".hidden") as told:
        (tmp_path / ".hidden" / "main.py").write_text("22")
        await told.until(".hidden/main.py")


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    watcher = FileWatcher([tmp_path / "none"], PATTERNS, Told(tmp_path))
    with pytest.raises(UsageError, match=f"^cannot watch {tmp_path / 'none'}: there is no such directory$"):
        await watcher.start()
    await watcher.stop()


async def test_what_the_system_cannot_watch_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(*_: object, **__: object) -> None:
        raise OSError("OS file watch limit reached.")

    monkeypatch.setattr("watchfiles.watch", watch)
    watcher = FileWatcher([tmp_path], PATTERNS, Told(tmp_path))
    with pytest.raises(UsageError, match=r"watch limit reached\..*name those that matter: run\.reload\.directories"):
        await watcher.start()


async def test_an_end_that_nobody_asked_for_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails = threading.Event()

    def watch(*_: object, **__: object) -> object:
        yield set()
        fails.wait()
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr("watchfiles.watch", watch)
    watcher = FileWatcher([tmp_path], PATTERNS, Told(tmp_path))
    await watcher.start()
    fails.set()
    await until(lambda: "files are not watched any more: " in caplog.text)
    assert "the disk is gone" in caplog.text
    await watcher.stop()


async def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    watcher = FileWatcher([tmp_path], PATTERNS, Told(tmp_path))
    with pytest.raises(UsageError, match="watchfiles cannot be imported"):
        await watcher.start()


async def leave(watcher: FileWatcher) -> None:
    watcher.leave()


@pytest.mark.parametrize("end", [FileWatcher.stop, leave])
async def test_nothing_is_told_of_nor_left_after_its_end(
    tmp_path: Path, end: Callable[[FileWatcher], Awaitable[None]]
) -> None:
    told = Told(tmp_path)
    watcher = FileWatcher([tmp_path], PATTERNS, told)
    await watcher.start()
    watcher._loop.call_soon(watcher._tell, frozenset({tmp_path / "main.py"}))  # on its way when it ends
    await end(watcher)
    assert watcher._has_ended.is_set()
    await nothing_left()
    await end(watcher)
    await asyncio.sleep(0)
    assert told.calls == []


async def test_one_that_is_stopped_before_it_begins_ends(tmp_path: Path) -> None:
    watcher = FileWatcher([tmp_path], PATTERNS, Told(tmp_path))
    await watcher.stop()
    await watcher.start()
    await watcher.stop()
    await nothing_left()


async def test_the_package_does_not_log_what_it_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with watching(tmp_path) as told:
        (tmp_path / "main.py").write_text("1")
        await told.until("main.py")
    assert [record for record in caplog.records if record.name.startswith("watchfiles")] == []
