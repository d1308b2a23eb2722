"""The affinity cookie on the wire: taken out of any Cookie header and nothing else with it; written for a browser."""

from __future__ import annotations

from http.cookies import SimpleCookie
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stickyproxy.wire.cookies import (
    CookieAttributes,
    CookieReader,
    CookiesReader,
    CookieWriter,
    is_shared_cacheable,
)
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import parse_request_head

if TYPE_CHECKING:
    from stickyproxy.wire.request_head import RequestHead

NAME = "sp"


def parse(*values: bytes) -> RequestHead:
    fields = b"".join(b"Cookie: " + value + b"\r\nX: between\r\n" for value in values)
    data = b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n"
    return parse_request_head(data, len(data), HeadLimits())


def take(*values: bytes, name: str = NAME) -> tuple[bytes | None, list[bytes]]:
    """Return the token and the values of the Cookie fields that are left."""
    head = parse(*values)
    token = CookieReader(name).take(head.section, head.cookies or [])
    section = b"".join(head.section)
    assert section.replace(b"X: between\r\n", b"").startswith(b"Host: a\r\n")
    assert section.count(b"X: between\r\n") == len(values)
    lines = section.split(b"\r\n")
    return token, [line.removeprefix(b"Cookie: ") for line in lines if line.startswith(b"Cookie: ")]


def pairs_of(value: bytes) -> list[bytes]:
    """Split a Cookie value as RFC 6265, section 5.4, puts it together."""
    return [pair for pair in (piece.strip(b" \t") for piece in value.split(b";")) if pair]


@pytest.mark.parametrize(
    ("values", "token", "left"),
    [
        pytest.param([], None, [], id="no cookie field"),
        pytest.param([b"a=1"], None, [b"a=1"], id="no such cookie"),
        pytest.param([b"sp=T"], b"T", [], id="alone"),
        pytest.param([b'sp="T"'], b"T", [], id="in quotes"),
        pytest.param([b"sp=T; a=1"], b"T", [b"a=1"], id="first"),
        pytest.param([b"a=1; sp=T"], b"T", [b"a=1"], id="last"),
        pytest.param([b"a=1; sp=T; b=2"], b"T", [b"a=1; b=2"], id="in the middle"),
        pytest.param([b"a=1;sp=T;b=2"], b"T", [b"a=1;b=2"], id="without spaces"),
        pytest.param([b"a=1;\t sp=T \t;b=2"], b"T", [b"a=1;b=2"], id="with tabs"),
        pytest.param([b"sp =T; a = 1"], b"T", [b"a = 1"], id="white space before the equals sign"),
        pytest.param([b"a=1; sp\t = T "], b"T", [b"a=1"], id="white space on both sides of it"),
        pytest.param([b'sp\xa0=T; "sp"=T'], None, [b'sp\xa0=T; "sp"=T'], id="other names"),
        pytest.param([b"sp=T; sp=U; a=1; sp=V"], b"T", [b"a=1"], id="several: the first counts, all go"),
        pytest.param([b"sp=T;sp=U;sp=V"], b"T", [], id="several and nothing else"),
        pytest.param([b"sp=; sp=U"], b"", [], id="the first is empty"),
        pytest.param([b"sp="], b"", [], id="an empty one is one"),
        pytest.param([b"a=1", b"sp=T", b"b=2; sp=U"], b"T", [b"a=1", b"b=2"], id="in several fields"),
        pytest.param([b"sp=T;"], b"T", [], id="a semicolon after it"),
        pytest.param([b"; sp=T"], b"T", [], id="a semicolon before it"),
        pytest.param([b"sp=T; a"], b"T", [b"a"], id="another without a value"),
        pytest.param([b"xsp=1; sp2=2; SP=3; sp; a=sp=T; =sp=4"], None,
                     [b"xsp=1; sp2=2; SP=3; sp; a=sp=T; =sp=4"], id="names that only look alike"),
        pytest.param([b"s;sp=1;p=2"], b"1", [b"s;p=2"], id="what is left makes no new one"),
        pytest.param([b"sp=sp=T; a=1"], b"sp=T", [b"a=1"], id="its value looks like itself"),
    ],
)  # fmt: skip
def test_the_affinity_cookie_is_taken_out(values: list[bytes], token: bytes | None, left: list[bytes]) -> None:
    assert take(*values) == (token, left)


