"""The workers together: how they start, what all of them know, and what becomes of one that dies."""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stickyproxy.affinity.snapshot import AdminState, upstream_digest
from stickyproxy.config import Address, Upstream
from stickyproxy.control import fleet as fleet_module
from stickyproxy.control.channel import Channel, Message
from stickyproxy.control.fleet import Fleet, Orders
from stickyproxy.control.inheritance import Inheritance
from stickyproxy.control.worker_link import Program, WorkerLink, start_process
from stickyproxy.errors import UsageError
from stickyproxy.observe import removed as removed_module
from stickyproxy.observe.table import make_memory, sum_readings
from stickyproxy.proxy.key_table import KeyTable
from tests.helpers.fleet import Apps, Running, sections, started, two_apps
from tests.helpers.plain_client import AbortedError, PlainClient, ask
from tests.helpers.supervised import (
    DEADLINE_S,
    SECRET,
    App,
    Tunnel,
    is_running,
    kill,
    load,
    open_tunnel,
    pids,
    port_of,
    read_admin,
    read_metric,
    running,
    until,
)


@pytest.fixture
async def apps() -> AsyncIterator[Apps]:
    async with two_apps() as apps:
        yield apps


# Starting


async def test_each_worker_serves_and_knows_all_upstreams(apps: Apps) -> None:
    async with started(apps, workers=3) as running_:
        assert [link.index for link in running_.fleet] == [0, 1, 2]
        assert repr(running_.fleet) == "<Fleet of 3 workers, 0 leaving>"
        assert await running_.ask(30) == {"a", "b"}
        for link in running_.fleet.links[1:]:
            kill(link.process_id)  # only the first is left to answer, until they are replaced
        assert await running_.ask(10) == {"a", "b"}


