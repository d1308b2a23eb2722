"""What the other end of a connection has not taken yet, the kernel's part included.

By it alone a slow end can be told from one that takes nothing: the kernel holds megabytes, and what waits in the
process may stand still for minutes while they drain.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


def count_unsent(transport: asyncio.WriteTransport) -> int:
    """Return the bytes written to a connection that its other end has not acknowledged; one system call."""
    size = transport.get_write_buffer_size()
    link = transport.get_extra_info("socket")
    if link is None:
        return size
    try:
        queued = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    except (OSError, ValueError):  # closed meanwhile
        return size
    return size + int(struct.unpack("i", queued)[0])
