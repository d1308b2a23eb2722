"""The channel between two workers over which one gives the other its connections and sessions.

A batch is asked for ("connections") and prepared by the receiver, which answers; then the sender says "go". Only after
that the receiver reads or writes. Where the sender hears no answer, or cannot say "go", it goes on itself; where the
receiver hears no "go", it gives the batch up. So one of the two has a connection, never both; it is lost only with the
process that has it: from "go" on, that is the receiver.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.affinity.sessions import ActiveSession
from stickyproxy.affinity.snapshot import DIGEST_BYTES
from stickyproxy.affinity.token import CLIENT_ID_BYTES
from stickyproxy.control.channel import Channel, Message, TooLargeError
from stickyproxy.errors import ChannelError
from stickyproxy.observe.counters import HANDED
from stickyproxy.proxy.arrival import Arrival, arrive
from stickyproxy.proxy.departure import Mover
from stickyproxy.proxy.handover import HandOverError, read_state
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    import socket
    from collections import Counter
    from collections.abc import Sequence

    from stickyproxy.control.worker import Worker
    from stickyproxy.proxy.departure import Departure

logger = logging.getLogger(__name__)

_BATCH_S: Final = 15.0  # for the receiver to prepare a batch; it takes some milliseconds
_SESSIONS_AT_ONCE: Final = 1000
_MAX_SECONDS: Final = 1 << 32  # of the wall clock, as in a token: until 2106


class Sender:
    """Gives what can move of a worker to another one, `limit` connections at most. `moved` counts by kind."""

    def __init__(self, worker: Worker, link: socket.socket, *, limit: float = math.inf) -> None:
        self._plane = worker.plane
        self._channel = Channel(link, lambda _: None)
        self._mover = Mover(worker.plane, self._send, limit=limit)

    @property
    def moved(self) -> Counter[str]:
        """Return how many connections have moved, by kind."""
        return self._mover.moved

    async def send(self) -> Counter[str]:
        """Send the sessions and what can move now; return how many connections are left, by what keeps them.

        Raises ChannelError where the receiver is gone; what has not moved then goes on here.
        """
        plane = self._plane
        for piece in plane.sessions.export(plane.now, at_once=_SESSIONS_AT_ONCE):
            sessions = [[one.client_id.hex(), one.digest.hex(), one.pinned_at, one.idle_s] for one in piece]
            await self._channel.request("sessions", {"sessions": sessions})
        left = await self._mover.move()
        plane.sessions.forget_idle()
        return left

    async def finish(self, timeout_s: float) -> Counter[str]:
        """Send what can move later, for so long at most; return how many are left, by what keeps them."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._mover.finish()
        except TimeoutError:
            return self._mover.left()

    async def close(self) -> None:
        """Let what has not moved stay."""
        await self._mover.stop()
        await self._channel.flush()
        self._channel.close()

    async def _send(self, batch: Sequence[Departure]) -> bool:
        states = [one.state.to_json() for one in batch]
        descriptors = [descriptor for one in batch for descriptor in one.descriptors]
        body = {"states": states, "counts": [len(one.descriptors) for one in batch]}
        try:
            answer = await self._channel.request("connections", body, descriptors, timeout_s=_BATCH_S)
        except TooLargeError as error:
            logger.warning("%d connections cannot move at once: %s", len(batch), error)
            return False
        except BaseException:
            # The receiver must not go on with a batch that it may still prepare.
            self._channel.close()
            raise
        if "refused" in answer.body:
            logger.warning("the other worker cannot take over: %s", answer.body["refused"])
            return False
        self._channel.send("go")
        if not self._channel.is_open:
            raise ChannelError("the receiver ended before it could go on")
        for one in batch:
            self._plane.counters.cells[HANDED["tunnels" if one.state.kind == "tunnel" else "connections"]] += 1
        return True

    @override
    def __repr__(self) -> str:
        return f"<Sender {self._mover}>"


