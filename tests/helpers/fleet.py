"""A fleet of workers in the test's own event loop, without a supervisor, and apps behind it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from stickyproxy.config import Address, Loaded
from stickyproxy.control.fleet import Fleet, Orders
from stickyproxy.control.routing import Routing
from stickyproxy.control.worker_link import WorkerLink
from stickyproxy.proxy.listener import bind
from tests.helpers.plain_client import ask
from tests.helpers.supervised import SECRET, App, is_running, load, until

LISTEN = Address("127.0.0.1", 0)
Apps = tuple[App, App]


@asynccontextmanager
async def two_apps() -> AsyncIterator[Apps]:
    """Run two apps, `a` and `b`, until the end of the block."""
    both = await App("a").start(), await App("b").start()
    yield both
    for app in both:
        app.stop()


def sections(apps: Apps, **more: Any) -> dict[str, Any]:
    return {
        "upstreams": [app.upstream for app in apps],
        "affinity": {"secrets": [SECRET], "policy": "round_robin"},
    } | more


class Running:
    """A fleet with one listener, and the routing state that is published to it."""

    def __init__(self, loaded: Loaded, workers: int) -> None:
        self.link = bind(LISTEN)
        self.link.setblocking(False)
        self.link.listen()
        self.port = int(self.link.getsockname()[1])
        self.reported: list[tuple[str, str]] = []
        self.orders = Orders(loaded, (SECRET.encode(),), {LISTEN: self.link}, workers)
        self.fleet = Fleet(self.orders, lambda *facts: self.reported.append(facts))
        self.routing = Routing(loaded.config, self.fleet.publish)

    async def ask(self, count: int = 1) -> set[str]:
        """Let new clients ask, each over a connection of its own; return the names of the apps that answered."""
        answers = [await ask(self.port, "/") for _ in range(count)]
        assert {answer.status for answer in answers} == {200}
        return {answer.body.decode() for answer in answers}

    def link_of(self, index: int) -> WorkerLink:
        return next(link for link in self.fleet.links if link.index == index)

    async def replaced(self, gone: WorkerLink) -> WorkerLink:
        """Wait until another worker has taken the place of one."""
        await until(
            lambda: any(link.index == gone.index and link is not gone for link in self.fleet.links),
            f"worker {gone.index} is replaced",
        )
        return self.link_of(gone.index)


@asynccontextmanager
async def started(apps: Apps, workers: int = 2) -> AsyncIterator[Running]:
    made = Running(load(**sections(apps)), workers)
    try:
        await made.fleet.start()
        await made.fleet.accept()
        await made.fleet.published()
        yield made
    finally:
        links = list(made.fleet)
        await made.fleet.close()
        made.fleet.board.close()
        made.link.close()
    assert [link for link in links if is_running(link.process_id)] == []
