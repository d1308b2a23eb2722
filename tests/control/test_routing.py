"""The routing state: what is published when, and what is said about it."""

import json
import logging
import ssl
from collections.abc import Mapping

import pytest

from stickyproxy.affinity.health import HealthEvent, Observed
from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot
from stickyproxy.config import Address, Config, Upstream, load_text
from stickyproxy.control.routing import Routing
from stickyproxy.proxy.endpoint import Endpoint

TWO = """
upstreams:
  - {id: a, url: "http://127.0.0.1:8001", weight: 3}
  - {id: b, url: "unix:/run/b.sock"}
"""
PASSED, FAILED, REFUSED, CONNECTED = (
    HealthEvent.PROBE_PASSED,
    HealthEvent.PROBE_FAILED,
    HealthEvent.REFUSED,
    HealthEvent.CONNECTED,
)


class Published:
    """Takes what is published."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.endpoints: dict[str, Endpoint] = {}

    def __call__(self, snapshots: tuple[Snapshot, ...], endpoints: Mapping[str, Endpoint]) -> None:
        self.all = {one.cluster: one for one in snapshots}
        self.snapshots.append(snapshots[0])
        self.endpoints = dict(endpoints)

    @property
    def last(self) -> Snapshot:
        return self.snapshots[-1]


def make(text: str = TWO) -> tuple[Routing, Published]:
    published = Published()
    return Routing(load_text(text, {}), published), published


def levels(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_first_snapshot_is_published_at_once() -> None:
    routing, published = make()
    assert published.snapshots == [routing.snapshots["default"]]
    a, b = Address("127.0.0.1", 8001), Address(path="/run/b.sock")
    assert published.endpoints == {"a": Endpoint(a), "b": Endpoint(b)}
    assert routing.addresses == {"a": a, "b": b}
    assert routing.snapshots["default"].cluster == "default"
    facts = [(one.id, one.weight, one.admin, one.health, one.is_refused) for one in routing.upstreams]
    assert facts == [
        ("a", 3, AdminState.READY, Health.UNKNOWN, False),
        ("b", 1, AdminState.READY, Health.UNKNOWN, False),
    ]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("", Rules()),
        ("affinity: {policy: random}", Rules(policy="random")),
        ("affinity: {on_unavailable: refuse}", Rules(on_unavailable="refuse")),
        ("affinity: {on_unavailable: {wait: 7s}}", Rules(on_unavailable="wait", wait_s=7.0)),
        ("affinity: {cookie: false, client_address: true}", Rules(has_cookie=False, uses_client_address=True)),
    ],
)
def test_the_rules_are_those_of_the_file(text: str, rules: Rules) -> None:
    routing, _ = make(TWO + text)
    assert routing.snapshots["default"].rules == rules


def test_a_snapshot_never_changes() -> None:
    routing, published = make()
    before = routing.snapshots["default"]
    routing.report("a", REFUSED)
    assert routing.snapshots["default"] is published.last is not before
    assert not before.upstreams[0].is_refused
    assert published.last.upstreams[0].is_refused
    assert published.last.upstreams[1] == before.upstreams[1]


def test_what_changes_nothing_is_not_published() -> None:
    routing, published = make()
    routing.report("a", FAILED)
    routing.report("a", FAILED)
    routing.report("a", CONNECTED)
    routing.set_admin_state("a", AdminState.READY)
    assert len(published.snapshots) == 1
    routing.report("a", FAILED)
    assert len(published.snapshots) == 2


def test_the_thresholds_are_those_of_the_file() -> None:
    routing, published = make(TWO + "health: {probe: {rise: 3, fall: 1}}")
    routing.report("a", FAILED)
    assert published.last.upstreams[0].health == "unhealthy"
    seen = []
    for _ in range(3):
        routing.report("a", PASSED)
        seen.append(published.last.upstreams[0].health)
    assert seen == [Health.UNHEALTHY, Health.UNHEALTHY, Health.HEALTHY]


def test_without_probes_the_data_plane_still_reports() -> None:
    routing, published = make(TWO + "health: {probe: false}")
    routing.report("a", REFUSED)
    assert [one.id for one in published.last.candidates] == ["b"]
    routing.report("a", CONNECTED)
    assert [one.id for one in published.last.candidates] == ["a", "b"]


def test_a_report_about_an_upstream_that_is_gone_is_ignored() -> None:
    routing, published = make()
    for event in HealthEvent:
        routing.report("removed", event)
    assert len(published.snapshots) == 1
    assert set(routing.observed.values()) == {Observed()}


@pytest.mark.parametrize("state", [AdminState.DRAIN, AdminState.MAINT])
def test_the_operator_and_the_probes_do_not_overwrite_each_other(state: AdminState) -> None:
    routing, published = make()
    routing.set_admin_state("a", state)
    routing.report("a", REFUSED)
    routing.report("a", PASSED)
    upstream = published.last.upstreams[0]
    assert (upstream.admin, upstream.health) == (state, Health.HEALTHY)
    routing.set_admin_state("a", AdminState.READY)
    upstream = published.last.upstreams[0]
    assert (upstream.admin, upstream.health) == (AdminState.READY, Health.HEALTHY)


def test_an_unknown_upstream_has_no_admin_state() -> None:
    routing, published = make()
    with pytest.raises(KeyError):
        routing.set_admin_state("c", AdminState.DRAIN)
    assert len(published.snapshots) == 1


def test_what_publish_reports_in_turn_is_not_lost() -> None:
    """The data plane may report from within `publish`; the last snapshot published is the last state."""
    published = Published()
    routing: Routing

    def publish(snapshots: tuple[Snapshot, ...], endpoints: Mapping[str, Endpoint]) -> None:
        published(snapshots, endpoints)
        if len(published.snapshots) == 2:
            routing.report("b", REFUSED)

    routing = Routing(load_text(TWO, {}), publish)
    routing.report("a", REFUSED)
    assert [one.is_refused for one in published.last.upstreams] == [True, True]
    assert routing.snapshots["default"] is published.last


NAMED = """
upstreams:
  - {id: a, url: "https://app.internal:8443", max_sessions: 7}
  - {id: b, url: "https://10.0.0.7", tls: {verify: false, server_name: app.internal}}
  - {id: c, url: "http://app.internal:8001"}
