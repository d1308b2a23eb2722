"""One proxy takes the place of another, from an installation of its own: all that can move, moves, or nothing changes.

A is the proxy that runs, B the one that is started with `--take-over`.
"""

import array
import asyncio
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.control.messages import PROTOCOL
from tests.helpers.operated import GatedApp, Proxy, Stage, until_so
from tests.helpers.plain_client import PlainClient, ask
from tests.helpers.proc import ports_held
from tests.helpers.processes import free_port
from tests.helpers.supervised import DEADLINE_S, SECRET, Tunnel, until

OTHER_SECRET = "fedcba9876543210fedcba9876543210"
STRANGER = 10_002  # a user id
HEAD = struct.Struct("!4sII")


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(tmp_path) as stage:
        yield stage


def begin_b(stage: Stage, a: Proxy, *apps: GatedApp, **more: Any) -> Proxy:
    """Start B, which listens where A does and takes its place."""
    listeners = [f"127.0.0.1:{a.port}"]
    return stage.begin(*apps, name="b", options=["--take-over", str(a.hand_over)], listeners=listeners, **more)


async def ended(proxy: Proxy) -> None:
    """Wait until a proxy has ended in order, with all its processes."""
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == 0, proxy.log
    await until(lambda: not proxy.processes, "no process of it is left")


async def goes_on(a: Proxy, clients: list[PlainClient], tunnels: list[Any], workers: int = 2) -> None:
    """Check that A serves as before, with all its connections and workers."""
    assert a.child.is_running()
    for client in clients:
        assert (await client.ask("/")).status == 200
    for tunnel in tunnels:
        await tunnel.echo()
    await until(lambda: len(a.workers) == workers, "as many workers as before")
    assert (await a.ask())[0] == 200
    assert stat.S_IMODE(a.hand_over.stat().st_mode) == 0o600
    assert json.loads((await ask(str(a.control), "/api/v1/state")).body)["is_ready"]


async def test_everything_that_can_move_moves(stage: Stage) -> None:
    """Tunnels, idle connections, one in an exchange when that is over, and the Unix socket with its file."""
    app = await stage.app()
    path, port = stage.short / "s", free_port()
    listeners = [f"127.0.0.1:{port}", {"address": f"unix:{path}"}]
    a = await stage.serve(app, listeners=listeners, grace="1h")
    kept, held, local = await a.connect(port), await a.connect(port), await a.connect(str(path))
    for client in (kept, local):
        assert (await client.ask("/")).status == 200
    tunnels = [await Tunnel.open(await a.connect(port)) for _ in range(10)]
    held.send("/hold", fields={"X-Id": "held"})
    await until(lambda: app.waiting["/hold"] == 1, "the request is under way")
    assert stat.S_IMODE(a.hand_over.stat().st_mode) == 0o600
    assert stat.S_IMODE(a.control.stat().st_mode) == 0o600
    file = path.stat().st_ino
    b = await stage.begin(
        app, name="b", options=["--take-over", str(a.hand_over)], listeners=listeners, grace="1h"
    ).serving()
    assert "took over from a proxy of version 0.1.0: 10 tunnels and 2 connections have moved" in b.log
    assert "1 in an exchange cannot, and have 3600 s to end in the old workers" in b.log
    assert a.child.is_running()
    assert not a.hand_over.exists()
    assert not a.control.exists()
    for tunnel in tunnels:
        await tunnel.echo()
    app.gate.set()
    assert (await held.receive()).body == b"app"
    await ended(a)
    assert "Traceback" not in a.log
    for tunnel in tunnels:
        await tunnel.echo()
    for client in (kept, held, local):
        assert (await client.ask("/", fields={"X-Id": "again"})).status == 200
    assert app.ids == {"held": 1, "again": 3}
    assert path.stat().st_ino == file
    async with await PlainClient.connect(str(path)) as late:
        assert (await late.ask("/")).status == 200
    a.leave()
    await b.stop()
    assert not path.exists()


async def test_one_proxy_after_the_other_at_the_same_paths(stage: Stage) -> None:
    """B's own sockets for commands and hand-over may be where A's are."""
    app = await stage.app()
    a = await stage.serve(app)
    tunnel = await a.open_tunnel()
    paths = {"control": str(a.control), "hand_over": str(a.hand_over)}
    b = await begin_b(stage, a, app, **paths).serving()
    await ended(a)
    await tunnel.echo()
    options = ["--take-over", str(a.hand_over)]
    c = await stage.begin(app, name="c", options=options, listeners=[f"127.0.0.1:{a.port}"]).serving()
    await ended(b)
    await tunnel.echo()
    a.leave()
    await c.stop()


