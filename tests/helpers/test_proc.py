"""What is read of /proc: that of a text, and that of this process and of those that it starts."""

from __future__ import annotations

import asyncio
import os
import subprocess

from tests.helpers.proc import (
    ESTABLISHED,
    LISTENING,
    Socket,
    listens,
    living,
    mentioning,
    parse_stat,
    parse_tcp,
    ports_held,
    zombies_of,
)
from tests.helpers.processes import wait_until

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1
   1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 12 1
   2: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 13 1
   3: 0100007F:1F90 0100007F:C003 06 00000000:00000000 00:00000000 00000000     0        0 0 1
"""


def test_the_facts_of_a_process_are_read_whatever_its_name() -> None:
    stat = parse_stat("7 (a) S 1 (b) R 1 2 99 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 8192")
    assert stat == ("R", 99, 4711)
    assert not stat.has_ended


def test_a_process_that_has_ended_lives_no_more_but_is_a_zombie_until_it_is_waited_for() -> None:
    with subprocess.Popen(["sleep", "4711.25"]) as child:
        wait_until(lambda: child.pid in mentioning("sleep", "4711.25"), "it is another program")
        assert child.pid in dict(living())
        assert child.pid not in zombies_of(os.getpid())
        child.kill()
        wait_until(lambda: child.pid in zombies_of(os.getpid()), "it has ended")
        assert child.pid not in dict(living()).keys() | mentioning("sleep", "4711.25")
    assert child.pid not in zombies_of(os.getpid())


def test_who_is_connected_to_a_port_is_read() -> None:
    assert parse_tcp(TABLE, 0x1F90) == [
        Socket("11", 0, LISTENING),
        Socket("12", 0xC350, ESTABLISHED),
        Socket("0", 0xC003, "06"),
    ]
    assert parse_tcp(TABLE, 0xC350) == [Socket("13", 0x1F90, ESTABLISHED)]


async def test_the_connections_of_this_process_are_found() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        closed.set()

    closed = asyncio.Event()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        client = writer.get_extra_info("sockname")[1]
        assert listens(os.getpid(), port)
        assert not listens(os.getppid(), port)
        assert not listens(os.getpid(), client)
        async with asyncio.timeout(30):
            while ports_held(os.getpid(), port) != {client}:  # noqa: ASYNC110 -- the kernel tells nobody
                await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        await asyncio.wait_for(closed.wait(), 30)
