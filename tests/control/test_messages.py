"""Addresses and snapshots as JSON: what is written is read, and what is anything else is refused."""

from __future__ import annotations

import json
import ssl
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.snapshot import AdminState, Health, OnUnavailable, Policy, Rules, Snapshot, Upstream
from stickyproxy.config import Address
from stickyproxy.control.messages import (
    read_address,
    read_snapshot,
    read_snapshots,
    write_address,
    write_snapshot,
    write_snapshots,
)
from stickyproxy.errors import ChannelError
from stickyproxy.proxy.endpoint import Endpoint

TEXT = st.text(max_size=12)
ADDRESSES = st.one_of(
    st.builds(Address, TEXT, st.integers(0, 65535), is_tls=st.booleans()),
    st.builds(Address, path=TEXT.map("/{}".format)),
)
UPSTREAMS = st.builds(
    Upstream,
    TEXT,
    st.integers(1, 256),
    st.sampled_from(AdminState),
    st.sampled_from(Health),
    st.booleans(),
    st.none() | st.integers(1, 1000),
    st.booleans(),
)
RULES = st.builds(
    Rules,
    policy=st.sampled_from(get_args(Policy)),
    on_unavailable=st.sampled_from(get_args(OnUnavailable)),
    wait_s=st.floats(0, 1e6),
    has_cookie=st.booleans(),
    uses_client_address=st.booleans(),
    is_shared=st.booleans(),
)
CONTEXT = ssl.create_default_context()
SNAPSHOT = Snapshot("default", (Upstream("app-1", is_closing=True), Upstream("app-2", 3, max_sessions=7)), Rules())
PLAIN = {"app-1": Endpoint(Address("127.0.0.1", 8001)), "app-2": Endpoint(Address(path="/run/app.sock"))}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@given(address=ADDRESSES)
def test_an_address_is_read_as_it_was_written(address: Address) -> None:
    assert read_address(as_json(write_address(address))) == address


@settings(max_examples=100, deadline=None)
@given(
    cluster=TEXT,
    upstreams=st.lists(UPSTREAMS, max_size=5, unique_by=lambda one: one.id),
    rules=RULES,
    endpoints=st.lists(st.tuples(ADDRESSES, TEXT, TEXT), min_size=5, max_size=5),
)
def test_a_snapshot_is_read_as_it_was_written(
    cluster: str, upstreams: list[Upstream], rules: Rules, endpoints: list[tuple[Address, str, str]]
) -> None:
    contexts = {one.id: CONTEXT for one in upstreams}
    reached = {
        one.id: Endpoint(address, ip, CONTEXT if address.is_tls else None, name)
        for one, (address, ip, name) in zip(upstreams, endpoints, strict=False)
    }
    written = as_json(write_snapshot(Snapshot(cluster, tuple(upstreams), rules), reached))
    snapshot, found = read_snapshot(written, contexts)
    assert (snapshot.cluster, snapshot.upstreams, snapshot.rules) == (cluster, tuple(upstreams), rules)
    assert found == reached


def with_more(value: Any) -> Any:
    """Add a key that this version does not know to every object."""
    if isinstance(value, dict):
        return {**{key: with_more(one) for key, one in value.items()}, "since_version_9": [1]}
    return [with_more(one) for one in value] if isinstance(value, list) else value


def test_unknown_keys_are_ignored() -> None:
    snapshot, endpoints = read_snapshot(with_more(as_json(write_snapshot(SNAPSHOT, PLAIN))), {})
    assert (snapshot.upstreams, snapshot.rules, endpoints) == (SNAPSHOT.upstreams, SNAPSHOT.rules, PLAIN)


def test_what_an_earlier_version_did_not_write_has_its_default() -> None:
    written = as_json(write_snapshot(SNAPSHOT, PLAIN))
    del written["rules"]["is_shared"]
    for one in written["upstreams"]:
        del one["max_sessions"], one["is_closing"]
        del one["address"]["tls"]
    snapshot, endpoints = read_snapshot(written, {})
    assert [one.max_sessions for one in snapshot.upstreams] == [None, None]
    assert [one.is_closing for one in snapshot.upstreams] == [False, False]
    assert not snapshot.rules.is_shared
    assert endpoints == PLAIN


# TLS


def with_address(address: Address) -> Any:
    return as_json(write_snapshot(SNAPSHOT, {**PLAIN, "app-1": Endpoint(address, server_name="app.internal")}))


def test_an_https_upstream_without_a_context_gets_one_that_verifies() -> None:
    """Nothing goes out in plain text, nor to somebody who cannot show a certificate for the name."""
    written = with_address(Address("app.internal", 443, is_tls=True))
    _, endpoints = read_snapshot(written, {"app-2": CONTEXT})
    endpoint = endpoints["app-1"]
    assert endpoint.tls is not None
    assert endpoint.tls.verify_mode is ssl.CERT_REQUIRED
    assert endpoint.tls.check_hostname
    assert endpoint.server_name == "app.internal"
    _, again = read_snapshot(written, {})
    assert again["app-1"] == endpoint, "its connections are used on"


