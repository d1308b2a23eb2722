"""Listeners: what can be bound and what cannot, and what is known of a client from its connection."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from ipaddress import ip_network
from typing import TYPE_CHECKING, cast

import pytest

from stickyproxy.config import Address
from stickyproxy.errors import UsageError
from stickyproxy.proxy import listener as listener_module
from stickyproxy.proxy.listener import Listener, Role, _explain, bind
from stickyproxy.proxy.settings import Settings
from stickyproxy.wire.proxy_protocol import ProxyHeader
from tests.helpers.plane import LOOPBACK
from tests.helpers.raw import GET, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.plane import PlaneUnderTest, Start


class _Transport:
    def __init__(self, peer: object) -> None:
        self.peer = peer

    def get_extra_info(self, name: str) -> object:
        assert name == "peername"
        return self.peer


def transport(peer: object) -> asyncio.BaseTransport:
    return cast("asyncio.BaseTransport", _Transport(peer))


# Binding


def test_the_system_chooses_a_port_for_port_0() -> None:
    with bind(LOOPBACK) as link:
        host, port = link.getsockname()
        assert host == "127.0.0.1"
        assert port > 0


def test_an_address_in_use_is_named() -> None:
    with bind(LOOPBACK) as link:
        link.listen()
        port = link.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127.0.0.1:{port}: the address is in use; is another"):
            bind(Address("127.0.0.1", port))


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        bind(Address("192.0.2.1", 0))


def test_a_privileged_port_is_explained() -> None:
    assert "need a privilege" in _explain(PermissionError(errno.EACCES, "Permission denied"))
    assert _explain(OSError("Odd")) == "odd"


def test_all_interfaces_are_both_families() -> None:
    with bind(Address("", 0)) as link:
        link.listen()
        port = link.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port)).close()


def test_one_family_is_only_that() -> None:
    with bind(Address("::1", 0)) as link:
        assert link.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


# Unix sockets


def test_the_socket_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    bind(Address(path=str(path))).close()
    assert path.exists()
    bind(Address(path=str(path))).close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_the_socket_of_a_living_process_is_not(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "proxy.sock"
    with socket.socket(socket.AF_UNIX, kind) as alive:
        alive.bind(str(path))
        if kind == socket.SOCK_STREAM:
            alive.listen()
        with pytest.raises(UsageError, match="is another proxy running"):
            bind(Address(path=str(path)))
        assert path.exists()


def test_a_file_is_no_socket_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    path.write_text("precious")
    with pytest.raises(UsageError):
        bind(Address(path=str(path)))
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        bind(Address(path=str(tmp_path / "none" / "proxy.sock")))


# Listening


async def test_a_closed_listener_accepts_nobody_and_keeps_who_is_there(proxy: PlaneUnderTest) -> None:
    listener = await proxy.listen()
    client = await proxy.client(listener)
    client.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await proxy.client(listener)
    app.answer(b"still")
    assert (await client.read_response()).body == b"still"


async def test_a_listener_that_never_began_can_be_closed(proxy: PlaneUnderTest) -> None:
    with bind(LOOPBACK) as link:
        Listener(proxy.plane, link, LOOPBACK).close()


async def test_a_unix_socket_listens_and_its_file_is_left_to_its_owner(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    proxy = await start(settings=Settings(trusts_unix=True))
    listener = await proxy.listen(Address(path=str(path)))
    assert listener.port == ""
    client = await proxy.client(listener)
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.1\r\n\r\n")
    app = await proxy.upstream.accept()
    got = await app.read_request()
    assert got["X-Forwarded-For"] == "203.0.113.1, unix"
    assert "X-Forwarded-Port" not in got
    app.answer(b"hello")
    assert (await client.read_response()).body == b"hello"
    assert (await proxy.recorded()).client == "203.0.113.1"
    listener.close()
    assert path.exists()
    with pytest.raises(ConnectionRefusedError):
        await proxy.client(listener)


async def test_ipv6_listens(proxy: PlaneUnderTest) -> None:
    listener = await proxy.listen(Address("::1", 0))
    client = await proxy.client(listener)
    client.send(GET)
    app = await proxy.upstream.accept()
    got = await app.read_request()
    assert got["X-Forwarded-For"] == "::1"
    assert got["X-Forwarded-Port"] == listener.port
    app.answer()
    assert (await client.read_response()).status == 200


async def test_clients_wait_while_a_listener_pauses(proxy: PlaneUnderTest, tmp_path: Path) -> None:
    for address in (LOOPBACK, Address(path=str(tmp_path / "proxy.sock"))):
        listener = await proxy.listen(address)
        before = await proxy.client(listener)
        await eventually(lambda: proxy.plane.downstreams)
        accepted = proxy.plane.counters.connections
        for _ in range(3):
            listener.pause()
            listener.pause()
            clients = [(await proxy.client(listener)).send(GET) for _ in range(5)]
            before.send(GET)
            app = await proxy.upstream.accept()
            await app.read_request()
            app.answer(b"open", "Connection: close")
            assert (await before.read_response()).body == b"open"
            assert proxy.plane.counters.connections == accepted
            await asyncio.gather(listener.start(), listener.start())
            for _ in clients:
                app = await proxy.upstream.accept()
                await app.read_request()
                app.answer(b"late", "Connection: close")
            for client in clients:
                assert (await client.read_response()).body == b"late"
            accepted += len(clients)
            assert proxy.plane.counters.connections == accepted
        before.close()
        await eventually(lambda before=before: before.is_lost)  # type: ignore[misc]


async def test_a_closed_listener_does_not_start_again(proxy: PlaneUnderTest) -> None:
    listener = await proxy.listen()
    listener.pause()
    listener.close()
    await listener.start()
    with pytest.raises(ConnectionRefusedError):
        await proxy.client(listener)


async def test_a_role_of_its_own_from_the_next_connection_on(proxy: PlaneUnderTest) -> None:
    """As when its certificate is renewed: who is connected already sees nothing of it."""
    listener = await proxy.listen()
    before = await proxy.client(listener)
    before.send(GET)
    app = await proxy.upstream.accept()
    await app.read_request()
    listener.role = Role(proxy_protocol=True)
    app.answer(b"before")
    assert (await before.read_response()).body == b"before"
    after = await proxy.client(listener)
    await after.read_rest()
    assert proxy.plane.counters.handshakes == {"proxy_protocol_refused": 1}


async def test_another_role_and_other_settings_count_from_the_next_connection_on(start: Start) -> None:
    proxy = await start()
    listener = proxy.listeners[0]
    before = await proxy.client()
    before.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.1\r\n\r\n")
    app = await proxy.upstream.accept()
    assert (await app.read_request())["X-Forwarded-For"] == "127.0.0.1"
    app.answer()
    await before.read_response()
    proxy.plane.change_settings(Settings(trusted=(ip_network("127.0.0.0/8"),)))
    kept = listener.forwarded_writer(transport(("127.0.0.1", 1)))
    assert not kept.origin.is_trusted, "what is known of a client is shared, and so as it was"
    listener.change_role(Role(redirect_to_https=8443))
    assert listener.forwarded_writer(transport(("127.0.0.1", 1))).origin.is_trusted
    after = await proxy.client()
    after.send(GET)
    assert (await after.read_response())["Location"].startswith("https://")
    listener.change_role(Role())
    named = await proxy.client()
    named.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.1\r\n\r\n")
    assert (await app.read_request())["X-Forwarded-For"] == "203.0.113.1, 127.0.0.1"
    app.answer()
    assert (await named.read_response()).status == 200


# Who the client is


async def test_a_header_of_a_trusted_proxy_names_the_client(start: Start) -> None:
    proxy = await start(settings=Settings(trusted=(ip_network("10.0.0.0/8"),)))
    listener = proxy.listeners[0]
    peer = transport(("10.0.0.1", 1))
    named = ProxyHeader(1, "203.0.113.7", 50000, "198.51.100.1", 443, is_tls=True)
    origin = listener.forwarded_writer(peer, named).origin
    assert (origin.address, origin.port, origin.is_https, origin.is_trusted) == ("203.0.113.7", "443", True, False)
    chained = ProxyHeader(1, "10.0.0.2", 50000, "10.0.0.1", 80)
    assert listener.forwarded_writer(peer, chained).origin.is_trusted
    for nobody in (None, ProxyHeader(1), ProxyHeader(1, is_tls=True)):
        origin = listener.forwarded_writer(peer, nobody).origin
        is_trusted = nobody is None  # where the header names nobody, the client is anybody
        assert (origin.address, origin.port, origin.is_trusted) == ("10.0.0.1", listener.port, is_trusted)
        assert origin.is_https == (nobody is not None and nobody.is_tls)


async def test_what_is_written_about_clients_is_shared_and_bounded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_MAX_WRITERS", 3)
    proxy = await start(settings=Settings(trusted=(ip_network("10.0.0.0/8"),)))
    listener = proxy.listeners[0]
    first = listener.forwarded_writer(transport(("10.0.0.1", 1)))
    assert listener.forwarded_writer(transport(("10.0.0.1", 2))) is first
    assert first.origin.is_trusted
    assert not listener.forwarded_writer(transport(("192.0.2.1", 1))).origin.is_trusted
    mapped = listener.forwarded_writer(transport(("::ffff:10.0.0.1", 1, 0, 0))).origin
    assert (mapped.address, mapped.is_trusted) == ("10.0.0.1", True)
    scoped = listener.forwarded_writer(transport(("fe80::1%eth0", 1, 0, 2))).origin
    assert (scoped.address, scoped.is_trusted) == ("fe80::1", False)
    assert len(listener._writers) == 1


async def test_a_client_without_an_address_is_not_trusted_as_a_unix_socket_is(start: Start, tmp_path: Path) -> None:
    proxy = await start(settings=Settings(trusts_unix=True, trusted=(ip_network("0.0.0.0/0"),)))
    origin = proxy.listeners[0].forwarded_writer(transport(None)).origin
    assert (origin.address, origin.is_trusted) == ("unknown", False)
    unix = await proxy.listen(Address(path=str(tmp_path / "proxy.sock")))
    origin = unix.forwarded_writer(transport("")).origin
    assert (origin.address, origin.is_trusted) == ("unix", True)


async def test_clients_that_reset_before_they_are_accepted_do_no_harm(proxy: PlaneUnderTest) -> None:
    port = int(proxy.listeners[0].port)
    for _ in range(20):
        link = socket.create_connection(("127.0.0.1", port))
        link.send(GET)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()
    await eventually(lambda: proxy.plane.counters.connections >= 20 or not proxy.plane.downstreams)
    await eventually(lambda: not proxy.plane.downstreams)
