"""A relay of WebSocket frames with a fault, for controls of comparisons that must find it out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from websockets.utils import apply_mask

from tests.helpers.websocket_cases import frame

if TYPE_CHECKING:
    from tests.helpers.websocket_matrix import Door


@dataclass(frozen=True)
class OneFrame:
    """A frame on its way; `start` is what comes before the mask and the payload."""

    is_upwards: bool
    start: bytes
    mask: bytes
    payload: bytes

    @property
    def opcode(self) -> int:
        return self.start[0] & 0x0F

    @property
    def plain(self) -> bytes:
        """The payload without its mask."""
        return apply_mask(self.payload, self.mask) if self.mask else self.payload

    def write(self) -> bytes:
        return self.start + self.mask + self.payload


Fault = Callable[[OneFrame], bytes]


async def read_frame(reader: asyncio.StreamReader, *, is_upwards: bool) -> OneFrame:
    start = await reader.readexactly(2)
    size = start[1] & 0x7F
    assert size < 126
    mask = await reader.readexactly(4) if start[1] & 0x80 else b""
    return OneFrame(is_upwards, start, mask, await reader.readexactly(size))


@dataclass
class FaultyRelay:
    """A relay that writes each head and each frame as the fault wants it."""

    upstream: Door
    on_head: Callable[[bytes], bytes]
    on_frame: Fault

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_app, to_app = await asyncio.open_connection(self.upstream.host, self.upstream.port)
        await asyncio.gather(
            self.relay(reader, to_app, is_upwards=True), self.relay(from_app, writer, is_upwards=False)
        )
        for one in (writer, to_app):
            one.close()
            await one.wait_closed()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_upwards: bool) -> None:
        try:
            writer.write(self.on_head(await reader.readuntil(b"\r\n\r\n")))
            while True:
                writer.write(self.on_frame(await read_frame(reader, is_upwards=is_upwards)))
        except asyncio.IncompleteReadError:
            writer.write_eof()


class PingingRelay(FaultyRelay):
    """A relay that sends the client a Ping of its own after each text; by default it takes the Pongs out."""

    def __init__(
        self,
        upstream: Door,
        *,
        passes_its_pongs: bool = False,
        loses_all_pongs: bool = False,
        payload: bytes = b"by relay",
        opcode: int = 9,
    ) -> None:
        super().__init__(upstream, same_head, self._on_frame)
        self._passes_its_pongs = passes_its_pongs
        self._loses_all_pongs = loses_all_pongs
        self._payload = payload
        self._opcode = opcode

    def _on_frame(self, one: OneFrame) -> bytes:
        if one.opcode == 10 and (self._loses_all_pongs or (self._payload == one.plain and not self._passes_its_pongs)):
            return b""
        if one.opcode == 1 and not one.is_upwards:
            return one.write() + frame(self._opcode, self._payload, is_masked=False)
        return one.write()


def without(opcode: int) -> Fault:
    return lambda one: b"" if one.opcode == opcode else one.write()


def alter_close_code(one: OneFrame) -> bytes:
    return one.start + b"\x10\x00" + one.payload[2:] if one.opcode == 8 and not one.is_upwards else one.write()


def alter_close_reason(one: OneFrame) -> bytes:
    return one.start + one.payload[:-1] + b"?" if one.opcode == 8 and not one.is_upwards else one.write()


def alter_one_bit(one: OneFrame) -> bytes:
    is_it = one.opcode == 1 and one.is_upwards
    return replace(one, payload=bytes((one.payload[0] ^ 1, *one.payload[1:]))).write() if is_it else one.write()


def mask_anew(one: OneFrame) -> bytes:
    if not one.is_upwards:
        return one.write()
    return frame(one.opcode, one.plain, first=one.start[0] & 0xF0, is_masked=True)


def drop_empty_fragments(one: OneFrame) -> bytes:
    return b"" if one.opcode == 0 and not one.start[0] & 0x80 and not one.payload else one.write()


def ping_of_its_own(one: OneFrame) -> bytes:
    return one.write() + (frame(9, b"proxy", is_masked=False) if one.opcode == 1 and not one.is_upwards else b"")


def repeat(one: OneFrame) -> bytes:
    return one.write() * (2 if one.opcode == 1 and not one.is_upwards and one.start[0] & 0x80 else 1)


def same_head(head: bytes) -> bytes:
    return head


FAULTS: dict[str, tuple[Callable[[bytes], bytes], Fault, str]] = {
    "loses Pings": (same_head, without(9), "server: frames received"),
    "loses Pongs": (same_head, without(10), "client: frames received"),
    "alters the close code": (same_head, alter_close_code, "client: close code"),
    "alters the close reason": (same_head, alter_close_reason, "client: close reason"),
    "alters one bit of a message": (same_head, alter_one_bit, "server: messages"),
    "masks anew": (same_head, mask_anew, "upwards, byte for byte"),
    "drops empty fragments": (same_head, drop_empty_fragments, "client: frames received"),
    "sends a Ping of its own": (same_head, ping_of_its_own, "client: frames received"),
    "repeats a message": (same_head, repeat, "client: messages"),
    "loses the subprotocol": (
        lambda head: re.sub(rb"Sec-WebSocket-Protocol: .*?\r\n", b"", head), OneFrame.write, "server: subprotocol",
    ),
    "alters a field": (lambda head: head.replace(b"X-App: a", b"X-App: b"), OneFrame.write, "response: fields"),
    "alters the target": (lambda head: head.replace(b"?a=%20", b"?a=+"), OneFrame.write, "request: start"),
    "swaps fields": (
        lambda head: re.sub(rb"(X-App: .*?\r\n)(X-App: .*?\r\n)", rb"\2\1", head), OneFrame.write, "response: in order",
    ),
}  # fmt: skip
