"""Keys: what a request carries, beside the affinity cookie, that says to which upstream its client belongs.

A key is *learned* where the app makes it (an Engine.IO `sid`, an `Mcp-Session-Id`): what the app sends is looked
through for it, and the upstream that sent it is remembered. It is *hashed* where the client makes it (Gradio's
`session_hash`): then all workers, and all proxies, come to the same upstream without having talked, and remember it
from then on, so that an upstream that is added or drained moves nobody.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal, NamedTuple
from urllib.parse import unquote_to_bytes

from stickyproxy.affinity.token import CLIENT_ID_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stickyproxy.wire.headers import Section
    from stickyproxy.wire.request_head import RequestHead

Mode = Literal["learn", "hash"]
Origin = Literal["header", "cookie", "response", "request", "upstream_messages", "client_messages"]
MAX_KEY_BYTES: Final = 1024  # of one value; the longest in use, tokens of Bokeh aside, have 64
SAMPLE_BYTES: Final = 4096  # of a body or of the first messages of a tunnel, in which a key is looked for
_ID: Final = rb"([^/?#]{1,%d})" % MAX_KEY_BYTES
_PLACEHOLDER: Final = "{id}"


@dataclass(frozen=True, slots=True)
class Lesson:
    """Where the app, or the client itself, tells a key that is learned from there.

    `origin` "header" and "cookie" are fields of the response, by `name`; the others are the bodies of the response and
    of the request, and the first messages of a WebSocket, in which `pattern` (with one group) finds it. Only exchanges
    count whose target contains one of the texts `on`, any where there are none, and only responses that have the field
    `given` with a value that begins so. Of the body of a response the first `within_bytes` are looked through.
    """

    origin: Origin
    name: str = ""
    pattern: bytes = b""
    on: tuple[bytes, ...] = ()
    given: tuple[str, str] | None = None
    within_bytes: int = SAMPLE_BYTES

    @property
    def mark(self) -> bytes | None:
        """Return a text, in lower case, that the head of each response has which tells the key; None where none is."""
        match self.origin:
            case "header":
                return self.name.lower().encode() + b": "
            case "cookie":
                return b"set-cookie: " + self.name.lower().encode() + b"="
            case "response" if self.given is not None:
                return f"{self.given[0]}: {self.given[1]}".lower().encode()
            case _:
                return None

    def concerns(self, target: bytes) -> bool:
        """Say whether an exchange with this target may tell the key."""
        return _names(self.on, target)


@dataclass(frozen=True, slots=True)
class GoneAnswer:
    """What a request gets whose upstream is gone, and with it all that its key stood for."""

    status: int
    content_type: str
    body: str


@dataclass(frozen=True, slots=True)
class Key:
    """One rung of the ladder. `name` tells it, and its values, from others.

    A request carries it in one of the `headers` (a name, and a pattern with one group, or none for the whole value),
    the `queries`, the `paths` (patterns with one group), the `cookies`, or as a member of the JSON of its body
    (`members`). Only requests count whose target contains one of the texts `on`, any where there are none. What was
    learned is forgotten `idle_s` seconds after its last use. Values count within their `scope` only: each app makes its
    own.
    """

    name: str
    mode: Mode
    headers: tuple[tuple[str, bytes], ...] = ()
    queries: tuple[str, ...] = ()
    paths: tuple[bytes, ...] = ()
    cookies: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    on: tuple[bytes, ...] = ()
    lessons: tuple[Lesson, ...] = ()
    idle_s: float = 86400.0
    gone: GoneAnswer | None = None
    scope: str = ""

    def concerns(self, target: bytes) -> bool:
        """Say whether a request with this target may carry the key."""
        return _names(self.on, target)


def _names(texts: tuple[bytes, ...], target: bytes) -> bool:
    """Say whether a target contains one of the texts, or there are none."""
    return not texts or any(text in target for text in texts)


class Found(NamedTuple):
    """A key with the value that was found for it."""

    key: Key
    value: bytes

    @property
    def stored(self) -> bytes:
        """Return what stands for it in the table of keys: values of two keys that are equal are not the same."""
        key = self.key
        return (f"{key.scope}\0{key.name}" if key.scope else key.name).encode() + b"\0" + self.value

    @property
    def client_id(self) -> bytes:
        """Return the id of the client that it stands for: the same for all who see the key."""
        return blake2b(self.stored, digest_size=CLIENT_ID_BYTES, person=b"stickyproxy-key").digest()


def path_pattern(template: str) -> bytes:
    """Return the pattern for a template such as `/session/{id}/upload`, which may stand anywhere in a path.

    The id is one segment, or the part of one; `*` stands for any segment. Raises ValueError where there is not exactly
    one `{id}`, nothing stands before it, or `*` for less than a segment: such patterns would try each cut of a path.
    """
    before, placeholder, after = template.partition(_PLACEHOLDER)
    if not placeholder or _PLACEHOLDER in after or not before.startswith("/") or before == "/":
        raise ValueError("expected a path with one {id} in it, as in /session/{id}/")
    if any("*" in segment and segment != "*" for segment in template.split("/")):
        raise ValueError("expected * in place of a whole segment, as in /call/*/{id}")
    end = _literal(after) if after else rb"(?=[/?]|\Z)"
    # Not in the query: what stands there is the client's to choose.
    return rb"\A[^?]*?" + _literal(before) + _ID + end


def _literal(text: str) -> bytes:
    return re.escape(text.encode()).replace(rb"\*", rb"[^/?#]+")


def member_pattern(name: str) -> bytes:
    """Return the pattern for the text of a member of a JSON object, at any depth."""
    return rb'"%b"[ \t\r\n]*:[ \t\r\n]*"([^"\\]{1,%d})"' % (re.escape(name.encode()), MAX_KEY_BYTES)


class _Places:
    """Where one key stands in requests, ready to be looked for."""

    __slots__ = ("cookies", "fields", "key", "members", "target")

    def __init__(self, key: Key) -> None:
        self.key = key
        queries = [  # only the first "?" begins a query
            rb"\A[^?]*\?(?:[^&#]*&)*?%b=([^&#]{1,%d})(?![^&#])" % (re.escape(one.encode()), MAX_KEY_BYTES)
            for one in key.queries
        ]
        self.target = [re.compile(one) for one in (*queries, *key.paths)]
        self.fields = [
            (re.compile(rb"(?i:(?:\A|\n)%b): ([^\r]*)" % re.escape(name.encode())), re.compile(pattern or rb"\A(.+)\Z"))
            for name, pattern in key.headers
        ]
        self.cookies = [
            re.compile(rb"(?:;|\A)[ \t]*%b=([^;]{1,%d})(?![^;])" % (re.escape(one.encode()), MAX_KEY_BYTES))
            for one in key.cookies
        ]
        self.members = [re.compile(member_pattern(one)) for one in key.members]

    def in_target(self, target: bytes) -> bytes | None:
        for pattern in self.target:
            match = pattern.search(target)
            if match is not None:
                return unquote_to_bytes(match[1]) if b"%" in match[1] else match[1]
        return None

    def in_section(self, head: RequestHead) -> bytes | None:
        """Look in the fields and the cookies, which are the same for all heads with this section."""
        for at in head.cookies or ():
            line = head.section[at]
            for pattern in self.cookies:
                match = pattern.search(line[line.find(b":") + 2 : -2])
                if match is not None:
                    return bytes(match[1].strip(b' \t"'))  # as in Set-Cookie
        for field, pattern in self.fields:
            for part in head.section:
                written = field.search(part)
                match = None if written is None else pattern.search(written[1])
                if match is not None and match[1] and len(match[1]) <= MAX_KEY_BYTES:
                    return bytes(match[1])
        return None

    def in_body(self, body: bytes | bytearray) -> bytes | None:
        """Look for the last one: what stands before may be the user's data."""
        for pattern in self.members:
            found = pattern.findall(body)
            if found:
                return bytes(found[-1])
        return None


