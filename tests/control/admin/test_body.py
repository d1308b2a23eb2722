"""The JSON bodies of the admin API."""

from __future__ import annotations

import pytest
from aiohttp import web

from stickyproxy.control.admin.body import read_body

NO_JSON = "the body is no JSON"
NO_OBJECT = "expected an object with no other keys than a, b"


@pytest.mark.parametrize(("body", "expected"), [(b"", {}), (b"{}", {}), (b'{"b": [1]}', {"b": [1]})])
def test_a_body_is_an_object(body: bytes, expected: dict[str, object]) -> None:
    assert read_body(body, {"a", "b"}) == expected


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"drain", NO_JSON),
        (b"\xff", NO_JSON),
        (b"[" * 4000, NO_JSON),
        (b'"a"', NO_OBJECT),
        (b"null", NO_OBJECT),
        (b'["a"]', NO_OBJECT),
        (b'{"a": 1, "c": 2}', NO_OBJECT),
    ],
)
def test_anything_else_is_refused(body: bytes, error: str) -> None:
    with pytest.raises(web.HTTPBadRequest) as refused:
        read_body(body, {"a", "b"})
    assert refused.value.text == error
