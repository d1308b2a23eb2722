"""Which origins may open a WebSocket: what each rule allows, and what only looks like it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stickyproxy.wire.origin import OriginRules

HOST = b"app.example:8080"


def allows(item: str, origin: bytes | None, host: bytes = HOST) -> bool:
    return OriginRules((item,)).allows(origin, host)


@pytest.mark.parametrize(
    ("item", "origin"),
    [
        ("https://example.org", b"https://example.org"),
        ("https://example.org", b"https://example.org:443"),
        ("https://example.org", b"HTTPS://Example.ORG"),
        ("http://example.org", b"http://example.org:80"),
        ("http://example.org:8080", b"http://example.org:8080"),
        ("https://example.org:443", b"https://example.org"),
        ("https://EXAMPLE.org", b"https://example.org"),
        ("http://localhost:3000", b"http://localhost:3000"),
        ("http://my_app-1:3000", b"http://my_app-1:3000"),
        ("http://127.0.0.1:8080", b"http://127.0.0.1:8080"),
        ("http://[::1]:8080", b"http://[::1]:8080"),
        ("https://[2001:db8::a]", b"https://[2001:DB8::A]"),
        ("https://[2001:db8::a]", b"https://[2001:db8::a]:443"),
        ("https://xn--bcher-kva.example", b"https://xn--bcher-kva.example"),
        ("http://[2001:db8::a]", b"http://[2001:0db8:0:0::A]"),
        ("http://[::ffff:1.2.3.4]", b"http://[::ffff:102:304]"),
        ("https://*.example.org", b"https://a.example.org"),
        ("https://*.example.org", b"https://a.b.c.example.org"),
        ("https://*.example.org", b"https://A.Example.Org:443"),
        ("https://*.example.org:8443", b"https://a.example.org:8443"),
        ("https://*.EXAMPLE.org", b"https://a.example.org"),
        ("null", b"null"),
        ("absent", None),
    ],
)
def test_an_origin_that_a_rule_names_is_allowed(item: str, origin: bytes | None) -> None:
    assert allows(item, origin)
    others = OriginRules(("https://other.example", "https://*.other.example", item))
    assert others.allows(origin, HOST)
    assert not OriginRules(("https://other.example", "https://*.other.example")).allows(origin, HOST)


EXACT = "https://example.org"
DOMAIN = "https://*.example.org"


@pytest.mark.parametrize(
    ("item", "origin"),
    [
        pytest.param(EXACT, b"https://example.org.evil.com", id="a longer name"),
        pytest.param(EXACT, b"https://evilexample.org", id="a name that ends so"),
        pytest.param(EXACT, b"https://evil.com/https://example.org", id="a path"),
        pytest.param(EXACT, b"https://example.org@evil.com", id="a user name"),
        pytest.param(EXACT, b"https://evil.com@example.org", id="a user name before it"),
        pytest.param(EXACT, b"https://example.org:443@evil.com", id="a user name and password"),
        pytest.param(EXACT, b"https://example.org.", id="a dot at the end"),
        pytest.param(EXACT, b"https://a.example.org", id="a subdomain"),
        pytest.param(EXACT, b"http://example.org", id="another scheme"),
        pytest.param(EXACT, b"http://example.org:443", id="another scheme with the port"),
        pytest.param(EXACT, b"https://example.org:80", id="the port of another scheme"),
        pytest.param(EXACT, b"https://example.org:8443", id="another port"),
        pytest.param(EXACT, b"https://example.org:0443", id="a leading zero"),
        pytest.param(EXACT, b"https://example.org:", id="an empty port"),
        pytest.param(EXACT, b"https://example.org:65979", id="a port that is too large, 443 in 16 bits"),
        pytest.param(EXACT, b"https://example.org:+443", id="a sign"),
        pytest.param(EXACT, "https://example.org:\u0664\u0664\u0663".encode(), id="other digits"),
        pytest.param(EXACT, b"https://example.org:4_43", id="an underscore in the port"),
        pytest.param(EXACT, b"https://example.org/", id="a slash"),
        pytest.param(EXACT, b"https://example.org?", id="a query"),
        pytest.param(EXACT, b"https://example.org#", id="a fragment"),
        pytest.param(EXACT, b"https://example.org ", id="a space after"),
        pytest.param(EXACT, b" https://example.org", id="a space before"),
        pytest.param(EXACT, b"https://example.org\n", id="a line feed after"),
        pytest.param(EXACT, b"https://example.org\x00", id="NUL"),
        pytest.param(EXACT, b"https://example.org https://example.org", id="two origins"),
        pytest.param(EXACT, b"https://example.org, https://evil.com", id="two fields"),
        pytest.param(EXACT, b"https://evil.com, https://example.org", id="two fields, ours last"),
        pytest.param(EXACT, b"https://example%2eorg", id="percent"),
        pytest.param(EXACT, b"https://example.org\\@evil.com", id="a backslash"),
        pytest.param(EXACT, b"https:example.org", id="no slashes"),
        pytest.param(EXACT, b"https:///example.org", id="three slashes"),
        pytest.param(EXACT, b"://example.org", id="no scheme"),
        pytest.param(EXACT, b"example.org", id="a host"),
        pytest.param(EXACT, "https://ex\u0430mple.org".encode(), id="a letter of another script"),
        pytest.param(EXACT, b"null", id="null"),
        pytest.param(EXACT, b"", id="empty"),
        pytest.param(EXACT, None, id="absent"),
        pytest.param(DOMAIN, b"https://example.org", id="the bare domain"),
        pytest.param(DOMAIN, b"https://.example.org", id="an empty label"),
        pytest.param(DOMAIN, b"https://a..example.org", id="an empty label between"),
        pytest.param(DOMAIN, b"https://evilexample.org", id="no dot"),
        pytest.param(DOMAIN, b"https://a.example.org.evil.com", id="a longer name than the domain's"),
        pytest.param(DOMAIN, b"https://a.example.org.", id="a subdomain with a dot at the end"),
        pytest.param(DOMAIN, b"https://evil.com/.example.org", id="a path that ends so"),
        pytest.param(DOMAIN, b"https://evil.com#.example.org", id="a fragment that ends so"),
        pytest.param(DOMAIN, b"https://evil.com:1.example.org", id="a port that ends so"),
        pytest.param(DOMAIN, b"https://*.example.org", id="the wildcard itself"),
        pytest.param(DOMAIN, b"http://a.example.org", id="a subdomain by another scheme"),
        pytest.param(DOMAIN, b"https://a.example.org:8443", id="a subdomain at another port"),
        pytest.param("http://[::1]", b"http://[::2]", id="another IPv6 address"),
        pytest.param("http://[::1]", b"http://::1", id="no brackets"),
        pytest.param("http://[::1]", b"http://[::1", id="half the brackets"),
        pytest.param("http://[::1]", b"http://[::1%25lo]", id="a zone"),
        pytest.param("http://[::1]", b"http://[1]", id="no IPv6 address, the same number"),
        pytest.param("http://[::1]", b"http://[:::1]", id="three colons"),
        pytest.param("http://[::1]", b"http://[]", id="empty brackets"),
        pytest.param("http://1.2.3.4", b"http://[::ffff:1.2.3.4]", id="an IPv4-mapped address is another origin"),
        pytest.param("null", b"NULL", id="null in upper case"),
        pytest.param("null", b"null ", id="null and a space"),
        pytest.param("null", b"", id="empty is not null"),
        pytest.param("null", None, id="absent is not null"),
        pytest.param("absent", b"", id="empty is not absent"),
        pytest.param("absent", b"null", id="null is not absent"),
        pytest.param("absent", b"absent", id="the word of a rule"),
        pytest.param("same-host", b"same-host", id="the word of another rule"),
        pytest.param("same-host", None, id="absent has no host"),
        pytest.param("same-host", b"null", id="null has no host"),
    ],
)
def test_what_only_looks_like_it_is_not_allowed(item: str, origin: bytes | None) -> None:
    assert not allows(item, origin)


@pytest.mark.parametrize(
    ("origin", "host", "expected"),
    [
        (b"https://app.example", b"app.example", True),
        (b"http://app.example", b"app.example", True),
        (b"https://app.example", b"APP.Example", True),
        (b"HTTPS://APP.example", b"app.example", True),
        (b"https://app.example", b"app.example:443", True),
        (b"https://app.example:443", b"app.example", True),
        (b"https://app.example", b"app.example:", True),
        (b"http://app.example:8080", b"app.example:8080", True),
        (b"http://[::1]:8080", b"[::1]:8080", True),
        (b"https://[2001:db8::A]", b"[2001:DB8::a]", True),
        (b"https://app.example.", b"app.example.", True),
        (b"https://app.example", b"app.example:80", False),
        (b"http://app.example", b"app.example:443", False),
        (b"http://app.example:8080", b"app.example", False),
        (b"http://app.example", b"app.example:8080", False),
        (b"https://app.example.", b"app.example", False),
        (b"https://app.example", b"app.example.", False),
        (b"https://evil.example", b"app.example", False),
        (b"https://a.app.example", b"app.example", False),
        (b"https://app.example", b"app.example:0443", False),
        (b"https://app.example", b"app.example:65979", False),
        (b"https://app.example", b"", False),
        (b"https://app.example", b"app.example, app.example", False),
        (b"https://app.example", b"app.example@evil", False),
        (b"https://app.example", b"app.example\n", False),
        (b"https://[::1]", b"[::2]", False),
        (b"https://[::1]", b"[:::1]", False),
        (b"ftp://app.example", b"app.example", False),
    ],
)
def test_the_same_host_is_that_of_the_request(origin: bytes, host: bytes, expected: bool) -> None:  # noqa: FBT001
    """A port that Host does not name is the default of the Origin's scheme, whatever the listener speaks."""
    assert allows("same-host", origin, host) == expected
    assert not allows("https://other.example", origin, host)


