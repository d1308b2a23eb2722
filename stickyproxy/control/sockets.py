"""The listening sockets of the proxy, which outlive workers, reloads and upgrades: nobody who connects is refused."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.errors import UsageError
from stickyproxy.proxy.listener import bind

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Iterator, Mapping

    from stickyproxy.config import Address

_BACKLOG: Final = 4096  # as of the listeners: they may begin to accept a second later


class Sockets:
    """Bound sockets by the addresses of the configuration. Those of `inherited` are used instead of being bound."""

    def __init__(self, inherited: Mapping[Address, socket.socket] | None = None) -> None:
        self._links: dict[Address, socket.socket] = {}
        self._files: dict[Address, tuple[int, int] | None] = {}
        self.adopt(inherited or {})

    def adopt(self, links: Mapping[Address, socket.socket], *, is_lent: bool = False) -> None:
        """Take sockets that are bound already; the files of those that are lent are somebody else's to remove."""
        self._links |= links
        self._files |= {address: None if is_lent else _look_at(address) for address in links}

    @property
    def lent(self) -> list[Address]:
        """Return the Unix sockets whose files are somebody else's."""
        return [address for address in self._links if address.is_unix and self._files.get(address) is None]

    def __getitem__(self, address: Address) -> socket.socket:
        return self._links[address]

    def __contains__(self, address: Address) -> bool:
        return address in self._links

    def __iter__(self) -> Iterator[Address]:
        return iter(self._links)

    def choose(self, addresses: Iterable[Address]) -> dict[Address, socket.socket]:
        """Return the sockets of some addresses."""
        return {address: self._links[address] for address in addresses}

    def open(self, addresses: Iterable[Address]) -> tuple[Address, ...]:
        """Bind those that are not bound yet, all or none, and return them; raise UsageError with the reason.

        A proxy that serves on half of its listeners would be worse than one that fails. The kernel takes connections
        from now on: they wait until somebody accepts them.
        """
        opened: list[Address] = []
        try:
            for address in addresses:
                if address not in self._links:
                    self._links[address] = _listen(address)
                    self._files[address] = _look_at(address)
                    opened.append(address)
        except UsageError:
            self.close(opened)
            raise
        return tuple(opened)

    def real_address(self, address: Address) -> Address:
        """Return where a socket really listens: with the port that the system chose for port 0."""
        if address.is_unix:
            return address
        return type(address)(host=address.host, port=self._links[address].getsockname()[1])

    def close(self, addresses: Iterable[Address]) -> None:
        """Close some sockets, and remove the files of those that are Unix sockets."""
        for address in addresses:
            link, file = self._links.pop(address, None), self._files.pop(address, None)
            if link is None:
                continue
            if file is not None and _look_at(address) == file:  # not another proxy's, bound to the same path since
                with suppress(OSError):
                    os.unlink(address.path)  # noqa: PTH108 -- as for every socket path here: no objects
            link.close()

    def disown(self) -> None:
        """Leave the files of Unix sockets to another process, which has the sockets too."""
        self._files.clear()

    def close_all(self) -> None:
        """Close all sockets."""
        self.close(tuple(self._links))

    @override
    def __repr__(self) -> str:
        return f"<Sockets {', '.join(map(str, self._links))}>"


def _listen(address: Address) -> socket.socket:
    """Return a listening socket; raise UsageError where the address is in use.

    With SO_REUSEADDR two sockets can be bound to one address as long as neither listens.
    """
    link = bind(address)
    try:
        link.setblocking(False)
        link.listen(_BACKLOG)
    except OSError as error:
        link.close()
        raise UsageError(f"cannot listen on {address}: the address is in use; is another proxy starting?") from error
    return link


def _look_at(address: Address) -> tuple[int, int] | None:
    """Return what tells the file of a Unix socket from another one at its place; None where there is none."""
    if not address.is_unix:
        return None
    try:
        found = os.stat(address.path)  # noqa: PTH116 -- as above
    except OSError:
        return None
    return found.st_dev, found.st_ino
