"""Messages between two processes of the proxy: JSON over a Unix stream socket, with descriptors (SCM_RIGHTS).

A frame is a header of 12 bytes (magic, descriptors, length of the JSON) and the JSON of one object. Descriptors travel
beside the first byte of their frame (unix(7)). Whatever is no such frame ends the channel: what cannot be understood is
never guessed at, and no descriptor of it stays open.
"""

from __future__ import annotations

import array
import asyncio
import errno
import json
import logging
import os
import socket
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.errors import ChannelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HEAD: Final = struct.Struct("!4sII")
_MAGIC: Final = b"STK1"
MAX_DESCRIPTORS: Final = 250  # in one message; SCM_MAX_FD of the kernel is 253
_MAX_BYTES: Final = 32 * 1024 * 1024
_READ_BYTES: Final = 256 * 1024
_RETRY_S: Final = 0.01  # after ETOOMANYREFS: more descriptors are on their way than the process may have open
_NOT_INHERITED: Final[int] = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # from the first moment, where the system can

logger = logging.getLogger(__name__)


class TooLargeError(ChannelError):
    """A message has more descriptors or more text than one may have; nothing of it was sent."""


@dataclass(slots=True)
class Message:
    """One message. `descriptors` belong to whoever handles it; those that are still in the list afterwards are closed.

    `number` is set where an answer is awaited.
    """

    kind: str
    body: dict[str, Any]
    descriptors: list[int] = field(default_factory=list)
    number: int | None = None

    def take_descriptors(self) -> list[int]:
        """Return the descriptors, which the caller must close from now on."""
        taken, self.descriptors = self.descriptors, []
        return taken

    def close(self) -> None:
        """Close the descriptors that nobody has taken."""
        _close_all(self.take_descriptors())


