"""How many connections each client address has open: none may take all the places there are.

Where there are several workers, each tells the others what it has of each address, in shared memory, and an address is
counted over all of them. That is exact but for two that admit at the same moment, and for the few addresses that share
their cells there (see `AddressCells`), which have their limit a little earlier. While workers of another version take
over, those of either version count alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from stickyproxy.proxy.settings import OFF

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stickyproxy.proxy.board import AddressCells
    from stickyproxy.wire.forwarded import ConnectionOrigin


class AddressCounts:
    """Connections by client address, each counted from `admit` to `release`; nothing is counted without a limit.

    Trusted proxies and Unix sockets are apart: they stand for many clients.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}
        self._cells: AddressCells | None = None

    def share(self, cells: AddressCells | None) -> None:
        """Count together with other workers from now on."""
        self._cells = cells
        self._show()

    def recount(self, limit: float, origins: Iterable[ConnectionOrigin]) -> None:
        """Work by another limit; `origins` are those of all connections that are open."""
        self._limit = limit
        self._counts.clear()
        if limit != OFF:
            for origin in filter(_is_counted, origins):
                self._counts[origin.address] = self._counts.get(origin.address, 0) + 1
        self._show()

    def _show(self) -> None:
        """Show the other workers what is counted here."""
        if self._cells is None:
            return
        if self._limit == OFF:
            self._cells.clear()
            return
        self._cells.begin()
        for address, count in self._counts.items():
            self._cells.add(address, count)

    def admit(self, origin: ConnectionOrigin, *, times: int = 1) -> bool:
        """Count a connection; say whether it is within so many times the limit. Either way it must be released."""
        if self._limit == OFF or not _is_counted(origin):
            return True
        address, cells = origin.address, self._cells
        count = self._counts[address] = self._counts.get(address, 0) + 1
        if cells is not None:
            cells.add(address, +1)  # before the others are read: of two that admit now, one at least sees the other
            count += cells.count_elsewhere(address)
        return count <= self._limit * times

    def release(self, origin: ConnectionOrigin) -> None:
        """Count a connection no more."""
        if self._limit == OFF or not _is_counted(origin):
            return
        count = self._counts.pop(origin.address, 0) - 1
        if count > 0:
            self._counts[origin.address] = count
        if count >= 0 and self._cells is not None:
            self._cells.add(origin.address, -1)

    @override
    def __repr__(self) -> str:
        return f"<AddressCounts of {len(self._counts)} addresses>"


def _is_counted(origin: ConnectionOrigin) -> bool:
    return not origin.is_trusted and origin.address not in {"unix", "unknown"}
