"""As much of JSON Schema (draft 2020-12) as the schema of the configuration uses; any other keyword is an error."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_NOTES = {"title", "description", "default", "$defs", "$schema", "additionalProperties"}


def find_mistakes(value: Any, schema: Schema, root: Schema, at: str = "$") -> Iterator[str]:
    """Give what is wrong with a value; raise KeyError for a keyword that is not known here."""
    for keyword, expected in schema.items():
        if keyword in _NESTED:
            yield from _NESTED[keyword](value, expected, root, at)
        elif keyword not in _NOTES and not _PLAIN[keyword](value, expected):
            yield f"{at}: not {keyword} {expected}"
    if isinstance(value, dict) and schema.get("additionalProperties") is False:
        yield from (f"{at}: unknown key {name}" for name in value.keys() - schema["properties"].keys())


def _has_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (not isinstance(value, bool) or name == "boolean")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_PLAIN: Mapping[str, Callable[[Any, Any], bool]] = {
    "type": _has_type,
    "enum": lambda value, expected: value in expected,
    "const": lambda value, expected: value == expected,
    "pattern": lambda value, expected: not isinstance(value, str) or re.search(expected, value) is not None,
    "minimum": lambda value, expected: not _is_number(value) or value >= expected,
    "maximum": lambda value, expected: not _is_number(value) or value <= expected,
    "minItems": lambda value, expected: not isinstance(value, list) or len(value) >= expected,
    "maxItems": lambda value, expected: not isinstance(value, list) or len(value) <= expected,
    "maxProperties": lambda value, expected: not isinstance(value, dict) or len(value) <= expected,
    "required": lambda value, expected: not isinstance(value, dict) or value.keys() >= set(expected),
}


def _follow(value: Any, reference: str, root: Schema, at: str) -> Iterator[str]:
    return find_mistakes(value, root["$defs"][reference.removeprefix("#/$defs/")], root, at)


def _try_each(value: Any, forms: Iterable[Schema], root: Schema, at: str) -> Iterator[str]:
    if all(list(find_mistakes(value, form, root, at)) for form in forms):
        yield f"{at}: none of its forms"


def _look_at_items(value: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    for position, item in enumerate(value if isinstance(value, list) else ()):
        yield from find_mistakes(item, schema, root, f"{at}[{position}]")


def _look_at_properties(value: Any, schemas: Mapping[str, Schema], root: Schema, at: str) -> Iterator[str]:
    for name in schemas.keys() & (value.keys() if isinstance(value, dict) else set()):
        yield from find_mistakes(value[name], schemas[name], root, f"{at}.{name}")


def _look_at_names(value: Any, schema: Schema, root: Schema, at: str) -> Iterator[str]:
    for name in value if isinstance(value, dict) else ():
        yield from find_mistakes(name, schema, root, f"{at}.{name}")


def _look_at_others(value: Any, schema: Any, root: Schema, at: str) -> Iterator[str]:
    """Look at the values of a mapping whose keys are names; that other keys are unknown is told elsewhere."""
    if isinstance(value, dict) and isinstance(schema, dict):
        for name, one in value.items():
            yield from find_mistakes(one, schema, root, f"{at}.{name}")


_NESTED: Mapping[str, Callable[[Any, Any, Schema, str], Iterator[str]]] = {
    "$ref": _follow,
    "anyOf": _try_each,
    "items": _look_at_items,
    "properties": _look_at_properties,
    "propertyNames": _look_at_names,
    "additionalProperties": _look_at_others,
}
