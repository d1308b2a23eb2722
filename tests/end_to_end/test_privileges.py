"""What a process of the proxy may do: all of its work as the image's user, without a privilege, in two directories.

The container is made here of what it consists of: a mount namespace in which everything is read-only but the state and
the runtime directory, the image's user and environment, no capability, and no way to get one.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from stickyproxy.config import Address
from tests.bench.process import process_tree
from tests.helpers.plain_client import PlainClient
from tests.helpers.processes import Child, Children, free_port
from tests.helpers.supervised import App, Tunnel, is_running, kill, open_tunnel, read_metric, until

UID = 10001
OTHER_UID = 10002
DEADLINE_S = 60
ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROXY = (sys.executable, "-m", "stickyproxy")
UNPRIVILEGED = "--clear-groups --inh-caps=-all --ambient-caps=-all --bounding-set=-all --no-new-privs"
READ_ONLY = """\
while read -r _ _ _ _ at options _; do
  case "$options" in ro|ro,*) continue;; esac
  case "$at" in /proc|{writable}) continue;; esac
  mount -o remount,bind,ro "$at"
done < /proc/self/mountinfo"""
CHANGES = (
    "open openat openat2 creat mkdir mkdirat mknod mknodat link linkat symlink symlinkat rename renameat renameat2"
)
CHANGES += " unlink unlinkat rmdir truncate chmod fchmodat chown lchown fchownat bind"


@dataclass
class Place:
    """The directories of one container: `state` and `runtime` are its user's, all below is gone in the end."""

    directory: Path
    umask: str = "077"
    writable: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.chmod(0o755)
        for path in (self.state, self.runtime):
            path.mkdir(mode=0o700)
            os.chown(path, UID, UID)
            self.writable.append(path)

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def runtime(self) -> Path:
        return self.directory / "run"

    @property
    def environment(self) -> dict[str, str]:
        return {"STATE_DIRECTORY": str(self.state), "RUNTIME_DIRECTORY": str(self.runtime)}

    def confine(
        self, program: Sequence[str | Path], environment: Mapping[str, str] | None = None, uid: int = UID
    ) -> list[str]:
        """Return the command that runs a program in the container; there is nothing else in its environment."""
        environment = self.environment if environment is None else environment
        variables = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), **environment}
        words = [*(f"{name}={value}" for name, value in variables.items()), *map(str, program)]
        setpriv = f"setpriv --reuid={uid} --regid={uid} {UNPRIVILEGED}"
        lines = ["set -eu", *self._mount(), f"umask {self.umask}", f"exec {setpriv} env -i {shlex.join(words)}"]
        return ["unshare", "--mount", "sh", "-c", "\n".join(lines)]

    def _mount(self) -> Iterator[str]:
        """Give the lines of a shell that make all mounts read-only, and the interpreter visible to other users."""
        stage = Path(tempfile.mkdtemp(dir=self.directory))
        for hidden, paths in find_hidden({Path(sys.base_prefix), Path(sys.prefix), ROOT}).items():
            for number, path in enumerate(paths):
                (stage / str(number)).mkdir()
                yield f"mount --rbind {path} {stage}/{number}"
            yield f"mount -t tmpfs -o mode=0755 tmpfs {hidden}"
            for number, path in enumerate(paths):
                yield f"mkdir -p {path} && mount --move {stage}/{number} {path}"
        for path in self.writable:
            yield f"mount --bind {path} {path}"
        yield READ_ONLY.format(writable="|".join(map(str, self.writable)) or "/proc")


def find_hidden(paths: set[Path]) -> dict[Path, list[Path]]:
    """Return the directories that other users cannot enter, each with what of `paths` is in it."""
    found: dict[Path, list[Path]] = {}
    for path in sorted(paths):
        for above in reversed(path.parents):
            if not above.stat().st_mode & stat.S_IXOTH:
                found.setdefault(above, []).append(path)
                break
    return found


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False)


@cache
def why_not() -> str:
    """Return why the container cannot be made here; empty if it can."""
    if os.geteuid() != 0:
        return "only root can become another user and make mounts"
    if lacking := [one for one in ("unshare", "setpriv", "mount") if shutil.which(one) is None]:
        return f"no {', '.join(lacking)} (Debian: util-linux, mount)"
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        result = run(Place(Path(folder)).confine([sys.executable, "-c", ""]))
    return f"root may not make mounts here: {result.stderr.strip()[-300:]}" if result.returncode else ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can be")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace (Debian: strace)")


