"""The tree of errors: each carries the facts that decide what happens next."""

from __future__ import annotations

import pytest

from stickyproxy.errors import (
    ExchangeError,
    RequestError,
    ResponseError,
    StickyproxyError,
    UpstreamUnavailable,
    UsageError,
)


def facts_of(error: ExchangeError) -> tuple[str, str, int, str, str, int | None]:
    return error.side, error.reason, error.status, error.phase, error.proxy_status, error.retry_after_s


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (
            ExchangeError("r", status=500, phase="tunnel", proxy_status="proxy_internal_error"),
            ("proxy", "r", 500, "tunnel", "proxy_internal_error", None),
        ),
        (
            ExchangeError("r", status=503, phase="choose", proxy_status="x", retry_after_s=7),
            ("proxy", "r", 503, "choose", "x", 7),
        ),
        (RequestError("r"), ("downstream", "r", 400, "head", "http_request_error", None)),
        (
            RequestError("r", status=408, phase="body", proxy_status="x"),
            ("downstream", "r", 408, "body", "x", None),
        ),
        (ResponseError("r"), ("upstream", "r", 502, "response", "http_protocol_error", None)),
        (
            ResponseError("r", status=504, phase="connect", proxy_status="connection_timeout"),
            ("upstream", "r", 504, "connect", "connection_timeout", None),
        ),
        (UpstreamUnavailable("r"), ("proxy", "r", 503, "choose", "destination_unavailable", 1)),
        (
            UpstreamUnavailable("r", proxy_status="x", retry_after_s=9),
            ("proxy", "r", 503, "choose", "x", 9),
        ),
    ],
)
def test_an_error_carries_its_facts(error: ExchangeError, facts: tuple[str, str, int, str, str, int | None]) -> None:
    assert facts_of(error) == facts
    assert str(error) == error.reason


@pytest.mark.parametrize("kind", [UsageError, RequestError, ResponseError, UpstreamUnavailable])
def test_everything_raised_on_purpose_is_of_one_family(kind: type[Exception]) -> None:
    assert issubclass(kind, StickyproxyError)
    assert issubclass(kind, ExchangeError) is (kind is not UsageError)
    with pytest.raises(StickyproxyError, match=r"^reason$"):
        raise kind("reason")
