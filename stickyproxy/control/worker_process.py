"""The program of a worker process: does what the supervisor says over the channel that it inherits as descriptor 3.

Signals of the terminal and of service managers are for the supervisor alone; when that is gone, the worker ends too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import uvloop

from stickyproxy import __version__
from stickyproxy.config import Loaded
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.descriptors import choose_connection_limit, raise_descriptor_limit
from stickyproxy.control.messages import PROTOCOL, read_address, read_snapshots
from stickyproxy.control.process import set_log_level, set_up_log, tune_collector
from stickyproxy.control.transfer import Receiver, Sender
from stickyproxy.control.worker import Worker
from stickyproxy.errors import ChannelError, StickyproxyError
from stickyproxy.observe.table import Table
from stickyproxy.proxy.board import Board
from stickyproxy.proxy.key_table import KeyTable, KeyTableError
from stickyproxy.tasks import spawn
from stickyproxy.wire.frames import SERVICE_RESTART

if TYPE_CHECKING:
    import ssl
    from collections import Counter
    from collections.abc import Awaitable, Callable, Mapping

    from stickyproxy.affinity.health import HealthEvent
    from stickyproxy.config import Address, Config

logger = logging.getLogger(__name__)

CHANNEL_DESCRIPTOR: Final = 3
_RETIRE_S: Final = 2.0  # over which the tunnels that could not move are closed, and as long again for their answers
_SHARE_S: Final = 1.0  # for connections in use to come to the end of their exchange
_ORPHAN_S: Final = 1.0  # for the Close frames of its tunnels, once the supervisor is gone
_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LONG: Final = frozenset({"drain", "depart", "share"})  # others are handled meanwhile


class WorkerProcess:
    """One worker, from its start message to its end; each method `_on_KIND` handles one kind of message."""

    def __init__(self, link: socket.socket) -> None:
        self._channel = Channel(link, self._on_message, self._on_lost)
        self._worker: Worker | None = None
        self._contexts: dict[str, ssl.SSLContext] = {}  # of upstreams, by id
        self._is_over = asyncio.Event()
        self._is_departing = False
        self._is_ending = False
        self._retiring: asyncio.Task[None] | None = None  # from the hand-over to the end
        self._retire_at = 0.0  # when the grace is over, on the loop's clock
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._handlers: dict[str, Callable[[Message], Awaitable[dict[str, Any] | None]]] = {
            "start": self._on_start,
            "keys": self._on_keys,
            "publish": self._on_publish,
            "accept": self._on_accept,
            "reload": self._on_reload,
            "renew": self._on_renew,
            "report_all": self._on_report_all,
            "arrive": self._on_arrive,
            "share": self._on_share,
            "depart": self._on_depart,
            "shut": self._on_shut,
            "drain": self._on_drain,
            "ping": self._on_ping,
            "stop": self._on_stop,
        }

    async def run(self) -> None:
        """Work until told to stop, or until the supervisor is gone."""
        self._channel.send("hello", {"protocol": PROTOCOL, "version": __version__, "pid": os.getpid()})
        handling = spawn(self._handle_all(), "messages of the supervisor")
        await self._is_over.wait()
        handling.cancel()
        await self._channel.flush()
        self._channel.close()

    def _on_message(self, message: Message) -> None:
        self._inbox.put_nowait(Message(message.kind, message.body, message.take_descriptors(), message.number))

    def _on_lost(self, reason: str) -> None:
        if not self._is_over.is_set():
            logger.error("the supervisor is gone (%s): ending", reason)
            spawn(self._end_orphaned(), "end without the supervisor")

    async def _end_orphaned(self) -> None:
        if self._worker is not None:
            await self._worker.shut_tunnels(_ORPHAN_S / 2, SERVICE_RESTART, "the proxy restarts")
            await self._worker.drain(_ORPHAN_S)
            await self._worker.close()
        self._is_over.set()

    async def _handle_all(self) -> None:
        """Handle messages one after the other: what was sent later counts later."""
        while True:
            message = await self._inbox.get()
            if message.kind in _LONG:
                spawn(self._handle(message), message.kind)
            else:
                await self._handle(message)

    async def _handle(self, message: Message) -> None:
        try:
            handler = self._handlers.get(message.kind)
            if handler is None:
                raise ChannelError(f"this version knows no {message.kind!r}")  # noqa: TRY301 -- refused as all else is
            answer = await handler(message)
        except StickyproxyError as error:
            if message.number is None:
                logger.error("cannot %s: %s", message.kind, error)  # noqa: TRY400 -- nobody waits for an answer
            self._channel.refuse(message, str(error))
        except Exception as error:
            logger.exception("cannot %s", message.kind)
            self._channel.refuse(message, f"{type(error).__name__}: {error}")
        else:
            self._channel.answer(message, answer)
        finally:
            message.close()

    @property
    def _running(self) -> Worker:
        if self._worker is None:
            raise ChannelError("the worker has not been started")
        return self._worker

    async def _on_start(self, message: Message) -> None:
        """Make the data plane. Descriptors: the table, the board, then the sockets of the listeners."""
        body = message.body
        config = _load(body)
        set_up_log(config.log_level, f"worker {body['index']}")
        table, board, *links = message.take_descriptors()
        raise_descriptor_limit()
        self._worker = worker = Worker(
            config,
            [bytes.fromhex(one) for one in body["secrets"]],
            connections=_limit_connections(body),
            report=self._report,
            table=Table(table),
        )
        contexts, self._contexts = _make_contexts(config)
        worker.plane.on_tick = self._on_tick
        worker.plane.place = Board(board).place(int(body["index"]))
        worker.add_listeners(_read_links(body, links), contexts)
        tune_collector()

    def _report(self, upstream_id: str, event: HealthEvent) -> None:
        self._channel.send("report", {"upstream": upstream_id, "event": event})

    def _on_tick(self) -> None:
        self._running.tick()
        self._report_sessions()

    def _report_sessions(self) -> None:
        """Tell which sessions began, were moved, or ended; the supervisor counts each once."""
        began, ended = self._running.plane.sessions.take_changes()
        if began or ended:
            news = [[one.client_id.hex(), one.digest.hex(), one.pinned_at] for one in began]
            self._channel.send("sessions", {"began": news, "ended": [one.hex() for one in ended]})

    async def _on_report_all(self, _: Message) -> None:
        """Tell all sessions again: another image of the supervisor knows none yet."""
        self._running.plane.sessions.forget_changes()
        self._report_sessions()

    async def _on_keys(self, message: Message) -> None:
        """Learn keys, and look them up, in the memory that comes with the message, as all other workers do."""
        (descriptor,) = message.take_descriptors()
        plane = self._running.plane
        try:
            keys = KeyTable(descriptor)
        except KeyTableError:
            os.close(descriptor)
            raise
        plane.keys, former = keys, plane.keys
        keys.learned, keys.evicted = former.learned, former.evicted  # counters never go back
        former.close()

    async def _on_publish(self, message: Message) -> None:
        snapshots, endpoints = read_snapshots(message.body["clusters"], self._contexts)
        worker = self._running
        if worker.plane.place is not None:
            worker.plane.place.slots = {bytes.fromhex(one): slot for one, slot in message.body["slots"].items()}
        worker.publish(snapshots, endpoints)

    async def _on_ping(self, _: Message) -> None:
        """Answer: all that was sent before is done."""

    async def _on_accept(self, _: Message) -> None:
        await self._running.accept()

    async def _on_reload(self, message: Message) -> None:
        """Work by another configuration. Descriptors: the sockets of listeners that are new."""
        body, worker = message.body, self._running
        config = await asyncio.to_thread(_load, body)
        contexts, upstream_contexts = await asyncio.to_thread(_make_contexts, config)
        secrets = [bytes.fromhex(one) for one in body["secrets"]]
        worker.reload(config, secrets, connections=_limit_connections(body), contexts=contexts)
        self._contexts |= upstream_contexts  # of those that are gone, some may still hold sessions
        set_log_level(config.log_level)
        worker.add_listeners(_read_links(body, message.take_descriptors()), contexts)
        await worker.accept()

    async def _on_renew(self, message: Message) -> None:
        """Take the files of a listener's certificates anew."""
        worker, address = self._running, read_address(message.body["address"])
        contexts, _ = await asyncio.to_thread(_make_contexts, worker.config)
        if address in contexts:
            worker.renew(address, contexts[address])

    async def _on_arrive(self, message: Message) -> None:
        """Take over what another worker sends over the socket that comes with the message."""
        Receiver(self._running, _only_socket(message))

    async def _on_share(self, message: Message) -> dict[str, Any]:
        """Give some connections to the worker at the other end of the socket that comes with the message.

        The answer says how many have moved, by kind: `count` at most, since those in use are waited for but a second.
        """
        if self._is_departing or self._retiring is not None or self._is_ending:
            raise ChannelError("the worker is handing over or ending already")
        self._is_departing = True
        try:
            sender = Sender(self._running, _only_socket(message), limit=int(message.body["count"]))
            try:
                await sender.finish(_SHARE_S)
            finally:
                await sender.close()
        finally:
            self._is_departing = False
        return {"moved": dict(sender.moved)}

    async def _on_depart(self, message: Message) -> dict[str, Any]:
        """Give all that can move to the worker at the other end of the socket that comes with the message, and end.

        The answer comes when all has moved that could move at once: it says how many connections did, by kind, and how
        many are left, by what keeps them. Those go on until they end, or until the grace is over. Where it is said once
        more meanwhile, because that worker leaves too, what is left goes to another one.
        """
        worker, loop = self._running, asyncio.get_running_loop()
        if self._is_departing or self._is_ending:
            raise ChannelError("the worker is handing over or ending already")
        self._is_departing = True
        try:
            if self._retiring is None:
                self._retire_at = loop.time() + float(message.body["grace_s"])
            else:
                self._retiring.cancel()
                await asyncio.wait((self._retiring,))
            sender = Sender(worker, _only_socket(message))
            worker.pause()
            worker.plane.is_leaving = True
            left = await self._send(sender)
        finally:
            self._is_departing = False
        return {"moved": dict(sender.moved), "left": dict(left)}

    async def _send(self, sender: Sender) -> Counter[str]:
        """Send what can move now, and retire; where that fails, go on as before, and raise ChannelError."""
        worker, is_first = self._running, self._retiring is None
        try:
            left = await sender.send()
        except ChannelError:
            await sender.close()
            if is_first:
                worker.plane.is_leaving = False
                await worker.accept()
            else:
                self._retiring = spawn(self._retire(None), "end after the hand-over")
            raise
        self._retiring = spawn(self._retire(sender), "end after the hand-over")
        return left

    async def _retire(self, sender: Sender | None) -> None:
        """Finish what cannot move, and end."""
        worker, loop = self._running, asyncio.get_running_loop()
        worker.stop_accepting()  # the sockets are the other workers'; a listener that is taken away must be gone
        if sender is not None:
            try:
                await sender.finish(self._retire_at - loop.time())
            except ChannelError as error:
                logger.warning("the worker that took over is gone: %s", error)
            finally:
                await sender.close()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._retire_at):
                await worker.plane.wait_until_gone()
        self._is_ending = True
        await worker.shut_tunnels(_RETIRE_S, SERVICE_RESTART, "the proxy was replaced")
        await worker.drain(2 * _RETIRE_S)
        await worker.close()
        self._is_over.set()

    async def _on_shut(self, message: Message) -> dict[str, Any]:
        """Begin to close the tunnels of some upstreams; the answer says how many they are."""
        worker, body = self._running, message.body
        digests = {bytes.fromhex(one) for one in body["upstreams"]}
        return {"count": worker.shut_upstreams(digests, float(body["per_s"]), str(body["reason"]))}

    async def _on_drain(self, message: Message) -> None:
        await self._running.drain(float(message.body["grace_s"]))

    async def _on_stop(self, _: Message) -> None:
        if self._worker is not None:
            await self._worker.close()
        self._is_over.set()


