"""Connections by client address: what is counted, and who is apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stickyproxy.proxy.addresses import AddressCounts
from stickyproxy.proxy.settings import OFF, Settings
from stickyproxy.wire.forwarded import ConnectionOrigin
from tests.helpers.raw import GET, eventually
from tests.helpers.tunnels import ACCEPT, HANDSHAKE

if TYPE_CHECKING:
    from tests.helpers.plane import Start


def origin(address: str, *, is_trusted: bool = False) -> ConnectionOrigin:
    return ConnectionOrigin(address, "80", is_https=False, is_trusted=is_trusted)


def test_an_address_has_its_places_and_no_more() -> None:
    counts, one, other = AddressCounts(2), origin("10.0.0.1"), origin("10.0.0.2")
    assert [counts.admit(one) for _ in range(3)] == [True, True, False]
    assert counts.admit(other)
    counts.release(one)
    assert not counts.admit(one)
    for _ in range(2):
        counts.release(one)
    assert counts.admit(one)
    for _ in range(2):
        counts.release(one)
    counts.release(other)
    assert repr(counts) == "<AddressCounts of 0 addresses>"


@pytest.mark.parametrize("apart", [origin("10.0.0.1", is_trusted=True), origin("unix"), origin("unknown")])
def test_those_who_stand_for_many_are_not_counted(apart: ConnectionOrigin) -> None:
    counts = AddressCounts(1)
    assert [counts.admit(apart) for _ in range(3)] == [True, True, True]
    counts.release(apart)
    assert repr(counts) == "<AddressCounts of 0 addresses>"


def test_without_a_limit_nothing_is_counted() -> None:
    counts = AddressCounts(OFF)
    assert counts.admit(origin("10.0.0.1"))
    assert repr(counts) == "<AddressCounts of 0 addresses>"
    counts.release(origin("10.0.0.1"))


async def test_a_client_with_too_many_connections_hears_so_and_comes_again_when_one_ends(start: Start) -> None:
    proxy = await start(settings=Settings(connections_per_address=2))
    first = await proxy.client()
    tunnel, app = await proxy.open(HANDSHAKE)
    await app.read_request()
    app.send(ACCEPT)
    assert (await tunnel.read_message()).status == 101
    refused = await proxy.client()
    response = await refused.read_response()
    assert (response.status, response["Connection"]) == (503, "close")
    assert "http_request_denied" in response["Proxy-Status"]
    refused.close()
    tunnel.reset()
    await eventually(lambda: not proxy.plane.tunnels and len(proxy.plane.downstreams) == 1)
    again, app = await proxy.open(GET)
    await app.read_request()
    app.answer(b"served")
    assert (await again.read_response()).body == b"served"
    first.send(GET)
    (await proxy.upstream.accept() if app.is_over else app).answer(b"still served")
    assert (await first.read_response()).body == b"still served"
