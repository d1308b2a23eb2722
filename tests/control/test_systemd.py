"""What systemd is told and hands over, with a manager made of a socket, and the units in `config/systemd/`."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

import pytest
import pytest_asyncio

from stickyproxy.cli import main
from stickyproxy.config import Address, parse_listener
from stickyproxy.control import systemd
from stickyproxy.control.systemd import InheritedSocket, Notifier, Watchdog, match, take_listeners
from stickyproxy.errors import UsageError
from tests.helpers.processes import Children, free_port

DEADLINE_S = 30
ROOT = Path(__file__).parents[2]
UNITS = ROOT / "config" / "systemd"
ALL_OF_V4 = "0.0.0.0"  # noqa: S104 -- what listens there is closed at once
ENVIRONMENT = {name: value for name, value in os.environ.items() if not re.match("LISTEN_|NOTIFY_|WATCHDOG_", name)}


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a short directory: the path of a Unix socket has at most 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="sp-"))
    yield made
    shutil.rmtree(made)


class Manager:
    """What of systemd is here: the socket that it reads."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": f"@{address[1:]}" if address.startswith("\0") else address}
        self.link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.link.bind(address)
        self.link.settimeout(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def read(self) -> dict[str, str]:
        """Return the variables of the next message."""
        return dict(line.split("=", 1) for line in self.link.recv(65536).decode().split("\n"))

    def read_all(self) -> list[dict[str, str]]:
        """Return the messages that have come."""
        self.link.setblocking(False)
        found = []
        try:
            while True:
                found.append(self.read())
        except BlockingIOError:
            return found
        finally:
            self.link.settimeout(DEADLINE_S)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, directory: Path) -> Iterator[Manager]:
    with Manager(str(directory / "notify") if request.param == "path" else f"\0stickyproxy-{directory.name}") as made:
        yield made


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- the condition lies in a socket
            await asyncio.sleep(0.005)


# Telling


def test_each_state_is_told(manager: Manager) -> None:
    with closing(Notifier(manager.environ)) as notifier:
        assert notifier.is_connected
        notifier.ready("serving 2 upstreams")
        assert manager.read() == {"READY": "1", "STATUS": "serving 2 upstreams"}
        notifier.ready()
        assert manager.read() == {"READY": "1"}
        notifier.status("two\nlines\r\nREADY=1  \udcff")
        assert manager.read() == {"STATUS": "two lines READY=1 ?"}
        notifier.stopping("10 tunnels end", within_s=1.5)
        assert manager.read() == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "1500000", "STATUS": "10 tunnels end"}
        notifier.stopping()
        assert manager.read() == {"STOPPING": "1"}
        notifier.main_pid(123)
        assert manager.read() == {"MAINPID": "123"}
        notifier.watchdog()
        assert manager.read() == {"WATCHDOG": "1"}
        notifier.status("")
        assert manager.read_all() == []


def test_a_reload_has_the_time_at_which_it_began(manager: Manager) -> None:
    with closing(Notifier(manager.environ)) as notifier:
        before = time.monotonic_ns()
        notifier.reloading("upgrading")
        after = time.monotonic_ns()
    told = manager.read()
    assert before // 1000 <= int(told.pop("MONOTONIC_USEC")) <= after // 1000
    assert told == {"RELOADING": "1", "STATUS": "upgrading"}


@pytest.mark.parametrize(
    ("value", "is_told_of"), [(None, False), ("", False), ("relative", True), ("vsock:2:1234", True)]
)
def test_without_a_manager_nothing_happens(
    caplog: pytest.LogCaptureFixture,
    value: str | None,
    is_told_of: bool,  # noqa: FBT001
) -> None:
    with closing(Notifier({} if value is None else {"NOTIFY_SOCKET": value})) as notifier:
        assert not notifier.is_connected
        notifier.ready("ready")
        notifier.reloading()
        notifier.stopping()
        notifier.watchdog()
    assert bool(caplog.messages) is is_told_of


@pytest.mark.parametrize("address", ["/nowhere/notify", f"/{'long' * 30}"])
def test_a_manager_that_cannot_be_reached_is_told_of_once(caplog: pytest.LogCaptureFixture, address: str) -> None:
    with closing(Notifier({"NOTIFY_SOCKET": address})) as notifier:
        notifier.ready()
        notifier.watchdog()
        notifier.watchdog()
    assert [message.partition(": ")[0] for message in caplog.messages] == ["cannot notify the service manager"]


