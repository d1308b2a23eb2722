r"""The corpus: cases as data in YAML files, read into values and checked on the way.

Bytes are written as text in double quotes, one character for each octet (latin-1), so that `\r`, `\n`, `\x00` and
`\xff` are exactly those. A list stands for parts sent one after the other:

    "text"                          as it is
    {repeat: "text", times: N}      the same many times over
    {await: "text"}                 go on once the other end of the conversation has received this
    {await_upstream: "text"}        go on once an upstream has received this
    end                             an end of file: nothing more is sent, the answer is still read

`<TOKEN>` stands for the value of an affinity cookie that the proxy itself has given, `<AFFINITY>` among the fields of
a response for such a cookie that it sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import yaml

FOLDER: Final = Path(__file__).parent

Await = Literal["await", "await_upstream"]
End = Literal["end"]


@dataclass(frozen=True)
class Step:
    """One step of what is sent: bytes, or something to wait for, or the end of file."""

    kind: Literal["send", "await", "await_upstream", "end"]
    data: bytes = b""


@dataclass(frozen=True)
class Seen:
    """One request as an upstream must see it; None is "whatever".

    `present` are all fields of their names, as whole lines; `aborted` says that it does not come whole.
    """

    line: str
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    body: bytes | None = b""
    trailers: tuple[str, ...] = ()
    aborted: bool = False


@dataclass(frozen=True)
class Answer:
    """How the upstream answers, where not in the usual way: `bytes` once the request's `at` has come."""

    bytes: bytes
    at: Literal["head", "request"] = "request"


@dataclass(frozen=True)
class RequestCase:
    """What a client sends, what it gets for it, and what may reach the upstream.

    `why` is the RFC section or the class of CVEs, and the reason where the RFC leaves a choice. `status` are those of
    all final responses. `incomplete` says that the bytes are no whole request, so that what is sent after them belongs
    to it. `head` are the positions of the responses that answer a HEAD. `tunnel` is sent after 101, and comes back.
    `whole_only` says that the case must not be cut, because its timing is what it shows; `closes_silently` that the
    last response does not announce the end, which the client knows of already.
    """

    name: str
    why: str
    send: tuple[Step, ...]
    status: tuple[int, ...]
    upstream: tuple[Seen, ...]
    stays_open: bool
    interim: tuple[int, ...] = ()
    answer: Answer | None = None
    timeouts: dict[str, float] | None = None
    incomplete: bool = False
    head: tuple[int, ...] = ()
    tunnel: bytes = b""
    trusted: bool = False
    sets_cookie: bool | None = None
    closes_silently: bool = False
    whole_only: bool = False
    theme: str = ""


@dataclass(frozen=True)
class ResponseCase:
    """What an upstream sends, what the client sees of it, and whether the upstream's connection is used again.

    `at` is when it sends: once the head or the whole request has come, on the accept, or on an idle connection that
    has served one exchange; `prior` says that the connection has served one before. `then` is what it does with the
    connection afterwards. `end` is how the client's response ends. `seen` is how often the upstream sees the request.
    """

    name: str
    why: str
    upstream: tuple[Step, ...]
    status: int
    stays_open: bool
    reusable: bool
    request: tuple[Step, ...] = (Step("send", b"GET /case HTTP/1.1\r\nHost: a.example\r\n\r\n"),)
    at: Literal["connect", "head", "request", "idle"] = "request"
    then: Literal["keep", "close", "reset"] = "keep"
    body: bytes | None = None
    interim: tuple[int, ...] = ()
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    trailers: tuple[str, ...] = ()
    end: Literal["clean", "broken"] = "clean"
    seen: int = 1
    prior: bool = False
    head: bool = False
    timeouts: dict[str, float] | None = None
    whole_only: bool = False
    theme: str = ""


def _octets(text: str) -> bytes:
    return text.encode("latin-1")


def _steps(given: Any) -> tuple[Step, ...]:
    steps: list[Step] = []
    for part in given if isinstance(given, list) else [given]:
        if part == "end":
            steps.append(Step("end"))
        elif isinstance(part, str):
            steps.append(Step("send", _octets(part)))
        elif set(part) == {"repeat", "times"}:
            steps.append(Step("send", _octets(part["repeat"]) * part["times"]))
        else:
            (kind, text), = part.items()  # fmt: skip
            assert kind in {"await", "await_upstream"}, part
            steps.append(Step(cast("Await", kind), _octets(text)))
    joined: list[Step] = []
    for step in steps:
        if step.kind == "send" and joined and joined[-1].kind == "send":
            joined[-1] = Step("send", joined[-1].data + step.data)
        else:
            joined.append(step)
    return tuple(joined)


def _many(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, list) else (given,)


def _body(given: Any) -> bytes | None:
    if given is None:
        return None
    return b"".join(step.data for step in _steps(given))


def _seen(given: dict[str, Any]) -> Seen:
    facts = {"body": ""} | given
    facts["body"] = _body(facts["body"])
    facts["line"] = (_body(facts["line"]) or b"").decode("latin-1")
    for name in ("present", "absent", "trailers"):
        facts[name] = _many(facts.get(name, []))
    return Seen(**facts)


def _read_request_case(given: dict[str, Any], theme: str) -> RequestCase:
    facts = dict(given)
    if "refused" in facts:  # the usual end of what is no request: an error, nothing passed on, the connection closed
        facts = {"status": facts.pop("refused"), "upstream": [], "stays_open": False} | facts
    facts.setdefault("status", 200)
    facts.setdefault("stays_open", True)
    for name in ("status", "interim", "head"):
        facts[name] = _many(facts.get(name, []))
    facts["send"] = _steps(facts["send"])
    upstream = facts["upstream"]
    facts["upstream"] = tuple(_seen(one) for one in (upstream if isinstance(upstream, list) else [upstream]))
    if "answer" in facts:
        answer = facts["answer"]
        facts["answer"] = Answer(_octets(answer["bytes"]), answer.get("at", "request"))
    facts["tunnel"] = _octets(facts.get("tunnel", ""))
    return RequestCase(**facts, theme=theme)


def _read_response_case(given: dict[str, Any], theme: str) -> ResponseCase:
    facts = dict(given)
    if "refused" in facts:  # the usual end of what is no response: an error in its place, the connection not reused
        facts = {"status": facts.pop("refused"), "reusable": False, "stays_open": True} | facts
    if facts.get("end") == "broken":
        facts = {"reusable": False, "stays_open": False} | facts
    facts.setdefault("status", 200)
    facts.setdefault("stays_open", True)
    facts.setdefault("reusable", True)
    for name in ("interim", "present", "absent", "trailers"):
        facts[name] = _many(facts.get(name, []))
    facts["upstream"] = _steps(facts["upstream"])
    if "request" in facts:
        facts["request"] = _steps(facts["request"])
    facts["body"] = _body(facts.get("body"))
    return ResponseCase(**facts, theme=theme)


def _load(folder: str) -> list[tuple[str, dict[str, Any]]]:
    cases = []
    for file in sorted((FOLDER / folder).glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="ascii"))
        cases += [(file.stem, one) for one in content]
    return cases


def load_request_cases() -> list[RequestCase]:
    """Read all cases of `requests/`."""
    return [_read_request_case(one, theme) for theme, one in _load("requests")]


def load_response_cases() -> list[ResponseCase]:
    """Read all cases of `responses/`."""
    return [_read_response_case(one, theme) for theme, one in _load("responses")]


def name_of(case: RequestCase | ResponseCase) -> str:
    """Return the test id of a case."""
    return f"{case.theme}: {case.name}"
