"""States of connections as JSON: back as they were, read tolerantly, and refused where they are nonsense."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.errors import StickyproxyError
from stickyproxy.observe.record import Record
from stickyproxy.proxy.handover import DownstreamState, HandOverError, SideState, TunnelState, read_state
from stickyproxy.proxy.pinger import PingerState, PulseState
from stickyproxy.wire.forwarded import ConnectionOrigin
from stickyproxy.wire.frames import ScannerState
from stickyproxy.wire.pings import FilterState
from stickyproxy.wire.proxy_protocol import ProxyHeader

SIZES = st.integers(0, 1 << 70)
TIMES = st.floats(0, 1e8)
TEXT = st.text(max_size=20)
DATA = st.binary(max_size=40)
SCANNERS = st.builds(
    ScannerState,
    skip=SIZES,
    held=DATA,
    close_code=st.integers(0, 0xFFFF),
    is_first=st.booleans(),
    is_lost=st.booleans(),
)
FILTERS = st.builds(
    FilterState, prefix=st.binary(min_size=1, max_size=8), skip=SIZES, passed=DATA, held=DATA, pongs=SIZES
)
SIDES = st.builds(
    SideState, scanner=SCANNERS, filter=st.none() | FILTERS, received_bytes=SIZES, is_eof=st.booleans(), unsent=DATA
)
PULSES = st.builds(PulseState, silent_s=TIMES, heard_bytes=SIZES, pinged_s=st.none() | TIMES)
RECORDS = st.builds(Record, TEXT, TEXT, TEXT, st.integers(100, 599), target=DATA, upstream=TEXT, duration_s=TIMES)
ORIGINS = st.builds(ConnectionOrigin, address=TEXT, port=TEXT, is_https=st.booleans(), is_trusted=st.booleans())
SESSIONS = st.just((b"", b"", 0)) | st.tuples(
    st.binary(min_size=10, max_size=10), st.binary(min_size=8, max_size=8), st.integers(0, (1 << 32) - 1)
)
TUNNELS = st.builds(
    lambda session, **rest: TunnelState(client_id=session[0], pinned_to=session[1], pinned_at=session[2], **rest),
    session=SESSIONS,
    client=SIDES,
    upstream=SIDES,
    digest=st.binary(min_size=8, max_size=8),
    upstream_id=TEXT,
    origin=ORIGINS,
    record=st.none() | RECORDS,
    pinger=st.none() | st.builds(PingerState, prefix=DATA, client=PULSES, upstream=PULSES),
    age_s=TIMES,
    left_s=st.none() | TIMES,
    idle_s=TIMES,
    seen_bytes=SIZES,
    initiator=TEXT,
    cause=TEXT,
)
HEADERS = st.builds(ProxyHeader, SIZES, source=st.none() | TEXT, destination_port=SIZES, is_tls=st.booleans())
DOWNSTREAMS = st.builds(
    DownstreamState,
    listener=TEXT,
    left_s=TIMES,
    header=st.none() | HEADERS,
    held=DATA,
    pieces=SIZES,
    is_kept=st.booleans(),
)
TUNNEL = TunnelState(SideState(), SideState(), b"12345678", "app-1")


@given(state=TUNNELS | DOWNSTREAMS)
def test_a_state_comes_back_as_it_was(state: TunnelState | DownstreamState) -> None:
    assert read_state(json.loads(json.dumps(state.to_json()))) == state


@given(state=TUNNELS | DOWNSTREAMS, more=st.dictionaries(TEXT.map("new ".__add__), TEXT))
def test_what_is_not_known_is_ignored(state: TunnelState | DownstreamState, more: dict[str, str]) -> None:
    written = state.to_json() | more
    if isinstance(state, TunnelState):
        written["client"] = written["client"] | more
    assert read_state(written) == state


def test_an_idle_tunnel_is_little_text() -> None:
    assert TUNNEL.to_json() == {
        "kind": "tunnel",
        "client": {},
        "upstream": {},
        "digest": "MTIzNDU2Nzg=",
        "upstream_id": "app-1",
    }


def test_what_is_missing_is_the_default() -> None:
    state = TunnelState.from_json({"client": {}, "upstream": {"received_bytes": 5}, "digest": "MTIzNDU2Nzg="})
    assert state.upstream == SideState(received_bytes=5)
    assert state.left_s is None
    assert DownstreamState.from_json({"listener": "x"}) == DownstreamState("x")


def with_client(**values: Any) -> dict[str, Any]:
    return TUNNEL.to_json() | {"client": values}


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (None, "its kind is None"),
        ([], "its kind is None"),
        ({"kind": "exchange"}, "its kind is 'exchange'"),
        ({"kind": []}, "its kind is"),
        ({"kind": "tunnel"}, "tunnel lacks"),
        ({"kind": "downstream"}, "downstream lacks"),
        (TUNNEL.to_json() | {"client": 5}, "tunnel.client is not an object"),
        (TUNNEL.to_json() | {"digest": "MTIz"}, "digest of its upstream"),
        (TUNNEL.to_json() | {"digest": "%"}, "tunnel.digest is no base64"),
        (TUNNEL.to_json() | {"digest": "ä"}, "tunnel.digest is no base64"),
        (TUNNEL.to_json() | {"client_id": "MTIz"}, "session is none"),
        (TUNNEL.to_json() | {"pinned_at": 1 << 32}, "after the end of all tokens"),
        (TUNNEL.to_json() | {"age_s": -1}, "tunnel.age_s"),
        (TUNNEL.to_json() | {"age_s": float("nan")}, "tunnel.age_s"),
        (TUNNEL.to_json() | {"age_s": float("inf")}, "tunnel.age_s"),
        (TUNNEL.to_json() | {"age_s": 10**400}, "tunnel.age_s"),
        (TUNNEL.to_json() | {"age_s": True}, "tunnel.age_s"),
        (TUNNEL.to_json() | {"age_s": None}, "tunnel.age_s"),
        (TUNNEL.to_json() | {"upstream_id": 5}, "tunnel.upstream_id"),
        (with_client(received_bytes=-1), "tunnel.client.received_bytes"),
        (with_client(received_bytes=1.5), "tunnel.client.received_bytes"),
        (with_client(received_bytes=True), "tunnel.client.received_bytes"),
        (with_client(is_eof=1), "tunnel.client.is_eof"),
        (with_client(scanner={"close_code": 70_000}), "more than two bytes"),
        (with_client(scanner={"held": 5}), "tunnel.client.scanner.held"),
        (with_client(filter={}), "every Pong"),
    ],
)
def test_nonsense_is_refused(written: Any, reason: str) -> None:
    with pytest.raises(HandOverError, match=reason) as caught:
        read_state(written)
    assert isinstance(caught.value, StickyproxyError)
    assert isinstance(caught.value, ValueError)


NAMES = ["kind", *(one.name for cls in (TunnelState, SideState, ScannerState, FilterState) for one in fields(cls))]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("MTIzNDU2Nzg="),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(written=JSON, kind=st.sampled_from(["tunnel", "downstream", None]))
def test_any_json_is_read_or_refused(written: Any, kind: str | None) -> None:
    if isinstance(written, dict) and kind:
        written = written | {"kind": kind}
    try:
        state = read_state(written)
    except HandOverError:
        return
    assert read_state(json.loads(json.dumps(state.to_json()))) == state