@pytest.fixture
def place() -> Iterator[Place]:
    """Give a container whose paths are short: that of a Unix socket has at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="sp-"))
    yield Place(directory)
    shutil.rmtree(directory)


@pytest.fixture
def children(place: Place) -> Iterator[Children]:
    with Children(place.directory) as children:
        yield children


@pytest_asyncio.fixture
async def app() -> AsyncIterator[App]:
    app = await App("app").start()
    yield app
    app.stop()


class Container:
    """A proxy with two workers in a container; `prefix` is a command that runs it, `more` stands behind `serve`."""

    def __init__(
        self, place: Place, children: Children, app: App, name: str = "proxy", prefix: Sequence[str | Path] = ()
    ) -> None:
        self.place, self.name, self._children = place, name, children
        self.prefix = prefix
        self.port, self.admin = free_port(), Address("127.0.0.1", free_port())
        self.file = place.directory / f"{name}.yaml"
        self.sections: dict[str, Any] = {
            "listeners": [f"127.0.0.1:{self.port}"],
            "upstreams": [app.upstream],
            "admin": {"address": str(self.admin)},
            "grace": "10s",
            "workers": 2,
        }
        self.write()
        self.child: Child

    def write(self, **sections: Any) -> None:
        """Write the file with other sections."""
        self.sections |= sections
        self.file.write_text(yaml.safe_dump(self.sections))
        self.file.chmod(0o644)

    def begin(self, *options: str | Path, environment: Mapping[str, str] | None = None, uid: int = UID) -> None:
        """Start it."""
        command = self.place.confine([*PROXY, "serve", "--config", self.file, *options], environment, uid)
        self.child = self._children.start(self.name, [*self.prefix, *command])

    async def start(self, *options: str | Path, environment: Mapping[str, str] | None = None) -> "Container":
        """Start it, and wait until it serves."""
        self.begin(*options, environment=environment)
        await until(lambda: "serving 1 upstreams" in self.log or not self.child.is_running(), "it serves")
        assert self.child.is_running(), self.log
        return self

    @property
    def log(self) -> str:
        return self.child.log.read_text()

    @property
    def control(self) -> Path:
        return self.place.runtime / f"{self.child.pid}.control"

    @property
    def hand_over(self) -> Path:
        return self.place.runtime / f"{self.child.pid}.hand-over"

    def workers(self) -> set[int]:
        """Return the processes that serve."""
        return {pid for pid in process_tree(self.child.pid) if b"worker_process" in read(pid, "cmdline")}

    async def command(
        self, *words: str | Path, uid: int = UID, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the proxy as a user, in a container that shares these directories; root: without one."""
        if uid == 0:
            return await asyncio.to_thread(run, [*PROXY, *words], {**os.environ, "PYTHONPATH": str(ROOT)})
        return await asyncio.to_thread(run, self.place.confine([*PROXY, *words], environment, uid))

    async def ask(self) -> None:
        """Ask over a connection of its own."""
        async with await PlainClient.connect(self.port) as client:
            answer = await client.ask("/")
        assert (answer.status, answer.body) == (200, b"app")

    async def reload(self, **sections: Any) -> str:
        self.write(**sections)
        done = await self.command("reload")
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def upgrade(self) -> None:
        """Upgrade, and see that other workers serve for the same process."""
        before = self.workers()
        done = await self.command("upgrade")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("upgraded from version "), done.stdout
        assert self.child.is_running()
        await until(lambda: len(self.workers()) == 2 and not self.workers() & before, "the old workers have ended")

    async def lose_a_worker(self) -> None:
        """Kill a worker, and wait until another one is in its place."""
        before, count = self.workers(), self.log.count(" is back (pid ")
        victim = min(before)
        kill(victim)
        await until(lambda: self.log.count(" is back (pid ") > count, "there are two workers again")
        assert not is_running(victim)
        assert len(self.workers()) == 2
        assert len(self.workers() & before) == 1

    async def end(self) -> int:
        """Wait for its end; return the exit status."""
        return await asyncio.to_thread(self.child.wait)

    async def stop(self) -> None:
        workers = self.workers()
        os.kill(self.child.pid, signal.SIGTERM)
        assert await self.end() == 0, self.log
        assert not [pid for pid in workers if is_running(pid)]