class Lessons:
    """What an exchange may teach; `marks` are texts, in lower case, of which its response's head has one if it does.

    Without `marks` any response may.
    """

    __slots__ = ("marks", "pairs")

    def __init__(self, pairs: Iterable[tuple[Key, Lesson]]) -> None:
        self.pairs = tuple(pairs)
        marks = [lesson.mark for _, lesson in self.pairs]
        self.marks = None if None in marks else tuple(dict.fromkeys(one for one in marks if one is not None))

    def concern(self, section: Section) -> bool:
        """Say whether a response with this header section may teach something; cheap, for most cannot."""
        if self.marks is None:
            return True
        for part in section:
            lower = part.lower()
            for mark in self.marks:
                if mark in lower:
                    return True
        return False


class KeyReader:
    """Finds the keys of one cluster in requests; the order of the keys is that of the ladder, learned ones first.

    Most requests are none that a key names in `on`: they cost one look at the target, and one at the response's head
    where a key may be learned from any (`python -m tests.bench http --targets stickyproxy,stickyproxy-keys`).
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        learned = [one for one in keys if one.mode == "learn"]
        self.keys = (*learned, *(one for one in keys if one.mode == "hash"))
        self._places = [_Places(one) for one in self.keys]
        self._lessons = [(key, lesson) for key in learned for lesson in key.lessons]
        anywhere = Lessons((key, lesson) for key, lesson in self._lessons if not lesson.on)
        self._anywhere = anywhere if anywhere.pairs else None
        texts = {text for one in self.keys for text in one.on} | {text for _, one in self._lessons for text in one.on}
        self._on = re.compile(b"|".join(re.escape(one) for one in sorted(texts))) if texts else None
        self._has_plain_targets = any(one.target and not one.key.on for one in self._places)
        self._reads_section = any(one.fields or one.cookies for one in self._places)
        self._in_body = [one for one in self._places if one.members]

    def _is_named(self, target: bytes) -> bool:
        """Say whether any key or lesson names this target."""
        return self._on is not None and self._on.search(target) is not None

    def read(self, head: RequestHead) -> list[Found]:
        """Return the keys that a request carries in its head, the first rung first; none is longer than it may be."""
        target = head.target
        found: list[Found] = []
        of_section = self._read_section(head) if self._reads_section else None
        if of_section is None and not self._has_plain_targets and not self._is_named(target):
            return found
        for at, places in enumerate(self._places):
            key = places.key
            if not key.concerns(target):
                continue
            value = places.in_target(target) if places.target else None
            if value is None and of_section is not None:
                value = of_section[at]
            if value:
                found.append(Found(key, value))
        return found

    def _read_section(self, head: RequestHead) -> tuple[bytes | None, ...] | None:
        """Return what the fields say for each key, None where nothing; heads that repeat a section are read once."""
        known = head.key_fields
        if known is None or known[0] is not self:
            values = tuple(one.in_section(head) if one.fields or one.cookies else None for one in self._places)
            known = head.key_fields = (self, values if any(values) else None)
        return known[1]

    def reads_body(self, target: bytes, *, is_pinned: bool) -> bool:
        """Say whether the body of a request may carry a key that counts; for who is pinned, a learned one only."""
        return any(one.key.concerns(target) and (not is_pinned or one.key.mode == "learn") for one in self._in_body)

    def read_body(self, target: bytes, body: bytes | bytearray) -> list[Found]:
        """Return the keys that a body carries, as `read` does."""
        found = ((one.key, one.in_body(body)) for one in self._in_body if one.key.concerns(target))
        return [Found(key, value) for key, value in found if value is not None]

    def lessons(self, target: bytes) -> Lessons | None:
        """Return what an exchange with this target may teach, None where nothing."""
        if not self._is_named(target):
            return self._anywhere
        lessons = Lessons((key, lesson) for key, lesson in self._lessons if lesson.concerns(target))
        return lessons if lessons.pairs else None
