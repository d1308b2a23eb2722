"""The reloads of proxies: what is read and written, what is counted, and short runs with each installed proxy."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from tests.bench.messages import BINARY, CLOSE, NUMBER, FrameReader, parse_head, write_frame
from tests.bench.programs import find_program
from tests.bench.reloads import __main__ as command_line
from tests.bench.reloads.family import Family, Usage
from tests.bench.reloads.look import Look, look
from tests.bench.reloads.peers import CONTROLS, PEERS, Kind, Operation, Stage, replace_program, with_limit
from tests.bench.reloads.requests import Requests, RequestTally
from tests.bench.reloads.run import Outcome, Plan, Stranded, run
from tests.bench.reloads.settings import Setting, caddy_text, haproxy_text, nginx_text, replace_once, stickyproxy_text
from tests.bench.reloads.table import COLUMNS, Row, cells, legend, write_report
from tests.bench.reloads.tunnels import Tally, Tunnel, Visitor, all_open
from tests.bench.results import RunError
from tests.bench.targets import Site, environment
from tests.helpers.processes import Children, free_port
from tests.helpers.supervised import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

DEADLINE_S = 30.0
SMALL = Plan(times=2, tunnels=20, renewed=3, interval_s=1.0, watch_s=1.0)
UNTIL_THE_LIMIT = replace(SMALL, watch_s=5.0)
INSTALLED = [name for name in ("haproxy", "nginx", "caddy") if find_program(name)]
WITH_OLD_PROCESSES = [name for name in ("haproxy", "nginx") if find_program(name)]
NOTHING, KILL = CONTROLS


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a directory with a short path, for Unix sockets, that the user of nginx's workers can read."""
    with tempfile.TemporaryDirectory(prefix="reloads-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def children(directory: Path) -> Iterator[Children]:
    with Children(directory) as children:
        yield children


@pytest.fixture
async def application(children: Children) -> AsyncIterator[tuple[Family, int]]:
    """Give the application alone, as a proxy would be, and its port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.reloads.app", str(port)]
    family = Family(children, "application", command, environment(children.directory))
    family.start()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await answers(family, port):
                break
            await asyncio.sleep(0.02)
    yield family, port
    await asyncio.to_thread(family.end)


async def answers(family: Family, port: int) -> bool:
    try:
        await asyncio.to_thread(look, family, port)
    except OSError:
        return False
    return True


def operation_of(name: str, kind: Kind) -> Operation:
    return next(one for one in PEERS[name].operations if one.kind is kind)


def outcome(**changes: object) -> Outcome:
    tally = Tally(cuts_s=[1.0, 2.0], codes=Counter({None: 1, 1001: 1}), unanswered=3, wrong=4, longest_s=0.0126)
    plain = Outcome(
        times=2,
        effective=1,
        cut_at_once=1,
        tally=tally,
        requests=RequestTally(sent=50, repeated=5, failed=6),
        usage=(Usage(2, 10240), Usage(3, 20480), Usage(4, 30720)),
        stranded=(Stranded(1, 7), Stranded(0, 0)),
        taken_out=(9, 8),
        complaints=("RunError: it did not",),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# What is read and written


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 100])
def test_frames_are_read_whatever_the_cuts(cut: int) -> None:
    frames = [(BINARY, NUMBER.pack(7)), (CLOSE, b"\x03\xe8"), (BINARY, b"")]
    stream = b"".join(write_frame(*frame, is_masked=masked) for masked in (True, False) for frame in frames)
    reader = FrameReader()
    read = [frame for at in range(0, len(stream), cut) for frame in reader.feed(stream[at : at + cut])]
    assert read == frames * 2


@pytest.mark.parametrize("stream", [b"\x02\x01x", b"\x82\x7e\0\0", b"\x82\x81\0\0\1\0x"])
def test_a_frame_that_nobody_sends_is_an_error(stream: bytes) -> None:
    with pytest.raises(RunError, match="not sent"):
        FrameReader().feed(stream)


def test_a_head_is_read() -> None:
    head = parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nSet-Cookie: SP=a; Path=/\r\nConnection: close\r\n\r\n")
    assert head == (200, 4, "SP=a", True)
    assert parse_head(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n") == (101, 0, "", False)
    with pytest.raises(RunError, match="no response"):
        parse_head(b"ICY 200 OK\r\n\r\n")


@pytest.mark.parametrize("write", [haproxy_text, nginx_text, caddy_text, stickyproxy_text])
def test_a_configuration_has_the_upstreams_that_it_should(
    write: Callable[[Site, Setting], str], directory: Path
) -> None:
    site = Site(directory, 21000, 21001, (21002, 21003), is_websocket=True)
    extra = "grace_period 5s" if write is caddy_text else "# more"
    text = write(site, Setting(3, (("a", 21002), ("c", 21004)), extra))
    assert [f":{port}" in text for port in (21000, 21002, 21003, 21004)] == [True, True, False, True]
    assert "X-Generation 3" in text or "response: 303s" in text
    assert "# more" in text or "  grace_period 5s\n" in text or write is stickyproxy_text


def test_a_text_that_changed_is_not_replaced_silently() -> None:
    assert replace_once("a b", "b", "c") == "a c"
    for text in ("a", "b b"):
        with pytest.raises(ValueError, match="times: 'b'"):
            replace_once(text, "b", "c")


def test_the_limit_can_be_another() -> None:
    limit = next(one for one in with_limit(PEERS["haproxy"], 1.5).operations if one.kind is Kind.LIMIT)
    assert (limit.title, limit.extra) == ("reload, hard-stop-after 1.5s", "hard-stop-after 1.5s")


# What is counted, with the application in place of a proxy


async def test_clients_that_leave_are_not_counted_as_cut(application: tuple[Family, int]) -> None:
    _, port = application
    tally = Tally()
    visitors = [Visitor(port, tally) for _ in range(5)]
    await all_open(visitors)
    first = visitors[0].tunnel
    assert first is not None
    first.leave()
    await until(lambda: tally.opened == 6)
    await until(lambda: tally.answered >= 30)
    await asyncio.gather(*(visitor.stop() for visitor in visitors))
    assert first.ended.done()
    assert (tally.cuts_s, tally.unanswered, tally.wrong) == ([], 0, 0)


async def test_whoever_is_killed_has_cut_all(application: tuple[Family, int]) -> None:
    family, port = application
    tally = Tally()
    visitors = [Visitor(port, tally) for _ in range(5)]
    await all_open(visitors)
    begin_s = asyncio.get_running_loop().time()
    await asyncio.to_thread(family.end, signal.SIGKILL)
    await until(lambda: len(tally.cuts_s) == 5)
    end_s = asyncio.get_running_loop().time()
    await until(lambda: tally.refused >= 5)
    await asyncio.gather(*(visitor.stop() for visitor in visitors))
    assert tally.codes == {None: 5}
    assert tally.cuts_within([(begin_s, end_s), (0, end_s)]) == 5
    assert tally.cuts_within([(0, begin_s)]) == 0


async def test_messages_without_an_answer_are_counted(application: tuple[Family, int]) -> None:
    family, port = application
    tally = Tally()
    visitors = [Visitor(port, tally) for _ in range(5)]
    await all_open(visitors)
    family.send(signal.SIGSTOP)
    tunnels = [visitor.tunnel for visitor in visitors if visitor.tunnel is not None]
    await until(lambda: not any(tunnel.is_quiet for tunnel in tunnels))
    await asyncio.to_thread(family.end, signal.SIGKILL)
    await until(lambda: len(tally.cuts_s) == 5)
    await asyncio.gather(*(visitor.stop() for visitor in visitors))
    assert tally.unanswered >= 5


async def test_an_answer_that_is_not_the_next_is_wrong(application: tuple[Family, int]) -> None:
    _, port = application
    tally = Tally()
    visitor = Visitor(port, tally)
    await all_open([visitor])
    assert visitor.tunnel is not None
    visitor.tunnel._on_answer(10**6, port)
    await visitor.stop()
    assert tally.wrong == 1


class Goodbye(asyncio.Protocol):
    """Accepts a WebSocket and ends it with Close 1001; answers no plain request."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + write_frame(CLOSE, b"\x03\xe9", is_masked=False))


async def test_the_code_of_a_close_frame_is_counted() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Goodbye, "127.0.0.1", 0)
    tally = Tally()
    _, tunnel = await loop.create_connection(lambda: Tunnel(tally, ""), *server.sockets[0].getsockname())
    async with asyncio.timeout(DEADLINE_S):
        await tunnel.ended
    server.close()
    assert (len(tally.cuts_s), tally.codes) == (1, {1001: 1})


