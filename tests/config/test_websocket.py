"""The section `websocket`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.explain import explain
from stickyproxy.config.load import load_text
from stickyproxy.config.websocket import Ping, WebSocket, read_origin

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall
FORMS = 'expected an origin such as https://example.org or https://*.example.org, same-host, absent or "null"'
PORT = "expected a port from 1 to 65535 after the last colon"


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        WebSocket.model_validate(raw)
    return list(explain(raised.value, WebSocket))


def test_by_default_any_page_may_and_nobody_is_pinged() -> None:
    assert WebSocket().model_dump() == {"origins": None, "ping": None}
    assert WebSocket.model_validate({"origins": None, "ping": None}) == WebSocket()


@pytest.mark.parametrize(
    ("written", "origin"),
    [
        ("https://example.org", "https://example.org"),
        ("HTTPS://Example.ORG", "https://example.org"),
        ("https://example.org:443", "https://example.org"),
        ("http://example.org:80", "http://example.org"),
        ("http://example.org:443", "http://example.org:443"),
        ("https://example.org:80", "https://example.org:80"),
        ("https://example.org:08443", "https://example.org:8443"),
        ("https://*.Example.org", "https://*.example.org"),
        ("https://*.example.org:8443", "https://*.example.org:8443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("http://[0:0::1]", "http://[::1]"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("same-host", "same-host"),
        ("absent", "absent"),
        ("null", "null"),
    ],
)
def test_an_origin_is_read_as_browsers_write_it(written: str, origin: str) -> None:
    assert read_origin(written) == origin
    assert read_origin(origin) == origin


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", f"{FORMS}, got ''"),
        ("example.org", f"{FORMS}, got 'example.org'"),
        ("same-origin", f"{FORMS}, got 'same-origin'"),
        ("Null", f"{FORMS}, got 'Null'"),
        ("*", "expected origins, got '*'; for any origin leave the key origins out"),
        (None, f'{FORMS}, got nothing; put quotes around "null" for pages without an origin'),
        (7, "expected text, got 7; put quotes around it"),
        (["https://a"], "expected text, got a list"),
        ("https://", f"{FORMS}: the host is missing"),
        ("https://:443", f"{FORMS}: the host is missing"),
        ("https://a:", PORT),
        ("https://a:0", PORT),
        ("https://a:65536", PORT),
        ("https://a:*", PORT),
        (
            "https://a/",
            "an origin ends with its host or port: no path, no slash, no query; got 'https://a/'",
        ),
        (
            "https://a:1/b?c#d",
            "an origin ends with its host or port: no path, no slash, no query; got 'https://a:1/b?c#d'",
        ),
        ("https://a?b", "an origin ends with its host or port: no path, no slash, no query; got 'https://a?b'"),
        ("https://me:password@a", "an origin has no user name or password; write https://example.org"),
        ("ftp://a", "an origin begins with http:// or https://, got 'ftp://a'"),
        (
            "wss://a",
            "an origin begins with http:// or https://, got 'wss://a'; write that of the page, not of its WebSocket",
        ),
        ("https://*", "a wildcard stands at the beginning, as in https://*.example.org; got '*'"),
        ("https://a.*.b", "a wildcard stands at the beginning, as in https://*.example.org; got 'a.*.b'"),
        ("https://*a.b", "a wildcard stands at the beginning, as in https://*.example.org; got '*a.b'"),
        ("https://*.*.b", "a wildcard stands at the beginning, as in https://*.example.org; got '*.*.b'"),
        (
            "https://*.127.0.0.1",
            "a wildcard stands before a name, an IP address has no subdomains; got '*.127.0.0.1'",
        ),
        ("https://*.[::1]", "a wildcard stands before a name, an IP address has no subdomains; got '*.[::1]'"),
        ("https://*.", "expected a host name of letters, digits, hyphens and dots (IDNA names as xn--...)"),
        ("https://bücher.example", "expected a host name of letters, digits, hyphens and dots (IDNA names as xn--...)"),
        ("https://::1", "expected an IPv6 address in brackets, as in [::1]:8080"),
        ("https://[::g]", "expected an IPv6 address between the brackets, as in [::1]:8080"),
    ],
)
def test_what_is_no_origin(written: object, message: str) -> None:
    assert mistakes({"origins": ["absent", written]}) == [(("origins", 1), message)]


def test_origins_are_a_list() -> None:
    assert WebSocket.model_validate({"origins": ["same-host", "https://A:443"]}).origins == ("same-host", "https://a")
    assert mistakes({"origins": "https://a"}) == [
        (("origins",), 'expected a list, as in ["https://example.org"], got text')
    ]
    assert mistakes({"origins": []}) == [
        (("origins",), "expected at least one origin; for any origin leave the key origins out")
    ]


def test_each_mistake_has_its_line() -> None:
    with pytest.raises(ConfigErrors) as raised:
        load_text("websocket:\n  origins:\n    - absent\n    - null\n    - https://a/\n  ping:\n    interval: off", {})
    assert [(error.line, error.path_in_file) for error in raised.value.errors] == [
        (4, "websocket.origins[1]"),
        (5, "websocket.origins[2]"),
        (7, "websocket.ping.interval"),
    ]


def test_null_in_quotes_is_the_origin_of_sandboxed_documents() -> None:
    assert load_text('websocket: {origins: ["null"]}', {}).websocket.origins == ("null",)


@pytest.mark.parametrize("written", ["off", "false", "null", ""])
def test_no_pings(written: str) -> None:
    assert load_text(f"websocket:\n  ping: {written}\n", {}).websocket.ping is None


def test_pings() -> None:
    assert WebSocket.model_validate({"ping": True}).ping == Ping()
    assert (Ping().interval_s, Ping().timeout_s) == (30.0, 20.0)
    ping = WebSocket.model_validate({"ping": {"interval": "5s", "timeout": False}}).ping
    assert ping == Ping.model_validate({"interval": "5s", "timeout": "off"})
    assert ping.timeout_s is None


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ("30s", (), "expected a mapping of keys or false, got text"),
        ({"interval": 0}, ("interval",), "expected a duration above 0, got 0"),
        ({"timeout": "0s"}, ("timeout",), "expected a duration above 0, got '0s'"),
        ({"intervall": "1s"}, ("intervall",), "unknown key 'intervall'; did you mean 'interval'?"),
    ],
)
def test_wrong_pings(raw: object, path: tuple[str, ...], message: str) -> None:
    assert mistakes({"ping": raw}) == [(("ping", *path), message)]


def test_the_json_schema_has_every_form() -> None:
    properties = WebSocket.model_json_schema()["properties"]
    assert properties["origins"]["anyOf"] == [
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "null"},
    ]
    assert properties["ping"]["anyOf"] == [{"type": "boolean"}, {"$ref": "#/$defs/Ping"}]
    assert properties["ping"]["default"] is False


ALPHABET = st.sampled_from([*"abz019:/.[]@?#*-_ \n\0", "http://", "https://", "*.", "::1", "null", "é"])


@UNHURRIED
@given(st.lists(ALPHABET).map("".join) | st.text())
def test_any_text_is_an_origin_or_refused(text: str) -> None:
    try:
        origin = read_origin(text)
    except UnicodeError:
        raise
    except ValueError:
        return
    assert origin.isascii()
    assert origin == origin.lower()
    assert read_origin(origin) == origin
