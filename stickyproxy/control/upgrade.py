"""Upgrades: the program is replaced by the version that is installed now, and nobody who is connected notices.

    check        a child runs the new version up to the point where it could go on from the present state
    start        workers of the new version start, and take the configuration and the routing state
    execute      the supervisor executes the new version in place: same process id, sockets and children
    take over    new workers accept, then the old ones hand over their connections and end

Until "execute" everything can be taken back, and is, where a step fails: the old version goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from stickyproxy import __version__
from stickyproxy.control.inheritance import leave
from stickyproxy.control.messages import PROTOCOL
from stickyproxy.control.worker_link import Program
from stickyproxy.errors import StickyproxyError, UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stickyproxy.control.inheritance import Inheritance
    from stickyproxy.control.supervisor import Supervisor
    from stickyproxy.control.worker_link import WorkerLink

logger = logging.getLogger(__name__)

_LEFT: Final = {
    "tls": "of TLS",
    "exchange": "in an exchange",
    "ending": "ending",
    "waiting": "with unsent bytes",
    "handshake": "in a handshake",
    "refused": "that were refused",
}
_ANSWER_S: Final = 0.1  # for whoever asked for the upgrade to hear that it goes on
_CHECK_S: Final = 60.0  # for the new version to say whether it can go on; it takes about a second
_TURNS: Final = 3  # of the loop, in which it notices a signal
HELD_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2})
_MAX_WORDS: Final = 2000  # of what it says where it cannot


class Upgrader:
    """Upgrades of one supervisor, one at a time; `outcomes` counts by "ok" and "failed".

    `status` tells of the last one: its number, the versions it is `from` and `to`, its `state` ("running", "ok" or
    "failed"), the `reason` where it failed, and the counts of `Fleet.take_over`.
    """

    def __init__(self, supervisor: Supervisor, inherited: Inheritance | None) -> None:
        counts = {} if inherited is None else inherited.counts
        self._supervisor = supervisor
        self.outcomes = Counter({"ok": 0, "failed": 0, **counts.get("upgrades", {})})
        self.status: dict[str, Any] = dict(counts.get("upgrade", {}))

    def export(self) -> dict[str, Any]:
        """Return what is counted, and the status, as JSON, for another process that goes on from it."""
        return {"upgrades": dict(self.outcomes), "upgrade": self.status}

    async def upgrade(self) -> None:
        """Upgrade as far as to the execution of the new version, which then follows by itself.

        Raises UsageError where something fails; the old version goes on.
        """
        if self.is_running:
            raise UsageError("an upgrade is under way already")
        supervisor = self._supervisor
        if supervisor.is_handing_over:
            raise UsageError("another proxy is taking over")
        if supervisor.runner is not None and supervisor.runner.is_turning:
            raise UsageError("a deploy is under way: upgrade once it is decided")
        number = self.status.get("number", 0) + 1
        self.status = {"number": number, "state": "running", "from": __version__}
        try:
            await supervisor.reloader.finish()
            command = program_command()
            version, program = await ask_new_version(command, supervisor.export())
            self._check_stop()
            logger.info("upgrading from version %s to %s: %s", __version__, version, shlex.join(command))
            self.status["to"] = version
            successors = await supervisor.fleet.start_successors(program)
        except Exception as error:
            self._fail(str(error) or type(error).__name__)
            if isinstance(error, UsageError):
                raise
            logger.exception("the upgrade crashed")
            raise UsageError(f"the upgrade crashed: {error!r}") from error
        asyncio.get_running_loop().call_later(_ANSWER_S, self._execute_soon, command, successors)

    @property
    def is_running(self) -> bool:
        """Say whether an upgrade is under way; in the new version too, until it has taken over."""
        return self.status.get("state") == "running"

    def _check_stop(self) -> None:
        if self._supervisor.is_stopping:
            raise UsageError("the proxy is stopping")

    def _execute_soon(self, command: list[str], successors: list[WorkerLink]) -> None:
        spawn(self._execute(command, successors), "execute the new version")

    async def _execute(self, command: list[str], successors: list[WorkerLink]) -> None:
        # From here on signals wait for the new version; those that came before have been noticed two turns later.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        try:
            self._check_stop()
        except UsageError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
            self._supervisor.fleet.drop_successors()
            self._fail(str(error))
            return
        self._supervisor.notifier.reloading(f"upgrading to version {self.status['to']}")
        inheritance = await self._supervisor.leave(successors)
        try:
            execute(command, inheritance)
        except OSError as error:
            # It could be run a moment ago. All parts have ended; this very version can still go on from the state.
            logger.critical("cannot execute %s: %s", command[0], error.strerror)
            execute([sys.executable, *sys.orig_argv[1:]], inheritance)

    def _fail(self, reason: str) -> None:
        self.outcomes["failed"] += 1
        self.status |= {"state": "failed", "reason": reason}
        logger.error("cannot upgrade, version %s goes on: %s", __version__, reason)
        self._supervisor.on_free()

    async def take_over(self) -> None:
        """Be the new version: let its workers take over from the old ones."""
        supervisor = self._supervisor
        began = time.monotonic()
        try:
            counts = await supervisor.fleet.take_over(supervisor.config.grace_s)
        except StickyproxyError as error:  # workers of both versions run: all is served
            self._fail(str(error))
            return
        self.status |= {"state": "ok", "to": __version__, "grace_s": supervisor.config.grace_s, **counts}
        self.status["seconds"] = round(time.monotonic() - began, 3)
        self.outcomes["ok"] += 1
        logger.info("upgraded from version %s to %s: %s", self.status.get("from"), __version__, describe(self.status))


def describe(status: Mapping[str, Any]) -> str:
    """Return what has moved in an upgrade and what has not, in words."""
    moved = f"{status.get('moved_tunnel', 0)} tunnels and {status.get('moved_downstream', 0)} connections have moved"
    failed = status.get("failed", 0)
    if failed:
        moved += f"; {failed} old workers could not hand over, and serve on: the log says why"
    left = {words: status.get(f"left_{kind}", 0) for kind, words in _LEFT.items()}
    rest = ", ".join(f"{count} {words}" for words, count in left.items() if count)
    if not rest:
        return moved
    return f"{moved}; {rest} cannot, and have {status.get('grace_s', 0):g} s to end in the old workers"


def program_command() -> list[str]:
    """Return what runs this program as it was run: the script, which names its interpreter, or the interpreter.

    A script behind a link that is pointed to another release runs that release.
    """
    script = os.path.abspath(sys.argv[0])  # noqa: PTH100 -- links in it must stay
    is_script = sys.orig_argv[1:2] == sys.argv[:1] and os.access(script, os.X_OK)
    return [script, *sys.argv[1:]] if is_script else [sys.executable, *sys.orig_argv[1:]]


def check(inheritance: Inheritance) -> dict[str, Any]:
    """Return what the old version must know of this one, which has been able to read its state."""
    if not inheritance.loaded.config.has_upstreams:
        raise UsageError("no upstreams in the configuration as this version reads it")
    program = Program.own()
    return {
        "protocol": PROTOCOL,
        "version": __version__,
        "command": list(program.command),
        "environment": dict(program.environment),
    }


async def ask_new_version(command: Sequence[str], inheritance: Inheritance) -> tuple[str, Program]:
    """Run the new version as far as to say that it can go on from this state; return its version and its workers.

    Raises UsageError with its reason where it cannot.
    """
    descriptor, environment = leave(inheritance, is_check=True)
    try:
        status, output, words = await _run(command, environment, descriptor)
    finally:
        os.close(descriptor)
    if status:
        said = words.decode(errors="replace").strip()
        logger.debug("the new version said: %s", said)
        raise UsageError(f"the new version cannot start: {_shorten(said) or f'exit status {status}'}")
    try:
        answer = json.loads(output)
        if answer["protocol"] != PROTOCOL:
            raise UsageError(f"version {answer['version']} cannot take over from {__version__}: restart the proxy")
        return str(answer["version"]), Program(tuple(answer["command"]), dict(answer["environment"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"what is installed now knows no upgrades: it said {output[:200]!r}") from error


def _shorten(said: str) -> str:
    """Return the last words of a program; of a traceback the error, and where it was raised."""
    if "Traceback (most recent call last)" not in said and "SyntaxError" not in said:
        return said[-_MAX_WORDS:]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    places = [line for line in lines if line.startswith('File "')]
    return f"{lines[-1]} ({places[-1]})" if places else lines[-1]


async def _run(command: Sequence[str], environment: dict[str, str], descriptor: int) -> tuple[int, bytes, bytes]:
    """Run the very command that this process was run with; return its exit status, its output and its errors."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, pass_fds=[descriptor], stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"cannot run {command[0]}: {(error.strerror or str(error)).lower()}") from error
    try:
        async with asyncio.timeout(_CHECK_S):
            output, words = await process.communicate()
    except TimeoutError as error:
        raise UsageError(f"the new version said nothing within {_CHECK_S:g} s") from error
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
    return process.returncode or 0, output, words


async def keep_signals_from_threads() -> None:
    """Begin to hold the signals, in the threads of the process for ever: the main thread alone is to get them.

    A thread that takes a signal while the main one holds it, just before the new version is executed, takes it along.
    The threads of the loop itself begin with the first look-up of a name, and all at once.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(initializer=_hold_signals, thread_name_prefix="stickyproxy"))
    with suppress(OSError):  # it is no number
        await loop.getaddrinfo("localhost", 0, flags=socket.AI_NUMERICHOST)


def _hold_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)


def execute(command: Sequence[str], inheritance: Inheritance) -> None:
    """Become the new version; returns never. Raises OSError where the command cannot be executed.

    Signals must be held until it can handle them: most would end a process that has no handlers yet.
    """
    descriptor, environment = leave(inheritance, is_check=False)
    for one in (descriptor, *inheritance.descriptors()):
        os.set_inheritable(one, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), environment)  # noqa: S606 -- as above, without a shell
