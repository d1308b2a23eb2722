"""What is said of a file, in all its lines, and what the schema knows."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from stickyproxy import __version__
from tests.cli.running import EXAMPLES, run, run_process
from tests.helpers.certificates import Authority
from tests.helpers.json_schema import find_mistakes

CLUSTER = "clusters: {a: {upstreams: [http://127.0.0.1:3, http://127.0.0.1:4]}}\nroutes: [{path: /a, cluster: a}]"


def test_version() -> None:
    assert run("version").stdout == f"stickyproxy {__version__}\n"


# check


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_check_of_an_example_says_that_it_is_right(path: Path) -> None:
    result = run("check", path)
    assert (result.exit_code, result.stderr) == (0, "")
    said = result.stdout.removeprefix(f"{path}: ")
    assert re.fullmatch(
        r"right; [12] (upstreams?|app process)(, 2 more clusters with 4 upstreams)?, 1 listener\n", said
    )


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("upstreams: [http://127.0.0.1:1]", "1 upstream, 1 listener"),
        ("upstreams: [http://127.0.0.1:1, http://127.0.0.1:2]", "2 upstreams, 1 listener"),
        ("listeners: [127.0.0.1:1, 127.0.0.1:2]", "0 upstreams, 2 listeners"),
        (f"{CLUSTER}\nupstreams: [http://127.0.0.1:1]", "1 upstream, 1 more cluster with 2 upstreams, 1 listener"),
        (CLUSTER, "1 cluster with 2 upstreams, 1 listener"),
        ("run: {command: app}", "1 app process, 1 listener"),
        ("run: {command: app, processes: 3}", "3 app processes, 1 listener"),
        ("run: {command: app, processes: {min: 2, max: 8}}", "2 to 8 app processes, 1 listener"),
    ],
)
def test_check_says_what_there_is(written: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "proxy.yaml"
    path.write_text(written)
    result = run("check", path)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}: right; {said}\n", "")


def test_check_reads_the_certificates_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    leaf = authority.issue("localhost")
    configuration: dict[str, Any] = {
        "listeners": [{"address": "127.0.0.1:8443", "tls": {"certificates": [leaf.section]}}],
        "upstreams": [{"url": "https://127.0.0.1:8001", "tls": {"ca": str(authority.file)}}],
    }
    file = tmp_path / "proxy.yaml"
    file.write_text(yaml.safe_dump(configuration))
    assert run("check", file).stdout == f"{file}: right; 1 upstream, 1 listener\n"
    gone, empty = str(tmp_path / "gone.pem"), tmp_path / "empty.pem"
    empty.write_text("")
    configuration["listeners"][0]["tls"]["certificates"][0]["key"] = gone
    configuration["upstreams"][0]["tls"]["ca"] = str(empty)
    file.write_text(yaml.safe_dump(configuration))
    result = run("check", file)
    assert (result.exit_code, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert gone in first
    assert str(empty) in second


MISTAKES = """\
listeners:
  - address: 127.0.0.1:99999
upstreams:
  - url: http://127.0.0.1:8001
    weigth: 2
  - http://127.0.0.1:8001/path
affinity:
  policy: fastest
  secrets: [env:NOT_SET_ANYWHERE]
health: {probe: {interval: 5}}
grace: 30 parsecs
"""
MISTAKEN = {
    2: "listeners[0].address",
    5: "upstreams[0].weigth",
    6: "upstreams[1]",
    8: "affinity.policy",
    9: "affinity.secrets[0]",
    10: "health.probe.interval",
    11: "grace",
}


def test_check_names_every_mistake_with_its_line_and_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(MISTAKES)
    result = run("check", path)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == len(MISTAKEN)
    for line, (number, where) in zip(lines, MISTAKEN.items(), strict=True):
        assert line.startswith(f"stickyproxy: {path}: line {number}: {where}"), line


def test_serve_says_the_same_as_check(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(MISTAKES)
    result = run("serve", "--config", path)
    assert result.exit_code == 2
    assert result.stderr == run("check", path).stderr


UNREADABLE = {
    "missing": None,
    "no YAML": b"upstreams: [",
    "not UTF-8": b"upstreams: \xff",
    "a list": b"- http://127.0.0.1:8001",
    "a tag": b"upstreams: !!python/object/apply:os.system [id]",
    "a bomb": b"a: &a [x, x]\nb: &b [*a, *a]\nupstreams: *b",
    "too long": b"# " + b"x" * (1 << 20),
    "NUL": b"upstreams: \x00",
    "deep": b"[" * 5000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("command", [("check",), ("serve", "--config")], ids=lambda command: command[0])
def test_a_file_that_cannot_be_read_is_one_clear_line(
    command: Sequence[str], content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_bytes(content)
    result = run(*command, path)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith(f"stickyproxy: {path}: ") for line in lines)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    result = run("check", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"stickyproxy: {tmp_path}: cannot read the file: Is a directory\n"


@pytest.mark.parametrize("arguments", [("check",), ("check", "one.yaml", "two.yaml"), ("schema", "too much")])
def test_a_wrong_number_of_arguments_is_a_clear_error(arguments: Sequence[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_a_missing_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_process("serve", "--config", tmp_path / "missing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"stickyproxy: {tmp_path}/missing.yaml: cannot read the file: No such file or directory\n"


# schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run("schema").stdout)
    return parsed


def test_the_schema_is_one_that_editors_know(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_accepts_the_examples(path: Path, schema: dict[str, Any]) -> None:
    assert list(find_mistakes(yaml.safe_load(path.read_text()), schema, schema)) == []


def test_the_schema_finds_mistakes(schema: dict[str, Any]) -> None:
    found = set(find_mistakes(yaml.safe_load(MISTAKES), schema, schema))
    assert found >= {
        "$.upstreams[0]: none of its forms",
        "$.affinity.policy: not enum ['least_sessions', 'round_robin', 'random']",
    }
    assert list(find_mistakes({"upstream": []}, schema, schema)) == ["$: unknown key upstream"]