def test_a_plain_upstream_is_not_spoken_to_with_the_context_of_its_former_address() -> None:
    _, endpoints = read_snapshot(as_json(write_snapshot(SNAPSHOT, PLAIN)), {"app-1": CONTEXT, "app-2": CONTEXT})
    assert [one.tls for one in endpoints.values()] == [None, None]


# What is refused

NO_ADDRESSES: list[Any] = [
    None,
    5,
    "127.0.0.1:80",
    [],
    {},
    {"host": "a", "port": 80},
    {"host": "a", "port": "80", "path": ""},
    {"host": "a", "port": True, "path": ""},
    {"host": "a", "port": 80.0, "path": ""},
    {"host": "a", "port": float("inf"), "path": ""},
    {"host": "a", "port": 65536, "path": ""},
    {"host": "a", "port": -1, "path": ""},
    {"host": None, "port": 80, "path": ""},
    {"host": "a", "port": 80, "path": None},
    {"host": "a", "port": 80, "path": "", "tls": "yes"},
]


@pytest.mark.parametrize("raw", NO_ADDRESSES)
def test_what_is_no_address_is_refused(raw: Any) -> None:
    with pytest.raises(ChannelError, match="no address"):
        read_address(raw)


def changed(where: str, value: Any) -> Any:
    """Return a snapshot with another value at a place; `...` removes it."""
    written = as_json(write_snapshot(SNAPSHOT, PLAIN))
    *path, last = where.split(".")
    at: Any = written
    for step in path:
        at = at[int(step) if step.isdigit() else step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return written


WRONG: list[tuple[str, Any]] = [
    *((key, ...) for key in ("cluster", "rules", "upstreams")),
    *((f"upstreams.0.{key}", ...) for key in ("id", "weight", "admin", "health", "is_refused", "address", "ip")),
    *((f"rules.{key}", ...) for key in ("policy", "on_unavailable", "wait_s", "has_cookie", "uses_client_address")),
    *((f"upstreams.0.{key}", [1]) for key in ("id", "weight", "admin", "health", "is_refused", "max_sessions", "ip")),
    *((f"rules.{key}", {}) for key in ("policy", "on_unavailable", "wait_s", "has_cookie", "uses_client_address")),
    ("cluster", 5),
    ("upstreams", 5),
    ("upstreams", "ab"),
    ("upstreams", [5]),
    ("rules", []),
    ("upstreams.0.weight", 0),
    ("upstreams.0.weight", True),
    ("upstreams.0.max_sessions", -1),
    ("upstreams.0.admin", "asleep"),
    ("upstreams.0.health", "ill"),
    ("upstreams.0.is_refused", "no"),
    ("upstreams.0.is_closing", 1),
    ("upstreams.0.is_closing", None),
    ("upstreams.0.server_name", None),
    ("upstreams.0.address.port", "80"),
    ("rules.policy", "by_the_moon"),
    ("rules.on_unavailable", "weep"),
    ("rules.wait_s", "5s"),
    ("rules.is_shared", 1),
]


@pytest.mark.parametrize(("where", "value"), WRONG)
def test_what_is_no_snapshot_is_refused(where: str, value: Any) -> None:
    with pytest.raises(ChannelError, match="what came is no"):
        read_snapshot(changed(where, value), {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(where=st.sampled_from([where for where, _ in WRONG]), value=JSON)
def test_any_value_anywhere_is_read_or_refused(where: str, value: Any) -> None:
    try:
        snapshot, endpoints = read_snapshot(changed(where, value), {})
    except ChannelError:
        return
    assert read_snapshot(as_json(write_snapshot(snapshot, endpoints)), {})[0].upstreams == snapshot.upstreams


def test_the_digest_is_made_here() -> None:
    """What selects an upstream in a token is never taken from another process."""
    snapshot, _ = read_snapshot(as_json(write_snapshot(SNAPSHOT, PLAIN)), {})
    assert snapshot.upstreams[0].digest == replace(SNAPSHOT.upstreams[0]).digest


def test_the_snapshots_of_all_clusters_are_read_as_they_were_written() -> None:
    other = Snapshot("shop", (Upstream("s"),), Rules())
    endpoints = PLAIN | {"s": Endpoint(Address("127.0.0.1", 8101))}
    snapshots, found = read_snapshots(as_json(write_snapshots([SNAPSHOT, other], endpoints)), {})
    assert [one.cluster for one in snapshots] == [SNAPSHOT.cluster, "shop"]
    assert [one.upstreams for one in snapshots] == [SNAPSHOT.upstreams, other.upstreams]
    assert found == endpoints


@pytest.mark.parametrize("raw", [None, {}, "x", [1], [{}]])
def test_what_is_no_list_of_snapshots_is_refused(raw: Any) -> None:
    with pytest.raises(ChannelError):
        read_snapshots(raw, {})
