"""The keys of `affinity`: what requests carry, beside the affinity cookie, that says where their client belongs."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stickyproxy.affinity.keys import GoneAnswer, Key, Lesson, Mode, Origin, member_pattern, path_pattern
from stickyproxy.config.errors import Mistake
from stickyproxy.config.explain import read_sections
from stickyproxy.config.fields import (
    Read,
    Seconds,
    Section,
    in_bytes,
    in_seconds,
    read_items,
    read_text,
    refuse,
    size,
    text,
    whole_number,
)
from stickyproxy.config.units import shown

MAX_KEYS = 64  # each is looked for in the requests that it concerns

_FIELD_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}"  # RFC 9110 section 5.1
_PARAMETER = r"[\x21\x22\x24\x25\x27-\x3c\x3e-\x7e]{1,128}"  # printable, without "#", "&" and "="
_COOKIE_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}"  # RFC 6265 section 4.1.1
_MEMBER = r'[^"\\\x00-\x1f]{1,128}'
_ON = r"[\x21-\x7e]{1,256}"  # what can stand in a request target
_WRITABLE = r"[^\r\n\x00]{1,256}"

_name = text(r"[A-Za-z0-9._ -]{1,64}", "1 to 64 letters, digits, dots, spaces, underscores or hyphens")
_header = text(_FIELD_NAME, "the name of a header field")
_given = text(rf"{_FIELD_NAME}(:[ \t]*[\x20-\x7e]+)?", "a header field, as in Content-Type: text/html")
_cookie = text(_COOKIE_NAME, "the name of a cookie")
_member = text(_MEMBER, "the name of a member of a JSON object")


def _read_path(raw: object) -> str:
    template = read_text(raw)
    try:
        path_pattern(template)
    except ValueError as error:
        raise ValueError(f"{error}; got {shown(template)}") from None
    return template


_path = Read(_read_path, {"type": "string", "pattern": r"^/.*\{id\}"})


def _read_pattern(raw: object) -> str:
    written = read_text(raw)
    try:
        groups = re.compile(written.encode()).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {shown(written)}: {error}") from None
    if groups != 1:
        raise ValueError(f"expected one group (...) around the key, got {groups} in {shown(written)}")
    return written


_pattern = Read(_read_pattern, {"type": "string", "format": "regex"})


def _one_or_more(item: Read) -> Read:
    """Mark a list of texts that one of them may stand for."""

    def read(raw: object) -> object:
        return read_items([raw] if isinstance(raw, str) else raw, item.read, "a text or a list of texts")

    return Read(read, {"anyOf": [item.json_schema, {"type": "array", "items": item.json_schema}]})


_Headers = Annotated[tuple[str, ...], _one_or_more(_header)]
_Queries = Annotated[tuple[str, ...], _one_or_more(text(_PARAMETER, "the name of a query parameter"))]
_Paths = Annotated[tuple[str, ...], _one_or_more(_path)]
_Cookies = Annotated[tuple[str, ...], _one_or_more(_cookie)]
_Members = Annotated[tuple[str, ...], _one_or_more(_member)]
_On = Annotated[
    tuple[str, ...],
    _one_or_more(text(_ON, "a text of 1 to 256 characters that the request target contains, such as /api/")),
]


class KeyLesson(Section):
    """Where a key that the app makes can be learned from."""

    header: Annotated[str, _header] | None = Field(default=None, description="A header field of the response.")
    cookie: Annotated[str, _cookie] | None = Field(default=None, description="A cookie that the response sets.")
    place: Literal["response", "request", "upstream_messages", "client_messages"] | None = Field(
        default=None,
        alias="in",
        description="The first 4 KiB of the body of the response or of the request, or of the first WebSocket messages "
        "of the upstream or of the client.",
    )
    json_member: Annotated[str, _member] | None = Field(
        default=None, alias="json", description="The member of a JSON object there, at any depth, that holds the key."
    )
    pattern: Annotated[str, _pattern] | None = Field(
        default=None, description="A regular expression that finds the key there, with one group around it."
    )
    on: _On = Field(default=(), description="Only exchanges whose target contains this text, or one of these.")
    given: Annotated[str, _given] | None = Field(
        default=None, description="Only responses that have this header field, with a value that begins so."
    )
    within_bytes: Annotated[int, size("1B", "1MiB")] = in_bytes("4KiB", "How much of a response is looked through.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(one is not None for one in (self.header, self.cookie, self.place)) != 1:
            refuse([((), "expected one of header, cookie and in")])
        is_found = sum(one is not None for one in (self.json_member, self.pattern))
        if self.place is not None and is_found != 1:
            refuse([(("in",), "in needs either json or pattern, which say what to look for there")])
        if self.place is None and is_found:
            refuse([((), "json and pattern go with in")])
        return self

    def compile(self) -> Lesson:
        """Return the lesson as the data plane needs it."""
        origin: Origin = self.place or ("header" if self.header is not None else "cookie")
        pattern = member_pattern(self.json_member) if self.json_member is not None else (self.pattern or "").encode()
        name, _, contained = (self.given or "").partition(":")
        return Lesson(
            origin,
            self.header or self.cookie or "",
            pattern,
            _encode(self.on),
            (name, contained.strip()) if name else None,
            self.within_bytes,
        )


class Gone(Section):
    """What is answered in place of an upstream that is gone."""

    status: Annotated[int, whole_number(400, 599)] = Field(default=400, description="The status of the answer.")
    content_type: Annotated[str, text(_WRITABLE, "a media type")] = Field(
        default="text/plain; charset=utf-8", description="The media type of its body."
    )
    body: Annotated[str, Read(read_text, {"type": "string"})] = Field(default="", description="Its body.")


class AffinityKey(Section):
    """One key: where requests carry it, who makes it, and where it is learned from."""

    explicit_name: Annotated[str, _name] | None = Field(
        default=None,
        alias="name",
        description="What it is called in logs; keys of one name are one. null: made from where it stands.",
    )
    mode: Literal["learn", "hash"] = Field(
        description="learn: the app makes it, and the proxy remembers who did; hash: the client makes it."
    )
    header: _Headers = Field(default=(), description="The header fields of requests that carry it.")
    header_pattern: Annotated[str, _pattern] | None = Field(
        default=None, description="What of the field is the key, as the one group of a regular expression; null: all."
    )
    query: _Queries = Field(default=(), description="The query parameters that carry it.")
    path: _Paths = Field(
        default=(), description="The paths that carry it, each with {id} in its place: /session/{id}/."
    )
    cookie: _Cookies = Field(default=(), description="The app's cookies that carry it.")
    member: _Members = Field(
        default=(),
        description="The members of the JSON in bodies of requests that carry it; needs on, for such a body is held "
        "until it has come whole. One of more than 1 MiB is not looked into.",
    )
    on: _On = Field(default=(), description="Only requests whose target contains this text, or one of these.")
    idle_s: Seconds = in_seconds("24h", "How long after its last use it is forgotten.")
    learn: Annotated[tuple[KeyLesson, ...], Field(max_length=16)] = Field(
        default=(), description="Where it is learned from; by default the header or the cookie of the same name."
    )
    gone: Gone | None = Field(
        default=None,
        description="What is answered at once where the upstream that made it is gone; null: the client is placed "
        "anew.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if mistakes := [*self._find_mistakes()]:
            refuse(mistakes)
        return self

    def _find_mistakes(self) -> Iterator[Mistake]:
        if not (self.header or self.query or self.path or self.cookie or self.member):
            yield (), "expected where requests carry it: header, query, path, cookie or member"
        if self.header_pattern is not None and not self.header:
            yield ("header_pattern",), "header_pattern goes with header"
        if self.member and not self.on:
            yield ("member",), "member needs on: the bodies of these requests alone are looked into"
        if self.mode == "hash":
            for name in ("learn", "gone"):
                if getattr(self, name):
                    yield (name,), f"{name} goes with mode: learn; what a client makes is hashed"
        elif not (self.learn or self.header or self.cookie):
            yield ("learn",), "expected where it is learned from, as in [{in: response, json: id, on: /start}]"

    @property
    def name(self) -> str:
        """The name from the file, or one made from where it stands: `query sid`."""
        if self.explicit_name is not None:
            return self.explicit_name
        places = ("header", "query", "path", "cookie", "member")
        return next(f"{place} {getattr(self, place)[0]}" for place in places if getattr(self, place))

    def compile(self) -> Key:
        """Return the key as the data plane needs it."""
        lessons = tuple(one.compile() for one in self.learn)
        mode: Mode = self.mode
        if mode == "learn" and not lessons:
            lessons = (
                *(Lesson("header", name) for name in self.header),
                *(Lesson("cookie", name) for name in self.cookie),
            )
        return Key(
            name=self.name,
            mode=mode,
            headers=tuple((name, (self.header_pattern or "").encode()) for name in self.header),
            queries=self.query,
            paths=tuple(path_pattern(one) for one in self.path),
            cookies=self.cookie,
            members=self.member,
            on=_encode(self.on),
            lessons=lessons,
            idle_s=self.idle_s,
            gone=None if self.gone is None else GoneAnswer(self.gone.status, self.gone.content_type, self.gone.body),
        )


def _encode(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(one.encode() for one in texts)


def read_keys(raw: object) -> object:
    """Return the keys of a list. Raises `ValueError` and `ValidationError`, the latter with all mistakes."""
    if isinstance(raw, list) and len(raw) > MAX_KEYS:
        raise ValueError(f"expected at most {MAX_KEYS} keys, got {len(raw)}")
    return read_sections(raw, AffinityKey, lambda _: ())
