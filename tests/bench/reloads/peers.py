"""The proxies: for each its command, and its documented ways to take a new configuration or a new executable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from tests.bench.programs import ROOT, path_of
from tests.bench.reloads.settings import (
    Setting,
    caddy_text,
    control_path,
    haproxy_text,
    nginx_text,
    stickyproxy_text,
    writer,
)
from tests.bench.results import RunError
from tests.bench.targets import Site, environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.reloads.family import Family

_COMMAND_TIMEOUT_S: Final = 60.0
_NEW_MASTER_TIMEOUT_S: Final = 5.0
_AWAY_S: Final = 0.5  # of the killed control
_POLL_S: Final = 0.02
_NO_SUCH_COMMAND: Final = 2


class Kind(Enum):
    """What an operation is for; a limit is tried with one operation only, and so is a control."""

    RELOAD = "reload"
    LIMIT = "limit"
    UPGRADE = "upgrade"
    CONTROL = "control"


@dataclass(frozen=True)
class Stage:
    """One running proxy: where it listens, and its processes."""

    site: Site
    family: Family


@dataclass(frozen=True)
class Operation:
    """One thing that an operator does to a running proxy, after the new configuration was written."""

    kind: Kind
    title: str
    act: Callable[[Stage], None]
    extra: str = ""


@dataclass(frozen=True)
class Peer:
    """One proxy. `shows_generation`: its responses carry the header; else the operation's own answer is believed.

    `pid_file`: where it writes the id of the process that it goes to the background as.
    """

    name: str
    write: Callable[[Site, Setting], object]
    command: Callable[[Site], list[str]]
    operations: tuple[Operation, ...]
    shows_generation: bool = True
    pid_file: str = ""


def _own_copy(site: Site, name: str) -> str:
    """Return a copy of a program, which an upgrade can replace."""
    file = site.directory / "bin" / name
    if not file.exists():
        replace_program(site, name)
    return str(file)


def replace_program(site: Site, name: str) -> None:
    """Put a new file in the place of the copy, as an installation does."""
    directory = site.directory / "bin"
    directory.mkdir(exist_ok=True)
    shutil.copy2(path_of(name), directory / f"{name}.new")
    (directory / f"{name}.new").replace(directory / name)


def _haproxy(site: Site) -> list[str]:
    return [
        _own_copy(site, "haproxy"),
        "-W",
        "-S",
        str(site.directory / "master"),
        "-f",
        str(site.directory / "haproxy.cfg"),
    ]


def _nginx(site: Site) -> list[str]:
    return [_own_copy(site, "nginx"), "-e", "stderr", "-c", str(site.directory / "nginx.conf")]


def _caddy(site: Site) -> list[str]:
    return [path_of("caddy"), "run", "--config", str(site.directory / "Caddyfile"), "--adapter", "caddyfile"]


def _stickyproxy(site: Site) -> list[str]:
    return [sys.executable, "-m", "stickyproxy", "serve", "--config", str(site.directory / "stickyproxy.yaml")]


def _signal_haproxy(stage: Stage) -> None:
    os.kill(stage.family.main.pid, signal.SIGUSR2)


def _upgrade_haproxy(stage: Stage) -> None:
    replace_program(stage.site, "haproxy")
    _signal_haproxy(stage)


def _nginx_master(site: Site) -> int:
    with suppress(OSError, ValueError):  # while it is renamed
        return int((site.directory / "nginx.pid").read_text())
    return 0


def _reload_nginx(stage: Stage) -> None:
    os.kill(_nginx_master(stage.site), signal.SIGHUP)


def _upgrade_nginx(stage: Stage) -> None:
    """Do what "Upgrading Executable on the Fly" of nginx's documentation says."""
    replace_program(stage.site, "nginx")
    old = _nginx_master(stage.site)
    os.kill(old, signal.SIGUSR2)
    deadline = time.monotonic() + _NEW_MASTER_TIMEOUT_S
    while _nginx_master(stage.site) in {0, old}:
        if time.monotonic() > deadline:
            raise RunError("the master started no new one")
        time.sleep(_POLL_S)
    os.kill(old, signal.SIGWINCH)
    os.kill(old, signal.SIGQUIT)


