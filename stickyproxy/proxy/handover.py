"""What is known of a connection that moves to another process, as JSON that another version can read.

Only what differs from the default is written; what is not known is ignored, and what is missing is the default. The
descriptors travel beside it. `departure.py` makes these states and `arrival.py` goes on from them.
"""

from __future__ import annotations

import base64
import sys
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, ClassVar, Final, Self, get_args, get_type_hints

from stickyproxy.affinity.snapshot import DIGEST_BYTES
from stickyproxy.affinity.token import CLIENT_ID_BYTES
from stickyproxy.errors import StickyproxyError
from stickyproxy.observe.record import Record  # noqa: TC001 -- read at run time, to read a state
from stickyproxy.proxy.pinger import PingerState  # noqa: TC001 -- read at run time, to read a state
from stickyproxy.wire.forwarded import ConnectionOrigin
from stickyproxy.wire.frames import ScannerState
from stickyproxy.wire.pings import FilterState  # noqa: TC001 -- read at run time, to read a state
from stickyproxy.wire.proxy_protocol import ProxyHeader  # noqa: TC001 -- read at run time, to read a state

_MAX_CODE: Final = 0xFFFF  # of a Close frame: two bytes (RFC 6455, section 5.5.1)
_MAX_SHARED: Final = 512
_MAX_TIME: Final = 1 << 32  # what a token can say, in seconds since 1970
_MAX_S: Final = 1e9  # of a length of time: thirty years
_NOBODY: Final = ConnectionOrigin("unknown", "", is_https=False, is_trusted=False)


class HandOverError(StickyproxyError, ValueError):
    """A connection cannot move: what came is no state of one, or nothing here can go on with it. The text says why."""


@dataclass(frozen=True, slots=True)
class SideState:
    """One side of a tunnel. `unsent` is what it sent and the kernel has not taken for the other side."""

    scanner: ScannerState = field(default_factory=ScannerState)
    filter: FilterState | None = None
    received_bytes: int = 0
    is_eof: bool = False
    unsent: bytes = b""


@dataclass(frozen=True, slots=True)
class TunnelState:
    """A tunnel; its descriptors are those of the client and of the upstream, in this order.

    `client_id`, `pinned_to` (a digest) and `pinned_at` are of its session, empty where it has none; `record` is that
    of its handshake, None where nothing is logged. `left_s` are the seconds until it has reached its age, None for
    never; `idle_s` those since its bytes were found to be `seen_bytes`.
    """

    kind: ClassVar[str] = "tunnel"

    client: SideState
    upstream: SideState
    digest: bytes
    upstream_id: str = ""
    origin: ConnectionOrigin = _NOBODY
    client_id: bytes = b""
    pinned_to: bytes = b""
    pinned_at: int = 0
    record: Record | None = None
    pinger: PingerState | None = None
    age_s: float = 0.0
    left_s: float | None = None
    idle_s: float = 0.0
    seen_bytes: int = 0
    initiator: str = ""
    cause: str = ""

    def __post_init__(self) -> None:
        """Raise HandOverError where the state is that of no tunnel."""
        if len(self.digest) != DIGEST_BYTES:
            raise HandOverError("a tunnel without the digest of its upstream")
        if self.pinned_at >= _MAX_TIME:
            raise HandOverError("a session that was pinned after the end of all tokens")
        if self.client_id and (len(self.client_id), len(self.pinned_to)) != (CLIENT_ID_BYTES, DIGEST_BYTES):
            raise HandOverError("a tunnel whose session is none")
        for side in (self.client, self.upstream):
            if side.scanner.close_code > _MAX_CODE:
                raise HandOverError("a close code of more than two bytes")
            if side.filter is not None and not side.filter.prefix:
                raise HandOverError("a filter that would take every Pong for one of ours")

    def to_json(self) -> dict[str, Any]:
        """Return the state as a JSON object."""
        return {"kind": self.kind, **_write(self)}

    @classmethod
    def from_json(cls, written: object) -> Self:
        """Return what `to_json` wrote, perhaps of another version; raise HandOverError."""
        state: Self = _read(cls, written, cls.kind)
        return state


