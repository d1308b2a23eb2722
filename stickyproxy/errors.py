"""The errors of the proxy, each with the facts that decide what happens next.

    StickyproxyError            anything that this package raises on purpose
      UsageError                what an operator gave cannot be used (a file, an address, a command line)
      AppError                  the app that the proxy runs does not start
      ChannelError              another process of the proxy did not do what it was asked for
      ExchangeError             one exchange cannot go on; carries side, phase, status and Proxy-Status
        RequestError            the client sent something wrong (side "downstream")
        ResponseError           the upstream sent something wrong (side "upstream")
        UpstreamUnavailable     no upstream could take the exchange (side "proxy")
        UpstreamGone            the upstream that holds what a request is about is gone (side "proxy")

`proxy/respond.py` is the one place that turns an ExchangeError into a response.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Side = Literal["downstream", "upstream", "proxy"]
Phase = Literal["head", "body", "choose", "connect", "response", "tunnel"]


class StickyproxyError(Exception):
    """Base of all errors that this package raises on purpose."""


class UsageError(StickyproxyError):
    """What the operator gave cannot be used; the text is one line for a person."""


class AppError(StickyproxyError):
    """The app that the proxy is to run does not start; the text says why, with what the app said last."""


class ChannelError(StickyproxyError):
    """Another process of the proxy is gone, or did not do what it was asked for; the text says why."""


class ExchangeError(StickyproxyError):
    """One exchange cannot go on.

    `status` is the HTTP status that the client gets; `proxy_status` the registered error type of RFC 9209,
    section 2.3; `phase` where on the path it happened; `retry_after_s` seconds for Retry-After, or None.
    """

    side: ClassVar[Side] = "proxy"

    def __init__(
        self,
        reason: str,
        *,
        status: int,
        phase: Phase,
        proxy_status: str,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.phase: Phase = phase
        self.proxy_status = proxy_status
        self.retry_after_s = retry_after_s


class RequestError(ExchangeError):
    """The client sent something that cannot be served; its connection is closed after the answer."""

    side: ClassVar[Side] = "downstream"

    def __init__(
        self, reason: str, *, status: int = 400, phase: Phase = "head", proxy_status: str = "http_request_error"
    ) -> None:
        super().__init__(reason, status=status, phase=phase, proxy_status=proxy_status)


class ResponseError(ExchangeError):
    """The upstream sent something that cannot be passed on; its connection is never used again."""

    side: ClassVar[Side] = "upstream"

    def __init__(
        self, reason: str, *, status: int = 502, phase: Phase = "response", proxy_status: str = "http_protocol_error"
    ) -> None:
        super().__init__(reason, status=status, phase=phase, proxy_status=proxy_status)


class UpstreamUnavailable(ExchangeError):  # noqa: N818 -- names the state, as 503 does
    """No upstream could take the exchange; nothing of it was sent to any."""

    def __init__(self, reason: str, *, proxy_status: str = "destination_unavailable", retry_after_s: int = 1) -> None:
        super().__init__(reason, status=503, phase="choose", proxy_status=proxy_status, retry_after_s=retry_after_s)


class UpstreamGone(ExchangeError):  # noqa: N818 -- names the state
    """The upstream that holds what a request is about is gone; `content_type` and `body` are what it would answer."""

    def __init__(self, reason: str, *, status: int, content_type: str, body: str) -> None:
        super().__init__(reason, status=status, phase="choose", proxy_status="destination_unavailable")
        self.content_type = content_type
        self.body = body
