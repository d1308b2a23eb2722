"""Where a WebSocket case is played: an address of the upstream, and a `stickyproxy` process in front of it."""

from __future__ import annotations

import asyncio
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from pprint import pformat
from typing import TYPE_CHECKING, Any, Final

from tests.helpers.certificates import Authority
from tests.helpers.proc import Growth
from tests.helpers.processes import Children, StickyProxy, free_port
from tests.helpers.websocket_cases import MIB, content, far_from
from tests.helpers.websocket_matrix import DEADLINE_S, Case, Conversation, Door, End, differences, observe, observe_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from tests.helpers.websocket_matrix import Verdict

LARGE: Final = 64 * MIB
# The proxy looks four times a second for sides that were silent since its last look: each gets a Ping.
PINGS: Final[Mapping[str, Any]] = {"websocket": {"ping": {"interval": "1ms", "timeout": "off"}}}


def check_same(different: Mapping[str, Any]) -> None:
    """Fail with what is different: name, then what was seen directly and through the proxy."""
    assert not different, f"not as without the proxy:\n{pformat(different, width=120)}"


def differences_of_all(
    direct: Mapping[str, Verdict], proxied: Mapping[str, Verdict]
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return what is different through the proxy, by path; nothing for paths where nothing is."""
    different = {path: differences(direct[path], proxied[path]) for path in direct}
    return {path: each for path, each in different.items() if each}


@dataclass
class Site:
    """An address where the upstream of a case listens, and a proxy in front of it."""

    listening: socket.socket
    proxy: StickyProxy
    proxied: Door

    @property
    def direct(self) -> Door:
        return Door(*self.listening.getsockname())

    async def compare(self, case: Case) -> tuple[Verdict, dict[str, tuple[Any, Any]]]:
        """Play a case both ways; return the direct verdict, and what is different through the proxy."""
        direct = await observe(case, self.listening, self.direct)
        proxied = await observe(case, self.listening, self.proxied)
        return direct, differences(direct, proxied)

    async def same(self, case: Case) -> Verdict:
        """Play a case both ways and return its verdict, which must be the same."""
        verdict, different = await self.compare(case)
        check_same(different)
        return verdict

    async def same_for_all(self, case: Case, paths: Iterable[str]) -> tuple[dict[str, Verdict], dict[str, Verdict]]:
        """Play a case for several clients at once, both ways; return their verdicts, which must be the same."""
        direct, proxied = await self.observe_all(case, paths)
        check_same(differences_of_all(direct, proxied))
        return direct, proxied

    async def observe_all(self, case: Case, paths: Iterable[str]) -> tuple[dict[str, Verdict], dict[str, Verdict]]:
        """Play a case for several clients at once, both ways; return their verdicts by path."""
        paths = list(paths)
        direct = await observe_all(case, self.listening, self.direct, paths)
        return direct, await observe_all(case, self.listening, self.proxied, paths)


@contextmanager
def open_site(folder: Path, *, has_tls: bool = False, has_pings: bool = False) -> Iterator[Site]:
    """Start a proxy that keeps its files in a folder: with TLS on its listener, or with Pings of its own."""
    # The socket listens all the time, and each case serves it for a while. Probes would be clients of the case.
    # The protocol is named because asyncio sets TCP_NODELAY only where it is.
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening,
        Children(folder) as children,
    ):
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        upstream = "http://{}:{}".format(*listening.getsockname())
        more: dict[str, Any] = {"health": {"probe": False}, **(PINGS if has_pings else {})}
        port, context = free_port(), None
        listener: dict[str, Any] = {"address": f"127.0.0.1:{port}"}
        if has_tls:
            authority = Authority(folder)
            context = authority.client_context()
            listener["tls"] = {"certificates": [authority.issue("127.0.0.1").section]}
        proxy = StickyProxy(children, {"app": upstream}, more={**more, "listeners": [listener]})
        yield Site(listening, proxy, Door("127.0.0.1", port, context, has_pings))


class Blocked:
    """A conversation in which `side` sends 64 MiB to an end that does not read until it `may_read`."""

    def __init__(self, site: Site, side: str, door: Door) -> None:
        self.sent = 0
        self.may_read = asyncio.Event()
        self._door = door
        self._listening = site.listening
        self._block = content(MIB)
        scripts = {side: self.give, far_from(side): self.take}
        self._conversation = Conversation(Case(scripts["client"], scripts["server"]), site.listening, door)

    async def give(self, end: End) -> None:
        if await self.is_other(end):
            return
        for number in range(LARGE // MIB):
            await end.send(self._block[number:] + self._block[:number])
            self.sent += 1

    async def take(self, end: End) -> None:
        if await self.is_other(end):
            return
        end.connection.transport.pause_reading()
        await self.may_read.wait()
        end.connection.transport.resume_reading()
        await end.receive_all()

    async def is_other(self, end: End) -> bool:
        assert end.connection.request is not None
        if end.connection.request.path != "/other":
            return False
        await end.echo()
        return True

    async def stand_still(self) -> int:
        """Wait until nothing more is taken from the sender while another client has 50 answers; return what was."""
        before = -1
        while before != self.sent or not before:
            before = self.sent
            async with self._door.connect(self._listening, "/other", {}) as other:
                for _ in range(50):
                    await other.send("still there?")
                    await other.recv()
        return before

    async def play(self) -> Verdict:
        async with asyncio.timeout(DEADLINE_S), self._conversation.serving, asyncio.TaskGroup() as group:
            slow = group.create_task(self._conversation.open("/slow"))
            assert 0 < await self.stand_still() < LARGE // MIB
            self.may_read.set()
        return slow.result()


async def play_blocked(site: Site, side: str) -> Verdict:
    """Let `side` send to an end that does not read for a while, both ways; the verdict must be the same.

    The sender stands still, others are served meanwhile, and in the end all of it arrives.
    """
    direct = await Blocked(site, side, site.direct).play()
    growth = Growth(site.proxy.child.pid)
    proxied = await Blocked(site, side, site.proxied).play()
    assert growth.kib < LARGE // 8 // 1024
    check_same(differences(direct, proxied))
    assert len(direct[f"{far_from(side)}: messages"]) == LARGE // MIB
    assert direct["client: close code"] == 1000
    return proxied
