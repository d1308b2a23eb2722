"""The section `run`: the app as processes that the proxy itself starts, each by the same command.

Placeholders in it stand until a process is started: see `placeholders.py`. What a value means for the processes is in
`control/runner/`.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from typing_extensions import override

from stickyproxy.config.address import MAX_PORT
from stickyproxy.config.errors import Mistake, PathInFile
from stickyproxy.config.fields import (
    PATH_PATTERN,
    AlsoWritten,
    OrFalse,
    Read,
    Seconds,
    SecondsOrOff,
    SecondsOrZero,
    Section,
    as_list,
    in_seconds,
    kind_of,
    or_word,
    read_items,
    read_path,
    read_text,
    refuse,
    size,
    text,
    whole_number,
)
from stickyproxy.config.health import StatusRange, read_expect
from stickyproxy.config.placeholders import placeholders
from stickyproxy.config.units import shown

MAX_PROCESSES: Final = 256  # each is a Python of its own, with its memory; more call for several machines
MAX_SESSIONS_EACH: Final = 1_000_000
LOWEST_PORT: Final = 1024  # the ports below need privileges that an app has no use for
LOWEST_PACE: Final = 0.01  # one client in 100 s
HIGHEST_PACE: Final = 10_000  # as good as all at once

_COMMAND_FORMS = "text or a list of words"
_STATUS_FORMS = [{"type": "integer", "minimum": 100, "maximum": 599}, {"type": "string"}]
_PORTS = re.compile("([0-9]{1,5})-([0-9]{1,5})")
_PACE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,20})?)(?:/s)?")
_PLAIN_WORD = re.compile(r"""[^\s'"\\]+""")  # no shell reads it: braces and the like need no quotes
# A backslash at the end of a line goes on with the next, as in a shell; not within quotes, which are kept as they are.
_CONTINUED = re.compile(r"""('[^']*'|"(?:[^"\\]|\\.)*"|\\[^\n])|\\\n""", re.DOTALL)


class Command(tuple[str, ...]):
    """The words of a command, at least one; `str()` gives them as one text, which `read_command` reads as the same."""

    __slots__ = ()

    @override
    def __str__(self) -> str:
        return " ".join(word if _PLAIN_WORD.fullmatch(word) else shlex.quote(word) for word in self)


def read_command(raw: object) -> Command:
    """Return the words of a command, from a list or from one text that is split as a shell would.

    Raises `ValueError`, and `ValidationError` with all mistakes of a list.
    """
    words = _split(raw) if isinstance(raw, str) else read_items(_as_words(raw), _read_word, _COMMAND_FORMS)
    if not words:
        raise ValueError("expected at least one word, the program; got none")
    if not words[0]:
        raise ValueError("expected a program as the first word, got an empty one")
    return Command(words)


def _as_words(raw: object) -> list[object]:
    return list(raw) if isinstance(raw, Command) else as_list(raw, _COMMAND_FORMS)


def _split(written: str) -> tuple[str, ...]:
    try:
        words = shlex.split(_CONTINUED.sub(lambda match: match[1] or "", written))
    except ValueError as error:
        what = "a quote that is not closed" if "quotation" in str(error) else "a backslash at the end"
        raise ValueError(f"{what} in {shown(written)}; where quoting is hard, write a list of words") from None
    return tuple(map(_read_word, words))


def _read_word(raw: object) -> str:
    word = read_text(raw)
    placeholders(word)
    return word


class Processes(Section):
    """How many app processes there are: always so many, or from `min` to `max`."""

    expected: ClassVar[str] = "a number or {min: 2, max: 8, sessions_each: 50}"

    min: Annotated[int, whole_number(1, MAX_PROCESSES)] = Field(description="The fewest app processes.")
    max: Annotated[int, whole_number(1, MAX_PROCESSES)] = Field(description="The most app processes.")
    sessions_each: Annotated[int, whole_number(1, MAX_SESSIONS_EACH)] | None = Field(
        default=None,
        description="The sessions of each beyond which there are more of them; null: `stickyproxy scale` alone changes "
        "their number.",
    )

    @property
    def is_fixed(self) -> bool:
        """Whether the file says it by one number."""
        return self.min == self.max and self.sessions_each is None

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain number for as many processes, always."""
        if isinstance(raw, int | float | str) and not isinstance(raw, bool):
            number = _number_of_processes.read(raw)
            return {"min": number, "max": number}
        return raw

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max < self.min:
            refuse([(("max",), f"expected at least min, which is {self.min}; got {self.max}")])
        return self


_number_of_processes = whole_number(1, MAX_PROCESSES)


def _read_env(raw: object) -> Mapping[str, str]:
    found: dict[str, str] = {}
    mistakes: list[Mistake] = []
    for name, value in _as_mapping(raw).items():
        try:
            found[_read_env_name(name)] = _read_env_value(value)
        except ValueError as error:
            mistakes.append(((str(name),), str(error)))
    if mistakes:
        refuse(mistakes)
    return MappingProxyType(found)


def _as_mapping(raw: object) -> Mapping[object, object]:
    if isinstance(raw, Mapping):
        return raw
    raise ValueError(f"expected a mapping of names to texts, got {kind_of(raw)}")


def _read_env_name(raw: object) -> str:
    name = read_text(raw)
    if not name or "=" in name or not name.isprintable():
        raise ValueError('expected the name of an environment variable: not empty, without "=" and control characters')
    return name


def _read_env_value(raw: object) -> str:
    """Return the value of a variable. It may be a secret: no message repeats it."""
    match raw:
        case str() | bool():
            value = read_text(raw)
        case int() | float():
            raise ValueError("expected text, got a number; put quotes around it")
        case None:
            raise ValueError('expected text, got nothing; write "" for an empty value')
        case _:
            raise ValueError(f"expected text, got {kind_of(raw)}")
    try:
        placeholders(value)
    except ValueError:
        forms = "{port}, {socket}, {id} and {generation}"
        message = f'expected text with no placeholders but {forms}, with "{{{{" and "}}}}" for literal braces'
        raise ValueError(f"{message}, without NUL characters") from None
    return value


def _read_cwd(raw: object) -> Path:
    path = read_path(raw)
    placeholders(str(path))
    return path


class PortRange(NamedTuple):
    """TCP ports from `first` to `last`, both included."""

    first: int
    last: int

    @override
    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def read_ports(raw: object) -> PortRange:
    """Return the ports of a range such as `20000-29999`. Raises `ValueError`."""
    written = str(raw) if isinstance(raw, PortRange) else raw
    match = _PORTS.fullmatch(written) if isinstance(written, str) else None
    if match is None:
        raise ValueError(f"expected a range of ports such as 20000-29999, got {shown(raw)}")
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ValueError(f"expected the lower port first, got {shown(raw)}")
    if first < LOWEST_PORT or last > MAX_PORT:
        raise ValueError(f"expected ports from {LOWEST_PORT} to {MAX_PORT}, got {shown(raw)}")
    return PortRange(first, last)


class Ready(Section):
    """When an app process takes clients: an HTTP response where `path` is given, else a TCP or Unix connection."""

    expected: ClassVar[str] = "a path or a mapping of keys"

    path: Annotated[str, text(r"/[\x21\x22\x24-\x7e]*", 'a path that begins with "/", without spaces')] | None = Field(
        default=None, description="The path that is asked for; null: only connect."
    )
    timeout_s: Seconds = in_seconds("60s", "How long an app process may take from its start until it is ready.")
    expect: Annotated[
        tuple[StatusRange, ...],
        Read(
            read_expect,
            {"anyOf": [*_STATUS_FORMS, {"type": "array", "items": {"anyOf": _STATUS_FORMS}, "minItems": 1}]},
        ),
    ] = Field(
        default=(StatusRange(200, 399),),
        json_schema_extra={"default": "200-399"},
        description="The statuses of the response that mean ready.",
    )

    def expects(self, status: int) -> bool:
        """Say whether a response with this status counts as ready."""
        return any(first <= status <= last for first, last in self.expect)

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Take a plain path."""
        return {"path": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        if "expect" in self.model_fields_set and self.path is None:
            refuse([(("expect",), "expect needs path: without it only a connection is made, which has no status")])
        return self


class Stop(Section):
    """How an app process is stopped."""

    signal: Literal["TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL"] = Field(
        default="TERM", description="The signal that its process group gets."
    )
    timeout_s: SecondsOrZero = in_seconds("10s", "What is left of the group after so long is killed.")


def _read_directories(raw: object) -> tuple[Path, ...]:
    return read_items(raw, read_path, "a list of directories")


_pattern = text(r"[^/\x00-\x1f\x7f][^\x00-\x1f\x7f]*", 'a pattern of files such as *.html, not from "/" on')


def _read_patterns(raw: object) -> tuple[str, ...]:
    return read_items(raw, lambda item: str(_pattern.read(item)), "a list of patterns")


class Reload(Section):
    """How the app is deployed anew when its files change, for development."""

    expected: ClassVar[str] = "true, false or a mapping of keys"

    directories: Annotated[
        tuple[Path, ...],
        Read(_read_directories, {"type": "array", "items": {"type": "string", "pattern": f"^(?:{PATH_PATTERN})$"}}),
    ] = Field(
        default=(),
        json_schema_extra={"default": []},
        description="Where its files are, with all that is below; none: the working directory of the app.",
    )
    include: Annotated[tuple[str, ...], Read(_read_patterns, {"type": "array", "items": _pattern.json_schema})] = Field(
        default=(),
        json_schema_extra={"default": []},
        description="Patterns of the files that count beside *.py, such as *.html or templates/*.css.",
    )

    @model_validator(mode="after")
    def _check_package(self) -> Self:
        """Refuse what cannot be done here: a start, a reload or an upgrade says so before anything has changed."""
        if find_spec("watchfiles") is None:
            raise ValueError("to watch files needs the package watchfiles: pip install 'stickyproxy[reload]'")
        return self


def read_pace(raw: object) -> float:
    """Return how many a second `20/s`, or a plain number, means. Raises `ValueError`."""
    number = 0.0
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        number = raw
    elif isinstance(raw, str) and (match := _PACE.fullmatch(raw)):
        number = float(match[1])
    if not LOWEST_PACE <= number <= HIGHEST_PACE:
        raise ValueError(f"expected a pace such as 20/s, from {LOWEST_PACE}/s to {HIGHEST_PACE}/s; got {shown(raw)}")
    return float(number)


def write_pace(pace_per_s: float) -> str:
    """Return a pace as the file writes it, `20/s`; `read_pace` reads it as the same number again."""
    return f"{repr(float(pace_per_s)).removesuffix('.0')}/s"


class Run(Section):
    """The app as processes that the proxy itself starts.

    In `command`, `cwd` and the values of `env`, `{port}`, `{socket}`, `{id}` and `{generation}` are placeholders, and
    `{{` and `}}` literal braces.
    """

    command: Annotated[
        Command,
        Read(
            read_command,
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
        ),
    ] = Field(
        description="What starts one app process: a list of words, or one text that is split as in a shell, but run "
        "without one. It listens on {port} of 127.0.0.1, or on the Unix socket {socket}."
    )
    processes: Annotated[Processes, AlsoWritten({"type": "integer", "minimum": 1, "maximum": MAX_PROCESSES})] = Field(
        default=Processes(min=1, max=1),
        json_schema_extra={"default": 1},
        description="How many app processes there are: a number, or {min: 2, max: 8, sessions_each: 50}.",
    )
    env: Annotated[
        Mapping[str, str], Read(_read_env, {"type": "object", "additionalProperties": {"type": "string"}})
    ] = Field(
        default_factory=lambda: MappingProxyType({}),
        repr=False,  # secrets stand here
        json_schema_extra={"default": {}},
        description="Environment variables of the app processes, over those of the proxy.",
    )
    cwd: Annotated[Path, Read(_read_cwd, {"type": "string", "pattern": f"^(?:{PATH_PATTERN})$"})] | None = Field(
        default=None, description="Their working directory; null: where the proxy was started."
    )
    ports: Annotated[PortRange, Read(read_ports, {"type": "string", "pattern": f"^{_PORTS.pattern}$"})] = Field(
        # Below 32768, where the ephemeral ports of Linux begin: the kernel gives none of these to a connection.
        default=PortRange(20000, 29999),
        json_schema_extra={"default": "20000-29999"},
        description="Where {port} is taken from.",
    )
    ready: Annotated[Ready, AlsoWritten({"type": "string"})] = Field(
        default_factory=Ready, description="When an app process takes clients: a path, or a mapping of keys."
    )
    restart: Literal["always", "on_failure", "never"] = Field(
        default="always",
        description="Whether an app process that ended by itself is started again; on_failure: unless its exit "
        "status was 0.",
    )
    stop: Stop = Field(default_factory=Stop, description="How an app process is stopped.")
    max_memory_bytes: Annotated[int | None, or_word("off", size("1MiB", "1024GiB"))] = Field(
        default=None,
        json_schema_extra={"default": "off"},
        description="The memory of an app process, with its children, beyond which it is replaced through a drain; "
        "or off.",
    )
    max_age_s: SecondsOrOff = in_seconds("off", "The age at which an app process is replaced through a drain; or off.")
    drain_timeout_s: SecondsOrOff = in_seconds(
        "30m", "How long the clients of an app process that is replaced keep it at most; off: until they leave."
    )
    pace_per_s: Annotated[
        float,
        Read(
            read_pace,
            {
                "anyOf": [
                    {"type": "string", "pattern": f"^{_PACE.pattern}$"},
                    {"type": "number", "minimum": LOWEST_PACE, "maximum": HIGHEST_PACE},
                ]
            },
        ),
    ] = Field(
        default=20.0,
        alias="pace",
        json_schema_extra={"default": "20/s"},
        description="How many clients are closed in a second when the drain timeout is over.",
    )
    reload: OrFalse[Reload] = Field(
        default=None,
        json_schema_extra={"default": False},
        description="Whether the app is deployed anew when its files change, for development: true, false or a mapping "
        "of keys.",
    )

    @property
    def uses_port(self) -> bool:
        """Whether `{port}` stands anywhere in it."""
        return self._uses("port")

    @property
    def uses_socket(self) -> bool:
        """Whether `{socket}` stands anywhere in it."""
        return self._uses("socket")

    def find_second_place(self) -> Iterator[Mistake]:
        """Yield a mistake where the second of `{port}` and `{socket}` stands: an app process listens at one place."""
        found = set[str]()
        for path, written in self._texts():
            found |= placeholders(written) & {"port", "socket"}
            if len(found) > 1:
                yield path, "{port} and {socket} together: an app process listens at one of them"
                return

    def find_unwatched(self) -> Iterator[Mistake]:
        """Yield a mistake where the files of the app are to be watched, and nothing says where they are."""
        if self.reload is not None and not self.reload.directories and placeholders(str(self.cwd or "")):
            yield ("reload",), "cwd has placeholders: say in directories where the files of the app are"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if mistakes := [*self.find_second_place(), *self.find_unwatched()]:
            refuse(mistakes)
        return self

    def _uses(self, name: str) -> bool:
        return any(name in placeholders(written) for _, written in self._texts())

    def _texts(self) -> Iterator[tuple[PathInFile, str]]:
        """Give each text that may hold placeholders, with its path."""
        yield from ((("command", position), word) for position, word in enumerate(self.command))
        yield from ((("env", name), value) for name, value in self.env.items())
        if self.cwd is not None:
            yield ("cwd",), str(self.cwd)
