"""The section `listeners`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stickyproxy.config.address import Address
from stickyproxy.config.explain import explain
from stickyproxy.config.listener import Listener
from stickyproxy.config.schema import Config


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(raw)
    return list(explain(raised.value, Config))


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


def test_a_listener_is_plain_by_default() -> None:
    listener = Listener.model_validate(":80")
    assert (listener.tls, listener.proxy_protocol, listener.redirect_to_https) == (None, False, None)
    assert Listener.model_validate({"address": ":80", "tls": None, "redirect_to_https": None}) == listener


def test_a_listener_with_tls() -> None:
    listener = Listener.model_validate({"address": ":443", "tls": {"certificates": "/a.pem"}})
    assert listener.tls is not None
    assert len(listener.tls.certificates) == 1


@pytest.mark.parametrize(("raw", "port"), [(True, 443), (False, None), (None, None), (1, 1), (65535, 65535)])
def test_redirect(raw: object, port: int | None) -> None:
    assert Listener.model_validate({"address": ":80", "redirect_to_https": raw}).redirect_to_https == port


REDIRECT = "expected true, false or a port from 1 to 65535"
NOTHING_TO_REDIRECT = "a listener with tls has nothing to redirect: its clients came by https"


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({"redirect_to_https": 0}, ("redirect_to_https",), f"{REDIRECT}, got 0"),
        ({"redirect_to_https": 65536}, ("redirect_to_https",), f"{REDIRECT}, got 65536"),
        ({"redirect_to_https": "443"}, ("redirect_to_https",), f"{REDIRECT}, got '443'"),
        ({"redirect_to_https": 443.0}, ("redirect_to_https",), f"{REDIRECT}, got 443.0"),
        ({"redirect_to_https": True, "tls": {"certificates": "/a"}}, ("redirect_to_https",), NOTHING_TO_REDIRECT),
        ({"proxy_protocol": "v2"}, ("proxy_protocol",), "expected true or false, got 'v2'"),
        ({"tls": True}, ("tls",), "expected a mapping of keys, got true"),
        ({"tls": {}}, ("tls",), "the key 'certificates' is missing"),
        ({"tls": {"certificates": {"kye": "/a"}}}, ("tls", "certificates"), "the key 'certificate' is missing"),
        ({"tsl": None}, ("tsl",), "unknown key 'tsl'; did you mean 'tls'?"),
    ],
)
def test_a_wrong_key_of_a_listener(raw: dict[str, object], path: tuple[str, ...], message: str) -> None:
    found = mistakes({"listeners": [":1", {"address": ":80", **raw}]})
    assert found[0] == (("listeners", 1, *path), message)


def test_redirect_may_be_false_beside_tls() -> None:
    raw = {"address": ":443", "redirect_to_https": False, "tls": {"certificates": "/a"}}
    assert Listener.model_validate(raw).tls is not None


def test_the_json_schema_of_a_listener() -> None:
    properties = Listener.model_json_schema()["properties"]
    assert properties["tls"]["anyOf"] == [{"$ref": "#/$defs/ListenerTls"}, {"type": "null"}]
    assert properties["redirect_to_https"]["default"] is False
    assert properties["redirect_to_https"]["anyOf"] == [
        {"type": "boolean"},
        {"type": "integer", "minimum": 1, "maximum": 65535},
    ]
