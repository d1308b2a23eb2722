"""The sections `timeouts` and `limits`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stickyproxy.config.explain import explain
from stickyproxy.config.limits import Limits, Timeouts


def test_the_defaults_of_the_timeouts() -> None:
    assert Timeouts().model_dump() == {
        "head_s": 10.0,
        "body_idle_s": 60.0,
        "keep_alive_s": 75.0,
        "connect_s": 5.0,
        "response_s": 300.0,
        "upstream_keep_alive_s": 4.0,
        "tunnel_idle_s": None,
        "linger_s": 2.0,
    }


def test_the_defaults_of_the_limits() -> None:
    assert Limits().model_dump() == {
        "head_bytes": 131072,
        "line_bytes": 65536,
        "fields": 200,
        "target_bytes": 16384,
        "trailers_bytes": 8192,
        "chunk_extensions_bytes": 4096,
        "buffer_bytes": 65536,
        "upstream_idle_connections": 256,
    }


@pytest.mark.parametrize("key", ["body_idle", "response", "tunnel_idle"])
def test_some_timeouts_can_be_off(key: str) -> None:
    assert getattr(Timeouts.model_validate({key: False}), f"{key}_s") is None
    assert getattr(Timeouts.model_validate({key: "1m"}), f"{key}_s") == 60.0


@pytest.mark.parametrize("key", ["keep_alive", "upstream_keep_alive", "linger"])
def test_some_timeouts_can_be_zero(key: str) -> None:
    assert getattr(Timeouts.model_validate({key: 0}), f"{key}_s") == 0.0


@pytest.mark.parametrize("key", ["head", "keep_alive", "connect", "upstream_keep_alive", "linger"])
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
