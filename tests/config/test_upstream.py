"""The section `upstreams`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stickyproxy.config.explain import explain
from stickyproxy.config.schema import Config
from stickyproxy.config.tls import UpstreamTls
from stickyproxy.config.upstream import Upstream


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(raw)
    return list(explain(raised.value, Config))


def test_upstreams_are_urls_or_mappings() -> None:
    config = Config.model_validate(
        {"upstreams": ["http://127.0.0.1:8001", {"id": "app-2", "url": "http://[::1]:1", "weight": 2}, "unix:/x"]}
    )
    assert [(upstream.id, upstream.weight) for upstream in config.upstreams] == [
        ("127.0.0.1:8001", 1),
        ("app-2", 2),
        ("/x", 1),
    ]


def test_an_id_does_not_depend_on_the_order() -> None:
    urls = ["http://a", "http://b", "unix:/c"]
    ids = {upstream.id for upstream in Config.model_validate({"upstreams": urls}).upstreams}
    assert ids == {upstream.id for upstream in Config.model_validate({"upstreams": urls[::-1]}).upstreams}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("http://a", [(("upstreams",), "expected a list, got text")]),
        (["http://a"] * 1001, [(("upstreams",), "expected at most 1000 upstreams, got 1001")]),
        ([{"weight": 1}], [(("upstreams", 0), "the key 'url' is missing")]),
        ([["http://a"]], [(("upstreams", 0), "expected a URL or a mapping of keys, got a list")]),
        (
            [{"url": "http://a", "wieght": 1}],
            [(("upstreams", 0, "wieght"), "unknown key 'wieght'; did you mean 'weight'?")],
        ),
        (
            [{"url": "http://a", "id": "a b"}],
            [
                (
                    ("upstreams", 0, "id"),
                    "expected 1 to 64 letters, digits, dots, underscores or hyphens, got 'a b'",
                )
            ],
        ),
        (
            [{"url": "http://a", "weight": 257}],
            [(("upstreams", 0, "weight"), "expected a whole number from 1 to 256, got 257")],
        ),
        (
            ["http://a", 7, "http://A:80/"],
            [
                (("upstreams", 1), "expected a URL or a mapping of keys, got a number"),
                (("upstreams", 2, "url"), "a:80 is listed twice; for a larger share of clients set its weight"),
            ],
        ),
        (
            [{"url": "http://a", "id": "x"}, {"url": "http://b", "id": "x"}],
            [(("upstreams", 1, "id"), "the id 'x' is taken by an upstream above")],
        ),
    ],
)
def test_wrong_upstreams(raw: object, expected: object) -> None:
    assert mistakes({"upstreams": raw}) == expected


def test_only_an_upstream_with_https_has_tls() -> None:
    assert Upstream.model_validate("http://a").tls is None
    assert Upstream.model_validate({"url": "unix:/x", "tls": None}).tls is None
    assert Upstream.model_validate("https://a").tls == UpstreamTls()
    assert Upstream.model_validate({"url": "https://a", "tls": {}}).tls == UpstreamTls()
    upstream = Upstream.model_validate({"url": "https://a", "tls": {"verify": False}})
    assert upstream.tls == UpstreamTls(verify=False)


def test_http_and_https_to_one_port_are_two_addresses_of_one_id() -> None:
    raw = ["http://a:443", "https://a"]
    assert mistakes({"upstreams": raw}) == [(("upstreams", 1, "id"), "the id 'a:443' is taken by an upstream above")]
    config = Config.model_validate({"upstreams": [raw[0], {"url": raw[1], "id": "b"}]})
    assert [one.address.is_tls for one in config.upstreams] == [False, True]
    assert mistakes({"upstreams": ["https://a", "https://A:443/"]}) == [
        (("upstreams", 1, "url"), "a:443 is listed twice; for a larger share of clients set its weight")
    ]


def test_max_sessions() -> None:
    assert Upstream.model_validate("http://a").max_sessions is None
    assert Upstream.model_validate({"url": "http://a", "max_sessions": 1_000_000}).max_sessions == 1_000_000
    assert Upstream.model_json_schema()["properties"]["max_sessions"]["anyOf"] == [
        {"type": "integer", "minimum": 1, "maximum": 1_000_000},
        {"type": "null"},
    ]


NEEDS_HTTPS = "tls needs a url that begins with https://"


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({"url": "http://a", "tls": {}}, ("tls",), NEEDS_HTTPS),
        ({"url": "unix:/x", "tls": {"verify": False}}, ("tls",), NEEDS_HTTPS),
        ({"url": "https://a", "tls": False}, ("tls",), "expected a mapping of keys, got false"),
        (
            {"url": "https://a", "tls": {"verfy": False}},
            ("tls", "verfy"),
            "unknown key 'verfy'; did you mean 'verify'?",
        ),
        (
            {"url": "https://a", "explicit_tls": {}},
            ("explicit_tls",),
            "unknown key 'explicit_tls'; known here: id, url, weight, tls, max_sessions",
        ),
        (
            {"url": "http://a", "max_sessions": 0},
            ("max_sessions",),
            "expected a whole number from 1 to 1000000, got 0",
        ),
    ],
)
def test_a_wrong_key_of_an_upstream(raw: dict[str, object], path: tuple[str, ...], message: str) -> None:
    assert mistakes({"upstreams": [raw]}) == [(("upstreams", 0, *path), message)]
