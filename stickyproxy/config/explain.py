"""From the errors of pydantic to sentences for the author of the file.

Most messages are our own readers' already and pass as they are; what pydantic itself found is worded here.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, get_args

from stickyproxy.config.errors import Mistake, PathInFile, render_key
from stickyproxy.config.fields import Section
from stickyproxy.config.units import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


def explain(error: ValidationError, model: type[Section]) -> Iterator[Mistake]:
    """Yield each mistake as its path below the model and a message. `model` is what was validated."""
    for details in error.errors(include_url=False):
        path = details["loc"]
        if details["type"] == "missing":
            yield path[:-1], f"the key '{path[-1]}' is missing"
        elif details["type"] == "extra_forbidden":
            yield path, _explain_unknown_key(str(path[-1]), _known_keys(model, path[:-1]))
        else:
            yield path, _explain_value(details)


def _explain_value(details: ErrorDetails) -> str:
    match details["type"]:
        case "value_error":
            return str(details["ctx"]["error"])
        case "literal_error":
            return f"expected {details['ctx']['expected'].replace(chr(39), '')}, got {shown(details['input'])}"
        case _:
            return details["msg"]


def _explain_unknown_key(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(known)}"
    return f"unknown key '{render_key(key)}'{hint}"


def _known_keys(model: type[Section], path: PathInFile) -> list[str]:
    for key in path:
        annotation = next(field.annotation for field in model.model_fields.values() if field.alias == key)
        model = next(kind for kind in (annotation, *get_args(annotation)) if _is_section(kind))
    return [str(field.alias) for field in model.model_fields.values()]


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
