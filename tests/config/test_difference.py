"""What a reload changes: each difference once, in the words of the file, without a secret."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.config.cluster import OF_THE_PROXY
from stickyproxy.config.difference import Change, find_changes, find_unreloadable
from stickyproxy.config.fields import Section
from stickyproxy.config.load import load_text
from stickyproxy.config.schema import Config
from tests.config.every_key import ROWS, RUN_ROWS, RUN_TEXT, TEXT, Row, config_with

if TYPE_CHECKING:
    from collections.abc import Iterable

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall
BASE = load_text(TEXT, {})
RUN_BASE = load_text(RUN_TEXT, {})
KEY_NAMES = ("keys.name", "keys.learn.header", "keys.learn.cookie", "keys.learn.in")
NAMES = {
    "listeners.address",
    "listeners.tls.certificates.certificate",
    "upstreams.id",
    "clusters.upstreams.id",
    "routes.host",
    "routes.path",
    *(f"{section}.{key}" for section in ("affinity", "clusters.affinity") for key in KEY_NAMES),
}
NOT_OF_CLUSTERS = {f"clusters.affinity.{key}" for key in OF_THE_PROXY}


def lines(before: str | Config, after: str | Config) -> list[str]:
    pair = [one if isinstance(one, Config) else load_text(one, {}) for one in (before, after)]
    return [str(change) for change in find_changes(*pair)]


def unfold(annotation: object) -> Iterable[object]:
    return [annotation, *(kind for part in get_args(annotation) for kind in unfold(part))]


def leaves(section: type[Section], path: tuple[str, ...] = ()) -> Iterable[str]:
    """Return the path of each key of the schema that is no section, without positions in lists."""
    for field in section.model_fields.values():
        below = (*path, str(field.alias))
        inner = [kind for kind in unfold(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        yield from leaves(inner[0], below) if inner else [".".join(below)]


def test_every_key_of_the_schema_has_a_row() -> None:
    """A new key is told of when it changes, and in the right words, or this fails."""
    rows, run_rows = (
        [".".join(key for key in row.path if isinstance(key, str) and key != "shop") for row in table]
        for table in (ROWS, RUN_ROWS)
    )
    found = [leaf for leaf in leaves(Config) if leaf not in NAMES | NOT_OF_CLUSTERS]
    assert [leaf for leaf in found if not leaf.startswith("run.")] == rows
    assert [leaf for leaf in found if leaf.startswith("run.")] == run_rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.line)
def test_a_changed_key_is_found_once(row: Row) -> None:
    assert lines(BASE, config_with([row])) == [row.line]


@pytest.mark.parametrize("row", RUN_ROWS, ids=lambda row: row.line)
def test_a_changed_key_of_run_is_found_once(row: Row) -> None:
    assert lines(RUN_BASE, config_with([row], RUN_TEXT)) == [row.line]


def test_all_keys_of_run_can_change_in_one_reload() -> None:
    changed = config_with(RUN_ROWS, RUN_TEXT)
    assert lines(RUN_BASE, changed) == [row.line for row in RUN_ROWS]
    assert find_unreloadable(RUN_BASE, changed) == ()
    assert find_changes(changed, config_with(RUN_ROWS, RUN_TEXT)) == ()


SOME_ROWS = st.sets(st.sampled_from(range(len(ROWS)))).map(lambda found: [ROWS[number] for number in sorted(found)])


@UNHURRIED
@given(SOME_ROWS)
def test_changes_that_come_together_are_found_each_once_in_the_order_of_the_file(rows: list[Row]) -> None:
    changed = config_with(rows)
    assert lines(BASE, changed) == [row.line for row in rows]
    back = find_changes(changed, BASE)
    assert [change.path for change in back] == [change.path for change in find_changes(BASE, changed)]
    assert find_changes(changed, config_with(rows)) == ()


@UNHURRIED
@given(SOME_ROWS, SOME_ROWS)
def test_there_are_no_changes_exactly_where_two_configurations_are_equal(one: list[Row], other: list[Row]) -> None:
    before, after = config_with(one), config_with(other)
    found = find_changes(before, after)
    assert (found == ()) == (before == after)
    assert len(found) == sum((row in one) != (row in other) for row in ROWS)


@UNHURRIED
@given(SOME_ROWS)
def test_no_secret_is_shown(rows: list[Row]) -> None:
    for pair in ((BASE, config_with(rows)), (config_with(rows), BASE), (Config(), BASE), (BASE, Config())):
        found = repr(find_changes(*pair)) + "".join(lines(*pair))
        assert "-0123456789" not in found


def test_a_secret_within_a_section_that_is_switched_on_is_not_shown() -> None:
    token = "{admin: {token: hunter2-hunter2-hunter2}}"
    assert lines("{admin: false}", token) == ["admin: false -> {token: (not shown)}"]
    assert lines(token, "{admin: false}") == ["admin: {token: (not shown)} -> false"]
    assert lines("", token) == ["admin.token: changed"]


ENV = "{A: hunter2, B: hunter2, C: hunter2}"


def test_environment_variables_are_told_by_name_and_their_values_never() -> None:
    before, after = f"run: {{command: a, env: {ENV}}}", "run: {command: a, env: {D: hunter3, B: hunter3, C: hunter2}}"
    assert lines(before, after) == ["run.env: A removed", "run.env.B: changed", "run.env: D added"]
    assert lines(before, "run: {command: a, env: {C: hunter2, B: hunter2, A: hunter2}}") == []
    assert lines(before, "") == ["run: {command: a, env: (not shown)} -> null"]
    assert "hunter" not in repr(find_changes(load_text(before, {}), load_text(after, {})))
    assert "hunter" not in repr(load_text(before, {}))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("4", "6", ["run.processes: 4 -> 6"]),
        ("4", "{min: 4, max: 4}", []),
        ("4", "{min: 2, max: 8}", ["run.processes: 4 -> {min: 2, max: 8}"]),
        (
            "{min: 2, max: 2, sessions_each: 5}",
            "{min: 2, max: 4, sessions_each: 6}",
            ["run.processes.max: 2 -> 4", "run.processes.sessions_each: 5 -> 6"],
        ),
        ("{min: 2, max: 8}", "1", ["run.processes: {min: 2, max: 8} -> 1"]),
    ],
)
def test_processes_are_told_as_the_file_has_them(before: str, after: str, expected: list[str]) -> None:
    form = "run: {{command: a, processes: {}}}"
    assert lines(form.format(before), form.format(after)) == expected


def lines_without_details(before: str, after: str) -> list[str]:
    return [line.partition(" (")[0] for line in lines(before, after)]


def test_a_preset_is_told_with_what_it_brings() -> None:
    form = "{{presets: {}, run: {{command: app}}}}"
    assert lines_without_details(form.format("[]"), form.format("chainlit")) == [
        "presets: chainlit added",
        "run.env: CHAINLIT_HOST added",
        "run.env: CHAINLIT_PORT added",
        "run.ready.path: null -> /health",
        *["affinity.keys: Chainlit session added", "affinity.keys: Engine.IO sid added"],
        "health.probe.path: null -> /health",
    ]
    assert lines_without_details(form.format("[panel]"), form.format("engineio")) == [
        "presets: panel removed",
        "presets: engineio added",
        "run.env: BOKEH_ALLOW_WS_ORIGIN removed",
        *["affinity.keys: Bokeh session removed", "affinity.keys: Engine.IO sid added"],
        "websocket.origins: [same-host] -> null",
    ]
    assert lines("presets: [panel, gradio]", "presets: [gradio, panel]") == [
        "presets: in another order",
        "affinity.keys: in another order",
        "health.probe.path: /gradio_api/app_id -> null",
    ]


KEY = "{name: k, mode: learn, query: sid, learn: [{in: response, json: id}]}"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (KEY, KEY, []),
        ("", KEY, ["affinity.keys: k added (mode: learn, query: [sid], learn: [{in: response, json: id}])"]),
        (KEY, "", ["affinity.keys: k removed"]),
        (KEY, KEY.replace("name: k", "name: l"), [
            "affinity.keys: k removed",
            "affinity.keys: l added (mode: learn, query: [sid], learn: [{in: response, json: id}])",
        ]),
        (KEY, KEY.replace("{in: response, json: id}", "{header: X}"), [
            "affinity.keys.k.learn: response removed",
            "affinity.keys.k.learn: X added (header: X)",
        ]),
        (KEY, KEY.replace("sid,", "[a, sid], gone: {},"), [
            "affinity.keys.k.query: a added",
            "affinity.keys.k.gone: null -> {}",
        ]),
        ("{mode: hash, query: a}, " + KEY, KEY + ", {mode: hash, query: a}", ["affinity.keys: in another order"]),
        ("{mode: hash, query: a}, {mode: hash, query: a}", "{mode: hash, query: a}", [
            "affinity.keys: query a removed",
        ]),
    ],
)  # fmt: skip
def test_keys_are_matched_by_name(before: str, after: str, expected: list[str]) -> None:
    form = "affinity: {{keys: [{}]}}"
    assert lines(form.format(before), form.format(after)) == expected


def test_the_room_for_keys_is_taken_at_the_start() -> None:
    (found,) = find_unreloadable(load_text("", {}), load_text("affinity: {max_keys: 9, keys: [" + KEY + "]}", {}))
    assert str(found) == (
        "affinity.max_keys: 65536 -> 9; the room for keys is taken once, at the start: restart the proxy"
    )


def test_a_command_is_told_as_one_text() -> None:
    before = "run: {command: [a, b, --x]}"
    assert lines(before, "run: {command: 'a  b'}") == ["run.command: a b --x -> a b"]
    assert lines(before, "run: {command: [b, a, --x]}") == ["run.command: a b --x -> b a --x"]
    assert lines(before, 'run: {command: [a, "{id}", "b c"]}') == ["run.command: a b --x -> a {id} 'b c'"]
    assert lines(before, "run: {command: 'a b --x'}") == []


def test_upstreams_are_matched_by_id() -> None:
    before = "upstreams: [{id: app-1, url: 'http://a'}, {id: app-2, url: 'http://b'}, 'http://c']"
    after = "upstreams: [{id: app-2, url: 'http://b', weight: 2}, 'http://c', {id: app-3, url: 'http://a'}]"
    assert lines(before, after) == [
        "upstreams: app-1 removed",
        "upstreams.app-2.weight: 1 -> 2",
        "upstreams: app-3 added (http://a:80)",
    ]


def test_an_id_that_moves_to_another_address_is_a_change_of_its_url() -> None:
    before = "upstreams: [{id: app-1, url: 'http://a'}, {id: app-2, url: 'http://b'}]"
    after = "upstreams: [{id: app-1, url: 'http://b'}, {id: app-2, url: 'unix:/a'}]"
    assert lines(before, after) == [
        "upstreams.app-1.url: http://a:80 -> http://b:80",
        "upstreams.app-2.url: http://b:80 -> unix:/a",
    ]


def test_an_upstream_without_an_id_of_its_own_is_another_one_at_another_address() -> None:
    assert lines("upstreams: ['http://a']", "upstreams: [{url: 'https://a', max_sessions: 3}]") == [
        "upstreams: a:80 removed",
        "upstreams: a:443 added (https://a:443, max_sessions: 3)",
    ]
    assert lines("upstreams: ['http://a']", "upstreams: [{id: 'a', url: 'http://a'}]") == [
        "upstreams: a:80 removed",
        "upstreams: a added (http://a:80)",
    ]


def test_listeners_are_matched_by_address() -> None:
    before = "listeners: [':80', {address: ':81', redirect_to_https: true}]"
    after = "listeners: [{address: ':443', tls: {certificates: [/a.pem, /b.pem]}}, {address: ':81'}]"
    assert lines(before, after) == [
        "listeners: :80 removed",
        "listeners.:81.redirect_to_https: 443 -> false",
        "listeners: :443 added (tls: {certificates: [{certificate: /a.pem}, {certificate: /b.pem}]})",
    ]


def test_listeners_whose_port_the_system_chooses_are_matched_in_turn() -> None:
    before = "listeners: ['127.0.0.1:0', {address: '127.0.0.1:0', redirect_to_https: true}]"
    assert lines(before, "listeners: ['127.0.0.1:0']") == ["listeners: 127.0.0.1:0 removed"]
    assert lines(before, "listeners: ['127.0.0.1:0', '127.0.0.1:0', '127.0.0.1:0']") == [
        "listeners.127.0.0.1:0.redirect_to_https: 443 -> false",
        "listeners: 127.0.0.1:0 added",
    ]


def test_certificates_are_matched_by_file() -> None:
    before = "listeners: [{address: ':443', tls: {certificates: [/a.pem, /b.pem]}}]"
    after = "listeners: [{address: ':443', tls: {certificates: [/b.pem, {certificate: /c.pem, key: /c.key}]}}]"
    assert lines(before, after) == [
        "listeners.:443.tls.certificates: /a.pem removed",
        "listeners.:443.tls.certificates: /c.pem added (key: /c.key)",
    ]


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ("upstreams: ['http://a', 'http://b']", "upstreams: ['http://b', 'http://a']", "upstreams"),
        ("trusted_proxies: [10.0.0.0/8, '::1']", "trusted_proxies: ['::1', 10.0.0.0/8]", "trusted_proxies"),
        (
            "listeners: [{address: ':1', tls: {certificates: [/a, /b]}}]",
            "listeners: [{address: ':1', tls: {certificates: [/b, /a]}}]",
            "listeners.:1.tls.certificates",
        ),
    ],
)
def test_another_order_is_a_change(before: str, after: str, path: str) -> None:
    """The first certificate is shown to clients that ask for no name."""
    assert lines(before, after) == [f"{path}: in another order"]


def test_what_stands_in_a_list_twice() -> None:
    assert lines("trusted_proxies: [unix, '::1', '::1']", "trusted_proxies: [unix, '::1']") == [
        "trusted_proxies: ::1/128 removed"
    ]


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("affinity: {cookie: false}", "", "affinity.cookie: false -> true"),
        ("", "affinity: {cookie: false}", "affinity.cookie: true -> false"),
        ("affinity: {cookie: false}", "affinity: {cookie: {max_age: 1d}}", "affinity.cookie: false -> {max_age: 1d}"),
        ("", "health: {probe: false}", "health.probe: true -> false"),
        ("", "admin: false", "admin: true -> false"),
        ("", "websocket: {ping: {timeout: off}}", "websocket.ping: false -> {timeout: off}"),
        ("", "access_log: {path: /a}", "access_log: false -> {path: /a}"),
        ("", "websocket: {origins: [absent]}", "websocket.origins: null -> [absent]"),
        (
            "upstreams: ['https://a']",
            "upstreams: [{url: 'https://a', tls: {verify: false}}]",
            "upstreams.a:443.tls: null -> {verify: false}",
        ),
        (
            "listeners: [':443']",
            "listeners: [{address: ':443', tls: {certificates: /a}}]",
            "listeners.:443.tls: null -> {certificates: [{certificate: /a}]}",
        ),
    ],
)
def test_a_section_that_is_switched_on_or_off_is_one_change(before: str, after: str, line: str) -> None:
    assert lines(before, after) == [line]


def test_code_reads_paths_and_kinds() -> None:
    before = load_text("upstreams: ['http://a', {id: x.y, url: 'http://b'}]", {})
    after = load_text("{upstreams: [{id: x.y, url: 'http://b', weight: 2}, 'http://c'], grace: 1s}", {})
    assert find_changes(before, after) == (
        Change(("upstreams", "a:80"), "removed"),
        Change(("upstreams", "x.y", "weight"), "changed", "1 -> 2"),
        Change(("upstreams", "c:80"), "added", "http://c:80"),
        Change(("grace",), "changed", "30s -> 1s"),
    )


def test_a_change_is_one_line_whatever_stands_in_the_name_of_a_file() -> None:
    certificates = "listeners: [{address: ':1', tls: {certificates: [/a, \"/\\u2028\\x85\"]}}]"
    plain = "listeners: [{address: ':1', tls: {certificates: [/a]}}]"
    assert lines(plain, certificates) == ["listeners.:1.tls.certificates: /\\u2028\\x85 added"]
    assert lines("", 'state_directory: "/\\u2028\\x85"') == ['state_directory: null -> "/\\L\\N"']


def test_what_a_reload_cannot_change_says_what_can() -> None:
    before = load_text("control: /a", {})
    after = load_text("{control: false, hand_over: /b, grace: 1s}", {})
    found = find_unreloadable(before, after)
    assert [one.change.path for one in found] == [("control",), ("hand_over",)]
    assert [str(one) for one in found] == [
        "control: /a -> false; the socket is made once, at the start: restart the proxy",
        "hand_over: null -> /b; the socket is made once, at the start: restart the proxy",
    ]


RUN_STAYS = "whether the proxy runs the app itself is settled at the start: restart the proxy"


def test_a_reload_neither_begins_nor_ends_to_run_the_app() -> None:
    run = load_text("run: {command: 'a {port}', processes: 4}", {})
    listed = load_text("upstreams: ['http://a']", {})
    begins, ends = find_unreloadable(listed, run), find_unreloadable(run, listed)
    assert [str(one) for one in begins] == [f"run: null -> {{command: 'a {{port}}', processes: 4}}; {RUN_STAYS}"]
    assert [str(one) for one in ends] == [f"run: {{command: 'a {{port}}', processes: 4}} -> null; {RUN_STAYS}"]
    assert [one.change.path for one in (*begins, *ends)] == [("run",), ("run",)]


STAYS = [("affinity", "max_keys"), ("control",), ("hand_over",)]


def test_everything_else_can_be_reloaded() -> None:
    rest = [row for row in ROWS if row.path not in STAYS]
    assert len(rest) == len(ROWS) - 3
    assert find_unreloadable(BASE, config_with(rest)) == ()
    assert [one.change.path for one in find_unreloadable(BASE, config_with(ROWS))] == STAYS
