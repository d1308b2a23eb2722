"""What the command line says over the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from stickyproxy.config.address import parse_listener
from stickyproxy.config.errors import ConfigError, ConfigErrors, PathInFile, render_path
from stickyproxy.config.explain import explain
from stickyproxy.config.fields import read_socket
from stickyproxy.config.schema import NEEDS_TOKEN, Admin, Config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def with_overrides(
    config: Config,
    *,
    urls: Sequence[str] = (),
    listen: str | None = None,
    admin: str | None = None,
    workers: int | str | None = None,
    control: str | None = None,
) -> Config:
    """Return the configuration with what the command line gave in place of what it had.

    `urls` replace all upstreams and `listen` all listeners. `admin` is an address, or `off`; the token of the file
    stays. `control` is an absolute path, or `off`. What is None or empty changes nothing. Raises `ConfigErrors` whose
    paths are `URL 2`, `--listen`, `--admin`, `--workers` and `--control`, or keys of the file that do not go with them.
    """
    given: dict[str, object] = {}
    if urls:
        given["upstreams"] = list(urls)
    if listen is not None:
        given["listeners"] = [listen]
    if workers is not None:
        given["workers"] = workers
    mistakes: list[ConfigError] = []
    changes: dict[str, object] = {}
    try:
        valid = Config.model_validate(given)
        changes = {name: getattr(valid, name) for name in given}
    except ValidationError as error:
        mistakes.extend(ConfigError(_option(path), None, message) for path, message in explain(error, Config))
    for name, text, read in (
        ("admin", admin, partial(_override_admin, config.admin)),
        ("control", control, _override_control),
    ):
        if text is not None:
            try:
                changes[name] = read(text)
            except ValueError as error:
                mistakes.append(ConfigError(f"--{name}", None, str(error)))
    if mistakes:
        raise ConfigErrors(mistakes)
    changed = config.model_copy(update=changes)
    if shared := list(changed.find_shared_sockets()):
        keys = ((render_path(path), text) for path, text in shared)
        raise ConfigErrors(ConfigError(f"--{key}" if key in changes else key, None, text) for key, text in keys)
    return changed


def _override_admin(admin: Admin | None, text: str) -> Admin | None:
    if text == "off":
        return None
    address = parse_listener(text)
    kept = admin or Admin()
    if kept.token is None and not address.is_loopback:
        raise ValueError(f"{NEEDS_TOKEN}; set admin.token in the file")
    return kept.model_copy(update={"address": address})


def _override_control(text: str) -> Path | Literal[False]:
    return False if text == "off" else read_socket(text)


def _option(path: PathInFile) -> str:
    match path:
        case ("upstreams", int(position), *_):
            return f"URL {position + 1}"
        case ("listeners", *_):
            return "--listen"
        case ("workers", *_):
            return "--workers"
        case _:
            return "URL"  # too many of them