def _only_socket(message: Message) -> socket.socket:
    """Return the socket that comes with a message; raise ChannelError where it is not exactly one."""
    if len(message.descriptors) != 1:
        raise ChannelError(f"one socket is needed, {len(message.descriptors)} came")
    return socket.socket(fileno=message.take_descriptors()[0])


def _load(body: Mapping[str, Any]) -> Config:
    """Return the configuration that a message carries; raise UsageError where this version cannot read it."""
    return Loaded.from_json(body, os.environ).config


def _make_contexts(config: Config) -> tuple[dict[Address, ssl.SSLContext], dict[str, ssl.SSLContext]]:
    """Return the TLS contexts of listeners, by address, and of upstreams, by id; raise UsageError."""
    if not (any(one.tls for one in config.listeners) or any(one.tls for one in config.every_upstream)):
        return {}, {}
    # Most workers speak no TLS, and start in nine tenths of the time, with 5 MB less, without what reads certificates.
    from stickyproxy.control.certificates import make_listener_context, make_upstream_contexts  # noqa: PLC0415

    listeners = {one.address: make_listener_context(one.tls) for one in config.listeners if one.tls is not None}
    return listeners, make_upstream_contexts(config.every_upstream)


def _limit_connections(body: Mapping[str, Any]) -> int:
    return choose_connection_limit(raise_descriptor_limit(), body.get("connections"))


def _read_links(body: Mapping[str, Any], descriptors: list[int]) -> dict[Address, socket.socket]:
    """Return the sockets of listeners, by address."""
    links = [socket.socket(fileno=one) for one in descriptors]
    for link in links:
        link.setblocking(False)
    return dict(zip(map(read_address, body["listeners"]), links, strict=True))


async def _run(link: socket.socket) -> None:
    await WorkerProcess(link).run()


def main() -> None:
    """Run a worker on the channel that was inherited."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    set_up_log("info", "worker")
    uvloop.run(_run(socket.socket(fileno=CHANNEL_DESCRIPTOR)))


if __name__ == "__main__":
    main()
