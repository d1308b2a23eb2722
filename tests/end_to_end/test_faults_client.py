"""Clients at fault, in front of a proxy in a process of its own: slow, half-closed, gone in the middle of a request.

The app runs in the test's own loop, so that the test says when it goes on. Both ends note the ids of their requests.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fault_client_app import BLOCK_BYTES, FRAME, HALVES, FaultApp
from tests.helpers.fault_client_load import Transfer, ask_each, new_ids
from tests.helpers.proc import Growth, descriptors
from tests.helpers.processes import Children, StickyProxy
from tests.helpers.raw import eventually

DEADLINE_S = 120.0
LARGE_BYTES = 64 * 2**20  # more than the kernel keeps of two connections, by far
HUGE_BYTES = 2**30
# Two directions of 64 KiB for each connection, the pieces of one read, and what the allocator keeps of them.
BUFFERS_KIB = 6 * 1024
OTHERS = 200
CLIENTS = 40
COOKIE_LESS = {"cookie": False}  # fewer fields to look through; who goes where is not the question here


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
async def app() -> AsyncIterator[FaultApp]:
    async with FaultApp() as app, asyncio.timeout(DEADLINE_S):
        yield app


async def serve(children: Children, app: FaultApp, **more: Any) -> StickyProxy:
    return await asyncio.to_thread(StickyProxy, children, app.upstreams, affinity=COOKIE_LESS, more=more)


async def check_others(proxy: StickyProxy, app: FaultApp, number: int = OTHERS) -> None:
    """Check that so many requests of other clients are answered, each after it reached the app once."""
    ids = new_ids(number)
    answers = await ask_each(proxy.port, ids)
    assert answers == dict.fromkeys(ids, 200)
    assert {request_id: app.received["POST", request_id] for request_id in ids} == dict.fromkeys(ids, 1)


async def warm_up(proxy: StickyProxy, app: FaultApp) -> None:
    """Let the proxy take what memory it needs for the other clients, so that this is not measured."""
    await check_others(proxy, app)


async def download_slowly(proxy: StickyProxy, app: FaultApp, size: int) -> int:
    """Ask for a body and take none of it while others are served, then all; return the growth (KiB) of the proxy."""
    await warm_up(proxy, app)
    growth = Growth(proxy.worker)
    async with await Transfer.connect(proxy.port) as slow:
        slow.ask(f"GET /bytes/{size}", "slow")
        arrival = await app.arrived("slow")
        await eventually(lambda: arrival.sent_bytes >= 2**20, "a part is on its way")
        await check_others(proxy, app)
        assert arrival.sent_bytes < size
        assert await slow.receive_status() == 200
        for _ in range(4):
            await slow.download(size // 8)
            await check_others(proxy, app, OTHERS // 10)
        await slow.download(size // 2)
        assert (slow.moved_bytes, slow.crc) == (arrival.sent_bytes, arrival.sent_crc)
        assert arrival.sent_bytes == size
    return growth.kib


async def test_a_client_that_reads_slowly_costs_the_proxy_its_buffers_and_no_more(
    children: Children, app: FaultApp
) -> None:
    proxy = await serve(children, app)
    grown_kib = await download_slowly(proxy, app, LARGE_BYTES)
    print(f"a slow reader of {LARGE_BYTES >> 20} MiB: the proxy grew by {grown_kib} KiB")
    assert grown_kib < BUFFERS_KIB


@pytest.mark.load
async def test_a_client_that_reads_one_gigabyte_slowly_costs_no_more(children: Children, app: FaultApp) -> None:
    proxy = await serve(children, app)
    grown_kib = await download_slowly(proxy, app, HUGE_BYTES)
    print(f"a slow reader of {HUGE_BYTES >> 20} MiB: the proxy grew by {grown_kib} KiB")
    assert grown_kib < BUFFERS_KIB


async def test_with_a_large_buffer_the_growth_is_seen(children: Children, app: FaultApp) -> None:
    """The control: what the proxy keeps of a slow client's response shows in its memory."""
    proxy = await serve(children, app, limits={"buffer": "16MiB"})
    grown_kib = await download_slowly(proxy, app, LARGE_BYTES)
    print(f"the same with a buffer of 16 MiB: the proxy grew by {grown_kib} KiB")
    assert grown_kib > 2 * BUFFERS_KIB


