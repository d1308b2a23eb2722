"""The section `affinity`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stickyproxy.config.affinity import Affinity, Cookie, OnUnavailable
from stickyproxy.config.explain import explain
from stickyproxy.config.secret import Sources

NAME = "expected a cookie name of 1 to 64 characters without spaces and separators"
PATH = 'expected a path that begins with "/", without ";" and control characters'
FORMS = "expected redispatch, refuse or {wait: 10s}"


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        Affinity.model_validate(raw)
    return list(explain(raised.value, Affinity))


def test_the_defaults() -> None:
    assert Affinity.model_validate({}) == Affinity()
    affinity = Affinity()
    assert affinity.cookie == Cookie()
    assert affinity.secrets == ()
    assert affinity.policy == "least_sessions"
    assert affinity.on_unavailable == OnUnavailable("redispatch", 0.0)
    assert affinity.client_address is False
    assert (affinity.max_idle_s, affinity.max_life_s, affinity.session_idle_s) == (None, None, 300.0)


def test_the_defaults_of_the_cookie() -> None:
    cookie = Cookie()
    assert (cookie.name, cookie.path, cookie.domain, cookie.max_age_s) == (None, "/", None, None)
    assert (cookie.http_only, cookie.same_site, cookie.secure, cookie.partitioned) == (True, "lax", "auto", False)


def test_every_key_is_read() -> None:
    affinity = Affinity.model_validate(
        {
            "cookie": {
                "name": "__Secure-pin",
                "path": "/app x",
                "domain": ".example.org",
                "max_age": "30d",
                "http_only": False,
                "same_site": "none",
                "secure": True,
                "partitioned": True,
            },
            "policy": "random",
            "on_unavailable": {"wait": "10s"},
            "client_address": True,
            "max_idle": "1h",
            "max_life": "1d",
            "session_idle": 0,
        }
    )
    assert affinity.cookie is not None
    assert affinity.cookie.max_age_s == 2592000.0
    assert affinity.cookie.secure is True
    assert affinity.on_unavailable == OnUnavailable("wait", 10.0)
    assert (affinity.max_idle_s, affinity.max_life_s, affinity.session_idle_s) == (3600.0, 86400.0, 0.0)


def test_no_cookie() -> None:
    assert Affinity.model_validate({"cookie": False}).cookie is None


def test_refuse_when_unavailable() -> None:
    assert Affinity.model_validate({"on_unavailable": "refuse"}).on_unavailable == OnUnavailable("refuse")
    assert Affinity.model_validate({"on_unavailable": "redispatch"}).on_unavailable == OnUnavailable("redispatch")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("wait", f"{FORMS}, got 'wait'"),
        (True, f"{FORMS}, got true"),
        ({}, f"{FORMS}, got a mapping"),
        ({"wait": "1s", "x": 1}, f"{FORMS}, got a mapping"),
    ],
)
def test_what_is_no_answer_to_unavailable(raw: object, message: str) -> None:
    assert mistakes({"on_unavailable": raw}) == [(("on_unavailable",), message)]


def test_a_wait_without_length_is_refused() -> None:
    found = mistakes({"on_unavailable": {"wait": "0s"}})
    assert found == [(("on_unavailable", "wait"), "expected a duration above 0, got '0s'")]


@pytest.mark.parametrize(
    ("key", "raw", "message"),
    [
        ("name", "a b", f"{NAME}, got 'a b'"),
        ("name", "a=b", f"{NAME}, got 'a=b'"),
        ("name", "a;", f"{NAME}, got 'a;'"),
        ("name", "", f"{NAME}, got ''"),
        ("name", "é", f"{NAME}, got 'é'"),
        ("path", "app", f"{PATH}, got 'app'"),
        ("path", "/;x", f"{PATH}, got '/;x'"),
        ("path", "/\r\n", f"{PATH}, got '/\\r\\n'"),
        ("domain", "a;b", "expected a domain name, got 'a;b'"),
        ("domain", "a\n", "expected a domain name, got 'a\\n'"),
        ("max_age", 0, "expected a duration above 0, got 0"),
        ("same_site", "lux", "expected lax, strict or none, got 'lux'"),
        ("same_site", False, "expected lax, strict or none, got false"),
        ("secure", "always", "expected auto, true or false, got 'always'"),
        ("secure", 1, "expected auto, true or false, got 1"),
    ],
)
def test_a_wrong_attribute_of_the_cookie(key: str, raw: object, message: str) -> None:
    assert mistakes({"cookie": {key: raw}}) == [(("cookie", key), message)]


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [
        (
            {"secure": False, "same_site": "none", "partitioned": True},
            {
                "same_site": "browsers refuse same_site: none with secure: false",
                "partitioned": "browsers refuse partitioned: true with secure: false",
            },
        ),
        (
            {"name": "__Host-x", "secure": False, "path": "/a", "domain": "example.org"},
            {
                "secure": "a cookie named __Host-... cannot have secure: false",
                "path": "a cookie named __Host-... has the path /",
                "domain": "a cookie named __Host-... has no domain",
            },
        ),
        (
            {"name": "__secure-x", "secure": False, "path": "/a"},
            {"secure": "a cookie named __Secure-... cannot have secure: false"},
        ),
    ],
)
def test_attributes_that_browsers_refuse_together(cookie: object, expected: dict[str, str]) -> None:
    assert mistakes({"cookie": cookie}) == [(("cookie", key), message) for key, message in expected.items()]


@pytest.mark.parametrize(
    "cookie",
    [{"secure": False}, {"same_site": "none", "partitioned": True}, {"name": "__Host-x"}, {"name": "__Secure-x"}],
)
def test_attributes_that_go_together(cookie: object) -> None:
    assert Affinity.model_validate({"cookie": cookie}).cookie is not None


def test_secrets_are_resolved_and_not_shown() -> None:
    sources = Sources({"NAME": "e" * 32})
    affinity = Affinity.model_validate({"secrets": ["env:NAME", "l" * 32]}, context=sources)
    assert affinity.secrets == (b"e" * 32, b"l" * 32)
    assert "e" * 32 not in repr(affinity)
    assert "l" * 32 not in str(affinity)


def test_wrong_secrets_are_named_one_by_one_and_not_shown() -> None:
    assert mistakes({"secrets": ["env:NAME", "hunter2", 7]}) == [
        (("secrets", 0), "the environment variable NAME is not set"),
        (("secrets", 1), "a secret has at least 32 bytes, this one has 7"),
        (("secrets", 2), "expected text: env:NAME, file:/path or the secret itself, in quotes"),
    ]
    assert mistakes({"secrets": "hunter2"}) == [
        (("secrets",), 'expected a list, as in ["env:STICKYPROXY_SECRET"], got text')
    ]
