"""WebSocket handshakes, directly and through the proxy: what each end is told by the two heads."""

from __future__ import annotations

import asyncio
import http
from typing import TYPE_CHECKING, Any

import pytest
from websockets.frames import Frame, Opcode

from tests.helpers.websocket_cases import (
    content,
)
from tests.helpers.websocket_matrix import (
    DEADLINE_S,
    Case,
    Conversation,
    Door,
    End,
    differences,
    digest,
    observe,
    receive_all,
)
from tests.helpers.websocket_site import Site, open_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

    from tests.helpers.websocket_matrix import Verdict


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


ADDED_TO_REQUEST = {
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Port",
    "X-Forwarded-Proto",
    "X-Request-ID",
}


@pytest.mark.parametrize(
    ("asked", "supported", "chosen"),
    [
        (["chat"], ["chat"], "chat"),
        (["superchat", "chat"], ["chat", "other"], "chat"),
        (["one", "two", "three"], ["three", "two"], "three"),
        (["token.QUJD=".rstrip("="), "a!#$%&'*+-.^_`|~9"], ["a!#$%&'*+-.^_`|~9"], "a!#$%&'*+-.^_`|~9"),
        (None, ["chat"], None),
        (["chat"], None, None),
    ],
)
async def test_subprotocols(
    site: Site, asked: list[str] | None, supported: list[str] | None, chosen: str | None
) -> None:
    def select(_: ServerConnection, offered: Sequence[str]) -> str | None:
        return next((name for name in supported or [] if name in offered), None)

    options = {"subprotocols": supported, "select_subprotocol": select} if supported else {}
    verdict = await site.same(Case(client_options={"subprotocols": asked}, server_options=options))
    assert verdict["client: subprotocol"] == verdict["server: subprotocol"] == chosen
    if asked:
        assert f"Sec-WebSocket-Protocol: {', '.join(asked)}" in verdict["request: fields"]


async def test_a_subprotocol_that_was_not_asked_for(site: Site) -> None:
    def answer(_: ServerConnection, request: Request, response: Response) -> None:
        response.headers["Sec-WebSocket-Protocol"] = "surprise"

    verdict = await site.same(Case(server_options={"process_response": answer}))
    assert "NegotiationError" in verdict["client: refused"] or "InvalidHeader" in verdict["client: refused"]


async def test_an_accept_that_is_wrong(site: Site) -> None:
    def answer(_: ServerConnection, request: Request, response: Response) -> None:
        del response.headers["Sec-WebSocket-Accept"]
        response.headers["Sec-WebSocket-Accept"] = "AAAAAAAAAAAAAAAAAAAAAAAAAAA="

    verdict = await site.same(Case(server_options={"process_response": answer}))
    assert "Sec-WebSocket-Accept" in verdict["client: refused"]


