"""Worker processes as the supervisor sees them: whatever becomes of one, its end is told once and nothing stays."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import stickyproxy
from stickyproxy.control import worker_link as worker_link_module
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.control.worker_link import Program, WorkerLink, start_process
from stickyproxy.errors import ChannelError
from stickyproxy.observe.table import Table
from stickyproxy.tasks import spawn
from tests.helpers.loops import no_leak, on_uvloop, open_descriptors
from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stickyproxy.control.channel import Message

# What a process needs to speak over the channel, without this package.
SPEAK = """
import json, os, socket, struct, sys, time
link = socket.socket(fileno=3)
def say(**envelope):
    text = json.dumps(envelope).encode()
    link.sendall(struct.pack("!4sII", b"STK1", 0, len(text)) + text)
def hear():
    head = link.recv(12, socket.MSG_WAITALL)
    if not head:
        sys.exit()
    return json.loads(link.recv(struct.unpack("!4sII", head)[2], socket.MSG_WAITALL))
def hello(protocol):
    say(kind="hello", body={"protocol": protocol, "version": "7.7", "pid": os.getpid()})
"""
OBEDIENT = f"""
hello({PROTOCOL})
while True:
    message = hear()
    if "number" in message:
        say(kind="answer", to=message["number"], body=message.get("body", {{}}))
"""


def program(text: str, environment: dict[str, str] | None = None) -> Program:
    """Return a program that runs Python text instead of a worker."""
    return Program((sys.executable, "-I", "-S", "-c", SPEAK + text), environment or {})


def wait_for(process_id: int, options: int = os.WEXITED) -> None:
    """Wait for the end of a process, in which the loop sees nothing."""
    os.waitid(os.P_PID, process_id, options)


class Watched:
    """A process, and what was told of it."""

    def __init__(self, text: str) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.ends = 0
        self.process_id, link = start_process(program(text))
        self.table = Table.create()
        self.link = self.take(link)

    def take(self, link: socket.socket, received: bytes = b"") -> WorkerLink:
        return WorkerLink(
            4, self.process_id, link, self.table, on_message=self._take, on_end=self._end, received=received
        )

    def _take(self, _: WorkerLink, message: Message) -> None:
        self.messages.append((message.kind, message.body))

    def _end(self, _: WorkerLink) -> None:
        self.ends += 1

    async def wait(self) -> str:
        """Wait until its end was told; return how it ended."""
        await eventually(lambda: self.ends)
        return self.link.ended.result()

    async def check(self) -> None:
        """Check what must hold once a process has ended."""
        await eventually(lambda: self.ends)
        await asyncio.sleep(0.02)
        assert self.ends == 1
        assert self.link.reap()
        assert self.link.channel.is_closed
        with pytest.raises(ChildProcessError):  # no zombie
            wait_for(self.process_id)
        assert "ended" in repr(self.link)


@asynccontextmanager
async def watched(text: str) -> AsyncIterator[Watched]:
    """Start a process; in the end it is killed, and nothing of it may be left."""
    await asyncio.sleep(0)
    with no_leak():
        it = Watched(text)
        try:
            yield it
        finally:
            it.link.kill()
        await it.check()
        it.table.close()
        it.link = it.table = None  # type: ignore[assignment]  # the table's memory goes with it


# How it ends


@on_uvloop
async def test_a_worker_starts_hears_and_is_killed() -> None:
    async with watched(OBEDIENT) as it:
        assert not it.link.is_ready
        await it.link.start({"answer": 42}, [])
        assert it.link.is_ready
        assert it.link.version == "7.7"
        assert f"pid={it.process_id} alive" in repr(it.link)
        os.kill(it.process_id, signal.SIGKILL)
        assert await it.wait() == "killed by SIGKILL"


@on_uvloop
async def test_requests_that_wait_hear_of_the_end() -> None:
    async with watched(f"hello({PROTOCOL}); hear(); hear()") as it:
        starting = spawn(it.link.start({}, []), "start")
        await eventually(lambda: it.link.version)
        os.kill(it.process_id, signal.SIGTERM)
        with pytest.raises(ChannelError, match="gone"):
            await starting
        assert await it.wait() == "killed by SIGTERM"


@pytest.mark.parametrize(("text", "how"), [("", "exit status 0"), ("sys.exit(3)", "exit status 3")])
@pytest.mark.parametrize("seen_first", ["process", "channel", "either"])
@on_uvloop
async def test_a_program_that_ends_at_once(text: str, how: str, seen_first: str) -> None:
    async with watched(text) as it:
        starting = spawn(it.link.start({}, []), "start")
        await asyncio.sleep(0)
        if seen_first != "either":
            wait_for(it.process_id, os.WEXITED | os.WNOWAIT)
        if seen_first == "process":
            assert it.link.reap()
        elif seen_first == "channel":
            it.link.channel.read_rest()
        with pytest.raises(ChannelError, match="ended before it could start"):
            await asyncio.wait_for(starting, 20)  # sooner than a worker is waited for that says nothing
        assert await it.wait() == how


def test_an_end_that_nobody_waits_for_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    @on_uvloop
    async def end() -> None:
        async with watched("") as it:
            await it.wait()

    end()
    gc.collect()
    assert caplog.text == ""


@on_uvloop
async def test_a_program_that_leaves_its_channel_to_another_has_ended_too() -> None:
    async with watched("os.fork() or hear()") as it:
        with pytest.raises(ChannelError, match="ended before it could start"):
            await asyncio.wait_for(it.link.start({}, []), 20)
        assert await it.wait() == "exit status 0"


@on_uvloop
async def test_a_program_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link_module, "START_TIMEOUT_S", 0.1)
    async with watched("time.sleep(1000)") as it:
        with pytest.raises(ChannelError, match=r"no sign of life within 0\.1 s"):
            await it.link.start({}, [])
        assert it.ends == 0


@on_uvloop
async def test_a_program_of_another_protocol_is_not_started() -> None:
    async with watched(f"hello({PROTOCOL + 1}); say(kind='unasked'); hear()") as it:
        with pytest.raises(ChannelError, match=r"version 7\.7 of the worker speaks another protocol"):
            await it.link.start({}, [])
        await eventually(lambda: it.messages)
        assert not it.link.is_ready


@on_uvloop
async def test_a_program_that_speaks_no_protocol_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link_module, "_KILL_S", 0.05)
    async with watched("link.sendall(b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'); time.sleep(1000)") as it:
        with pytest.raises(ChannelError, match="ended before"):
            await it.link.start({}, [])
        assert await it.wait() == "killed by SIGKILL"


@on_uvloop
async def test_a_worker_that_closes_its_channel_has_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(f"hello({PROTOCOL}); link.close(); time.sleep(0.1); sys.exit(5)") as it:
        assert await it.wait() == "exit status 5"


LAST_WORDS = f"""
hello({PROTOCOL})
number = hear()["number"]
say(kind="answer", to=number)
number = hear()["number"]
for word in range(50):
    say(kind="word", body={{"number": word, "text": "x" * 1000}})
