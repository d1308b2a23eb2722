"""The workers together: started, replaced when they die, told what changes, and ended."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from stickyproxy.affinity.snapshot import nowhere_digest, upstream_digest
from stickyproxy.config.schema import MAX_WORKERS
from stickyproxy.control.inheritance import open_socket
from stickyproxy.control.messages import write_address, write_snapshots
from stickyproxy.control.registry import SessionRegistry
from stickyproxy.control.worker_link import WorkerLink, start_process
from stickyproxy.errors import ChannelError, UsageError
from stickyproxy.observe.removed import Removed
from stickyproxy.observe.table import Table, Totals
from stickyproxy.proxy.board import MAX_SLOTS, Board
from stickyproxy.proxy.key_table import KeyTable, KeyTableError
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from stickyproxy.affinity.snapshot import Snapshot
    from stickyproxy.config import Address, Loaded
    from stickyproxy.control.channel import Message
    from stickyproxy.control.inheritance import Inheritance, WorkerState
    from stickyproxy.control.worker_link import Program
    from stickyproxy.proxy.endpoint import Endpoint

logger = logging.getLogger(__name__)

_RETURN_S: Final = 10.0  # for the clients of a worker that has died, and their tunnels, to come back
_END_S: Final = 3.0  # for a worker that was told to end, beyond the time that it was given
_PUBLISH_S: Final = 0.002  # changes within so long are published together: one probe may follow the other
_ACKNOWLEDGED_S: Final = 5.0
_BACK_OFF_S: Final = (0.0, 0.1, 0.5, 2.0, 5.0)  # before a worker that ends again and again is replaced
_STABLE_S: Final = 30.0
HAND_OVER_S: Final = 120.0  # for a worker to move all that can move at once; 10,000 tunnels take some 2 s
_HAND_OVER_TRIES: Final = 3
_ARRIVE_S: Final = 10.0  # for a worker to be ready for what another one gives it
_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What each worker is made from: the configuration as it was loaded, the secrets, and the bound sockets."""

    loaded: Loaded
    secrets: tuple[bytes, ...]
    bound: Mapping[Address, socket.socket]
    workers: int

    def write(self, addresses: Sequence[Address]) -> dict[str, Any]:
        """Return the orders as JSON; the sockets of `addresses` go beside them."""
        limit = self.loaded.config.limits.connections
        return {
            **self.loaded.to_json(),
            "secrets": [secret.hex() for secret in self.secrets],
            "listeners": [write_address(one) for one in addresses],
            "connections": None if limit is None else -(-limit // self.workers),
        }


class Fleet:
    """All workers of a proxy. `on_message` gets what they send, but for what the fleet itself is asked."""

    def __init__(self, orders: Orders, on_report: Callable[[str, str], None]) -> None:
        self.orders = orders
        self._on_report = on_report
        self.links: list[WorkerLink] = []
        """Those that serve, by index."""
        self.leaving: list[WorkerLink] = []
        """Those that were told to end, and finish what they have."""
        self.successors: list[WorkerLink] = []
        """Those of another version that will serve."""
        self.totals = Totals()
        """What the workers that have ended had counted."""
        self.removed = Removed()
        """The upstreams whose counters are still shown."""
        self.registry = SessionRegistry()
        self.board = Board.create()
        self.keys = KeyTable.create(orders.loaded.config.affinity.max_keys)
        """The keys that all workers have learned, those of the successors too."""
        self.next_board: Board | None = None
        """That of the successors."""
        self._lost_at = -math.inf  # when a worker that served has died
        self.moving = asyncio.Lock()
        """Held while connections move between workers: one that takes some over cannot leave."""
        self._slots: dict[str, int] = {}
        self._present: dict[str, str] = {}  # the upstreams of the last routing state, with their clusters
        self.restarts = 0
        self._state: dict[str, Any] | None = None
        self._publishing: asyncio.TimerHandle | None = None
        self._is_stopping = False
        self._starting: set[WorkerLink] = set()  # none of the others yet, but to be told what they are told
        self._vacant: set[int] = set()  # indexes of those that have died and are being replaced
        self._started_at: dict[int, float] = {}
        self._failures: dict[int, int] = {}

    def __iter__(self) -> Iterator[WorkerLink]:
        return iter((*self.links, *self.leaving))

    async def start(self) -> None:
        """Start all workers; raise UsageError, with none left, where one cannot start."""
        links: list[WorkerLink] = []
        try:
            for index in range(self.orders.workers):
                links.append(self._launch(index))  # noqa: PERF401 -- those launched are killed below
            await asyncio.gather(*(self._prepare(link) for link in links))
        except (ChannelError, OSError) as error:
            for link in links:
                self._give_up(link)
            if links:  # they hold the sockets until they are gone
                await asyncio.wait([link.ended for link in links], timeout=_END_S)
            raise UsageError(f"a worker cannot start: {error}") from error
        self.links = links
        self._starting.difference_update(links)

    async def accept(self) -> None:
        """Let all workers accept clients, who meet the latest routing state."""
        self._publish_pending()
        await asyncio.gather(*(link.channel.request("accept") for link in self.links))

    def _launch(self, index: int, program: Program | None = None) -> WorkerLink:
        """Start a process; raise OSError."""
        table = Table.create()
        try:
            process_id, channel = start_process(program)
        except OSError:
            table.close()
            raise
        self._started_at[index] = asyncio.get_running_loop().time()
        link = WorkerLink(index, process_id, channel, table, on_message=self._take, on_end=self._on_end)
        self._starting.add(link)
        return link

    def _give_up(self, link: WorkerLink) -> None:
        """End a worker that does not serve."""
        self._starting.discard(link)
        link.is_leaving = True
        link.kill()

    async def _prepare(self, link: WorkerLink, board: Board | None = None) -> None:
        """Have a worker make its data plane and take the routing state; raise ChannelError."""
        await link.greet()  # the sockets may be others, or closed, by then: their numbers are not taken before
        bound = self.orders.bound
        body = {"index": link.index, **self.orders.write(list(bound))}
        board = board or self.board
        board.clear_worker(link.index)
        await link.start(body, [link.table.descriptor, board.descriptor, *(one.fileno() for one in bound.values())])
        await self._share_keys(link)
        if self._state is not None:
            link.channel.send("publish", self._state)

    async def _share_keys(self, link: WorkerLink) -> None:
        """Let a worker learn and look up keys where all others do, unless its version knows of none."""
        try:
            await link.channel.request("keys", {}, [self.keys.descriptor], timeout_s=_ACKNOWLEDGED_S)
        except ChannelError as error:
            logger.warning("worker %d (pid %d) keeps its keys to itself: %s", link.index, link.process_id, error)

    def _take(self, link: WorkerLink, message: Message) -> None:
        match message.kind:
            case "report":
                self._on_report(str(message.body["upstream"]), str(message.body["event"]))
            case "sessions":
                self.registry.take(link.process_id, message.body)
                self._show_sessions()
            case _:
                logger.debug("worker %d says %s", link.index, message.kind)

    # When the program, or the number of workers, is another

    def adopt(self, inherited: Inheritance) -> None:
        """Take over the workers that a former image of this process had."""
        if inherited.board is not None:
            os.set_inheritable(inherited.board, False)
            self.board.close()
            self.board = Board(inherited.board)
        self._adopt_keys(inherited.keys)
        self.links = self._adopt_all(inherited.serving)
        self.leaving = self._adopt_all(inherited.leaving)
        self.totals = Totals.from_json(inherited.totals)
        now = asyncio.get_running_loop().time()
        self.removed = Removed.from_json(inherited.counts.get("removed", ()), now)
        self.restarts = int(inherited.counts.get("restarts", 0))

    def _adopt_keys(self, descriptor: int | None) -> None:
        """Go on with the keys of the former image, where this version can read them."""
        if descriptor is None:
            return
        os.set_inheritable(descriptor, False)
        try:
            keys = KeyTable(descriptor)
        except KeyTableError as error:
            logger.warning("the keys that were learned are lost: %s", error)
            os.close(descriptor)
        else:
            self.keys.close()
            self.keys = keys

    def _adopt_all(self, states: Sequence[WorkerState]) -> list[WorkerLink]:
        """Return those that live."""
        return [link for link in map(self._adopt, states) if not link.ended.done()]

    def _adopt(self, state: WorkerState) -> WorkerLink:
        os.set_inheritable(state.table, False)
        link = WorkerLink(
            state.index,
            state.process_id,
            open_socket(state.channel),
            Table(state.table),
            on_message=self._take,
            on_end=self._on_end,
            received=state.received,
        )
        link.version, link.is_ready, link.is_leaving = state.version, True, state.is_retiring
        return link

    async def learn(self) -> None:
        """Ask the workers that a former image had for their sessions, so that nobody sees less than there are.

        They get the table of keys, too: that of the former image, if it had any, may be none that this one can read.
        """
        await asyncio.gather(*(self._share_keys(link) for link in self))
        await asyncio.gather(
            *(link.channel.request("report_all", timeout_s=_ACKNOWLEDGED_S) for link in self), return_exceptions=True
        )

    async def start_successors(self, program: Program) -> list[WorkerLink]:
        """Start workers of another version, and return them; raise UsageError, with none left, where one cannot."""
        self.next_board = Board.create()  # the old ones have the same places on theirs
        try:
            for index in range(self.orders.workers):
                self.successors.append(self._launch(index, program))
            await asyncio.gather(*(self._prepare(link, self.next_board) for link in self.successors))
        except (ChannelError, OSError) as error:
            self.drop_successors()
            raise UsageError(f"a worker of the new version cannot start: {error}") from error
        return self.successors

    def drop_successors(self) -> None:
        """End those that were to serve."""
        successors, self.successors = self.successors, []
        for link in successors:
            self._give_up(link)
        if self.next_board is not None:
            self.next_board.close()
            self.next_board = None

    async def leave(self, successors: Sequence[WorkerLink]) -> tuple[tuple[WorkerState, ...], tuple[WorkerState, ...]]:
        """Part from all workers without ending them; return the successors, and those that they take over from."""
        await self.moving.acquire()  # for good: another image of this process goes on
        self._is_stopping = True
        self._publish_pending()
        for link in self._starting - set(successors):  # the other image would not know them
            self._give_up(link)
            await link.ended
        leaving = [(link, await link.leave()) for link in tuple(self)]
        serving = [(link, await link.leave()) for link in successors]
        return _living(serving), _living(leaving)

    async def take_over(self, grace_s: float) -> dict[str, int]:
        """Let the serving workers take over from those that are leaving; return what has moved and what has not.

        The keys are "moved_" and "left_" with the kinds of `Sender`. What is left goes on in the old workers until it
        ends, or for `grace_s` seconds; "failed" counts the workers that could not hand over and serve as before.
        """
        await self._accept_adopted()
        counts: Counter[str] = Counter()
        for number, old in enumerate(tuple(self.leaving)):
            counts += await self._hand_over(old, number, grace_s)
        return dict(counts)

    async def _accept_adopted(self) -> None:
        """Let all workers accept; another one comes in place of a worker that does not, or that is gone already."""
        for link, answer in await self._ask_each("accept"):
            if isinstance(answer, Exception) and not link.ended.done():
                logger.error("worker %d (pid %d) does not accept: killed", link.index, link.process_id)
                link.kill()
        try:
            await self.resize(0.0)
        except UsageError as error:
            logger.error("there are fewer workers than there should be: %s", error)  # noqa: TRY400 -- as above

    async def _hand_over(self, old: WorkerLink, number: int, grace_s: float) -> Counter[str]:
        """Let one worker give its connections to another, the `number`-th; where that fails it goes on as before.

        One that had handed over already, and finishes what could not move, gives that to another worker.
        """
        was_leaving, old.is_leaving = old.is_leaving, True
        for attempt in range(_HAND_OVER_TRIES):
            if attempt:
                await asyncio.sleep(_RETRY_S)
            alive = [link for link in self.links if link.is_ready and not link.ended.done()]
            if not alive:
                continue
            new = alive[(number + attempt) % len(alive)]
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with ours, theirs:
                try:
                    await new.channel.request("arrive", {}, [ours.fileno()], timeout_s=_ARRIVE_S)
                except ChannelError as error:
                    logger.error("worker %d (pid %d) cannot take over: %s", new.index, new.process_id, error)  # noqa: TRY400
                    continue
                try:
                    return Counter(await self._depart(old, [theirs.fileno()], grace_s))
                except ChannelError as error:
                    logger.error("worker %d (pid %d) cannot hand over: %s", old.index, old.process_id, error)  # noqa: TRY400
                    if old.ended.done() or was_leaving:
                        break
                    if isinstance(error.__cause__, TimeoutError):  # it may still do what it was asked for
                        return Counter(failed=1)
        old.is_leaving = was_leaving
        return Counter() if was_leaving else Counter(failed=1)

    async def _depart(self, old: WorkerLink, descriptors: Sequence[int], grace_s: float) -> dict[str, int]:
        async with self.moving:
            answer = await old.channel.request("depart", {"grace_s": grace_s}, descriptors, timeout_s=HAND_OVER_S)
        moved = {f"moved_{kind}": count for kind, count in answer.body.get("moved", {}).items()}
        return moved | {f"left_{kind}": count for kind, count in answer.body.get("left", {}).items()}

    async def let_depart(self, link: WorkerLink, descriptors: Sequence[int], grace_s: float) -> dict[str, int]:
        """Have a serving worker hand over to another proxy's, over a socket; raise ChannelError where it cannot."""
        self.links.remove(link)
        self.leaving.append(link)
        link.is_leaving = True
        try:
            return await self._depart(link, descriptors, grace_s)
        except ChannelError:
            if not link.ended.done():
                self.leaving.remove(link)
                self.links.append(link)
                link.is_leaving = False
            raise

    async def gone(self) -> None:
        """Wait until all workers that are leaving have ended."""
        if self.leaving:
            await asyncio.wait([link.ended for link in self.leaving])

    async def resize(self, grace_s: float) -> None:
        """Have as many workers as the orders say; those that go hand over to those that stay."""
        while len(self.links) + len(self._vacant) < self.orders.workers:
            # One that is leaving still writes to its place on the board.
            taken = {link.index for link in self} | self._vacant
            index = next(number for number in range(len(taken) + 1) if number not in taken) % MAX_WORKERS
            try:
                await self._start_serving(index)
            except (ChannelError, OSError) as error:
                raise UsageError(f"a worker cannot start: {error}") from error
        while len(self.links) + len(self._vacant) > self.orders.workers:
            if self._vacant:
                self._vacant.pop()
                continue
            old = self.links.pop()
            self.leaving.append(old)
            await self._hand_over(old, 0, grace_s)

    async def _start_serving(self, index: int) -> WorkerLink:
        """Start one more worker, and let it accept; raise ChannelError or OSError, with nothing left of it."""
        link = self._launch(index)
        try:
            orders = self.orders
            await self._prepare(link)
            self._publish_pending()
            await link.channel.request("accept")
            if orders is not self.orders:
                raise ChannelError("there are other orders meanwhile")  # noqa: TRY301 -- one way to give up
        except ChannelError:
            self._give_up(link)
            raise
        self._starting.discard(link)
        self.links.append(link)
        self.links.sort(key=lambda one: one.index)
        return link

    # When a worker ends

    def _on_end(self, link: WorkerLink) -> None:
        self.totals.fold(link.table.read())
        link.table.close()
        if all(one.index != link.index for one in self if one is not link):
            self.board.clear_worker(link.index)
        if link in self.links and not link.is_leaving:
            self._lost_at = asyncio.get_running_loop().time()
        self.registry.forget(link.process_id)
        self._show_sessions()
        self._starting.discard(link)
        if link in self.leaving:
            self.leaving.remove(link)
        if link not in self.links:
            return
        self.links.remove(link)
        if link.is_leaving or self._is_stopping:
            return
        self.restarts += 1
        self._vacant.add(link.index)
        logger.error("worker %d (pid %d) ended: %s", link.index, link.process_id, link.ended.result())
        spawn(self._replace(link.index), "replace a worker")

    async def _replace(self, index: int) -> None:
        """Start another worker in place of one that has ended, again and again, at longer and longer intervals."""
        is_stable = asyncio.get_running_loop().time() - self._started_at.get(index, 0.0) > _STABLE_S
        failures = 0 if is_stable else self._failures.get(index, 0)
        while not self._is_stopping and index in self._vacant:
            await asyncio.sleep(_BACK_OFF_S[min(failures, len(_BACK_OFF_S) - 1)])
            orders = self.orders
            failures = self._failures[index] = failures + 1
            try:
                link = await self._start_serving(index)
            except (ChannelError, OSError) as error:
                if orders is self.orders and not self._is_stopping:
                    logger.error("worker %d cannot start: %s", index, error)  # noqa: TRY400 -- the reason is all
                elif orders is not self.orders:
                    failures = 0
                continue
            if index in self._vacant:
                self._vacant.discard(index)
                logger.info("worker %d is back (pid %d)", index, link.process_id)
            else:  # there are to be fewer by now
                self.links.remove(link)
                self._give_up(link)

    def knows_sessions(self, idle_s: float) -> bool:
        """Say whether all sessions are known: those of a worker that has died come back within their idle time."""
        return asyncio.get_running_loop().time() >= self._lost_at + max(idle_s, _RETURN_S)

    # Reloads

    async def reload(self, orders: Orders, added: Sequence[Address]) -> None:
        """Let all workers work by other orders; `added` are the addresses whose sockets they do not have yet.

        Raises UsageError where one cannot; then all go on as before.
        """
        before, self.orders = self.orders, orders
        descriptors = [orders.bound[address].fileno() for address in added]
        links = [link for link in self.links if link.is_ready]
        answers = await asyncio.gather(
            *(link.channel.request("reload", orders.write(added), descriptors) for link in links),
            return_exceptions=True,
        )
        wrong = next((str(one) for link, one in zip(links, answers, strict=True) if _is_refusal(link, one)), None)
        if wrong is not None:
            self.orders = before
            closed = [address for address in before.bound if address not in orders.bound]
            descriptors = [before.bound[address].fileno() for address in closed]
            await asyncio.gather(
                *(link.channel.request("reload", before.write(closed), descriptors) for link in links),
                return_exceptions=True,
            )
            raise UsageError(f"a worker cannot work by it: {wrong}")

    # What all are told

    def publish(self, snapshots: Iterable[Snapshot], endpoints: Mapping[str, Endpoint]) -> None:
        """Send a routing state, the snapshots of all clusters, to all workers, very soon."""
        self._state = None
        self._pending = (tuple(snapshots), dict(endpoints))
        if self._publishing is None:
            self._publishing = asyncio.get_running_loop().call_later(_PUBLISH_S, self._publish_now)

    def _publish_pending(self) -> None:
        """Send what is to be published now: a worker takes in what was sent before it does what it is asked next."""
        if self._publishing is not None:
            self._publishing.cancel()
            self._publish_now()

    def _publish_now(self) -> None:
        self._publishing = None
        snapshots, endpoints = self._pending
        self._state = {"clusters": write_snapshots(snapshots, endpoints), "slots": self._assign_slots(snapshots)}
        for link in {*self, *self.successors, *self._starting}:
            if link.is_ready:
                link.channel.send("publish", self._state)

    def _assign_slots(self, snapshots: Sequence[Snapshot]) -> dict[str, int]:
        """Return the slot of each upstream on the board, by digest; those of upstreams that are gone become free."""
        self._keep_counters(snapshots)
        present = {one.digest.hex() for snapshot in snapshots for one in snapshot.upstreams}
        for digest in self._slots.keys() - present:
            self.board.clear_slot(self._slots.pop(digest))
        free = iter(sorted(set(range(MAX_SLOTS)) - set(self._slots.values())))
        for digest in sorted(present - self._slots.keys()):
            slot = self._slots[digest] = next(free)
            self.board.clear_slot(slot)  # what a former image of this process had there
        self._show_sessions()
        return self._slots

    def _keep_counters(self, snapshots: Sequence[Snapshot]) -> None:
        """Remember what was counted for the upstreams that there are, and for those that were removed lately."""
        before = self._present
        self._present = {one.id: snapshot.cluster for snapshot in snapshots for one in snapshot.upstreams}
        now = asyncio.get_running_loop().time()
        self.removed.note(before, self._present, now)
        kept = {upstream_digest(one) for one in (*self._present, *self.removed.clusters(now))}
        self.totals.keep(kept | {nowhere_digest(snapshot.cluster) for snapshot in snapshots})

    def _show_sessions(self) -> None:
        for digest, slot in self._slots.items():
            self.board.write_sessions(slot, self.registry.counts.get(digest, 0))

    async def published(self) -> None:
        """Wait until each worker works by the latest routing state, for 5 seconds at most."""
        self._publish_pending()
        await self.ask_all("ping", timeout_s=_ACKNOWLEDGED_S)

    async def ask_all(
        self, kind: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 30.0
    ) -> list[Message | Exception]:
        """Ask each serving worker for something; return the answers, or why there is none."""
        return [answer for _, answer in await self._ask_each(kind, body, timeout_s=timeout_s)]

    async def _ask_each(
        self, kind: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 30.0
    ) -> list[tuple[WorkerLink, Message | Exception]]:
        links = [link for link in self.links if link.is_ready]
        answers = await asyncio.gather(
            *(link.channel.request(kind, dict(body or {}), timeout_s=timeout_s) for link in links),
            return_exceptions=True,
        )
        return list(zip(links, answers, strict=True))  # type: ignore[arg-type]  # gather swallows no other exceptions

    async def shut_upstreams(self, digests: Collection[bytes], per_s: float, reason: str) -> int:
        """Begin to close the tunnels of some upstreams with 1012, of `per_s` clients a second in all workers together.

        Each has a part of the pace that is like its part of the tunnels, so that all take the same time. Returns how
        many tunnels they are; those of a worker that does not answer are not among them. Called again, it goes on at
        the new pace.
        """
        self._publish_pending()  # who comes back is not to meet an older state
        links = [link for link in self if link.is_ready and not link.ended.done()]
        readings = [link.table.read() for link in links]
        shares = [1 + sum(one.upstream(digest).tunnels_open for digest in digests) for one in readings]
        body = {"upstreams": [digest.hex() for digest in digests], "reason": reason}
        answers = await asyncio.gather(
            *(
                link.channel.request("shut", {**body, "per_s": per_s * share / sum(shares)}, timeout_s=_ACKNOWLEDGED_S)
                for link, share in zip(links, shares, strict=True)
            ),
            return_exceptions=True,
        )
        for link, answer in zip(links, answers, strict=True):
            if isinstance(answer, BaseException):
                logger.warning("worker %d (pid %d) does not close tunnels: %s", link.index, link.process_id, answer)
        return sum(int(one.body["count"]) for one in answers if not isinstance(one, BaseException))

    # The end

    async def drain(self, grace_s: float) -> None:
        """Let all workers finish what they have, for `grace_s` seconds at most."""
        self._is_stopping = True
        async with self.moving:
            await asyncio.gather(
                *(link.channel.request("drain", {"grace_s": grace_s}, timeout_s=grace_s + _END_S) for link in self),
                return_exceptions=True,
            )

    async def close(self) -> None:
        """End all workers now; those that do not, are killed."""
        self._is_stopping = True
        if self._publishing is not None:
            self._publishing.cancel()
        links = {*self, *self.successors, *self._starting}
        for link in links:
            link.is_leaving = True
            link.channel.send("stop")
        waiting = [link.ended for link in links if not link.reap()]
        if waiting:
            await asyncio.wait(waiting, timeout=_END_S)
        for link in links:
            if not link.reap():
                logger.error("worker %d (pid %d) does not end: killed", link.index, link.process_id)
                link.kill()
                await asyncio.wait([link.ended], timeout=_END_S)

    def count_open(self) -> tuple[int, int]:
        """Return how many connections and tunnels are open, as of the last tick of each worker."""
        readings = [link.table.read() for link in self]
        tunnels = sum(one.tunnels_open for reading in readings for one in reading.upstreams.values())
        return sum(reading.plane.downstreams for reading in readings), tunnels

    @override
    def __repr__(self) -> str:
        return f"<Fleet of {len(self.links)} workers, {len(self.leaving)} leaving>"


def _living(states: Sequence[tuple[WorkerLink, WorkerState]]) -> tuple[WorkerState, ...]:
    """Return the states of the workers that have not ended meanwhile."""
    return tuple(state for link, state in states if not link.reap())


def _is_refusal(link: WorkerLink, answer: Message | BaseException) -> bool:
    """Say whether a worker that lives has not done what it was asked; one that has died is made by the new orders."""
    return isinstance(answer, BaseException) and not link.channel.is_closed
