"""Presets: what a framework needs and its users should not have to know, as a piece of a configuration.

Each is a file of `presets/`, in the words of the configuration file; its first line describes it, and it may stand on
others itself. `load.py` puts those that are named under what the user's own file says, before the schema sees it. They
are read once: a process works by the same ones until its end, whatever is installed meanwhile.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Final, TypeGuard

import yaml
from pydantic import ValidationError

from stickyproxy.config.document import Document, read_document
from stickyproxy.config.fields import read_items, read_text
from stickyproxy.config.placeholders import placeholders
from stickyproxy.config.run import Run
from stickyproxy.config.units import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stickyproxy.config.errors import PathInFile

_FILES: Final = resources.files(__package__) / "presets"

AUTO: Final = "auto"
_FRAMEWORKS: Final = tuple(
    sorted(file.name.removesuffix(".yaml") for file in _FILES.iterdir() if file.name.endswith(".yaml"))
)
PRESETS: Final = (AUTO, *_FRAMEWORKS)
"""The names of all presets."""

_AUTO_TEXT: Final = """\
# Any of these frameworks: the keys of all presets, of which the log says those that are in use
#
# What else a preset brings, such as the path of the ready probe, comes only with its name.
"""

_WIDTH: Final = 120
_KEYS: Final = ("affinity", "keys")


def preset_text(name: str) -> str:
    """Return the file of one of the `PRESETS` as it stands."""
    if name == AUTO:
        return _AUTO_TEXT + yaml.safe_dump({"affinity": {"keys": _all_keys()}}, sort_keys=False, width=_WIDTH)
    return (_FILES / f"{name}.yaml").read_text(encoding="utf-8")


def _all_keys() -> list[object]:
    """Return the keys of all presets, each once."""
    keys: list[object] = []
    for name in _FRAMEWORKS:
        affinity = _read(name).get("affinity")
        if _is_mapping(affinity) and isinstance(of_preset := affinity.get("keys"), list):
            keys += [one for one in of_preset if one not in keys]
    return keys


def describe_preset(name: str) -> str:
    """Return what the first line of its file says one of the `PRESETS` is."""
    return preset_text(name).partition("\n")[0].removeprefix("# ")


def read_presets(raw: object) -> tuple[str, ...]:
    """Return the names of presets, from one or a list. Raises `ValueError`, with all mistakes of a list."""
    return read_items([raw] if isinstance(raw, str) else raw, _read_name, "the name of a preset or a list of names")


def _read_name(raw: object) -> str:
    name = read_text(raw)
    if name not in PRESETS:
        raise ValueError(f"there is no preset {shown(name)}; there are {', '.join(PRESETS)}")
    return name


def put_presets_under(document: Document, presets: Sequence[str], command: Sequence[str] | None) -> Document:
    """Return the document of a user's file with presets under it.

    Mappings are merged key by key, and the keys of `affinity` add up: first the file's own, then those of each preset.
    Anything else that the file says wins as a whole, null too. Of two presets the one named later goes over the other.
    What they say of `run` counts only where there is an app to run, and a variable that holds `{port}` only where the
    app does not listen on `{socket}`.

    `presets` and `command` are those of the command line, in place of the file's; empty: as the file says. What is
    wrong in any of them is left to others to report, and counts as not said.
    """
    value = document.value
    if not _is_mapping(value):
        return document
    known = [*_with_theirs(name for name in presets or _names_in(value) if name in PRESETS)]
    if not known:
        return document
    run = value.get("run")
    if command and _is_command(command) and (run is None or (_is_mapping(run) and "command" in run)):
        run = {**(run or {}), "command": list(command)}
        value = {**value, "run": run}
    origins: dict[PathInFile, str] = {}
    for name in reversed(known):
        value = _merge(value, _piece_for(run, name), (), name, origins)
    return replace(document, value=value, presets=origins)


def _with_theirs(names: Iterable[str]) -> Iterator[str]:
    """Give the names of presets, each behind those that its own file names: it goes over them."""
    for name in names:
        yield from _with_theirs(_names_in(_read(name)))
        yield name


def _names_in(value: Mapping[str, object]) -> Sequence[str]:
    with suppress(ValueError):
        return read_presets(value.get("presets") or [])
    return ()


def _is_command(words: Sequence[str]) -> bool:
    with suppress(ValidationError):
        return bool(Run.model_validate({"command": list(words)}))
    return False


def _piece_for(run: object, name: str) -> dict[str, object]:
    """Return what a preset says where this is the user's own `run`."""
    piece = dict(_read(name))
    piece.pop("presets", None)
    of_run = piece.pop("run", None)
    if _is_mapping(run) and _is_mapping(of_run):
        env = of_run.get("env")
        if _is_mapping(env) and _uses(run, "socket"):
            env = {variable: text for variable, text in env.items() if "port" not in placeholders(str(text))}
            of_run = {**of_run, "env": env}
        piece["run"] = of_run
    return piece


@cache
def _read(name: str) -> Mapping[str, object]:
    value = read_document(preset_text(name)).value
    return value if _is_mapping(value) else {}


def _uses(run: Mapping[str, object], placeholder: str) -> bool:
    """Say whether a placeholder stands in a `run` that nobody has validated yet."""
    for text in _texts([run.get(key) for key in ("command", "env", "cwd")]):
        with suppress(ValueError):
            if placeholder in placeholders(text):
                return True
    return False


def _texts(raw: object) -> Iterator[str]:
    if isinstance(raw, str):
        yield raw
    elif isinstance(raw, list | dict):
        for item in raw.values() if isinstance(raw, dict) else raw:
            yield from _texts(item)


def _merge(
    over: Mapping[str, object],
    under: Mapping[str, object],
    path: PathInFile,
    name: str,
    origins: dict[PathInFile, str],
) -> dict[str, object]:
    """Return both mappings as one; note in `origins`, by its path, each value that comes from the one below."""
    merged = dict(over)
    for key, below in under.items():
        here = (*path, key)
        if key not in over:
            origins[here] = name
        above = over.get(key, {} if _is_mapping(below) else below)
        if _is_mapping(above) and _is_mapping(below):
            above = _merge(above, below, here, name, origins)
        elif here == _KEYS and key in over and isinstance(above, list) and isinstance(below, list):
            more = [one for one in below if one not in above]  # two presets may bring the same
            origins.update({(*here, len(above) + at): name for at in range(len(more))})
            above = [*above, *more]
        merged[key] = above
    return merged


def _is_mapping(raw: object) -> TypeGuard[dict[str, object]]:
    """Say whether this is a mapping of a document, whose keys are text."""
    return isinstance(raw, dict)
