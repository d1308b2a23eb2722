"""The whole configuration, and what its sections forbid each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from stickyproxy.config.address import Address
from stickyproxy.config.explain import explain
from stickyproxy.config.schema import AccessLog, Admin, Config, Listener, Upstream
from stickyproxy.config.secret import Sources

TOKEN = "t" * 16


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(raw)
    return list(explain(raised.value, Config))


def test_the_defaults() -> None:
    config = Config()
    assert [listener.address for listener in config.listeners] == [Address("127.0.0.1", 8080)]
    assert config.upstreams == ()
    assert config.admin == Admin()
    assert config.admin.address == Address("127.0.0.1", 9090)
    assert config.admin.token is None
    assert config.access_log is None
    assert (config.log_level, config.grace_s, config.state_directory, config.workers) == ("info", 30.0, None, 1)
    assert Config.model_validate({}) == config


def test_empty_sections_are_defaults() -> None:
    assert Config.model_validate(dict.fromkeys(Config().model_dump(by_alias=True))) == Config()


def test_listeners_are_addresses_or_mappings() -> None:
    config = Config.model_validate({"listeners": [":80", {"address": "unix:/x"}]})
    assert [listener.address for listener in config.listeners] == [Address(port=80), Address(path="/x")]


def test_port_zero_may_stand_twice() -> None:
    assert len(Config.model_validate({"listeners": ["127.0.0.1:0", "127.0.0.1:0"]}).listeners) == 2


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([], [(("listeners",), "expected at least one listener")]),
        (":80", [(("listeners",), "expected a list, got text")]),
        ([":80", {"address": ":80"}], [(("listeners", 1, "address"), ":80 is listed twice")]),
        (["unix:/x", "unix:/x"], [(("listeners", 1, "address"), "unix:/x is listed twice")]),
        ([8080], [(("listeners", 0), "expected an address or a mapping of keys, got a number")]),
        ([{}], [(("listeners", 0), "the key 'address' is missing")]),
    ],
)
def test_wrong_listeners(raw: object, expected: object) -> None:
    assert mistakes({"listeners": raw}) == expected


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


def test_admin() -> None:
    assert Config.model_validate({"admin": False}).admin is None
    config = Config.model_validate({"admin": {"address": ":9090", "token": "env:T"}}, context=Sources({"T": TOKEN}))
    assert config.admin is not None
    assert (config.admin.address, config.admin.token) == (Address(port=9090), TOKEN)
    assert TOKEN not in repr(config)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"address": "0.0.0.0:9090"},
            [(("admin", "address"), "an admin address that is not loopback needs a token")],
        ),
        ({"token": "hunter2"}, [(("admin", "token"), "a token has at least 16 characters, this one has 7")]),
        ("127.0.0.1:1", [(("admin",), "expected a mapping of keys or false, got text")]),
    ],
)
def test_wrong_admin(raw: object, expected: object) -> None:
    assert mistakes({"admin": raw}) == expected


def test_access_log() -> None:
    assert Config.model_validate({"access_log": "combined"}).access_log == AccessLog(format="combined", path="-")
    config = Config.model_validate({"access_log": {"path": "/var/log/x"}})
    assert config.access_log == AccessLog(format="json", path="/var/log/x")
    assert Config.model_validate({"access_log": False}).access_log is None
    assert mistakes({"access_log": "xml"}) == [(("access_log", "format"), "expected json or combined, got 'xml'")]
    assert mistakes({"access_log": {"path": "x"}}) == [
        (("access_log", "path"), "expected an absolute path, or - for standard output, got 'x'")
    ]
    assert mistakes({"access_log": 1}) == [
        (("access_log",), "expected json, combined, false or a mapping of keys, got a number")
    ]


def test_workers() -> None:
    assert Config.model_validate({"workers": 1}).workers == 1
    assert Config.model_validate({"workers": "auto"}).workers == "auto"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (2, "this version runs one worker; expected 1 or auto"),
        (0, "expected 1 or auto, got 0"),
        (True, "expected 1 or auto, got true"),
        (1.0, "expected 1 or auto, got 1.0"),
        ("1", "expected 1 or auto, got '1'"),
    ],
)
def test_wrong_workers(raw: object, message: str) -> None:
    assert mistakes({"workers": raw}) == [(("workers",), message)]


def test_the_rest_of_the_top_level() -> None:
    config = Config.model_validate({"log_level": "debug", "grace": 0, "state_directory": "/var/lib/stickyproxy"})
    assert (config.log_level, config.grace_s) == ("debug", 0.0)
    assert config.state_directory == Path("/var/lib/stickyproxy")
    assert mistakes({"log_level": "loud", "grace": -1, "state_directory": "state"}) == [
        (("log_level",), "expected debug, info, warning or error, got 'loud'"),
        (
            ("grace",),
            "expected a duration such as 500ms, 30s, 10m, 1h or 2d, got -1; a number needs its unit (ms, s, m, h or d)",
        ),
        (("state_directory",), "expected an absolute path, got 'state'"),
    ]


def test_parts_of_a_config_can_be_given_as_they_are() -> None:
    listeners = [Listener.model_validate(":1")]
    upstreams = [Upstream.model_validate("unix:/x")]
    config = Config.model_validate({"listeners": listeners, "upstreams": upstreams})
    assert config.listeners == tuple(listeners)
    assert config.upstreams == tuple(upstreams)