def test_a_name_is_no_expression() -> None:
    assert take(b"a+b=1; aab=2", name="a+b") == (b"1", [b"aab=2"])
    assert take(b"a.b=1; axb=2", name="a.b") == (b"1", [b"axb=2"])


PIECES = st.sampled_from([b"sp=", b"sp", b"=", b";", b"; ", b" ", b"\t", b"a", b"b=2", b'"', b"T", b"sp=T", b"\xff"])
VALUES = st.lists(st.lists(PIECES, max_size=12).map(b"".join), max_size=3)


@settings(deadline=None, max_examples=400)
@given(VALUES)
@example([b"sp=T;sp=T; ;sp=T"])
def test_of_any_cookie_fields_only_the_affinity_cookie_is_taken(values: list[bytes]) -> None:
    given_pairs = [pair for value in values for pair in pairs_of(value)]
    ours = [pair for pair in given_pairs if b"=" in pair and pair.partition(b"=")[0].rstrip(b" \t") == b"sp"]
    token, left = take(*values)
    assert [pair for value in left for pair in pairs_of(value)] == [pair for pair in given_pairs if pair not in ours]
    assert (token is None) == (not ours)
    if token:
        assert token in b" ".join(ours)
    assert take(*left)[0] is None


def test_the_comparison_of_pairs_finds_a_lost_cookie() -> None:
    _, left = take(b"a=1; sp=T; b=2")
    assert pairs_of(left[0]) == [b"a=1", b"b=2"] != pairs_of(b"a=1")