class Receiver:
    """Takes over what a sender gives; it ends when the sender closes the channel."""

    def __init__(self, worker: Worker, link: socket.socket) -> None:
        self._worker = worker
        self._prepared: list[Arrival] = []
        self._is_preparing = False
        self._channel = Channel(link, self._on_message, self._on_lost)

    def _on_message(self, message: Message) -> None:
        match message.kind:
            case "connections":
                self._begin(message)
            case "go":
                self._go()
            case "sessions":
                self._take_sessions(message)
            case kind:
                self._channel.refuse(message, f"this version knows no {kind!r}")

    def _take_sessions(self, message: Message) -> None:
        plane = self._worker.plane
        try:
            sessions = [_read_session(*written) for written in message.body["sessions"]]
        except (TypeError, ValueError, KeyError) as error:
            self._channel.refuse(message, f"what came are no sessions: {error!r}")
            return
        plane.sessions.take_in(sessions, plane.now)
        if plane.on_tick is not None:
            plane.on_tick()  # before the sender forgets them: no session is ever counted by nobody
        self._channel.answer(message)

    def _begin(self, message: Message) -> None:
        if self._is_preparing or self._prepared:
            self._channel.refuse(message, "the connections before these have not been gone on with")
            return
        self._is_preparing = True
        message = Message(message.kind, message.body, message.take_descriptors(), message.number)
        spawn(self._prepare(message), "take over connections")

    async def _prepare(self, message: Message) -> None:
        """Make transports of all connections of a batch, or of none; nothing is read yet."""
        made: list[Arrival] = []
        refused = ""
        try:
            await self._make(message, made)
        except HandOverError as error:
            refused = str(error)
        except Exception as error:
            logger.exception("cannot take over connections")
            refused = repr(error)
        finally:
            message.close()
            self._is_preparing = False
        if refused or self._channel.is_closed:
            for arrival in made:
                arrival.drop()
            self._channel.answer(message, {"refused": refused})
        else:
            self._prepared = made
            self._channel.answer(message)

    async def _make(self, message: Message, made: list[Arrival]) -> None:
        """Add an arrival for each connection to `made`; raise HandOverError where one cannot be taken over."""
        states, counts = message.body.get("states"), message.body.get("counts")
        if not (isinstance(states, list) and isinstance(counts, list) and len(states) == len(counts)):
            raise HandOverError("what came are no connections")
        if not all(type(one) is int and one > 0 for one in counts) or sum(counts) != len(message.descriptors):
            raise HandOverError(f"{len(message.descriptors)} descriptors came for {len(states)} connections")
        worker, arriving = self._worker, []
        for state, count in zip([read_state(written) for written in states], counts, strict=True):
            theirs, message.descriptors = message.descriptors[:count], message.descriptors[count:]
            arriving.append(arrive(worker.plane, worker.listeners.values(), state, theirs))
        # All at once: each takes some turns of the loop, which are long where thousands of tunnels are busy.
        arrived = await asyncio.gather(*arriving, return_exceptions=True)
        made += [one for one in arrived if isinstance(one, Arrival)]
        for one in arrived:
            if isinstance(one, BaseException):
                raise one

    def _go(self) -> None:
        prepared, self._prepared = self._prepared, []
        for arrival in prepared:
            try:
                arrival.go()
            except Exception:
                logger.exception("a connection that was taken over is lost")
                arrival.drop()

    def _on_lost(self, _: str) -> None:
        prepared, self._prepared = self._prepared, []
        for arrival in prepared:
            arrival.drop()

    @override
    def __repr__(self) -> str:
        return f"<Receiver prepared={len(self._prepared)}>"


def _read_session(client_id: Any, digest: Any, pinned_at: Any, idle_s: Any) -> ActiveSession:
    """Return a session; raise ValueError or TypeError where it is none that a token could stand for."""
    session = ActiveSession(bytes.fromhex(client_id), bytes.fromhex(digest), pinned_at, idle_s)
    if (len(session.client_id), len(session.digest)) != (CLIENT_ID_BYTES, DIGEST_BYTES):
        raise ValueError("an id of another length")
    if type(pinned_at) is not int or not 0 <= pinned_at < _MAX_SECONDS:
        raise ValueError("no time when it was pinned")
    if type(idle_s) not in {int, float} or not math.isfinite(idle_s) or idle_s < 0:
        raise ValueError("no time since its last request")
    return session
