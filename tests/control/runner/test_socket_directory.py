"""The directory of sockets: nobody else's while its proxy lives, and removed when it is gone."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from stickyproxy.control.runner import socket_directory
from stickyproxy.control.runner.socket_directory import SocketDirectory, remove_dead_directories
from stickyproxy.errors import UsageError
from tests.helpers.loops import no_leak

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = f"apps-{os.getpid()}"
HOLDER = """
import os, pathlib, socket, sys
from stickyproxy.control.runner.socket_directory import SocketDirectory
made = SocketDirectory.make(pathlib.Path(sys.argv[1]))
socket.socket(socket.AF_UNIX).bind(str(made.path / "g1-1.sock"))
if sys.argv[2] == "execute":
    made.leave()
    os.execv(sys.executable, [sys.executable, "-c", f"print({str(made.path)!r}, flush=True); input()"])
print(made.path, flush=True)
input()
"""


@pytest.fixture
def parent() -> Iterator[Path]:
    """Give a directory with a short path, private as the runtime directory of a proxy is."""
    with TemporaryDirectory(prefix="apps-") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    with no_leak():
        yield


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def bind(path: Path) -> None:
    """Leave the file of a socket."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


class Holder:
    """Another process that has a directory; with `executes` it has become another image, as in an upgrade."""

    def __init__(self, parent: Path, *, executes: bool = False) -> None:
        words = [sys.executable, "-c", HOLDER, str(parent), "execute" if executes else "stay"]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.path = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        """End it as by kill -9."""
        self.process.kill()
        self.process.communicate()


# Whose it is


def test_it_is_private_and_goes_at_the_end(parent: Path) -> None:
    directory = SocketDirectory.make(parent)
    assert directory.path == parent / NAME
    assert repr(directory) == f"<SocketDirectory {parent / NAME}>"
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    directory.close()
    directory.close()
    assert names(parent) == []


def test_with_a_file_in_it_it_stays(parent: Path) -> None:
    directory = SocketDirectory.make(parent)
    (directory.path / "file").touch()
    directory.close()
    assert names(parent) == [NAME]


def test_two_that_live_have_two(parent: Path) -> None:
    """Two containers may have the same process ids and one runtime directory."""
    first, second, third = (SocketDirectory.make(parent) for _ in range(3))
    assert [one.path.name for one in (first, second, third)] == [NAME, f"{NAME}-2", f"{NAME}-3"]
    second.close()
    again = SocketDirectory.make(parent)
    assert again.path == second.path
    for one in (first, again, third):
        one.close()
    assert names(parent) == []


def test_that_of_a_dead_one_is_taken_over(parent: Path) -> None:
    (parent / NAME).mkdir(0o700)
    directory = SocketDirectory.make(parent)
    assert directory.path == parent / NAME
    directory.close()


@pytest.mark.parametrize("kind", ["open to others", "a file", "a link"])
def test_one_that_is_not_private_is_refused(parent: Path, kind: str) -> None:
    path = parent / NAME
    if kind == "open to others":
        path.mkdir()
        path.chmod(0o750)
    elif kind == "a file":
        path.touch(0o700)
    else:
        (parent / "other").mkdir(0o700)
        path.symlink_to(parent / "other")
    with pytest.raises(UsageError, match=NAME):
        SocketDirectory.make(parent)


