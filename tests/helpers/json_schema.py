"""As much of JSON Schema (draft 2020-12) as the schema of the configuration uses; any other keyword is an error."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_NOTES = {"title", "description", "default", "$defs", "$schema"}


def find_mistakes(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str = "$") -> Iterator[str]:
    """Give what is wrong with a value; raise KeyError for a keyword that is not known here."""
    for keyword, expected in schema.items():
        if keyword not in _NOTES:
            yield from _find(keyword, expected, value, schema, root, at)


def _find(
    keyword: str, expected: Any, value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str
) -> Iterator[str]:
    match keyword:
        case "$ref":
            yield from find_mistakes(value, root["$defs"][expected.removeprefix("#/$defs/")], root, at)
        case "type" if not _has_type(value, expected):
            yield f"{at}: not of type {expected}"
        case "enum" if value not in expected:
            yield f"{at}: not one of {expected}"
        case "const" if value != expected:
            yield f"{at}: not {expected}"
        case "anyOf" if all(list(find_mistakes(value, one, root, at)) for one in expected):
            yield f"{at}: none of its forms"
        case "pattern" if isinstance(value, str) and not re.search(expected, value):
            yield f"{at}: does not match {expected}"
        case "minimum" if _is_number(value) and value < expected:
            yield f"{at}: below {expected}"
        case "maximum" if _is_number(value) and value > expected:
            yield f"{at}: above {expected}"
        case "minItems" if isinstance(value, list) and len(value) < expected:
            yield f"{at}: fewer than {expected}"
        case "maxItems" if isinstance(value, list) and len(value) > expected:
            yield f"{at}: more than {expected}"
        case "items" if isinstance(value, list):
            for position, item in enumerate(value):
                yield from find_mistakes(item, expected, root, f"{at}[{position}]")
        case "required" if isinstance(value, dict):
            yield from (f"{at}: lacks {name}" for name in expected if name not in value)
        case "properties" if isinstance(value, dict):
            for name in value.keys() & expected.keys():
                yield from find_mistakes(value[name], expected[name], root, f"{at}.{name}")
        case "additionalProperties" if isinstance(value, dict) and expected is False:
            yield from (f"{at}: unknown key {name}" for name in value.keys() - schema["properties"].keys())
        case _ if keyword not in _KNOWN:
            raise KeyError(keyword)


_KNOWN = {
    *("$ref", "type", "enum", "const", "anyOf", "pattern", "minimum", "maximum", "minItems", "maxItems", "items"),
    *("required", "properties", "additionalProperties"),
}


def _has_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (not isinstance(value, bool) or name == "boolean")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
