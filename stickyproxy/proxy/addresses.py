"""How many connections each client address has open: none may take all the places there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from stickyproxy.proxy.settings import OFF

if TYPE_CHECKING:
    from stickyproxy.wire.forwarded import ConnectionOrigin


class AddressCounts:
    """Connections by client address, each counted from `admit` to `release`; nothing is counted without a limit.

    Trusted proxies and Unix sockets are apart: they stand for many clients.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}

    def admit(self, origin: ConnectionOrigin, *, times: int = 1) -> bool:
        """Count a connection; say whether it is within so many times the limit. Either way it must be released."""
        if self._limit == OFF or not _is_counted(origin):
            return True
        count = self._counts[origin.address] = self._counts.get(origin.address, 0) + 1
        return count <= self._limit * times

    def release(self, origin: ConnectionOrigin) -> None:
        """Count a connection no more."""
        if self._limit == OFF or not _is_counted(origin):
            return
        count = self._counts.get(origin.address, 0) - 1
        if count > 0:
            self._counts[origin.address] = count
        else:
            self._counts.pop(origin.address, None)

    @override
    def __repr__(self) -> str:
        return f"<AddressCounts of {len(self._counts)} addresses>"


def _is_counted(origin: ConnectionOrigin) -> bool:
    return not origin.is_trusted and origin.address not in {"unix", "unknown"}