def test_one_that_cannot_be_made_is_said(parent: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot make the directory .*: no such file or directory"):
        SocketDirectory.make(parent / "gone")


# What dead ones have left


def test_what_a_killed_process_left_is_removed_and_not_before(parent: Path) -> None:
    living, dead = Holder(parent), Holder(parent)
    try:
        remove_dead_directories(parent)
        assert names(parent) == sorted([living.path.name, dead.path.name]), "the control: both live"
        dead.kill()
        remove_dead_directories(parent)
        assert names(parent) == [living.path.name]
        assert names(living.path) == ["g1-1.sock"]
    finally:
        living.kill()
        dead.kill()


def test_one_that_another_image_goes_on_with_is_in_use(parent: Path) -> None:
    holder = Holder(parent, executes=True)
    try:
        remove_dead_directories(parent)
        assert names(parent) == [holder.path.name]
        holder.kill()
        remove_dead_directories(parent)
        assert names(parent) == []
    finally:
        holder.kill()


def test_the_lock_is_left_to_another_image_and_to_no_other_process(parent: Path) -> None:
    directory = SocketDirectory.make(parent)
    assert not os.get_inheritable(directory._lock)
    left = directory.leave()
    assert os.get_inheritable(directory._lock)
    adopted = SocketDirectory.adopt(json.loads(json.dumps(left)))
    assert not os.get_inheritable(adopted._lock)
    remove_dead_directories(parent)
    assert names(parent) == [NAME]
    adopted.close()
    assert names(parent) == []


def test_files_of_others_stay(parent: Path) -> None:
    kept = ["apps-", "apps-1", "apps-1-", "apps-2.old", "apps-x", "other"]
    for name in kept:
        (parent / name).mkdir()
    (parent / "apps-1" / "file").write_text("precious")
    for name in ("apps-3", "apps-4-2"):
        (parent / name).mkdir()
        bind(parent / name / "g1-1.sock")
    (parent / "apps-5").symlink_to(parent / "other")
    (parent / "apps-6").touch()
    bind(parent / "other" / "g1-1.sock")
    remove_dead_directories(parent)
    assert names(parent) == sorted([*kept, "apps-5", "apps-6"])
    assert names(parent / "other") == ["g1-1.sock"]
    assert (parent / "apps-1" / "file").read_text() == "precious"
    remove_dead_directories(parent / "gone")


@pytest.mark.parametrize("step", ["_try_lock", "_is_there"])
def test_one_that_is_removed_before_it_is_locked_is_made_again(
    parent: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Who removes dead ones may come between each two steps."""
    go_on, calls = getattr(socket_directory, step), list[Path]()

    def remove_first(path: Path, *more: int) -> object:
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()
        return go_on(path, *more)

    monkeypatch.setattr(socket_directory, step, remove_first)
    directory = SocketDirectory.make(parent)
    assert calls == [parent / NAME] * 2
    assert names(parent) == [NAME]
    remove_dead_directories(parent)
    assert names(parent) == [NAME]
    directory.close()


def test_one_that_has_come_in_place_of_a_dead_one_is_in_use(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at the dead one and its lock, somebody else has removed it and another has made its own."""
    (parent / NAME).mkdir(0o700)
    try_lock, made = socket_directory._try_lock, list[SocketDirectory]()

    def replace_it(path: Path) -> int | None:
        lock = try_lock(path)
        if not made:
            path.rmdir()
            monkeypatch.setattr(socket_directory, "_try_lock", try_lock)
            made.append(SocketDirectory.make(parent))
        return lock

    monkeypatch.setattr(socket_directory, "_try_lock", replace_it)
    remove_dead_directories(parent)
    assert made[0].path == parent / NAME
    assert names(parent) == [NAME]
    made[0].close()


def test_one_that_is_removed_while_it_is_looked_at_is_made_again(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parent / NAME).mkdir(0o700)
    mkdir, calls = os.mkdir, list[Path]()

    def remove_then(path: Path, *more: int) -> None:
        calls.append(path)
        try:
            mkdir(path, *more)
        finally:
            if len(calls) == 1:
                path.rmdir()

    monkeypatch.setattr(os, "mkdir", remove_then)
    directory = SocketDirectory.make(parent)
    assert calls == [parent / NAME] * 2
    directory.close()


def test_of_all_who_make_and_remove_at_once_each_has_its_own(parent: Path) -> None:
    barrier, made, lock = threading.Barrier(4), list[SocketDirectory](), threading.Lock()

    def work() -> None:
        barrier.wait()
        for _ in range(50):
            remove_dead_directories(parent)
            directory = SocketDirectory.make(parent)
            bind(directory.path / "g1-1.sock")  # it fails where two have the same, or none is there
            (directory.path / "g1-1.sock").unlink()
            directory.close()
        directory = SocketDirectory.make(parent)
        with lock:
            made.append(directory)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.path for one in made}) == 4
    for one in made:
        one.close()
    assert names(parent) == []