@pytest.mark.parametrize("length", [LARGE_BYTES, None], ids=["length", "chunked"])
async def test_a_client_that_sends_slowly_costs_nothing(children: Children, app: FaultApp, length: int | None) -> None:
    proxy = await serve(children, app)
    await warm_up(proxy, app)
    growth = Growth(proxy.worker)
    blocks = LARGE_BYTES // BLOCK_BYTES
    async with await Transfer.connect(proxy.port) as slow:
        slow.begin_upload("/word", "slow", length)
        for part in range(8):
            await slow.upload(part * blocks // 8, blocks // 8)
            await check_others(proxy, app, OTHERS // 8)
        slow.end_upload()
        assert await slow.receive_status() == 200
    arrival = app.of("slow")
    assert (arrival.end, arrival.body_bytes, arrival.crc) == ("whole", LARGE_BYTES, slow.crc)
    print(f"a slow writer of {LARGE_BYTES >> 20} MiB: the proxy grew by {growth.kib} KiB")
    assert growth.kib < BUFFERS_KIB


async def upload_to_slow_app(proxy: StickyProxy, app: FaultApp, length: int | None) -> int:
    """Send a body that the app takes only after others were served; return the growth (KiB) of the proxy."""
    await warm_up(proxy, app)
    growth = Growth(proxy.worker)
    async with await Transfer.connect(proxy.port) as client:
        client.begin_upload("/slow/gate", "slow", length)
        uploading = asyncio.get_running_loop().create_task(client.upload(0, LARGE_BYTES // BLOCK_BYTES))
        arrival = await app.arrived("slow")
        await eventually(lambda: client.moved_bytes >= 2**20, "a part is on its way")
        await check_others(proxy, app)
        assert client.moved_bytes < LARGE_BYTES
        assert arrival.body_bytes == 0
        app.open("gate")
        await uploading
        client.end_upload()
        assert await client.receive_status() == 200
        assert (arrival.end, arrival.body_bytes, arrival.crc) == ("whole", LARGE_BYTES, client.crc)
    assert app.received["POST", "slow"] == 1
    return growth.kib


@pytest.mark.parametrize("length", [LARGE_BYTES, None], ids=["length", "chunked"])
async def test_an_app_that_takes_an_upload_slowly_costs_the_buffers_and_no_more(
    children: Children, app: FaultApp, length: int | None
) -> None:
    proxy = await serve(children, app)
    grown_kib = await upload_to_slow_app(proxy, app, length)
    print(f"an upload of {LARGE_BYTES >> 20} MiB that is taken slowly: the proxy grew by {grown_kib} KiB")
    assert grown_kib < BUFFERS_KIB


async def test_with_a_large_buffer_the_growth_by_an_upload_is_seen(children: Children, app: FaultApp) -> None:
    """The control of the test above."""
    proxy = await serve(children, app, limits={"buffer": "16MiB"})
    grown_kib = await upload_to_slow_app(proxy, app, LARGE_BYTES)
    print(f"the same with a buffer of 16 MiB: the proxy grew by {grown_kib} KiB")
    assert grown_kib > 2 * BUFFERS_KIB


async def test_a_tunnel_that_is_read_slowly_costs_its_buffers_and_no_more(children: Children, app: FaultApp) -> None:
    proxy = await serve(children, app)
    await warm_up(proxy, app)
    growth = Growth(proxy.worker)
    async with await Transfer.connect(proxy.port) as slow:
        await slow.open_tunnel(f"/flood/{LARGE_BYTES}", "slow")
        arrival = app.of("slow")
        await eventually(lambda: arrival.sent_bytes >= 2**20, "a part is on its way")
        await check_others(proxy, app)
        assert arrival.sent_bytes < LARGE_BYTES
        assert (await slow.reader.readexactly(10))[:2] == b"\x82\x7f"
        await slow.download(LARGE_BYTES)
        assert (slow.moved_bytes, slow.crc) == (arrival.sent_bytes, arrival.sent_crc)
    print(f"a tunnel of {LARGE_BYTES >> 20} MiB that is read slowly: the proxy grew by {growth.kib} KiB")
    assert growth.kib < BUFFERS_KIB


# Half-close

BODY = ("Content-Length: 4", b"word")
CHUNKED_BODY = ("Transfer-Encoding: chunked", b"4\r\nword\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("line", "framing", "body"),
    [("GET", "X-Nothing: -", b""), ("POST", *BODY), ("POST", *CHUNKED_BODY)],
    ids=["GET", "POST", "POST in chunks"],
)
async def test_after_a_half_close_the_response_to_a_whole_request_still_arrives(
    children: Children, app: FaultApp, line: str, framing: str, body: bytes
) -> None:
    proxy = await serve(children, app)
    async with await Transfer.connect(proxy.port) as client:
        client.ask(f"{line} /hold/gate", "half-closed", framing, body=body)
        client.half_close()
        arrival = await app.arrived("half-closed")
        await client.was_half_closed(proxy.port)
        app.open("gate")
        assert await client.receive_status() == 200
        assert await client.receive_rest() == b"word"
    assert arrival.end == "whole"
    assert app.received[line, "half-closed"] == 1
    assert proxy.metric("exchanges_total", method=line, status_class="2xx") > 0
    assert proxy.metric("exchanges_total", status_class="4xx") == 0


async def test_a_response_whose_half_was_sent_before_the_half_close_arrives_whole(
    children: Children, app: FaultApp
) -> None:
    proxy = await serve(children, app)
    async with await Transfer.connect(proxy.port) as client:
        client.ask("GET /halves/gate", "half-closed")
        assert await client.receive_status() == 200
        assert await client.reader.readexactly(len(HALVES[0])) == HALVES[0]
        client.half_close()
        await client.was_half_closed(proxy.port)
        app.open("gate")
        assert await client.receive_rest() == HALVES[1]


async def test_a_large_response_that_is_taken_slowly_arrives_whole_after_a_half_close(
    children: Children, app: FaultApp
) -> None:
    proxy = await serve(children, app)
    async with await Transfer.connect(proxy.port) as client:
        client.ask(f"GET /bytes/{LARGE_BYTES}", "half-closed")
        client.half_close()
        arrival = await app.arrived("half-closed")
        await eventually(lambda: arrival.sent_bytes >= 2**20, "a part is on its way")
        await client.was_half_closed(proxy.port)
        assert await client.receive_status() == 200
        await client.download(LARGE_BYTES)
        assert client.crc == arrival.sent_crc
        assert await client.receive_rest() == b""


async def test_pipelined_requests_before_a_half_close_are_all_answered(children: Children, app: FaultApp) -> None:
    proxy = await serve(children, app)
    ids = new_ids(5, "pipelined")
    async with await Transfer.connect(proxy.port) as client:
        client.ask("POST /hold/gate", ids[0], BODY[0], body=BODY[1])
        for request_id in ids[1:]:
            client.ask("POST /word", request_id, CHUNKED_BODY[0], body=CHUNKED_BODY[1])
        client.half_close()
        await app.arrived(ids[0])
        await client.was_half_closed(proxy.port)
        app.open("gate")
        answers = await client.receive_rest()
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == len(ids)
    assert answers.count(b"\r\n\r\nword") == len(ids)
    assert [one.request_id for one in app.arrivals if one.request_id in ids] == ids


async def test_a_half_close_in_the_middle_of_a_request_is_no_whole_request(children: Children, app: FaultApp) -> None:
    """The control: the proxy does see the end of file, and an app never takes such a body for whole."""
    proxy = await serve(children, app)
    for framing, body in (("Content-Length: 4", b"wor"), ("Transfer-Encoding: chunked", b"4\r\nword\r\n")):
        async with await Transfer.connect(proxy.port) as client:
            [request_id] = new_ids(1, "cut")
            client.ask("POST /word", request_id, framing, body=body)
            arrival = await app.arrived(request_id)
            client.half_close()
            assert b"200" not in await client.receive_rest()
            await eventually(lambda arrival=arrival: arrival.end, "the body ends")  # type: ignore[misc]
            assert arrival.end == "aborted"
            assert app.received["POST", request_id] == 1


async def test_a_body_that_ends_with_the_half_close_of_the_app_arrives_whole(children: Children, app: FaultApp) -> None:
    proxy = await serve(children, app)
    async with await Transfer.connect(proxy.port) as client:
        client.ask("GET /end/gate", "to the end")
        assert await client.receive_status() == 200
        await check_others(proxy, app, 2)
        app.open("gate")
        length = len(HALVES[0] + HALVES[1])
        framed = await client.reader.readuntil(b"0\r\n\r\n")
        assert HALVES[0] in framed
        assert HALVES[1] in framed
        assert length < len(framed) < length + 40
        client.ask("GET /word", "after it")
        assert await client.receive_status() == 200


async def test_an_answer_and_half_close_before_the_body_has_come_reaches_the_client(
    children: Children, app: FaultApp
) -> None:
    proxy = await serve(children, app)
    async with await Transfer.connect(proxy.port) as client:
        client.begin_upload("/early/gate", "early", 2 * BLOCK_BYTES)
        await client.upload(0, 1)
        assert await client.receive_status() == 200
        assert await client.reader.readexactly(4) == b"word"
        assert await client.receive_rest() == b""
    arrival = app.of("early")
    await eventually(lambda: arrival.end, "the body ends")
    assert arrival.end == "aborted"
    assert app.received["POST", "early"] == 1


async def test_a_half_closed_client_of_a_tunnel_still_gets_what_the_app_sends(
    children: Children, app: FaultApp
) -> None:
    proxy = await serve(children, app)
    async with await Transfer.connect(proxy.port) as client:
        await client.open_tunnel("/tunnel/gate", "tunnel")
        client.half_close()
        await client.was_half_closed(proxy.port)
        app.open("gate")
        assert (await client.receive_rest())[: len(FRAME)] == FRAME


# Gone


SHORT = {"upstream_keep_alive": "1s", "send": "2s"}  # what is idle is closed soon, so that the rest can be counted


async def settled(proxy: StickyProxy, app: FaultApp) -> int:
    """Return how many descriptors the proxy has once nothing is open that only waits to be used again."""
    await check_others(proxy, app)
    await eventually(
        lambda: proxy.metric("upstream_connections", state="idle") == 0, "idle connections are closed", look_s=0.1
    )
    # Those of the others are closed at their own time; the metric is as of the last tick, so that it may be 0 still.
    looks = [-1]

    def is_still() -> bool:
        looks.append(descriptors(proxy.worker))
        return len(looks) > 100 and len(set(looks[-100:])) == 1

    await eventually(is_still, "the number of descriptors stays for longer than an idle connection", look_s=0.02)
    return looks[-1]


GONE = pytest.mark.parametrize("how", ["closed", "reset"])


async def leave(client: Transfer, how: str) -> None:
    if how == "reset":
        client.reset()
    else:
        client.writer.transport.abort()  # with all that it has not sent yet
    await asyncio.sleep(0)


@GONE
@pytest.mark.parametrize("length", [LARGE_BYTES, None], ids=["length", "chunked"])
async def test_when_clients_are_gone_the_app_sees_aborted_bodies_and_nothing_stays_open(
    children: Children, app: FaultApp, how: str, length: int | None
) -> None:
    proxy = await serve(children, app, timeouts=SHORT)
    before = await settled(proxy, app)
    clients = [await Transfer.connect(proxy.port) for _ in range(CLIENTS)]
    ids = new_ids(CLIENTS, "gone")
    for client, request_id in zip(clients, ids, strict=True):
        client.begin_upload("/word", request_id, length)
        await client.upload(0, 2)
    arrivals = [await app.arrived(request_id) for request_id in ids]
    await eventually(lambda: all(one.body_bytes == 2 * BLOCK_BYTES for one in arrivals), "the app has what was sent")
    assert descriptors(proxy.worker) >= before + 2 * CLIENTS

    for client in clients:
        await leave(client, how)
    await eventually(lambda: all(one.end for one in arrivals), "all bodies have ended")
    assert {one.end for one in arrivals} == {"aborted"}
    await eventually(lambda: descriptors(proxy.worker) <= before, "the descriptors are free again")
    assert [app.received["POST", request_id] for request_id in ids] == [1] * CLIENTS
    assert proxy.metric("exchanges_total", method="POST", status_class="4xx") == CLIENTS
    assert proxy.metric("exchanges_in_flight") == 0
    await check_others(proxy, app)


async def leave_untaken_uploads(proxy: StickyProxy, app: FaultApp, how: str) -> list[str]:
    """Let clients go whose uploads the proxy reads no more, since the app takes nothing of them; return their ids."""
    clients = [await Transfer.connect(proxy.port) for _ in range(4)]
    ids = new_ids(len(clients), "gone")
    uploads = []
    for client, request_id in zip(clients, ids, strict=True):
        client.begin_upload("/slow/gate", request_id, LARGE_BYTES)
        uploads.append(asyncio.get_running_loop().create_task(client.upload(0, LARGE_BYTES // BLOCK_BYTES)))
    for request_id in ids:
        await app.arrived(request_id)
    await eventually(lambda: all(client.moved_bytes >= 2**20 for client in clients), "a part is on its way")
    await check_others(proxy, app)
    for client, upload in zip(clients, uploads, strict=True):
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        await leave(client, how)
    return ids


async def check_aborted(app: FaultApp, ids: list[str]) -> None:
    """Check that none of the uploads is whole for the app, and none came twice, once it takes them."""
    app.open("gate")
    await eventually(lambda: all(app.of(one).end for one in ids), "all bodies have ended")
    assert {app.of(one).end for one in ids} == {"aborted"}
    assert [app.received["POST", one] for one in ids] == [1] * len(ids)


async def test_when_clients_are_gone_whose_uploads_are_not_taken_nothing_stays_open(
    children: Children, app: FaultApp
) -> None:
    """The proxy reads no more of them, but its kernel knows of the reset."""
    proxy = await serve(children, app, timeouts=SHORT)
    before = await settled(proxy, app)
    ids = await leave_untaken_uploads(proxy, app, "reset")
    await eventually(lambda: descriptors(proxy.worker) <= before, "the descriptors are free again")
    await check_aborted(app, ids)


async def test_when_a_client_is_gone_whose_tunnel_the_app_does_not_read_nothing_stays_open(
    children: Children, app: FaultApp
) -> None:
    """The same in a tunnel, which no timeout ends unless it is configured."""
    proxy = await serve(children, app, timeouts=SHORT)
    before = await settled(proxy, app)
    async with await Transfer.connect(proxy.port) as client:
        await client.open_tunnel("/tunnel/gate", "gone")
        message = b"\x82\xff" + LARGE_BYTES.to_bytes(8, "big") + bytes(4)
        client.writer.write(message)
        upload = asyncio.get_running_loop().create_task(client.upload(0, LARGE_BYTES // BLOCK_BYTES))
        await eventually(lambda: client.moved_bytes >= 2**20, "a part is on its way")
        await check_others(proxy, app)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        client.reset()
    await eventually(lambda: descriptors(proxy.worker) <= before, "the descriptors are free again")
    await eventually(lambda: proxy.metric("tunnels_open") == 0, "it is counted no more", look_s=0.1)


@GONE
async def test_uploads_that_are_not_taken_end_with_the_timeout_of_a_body(
    children: Children, app: FaultApp, how: str
) -> None:
    """After a plain close nobody can know: the end of file waits behind what the proxy does not take."""
    proxy = await serve(children, app, timeouts={**SHORT, "body_idle": "3s"})
    before = await settled(proxy, app)
    ids = await leave_untaken_uploads(proxy, app, how)
    await eventually(lambda: descriptors(proxy.worker) <= before, "the descriptors are free again")
    await check_aborted(app, ids)


@GONE
async def test_when_clients_are_gone_that_wait_for_a_response_nothing_stays_open(
    children: Children, app: FaultApp, how: str
) -> None:
    """After a plain close the client may be half-closed for all that the proxy can know, until it is sent something."""
    proxy = await serve(children, app, timeouts=SHORT)
    before = await settled(proxy, app)
    clients = [await Transfer.connect(proxy.port) for _ in range(CLIENTS)]
    ids = new_ids(CLIENTS, "gone")
    for client, request_id in zip(clients, ids, strict=True):
        client.ask("POST /hold/gate", request_id, BODY[0], body=BODY[1])
    for request_id in ids:
        await app.arrived(request_id)
    for client in clients:
        await leave(client, how)
    if how == "closed":
        app.open("gate")
    await eventually(
        lambda: proxy.metric("exchanges_in_flight") == 0 and proxy.metric("downstream_connections") == 0,
        "no client is left",
        look_s=0.05,
    )
    assert await settled(proxy, app) <= before
    assert [app.received["POST", request_id] for request_id in ids] == [1] * CLIENTS


@GONE
async def test_when_clients_are_gone_in_the_middle_of_a_download_nothing_stays_open(
    children: Children, app: FaultApp, how: str
) -> None:
    proxy = await serve(children, app, timeouts=SHORT)
    before = await settled(proxy, app)
    clients = [await Transfer.connect(proxy.port) for _ in range(4)]
    ids = new_ids(len(clients), "gone")
    for client, request_id in zip(clients, ids, strict=True):
        client.ask(f"GET /bytes/{LARGE_BYTES}", request_id)
    arrivals = [await app.arrived(request_id) for request_id in ids]
    await eventually(lambda: all(one.sent_bytes >= 2**20 for one in arrivals), "a part is on its way")
    for client in clients:
        await leave(client, how)
    await eventually(lambda: proxy.metric("exchanges_in_flight") == 0, "no exchange is left", look_s=0.05)
    assert await settled(proxy, app) <= before
    assert max(one.sent_bytes for one in arrivals) < LARGE_BYTES


async def test_a_client_that_stays_holds_its_descriptors(children: Children, app: FaultApp) -> None:
    """The control: a descriptor that is still in use is counted."""
    proxy = await serve(children, app, timeouts=SHORT)
    before = await settled(proxy, app)
    async with await Transfer.connect(proxy.port) as client:
        client.begin_upload("/word", "stays", LARGE_BYTES)
        await client.upload(0, 2)
        await app.arrived("stays")
        assert await settled(proxy, app) == before + 2
        assert app.of("stays").end == ""
