"""Places: a port that nobody else gets until the app does, and sockets that nobody else reaches."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import stat
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

from stickyproxy.config import Address
from stickyproxy.config.run import PortRange
from stickyproxy.control.runner.places import Place, Places
from stickyproxy.errors import UsageError
from tests.helpers.loops import no_leak

if TYPE_CHECKING:
    from collections.abc import Iterator

LOWEST, HIGHEST = 10_000, 19_999  # below what the system and other tests take


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a directory with a short path, private as the runtime directory of a proxy is."""
    with TemporaryDirectory(prefix="places-") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    with no_leak():
        yield


def free_range(size: int) -> PortRange:
    """Return ports side by side that were free a moment ago."""
    while True:
        first = LOWEST + secrets.randbelow(HIGHEST - LOWEST - size)
        with ExitStack() as stack:
            try:
                for port in range(first, first + size):
                    stack.enter_context(closing(socket.create_server(("127.0.0.1", port))))
            except OSError:
                continue
        return PortRange(first, first + size - 1)


def listen(port: int, host: str = "127.0.0.1", *, reuses: bool = True) -> socket.socket:
    """Listen as a server does; most ask for SO_REUSEADDR."""
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuses))
        server.bind((host, port))
        server.listen()
    except OSError:
        server.close()
        raise
    return server


def from_the_first(ports: PortRange, directory: Path) -> Places:
    """Return places that look at the first port first; where they begin is random else."""
    places = Places(ports, directory)
    places._next = 0
    return places


def is_taken(port: int, *, reuses: bool) -> bool:
    try:
        listen(port, reuses=reuses).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return True
    return False


def leave_time_wait(port: int) -> None:
    """Leave the end of a connection at a port: whoever closes first keeps it for a minute."""
    with listen(port) as server, socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""


# Ports


def test_a_port_is_of_the_range_and_has_its_address(directory: Path) -> None:
    ports = free_range(2)
    place = Places(ports, directory).take("g1-1", uses_socket=False)
    assert place.port is not None
    assert ports.first <= place.port <= ports.last
    assert place.address == Address("127.0.0.1", place.port)
    assert place.socket is None
    assert repr(place) == f"<Place 127.0.0.1:{place.port} held>"
    place.release()


@pytest.mark.parametrize("reuses", [False, True])
def test_a_port_is_held_until_it_is_let_go(directory: Path, *, reuses: bool) -> None:
    place = Places(free_range(1), directory).take("g1-1", uses_socket=False)
    assert place.port is not None
    assert place.is_held
    assert is_taken(place.port, reuses=reuses)
    place.let_go()
    assert not place.is_held
    assert not is_taken(place.port, reuses=reuses)
    place.let_go()
    place.release()


def test_a_held_port_refuses_connections_and_is_not_inherited(directory: Path) -> None:
    place = Places(free_range(1), directory).take("g1-1", uses_socket=False)
    assert place.port is not None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", place.port))
    assert place._hold is not None
    assert not place._hold.get_inheritable()
    place.release()


def test_a_port_is_not_given_again_before_it_is_released(directory: Path) -> None:
    places = Places(free_range(3), directory)
    taken = [places.take(f"g1-{number}", uses_socket=False) for number in range(1, 4)]
    assert {place.port for place in taken} == set(range(places.ports.first, places.ports.last + 1))
    for place in taken:
        place.let_go()
    message = f"no port from {places.ports.first} to {places.ports.last} is free: app processes have 3, and others"
    with pytest.raises(UsageError, match=message):
        places.take("g1-4", uses_socket=False)
    taken[1].release()
    again = places.take("g1-4", uses_socket=False)
    assert again.port == taken[1].port
    taken[1].release()  # of one that has it no more: the port is still taken
    with pytest.raises(UsageError):
        places.take("g1-5", uses_socket=False)
    for place in (taken[0], again, taken[2]):
        place.release()


def test_another_range_holds_from_the_next_port_on(directory: Path) -> None:
    places = Places(free_range(50), directory)
    places._next = 49
    place = places.take("g1-1", uses_socket=False)
    assert place.port == places.ports.last
    places._next = 49
    places.ports = free_range(2)
    taken = [places.take(f"g1-{number}", uses_socket=False) for number in (2, 3)]
    assert {one.port for one in taken} == set(places.ports)
    for one in (place, *taken):
        one.release()


