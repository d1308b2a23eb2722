"""Addresses of listeners and upstreams."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.config.address import Address, parse_listener, parse_upstream_url, read_server_name, write_upstream_url

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall
LISTENER_FORMS = (
    "expected an address such as 127.0.0.1:8080, :8080 (all interfaces), [::1]:8080 or unix:/run/proxy.sock"
)
UPSTREAM_FORMS = "expected a URL such as http://127.0.0.1:8001 or unix:/run/app.sock"
HOST_NAME = "expected a host name of letters, digits, hyphens and dots (IDNA names as xn--...)"


@pytest.mark.parametrize(
    ("written", "address", "canonical"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080), "127.0.0.1:8080"),
        (":8080", Address("", 8080), ":8080"),
        ("0.0.0.0:0", Address("0.0.0.0", 0), "0.0.0.0:0"),  # noqa: S104 - read, not bound
        ("[::1]:8080", Address("::1", 8080), "[::1]:8080"),
        ("[::]:80", Address("::", 80), "[::]:80"),
        ("[0:0:0:0:0:0:0:A]:80", Address("::a", 80), "[::a]:80"),
        ("LocalHost:65535", Address("localhost", 65535), "localhost:65535"),
        ("app_1.example.org.:80", Address("app_1.example.org.", 80), "app_1.example.org.:80"),
        ("unix:/run/x.sock", Address(path="/run/x.sock"), "unix:/run/x.sock"),
    ],
)
def test_listener_is_read(written: str, address: Address, canonical: str) -> None:
    found = parse_listener(written)
    assert found == address
    assert str(found) == canonical
    assert parse_listener(canonical) == address


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", LISTENER_FORMS),
        ("8080", LISTENER_FORMS),
        ("127.0.0.1", LISTENER_FORMS),
        ("127.0.0.1:", "expected a port from 0 to 65535 after the last colon"),
        ("127.0.0.1:http", "expected a port from 0 to 65535 after the last colon"),
        ("127.0.0.1:65536", "expected a port from 0 to 65535 after the last colon"),
        ("127.0.0.1:-1", "expected a port from 0 to 65535 after the last colon"),
        ("127.0.0.1:٣", "expected a port from 0 to 65535 after the last colon"),
        ("256.0.0.1:80", "expected an IPv4 address of four numbers from 0 to 255, as in 127.0.0.1"),
        ("127.1:80", "expected an IPv4 address of four numbers from 0 to 255, as in 127.0.0.1"),
        ("::1:8080", "expected an IPv6 address in brackets, as in [::1]:8080"),
        ("[::g]:80", "expected an IPv6 address between the brackets, as in [::1]:8080"),
        ("[fe80::1%eth0]:80", "an IPv6 address with a zone (%eth0) is not supported"),
        ("*:80", HOST_NAME),
        ("exa mple:80", HOST_NAME),
        ("bücher.example:80", HOST_NAME),
        ("-a:80", HOST_NAME),
        ("a..b:80", HOST_NAME),
        (".:80", HOST_NAME),
        (".".join(["a" * 60] * 5) + ":80", HOST_NAME),
        ("unix:", "expected the absolute path of a socket, as in unix:/run/app.sock"),
        ("unix:run/x.sock", "expected the absolute path of a socket, as in unix:/run/app.sock"),
        ("unix:/run/", "expected the absolute path of a socket, as in unix:/run/app.sock"),
        ("unix:/run/x\0", "the path of a socket has no control characters"),
        ("unix:/" + "x" * 107, "the path of a socket has at most 107 bytes; the kernel takes no more"),
    ],
)
def test_what_is_no_listener_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_listener(written)


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("http://127.0.0.1:8001", Address("127.0.0.1", 8001)),
        ("http://127.0.0.1:8001/", Address("127.0.0.1", 8001)),
        ("HTTP://App-1", Address("app-1", 80)),
        ("http://[::1]", Address("::1", 80)),
        ("http://[::1]:81/", Address("::1", 81)),
        ("https://127.0.0.1:8001", Address("127.0.0.1", 8001, is_tls=True)),
        ("HTTPS://App-1/", Address("app-1", 443, is_tls=True)),
        ("https://[::1]", Address("::1", 443, is_tls=True)),
        ("unix:/run/x.sock", Address(path="/run/x.sock")),
        ("http+unix:///run/x.sock", Address(path="/run/x.sock")),
    ],
)
def test_upstream_is_read(written: str, address: Address) -> None:
    assert parse_upstream_url(written) == address


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", UPSTREAM_FORMS),
        ("127.0.0.1:8001", UPSTREAM_FORMS),
        ("ws://127.0.0.1:8001", UPSTREAM_FORMS),
        ("https://", f"{UPSTREAM_FORMS}: the host is missing"),
        ("https://a:0", "expected a port from 1 to 65535 after the last colon"),
        ("https://a:443/app", "the URL of an upstream has no path: a request keeps its own; write https://host:port"),
        ("https://a?x", "the URL of an upstream has no query; write https://host:port"),
        ("https://me:password@a", "the URL of an upstream has no user name or password; write https://host:port"),
        ("https+unix:///x", UPSTREAM_FORMS),
        ("http://", f"{UPSTREAM_FORMS}: the host is missing"),
        ("http://:80", f"{UPSTREAM_FORMS}: the host is missing"),
        ("http://a:0", "expected a port from 1 to 65535 after the last colon"),
        ("http://a:", "expected a port from 1 to 65535 after the last colon"),
        ("http://a\n", HOST_NAME),
        ("http://a:80/app", "the URL of an upstream has no path: a request keeps its own; write http://host:port"),
        ("http://a:80?x", "the URL of an upstream has no query; write http://host:port"),
        ("http://a:80#x", "the URL of an upstream has no fragment; write http://host:port"),
        ("http://me:password@a", "the URL of an upstream has no user name or password; write http://host:port"),
        ("http+unix:///x?y", "the URL of an upstream has no query; write http+unix:///path"),
        (
            "http+unix://run/x.sock",
            "expected three slashes before the path of the socket, as in http+unix:///run/app.sock",
        ),
        ("http+unix:///run%2Fx", "percent escapes are not read in the path of a socket; write unix:/path"),
        ("http+unix://", "expected the absolute path of a socket, as in unix:/run/app.sock"),
        ("unix:x", "expected the absolute path of a socket, as in unix:/run/app.sock"),
    ],
)
def test_what_is_no_upstream_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_upstream_url(written)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8001", "http://[::1]:80", "https://app-1:443", "https://[::1]:1", "unix:/run/x.sock"],
)
def test_upstream_is_written_as_it_is_read(url: str) -> None:
    assert write_upstream_url(parse_upstream_url(url)) == url


@pytest.mark.parametrize(
    ("written", "is_loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/x", True),
        (":1", False),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
        ("[::ffff:127.0.0.1]:1", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(written: str, is_loopback: bool) -> None:  # noqa: FBT001 - a table
    assert parse_listener(written).is_loopback is is_loopback


def test_tls_is_part_of_an_address_but_not_of_its_text() -> None:
    plain, secure = parse_upstream_url("http://a:443"), parse_upstream_url("https://a")
    assert plain != secure
    assert str(plain) == str(secure) == "a:443"
    assert replace(secure, is_tls=False) == plain
    assert not parse_listener(":443").is_tls


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("App.Example.org", "app.example.org"),
        ("app.example.org.", "app.example.org"),
        ("app_1", "app_1"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[0:0::1]", "::1"),
    ],
)
def test_server_name_is_read(written: str, name: str) -> None:
    assert read_server_name(written) == name


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", HOST_NAME),
        (".", HOST_NAME),
        ("*.example.org", HOST_NAME),
        ("bücher.example", HOST_NAME),
        ("300.0.0.1", "expected an IPv4 address of four numbers from 0 to 255, as in 127.0.0.1"),
        ("a:443", "expected an IPv6 address, as in ::1, or a name without a port"),
        ("[::1]:443", "expected an IPv6 address, as in ::1, or a name without a port"),
        ("fe80::1%eth0", "an IPv6 address with a zone (%eth0) is not supported"),
    ],
)
def test_what_is_no_server_name_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_server_name(written)


URL_ALPHABET = st.sampled_from(
    [*"abz019:/.[]@?#%*-_ \n\0", "http://", "https://", "unix:/", "http+unix:///", "::1", "é"]
)


@UNHURRIED
@given(st.lists(URL_ALPHABET).map("".join) | st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for parse in (parse_listener, parse_upstream_url):
        try:
            address = parse(text)
        except UnicodeError:
            raise
        except ValueError:
            continue
        assert address.is_unix == bool(address.path)
        assert parse_listener(str(address)) == replace(address, is_tls=False)
