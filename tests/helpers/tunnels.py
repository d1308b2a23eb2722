"""Tunnels of a data plane under test: the handshake, frames and what became of them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from stickyproxy.observe.counters import name_close_code
from tests.helpers.raw import RawLink, eventually, request

if TYPE_CHECKING:
    from stickyproxy.proxy.tunnel import Tunnel
    from tests.helpers.plane import PlaneUnderTest

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = request(
    "GET /ws", "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"
)
ACCEPT = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
MASK = b"\x01\x02\x03\x04"


def frame(payload: bytes, opcode: int = 1, *, is_masked: bool = False) -> bytes:
    """Return one whole frame."""
    size, flag = len(payload), 0x80 if is_masked else 0
    if size < 126:
        head = bytes((0x80 | opcode, flag | size))
    elif size < 1 << 16:
        head = bytes((0x80 | opcode, flag | 126)) + struct.pack("!H", size)
    else:
        head = bytes((0x80 | opcode, flag | 127)) + struct.pack("!Q", size)
    if is_masked:
        return head + MASK + bytes(octet ^ MASK[at & 3] for at, octet in enumerate(payload))
    return head + payload


def close_of(data: bytes) -> tuple[int, bool]:
    """Return the code of a Close frame, which must be all of `data`, and whether it was masked."""
    assert data[0] == 0x88
    is_masked, size = bool(data[1] & 0x80), data[1] & 0x7F
    payload = data[2:]
    if is_masked:
        payload = bytes(octet ^ data[2 + (at & 3)] for at, octet in enumerate(data[6:]))
    assert len(payload) == size
    return int.from_bytes(payload[:2], "big"), is_masked


async def connect(proxy: PlaneUnderTest) -> tuple[RawLink, RawLink]:
    """Open a tunnel and return both ends."""
    client, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(ACCEPT)
    assert (await client.read_message()).status == 101
    return client, app


def the_tunnel(proxy: PlaneUnderTest) -> Tunnel:
    (tunnel,) = proxy.plane.tunnels
    return tunnel


async def ended(proxy: PlaneUnderTest) -> tuple[str, int, str]:
    """Wait for the end of the only tunnel; return who ended it, the code and the cause, as counted and logged."""
    await eventually(lambda: not proxy.plane.tunnels)
    (closes,) = proxy.pool().counters.closes.items()
    assert closes[1] == 1
    record = proxy.records[-1]
    assert record.kind == "tunnel"
    assert (record.initiator, record.cause) == (closes[0][0], closes[0][2])
    assert closes[0][1] == name_close_code(record.close_code)
    return record.initiator, record.close_code, record.cause
