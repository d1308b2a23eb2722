"""One app process: how it is started, what it writes, that it has ended, and that nothing of its group stays."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy.control.pidfd import Watch, describe
from stickyproxy.control.runner.launch import LINK
from stickyproxy.control.runner.lines import Lines
from stickyproxy.control.runner.program import start_program
from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stickyproxy.control.runner.warden import Warden

logger = logging.getLogger(__name__)

_LAST_LINES: Final = 200
_STOP_TIMEOUT_S: Final = 10.0
_CHUNK_BYTES: Final = 64 * 1024
_REST_BYTES: Final = 1024 * 1024  # at most, of what is left in the pipe at the end: as much as a pipe may hold
_LOOK_S: Final = 0.02  # no event tells that a process group has ended, once its leader has
_KILL_S: Final = 5.0  # for the system to end what got SIGKILL: more only where a disk or a network does not answer
_PROGRAM: Final = "launch.py"


class AppProcess:
    """An app process with all that it starts, as far as that stays in its process group.

    Its words are a command without placeholders; `env` is its whole environment; without `cwd` it runs where this
    process does. Each line of its output goes to `on_line`, after the id of its upstream. It ends by `stop_signal`, or
    after `stop_timeout_s` by SIGKILL, also where the warden ends it.
    """

    def __init__(  # noqa: PLR0913, PLR0917 -- what there is to know of one process
        self,
        upstream_id: str,
        words: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None,
        warden: Warden,
        on_line: Callable[[str, str], None],
        stop_signal: int = signal.SIGTERM,
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        self.upstream_id = upstream_id
        self.words = tuple(words)
        self.env = env
        self.cwd = cwd
        self.stop_signal = stop_signal
        self.stop_timeout_s = stop_timeout_s
        self.process_id = 0
        """The id of the process, and of its group; 0 before it is started. When it has ended it may be another's."""
        self.started_at = 0.0
        """When the command was executed, by the clock of the loop; 0 until then."""
        self.exit_status: int | None = None
        """As of `subprocess`: below 0 a signal. None while it runs, or where nobody knows."""
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """How the process ended, in words, once it has; all that it had written until then has been read."""
        self._warden = warden
        self._on_line = on_line
        self._lines = Lines()
        self._output: int | None = None
        self._watch: Watch | None = None
        self._has_group = False
        self._stops = 0  # how many wait for its end, and see to its group

    @property
    def is_running(self) -> bool:
        """Say whether there is a process that has not ended."""
        return bool(self.process_id) and not self.ended.done()

    async def start(self) -> None:
        """Start the process; return when its command has been executed, whatever becomes of it then.

        Raises UsageError with the reason where it cannot be executed. Nothing of it stays then, nor if the call is
        cancelled. It is called once, instead of `adopt`.
        """
        process_id, link = self._spawn()
        try:
            await self._launch(process_id, link)
        except BaseException:
            self.kill()
            raise
        finally:
            link.close()
        self.started_at = asyncio.get_running_loop().time()

    def _spawn(self) -> tuple[int, socket.socket]:
        """Start the program that becomes the app; return its process id, and the socket that it waits at."""
        locale = "LC_CTYPE" if "LC_CTYPE" in self.env else ""
        arguments = [locale, "" if self.cwd is None else str(self.cwd), *self.words]
        with ExitStack() as stack:
            link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.callback(theirs.close)
            output, written = os.pipe()
            stack.callback(os.close, written)
            descriptors = {1: written, 2: written, LINK: theirs.fileno()}
            try:
                process_id = start_program(_PROGRAM, arguments, self.env, descriptors)
            except (OSError, ValueError) as error:
                link.close()
                os.close(output)
                reason = _explain(error.errno) if isinstance(error, OSError) else str(error)
                raise UsageError(f"cannot run {self.words[0]!r}: {reason}") from error
        link.setblocking(False)
        self._follow(process_id, output)
        return process_id, link

    def _follow(self, process_id: int, output: int | None) -> None:
        self.process_id = process_id
        self._has_group = True
        self._output = output
        if output is not None:
            os.set_inheritable(output, False)
            os.set_blocking(output, False)
            asyncio.get_running_loop().add_reader(output, self._read)
        self._watch = Watch(process_id, self._on_end)

    async def _launch(self, process_id: int, link: socket.socket) -> None:
        """Let the program go, as soon as the warden knows of it; raise UsageError where it cannot become the app."""
        if not await _receive(link):
            raise UsageError(f"cannot run {self.words[0]!r}: {await self._explain_end()}")
        self._warden.add(process_id, self.stop_signal, self.stop_timeout_s)
        with suppress(OSError):  # it was killed just now
            await asyncio.get_running_loop().sock_sendall(link, b"g")
        failure = b""
        while data := await _receive(link):
            failure += data
        if failure:
            await asyncio.wait([self.ended])
            raise UsageError(f"cannot run {self.words[0]!r}: {self._explain_failure(failure)}")

    async def _explain_end(self) -> str:
        """Return why the program has ended before it could be let go, once it has."""
        how = await asyncio.shield(self.ended)
        return f"{how} before it could begin{''.join(f': {line}' for line in list(self.last_lines)[-1:])}"

    def _explain_failure(self, failure: bytes) -> str:
        number, _, step = failure.decode(errors="replace").partition(" ")
        reason = _explain(int(number))
        if step == "chdir":
            return f"its directory {self.cwd}: {reason}"
        if step == "interpreter":
            return f"{reason}: the interpreter that its first line names"
        return reason

    # Its output

    def _read(self) -> None:
        if self._read_some() == 0:
            self._close_output()

    def _read_some(self) -> int | None:
        """Read once; return how many bytes there were, 0 at the end, None while there are none."""
        if self._output is None:
            return 0
        try:
            data = os.read(self._output, _CHUNK_BYTES)
        except BlockingIOError:
            return None
        self._show(self._lines.feed(data))
        return len(data)

    def _read_rest(self) -> None:
        """Read what is there; not for ever, since what has left the group may still write."""
        rest = _REST_BYTES
        while rest > 0 and (count := self._read_some()):
            rest -= count

    def _show(self, lines: list[str]) -> None:
        for line in lines:
            self.last_lines.append(line)
            self._on_line(self.upstream_id, line)

    def _close_output(self) -> None:
        self._show(self._lines.finish())
        if self._output is not None:
            asyncio.get_running_loop().remove_reader(self._output)
            os.close(self._output)
            self._output = None

    # Its end

    def _on_end(self, status: int | None) -> None:
        """Take note of the end; where it was not asked for, the others of the group have nobody to lead them."""
        self.exit_status = None if status is None else os.waitstatus_to_exitcode(status)
        self._watch = None
        try:
            if self._stops:
                self._read_rest()
            else:
                self._part()
        finally:
            self.ended.set_result(describe(status))

    async def stop(self, number: int | None = None, timeout_s: float | None = None) -> None:
        """End the process with its group: by a signal, `stop_signal` by default, by SIGKILL after a timeout.

        Returns when the whole group has ended. What the process started has the rest of the timeout when it has ended
        itself. May be called again at any time: the shortest timeout counts. When it is cancelled, the signal was sent,
        and what is left of the group is killed when the process ends.
        """
        number = self.stop_signal if number is None else number
        timeout_s = self.stop_timeout_s if timeout_s is None else timeout_s
        until = asyncio.get_running_loop().time() + timeout_s
        self._stops += 1
        try:
            self._signal(number)
            self._signal(signal.SIGCONT)  # a stopped process notices no other signal
            if not await self._wait_for_group(until):
                self._signal(signal.SIGKILL)
                if not await self._wait_for_group(asyncio.get_running_loop().time() + _KILL_S):
                    logger.error("%s (pid %s) does not even end by SIGKILL", self.upstream_id, self.process_id)
        finally:
            self._stops -= 1
            if self.ended.done() and not self._stops:
                self._part()

    async def _wait_for_group(self, until: float) -> bool:
        """Wait until nothing of the group is left, or until an instant of the loop's clock; say whether nothing is."""
        loop = asyncio.get_running_loop()
        if self._has_group:
            await asyncio.wait([self.ended], timeout=max(0, until - loop.time()))
        while self._lives_on():
            if loop.time() >= until:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def _lives_on(self) -> bool:
        """Say whether anything of the group is left; wait for those of it that have become children of this process."""
        if not self._has_group:
            return False
        if not self.ended.done():
            return True
        with suppress(ChildProcessError):  # as a rule: they have become those of process 1
            while os.waitpid(-self.process_id, os.WNOHANG)[0]:
                pass
        return self._signal(0)

    def _signal(self, number: int) -> bool:
        """Send a signal to the group, none with number 0; say whether there is such a group."""
        if not self._has_group:
            return False
        try:
            os.killpg(self.process_id, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # it has become another user's
            logger.debug("%s (pid %d) takes no signal %d from this user", self.upstream_id, self.process_id, number)
        return True

    def kill(self) -> None:
        """End the process with its group at once, and wait for nothing."""
        self._signal(signal.SIGKILL)
        if self._has_group and not self.ended.done():  # it may be about to make its group
            with suppress(ProcessLookupError):
                os.kill(self.process_id, signal.SIGKILL)

    def _part(self) -> None:
        """Leave nothing behind of a process that has ended."""
        self._signal(signal.SIGKILL)
        self._read_rest()
        self._close_output()
        if self._has_group:
            self._warden.remove(self.process_id)
        self._has_group = False

    # Another image of this process goes on

    def leave(self) -> dict[str, Any]:
        """Part from the process without touching it; return, as JSON, what another image of this one needs to go on.

        Its output stays open over the execution, and must not get into any other process until then. Raises ValueError
        for a process that `start` has not returned for.
        """
        if not self.started_at:
            raise ValueError(f"{self!r} has not been started yet")
        if self.ended.done():  # it is being stopped: what is left of its group has nobody to lead, nor to wait for it
            self._part()
        state = {
            "upstream_id": self.upstream_id,
            "stop_signal": int(self.stop_signal),
            "stop_timeout_s": self.stop_timeout_s,
            "process_id": self.process_id,
            "started_at": self.started_at,
            "output": self._output,
            "partial": self._lines.partial.hex(),
            "last_lines": list(self.last_lines),
            "ended": self.ended.result() if self.ended.done() else None,
            "exit_status": self.exit_status,
        }
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._output is not None:
            asyncio.get_running_loop().remove_reader(self._output)
            os.set_inheritable(self._output, True)
            self._output = None
        self._has_group = False
        return state

    @classmethod
    def adopt(cls, state: Mapping[str, Any], warden: Warden, on_line: Callable[[str, str], None]) -> Self:
        """Return the process that another image of this one has left, by what `leave` returned.

        If it has ended meanwhile, that is seen a moment later. The clock goes on too: it is that of the system.
        """
        number = int(state.get("stop_signal", signal.SIGTERM))
        timeout_s = float(state.get("stop_timeout_s", _STOP_TIMEOUT_S))
        # It runs already: nobody needs its command any more.
        process = cls(str(state["upstream_id"]), (), {}, None, warden, on_line, number, timeout_s)
        process.started_at = float(state["started_at"])
        process.last_lines.extend(map(str, state.get("last_lines", ())))
        process._lines.partial = bytes.fromhex(state.get("partial", ""))
        process_id, output = int(state["process_id"]), state.get("output")
        if state.get("ended") is not None:
            process.process_id = process_id
            process.exit_status = state.get("exit_status")
            process.ended.set_result(str(state["ended"]))
        else:
            warden.add(process_id, process.stop_signal, process.stop_timeout_s)
            process._follow(process_id, None if output is None else int(output))
        return process

    @override
    def __repr__(self) -> str:
        state = self.ended.result() if self.ended.done() else "running" if self.process_id else "new"
        return f"<AppProcess {self.upstream_id} pid={self.process_id} {state}>"


async def _receive(link: socket.socket) -> bytes:
    """Return what has come over a socket, nothing when its other end is closed."""
    try:
        return await asyncio.get_running_loop().sock_recv(link, 1024)
    except ConnectionError:  # it ended with something unread
        return b""


def _explain(number: int | None) -> str:
    if number == errno.ENOEXEC:
        return "it is no program, and its first line names no interpreter"
    return os.strerror(number or 0).lower()
