"""The settings: the defaults are those of the configuration file, and nothing changes them later."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import TYPE_CHECKING

import pytest

from stickyproxy.config import Limits
from stickyproxy.config import Timeouts as TimeoutsOfTheFile
from stickyproxy.proxy.settings import Settings, Timeouts
from tests.helpers.raw import GET

if TYPE_CHECKING:
    from tests.helpers.plane import Start


def test_the_timeouts_are_those_of_the_configuration() -> None:
    written = TimeoutsOfTheFile()
    for one in fields(Timeouts):
        value = getattr(written, one.name)
        assert getattr(Timeouts(), one.name) == (float("inf") if value is None else value), one.name


def test_the_limits_are_those_of_the_configuration() -> None:
    written, settings = Limits(), Settings()
    for name in ("head_bytes", "line_bytes", "fields", "target_bytes"):
        assert getattr(settings.head, name) == getattr(written, name)
    for name in ("trailers_bytes", "chunk_extensions_bytes", "buffer_bytes"):
        assert getattr(settings, name) == getattr(written, name)
    assert settings.idle_connections == written.upstream_idle_connections


def test_nothing_changes_them() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().buffer_bytes = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Timeouts().head_s = 1  # type: ignore[misc]


async def test_buffer_bytes_bounds_what_waits_to_be_written(start: Start) -> None:
    proxy = await start(settings=Settings(buffer_bytes=10_000))
    client, app = await proxy.open(GET)
    await app.read_request()
    (downstream,) = proxy.plane.downstreams
    assert downstream.exchange is not None
    assert downstream.exchange._connection is not None
    for transport in (downstream.transport, downstream.exchange._connection.transport):
        assert transport.get_write_buffer_limits()[1] == 10_000
    app.answer()
    await client.read_response()