def test_without_a_descriptor_it_starts_all_the_same(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", fail)
        notifier = Notifier(manager.environ)
    notifier.ready()
    notifier.close()
    assert "Too many open files" in caplog.text


def test_no_descriptor_is_needed_later(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Notifier(manager.environ)) as notifier:
        with monkeypatch.context() as patched:
            patched.delattr(socket, "socket")
            notifier.watchdog()
        assert manager.read() == {"WATCHDOG": "1"}


async def test_a_manager_that_is_slow_gets_all_in_order_and_is_not_waited_for(manager: Manager) -> None:
    with closing(Notifier(manager.environ)) as notifier:
        filled = fill(notifier)
        notifier.ready("at last")
        got: list[dict[str, str]] = []

        def has_come() -> bool:
            got.extend(manager.read_all())
            return {"READY": "1", "STATUS": "at last"} in got

        await until(has_come)
        assert got == [*({"STATUS": str(number)} for number in range(filled)), {"READY": "1", "STATUS": "at last"}]


def fill(notifier: Notifier) -> int:
    """Send until the manager's queue is full; return how many messages were given, the last of which waits."""
    for number in range(10_000):
        notifier.status(str(number))
        if notifier._waiting:
            return number + 1
    raise AssertionError("the queue of a socket has an end")


def test_without_a_loop_what_waits_goes_with_the_next_message(manager: Manager) -> None:
    with closing(Notifier(manager.environ)) as notifier:
        filled = fill(notifier)
        assert len(manager.read_all()) == filled - 1
        notifier.ready()
        assert manager.read_all() == [{"STATUS": str(filled - 1)}, {"READY": "1"}]


async def test_what_waits_has_an_end(manager: Manager) -> None:
    with closing(Notifier(manager.environ)) as notifier:
        fill(notifier)
        for number in range(1000):
            notifier.status(f"more {number}")
        assert len(notifier._waiting) == 64
        assert notifier._waiting[-1] == b"STATUS=more 999"


# The watchdog


def watched(manager: Manager, interval_s: float, **more: str) -> dict[str, str]:
    return {**manager.environ, "WATCHDOG_USEC": str(int(interval_s * 1e6)), **more}


@pytest_asyncio.fixture
async def start(manager: Manager) -> AsyncIterator[Callable[..., Watchdog]]:
    """Return what starts a watchdog with `is_alive` and an environment; it is stopped in the end."""
    made: list[Watchdog] = []
    with ExitStack() as stack:

        def begin(is_alive: Callable[[], bool], environ: dict[str, str]) -> Watchdog:
            made.append(Watchdog(stack.enter_context(closing(Notifier(environ))), is_alive, environ))
            made[-1].start()
            return made[-1]

        yield begin
        for one in made:
            await one.stop()


async def test_the_watchdog_is_told_three_times_in_its_interval(
    manager: Manager, start: Callable[..., Watchdog], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(pause_s: float) -> None:
        pauses.append(pause_s)
        await sleep(0)

    with monkeypatch.context() as patched:
        patched.setattr(systemd.asyncio, "sleep", note)  # type: ignore[attr-defined]  # its own view of the module
        watchdog = start(lambda: True, watched(manager, 6, WATCHDOG_PID=str(os.getpid())))
        assert watchdog.interval_s == 6
        while len(pauses) < 4:
            await sleep(0)
        await watchdog.stop()
    assert set(pauses) == {2.0}
    assert manager.read_all()[:4] == [{"WATCHDOG": "1"}] * 4


async def test_who_is_not_alive_is_silent_until_it_is_again(
    manager: Manager, start: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[bool | None] = [True, False, None, False, True]
    asked = 0

    def is_alive() -> bool:
        nonlocal asked
        answer = answers[min(asked, len(answers) - 1)]
        asked += 1
        if answer is None:
            raise RuntimeError("nobody knows")
        return answer

    watchdog = start(is_alive, watched(manager, 0.03))
    await until(lambda: asked >= 6)
    await watchdog.stop()
    assert len(manager.read_all()) == asked - 3
    assert [message for message in caplog.messages if "not all of the proxy is alive" in message] == [
        "not all of the proxy is alive: unless that changes, the service manager will restart it"
    ]
    assert "nobody knows" in caplog.text


@pytest.mark.parametrize(
    ("environ", "is_told_of"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": ""}, False),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "x"}, False),
        ({"WATCHDOG_USEC": "0"}, True),
        ({"WATCHDOG_USEC": "-1"}, True),
        ({"WATCHDOG_USEC": "1_000"}, True),
        ({"WATCHDOG_USEC": "٣"}, True),
    ],
)
async def test_where_nobody_watches_nobody_is_told(
    manager: Manager,
    start: Callable[..., Watchdog],
    caplog: pytest.LogCaptureFixture,
    environ: dict[str, str],
    is_told_of: bool,  # noqa: FBT001
) -> None:
    watchdog = start(lambda: True, {**manager.environ, **environ})
    assert watchdog.interval_s is None
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert manager.read_all() == []
    assert bool(caplog.messages) is is_told_of


# Taking sockets over


def environment(count: object, **more: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "OTHER": "stays", **more}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "x", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "1"},
    ],
)
def test_what_is_meant_for_another_process_is_ignored(environ: dict[str, str]) -> None:
    environ["OTHER"] = "stays"
    assert take_listeners(environ) == []
    assert environ == {"OTHER": "stays"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (environment("x"), "LISTEN_FDS, set by the service manager, is no number of sockets"),
        (environment("0"), "LISTEN_FDS, set"),
        (environment("-1"), "LISTEN_FDS, set"),
        (environment("1_0"), "LISTEN_FDS, set"),
        (environment("٣"), "LISTEN_FDS, set"),
        (environment("9999999"), "LISTEN_FDS, set"),
        (environment("1", LISTEN_PID="x"), "LISTEN_PID, set by the service manager, is no process id"),
        (environment("1", LISTEN_PID=f"+{os.getpid()}"), "LISTEN_PID, set"),
        (environment("2", LISTEN_FDNAMES="web"), "LISTEN_FDNAMES has 1 names for the 2 sockets"),
    ],
)
def test_values_without_sense_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        take_listeners(environ)
    assert environ == {"OTHER": "stays"}