async def test_upstreams_that_only_the_old_one_knows_are_leaving(stage: Stage) -> None:
    """Their tunnels live on, no new client goes there, and they are forgotten once they are empty."""
    old, new = await stage.app("old"), await stage.app("new")
    a = await stage.serve(old)
    tunnel = await a.open_tunnel()
    assert tunnel.app == "old"
    # A session outlasts its tunnel for so long.
    b = await begin_b(stage, a, new, affinity={"secrets": [SECRET], "session_idle": "1s"}).serving()
    await ended(a)
    await tunnel.echo()
    state = json.loads(await b.get("/api/v1/state"))
    [cluster] = state["clusters"]
    facts = {one["id"]: (one["is_leaving"], one["accepts_new"], one["tunnels"]) for one in cluster["upstreams"]}
    assert facts == {"new": (False, True, 0), "old": (True, False, 1)}
    assert {(await ask(a.port, "/")).body for _ in range(10)} == {b"new"}
    tunnel.client._writer.close()
    await b.logged("upstream old, which is no longer in the configuration, is empty: removed")
    a.leave()
    await b.stop()


async def test_tokens_of_the_old_secret_are_still_good(stage: Stage) -> None:
    apps = [await stage.app(name) for name in ("one", "two", "three")]
    a = await stage.serve(*apps)
    async with await PlainClient.connect(a.port) as client:
        first = await client.ask("/")
    assert first.cookie is not None
    b = await begin_b(stage, a, *apps, affinity={"secrets": [OTHER_SECRET]}).serving()
    await ended(a)
    for _ in range(12):  # else it would be placed anew each time
        answer = await ask(a.port, "/", fields={"Cookie": first.cookie})
        assert answer.body == first.body
    assert await b.metric("affinity_total", outcome="invalid") == 0
    fresh = await ask(a.port, "/")
    b_alone = await stage.serve(*apps, name="c", affinity={"secrets": [OTHER_SECRET]})
    assert fresh.cookie is not None
    await ask(b_alone.port, "/", fields={"Cookie": fresh.cookie})
    assert await b_alone.metric("affinity_total", outcome="invalid") == 0  # B signs with its own
    await ask(b_alone.port, "/", fields={"Cookie": first.cookie})

    async def is_counted() -> bool:
        return await b_alone.metric("affinity_total", outcome="invalid") == 1

    await until_so(is_counted)
    await b.stop()


async def test_listeners_need_not_be_the_same(stage: Stage) -> None:
    """Who is connected to one that only the old proxy has stays there until the grace is over."""
    app = await stage.app()
    both, of_a, of_b = free_port(), free_port(), free_port()
    a = await stage.serve(app, listeners=[f"127.0.0.1:{both}", f"127.0.0.1:{of_a}"], grace="1h")
    kept, staying = await a.connect(both), await a.connect(of_a)
    tunnel = await Tunnel.open(await a.connect(of_a))
    for client in (kept, staying):
        assert (await client.ask("/")).status == 200
    listeners = [f"127.0.0.1:{both}", f"127.0.0.1:{of_b}"]
    options = ["--take-over", str(a.hand_over)]
    b = await stage.begin(app, name="b", options=options, listeners=listeners, grace="1h").serving()
    assert "1 that were refused cannot" in b.log
    assert (await kept.ask("/")).status == 200
    assert (await staying.ask("/")).status == 200
    await tunnel.echo()
    assert (await ask(of_b, "/")).status == 200
    assert a.child.is_running()
    staying._writer.close()
    await ended(a)
    await tunnel.echo()
    assert (await kept.ask("/")).status == 200
    a.leave()
    await b.stop()


async def test_where_nobody_listens_it_starts_by_itself(stage: Stage) -> None:
    app = await stage.app()
    path = stage.short / "nobody"
    b = await stage.serve(app, name="b", options=["--take-over", str(path)])
    assert f"nobody listens at {path}: there is nobody to take over from" in b.log
    assert (await b.ask())[0] == 200
    await b.stop()


