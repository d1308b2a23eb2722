"""Why a request would go where it goes: the path's own ladder, asked without sending anything.

A data plane is made for the question, with the routing state and the keys of the running proxy where there is one. It
remembers nothing: what it would learn, count and pin is dropped with it.
"""

from __future__ import annotations

import logging
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from stickyproxy.affinity.choose import Outcome, why_broken
from stickyproxy.control.worker import make_sessions, make_settings
from stickyproxy.errors import ExchangeError, UsageError
from stickyproxy.proxy.placement import Placement
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.router import Destination
from stickyproxy.wire.forwarded import ConnectionOrigin, ForwardedWriter
from stickyproxy.wire.headers import find_field
from stickyproxy.wire.request_head import RequestHeadReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stickyproxy.affinity.snapshot import Snapshot
    from stickyproxy.config import Config
    from stickyproxy.proxy.endpoint import Endpoint
    from stickyproxy.proxy.key_table import KeyStore
    from stickyproxy.wire.request_head import RequestHead

_LINE: Final = re.compile(r"(?:([A-Za-z-]+) +)?(/\S*|(?i:https?)://\S+|\*)(?: +HTTP/1\.[01])?")
_HEADER: Final = re.compile(r"([^:\s]+):[ \t]*(.*)")
_TOKEN: Final = re.compile(r"=v1\.[^;]*")  # which is good for whoever has it
_SHOWN: Final = 64  # characters of what was given
_ADDRESS: Final = "127.0.0.1"  # that the client is taken to come from

# The pin cannot be used, or all that the request is about is gone with its upstream.
_BROKEN: Final = frozenset({Outcome.REDISPATCHED, Outcome.WAIT, Outcome.REFUSED, Outcome.GONE})
_PINNED: Final = frozenset({Outcome.HIT, Outcome.LEARNED, Outcome.WAIT, Outcome.REFUSED, Outcome.GONE})
_UNPLACED: Final = frozenset({Outcome.FULL, Outcome.NONE})


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that nobody sends: its line without the version, its fields, and what there is of its body."""

    line: str
    headers: tuple[str, ...] = ()
    body: bytes = b""
    is_https: bool = False

    def write_head(self) -> bytes:
        """Return its head as a client would send it; raise UsageError for what is no request."""
        line = _LINE.fullmatch(self.line.strip())
        if line is None:
            raise UsageError(f"expected a request such as 'GET /path', got {_shown(self.line)}")
        fields, names = [], set()
        for one in self.headers:
            match = _HEADER.fullmatch(one.strip())
            if match is None:
                raise UsageError(f"expected a header such as 'Cookie: name=value', got {_shown(one)}")
            fields.append(f"{match[1]}: {match[2]}")
            names.add(match[1].lower())
        if "host" not in names:
            fields.insert(0, "Host: localhost")
        if self.body and names.isdisjoint({"content-length", "transfer-encoding"}):
            fields.append(f"Content-Length: {len(self.body)}")
        method = line[1] or ("POST" if self.body else "GET")
        try:
            return "\r\n".join([f"{method.upper()} {line[2]} HTTP/1.1", *fields, "", ""]).encode()
        except UnicodeEncodeError as error:
            raise UsageError("the request is not UTF-8") from error


@dataclass(frozen=True, slots=True)
class State:
    """What is known when the question is asked: the routing state, the secrets, and what a running proxy has learned.

    `sessions` are the active ones by upstream digest, in hexadecimal; they count for the policy and for `max_sessions`.
    """

    config: Config
    snapshots: Sequence[Snapshot]
    endpoints: Mapping[str, Endpoint]
    secrets: Sequence[bytes]
    keys: KeyStore | None = None
    sessions: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Unwritten:
    """The keys of a proxy, of which nothing is changed: to look at one does not renew it."""

    keys: KeyStore | None
    learned: int = 0
    evicted: int = 0

    def find(self, key: bytes, now: float, idle_s: float = 0.0) -> bytes | None:  # noqa: ARG002 -- not a use
        return None if self.keys is None else self.keys.find(key, now)

    def learn(self, key: bytes, digest: bytes, idle_s: float, now: float) -> None:
        """Learn nothing."""

    def forget(self, key: bytes) -> None:
        """Forget nothing."""

    def close(self) -> None:
        """Leave the keys to the proxy."""


def explain(asked: Asked, state: State) -> dict[str, Any]:
    """Return what would become of a request, as JSON; raise UsageError where it is none. Needs a running event loop."""
    plane = Plane(
        make_settings(state.config),
        make_sessions(state.config, state.secrets or (b"\0" * 32,)),
        report=lambda *_: None,
        random=random.Random(0).random,  # noqa: S311 -- any upstream will do as the example
    )
    plane.keys.close()
    plane.keys = _Unwritten(state.keys)
    plane.sessions.counts.update((bytes.fromhex(digest), count) for digest, count in state.sessions.items())
    try:
        with _silence():
            plane.publish(state.snapshots, state.endpoints)
            return _explain(asked, plane)
    finally:
        plane.close()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the path from logging what would happen as if it had. Nothing else of this process goes that path."""
    path = logging.getLogger("stickyproxy.proxy")
    level = path.level
    path.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        path.setLevel(level)