async def test_requests_are_answered_and_those_that_are_not_fail(application: tuple[Family, int]) -> None:
    family, port = application
    requests = Requests(port, per_s=200)
    await until(lambda: requests.tally.sent >= 50)
    assert requests.tally.failed == 0
    await asyncio.to_thread(family.end, signal.SIGKILL)
    await until(lambda: requests.tally.failed >= 10)
    await requests.stop()


async def test_a_request_that_meets_a_close_is_sent_again() -> None:
    """The server answers the first request of each connection, and closes when it has read the second."""
    answered: Counter[str] = Counter()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answered["first"] += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read(1)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    requests = Requests(server.sockets[0].getsockname()[1], per_s=100, connections=1)
    await until(lambda: requests.tally.repeated >= 3)
    await requests.stop()
    server.close()
    assert requests.tally.failed == 0
    assert answered["first"] == requests.tally.sent


async def test_a_body_that_is_cut_is_a_failure() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    requests = Requests(server.sockets[0].getsockname()[1], per_s=100, connections=1)
    await until(lambda: requests.tally.sent >= 3)
    await requests.stop()
    server.close()
    assert (requests.tally.failed, requests.tally.repeated) == (requests.tally.sent, 0)


async def test_a_connection_is_found_in_the_process_that_holds_it(application: tuple[Family, int]) -> None:
    family, port = application
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    client_port = writer.get_extra_info("sockname")[1]
    await until(lambda: family.holders(port).get(client_port) == family.main.pid)
    writer.close()
    assert await asyncio.to_thread(look, family, port) == Look("", family.main.pid, is_outdated=False)
    assert family.usage().processes == 1
    assert family.usage().kib > 0


