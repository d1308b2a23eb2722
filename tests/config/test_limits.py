"""The sections `timeouts` and `limits`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stickyproxy.config.explain import explain
from stickyproxy.config.limits import Limits, Timeouts


def test_the_defaults_of_the_timeouts() -> None:
    assert Timeouts().model_dump() == {
        "tls_handshake_s": 10.0,
        "head_s": 10.0,
        "body_idle_s": 60.0,
        "keep_alive_s": 75.0,
        "send_s": 60.0,
        "connect_s": 5.0,
        "response_s": 300.0,
        "response_idle_s": 300.0,
        "websocket_handshake_s": 60.0,
        "upstream_keep_alive_s": 4.0,
        "tunnel_idle_s": None,
        "tunnel_max_age_s": None,
        "tunnel_max_age_jitter_percent": 10,
        "linger_s": 2.0,
    }


def test_the_defaults_of_the_limits() -> None:
    assert Limits().model_dump() == {
        "head_bytes": 131072,
        "line_bytes": 65536,
        "fields": 200,
        "target_bytes": 16384,
        "handshake_bytes": 131072,
        "body_bytes": None,
        "trailers_bytes": 8192,
        "chunk_extensions_bytes": 4096,
        "buffer_bytes": 65536,
        "connections": None,
        "connections_per_address": None,
        "upstream_idle_connections": 256,
    }


@pytest.mark.parametrize("key", ["body_idle", "send", "response", "response_idle", "tunnel_idle", "tunnel_max_age"])
def test_some_timeouts_can_be_off(key: str) -> None:
    assert getattr(Timeouts.model_validate({key: False}), f"{key}_s") is None
    assert getattr(Timeouts.model_validate({key: "1m"}), f"{key}_s") == 60.0


@pytest.mark.parametrize("key", ["keep_alive", "upstream_keep_alive", "linger"])
def test_some_timeouts_can_be_zero(key: str) -> None:
    assert getattr(Timeouts.model_validate({key: 0}), f"{key}_s") == 0.0


@pytest.mark.parametrize(
    "key", ["tls_handshake", "head", "keep_alive", "connect", "websocket_handshake", "upstream_keep_alive", "linger"]
)
def test_others_cannot_be_off(key: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Timeouts.model_validate({key: False})
    message = "expected a duration such as 500ms, 30s, 10m, 1h or 2d; this cannot be switched off"
    assert list(explain(raised.value, Timeouts)) == [((key,), message)]


def test_limits_have_bounds() -> None:
    with pytest.raises(ValidationError) as raised:
        Limits.model_validate({"head": "10B", "fields": 0, "trailers": "0B", "buffer": "1GiB", "line": 64})
    assert list(explain(raised.value, Limits)) == [
        (("head",), "expected a size from 1KiB to 16MiB, got '10B'"),
        (
            ("line",),
            "expected a size such as 512B, 64KiB or 1MiB, got 64; a number needs its unit (B, KiB, MiB or GiB)",
        ),
        (("fields",), "expected a whole number from 1 to 10000, got 0"),
        (("buffer",), "expected a size from 4KiB to 16MiB, got '1GiB'"),
    ]


def test_the_jitter_of_tunnels_is_a_percentage() -> None:
    assert Timeouts.model_validate({"tunnel_max_age_jitter": 0}).tunnel_max_age_jitter_percent == 0
    with pytest.raises(ValidationError) as raised:
        Timeouts.model_validate({"tunnel_max_age_jitter": 51})
    message = "expected a whole number from 0 to 50, got 51"
    assert list(explain(raised.value, Timeouts)) == [(("tunnel_max_age_jitter",), message)]


@pytest.mark.parametrize(
    ("key", "raw", "name", "value"),
    [
        ("body", "off", "body_bytes", None),
        ("body", False, "body_bytes", None),
        ("body", 0, "body_bytes", 0),
        ("body", "0B", "body_bytes", 0),
        ("body", "1024GiB", "body_bytes", 1 << 40),
        ("handshake", "16MiB", "handshake_bytes", 16 << 20),
        ("connections", "auto", "connections", None),
        ("connections", 1_000_000, "connections", 1_000_000),
        ("connections_per_address", False, "connections_per_address", None),
        ("connections_per_address", "off", "connections_per_address", None),
        ("connections_per_address", 1, "connections_per_address", 1),
    ],
)
def test_limits_that_a_word_may_stand_for(key: str, raw: object, name: str, value: int | None) -> None:
    assert getattr(Limits.model_validate({key: raw}), name) == value


@pytest.mark.parametrize(
    ("key", "raw", "message"),
    [
        ("body", "2048GiB", "expected off or a size of at most 1024GiB, got '2048GiB'"),
        ("body", True, "expected off or a size such as 512B, 64KiB or 1MiB, got true"),
        ("body", "auto", "expected off or a size such as 512B, 64KiB or 1MiB, got 'auto'"),
        ("handshake", "32MiB", "expected a size from 1KiB to 16MiB, got '32MiB'"),
        ("connections", 0, "expected auto or a whole number from 1 to 1000000, got 0"),
        ("connections", False, "expected auto or a whole number from 1 to 1000000, got false"),
        ("connections_per_address", 0, "expected off or a whole number from 1 to 1000000, got 0"),
        ("connections_per_address", "auto", "expected off or a whole number from 1 to 1000000, got 'auto'"),
    ],
)
def test_limits_that_no_word_may_stand_for(key: str, raw: object, message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Limits.model_validate({key: raw})
    assert list(explain(raised.value, Limits)) == [((key,), message)]


def test_the_json_schema_of_limits_with_a_word() -> None:
    properties = Limits.model_json_schema()["properties"]
    size, off = properties["body"]["anyOf"]
    assert off == {"enum": ["off", False]}
    assert {"const": 0} in size["anyOf"]
    number = {"type": "integer", "minimum": 1, "maximum": 1_000_000}
    assert properties["connections"]["anyOf"] == [number, {"enum": ["auto"]}]
    assert properties["connections_per_address"]["anyOf"] == [number, off]
    defaults = {key: properties[key]["default"] for key in ("body", "connections", "connections_per_address")}
    assert defaults == {"body": "off", "connections": "auto", "connections_per_address": "off"}
    assert Limits.model_validate(defaults) == Limits()
