"""The types of the schema's fields: how a value of the YAML file becomes one of ours.

Stands between the readers of single values (units, address, secret) and the models. Each type brings its own message
and its own JSON Schema. Readers raise `ValueError`, for a value of the wrong type too: that is what pydantic collects.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from stickyproxy.config.address import Address, parse_listener, parse_upstream_url, read_socket_path
from stickyproxy.config.errors import Mistake
from stickyproxy.config.units import DURATION_PATTERN, SIZE_PATTERN, parse_duration, parse_size, shown

T = TypeVar("T")

JsonSchema = dict[str, Any]

MISTAKE = "mistake"  # the pydantic error type of what `refuse` raises


def yaml_key(name: str) -> str:
    """Return the YAML key of an attribute: its name without the unit, which the file writes beside the value."""
    for suffix in ("_s", "_bytes", "_percent"):
        name = name.removesuffix(suffix)
    return name


class Section(BaseModel):
    """A mapping of the file, frozen. A key with nothing after it counts as absent, so that it has its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=yaml_key, hide_input_in_errors=True)

    expected: ClassVar[str] = "a mapping of keys"

    @classmethod
    def expand(cls, raw: object) -> object:
        """Return the mapping that a short form stands for; any other value as it is."""
        return raw

    @model_validator(mode="before")
    @classmethod
    def _read_mapping(cls, raw: object) -> object:
        raw = cls.expand(raw)
        if isinstance(raw, dict):
            known = {field.alias for field in cls.model_fields.values()}
            return {key: value for key, value in raw.items() if value is not None or key not in known}
        raise ValueError(f"expected {cls.expected}, got {kind_of(raw)}")


def refuse(mistakes: Iterable[Mistake]) -> NoReturn:
    """Raise `ValidationError` with all mistakes, each at its path below the value that is being validated."""
    details = [
        InitErrorDetails(type=PydanticCustomError(MISTAKE, text), loc=path, input=None) for path, text in mistakes
    ]
    raise ValidationError.from_exception_data("configuration", details)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Mark a field whose value `read` makes; `json_schema` says what may be written in the file."""

    read: Callable[[object], object]
    json_schema: JsonSchema

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return dict(self.json_schema)


@dataclass(frozen=True, slots=True, eq=False)
class AlsoWritten:
    """Mark a section that has a short form; `json_schema` describes the short form."""

    json_schema: JsonSchema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        section = handler(schema)
        return {
            "anyOf": [self.json_schema, *(form for form in section.get("anyOf", [section]) if form != {"type": "null"})]
        }


@dataclass(frozen=True, slots=True, eq=False)
class OneOrMore:
    """Mark a list that one item may stand for; the reader of the field takes it so, this is for the JSON Schema."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        items = handler(schema)
        item = items["items"]
        return {"anyOf": [*item.get("anyOf", [item]), {**items, "minItems": 1}]}


def _read_switch(raw: object) -> object:
    if isinstance(raw, bool):
        return {} if raw else None
    return raw


OrFalse = Annotated[T | None, BeforeValidator(_read_switch), AlsoWritten({"type": "boolean"})]
"""A section that `false` switches off (None); `true` stands for its defaults."""


def read_flag(raw: object) -> bool:
    """Return true or false. Raises `ValueError`."""
    if isinstance(raw, bool):
        return raw
    raise ValueError(f"expected true or false, got {shown(raw)}")


def read_text(raw: object) -> str:
    """Return text. Raises `ValueError` for what YAML read as something else, with the remedy."""
    match raw:
        case str():
            return raw
        case bool():
            raise ValueError("expected text, got true or false (YAML reads yes, no, on, off so); put quotes around it")
        case int() | float():
            raise ValueError(f"expected text, got {shown(raw)}; put quotes around it")
        case _:
            raise ValueError(f"expected text, got {shown(raw)}")


def read_seconds(raw: object) -> float:
    """Return a duration above 0, in seconds. Raises `ValueError`."""
    duration_s = parse_duration(raw)
    if duration_s == 0:
        raise ValueError(f"expected a duration above 0, got {shown(raw)}")
    return duration_s


def read_seconds_or_off(raw: object) -> float | None:
    """Return a duration above 0, in seconds; None for `off`. Raises `ValueError`."""
    return None if raw is False or raw == "off" else read_seconds(raw)


def whole_number(lowest: int, highest: int) -> Read:
    """Mark a whole number within the two bounds, both included."""

    def read(raw: object) -> int:
        if not isinstance(raw, int) or isinstance(raw, bool) or not lowest <= raw <= highest:
            hint = "; remove the quotes" if isinstance(raw, str) and re.fullmatch("[0-9]+", raw) else ""
            raise ValueError(f"expected a whole number from {lowest} to {highest}, got {shown(raw)}{hint}")
        return raw

    return Read(read, {"type": "integer", "minimum": lowest, "maximum": highest})


def size(lowest: str, highest: str) -> Read:
    """Mark a size within the two bounds, both included, in bytes."""

    def read(raw: object) -> int:
        size_bytes = parse_size(raw)
        if not parse_size(lowest) <= size_bytes <= parse_size(highest):
            raise ValueError(f"expected a size from {lowest} to {highest}, got {shown(raw)}")
        return size_bytes

    return Read(read, _SIZE_SCHEMA)


