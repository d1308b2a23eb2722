"""Shiny for Python as its page speaks it: a WebSocket, which is the session, and HTTP below `session/<id>/`."""

import json
from collections.abc import Callable
from typing import Any, Final

from tests.cookieless.outcome import Outcome, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Site, Socket

ROUNDS: Final = 10
CONTENT: Final = b"hello"
UNKNOWN: Final = {404: "Not Found"}
OUTPUTS: Final = ("route", "uploaded")


async def send(socket: Socket, message: dict[str, Any]) -> None:
    await socket.send(json.dumps(message))


async def wait_for(socket: Socket, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the next message that is the one; drop all others."""
    while True:
        message: dict[str, Any] = json.loads(await socket.receive())
        if is_it(message):
            return message


async def begin(socket: Socket) -> str:
    """Begin the session; return the URL of the app's dynamic route."""
    await wait_for(socket, lambda message: "config" in message)
    hidden = {f".clientdata_output_{name}_hidden": False for name in OUTPUTS}
    await send(socket, {"method": "init", "data": {**hidden, ".clientdata_url_search": ""}})
    message = await wait_for(socket, lambda message: "route" in message.get("values", {}))
    return f"/{message['values']['route']}"


async def upload(site: Site, outcome: Outcome, socket: Socket, number: int) -> None:
    """Upload a file whose size tells it from the others, and wait until the page is told."""
    content = CONTENT + b"!" * number
    file = {"name": "a.txt", "size": len(content), "type": "text/plain"}
    await send(socket, {"method": "uploadInit", "args": [[file]], "tag": 2 * number})
    begun = (await wait_for(socket, lambda message: "response" in message))["response"]["value"]
    await site.ask(outcome, "POST", f"/{begun['uploadUrl']}", data=content, unknown=UNKNOWN)
    await send(socket, {"method": "uploadEnd", "args": [begun["jobId"], "file"], "tag": 2 * number + 1})
    await wait_for(socket, lambda message: message.get("values", {}).get("uploaded") == f"{len(content)} bytes")


async def drive_shiny(base_url: str, exchanges: int = 10_000, at_once: int = AT_ONCE) -> Outcome:
    """Let pages of the tests' Shiny app ask its dynamic route, again and again, and upload."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            async with site.websocket(outcome, "/websocket/") as socket:
                route = await begin(socket)
                for number in range(ROUNDS):
                    await site.ask(outcome, "GET", route, unknown=UNKNOWN)
                    told = (await site.ask(outcome, "GET", route, unknown=UNKNOWN)).json
                    outcome.served.add(told["process"])
                    if told["count"] != 2 * number + 2:
                        raise WrongProcessError(
                            f"request {2 * number + 2} of the session is counted as {told['count']}"
                        )
                    await upload(site, outcome, socket, number)

        return await drive(exchanges, session, at_once)