def test_without_items_nothing_is_allowed() -> None:
    rules = OriginRules(())
    assert not any(rules.allows(origin, b"a") for origin in (None, b"null", b"http://a", b""))


def test_several_domains_of_one_scheme_and_port() -> None:
    rules = OriginRules(("https://*.a.example", "https://*.b.example", "http://*.c.example"))
    allowed = [name for name in (b"a", b"b", b"c", b"d") if rules.allows(b"https://x." + name + b".example", HOST)]
    assert allowed == [b"a", b"b"]


@pytest.mark.parametrize(
    "item",
    ["", "*", "example.org", "https://", "https://example.org/", "https://*", "https://*.", "https://*.*.example.org",
     "https://a.*.example.org", "https://*.[::1]", "https://b\xfccher.example", "https://example.org:99999", "NULL",
     "same-Host", "https://u@example.org", "wss://example.org", "http://[:::1]"],
)  # fmt: skip
def test_an_item_that_is_no_rule_is_refused(item: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        OriginRules((EXACT, item))


NAMES = st.from_regex(r"[a-z0-9-]{1,5}(\.[a-z0-9-]{1,5}){0,3}", fullmatch=True)


@given(NAMES, NAMES, st.sampled_from(["http", "https"]), st.sampled_from([None, 80, 443, 8080]))
@example("a", "b", "https", None)
def test_a_wildcard_stands_for_one_label_or_more(name: str, domain: str, scheme: str, port: int | None) -> None:
    end = "" if port is None else f":{port}"
    rules = OriginRules((f"{scheme}://*.{domain}{end}",))
    assert rules.allows(f"{scheme}://{name}.{domain}{end}".encode(), HOST)
    assert not rules.allows(f"{scheme}://{name}{domain}{end}".encode(), HOST) or (name + domain).endswith("." + domain)
    assert rules.allows(f"{scheme}://{name}{end}".encode(), HOST) == name.endswith("." + domain)


PARTS = [b"https", b"http", b"://", b"example.org", b"a.", b".", b":", b"443", b"80", b"[::1]", b"*", b"@", b"/", b" ",
         b",", b"null", b"\n", b"\xff", b"E"]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=7).map(b"".join), st.lists(st.sampled_from(PARTS), max_size=4))
def test_nothing_is_allowed_but_the_ways_to_write_what_is_named(origin: bytes, host: list[bytes]) -> None:
    """Whatever Host says: only `same-host` looks at it."""
    rules = OriginRules((EXACT, "http://[::1]"))
    named = {b"https://example.org", b"https://example.org:443", b"http://[::1]", b"http://[::1]:80"}
    assert rules.allows(origin, b"".join(host)) == (origin.lower() in named)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_have_an_answer(origin: bytes, host: bytes) -> None:
    rules = OriginRules((EXACT, DOMAIN, "same-host", "null", "absent"))
    assert rules.allows(origin, host) in {True, False}


def test_a_long_origin_costs_no_more_than_its_length() -> None:
    """It would not end if the names were tried one by one from each dot, or the expression went back."""
    for origin in (b"https://" + b"a." * 1_000_000, b"https://" + b"a." * 1_000_000 + b"/", b"h" * 2_000_000):
        assert not allows(DOMAIN, origin)