def test_processes_that_outlive_their_parent_are_found_and_ended(children: Children) -> None:
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    family = Family(children, "parent", [sys.executable, "-c", script], {})
    family.start()
    family.main.wait()
    (left,) = family.pids()
    assert left != family.main.pid
    family.end()
    assert family.pids() == []


# Short runs


@pytest.mark.parametrize("name", WITH_OLD_PROCESSES)
async def test_a_reload_leaves_the_tunnels_in_old_processes(name: str, children: Children) -> None:
    seen = await run(PEERS[name], operation_of(name, Kind.RELOAD), SMALL, children)
    assert (seen.effective, seen.times, seen.complaints) == (2, 2, ())
    assert (seen.tally.cuts_s, seen.tally.unanswered, seen.tally.wrong) == ([], 0, 0)
    assert seen.stranded[1].processes == 2  # some clients left and came back between the two
    assert seen.stranded[1].tunnels == 20
    before, after, _ = seen.usage
    assert after.processes == before.processes + 2
    assert after.kib > before.kib > 0
    assert seen.taken_out is not None
    assert seen.taken_out[0] == seen.taken_out[1] > 0
    assert seen.requests.sent > 50


@pytest.mark.parametrize("name", WITH_OLD_PROCESSES)
async def test_a_limit_cuts_them_later(name: str, children: Children) -> None:
    peer = with_limit(PEERS[name], 2)
    limit = next(one for one in peer.operations if one.kind is Kind.LIMIT)
    seen = await run(peer, limit, UNTIL_THE_LIMIT, children)
    assert (seen.times, seen.effective) == (1, 1)
    assert len(seen.tally.cuts_s) == 20
    assert seen.stranded[1] == Stranded(0, 0)


@pytest.mark.parametrize("name", WITH_OLD_PROCESSES)
async def test_an_upgrade_runs_the_new_executable(name: str, children: Children) -> None:
    seen = await run(PEERS[name], operation_of(name, Kind.UPGRADE), replace(SMALL, times=1), children)
    assert (seen.effective, seen.complaints) == (1, ())
    assert seen.tally.cuts_s == []