"""


def test_endpoints_have_the_tls_of_their_upstreams() -> None:
    published = Published()
    contexts = {one: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for one in ("a", "b")}
    Routing(load_text(NAMED, {}), published, contexts)
    assert published.endpoints == {
        "a": Endpoint(Address("app.internal", 8443, is_tls=True), tls=contexts["a"]),
        "b": Endpoint(Address("10.0.0.7", 443, is_tls=True), tls=contexts["b"], server_name="app.internal"),
        "c": Endpoint(Address("app.internal", 8001)),
    }
    assert [one.max_sessions for one in published.last.upstreams] == [7, None, None]


def test_what_names_stand_for_is_published_with_the_same_snapshot() -> None:
    routing, published = make(NAMED)
    before = routing.snapshots["default"]
    routing.report("a", REFUSED)
    routing.resolve({"a": "10.0.0.8", "c": "10.0.0.9"})
    assert [published.endpoints[one].ip for one in ("a", "b", "c")] == ["10.0.0.8", "", "10.0.0.9"]
    assert published.endpoints["a"].address == Address("app.internal", 8443, is_tls=True)
    assert published.last is routing.snapshots["default"] is not before
    routing.resolve({"a": "10.0.0.10"})
    assert [published.endpoints[one].ip for one in ("a", "b", "c")] == ["10.0.0.10", "", "10.0.0.9"]
    assert len(published.snapshots) == 4


# Reloads


def ids(snapshot: Snapshot) -> list[tuple[str, AdminState]]:
    return [(one.id, one.admin) for one in snapshot.upstreams]


def test_a_reload_keeps_what_is_known_of_the_upstreams_that_stay() -> None:
    routing, published = make(NAMED)
    routing.set_admin_state("a", AdminState.DRAIN)
    routing.report("c", REFUSED)
    routing.resolve({"a": "10.0.0.8", "c": "10.0.0.9"})
    before = len(published.snapshots)
    routing.reload(load_text(NAMED.replace("max_sessions: 7", "weight: 5") + "affinity: {policy: random}", {}), {})
    assert len(published.snapshots) == before + 1  # all at once
    a, _, c = published.last.upstreams
    assert (a.admin, a.weight, a.max_sessions) == (AdminState.DRAIN, 5, None)
    assert c.is_refused
    assert [published.endpoints[one].ip for one in ("a", "c")] == ["10.0.0.8", "10.0.0.9"]
    assert published.last.rules == Rules(policy="random")


def test_an_upstream_at_another_address_is_another_process() -> None:
    routing, published = make(NAMED)
    routing.report("c", REFUSED)
    routing.set_admin_state("c", AdminState.DRAIN)
    routing.resolve({"c": "10.0.0.9"})
    routing.reload(load_text(NAMED.replace("8001", "8002"), {}), {})
    c = published.last.upstreams[2]
    assert (c.health, c.is_refused, c.admin) == (Health.UNKNOWN, False, AdminState.DRAIN)
    assert published.endpoints["c"] == Endpoint(Address("app.internal", 8002))


ONE = TWO.rsplit("  -", 1)[0]


def test_a_removed_upstream_drains_until_it_is_dropped() -> None:
    routing, published = make()
    routing.reload(load_text(ONE, {}), {})
    assert ids(published.last) == [("a", AdminState.READY), ("b", AdminState.DRAIN)]
    assert list(routing.leaving) == ["b"]
    assert published.endpoints["b"] == Endpoint(Address(path="/run/b.sock"))
    routing.report("b", REFUSED)
    assert published.last.upstreams[1].is_refused
    routing.drop(["b"])
    assert ids(published.last) == [("a", AdminState.READY)]
    assert set(published.endpoints) == set(routing.observed) == set(routing.admin_states) == {"a"}
    routing.report("b", PASSED)
    routing.drop([])
    assert ids(published.last) == [("a", AdminState.READY)]


def test_a_removed_upstream_in_maintenance_stays_there() -> None:
    routing, published = make()
    routing.set_admin_state("b", AdminState.MAINT)
    routing.reload(load_text(ONE, {}), {})
    assert ids(published.last)[1] == ("b", AdminState.MAINT)


def test_a_removed_upstream_can_only_drain() -> None:
    routing, published = make()
    routing.reload(load_text(ONE, {}), {})
    with pytest.raises(ValueError, match="no longer in the configuration"):
        routing.set_admin_state("b", AdminState.READY)
    routing.set_admin_state("b", AdminState.MAINT)
    assert ids(published.last)[1] == ("b", AdminState.MAINT)


def test_an_upstream_that_comes_back_is_ready_again() -> None:
    routing, published = make()
    routing.reload(load_text(ONE, {}), {})
    routing.report("b", FAILED)
    routing.reload(load_text(TWO, {}), {})
    assert ids(published.last) == [("a", AdminState.READY), ("b", AdminState.READY)]
    assert routing.leaving == {}
    routing.reload(load_text(ONE, {}), {})
    assert list(routing.leaving) == ["b"]


def test_an_upstream_that_stays_through_two_reloads_leaves_once() -> None:
    routing, published = make()
    for _ in range(2):
        routing.reload(load_text(ONE, {}), {})
    assert ids(published.last) == [("a", AdminState.READY), ("b", AdminState.DRAIN)]
    routing.drop(["b"])
    routing.reload(load_text(ONE, {}), {})
    assert ids(published.last) == [("a", AdminState.READY)]


def test_a_reload_brings_the_thresholds_and_the_tls_of_the_file() -> None:
    routing, published = make(NAMED)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    routing.reload(load_text(NAMED + "health: {probe: {fall: 1}}", {}), {"a": context})
    assert published.endpoints["a"].tls is context
    routing.report("a", FAILED)
    assert published.last.upstreams[0].health is Health.UNHEALTHY


# App processes


def app_process(upstream_id: str = "g1-1", url: str = "http://127.0.0.1:20001", **more: object) -> Upstream:
    return Upstream.model_validate({"id": upstream_id, "url": url, **more})


def test_an_app_process_is_an_upstream_from_the_moment_it_is_added_until_it_is_removed() -> None:
    published = Published()
    routing = Routing(Config(), published)
    assert routing.snapshots["default"].upstreams == ()
    routing.add_process(app_process())
    routing.add_process(app_process("g1-2", "http+unix:///run/apps/g1-2.sock", weight=3, max_sessions=5))
    assert list(routing.processes) == ["g1-1", "g1-2"]
    assert [(one.id, one.weight, one.max_sessions) for one in published.last.upstreams] == [
        ("g1-1", 1, None),
        ("g1-2", 3, 5),
    ]
    assert ids(published.last) == [("g1-1", AdminState.READY), ("g1-2", AdminState.READY)]
    unix = Endpoint(Address(path="/run/apps/g1-2.sock"))
    assert published.endpoints == {"g1-1": Endpoint(Address("127.0.0.1", 20001)), "g1-2": unix}
    routing.remove_process("g1-1")
    assert ids(published.last) == [("g1-2", AdminState.READY)]
    assert set(routing.endpoints) == set(routing.observed) == set(routing.admin_states) == set(routing.processes)
    before = len(published.snapshots)
    routing.remove_process("g1-1")
    routing.report_gone("g1-1")
    assert len(published.snapshots) == before
    routing.remove_process("g1-2")
    assert published.last.upstreams == ()


def test_app_processes_stand_beside_the_configuration_and_no_reload_touches_them() -> None:
    routing, published = make()
    routing.add_process(app_process())
    routing.add_process(app_process("g1-2", "http://127.0.0.1:20002"))
    routing.set_admin_state("g1-2", AdminState.DRAIN)
    routing.set_closing(["g1-2"])
    routing.report("g1-1", FAILED)
    before = routing.observed["g1-1"]
    for text in (ONE, TWO, NAMED):
        routing.reload(load_text(text + "affinity: {policy: random}", {}), {})
        assert ids(published.last)[-2:] == [("g1-1", AdminState.READY), ("g1-2", AdminState.DRAIN)]
        assert [one.is_closing for one in published.last.upstreams[-2:]] == [False, True]
        assert routing.observed["g1-1"] is before
        assert "g1-1" not in routing.leaving
    routing.reload(Config(), {})
    routing.drop(list(routing.leaving))
    assert ids(published.last) == [("g1-1", AdminState.READY), ("g1-2", AdminState.DRAIN)]


@pytest.mark.parametrize("url", ["http://127.0.0.1:20001", "http://127.0.0.1:20009", "unix:/run/apps/g1-1.sock"])
def test_one_that_was_started_anew_is_another_process_under_the_same_id(url: str) -> None:
    routing, published = make(ONE)
    routing.add_process(app_process())
    routing.report_gone("g1-1")
    assert published.last.upstreams[1].is_refused
    assert "g1-1" not in [one.id for one in published.last.candidates]
    routing.add_process(app_process(url=url))
    again = published.last.upstreams[1]
    assert (again.admin, again.health, again.is_refused) == (AdminState.READY, Health.UNKNOWN, False)
    assert published.endpoints["g1-1"] == Endpoint(app_process(url=url).address)
    assert "g1-1" in [one.id for one in published.last.candidates]
    assert list(routing.processes) == ["g1-1"]


def test_what_the_operator_wants_of_an_app_process_outlives_its_crash_but_not_its_end() -> None:
    routing, published = make(ONE)
    routing.add_process(app_process())
    routing.set_admin_state("g1-1", AdminState.DRAIN)
    routing.add_process(app_process(url="http://127.0.0.1:20009"))
    assert ids(published.last)[1] == ("g1-1", AdminState.DRAIN)
    routing.remove_process("g1-1")
    routing.add_process(app_process())
    assert ids(published.last)[1] == ("g1-1", AdminState.READY)


def test_a_process_that_has_ended_is_dead_at_once() -> None:
    routing, published = make(ONE)
    routing.add_process(app_process())
    routing.report("g1-1", PASSED)
    routing.report_gone("g1-1")
    one = published.last.upstreams[1]
    assert (one.health, one.is_refused) == (Health.UNHEALTHY, True)
    assert one.digest not in published.last.pinnable


def test_closing_is_for_app_processes_and_until_their_end(caplog: pytest.LogCaptureFixture) -> None:
    routing, published = make()
    for number in (1, 2, 3):
        routing.add_process(app_process(f"g1-{number}", f"http://127.0.0.1:2000{number}"))
    before = len(published.snapshots)
    routing.set_closing(["g1-1", "g1-2", "a", "g9-9"])
    assert [one.id for one in published.last.upstreams if one.is_closing] == ["g1-1", "g1-2"]
    assert [one.id for one in published.last.candidates] == ["a", "b", "g1-3"]
    routing.set_closing(["g1-2"])
    routing.set_closing([])
    assert len(published.snapshots) == before + 1
    routing.set_closing(["g1-3"])
    assert [one.id for one in published.last.upstreams if one.is_closing] == ["g1-1", "g1-2", "g1-3"]
    with pytest.raises(ValueError, match="takes no new client"):
        routing.set_admin_state("g1-1", AdminState.READY)
    routing.set_admin_state("g1-1", AdminState.MAINT)
    routing.remove_process("g1-1")
    routing.add_process(app_process())
    assert [one.id for one in published.last.upstreams if one.is_closing] == ["g1-2", "g1-3"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_app_process_that_is_to_end_takes_nobody_again() -> None:
    routing, published = make()
    for number in (1, 2):
        routing.add_process(app_process(f"g1-{number}", f"http://127.0.0.1:2000{number}"))
    routing.is_retired = lambda upstream_id: upstream_id in {"g1-1", "a"}
    routing.set_admin_state("g1-1", AdminState.DRAIN)
    before = len(published.snapshots)
    with pytest.raises(ValueError, match="the app process 'g1-1' ends once its sessions have; it takes no new client"):
        routing.set_admin_state("g1-1", AdminState.READY)
    assert len(published.snapshots) == before
    assert routing.admin_states["g1-1"] is AdminState.DRAIN
    for state in (AdminState.MAINT, AdminState.DRAIN):  # its clients can be sent away, and let come again
        routing.set_admin_state("g1-1", state)
        assert routing.admin_states["g1-1"] is state
    for other in ("g1-2", "a"):  # the runner knows app processes only
        routing.set_admin_state(other, AdminState.DRAIN)
        routing.set_admin_state(other, AdminState.READY)


def test_an_id_belongs_to_one_upstream(caplog: pytest.LogCaptureFixture) -> None:
    routing, published = make()
    with pytest.raises(ValueError, match="in the configuration"):
        routing.add_process(app_process("a"))
    routing.reload(load_text(ONE, {}), {})
    with pytest.raises(ValueError, match="in the configuration"):
        routing.add_process(app_process("b"))  # it is leaving
    routing.drop(["b"])
    routing.add_process(app_process("b"))
    routing.reload(load_text(TWO, {}), {})
    assert published.endpoints["b"] == Endpoint(Address("127.0.0.1", 20001))
    assert [one.id for one in published.last.upstreams] == ["a", "b"]
    assert "upstream b of the configuration is left out: an app process has that id" in caplog.messages
    routing.remove_process("b")
    routing.reload(load_text(TWO, {}), {})
    assert published.endpoints["b"] == Endpoint(Address(path="/run/b.sock"))


def test_who_follows_is_told_of_each_upstream_that_comes_moves_or_goes() -> None:
    routing, _ = make()
    told: list[list[str]] = []
    routing.on_change = lambda: told.append(sorted(routing.endpoints))
    routing.add_process(app_process())
    routing.add_process(app_process(url="http://127.0.0.1:20009"))
    routing.report("g1-1", REFUSED)
    routing.set_admin_state("g1-1", AdminState.DRAIN)
    routing.set_closing(["g1-1"])
    assert told == [["a", "b", "g1-1"]] * 2
    routing.remove_process("g1-1")
    routing.reload(load_text(ONE, {}), {})  # after which everybody looks anew
    assert told[2:] == [["a", "b"]]
    routing.drop(["b"])
    assert told[3:] == [["a"]]


# Another process goes on


def test_app_processes_go_on_in_another_image_of_the_proxy() -> None:
    routing, before = make(NAMED)
    routing.add_process(app_process())
    routing.add_process(app_process("g1-2", "unix:/run/apps/g 1-2.sock", max_sessions=7))
    routing.add_process(app_process("g2-1", "http://127.0.0.1:20003"))
    routing.set_admin_state("g1-2", AdminState.DRAIN)
    routing.set_closing(["g1-2"])
    routing.report("g2-1", PASSED)
    routing.report_gone("g1-1")
    routing.reload(load_text(NAMED.rsplit("  -", 1)[0], {}), {})  # one is leaving, too
    exported = json.loads(json.dumps(routing.export()))
    published = Published()
    told: list[None] = []
    other = Routing(load_text(NAMED.rsplit("  -", 1)[0], {}), published)
    other.on_change = lambda: told.append(None)
    other.restore(exported)
    assert told == [None]
    assert published.last.upstreams == before.last.upstreams
    assert [one.is_closing for one in published.last.upstreams] == [False, False, False, False, True, False]
    assert list(other.processes) == ["g1-1", "g1-2", "g2-1"]
    assert list(other.leaving) == ["c"]
    assert other.processes == routing.processes
    for upstream_id in other.processes:
        assert published.endpoints[upstream_id] == before.endpoints[upstream_id]
        assert other.observed[upstream_id] == routing.observed[upstream_id]
    other.remove_process("g1-2")
    assert other.export()["closing"] == []


def test_what_an_earlier_version_or_nonsense_left_is_no_app_process() -> None:
    routing, published = make()
    exported = routing.export()
    del exported["processes"], exported["closing"]
    routing.restore(exported)
    assert ids(published.last) == [("a", AdminState.READY), ("b", AdminState.READY)]
    routing.restore(
        {
            "processes": [
                "{id: g1-1",
                "{url: 'http://127.0.0.1:1', id: a}",
                "{id: g1-1, url: 'http://127.0.0.1:2'}",
                "5",
            ],
            "closing": ["a", "g1-1", "g9-9"],
        }
    )
    assert list(routing.processes) == ["g1-1"]
    assert published.endpoints["a"].address.port == 8001
    assert [one.id for one in published.last.upstreams if one.is_closing] == ["g1-1"]


# The log


def test_the_log_names_what_changed_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stickyproxy.control.routing")
    routing, _ = make(TWO + "health: {probe: {fall: 1, rise: 1}}")
    for event in (PASSED, PASSED, FAILED, FAILED, PASSED, REFUSED, REFUSED):
        routing.report("a", event)
    routing.set_admin_state("a", AdminState.DRAIN)
    routing.set_admin_state("a", AdminState.DRAIN)
    assert levels(caplog) == [
        (logging.INFO, "upstream a is healthy"),
        (logging.WARNING, "upstream a is unhealthy"),
        (logging.INFO, "upstream a is healthy"),
        (logging.WARNING, "upstream a is refusing connections"),
        (logging.INFO, "upstream a is set to drain"),
    ]


def test_the_log_says_when_no_upstream_is_left_and_when_one_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stickyproxy.control.routing")
    routing, published = make()
    routing.report("a", REFUSED)
    assert not published.last.is_guarded
    routing.report("b", REFUSED)
    assert published.last.is_guarded
    routing.report("b", CONNECTED)
    assert not published.last.is_guarded
    assert levels(caplog) == [
        (logging.WARNING, "upstream a is refusing connections"),
        (logging.WARNING, "upstream b is refusing connections"),
        (logging.ERROR, "no upstream is healthy: new clients are placed all the same"),
        (logging.INFO, "upstream b accepts connections again"),
        (logging.INFO, "an upstream is healthy again"),
    ]


def test_a_cluster_that_the_operator_emptied_is_not_called_unhealthy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "stickyproxy.control.routing")
    routing, published = make()
    for upstream_id in ("a", "b"):
        routing.set_admin_state(upstream_id, AdminState.MAINT)
    assert published.last.candidates == ()
    assert not published.last.is_guarded
    assert levels(caplog) == []


def test_no_upstreams_make_an_empty_snapshot() -> None:
    published = Published()
    routing = Routing(Config(), published)
    assert routing.snapshots["default"].upstreams == ()
    assert published.endpoints == {}


# Several clusters

CLUSTERS = """
upstreams: [{id: a, url: "http://127.0.0.1:8001"}]
clusters:
  shop:
    upstreams: [{id: s, url: "http://127.0.0.1:8101"}, {id: t, url: "http://127.0.0.1:8102"}]
    affinity: {policy: random, cookie: false}
    health: {probe: {path: /healthz, fall: 1}}