@pytest.mark.parametrize("reason", ["port", "upstreams", "file"])
async def test_a_successor_that_cannot_start_changes_nothing(stage: Stage, reason: str) -> None:
    app = await stage.app()
    path, port = stage.short / "s", free_port()
    listeners = [f"127.0.0.1:{port}", f"unix:{path}"]
    a = await stage.serve(app, listeners=listeners)
    kept, tunnel = await a.connect(str(path)), await Tunnel.open(await a.connect(str(path)))
    file, workers = path.stat().st_ino, a.workers
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases: dict[str, dict[str, Any]] = {
            "port": {"listeners": [*listeners, f"127.0.0.1:{taken.getsockname()[1]}"]},
            "upstreams": {"listeners": listeners, "upstreams": []},
            "file": {"listeners": listeners, "no_such_key": 1},
        }
        b = stage.begin(app, name="b", options=["--take-over", str(a.hand_over)], **cases[reason])
        assert await asyncio.to_thread(b.child.wait, DEADLINE_S) == 2, b.log
    assert path.stat().st_ino == file
    assert a.workers == workers
    await goes_on(a, [kept], [tunnel])
    if reason == "port":
        await a.logged("the proxy that was taking over is gone")
    c = stage.begin(app, name="c", options=["--take-over", str(a.hand_over)], listeners=listeners)
    await c.serving()  # a later one that is right does take over
    await ended(a)
    await tunnel.echo()
    a.leave()
    await c.stop()


@pytest.mark.parametrize("moment", ["accept", "first worker", "done"])
async def test_a_successor_that_is_killed_in_the_middle_is_recovered_from(stage: Stage, moment: str) -> None:
    """What B's workers had is lost with them; A has all else, and as many workers as before."""
    app, tree, still = await stage.app(), stage.tree("b-tree"), stage.tree("a-tree")
    still.keep_connections()
    a = await stage.serve(app, tree=still, workers=2)
    kept = [await a.connect() for _ in range(20)]
    for client in kept:
        assert (await client.ask("/")).status == 200
    tunnels = [await a.open_tunnel() for _ in range(20)]
    held = {one: ports_held(one, a.port) for one in a.workers}
    name, old = {
        "accept": ("control/supervisor.py", "        counts = await predecessor.hand_over("),
        "first worker": ("control/takeover.py", "                return Counter(answer.body)\n"),
        "done": ("control/takeover.py", '            await self._channel.request("done")\n'),
    }[moment]
    indent = old.partition(old.lstrip())[0]
    tree.replace(name, old, f"{indent}import os; os.kill(os.getpid(), 9)\n{old}")
    b = begin_b(stage, a, app, tree=tree)
    assert await asyncio.to_thread(b.child.wait, DEADLINE_S) == -signal.SIGKILL
    await a.logged("this one goes on")
    await until(lambda: not b.processes, "no process of B is left")
    await until(lambda: len(a.workers) == 2, "A has two workers again")
    left = {"accept": 2, "first worker": 1, "done": 0}[moment]
    stayed = [one for one in held if one in a.workers]
    assert len(stayed) == left
    safe = set().union(*(held[one] for one in stayed))
    for client in kept:
        if own_port(client) in safe:
            assert (await client.ask("/", fields={"X-Id": str(own_port(client))})).status == 200
        else:
            assert await client.receive_end() == b""
    for tunnel in tunnels:
        if own_port(tunnel.client) in safe:
            await tunnel.echo()
    await goes_on(a, [], [])
    assert max(app.ids.values(), default=1) == 1
    c = await stage.begin(
        app, name="c", options=["--take-over", str(a.hand_over)], listeners=[f"127.0.0.1:{a.port}"]
    ).serving()
    await ended(a)
    a.leave()
    await c.stop()


def own_port(client: PlainClient) -> int:
    return int(client._writer.get_extra_info("sockname")[1])