@pytest.mark.skipif("nginx" not in WITH_OLD_PROCESSES, reason="nginx is not installed")
async def test_a_reload_that_runs_the_old_executable_is_no_upgrade(children: Children) -> None:
    def act(stage: Stage) -> None:
        replace_program(stage.site, "nginx")
        operation_of("nginx", Kind.RELOAD).act(stage)

    seen = await run(PEERS["nginx"], Operation(Kind.UPGRADE, "none", act), replace(SMALL, times=1), children)
    assert (seen.effective, seen.times) == (0, 1)


@pytest.mark.skipif("caddy" not in INSTALLED, reason="caddy is not installed")
async def test_caddy_cuts_them_all_at_each_reload(children: Children) -> None:
    seen = await run(PEERS["caddy"], operation_of("caddy", Kind.RELOAD), SMALL, children)
    assert (seen.effective, seen.cut_at_once) == (2, 40)
    assert seen.stranded[1] == Stranded(0, 0)


@pytest.mark.parametrize("name", INSTALLED[:1])
async def test_the_controls_count_nothing_and_all(name: str, children: Children) -> None:
    left = await run(PEERS[name], NOTHING, SMALL, children)
    killed = await run(PEERS[name], KILL, SMALL, children)
    assert (left.tally.cuts_s, left.tally.unanswered, left.requests.failed) == ([], 0, 0)
    assert (killed.cut_at_once, len(killed.tally.cuts_s)) == (20, 20)
    assert killed.requests.failed > 0
    rows = [Row(name, NOTHING.title, left), Row(name, KILL.title, killed)]
    assert command_line.find_miscounts(rows, 20) == []
    swapped = [Row(name, KILL.title, left), Row(name, NOTHING.title, killed)]
    assert len(command_line.find_miscounts(swapped, 20)) == 2


@pytest.mark.parametrize("name", INSTALLED)
async def test_nothing_is_left_behind(name: str, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    families: list[Family] = []
    start = Family.start

    def start_and_note(family: Family) -> None:
        families.append(family)
        start(family)

    def fail(_: Stage) -> None:
        raise ValueError("it fails")

    monkeypatch.setattr(Family, "start", start_and_note)
    with pytest.raises(ValueError, match="it fails"):
        await run(PEERS[name], Operation(Kind.RELOAD, "fails", fail), SMALL, children)
    assert families
    assert [family.pids() for family in families] == [[]] * len(families)


# The command


def test_a_proxy_that_does_not_come_up_is_in_the_table(children: Children) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such option')"]
    broken = replace(PEERS["stickyproxy"], command=lambda _: command)
    row = command_line.run_one(broken, NOTHING, SMALL, children)
    assert row.outcome is None
    assert "no such option" in row.failure
    assert "no such option" in write_report([row], [], is_markdown=False)


def test_the_table_has_a_cell_for_each_column() -> None:
    rows = [Row("a", "reload", outcome()), Row("b", "upgrade", failure="skipped: no command")]
    assert [len(cells(row)) for row in rows] == [len(COLUMNS)] * 2
    assert cells(rows[0])[2:] == [
        "1 of 2", "1", "2", "none: 1, 1001: 1", "7", "13", "50", "5", "6", "2 → 3 → 4", "10 → 20 → 30", "1 → 0",
        "7 → 0", "9 → 8",
    ]  # fmt: skip
    assert cells(Row("a", "upgrade", outcome(taken_out=None)))[-1] == "-"
    text = write_report(rows, legend(SMALL), is_markdown=True)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert text.endswith("a, reload: RunError: it did not\n\nb, upgrade: skipped: no command")


def test_mistakes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--targets", "apache"], ["--kinds", "x"], ["--times", "0"], ["--watch", "4"]):
        with pytest.raises(SystemExit, match="2"):
            command_line.parse_options(arguments)
    assert "unknown: apache; known: haproxy, nginx" in capsys.readouterr().err


def test_what_cannot_be_done_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "lacking_commands", lambda: ["upgrade"])
    reasons = [reason for _, _, reason in command_line.choose_runs(["stickyproxy"], ["reload", "control"], 5)]
    assert reasons == ["skipped: this version has no command `reload` (lacking: upgrade)"]
    monkeypatch.setattr(command_line, "lacking_commands", list)
    kinds = [one.kind.value for _, one, _ in command_line.choose_runs(["stickyproxy"], ["reload", "control"], 5)]
    assert kinds == ["reload", "control", "control"]
