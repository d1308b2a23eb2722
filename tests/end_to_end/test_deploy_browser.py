"""People in browsers while an app is deployed that the proxy itself runs: nobody notices, or each once at most.

Their pages are NiceGUI's and Chainlit's, as the frameworks make them. Where the drain timeout is longer than the
sessions nobody notices; where it is shorter each page is loaded again, or connects again, once. A rolling restart,
which is what one has without a deploy, disturbs all, and some more than once: they come to a process that is next.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.guests import (
    GUESTS_OF,
    WORK_TIMEOUT_S,
    Guest,
    let_all_work,
    take_pictures,
    welcome,
    work_until,
)
from tests.end_to_end.pages import PATIENT
from tests.helpers.apps import CHAINLIT, NICEGUI, Framework
from tests.helpers.browser import Visitors
from tests.helpers.deployed_site import DeployedSite
from tests.helpers.processes import Children

pytestmark = pytest.mark.browser

GUESTS = 12
NEWCOMERS = 3
PROCESSES = 3
OLD, NEW = {f"g1-{number + 1}" for number in range(PROCESSES)}, {f"g2-{number + 1}" for number in range(PROCESSES)}
NUMBERS = itertools.count(1)


@pytest.fixture(params=[NICEGUI, CHAINLIT], ids=lambda framework: framework.name)
def framework(request: pytest.FixtureRequest) -> Framework:
    assert isinstance(request.param, Framework)
    return request.param


@pytest.fixture
def site(children: Children, framework: Framework) -> Iterator[DeployedSite]:
    options = PATIENT if framework is NICEGUI else ()
    site = DeployedSite(children, framework, f"{framework.name}-{next(NUMBERS)}", PROCESSES, options)
    yield site
    site.stop()


def settle(visitors: Visitors, site: DeployedSite, framework: Framework, count: int) -> list[Guest]:
    """Let guests come to the first generation and do something twice."""
    guests = welcome(visitors, site.url, GUESTS_OF[framework.name], count)
    let_all_work(guests)
    told = let_all_work(guests)
    print(f"{count} guests at {sorted(Counter(one.upstream for one in told).items())}")
    assert {one.version for one in told} == {"1"}
    assert len({one.upstream for one in told} & OLD) > 1
    return guests


def test_nobody_notices_a_deploy_that_waits_for_the_sessions_to_end(
    visitors: Visitors, site: DeployedSite, framework: Framework, tmp_path: Path
) -> None:
    guests = settle(visitors, site, framework, GUESTS)
    old_processes = site.ready()
    told = let_all_work(guests)
    site.set_version("2")
    deploy = site.deploy("--drain-timeout", "1h", "--watch", "1s")

    work_until(guests, told, lambda: set(site.ready()) == NEW, "the new generation serves")
    newcomers = welcome(visitors, site.url, GUESTS_OF[framework.name], NEWCOMERS)
    told_newcomers = let_all_work(newcomers)
    assert {one.version for one in told_newcomers} == {"2"}
    assert {one.upstream for one in told_newcomers} <= NEW
    work_until(guests + newcomers, told + told_newcomers, lambda: True, "all work")
    assert deploy.is_running(), deploy.log_tail()
    take_pictures(guests + newcomers, tmp_path, "draining")

    # The visitors of one old process leave: it ends, and no other one does.
    [*_, empty] = sorted(one.upstream for one in told)
    leaving = [guest for guest, one in zip(guests, told, strict=True) if one.upstream == empty]
    staying = [guest for guest in guests if guest not in leaving]
    told_staying = [one for one in told if one.upstream != empty]
    for guest in guests:
        guest.assert_noticed_nothing()
    for guest in leaving:
        guest.leave()
    left = {one.upstream for one in told_staying} | NEW
    work_until(staying, told_staying, lambda: set(site.upstreams()) == left, "the process without visitors is gone")
    assert old_processes[empty] not in site.app_processes()
    for guest in staying:
        guest.assert_noticed_nothing()

    for guest in staying:
        guest.leave()
    work_until(newcomers, told_newcomers, lambda: not deploy.is_running(), "the deploy is over")
    assert deploy.wait() == 0, deploy.log_tail()
    assert set(site.ready()) == set(site.upstreams()) == NEW
    assert site.app_processes() == set(site.ready().values())
    for guest in newcomers:
        guest.assert_noticed_nothing()
    assert site.metric("affinity_breaks_total") == 0


def test_at_a_short_drain_timeout_each_is_disturbed_once_and_lands_on_the_new_version(
    visitors: Visitors, site: DeployedSite, framework: Framework, tmp_path: Path
) -> None:
    guests = settle(visitors, site, framework, GUESTS)
    site.set_version("2")
    deploy = site.deploy("--drain-timeout", "1s", "--pace", "20/s", "--surge", "all", "--watch", "1s")
    guests[0].tab.wait_until(lambda: not deploy.is_running(), "the deploy is over", WORK_TIMEOUT_S)
    assert deploy.wait() == 0, deploy.log_tail()

    for guest in guests:
        guest.wait_until_disturbed(0)
    told = let_all_work(guests)
    take_pictures(guests, tmp_path, "deployed")
    assert {one.version for one in told} == {"2"}
    assert {one.upstream for one in told} <= NEW
    assert let_all_work(guests) == told
    for guest in guests:
        guest.assert_disturbed_once()
    assert f"{GUESTS} tunnels are closed" in site.child.log.read_text()
    assert site.metric("tunnels_open") == GUESTS
    assert site.app_processes() == set(site.ready().values())


def test_a_rolling_restart_disturbs_all_and_some_twice(
    visitors: Visitors, site: DeployedSite, framework: Framework, tmp_path: Path
) -> None:
    """The control: this is what the other tests would see if a deploy were a restart of one process after another."""
    guests = settle(visitors, site, framework, GUESTS // 2)
    site.set_version("2")
    for upstream in sorted(OLD):
        told = let_all_work(guests)
        hit = [guest for guest, one in zip(guests, told, strict=True) if one.upstream == upstream]
        before = {guest: guest.disturbances for guest in hit}
        site.kill(upstream)
        for guest in hit:
            guest.wait_until_disturbed(before[guest])
        told = let_all_work(guests)
        assert upstream not in {one.upstream for one in told}
        site.let_start()
        guests[0].tab.wait_until(lambda: set(site.ready()) == OLD, "the process serves again", WORK_TIMEOUT_S)

    take_pictures(guests, tmp_path, "restarted")
    disturbances = [guest.disturbances for guest in guests]
    print(f"a rolling restart disturbed the pages {disturbances} times")
    for guest in guests:
        with pytest.raises(AssertionError):
            guest.assert_noticed_nothing()
    twice = [guest for guest in guests if guest.disturbances > 1]
    assert twice
    for guest in twice:
        with pytest.raises(AssertionError):
            guest.assert_disturbed_once()
