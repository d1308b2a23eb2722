"""What the command line says over the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict

from pydantic import ValidationError
from typing_extensions import Unpack

from stickyproxy.config.address import parse_listener
from stickyproxy.config.errors import ConfigError, ConfigErrors, Mistake, PathInFile, render_path
from stickyproxy.config.explain import explain
from stickyproxy.config.fields import read_socket
from stickyproxy.config.run import Run
from stickyproxy.config.schema import NEEDS_TOKEN, Admin, Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from stickyproxy.config.run import Reload

NO_COMMAND = "there is no command to run: give one after --, or as run.command in the file"


class Overrides(TypedDict, total=False):
    """What a command line may say. What is None or empty changes nothing.

    `urls` replace all upstreams and `listen` all listeners. `admin` is an address, or `off`; the token of the file
    stays. `control` is an absolute path, or `off`. `presets` replace all names of presets; what they bring is in the
    configuration already. `command` is the command of `run`, and `processes` how many of it; what else the file says of
    `run` stays. Each of `reload`, `reload_directories` and `reload_include` has the app deployed anew when its files
    change; the latter two replace what the file says of them.
    """

    urls: Sequence[str]
    listen: str | None
    admin: str | None
    workers: int | str | None
    control: str | None
    presets: Sequence[str]
    command: Sequence[str] | None
    processes: int | str | None
    reload: bool | None
    reload_directories: Sequence[str]
    reload_include: Sequence[str]


def with_overrides(config: Config, **overrides: Unpack[Overrides]) -> Config:
    """Return the configuration with what the command line gave in place of what it had.

    Raises `ConfigErrors` whose paths are `URL 2`, `--listen`, `--admin`, `--workers`, `--control`, `--preset`,
    `COMMAND`, `--processes`, `--reload`, `--reload-dir` and `--reload-include`, or keys of the file that do not go with
    them.
    """
    mistakes: list[ConfigError] = []
    changes: dict[str, object] = {}
    for key, raw in _as_in_file(config, overrides):
        try:
            changes[key] = getattr(Config.model_validate({key: raw}), key)
        except ValidationError as error:
            mistakes.extend(ConfigError(_option(path), None, message) for path, message in explain(error, Config))
    for name, text, read in (
        ("admin", overrides.get("admin"), partial(_override_admin, config.admin)),
        ("control", overrides.get("control"), _override_control),
    ):
        if text is not None:
            try:
                changes[name] = read(text)
            except ValueError as error:
                mistakes.append(ConfigError(f"--{name}", None, str(error)))
    if config.run is None and not overrides.get("command"):
        given = {"--processes": overrides.get("processes"), "--reload": _override_reload(None, overrides)}
        mistakes.extend(ConfigError(option, None, NO_COMMAND) for option, raw in given.items() if raw is not None)
    if mistakes:
        raise ConfigErrors(mistakes)
    if isinstance(run := changes.get("run"), Run):
        changes["run"] = _override_run(config.run, run, overrides)
    changed = config.model_copy(update=changes)
    if conflicts := [*changed.find_conflicts(), *_find_unwatched(changed.run)]:
        raise ConfigErrors(ConfigError(_name_conflict(path, changes), None, text) for path, text in conflicts)
    return changed


def _as_in_file(config: Config, overrides: Overrides) -> Iterator[tuple[str, object]]:
    """Give each key that the schema reads, with the value that the file would have for it."""
    if urls := overrides.get("urls"):
        yield "upstreams", list(urls)
    if (listen := overrides.get("listen")) is not None:
        yield "listeners", [listen]
    if (workers := overrides.get("workers")) is not None:
        yield "workers", workers
    if presets := overrides.get("presets"):
        yield "presets", list(presets)
    command, of_file = overrides.get("command"), config.run
    given = {
        "processes": overrides.get("processes"),
        "reload": _override_reload(None if of_file is None else of_file.reload, overrides),
    }
    if not command and of_file is not None and any(raw is not None for raw in given.values()):
        command = of_file.command
    if command:
        yield "run", {"command": list(command), **given}


def _override_reload(of_file: Reload | None, overrides: Overrides) -> dict[str, object] | None:
    """Return `run.reload` as the file would have it with what was given; None where nothing was."""
    lists = {"directories": overrides.get("reload_directories"), "include": overrides.get("reload_include")}
    given = {key: list(items) for key, items in lists.items() if items}
    if not (overrides.get("reload") or given):
        return None
    kept = {} if of_file is None else {key: list(getattr(of_file, key)) for key in lists}
    return {**kept, **given}


def _override_run(of_file: Run | None, given: Run, overrides: Overrides) -> Run:
    """Return `run` of the file with what was given of its keys; without one, all."""
    if of_file is None:
        return given
    changes: dict[str, object] = {}
    if overrides.get("command"):
        changes["command"] = given.command
    if overrides.get("processes") is not None:
        changes["processes"] = given.processes
    if given.reload is not None:
        changes["reload"] = given.reload
    return of_file.model_copy(update=changes)


def _find_unwatched(run: Run | None) -> Iterator[Mistake]:
    if run is not None:
        yield from ((("run", *path), text) for path, text in run.find_unwatched())


def _name_conflict(path: PathInFile, changes: Mapping[str, object]) -> str:
    """Return the option that brought about a conflict, or the key of the file that it does not go with."""
    match path:
        case ("upstreams", *_):
            return "URL" if "upstreams" in changes else "COMMAND"
        case ("run", "command", *_):
            return "COMMAND"
        case ("run", "reload"):
            return "--reload"
        case (key, *_) if key in changes and key != "run":
            return f"--{key}"
        case _:
            return render_path(path)


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
        case ("presets", *_):
            return "--preset"
        case ("run", "command", *_):
            return "COMMAND"
        case ("run", "processes", *_):
            return "--processes"
        case ("run", "reload", "directories", *_):
            return "--reload-dir"
        case ("run", "reload", "include", *_):
            return "--reload-include"
        case ("run", "reload", *_):
            return "--reload"
        case _:
            return "URL"  # too many of them
