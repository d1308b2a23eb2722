"""What the command line says over the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from stickyproxy.config.address import parse_listener
from stickyproxy.config.errors import ConfigError, ConfigErrors, PathInFile
from stickyproxy.config.explain import explain
from stickyproxy.config.schema import NEEDS_TOKEN, Admin, Config

if TYPE_CHECKING:
    from collections.abc import Sequence


def with_overrides(
    config: Config,
    *,
    urls: Sequence[str] = (),
    listen: str | None = None,
    admin: str | None = None,
    workers: int | str | None = None,
) -> Config:
    """Return the configuration with what the command line gave in place of what it had.

    `urls` replace all upstreams and `listen` all listeners. `admin` is an address, or `off`; the token of the file
    stays. What is None or empty changes nothing. Raises `ConfigErrors` whose paths are `URL 2`, `--listen`, `--admin`
    and `--workers`.
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
    if admin is not None:
        try:
            changes["admin"] = _override_admin(config.admin, admin)
        except ValueError as error:
            mistakes.append(ConfigError("--admin", None, str(error)))
    if mistakes:
        raise ConfigErrors(mistakes)
    return config.model_copy(update=changes)


def _override_admin(admin: Admin | None, text: str) -> Admin | None:
    if text == "off":
        return None
    address = parse_listener(text)
    kept = admin or Admin()
    if kept.token is None and not address.is_loopback:
        raise ValueError(f"{NEEDS_TOKEN}; set admin.token in the file")
    return kept.model_copy(update={"address": address})


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
