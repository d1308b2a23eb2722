"""Routes: the most specific one counts, wherever it stands; a path matches whole segments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.affinity.routes import Route, Routes, normalise_host, strip_prefix


def make(*written: str) -> Routes[str]:
    """Return routes written as `host/path`, each leading to itself."""
    pairs = []
    for one in written:
        host, slash, path = one.partition("/")
        pairs.append((Route("any", host, slash + path), one))
    return Routes(pairs)


WRITTEN = (
    "", "/chat", "/chat/rooms", "*.example.org", "*.example.org/tool", "*.a.example.org", "shop.example.org/tool",
    "shop.example.org/tool/deep", "[::1]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("host", "target", "found"),
    [
        ("other.net", "/", ""),
        ("other.net", "/chat", "/chat"),
        ("other.net", "/chat?a=/chat/rooms", "/chat"),
        ("other.net", "/chat/rooms/1", "/chat/rooms"),
        ("other.net", "/chatter", ""),
        ("example.org", "/", ""),
        ("x.example.org", "/", "*.example.org"),
        ("x.example.org", "/chat", "*.example.org"),
        ("x.example.org", "/tool/x", "*.example.org/tool"),
        ("x.a.example.org", "/tool", "*.a.example.org"),
        ("evilexample.org", "/", ""),
        ("shop.example.org", "/tool", "shop.example.org/tool"),
        ("SHOP.Example.org.:8443", "/tool/", "shop.example.org/tool"),
        ("shop.example.org", "/tool/deep/er", "shop.example.org/tool/deep"),
        ("shop.example.org", "/toolbox", "*.example.org"),
        ("[::1]:80", "/x", "[::1]"),
        ("", "*", ""),
    ],
)
def test_the_most_specific_route_is_found(host: str, target: str, found: str) -> None:
    for order in (WRITTEN, WRITTEN[::-1]):
        assert make(*order).find(host.encode(), target.encode()) == found


def test_without_a_route_nothing_is_found() -> None:
    assert make("a.org", "*.b.org/x").find(b"b.org", b"/x") is None
    assert make().find(b"b.org", b"/x") is None
    assert repr(make("a.org", "*.b.org/x")) == "<Routes hosts=1 wildcards=1>"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("A.org", "a.org"),
        ("a.org:80", "a.org"),
        ("a.org:", "a.org"),
        ("a.org.", "a.org"),
        ("[::1]:8", "[::1]"),
        ("", ""),
    ],
)
def test_hosts_are_compared_without_case_port_and_root(host: str, name: str) -> None:
    assert normalise_host(host.encode()) == name.encode()


@pytest.mark.parametrize(
    ("target", "rest"),
    [("/tool", "/"), ("/tool/", "/"), ("/tool?a=/tool", "/?a=/tool"), ("/tool/x?y", "/x?y"), ("/tool/tool", "/tool")],
)
def test_a_prefix_is_taken_off(target: str, rest: str) -> None:
    assert strip_prefix(target.encode(), b"/tool") == rest.encode()


def test_the_place_of_a_route_is_said_in_words() -> None:
    assert [one.place for one in (Route("a"), Route("a", "b.org"), Route("a", "*.b.org", "/x"))] == [
        "*",
        "b.org",
        "*.b.org/x",
    ]


# Against a naive model

LABELS = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3)
HOSTS = LABELS.map(".".join)
PATHS = st.lists(st.sampled_from(["x", "y", "xy"]), max_size=3).map(lambda parts: "".join(f"/{part}" for part in parts))
ROUTE_HOSTS = st.one_of(st.just(""), HOSTS, HOSTS.map("*.{}".format))


def matches(route: Route, host: str, path: str) -> bool:
    is_host = not route.host or route.host == host or (route.host[:1] == "*" and host.endswith(route.host[1:]))
    wanted, given_ = route.path.split("/"), path.split("/")
    return is_host and given_[: len(wanted)] == wanted


def rank(route: Route) -> tuple[int, int, int]:
    kind = 0 if not route.host else 1 if route.host[0] == "*" else 2
    return kind, len(route.host), len(route.path)


@given(
    st.lists(st.tuples(ROUTE_HOSTS, PATHS), max_size=8, unique=True),
    HOSTS,
    PATHS,
    st.sampled_from(["", "/", "?x/y", "x"]),
)
def test_what_is_found_is_what_a_naive_search_finds(
    written: list[tuple[str, str]], host: str, path: str, rest: str
) -> None:
    routes = [Route(str(number), *one) for number, one in enumerate(written)]
    target = path + rest if path else "/" + rest.removeprefix("/")
    matching = [route for route in routes if matches(route, host, target.partition("?")[0])]
    expected = max(matching, key=rank).cluster if matching else None
    found = Routes([(route, route.cluster) for route in routes]).find(host.encode(), target.encode())
    assert found == expected
