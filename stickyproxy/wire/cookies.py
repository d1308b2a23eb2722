"""The affinity cookie on the wire: found in and taken out of Cookie, written as Set-Cookie (RFC 6265)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stickyproxy.wire.headers import Section


class CookieReader:
    """Finds one cookie by name in Cookie fields; names are compared octet by octet (RFC 6265, section 5.4).

    White space around a name does not belong to it (section 5.2): applications that strip it would see the cookie.
    """

    __slots__ = ("_name", "_pattern", "_prefix")

    def __init__(self, name: str) -> None:
        self._name = name.encode("ascii")
        self._prefix = self._name + b"="
        self._pattern = re.compile(rb"(?:(?<=;)|\A)[ \t]*" + re.escape(self._name) + rb"[ \t]*=([^;]*)(?:;|\Z)")

    def take(self, section: Section, positions: list[int]) -> bytes | None:
        """Return the value of the cookie and take it out of the Cookie fields, the parts at `positions`.

        A field left empty becomes an empty part. The first value counts where a client sends several; all of them are
        taken out. None when there is no such cookie.
        """
        token: bytes | None = None
        for at in positions:
            line = section[at]
            if self._name not in line:
                continue
            value = line[line.index(b":") + 2 : -2]
            if value.startswith(self._prefix) and b";" not in value:  # it is alone
                section[at] = b""
                token = token or value[len(self._prefix) :].strip(b' \t"')
                continue
            found = self._pattern.findall(value)
            if found:
                token = token or found[0].strip(b' \t"')
                rest = self._pattern.sub(b"", value).strip(b" \t;")
                section[at] = b"Cookie: " + rest + b"\r\n" if rest else b""
        return token


class CookiesReader:
    """Finds several cookies by name, as a `CookieReader` finds one."""

    __slots__ = ("_pattern",)

    def __init__(self, names: Iterable[str]) -> None:
        any_name = b"|".join(re.escape(name.encode("ascii")) for name in names)
        self._pattern = re.compile(rb"(?:(?<=;)|\A)[ \t]*(" + any_name + rb")[ \t]*=([^;]*)(?:;|\Z)")

    def take(self, section: Section, positions: list[int]) -> dict[bytes, bytes]:
        """Return the values of the cookies by name, and take them out of the Cookie fields, the parts at `positions`.

        A field left empty becomes an empty part. Of one that comes several times the first value counts, and all are
        taken out.
        """
        tokens: dict[bytes, bytes] = {}
        for at in positions:
            line = section[at]
            value = line[line.index(b":") + 2 : -2]
            found = self._pattern.findall(value)
            if found:
                for name, token in found:
                    tokens[name] = tokens.get(name) or token.strip(b' \t"')
                rest = self._pattern.sub(b"", value).strip(b" \t;")
                section[at] = b"Cookie: " + rest + b"\r\n" if rest else b""
        return tokens


@dataclass(frozen=True, slots=True)
class CookieAttributes:
    """How the affinity cookie is set. `max_age_s` None makes it end with the browser's session."""

    name: str = "stickyproxy"
    path: str = "/"
    domain: str | None = None
    max_age_s: int | None = None
    http_only: bool = True
    same_site: Literal["lax", "strict", "none"] = "lax"
    secure: bool | Literal["auto"] = "auto"
    partitioned: bool = False


class CookieWriter:
    """Writes the Set-Cookie line; everything but the token is put together beforehand.

    `name` is that of the cookie. `is_weakened` says that over http the cookie is not what the attributes ask for, since
    browsers would drop it.
    """

    __slots__ = ("_own", "_place", "_place_and_age", "_plain_end", "_secure_end", "_start", "is_weakened", "name")

    def __init__(self, attributes: CookieAttributes) -> None:
        end = f"; Path={attributes.path}"
        if attributes.domain:
            end += f"; Domain={attributes.domain}"
        self._place = end.encode("ascii")
        if attributes.max_age_s is not None:
            end += f"; Max-Age={attributes.max_age_s}"
        self._place_and_age = end.encode("ascii")
        if attributes.http_only:
            end += "; HttpOnly"
        plain = secure = end
        # Over plain HTTP a browser drops a Secure cookie, and with it SameSite=None and Partitioned, which need it:
        # `auto` falls back to Lax there, for a cookie that is dropped pins nobody.
        plain += "; SameSite=Lax" if attributes.same_site == "none" else f"; SameSite={attributes.same_site.title()}"
        secure += f"; SameSite={attributes.same_site.title()}; Secure"
        if attributes.partitioned:
            secure += "; Partitioned"
        if attributes.secure is True:
            plain = secure
        elif attributes.secure is False:
            secure = plain
        self.is_weakened = attributes.secure == "auto" and (attributes.same_site == "none" or attributes.partitioned)
        self.name = name = attributes.name.encode("ascii")
        self._start = b"Set-Cookie: " + name + b"="
        self._own = re.compile(rb"(?i:set-cookie): " + re.escape(name) + rb"[ \t]*(?:[=;\r]|\Z)")
        self._plain_end = plain.encode("ascii")
        self._secure_end = secure.encode("ascii")

    def write(self, token: bytes, *, is_https: bool) -> bytes:
        """Return the Set-Cookie line, without CRLF, for a response to a request over https or http."""
        return self._start + token + (self._secure_end if is_https else self._plain_end)

    def write_end(self, *, is_https: bool) -> bytes:
        """Return the Set-Cookie line, without CRLF, that takes the cookie from the client (RFC 6265, section 3.1)."""
        end = self._secure_end if is_https else self._plain_end
        return self._start + self._place + b"; Max-Age=0" + end[len(self._place_and_age) :]

    def drop_foreign(self, section: Section) -> Section:
        """Return a section of a response without the cookies of this name that the application sets.

        They would replace the affinity cookie, and end the pin.
        """
        return [
            part
            if self._own.search(part) is None
            else b"".join(line + b"\r\n" for line in part.split(b"\r\n")[:-1] if self._own.match(line) is None)
            for part in section
        ]


def is_shared_cacheable(cache_control: bytes | None) -> bool:
    """Say whether a response is meant for shared caches, given its Cache-Control fields in lower case.

    A Set-Cookie would make such a response private, or worse, be served to others from a cache.
    """
    return cache_control is not None and (
        b"public" in cache_control or b"immutable" in cache_control or b"s-maxage" in cache_control
    )
