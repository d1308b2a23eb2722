"""Routes: which app a request is for, by its host and its path. The most specific route counts, wherever it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stickyproxy.wire.cookies import CookieAttributes

T = TypeVar("T")

_ENDS: Final = (b"/", b"?")  # of a segment of a path


@dataclass(frozen=True, slots=True)
class Route:
    """The requests that go to a cluster: those for a host, and for a path and all below it.

    `host` is in lower case and without a port; `*.example.org` stands for all below example.org, "" for any. `path`
    begins with a slash and ends with none; "" is any. `cookie` is None where the cluster's own is meant.
    """

    cluster: str
    host: str = ""
    path: str = ""
    strips_prefix: bool = False
    cookie: CookieAttributes | None = None

    @property
    def place(self) -> str:
        """Return what the route is for, in words: `shop.example.org/tool`, `/chat`, `*`."""
        return f"{self.host}{self.path}" or "*"


class Routes(Generic[T]):
    """Finds what was given with the most specific of the routes that a request matches.

    An exact host comes before a wildcard, the longest of them first, and that before none; then the longest path.
    """

    __slots__ = ("_any", "_exact", "_wildcards")

    def __init__(self, routes: Sequence[tuple[Route, T]]) -> None:
        by_host: dict[str, list[tuple[bytes, T]]] = {}
        for route, what in routes:
            by_host.setdefault(route.host, []).append((route.path.encode("ascii"), what))
        for of_host in by_host.values():
            of_host.sort(key=lambda one: len(one[0]), reverse=True)
        self._any = tuple(by_host.pop("", ()))
        wildcards = sorted((host for host in by_host if host.startswith("*")), key=len, reverse=True)
        # Those for a host, and behind them those that count where none of them has the path.
        self._wildcards = [(host[1:].encode("ascii"), tuple(by_host.pop(host))) for host in wildcards]
        self._exact = {
            host.encode("ascii"): (*paths, *self._behind(host.encode("ascii"))) for host, paths in by_host.items()
        }

    def _behind(self, host: bytes) -> tuple[tuple[bytes, T], ...]:
        """Return what counts for a host that has no route of its own: wildcards, the longest first, then none."""
        found = [one for suffix, paths in self._wildcards if host.endswith(suffix) for one in paths]
        return (*found, *self._any)

    def find(self, host: bytes, target: bytes) -> T | None:
        """Return what belongs to the route of a request, by its Host and its target in origin form; None without one.

        O(n) in the routes of the host.
        """
        name = normalise_host(host)
        candidates = self._exact.get(name)
        if candidates is None:
            candidates = self._behind(name) if self._wildcards else self._any
        for path, what in candidates:
            if target.startswith(path) and (not path or target[len(path) : len(path) + 1] in {b"", *_ENDS}):
                return what
        return None

    @override
    def __repr__(self) -> str:
        return f"<Routes hosts={len(self._exact)} wildcards={len(self._wildcards)}>"


def normalise_host(host: bytes) -> bytes:
    """Return a Host without its port and the dot of the root, in lower case; an IPv6 address stays in brackets."""
    if not host.endswith(b"]"):
        name, colon, port = host.rpartition(b":")
        if colon and (port.isdigit() or not port):
            host = name
    return host.removesuffix(b".").lower()


def strip_prefix(target: bytes, prefix: bytes) -> bytes:
    """Return a target without the path that it begins with; what is left begins with a slash, and keeps its query."""
    rest = target[len(prefix) :]
    return rest if rest.startswith(b"/") else b"/" + rest
