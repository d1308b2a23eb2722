"""The end of a client's connection: who takes what was written has the time for it, who does not is cut."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from stickyproxy.config import Address
from stickyproxy.proxy.closing import Closing, close_broken
from stickyproxy.proxy.settings import Settings
from tests.helpers.raw import GET, eventually, request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.plane import PlaneUnderTest, Start


async def test_a_lingering_connection_is_cut_after_the_linger_timeout(start: Start) -> None:
    proxy = await start(linger_s=0.2)
    client = await proxy.client()
    client.send(b"\n")
    assert (await client.read_response()).status == 400
    (downstream,) = proxy.plane.downstreams
    assert repr(downstream) == "<Downstream lingering>"

    def goes_on() -> bool:
        if not client.is_lost:
            client.send(b"more that nobody reads")
        return not proxy.plane.downstreams

    await eventually(goes_on, look_s=0.01)


async def test_a_client_that_goes_on_sending_can_read_the_answer(proxy: PlaneUnderTest) -> None:
    client, app = await proxy.open(request("POST /", "Content-Length: 50000000"))
    await app.read_message()
    app.answer(b"too much", status="413 Content Too Large")
    for _ in range(100):
        client.send(b"x" * 100_000)
        await asyncio.sleep(0)
    response = await client.read_response()
    assert (response.status, response["Connection"], response.body) == (413, "close", b"too much")
    assert await client.read_rest() == b""
    assert client.ending == "eof"


async def test_a_client_that_never_reads_does_not_hold_a_closed_connection_for_ever(start: Start) -> None:
    proxy = await start(settings=Settings(buffer_bytes=1 << 26), send_s=0.2)
    client, app = await proxy.open(request("GET /", "Connection: close"))
    client.stop_reading()
    await app.read_request()
    app.answer(b"x" * 30_000_000)
    await proxy.recorded()
    await eventually(lambda: not proxy.plane.downstreams)
    client.read_again()
    assert len(await client.read_rest()) < 30_000_000


@pytest.mark.parametrize("ending", ["closing", "lingering"])
async def test_a_client_that_takes_its_response_slowly_gets_all_of_it(start: Start, ending: str) -> None:
    proxy = await start(settings=Settings(buffer_bytes=1 << 26), send_s=1.0, linger_s=1.0)
    client, app = await proxy.open(request("GET /", "Connection: close") + (GET if ending == "lingering" else b""))
    client.stop_reading()
    await app.read_request()
    size = 30_000_000
    app.answer(b"x" * size)
    await proxy.recorded()
    (downstream,) = proxy.plane.downstreams
    unsent = downstream.transport.get_write_buffer_size()
    assert unsent
    deadline = downstream.deadline
    while downstream.deadline == deadline:  # something of it goes, but not all, until its time was renewed
        client.read_again()
        await eventually(lambda: downstream.transport.get_write_buffer_size() < unsent)
        client.stop_reading()
        await eventually(lambda: downstream.deadline != deadline or not proxy.plane.downstreams)
    assert proxy.plane.downstreams
    client.read_again()
    await eventually(lambda: client.received_bytes > size)


@pytest.mark.parametrize("is_unix", [False, True])
async def test_a_broken_response_cuts_the_connection(proxy: PlaneUnderTest, tmp_path: Path, *, is_unix: bool) -> None:
    client = await proxy.client(await proxy.listen(Address(path=str(tmp_path / "proxy.sock"))) if is_unix else None)
    client.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel").close()
    assert not (await client.read_rest()).endswith(b"0\r\n\r\n")
    assert client.ending == ("eof" if is_unix else "reset")


async def test_who_closes_without_having_been_waited_for_is_waited_for_now(proxy: PlaneUnderTest) -> None:
    client = await proxy.client()
    await eventually(lambda: proxy.plane.downstreams)
    (downstream,) = proxy.plane.downstreams
    downstream.transport.close()
    downstream.on_deadline()
    assert await client.read_rest() == b""
    await eventually(lambda: not proxy.plane.downstreams)


async def test_repr_shows_the_state(proxy: PlaneUnderTest) -> None:
    await proxy.client()
    await eventually(lambda: proxy.plane.downstreams)
    (downstream,) = proxy.plane.downstreams
    proxy.plane.now = 100.0
    assert repr(Closing(downstream)) == "<Closing until 102.0>"
    assert downstream.deadline == 102.0


class _Secured:
    """A transport over TLS, which knows no half-close."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, _: str) -> None:
        return None

    def close(self) -> None:
        self.done.append("close")

    def abort(self) -> None:
        self.done.append("abort")


@pytest.mark.parametrize(("is_delimited", "done"), [(False, "abort"), (True, "close")])
def test_over_tls_only_what_has_no_end_of_its_own_lacks_the_alert(*, is_delimited: bool, done: str) -> None:
    transport = _Secured()
    close_broken(cast("asyncio.Transport", transport), is_delimited=is_delimited)
    assert transport.done == [done]