def or_word(word: str, marker: Read) -> Read:
    """Mark what another marker reads, or one word for no value (None): `auto`, or `off`, which YAML reads as false."""
    words = ["off", False] if word == "off" else [word]

    def read(raw: object) -> object:
        if any(raw is known or (isinstance(raw, str) and raw == known) for known in words):
            return None
        try:
            return marker.read(raw)
        except ValueError as error:
            raise ValueError(f"expected {word} or {str(error).removeprefix('expected ')}") from None

    return Read(read, {"anyOf": [marker.json_schema, {"enum": words}]})


def text(pattern: str, expected: str) -> Read:
    """Mark text that matches the pattern as a whole; `expected` says so in words."""

    def read(raw: object) -> str:
        found = read_text(raw)
        if not re.fullmatch(pattern, found):
            raise ValueError(f"expected {expected}, got {shown(found)}")
        return found

    return Read(read, {"type": "string", "pattern": f"^(?:{pattern})$"})


_DURATION_SCHEMA: JsonSchema = {"anyOf": [{"type": "string", "pattern": f"^{DURATION_PATTERN}$"}, {"const": 0}]}
_SIZE_SCHEMA: JsonSchema = {"anyOf": [{"type": "string", "pattern": f"^{SIZE_PATTERN}$"}, {"const": 0}]}
_OFF_SCHEMA: JsonSchema = {"anyOf": [{"type": "string", "pattern": f"^{DURATION_PATTERN}$"}, {"enum": ["off", False]}]}

Flag = Annotated[bool, Read(read_flag, {"type": "boolean"})]
Seconds = Annotated[float, Read(read_seconds, {"type": "string", "pattern": f"^{DURATION_PATTERN}$"})]
SecondsOrZero = Annotated[float, Read(parse_duration, _DURATION_SCHEMA)]
SecondsOrOff = Annotated[float | None, Read(read_seconds_or_off, _OFF_SCHEMA)]

# Absolute, because a reload or an upgrade may happen in another working directory than the start.
PATH_PATTERN = r"/[^\x00-\x1f\x7f]*"
_absolute_path = text(PATH_PATTERN, "an absolute path")


def read_path(raw: object) -> Path:
    """Return an absolute path, from text or as it is. Raises `ValueError`."""
    return Path(str(_absolute_path.read(str(raw) if isinstance(raw, Path) else raw)))


AbsolutePath = Annotated[Path, Read(read_path, _absolute_path.json_schema)]


def read_socket(raw: object) -> Path:
    """Return the absolute path of a Unix socket, from text or as it is. Raises `ValueError`."""
    return Path(read_socket_path(read_text(str(raw) if isinstance(raw, Path) else raw), "/run/stickyproxy.sock"))


def read_socket_or_false(raw: object) -> Path | Literal[False]:
    """Return the absolute path of a Unix socket; False for `false`. Raises `ValueError`."""
    if raw is False:
        return False
    if raw is True:
        raise ValueError("expected the absolute path of a socket or false, got true; for the usual place leave it out")
    return read_socket(raw)


SocketOrFalse = Annotated[
    Path | Literal[False],
    Read(read_socket_or_false, {"anyOf": [_absolute_path.json_schema, {"const": False}]}),
]
"""Where a Unix socket is; False where there is none."""

ListenerAddress = Annotated[Address, Read(lambda raw: parse_listener(read_text(raw)), {"type": "string"})]
UpstreamAddress = Annotated[Address, Read(lambda raw: parse_upstream_url(read_text(raw)), {"type": "string"})]


def in_seconds(default: str, description: str) -> Any:
    """Return a field with a duration as its default, written as in the file: `5s`, or `off`."""
    return Field(default=read_seconds_or_off(default), json_schema_extra={"default": default}, description=description)


def in_bytes(default: str, description: str) -> Any:
    """Return a field with a size as its default, written as in the file: `64KiB`."""
    return Field(default=parse_size(default), json_schema_extra={"default": default}, description=description)


def read_items(raw: object, read: Callable[[object], T], expected: str) -> tuple[T, ...]:
    """Return the items of a list, each by `read`. Raises `ValidationError` with the mistakes of all items."""
    found: list[T] = []
    mistakes: list[Mistake] = []
    for position, item in enumerate(as_list(raw, expected)):
        try:
            found.append(read(item))
        except ValueError as error:
            mistakes.append(((position,), str(error)))
    if mistakes:
        refuse(mistakes)
    return tuple(found)


def as_list(raw: object, expected: str = "a list") -> list[object]:
    """Return a list. Raises `ValueError`; the message does not repeat the value, which may be a secret."""
    if isinstance(raw, list):
        return raw
    raise ValueError(f"expected {expected}, got {kind_of(raw)}")


def kind_of(raw: object) -> str:
    """Return what a value is, without the value: where a section or a list belongs, a secret may stand."""
    if isinstance(raw, str):
        return "text"
    return "a number" if isinstance(raw, int | float) and not isinstance(raw, bool) else shown(raw)
