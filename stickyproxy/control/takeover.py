"""One proxy takes the place of another: two installations, or containers, that share a Unix socket.

The successor connects to the hand-over socket of the predecessor and asks for its state and its listening sockets. Once
its own workers accept, it has each worker of the predecessor hand over to one of its own. Until it says "done" the
predecessor can go on: where the successor is gone before, it replaces the workers that have left.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy import __version__
from stickyproxy.config.written import write_section
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.fleet import HAND_OVER_S
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
_SILENT_S: Final = 10.0  # for whoever has connected to say what it wants
_TRIES: Final = 3  # for each worker
_RETRY_S: Final = 1.0
_LOOK_S: Final = 0.1


class HandOverListener:
    """Waits on the hand-over socket for a proxy that takes over; refuses all others, and all but one at a time."""

    def __init__(self, supervisor: Supervisor, link: socket.socket) -> None:
        self._supervisor = supervisor
        self._link = link
        self._successor: Channel | None = None
        self._has_state = False  # the successor may begin to take over
        self._departing: set[asyncio.Task[None]] = set()
        self._restoring: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(link.fileno(), self._accept)

    @property
    def is_busy(self) -> bool:
        """Say whether a proxy is taking over, or workers come back because one did not."""
        is_restoring = self._restoring is not None and not self._restoring.done()
        return is_restoring or (self._has_state and self._successor is not None and not self._successor.is_closed)

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
        self._has_state = False
        self._successor = channel = Channel(link, self._on_message, self._on_lost)
        asyncio.get_running_loop().call_later(_SILENT_S, self._drop_silent, channel)

    def _drop_silent(self, channel: Channel) -> None:
        if channel is self._successor and not self._has_state and not channel.is_closed:
            logger.warning("hand-over refused: nothing was asked for within %g s", _SILENT_S)
            channel.close()

    def _on_message(self, message: Message) -> None:
        message = Message(message.kind, message.body, message.take_descriptors(), message.number)
        task = spawn(self._handle(message), "hand over")
        if message.kind == "depart":
            self._departing.add(task)
            task.add_done_callback(self._departing.discard)

    async def _handle(self, message: Message) -> None:
        channel, supervisor = self._successor, self._supervisor
        if channel is None:
            return
        try:
            match message.kind:
                case "state":
                    await self._give_state(channel, message)
                case "depart":
                    channel.answer(message, await self._let_depart(message))
                case "done" if not self._has_state:
                    raise ChannelError("whoever takes over has not asked for the state")
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

    async def _give_state(self, channel: Channel, message: Message) -> None:
        if message.body.get("protocol") != PROTOCOL:
            raise ChannelError(f"version {__version__} cannot hand over to version {message.body.get('version')}")
        supervisor = self._supervisor
        if supervisor.upgrader.is_running:
            raise ChannelError("an upgrade is under way")
        if supervisor.runner is not None:
            raise ChannelError("it runs its app processes itself, and they would end with it: use stickyproxy upgrade")
        if self._restoring is not None:
            await self._restoring
        self._has_state = True
        sockets, config = supervisor.sockets, supervisor.config
        addresses = list(sockets)
        body = {
            "version": __version__,
            "sockets": [write_address(address) for address in addresses],
            "secrets": [secret.hex() for secret in supervisor.signing],
            "routing": supervisor.routing.export(),
            "upstreams": [write_section(one) for one in config.every_upstream],
            "clusters": {one.id: cluster.name for cluster in config.every_cluster for one in cluster.upstreams},
            "workers": len(supervisor.fleet.links),
        }
        channel.answer(message, body, [sockets[address].fileno() for address in addresses])

    async def _let_depart(self, message: Message) -> dict[str, Any]:
        """Have a worker hand over to the socket that came with the message."""
        fleet, position = self._supervisor.fleet, int(message.body["worker"])
        alive = [link for link in fleet.links if not link.ended.done()]
        if not 0 <= position < len(alive) or len(message.descriptors) != 1 or not self._has_state:
            raise ChannelError(
                f"there is no worker {position} that could hand over to {len(message.descriptors)} sockets"
            )
        return await fleet.let_depart(alive[position], message.descriptors, float(message.body["grace_s"]))

    def _on_lost(self, reason: str) -> None:
        if self._supervisor.is_handed_over:
            return
        if not self._has_state:
            logger.warning("hand-over refused: %s", reason)
            return
        logger.error("the proxy that was taking over is gone (%s): this one goes on", reason)
        self._restoring = spawn(self._restore(), "go on after a failed hand-over")

    async def _restore(self) -> None:
        """Have as many workers as before, once it is known which ones have left."""
        if self._departing:
            await asyncio.wait(tuple(self._departing))
        try:
            await self._supervisor.fleet.resize(0.0)
        except UsageError as error:
            logger.error("there are fewer workers than there should be: %s", error)  # noqa: TRY400 -- the reason is all
        self._supervisor.on_free()

    @override
    def __repr__(self) -> str:
        return f"<HandOverListener {self._successor}>"


class Predecessor:
    """The proxy whose place is taken, as its successor sees it."""

    def __init__(self, link: socket.socket, path: Path) -> None:
        self._channel = Channel(link, lambda _: None)
        self._path = path
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
        found = cls(link, path)
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
            routing = body["routing"]
            self.routing = {
                **routing,
                "leaving": [*routing.get("leaving", ()), *body["upstreams"]],
                "clusters": {**routing.get("clusters", {}), **body.get("clusters", {})},
            }
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

        One that cannot, ends with the other proxy, in order ("failed"). Where the other proxy itself ends meanwhile,
        this one serves alone. Raises UsageError where it goes on, but does not hand over any more.
        """
        counts: Counter[str] = Counter()
        for position in range(self.workers):
            counts += await self._take_from(position, fleet, grace_s)
        try:
            await self._channel.request("done")
        except ChannelError as error:
            if not await self._is_gone():
                raise UsageError(f"the other proxy does not hand over: {error}") from error
            logger.error("the other proxy has ended, and what it had not handed over is lost: %s", error)  # noqa: TRY400
        self.close()
        return counts

    async def _take_from(self, position: int, fleet: Fleet, grace_s: float) -> Counter[str]:
        """Take over from one worker, in several tries where it must be."""
        for attempt in range(_TRIES):
            alive = [link for link in fleet.links if link.is_ready and not link.ended.done()]
            try:
                if not alive:
                    raise ChannelError("no worker can take over")  # noqa: TRY301 -- it is tried again as all else is
                answer = await self._let_depart(alive[(position + attempt) % len(alive)], grace_s)
            except ChannelError as error:
                logger.error("worker %d of the other proxy cannot hand over: %s", position, error)  # noqa: TRY400
                if not self._channel.is_open:
                    break
                await asyncio.sleep(_RETRY_S)
            else:
                logger.info("worker %d of the other proxy has handed over", position)
                return Counter(answer.body)
        return Counter(failed=1)

    async def _let_depart(self, new: WorkerLink, grace_s: float) -> Message:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            await new.channel.request("arrive", {}, [ours.fileno()])
            # Always the first: one that has handed over is no longer among them.
            body = {"worker": 0, "grace_s": grace_s}
            return await self._channel.request("depart", body, [theirs.fileno()], timeout_s=HAND_OVER_S)

    async def _is_gone(self) -> bool:
        """Say whether nobody listens at the hand-over socket any more; the end of a process takes a moment."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CONNECT_S
        while loop.time() < deadline:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                if probe.connect_ex(str(self._path)) in {errno.ECONNREFUSED, errno.ENOENT}:
                    return True
            await asyncio.sleep(_LOOK_S)
        return False

    def close(self) -> None:
        """Part from it."""
        self._channel.close()

    @override
    def __repr__(self) -> str:
        return f"<Predecessor of version {self.version}>"
