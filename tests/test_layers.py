"""The layers: what may import what, which modules are pure, and that each module has its test."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "stickyproxy"

# What each layer may import of the package, besides itself, lowest first. Imports run one way:
# errors < wire < affinity < config < observe < tasks < proxy < control < (demo) < cli.
ORDER: Final = (
    "errors",
    "wire",
    "affinity",
    "config",
    "observe",
    "tasks",
    "proxy",
    "control",
    "demo",
    "cli",
    "__main__",
)
# An app to try the proxy with knows nothing of the proxy but how to start a task.
NARROW: Final = {"demo": {"tasks"}}
PURE: Final = ("wire", "affinity")
IMPURE: Final = frozenset(
    {"asyncio", "logging", "os", "random", "secrets", "select", "selectors", "socket", "ssl", "subprocess", "threading",
     "time", "uvloop"}
)  # fmt: skip
# Modules that hold nothing to test by themselves, and where they are tested.
UNTESTED: Final = {"observe/record.py": "fields and nothing else: test_access_log.py fills and reads them"}


def layer_of(module: str) -> str:
    """Return the layer of `stickyproxy.layer.name`; of the package itself, nothing."""
    return module.removeprefix("stickyproxy").removeprefix(".").partition(".")[0]


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the full names of all that a module imports, wherever in it: TYPE_CHECKING and functions included."""
    found: set[str] = set()
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*parents[: len(parents) - node.level + 1], *filter(None, [node.module])] if node.level else []
            name = ".".join(base) or node.module or ""
            # `from package import name`: the name may be a module of it.
            found |= {f"{name}.{alias.name}" if name == "stickyproxy" else name for alias in node.names}
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    """Return what a module imports against the order of the layers, or, in a pure one, for a side effect."""
    own = layer_of(module)
    allowed = NARROW.get(own, set(ORDER[: ORDER.index(own)]) if own else set()) | {own}
    wrong = []
    for name in sorted(imported):
        top = name.partition(".")[0]
        if top == "stickyproxy":
            target = layer_of(name)
            if target in ORDER and target not in allowed:
                wrong.append(f"{module} imports {name}")
        elif own in PURE and top in IMPURE:
            wrong.append(f"{module} imports {name}")
    return wrong


def modules() -> dict[str, Path]:
    """Return every module of the package by its full name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES: Final = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    path = MODULES[module]
    imported = imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert violations(module, imported) == []


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(module) for module in MODULES} == {"", *ORDER}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        pytest.param("stickyproxy.wire.head", "import stickyproxy.proxy.pool", "stickyproxy.proxy.pool", id="import"),
        pytest.param("stickyproxy.wire.head", "from stickyproxy.affinity.token import Token",
                     "stickyproxy.affinity.token", id="from"),
        pytest.param("stickyproxy.wire.head", "from stickyproxy import proxy", "stickyproxy.proxy", id="from the root"),
        pytest.param("stickyproxy.wire.head", "from ..config import load", "stickyproxy.config", id="relative"),
        pytest.param("stickyproxy.wire.head", "if TYPE_CHECKING:\n    from stickyproxy.observe.record import Record",
                     "stickyproxy.observe.record", id="for types only"),
        pytest.param("stickyproxy.tasks", "def late():\n    from stickyproxy.proxy.plane import Plane",
                     "stickyproxy.proxy.plane", id="inside a function"),
        pytest.param("stickyproxy.proxy.pool", "import stickyproxy.control.probe as p", "stickyproxy.control.probe",
                     id="under another name"),
        pytest.param("stickyproxy.demo.app", "from stickyproxy.proxy.pool import Pool", "stickyproxy.proxy.pool",
                     id="the demo is no part of the proxy"),
        pytest.param("stickyproxy.control.worker", "import stickyproxy.cli", "stickyproxy.cli", id="the top"),
        pytest.param("stickyproxy.demo.launcher", "from stickyproxy.cli.words import count", "stickyproxy.cli.words",
                     id="a part of the top"),
        pytest.param("stickyproxy", "from stickyproxy.errors import UsageError", "stickyproxy.errors",
                     id="the root imports nothing"),
        pytest.param("stickyproxy.wire.head", "from asyncio import Protocol", "asyncio", id="asyncio in wire"),
        pytest.param("stickyproxy.wire", "import os.path", "os.path", id="os in wire"),
        pytest.param("stickyproxy.affinity.policy", "import random", "random", id="random in affinity"),
        pytest.param("stickyproxy.affinity.token", "import time, math", "time", id="time in affinity"),
        pytest.param("stickyproxy.affinity.token", "def f():\n    import logging", "logging", id="logging in affinity"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(module: str, source: str, expected: str) -> None:
    imported = imports_of(source, module, is_package=module.count(".") == 1)
    assert violations(module, imported) == [f"{module} imports {expected}"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("stickyproxy.wire.head", "from stickyproxy.errors import RequestError"),
        ("stickyproxy.wire.head", "from . import headers"),
        ("stickyproxy.wire.head", "from hashlib import blake2b"),
        ("stickyproxy.config.load", "from stickyproxy.errors import UsageError"),
        ("stickyproxy.demo.app", "from stickyproxy.tasks import spawn"),
        ("stickyproxy.cli.demo", "from stickyproxy.demo.launcher import Demo"),
        ("stickyproxy.cli.deploy", "from stickyproxy.control.client import ControlClient"),
        ("stickyproxy.cli", "from stickyproxy.cli import serve"),
        ("stickyproxy.tasks", "import asyncio"),
        ("stickyproxy.observe.metrics", "from stickyproxy import __version__"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(module, imports_of(source, module)) == []


# Each module has its test


def mirrored(module: PurePosixPath) -> PurePosixPath:
    """Return where the test of `a/b.py` stands: `a/test_b.py`."""
    return module.with_name(f"test_{module.name}")


def lacking(modules: set[PurePosixPath], tests: set[PurePosixPath]) -> list[str]:
    exempt = {"__init__.py", "__main__.py"}
    return sorted(
        str(module)
        for module in modules
        if module.name not in exempt and str(module) not in UNTESTED and mirrored(module) not in tests
    )


def paths_in(folder: Path) -> set[PurePosixPath]:
    return {PurePosixPath(path.relative_to(folder).as_posix()) for path in folder.rglob("*.py")}


def test_every_module_has_a_test_of_its_own() -> None:
    assert lacking(paths_in(PACKAGE), paths_in(ROOT / "tests")) == []


def test_a_module_without_a_test_is_found() -> None:
    given = {PurePosixPath(name) for name in ("a/b.py", "a/c.py", "a/__init__.py", "d.py", "__main__.py")}
    assert lacking(given, {PurePosixPath("a/test_b.py")}) == ["a/c.py", "d.py"]
    assert lacking(given, {PurePosixPath(name) for name in ("a/test_b.py", "a/test_c.py", "test_d.py")}) == []


@pytest.mark.parametrize("name", UNTESTED)
def test_every_exception_is_still_one(name: str) -> None:
    """An exception ends when its module goes, gets a test, or comes to do something."""
    path = PACKAGE / name
    assert not (ROOT / "tests" / mirrored(PurePosixPath(name))).exists()
    assert not any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
