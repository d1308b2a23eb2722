"""The sections `trusted_proxies` and `forwarded`."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from pydantic import ValidationError

from stickyproxy.config.explain import explain
from stickyproxy.config.trust import Forwarded, TrustedProxies, read_trusted_proxies

NETWORK = "expected a network such as 10.0.0.0/8, an address or unix"


def test_networks_addresses_and_unix() -> None:
    assert read_trusted_proxies([]) == TrustedProxies()
    assert read_trusted_proxies(["10.0.0.0/8", "::1", "unix"]) == TrustedProxies(
        (ip_network("10.0.0.0/8"), ip_network("::1/128")), unix=True
    )


def test_what_is_no_network() -> None:
    with pytest.raises(ValidationError) as raised:
        read_trusted_proxies(["10.0.0.1/8", "example.org", 10, "*"])
    assert [(details["loc"], details["msg"]) for details in raised.value.errors()] == [
        ((0,), f"{NETWORK}, got '10.0.0.1/8'; did you mean 10.0.0.0/8?"),
        ((1,), f"{NETWORK}, got 'example.org'"),
        ((2,), "expected text, got 10; put quotes around it"),
        ((3,), f"{NETWORK}, got '*'"),
    ]
    with pytest.raises(ValueError, match=r"got text$"):
        read_trusted_proxies("10.0.0.0/8")


def test_forwarded() -> None:
    assert Forwarded().model_dump() == {"forwarded": False, "prefix": None}
    assert Forwarded.model_validate({"forwarded": True, "prefix": "/app"}).prefix == "/app"
    with pytest.raises(ValidationError) as raised:
        Forwarded.model_validate({"prefix": "/a\r\nx: y"})
    message = "expected a path that begins with \"/\", without spaces, got '/a\\r\\nx: y'"
    assert list(explain(raised.value, Forwarded)) == [(("prefix",), message)]