async def test_where_the_old_one_is_killed_in_the_middle_the_new_one_serves(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree("a-tree")
    tree.replace(
        "control/takeover.py",
        "                    channel.answer(message, await self._let_depart(message))\n",
        "                    channel.answer(message, await self._let_depart(message))\n"
        "                    await channel.flush()\n                    import os; os.kill(os.getpid(), 9)\n",
    )
    tree.keep_connections()
    a = await stage.serve(app, tree=tree)
    tunnels = [await a.open_tunnel() for _ in range(20)]
    held = {one: ports_held(one, a.port) for one in a.workers}
    b = await begin_b(stage, a, app).serving()
    assert await asyncio.to_thread(a.child.wait, DEADLINE_S) == -signal.SIGKILL
    assert "the other proxy has ended" in b.log
    await until(lambda: not a.processes, "no process of A is left")
    alive = 0
    for tunnel in tunnels:
        with suppress(asyncio.IncompleteReadError, ConnectionError, AssertionError):
            await tunnel.echo()
            alive += 1
    assert alive in {len(ports) for ports in held.values()}
    for _ in range(10):
        assert (await ask(a.port, "/")).status == 200
    a.leave()
    await b.stop()


@pytest.mark.parametrize("of_a", [True, False], ids=["old", "new"])
async def test_a_worker_that_dies_in_the_middle_takes_only_its_own_along(stage: Stage, *, of_a: bool) -> None:
    app, tree = await stage.app(), stage.tree()
    flag = stage.directory / "struck"
    name, old = (
        ("control/worker_process.py", "        if self._is_departing or self._is_ending:\n")
        if of_a
        else ("control/transfer.py", "        if self._is_preparing or self._prepared:\n")
    )
    tree.replace(
        name,
        old,
        f"        import os as _os\n        try:\n            open({str(flag)!r}, 'x').write(str(_os.getpid()))\n"
        f"            _os.kill(_os.getpid(), 9)\n        except FileExistsError:\n            pass\n{old}",
    )
    still = stage.tree("still")
    for one in (tree, still):
        one.keep_connections()
    a = await stage.serve(app, tree=tree if of_a else still)
    kept = [await a.connect() for _ in range(20)]
    for client in kept:
        assert (await client.ask("/")).status == 200
    tunnels = [await a.open_tunnel() for _ in range(20)]
    held = {one: ports_held(one, a.port) for one in a.workers}
    b = await begin_b(stage, a, app, tree=still if of_a else tree).serving()
    struck = int(flag.read_text())
    doomed = held[struck] if of_a else set()
    await ended(a)
    for client in kept:
        if own_port(client) in doomed:
            assert await client.receive_end() == b""
        else:
            assert (await client.ask("/", fields={"X-Id": str(own_port(client))})).status == 200
    for tunnel in tunnels:
        if own_port(tunnel.client) not in doomed:
            await tunnel.echo()
    assert max(app.ids.values(), default=1) == 1
    await until(lambda: len(b.workers) == 2, "B has two workers")
    a.leave()
    await b.stop()


# What is no successor


async def refused(a: Proxy, data: bytes, descriptors: list[int] | None = None) -> bytes:
    """Send bytes to the hand-over socket, and return what comes until the end."""

    def speak() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(DEADLINE_S)
            link.connect(str(a.hand_over))
            ancillary = []
            if descriptors:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            if data:
                link.sendmsg([data], ancillary)
            link.shutdown(socket.SHUT_WR)
            received = b""
            with suppress(ConnectionError):
                while piece := link.recv(65536):
                    received += piece
            return received

    return await asyncio.to_thread(speak)


def message(kind: str, body: dict[str, Any] | None = None, descriptors: int = 0) -> bytes:
    text = json.dumps({"kind": kind, "number": 1, "body": body or {}}).encode()
    return HEAD.pack(b"STK1", descriptors, len(text)) + text


def count_in(directory: str) -> int:
    return len(list(Path(directory).iterdir()))


async def test_whatever_else_comes_over_the_socket_is_refused_and_logged(stage: Stage) -> None:
    app = await stage.app()
    a = await stage.serve(app)
    kept, tunnel = await a.connect(), await a.open_tunnel()
    workers, listing = a.workers, f"/proc/{a.pid}/fd"
    await refused(a, b"")
    await until(lambda: a.log.count("hand-over refused") == 1, "the silent one is logged")
    before = count_in(listing)
    cases: list[tuple[bytes, int]] = [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 0),
        (message("state", {"protocol": PROTOCOL})[:-9], 0),  # torn
        (HEAD.pack(b"STK1", 0, 1 << 31), 0),
        (HEAD.pack(b"STK1", 251, 2) + b"{}", 0),
        (HEAD.pack(b"STK1", 0, 2) + b"[]", 0),
        (message("state", {"protocol": PROTOCOL}), 100),  # descriptors that nobody asked for
        (HEAD.pack(b"STK1", 3, 2) + b"{}", 2),
    ]
    for number, (data, descriptors) in enumerate(cases, 2):
        await refused(a, data, [0] * descriptors)
        await until(lambda number=number: a.log.count("hand-over refused") >= number, f"case {number} is logged")  # type: ignore[misc]
    for data, answer in (
        (message("state", {"protocol": PROTOCOL + 1, "version": "9.9"}), "cannot hand over to version 9.9"),
        (message("state", {"version": "9.9"}), "cannot hand over to version 9.9"),
        (message("depart", {"worker": 0, "grace_s": 1}), "there is no worker 0 that could hand over to 0 sockets"),
        (message("depart", {"worker": "all"}), "invalid literal"),
        (message("done"), "has not asked"),
        (message("sudo"), "knows no 'sudo'"),
    ):
        assert answer.encode() in await refused(a, data), answer
    await until(lambda: count_in(listing) <= before, "no descriptor is left open")
    assert a.workers == workers
    await goes_on(a, [kept], [tunnel])
    b = await begin_b(stage, a, app).serving()  # and one that is right is not
    await ended(a)
    await tunnel.echo()
    a.leave()
    await b.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_another_user_is_refused(stage: Stage) -> None:
    """The file's mode keeps others out, and where that was changed, the user id of whoever connects does."""
    app = await stage.app()
    a = await stage.serve(app)
    tunnel = await a.open_tunnel()
    await refused_as_user(a, may_connect=False)
    a.hand_over.chmod(0o666)
    await refused_as_user(a, may_connect=True)
    await a.logged("hand-over refused: process ")
    assert f"of uid {STRANGER} has connected; only uid 0 may" in a.log
    a.hand_over.chmod(0o600)
    await goes_on(a, [], [tunnel])
    await a.stop()