def _explain(asked: Asked, plane: Plane) -> dict[str, Any]:
    raw = asked.write_head()
    try:
        head = RequestHeadReader(plane.settings.head, plane.cookie_reader).read(raw, len(raw))
    except ExchangeError as error:
        raise UsageError(f"the proxy would refuse the request with {error.status}: {error.reason}") from error
    origin = ConnectionOrigin(_ADDRESS, "", asked.is_https, is_trusted=False)
    found = Destination(plane.default) if plane.router is None else plane.router.find(head)
    sent = head if plane.router is None else found.enter(head)
    place = Placement(plane, found.cluster, sent, ForwardedWriter(origin), found.writer)
    answer: dict[str, Any] = {
        "request": f"{head.method.decode()} {head.target.decode('latin-1')}",
        "host": head.host.decode("latin-1"),
        "route": found.place,
        "sent_as": sent.target.decode("latin-1"),
        "cluster": place.cluster.name,
    }
    place.read_pin()
    needs_body = place.needs_body()
    if needs_body and asked.body:
        place.read_body(asked.body)
    rungs = [*_list_rungs(asked.body if needs_body else b"", plane, place, sent)]
    decision = _decide(place)
    _mark(rungs, decision["outcome"])
    lacks_body = needs_body and not asked.body and head.method not in {b"GET", b"HEAD"}
    return answer | {"ladder": rungs, "lacks_body": lacks_body} | decision


def _decide(place: Placement) -> dict[str, Any]:
    """Return the outcome with its facts; `broken` says why a pin does not hold, where one does not."""
    snapshot, session = place.cluster.snapshot, place.session
    broken = None if session is None else why_broken(snapshot, session, frozenset())
    try:
        pool = place.choose()
    except ExchangeError as error:
        facts: dict[str, Any] = {"upstream": None, "status": error.status, "reason": error.reason}
    else:
        facts = {"upstream": None, "wait_s": snapshot.rules.wait_s}
        if pool is not None:
            upstream = snapshot.by_digest[pool.digest]
            facts = {
                "upstream": {
                    "id": upstream.id,
                    "address": str(pool.endpoint.address),
                    "admin": upstream.admin,
                    "health": upstream.health,
                    "is_refused": upstream.is_refused,
                    "is_closing": upstream.is_closing,
                },
                "sets_cookie": _write_cookie(place),
            }
            place.leave()
    return {"outcome": place.outcome, "broken": broken if place.outcome in _BROKEN else None} | facts


def _write_cookie(place: Placement) -> str | None:
    """Return the cookie that is set, "" where the client's stays as it is, and None where there is none."""
    if place.cookie_writer is None:
        return None
    return _TOKEN.sub("=TOKEN", place.write_cookie(None).decode("ascii").strip().partition(": ")[2])


def _list_rungs(body: bytes, plane: Plane, place: Placement, head: RequestHead) -> Iterable[dict[str, Any]]:
    """Give what each rung of the ladder says, in its order; those that the request says nothing for are left out."""
    snapshot, reader = place.cluster.snapshot, place.cluster.keys
    found = [] if reader is None else [*reader.read(head), *(reader.read_body(head.target, body) if body else ())]
    keys = [
        {
            "rung": "learned" if one.key.mode == "learn" else "hashed",
            "key": one.key.name,
            "value": _cut(one.value.decode(errors="backslashreplace")),
            **_name(plane, plane.keys.find(one.stored, plane.now)),
        }
        for one in found
    ]
    yield from (one for one in keys if one["rung"] == "learned")
    if head.token is not None:
        yield {"rung": "cookie", **_read_token(plane, head.token)}
    yield from (one for one in keys if one["rung"] == "hashed")
    if snapshot.rules.uses_client_address and find_field(head.section, b"sec-fetch-dest") != b"document":
        yield {"rung": "address", "value": _ADDRESS}
    room = [u.id for u in snapshot.candidates if u.max_sessions is None or plane.load(u) < u.max_sessions]
    yield {"rung": "policy", "policy": snapshot.rules.policy, "choices": room, "is_guarded": snapshot.is_guarded}


def _read_token(plane: Plane, token: bytes) -> dict[str, Any]:
    presented = plane.sessions.present(token, plane.wall)
    if presented is None:
        return {"state": "invalid", "upstream": None}
    if presented.expires_at < plane.wall:
        return {"state": "expired", "upstream": None}
    return _name(plane, presented.digest)


def _name(plane: Plane, digest: bytes | None) -> dict[str, Any]:
    """Return whether an upstream is known, and still there, with its id."""
    if digest is None:
        return {"state": "unknown", "upstream": None}
    pool = plane.pools.get(digest)
    return {"state": "gone", "upstream": None} if pool is None else {"state": "known", "upstream": pool.upstream_id}


def _mark(rungs: Sequence[dict[str, Any]], outcome: Outcome) -> None:
    """Say of each rung whether it decides, and whether it leads elsewhere than an earlier one, which wins."""
    leading = [one for one in rungs if one.get("state") in {"known", "gone"}]
    pin = leading[0] if leading else None
    if outcome in _UNPLACED:
        decides = None
    elif outcome in _PINNED:
        decides = pin
    elif outcome is Outcome.HASHED:  # the first time by the hash, and from then on by what was remembered
        decides = pin or next(one for one in rungs if one["rung"] == "hashed")
    elif outcome is Outcome.ADDRESS:
        decides = next(one for one in rungs if one["rung"] == "address")
    else:
        decides = rungs[-1]
    for one in rungs:
        one["decides"] = one is decides
        one["disagrees"] = one in leading[1:] and one["upstream"] != leading[0]["upstream"]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _shown(text: str) -> str:
    return repr(_cut(text))
