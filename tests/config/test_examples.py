"""The files of `config/` that users copy: they load, they are complete, and what they call a default is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stickyproxy.config.cluster import ClusterAffinity
from stickyproxy.config.document import read_document
from stickyproxy.config.load import json_schema, load_file, load_text
from stickyproxy.config.run import Run, read_command
from stickyproxy.config.schema import Config
from stickyproxy.config.tls import ListenerTls, UpstreamTls
from stickyproxy.config.websocket import Ping

EXAMPLES = Path(__file__).parents[2] / "config"
COMMENTED = EXAMPLES / "stickyproxy.yaml"
RUN = EXAMPLES / "run.yaml"  # the one section that does not go with upstreams
ROUTES = EXAMPLES / "routes.yaml"

ENV = {"STICKYPROXY_SECRET": "s" * 32, "STICKYPROXY_ADMIN_TOKEN": "t" * 16}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_loads_with_an_empty_environment(path: Path) -> None:
    config = load_file(path, {})
    assert config.upstreams or config.run


def test_the_minimal_example_is_minimal() -> None:
    config = load_file(EXAMPLES / "minimal.yaml", {})
    assert config.model_copy(update={"upstreams": ()}) == Config()


def test_the_values_of_the_commented_example_are_the_defaults() -> None:
    config = load_file(COMMENTED, {})
    assert config.model_copy(update={"upstreams": ()}) == Config()
    assert {upstream.weight for upstream in config.upstreams} == {1}


def test_the_values_of_the_example_of_run_are_the_defaults() -> None:
    config = load_file(RUN, {})
    assert config.run == Run(command=read_command("uvicorn main:app --port {port}"))
    assert config.model_copy(update={"run": None}) == Config()


def test_the_values_of_a_cluster_in_the_example_of_routes_are_the_defaults() -> None:
    config = load_file(ROUTES, {})
    assert [one.name for one in config.every_cluster] == ["default", "chat", "shop"]
    shop = config.every_cluster[2]
    assert shop.affinity == ClusterAffinity()
    assert shop.health == Config().health
    assert {upstream.weight for upstream in shop.upstreams} == {1}
    assert [route.place for route in config.routes] == ["shop.example.org/tool", "*.example.org", "/chat"]
    assert config.model_copy(update={"upstreams": (), "clusters": (), "routes": ()}) == Config()


def test_every_line_to_uncomment_in_the_example_of_routes_loads() -> None:
    default = load_file(ROUTES, {})
    texts = uncommented_examples(ROUTES)
    for text in texts:
        needs_path = re.search(r"^ +expect:", text, re.MULTILINE)
        assert (
            load_text(text.replace("path: null\n        ", "path: /x\n        ") if needs_path else text, {}) != default
        )
    assert len(texts) == 4


def known_paths(schema: dict[str, Any], model: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, field in model["properties"].items():
        found.append(f"{path}{key}")
        for name in re.findall(r"#/\$defs/(\w+)", str(field)):
            found += known_paths(schema, schema["$defs"][name], f"{path}{key}.")
    return found


def mentioned_paths(text: str) -> set[str]:
    """Return the paths of the keys of a YAML text, without list positions: `upstreams.weight`."""
    paths = read_document(text).lines
    return {".".join(part for part in path if isinstance(part, str)) for path in paths}


def uncommented_examples(path: Path = COMMENTED) -> list[str]:
    """Return a commented example, once for each line such as `#domain: example.org` with that line in force."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = []
    for number, line in enumerate(lines):
        if match := re.match(r"(\s*)#([a-z_]+:|-) ", line):
            key = f"{match[1]}{match[2]} "
            kept = [
                other
                for position, other in enumerate(lines)
                if match[2] == "-" or not (abs(position - number) <= 14 and other.startswith(key))
            ]
            kept[kept.index(line)] = line.replace("#", "", 1)
            texts.append("\n".join(kept))
    return texts


def test_every_line_to_uncomment_loads() -> None:
    texts = [text.replace("file:/run/secrets/stickyproxy-old", "o" * 32) for text in uncommented_examples()]
    expect = [text for text in texts if re.search(r"^    expect:", text, re.MULTILINE)]
    for text in texts:
        complete = text.replace("path: null", "path: /healthz") if text in expect else text
        assert load_text(complete, ENV) != Config()
    assert len(texts) == 23
    assert len(expect) == 1


def test_every_line_to_uncomment_in_the_example_of_run_loads() -> None:
    default = load_file(RUN, {}).run
    texts = uncommented_examples(RUN)
    for text in texts:
        needs_path = re.search(r"^    expect:", text, re.MULTILINE)
        run = load_text(text.replace("path: null", "path: /") if needs_path else text, {}).run
        assert run is not None
        assert run != default
    assert len(texts) == 11


def test_every_key_is_mentioned() -> None:
    texts = [text for path in (COMMENTED, RUN, ROUTES) for text in uncommented_examples(path)]
    mentioned = {path.replace("clusters.shop", "clusters") for path in set().union(*map(mentioned_paths, texts))}
    # What a cluster has is said at the top of the file.
    mentioned |= {f"clusters.{path}" for path in mentioned if path.startswith(("upstreams", "affinity", "health"))}
    schema = json_schema()
    assert [path for path in known_paths(schema, schema) if path not in mentioned] == []


def uncommented(pattern: str) -> list[Config]:
    """Return the commented example with each line to uncomment that holds the pattern."""
    return [load_text(text, ENV) for text in uncommented_examples() if re.search(rf"^ *{pattern}", text, re.MULTILINE)]


def test_the_keys_that_need_others_have_their_defaults_in_lines_to_uncomment() -> None:
    first, second = (config.listeners[0].tls for config in uncommented("tls: {cert"))
    assert first is not None
    assert second is not None
    assert first == ListenerTls(certificates=first.certificates)
    assert [(one.certificate.name, one.key and one.key.name) for one in first.certificates] == [
        ("a.pem", "a.key"),
        ("b.pem", None),
    ]
    assert second == ListenerTls(certificates=second.certificates, client_ca=second.client_ca)
    (https,) = (config.upstreams[2] for config in uncommented("- {url: https"))
    assert https.tls == UpstreamTls()
    (pinging,) = (config.websocket.ping for config in uncommented("ping: {"))
    assert pinging == Ping()


def test_the_default_of_expect_is_the_default() -> None:
    """`expect` cannot stand without `path`, so its default is shown in a comment."""
    (text,) = (text for text in uncommented_examples() if re.search(r"^    expect:", text, re.MULTILINE))
    probe = load_text(text.replace("path: null", "path: /healthz"), {}).health.probe
    default = Config().health.probe
    assert probe is not None
    assert default is not None
    assert probe.model_copy(update={"path": None}) == default
