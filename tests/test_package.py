"""The package as it is shipped: its version, and what is in the wheel."""

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import stickyproxy

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend that is installed; nothing is downloaded."""
    directory = tmp_path_factory.mktemp("wheel")
    build = f"-m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir {directory} {REPOSITORY}".split()
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert stickyproxy.__version__ == project["version"]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(names: set[str]) -> None:
    files = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "stickyproxy").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == files
    assert {"stickyproxy/py.typed", "stickyproxy/demo/page.html", "stickyproxy/__main__.py"} <= packaged


def test_the_wheel_holds_the_licence_and_the_command(wheel: Path) -> None:
    information = f"stickyproxy-{stickyproxy.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{information}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
        metadata = email.message_from_bytes(archive.read(f"{information}/METADATA"))
        commands = archive.read(f"{information}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("stickyproxy", stickyproxy.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert "stickyproxy = stickyproxy.cli:main" in commands


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    program = "from importlib import resources; import stickyproxy.cli, stickyproxy as it; print(it.__file__); "
    program += "print(resources.files('stickyproxy.demo').joinpath('page.html').read_text()[:15])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    path, page = done.stdout.splitlines()
    assert path.startswith(str(wheel))
    assert page.lower() == "<!doctype html>"