@dataclass(frozen=True, slots=True)
class DownstreamState:
    """A client's connection between two exchanges; its one descriptor travels beside it.

    `listener` is the address of the listener that accepted it, `header` what a PROXY protocol header said, `held` what
    has come of the next head, in so many `pieces`. `left_s` are the seconds until its deadline; `is_kept` says that it
    has had an exchange.
    """

    kind: ClassVar[str] = "downstream"

    listener: str
    left_s: float = 0.0
    header: ProxyHeader | None = None
    held: bytes = b""
    pieces: int = 0
    is_kept: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the state as a JSON object."""
        return {"kind": self.kind, **_write(self)}

    @classmethod
    def from_json(cls, written: object) -> Self:
        """Return what `to_json` wrote, perhaps of another version; raise HandOverError."""
        state: Self = _read(cls, written, cls.kind)
        return state


def read_state(written: object) -> TunnelState | DownstreamState:
    """Return the state of either kind; raise HandOverError."""
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind == TunnelState.kind:
        return TunnelState.from_json(written)
    if kind == DownstreamState.kind:
        return DownstreamState.from_json(written)
    raise HandOverError(f"what came is no connection that can be taken over: its kind is {kind!r}")


@lru_cache(4096)
def share(origin: ConnectionOrigin) -> ConnectionOrigin:
    """Return the one origin of all that are equal: thousands of connections come from few."""
    return origin


# Dataclasses of numbers, text, bytes, and others of their kind, as JSON


def _write(state: Any) -> dict[str, Any]:
    """Return the fields that are not at their defaults."""
    written = {}
    for one in fields(state):
        value = getattr(state, one.name)
        if value != (one.default if one.default_factory is MISSING else one.default_factory()):
            written[one.name] = _write_value(value)
    return written


def _write_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if is_dataclass(value):
        return _write(value)
    return value


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_decode_shared: Final = lru_cache(4096)(_decode)
"""Short text is the same for many connections (hosts, targets, user agents): an idle tunnel should cost little."""
_types_known: Final[dict[type[Any], dict[str, tuple[type[Any], bool]]]] = {}


def _types(cls: type[Any]) -> dict[str, tuple[type[Any], bool]]:
    """Return the type of each field, and whether it may be None."""
    known = _types_known.get(cls)
    if known is None:
        known = _types_known[cls] = {}
        hints = get_type_hints(cls)
        for one in fields(cls):
            hint = hints[one.name]
            options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            known[one.name] = next(option for option in options if option is not type(None)), type(None) in options
    return known


def _read(cls: type[Any], written: object, path: str) -> Any:
    """Return an instance of a dataclass; raise HandOverError with the path of what is wrong."""
    if not isinstance(written, dict):
        raise HandOverError(f"{path} is not an object")
    values = {}
    for name, (wanted, is_optional) in _types(cls).items():
        if name in written:
            value = written[name]
            values[name] = None if value is None and is_optional else _read_value(wanted, value, f"{path}.{name}")
    try:
        return cls(**values)
    except TypeError as error:
        raise HandOverError(f"{path} lacks what it cannot be without") from error


def _read_value(wanted: type[Any], value: Any, path: str) -> Any:
    if is_dataclass(wanted):
        return _read(wanted, value, path)
    if wanted is bytes and isinstance(value, str):
        try:
            return _decode_shared(value) if len(value) <= _MAX_SHARED else _decode(value)
        except ValueError as error:
            raise HandOverError(f"{path} is no base64") from error
    if wanted is float and type(value) in {int, float} and 0 <= value < _MAX_S:
        return float(value)
    if wanted is str and isinstance(value, str):
        return sys.intern(str(value))
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is int and type(value) is int and value >= 0:
        return value
    raise HandOverError(f"{path} is not what it should be")
