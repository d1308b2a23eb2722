"""How a tunnel ends: each side learns of it in a way that it understands, and who began it and why is noted.

| what happens               | what the sides see                                                              |
|----------------------------|---------------------------------------------------------------------------------|
| a side half-closes         | the other one too; what that one still sends is passed on                       |
| the upstream vanishes      | the client: a Close frame at a frame boundary, and time to answer it            |
| the client vanishes        | the upstream: the end of its connection                                         |
| the proxy shuts the tunnel | both: a Close frame at their next frame boundary, and `linger_s` to follow      |
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Literal

from typing_extensions import override

from stickyproxy.proxy.side import DISCARD, Ending, Farewell
from stickyproxy.wire.frames import ABNORMAL, BAD_GATEWAY, SERVICE_RESTART, write_close

if TYPE_CHECKING:
    import asyncio

    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.side import Side
    from stickyproxy.proxy.tunnel import Tunnel

Initiator = Literal["client", "upstream", "proxy"]
INITIATORS: Final[dict[str, Initiator]] = {"client": "client", "upstream": "upstream", "proxy": "proxy"}
_MAX_LINGERS: Final = 15  # times `linger_s`: 30 s by default, as nginx's lingering_time


class TunnelEnd:
    """The end of one tunnel, from its first sign on.

    `initiator` is who began it, None while nobody knows, and `cause` why; `said` is the code of the Close frame that
    the proxy sent the client of its own, 0 for none. `is_shut` says that the proxy itself wants the end.
    """

    __slots__ = ("_plane", "_shut_as", "_timer", "_tunnel", "cause", "initiator", "said")

    def __init__(self, tunnel: Tunnel, plane: Plane, initiator: Initiator | None = None, cause: str = "") -> None:
        self._tunnel = tunnel
        self._plane = plane
        self.initiator = initiator
        self.cause = cause
        self.said = 0
        self._shut_as: tuple[int, str, str] | None = None  # code, reason and cause
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_shut(self) -> bool:
        """Say whether the proxy has begun to shut the tunnel."""
        return self._shut_as is not None

    @property
    def is_awaited(self) -> bool:
        """Say whether the tunnel will end here, by a timer if not before."""
        return self._shut_as is not None or self._timer is not None

    # Who began it

    def blame(self, side: Side, cause: str) -> None:
        """Note who ended the tunnel, unless that is known: the first Close frame counts, then the first end."""
        tunnel = self._tunnel
        if self.initiator is not None:
            return
        if tunnel.client.scanner.is_first:
            self.initiator, self.cause = "client", "close_frame"
        elif tunnel.upstream.scanner.is_first:
            self.initiator, self.cause = "upstream", "close_frame"
        else:
            self.initiator, self.cause = ("client" if side is tunnel.client else "upstream"), cause

    def blame_proxy(self, cause: str) -> None:
        """Note that the proxy ends the tunnel, unless somebody else was first."""
        if self.initiator is None:
            self.initiator, self.cause = "proxy", cause

    @property
    def close_code(self) -> int:
        """Return the code to be counted: that of the Close frame which its receiver took for the reason."""
        client, upstream = self._tunnel.client.scanner, self._tunnel.upstream.scanner
        if self.cause == "close_frame":
            return (client if self.initiator == "client" else upstream).close_code
        said = 0 if self.initiator == "client" else self.said  # a client that went away did not hear it
        return said or client.close_code or upstream.close_code or ABNORMAL

    # One of the sides ends it

    def on_eof(self, side: Side) -> None:
        """Pass a half-close on; an upstream that ends without a Close frame has vanished."""
        tunnel = self._tunnel
        self.blame(side, "eof")
        if side is tunnel.upstream and not tunnel.has_close:
            self._say_close(SERVICE_RESTART, "the application ended")
        if tunnel.client.is_eof and tunnel.upstream.is_eof:
            tunnel.end()
            return
        tunnel.opposite(side).write_eof()
        if side is tunnel.upstream:
            self._say_farewell()

    def on_lost(self, side: Side, error: Exception | None) -> None:
        """Close the side that is left; a client is told why."""
        tunnel = self._tunnel
        if side is tunnel.upstream and side.is_eof and self._timer is not None:  # over TLS its loss follows its end
            tunnel.client.other = DISCARD
            return
        self.blame(side, "reset" if error is not None else "eof")
        other = tunnel.opposite(side)
        other.other = DISCARD
        if side is tunnel.upstream and not tunnel.has_close:
            self._say_close(BAD_GATEWAY if error is not None else SERVICE_RESTART, "the application broke off")
            other.write_eof()
            side.is_eof = True
            self._say_farewell()
            return
        tunnel.end()

    def _say_close(self, code: int, reason: str) -> None:
        """Tell the client why its tunnel ends, if its stream stands at a frame boundary; else the cut says it."""
        client = self._tunnel.client
        if self._tunnel.upstream.scanner.is_at_boundary and not client.transport.is_closing():
            client.say(write_close(code, reason))
            self.said = code
            client.other = DISCARD

    def _say_farewell(self) -> None:
        """Let the client answer the last Close frame, its application's or the proxy's own."""
        client = self._tunnel.client
        if client.is_tls:
            if client.scanner.close_code:
                self._tunnel.end()
                return
            client.transport.set_protocol(Farewell(client))
        self._end_when_quiet(_MAX_LINGERS)

    def _end_when_quiet(self, times: int) -> None:
        """End once the client has stopped sending, so that no reset overtakes the Close frame on its way to it.

        It is looked at so many times, and once more.
        """
        client = self._tunnel.client
        before = client.received_bytes

        def look() -> None:
            if client.received_bytes != before and times > 0:
                self._end_when_quiet(times - 1)
            else:
                self._tunnel.end()

        self.stop_waiting()
        self._timer = self._plane.loop.call_later(self._plane.settings.timeouts.linger_s, look)

    # The proxy ends it

    def shut(self, code: int, reason: str, cause: str) -> None:
        """Close both sides with a Close frame, each at its next frame boundary, and cut them if they do not follow."""
        tunnel = self._tunnel
        if self._shut_as is not None:
            return
        self._shut_as = code, reason, cause
        if self.initiator is not None or tunnel.has_close:  # it is ending already, and not waited for any longer
            self.blame(tunnel.client, cause)
            if not (tunnel.has_close or tunnel.upstream.is_eof):
                self._say_close(code, reason)
            self._end_soon()
            return
        for side in tunnel.sides:
            if side.scanner.is_at_boundary:
                self.close_direction(side)
            else:
                side.transport.set_protocol(Ending(side))
        if self._timer is None:
            self._wait_for_boundary(-1)

    def close_direction(self, side: Side) -> None:
        """End what a side sends, at a frame boundary, with a Close frame to the other; what still comes is dropped."""
        if self._shut_as is None or side.other is DISCARD:
            return
        tunnel, (code, reason, cause) = self._tunnel, self._shut_as
        opposite = tunnel.opposite(side)
        if not side.scanner.close_code:
            mask = os.urandom(4) if opposite is tunnel.upstream else None
            opposite.say(write_close(code, reason, mask=mask))
            self.blame_proxy(cause)
            if opposite is tunnel.client:
                self.said = code
        side.other = DISCARD
        if opposite.other is DISCARD:
            self._end_soon()

    def _wait_for_boundary(self, before: int) -> None:
        """Wait for a side in the middle of a frame for as long as it goes on; one that is stuck there is cut."""
        tunnel = self._tunnel
        if tunnel.passed_bytes == before and self._shut_as is not None:
            self.blame_proxy(self._shut_as[2])
            tunnel.end()
        else:
            linger_s = self._plane.settings.timeouts.linger_s
            self._timer = self._plane.loop.call_later(linger_s, self._wait_for_boundary, tunnel.passed_bytes)

    def _end_soon(self) -> None:
        self.stop_waiting()
        self._timer = self._plane.loop.call_later(self._plane.settings.timeouts.linger_s, self._tunnel.end)

    def stop_waiting(self) -> None:
        """Cancel the timer that would end the tunnel."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @override
    def __repr__(self) -> str:
        return f"<TunnelEnd by {self.initiator}: {self.cause}{', awaited' if self.is_awaited else ''}>"