async def test_one_that_cannot_start_leaves_none(apps: Apps, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Running(load(**sections(apps)), 3)
    launched: list[WorkerLink] = []
    launch = Fleet._launch

    def fail_the_last(fleet: Fleet, index: int, _: Program | None = None) -> WorkerLink:
        broken = Program(("/bin/false",), {}) if index == 2 else None
        launched.append(launch(fleet, index, broken))
        return launched[-1]

    monkeypatch.setattr(Fleet, "_launch", fail_the_last)
    with pytest.raises(UsageError, match="a worker cannot start"):
        await made.fleet.start()
    await until(lambda: all(link.ended.done() for link in launched), "all have ended")
    assert [is_running(link.process_id) for link in launched] == [False] * 3
    assert list(made.fleet) == []
    made.fleet.board.close()
    made.link.close()


def hold_back(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold each worker back that has been prepared: the first event says that one is, the second lets them go on."""
    is_prepared, may_go_on = asyncio.Event(), asyncio.Event()
    prepare = Fleet._prepare

    async def prepare_and_wait(fleet: Fleet, link: WorkerLink, *given: Any) -> None:
        await prepare(fleet, link, *given)
        is_prepared.set()
        await may_go_on.wait()

    monkeypatch.setattr(Fleet, "_prepare", prepare_and_wait)
    return is_prepared, may_go_on


async def test_what_is_published_while_they_start_reaches_those_that_were_first(
    apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may be ready long before another: names are resolved meanwhile, and probes end."""
    is_prepared, may_go_on = hold_back(monkeypatch)
    made = Running(load(**sections(apps)), 2)
    starting = asyncio.get_running_loop().create_task(made.fleet.start())
    await is_prepared.wait()
    await asyncio.sleep(0.1)  # the first state has been published
    made.routing.set_admin_state("a", AdminState.MAINT)
    await asyncio.sleep(0.1)  # and the second
    may_go_on.set()
    try:
        await starting
        await made.fleet.accept()
        await made.fleet.published()
        assert await made.ask(20) == {"b"}
    finally:
        await made.fleet.close()
        made.fleet.board.close()
        made.link.close()


async def test_who_waits_at_the_listener_meets_what_was_published_last(
    apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the timer that publishes may fire long after the workers accept."""
    monkeypatch.setattr(fleet_module, "_PUBLISH_S", 1000.0)
    made = Running(load(**sections(apps)), 2)
    try:
        made.fleet._publish_pending()
        await made.fleet.start()
        for name in ("a", "b"):
            made.routing.set_admin_state(name, AdminState.MAINT)
        made.fleet._publish_pending()
        made.routing.set_admin_state("b", AdminState.READY)
        waiting = [await PlainClient.connect(made.port) for _ in range(12)]
        await made.fleet.accept()
        for client in waiting:
            async with client:
                assert (await client.ask("/")).body == b"b"
        # A worker that comes later, of which the same holds.
        kill(made.fleet.links[0].process_id)
        await until(lambda: made.fleet.restarts == 1, "one has ended")
        made.routing.set_admin_state("a", AdminState.READY)
        made.routing.set_admin_state("b", AdminState.MAINT)
        await until(lambda: len(made.fleet.links) == 2, "another one has come")
        assert await made.ask(12) == {"a"}
    finally:
        await made.fleet.close()
        made.fleet.board.close()
        made.link.close()


# What they are told, and what they tell


async def test_after_published_all_work_by_the_latest_state(apps: Apps) -> None:
    async with started(apps, workers=2) as running_:
        for state, names in ((AdminState.MAINT, {"a"}), (AdminState.READY, {"a", "b"})) * 3:
            running_.routing.set_admin_state("b", state)
            await running_.fleet.published()
            assert await running_.ask(12) == names


async def test_what_a_worker_observes_is_reported(apps: Apps) -> None:
    async with started(apps) as running_:
        apps[0].stop()
        await running_.ask(12)
        assert ("a", "refused") in running_.reported


async def test_a_client_of_two_workers_is_one_session(apps: Apps) -> None:
    async with started(apps) as running_:
        cookie = str((await ask(running_.port, "/")).cookie)
        for _ in range(40):
            await ask(running_.port, "/", fields={"Cookie": cookie})
        held = running_.fleet.registry._held
        await until(lambda: len(held) == 2 and all(held.values()), "both workers have had requests of the client")
        assert len(running_.fleet.registry) == 1
        assert sum(running_.fleet.registry.counts.values()) == 1


async def test_ask_all_gives_what_each_has_answered(apps: Apps) -> None:
    async with started(apps) as running_:
        answers = await running_.fleet.ask_all("ping")
        assert [getattr(one, "kind", one) for one in answers] == ["answer"] * 2
        answers = await running_.fleet.ask_all("sing")
        assert [str(one) for one in answers] == ["this version knows no 'sing'"] * 2


async def test_what_was_counted_for_an_upstream_that_was_removed_stays_for_some_time(
    apps: Apps, process: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(apps) as running_:
        fleet, routing = running_.fleet, running_.routing
        digest = upstream_digest("g1-1")
        for name in ("a", "b"):
            routing.set_admin_state(name, AdminState.DRAIN)
        routing.add_process(Upstream.model_validate({"id": "g1-1", "url": process.url}))
        await fleet.published()
        assert await running_.ask(10) == {"process"}

        def count() -> int:
            return sum(sum_readings([link.table.read() for link in fleet], fleet.totals).upstream(digest).exchanges)

        await until(lambda: count() == 10, "the last is counted, too")
        for name in ("a", "b"):
            routing.set_admin_state(name, AdminState.READY)
        routing.remove_process("g1-1")
        await fleet.published()
        loop = asyncio.get_running_loop()
        assert list(fleet.removed.clusters(loop.time())) == ["g1-1"]
        for link in tuple(fleet.links):
            kill(link.process_id)
            await running_.replaced(link)
        routing.set_admin_state("a", AdminState.DRAIN)
        await fleet.published()
        assert count() == 10
        assert fleet._slots.keys() == {upstream_digest(name).hex() for name in ("a", "b")}
        monkeypatch.setattr(removed_module, "KEPT_S", 0.0)
        routing.set_admin_state("a", AdminState.READY)
        await fleet.published()
        assert (count(), list(fleet.removed.clusters(loop.time()))) == (0, [])


# App processes that are closed


@pytest.fixture
async def process() -> AsyncIterator[App]:
    app = await App("process").start()
    yield app
    app.stop()


@dataclass
class Client:
    cookie: str
    tunnel: Tunnel


async def come(port: int) -> Client:
    cookie = str((await ask(port, "/")).cookie)
    return Client(cookie, await open_tunnel(port, cookie))


@asynccontextmanager
async def with_process(apps: Apps, process: App) -> AsyncIterator[tuple[Running, list[Client]]]:
    """Run two workers, each of them with tunnels to an app process that drains."""
    async with started(apps) as running_:
        routing, clients = running_.routing, list[Client]()
        for name in ("a", "b"):
            routing.set_admin_state(name, AdminState.DRAIN)
        routing.add_process(Upstream.model_validate({"id": "g1-1", "url": process.url}))
        await running_.fleet.published()
        async with asyncio.timeout(DEADLINE_S):
            while not all(tunnels_of(link) for link in running_.fleet.links):  # who accepts is as it happens
                clients += await asyncio.gather(*(come(running_.port) for _ in range(8)))
                count = len(clients)
                await until(lambda count=count: running_.fleet.count_open()[1] == count, "all are counted")  # type: ignore[misc]
        for name in ("a", "b"):
            routing.set_admin_state(name, AdminState.READY)
        routing.set_admin_state("g1-1", AdminState.DRAIN)
        await running_.fleet.published()
        yield running_, clients
        for one in clients:
            async with one.tunnel.client:
                pass


def tunnels_of(link: WorkerLink) -> int:
    return link.table.read().upstream(upstream_digest("g1-1")).tunnels_open


def note_requests(monkeypatch: pytest.MonkeyPatch, *, fails: Channel | None = None) -> list[tuple[Channel, Any]]:
    """Note what workers are asked for; one of them does not know what is meant."""
    request, noted = Channel.request, list[tuple[Channel, Any]]()

    async def note(channel: Channel, kind: str, body: Any = None, *given: Any, **more: Any) -> Message:
        if kind == "shut":
            noted.append((channel, body))
        return await request(channel, "sing" if channel is fails else kind, body, *given, **more)

    monkeypatch.setattr(Channel, "request", note)
    return noted


async def test_all_workers_close_the_tunnels_of_an_app_process_and_its_clients_go_elsewhere(
    apps: Apps, process: App
) -> None:
    async with with_process(apps, process) as (running_, clients):
        fleet = running_.fleet
        fleet.leaving.append(fleet.links.pop())  # as one that finishes what could not move
        for one in clients:
            assert (await ask(running_.port, "/", fields={"Cookie": one.cookie})).body == b"process"
        running_.routing.set_closing(["g1-1"])
        assert await fleet.shut_upstreams([upstream_digest("g1-1")], 10_000.0, "another version") == len(clients)
        for one in clients:
            assert await one.tunnel.receive_close() == 1012
            again = await ask(running_.port, "/", fields={"Cookie": one.cookie})
            assert again.body in {b"a", b"b"}
            assert again.cookie is not None
        fleet.links.append(fleet.leaving.pop())


async def test_the_pace_is_that_of_all_workers_together(
    apps: Apps, process: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_process(apps, process) as (running_, clients):
        noted = note_requests(monkeypatch)
        counts = {link.channel: tunnels_of(link) for link in running_.fleet.links}
        assert await running_.fleet.shut_upstreams([upstream_digest("g1-1")], 1e-6, "slowly") == len(clients)
        assert sum(body["per_s"] for _, body in noted) == pytest.approx(1e-6)
        parts = {channel: body["per_s"] / (1 + counts[channel]) for channel, body in noted}
        assert list(parts) == [link.channel for link in running_.fleet.links]
        assert len({round(part * 1e12, 3) for part in parts.values()}) == 1, "all take the same time"
        assert await running_.fleet.shut_upstreams([upstream_digest("unknown")], 20.0, "nobody") == 0


async def test_a_worker_that_cannot_close_tunnels_does_not_keep_the_others(
    apps: Apps, process: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with with_process(apps, process) as (running_, _):
        first, second = running_.fleet.links
        note_requests(monkeypatch, fails=first.channel)
        theirs = tunnels_of(second)
        assert await running_.fleet.shut_upstreams([upstream_digest("g1-1")], 10_000.0, "over") == theirs
        assert f"worker 0 (pid {first.process_id}) does not close tunnels: this version knows no 'sing'" in caplog.text
        await until(lambda: not tunnels_of(second), "those of the other have ended")
        assert tunnels_of(first)


# When one dies


async def test_a_worker_that_dies_is_replaced_and_the_others_notice_nothing(
    apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(apps) as running_:
        fleet, clients = running_.fleet, list[PlainClient]()
        first, second = fleet.links
        counts: dict[WorkerLink, int] = {}
        async with asyncio.timeout(DEADLINE_S):
            while not counts or not all(counts.values()):  # who accepts is as it happens: until both have some
                more = await asyncio.gather(*(PlainClient.connect(running_.port) for _ in range(24)))
                await asyncio.gather(*(client.ask("/") for client in more))
                clients += more
                counts = {link: link.table.read().plane.connections for link in fleet.links}
        kill(first.process_id)
        new = await running_.replaced(first)
        assert (new.index, fleet.links) == (0, [new, second])
        assert first.process_id != new.process_id
        assert fleet.restarts == 1
        assert f"worker 0 (pid {first.process_id}) ended: killed by SIGKILL" in caplog.messages
        lost = 0
        for client in clients:
            try:
                await client.ask("/")
            except (AbortedError, ConnectionError):
                lost += 1
        assert lost == counts[first]
        kill(second.process_id)  # the new one answers, by the same state and secrets
        assert await running_.ask(12) == {"a", "b"}
        await running_.replaced(second)
        for client in clients:
            async with client:
                pass


async def test_when_a_worker_has_died_its_sessions_are_not_known_for_a_while(apps: Apps) -> None:
    async with started(apps) as running_:
        assert running_.fleet.knows_sessions(3600.0)
        gone = running_.fleet.links[0]
        kill(gone.process_id)
        await running_.replaced(gone)
        assert not running_.fleet.knows_sessions(3600.0)
        assert not running_.fleet.knows_sessions(0.0), "clients need some seconds to come back"


async def test_what_a_dead_worker_counted_is_kept_and_what_it_had_open_is_not(apps: Apps) -> None:
    async with started(apps, workers=1) as running_:
        fleet = running_.fleet
        await running_.ask(10)
        tunnel = await open_tunnel(running_.port)
        await until(lambda: fleet.count_open()[1] == 1, "the tunnel is counted")
        await until(lambda: fleet.registry.counts, "its session is reported")
        [gone] = fleet.links
        kill(gone.process_id)
        new = await running_.replaced(gone)
        await running_.ask(5)
        await until(lambda: new.table.read().plane.connections == 5, "the new one has counted")
        assert fleet.totals.read().plane.connections == 11
        assert fleet.count_open()[1] == 0
        assert fleet.registry.counts == {}
        async with tunnel.client:
            assert await tunnel.client.receive_end() == b""


async def test_the_session_of_a_client_of_two_workers_outlives_one(apps: Apps) -> None:
    async with started(apps) as running_:
        cookie = str((await ask(running_.port, "/")).cookie)
        held = running_.fleet.registry._held

        async def ask_until_both() -> None:
            while len([one for one in held.values() if one]) < 2:
                await ask(running_.port, "/", fields={"Cookie": cookie})

        await asyncio.wait_for(ask_until_both(), DEADLINE_S)
        gone = running_.fleet.links[0]
        kill(gone.process_id)
        await until(gone.ended.done, "it has ended")
        assert len(running_.fleet.registry) == 1
        await running_.replaced(gone)


async def test_one_that_stops_working_is_replaced_when_its_channel_is_lost(apps: Apps) -> None:
    async with started(apps, workers=1) as running_:
        [gone] = running_.fleet.links
        gone.channel._lose("what came is no message")  # it ends by itself: the supervisor is gone for it
        new = await running_.replaced(gone)
        assert not is_running(gone.process_id)
        assert is_running(new.process_id)
        assert await running_.ask(4) == {"a", "b"}


async def test_one_that_cannot_start_again_is_tried_at_longer_and_longer_intervals(
    apps: Apps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fleet_module, "_BACK_OFF_S", (0.0, 0.05, 0.2))
    async with started(apps) as running_:
        fleet, loop, launched_at = running_.fleet, asyncio.get_running_loop(), list[float]()

        def fail(_: object = None) -> Any:
            launched_at.append(loop.time())
            return start_process(Program(("/bin/false",), {}))

        with monkeypatch.context() as patched:
            patched.setattr(fleet_module, "start_process", fail)
            gone = fleet.links[0]
            kill(gone.process_id)
            await until(lambda: len(launched_at) >= 5, "it was tried five times")
            assert await running_.ask(4) == {"a", "b"}  # the other goes on
        pauses = [after - before for before, after in itertools.pairwise(launched_at)]
        assert pauses[0] >= 0.05
        assert min(pauses[1:]) >= 0.2
        await running_.replaced(gone)
        assert fleet.restarts == 1
        assert any(message.startswith("worker 0 cannot start: ") for message in caplog.messages)
        assert any(message.startswith("worker 0 is back ") for message in caplog.messages)


async def test_one_that_ends_again_and_again_is_replaced_less_and_less_often(
    apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_BACK_OFF_S", (0.0, 0.3))
    async with started(apps, workers=1) as running_:
        loop = asyncio.get_running_loop()
        for number in range(3):
            [gone] = running_.fleet.links
            kill(gone.process_id)
            await until(lambda link=gone: link.ended.done(), "it has ended")  # type: ignore[misc]
            ended_at = loop.time()
            await running_.replaced(gone)
            assert number == 0 or loop.time() - ended_at >= 0.3
        assert running_.fleet.restarts == 3


async def test_a_system_that_cannot_start_processes_for_a_while_is_outlived(
    apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_BACK_OFF_S", (0.0, 0.01))
    async with started(apps) as running_:
        failures = 0

        def fail(_: object = None) -> Any:
            nonlocal failures
            failures += 1
            raise BlockingIOError(11, "Resource temporarily unavailable")

        gone = running_.fleet.links[0]
        with monkeypatch.context() as patched:
            patched.setattr(fleet_module, "start_process", fail)
            kill(gone.process_id)
            await until(lambda: failures, "it was tried")
        await running_.replaced(gone)


async def test_what_is_published_meanwhile_is_known_to_the_one_that_replaces(
    apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(apps, workers=1) as running_:
        is_prepared, may_go_on = hold_back(monkeypatch)
        [gone] = running_.fleet.links
        kill(gone.process_id)
        await is_prepared.wait()
        running_.routing.set_admin_state("a", AdminState.MAINT)
        await asyncio.sleep(0.1)  # it has been published, to nobody
        may_go_on.set()
        await running_.replaced(gone)
        await running_.fleet.published()
        assert await running_.ask(10) == {"b"}


async def test_a_state_that_is_about_to_be_published_reaches_the_one_that_replaces(
    apps: Apps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes are gathered for a moment; a worker that is prepared in that moment must not be left without a state."""
    monkeypatch.setattr(fleet_module, "_PUBLISH_S", 3600.0)
    async with started(apps, workers=1) as running_:
        is_prepared, may_go_on = hold_back(monkeypatch)
        running_.routing.set_admin_state("a", AdminState.MAINT)
        [gone] = running_.fleet.links
        kill(gone.process_id)
        await is_prepared.wait()
        running_.fleet._publish_now()  # the moment is over
        may_go_on.set()
        await running_.replaced(gone)
        assert await running_.ask(10) == {"b"}


async def test_a_reload_meanwhile_counts_for_the_one_that_replaces(apps: Apps, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(apps, workers=1) as running_:
        is_prepared, may_go_on = hold_back(monkeypatch)
        [gone] = running_.fleet.links
        kill(gone.process_id)
        await is_prepared.wait()
        loaded = load(**sections(apps, limits={"line": "1KiB", "head": "4KiB"}))
        await running_.fleet.reload(Orders(loaded, (SECRET.encode(),), running_.orders.bound, 1), [])
        may_go_on.set()
        await running_.replaced(gone)
        assert (await ask(running_.port, "/", fields={"X-Long": "x" * 2000})).status == 431


async def test_nobody_is_replaced_while_it_stops(apps: Apps) -> None:
    async with started(apps) as running_:
        async with await PlainClient.connect(running_.port) as client:
            client.send("/hold")
            await until(lambda: any(app.has_request.is_set() for app in apps), "the request has arrived")
            draining = asyncio.get_running_loop().create_task(running_.fleet.drain(3600))
            [busy] = [link for link in running_.fleet if link.table.read().plane.connections]
            [other] = [link for link in running_.fleet if link is not busy]
            kill(other.process_id)
            await until(other.ended.done, "it has ended")
            assert running_.fleet.links == [busy]
            for app in apps:
                app.released.set()
            assert (await client.receive()).status == 200
            await asyncio.wait_for(draining, DEADLINE_S)
        assert running_.fleet.restarts == 0


async def test_one_that_does_not_end_is_killed(
    apps: Apps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet_module, "_END_S", 0.2)
    async with started(apps, workers=1) as running_:
        [link] = running_.fleet.links
        monkeypatch.setattr(link.channel, "send", lambda *_: None)  # it never hears that it should
        await running_.fleet.close()
        assert not is_running(link.process_id)
    assert f"worker 0 (pid {link.process_id}) does not end: killed" in caplog.messages


# Reloads, and more or fewer


async def test_all_or_none_work_by_other_orders(apps: Apps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second worker that refuses: the first goes back, with all its listeners."""
    async with started(apps) as running_:
        fleet, before = running_.fleet, running_.fleet.orders
        loaded = load(**sections(apps, listeners=["127.0.0.1:1"], limits={"line": "1KiB", "head": "4KiB"}))
        request = fleet.links[1].channel.request

        async def refuse(kind: str, *given: Any, **more: Any) -> Any:
            if kind == "reload":
                monkeypatch.undo()
                return await request("sing")
            return await request(kind, *given, **more)

        monkeypatch.setattr(fleet.links[1].channel, "request", refuse)
        with pytest.raises(UsageError, match="a worker cannot work by it: this version knows no 'sing'"):
            await fleet.reload(Orders(loaded, (SECRET.encode(),), {}, 2), [])
        assert fleet.orders is before
        monkeypatch.setattr(Fleet, "_replace", lambda *_: asyncio.sleep(0))
        kill(fleet.links[1].process_id)  # the first must answer alone
        await until(fleet.links[1].ended.done, "the second has ended")
        async with asyncio.timeout(DEADLINE_S):
            assert (await ask(running_.port, "/", fields={"X-Long": "x" * 2000})).status == 200


async def test_one_that_dies_meanwhile_does_not_fail_a_reload(apps: Apps) -> None:
    async with started(apps) as running_:
        gone = running_.fleet.links[1]
        kill(gone.process_id)
        loaded = load(**sections(apps, limits={"line": "1KiB", "head": "4KiB"}))
        await running_.fleet.reload(Orders(loaded, (SECRET.encode(),), running_.orders.bound, 2), [])
        await running_.replaced(gone)
        for _ in range(12):
            assert (await ask(running_.port, "/", fields={"X-Long": "x" * 2000})).status == 431


async def test_fewer_workers_hand_over_what_they_have(apps: Apps) -> None:
    async with started(apps, workers=3) as running_:
        fleet, tunnels = running_.fleet, [await open_tunnel(running_.port) for _ in range(24)]
        for tunnel in tunnels:
            await tunnel.echo()
        gone = fleet.links[1:]
        fleet.orders = Orders(running_.orders.loaded, running_.orders.secrets, running_.orders.bound, 1)
        await fleet.resize(3600)
        assert [link.index for link in fleet.links] == [0]
        await asyncio.wait_for(fleet.gone(), DEADLINE_S)
        assert [is_running(link.process_id) for link in gone] == [False, False]
        for tunnel in tunnels:
            await tunnel.echo()
        assert fleet.restarts == 0
        assert await running_.ask(6) == {"a", "b"}
        fleet.orders = running_.orders
        await fleet.resize(3600)
        assert [link.index for link in fleet.links] == [0, 1, 2]
        for tunnel in tunnels:
            async with tunnel.client:
                await tunnel.echo()


# All of it, as operators see it


async def test_metrics_show_what_became_of_workers(
    apps: Apps, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    admin = Address(path=str(tmp_path / "admin.sock"))
    loaded = load(**sections(apps, workers=2, admin={"address": str(admin)}))
    async with running(loaded) as supervisor:
        for _ in range(10):
            await ask(port_of(supervisor), "/")
        assert await wait_for_metric(admin, "exchanges_total", lambda value: value == 10)
        assert await read_metric(admin, "workers") == 2
        before = pids(supervisor)
        for process_id in before:
            kill(process_id)
        # Also while there is none: a scrape never fails.
        assert await wait_for_metric(admin, "worker_restarts_total", lambda value: value == 2)
        await until(lambda: not set(before) & set(pids(supervisor)), "both are replaced")
        assert await read_metric(admin, "exchanges_total") == 10
        for _ in range(10):
            assert (await ask(port_of(supervisor), "/")).status == 200
        assert await wait_for_metric(admin, "exchanges_total", lambda value: value == 20)
        assert (await read_admin(admin, "/readyz"))[0] == 200


async def wait_for_metric(admin: Address, name: str, is_right: Callable[[float], bool]) -> float:
    async with asyncio.timeout(DEADLINE_S):
        while not is_right(value := await read_metric(admin, name)):  # noqa: ASYNC110 -- it is looked at from outside
            await asyncio.sleep(0.01)
    return value


# Keys


async def test_what_one_worker_has_learned_all_find_and_those_that_come_later(apps: Apps) -> None:
    digest = upstream_digest("a")
    keys = [{"name": "id", "mode": "learn", "query": "id", "learn": [{"header": "X-Never"}]}]
    affinity = {"secrets": [SECRET], "policy": "round_robin", "cookie": False, "keys": keys}
    made = Running(load(**sections(apps, affinity=affinity)), 2)
    try:
        await made.fleet.start()
        await made.fleet.accept()
        await made.fleet.published()
        made.fleet.keys.learn(b"id\0one", digest, 1000.0, time.monotonic())

        async def ask_all() -> set[bytes]:
            return {(await ask(made.port, "/?id=one")).body for _ in range(20)}

        assert await ask_all() == {b"a"}
        assert {(await ask(made.port, "/?id=other")).body for _ in range(20)} == {b"a", b"b"}, "the control"
        for link in list(made.fleet.links):
            kill(link.process_id)
            await made.replaced(link)
        await made.fleet.published()
        assert await ask_all() == {b"a"}
    finally:
        await made.fleet.close()
        made.fleet.board.close()
        made.fleet.keys.close()
        made.link.close()


async def test_the_keys_of_a_former_image_are_gone_on_with(apps: Apps) -> None:
    made = Running(load(**sections(apps)), 1)
    former = KeyTable.create(77)
    former.learn(b"id\0one", upstream_digest("a"), 1000.0, time.monotonic())
    descriptor = os.dup(former.descriptor)
    os.set_inheritable(descriptor, True)
    made.fleet.adopt(Inheritance(load(), (), keys=descriptor))
    assert made.fleet.keys.find(b"id\0one", time.monotonic()) == upstream_digest("a")
    assert made.fleet.keys.max_keys == 77
    assert not os.get_inheritable(descriptor)
    former.close()
    made.fleet.keys.close()
    made.fleet.board.close()
    made.link.close()


async def test_memory_of_a_former_image_that_cannot_be_read_is_given_up_with_a_word(
    apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    made = Running(load(**sections(apps)), 1)
    own, descriptor = made.fleet.keys, make_memory("test")
    made.fleet.adopt(Inheritance(load(), (), keys=descriptor))
    assert made.fleet.keys is own
    assert "the keys that were learned are lost: the memory holds no table of keys" in caplog.text
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    made.fleet.keys.close()
    made.fleet.board.close()
    made.link.close()


async def test_a_worker_that_cannot_share_the_keys_keeps_its_own_and_serves(
    apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(apps, workers=1) as running_:
        other = make_memory("test")
        own = running_.fleet.keys
        running_.fleet.keys = cast("KeyTable", SimpleNamespace(descriptor=other))
        await running_.fleet._share_keys(running_.fleet.links[0])
        assert "keeps its keys to itself: the memory holds no table of keys" in caplog.text
        assert await running_.ask(4) == {"a", "b"}
        running_.fleet.keys = own
        os.close(other)
