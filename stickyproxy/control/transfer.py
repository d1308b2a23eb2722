"""The channel between two workers over which one gives the other its connections and sessions.

A batch is asked for ("connections") and prepared by the receiver, which answers; then the sender says "go". Only after
that the receiver reads or writes. Where the sender hears no answer, it never says so and goes on itself; where the
receiver hears no "go", it gives the batch up. So one of the two has a connection, never both.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.affinity.sessions import ActiveSession
from stickyproxy.control.channel import Channel, Message
from stickyproxy.errors import ChannelError
from stickyproxy.observe.counters import HANDED
from stickyproxy.proxy.arrival import arrive
from stickyproxy.proxy.departure import Mover
from stickyproxy.proxy.handover import HandOverError, read_state
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    import socket
    from collections import Counter
    from collections.abc import Sequence

    from stickyproxy.control.worker import Worker
    from stickyproxy.proxy.arrival import Arrival
    from stickyproxy.proxy.departure import Departure

logger = logging.getLogger(__name__)

_BATCH_S: Final = 15.0  # for the receiver to prepare a batch; it takes some milliseconds
_SESSIONS_AT_ONCE: Final = 1000


class Sender:
    """Gives all that can move of a worker to another one. `moved` counts by kind."""

    def __init__(self, worker: Worker, link: socket.socket) -> None:
        self._plane = worker.plane
        self._channel = Channel(link, lambda _: None)
        self._mover = Mover(worker.plane, self._send)

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
            self._channel.send("sessions", {"sessions": sessions})
            await self._channel.flush()
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
        except ChannelError:
            # The receiver must not go on with a batch that it may still prepare.
            self._channel.close()
            raise
        if "refused" in answer.body:
            logger.warning("the other worker cannot take over: %s", answer.body["refused"])
            return False
        self._channel.send("go")
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
        self._channel = Channel(link, self._on_message, self._on_lost)

    def _on_message(self, message: Message) -> None:
        match message.kind:
            case "connections":
                message = Message(message.kind, message.body, message.take_descriptors(), message.number)
                spawn(self._prepare(message), "take over connections")
            case "go":
                self._go()
            case "sessions":
                self._take_sessions(message)
            case kind:
                self._channel.refuse(message, f"this version knows no {kind!r}")

    def _take_sessions(self, message: Message) -> None:
        plane = self._worker.plane
        try:
            sessions = [
                ActiveSession(bytes.fromhex(client_id), bytes.fromhex(digest), int(pinned_at), float(idle_s))
                for client_id, digest, pinned_at, idle_s in message.body["sessions"]
            ]
        except (TypeError, ValueError, KeyError):
            logger.exception("what came are no sessions")
            return
        plane.sessions.take_in(sessions, plane.now)

    async def _prepare(self, message: Message) -> None:
        """Make transports of all connections of a batch, or of none; nothing is read yet."""
        worker, descriptors, made = self._worker, message.take_descriptors(), list[Any]()
        try:
            states, counts = message.body["states"], message.body["counts"]
            if sum(counts) != len(descriptors) or len(states) != len(counts):
                raise HandOverError(f"{len(descriptors)} descriptors came for {len(states)} connections")  # noqa: TRY301
            for written, count in zip(states, counts, strict=True):
                state = read_state(written)
                theirs, descriptors = descriptors[:count], descriptors[count:]
                made.append(await arrive(worker.plane, worker.listeners.values(), state, theirs))
        except (HandOverError, KeyError, TypeError) as error:
            message.descriptors = descriptors  # closed below
            for arrival in made:
                arrival.drop()
            self._channel.answer(message, {"refused": str(error)})
        else:
            if self._channel.is_closed:
                for arrival in made:
                    arrival.drop()
                return
            self._prepared = made
            self._channel.answer(message)
        finally:
            message.close()

    def _go(self) -> None:
        prepared, self._prepared = self._prepared, []
        for arrival in prepared:
            arrival.go()

    def _on_lost(self, _: str) -> None:
        prepared, self._prepared = self._prepared, []
        for arrival in prepared:
            arrival.drop()

    @override
    def __repr__(self) -> str:
        return f"<Receiver prepared={len(self._prepared)}>"
