"""How mistakes are shown."""

from __future__ import annotations

from stickyproxy.config.errors import ConfigError, ConfigErrors, render_path


def test_a_mistake_is_one_line() -> None:
    assert str(ConfigError("upstreams[1].weight", 4, "wrong")) == "line 4: upstreams[1].weight: wrong"
    assert str(ConfigError("--listen", None, "wrong")) == "--listen: wrong"
    assert str(ConfigError("", None, "wrong")) == "wrong"
    assert str(ConfigError("health.probe", None, "wrong", "panel")) == "preset panel: health.probe: wrong"


def test_mistakes_stand_in_the_order_of_the_file() -> None:
    errors = ConfigErrors([ConfigError("b", 9, "x"), ConfigError("a", 2, "y"), ConfigError("", None, "z")], "my.yaml")
    assert [error.line for error in errors.errors] == [None, 2, 9]
    assert str(errors) == "my.yaml: z\nmy.yaml: line 2: a: y\nmy.yaml: line 9: b: x"
    assert str(ConfigErrors([ConfigError("a", 2, "y")])) == "line 2: a: y"


def test_a_path_is_written_with_dots_and_brackets() -> None:
    assert render_path(()) == ""
    assert render_path(("upstreams", 1, "weight")) == "upstreams[1].weight"
    assert render_path(("a\nb", "c" * 50)) == "a\\nb." + "c" * 40 + "..."
