"""What both kinds of heads share: where one ends, and the fields of its framing."""

from __future__ import annotations

import pytest

from stickyproxy.wire.head import Framing, find_head_end
from stickyproxy.wire.headers import FieldError


def test_where_a_head_ends() -> None:
    assert find_head_end(b"GET / HTTP/1.1\r\n\r\nx") == 18
    assert find_head_end(b"GET / HTTP/1.1\r\n\r") == -1
    assert find_head_end(bytearray(b"\r\n\r\n \r\n\r\n"), 1) == 9


def test_the_options_of_several_connection_fields_add_up() -> None:
    framing = Framing()
    framing.take_connection(b"close")
    framing.take_connection(b"x, upgrade")
    assert framing.connection == [b"close", b"x", b"upgrade"]


def test_framing_is_said_once() -> None:
    framing = Framing()
    framing.take_length(b"5")
    framing.take_transfer_encoding(b"chunked")
    assert (framing.length, framing.transfer_encoding) == (5, b"chunked")
    with pytest.raises(FieldError, match="several Content-Length"):
        framing.take_length(b"5")
    with pytest.raises(FieldError, match="several Transfer-Encoding"):
        framing.take_transfer_encoding(b"chunked")


@pytest.mark.parametrize(
    ("upgrades", "connection", "is_websocket"),
    [
        ([b"websocket"], b"upgrade", True),
        ([b"websocket"], b"keep-alive, upgrade", True),
        ([b"websocket"], b"close", False),
        ([b"websocket"], None, False),
        ([b"h2c"], b"upgrade", False),
        ([b"websocket", b"websocket"], b"upgrade", False),
    ],
)
def test_an_upgrade_to_websocket_takes_both_fields(
    upgrades: list[bytes], connection: bytes | None, *, is_websocket: bool
) -> None:
    framing = Framing()
    for value in upgrades:
        framing.take_upgrade(value)
    if connection is not None:
        framing.take_connection(connection)
    assert framing.is_websocket is is_websocket
