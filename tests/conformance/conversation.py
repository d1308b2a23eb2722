"""Both ends of a conversation through a real data plane: a client that sends exact bytes, a recording upstream."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from stickyproxy.proxy.settings import Settings, Timeouts
from tests.conformance.strict import Message, StrictError, read_request, read_responses
from tests.helpers.plane import start_plane
from tests.helpers.raw import RawUpstream

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable, Sequence

    from tests.conformance.corpus import Answer, Step
    from tests.helpers.plane import PlaneUnderTest
    from tests.helpers.raw import RawLink

DEADLINE_S: Final = 30.0
_LOOK_S: Final = 0.001
_SMALL: Final = 400  # up to so many bytes are sent one by one
_CANARY: Final = "/canary/"


async def until(is_so: Callable[[], object], what: Callable[[], str] = str) -> None:
    """Wait until a condition holds; fail with `what` after the deadline."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DEADLINE_S
    while not is_so():
        assert loop.time() < end, f"never came: {what()}"
        await asyncio.sleep(_LOOK_S)


def cut(data: bytes, rng: random.Random | None) -> list[bytes]:
    """Cut what is sent: not at all without `rng`; else byte by byte, or where it is long at random places.

    The first and the last bytes are always sent one by one: a head begins and ends there.
    """
    if rng is None:
        return [data]
    if len(data) <= _SMALL:
        return [data[at : at + 1] for at in range(len(data))]
    places = set(range(1, 40)) | set(range(len(data) - 80, len(data)))
    places |= {rng.randrange(1, len(data)) for _ in range(100)}
    bounds = [0, *sorted(places), len(data)]
    return [data[start:stop] for start, stop in pairwise(bounds)]


