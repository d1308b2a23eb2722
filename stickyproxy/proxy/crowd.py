"""Keeps the loop turning when more connections are ready at once than it takes in one round.

libuv asks the kernel for 1,024 events at a time, and as long as it gets as many it asks again, up to 48 times, before
it comes back to timers, callbacks and tasks (`uv__io_poll` of linux.c). With more connections than that always ready, a
turn of the loop would last for 49,152 reads: a second in which no dial, no deadline and no signal gets its turn.

So reads are counted. Those that come after a whole round without a turn of the loop show a crowd: each connection read
from then on is paused, until fewer than a round of them are ready and the loop turns. With each turn some go on, those
first that were paused first. A loop that turns never pauses anything, and pays for a subtraction per read.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from typing_extensions import override

if TYPE_CHECKING:
    import asyncio

ROUND: Final = 1024
"""Events that libuv takes in one round (`struct epoll_event events[1024]`). One read more in a turn is of another."""
CALM: Final = 128
"""Reads after which the next turn of the loop is asked for, while there is no crowd; many, so that it costs nothing."""
RESUMED: Final = ROUND // 2
"""Connections that go on with each turn: fewer than a round, so that by themselves they make no crowd again."""


class Crowd:
    """Counts the reads of all connections since the loop has turned.

    Whoever is read takes one from `left` before anything else, and calls `on_spent` where that leaves less than 0.
    Whoever pauses or resumes a connection for a reason of its own does so here, and the crowd leaves it alone.
    """

    __slots__ = ("_held", "_is_turn_due", "_loop", "left")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._held: dict[asyncio.Transport, None] = {}  # paused for nothing but the crowd; the first was paused first
        self._is_turn_due = False
        self.left = CALM

    def on_spent(self, transport: asyncio.Transport) -> None:
        """Ask for the next turn of the loop; where it has not come after a round, pause the connection until it does.

        TLS: its layer must hold no more than one read while it is paused (`set_read_buffer_limits`), or it reads on.
        """
        if not self._is_turn_due:
            self._await_turn()
        elif transport.is_reading():
            transport.pause_reading()
            self._held[transport] = None

    def _await_turn(self) -> None:
        self._is_turn_due = True
        self.left = ROUND
        self._loop.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._is_turn_due = False
        held = self._held
        if not held:
            self.left = CALM
            return
        for transport in tuple(islice(held, RESUMED)):
            del held[transport]
            if not transport.is_closing():
                transport.resume_reading()
        self._await_turn()

    def pause(self, transport: asyncio.Transport) -> None:
        """Pause a connection for a reason that has nothing to do with the crowd, which will not resume it then."""
        self._held.pop(transport, None)
        transport.pause_reading()

    def resume(self, transport: asyncio.Transport) -> None:
        """Resume a connection at once; the crowd will not do so later, when its end of file may have come."""
        self._held.pop(transport, None)
        transport.resume_reading()

    def holds(self, transport: asyncio.Transport) -> bool:
        """Say whether a connection is paused for nothing but the crowd."""
        return transport in self._held

    @override
    def __repr__(self) -> str:
        return f"<Crowd left={self.left} held={len(self._held)}>"
