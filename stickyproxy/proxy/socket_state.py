"""What the kernel knows of a connection and the event loop does not say: what was not taken, and whether it is gone."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

_TCP_CLOSE: Final = 7  # enum in linux/tcp_states.h: a connection that was reset


def count_unsent(transport: asyncio.WriteTransport) -> int:
    """Return the bytes written to a connection that its other end has not acknowledged; one system call.

    By it alone a slow end can be told from one that takes nothing: the kernel holds megabytes, and what waits in the
    process may stand still for minutes while they drain.
    """
    size = transport.get_write_buffer_size()
    link = transport.get_extra_info("socket")
    if link is None:
        return size
    try:
        queued = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    except (OSError, ValueError):  # closed meanwhile
        return size
    return size + int(struct.unpack("i", queued)[0])


def is_reset(transport: asyncio.BaseTransport) -> bool:
    """Say whether the other end has reset the connection; one system call.

    A connection that is not read is not watched either, so the loop would tell no sooner than it is read again.
    """
    link = transport.get_extra_info("socket")
    if link is None or link.family == socket.AF_UNIX or not hasattr(socket, "TCP_INFO"):
        return False
    try:
        return bool(link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)
    except (OSError, ValueError):  # closed meanwhile
        return False
