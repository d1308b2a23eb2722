"""A configuration with what it was made from: the very same in another process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.loaded import Loaded
from stickyproxy.config.source import ConfigSource

SECRET = "s" * 32


def sent(loaded: Loaded) -> dict[str, object]:
    """Return what arrives in another process."""
    arrived: dict[str, object] = json.loads(json.dumps(loaded.to_json()))
    return arrived


def test_it_is_read_from_its_source(tmp_path: Path) -> None:
    path = tmp_path / "stickyproxy.yaml"
    path.write_text("grace: 1s")
    source = ConfigSource(path=path, workers=2)
    loaded = Loaded.read(source, {})
    assert (loaded.source, loaded.text) == (source, "grace: 1s")
    assert (loaded.config.grace_s, loaded.config.workers) == (1.0, 2)
    assert Loaded.of_text(source, "grace: 2s", {}).config.grace_s == 2.0


def test_another_process_has_the_same_whatever_has_changed_since(tmp_path: Path) -> None:
    path, secret = tmp_path / "stickyproxy.yaml", tmp_path / "secret"
    path.write_text(f"affinity: {{secrets: ['env:NAME', 'file:{secret}']}}")
    secret.write_bytes(b"\xff" * 32)
    loaded = Loaded.read(ConfigSource(path=path, urls=("http://a",)), {"NAME": SECRET})
    assert loaded.config.affinity.secrets == (SECRET.encode(), b"\xff" * 32)
    path.unlink()
    secret.write_bytes(b"x" * 32)
    assert Loaded.from_json(sent(loaded), {"NAME": "x" * 32}) == loaded
    assert Loaded.from_json({**sent(loaded), "more": 1}, {}) == loaded


def test_another_process_has_the_same_presets(tmp_path: Path) -> None:
    path = tmp_path / "stickyproxy.yaml"
    path.write_text("{presets: panel, run: {command: app}}")
    for presets in ((), ("streamlit", "engineio")):
        loaded = Loaded.read(ConfigSource(path=path, presets=presets, command=("app", "{socket}")), {})
        assert loaded.config.presets == (presets or ("panel",))
        assert Loaded.from_json(sent(loaded), {}) == loaded


def test_secrets_are_read_anew_at_each_reading(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    text = f"affinity: {{secrets: ['file:{secret}']}}"
    for content in (b"a" * 32, b"b" * 32):
        secret.write_bytes(content)
        assert Loaded.of_text(ConfigSource(), text, {}).config.affinity.secrets == (content,)


def test_no_secret_is_shown() -> None:
    text = "affinity: {secrets: ['env:NAME', 'literal-literal-literal-literal-']}"
    loaded = Loaded.of_text(ConfigSource(), text, {"NAME": SECRET})
    assert SECRET not in repr(loaded)
    assert SECRET.encode().hex() not in repr(loaded)
    assert "literal" not in repr(loaded)


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigErrors, match="workers: expected auto or a whole number"):
        Loaded.of_text(ConfigSource(), "workers: 0", {})
    with pytest.raises(ConfigErrors, match="cannot read the file"):
        Loaded.read(ConfigSource(path=Path("/missing/x")), {})
    with pytest.raises(ConfigErrors, match="workers: expected auto or a whole number"):
        Loaded.from_json({"source": {}, "text": "workers: 0", "known": {}}, {})


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"source": {}, "text": 7, "known": {}},
        {"source": {}, "text": "", "known": []},
        {"source": {}, "text": ""},
        {"source": None, "text": "", "known": {}},
        {"source": {"colour": "red"}, "text": "", "known": {}},
        {"source": {}, "text": "", "known": {"env:NAME": "xy"}},
        {"source": {}, "text": "", "known": {"env:NAME": 7}},
    ],
)
def test_what_is_no_configuration_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of them
        Loaded.from_json(raw, {})