def test_a_port_rests_before_it_is_given_again(directory: Path) -> None:
    places = Places(free_range(4), directory)
    seen = []
    for _ in range(4):
        place = places.take("g1-1", uses_socket=False)
        seen.append(place.port)
        place.release()
    assert len(set(seen)) == 4


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.0.0.2", "::", "::1"])  # noqa: S104 -- that others may have
def test_a_port_that_others_have_anywhere_is_passed_over(directory: Path, host: str) -> None:
    ports = free_range(2)
    try:
        server = listen(ports.first, host)
    except OSError as error:
        pytest.skip(f"cannot listen at {host}: {error}")
    with server:
        places = from_the_first(ports, directory)
        place = places.take("g1-1", uses_socket=False)
        assert place.port == ports.last
        with pytest.raises(UsageError, match="app processes have 1, and others the rest"):
            places.take("g1-2", uses_socket=False)
        place.release()


def test_two_proxies_do_not_take_the_same_port(directory: Path) -> None:
    ports = free_range(2)
    taken = [from_the_first(ports, directory).take("g1-1", uses_socket=False) for _ in range(2)]
    assert [place.port for place in taken] == [ports.first, ports.last]
    with pytest.raises(UsageError, match=r"is free: widen ports: of the section run, or use \{socket\}"):
        Places(ports, directory).take("g1-1", uses_socket=False)
    for place in taken:
        place.release()


def test_a_port_with_the_end_of_a_connection_is_the_last_choice(directory: Path) -> None:
    ports = free_range(3)
    leave_time_wait(ports.first)
    assert is_taken(ports.first, reuses=False), "the control: it stands in the way of a plain bind"
    places = from_the_first(ports, directory)
    taken = [places.take(f"g1-{number}", uses_socket=False) for number in range(1, 4)]
    assert taken[-1].port == ports.first
    assert is_taken(ports.first, reuses=True), "it is held as any other"
    taken[-1].let_go()
    assert not is_taken(ports.first, reuses=True)
    for place in taken:
        place.release()


def test_ports_that_this_user_may_not_bind_are_said_so(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Places, "_bind", refuse)
    with pytest.raises(UsageError, match="no port from 1 to 3 is free: this user may not bind any"):
        Places(PortRange(1, 3), directory).take("g1-1", uses_socket=False)


def test_another_fault_is_said_as_what_it_is(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Places, "_bind", refuse)
    with pytest.raises(UsageError, match="cannot look for a free port: too many open files"):
        Places(PortRange(20_000, 20_001), directory).take("g1-1", uses_socket=False)


