"""The JSON bodies of the admin API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet


def read_body(body: bytes, keys: AbstractSet[str]) -> dict[str, Any]:
    """Return the object of a body with no other keys than these; {} for an empty one. Raises HTTPBadRequest."""
    try:
        parsed = json.loads(body) if body else {}
    except (ValueError, RecursionError):  # brackets nested some thousand deep fit into 4 KiB
        raise web.HTTPBadRequest(text="the body is no JSON") from None
    if not isinstance(parsed, dict) or parsed.keys() - keys:
        raise web.HTTPBadRequest(text=f"expected an object with no other keys than {', '.join(sorted(keys))}")
    return parsed
