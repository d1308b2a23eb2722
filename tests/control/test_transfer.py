"""Connections and sessions that go from one worker to another: each is served by exactly one of them, whatever ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from functools import wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvloop

from stickyproxy.affinity.sessions import ActiveSession
from stickyproxy.control import channel as channel_module
from stickyproxy.control import transfer as transfer_module
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.transfer import Receiver, Sender
from stickyproxy.errors import ChannelError
from stickyproxy.proxy.arrival import arrive
from stickyproxy.proxy.departure import depart
from stickyproxy.proxy.handover import read_state
from stickyproxy.tasks import spawn
from tests.helpers.loops import open_descriptors
from tests.helpers.plane import PlaneUnderTest, start_plane
from tests.helpers.raw import GET, RawLink, eventually, request
from tests.helpers.tunnels import ACCEPT, HANDSHAKE, connect, frame
from tests.proxy.moving import Pair, start_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from stickyproxy.control.worker import Worker
    from stickyproxy.proxy.departure import Departure

HELLO = frame(b"hello", is_masked=True)


def worker_of(proxy: PlaneUnderTest) -> Worker:
    """Return what of a worker is needed here: the plane and its listeners."""
    listeners = {number: listener for number, listener in enumerate(proxy.listeners)}
    return cast("Worker", SimpleNamespace(plane=proxy.plane, listeners=listeners))


class Transfer:
    """Two planes, and a channel between them. Clients connect to the old one."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.old, self.new = pair, pair.old, pair.new
        self.ends = socket.socketpair()
        self._channels: list[Channel] = []

    def sender(self) -> Sender:
        sender = Sender(worker_of(self.old), self.ends[0])
        self._channels.append(sender._channel)
        return sender

    def receiver(self) -> Receiver:
        receiver = Receiver(worker_of(self.new), self.ends[1])
        self._channels.append(receiver._channel)
        return receiver

    def both(self) -> tuple[Sender, Receiver]:
        return self.sender(), self.receiver()

    def peer(self, at: int, handle: Callable[[Channel, Message], None] = lambda _, __: None) -> Channel:
        """Return an end that does what the test says: 0 is the sender's, 1 the receiver's."""
        channel = Channel(self.ends[at], lambda message: handle(channel, message))
        self._channels.append(channel)
        return channel

    @property
    def places(self) -> tuple[int, int]:
        """Return how many connections are at the old and at the new one."""
        return self.old.plane.connections, self.new.plane.connections

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for link in self.ends:
            link.close()


@asynccontextmanager
async def start_transfer(upstreams: int = 1) -> AsyncIterator[Transfer]:
    async with AsyncExitStack() as stack:

        async def start(*args: Any, **options: Any) -> PlaneUnderTest:
            return await stack.enter_async_context(start_plane(*args, **options))

        transfer = Transfer(await start_pair(start, upstreams))
        try:
            yield transfer
        finally:
            transfer.close()


def over_two_planes(scenario: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a scenario with two planes on uvloop; both must be empty afterwards, and nothing may be left open."""

    async def run(kwargs: dict[str, Any]) -> None:
        before = open_descriptors().keys()
        async with start_transfer() as transfer:
            await scenario(transfer, **kwargs)
        await eventually(lambda: open_descriptors().keys() <= before, "all that was opened is closed")

    @wraps(scenario)
    def test(**kwargs: Any) -> None:
        uvloop.run(run(kwargs))

    # The planes are no fixture.
    parameters = scenario.__code__.co_varnames[1 : scenario.__code__.co_argcount + scenario.__code__.co_kwonlyargcount]
    del test.__wrapped__  # type: ignore[attr-defined]
    exec(f"def wrapper({', '.join(parameters)}): test(**locals())", space := {"test": test})  # noqa: S102
    return space["wrapper"]