async def test_the_fields_of_both_heads_arrive_as_they_were_sent(site: Site) -> None:
    def answer(_: ServerConnection, request: Request, response: Response) -> None:
        response.headers["Set-Cookie"] = "session=1; Path=/"
        response.headers["Set-Cookie"] = "other=2; HttpOnly"
        response.headers["X-App"] = 'a, b;c="d"'

    client_fields = [
        ("Origin", "https://example.org"),
        ("Cookie", "session=1; other=2"),
        ("Authorization", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
        ("sec-websocket-extensions", 'x-one; a=1; b="2"'),
        ("SEC-WEBSOCKET-EXTENSIONS", "x-two"),
        ("X-Long", "y" * 6000),
        ("X-Twice", "1"),
        ("X-Twice", "2"),
    ]
    case = Case(
        client_options={"additional_headers": client_fields, "compression": "deflate"},
        server_options={"process_response": answer, "compression": "deflate"},
    )
    direct = await observe(case, site.listening, site.direct)
    proxied = await observe(case, site.listening, site.proxied)
    assert differences(direct, proxied) == {}
    assert {f"{name}: {value}" for name, value in client_fields} < set(proxied["request: fields"])
    assert "Set-Cookie: other=2; HttpOnly" in proxied["response: fields"]
    assert any(line.startswith("Sec-WebSocket-Extensions: permessage-deflate") for line in proxied["request: fields"])
    assert not [line for line in proxied["request: fields"] + proxied["response: fields"] if "lost" in line]
    assert (direct["request: added"], direct["response: added"]) == ([], [])
    assert set(proxied["request: added"]) == ADDED_TO_REQUEST
    assert proxied["response: added"] == ["Set-Cookie"]


@pytest.mark.parametrize(
    "path",
    [
        "/ws?session=a%20b&empty=&q=%C3%A4&x=1&x=2",
        "/_stcore/stream;v=1/%2e%2e/%2F//a/./b/../c?next=http://example.org/?a=b?c",
        "/" + "long/" * 1000 + "?" + "q" * 2000,
    ],
)
async def test_the_target_arrives_as_it_was_sent(site: Site, path: str) -> None:
    verdict = await site.same(Case(path=path))
    assert verdict["request: start"] == f"GET {path} HTTP/1.1"


def refusal(status: int, body: str, *fields: tuple[str, str]) -> Callable[[ServerConnection, Request], Any]:
    def answer(connection: ServerConnection, request: Request) -> Response | None:
        if request.path != "/":
            return None
        response = connection.respond(http.HTTPStatus(status), body)
        for name, value in fields:
            response.headers[name] = value
        return response

    return answer


@pytest.mark.parametrize(
    ("status", "body", "fields"),
    [
        (403, "not you: ä€\n", []),
        (401, "", [("WWW-Authenticate", 'Basic realm="a"'), ("WWW-Authenticate", "Bearer"), ("Set-Cookie", "a=b")]),
        (404, "x" * 100_000, [("X-App", "here")]),
        (503, "later", [("Retry-After", "7")]),
        (426, "13 only", [("Sec-WebSocket-Version", "13")]),
        (500, "", []),
        (200, "no WebSocket here", []),
    ],
)
async def test_a_refused_handshake(site: Site, status: int, body: str, fields: list[tuple[str, str]]) -> None:
    verdict = await site.same(Case(server_options={"process_request": refusal(status, body, *fields)}))
    assert verdict["client: status"] == (status, http.HTTPStatus(status).phrase)
    assert verdict["client: body"] == body.encode()
    assert {f"{name}: {value}" for name, value in fields} <= set(verdict["response: fields"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed(site: Site, status: int) -> None:
    answer = refusal(status, "elsewhere", ("Location", "/there?a=1"))
    verdict = await site.same(Case(server_options={"process_request": answer}))
    assert verdict["request: start"] == "GET /there?a=1 HTTP/1.1"
    assert verdict["client: close code"] == 1000


async def test_a_server_that_fails_in_the_handshake(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    def answer(_: ServerConnection, request: Request) -> None:
        raise LookupError("a fault of the app")

    verdict = await site.same(Case(server_options={"process_request": answer}))
    assert verdict["client: status"] == (500, "Internal Server Error")


async def answer_late(site: Site, door: Door) -> Verdict:
    """Return the verdict of a client whose handshake is answered after 20 others have come and gone."""
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def answer(_: ServerConnection, request: Request) -> None:
        if request.path == "/late":
            asked.set()
            await may_answer.wait()

    async def say(end: End) -> None:
        await end.send("hello")
        await end.receive()

    conversation = Conversation(Case(say, server_options={"process_request": answer}), site.listening, door)
    async with asyncio.timeout(DEADLINE_S), conversation.serving, asyncio.TaskGroup() as group:
        late = group.create_task(conversation.open("/late"))
        await asked.wait()
        for number in range(20):
            verdict = await conversation.open(f"/{number}")
            assert verdict["client: close code"] == 1000
        assert not late.done()
        may_answer.set()
    return late.result()


async def test_an_upgrade_that_is_answered_late(site: Site) -> None:
    direct, proxied = await answer_late(site, site.direct), await answer_late(site, site.proxied)
    assert differences(direct, proxied) == {}
    assert direct["client: messages"] == [f"text 5 {digest(b'hello')}"]
    assert direct["request: start"] == "GET /late HTTP/1.1"


async def test_frames_in_one_piece_with_the_end_of_the_handshake(site: Site) -> None:
    def serial(payload: bytes, *, mask: bool) -> bytes:
        return Frame(Opcode.BINARY, payload).serialize(mask=mask)

    async def server(end: End) -> None:
        for _ in range(3):
            await end.receive()
        await end.connection.close(4000)

    case = Case(
        receive_all,
        server,
        client_tail=serial(b"first", mask=True) + serial(content(200), mask=True) + serial(b"", mask=True),
        server_tail=serial(b"with the 101", mask=False) + serial(content(60000), mask=False),
    )
    verdict = await site.same(case)
    assert [one.split()[1] for one in verdict["server: messages"]] == ["5", "200", "0"]
    assert [one.split()[1] for one in verdict["client: messages"]] == ["12", "60000"]


async def test_data_straight_after_the_101(site: Site) -> None:
    async def client(end: End) -> None:
        await end.send(content(100_000))
        await end.receive()

    async def server(end: End) -> None:
        await end.send(content(100_000))
        await end.receive_all()

    verdict = await site.same(Case(client, server))
    assert verdict["client: messages"] == verdict["server: messages"]
    assert len(verdict["client: messages"]) == 1
