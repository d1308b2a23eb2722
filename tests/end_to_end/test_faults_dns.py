"""Faults of name resolution: a name that comes to stand for another address, or for none.

The proxy gets a hosts file of its own by Debian's libnss-wrapper, which answers `getaddrinfo` in its process. The old
process and the new one listen at one port of two addresses, and a ledger compares what both ends noted.
"""

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.apps import lacking
from tests.helpers.faults import Crowd, FaultApps, Load, Visitor
from tests.helpers.processes import Children, wait_until
from tests.helpers.serving import Serving

pytestmark = pytest.mark.load

LIBRARY = "libnss_wrapper.so"
NAME = "app.faults.test"
REFRESH_S = 1.0
DEADLINE_S = 60.0
LOOK_UP = f"import socket; print(*[one[4][0] for one in socket.getaddrinfo({NAME!r}, 80, type=socket.SOCK_STREAM)])"


class Names:
    """A hosts file, and the environment in which it is used."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "hosts"
        self._file.touch()
        self._changed_s = int(self._file.stat().st_mtime)
        self.env = {
            "LD_PRELOAD": LIBRARY,
            "NSS_WRAPPER_HOSTS": str(self._file),
            "RES_OPTIONS": "attempts:0",  # a name that is not in the file is not looked for anywhere else
        }

    def set(self, *addresses: str) -> None:
        """Let the name stand for these addresses, in this order; for none, if there are none."""
        new = self._file.with_suffix(".new")
        new.write_text("".join(f"{address} {NAME}\n" for address in addresses) or "127.0.0.1 another.faults.test\n")
        # The file is read again when its time in whole seconds is another.
        self._changed_s += 10
        os.utime(new, (self._changed_s, self._changed_s))
        new.replace(self._file)

    def look_up(self) -> list[str]:
        """Return what a process finds that starts now, in order; nothing where the name cannot be resolved."""
        found = subprocess.run(
            [sys.executable, "-c", LOOK_UP], env={**os.environ, **self.env}, capture_output=True, check=False
        )
        assert found.returncode == 0 or b"gaierror" in found.stderr, found.stderr
        return found.stdout.decode().split()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
def names(children: Children) -> Names:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        lacking("no libnss_wrapper: install the package libnss-wrapper")
    return Names(children.directory)


@pytest.fixture
def apps(children: Children) -> FaultApps:
    return FaultApps(children, "old", "new", hosts={"old": "127.0.0.2", "new": "127.0.0.3"})


async def start(children: Children, apps: FaultApps, names: Names, **configuration: Any) -> Serving:
    """Start a proxy in front of the name, whose probes find it healthy."""
    port = apps.upstreams["old"].rpartition(":")[2]
    proxy = Serving(
        children,
        {
            "upstreams": [{"id": "app", "url": f"http://{NAME}:{port}"}],
            "dns_refresh": f"{REFRESH_S:g}s",
            "health": {"probe": {"interval": "500ms", "timeout": "10s", "rise": 1, "fall": 1}},
            **configuration,
        },
        env=names.env,
    )
    await asyncio.to_thread(proxy.wait_for_log, "upstream app is healthy")
    return proxy


def cookies_of(crowd: Crowd) -> Mapping[str, str | None]:
    return {visitor.name: visitor.cookie for visitor in crowd.visitors}


async def wait_until_all_are_at(visitors: list[Visitor], app: str) -> None:
    """Wait until the last answer to each visitor came from an app."""
    async with asyncio.timeout(DEADLINE_S):
        while any(visitor.app != app for visitor in visitors):  # noqa: ASYNC110 -- their load goes on meanwhile
            await asyncio.sleep(0.01)


async def test_a_name_that_moves_is_followed_without_an_error(
    children: Children, apps: FaultApps, names: Names
) -> None:
    names.set("127.0.0.2")
    assert names.look_up() == ["127.0.0.2"]
    proxy = await start(children, apps, names)
    async with Crowd(proxy.port) as crowd:
        busy = await crowd.arrive(10)
        cookies = cookies_of(crowd)
        assert len(crowd.at("old")) == 10
        [waiting] = crowd.new(1)
        asking = asyncio.get_running_loop().create_task(waiting.ask("/hold/later?at=old", "POST"))
        await asyncio.to_thread(apps.wait_until_held, "old", "later")
        async with Load(busy, "/take?ms=2") as load:
            await load.go_on(10)
            began = time.monotonic()
            names.set("127.0.0.3")
            assert names.look_up() == ["127.0.0.3"]
            await wait_until_all_are_at(busy, "new")
            print(f"followed after {time.monotonic() - began:.2f} s, dns_refresh is {REFRESH_S:g} s")
            await load.go_on(10)
        await asyncio.to_thread(apps.release, "old", "later")
        async with asyncio.timeout(DEADLINE_S):
            verdict = await asking
        # What was under way ended where it had begun; the pin is to the upstream, which is the same.
        assert verdict.receipt is not None
        assert verdict.receipt.app == "old"
        assert cookies.items() <= cookies_of(crowd).items()
        assert all(len(visitor.processes) == 2 for visitor in busy)
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}")
        assert not crowd.ledger.errors()
        assert crowd.ledger.findings(apps.arrivals()) == []


async def test_a_name_that_cannot_be_resolved_keeps_its_last_address(
    children: Children, apps: FaultApps, names: Names
) -> None:
    names.set("127.0.0.2")
    # Each request needs a connection of its own.
    proxy = await start(children, apps, names, timeouts={"upstream_keep_alive": "0s"})
    async with Crowd(proxy.port) as crowd:
        busy = await crowd.arrive(10)
        async with Load(busy, "/take?ms=20") as load:
            await load.go_on(5)
            names.set()
            assert names.look_up() == []
            until = time.monotonic() + 4 * REFRESH_S
            while time.monotonic() < until and not crowd.ledger.errors():
                await load.go_on(1)
            new = await crowd.arrive(3)
            print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}")
            assert not crowd.ledger.errors()
            assert {visitor.app for visitor in new} == {"old"}
            assert proxy.ready_status() == 200
            assert "app is unhealthy" not in proxy.log

            # And when names are resolved again, they are followed again.
            names.set("127.0.0.3")
            await wait_until_all_are_at(busy, "new")
        assert not crowd.ledger.errors()
        assert crowd.ledger.findings(apps.arrivals()) == []


async def test_a_name_with_two_addresses_stays_with_one_while_it_is_among_them(
    children: Children, apps: FaultApps, names: Names
) -> None:
    """Name servers turn their answers around; a client's state is in one of the processes."""
    names.set("127.0.0.2", "127.0.0.3")
    assert names.look_up() == ["127.0.0.2", "127.0.0.3"]
    proxy = await start(children, apps, names, timeouts={"upstream_keep_alive": "0s"})
    async with Crowd(proxy.port) as crowd:
        await crowd.arrive(10)
        async with Load(list(crowd.visitors), "/take?ms=20") as load:
            await load.go_on(5)
            names.set("127.0.0.3", "127.0.0.2")
            assert names.look_up() == ["127.0.0.3", "127.0.0.2"]
            until = time.monotonic() + 4 * REFRESH_S
            while time.monotonic() < until and not crowd.moved:
                await load.go_on(1)
        print(f"{len(crowd.ledger)} requests: {dict(crowd.ledger.count())}, moved: {len(crowd.moved)}")
        assert not crowd.moved
        assert not crowd.ledger.errors()
        assert crowd.ledger.findings(apps.arrivals()) == []


def test_a_proxy_starts_before_its_name_can_be_resolved(children: Children, apps: FaultApps, names: Names) -> None:
    names.set()
    port = apps.upstreams["old"].rpartition(":")[2]
    proxy = Serving(
        children,
        {
            "upstreams": [{"id": "app", "url": f"http://{NAME}:{port}"}],
            "dns_refresh": f"{REFRESH_S:g}s",
            "health": {"probe": {"interval": "500ms", "rise": 1}},
        },
        env=names.env,
    )
    proxy.wait_until_serving()
    names.set("127.0.0.2")
    proxy.wait_for_log("upstream app is healthy")
    wait_until(lambda: proxy.ready_status() == 200, "it takes clients")