async def refused_as_user(a: Proxy, *, may_connect: bool) -> None:
    a.hand_over.parent.chmod(0o755)
    code = (
        "import os, socket, sys\n"
        f"os.setgid({STRANGER}); os.setuid({STRANGER})\n"
        "link = socket.socket(socket.AF_UNIX)\n"
        "link.settimeout(30)\n"
        "try:\n"
        f"    link.connect({str(a.hand_over)!r})\n"
        "except PermissionError:\n"
        "    sys.exit(13)\n"
        "try:\n"
        f"    link.sendall({message('state', {'protocol': 1})!r})\n"
        "    sys.exit(1 if link.recv(1) else 0)\n"
        "except ConnectionError:\n"
        "    sys.exit(0)\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-I", "-c", code], timeout=DEADLINE_S, check=False, capture_output=True
    )
    assert done.returncode == (0 if may_connect else 13), done.stderr


async def test_of_two_at_once_one_is_refused(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree("b-tree")
    a = await stage.serve(app)
    tunnel = await a.open_tunnel()
    flag, go_on = stage.directory / "there", stage.directory / "go on"
    old = "        counts = await predecessor.hand_over("
    tree.replace(
        "control/supervisor.py",
        old,
        f"        open({str(flag)!r}, 'x').close()\n"
        f"        while not os.path.exists({str(go_on)!r}):\n            await asyncio.sleep(0.05)\n{old}",
    )
    b = begin_b(stage, a, app, tree=tree)
    await until(flag.exists, "B is in the middle")
    c = stage.begin(app, name="c", options=["--take-over", str(a.hand_over)], listeners=[f"127.0.0.1:{a.port}"])
    assert await asyncio.to_thread(c.child.wait, DEADLINE_S) == 2, c.log
    assert "cannot take over from" in c.log
    assert "hand-over refused: another proxy is taking over already" in a.log
    assert "another proxy is taking over" in await a.fail_to_upgrade()
    go_on.touch()
    await b.serving()
    await ended(a)
    await tunnel.echo()
    a.leave()
    await b.stop()


async def test_while_an_upgrade_is_under_way_nobody_takes_over(stage: Stage) -> None:
    app, tree = await stage.app(), stage.tree("a-tree")
    a = await stage.serve(app, tree=tree)
    flag = stage.directory / "there"
    old = "    program = Program.own()\n"
    tree.replace("control/upgrade.py", old, f"    open({str(flag)!r}, 'x').close()\n    time.sleep(5)\n{old}")
    upgrading = asyncio.get_running_loop().create_task(a.upgrade())
    await until(flag.exists, "the upgrade is under way")
    b = begin_b(stage, a, app)
    assert await asyncio.to_thread(b.child.wait, DEADLINE_S) == 2, b.log
    assert "cannot take over from" in b.log
    await upgrading
    assert (await a.ask())[0] == 200

    async def is_ready() -> bool:
        return bool(json.loads(await a.get("/api/v1/state"))["is_ready"])

    await until_so(is_ready)
    await a.stop()
