"""Faults of upstreams: processes that are killed, stopped, blocked or restarted, and that break off their responses.

In each test the clients and the apps note the ids of the requests, and a ledger compares the two ends: each request got
a response or a visible error, none that must not be repeated arrived twice, and each answer went to who had asked.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fault_app import PART
from tests.helpers.faults import Crowd, FaultApps, Load, Visitor, state_of, wait_for_state
from tests.helpers.ledger import RECEIPT, Receipt, Verdict
from tests.helpers.plain_client import PlainClient
from tests.helpers.processes import Children, StickyProxy, wait_until
from tests.helpers.raw import Message, RawLink, eventually, request

pytestmark = pytest.mark.load

DEADLINE_S = 60.0
# Nothing but a refused connection takes an upstream out.
PATIENT = {"path": "/healthz", "interval": "1s", "timeout": "10s", "rise": 1, "fall": 10}
# One slow answer takes it out for new clients.
STRICT = {"path": "/healthz", "interval": "500ms", "timeout": "2s", "rise": 1, "fall": 1}
NO_AFFINITY = {"cookie": False, "policy": "round_robin"}
RESPONSE_S = 5.0
TUNNELS = 1000


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
def apps(children: Children) -> FaultApps:
    return FaultApps(children, "alpha", "beta", "gamma")


def names_of(visitors: list[Visitor]) -> set[str]:
    return {visitor.name for visitor in visitors}


def start_asking(visitors: list[Visitor], target: str, *methods: str) -> list[asyncio.Task[Verdict]]:
    """Let each visitor send a request, with one method after the other; without any, a GET and a POST in turn."""
    loop = asyncio.get_running_loop()
    turns = methods or ("GET", "POST")
    return [loop.create_task(visitor.ask(target, turns[at % len(turns)])) for at, visitor in enumerate(visitors)]


async def end_all(tasks: list[asyncio.Task[Verdict]]) -> list[Verdict]:
    """Return how the requests ended; raise TimeoutError if one does not end."""
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.gather(*tasks)


async def ask_all(visitors: list[Visitor], target: str = "/take") -> list[Verdict]:
    """Let each visitor send a request, all at once, and return how they ended."""
    return await end_all(start_asking(visitors, target))


# kill -9


async def test_a_kill_ends_only_what_was_under_way_at_the_killed_process(children: Children, apps: FaultApps) -> None:
    proxy = StickyProxy(children, apps.upstreams, probe=PATIENT)
    async with Crowd(proxy.port) as crowd:
        await crowd.arrive(60)
        victims, others = crowd.at("alpha"), crowd.at("beta") + crowd.at("gamma")
        assert len(victims) == 20
        asking, streaming, talking, quiet = victims[:8], victims[8:12], victims[12:16], victims[16:]
        waiting, listening, busy = others[:10], others[10:14], others[14:]
        for visitor in [*talking, *listening]:
            assert (await visitor.open_tunnel()).status == 101

        async with Load(busy, "/take?ms=2") as load:
            # So that each finds an idle connection, over which a GET may be sent that is repeated if it breaks.
            await ask_all(victims, "/take?ms=50")
            held = start_asking(asking, "/hold/kill?at=alpha")
            cut = start_asking(streaming, "/break/chunk/fin/kill", "GET")
            elsewhere = start_asking(waiting, "/hold/later")
            await asyncio.to_thread(apps.wait_until_held, "alpha", "kill", len(held + cut))
            await load.go_on(10)

            began = time.monotonic()
            await asyncio.to_thread(apps.kill, "alpha")
            ended, ended_cut = await end_all(held), await end_all(cut)
            codes = Counter([await visitor.wait_closed() for visitor in talking])
            took_s = time.monotonic() - began

            # Those who had nothing under way, and those who had, each with their next request.
            moved_on_101 = [await visitor.open_tunnel() for visitor in quiet]
            moved_on_200 = await ask_all([*asking, *streaming, *talking])
            await load.go_on(10)
            for name in ("beta", "gamma"):
                await asyncio.to_thread(apps.release, name, "later")
            assert {verdict.status for verdict in await end_all(elsewhere)} == {200}

        assert {await visitor.echo() for visitor in listening} == {(visitor.app, 1) for visitor in listening}
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}; under way at the killed process: "
              f"{[verdict.name for verdict in ended + ended_cut]}, over after {took_s:.3f} s; "
              f"its tunnels were closed with {dict(codes)}; "
              f"repeated: {len(crowd.ledger.repeated(apps.arrivals()))}")  # fmt: skip

        # A GET that was sent over an idle connection is repeated elsewhere, and its answer carries the new cookie.
        assert {verdict.status for verdict in ended[1::2]} == {502}
        assert all(verdict.status == 502 or verdict.cookie for verdict in ended[::2])
        # Where the repeated one met the process as it ended, it did not arrive.
        sent_again = proxy.metric("attempts_total", upstream="alpha", outcome="closed")
        assert len(crowd.ledger.repeated(apps.arrivals())) <= sent_again
        assert {verdict.name for verdict in ended_cut} == {"aborted"}
        assert codes.keys() <= {1012, 1014}
        assert [verdict.status for verdict in moved_on_101] == [101] * len(quiet)
        assert all(verdict.cookie for verdict in moved_on_101)
        assert {verdict.status for verdict in moved_on_200} == {200}
        for visitor in victims:
            first = next(one for one in visitor.verdicts if one.receipt is not None and one.receipt.app != "alpha")
            assert first.cookie
            assert len(visitor.processes) == 2
            assert visitor.processes[0] == ("alpha", 1)
        for visitor in quiet:  # the cookie of the 101 is the pin
            [verdict] = await ask_all([visitor])
            assert (verdict.status, verdict.cookie, len(visitor.processes)) == (200, None, 2)
        assert set(crowd.moved) == set(victims)
        assert not crowd.ledger.errors(names_of(others))
        assert crowd.ledger.errors(names_of(quiet + talking)) == {}
        assert crowd.ledger.findings(apps.arrivals()) == []


async def test_a_client_that_repeats_a_post_is_found(children: Children, apps: FaultApps) -> None:
    """The control: the ledger sees what a proxy would do that sends a failed POST again."""
    proxy = StickyProxy(children, apps.upstreams, probe=PATIENT)
    async with Crowd(proxy.port) as crowd:
        await crowd.arrive(3)
        [visitor] = crowd.at("alpha")
        request_id = crowd.ledger.begin("POST", visitor.name)
        fields = visitor.fields(request_id)
        async with await PlainClient.connect(proxy.port) as client:
            client.send("/hold/kill?at=alpha", method="POST", fields=fields)
            await asyncio.to_thread(apps.wait_until_held, "alpha", "kill")
            await asyncio.to_thread(apps.kill, "alpha")
            assert (await client.receive()).status == 502
            answer = await client.ask("/hold/kill?at=alpha", method="POST", fields=fields)
        visitor.note(request_id, Verdict(answer.status, receipt=Receipt.read(answer.fields), cookie=answer.cookie))
        assert answer.status == 200
        assert crowd.ledger.findings(apps.arrivals()) == [
            f"POST {request_id} of {visitor.name} arrived 2 times: alpha, {visitor.app}"
        ]


# SIGSTOP


async def test_nobody_leaves_a_process_that_is_stopped_and_each_gets_504_in_time(
    children: Children, apps: FaultApps
) -> None:
    probe = {"path": "/healthz", "interval": "500ms", "timeout": "1s", "rise": 1, "fall": 2}
    proxy = StickyProxy(children, apps.upstreams, probe=probe, more={"timeouts": {"response": f"{RESPONSE_S:g}s"}})
    async with Crowd(proxy.port) as crowd:
        await crowd.arrive(30)
        pinned, others = crowd.at("alpha"), crowd.at("beta") + crowd.at("gamma")
        cookies = {visitor: visitor.cookie for visitor in crowd.visitors}
        assert len(pinned) == 10
        for visitor in pinned[:2]:
            await visitor.open_tunnel()
        apps.send("alpha", signal.SIGSTOP)

        async with Load(others, "/take?ms=5") as load:
            loop = asyncio.get_running_loop()
            waited_s = [loop.create_task(measure(visitor, at)) for at, visitor in enumerate(pinned)]
            await wait_for_state(proxy, "alpha", health="unhealthy", accepts_new=False, accepts_pinned=True)
            new = await crowd.arrive(12)
            assert {visitor.app for visitor in new} == {"beta", "gamma"}
            async with asyncio.timeout(DEADLINE_S):
                times = sorted(await asyncio.gather(*waited_s))
            print(f"504 after {times[0]:.3f} to {times[-1]:.3f} s, the timeout is {RESPONSE_S:g} s")
            assert crowd.ledger.errors() == {"504": len(pinned)} == crowd.ledger.errors(names_of(pinned))
            assert times[0] >= 0.9 * RESPONSE_S

            # Unhealthy by now; their next requests wait at the same process all the same, and are answered there.
            last = start_asking(pinned, "/take")
            await wait_for_state(proxy, "alpha", in_flight=len(pinned))
            apps.send("alpha", signal.SIGCONT)
            assert {verdict.status for verdict in await end_all(last)} == {200}
            await wait_for_state(proxy, "alpha", health="healthy", accepts_new=True)
            await load.go_on(5)

        assert {await visitor.echo() for visitor in pinned[:2]} == {("alpha", 1)}
        late = await crowd.arrive(15)
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}; of 15 new clients after SIGCONT "
              f"{len(set(late) & set(crowd.at('alpha')))} came to alpha")  # fmt: skip
        assert set(late) & set(crowd.at("alpha"))
        for _ in range(3):  # a late answer to an earlier request would come now
            assert {verdict.status for verdict in await ask_all(crowd.visitors)} == {200}
        assert not crowd.moved
        assert {visitor: visitor.cookie for visitor in cookies} == cookies
        assert proxy.metric("affinity_breaks_total") == 0
        await asyncio.to_thread(wait_for_arrivals, apps, crowd)
        assert crowd.ledger.findings(apps.arrivals()) == []


async def measure(visitor: Visitor, number: int) -> float:
    """Return how many seconds it took until a request ended; each begins at another moment within half a second."""
    await asyncio.sleep(number * 0.05)
    began = time.monotonic()
    await visitor.ask("/take", "POST" if number % 2 else "GET")
    return time.monotonic() - began


def wait_for_arrivals(apps: FaultApps, crowd: Crowd) -> None:
    """Wait until the process that was stopped has read what was sent to it meanwhile: every request arrived once."""
    wait_until(lambda: len(apps.arrivals()) >= len(crowd.ledger), "all requests have arrived")


# Blocking code


async def block_one(children: Children, apps: FaultApps, *, block_s: int, affinity: Mapping[str, Any]) -> Crowd:
    """Let one process do nothing for a while, as all clients go on, and return what they saw."""
    proxy = StickyProxy(children, apps.upstreams, probe=STRICT, affinity=affinity)
    async with Crowd(proxy.port) as crowd:
        first = (await crowd.arrive(31))[0]  # no multiple of three: round robin must not keep step with them
        blocker = start_asking([first], f"/block/{block_s}000", "POST")
        blocked = await asyncio.to_thread(apps.wait_for_arrival, first.name, "POST")
        asking = start_asking(crowd.visitors[1::2], "/take")
        await wait_for_state(proxy, blocked, health="unhealthy")
        assert state_of(proxy, blocked)["accepts_pinned"]
        asking += start_asking(crowd.visitors[2::2], "/take")
        ended = await end_all(blocker + asking)
        ended += await ask_all(crowd.visitors)
        assert {verdict.status for verdict in ended} == {200}
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}, moved: {len(crowd.moved)}; "
              f"probes of {blocked} timed out: {proxy.metric('probes_total', upstream=blocked, outcome='timeout'):g}; "
              f"pins broken: {proxy.metric('affinity_breaks_total'):g}")  # fmt: skip
        assert crowd.ledger.findings(apps.arrivals()) == []
    return crowd


async def test_nobody_leaves_a_process_whose_code_blocks_for_longer_than_its_probes_wait(
    children: Children, apps: FaultApps
) -> None:
    crowd = await block_one(children, apps, block_s=8, affinity={})
    assert not crowd.moved
    assert {visitor.app for visitor in crowd.visitors} == apps.upstreams.keys()


async def test_without_affinity_clients_leave_it(children: Children, apps: FaultApps) -> None:
    """The control: the tests of this file would see a client that is moved."""
    assert (await block_one(children, apps, block_s=4, affinity=NO_AFFINITY)).moved


# Drained, then restarted


async def drain(proxy: StickyProxy, apps: FaultApps, crowd: Crowd, load: Load) -> None:
    """Restart alpha as the README says: drain, maint, restart, ready."""
    await asyncio.to_thread(proxy.set_state, "alpha", "drain")
    assert {visitor.app for visitor in await crowd.arrive(6)} == {"beta", "gamma"}
    await load.go_on(5)
    assert not crowd.moved
    await asyncio.to_thread(proxy.set_state, "alpha", "maint")
    await wait_for_state(proxy, "alpha", in_flight=0)
    await asyncio.to_thread(apps.restart, "alpha")
    await load.go_on(5)
    await asyncio.to_thread(proxy.set_state, "alpha", "ready")


async def restart_at_once(proxy: StickyProxy, apps: FaultApps, crowd: Crowd, load: Load) -> None:
    """Restart alpha as one should not, under load."""
    await asyncio.to_thread(apps.restart, "alpha")
    await load.go_on(5)


async def restart_under_load(
    children: Children, apps: FaultApps, restart: Callable[[StickyProxy, FaultApps, Crowd, Load], Awaitable[None]]
) -> Crowd:
    """Restart alpha in some way while 30 clients go on, and return what they saw."""
    proxy = StickyProxy(children, apps.upstreams, probe={**PATIENT, "interval": "500ms"})
    async with Crowd(proxy.port) as crowd:
        await crowd.arrive(30)
        pinned = crowd.at("alpha")
        async with Load(list(crowd.visitors), "/take?ms=20") as load:
            await load.go_on(5)
            await restart(proxy, apps, crowd, load)
            await wait_for_state(proxy, "alpha", accepts_new=True, health="healthy")
            new = await crowd.arrive(20)
            await load.go_on(5)
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}, moved: {len(crowd.moved)}, "
              f"pins broken: {proxy.metric('affinity_breaks_total'):g}")  # fmt: skip
        assert ("alpha", 2) in {visitor.processes[0] for visitor in new}
        assert set(crowd.moved) == set(pinned)
        assert crowd.ledger.findings(apps.arrivals()) == []
    return crowd


async def test_a_process_that_is_drained_and_restarted_costs_no_error(children: Children, apps: FaultApps) -> None:
    assert not (await restart_under_load(children, apps, drain)).ledger.errors()


async def test_a_process_that_is_restarted_undrained_costs_errors(children: Children, apps: FaultApps) -> None:
    """The control: the load is such that a restart without a drain is noticed."""
    assert (await restart_under_load(children, apps, restart_at_once)).ledger.errors()


async def test_those_who_sleep_through_the_restart_of_a_drained_process_come_back_to_it(
    children: Children, apps: FaultApps
) -> None:
    proxy = StickyProxy(children, apps.upstreams, probe=PATIENT)
    async with Crowd(proxy.port) as crowd:
        await crowd.arrive(30)
        pinned, others = crowd.at("alpha"), crowd.at("beta") + crowd.at("gamma")
        async with Load(others, "/take?ms=2") as load:
            await ask_all(pinned)
            await asyncio.to_thread(proxy.set_state, "alpha", "drain")
            await wait_for_state(proxy, "alpha", in_flight=0)
            await asyncio.to_thread(apps.restart, "alpha")
            await load.go_on(5)
            # What was kept of connections to the old process must not meet the first requests.
            await wait_for_state(proxy, "alpha", accepts_pinned=True)
            back = await ask_all(pinned)
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}")
        assert {verdict.status for verdict in back} == {200}
        assert {tuple(visitor.processes) for visitor in pinned} == {(("alpha", 1), ("alpha", 2))}
        assert not crowd.ledger.errors()
        assert crowd.ledger.findings(apps.arrivals()) == []


# Broken off in the middle of a response


class Breaking:
    """An app that breaks off its responses, behind a proxy."""

    def __init__(self, children: Children) -> None:
        self.reports = children.reports
        self.apps = FaultApps(children, "alpha", "beta")
        self.proxy = StickyProxy(children, self.apps.upstreams, probe=PATIENT)


@pytest.fixture(scope="module")
def breaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breaking]:
    with Children(tmp_path_factory.mktemp("breaking")) as children:
        yield Breaking(children)


async def ends_whole(link: RawLink, head: Message) -> bool:
    """Wait for the end of a response, and say whether it looks whole to its client (RFC 9112, sections 6.3 and 8)."""
    if lengths := head.all("content-length"):
        await eventually(lambda: link.is_over or len(link.held) == int(lengths[0]), "the response ends")
        return len(link.held) == int(lengths[0])
    if head.all("transfer-encoding") == ["chunked"]:
        await eventually(lambda: link.is_over or link.held.endswith(b"0\r\n\r\n"), "the response ends")
        return link.held.endswith(b"0\r\n\r\n")
    await eventually(lambda: link.is_over, "the response ends")
    return link.ending == "eof"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("framing", "ending", "looks_whole"),
    [
        *((framing, ending, False) for framing in ("length", "chunk", "in-chunk") for ending in ("fin", "rst", "half")),
        ("until-close", "rst", False),
        # The control: that is how such a response ends.
        ("until-close", "fin", True),
        ("until-close", "half", True),
    ],
)
async def test_a_response_that_breaks_off_is_visibly_cut(
    breaking: Breaking, framing: str, ending: str, version: str, *, looks_whole: bool
) -> None:
    apps, port, gate = breaking.apps, breaking.proxy.port, f"{framing}-{ending}-{version}"
    async with Crowd(port) as crowd:
        [visitor] = await crowd.arrive(1)
        app = visitor.app
        request_id = crowd.ledger.begin("GET", visitor.name)
        fields = [f"{name}: {value}" for name, value in visitor.fields(request_id).items()]
        _, link = await asyncio.get_running_loop().create_connection(RawLink, "127.0.0.1", port)
        link.send(request(f"GET /break/{framing}/{ending}/{gate}", *fields, version=version))
        head = await link.read_message()
        await eventually(lambda: PART in link.held, "the part that is sent at once")
        await asyncio.to_thread(apps.wait_until_held, app, gate)
        await asyncio.to_thread(apps.release, app, gate)
        is_whole = await ends_whole(link, head)
        receipt = Receipt.read({RECEIPT: head[RECEIPT]})
        visitor.note(request_id, Verdict(head.status, "" if is_whole else "truncated", receipt))
        link.close()
        assert is_whole is looks_whole
        if not is_whole and version == "1.0" and framing != "length":
            assert link.ending == "reset"
        await asyncio.to_thread(apps.wait_until_held, app, f"{gate}-end", 0)  # a half-closed connection is closed

        after = [await visitor.ask("/take", method) for method in ("POST", "GET", "POST")]
        assert [verdict.status for verdict in after] == [200] * 3
        assert len(visitor.processes) == 1
        assert receipt is not None
        assert receipt.connection not in {one.receipt.connection for one in after if one.receipt is not None}
        assert crowd.ledger.errors() == ({} if looks_whole else {"truncated": 1})
        assert crowd.ledger.findings(apps.arrivals()) == []
        assert not crowd.ledger.repeated(apps.arrivals())


@pytest.mark.parametrize("ending", ["fin", "rst", "half"])
async def test_a_head_that_breaks_off_is_answered_with_502_and_not_sent_again(breaking: Breaking, ending: str) -> None:
    apps, gate = breaking.apps, f"head-{ending}"
    async with Crowd(breaking.proxy.port) as crowd:
        [visitor] = await crowd.arrive(1)
        asking = start_asking([visitor], f"/break/head/{ending}/{gate}", "GET")
        await asyncio.to_thread(apps.wait_until_held, visitor.app, gate)
        await asyncio.to_thread(apps.release, visitor.app, gate)
        assert [verdict.name for verdict in await end_all(asking)] == ["502"]
        await asyncio.to_thread(apps.wait_until_held, visitor.app, f"{gate}-end", 0)
        assert (await visitor.ask("/take", "POST")).status == 200
        assert len(visitor.processes) == 1
        assert crowd.ledger.errors() == {"502": 1}
        assert crowd.ledger.findings(apps.arrivals()) == []
        assert not crowd.ledger.repeated(apps.arrivals())


# A thousand at once


async def open_all(visitors: list[Visitor], at_once: int) -> list[Verdict]:
    """Let each visitor open a tunnel, so many at a time, and say something."""
    verdicts = []
    async with asyncio.timeout(DEADLINE_S):
        for at in range(0, len(visitors), at_once):
            group = visitors[at : at + at_once]
            verdicts += await asyncio.gather(*(visitor.open_tunnel() for visitor in group))
            answers = await asyncio.gather(*(visitor.echo() for visitor in group))
            assert answers == [(visitor.app, 1) for visitor in group]
    return verdicts


async def test_a_thousand_clients_lose_a_process_and_its_own_come_back_at_once(
    children: Children, apps: FaultApps
) -> None:
    proxy = StickyProxy(children, apps.upstreams, probe=PATIENT)
    survivors = ("beta", "gamma")
    async with Crowd(proxy.port) as crowd:
        assert {verdict.status for verdict in await open_all(crowd.new(TUNNELS), 50)} == {101}
        victims, others = crowd.at("alpha"), crowd.at("beta") + crowd.at("gamma")
        assert abs(len(victims) - TUNNELS // 3) <= 1
        codes: Counter[int | None] = Counter()
        is_gone = asyncio.Event()
        met_the_end: list[Verdict] = []

        async def come_back(visitor: Visitor) -> Verdict:
            """Open a tunnel as soon as the old one is closed; again where it met the process before it was gone."""
            codes[await visitor.wait_closed()] += 1
            while True:
                was_gone = is_gone.is_set()
                verdict = await visitor.open_tunnel()
                if was_gone or verdict.status != 502:
                    return verdict
                # The system still took connections for the process that was ending.
                met_the_end.append(verdict)

        loop = asyncio.get_running_loop()
        coming = [loop.create_task(come_back(visitor)) for visitor in victims]
        for name in survivors:
            await asyncio.to_thread(apps.take_lag, name)
        began = time.monotonic()
        await asyncio.to_thread(apps.kill, "alpha")
        is_gone.set()
        back = await end_all(coming)
        assert Counter(verdict.name for verdict in back) == {"101": len(victims)}
        async with asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*(visitor.echo() for visitor in victims))
        took_s = time.monotonic() - began
        lags = {name: await asyncio.to_thread(apps.take_lag, name) for name in survivors}
        print(f"{len(victims)} of {TUNNELS} tunnels were closed with {dict(codes)}, "
              f"and were back after {took_s:.3f} s; timers of the surviving processes were late by {lags}; "
              f"of the proxy's at most by {lag_bound(proxy):g} s; {dict(crowd.ledger.count())}")  # fmt: skip

        assert codes.keys() <= {1012, 1014}
        assert all(verdict.cookie for verdict in back)
        assert answers == [(visitor.app, 1) for visitor in victims]
        assert Counter(visitor.app for visitor in victims).keys() == set(survivors)
        async with asyncio.timeout(DEADLINE_S):
            assert {await visitor.echo() for visitor in others} == {("beta", 2), ("gamma", 2)}
        assert set(crowd.moved) == set(victims)
        assert proxy.metric("tunnels_open") == TUNNELS
        assert crowd.ledger.errors().total() == len(met_the_end)
        assert crowd.ledger.findings(apps.arrivals()) == []
        assert not crowd.ledger.repeated(apps.arrivals())


def lag_bound(proxy: StickyProxy) -> float:
    """Return the bucket of the largest lag of the worker's loop, in seconds."""
    name = "stickyproxy_event_loop_lag_seconds_bucket"
    buckets = [(float(one.labels["le"]), one.value) for one in proxy.metrics()
               if one.name == name and one.labels["process"] == "worker"]  # fmt: skip
    return min(bound for bound, count in buckets if count == max(value for _, value in buckets))
