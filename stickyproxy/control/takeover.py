"""One proxy takes the place of another: two installations, or containers, that share a Unix socket.

The successor connects to the hand-over socket of the predecessor and asks for its state and its listening sockets. Once
its own workers accept, it has each worker of the predecessor hand over to one of its own. Until it says "done" the
predecessor can go on: where the successor is gone before, it replaces the workers that have left.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy import __version__
from stickyproxy.config.written import write_section
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.inheritance import open_socket
from stickyproxy.control.messages import PROTOCOL, read_address, write_address
from stickyproxy.control.runtime import ForeignPeerError, check_peer
from stickyproxy.errors import ChannelError, StickyproxyError, UsageError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stickyproxy.config import Address
    from stickyproxy.control.fleet import Fleet
    from stickyproxy.control.supervisor import Supervisor
    from stickyproxy.control.worker_link import WorkerLink

logger = logging.getLogger(__name__)

_CONNECT_S: Final = 5.0
_HAND_OVER_S: Final = 120.0  # for one worker to move all that can move


class HandOverListener:
    """Waits on the hand-over socket for a proxy that takes over; refuses all others, and all but one at a time."""

    def __init__(self, supervisor: Supervisor, link: socket.socket) -> None:
        self._supervisor = supervisor
        self._link = link
        self._successor: Channel | None = None
        asyncio.get_running_loop().add_reader(link.fileno(), self._accept)

    def close(self) -> None:
        """Wait for nobody any more."""
        asyncio.get_running_loop().remove_reader(self._link.fileno())

    def _accept(self) -> None:
        try:
            link, _ = self._link.accept()
        except OSError:
            return
        try:
            peer = check_peer(link)
            if self._successor is not None and not self._successor.is_closed:
                raise ForeignPeerError("another proxy is taking over already")  # noqa: TRY301 -- one way to refuse
        except ForeignPeerError as error:
            logger.warning("hand-over refused: %s", error)
            link.close()
            return
        logger.info("process %d asks to take over", peer.pid)
        self._successor = Channel(link, self._on_message, self._on_lost)

    def _on_message(self, message: Message) -> None:
        message = Message(message.kind, message.body, message.take_descriptors(), message.number)
        spawn(self._handle(message), "hand over")

    async def _handle(self, message: Message) -> None:
        channel, supervisor = self._successor, self._supervisor
        if channel is None:
            return
        try:
            match message.kind:
                case "state":
                    self._give_state(channel, message)
                case "depart":
                    channel.answer(message, await self._let_depart(message))
                case "done":
                    await supervisor.hand_over_done()
                    channel.answer(message)
                case kind:
                    raise ChannelError(f"this version knows no {kind!r}")
        except (StickyproxyError, KeyError, TypeError, ValueError) as error:
            logger.warning("hand-over: refused %s: %s", message.kind, error)
            channel.refuse(message, str(error))
        finally:
            message.close()

    def _give_state(self, channel: Channel, message: Message) -> None:
        if message.body.get("protocol") != PROTOCOL:
            raise ChannelError(f"version {__version__} cannot hand over to version {message.body.get('version')}")
        supervisor = self._supervisor
        sockets, config = supervisor.sockets, supervisor.config
        addresses = list(sockets)
        body = {
            "version": __version__,
            "sockets": [write_address(address) for address in addresses],
            "secrets": [secret.hex() for secret in supervisor.signing],
            "routing": supervisor.routing.export(),
            "upstreams": [write_section(one) for one in config.upstreams],
            "workers": len(supervisor.fleet.links),
        }
        channel.answer(message, body, [sockets[address].fileno() for address in addresses])

    async def _let_depart(self, message: Message) -> dict[str, Any]:
        """Have a worker hand over to the socket that came with the message."""
        fleet, position = self._supervisor.fleet, int(message.body["worker"])
        if not 0 <= position < len(fleet.links) or len(message.descriptors) != 1:
            raise ChannelError(
                f"there is no worker {position} that could hand over to {len(message.descriptors)} sockets"
            )
        return await fleet.let_depart(fleet.links[position], message.descriptors, float(message.body["grace_s"]))

    def _on_lost(self, reason: str) -> None:
        supervisor = self._supervisor
        if not supervisor.is_handed_over:
            logger.error("the proxy that was taking over is gone (%s): this one goes on", reason)
            spawn(supervisor.fleet.restore(), "go on after a failed hand-over")

    @override
    def __repr__(self) -> str:
        return f"<HandOverListener {self._successor}>"


class Predecessor:
    """The proxy whose place is taken, as its successor sees it."""

    def __init__(self, link: socket.socket) -> None:
        self._channel = Channel(link, lambda _: None)
        self.version = ""
        self.sockets: dict[Address, socket.socket] = {}
        self.secrets: tuple[bytes, ...] = ()
        self.routing: dict[str, Any] = {}
        self.workers = 0

    @classmethod
    async def find(cls, path: Path) -> Self | None:
        """Connect to a hand-over socket and ask for the state; None where nobody listens there.

        Raises UsageError where whoever listens does not hand over.
        """
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        try:
            async with asyncio.timeout(_CONNECT_S):
                await asyncio.get_running_loop().sock_connect(link, str(path))
            check_peer(link)
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            return None
        except (OSError, ForeignPeerError) as error:
            link.close()
            raise UsageError(f"cannot take over from {path}: {str(error) or 'no answer'}") from error
        found = cls(link)
        try:
            await found._ask()
        except (ChannelError, KeyError, TypeError, ValueError) as error:
            found.close()
            raise UsageError(f"cannot take over from {path}: {error}") from error
        return found

    async def _ask(self) -> None:
        message = await self._channel.request("state", {"protocol": PROTOCOL, "version": __version__})
        body, descriptors = message.body, message.take_descriptors()
        links = [open_socket(one) for one in descriptors]
        try:
            self.sockets = dict(zip(map(read_address, body["sockets"]), links, strict=True))
            self.secrets = tuple(bytes.fromhex(one) for one in body["secrets"])
            self.routing = {**body["routing"], "leaving": [*body["routing"].get("leaving", ()), *body["upstreams"]]}
            self.workers, self.version = int(body["workers"]), str(body["version"])
        except BaseException:
            for link in links:
                link.close()
            raise

    def choose_sockets(self, addresses: Sequence[Address]) -> dict[Address, socket.socket]:
        """Return the sockets of addresses that both proxies listen on; the others are closed."""
        for address in self.sockets.keys() - set(addresses):
            self.sockets.pop(address).close()
        return self.sockets

    async def hand_over(self, fleet: Fleet, grace_s: float) -> Counter[str]:
        """Have each of its workers hand over to one of ours; return what has moved and what has not.

        Raises UsageError where it is gone, or does not want to any more.
        """
        counts: Counter[str] = Counter()
        try:
            for position in range(self.workers):
                counts += await self._take_from(position, fleet.links[position % len(fleet.links)], grace_s)
            await self._channel.request("done")
        except ChannelError as error:
            raise UsageError(f"the other proxy does not hand over: {error}") from error
        self.close()
        return counts

    async def _take_from(self, position: int, new: WorkerLink, grace_s: float) -> Counter[str]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            await new.channel.request("arrive", {}, [ours.fileno()])
            answer = await self._channel.request(
                "depart", {"worker": 0, "grace_s": grace_s}, [theirs.fileno()], timeout_s=_HAND_OVER_S
            )
        logger.info("worker %d of the other proxy has handed over", position)
        return Counter(answer.body)

    def close(self) -> None:
        """Part from it."""
        self._channel.close()

    @override
    def __repr__(self) -> str:
        return f"<Predecessor of version {self.version}>"