def test_without_ipv6_ports_are_found_all_the_same(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    ports = free_range(2)
    with listen(ports.first):
        place = from_the_first(ports, directory).take("g1-1", uses_socket=False)
        assert place.port == ports.last
        assert is_taken(ports.last, reuses=True)
        place.release()


# Sockets


@pytest.fixture
def places(directory: Path) -> Iterator[Places]:
    made = Places(PortRange(20_000, 29_999), directory)
    yield made
    made.close()


def bind(place: Place) -> None:
    """Leave the file that an app leaves which is killed."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.socket))


def test_a_socket_stands_in_a_private_directory(directory: Path, places: Places) -> None:
    place = places.take("g1-1", uses_socket=True)
    assert place.socket == directory / f"apps-{os.getpid()}" / "g1-1.sock"
    assert place.port is None
    assert place.address == Address(path=str(place.socket))
    assert stat.S_IMODE(place.socket.parent.stat().st_mode) == 0o700
    assert not place.socket.exists()
    assert not place.is_held
    place.let_go()
    bind(place)


def test_the_directory_is_made_only_for_sockets(directory: Path) -> None:
    place = Places(free_range(1), directory).take("g1-1", uses_socket=False)
    assert list(directory.iterdir()) == []
    place.release()


def test_a_released_socket_is_removed(places: Places) -> None:
    place = places.take("g1-1", uses_socket=True)
    assert place.socket is not None
    bind(place)
    place.release()
    assert not place.socket.exists()
    again = places.take("g1-1", uses_socket=True)
    assert again.socket is not None
    assert again.socket != place.socket, "an upstream that is waited for would seem to be back before it is ready"
    bind(again)
    place.release()  # of one that has none any more: the other file stays
    assert again.socket.exists()
    again.release()
    again.release()


def test_a_path_is_never_given_twice(places: Places) -> None:
    first, second, third = (places.take("g1-1", uses_socket=True) for _ in range(3))
    assert [place.socket.name for place in (first, second, third) if place.socket] == [
        "g1-1.sock", "g1-1-2.sock", "g1-1-3.sock",
    ]  # fmt: skip


def test_what_a_dead_proxy_left_is_removed(directory: Path, places: Places) -> None:
    former = Places(places.ports, directory)
    left = former.take("g1-1", uses_socket=True)
    bind(left)
    former.close()  # its lock ends with it
    place = places.take("g1-1", uses_socket=True)
    assert place.socket == left.socket
    bind(place)  # the control: it fails while the file is there
    with pytest.raises(OSError, match="in use"):
        bind(place)


def test_what_a_living_proxy_has_is_left_alone(directory: Path, places: Places) -> None:
    """It may have the same process id, in a container of its own."""
    other = Places(places.ports, directory)
    theirs, ours = other.take("g1-1", uses_socket=True), places.take("g1-1", uses_socket=True)
    assert theirs.socket != ours.socket
    bind(theirs)
    bind(ours)
    other.close()


def test_what_cannot_be_removed_is_said(directory: Path, places: Places) -> None:
    (directory / f"apps-{os.getpid()}" / "g1-1.sock").mkdir(parents=True)
    (directory / f"apps-{os.getpid()}").chmod(0o700)
    with pytest.raises(UsageError, match=r"cannot remove .*/g1-1\.sock, which is in the way: "):
        places.take("g1-1", uses_socket=True)


def test_a_socket_that_cannot_be_removed_is_logged(places: Places, caplog: pytest.LogCaptureFixture) -> None:
    place = places.take("g1-1", uses_socket=True)
    assert place.socket is not None
    place.socket.mkdir()
    place.release()
    assert "cannot remove the socket" in caplog.text


def test_an_id_leads_nowhere_else(directory: Path, places: Places) -> None:
    place = places.take("../a b/\n", uses_socket=True)
    assert place.socket is not None
    assert place.socket.parent == directory / f"apps-{os.getpid()}"
    assert place.socket.name == ".._a_b__.sock"


def test_a_path_that_the_kernel_does_not_take_is_refused(directory: Path) -> None:
    long = directory / ("x" * (107 - len(str(directory / "x" / f"apps-{os.getpid()}" / "g1-1.sock")) + 1))
    long.mkdir()
    places = Places(PortRange(20_000, 29_999), long)
    fits = places.take("g1-1", uses_socket=True)
    assert len(str(fits.socket)) == 107
    bind(fits)
    with pytest.raises(UsageError, match="has more than 107 bytes; set RUNTIME_DIRECTORY to a shorter one"):
        places.take("g1-10", uses_socket=True)
    places.close()


def test_the_directory_goes_at_the_end(directory: Path, places: Places) -> None:
    place = places.take("g1-1", uses_socket=True)
    bind(place)
    place.release()
    places.close()
    places.close()
    assert list(directory.iterdir()) == []


# Another image of this process


def left_by(place: Place) -> Any:
    return json.loads(json.dumps(place.leave()))


def test_a_port_is_adopted(directory: Path) -> None:
    former = Places(free_range(1), directory)
    place = former.take("g1-1", uses_socket=False)
    place.let_go()
    places = Places(former.ports, directory)
    adopted = places.adopt("g1-1", left_by(place))
    assert (adopted.port, adopted.address, adopted.is_held) == (place.port, place.address, False)
    with pytest.raises(UsageError):
        places.take("g1-2", uses_socket=False)
    adopted.release()
    places.take("g1-2", uses_socket=False).release()


def test_a_socket_is_adopted(directory: Path, places: Places) -> None:
    former = Places(places.ports, directory)
    place = former.take("g1-1", uses_socket=True)
    bind(place)
    later = places
    later.resume(json.loads(json.dumps(former.leave())))
    adopted = later.adopt("g1-1", left_by(place))
    assert adopted.address == place.address
    other = later.take("g1-1", uses_socket=True)
    assert other.socket != place.socket
    assert adopted.socket is not None
    assert adopted.socket.exists()
    adopted.release()
    assert not adopted.socket.exists()


@pytest.mark.parametrize(
    "left", [{}, {"port": "1", "socket": None}, {"port": None, "socket": None}, {"port": 1, "socket": "/x"}]
)
def test_what_is_no_place_is_not_adopted(places: Places, left: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="where app process g1-1 listens cannot be told"):
        places.adopt("g1-1", left)