@pytest.mark.parametrize("filler", [b" ", b";", b"; ", b"sp", b"sp=", b"sp=;", b";sp=1; a=2"])
def test_a_long_cookie_field_takes_little_time(filler: bytes) -> None:
    value = filler * (60_000 // len(filler)) + b"; a=1"
    began_at = perf_counter()
    _, left = take(b"a=1;" + value)
    assert perf_counter() - began_at < 1.0
    assert pairs_of(left[0])[-1] == b"a=1"


# Set-Cookie


def written(*, is_https: bool, **attributes: object) -> str:
    writer = CookieWriter(CookieAttributes(**attributes))  # type: ignore[arg-type]
    return writer.write(b"T", is_https=is_https).decode()


@pytest.mark.parametrize(
    ("attributes", "line"),
    [
        pytest.param({}, "stickyproxy=T; Path=/; HttpOnly; SameSite=Lax", id="the default"),
        pytest.param({"name": "n", "path": "/app"}, "n=T; Path=/app; HttpOnly; SameSite=Lax", id="a name and a path"),
        pytest.param({"domain": "a.b"}, "stickyproxy=T; Path=/; Domain=a.b; HttpOnly; SameSite=Lax", id="a domain"),
        pytest.param({"max_age_s": 9}, "stickyproxy=T; Path=/; Max-Age=9; HttpOnly; SameSite=Lax", id="a lifetime"),
        pytest.param({"max_age_s": 0}, "stickyproxy=T; Path=/; Max-Age=0; HttpOnly; SameSite=Lax", id="none at all"),
        pytest.param({"http_only": False}, "stickyproxy=T; Path=/; SameSite=Lax", id="for scripts too"),
        pytest.param({"same_site": "strict"}, "stickyproxy=T; Path=/; HttpOnly; SameSite=Strict", id="strict"),
        pytest.param({"same_site": "none"}, "stickyproxy=T; Path=/; HttpOnly; SameSite=Lax", id="none is lax on http"),
        pytest.param({"partitioned": True}, "stickyproxy=T; Path=/; HttpOnly; SameSite=Lax", id="partitioned on http"),
        pytest.param(
            {"secure": True}, "stickyproxy=T; Path=/; HttpOnly; SameSite=Lax; Secure", id="secure, whatever the link"
        ),
    ],
)
def test_the_attributes_of_the_cookie_over_http(attributes: dict[str, object], line: str) -> None:
    assert written(is_https=False, **attributes) == f"Set-Cookie: {line}"


@pytest.mark.parametrize(
    ("attributes", "end"),
    [
        pytest.param({}, "; SameSite=Lax; Secure", id="the default"),
        pytest.param({"secure": False}, "; SameSite=Lax", id="never secure"),
        pytest.param({"same_site": "none"}, "; SameSite=None; Secure", id="none"),
        pytest.param({"same_site": "none", "secure": False}, "; SameSite=Lax", id="none needs secure"),
        pytest.param({"partitioned": True}, "; SameSite=Lax; Secure; Partitioned", id="partitioned"),
    ],
)
def test_the_attributes_of_the_cookie_over_https(attributes: dict[str, object], end: str) -> None:
    assert written(is_https=True, **attributes) == f"Set-Cookie: stickyproxy=T; Path=/; HttpOnly{end}"


def attributes_of(line: bytes) -> list[str]:
    return line.decode().removeprefix("Set-Cookie: ").split("; ")


@pytest.mark.parametrize(
    ("attributes", "over_http", "over_https"),
    [
        ({}, ["stickyproxy=", "Path=/"], ["Secure"]),
        ({"name": "n", "path": "/app"}, ["n=", "Path=/app"], ["Secure"]),
        ({"domain": "a.b", "max_age_s": 99}, ["stickyproxy=", "Path=/", "Domain=a.b"], ["Secure"]),
        ({"secure": False}, ["stickyproxy=", "Path=/"], []),
        ({"name": "__Host-n", "secure": True}, ["__Host-n=", "Path=/", "Secure"], []),
        ({"same_site": "none"}, ["stickyproxy=", "Path=/"], ["Secure", "SameSite=None"]),
        ({"same_site": "none", "partitioned": True}, ["stickyproxy="], ["Secure", "SameSite=None", "Partitioned"]),
    ],
)
def test_a_cookie_is_taken_from_the_client(
    attributes: dict[str, object], over_http: list[str], over_https: list[str]
) -> None:
    """By an empty one of the same name, path and domain, whose lifetime is over (RFC 6265, section 3.1).

    It has what lets a browser take it where it took the first one: in a frame of another site a cookie without
    SameSite=None is not taken at all, and one without Partitioned is another cookie (CHIPS).
    """
    writer = CookieWriter(CookieAttributes(**attributes))  # type: ignore[arg-type]
    for is_https, expected in ((False, over_http), (True, [*over_http, *over_https])):
        found = attributes_of(writer.write_end(is_https=is_https))
        assert found[0] == expected[0]
        assert {*expected, "Max-Age=0"} <= set(found)
        assert [one for one in found if one.startswith("Max-Age")] == ["Max-Age=0"]
        assert ("Secure" in found) == ("Secure" in expected)
        assert ("Partitioned" in found) == ("Partitioned" in expected)


@pytest.mark.parametrize("is_https", [False, True])
@pytest.mark.parametrize("same_site", ["lax", "strict", "none"])
@pytest.mark.parametrize("secure", [True, False, "auto"])
@pytest.mark.parametrize("partitioned", [False, True])
def test_no_cookie_is_written_that_browsers_drop(
    is_https: bool,  # noqa: FBT001
    same_site: Literal["lax", "strict", "none"],
    secure: bool | Literal["auto"],  # noqa: FBT001
    partitioned: bool,  # noqa: FBT001
) -> None:
    """SameSite=None and Partitioned need Secure; Secure over plain HTTP is only the operator's own wish."""
    line = written(is_https=is_https, same_site=same_site, secure=secure, partitioned=partitioned)
    is_secure = "; Secure" in line
    assert is_secure == (secure is True or (secure == "auto" and is_https))
    assert is_secure or ("SameSite=None" not in line and "Partitioned" not in line)
    morsel = SimpleCookie(line.removeprefix("Set-Cookie: ").removesuffix("; Partitioned"))["stickyproxy"]
    assert (morsel.value, morsel["path"], bool(morsel["secure"])) == ("T", "/", is_secure)


@pytest.mark.parametrize(
    ("cache_control", "is_shared"),
    [
        (None, False),
        (b",no-cache", False),
        (b",private, max-age=60", False),
        (b",max-age=60", False),
        (b",public", True),
        (b",no-cache,public, max-age=60", True),
        (b",max-age=31536000, immutable", True),
        (b",s-maxage=600", True),
    ],
)
def test_what_a_shared_cache_would_keep(cache_control: bytes | None, is_shared: bool) -> None:  # noqa: FBT001
    assert is_shared_cacheable(cache_control) is is_shared


# Cookies of the application with our name


@pytest.mark.parametrize(
    "line",
    [
        b"Set-Cookie: stickyproxy=theirs",
        b"set-cookie: stickyproxy=",
        b"SET-COOKIE: stickyproxy =theirs; Path=/app; HttpOnly",
        b"Set-Cookie: stickyproxy; Path=/",
        b"Set-Cookie: stickyproxy",
    ],
)
def test_a_cookie_of_the_application_never_takes_our_place(line: bytes) -> None:
    others = [b"X: stickyproxy=1", b"Set-Cookie: stickyproxy2=a", b"Set-Cookie: a=stickyproxy=b", b"Set-Cookie: A=b"]
    writer = CookieWriter(CookieAttributes())
    for position in range(len(others) + 1):
        lines = [*others[:position], line, *others[position:]]
        section = [b"".join(one + b"\r\n" for one in lines[:2]), b"".join(one + b"\r\n" for one in lines[2:])]
        assert b"".join(writer.drop_foreign(section)) == b"".join(one + b"\r\n" for one in others)


def test_cookies_with_other_names_are_not_touched() -> None:
    section = [b"Set-Cookie: Stickyproxy=a\r\nSet-Cookie: xstickyproxy=a\r\n", b"Set-Cookie: stickyproxyx=a\r\n"]
    assert CookieWriter(CookieAttributes()).drop_foreign(section) == section


# Several cookies


@pytest.mark.parametrize(
    ("value", "tokens", "rest"),
    [
        (b"pin=1; pin-shop=2", {b"pin": b"1", b"pin-shop": b"2"}, b""),
        (b"a=b; pin-shop=2;pin=1; c=d", {b"pin": b"1", b"pin-shop": b"2"}, b"Cookie: a=b; c=d\r\n"),
        (b"pin-shop=2; pin-shop=3; pin-shoplift=4", {b"pin-shop": b"2"}, b"Cookie: pin-shoplift=4\r\n"),
        (b"xpin=1; pin-other=2", {}, b"Cookie: xpin=1; pin-other=2\r\n"),
        (b'pin=; pin="5"', {b"pin": b"5"}, b""),
    ],
)
def test_several_cookies_are_taken_out_by_name(value: bytes, tokens: dict[bytes, bytes], rest: bytes) -> None:
    section = [b"Host: a\r\n", b"Cookie: " + value + b"\r\n"]
    assert CookiesReader(["pin", "pin-shop"]).take(section, [1]) == tokens
    assert section == [b"Host: a\r\n", rest]


@pytest.mark.parametrize(
    ("attributes", "is_weakened"),
    [
        ({}, False),
        ({"same_site": "none"}, True),
        ({"partitioned": True}, True),
        ({"same_site": "none", "secure": True}, False),
    ],
)
def test_a_writer_knows_what_falls_back_over_http(attributes: dict[str, Any], is_weakened: object) -> None:
    assert CookieWriter(CookieAttributes(**attributes)).is_weakened is is_weakened
