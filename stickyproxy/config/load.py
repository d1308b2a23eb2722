"""Load a configuration: a file or a text in, one frozen `Config` or all mistakes out.

The entry of `config/`. The steps: read the file, read the YAML with its lines (document), put presets under it
(preset), validate (schema), name each mistake by its line and its path in the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stickyproxy.config.document import Document, read_document
from stickyproxy.config.errors import ConfigError, ConfigErrors, PathInFile, render_path
from stickyproxy.config.explain import explain
from stickyproxy.config.preset import put_presets_under
from stickyproxy.config.schema import Config
from stickyproxy.config.secret import Sources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAX_FILE_BYTES = 1 << 20  # 1 MiB: ten times a file of 1000 upstreams; PyYAML takes seconds for it


def load_file(path: Path, env: Mapping[str, str]) -> Config:
    """Load a configuration from a YAML file.

    `env` is where `env:NAME` is looked up. Reads this file, and those that `file:` names, at once. Raises
    `ConfigErrors` with every mistake; its `source` is the path.
    """
    return load_text(read_file(path), env, source=str(path))


def load_text(
    text: str,
    env: Mapping[str, str],
    source: str = "",
    known: dict[str, bytes] | None = None,
    presets: Sequence[str] = (),
    command: Sequence[str] | None = None,
) -> Config:
    """Load a configuration from the text of a YAML file; an empty one gives the defaults.

    `source` names the text in the errors. `known` holds the secrets that are not read again, and gets those that are.
    `presets` and `command` are those of the command line, for which `put_presets_under` says what they bring.
    Raises `ConfigErrors` with every mistake. Takes time with the length of the text, some 0.2 s for 1000 upstreams: on
    an event loop that serves clients, call it in a thread.
    """
    try:
        document = put_presets_under(read_document(text), presets, command)
    except ConfigErrors as errors:
        raise ConfigErrors(errors.errors, source) from None
    try:
        config = Config.model_validate(document.value, context=Sources(env, {} if known is None else known))
    except ValidationError as error:
        found = [_locate(path, message, document) for path, message in explain(error, Config)]
        raise ConfigErrors([*document.mistakes, *found], source) from None
    if document.mistakes:
        raise ConfigErrors(document.mistakes, source)
    return config


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors: every key with its description, its forms and its default."""
    schema = Config.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "stickyproxy configuration"}


def _locate(path: PathInFile, message: str, document: Document) -> ConfigError:
    """Return the mistake at the deepest part of the path that was written: a short form has no keys inside."""
    while path and path not in document.lines and path not in document.presets:
        path = path[:-1]
    return ConfigError(render_path(path), document.lines.get(path), message, document.presets.get(path, ""))


def read_file(path: Path) -> str:
    """Return the text of a configuration file. Raises `ConfigErrors` where it cannot be read or is no text."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _whole_file(path, f"cannot read the file: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise _whole_file(path, f"the file is longer than {MAX_FILE_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _whole_file(path, f"the file is not UTF-8: byte {error.start + 1} is wrong") from None


def _whole_file(path: Path, message: str) -> ConfigErrors:
    return ConfigErrors([ConfigError("", None, message)], str(path))
