"""The section `health`: how the proxy learns whether an upstream can serve."""

import re
from typing import Annotated, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from stickyproxy.config.fields import (
    OrFalse,
    Read,
    Seconds,
    Section,
    in_seconds,
    read_items,
    refuse,
    text,
    whole_number,
)
from stickyproxy.config.units import shown

_STATUS = re.compile("([1-5][0-9][0-9])(?:-([1-5][0-9][0-9]))?")
_STATUS_FORM = {"anyOf": [{"type": "integer", "minimum": 100, "maximum": 599}, {"type": "string"}]}


class StatusRange(NamedTuple):
    """HTTP status codes from `first` to `last`, both included."""

    first: int
    last: int


def _read_status_range(raw: object) -> StatusRange:
    is_number = isinstance(raw, int) and not isinstance(raw, bool)
    match = _STATUS.fullmatch(str(raw)) if is_number or isinstance(raw, str) else None
    if match is None:
        raise ValueError(f'expected a status such as 200 or a range such as "200-399", got {shown(raw)}')
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ValueError(f"expected the lower status first, got {shown(raw)}")
    return StatusRange(first, last)


def read_expect(raw: object) -> tuple[StatusRange, ...]:
    """Return the ranges of a status, a range, or a list of them. Raises `ValueError`."""
    if not isinstance(raw, list):
        return (_read_status_range(raw),)
    if not raw:
        raise ValueError("expected at least one status")
    return read_items(raw, _read_status_range, "a list")


class Probe(Section):
    """The active health check: an HTTP request where `path` is given, else a TCP connect."""

    expected: ClassVar[str] = "a mapping of keys or false"

    path: Annotated[str, text(r"/[\x21\x22\x24-\x7e]*", 'a path that begins with "/", without spaces')] | None = Field(
        default=None, description="The path of the HTTP probe; null: only connect."
    )
    expect: Annotated[
        tuple[StatusRange, ...],
        Read(read_expect, {"anyOf": [*_STATUS_FORM["anyOf"], {"type": "array", "items": _STATUS_FORM, "minItems": 1}]}),
    ] = Field(
        default=(StatusRange(200, 399),),
        json_schema_extra={"default": "200-399"},
        description="The statuses of the HTTP probe that mean healthy.",
    )
    interval_s: Seconds = in_seconds("5s", "The time from one probe to the next.")
    timeout_s: Seconds = in_seconds("2s", "How long a probe may take.")
    rise: Annotated[int, whole_number(1, 100)] = Field(
        default=2, description="How many good probes in a row make an upstream healthy."
    )
    fall: Annotated[int, whole_number(1, 100)] = Field(
        default=3, description="How many bad probes in a row make an upstream unhealthy."
    )
    jitter_percent: Annotated[int, whole_number(0, 50)] = Field(
        default=10, description="By how much of the interval probes vary at random, in percent."
    )

    def expects(self, status: int) -> bool:
        """Say whether a response with this status counts as healthy."""
        return any(first <= status <= last for first, last in self.expect)

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if "expect" in self.model_fields_set and self.path is None:
            refuse([(("expect",), "expect needs path: without it the probe is a TCP connect and has no status")])
        return self


class Health(Section):
    """How the proxy learns whether an upstream can serve."""

    probe: OrFalse[Probe] = Field(default_factory=Probe, description="The active health check; false: none.")