def test_a_descriptor_that_is_no_socket_is_refused(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    first = 700  # far from what this process has open
    monkeypatch.setattr(systemd, "_FIRST_DESCRIPTOR", first)
    with pytest.raises(UsageError, match=r"descriptor 700 of LISTEN_FDS \(web\) is not open"):
        take_listeners(environment(1, LISTEN_FDNAMES="web"))
    with socket.create_server(("127.0.0.1", 0)) as link, (directory / "file").open("w") as file:
        os.dup2(link.fileno(), first)
        os.dup2(file.fileno(), first + 1)
    with pytest.raises(UsageError, match=r"descriptor 701 of LISTEN_FDS \(unknown\) is no socket"):
        take_listeners(environment(2))
    with pytest.raises(OSError, match="Bad file descriptor"):  # what was taken already is closed
        os.fstat(first)
    os.close(first + 1)


# As systemd starts a process: the sockets are its descriptors from 3 on, LISTEN_PID is its own.
LAUNCH = """
import os, sys
for number, descriptor in enumerate(map(int, sys.argv[1].split(",")), 100):
    os.dup2(descriptor, number)
for number in range(len(sys.argv[1].split(","))):
    os.dup2(100 + number, 3 + number)
    os.close(100 + number)
os.environ["LISTEN_PID"] = os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
# Says what it got, then re-executes itself once.
SERVICE = """
import json, os, subprocess, sys
from stickyproxy.control.systemd import Notifier, Watchdog, take_listeners
found = take_listeners()
notifier = Notifier()
see = "import os; print([name for name in os.environ if 'LISTEN_' in name], os.path.exists('/proc/self/fd/3'))"
notifier.ready(json.dumps({
    "pid": os.getpid(),
    "sockets": [[one.name, one.link.fileno(), one.link.getsockname()[1], one.link.getblocking()] for one in found],
    "child": subprocess.run([sys.executable, "-c", see], close_fds=False, capture_output=True, text=True).stdout,
    "watchdog": Watchdog(notifier, bool).interval_s,
}))
if len(sys.argv) == 1:
    notifier.reloading()
    os.execv(sys.executable, [*sys.orig_argv, "again"])
"""


def test_sockets_are_taken_over_and_all_goes_on_after_a_re_execution(directory: Path) -> None:
    with ExitStack() as stack:
        manager = stack.enter_context(Manager(str(directory / "notify")))
        links = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [link.getsockname()[1] for link in links]
        environ = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:stickyproxy.socket", "WATCHDOG_USEC": "3000000"}
        child = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, ",".join(str(link.fileno()) for link in links), "-c", SERVICE],
            env={**ENVIRONMENT, **manager.environ, **environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[link.fileno() for link in links],
        )
        try:
            first, reloading, second = (manager.read() for _ in range(3))
            assert child.wait(DEADLINE_S) == 0
        finally:
            child.kill()
            child.wait()
    assert json.loads(first["STATUS"]) == {
        "pid": child.pid,
        "sockets": [["web", 3, ports[0], False], ["stickyproxy.socket", 4, ports[1], False]],
        "child": "[] False\n",
        "watchdog": 3.0,
    }
    assert (first["READY"], reloading["RELOADING"], second["READY"]) == ("1", "1", "1")
    assert json.loads(second["STATUS"]) == {"pid": child.pid, "sockets": [], "child": "[] False\n", "watchdog": 3.0}


# Which serves which


def listen(address: str, *, is_v6_only: bool = False) -> socket.socket:
    """Return a socket as systemd makes it for ListenStream=."""
    if address.startswith("/"):
        link = socket.socket(socket.AF_UNIX)
        link.bind(address)
    else:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        link = socket.socket(family)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_v6_only)
        link.bind((host.strip("[]"), int(port)))
    link.listen()
    return link


class Inheritance:
    """Sockets of the service manager, closed in the end; port 0 in the text of an address stands for their port."""

    def __init__(self) -> None:
        self.sockets: list[InheritedSocket] = []

    def add(self, link: socket.socket) -> socket.socket:
        self.sockets.append(InheritedSocket(f"unit-{len(self.sockets)}", link))
        return link

    def find(self, addresses: Sequence[Address]) -> dict[Address, socket.socket]:
        return match(addresses, self.sockets)


@pytest.fixture
def inheritance() -> Iterator[Inheritance]:
    made = Inheritance()
    yield made
    for one in made.sockets:
        one.link.close()


def at(link: socket.socket, host: str) -> Address:
    return parse_listener(f"{host}:{link.getsockname()[1]}")


@pytest.mark.parametrize(
    ("given", "is_v6_only", "host", "is_served"),
    [
        ("127.0.0.1:0", False, "127.0.0.1", True),
        ("127.0.0.1:0", False, "localhost", True),
        ("127.0.0.1:0", False, "127.0.0.2", False),
        ("127.0.0.1:0", False, "", False),
        ("127.0.0.1:0", False, ALL_OF_V4, False),
        ("127.0.0.1:0", False, "[::1]", False),
        ("127.0.0.1:0", False, "nowhere.invalid", False),
        (f"{ALL_OF_V4}:0", False, ALL_OF_V4, True),
        (f"{ALL_OF_V4}:0", False, "", True),
        (f"{ALL_OF_V4}:0", False, "[::]", True),
        (f"{ALL_OF_V4}:0", False, "127.0.0.1", False),
        ("[::]:0", False, "", True),
        ("[::]:0", False, "[::]", True),
        ("[::]:0", False, ALL_OF_V4, True),
        ("[::]:0", False, "127.0.0.1", False),
        ("[::]:0", False, "[::1]", False),
        ("[::]:0", True, "", True),
        ("[::]:0", True, "[::]", True),
        ("[::]:0", True, ALL_OF_V4, False),
        ("[::1]:0", False, "[::1]", True),
        ("[::1]:0", True, "[0:0:0:0:0:0:0:1]", True),
        ("[::1]:0", False, "127.0.0.1", False),
    ],
)
def test_what_serves_an_address(
    inheritance: Inheritance,
    given: str,
    is_v6_only: bool,  # noqa: FBT001
    host: str,
    is_served: bool,  # noqa: FBT001
) -> None:
    link = inheritance.add(listen(given, is_v6_only=is_v6_only))
    address = at(link, host)
    assert inheritance.find([address]) == ({address: link} if is_served else {})
    assert (link.fileno() == -1) is not is_served


@pytest.mark.parametrize("port", [0, 1])
def test_another_port_serves_nothing(inheritance: Inheritance, port: int) -> None:
    inheritance.add(listen("127.0.0.1:0"))
    assert inheritance.find([Address("127.0.0.1", port)]) == {}


def test_a_unix_socket_is_known_by_its_place(inheritance: Inheritance, directory: Path) -> None:
    (directory / "link").symlink_to(directory)
    link = inheritance.add(listen(f"{directory}/s"))
    inheritance.add(listen(f"{directory}/other"))
    address = Address(path=f"{directory}/link/s")
    assert inheritance.find([Address("", 80), address]) == {address: link}
    assert (directory / "other").exists()


def test_what_fits_exactly_comes_first(inheritance: Inheritance) -> None:
    """Two listeners, and two sockets of the same port: neither takes what is the other's."""
    four = inheritance.add(listen(f"{ALL_OF_V4}:0"))
    six = inheritance.add(listen(f"[::]:{four.getsockname()[1]}", is_v6_only=True))
    for hosts in (("", ALL_OF_V4), (ALL_OF_V4, "")):
        addresses = [at(four, host) for host in hosts]
        assert inheritance.find(addresses) == {at(four, ""): six, at(four, ALL_OF_V4): four}
    assert inheritance.find([at(four, ALL_OF_V4)]) == {at(four, ALL_OF_V4): four}


def test_what_nobody_asked_for_is_closed_and_told(
    inheritance: Inheritance, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    used = inheritance.add(listen("127.0.0.1:0"))
    spare = inheritance.add(listen("127.0.0.1:0"))
    expected = [
        f"the socket 127.0.0.1:{used.getsockname()[1]} of unit-0 serves the listener {at(used, '127.0.0.1')}",
        f"the socket 127.0.0.1:{spare.getsockname()[1]} of unit-1 is in no listener of the configuration: it is closed",
    ]
    address = at(used, "127.0.0.1")
    # What is no listener, though at the address of one: a datagram socket, a bound one, and a connection.
    datagram = inheritance.add(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    datagram.bind(("127.0.0.1", address.port))
    bound = inheritance.add(socket.socket(socket.AF_UNIX))
    bound.bind(f"{directory}/s")
    client = socket.create_connection(("127.0.0.1", address.port))
    connection = inheritance.add(used.accept()[0])
    abstract = inheritance.add(socket.socket(socket.AF_UNIX))
    abstract.bind(f"\0{directory}")
    abstract.listen()
    pair = socket.socketpair()
    inheritance.add(pair[0])
    wanted = [address, Address(path=f"{directory}/s"), Address(path=str(directory))]
    with client, pair[1]:
        assert inheritance.find(wanted) == {address: used}
    assert caplog.messages[:2] == expected
    assert [message.partition(" of unit-")[2] for message in caplog.messages[2:]] == [
        "2 is no listening stream socket: it is closed",
        "3 is no listening stream socket: it is closed",
        "4 is no listening stream socket: it is closed",
        "5 is in no listener of the configuration: it is closed",
        "6 is no listening stream socket: it is closed",
    ]
    assert used.fileno() >= 0
    assert {one.fileno() for one in (spare, datagram, bound, connection, abstract, pair[0])} == {-1}


# The units


def directives(unit: str) -> dict[str, list[str]]:
    """Return the values of each directive of a unit, in order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"|\[[A-Z][a-z]+\]|#.*|[A-Za-z0-9]+=.*", line), line
        if not line.startswith(("#", "[")) and line:
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_service_is_what_this_program_speaks() -> None:
    service = directives("stickyproxy.service")
    assert service["Type"] == ["notify"]
    assert service["NotifyAccess"] == ["main"]
    assert service["RuntimeDirectory"] == service["StateDirectory"] == ["stickyproxy"]
    for line in (*service["ExecStart"], *service["ExecReload"]):
        program, command, *options = line.split()
        assert program == "/opt/stickyproxy/bin/stickyproxy"
        known = {name for option in main.commands[command].params for name in option.opts}
        assert {option for option in options if option.startswith("-")} <= known


def test_the_sockets_are_those_of_the_listeners_named_beside_them(inheritance: Inheritance) -> None:
    """The ports are free ones here; the rest is as in the unit."""
    unit = directives("stickyproxy.socket")
    text = (UNITS / "stickyproxy.socket").read_text(encoding="utf-8")
    assert re.findall(r'- {address: "(.*?)"', text) == [f":{port}" for port in unit["ListenStream"]]
    assert unit["BindIPv6Only"] == ["both"]
    links = [inheritance.add(listen("[::]:0")) for _ in unit["ListenStream"]]
    addresses = [at(link, "") for link in links]
    assert inheritance.find(addresses) == dict(zip(addresses, links, strict=True))


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze (Debian: systemd)"
)


def analyze(directory: Path, *changes: tuple[str, str]) -> str:
    """Return what systemd says of the units, with a program that exists in the place of ours, and more changes."""
    for path in UNITS.iterdir():
        text = path.read_text(encoding="utf-8").replace("/opt/stickyproxy/bin/stickyproxy", "/usr/bin/env stickyproxy")
        for before, after in changes:
            text = text.replace(before, after)
        (directory / path.name).write_text(text, encoding="utf-8")
    units = sorted(str(path) for path in directory.iterdir())
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return f"{result.stdout}{result.stderr}"


@needs_systemd
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("", "", ""),
        ("#Requires=", "Requires=", ""),
        ("#CapabilityBoundingSet=", "CapabilityBoundingSet=", ""),
        ("ProtectHome=yes", "ProtectHouse=yes", "Unknown key 'ProtectHouse'"),
        ("ProtectHome=yes", "ProtectHome=perhaps", "perhaps"),
        ("@system-service", "@no-service", "no-service"),
        ("BindIPv6Only=both", "BindIPv6Only=maybe", "maybe"),
    ],
)
def test_systemd_reads_the_units(directory: Path, before: str, after: str, expected: str) -> None:
    told = analyze(directory, (before, after) if before else ("", ""))
    if expected:
        assert expected in told
    else:
        assert told == ""


# What the service forbids, laid upon a process here as systemd does it: by seccomp, prctl and the bounding set.
SANDBOX = """
import ctypes, json, os, socket, sys
plan = json.loads(sys.argv[1])
libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
class Compare(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]
def prctl(option, value):
    arguments = [ctypes.c_ulong(one) for one in (value, 0, 0, 0)]
    if libc.prctl(option, *arguments):
        sys.exit(f"prctl {option}: {os.strerror(ctypes.get_errno())}")
for capability in range(int(open("/proc/sys/kernel/cap_last_cap").read()) + 1 if os.geteuid() == 0 else 0):
    prctl(24, capability)
prctl(38, 1)
if plan["is_code_fixed"]:
    prctl(65, 1)
seccomp.seccomp_init.restype = ctypes.c_void_p
filter = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(0x00050000 | 1)))
ALLOW = ctypes.c_uint32(0x7FFF0000)
for name in plan["calls"]:
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    if number < 0:
        continue
    if name == "socket":
        for family in plan["families"]:
            compare = Compare(0, 4, getattr(socket, family), 0)
            assert seccomp.seccomp_rule_add_array(filter, ALLOW, number, 1, ctypes.byref(compare)) == 0
    else:
        assert seccomp.seccomp_rule_add_array(filter, ALLOW, number, 0, None) == 0
assert seccomp.seccomp_load(filter) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
# Does once what the proxy does, and what it must not; says what came of each.
BEHAVE = """
import ctypes, json, mmap, os, resource, socket, subprocess, sys
import stickyproxy.cli  # with all libraries
import uvloop
done = {}
def attempt(what):
    def run(function):
        try:
            done[what] = function() or "ok"
        except OSError as error:
            done[what] = os.strerror(error.errno)
    return run
@attempt("shared memory")
def _():
    descriptor = os.memfd_create("x")
    os.ftruncate(descriptor, 4096)
    mmap.mmap(descriptor, 4096)[0] = 1
@attempt("pass descriptors")
def _():
    one, other = socket.socketpair()
    socket.send_fds(one, [b"x"], [0, 1])
    assert len(socket.recv_fds(other, 1, 2)[1]) == 2
@attempt("unix socket")
def _():
    socket.socket(socket.AF_UNIX).close()
@attempt("more descriptors")
def _():
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
@attempt("workers")
def _():
    assert subprocess.run([sys.executable, "-c", "pass"], start_new_session=True).returncode == 0
@attempt("look up")
def _():
    socket.getaddrinfo("localhost", 80)
@attempt("loop")
def _():
    async def serve():
        import asyncio
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.close()
        server.close()
        await asyncio.to_thread(os.getpid)
    uvloop.run(serve())
@attempt("packet socket")
def _():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
@attempt("netlink socket")
def _():
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
@attempt("mount")
def _():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, b"/proc", None, ctypes.c_ulong(32), None):
        raise OSError(ctypes.get_errno(), "")
@attempt("made code")
def _():
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
done["round"] = len(sys.argv)
done["pid"] = os.getpid()
print(json.dumps(done), flush=True)
if len(sys.argv) == 1:
    os.execv(sys.executable, [*sys.orig_argv, "again"])
"""


def allowed_calls(group: str) -> set[str]:
    """Return the system calls of a group of systemd, such as @system-service."""
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    names = {line.strip() for line in listed.stdout.splitlines()[1:]} - {""}
    names = {name for name in names if not name.startswith("#")}
    return names.union(*(allowed_calls(name) for name in names if name.startswith("@")))


def sandbox(program: Sequence[str]) -> list[str]:
    """Return the command that runs a Python program with what the service forbids."""
    service = directives("stickyproxy.service")
    assert service["SystemCallErrorNumber"] == ["EPERM"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert (service["CapabilityBoundingSet"], service["AmbientCapabilities"]) == ([""], [""])
    plan = {
        "calls": sorted(set().union(*(allowed_calls(group) for group in service["SystemCallFilter"]))),
        "families": service["RestrictAddressFamilies"][0].split(),
        "is_code_fixed": service["MemoryDenyWriteExecute"] == ["yes"],
    }
    return [sys.executable, "-c", SANDBOX, json.dumps(plan), *program]


def can_sandbox() -> bool:
    probe = "import ctypes, sys; ctypes.CDLL('libseccomp.so.2'); sys.exit(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0))"
    is_possible = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0
    return is_possible and shutil.which("systemd-analyze") is not None


needs_sandbox = pytest.mark.skipif(not can_sandbox(), reason="needs systemd-analyze, libseccomp2 and Linux 6.3")


def behave(command: list[str]) -> list[dict[str, Any]]:
    result = subprocess.run(
        command,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


NEEDED = ("shared memory", "pass descriptors", "unix socket", "more descriptors", "workers", "look up", "loop")


@needs_sandbox
def test_what_the_service_forbids_is_not_needed() -> None:
    first, second = behave(sandbox(["-c", BEHAVE]))
    assert (first.pop("round"), second.pop("round")) == (1, 2)
    assert first == second  # the process id too
    first.pop("pid")
    assert first == {
        **dict.fromkeys(NEEDED, "ok"),
        "packet socket": "Operation not permitted",
        "netlink socket": "Operation not permitted",
        "mount": "Operation not permitted",
        "made code": "Permission denied",
    }
    outside, _ = behave([sys.executable, "-c", BEHAVE])  # the control: what is forbidden inside is possible here
    assert outside["made code"] == outside["netlink socket"] == "ok"
    assert {outside[one] for one in NEEDED} == {"ok"}


@needs_sandbox
def test_the_proxy_serves_within_what_the_service_forbids(tmp_path: Path) -> None:
    port, admin_port, app_port = free_port(), free_port(), free_port()
    addresses = ["--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin_port}"]
    app = f"http://127.0.0.1:{app_port}"
    with Children(tmp_path) as children:
        # Outside: only the proxy is in the sandbox.
        children.start("app", [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(app_port)])
        child = children.start(
            "proxy",
            sandbox(["-m", "stickyproxy", "serve", *addresses, app]),
            env={"PYTHONPATH": str(ROOT), "STATE_DIRECTORY": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        )
        child.wait_until_ready(f"http://127.0.0.1:{admin_port}/livez")
        child.wait_until_ready(f"http://127.0.0.1:{port}/")
        os.kill(child.pid, signal.SIGTERM)  # only the main process, as with KillMode=mixed
        assert child.wait() == 0, child.log_tail()
