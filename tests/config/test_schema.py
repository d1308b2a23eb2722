"""The whole configuration, and what its sections forbid each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from stickyproxy.config.address import Address
from stickyproxy.config.explain import explain
from stickyproxy.config.listener import Listener
from stickyproxy.config.schema import AccessLog, Admin, Config
from stickyproxy.config.secret import Sources
from stickyproxy.config.upstream import Upstream

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
    for number in (1, 2, 64):
        assert Config.model_validate({"workers": number}).workers == number
    assert Config.model_validate({"workers": "auto"}).workers == "auto"


WORKERS = "expected auto or a whole number from 1 to 64"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (0, f"{WORKERS}, got 0"),
        (65, f"{WORKERS}, got 65"),
        (-1, f"{WORKERS}, got -1"),
        (True, f"{WORKERS}, got true"),
        (1.0, f"{WORKERS}, got 1.0"),
        ("1", f"{WORKERS}, got '1'; remove the quotes"),
        ("cores", f"{WORKERS}, got 'cores'"),
    ],
)
def test_wrong_workers(raw: object, message: str) -> None:
    assert mistakes({"workers": raw}) == [(("workers",), message)]


def test_the_json_schema_of_workers() -> None:
    schema = Config.model_json_schema()["properties"]["workers"]
    assert schema["anyOf"] == [{"type": "integer", "minimum": 1, "maximum": 64}, {"enum": ["auto"]}]


@pytest.mark.parametrize("key", ["control", "hand_over"])
def test_a_socket_has_a_path_or_its_usual_place_or_is_none(key: str) -> None:
    assert getattr(Config(), key) is None
    assert getattr(Config.model_validate({key: None}), key) is None
    assert getattr(Config.model_validate({key: False}), key) is False
    assert getattr(Config.model_validate({key: "/run/x.sock"}), key) == Path("/run/x.sock")
    assert Config.model_json_schema()["properties"][key]["default"] is None


SOCKET = "expected the absolute path of a socket, as in /run/stickyproxy.sock"


@pytest.mark.parametrize("key", ["control", "hand_over"])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("x.sock", SOCKET),
        ("unix:/run/x.sock", SOCKET),
        ("/run/", SOCKET),
        ("", SOCKET),
        ("/" + "x" * 107, "the path of a socket has at most 107 bytes; the kernel takes no more"),
        ("/" + "é" * 54, "the path of a socket has at most 107 bytes; the kernel takes no more"),
        ("/x\n", "the path of a socket has no control characters"),
        (True, "expected the absolute path of a socket or false, got true; for the usual place leave it out"),
        (7, "expected text, got 7; put quotes around it"),
    ],
)
def test_wrong_sockets(key: str, raw: object, message: str) -> None:
    assert mistakes({key: raw}) == [((key,), message)]


def test_a_socket_has_one_use() -> None:
    raw = {"listeners": ["unix:/l"], "admin": {"address": "unix:/a"}}
    assert Config.model_validate({**raw, "control": "/c", "hand_over": "/h"}).control == Path("/c")
    assert mistakes({**raw, "control": "/l", "hand_over": "/./a"}) == [
        (("control",), "/l is the path of a listener too"),
        (("hand_over",), "/a is the path of admin too"),
    ]
    assert mistakes({"control": "/c", "hand_over": "/c"}) == [(("hand_over",), "/c is the path of control too")]


def test_reload_on_change() -> None:
    assert Config().reload_on_change is False
    assert Config.model_validate({"reload_on_change": True}).reload_on_change is True


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


def test_dns_refresh() -> None:
    assert Config().dns_refresh_s == 10.0
    assert Config.model_validate({"dns_refresh": False}).dns_refresh_s is None
    assert Config.model_validate({"dns_refresh": "1m"}).dns_refresh_s == 60.0
    assert mistakes({"dns_refresh": 0}) == [(("dns_refresh",), "expected a duration above 0, got 0")]


NETWORKS_NEEDED = "proxy_protocol needs the networks that send it in trusted_proxies; all other connections are refused"
UNIX_NEEDED = "proxy_protocol needs unix in trusted_proxies; all other connections are refused"


@pytest.mark.parametrize(
    ("trusted", "refused"),
    [
        ([], {0: NETWORKS_NEEDED, 2: UNIX_NEEDED}),
        (["10.0.0.0/8"], {2: UNIX_NEEDED}),
        (["unix"], {0: NETWORKS_NEEDED}),
        (["10.0.0.0/8", "unix"], {}),
    ],
)
def test_the_proxy_protocol_needs_somebody_who_is_trusted(trusted: list[str], refused: dict[int, str]) -> None:
    listeners = [
        {"address": ":1", "proxy_protocol": True},
        {"address": ":2", "proxy_protocol": False},
        {"address": "unix:/x", "proxy_protocol": True},
    ]
    raw = {"listeners": listeners, "trusted_proxies": trusted}
    if refused:
        expected = [(("listeners", position, "proxy_protocol"), text) for position, text in refused.items()]
        assert mistakes(raw) == expected
    else:
        assert [one.proxy_protocol for one in Config.model_validate(raw).listeners] == [True, False, True]


def test_an_app_is_either_run_or_listed() -> None:
    text = "an app is either run here or listed: where there is run, there are no upstreams"
    assert Config().run is None
    assert Config.model_validate({"run": {"command": "a"}, "upstreams": []}).run is not None
    assert mistakes({"run": {"command": "a"}, "upstreams": ["http://a"]}) == [(("upstreams",), text)]


def test_conflicts_are_looked_for_again_after_a_change() -> None:
    config = Config.model_validate({"run": {"command": "a {port}", "env": {"A": "{port}"}}})
    other = Config.model_validate({"run": {"command": "a {socket}"}, "control": "/c"})
    assert config.run is not None
    assert other.run is not None
    assert list(config.find_conflicts()) == []
    run = config.run.model_copy(update={"command": other.run.command})
    changed = config.model_copy(update={"run": run, "control": Path("/c"), "hand_over": Path("/c")})
    assert [path for path, _ in changed.find_conflicts()] == [("hand_over",), ("run", "env", "A")]
