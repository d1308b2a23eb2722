"""From values back to what the file would say: `10s`, `64KiB`, `off`, `[same-host, absent]`.

For people who read what a reload changes. Each value is written so that the schema reads it as the same value again,
but a secret, which is never shown.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import yaml
from pydantic import BeforeValidator

from stickyproxy.config.address import Address, write_upstream_url
from stickyproxy.config.affinity import OnUnavailable
from stickyproxy.config.cluster import Cluster
from stickyproxy.config.fields import Read, Section
from stickyproxy.config.health import StatusRange
from stickyproxy.config.keys import AffinityKey, KeyLesson
from stickyproxy.config.listener import Listener
from stickyproxy.config.route import Route
from stickyproxy.config.run import Command, PortRange, Processes, write_pace
from stickyproxy.config.tls import Certificate
from stickyproxy.config.trust import TrustedProxies
from stickyproxy.config.units import write_duration, write_size
from stickyproxy.config.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo

NOT_SHOWN = "(not shown)"

_NAMING_FIELDS = {
    Upstream: "explicit_id",
    Listener: "address",
    Certificate: "certificate",
    AffinityKey: "explicit_name",
}


def write_value(section: Section, name: str) -> str:
    """Return the value of an attribute of a section as the file writes it; `(not shown)` for a secret."""
    return _write(name, type(section).model_fields[name], getattr(section, name), _quote)


def write_section(section: Section) -> str:
    """Return a section as a mapping on one line, without the keys that have their defaults; `{}` if all have."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in _write_keys(section))}}}"


def is_secret(field: FieldInfo) -> bool:
    """Say whether the values of a field are secrets: `repr` leaves those fields out."""
    return not field.repr


def is_whole(value: object) -> bool:
    """Say whether the file writes a section as one value, without keys: `4`."""
    return isinstance(value, Processes) and value.is_fixed


def items_of(value: object) -> tuple[object, ...] | None:
    """Return the items of a value that is a list in the file; None for any other value."""
    match value:
        case TrustedProxies():
            return (*value.networks, *(["unix"] if value.unix else []))
        case StatusRange() | PortRange() | Command():
            return None
        case tuple():
            return value
        case _:
            return None


def name_item(item: object) -> str:
    """Return what tells an item of a list from the others: the id of an upstream, the address of a listener."""
    match item:
        case Upstream():
            return item.id
        case AffinityKey():
            return item.name
        case KeyLesson():
            return item.header or item.cookie or str(item.place)
        case Cluster():
            return item.name
        case Route():
            return item.place
        case Listener():
            return str(item.address)
        case Certificate():
            return str(item.certificate)
        case StatusRange():
            return str(item.first) if item.first == item.last else f"{item.first}-{item.last}"
        case _:
            return str(item)


def describe_item(item: object) -> str:
    """Return what is to be said of an item beside its name: `http://127.0.0.1:8001, weight: 2`; "" for nothing."""
    if not isinstance(item, Section):
        return ""
    parts = [f"{key}: {value}" for key, value in _write_keys(item, without=_NAMING_FIELDS.get(type(item), ""))]
    if isinstance(item, Upstream):
        parts[0] = write_upstream_url(item.address)  # the URL needs neither its key nor quotes to be known for one
    return ", ".join(parts)


def _write_keys(section: Section, without: str = "") -> Iterator[tuple[str, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name != without and (field.is_required() or value != field.get_default(call_default_factory=True)):
            yield str(field.alias), _write(name, field, value, _quote_within)


def _write(name: str, field: FieldInfo, value: object, quote: Callable[[str], str]) -> str:
    if is_secret(field):
        return NOT_SHOWN
    match value:
        case None:
            return next((word for word, raw in _NONES if _reads(field, raw, None)), "null")
        case Processes() if is_whole(value):
            return str(value.min)
        case Section():
            written = write_section(value)
            return "true" if written == "{}" and _reads(field, True, {}) else written
        case bool():
            return "true" if value else "false"
        case int() | float():
            return _write_number(name, value)
        case Address() if field.alias == "url":
            return quote(write_upstream_url(value))
        case OnUnavailable():
            return f"{{wait: {write_duration(value.wait_s)}}}" if value.action == "wait" else value.action
        case _:
            items = items_of(value)
            if items and isinstance(items[0], Cluster):
                return f"{{{', '.join(f'{name_item(item)}: {_write_item(item)}' for item in items)}}}"
            return quote(str(value)) if items is None else f"[{', '.join(map(_write_item, items))}]"


def _write_item(item: object) -> str:
    return write_section(item) if isinstance(item, Section) else _quote_within(name_item(item))


def _write_number(name: str, number: float) -> str:
    if name.endswith("_per_s"):
        return write_pace(number)
    if name.endswith("_s"):
        return write_duration(number)
    return write_size(int(number)) if name.endswith("_bytes") else str(number)


_NONES = (("off", "off"), ("auto", "auto"), ("false", False))
"""What may stand in the file for no value, and how YAML reads it."""


def _reads(field: FieldInfo, raw: object, value: object) -> bool:
    """Say whether the field's reader makes this value of what stands in the file."""
    for marker in field.metadata:
        with suppress(ValueError):
            if isinstance(marker, Read) and marker.read(raw) == value:
                return True
            if isinstance(marker, BeforeValidator) and marker.func(raw) == value:  # type: ignore[call-arg]
                return True
    return False


def _quote(text: str) -> str:
    """Return text as YAML writes it where a line ends after it: in quotes only where it needs them."""
    style = None if text.isascii() and text.isprintable() else '"'  # escaped: one line, whatever stands in it
    return str(yaml.safe_dump(text, default_style=style, width=float("inf"))).removesuffix("...\n").removesuffix("\n")


def _quote_within(text: str) -> str:
    """Return text as YAML writes it between brackets, where more of it needs quotes."""
    style = None if text.isascii() and text.isprintable() else '"'
    return str(yaml.safe_dump([text], default_style=style, default_flow_style=True, width=float("inf")))[1:-2]