say(kind="answer", to=number, body={{"moved": 7}})
"""


@on_uvloop
async def test_the_last_words_of_a_worker_count_though_its_end_is_seen_first() -> None:
    async with watched(LAST_WORDS) as it:
        await it.link.start({}, [])
        asking = spawn(it.link.channel.request("depart"), "ask")
        await asyncio.sleep(0)
        wait_for(it.process_id, os.WEXITED | os.WNOWAIT)
        assert it.messages == []
        assert it.link.reap()
        assert [body["number"] for _, body in it.messages] == list(range(50))
        assert (await asking).body == {"moved": 7}
        assert await it.wait() == "exit status 0"


@pytest.mark.parametrize("text", [OBEDIENT, "", "time.sleep(1000)"])
@on_uvloop
async def test_the_end_is_seen_where_the_system_does_not_tell(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> int:
        raise OSError("no such system call")

    monkeypatch.setattr(os, "pidfd_open", fail)
    async with watched(text) as it:
        os.kill(it.process_id, signal.SIGTERM)
        assert await it.wait() in {"killed by SIGTERM", "exit status 0"}


@on_uvloop
async def test_a_process_that_somebody_else_has_waited_for_has_ended() -> None:
    async with watched("") as it:
        wait_for(it.process_id)
        assert await it.wait() == "unknown how: somebody else has waited for it"


@on_uvloop
async def test_kill_says_nothing_where_the_process_has_ended() -> None:
    async with watched(OBEDIENT) as it:
        for _ in range(3):
            it.link.kill()
        await it.wait()
        it.link.kill()


# How it is started


@pytest.mark.parametrize("command", ["/nowhere/python", "/etc/passwd", ""])
def test_an_interpreter_that_cannot_be_run_leaves_nothing_open(command: str) -> None:
    with no_leak(), pytest.raises((OSError, ValueError)):
        start_process(Program((command, "-c", "pass"), {}))


@on_uvloop
async def test_the_environment_is_that_of_this_process_and_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OURS", "kept")
    process_id, link = start_process(program("say(**os.environ); hear()", {"MORE": "added"}))
    link.settimeout(30)
    with link:
        size = int.from_bytes(link.recv(12, socket.MSG_WAITALL)[8:], "big")
        environment = json.loads(link.recv(size, socket.MSG_WAITALL))
    wait_for(process_id)
    assert (environment["OURS"], environment["MORE"]) == ("kept", "added")
    assert not environment.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}


@on_uvloop
async def test_a_worker_has_no_descriptor_but_its_own() -> None:
    opened = os.open("/dev/null", os.O_RDONLY)
    process_id, link = start_process(program("say(open=sorted(os.listdir('/proc/self/fd'))); hear()"))
    link.settimeout(30)
    with link:
        size = int.from_bytes(link.recv(12, socket.MSG_WAITALL)[8:], "big")
        said = json.loads(link.recv(size, socket.MSG_WAITALL))["open"]
    wait_for(process_id)
    os.close(opened)
    inherited = {str(one) for one in open_descriptors() if os.get_inheritable(one)}  # by the test's own process
    assert "3" in said
    assert len(set(said) - inherited - {"0", "1", "2", "3"}) <= 1, "that of the listing"


AT_THREE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from stickyproxy.control.worker_link import Program, start_process
for one in range(3, 30):
    try: os.close(one)
    except OSError: pass
os.close(0)
import socket
make = socket.socketpair
def seen(*args):
    found = make(*args)
    print([one.fileno() for one in found])
    return found
socket.socketpair = seen
process_id, link = start_process(Program((sys.executable, "-I", "-S", "-c", sys.argv[2]), {}))
print(link.recv(12)[:4], os.waitpid(process_id, 0)[1])
"""


