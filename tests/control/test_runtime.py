"""The sockets of a running proxy: private from the first, replaced when dead, and found by commands."""

import errno
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from typing_extensions import override

from stickyproxy.control import runtime
from stickyproxy.control.runtime import (
    ForeignPeerError,
    Peer,
    bind_private,
    check_peer,
    control_path,
    find_control,
    hand_over_path,
    peer_credentials,
    remove_dead_sockets,
    runtime_directory,
)
from stickyproxy.errors import UsageError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be, or make files of, another user")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a short directory: the path of a Unix socket has at most 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="sp-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setattr(runtime, "_SERVICE_DIRECTORY", directory / "no-service")


def make_dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.bind(str(path))


# Where


@pytest.mark.parametrize("more", ["", ":/run/other"])
def test_systemd_says_it_first(monkeypatch: pytest.MonkeyPatch, directory: Path, more: str) -> None:
    (directory / "systemd").mkdir(mode=0o755)
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{directory}/systemd{more}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    assert runtime_directory() == directory / "systemd"
    assert control_path(12) == directory / "systemd/12.control"
    assert hand_over_path(12) == directory / "systemd/12.hand-over"


def test_then_the_base_directory_for_what_runs(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    assert runtime_directory() == directory / "stickyproxy"
    assert stat.S_IMODE((directory / "stickyproxy").stat().st_mode) == 0o700


@pytest.mark.parametrize("value", [None, "", "relative", "/nowhere/at/all"])
def test_then_a_private_directory_among_temporary_files(
    monkeypatch: pytest.MonkeyPatch, directory: Path, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    expected = directory / f"stickyproxy-{os.geteuid()}"
    before = os.umask(0)
    try:
        assert runtime_directory() == expected
    finally:
        os.umask(before)
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700
    assert runtime_directory() == expected


def test_a_base_directory_whose_sockets_would_have_too_long_paths_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    longest = 107 - len("/stickyproxy/4194304.hand-over")
    for length, is_used in ((longest, True), (longest + 1, False)):
        base = directory / ("b" * (length - len(str(directory)) - 1))
        base.mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        assert (runtime_directory() == base / "stickyproxy") is is_used
    bind_private(directory / f"{'b' * (longest - len(str(directory)) - 1)}/stickyproxy/4194304.hand-over").close()


@as_root
def test_the_base_directory_of_another_user_is_passed_over(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    base = directory / "other"
    base.mkdir()
    os.chown(base, 12345, -1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    assert runtime_directory() == directory / f"stickyproxy-{os.geteuid()}"


# Whose


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777, 0o1777])
def test_a_directory_that_others_may_open_is_refused(directory: Path, mode: int) -> None:
    path = directory / f"stickyproxy-{os.geteuid()}"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(UsageError, match=rf"{path} is open to others \(mode {mode:04o}\); remove it, or set XDG_RUN"):
        runtime_directory()


@as_root
def test_a_directory_of_another_user_is_refused(directory: Path) -> None:
    path = directory / f"stickyproxy-{os.geteuid()}"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)
    with pytest.raises(UsageError, match=r"belongs to another user \(uid 12345\); remove it, or set XDG_RUNTIME_DIR"):
        runtime_directory()
    with pytest.raises(UsageError, match="belongs to another user"):
        find_control()


@pytest.mark.parametrize("what", ["link", "dangling", "file"])
def test_what_is_no_directory_is_refused(directory: Path, what: str) -> None:
    path = directory / f"stickyproxy-{os.geteuid()}"
    if what == "file":
        path.touch(mode=0o600)
    else:
        path.symlink_to(directory / "target")
    if what == "link":
        (directory / "target").mkdir(mode=0o700)
    with pytest.raises(UsageError, match="is no directory; remove it"):
        runtime_directory()


def test_a_directory_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/proc/stickyproxy")
    with pytest.raises(UsageError, match=r"cannot make the runtime directory /proc/stickyproxy: no such file"):
        runtime_directory()


# Binding


def test_a_private_socket_listens_and_is_its_owners_alone(directory: Path) -> None:
    path = directory / "s"
    before = os.umask(0)
    try:
        with bind_private(path) as link, socket.socket(socket.AF_UNIX) as client:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert link.getblocking() is False
            assert link.get_inheritable() is False
            client.connect(str(path))
            accepted, _ = link.accept()
            accepted.close()
    finally:
        os.umask(before)


def test_a_private_socket_is_so_from_its_first_moment(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode right after the bind, when it does not even listen."""
    path, seen = directory / "s", []

    class Watched(socket.socket):
        @override
        def bind(self, address: Any) -> None:
            super().bind(address)
            seen.append(stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        with Watched(socket.AF_UNIX) as plain:  # the control: without care it is open to all
            plain.bind(str(path))
        bind_private(path).close()
    finally:
        os.umask(before)
    assert seen == [0o777, 0o600]


def test_elsewhere_the_umask_makes_it_private(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    before = os.umask(0o002)
    try:
        with bind_private(directory / "s"):
            assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o600
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)


def test_the_file_of_a_dead_process_is_replaced(directory: Path) -> None:
    path = directory / "s"
    make_dead(path)
    with bind_private(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_living_process_keeps_its_socket(directory: Path) -> None:
    path = directory / "s"
    with bind_private(path) as link, socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(UsageError, match=f"cannot listen on {path}: another process listens there"):
            bind_private(path)
        with pytest.raises(BlockingIOError):
            link.accept()  # it has heard nothing of it
        client.connect(str(path))


def test_a_living_process_that_accepts_nobody_is_not_waited_for(directory: Path) -> None:
    path = directory / "s"
    with socket.socket(socket.AF_UNIX) as link, socket.socket(socket.AF_UNIX) as client:
        link.bind(str(path))
        link.listen(0)
        client.connect(str(path))  # the queue is full
        with pytest.raises(UsageError, match="another process listens there"):
            bind_private(path)


@pytest.mark.parametrize("what", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(directory: Path, what: str) -> None:
    path = directory / "s"
    if what == "file":
        path.write_text("precious")
    elif what == "directory":
        path.mkdir()
    else:
        make_dead(directory / "target")
        path.symlink_to(directory / "target")
    with pytest.raises(UsageError, match="a file that is no socket is in its place"):
        bind_private(path)
    assert path.exists()


def test_errors_are_for_the_operator(directory: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on .*/none/s: no such file or directory"):
        bind_private(directory / "none" / "s")
    with pytest.raises(UsageError, match=r"the path has more than 107 bytes"):
        bind_private(directory / ("s" * 107))


def test_no_descriptor_is_left_by_a_failure(directory: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(UsageError):
            bind_private(directory / "none" / "s")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def race(path: Path) -> int:
    """Let several bind to the path of a dead process at once; return how many believe that they have it."""
    make_dead(path)
    barrier = threading.Barrier(4)
    bound: list[socket.socket] = []

    def start() -> None:
        barrier.wait()
        with suppress(UsageError):
            bound.append(bind_private(path))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in bound:
        link.close()
    path.unlink()
    return len(bound)


def test_of_all_who_start_at_once_one_wins(directory: Path) -> None:
    assert {race(directory / "s") for _ in range(100)} == {1}


def test_a_lock_that_is_held_for_long_is_not_waited_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_LOCK_TRIES", 2)
    holder = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        bind_private(directory / "s").close()
    finally:
        os.close(holder)


# Finding


def test_without_a_proxy_the_place_is_named(directory: Path) -> None:
    expected = directory / f"stickyproxy-{os.geteuid()}"
    with pytest.raises(UsageError) as caught:
        find_control()
    assert str(caught.value) == f"no proxy is running (no control socket in {expected}); name it by --control PATH"
    assert not expected.exists()


def test_the_one_that_runs_is_found() -> None:
    with bind_private(control_path(12)), bind_private(hand_over_path(12)):
        assert find_control() == control_path(12)


def test_dead_ones_are_removed_and_others_files_are_not() -> None:
    directory = runtime_directory()
    for path in (control_path(1), control_path(2), hand_over_path(2), hand_over_path(3)):
        make_dead(path)
    kept = ["secret", "x.control", "3.controlled", "3.control.old", "4.control"]
    for name in kept[:2]:
        (directory / name).touch()
    for name in kept[2:4]:
        make_dead(directory / name)
    (directory / "4.control").write_text("a file, to which nobody can connect either")
    with bind_private(control_path(12)):
        assert find_control() == control_path(12)
        assert sorted(path.name for path in directory.iterdir()) == sorted([*kept, "12.control"])


def test_what_dead_ones_left_is_removed_and_living_ones_hear_nothing_of_it() -> None:
    directory = runtime_directory()
    for path in (control_path(1), hand_over_path(1), hand_over_path(3)):
        make_dead(path)
    (directory / "4.control").touch()
    with bind_private(control_path(12)) as control, bind_private(hand_over_path(12)) as hand_over:
        remove_dead_sockets(directory)
        assert sorted(path.name for path in directory.iterdir()) == ["12.control", "12.hand-over", "4.control"]
        for link in (control, hand_over):
            with pytest.raises(BlockingIOError):
                link.accept()
    remove_dead_sockets(directory / "gone")


def test_several_are_named() -> None:
    with bind_private(control_path(9)), bind_private(control_path(12)), pytest.raises(UsageError) as caught:
        find_control()
    assert str(caught.value) == (
        f"2 proxies are running; name one by --control PATH: {control_path(9)} (pid 9), {control_path(12)} (pid 12)"
    )


def test_the_service_of_the_system_is_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = directory / "service"
    service.mkdir(mode=0o755)
    monkeypatch.setattr(runtime, "_SERVICE_DIRECTORY", service)
    with pytest.raises(UsageError, match=rf"no control socket in {runtime_directory()} or {service}\)"):
        find_control()
    with bind_private(service / "7.control"):
        assert find_control() == service / "7.control"
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(service))  # as for the commands of its own unit
        assert find_control() == service / "7.control"


def test_one_that_does_not_listen_yet_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command looks for proxies in the moment between bind and listen of one."""
    path, started, found = control_path(12), threading.Event(), []

    def look() -> None:
        started.set()
        found.append(find_control())

    looking = threading.Thread(target=look)

    class Slow(socket.socket):
        @override
        def listen(self, backlog: int = 0) -> None:
            looking.start()
            started.wait()
            looking.join(0.2)  # it cannot end before this has listened: it waits for the lock
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Slow)
    with bind_private(path):
        looking.join()
        assert path.exists()
    assert found == [path]


# Who has connected


def test_who_has_connected_is_known(directory: Path) -> None:
    path = directory / "s"
    program = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.recv(1)"
    with bind_private(path) as link:
        link.setblocking(True)
        with subprocess.Popen([sys.executable, "-c", program]) as child:
            accepted, _ = link.accept()
            with accepted:
                assert peer_credentials(accepted) == Peer(child.pid, os.geteuid(), os.getegid())
                assert check_peer(accepted).pid == child.pid


@as_root
@pytest.mark.parametrize(("uid", "is_welcome"), [(0, True), (12345, False), (4_294_967_294, False)])
def test_other_users_are_refused(directory: Path, uid: int, is_welcome: bool) -> None:  # noqa: FBT001
    path = directory / "s"
    directory.chmod(0o755)
    program = (
        f"import os, socket; os.setuid({uid}); s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); s.recv(1)"
    )
    with bind_private(path) as link:
        path.chmod(0o666)
        link.settimeout(30)
        with subprocess.Popen([sys.executable, "-c", program]) as child:
            accepted, _ = link.accept()
            with accepted:
                if is_welcome:
                    assert check_peer(accepted).uid == uid
                else:
                    with pytest.raises(ForeignPeerError, match=f"process {child.pid} of uid {uid} has connected"):
                        check_peer(accepted)


def test_root_and_the_own_user_are_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with one, other:
        for uid, is_welcome in ((0, True), (1000, True), (1001, False)):
            with monkeypatch.context() as patched:
                patched.setattr(runtime, "peer_credentials", lambda _, uid=uid: Peer(1, uid, uid))
                patched.setattr(os, "geteuid", lambda: 1000)
                if is_welcome:
                    check_peer(one)
                else:
                    with pytest.raises(ForeignPeerError, match="only uid 1000 may"):
                        check_peer(one)


class BsdSocket:
    """Answers as the sockets of BSD do."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (0, 1)
        return self._answer[:size]


def test_the_answer_of_bsd_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_PEERCRED")
    # struct xucred: version, uid, number of groups, padding, 16 groups
    answer = struct.pack("=IIhxx16I", 0, 501, 2, 20, 12, *[0] * 14)
    assert peer_credentials(cast("socket.socket", BsdSocket(answer))) == Peer(0, 501, 20)
    with pytest.raises(ForeignPeerError, match="the system does not say"):
        check_peer(cast("socket.socket", BsdSocket(b"")))


def test_a_socket_of_another_kind_has_no_peer() -> None:
    class Closed:
        def getsockopt(self, *_: int) -> bytes:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with pytest.raises(ForeignPeerError, match="cannot see who has connected: transport endpoint is not connected"):
        check_peer(cast("socket.socket", Closed()))
