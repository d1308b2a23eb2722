"""What the kernel knows of a connection and the event loop does not say: how much was taken, and whether it is gone."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

# struct tcp_info of linux/tcp.h: the state is its first byte; the bytes acknowledged so far (RFC 4898,
# tcpEStatsAppHCThruOctetsAcked) stand at 120, in kernels since 4.1.
_TCP_CLOSE: Final = 7  # enum in linux/tcp_states.h: a connection that was reset
_ACKED_AT: Final = 120
_ACKED_END: Final = 128


def count_taken(transport: asyncio.WriteTransport) -> int:
    """Return a number that grows with each byte that the other end takes; one system call.

    By it alone a slow end can be told from one that takes nothing: the kernel holds megabytes, and what waits in the
    process may stand still for minutes while they drain.
    """
    link = transport.get_extra_info("socket")
    if link is None:
        return 0
    try:
        if link.family != socket.AF_UNIX and sys.platform == "linux":
            info = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_END)
            return int.from_bytes(info[_ACKED_AT:_ACKED_END], sys.byteorder)
    except OSError:  # closed meanwhile
        return 0
    return -transport.get_write_buffer_size() - _count_queued(transport)


def is_queued(transport: asyncio.WriteTransport) -> bool:
    """Say whether the kernel still holds something that the other end has not taken; one system call."""
    return _count_queued(transport) > 0


def _count_queued(transport: asyncio.WriteTransport) -> int:
    link = transport.get_extra_info("socket")
    if link is None:
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    except (OSError, ValueError):  # closed meanwhile
        return 0


def is_reset(transport: asyncio.BaseTransport) -> bool:
    """Say whether the other end has reset the connection; one system call.

    A connection that is not read is not watched either, so the loop would tell no sooner than it is read again.
    """
    link = transport.get_extra_info("socket")
    if link is None or link.family == socket.AF_UNIX or sys.platform != "linux":
        return False
    try:
        return bool(link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)
    except (OSError, ValueError):  # closed meanwhile
        return False
