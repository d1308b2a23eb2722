"""How an upstream is reached: what is the same place, and what stands for a Host that a request lacks."""

from __future__ import annotations

import ssl
from dataclasses import replace

import pytest

from stickyproxy.config import Address
from stickyproxy.proxy.endpoint import Endpoint


@pytest.mark.parametrize(
    ("address", "authority"),
    [
        (Address("127.0.0.1", 8001), b"127.0.0.1:8001"),
        (Address("app.example", 80), b"app.example:80"),
        (Address("::1", 8001), b"[::1]:8001"),
        (Address(path="/run/app.sock"), b"localhost"),
    ],
)
def test_a_request_without_a_host_gets_that_of_the_address(address: Address, authority: bytes) -> None:
    assert Endpoint(address).authority == authority
    assert Endpoint(address, ip="192.0.2.1").authority == authority


def test_two_are_the_same_only_if_they_are_reached_in_the_same_way() -> None:
    tls = ssl.create_default_context()
    endpoint = Endpoint(Address("app.example", 443), "192.0.2.1", tls, "other.example")
    assert replace(endpoint) == endpoint
    for change in ({"address": Address("app.example", 444)}, {"ip": "192.0.2.2"}, {"tls": None}, {"server_name": ""}):
        assert replace(endpoint, **change) != endpoint
    assert replace(endpoint, tls=ssl.create_default_context()) != endpoint, "a renewed context is another one"
