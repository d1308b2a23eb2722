"""Listening sockets that outlive who accepts: all or none, and a file is removed only where it is our own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from stickyproxy.config import Address
from stickyproxy.control.sockets import Sockets
from stickyproxy.errors import UsageError
from tests.helpers.loops import no_leak

LOOPBACK = Address("127.0.0.1", 0)


@pytest.fixture
def unix(tmp_path: Path) -> Address:
    return Address(path=str(tmp_path / "proxy.sock"))


def knock(address: Address) -> socket.socket:
    """Connect, which the kernel does where somebody listens."""
    family = socket.AF_UNIX if address.is_unix else socket.AF_INET
    link = socket.socket(family, socket.SOCK_STREAM)
    link.settimeout(30)
    link.connect(address.path if address.is_unix else (address.host, address.port))
    return link


def test_clients_can_connect_before_anybody_accepts(unix: Address) -> None:
    with no_leak():
        sockets = Sockets()
        assert sockets.open([LOOPBACK, unix]) == (LOOPBACK, unix)
        real = sockets.real_address(LOOPBACK)
        assert real.port > 0
        assert sockets.real_address(unix) == unix
        for address in (real, unix):
            knock(address).close()
        assert not any(sockets[one].getblocking() for one in sockets)
        assert not any(sockets[one].get_inheritable() for one in sockets)
        sockets.close_all()


def test_many_clients_wait_in_the_queue(unix: Address) -> None:
    """With the queue of 128 that the standard library chooses, the last ones would have to wait or be refused."""
    sockets = Sockets()
    sockets.open([unix])
    most = int(Path("/proc/sys/net/core/somaxconn").read_text(encoding="ascii"))
    links = [knock(unix) for _ in range(min(500, most))]
    for link in links:
        link.close()
    sockets.close_all()


def test_those_that_are_bound_already_stay() -> None:
    sockets = Sockets()
    sockets.open([LOOPBACK])
    link, other = sockets[LOOPBACK], Address("127.0.0.2", 0)
    assert sockets.open([LOOPBACK, other]) == (other,)
    assert sockets[LOOPBACK] is link
    assert list(sockets) == [LOOPBACK, other]
    assert LOOPBACK in sockets
    assert Address("127.0.0.3", 0) not in sockets
    assert sockets.choose([other]) == {other: sockets[other]}
    assert "127.0.0.1:0, 127.0.0.2:0" in repr(sockets)
    sockets.close_all()
    assert list(sockets) == []


def test_all_are_opened_or_none(unix: Address) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, no_leak():
        sockets = Sockets()
        sockets.open([Address("127.0.0.2", 0)])
        busy = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UsageError, match="the address is in use"):
            sockets.open([LOOPBACK, unix, busy])
        assert list(sockets) == [Address("127.0.0.2", 0)]
        assert not _exists(unix)
        sockets.close_all()


def _exists(address: Address) -> bool:
    return os.path.lexists(address.path)


def test_one_that_is_bound_and_about_to_listen_is_in_use() -> None:
    """With SO_REUSEADDR a second socket can be bound as long as neither listens; only one may come to."""
    first = socket.socket()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    first.bind(("127.0.0.1", 0))
    address = Address("127.0.0.1", first.getsockname()[1])
    with first, no_leak():
        sockets = Sockets()
        bind = socket.socket.listen

        def listen_later(link: socket.socket, backlog: int) -> None:
            if link is not first:
                bind(first, 1)
            bind(link, backlog)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "listen", listen_later)
            with pytest.raises(UsageError, match="is another proxy starting"):
                sockets.open([address])
        assert list(sockets) == []


def test_the_file_of_a_unix_socket_goes_with_it(unix: Address) -> None:
    sockets = Sockets()
    sockets.open([unix])
    assert _exists(unix)
    sockets.close([unix, LOOPBACK])
    assert not _exists(unix)
    sockets.open([unix])
    sockets.close_all()
    assert not _exists(unix)


def test_the_file_of_another_proxy_at_the_same_path_stays(unix: Address, tmp_path: Path) -> None:
    ours, theirs = Sockets(), Sockets()
    ours.open([unix])
    (tmp_path / "proxy.sock").unlink()
    theirs.open([unix])
    ours.close_all()
    assert _exists(unix)
    knock(unix).close()
    theirs.close_all()
    assert not _exists(unix)


def test_a_file_that_is_gone_is_no_error(unix: Address, tmp_path: Path) -> None:
    sockets = Sockets()
    sockets.open([unix])
    (tmp_path / "proxy.sock").unlink()
    sockets.close_all()


def test_inherited_ones_are_used_and_not_bound(unix: Address) -> None:
    before = Sockets()
    before.open([LOOPBACK, unix])
    inherited = {address: before[address].dup() for address in before}
    sockets = Sockets(inherited)
    assert sockets.open([LOOPBACK, unix]) == ()
    assert sockets.real_address(LOOPBACK) == before.real_address(LOOPBACK)
    for address in before:
        before[address].close()
    knock(unix).close()
    sockets.close([unix])
    assert not _exists(unix)
    sockets.close_all()
