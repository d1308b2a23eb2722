"""A worker process as the supervisor sees it: how it is started, what is said to it, and that it has ended."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

import stickyproxy
from stickyproxy.control.channel import Channel
from stickyproxy.control.inheritance import WorkerState
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.control.pidfd import Watch, describe
from stickyproxy.errors import ChannelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stickyproxy.control.channel import Message
    from stickyproxy.observe.table import Table

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 30.0
_KILL_S: Final = 3.0  # for a worker to end by itself, once its channel is closed
_CHANNEL_DESCRIPTOR: Final = 3
_PROGRAM: Final = "stickyproxy.control.worker_process"
_NOT_FOR_WORKERS: Final = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})  # systemd listens to one only


@dataclass(frozen=True, slots=True)
class Program:
    """How a worker of one version is run: its command, and what its environment has beside this process's."""

    command: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def own(cls) -> Self:
        """Return that of this version."""
        return cls((*_python_command(), "-m", _PROGRAM), _find_environment())


def start_process(program: Program | None = None) -> tuple[int, socket.socket]:
    """Start a worker process, of this version by default; return its id and the supervisor's end of its channel.

    Raises OSError.
    """
    program = program or Program.own()
    command = list(program.command)
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_WORKERS}
    environment |= program.environment
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        number = theirs.fileno()
        if number == _CHANNEL_DESCRIPTOR:  # dup2 onto itself would leave it to be closed by the execution
            os.set_inheritable(number, True)
            actions: list[tuple[Any, ...]] = []
        else:
            actions = [(os.POSIX_SPAWN_DUP2, number, _CHANNEL_DESCRIPTOR)]
        try:
            process_id = os.posix_spawn(
                command[0], command, environment, file_actions=actions, setsigdef=[signal.SIGPIPE]
            )
        except BaseException:
            ours.close()
            raise
    return process_id, ours


def _python_command() -> list[str]:
    """Return what runs this Python with the same options."""
    options = {"isolated": "-I", "dont_write_bytecode": "-B", "no_user_site": "-s", "ignore_environment": "-E"}
    return [sys.executable, *(option for name, option in options.items() if getattr(sys.flags, name)), "-P"]


def _find_environment() -> dict[str, str]:
    """Return what lets workers find this package where only the current directory has it."""
    root = str(Path(stickyproxy.__file__).parent.parent)
    if sys.flags.safe_path or not sys.path or str(Path(sys.path[0]).resolve()) != root:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


class WorkerLink:
    """One worker process. `on_message` gets what it sends, `on_end` is called once, when the process has ended.

    `index` is the number that metrics and logs know it by; `table` holds its counters, after its end too.
    """

    def __init__(  # noqa: PLR0913 -- what there is to know of one process
        self,
        index: int,
        process_id: int,
        link: socket.socket,
        table: Table,
        *,
        on_message: Callable[[WorkerLink, Message], None],
        on_end: Callable[[WorkerLink], None],
        received: bytes = b"",
    ) -> None:
        self.index = index
        self.process_id = process_id
        self.table = table
        self.version = ""
        self.is_ready = False
        self.is_leaving = False
        """Whether it has been told to end: its end is no accident then."""
        self._on_message = on_message
        self._on_end = on_end
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[None] = loop.create_future()
        self._hello.add_done_callback(asyncio.Future.exception)  # nobody need wait for it
        self.ended: asyncio.Future[str] = loop.create_future()
        """How the process ended, in words, once it has."""
        self.channel = Channel(link, self._take, self._on_lost, received)
        self._watch = Watch(process_id, self._end)

    def _take(self, message: Message) -> None:
        if message.kind == "hello":
            self.version = str(message.body.get("version", ""))
            if not self._hello.done():
                if message.body.get("protocol") == PROTOCOL:
                    self._hello.set_result(None)
                else:
                    self._hello.set_exception(
                        ChannelError(f"version {self.version} of the worker speaks another protocol")
                    )
            return
        self._on_message(self, message)

    def _on_lost(self, reason: str) -> None:
        self._miss_hello()
        if not self.reap():  # it is about to end, or it cannot be spoken to any more
            logger.debug("worker %d (pid %d): %s", self.index, self.process_id, reason)
            asyncio.get_running_loop().call_later(_KILL_S, self.kill)

    def _miss_hello(self) -> None:
        if not self._hello.done():
            self._hello.set_exception(ChannelError("it ended before it could start; its last words are above"))

    async def greet(self) -> None:
        """Wait until it can be told something; raise ChannelError with the reason where that never comes."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(self._hello)
        except TimeoutError as error:
            raise ChannelError(f"no sign of life within {START_TIMEOUT_S:g} s") from error

    async def start(self, body: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Have it make its data plane; raise ChannelError with the reason where it cannot."""
        await self.greet()
        await self.channel.request("start", dict(body), descriptors)
        self.is_ready = True

    async def leave(self) -> WorkerState:
        """Part from the process without ending it, and return what another image of this one needs to go on."""
        await self.channel.flush()
        link, received = self.channel.detach()
        if link.fileno() < 0:  # it is about to end: let the other image see that too
            link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            other.close()
        self._watch.close()
        return WorkerState(
            self.index, self.process_id, link.detach(), self.table.descriptor, self.version, received, self.is_leaving
        )

    def reap(self) -> bool:
        """Take note of the end of the process, if it has ended; say whether it has."""
        return self._watch.look()

    def _end(self, status: int | None) -> None:
        self.ended.set_result(describe(status))
        self.channel.read_rest()  # its last words: the end may be seen before them
        self._miss_hello()
        self.channel.close()
        self._on_end(self)

    def kill(self) -> None:
        """End the process at once."""
        if not self.reap():
            with suppress(ProcessLookupError):  # where it is nobody's child here
                os.kill(self.process_id, signal.SIGKILL)

    @override
    def __repr__(self) -> str:
        return f"<WorkerLink {self.index} pid={self.process_id} {'ended' if self.ended.done() else 'alive'}>"
