"""Who may use the admin listener: the token, and what keeps web pages of others away from it.

A browser on the operator's machine reaches loopback too, and any page that it shows can send requests there. It can
read no answer and set no JSON content type without leave, unless it resolves its own name to 127.0.0.1 (DNS
rebinding): hence the checks of Host, Origin and Sec-Fetch-Site beside the token.
"""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, Final

from aiohttp import web

from stickyproxy.config import Address
from stickyproxy.control.runtime import ForeignPeerError, check_peer

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

    from stickyproxy.config import Admin

OPEN_PATHS: Final = frozenset({"/livez", "/readyz"})  # for orchestrators, which have no token
_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HOST: Final = re.compile(r"\[(?P<ipv6>[0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|(?P<host>[A-Za-z0-9.-]+)(?::[0-9]{1,5})?")
_BEARER: Final = re.compile(r"bearer +(?P<token>[\x21-\x7e]+) *", re.IGNORECASE)


def make_guard(admin: Admin) -> Middleware:
    """Return the middleware that lets in who may come in; it raises HTTPForbidden, HTTPUnauthorized and such."""
    checks_host = admin.address.is_loopback and not admin.address.is_unix
    token = admin.token.encode() if admin.token is not None else None

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if checks_host:
            _check_host(request)
        if token is not None and request.path not in OPEN_PATHS:
            _check_token(request, token)
        if request.method not in _READING:
            _check_site(request)
        return await handler(request)

    return guard


@web.middleware
async def admit_same_user(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let in who has connected to a Unix socket as this user, or as root."""
    link = None if request.transport is None else request.transport.get_extra_info("socket")
    try:
        if link is None:
            raise ForeignPeerError("who has connected is gone")  # noqa: TRY301 -- refused as all others are
        check_peer(link)
    except ForeignPeerError as error:
        raise web.HTTPForbidden(text=str(error)) from error
    return await handler(request)


def _check_host(request: web.Request) -> None:
    match = _HOST.fullmatch(request.headers.get("Host", ""))
    host = (match["ipv6"] or match["host"].lower().removesuffix(".")) if match else ""
    if not Address(host=host).is_loopback:
        raise web.HTTPForbidden(text="this listener is on loopback: use a loopback address or localhost as the host")


def _check_token(request: web.Request, token: bytes) -> None:
    match = _BEARER.fullmatch(request.headers.get("Authorization", ""))
    if match is None or not hmac.compare_digest(match["token"].encode(), token):
        raise web.HTTPUnauthorized(
            text="a valid token is needed: Authorization: Bearer TOKEN",
            headers={"WWW-Authenticate": 'Bearer realm="stickyproxy"'},
        )


def _check_site(request: web.Request) -> None:
    """Refuse a request that changes something where a page of another site made it."""
    origin = request.headers.get("Origin")
    if request.headers.get("Sec-Fetch-Site", "none") not in {"same-origin", "none"} or (
        origin is not None and origin.partition("://")[2] != request.headers.get("Host")
    ):
        raise web.HTTPForbidden(text="a request of another site may change nothing here")
