"""What a preset brings, what the user's own file says over it, and how a mistake between them is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.keys import KeyReader, Lesson
from stickyproxy.config.document import read_document
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.load import load_text
from stickyproxy.config.preset import PRESETS, describe_preset, preset_text, put_presets_under, read_presets
from stickyproxy.config.schema import Config
from stickyproxy.config.source import ConfigSource
from stickyproxy.wire.head import HeadLimits
from stickyproxy.wire.request_head import parse_request_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stickyproxy.affinity.keys import Origin
    from stickyproxy.config.run import Run

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall


def load(text: str, *presets: str, command: Sequence[str] | None = None) -> Config:
    """Load a text as the command line does, with its `--preset` and its command."""
    return ConfigSource(presets=presets, command=None if command is None else tuple(command)).load_text(text, {})


def run_of(text: str, *presets: str, command: Sequence[str] | None = None) -> Run:
    run = load(text, *presets, command=command).run
    assert run is not None
    return run


def probe_path(config: Config) -> str | None:
    assert config.health.probe is not None
    return config.health.probe.path


# The presets that there are


def test_the_frameworks() -> None:
    assert PRESETS == (
        "auto", "chainlit", "engineio", "gradio", "jupyter", "marimo", "mcp", "nicegui", "panel", "shiny", "streamlit",
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_right_piece_of_a_file_and_says_in_its_first_line_what_it_is(name: str) -> None:
    copied = load_text(preset_text(name).replace("run:", "run:\n  command: app"), {})
    assert copied == load_text(f"{{presets: {name}, run: {{command: app}}}}", {}).model_copy(
        update={"presets": copied.presets, **({} if "run:" in preset_text(name) else {"run": None})}
    )
    assert preset_text(name) == f"# {describe_preset(name)}\n{preset_text(name).partition(chr(10))[2]}"
    assert 20 < len(describe_preset(name)) <= 110


@pytest.mark.parametrize("name", ["chainlit", "nicegui"])
def test_a_preset_may_stand_on_another(name: str) -> None:
    config = load_text(f"presets: {name}", {})
    assert config.presets == (name,)
    assert [key.name for key in config.affinity.keys][1:] == ["Engine.IO sid"]
    both = load_text(f"presets: [engineio, {name}]", {})
    assert both.affinity.keys == config.affinity.keys


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_room_for_more_in_each_section(name: str) -> None:
    """In short forms, such as `ready: /x`, it would be lost as a whole where the user gives one more key."""
    bare, more = (
        load(f"{{run: {{command: app{ready}}}{probe}}}", name)
        for ready, probe in (("", ""), (", ready: {timeout: 5s}", ", health: {probe: {interval: 7s}}"))
    )
    assert bare.run is not None
    assert more.run is not None
    assert (more.run.ready.path, more.run.ready.timeout_s) == (bare.run.ready.path, 5.0)
    assert more.health.probe is not None
    assert (more.health.probe.path, more.health.probe.interval_s) == (probe_path(bare), 7.0)


@pytest.mark.parametrize(
    ("name", "path", "env"),
    [
        ("chainlit", "/health", {"CHAINLIT_HOST": "127.0.0.1", "CHAINLIT_PORT": "{port}"}),
        (
            "gradio",
            "/gradio_api/app_id",
            {
                "GRADIO_SERVER_NAME": "127.0.0.1",
                "GRADIO_SERVER_PORT": "{port}",
                "GRADIO_NUM_PORTS": "1",
                "GRADIO_ANALYTICS_ENABLED": "False",
            },
        ),
        (
            "streamlit",
            "/_stcore/health",
            {
                "STREAMLIT_SERVER_ADDRESS": "127.0.0.1",
                "STREAMLIT_SERVER_PORT": "{port}",
                "STREAMLIT_SERVER_HEADLESS": "true",
                "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
                "STREAMLIT_SERVER_FILE_WATCHER_TYPE": "none",
                "STREAMLIT_LOGGER_HIDE_WELCOME_MESSAGE": "true",
            },
        ),
        ("panel", None, {"BOKEH_ALLOW_WS_ORIGIN": "*"}),
        ("nicegui", None, {}),
        ("shiny", None, {}),
        ("engineio", None, {}),
        ("jupyter", "/api", {}),
        ("marimo", "/health", {"PYTHONHASHSEED": "0"}),
        ("mcp", None, {}),
        ("auto", None, {}),
    ],
)
def test_what_a_preset_brings(name: str, path: str | None, env: dict[str, str]) -> None:
    config = load("", name, command=["app"])
    assert config.run is not None
    assert (config.run.ready.path, probe_path(config), dict(config.run.env)) == (path, path, env)
    assert config.run.uses_port == ("{port}" in env.values())
    assert config.run.stop.signal == ("INT" if name == "gradio" else "TERM")
    assert config.websocket.origins == (("same-host",) if name == "panel" else None)


# In the file


@pytest.mark.parametrize("raw", ["panel", ["panel"], ["engineio", "panel"], []])
def test_the_file_names_one_or_more(raw: object) -> None:
    config = load(f"presets: {json.dumps(raw)}")
    assert config.presets == ((raw,) if isinstance(raw, str) else tuple(raw))  # type: ignore[arg-type]
    assert config.websocket.origins == (("same-host",) if "panel" in config.presets else None)
    assert load("presets:").presets == ()


UNKNOWN = f"there is no preset 'nope'; there are {', '.join(PRESETS)}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grace: 1s\npresets: nope", [f"line 2: presets: {UNKNOWN}"]),
        ("presets:\n  - panel\n  - nope\n  - 7", [
            f"line 3: presets[1]: {UNKNOWN}",
            "line 4: presets[2]: expected text, got 7; put quotes around it",
        ]),
        ("presets: {panel: true}", [
            "line 1: presets: expected the name of a preset or a list of names, got a mapping",
        ]),
        ("presets: 7", ["line 1: presets: expected the name of a preset or a list of names, got a number"]),
    ],
)  # fmt: skip
def test_a_preset_that_is_not_there_is_a_mistake_at_its_line(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load(text)
    assert [str(error) for error in raised.value.errors] == expected


def test_names_are_read_once_or_in_a_list() -> None:
    assert read_presets("panel") == ("panel",)
    assert read_presets(["shiny", "panel"]) == ("shiny", "panel")
    with pytest.raises(ValueError, match=r"there is no preset '\.\./schema'; "):
        read_presets("../schema")


# What the user says goes over it


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("", "/health"),
        (", ready: /own", "/own"),
        (", ready: {path: /own}", "/own"),
        (", ready: {path: null}", None),
        (", ready: null", None),
        (", ready: {}", "/health"),
        (", ready: {timeout: 1s}", "/health"),
    ],
)
def test_mappings_are_merged_and_all_else_wins_as_a_whole(said: str, path: str | None) -> None:
    run = run_of(f"{{presets: chainlit, run: {{command: app{said}}}}}")
    assert run.ready.path == path
    assert run.env["CHAINLIT_PORT"] == "{port}"


def test_what_wins_as_a_whole() -> None:
    assert load("{presets: chainlit, health: {probe: false}}").health.probe is None
    assert probe_path(load("{presets: chainlit, health: {probe: true}}")) is None
    assert probe_path(load("{presets: chainlit, health: null}")) is None
    assert load("{presets: panel, websocket: {origins: null}}").websocket.origins is None
    assert load("{presets: panel, websocket: {origins: [absent]}}").websocket.origins == ("absent",)
    kept = load("{presets: panel, websocket: {ping: true}}").websocket
    assert (kept.origins, kept.ping is None) == (("same-host",), False)


def test_variables_are_merged_by_their_names() -> None:
    env = run_of("{presets: chainlit, run: {command: app, env: {A: b, CHAINLIT_HOST: '::1'}}}").env
    assert env == {"A": "b", "CHAINLIT_HOST": "::1", "CHAINLIT_PORT": "{port}"}
    assert run_of("{presets: chainlit, run: {command: app, env: null}}").env == {}


def test_of_two_presets_the_later_goes_over_the_earlier() -> None:
    for names, path in ((("chainlit", "gradio"), "/gradio_api/app_id"), (("gradio", "chainlit"), "/health")):
        config = load(f"{{presets: [{', '.join(names)}], run: {{command: app}}}}")
        assert config.run is not None
        assert (probe_path(config), config.run.ready.path, config.presets) == (path, path, names)
        assert {"CHAINLIT_PORT", "GRADIO_SERVER_PORT"} <= config.run.env.keys()
    assert probe_path(load("presets: [streamlit, engineio]")) == "/_stcore/health"


# The keys of the frameworks, by what one real process of each has sent, and what its clients sent then


class Framework:
    """What the keys of one preset find in requests, and learn from what an exchange with a target has sent."""

    def __init__(self, name: str) -> None:
        self.keys = [one.compile() for one in load("", name).affinity.keys]
        self.reader = KeyReader(self.keys)

    def find(self, target: bytes, *fields: bytes, body: bytes = b"") -> list[tuple[str, bytes]]:
        data = b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n" + b"".join(one + b"\r\n" for one in fields) + b"\r\n"
        head = parse_request_head(data, len(data), HeadLimits())
        in_body = self.reader.read_body(target, body) if self.reader.reads_body(target, is_pinned=False) else []
        return [(key.name, value) for key, value in (*self.reader.read(head), *in_body)]

    def learn(self, origin: Origin, target: bytes, text: bytes, given: str = "") -> list[tuple[str, bytes]]:
        """Return what is learned from a body or a message, of a response that has the field `given`."""
        found = []
        lessons = self.reader.lessons(target)
        for key, lesson in () if lessons is None else lessons.pairs:
            wanted = "" if lesson.given is None else f"{lesson.given[0]}: {lesson.given[1]}"
            if lesson.origin == origin and given.startswith(wanted):
                heard = text[: lesson.within_bytes]
                found += [(key.name, one[1]) for one in re.finditer(lesson.pattern, heard, re.DOTALL)]
        return found


@pytest.fixture(params=["alone", "auto"])
def preset_of(request: pytest.FixtureRequest) -> Callable[[str], Framework]:
    """Return a maker of frameworks: by the preset of each, and by the one that has the keys of all."""
    return lambda name: Framework("auto" if request.param == "auto" else name)


PresetOf = Callable[[str], Framework]
UUID = b"3001733b-618f-4cc0-988b-33b5c534714f"
OTHER_UUID = b"4d67114e-09ae-4ba3-a23a-29a528704657"
EIO_SID = b"AIrxa2m5HZ3qn6SIAAAA"
EIO = "Engine.IO sid", EIO_SID
POLLING = b"/socket.io/?EIO=4&transport=polling"


@pytest.mark.parametrize("name", ["engineio", "chainlit", "nicegui", "auto"])
def test_the_sid_of_engineio_is_in_the_first_answer_and_in_each_later_request(name: str) -> None:
    engineio = Framework(name)
    upgrades = b'"upgrades":["websocket"],"pingTimeout":20000,"pingInterval":25000,"maxPayload":1000000}'
    opened = b'0{"sid":"%b",%b' % (EIO_SID, upgrades)
    jsonp = b'___eio[0]("0{\\"sid\\":\\"%b\\",%b");' % (EIO_SID, upgrades.replace(b'"', b'\\"'))
    assert engineio.learn("response", POLLING + b"&t=P1", opened) == [EIO]
    assert engineio.learn("response", POLLING + b"&j=0", jsonp) == [EIO]
    assert engineio.find(POLLING + b"&t=P1") == []
    for later in (b"&sid=" + EIO_SID, b"&t=P2&sid=" + EIO_SID):
        assert engineio.find(POLLING + later) == [EIO]
        assert engineio.find(b"/chat/ws/socket.io/?EIO=4&transport=websocket" + later) == [EIO]
    assert engineio.find(b"/other?sid=" + EIO_SID) == [], "another app's own"


@pytest.mark.parametrize("name", ["engineio", "chainlit", "nicegui", "auto"])
@pytest.mark.parametrize(
    "later",
    [b'40{"sid":"%b"}', b'42["a"]\x1e40{"sid":"%b"}', b'42["hello",1]\x1e40{"sid":"%b"}', b'2\x1e40{"sid":"%b"}',
     b'440{"sid":"%b"}', b'{"sid":"%b"}', b'___eio[1]("40{\\"sid\\":\\"%b\\"}");', b'x0{"sid":"%b"}'],
)  # fmt: skip
def test_the_sid_of_socketio_is_another_one(name: str, later: bytes) -> None:
    assert Framework(name).learn("response", POLLING + b"&sid=" + EIO_SID, later % b"fAFUa2m5HZ3qn6SIAAAB") == []


def test_what_becomes_of_a_sid_whose_process_is_gone() -> None:
    (key,) = Framework("engineio").keys
    assert key.gone is not None
    assert (key.gone.status, key.gone.content_type) == (400, "application/json")
    assert json.loads(key.gone.body) == {"code": 1, "message": "Session ID unknown"}


def test_chainlit(preset_of: PresetOf) -> None:
    """Its page makes the id, and what counts is where it has connected with it."""
    chainlit = preset_of("chainlit")
    found = [("Chainlit session", UUID)]
    connect = b'40{"clientType":"webapp","sessionId":"%b","threadId":"","userEnv":"{}","chatProfile":""}' % UUID
    target = b"/chat/ws/socket.io/?EIO=4&transport=polling&sid=" + EIO_SID
    assert chainlit.learn("request", target, connect) == found
    assert chainlit.learn("request", target, b'42["x",{}]\x1e' + connect) == found
    assert chainlit.learn("client_messages", target.replace(b"polling", b"websocket"), connect) == found
    assert chainlit.learn("client_messages", target, b'40/ns,{"sessionId":"%b"}' % UUID) == found
    for decoy in (
        b'42["a",{"sessionId":"%b"}]',
        b'41{"sessionId":"%b"}',
        b'{"sessionId":"%b"}',
        b'2{"sessionId":"%b"}',
    ):
        assert chainlit.learn("client_messages", target, decoy % UUID) == []
        assert chainlit.learn("request", target, decoy % UUID) == []
    assert chainlit.find(b"/project/file?session_id=" + UUID) == found
    assert chainlit.find(b"/chat/project/file/1?session_id=" + UUID) == found
    for target in (b"/project/action", b"/project/element", b"/mcp", b"/feedback"):
        assert chainlit.find(target, body=b'{"x":1,"sessionId":"%b"}' % UUID) == found
    assert chainlit.find(b"/login", body=b'{"sessionId":"%b"}' % UUID) == []
    assert chainlit.find(b"/x?session_id=" + UUID) == []


def test_nicegui(preset_of: PresetOf) -> None:
    nicegui = preset_of("nicegui")
    found = [("NiceGUI client", OTHER_UUID)]
    page = b"".join(
        [
            b"<html>" + b"x" * 500_000,
            b'"/_nicegui/client/%b/upload/4"' % UUID,
            b"query: {'client_id': '%b', 'next_message_id': 0, 'implicit_handshake': True}," % OTHER_UUID,
        ]
    )
    assert nicegui.learn("response", b"/any/page", page, "X-NiceGUI-Content: page") == found
    assert nicegui.learn("response", b"/static.js", page) == [], "no page"
    socket = (
        b"/_nicegui_ws/socket.io/?implicit_handshake=true&client_id=%b&next_message_id=0&document_id=1" % OTHER_UUID
    )
    assert nicegui.find(socket + b"&EIO=4&transport=websocket") == found
    assert sorted(nicegui.find(socket + b"&EIO=4&transport=polling&sid=" + EIO_SID)) == [EIO, *found]
    assert nicegui.find(b"/prefix/_nicegui/client/%b/upload/4" % OTHER_UUID) == found
    assert nicegui.find(b"/page?client_id=" + OTHER_UUID) == []


STREAMLIT = (
    b'\x12(2&\n$5a1fd4a6-3cbb-4d0e-8d5b-3a3a3b1c0c0a"\xcf\x02\n\xab\x01\n^\n$e0e0e0e0-1111-4222-8333-444455556666*$'
    b"f0f0f0f0-1111-4222-8333-4444555566662\x10no-machine-id-v4\x1a\x1f\n\x061.67.0\x1a\x05linux%b2$%b\x1a\x03app"
)


@pytest.mark.parametrize("status", [b'"\x02\x10\x01', b'"\x02\x08\x01', b'"\x04\x08\x01\x10\x01', b'"\x00'])
def test_streamlit(status: bytes, preset_of: PresetOf) -> None:
    """The id of the session is the fourth in the first message; those before it are of the run and of the machine."""
    streamlit = preset_of("streamlit")
    found = [("Streamlit session", UUID)]
    assert streamlit.learn("upstream_messages", b"/base/_stcore/stream", STREAMLIT % (status, UUID)) == found
    assert streamlit.find(b"/_stcore/upload_file/%b/0d7e" % UUID) == found
    again = b"Sec-WebSocket-Protocol: streamlit, PLACEHOLDER_AUTH_TOKEN, " + UUID
    assert streamlit.find(b"/_stcore/stream", again) == found
    assert streamlit.find(b"/_stcore/stream", again.replace(b"PLACEHOLDER_AUTH_TOKEN", b"2|a1|b2|1795417200")) == found
    assert streamlit.find(b"/_stcore/stream", b"Sec-WebSocket-Protocol: streamlit, PLACEHOLDER_AUTH_TOKEN") == []
    assert streamlit.find(b"/other/%b/x" % UUID, again) == []


def test_the_other_ids_of_streamlit_are_not_learned() -> None:
    streamlit = Framework("streamlit")
    for decoy in (b"2$" + UUID, b"*$%b2\x10no" % UUID, b"\n$" + UUID, b'"\x01\x00' + b"2$" + UUID, b'"2$' + UUID):
        assert streamlit.learn("upstream_messages", b"/_stcore/stream", decoy) == []
    assert streamlit.learn("upstream_messages", b"/_stcore/stream", STREAMLIT.partition(b"%b")[0]) == []


def test_gradio(preset_of: PresetOf) -> None:
    gradio = preset_of("gradio")
    event_id, session_hash = b"bbd756d101cf44d8a07db6f0a967b3ac", b"abcdef12345"
    event, session = ("Gradio event", event_id), ("Gradio session", session_hash)
    assert gradio.learn("response", b"/gradio_api/queue/join?", b'{"event_id":"%b"}' % event_id) == [event]
    assert gradio.learn("response", b"/other", b'{"event_id":"%b"}' % event_id) == []
    join = (
        b'{"data":["a \\"session_hash\\":\\"x\\""],"event_data":null,"fn_index":0,"trigger_id":2,"session_hash":"%b"}'
    )
    assert gradio.find(b"/gradio_api/queue/join?", body=join % session_hash) == [session]
    python = b'{"data": ["a"], "fn_index": 0, "session_hash": "%b"}'
    assert gradio.find(b"/gradio_api/queue/join", body=python % UUID) == [("Gradio session", UUID)]
    for target in (
        b"/gradio_api/queue/data?session_hash=%b",
        b"/app/gradio_api/heartbeat/%b",
    ):
        assert gradio.find(target % session_hash) == [session]
    assert session in gradio.find(b"/gradio_api/stream/%b/1/2/playlist.m3u8" % session_hash)
    for target in (b"/gradio_api/call/predict/%b", b"/gradio_api/call/v2/predict/%b"):
        assert event in gradio.find(target % event_id)[:1]
    assert event in gradio.find(b"/gradio_api/stream/" + event_id)
    assert event in gradio.find(b"/gradio_api/stream/%b/close" % event_id)
    cancel = b'{"event_id":"%b","session_hash":"%b","fn_index":0}' % (event_id, session_hash)
    assert gradio.find(b"/gradio_api/cancel", body=cancel) == [event, session]
    assert gradio.find(b"/gradio_api/reset", body=b'{"event_id":"%b"}' % event_id) == [event]
    for target in (b"/gradio_api/upload?upload_id=u1", b"/gradio_api/upload_progress?upload_id=u1"):
        assert gradio.find(target) == [("Gradio upload", b"u1")]
    assert gradio.find(b"/?session_hash=a&upload_id=b") == []


def test_shiny(preset_of: PresetOf) -> None:
    shiny = preset_of("shiny")
    session_id = b"4463" * 16
    found = [("Shiny session", session_id)]
    first = b'{"config": {"workerId": "", "sessionId": "%b", "user": null}}' % session_id
    assert shiny.learn("upstream_messages", b"/app/websocket/", first) == found
    assert shiny.learn("client_messages", b"/websocket/", first) == []
    for target in (b"upload/7?w=", b"download/x.csv?w=", b"dynamic_route/x?nonce=1"):
        assert shiny.find(b"/base/session/%b/%b" % (session_id, target)) == found


def test_panel(preset_of: PresetOf) -> None:
    panel = preset_of("panel")
    token = b"eyJzZXNzaW9uX2lkIjogIkEzOEFP" + b"a_-Z" * 100
    found = [("Bokeh session", token[:80])]
    page = b"x" * 100_000 + b'"docid":"%b","roots":{},"token":"%b","y"' % (UUID, token)
    assert panel.learn("response", b"/app", page, "Content-Type: text/html; charset=UTF-8") == found
    script = "Content-Type: application/javascript"
    assert panel.learn("response", b"/app/autoload.js?bokeh-autoload-element=1", page, script) == found
    assert panel.learn("response", b"/static/js/bokeh.min.js", page, script) == []
    assert panel.learn("response", b"/api", page, "Content-Type: application/json") == []
    assert panel.find(b"/app/ws?a=1", b"Sec-WebSocket-Protocol: bokeh, " + token) == found
    assert panel.find(b"/app/ws", b"Sec-WebSocket-Protocol: other, " + token) == []


def test_marimo(preset_of: PresetOf) -> None:
    """Both keys are one: what the page has made."""
    marimo = preset_of("marimo")
    found = [("marimo session", b"s_abc123")]
    for target in (b"/ws?session_id=s_abc123&file=a.py", b"/sse?session_id=s_abc123"):
        assert marimo.find(target) == found
    assert marimo.find(b"/api/kernel/run", b"Marimo-Session-Id: s_abc123", b"Marimo-Server-Token: -25") == found
    assert marimo.find(b"/?session_id=s_abc123") == []


def test_mcp(preset_of: PresetOf) -> None:
    mcp = preset_of("mcp")
    session_id = b"a3d6ae22" * 4
    told = mcp.reader.lessons(b"/any/mcp")
    assert told is not None
    assert [one for key, one in told.pairs if key.name == "MCP session"] == [Lesson("header", "Mcp-Session-Id")]
    assert mcp.find(b"/any/mcp", b"mcp-session-id: " + session_id) == [("MCP session", session_id)]


def test_jupyter(preset_of: PresetOf) -> None:
    """The answer tells two ids, that of the session and that of its kernel."""
    jupyter = preset_of("jupyter")
    answer = b'{"id": "%b", "path": "a.ipynb", "kernel": {"id": "%b", "name": "python3"}}' % (UUID, OTHER_UUID)
    session, kernel = (("Jupyter kernel", one) for one in (UUID, OTHER_UUID))
    assert jupyter.learn("response", b"/api/sessions?1", answer) == [session, kernel]
    assert jupyter.learn("response", b"/api/contents/a", answer) == []
    assert jupyter.find(b"/lab/api/sessions/" + UUID) == [session]
    assert jupyter.find(b"/api/kernels/%b/channels?session_id=x" % OTHER_UUID) == [kernel]
    assert jupyter.find(b"/api/kernels/%b/restart" % OTHER_UUID) == [kernel]
    assert jupyter.find(b"/api/kernels") == []


def test_auto_has_the_keys_of_all_presets_each_once() -> None:
    auto = load("presets: auto").affinity.keys
    assert len(set(auto)) == len(auto)
    assert set(auto) == {key for name in PRESETS[1:] for key in load("", name).affinity.keys}
    assert load("presets: auto").model_copy(update={"presets": (), "affinity": Config().affinity}) == Config()


@pytest.mark.parametrize("name", PRESETS)
def test_each_key_of_a_preset_says_where_it_is_used_and_how_it_is_known(name: str) -> None:
    for key in Framework(name).keys:
        assert key.on or key.headers, "else the name of a parameter would be any app's"
        assert key.lessons or key.mode == "hash"
        assert key.idle_s <= 86_400
        assert all(lesson.on or lesson.given or lesson.origin == "header" for lesson in key.lessons)


SAID_PIECES = [
    b"0{", b'0{"sid":"', b"(", b'("', b"a", b"40", b"40{", b"40{\x1e", b"\x1e40{", b'"sessionId":"', b"'client_id': '",
    b"'client_id': '4d67-", b'"token": "', b'"token": "eyJ', b'"token":"eyJ' + b"a" * 76, b'"', b'"\0',
    b'"\x02\x08\x01\x10\x01', b'"\x02\x08\x01\x10\x012$', b"2$", b'"id":', b'"id"   ', b"{", b" ", b"___eio[",
]  # fmt: skip


@pytest.mark.parametrize("piece", SAID_PIECES)
def test_what_a_hostile_app_or_client_sends_is_looked_through_in_little_time(piece: bytes) -> None:
    """A text is heard anew with each piece of it that comes, so no pattern may try each cut of it."""
    text = b"40{" + piece * ((1 << 17) // len(piece))
    for key in Framework("auto").keys:
        for lesson in key.lessons:
            began_at = perf_counter()
            re.search(lesson.pattern, text, re.DOTALL)
            assert perf_counter() - began_at < 1.0, (key.name, lesson.pattern)


# Keys that add up


def key_names(text: str, *presets: str) -> list[str]:
    return [key.name for key in load(text, *presets).affinity.keys]


OWN = "affinity: {keys: [{mode: hash, query: mine}, {mode: learn, header: X-Mine}]}"


def test_the_keys_of_the_user_stand_first_and_those_of_presets_add_up() -> None:
    assert key_names(OWN) == ["query mine", "header X-Mine"]
    assert key_names(OWN, "mcp") == ["query mine", "header X-Mine", "MCP session"]
    several = key_names(OWN, "mcp", "shiny", "gradio")
    assert several[:2] == ["query mine", "header X-Mine"]
    assert sorted(several[2:]) == ["Gradio event", "Gradio session", "Gradio upload", "MCP session", "Shiny session"]
    assert key_names("affinity: {keys: []}", "mcp") == ["MCP session"]
    assert key_names("affinity: {policy: random}", "mcp") == ["MCP session"]
    assert key_names("affinity: {max_keys: 1}", "auto") == key_names("", "auto")


def test_null_in_place_of_keys_wins() -> None:
    assert key_names("affinity: {keys: null}", "mcp") == []
    assert key_names("affinity: null", "mcp") == []


def test_two_presets_with_the_same_key_find_it_as_one_does() -> None:
    config = load("presets: [engineio, chainlit, nicegui]")
    keys = [one.compile() for one in config.affinity.keys]
    assert {key.name for key in keys} == {"Engine.IO sid", "Chainlit session", "NiceGUI client"}
    assert len({key for key in keys if key.name == "Engine.IO sid"}) == 1
    data = b"GET " + POLLING + b"&sid=1 HTTP/1.1\r\nHost: a\r\n\r\n"
    found = KeyReader(keys).read(parse_request_head(data, len(data), HeadLimits()))
    assert {one.stored for one in found} == {b"Engine.IO sid\x001"}


def test_a_mistake_in_a_key_of_the_user_keeps_its_line_and_one_of_a_preset_names_the_preset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = {
        "shiny": {"affinity": {"keys": [{"mode": "hash", "query": "ok"}, {"mode": "hash", "query": "a&b"}]}},
        "mcp": {"affinity": {"keys": [{"mode": "hash"}]}},
    }
    monkeypatch.setattr("stickyproxy.config.preset._read", lambda name: pieces.get(name, {}))
    text = (
        "presets: [shiny, mcp]\naffinity:\n  keys:\n    - {mode: hash, query: ok}\n    - mode: hash\n      query: c=d\n"
    )
    with pytest.raises(ConfigErrors) as raised:
        load(text)
    needed = "expected where requests carry it: header, query, path, cookie or member"
    wrong = "expected the name of a query parameter, got"
    assert [str(error) for error in raised.value.errors] == [
        f"preset mcp: affinity.keys[2]: {needed}",
        f"preset shiny: affinity.keys[3]: {wrong} 'a&b'",
        f"line 6: affinity.keys[1].query: {wrong} 'c=d'",
    ]


@pytest.mark.parametrize("said", ["7", "{query: a}", "text"])
def test_keys_that_are_no_list_are_a_mistake_of_the_user_beside_a_preset_too(said: str) -> None:
    with pytest.raises(ConfigErrors, match=r"^line 1: affinity\.keys: expected a list, got "):
        load(f"affinity: {{keys: {said}}}", "mcp")


# The app that is run


@pytest.mark.parametrize("text", ["", "run: null", "upstreams: ['http://a']"])
def test_a_preset_runs_no_app_by_itself(text: str) -> None:
    config = load(text, "streamlit")
    assert config.run is None
    assert probe_path(config) == "/_stcore/health"


@pytest.mark.parametrize(
    "said",
    ["command: 'app {socket}'", "command: [app, '{socket}']", "command: app, env: {S: 'unix:{socket}'}",
     "command: app, cwd: '/srv{socket}'"],
)  # fmt: skip
def test_a_port_is_left_out_where_the_app_listens_on_a_socket(said: str) -> None:
    run = run_of(f"{{presets: chainlit, run: {{{said}}}}}")
    assert (run.uses_port, run.uses_socket) == (False, True)
    assert run.env["CHAINLIT_HOST"] == "127.0.0.1"
    assert "CHAINLIT_PORT" not in run.env


@pytest.mark.parametrize(
    "said", ["command: 'app {port}'", "command: app", "command: 'app {{socket}}'", "command: a, ready: '/{socket}'"]
)
def test_a_port_stays_where_it_does_not(said: str) -> None:
    assert run_of(f"{{presets: chainlit, run: {{{said}}}}}").env["CHAINLIT_PORT"] == "{port}"


def test_the_command_of_the_command_line_counts_in_place_of_that_of_the_file() -> None:
    text = "{presets: chainlit, run: {command: 'app %s', env: {A: b}, ready: {timeout: 1s}}}"
    to_socket = run_of(text % "{port}", command=["other", "{socket}"])
    assert (to_socket.command, dict(to_socket.env)) == (("other", "{socket}"), {"A": "b", "CHAINLIT_HOST": "127.0.0.1"})
    to_port = run_of(text % "{socket}", command=["other", "{port}"])
    assert (to_port.command, to_port.env["CHAINLIT_PORT"]) == (("other", "{port}"), "{port}")
    assert (to_port.ready.path, to_port.ready.timeout_s) == ("/health", 1.0)


def test_a_command_without_presets_changes_nothing() -> None:
    document = read_document("{run: {command: a}}")
    assert put_presets_under(document, (), ["b"]) is document


def test_the_run_of_a_file_needs_its_own_command() -> None:
    with pytest.raises(ConfigErrors, match=r"^line 1: run: the key 'command' is missing$"):
        load("{presets: chainlit, run: {processes: 2}}", command=["app"])


def test_an_app_is_either_run_or_listed() -> None:
    with pytest.raises(ConfigErrors, match=r"^line 1: upstreams: an app is either run here or listed"):
        load("{presets: chainlit, upstreams: ['http://a']}", command=["app"])


# Mistakes


def test_a_mistake_in_what_comes_from_a_preset_names_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No preset that there is can be mistaken beside a right file, so one is made that expects a status."""
    piece = {"health": {"probe": {"path": "/x", "expect": 204}}, "run": {"cwd": "/{port}"}}
    monkeypatch.setattr("stickyproxy.config.preset._read", lambda name: piece if name == "shiny" else {})
    assert load("presets: shiny").health.probe is not None
    with pytest.raises(ConfigErrors) as raised:
        load("presets: [panel, shiny]\nworkers: 0\nhealth: {probe: {path: null}}\nrun: {command: '{socket}'}")
    assert [str(error) for error in raised.value.errors] == [
        "preset shiny: run.cwd: {port} and {socket} together: an app process listens at one of them",
        "preset shiny: health.probe.expect: expect needs path: without it the probe is a TCP connect and has no status",
        "line 2: workers: expected auto or a whole number from 1 to 64, got 0",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("presets: panel\nwebsocket: {origins: ['*']}", "line 2: websocket.origins[0]: expected origins, got '*'"),
        ("presets: panel\nwebsocket: 7", "line 2: websocket: expected a mapping of keys, got a number"),
        (
            "presets: chainlit\nhealth:\n  probe: 7",
            "line 3: health.probe: expected a mapping of keys or false, got a n",
        ),
        ("presets: chainlit\nrun: app", "line 2: run: expected a mapping of keys, got text"),
        ("presets: chainlit\nrun: {command: ['{x}']}", "line 2: run.command[0]: unknown placeholder"),
        ("presets: chainlit\nrun:\n  command: a\n  env: [A]", "line 4: run.env: expected a mapping of names to texts"),
        ("- presets", "line 1: expected a mapping of keys, got a list"),
        ("presets: [", "line 1: not valid YAML"),
    ],
)
def test_a_mistake_of_the_user_keeps_its_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        load(text)
    [error] = raised.value.errors
    assert str(error).startswith(expected)


