"""From the errors of pydantic to sentences for the author of the file.

Most messages are our own readers' already and pass as they are; what pydantic itself found is worded here. Lists of
sections are read here too, so that the mistakes of all items come at once.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeGuard, TypeVar, get_args

from pydantic import ValidationError

from stickyproxy.config.errors import Mistake, PathInFile, render_key
from stickyproxy.config.fields import Section, as_list, refuse
from stickyproxy.config.units import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pydantic_core import ErrorDetails

S = TypeVar("S", bound=Section)


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
        if isinstance(key, str):  # the positions of a list all have one section
            annotation = next(field.annotation for field in model.model_fields.values() if field.alias == key)
            model = next(kind for kind in _unfold(annotation) if _is_section(kind))
    return [str(field.alias) for field in model.model_fields.values()]


def _unfold(annotation: object) -> list[object]:
    """Return the annotation and all in it: `Section | None`, `tuple[Section, ...]`, what is `Annotated`."""
    return [annotation, *(kind for part in get_args(annotation) for kind in _unfold(part))]


def _is_section(kind: object) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def read_sections(raw: object, section: type[S], find_repeated: Callable[[dict[int, S]], Iterable[Mistake]]) -> object:
    """Return a list of sections. Raises `ValidationError` with the mistakes of all of them, and with what repeats."""
    found: dict[int, S] = {}
    mistakes: list[Mistake] = []
    for position, item in enumerate(as_list(raw)):
        try:
            found[position] = section.model_validate(item)
        except ValidationError as error:
            mistakes.extend(((position, *path), message) for path, message in explain(error, section))
    mistakes.extend(find_repeated(found))
    if mistakes:
        refuse(mistakes)
    return tuple(found.values())