def read(pid: int, name: str) -> bytes:
    """Return what /proc says of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def make(place: Place, children: Children, app: App, name: str = "proxy") -> Container:
    return Container(place, children, app, name)


def describe(path: Path) -> tuple[str, int]:
    """Return the mode of a file as `ls` shows it, and its owner."""
    found = path.lstat()
    return stat.filemode(found.st_mode), found.st_uid


# The container


def test_the_image_is_what_is_tested_here() -> None:
    assert re.search(rf"^USER {UID}:{UID}$", DOCKERFILE, re.MULTILINE)  # by number, as runAsNonRoot asks for it
    (volumes,) = re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)
    directories = {name: re.search(rf"\b{name}=(\S+)", DOCKERFILE) for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY")}
    assert [found and found[1] for found in directories.values()] == json.loads(volumes)
    assert not re.search(r"^ENV .*\b(HOME|XDG_\w+)=", DOCKERFILE, re.MULTILINE)


TRY = """
import json, os, sys
tried = {}
for path in sys.argv[1:]:
    try:
        open(path + "/file", "w").close()
        tried[path] = "written"
    except OSError as error:
        tried[path] = os.strerror(error.errno)
print(json.dumps(tried))
"""
ELSEWHERE = ("/etc", "/tmp", "/var/tmp", "/dev/shm", "/run", "/var/lib", str(ROOT), sys.prefix)  # noqa: S108


def test_nothing_else_can_be_written_there(place: Place) -> None:
    """By root neither, whose container differs in nothing but the user: it is not the modes that forbid it."""
    for uid in (UID, 0):
        done = run(place.confine([sys.executable, "-c", TRY, *ELSEWHERE, *map(str, place.writable)], uid=uid))
        tried = json.loads(done.stdout)
        own = {tried.pop(str(one)) for one in place.writable}
        assert own == {"written" if uid == UID else "Permission denied"}
        assert tried == dict.fromkeys(ELSEWHERE, "Read-only file system")


# What it does there


@pytest.mark.parametrize("umask", ["077", "000"])
async def test_it_serves_without_a_privilege(place: Place, children: Children, app: App, umask: str) -> None:
    place.umask = umask
    proxy = await make(place, children, app).start()
    await proxy.ask()
    tunnel = await open_tunnel(proxy.port)
    async with tunnel.client:
        await tunnel.echo()
    assert len(proxy.workers()) == 2
    for pid in {proxy.child.pid, *proxy.workers()}:
        status = dict(re.findall(r"^(\w+):[ \t]*(.*?) *$", read(pid, "status").decode(), re.MULTILINE))
        assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
        assert [status["Groups"], status["NoNewPrivs"], int(status["Umask"], 8)] == ["", "1", int(umask, 8)]
        capabilities = {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")}
        assert capabilities == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
        assert b"HOME=" not in read(pid, "environ")
    assert describe(proxy.control) == describe(proxy.hand_over) == ("srw-------", UID)
    assert describe(place.state / "secret") == ("-rw-------", UID)
    await proxy.stop()
    assert [path.name for path in place.state.iterdir()] == ["secret"]
    assert list(place.runtime.iterdir()) == []
    assert " WARNING " not in proxy.log


async def test_it_reloads_and_upgrades(place: Place, children: Children, app: App) -> None:
    proxy = await make(place, children, app).start()
    tunnel = await open_tunnel(proxy.port)
    async with tunnel.client:
        assert "grace: 10s -> 9s" in await proxy.reload(grace="9s")
        await proxy.upgrade()
        await tunnel.echo()
        await proxy.ask()
        assert describe(proxy.control) == ("srw-------", UID)
        assert await read_metric(proxy.admin, "upgrades_total", outcome="ok") == 1
    await proxy.stop()


async def test_a_worker_that_is_killed_is_replaced(place: Place, children: Children, app: App) -> None:
    proxy = await make(place, children, app).start()
    await proxy.lose_a_worker()
    await proxy.ask()
    assert await read_metric(proxy.admin, "worker_restarts_total") == 1
    await proxy.stop()


async def take_over(old: Container, new: Container, tunnel: Tunnel) -> None:
    """Let a proxy take the place of another one, whose client it then serves."""
    await new.start("--take-over", old.hand_over)
    assert await old.end() == 0, old.log
    await tunnel.echo()
    assert not old.control.exists()
    assert describe(new.control) == ("srw-------", UID)


async def test_another_one_takes_over(place: Place, children: Children, app: App) -> None:
    old, new = make(place, children, app), make(place, children, app, "new")
    new.port = old.port
    new.write(listeners=old.sections["listeners"])
    await old.start()
    tunnel = await open_tunnel(old.port)
    async with tunnel.client:
        await take_over(old, new, tunnel)
        await new.ask()
    await new.stop()


# Who may command it


@pytest.mark.parametrize("is_open", [False, True], ids=["as it is", "with sockets open to all"])
async def test_another_user_cannot_command_it(
    place: Place,
    children: Children,
    app: App,
    is_open: bool,  # noqa: FBT001
) -> None:
    proxy = await make(place, children, app).start()
    proxy.write(grace="9s")
    if is_open:  # so that it is not the modes that keep others out
        place.runtime.chmod(0o755)
        proxy.control.chmod(0o666)
        proxy.hand_over.chmod(0o666)
    reload, upgrade, found, taken = [
        await proxy.command(*words, uid=OTHER_UID)
        for words in (
            ("reload", "--control", proxy.control),
            ("upgrade", "--control", proxy.control),
            ("reload",),
            ("serve", "--config", proxy.file, "--take-over", proxy.hand_over),
        )
    ]
    if is_open:
        words = [rf"process [0-9]+ of uid {OTHER_UID} has connected; only uid {UID} may"] * 3
        taken_because = f".*; only uid {OTHER_UID} may"  # it takes no place of another user's, either
        assert "hand-over refused: process " in proxy.log
    else:
        refused = re.escape(f"cannot reach the proxy at {proxy.control}: permission denied")
        words = [refused, refused, re.escape(f"no proxy is running (no control socket in {place.runtime}") + ".*"]
        taken_because = r"\[Errno 13\] Permission denied"
    for done, expected in zip((reload, upgrade, found), words, strict=True):
        assert done.returncode == (1 if is_open else 2)
        assert re.fullmatch(f"stickyproxy: {expected}\n", done.stderr), done.stderr
    assert taken.returncode == 2
    cannot = re.escape(f"stickyproxy: cannot take over from {proxy.hand_over}: ")
    assert re.fullmatch(f"{cannot}({taken_because})\n", taken.stderr), taken.stderr
    for name in ("reloads_total", "upgrades_total"):
        assert await read_metric(proxy.admin, name) == 0
    await proxy.ask()

    root = await proxy.command("reload", "--control", proxy.control, uid=0)
    assert (root.returncode, root.stdout) == (0, "grace: 10s -> 9s\n"), root.stderr
    root = await proxy.command("upgrade", "--control", proxy.control, uid=0)
    assert root.returncode == 0, root.stderr
    assert await read_metric(proxy.admin, "upgrades_total", outcome="ok") == 1
    await proxy.ask()
    await proxy.stop()


# What it touches


@dataclass
class Trace:
    """What processes have done, as strace tells: programs executed, paths opened for writing or changed, memory."""

    programs: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    memory: set[str] = field(default_factory=set)

    def take(self, call: str, arguments: str) -> None:
        """Take note of a call that has succeeded."""
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
        if call in {"execve", "execveat"}:
            self.programs.add(texts[0])
        elif call == "memfd_create":
            self.memory.add(texts[0])
        elif call == "bind":
            self.changed |= set(re.findall(r'sun_path="([^"]*)"', arguments))
        elif not call.startswith("open") or re.search("O_(WRONLY|RDWR|CREAT|TRUNC)", arguments):
            self.changed |= set(texts[-1:])


def trace_into(file: Path) -> list[str | Path]:
    """Return the command that runs another one, as its own process, and tells of what it and its children do."""
    calls = ",".join(f"?{one}" for one in (*CHANGES.split(), "execve", "execveat", "memfd_create"))
    return ["strace", "-DD", "-f", "-qq", "-s", "4096", "-e", "signal=none", "-e", f"trace={calls}", "-o", file]


def read_trace(file: Path, first: str) -> Trace:
    """Return what has been done since a program was executed for the first time: before that it is the container."""
    trace = Trace()
    unfinished: dict[str, str] = {}
    has_begun = False
    for line in file.read_text(errors="replace").splitlines():
        pid, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            unfinished[pid] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = unfinished.pop(pid) + text[resumed.end() :]
        match = re.fullmatch(r"(\w+)\((.*)\)\s+= [0-9]+.*", text)
        if match is None:
            continue
        has_begun = has_begun or text.startswith(f'execve("{first}"')
        if has_begun:
            trace.take(match[1], match[2])
    return trace


DO = """
import os, subprocess, sys
open("plain", "w").close()
os.mkdir("directory")
os.rename("plain", "renamed")
os.memfd_create("memory")
open("/etc/passwd").close()
subprocess.run(["/bin/true"])
"""


@needs_strace
def test_what_is_done_is_seen(children: Children) -> None:
    file = children.directory / "trace"
    child = children.start("does", [*trace_into(file), sys.executable, "-B", "-c", DO])
    assert child.wait() == 0, child.log_tail()
    trace = read_trace(file, sys.executable)
    assert trace == Trace({sys.executable, "/bin/true"}, {"plain", "directory", "renamed"}, {"memory"})


@needs_strace
async def test_it_touches_its_two_directories_and_executes_itself_alone(
    place: Place, children: Children, app: App
) -> None:
    files = [place.directory / "trace-old", place.directory / "trace-new"]
    old, new = (
        Container(place, children, app, name, trace_into(file))
        for name, file in zip(("old", "new"), files, strict=True)
    )
    new.port = old.port
    new.write(listeners=old.sections["listeners"])
    await old.start()
    await old.ask()
    tunnel = await open_tunnel(old.port)
    async with tunnel.client:
        await tunnel.echo()
        await old.reload(grace="9s")
        await old.upgrade()
        await take_over(old, new, tunnel)
    await new.lose_a_worker()
    await new.ask()
    await new.stop()
    for proxy, file in zip((old, new), files, strict=True):
        trace = read_trace(file, sys.executable)
        print(trace)
        assert trace.programs == {sys.executable}
        assert all(name.startswith("stickyproxy-") for name in trace.memory), trace.memory
        outside = {path for path in trace.changed if Path(path).parent not in {place.state, place.runtime}}
        assert outside == {"/dev/null"} if proxy is old else outside <= {"/dev/null"}
        inside = {re.sub(r"\.secret-[0-9a-f]+", ".secret-", Path(path).name) for path in trace.changed - outside}
        sockets = {proxy.control.name, proxy.hand_over.name}
        assert inside == sockets | ({"secret", ".secret-"} if proxy is old else set())


# Where it lacks something


async def test_without_a_runtime_directory_it_serves_and_takes_no_commands(
    place: Place, children: Children, app: App
) -> None:
    place.writable.remove(place.runtime)
    proxy = await make(place, children, app).start()
    await proxy.ask()
    for name in ("control", "hand-over"):
        path = place.runtime / f"{proxy.child.pid}.{name}"
        reason = f"cannot listen on {path}: read-only file system"
        assert f"the proxy goes on without its {name} socket: {reason}" in proxy.log
    done = await proxy.command("reload")
    assert done.returncode == 2
    assert done.stderr.startswith(f"stickyproxy: no proxy is running (no control socket in {place.runtime}")
    await proxy.lose_a_worker()
    await proxy.stop()


async def test_where_nothing_can_be_written_it_serves_and_takes_no_commands(
    place: Place, children: Children, app: App
) -> None:
    place.writable.clear()
    only_state = {"STATE_DIRECTORY": str(place.state)}
    proxy = await make(place, children, app).start(environment=only_state)
    await proxy.ask()
    done = await proxy.command("reload", environment=only_state)
    assert done.returncode == 2
    assert re.fullmatch("stickyproxy: .+\n", done.stderr)
    await proxy.stop()


async def test_without_a_state_directory_it_has_a_secret_of_its_own(place: Place, children: Children, app: App) -> None:
    place.writable.remove(place.state)
    proxy = await make(place, children, app).start()
    await proxy.ask()
    await proxy.upgrade()
    assert f"cannot keep a secret in {place.state} (Read-only file system): pins will not outlive this" in proxy.log
    assert list(place.state.iterdir()) == []
    await proxy.stop()


async def test_without_a_home_and_a_state_directory_it_says_what_to_set(
    place: Place, children: Children, app: App
) -> None:
    runtime = {"RUNTIME_DIRECTORY": str(place.runtime)}
    proxy = make(place, children, app)
    proxy.begin(environment=runtime)
    assert await proxy.end() == 2
    assert proxy.log == "stickyproxy: this user has no home directory: set state_directory or affinity.secrets\n"
    named = make(place, children, app, "named")
    named.write(affinity={"secrets": ["a-secret-of-the-tests-of-32-bytes-or-more"]})
    await named.start(environment=runtime)
    await named.ask()
    await named.stop()
