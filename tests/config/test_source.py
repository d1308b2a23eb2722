"""What a configuration is made from: read again, in another directory, in another process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stickyproxy.config.address import Address
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.run import Reload
from stickyproxy.config.schema import Config
from stickyproxy.config.source import ConfigSource

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines of CI stall


def test_nothing_given_is_the_default_configuration() -> None:
    source = ConfigSource()
    assert source.read_text() == ""
    assert source.load({}) == Config()


def test_the_file_is_read_at_each_load(tmp_path: Path) -> None:
    path = tmp_path / "stickyproxy.yaml"
    path.write_text("grace: 1s")
    source = ConfigSource(path=path)
    assert source.load({}).grace_s == 1.0
    path.write_text("grace: 2s")
    assert source.load({}).grace_s == 2.0
    assert source.read_text() == "grace: 2s"


def test_the_command_line_goes_over_each_text(tmp_path: Path) -> None:
    source = ConfigSource(
        path=tmp_path / "x", urls=("http://a",), listen=":1", admin="off", workers=2, control="/run/c.sock"
    )
    for text in ("", "{upstreams: ['http://b', 'http://c'], workers: 7, control: false}"):
        config = source.load_text(text, {})
        assert [upstream.id for upstream in config.upstreams] == ["a:80"]
        assert [listener.address for listener in config.listeners] == [Address(port=1)]
        assert (config.admin, config.workers, config.control) == (None, 2, Path("/run/c.sock"))


def test_a_command_goes_over_each_text() -> None:
    source = ConfigSource(command=("app", "{port}"), processes=4)
    for text in ("", "run: {command: other, processes: 2}"):
        run = source.load_text(text, {}).run
        assert run is not None
        assert (run.command, run.processes.min, run.processes.max) == (("app", "{port}"), 4, 4)


def test_the_presets_of_the_command_line_replace_those_of_each_text() -> None:
    source = ConfigSource(presets=("streamlit",))
    for text in ("", "presets: chainlit", "presets: [chainlit, panel]"):
        config = source.load_text(text, {})
        assert config.presets == ("streamlit",)
        assert config.health.probe is not None
        assert config.health.probe.path == "/_stcore/health"
        assert config.websocket.origins is None
    assert ConfigSource().load_text("presets: [chainlit, panel]", {}).presets == ("chainlit", "panel")


def test_presets_stand_under_the_command_of_the_command_line() -> None:
    run = ConfigSource(presets=("streamlit",), command=("app",), processes=4).load({}).run
    assert run is not None
    assert (run.command, run.processes.min, run.ready.path) == (("app",), 4, "/_stcore/health")
    assert run.env["STREAMLIT_SERVER_PORT"] == "{port}"
    assert ConfigSource(presets=("streamlit",)).load({}).run is None


def test_files_to_watch_go_over_each_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = ConfigSource(command=("app",), reload_directories=("src", "/srv"), reload_include=("*.html",))
    monkeypatch.chdir("/")
    for text in ("", "run: {command: other, reload: off}", "run: {command: other, reload: {include: ['*.css']}}"):
        run = source.load_text(text, {}).run
        assert run is not None
        assert run.reload == Reload.model_validate(
            {"directories": [tmp_path / "src", Path("/srv")], "include": ["*.html"]}
        )
    run = ConfigSource(command=("app",), reload=True).load({}).run
    assert run is not None
    assert run.reload == Reload()


def test_no_words_are_no_command() -> None:
    assert ConfigSource(command=()) == ConfigSource()
    assert ConfigSource(command=()).load({}).run is None


def test_env_is_where_secrets_come_from() -> None:
    config = ConfigSource().load_text("affinity: {secrets: ['env:NAME']}", {"NAME": "s" * 32})
    assert config.affinity.secrets == (b"s" * 32,)


def test_secrets_that_are_known_are_not_read_again() -> None:
    known = {"env:NAME": b"k" * 32}
    config = ConfigSource().load_text("affinity: {secrets: ['env:NAME']}", {"NAME": "s" * 32}, known)
    assert config.affinity.secrets == (b"k" * 32,)


def test_the_mistakes_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "stickyproxy.yaml"
    source = ConfigSource(path=path)
    with pytest.raises(ConfigErrors, match=f"^{path}: cannot read the file: No such file or directory$"):
        source.load({})
    path.write_text("\nworkers: 0")
    with pytest.raises(ConfigErrors, match=f"^{path}: line 2: workers: expected auto or a whole number from 1 to 64"):
        source.load({})
    with pytest.raises(ConfigErrors, match=f"^{path}: line 1: workers: expected auto or a whole number from 1 to 64"):
        source.load_text("workers: 0", {})


def test_the_mistakes_of_the_command_line_name_its_options() -> None:
    with pytest.raises(ConfigErrors, match=r"^--workers: expected auto or "):
        ConfigSource(workers="many").load({})
    with pytest.raises(ConfigErrors, match=r"^--processes: expected a whole number from 1 to 256, got 10000$"):
        ConfigSource(command=("a",), processes=10_000).load({})
    with pytest.raises(ConfigErrors, match=r"^--preset: there is no preset 'nope'; there are auto, chainlit, "):
        ConfigSource(command=("a",), presets=("panel", "nope")).load({})
    with pytest.raises(ConfigErrors, match=r"^COMMAND: unknown placeholder '\{prot\}'"):
        ConfigSource(command=("a", "{prot}"), presets=("panel",)).load({})


def test_paths_stay_what_they_were_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stickyproxy.yaml").write_text("grace: 1s")
    monkeypatch.chdir(tmp_path)
    source = ConfigSource(path=Path("stickyproxy.yaml"), control="c.sock")
    monkeypatch.chdir("/")
    assert source.path == tmp_path / "stickyproxy.yaml"
    config = source.load({})
    assert (config.grace_s, config.control) == (1.0, tmp_path / "c.sock")


def test_a_link_that_is_pointed_elsewhere_is_followed(tmp_path: Path) -> None:
    """As Kubernetes changes the files of a ConfigMap."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "x.yaml").write_text("grace: 1s")
    (tmp_path / "new" / "x.yaml").write_text("grace: 2s")
    link = tmp_path / "data"
    link.symlink_to("old")
    source = ConfigSource(path=link / "x.yaml")
    assert source.load({}).grace_s == 1.0
    link.unlink()
    link.symlink_to("new")
    assert source.load({}).grace_s == 2.0