async def send_cut(link: RawLink, data: bytes, rng: random.Random | None) -> None:
    """Send data in pieces, each of which the other end reads by itself: it has a turn of the loop to do so."""
    for piece in cut(data, rng):
        if link.is_lost:
            return
        link.send(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await until(lambda: link.is_lost or not link.transport.get_write_buffer_size(), lambda: f"{link} sends all")


@dataclass
class _Conversation:
    """What has come on one connection of the upstream: where the next request begins, and whether it is a tunnel."""

    at: int = 0
    is_answered: bool = False  # the request at `at` has had its answer already
    is_tunnel: bool = False


@dataclass
class Recorded:
    """One request as it came; `is_whole` turns true with its last byte."""

    link: RawLink
    message: Message
    is_whole: bool = False


@dataclass
class Recorder:
    """An upstream that reads strictly, keeps what it read, and answers each request with what it was.

    `answer` stands in for the usual one, but never for a canary's; the first `silent` requests get none at all from
    here. `faults` is what could not be read.
    """

    upstream: RawUpstream
    answer: Answer | None = None
    silent: int = 0
    requests: list[Recorded] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _state: dict[RawLink, _Conversation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.upstream.on_accept = self._on_accept

    def _on_accept(self, link: RawLink) -> None:
        self._state[link] = _Conversation()
        link.on_data = self._on_data

    def _on_data(self, link: RawLink) -> None:
        state = self._state[link]
        try:
            while not state.is_tunnel and len(link.all_received) > state.at:
                if not self._read_one(link, state):
                    break
        except StrictError as error:
            self.faults.append(str(error))
            link.transport.abort()
            return
        if state.is_tunnel and (data := bytes(link.all_received[state.at :])):
            state.at += len(data)
            link.send(data)

    def _read_one(self, link: RawLink, state: _Conversation) -> bool:
        """Read the request that is next on a connection; say whether it has come whole."""
        read = read_request(bytes(link.all_received[state.at :]))
        if read is None:
            return False
        message, is_whole = read
        is_new = not self.requests or self.requests[-1].link is not link or self.requests[-1].is_whole
        if is_new:
            self.requests.append(Recorded(link, message))
            if self.silent and not is_canary(message):
                self.silent -= 1
                state.is_answered = True
            self._on_head(link, state, message, is_whole=is_whole)
        recorded = self.requests[-1]
        recorded.message, recorded.is_whole = message, is_whole
        if not is_whole:
            return False
        state.at += len(message.raw)
        if not state.is_answered:
            self._send_answer(link, state, message)
        state.is_answered = False
        return True

    def _on_head(self, link: RawLink, state: _Conversation, message: Message, *, is_whole: bool) -> None:
        answer = None if is_canary(message) else self.answer
        if answer is not None and answer.at == "head":
            state.is_answered = True
            link.send(answer.bytes)
        elif (
            not state.is_answered
            and [one.lower() for one in message.all("expect")] == ["100-continue"]
            and not is_whole
        ):
            link.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send_answer(self, link: RawLink, state: _Conversation, message: Message) -> None:
        if self.answer is not None and not is_canary(message):
            link.send(self.answer.bytes)
            state.is_tunnel = self.answer.bytes.startswith(b"HTTP/1.1 101")
            return
        body = answer_to(message)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        link.send(head if message.method == "HEAD" else head + body)

    @property
    def of_case(self) -> list[Recorded]:
        """Return the requests that were not sent by the test beside its case."""
        return [one for one in self.requests if not is_canary(one.message)]

    def has_received(self, data: bytes) -> bool:
        """Say whether any connection has received this."""
        return any(data in link.all_received for link in self.upstream.links)


def is_canary(message: Message) -> bool:
    """Say whether a request is one that the test sends to see whether the connection still makes sense."""
    return message.target.startswith(_CANARY)


def answer_to(message: Message) -> bytes:
    """Return the body that answers this request and no other."""
    return f"{message.start} {hashlib.sha256(message.body).hexdigest()[:8]}".encode("latin-1")


def canary(name: str) -> bytes:
    """Return a request that asks for its own name."""
    return f"GET {_CANARY}{name} HTTP/1.1\r\nHost: canary.example\r\n\r\n".encode()


def check_canary(response: Message, name: str) -> None:
    """Check that a response is the canary's own."""
    assert response.status == 200, response
    assert response.body == answer_to(Message(f"GET {_CANARY}{name} HTTP/1.1", []))


@dataclass
class Client:
    """A client's connection and what it has read: interim responses, final ones, and what is no whole one."""

    link: RawLink
    to_head: tuple[int, ...] = ()
    interim: list[Message] = field(default_factory=list)
    final: list[Message] = field(default_factory=list)
    rest: bytes = b""
    _seen: tuple[int, bool] = (-1, False)

    def read(self) -> Client:
        """Read all that has come, from the beginning."""
        now = len(self.link.all_received), self.link.is_over
        if now != self._seen:
            self._seen = now
            data = bytes(self.link.all_received)
            self.interim, self.final, self.rest = read_responses(
                data, is_over=self.link.ending == "eof", to_head=self.to_head
            )
        return self

    async def finals(self, count: int) -> None:
        """Wait for so many final responses."""
        await until(lambda: len(self.read().final) >= count or self.link.is_over, lambda: f"answers {count}: {self}")
        assert len(self.read().final) >= count, f"{len(self.final)} of {count} answers, then {self.link}"

    async def ends(self) -> None:
        """Wait for the end of the connection."""
        await until(lambda: self.link.is_over, lambda: f"the end of {self}")
        self.read()

    async def talk(self, steps: Sequence[Step], rng: random.Random | None, recorder: Recorder) -> None:
        """Go through the steps of a case."""
        for step in steps:
            if step.kind == "send":
                await send_cut(self.link, step.data, rng)
            elif step.kind == "end":
                self.link.half_close()
            elif step.kind == "await":
                await until(lambda: step.data in self.link.all_received, lambda: f"{step} at {self}")  # noqa: B023
            else:
                await until(lambda: recorder.has_received(step.data), lambda: f"{step} at the upstream")  # noqa: B023


@asynccontextmanager
async def start_conversation(
    *, is_trusted: bool = False, timeouts: dict[str, float] | None = None
) -> AsyncIterator[tuple[PlaneUnderTest, RawUpstream]]:
    """Run a data plane with one upstream; in the end it is checked for what was left behind."""
    upstream = await RawUpstream("app-1").start()
    trusted = (ip_network("127.0.0.0/8"),) if is_trusted else ()
    # Idle connections are kept for long: one that ends must have been closed for what happened on it.
    lengths = {"upstream_keep_alive_s": 2 * DEADLINE_S} | (timeouts or {})
    settings = Settings(trusted=trusted, timeouts=Timeouts(**lengths))
    async with asyncio.timeout(DEADLINE_S), start_plane([upstream], settings=settings) as proxy:
        yield proxy, upstream


async def check_fresh_canary(proxy: PlaneUnderTest, name: str) -> str:
    """Check that a new client gets its own answer; return the affinity cookie that it gets, as `name=value`."""
    client = Client(await proxy.client())
    client.link.send(canary(name))
    await client.finals(1)
    check_canary(client.final[0], name)
    (cookie,) = client.final[0].all("set-cookie")
    return cookie.partition(";")[0]