def _reload_caddy(stage: Stage) -> None:
    config = str(stage.site.directory / "Caddyfile")
    address = f"127.0.0.1:{stage.site.admin_port}"
    _run([path_of("caddy"), "reload", "--config", config, "--adapter", "caddyfile", "--address", address], stage.site)


def _restart(stage: Stage) -> None:
    stage.family.end()
    stage.family.start()


def _ask_stickyproxy(command: str) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        words = [sys.executable, "-m", "stickyproxy", command, "--control", str(control_path(stage.site))]
        _run(words, stage.site)

    return act


def _run(command: list[str], site: Site) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        check=False,
        cwd=site.directory,
        env={**os.environ, **environment(site.directory)},
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
    )
    if done.returncode:
        raise RunError(f"{command[0]}: exit {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")


def _do_nothing(_: Stage) -> None:
    """Leave the proxy as it is."""


def _kill(stage: Stage) -> None:
    """Kill it, and start it again after half a second: requests come meanwhile."""
    stage.family.end(signal.SIGKILL)
    time.sleep(_AWAY_S)
    stage.family.start()


CONTROLS: Final = (
    Operation(Kind.CONTROL, "control: nothing is done", _do_nothing),
    Operation(Kind.CONTROL, "control: SIGKILL, started again", _kill),
)


def lacking_commands() -> list[str]:
    """Return which commands of stickyproxy this version does not have."""
    lacking = []
    for command in ("reload", "upgrade"):
        words = [sys.executable, "-m", "stickyproxy", command, "--help"]
        done = subprocess.run(words, capture_output=True, check=False, cwd=ROOT, timeout=_COMMAND_TIMEOUT_S)
        if done.returncode == _NO_SUCH_COMMAND:
            lacking.append(command)
    return lacking


def with_limit(peer: Peer, limit_s: float) -> Peer:
    """Return a peer whose limits are `limit_s` long in place of the 5 s that stand here."""
    operations = (
        replace(one, title=one.title.replace(" 5s", f" {limit_s:g}s"), extra=one.extra.replace(" 5s", f" {limit_s:g}s"))
        for one in peer.operations
    )
    return replace(peer, operations=tuple(operations))


PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer(
            "haproxy",
            writer("haproxy.cfg", haproxy_text),
            _haproxy,
            (
                Operation(Kind.RELOAD, "reload: SIGUSR2 to the master", _signal_haproxy),
                Operation(Kind.LIMIT, "reload, hard-stop-after 5s", _signal_haproxy, "hard-stop-after 5s"),
                Operation(Kind.UPGRADE, "upgrade: new executable, SIGUSR2", _upgrade_haproxy),
            ),
        ),
        Peer(
            "nginx",
            writer("nginx.conf", nginx_text),
            _nginx,
            (
                Operation(Kind.RELOAD, "reload: SIGHUP", _reload_nginx),
                Operation(
                    Kind.LIMIT, "reload, worker_shutdown_timeout 5s", _reload_nginx, "worker_shutdown_timeout 5s;"
                ),
                Operation(Kind.UPGRADE, "upgrade: new executable, SIGUSR2, SIGWINCH, SIGQUIT", _upgrade_nginx),
            ),
            pid_file="nginx.pid",
        ),
        Peer(
            "caddy",
            writer("Caddyfile", caddy_text),
            _caddy,
            (
                Operation(Kind.RELOAD, "reload: caddy reload", _reload_caddy),
                Operation(Kind.RELOAD, "reload, stream_close_delay 1h", _reload_caddy, "stream_close_delay 1h"),
                Operation(Kind.LIMIT, "reload, stream_close_delay 5s", _reload_caddy, "stream_close_delay 5s"),
                Operation(Kind.LIMIT, "reload, grace_period 5s", _reload_caddy, "grace_period 5s"),
                Operation(Kind.UPGRADE, "upgrade: SIGTERM, started again", _restart),
            ),
        ),
        Peer(
            "stickyproxy",
            writer("stickyproxy.yaml", stickyproxy_text),
            _stickyproxy,
            (
                Operation(Kind.RELOAD, "reload: stickyproxy reload", _ask_stickyproxy("reload")),
                Operation(Kind.UPGRADE, "upgrade: stickyproxy upgrade", _ask_stickyproxy("upgrade")),
            ),
            shows_generation=False,
        ),
    )
}