routes: [{path: /shop, cluster: shop}]
"""
ALONE = CLUSTERS.partition("clusters")[0]


def test_each_cluster_has_a_snapshot_of_its_own() -> None:
    routing, published = make(CLUSTERS)
    assert {name: [one.id for one in snapshot.upstreams] for name, snapshot in published.all.items()} == {
        "default": ["a"],
        "shop": ["s", "t"],
    }
    rules = published.all["shop"].rules
    assert (rules.policy, rules.has_cookie) == ("random", False)
    assert published.all["default"].rules == Rules()
    probe = routing.probe_of("s")
    assert probe is not None
    assert (probe.path, routing.probe_of("a")) == ("/healthz", Config().health.probe)
    for upstream_id in ("a", "s"):
        routing.report(upstream_id, FAILED)
    assert [one.health for one in routing.upstreams] == [Health.UNKNOWN, Health.UNHEALTHY, Health.UNKNOWN]


def test_a_cluster_that_is_taken_away_is_there_until_its_upstreams_are_gone() -> None:
    routing, published = make(CLUSTERS)
    rules = published.all["shop"].rules
    routing.reload(load_text(ALONE, {}), {})
    assert [(one.id, one.admin) for one in published.all["shop"].upstreams] == [
        ("s", AdminState.DRAIN),
        ("t", AdminState.DRAIN),
    ]
    assert published.all["shop"].rules == rules
    exported = json.loads(json.dumps(routing.export()))
    other, taken_over = make(ALONE)
    other.restore(exported)
    assert other.clusters == {"a": "default", "s": "shop", "t": "shop"}
    assert taken_over.all["shop"].upstreams == published.all["shop"].upstreams
    assert other.probe_of("s") == Config().health.probe
    routing.drop(["s", "t"])
    assert list(published.all) == ["default"]


def test_an_upstream_that_moves_to_another_cluster_stays_what_it_is() -> None:
    routing, published = make(CLUSTERS)
    routing.set_admin_state("s", AdminState.DRAIN)
    moved = CLUSTERS.replace("upstreams: [{id: a", "upstreams: [{id: s, url: 'http://127.0.0.1:8101'}, {id: a").replace(
        '[{id: s, url: "http://127.0.0.1:8101"}, {id: t', "[{id: t"
    )
    routing.reload(load_text(moved, {}), {})
    assert [(one.id, one.admin) for one in published.all["default"].upstreams] == [
        ("s", AdminState.DRAIN),
        ("a", AdminState.READY),
    ]
    assert [one.id for one in published.all["shop"].upstreams] == ["t"]
    assert routing.leaving == {}
