"""What a configuration is made from, so that it can be read again, and made in another process.

Stands above `load.py` and `overrides.py`: the start, each reload and each worker make their `Config` through one value,
`ConfigSource`, which goes from process to process as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stickyproxy.config.errors import ConfigError, ConfigErrors
from stickyproxy.config.load import load_text, read_file
from stickyproxy.config.overrides import with_overrides

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stickyproxy.config.schema import Config


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """The path of the file, None where there is none, and what the command line says over it.

    The overrides are as `with_overrides` takes them. `path`, `control` and `reload_directories` are made absolute,
    because a reload may happen in another working directory than the start; links are left as they are, because one
    that is pointed to another file means that file. Raises `ConfigErrors` where the working directory is gone.
    """

    path: Path | None = None
    urls: tuple[str, ...] = ()
    listen: str | None = None
    admin: str | None = None
    workers: int | str | None = None
    control: str | None = None
    presets: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None
    processes: int | str | None = None
    reload: bool | None = None
    reload_directories: tuple[str, ...] = ()
    reload_include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.command:
            object.__setattr__(self, "command", None)  # no words are no command, as no URLs are no upstreams
        if self.path is not None:
            object.__setattr__(self, "path", _absolute(self.path, "--config"))
        if self.control is not None and self.control != "off":
            object.__setattr__(self, "control", str(_absolute(Path(self.control), "--control")))
        directories = tuple(str(_absolute(Path(one), "--reload-dir")) for one in self.reload_directories)
        object.__setattr__(self, "reload_directories", directories)

    def load(self, env: Mapping[str, str]) -> Config:
        """Read the file, and those that it names, and return the configuration.

        `env` is where `env:NAME` is looked up. Raises `ConfigErrors` with every mistake of the file, or else with
        every one of the command line.
        """
        return self.load_text(self.read_text(), env)

    def read_text(self) -> str:
        """Return what the file holds at this moment; "" where there is none. Raises `ConfigErrors`."""
        return "" if self.path is None else read_file(self.path)

    def load_text(self, text: str, env: Mapping[str, str], known: dict[str, bytes] | None = None) -> Config:
        """Return the configuration with this text in place of the file's; otherwise as `load`.

        `known` holds the secrets that are not read again, and gets those that are.
        """
        source = "" if self.path is None else str(self.path)
        config = load_text(text, env, source, known, presets=self.presets, command=self.command)
        return with_overrides(
            config,
            urls=self.urls,
            listen=self.listen,
            admin=self.admin,
            workers=self.workers,
            control=self.control,
            presets=self.presets,
            command=self.command,
            processes=self.processes,
            reload=self.reload,
            reload_directories=self.reload_directories,
            reload_include=self.reload_include,
        )

    def to_json(self) -> dict[str, object]:
        """Return plain values for `json`, without what was not given.

        So a version that does not know one of them can still read what was made without it.
        """
        plain = {
            "path": None if self.path is None else str(self.path),
            "urls": list(self.urls),
            "presets": list(self.presets),
            "command": list(self.command or ()),
            "reload_directories": list(self.reload_directories),
            "reload_include": list(self.reload_include),
        }
        given = {field.name: plain.get(field.name, getattr(self, field.name)) for field in fields(self)}
        return {name: value for name, value in given.items() if value not in (None, [])}

    @classmethod
    def from_json(cls, raw: object) -> ConfigSource:
        """Return the source that `to_json` wrote. Raises `ValueError` for anything else, a newer version's included."""
        if not isinstance(raw, dict):
            raise ValueError("the source of a configuration is an object")  # noqa: TRY004 - foreign JSON, no bug
        for name, value in raw.items():
            if not _is_right(name, value):
                raise ValueError(f"the source of a configuration does not hold {name!r}, or not so")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()
        }
        if "path" in given:
            given["path"] = Path(given["path"])
        return cls(**given)


def _absolute(path: Path, option: str) -> Path:
    try:
        return path.absolute()
    except OSError as error:
        message = f"cannot tell where {path} is, the working directory is gone ({error.strerror}); name it from / on"
        raise ConfigErrors([ConfigError(option, None, message)]) from None


def _is_right(name: str, value: object) -> bool:
    """Say whether a value from elsewhere can be this field: of its type, and a path absolute already."""
    match name, value:
        case "path", str():
            return value.startswith("/")
        case "control", str():
            return value == "off" or value.startswith("/")
        case (("listen" | "admin" | "workers" | "processes"), str()):
            return True
        case (("workers" | "processes"), int()):
            return not isinstance(value, bool)
        case "reload", bool():
            return True
        case "reload_directories", list():
            return all(isinstance(item, str) and item.startswith("/") for item in value)
        case (("urls" | "presets" | "command" | "reload_include"), list()):
            return all(isinstance(item, str) for item in value)
        case _:
            return False