def test_no_control_is_no_path() -> None:
    assert ConfigSource(control="off").control == "off"
    assert ConfigSource(control="off").load({}).control is False


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert ConfigSource(path=Path("/x"), control="/y").path == Path("/x")
    with pytest.raises(ConfigErrors, match=r"^--config: cannot tell where x is, the working directory is gone "):
        ConfigSource(path=Path("x"))
    with pytest.raises(ConfigErrors, match=r"^--control: cannot tell where y is, the working directory is gone "):
        ConfigSource(control="y")
    with pytest.raises(ConfigErrors, match=r"^--reload-dir: cannot tell where z is, the working directory is gone "):
        ConfigSource(reload_directories=("/", "z"))


TEXTS = st.text(st.characters(codec="utf-8"))
SOURCES = st.builds(
    ConfigSource,
    path=st.none() | TEXTS.map(lambda text: Path("/", text.replace("\0", "").lstrip("/"))),
    urls=st.lists(TEXTS).map(tuple),
    listen=st.none() | TEXTS,
    admin=st.none() | TEXTS,
    workers=st.none() | st.integers() | TEXTS,
    control=st.none() | st.just("off") | TEXTS.map(lambda text: f"/{text}"),
    presets=st.lists(TEXTS).map(tuple),
    command=st.none() | st.lists(TEXTS | st.just("no UTF-8: \udcff")).map(tuple),
    processes=st.none() | st.integers() | TEXTS,
    reload=st.none() | st.booleans(),
    reload_directories=st.lists(TEXTS.map(lambda text: f"/{text}")).map(tuple),
    reload_include=st.lists(TEXTS).map(tuple),
)


@UNHURRIED
@given(SOURCES)
def test_a_source_goes_to_another_process_and_is_the_same_there(source: ConfigSource) -> None:
    assert ConfigSource.from_json(json.loads(json.dumps(source.to_json()))) == source


def test_what_was_not_given_is_not_written() -> None:
    """So a version that does not know an option can read what was made without it."""
    assert ConfigSource().to_json() == {}
    source = ConfigSource(path=Path("/x"), urls=("http://a",), workers=2)
    assert source.to_json() == {"path": "/x", "urls": ["http://a"], "workers": 2}
    assert ConfigSource(command=("a", "b"), processes=4).to_json() == {"command": ["a", "b"], "processes": 4}
    assert ConfigSource(presets=("panel",)).to_json() == {"presets": ["panel"]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "is an object"),
        (None, "is an object"),
        ({"listen": ":1", "colour": "red"}, "does not hold 'colour', or not so"),
        ({"path": "x"}, "does not hold 'path', or not so"),
        ({"path": None}, "does not hold 'path', or not so"),
        ({"control": "x"}, "does not hold 'control', or not so"),
        ({"urls": "http://a"}, "does not hold 'urls', or not so"),
        ({"urls": ["http://a", 7]}, "does not hold 'urls', or not so"),
        ({"presets": "panel"}, "does not hold 'presets', or not so"),
        ({"presets": [None]}, "does not hold 'presets', or not so"),
        ({"workers": True}, "does not hold 'workers', or not so"),
        ({"workers": 1.5}, "does not hold 'workers', or not so"),
        ({"admin": False}, "does not hold 'admin', or not so"),
        ({"command": "a b"}, "does not hold 'command', or not so"),
        ({"command": ["a", 7]}, "does not hold 'command', or not so"),
        ({"processes": True}, "does not hold 'processes', or not so"),
        ({"reload": 1}, "does not hold 'reload', or not so"),
        ({"reload_directories": ["/a", "b"]}, "does not hold 'reload_directories', or not so"),
        ({"reload_include": "*.html"}, "does not hold 'reload_include', or not so"),
        ({"processes": [4]}, "does not hold 'processes', or not so"),
        ({7: "x"}, "does not hold 7, or not so"),
    ],
)
def test_what_is_no_source_is_refused(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^the source of a configuration {message}$"):
        ConfigSource.from_json(raw)
