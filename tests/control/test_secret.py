"""The secret in the state directory: made once, whole or not at all, for one pair of eyes."""

import errno
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest

from stickyproxy.control.secret import load_or_make_secret, load_secret, state_directory
from stickyproxy.errors import UsageError

LONG = b"s" * 32


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


# Where


def test_the_configured_directory_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/stickyproxy")
    assert state_directory(Path("/somewhere")) == Path("/somewhere")


@pytest.mark.parametrize("value", ["/var/lib/stickyproxy", "/var/lib/stickyproxy:/var/lib/other"])
def test_then_comes_what_systemd_says(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", value)
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert state_directory(None) == Path("/var/lib/stickyproxy")


def test_then_the_base_directory_for_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert state_directory(None) == Path("/xdg/stickyproxy")


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_then_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("XDG_STATE_HOME", value)
    assert state_directory(None) == tmp_path / ".local/state/stickyproxy"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(UsageError, match=r"no home directory: set state_directory or affinity\.secrets"):
        state_directory(None)
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert state_directory(None) == Path("/xdg/stickyproxy")


# Making it


def test_it_is_made_once_and_for_its_owner_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    directory = tmp_path / "new" / "state"
    made = load_or_make_secret(directory)
    assert len(made) >= 32
    assert load_or_make_secret(directory) == made
    [path] = directory.iterdir()
    assert path.name == "secret"
    assert path.read_bytes() == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    [message] = caplog.messages
    assert message.startswith(f"made a secret in {path}")
    assert made.decode() not in message


def test_two_directories_have_two_secrets(tmp_path: Path) -> None:
    assert load_or_make_secret(tmp_path / "a") != load_or_make_secret(tmp_path / "b")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_one_that_is_there_is_used_without_its_line_end(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "secret").write_bytes(LONG + end)
    assert load_or_make_secret(tmp_path) == LONG


def test_all_who_start_at_once_use_the_same(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    found: list[bytes] = []

    def start() -> None:
        barrier.wait()
        found.append(load_or_make_secret(tmp_path / "state"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secret"]


def test_one_that_another_proxy_makes_meanwhile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def be_late(draft: Any, path: Path) -> None:
        path.write_bytes(LONG)
        link(draft, path)

    monkeypatch.setattr(os, "link", be_late)
    assert load_or_make_secret(tmp_path) == LONG
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


# When it cannot be


@pytest.mark.parametrize("what", ["open", "link"])
def test_a_directory_that_cannot_be_written_costs_only_the_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, what, fail)
        made = load_or_make_secret(tmp_path)
    assert len(made) >= 32
    [message] = caplog.messages
    assert message == (
        f"cannot keep a secret in {tmp_path} (No space left on device): pins will not outlive this process; "
        "set affinity.secrets"
    )
    assert list(tmp_path.iterdir()) == []
    assert load_or_make_secret(tmp_path) != made


def test_a_directory_that_cannot_be_made(caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_or_make_secret(Path("/proc/stickyproxy"))) >= 32
    assert "cannot keep a secret in /proc/stickyproxy" in caplog.text


def test_a_draft_that_is_half_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fdopen = os.fdopen

    class Full:
        """A file on a disk that is full."""

        def __init__(self, descriptor: int, mode: str) -> None:
            self._file = fdopen(descriptor, mode)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, _: bytes) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", Full)
    assert len(load_or_make_secret(tmp_path)) >= 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\n", b"s" * 31, b"s" * 31 + b"\n"])
def test_one_that_is_too_short_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(UsageError, match=rf"secret is too short \({len(content.rstrip())} bytes\): remove the file"):
        load_or_make_secret(tmp_path)
    assert (tmp_path / "secret").read_bytes() == content


def test_one_that_cannot_be_read_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    with pytest.raises(UsageError, match=r"cannot read the secret .*: is a directory"):
        load_or_make_secret(tmp_path)


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot read the secret .*: not a directory"):
        load_or_make_secret(tmp_path / "state")


@pytest.mark.parametrize("link", ["secret", "."])
def test_a_link_that_leads_nowhere(tmp_path: Path, link: str) -> None:
    directory = tmp_path / "state"
    if link == "secret":
        directory.mkdir()
        (directory / link).symlink_to(tmp_path / "nowhere" / "secret")
    else:
        directory.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="a link that leads nowhere"):
        load_or_make_secret(directory)


# Only looking


def test_one_that_is_there_is_loaded(tmp_path: Path) -> None:
    made = load_or_make_secret(tmp_path)
    assert load_secret(tmp_path) == (made,)


def test_one_is_looked_for_where_it_would_be_made(tmp_path: Path) -> None:
    made = load_or_make_secret(state_directory(None))
    assert (load_secret(None), load_secret(tmp_path / "elsewhere")) == ((made,), ())


def test_looking_makes_none(tmp_path: Path) -> None:
    assert load_secret(tmp_path / "state") == ()
    assert list(tmp_path.iterdir()) == []


def test_what_is_found_and_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(UsageError, match="is too short"):
        load_secret(tmp_path)
    with pytest.raises(UsageError, match=r"cannot read the secret .*: not a directory"):
        load_secret(tmp_path / "secret")