def test_the_channel_may_be_descriptor_three_already() -> None:
    root = str(Path(stickyproxy.__file__).parent.parent)
    command = [sys.executable, "-c", AT_THREE, root, SPEAK + "hello(1)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["[0, 3]", "b'STK1' 0"]


def test_the_own_program_is_a_worker_of_this_package() -> None:
    own = Program.own()
    assert own.command[0] == sys.executable
    assert own.command[-2:] == ("-m", "stickyproxy.control.worker_process")
    assert own.environment.keys() <= {"PYTHONPATH"}


@on_uvloop
async def test_the_own_program_starts() -> None:
    process_id, link = start_process()
    seen = list[int]()
    table = Table.create()
    worker = WorkerLink(
        0, process_id, link, table, on_message=lambda *_: None, on_end=lambda one: seen.append(one.process_id)
    )
    await eventually(lambda: worker.version)
    assert (await worker.channel.request("ping")).body == {}
    worker.channel.send("stop")
    await eventually(lambda: seen)
    assert worker.ended.result() == "exit status 0"
    table.close()


# Another image of the supervisor goes on


@on_uvloop
async def test_another_image_goes_on_with_a_worker() -> None:
    async with watched(OBEDIENT) as it:
        await it.link.start({}, [])
        before = it.link
        state = await before.leave()
        assert (state.index, state.process_id, state.table) == (4, it.process_id, it.table.descriptor)
        assert (state.version, state.received, state.is_retiring) == ("7.7", b"", False)
        it.link = it.take(socket.socket(fileno=state.channel), state.received)
        assert (await it.link.channel.request("ping", {"a": 1})).body == {"a": 1}
        assert it.ends == 0


@on_uvloop
async def test_the_other_image_sees_that_a_worker_is_lost() -> None:
    async with watched(f"hello({PROTOCOL}); link.close(); time.sleep(1000)") as it:
        await eventually(lambda: it.link.channel.is_closed)
        before = it.link
        state = await before.leave()
        it.link = it.take(socket.socket(fileno=state.channel), state.received)
        await eventually(lambda: it.link.channel.is_closed)
        it.link.kill()
        await it.wait()