class Channel:
    """One end of a channel, on the running loop.

    `on_message` is called with each message that is no answer, `on_lost` once, with the reason, when the other end is
    gone or has sent what is no message; never from within `send`. What the other end sent before it went still counts.
    An exception of `on_message` is logged, and is the answer where one is awaited.
    """

    def __init__(
        self,
        link: socket.socket,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None] | None = None,
        received: bytes = b"",
    ) -> None:
        link.setblocking(False)
        self._link = link
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._received = bytearray(received)
        self._descriptors: deque[int] = deque()  # received, not given to a message yet
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        # Not from 0 on: an answer may come to what a former image of this process has asked.
        self._numbers = int.from_bytes(os.urandom(4), "big")
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._flushed: asyncio.Future[None] | None = None
        self._is_waiting = False
        self._is_mute = False  # the other end takes nothing any more; what it has sent is still to be read
        self.is_closed = False
        self._loop.add_reader(link.fileno(), self._read)
        if received:
            self._loop.call_soon(self._take_messages)

    @property
    def is_open(self) -> bool:
        """Say whether what is sent may arrive."""
        return not self.is_closed and not self._is_mute

    def send(self, kind: str, body: dict[str, Any] | None = None, descriptors: Sequence[int] = ()) -> None:
        """Send a message; nothing happens where the channel is not open. The descriptors are duplicated first.

        Raises TooLargeError, and ChannelError where no descriptor is left for the duplicates; nothing is sent then.
        """
        self._send({"kind": kind, **({"body": body} if body else {})}, descriptors)

    async def request(
        self, kind: str, body: dict[str, Any] | None = None, descriptors: Sequence[int] = (), *, timeout_s: float = 30.0
    ) -> Message:
        """Send a message and return its answer; raise ChannelError where none comes, or one that says why not.

        Raises TooLargeError as `send` does. The descriptors of the answer are the caller's.
        """
        if not self.is_open:
            raise ChannelError("the other process is gone")
        self._numbers += 1
        number = self._numbers
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._answers[number] = answer
        try:
            self._send({"kind": kind, "number": number, **({"body": body} if body else {})}, descriptors)
            async with asyncio.timeout(timeout_s):
                message = await answer
        except TimeoutError as error:
            _drop(answer)
            raise ChannelError(f"no answer within {timeout_s:g} s") from error
        except BaseException:
            _drop(answer)
            raise
        finally:
            self._answers.pop(number, None)
        if "error" in message.body:
            message.close()
            raise ChannelError(str(message.body["error"]))
        return message

    def answer(self, message: Message, body: dict[str, Any] | None = None, descriptors: Sequence[int] = ()) -> None:
        """Answer a message that awaits it; nothing happens where none is awaited."""
        if message.number is not None:
            self._send({"kind": "answer", "to": message.number, "body": body or {}}, descriptors)

    def refuse(self, message: Message, reason: str) -> None:
        """Answer that what was asked for cannot be done."""
        self.answer(message, {"error": reason})

    def _send(self, envelope: dict[str, Any], descriptors: Sequence[int]) -> None:
        if not self.is_open:
            return
        text = json.dumps(envelope, separators=(",", ":")).encode()
        if len(descriptors) > MAX_DESCRIPTORS or len(text) > _MAX_BYTES:
            raise TooLargeError(f"too large to send: {len(descriptors)} descriptors, {len(text)} bytes")
        frame = _HEAD.pack(_MAGIC, len(descriptors), len(text)) + text
        self._unsent.append((memoryview(frame), _duplicate(descriptors)))
        if not self._is_waiting:
            self._write()

    def _write(self) -> None:
        self._stop_waiting()
        while self._unsent:
            data, descriptors = self._unsent[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._link.sendmsg([data], ancillary)
            except BlockingIOError:
                self._is_waiting = True
                self._loop.add_writer(self._link.fileno(), self._write)
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    self._is_waiting = True
                    self._loop.call_later(_RETRY_S, self._write)
                    return
                self._fail(error.strerror or str(error))
                return
            _close_all(descriptors)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = data[sent:], []
        self._wake_flushing()

    def _fail(self, reason: str) -> None:
        """Send nothing more, and end once all is read that the other end sent before it went."""
        self._is_mute = True
        self._drop_unsent()
        self._loop.call_soon(self._end, reason)

    def _end(self, reason: str) -> None:
        self.read_rest()
        self._lose(reason)

    def _drop_unsent(self) -> None:
        for _, descriptors in self._unsent:
            _close_all(descriptors)
        self._unsent.clear()
        self._wake_flushing()

    def _wake_flushing(self) -> None:
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            if not self.is_closed:
                self._loop.remove_writer(self._link.fileno())

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all messages have been given to the kernel, or the time is over."""
        if self._unsent and not self.is_closed:
            if self._flushed is None or self._flushed.done():
                self._flushed = self._loop.create_future()
            await asyncio.wait((self._flushed,), timeout=timeout_s)

    def read_rest(self) -> None:
        """Take all that has come by now: of a process that has ended, all that it ever sent."""
        while not self.is_closed and self._read():
            pass

    def _read(self) -> bool:
        """Take some of what has come, and say whether there may be more."""
        space = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
        try:
            data, ancillary, flags, _ = self._link.recvmsg(_READ_BYTES, space, _NOT_INHERITED)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(error.strerror or str(error))
            return False
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._descriptors.extend(numbers)
                if not _NOT_INHERITED:
                    for one in numbers:
                        os.set_inheritable(one, False)
        if flags & socket.MSG_CTRUNC:
            self._lose("descriptors were lost: too many at once, or too many open")
        elif not data:
            self._lose("the other process closed the channel")
        else:
            self._received += data
            self._take_messages()
        return True

    def _take_messages(self) -> None:
        received = self._received
        while len(received) >= _HEAD.size and not self.is_closed:
            magic, count, size = _HEAD.unpack_from(received)
            if magic != _MAGIC or count > MAX_DESCRIPTORS or size > _MAX_BYTES:
                self._lose("what came is no message")
                return
            end = _HEAD.size + size
            if len(received) < end:
                break
            text = bytes(received[_HEAD.size : end])
            del received[:end]
            if len(self._descriptors) < count:
                self._lose("a message came without its descriptors")
                return
            self._take(text, [self._descriptors.popleft() for _ in range(count)])
        if len(self._descriptors) > self._count_expected():
            self._lose("descriptors came that belong to no message")

    def _count_expected(self) -> int:
        """Return how many descriptors the message that has begun may have: they come beside its first byte."""
        if len(self._received) < _HEAD.size:
            return MAX_DESCRIPTORS if self._received else 0
        return int(_HEAD.unpack_from(self._received)[1])

    def _take(self, text: bytes, descriptors: list[int]) -> None:
        try:
            envelope = json.loads(text)
            message = Message(str(envelope["kind"]), dict(envelope.get("body") or {}), descriptors)
            number, answered = envelope.get("number"), envelope.get("to")
            if not all(one is None or isinstance(one, int) for one in (number, answered)):
                raise ValueError("no number")  # noqa: TRY301 -- all that is wrong ends in one place
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            _close_all(descriptors)
            self._lose("what came is no message")
            return
        message.number = number
        if message.kind == "answer" and answered is not None:
            waiting = self._answers.get(answered)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)  # whoever waits takes the descriptors
                return
        else:
            self._handle(message)
        message.close()

    def _handle(self, message: Message) -> None:
        try:
            self._on_message(message)
        except Exception as error:
            logger.exception("cannot handle the message %r", message.kind)
            self.refuse(message, f"{type(error).__name__}: {error}")

    def _lose(self, reason: str) -> None:
        if self.is_closed:
            return
        self.close()
        if self._on_lost is not None:
            self._on_lost(reason)

    def detach(self) -> tuple[socket.socket, bytes]:
        """Return the socket and what has come of a next message: another process image goes on with them.

        All that was sent must have been flushed: what was not is dropped, as are the descriptors of the next message.
        Where the channel is closed, so is the socket.
        """
        if not self.is_closed:
            self._part()
        return self._link, bytes(self._received)

    def close(self) -> None:
        """Close the channel and all descriptors that were not sent or not taken; who waits for an answer learns it."""
        if not self.is_closed:
            self._part()
            self._link.close()

    def _part(self) -> None:
        """Look at the socket no more, and let go of everything but it."""
        self._loop.remove_reader(self._link.fileno())
        self._stop_waiting()
        self.is_closed = True
        self._drop_unsent()
        _close_all(self._descriptors)
        self._descriptors.clear()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ChannelError("the other process is gone"))
        self._answers.clear()

    @override
    def __repr__(self) -> str:
        return f"<Channel {'closed' if self.is_closed else self._link.fileno()} unsent={len(self._unsent)}>"


def _duplicate(descriptors: Sequence[int]) -> list[int]:
    """Return duplicates of all descriptors; raise ChannelError, with none of them open, where that cannot be."""
    copies: list[int] = []
    try:
        for one in descriptors:
            copies.append(os.dup(one))  # noqa: PERF401 -- those made are closed below
    except OSError as error:
        _close_all(copies)
        raise ChannelError(f"a descriptor cannot be sent: {(error.strerror or str(error)).lower()}") from error
    return copies


def _drop(answer: asyncio.Future[Message]) -> None:
    """Close what came with an answer that nobody waits for any more."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        answer.result().close()


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for one in descriptors:
        with suppress(OSError):
            os.close(one)
