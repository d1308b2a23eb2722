"""The one place that turns an error into a response."""

from __future__ import annotations

import json

import pytest

from stickyproxy.errors import RequestError, ResponseError, UpstreamGone, UpstreamUnavailable
from stickyproxy.proxy.respond import write_error, write_redirect
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import RequestHead, parse_request_head
from tests.helpers.raw import Message, parse_message, request

ID = b"0123456789abcdef01234567"
DATE = b"Date: Mon, 23 Nov 2026 07:00:00 GMT\r\n"


def head(*fields: str, line: str = "GET /", version: str = "1.1") -> RequestHead:
    data = request(line, *fields, version=version)
    return parse_request_head(data, len(data), HeadLimits())


def answer(
    error: RequestError | ResponseError | UpstreamGone | UpstreamUnavailable,
    of: RequestHead | None,
    *,
    keep_alive: bool = True,
) -> Message:
    data = write_error(error, of, ID, DATE, keep_alive=keep_alive)
    start, _, body = data.partition(b"\r\n\r\n")
    message = parse_message(start + b"\r\n\r\n")
    message.body = body
    assert message["X-Request-ID"] == ID.decode()
    assert message["Cache-Control"] == "no-store"
    assert message["Date"] == "Mon, 23 Nov 2026 07:00:00 GMT"
    return message


def test_html_for_browsers() -> None:
    message = answer(ResponseError("it <broke>"), head("Accept: text/html,application/json;q=0.9"))
    assert message.start == "HTTP/1.1 502 Bad Gateway"
    assert message["Content-Type"] == "text/html; charset=utf-8"
    assert int(message["Content-Length"]) == len(message.body)
    page = message.body.decode()
    assert "It &lt;broke&gt;." in page
    assert ID.decode() in page
    assert "try again" not in page


def test_a_hint_where_it_is_worth_to_try_again() -> None:
    message = answer(UpstreamUnavailable("nobody", retry_after_s=7), head("Accept: text/html"))
    assert message["Retry-After"] == "7"
    assert b"try again" in message.body


def test_json_for_programs() -> None:
    message = answer(ResponseError("it broke", status=504), head("Accept: application/problem+json"))
    assert message["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(message.body) == {
        "status": 504,
        "error": "Gateway Timeout",
        "reason": "it broke",
        "request_id": ID.decode(),
    }


@pytest.mark.parametrize("fields", [(), ("Accept: */*",), ("Accept: image/png",)])
def test_plain_text_for_all_others(fields: tuple[str, ...]) -> None:
    message = answer(ResponseError("it broke"), head(*fields))
    assert message.body == b"502 Bad Gateway: it broke\nrequest 0123456789abcdef01234567\n"
    assert message["Content-Type"] == "text/plain; charset=utf-8"


def test_proxy_status_names_the_error() -> None:
    error = ResponseError("too long", proxy_status="http_response_header_section_size")
    assert (
        answer(error, None)["Proxy-Status"]
        == 'stickyproxy; error=http_response_header_section_size; details="too long"'
    )


def test_a_head_gets_the_head_only() -> None:
    message = answer(ResponseError("it broke"), head(line="HEAD /"))
    assert message.body == b""
    assert int(message["Content-Length"]) > 0


def test_405_says_what_is_allowed() -> None:
    assert "CONNECT" not in answer(RequestError("no", status=405), None)["Allow"]


@pytest.mark.parametrize(
    ("version", "keep_alive", "connection"),
    [("1.1", True, []), ("1.1", False, ["close"]), ("1.0", True, ["keep-alive"]), ("1.0", False, ["close"])],
)
def test_connection_says_what_follows(version: str, *, keep_alive: bool, connection: list[str]) -> None:
    message = answer(ResponseError("no"), head(version=version), keep_alive=keep_alive)
    assert message.all("connection") == connection


@pytest.mark.parametrize("status", [400, 408, 413, 414, 431, 501, 505])
def test_every_status_has_its_phrase(status: int) -> None:
    message = answer(RequestError("no", status=status), None, keep_alive=False)
    assert message.status == status
    assert message["Connection"] == "close"


# Redirects


@pytest.mark.parametrize(
    ("host", "port", "place"),
    [
        ("example.org", 443, "example.org"),
        ("example.org:8080", 443, "example.org"),
        ("example.org:8080", 8443, "example.org:8443"),
        ("192.0.2.1:80", 8443, "192.0.2.1:8443"),
        ("[::1]", 443, "[::1]"),
        ("[::1]:8080", 443, "[::1]"),
        ("[2001:db8::1]:8080", 8443, "[2001:db8::1]:8443"),
        ("[2001:db8::80]", 8443, "[2001:db8::80]:8443"),
    ],
)
def test_a_redirect_keeps_the_host_and_replaces_the_port(host: str, port: int, place: str) -> None:
    data = b"GET /a/b?c=d&e HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode()
    asked = parse_request_head(data, len(data), HeadLimits())
    message = parse_message(write_redirect(asked, port, ID, DATE, keep_alive=True))
    assert message.start == "HTTP/1.1 308 Permanent Redirect"
    assert message["Location"] == f"https://{place}/a/b?c=d&e"
    assert (message["Content-Length"], message["X-Request-ID"]) == ("0", ID.decode())
    assert "Connection" not in message


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("GET //evil.example/", "//evil.example/"),
        ("GET http://example.org:8080/x?y", "/x?y"),
        ("GET http://example.org", "/"),
        ("OPTIONS *", "/"),
    ],
)
def test_a_redirect_never_leaves_the_host(line: str, target: str) -> None:
    message = parse_message(write_redirect(head(line=line), 443, ID, DATE, keep_alive=False))
    assert message["Location"] == f"https://example.org{target}"
    assert message["Connection"] == "close"


# In place of an upstream that is gone


@pytest.mark.parametrize("accept", ["text/html", "application/json", "*/*"])
def test_what_the_upstream_would_say_is_said_whatever_is_accepted(accept: str) -> None:
    error = UpstreamGone(
        "the upstream of this sid is gone", status=400, content_type="application/json", body='{"é":1}'
    )
    message = answer(error, head(f"Accept: {accept}"))
    assert message.start == "HTTP/1.1 400 Bad Request"
    assert message["Content-Type"] == "application/json"
    assert message.body == '{"é":1}'.encode()
    assert int(message["Content-Length"]) == len(message.body)
    assert 'details="the upstream of this sid is gone"' in message["Proxy-Status"]
    assert "Retry-After" not in message


@pytest.mark.parametrize("status", [400, 404, 410, 419, 440, 499, 503, 599])
def test_its_status_may_be_any_that_the_configuration_takes(status: int) -> None:
    error = UpstreamGone("gone", status=status, content_type="text/plain", body="")
    assert answer(error, head()).status == status
