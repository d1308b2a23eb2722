"""How a proxy starts: with or without its upstreams, where it listens, its secret, and what keeps it from starting."""

import asyncio
import json
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.counting import CountingApps
from tests.helpers.plain_client import PlainClient, ask
from tests.helpers.processes import Children, free_port, http_status, wait_until
from tests.helpers.serving import Serving, can_listen

PROBE = {"interval": "1s", "timeout": "10s", "rise": 1, "fall": 10}
DEADLINE_S = 60.0


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path) as children:
        yield children


@pytest.fixture
def taken() -> Iterator[int]:
    """Give a port that somebody listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def listed(apps: CountingApps) -> list[dict[str, str]]:
    return [{"id": name, "url": url} for name, url in apps.upstreams.items()]


def refuses_to_start(proxy: Serving, status: int = 2) -> str:
    """Return the one line that a proxy says which does not start."""
    assert proxy.child.wait(DEADLINE_S) == status
    lines = [line for line in proxy.log.splitlines() if " INFO " not in line]
    assert len(lines) == 1, proxy.log
    return lines[0]


async def stop(proxy: Serving) -> None:
    proxy.child.send(signal.SIGTERM)
    assert await asyncio.to_thread(proxy.child.wait, DEADLINE_S) == 0
    assert "Traceback" not in proxy.log


# Upstreams


async def test_it_starts_without_its_upstream_and_serves_when_that_comes(children: Children) -> None:
    apps = CountingApps(children, "alpha", start=False)
    proxy = Serving(children, {"upstreams": listed(apps), "health": {"probe": PROBE}})
    await asyncio.to_thread(proxy.wait_for_log, "1 of 1 upstreams are not there yet: alpha (refused)")
    assert proxy.ready_status() == 503
    answer = await ask(proxy.port, "/count")
    assert answer.status == 503
    assert int(answer.fields["retry-after"]) >= 1
    assert answer.cookie is None
    apps.start("alpha")
    await asyncio.to_thread(wait_until, lambda: proxy.ready_status() == 200, "the upstream was found")
    answer = await ask(proxy.port, "/count")
    assert (answer.status, json.loads(answer.body)["name"]) == (200, "alpha")
    assert answer.cookie is not None
    await stop(proxy)


async def test_it_serves_an_upstream_that_comes_before_a_probe_has_seen_it(children: Children) -> None:
    apps = CountingApps(children, "alpha", start=False)
    proxy = Serving(children, {"upstreams": listed(apps), "health": {"probe": False}})
    await asyncio.to_thread(proxy.wait_until_serving)
    assert (await ask(proxy.port, "/count")).status == 503
    apps.start("alpha")
    await asyncio.to_thread(apps.wait_until_ready, "alpha")
    assert (await ask(proxy.port, "/count")).status == 200
    await stop(proxy)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_with_wait_the_request_of_a_pinned_client_is_held_until_its_upstream_comes(
    children: Children, method: str
) -> None:
    apps = CountingApps(children, "alpha", "beta")
    configuration = {
        "upstreams": listed(apps),
        "health": {"probe": PROBE},
        "state_directory": str(children.directory / "state"),
        "affinity": {"on_unavailable": {"wait": "1h"}, "cookie": {"name": "stickyproxy"}},  # the ports are others
    }
    before = Serving(children, configuration, name="before")
    await asyncio.to_thread(before.wait_until_serving)
    first = await ask(before.port, "/count")
    name = json.loads(first.body)["name"]
    assert first.cookie is not None
    await stop(before)

    apps.kill(name)
    proxy = Serving(children, configuration, name="after")
    await asyncio.to_thread(proxy.wait_for_log, f"1 of 2 upstreams are not there yet: {name} (refused)")
    async with await PlainClient.connect(proxy.port) as client:
        client.send("/count", method=method, fields={"Cookie": first.cookie, "X-Id": "held"})
        other = await ask(proxy.port, "/count")  # one without a pin need not wait
        assert json.loads(other.body)["name"] != name
        assert apps.received()[method, "held"] == 0
        apps.start(name)
        answer = await client.receive()
    assert answer.status == 200
    assert {key: json.loads(answer.body)[key] for key in ("name", "generation")} == {"name": name, "generation": 2}
    assert answer.cookie is None
    assert apps.received()[method, "held"] == 1
    await stop(proxy)


async def test_with_wait_a_request_that_finds_its_upstream_gone_is_held_until_it_comes(children: Children) -> None:
    apps = CountingApps(children, "alpha")
    affinity = {"on_unavailable": {"wait": "1h"}}
    proxy = Serving(children, {"upstreams": listed(apps), "health": {"probe": False}, "affinity": affinity})
    await asyncio.to_thread(proxy.wait_until_serving)
    first = await ask(proxy.port, "/count")
    apps.kill("alpha")
    async with await PlainClient.connect(proxy.port) as client:
        client.send("/count", fields={"Cookie": first.cookie or ""})
        await asyncio.to_thread(proxy.wait_for_log, "upstream alpha is refusing connections")
        apps.start("alpha")
        await asyncio.to_thread(proxy.wait_for_log, "upstream alpha is healthy")
        try:
            async with asyncio.timeout(5):
                answer = await client.receive()
        except TimeoutError:
            proxy.child.send(signal.SIGKILL)  # it does not even hear SIGTERM in time
            raise
    assert json.loads(answer.body)["generation"] == 2


# Addresses


def test_an_address_in_use_is_one_clear_line(children: Children, taken: int) -> None:
    proxy = Serving(children, {"listeners": [f"127.0.0.1:{taken}"], "upstreams": ["http://127.0.0.1:9"]})
    line = refuses_to_start(proxy)
    assert line == f"stickyproxy: cannot listen on 127.0.0.1:{taken}: the address is in use; is another proxy running?"


@pytest.mark.parametrize("which", ["listener", "admin"])
def test_nothing_is_left_bound_where_the_second_address_is_taken(children: Children, taken: int, which: str) -> None:
    first, path = free_port(), children.directory / "first.sock"
    taken_address = f"127.0.0.1:{taken}"
    listeners = [f"127.0.0.1:{first}", f"unix:{path}"]
    configuration: dict[str, Any] = {"upstreams": ["http://127.0.0.1:9"], "listeners": listeners}
    if which == "listener":
        configuration["listeners"] = [*listeners, taken_address]
    else:
        configuration["admin"] = {"address": taken_address}
    proxy = Serving(children, configuration)
    assert taken_address in refuses_to_start(proxy)
    assert can_listen(first)
    assert can_listen(proxy.admin_port)
    assert not path.exists()
    assert not list(proxy.home.rglob("*"))


@pytest.mark.parametrize("addresses", [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", ""), ("", "127.0.0.1")])
def test_a_port_that_is_wanted_twice_is_refused(children: Children, addresses: Sequence[str]) -> None:
    """Both can be bound, with SO_REUSEADDR, but only one can listen."""
    port = free_port()
    one, other = (f"{host}:{port}" for host in addresses)
    listeners = {"listeners": [one, other]} if one != other else {"listeners": [one], "admin": {"address": other}}
    proxy = Serving(children, {"upstreams": ["http://127.0.0.1:9"], **listeners})
    assert f"cannot listen on {other}: the address is in use" in refuses_to_start(proxy)
    assert can_listen(port)


def test_of_two_that_start_at_once_on_one_address_one_serves(children: Children) -> None:
    configuration = {"upstreams": ["http://127.0.0.1:9"], "listeners": [f"127.0.0.1:{free_port()}"], "admin": False}
    proxies = [Serving(children, configuration, name=name) for name in ("one", "other")]
    wait_until(lambda: any(not proxy.child.is_running() for proxy in proxies), "one of them has ended")
    loser, winner = sorted(proxies, key=lambda proxy: proxy.child.is_running())
    assert "the address is in use" in refuses_to_start(loser)
    winner.wait_until_serving()
    assert winner.child.is_running()


async def test_it_listens_on_a_unix_socket_and_removes_it_in_the_end(children: Children) -> None:
    apps = CountingApps(children, "alpha")
    file = children.directory / "proxy.sock"
    path = str(file)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    proxy = Serving(children, {"upstreams": listed(apps), "listeners": [f"unix:{path}"]})
    await asyncio.to_thread(proxy.wait_until_serving)
    assert (await ask(path, "/count")).status == 200
    second = Serving(children, {"upstreams": listed(apps), "listeners": [f"unix:{path}"]}, name="second")
    assert f"cannot listen on unix:{path}: the address is in use" in refuses_to_start(second)
    assert (await ask(path, "/count")).status == 200
    await stop(proxy)
    assert not file.exists()


def test_a_file_that_is_no_socket_is_left_alone(children: Children) -> None:
    path = children.directory / "precious"
    path.write_text("not a socket")
    proxy = Serving(children, {"upstreams": ["http://127.0.0.1:9"], "listeners": [f"unix:{path}"]})
    assert "cannot listen on unix:" in refuses_to_start(proxy)
    assert path.read_text() == "not a socket"


# The command line


async def test_urls_and_options_are_enough(children: Children) -> None:
    apps = CountingApps(children, "alpha", "beta")
    port = free_port()
    options = ["--listen", f"127.0.0.1:{port}", "--admin", "off", "--workers", "auto", *apps.upstreams.values()]
    proxy = Serving(children, None, options=options)
    await asyncio.to_thread(proxy.wait_for_log, f"serving 2 upstreams on 127.0.0.1:{port}")
    names = {json.loads((await ask(port, "/count")).body)["name"] for _ in range(2)}
    assert names == {"alpha", "beta"}
    assert http_status("http://127.0.0.1:9090/livez") is None or not can_listen(9090)
    await stop(proxy)


async def test_options_come_before_the_file(children: Children) -> None:
    apps = CountingApps(children, "alpha")
    port, admin_port = free_port(), free_port()
    proxy = Serving(
        children,
        {"upstreams": ["http://127.0.0.1:9"]},
        options=["--listen", f"127.0.0.1:{port}", f"--admin=127.0.0.1:{admin_port}", *apps.upstreams.values()],
    )
    await asyncio.to_thread(proxy.wait_until_serving)
    assert (await ask(port, "/count")).status == 200
    assert http_status(f"http://127.0.0.1:{admin_port}/readyz") == 200
    assert can_listen(proxy.port)
    assert can_listen(proxy.admin_port)
    await stop(proxy)


# The secret


async def test_the_secret_is_made_once_and_pins_outlive_a_restart(children: Children) -> None:
    apps = CountingApps(children, "alpha", "beta", "gamma")
    state = children.directory / "new" / "state"
    affinity = {"cookie": {"name": "stickyproxy"}}  # the ports are others
    configuration = {"upstreams": listed(apps), "state_directory": str(state), "affinity": affinity}
    first = Serving(children, configuration, name="first")
    await asyncio.to_thread(first.wait_until_serving)
    answers = [await ask(first.port, "/count") for _ in range(6)]
    await stop(first)
    secret = state / "secret"
    assert [path.name for path in state.iterdir()] == ["secret"]
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert "made a secret in" in first.log
    assert secret.read_text() not in first.log
    content = secret.read_bytes()

    second = Serving(children, configuration, name="second")
    await asyncio.to_thread(second.wait_until_serving)
    for answer in answers:
        again = await ask(second.port, "/count", fields={"Cookie": answer.cookie or ""})
        assert json.loads(again.body)["name"] == json.loads(answer.body)["name"]
        assert again.cookie is None
    assert secret.read_bytes() == content
    assert "made a secret" not in second.log
    await stop(second)


async def test_a_state_directory_that_cannot_be_made_costs_only_the_pins(children: Children) -> None:
    apps = CountingApps(children, "alpha")
    # Not a matter of permissions, which root does not know: nothing can be made under /proc.
    proxy = Serving(children, {"upstreams": listed(apps), "state_directory": "/proc/stickyproxy"})
    await asyncio.to_thread(proxy.wait_until_serving)
    answer = await ask(proxy.port, "/count")
    assert answer.cookie is not None
    assert (await ask(proxy.port, "/count", fields={"Cookie": answer.cookie})).cookie is None
    assert "cannot keep a secret in /proc/stickyproxy" in proxy.log
    assert "pins will not outlive this process" in proxy.log
    await stop(proxy)


def test_a_secret_that_is_cut_is_one_clear_line(children: Children) -> None:
    (children.directory / "secret").write_text("short\n")
    proxy = Serving(children, {"upstreams": ["http://127.0.0.1:9"], "state_directory": str(children.directory)})
    assert "secret is too short (5 bytes)" in refuses_to_start(proxy)
    assert can_listen(proxy.port)


def test_many_that_start_at_once_agree_on_one_secret(children: Children) -> None:
    state = children.directory / "state"
    configuration = {"upstreams": ["http://127.0.0.1:9"], "state_directory": str(state)}
    proxies = [Serving(children, configuration, name=f"proxy-{number}") for number in range(4)]
    for proxy in proxies:
        proxy.wait_until_serving()
    assert sum("made a secret" in proxy.log for proxy in proxies) == 1
    assert [path.name for path in state.iterdir()] == ["secret"]


# Probes and logs


async def test_every_upstream_is_probed(children: Children) -> None:
    apps = CountingApps(children, "alpha", "beta")
    paths = {"one": "/healthz", "none": "/nowhere"}
    proxies = [
        Serving(
            children, {"upstreams": listed(apps), "health": {"probe": {**PROBE, "path": path, "fall": 1}}}, name=name
        )
        for name, path in paths.items()
    ]
    one, none = proxies
    await asyncio.to_thread(wait_until, lambda: one.log.count("is healthy") == 2, "both are healthy")
    await asyncio.to_thread(wait_until, lambda: none.log.count("is unhealthy") == 2, "both are unhealthy")
    assert "2 of 2 upstreams are not there yet: alpha (failed), beta (failed)" in none.log.replace(
        "beta (failed), alpha (failed)", "alpha (failed), beta (failed)"
    )
    for proxy in proxies:  # none is healthy: better a doubtful upstream than none
        assert (await ask(proxy.port, "/count")).status == 200
        await stop(proxy)


async def test_the_access_log_has_a_line_for_each_exchange_and_tunnel(children: Children) -> None:
    apps = CountingApps(children, "alpha")
    log = children.directory / "access.log"
    proxy = Serving(children, {"upstreams": listed(apps), "access_log": {"format": "json", "path": str(log)}})
    await asyncio.to_thread(proxy.wait_until_serving)
    first = await ask(proxy.port, "/count?n=1")
    assert first.cookie is not None
    await ask(proxy.port, "/count?n=2", method="POST", fields={"Cookie": first.cookie, "User-Agent": 'a "b"\xe9'})
    await ask(proxy.port, "/nowhere", fields={"Cookie": first.cookie})
    apps.kill("alpha")
    assert (await ask(proxy.port, "/count?n=4", fields={"Cookie": first.cookie})).status == 503
    await stop(proxy)
    lines = [json.loads(line) for line in log.read_text(encoding="ascii").splitlines()]
    facts = [(line["method"], line["target"], line["status"], line["upstream"], line["affinity"]) for line in lines]
    assert facts == [
        ("GET", "/count?n=1", 200, "alpha", "new"),
        ("POST", "/count?n=2", 200, "alpha", "hit"),
        ("GET", "/nowhere", 404, "alpha", "hit"),
        ("GET", "/count?n=4", 503, "", "none"),
    ]
    assert lines[1]["received_bytes"] == len("word")
    assert lines[1]["user_agent"].startswith('a "b"')
    assert not [line for line in lines if first.cookie.partition("=")[2] in json.dumps(line)]


def test_an_access_log_that_cannot_be_opened_is_one_clear_line(children: Children) -> None:
    log = children.directory / "nowhere" / "access.log"
    proxy = Serving(children, {"upstreams": ["http://127.0.0.1:9"], "access_log": {"path": str(log)}})
    assert str(log) in refuses_to_start(proxy)
    assert can_listen(proxy.port)
    assert can_listen(proxy.admin_port)


async def test_a_client_that_comes_while_it_starts_is_served_or_refused(children: Children) -> None:
    apps = CountingApps(children, "alpha")
    proxy = Serving(children, {"upstreams": listed(apps)})
    status = None
    async with asyncio.timeout(DEADLINE_S):
        while status is None:
            with suppress(ConnectionRefusedError):  # but not AbortedError: none is taken and dropped
                status = (await ask(proxy.port, "/count")).status
    assert status == 200
    await stop(proxy)
