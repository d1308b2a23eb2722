"""A cluster takes other settings, and shows its upstreams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stickyproxy.affinity.keys import Key
from stickyproxy.affinity.snapshot import Rules, Snapshot, Upstream
from stickyproxy.proxy.cluster import Cluster
from stickyproxy.proxy.settings import ClusterSettings
from stickyproxy.wire.cookies import CookieAttributes

if TYPE_CHECKING:
    import pytest


def make_cluster(settings: ClusterSettings) -> Cluster:
    return Cluster("shop", settings, random=lambda: 0.5)


def test_a_new_cluster_has_no_upstream_yet() -> None:
    assert make_cluster(ClusterSettings()).snapshot.candidates == ()


def test_other_settings_change_how_the_cookie_is_written() -> None:
    cluster = make_cluster(ClusterSettings())
    cluster.change_settings(ClusterSettings(CookieAttributes(name="other")))
    assert cluster.cookie_writer is not None
    assert cluster.cookie_writer.write(b"T", is_https=False).startswith(b"Set-Cookie: other=T;")
    cluster.change_settings(ClusterSettings(None))
    assert cluster.cookie_writer is None


def test_its_repr_shows_its_name_and_upstreams() -> None:
    cluster = make_cluster(ClusterSettings())
    cluster.snapshot = Snapshot("shop", (Upstream("a"), Upstream("b")), Rules())
    assert repr(cluster) == "<Cluster shop <Snapshot shop upstreams=2 candidates=2>>"


def test_other_settings_change_the_keys() -> None:
    cluster = make_cluster(ClusterSettings())
    assert cluster.keys is None
    cluster.change_settings(ClusterSettings(keys=(Key("b", "hash", queries=("b",)), Key("a", "learn", queries=("a",)))))
    assert cluster.keys is not None
    assert [key.name for key in cluster.keys.keys] == ["a", "b"], "learned ones come first"
    cluster.change_settings(ClusterSettings())
    assert cluster.keys is None


def test_each_key_is_said_once_with_a_path_that_is_cut_and_without_its_query(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cluster = make_cluster(ClusterSettings())
    cluster.note_key("sid", b"/" + b"p" * 500 + b"?token=1")
    cluster.note_key("sid", b"/again")
    cluster.note_key("other", b"/\xff?token=1")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"clients are known by the key sid, too: first seen with /{'p' * 63}",
        "clients are known by the key other, too: first seen with /\u00ff",
    ]
