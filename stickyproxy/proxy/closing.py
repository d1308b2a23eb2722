"""The end of a client's connection: what was written is taken first, and who takes nothing more of it is cut.

A close alone would not do: the loop closes once the kernel has taken all, however long that may be, and over TLS it
waits for the client to close too.
"""

from __future__ import annotations

import math
import socket
import struct
from typing import TYPE_CHECKING

from typing_extensions import override

from stickyproxy.proxy.socket_state import count_taken, is_queued

if TYPE_CHECKING:
    import asyncio

    from stickyproxy.proxy.downstream import Downstream


class Closing:
    """The wait for a client to take all and to close too, from now on; `look` is due at the downstream's deadline."""

    __slots__ = ("_cut_at", "_downstream", "_taken")

    def __init__(self, downstream: Downstream) -> None:
        self._downstream = downstream
        self._wait()

    def _wait(self) -> None:
        """Give the client its time; it is looked at every `linger_s` seconds."""
        downstream = self._downstream
        timeouts, now = downstream.plane.settings.timeouts, downstream.plane.now
        is_unsent = not downstream.is_lingering and self._is_unsent
        is_watched = is_unsent or downstream.is_lingering
        self._taken = count_taken(downstream.transport) if is_watched else math.inf
        self._cut_at = now + (timeouts.send_s if is_unsent else timeouts.linger_s)
        downstream.deadline = now + timeouts.linger_s

    @property
    def _is_unsent(self) -> bool:
        """Say whether the client has not taken all; what the kernel alone still holds matters over TLS only."""
        downstream = self._downstream
        transport = downstream.transport
        return transport.get_write_buffer_size() > 0 or (downstream.is_tls and is_queued(transport))

    def look(self) -> None:
        """Wait on for a client that takes what was written, however slowly; cut it when its time is over."""
        downstream = self._downstream
        if count_taken(downstream.transport) > self._taken:
            self._wait()
        elif downstream.plane.now >= self._cut_at or not self._is_unsent:
            downstream.transport.abort()
        else:
            downstream.deadline = downstream.plane.now + downstream.plane.settings.timeouts.linger_s

    @override
    def __repr__(self) -> str:
        return f"<Closing until {self._cut_at:.1f}>"


def close_broken(transport: asyncio.Transport, *, is_delimited: bool) -> None:
    """Close a connection after a response that is not whole, so that the client cannot take it for whole.

    What was written is flushed; then a reset, since an end of file would look clean to a client that reads until the
    end of the connection. Over TLS that is a connection without its closing alert (RFC 8446, section 6.1);
    `is_delimited` says that the client knows anyway where the response should have ended.
    """
    is_tls = not transport.can_write_eof()
    if is_tls and not is_delimited:
        transport.abort()
        return
    link = transport.get_extra_info("socket")
    if link is not None and link.family != socket.AF_UNIX and not transport.is_closing():
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.close()