SAID: dict[str, list[Any]] = {
    "affinity": [
        None,
        {},
        {"keys": None},
        {"keys": []},
        {"keys": [{"mode": "hash", "query": "q"}]},
        {"keys": [{"mode": "hash"}], "policy": "random"},
        {"keys": "text"},
    ],
    "websocket": [None, {}, {"origins": None}, {"origins": ["absent"]}, {"ping": True}, 7],
    "health": [None, {}, {"probe": None}, {"probe": False}, {"probe": {"path": None}}, {"probe": {"expect": 200}}, []],
    "run": [
        None,
        {},
        "app",
        {"command": "app"},
        {"command": ["app", "{socket}"], "ready": "/x"},
        {"command": "{port}", "env": {"A": "{socket}"}},
        {"command": "app", "env": {"CHAINLIT_PORT": None}},
        {"command": "app", "ready": {"expect": 200}, "env": {"STREAMLIT_SERVER_PORT": "1"}},
    ],
}
FILES = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(values) for key, values in SAID.items()}
)  # fmt: skip
NAMES = st.lists(st.sampled_from(PRESETS), max_size=3)
COMMANDS = st.sampled_from([None, ["app"], ["app", "{socket}"], ["app", "{port}"], ["{x}"]])


@UNHURRIED
@given(FILES, NAMES, NAMES, COMMANDS)
def test_any_file_with_any_presets_is_a_config_or_its_mistakes(
    file: dict[str, Any], named: list[str], given: list[str], command: list[str] | None
) -> None:
    text = json.dumps({**file, "presets": named})
    try:
        config = load(text, *given, command=command)
    except ConfigErrors as errors:
        told = [error for error in errors.errors if error.path_in_file != "COMMAND"]
        assert all(error.line == 1 or error.preset in PRESETS for error in told) or not (named or given)
    else:
        assert config.presets == tuple(given or named)
        assert config.run is None or not (config.run.uses_port and config.run.uses_socket)


@UNHURRIED
@given(FILES)
def test_what_the_file_says_stands(file: dict[str, Any]) -> None:
    """Whatever presets are under a file, each value that it gives is there, and mappings have more keys."""
    document = read_document(json.dumps(file))
    under = put_presets_under(document, PRESETS, None)
    assert document.value == file
    assert holds(under.value, file)
    assert all(path not in document.lines for path in under.presets)


def holds(merged: Any, said: Any) -> bool:
    if isinstance(said, dict):
        return isinstance(merged, dict) and all(key in merged and holds(merged[key], said[key]) for key in said)
    if isinstance(said, list) and isinstance(merged, list):
        return merged[: len(said)] == said  # the keys of presets come after the file's own
    return bool(merged == said)
