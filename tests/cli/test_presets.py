"""What the presets are called, and what one of them says."""

from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from stickyproxy.config import PRESETS, load_text, preset_text
from stickyproxy.config.document import read_document
from tests.cli.running import run, run_process


def test_the_names_are_listed_each_with_what_it_is() -> None:
    result = run("presets")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    for line, name in zip(lines, PRESETS, strict=True):
        description = line.removeprefix(name).strip()
        assert preset_text(name).startswith(f"# {description}\n")
    assert len({line.index(line.split()[1], 1) for line in lines}) == 1  # in one column


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_printed_as_its_file_stands(name: str, tmp_path: Path) -> None:
    result = run("presets", name)
    assert (result.exit_code, result.stdout, result.stderr) == (0, preset_text(name), "")
    assert load_text(f"{{presets: {name}, upstreams: ['http://a']}}", {}).presets == (name,)
    # It is a piece of a file, which needs a command only.
    copied: dict[str, Any] = {"run": {}, **cast("dict[str, Any]", read_document(result.stdout).value)}
    copied["run"] = {**copied["run"], "command": "app"}
    path = tmp_path / "copied.yaml"
    path.write_text(yaml.safe_dump(copied))
    assert run("check", path).exit_code == 0


@pytest.mark.parametrize("name", ["nope", "", "Panel", "../presets/panel", "panel.yaml"])
def test_an_unknown_name_is_told_the_known_ones(name: str) -> None:
    result = run("presets", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert all(known in result.stderr for known in PRESETS)


def test_too_many_names_are_a_clear_error() -> None:
    result = run("presets", "panel", "shiny")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


def test_check_and_schema_know_them(tmp_path: Path) -> None:
    path = tmp_path / "proxy.yaml"
    path.write_text("presets: [engineio, panel]\nrun: {command: panel serve}\n")
    assert run("check", path).stdout == f"{path}: right; 1 app process, 1 listener\n"
    path.write_text("grace: 1s\npresets:\n  - engineio\n  - nope\n")
    assert run("check", path).stderr == (
        f"stickyproxy: {path}: line 4: presets[1]: there is no preset 'nope'; there are {', '.join(PRESETS)}\n"
    )
    assert '"streamlit"' in run("schema").stdout


def test_the_command_in_a_process_of_its_own() -> None:
    done = run_process("presets", "chainlit")
    assert (done.returncode, done.stdout, done.stderr) == (0, preset_text("chainlit"), "")
