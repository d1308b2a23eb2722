"""The one place that turns an error into a response: HTML, JSON or plain text, by Accept."""

from __future__ import annotations

import json
import re
from html import escape
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from stickyproxy.errors import UpstreamGone
from stickyproxy.wire.headers import find_field

if TYPE_CHECKING:
    from stickyproxy.errors import ExchangeError
    from stickyproxy.wire.request_head import RequestHead

REDIRECT: Final = 308  # RFC 9110, section 15.4.9: the method stays what it was
_HTTPS_PORT: Final = 443
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}
_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{status} {phrase}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem}}
:root{{color-scheme:light dark}}
code{{font-size:.85em}}</style></head>
<body><h1>{status} {phrase}</h1><p>{reason}.</p>{hint}<p><code>{request_id}</code></p></body></html>
"""
_RETRY_HINT = "<p>The application cannot be reached right now. Please try again in a moment.</p>"


def write_error(
    error: ExchangeError, head: RequestHead | None, request_id: bytes, date_line: bytes, *, keep_alive: bool
) -> bytes:
    """Return the whole response for an error; `head` is None where the request could not be read.

    It carries the request's id, which the log has too, and Proxy-Status (RFC 9209). `date_line` is the Date field with
    its CRLF.
    """
    phrase = _PHRASES.get(error.status, "")  # an app's own status may have none (RFC 9112, section 4)
    if isinstance(error, UpstreamGone):
        content_type, body = error.content_type, error.body.encode()
    else:
        content_type, body = _body(error, phrase, head, request_id.decode("ascii"))
    lines = [
        f"HTTP/1.1 {error.status} {phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        f'Proxy-Status: stickyproxy; error={error.proxy_status}; details="{error.reason}"',
        f"X-Request-ID: {request_id.decode('ascii')}",
    ]
    if error.retry_after_s is not None:
        lines.append(f"Retry-After: {error.retry_after_s}")
    if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
    if not keep_alive:
        lines.append("Connection: close")
    elif head is not None and head.is_http_10:
        lines.append("Connection: keep-alive")
    text = "\r\n".join(lines).encode("ascii", "replace") + b"\r\n" + date_line + b"\r\n"
    return text if head is not None and head.method == b"HEAD" else text + body


def write_redirect(head: RequestHead, port: int, request_id: bytes, date_line: bytes, *, keep_alive: bool) -> bytes:
    """Return the response that sends a client to the same target over TLS, at the `port` of the host it named."""
    name = head.host if head.host.endswith(b"]") else re.sub(rb":[0-9]*\Z", b"", head.host)
    place = name if port == _HTTPS_PORT else b"%b:%d" % (name, port)
    target = head.target if head.target.startswith(b"/") else b"/"
    lines = [
        b"HTTP/1.1 308 Permanent Redirect",
        b"Location: https://%b%b" % (place, target),
        b"Content-Length: 0",
        b"X-Request-ID: " + request_id,
    ]
    if not keep_alive:
        lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n" + date_line + b"\r\n"


def _body(error: ExchangeError, phrase: str, head: RequestHead | None, request_id: str) -> tuple[str, bytes]:
    accept = find_field(head.section, b"accept").lower() if head is not None else b""
    if b"text/html" in accept:
        page = _HTML.format(
            status=error.status,
            phrase=phrase,
            reason=escape(error.reason.capitalize()),
            hint=_RETRY_HINT if error.retry_after_s is not None else "",
            request_id=request_id,
        )
        return "text/html; charset=utf-8", page.encode()
    if b"json" in accept:
        facts = {"status": error.status, "error": phrase, "reason": error.reason, "request_id": request_id}
        return "application/json; charset=utf-8", json.dumps(facts).encode()
    return "text/plain; charset=utf-8", f"{error.status} {phrase}: {error.reason}\nrequest {request_id}\n".encode()
