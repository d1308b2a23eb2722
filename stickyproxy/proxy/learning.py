"""What an exchange teaches: keys that the app makes, read off what passes, which is never held back or changed for it.

Only exchanges whose target a key names come here. A key is learned before the bytes that tell it are passed on, so that
it is known when the client's next request comes, to whichever worker.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.affinity.keys import MAX_KEY_BYTES, SAMPLE_BYTES
from stickyproxy.proxy.side import Watch
from stickyproxy.wire.body_sample import BodySample
from stickyproxy.wire.headers import find_field, find_fields
from stickyproxy.wire.message_sample import MessageSample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stickyproxy.affinity.keys import Key, Lesson, Lessons, Origin
    from stickyproxy.proxy.side import Side
    from stickyproxy.proxy.tunnel import Tunnel
    from stickyproxy.wire.response_head import ResponseHead

    Learn = Callable[[Key, bytes], None]

_MAX_MATCHES: Final = 16  # of one pattern in one sample; Jupyter tells two ids at once
_OVERLAP_BYTES: Final = SAMPLE_BYTES  # a match may begin so long before what is new
_FAILED: Final = 400  # the status from which on nothing is learned: what a refusal names is gone again


@lru_cache(maxsize=1024)
def _compile(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


class _Listener:
    """Looks for the keys of some lessons in a text that grows."""

    __slots__ = ("_learn", "_lessons", "_searched", "_silent")

    def __init__(self, lessons: Iterable[tuple[Key, Lesson]], learn: Learn) -> None:
        self._lessons = [(key, _compile(lesson.pattern)) for key, lesson in lessons]
        self._learn = learn
        self._searched = 0
        self._silent = set(range(len(self._lessons)))  # those of which nothing was found

    @property
    def is_content(self) -> bool:
        """Say whether each lesson has told a key."""
        return not self._silent

    def hear(self, text: bytes | bytearray, *, is_open: bool = False) -> None:
        """Look through a text, of which the beginning may have been heard before.

        `is_open` says that more of it is to come: then a key that ends with it may be cut off, and is not learned yet.
        """
        start, self._searched = max(0, self._searched - _OVERLAP_BYTES), len(text)
        for at, (key, pattern) in enumerate(self._lessons):
            for count, match in enumerate(pattern.finditer(text, start)):
                if count == _MAX_MATCHES:
                    break
                if match[1] and not (is_open and match.end(1) == len(text)):
                    self._silent.discard(at)
                    self._learn(key, bytes(match[1]))

    def begin_another(self) -> None:
        """Go on with a text of which nothing has been heard."""
        self._searched = 0


class Learning:
    """What one exchange may teach. `learn` takes each key that was found, with its value."""

    __slots__ = ("_learn", "_lessons", "_request", "_response")

    def __init__(self, lessons: Lessons, learn: Learn) -> None:
        self._lessons = lessons
        self._learn = learn
        self._request: tuple[_Listener, BodySample] | None = None
        self._response: tuple[_Listener, BodySample] | None = None

    def _those_in(self, origin: Origin) -> list[tuple[Key, Lesson]]:
        return [(key, lesson) for key, lesson in self._lessons.pairs if lesson.origin == origin]

    def begin_request(self) -> bool:
        """Say whether the body of the request is to be heard."""
        lessons = self._those_in("request")
        if lessons:
            self._request = _Listener(lessons, self._learn), BodySample(b"", SAMPLE_BYTES)
        return bool(lessons)

    def hear_request(self, payload: bytes) -> bool:
        """Hear what comes of the request's body; say whether more of it is wanted."""
        return _feed(self._request, payload)

    def hear_head(self, head: ResponseHead) -> bool:
        """Hear the head of the response; say whether its body is to be heard too."""
        if head.status >= _FAILED or not self._lessons.concern(head.section):
            return False
        wanted = []
        for key, lesson in self._lessons.pairs:
            if lesson.origin in {"header", "cookie"}:
                self._hear_fields(key, lesson, head)
            elif lesson.origin == "response" and _has(head, lesson.given):
                wanted.append((key, lesson))
        if not wanted:
            return False
        encoding = find_field(head.section, b"content-encoding")
        limit = max(lesson.within_bytes for _, lesson in wanted)
        self._response = _Listener(wanted, self._learn), BodySample(encoding, limit)
        return True

    def _hear_fields(self, key: Key, lesson: Lesson, head: ResponseHead) -> None:
        if lesson.origin == "header":
            values = [find_field(head.section, lesson.name.lower().encode())]
        else:
            start = lesson.name.encode() + b"="
            fields = find_fields(head.section, b"set-cookie")
            values = [one[len(start) :].partition(b";")[0].strip(b' \t"') for one in fields if one.startswith(start)]
        for value in values:
            if 0 < len(value) <= MAX_KEY_BYTES:
                self._learn(key, value)

    def hear_response(self, payload: bytes) -> bool:
        """Hear what comes of the response's body; say whether more of it is wanted."""
        return _feed(self._response, payload)

    def overhear(self, tunnel: Tunnel, learn: Learn) -> None:
        """Hear the first messages of a tunnel that has just been opened, until its keys are found in them."""
        sides: tuple[tuple[Side, Origin, bool], ...] = (
            (tunnel.client, "client_messages", True),
            (tunnel.upstream, "upstream_messages", False),
        )
        for side, origin, is_masked in sides:
            lessons = self._those_in(origin)
            if lessons:
                sample = MessageSample(is_masked=is_masked, limit=SAMPLE_BYTES)
                side.transport.set_protocol(Overhearing(side, _Listener(lessons, learn), sample))


def _feed(heard: tuple[_Listener, BodySample] | None, payload: bytes) -> bool:
    if heard is None:
        return False
    listener, sample = heard
    text = sample.feed(payload)
    if text is not None:
        listener.hear(text)
    return not sample.is_done


def _has(head: ResponseHead, given: tuple[str, str] | None) -> bool:
    """Say whether a response has a field, and with a value that begins so."""
    if given is None:
        return True
    value = find_field(head.section, given[0].lower().encode())
    return value != b"" and value.lower().startswith(given[1].encode().lower())


class Overhearing(Watch):
    """Stands before a side of a tunnel until its first messages have come, and hears them before they are passed on."""

    def __init__(self, side: Side, listener: _Listener, sample: MessageSample) -> None:
        super().__init__(side)
        self._listener = listener
        self._sample = sample

    @override
    def data_received(self, data: bytes) -> None:
        sample, listener = self._sample, self._listener
        was_open = sample.is_open
        messages = sample.feed(data)
        for at, message in enumerate(messages, start=1):
            if at > 1 or not was_open:
                listener.begin_another()
            listener.hear(message, is_open=sample.is_open and at == len(messages))
        if sample.is_done or listener.is_content:
            self._side.transport.set_protocol(self._side)
        self._side.data_received(data)
