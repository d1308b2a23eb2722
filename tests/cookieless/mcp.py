"""MCP over streamable HTTP: JSON-RPC by POST, with `Mcp-Session-Id`; a stream by GET; and the end by DELETE."""

import json
from typing import Any, Final

from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError
from tests.cookieless.sessions import AT_ONCE, drive
from tests.cookieless.web import Answer, Site

PATH: Final = "/mcp"
CALLS: Final = 45
VERSION: Final = "2025-06-18"
ACCEPT: Final = {"Accept": "application/json, text/event-stream"}
UNKNOWN: Final = {404: "Session not found"}


def result_of(answer: Answer) -> Any:
    """Return the result of a call, which comes as JSON or as the only event of a stream."""
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    message = json.loads(events[-1] if events else answer.body)
    if "result" not in message:
        raise UnexpectedAnswerError(answer.text[:200])
    return message["result"]


def request(number: int, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a request of JSON-RPC."""
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}


async def drive_mcp(base_url: str, exchanges: int = 10_000, at_once: int = AT_ONCE) -> Outcome:
    """Let clients call a tool that counts its calls for each session."""
    async with Site(base_url) as site:

        async def session(outcome: Outcome) -> None:
            client = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
            begun = await site.ask(
                outcome, "POST", PATH, json=request(0, "initialize", client), headers=ACCEPT, unknown={}
            )
            fields = {**ACCEPT, "Mcp-Session-Id": begun.headers["Mcp-Session-Id"], "MCP-Protocol-Version": VERSION}
            told = {"jsonrpc": "2.0", "method": "notifications/initialized"}
            await site.ask(outcome, "POST", PATH, json=told, headers=fields, unknown=UNKNOWN)
            async with site.stream(outcome, "GET", PATH, headers=fields) as stream:
                if stream.status != 200:
                    raise WrongProcessError(f"GET: {stream.status} {(await stream.text())[:200]}")
                for number in range(1, CALLS + 1):
                    called = request(number, "tools/call", {"name": "count", "arguments": {}})
                    answer = await site.ask(outcome, "POST", PATH, json=called, headers=fields, unknown=UNKNOWN)
                    count, _, process = result_of(answer)["content"][0]["text"].partition(" counted by ")
                    outcome.served.add(process)
                    if int(count) != number:
                        raise WrongProcessError(f"call {number} is counted as {count}")
            await site.ask(outcome, "DELETE", PATH, headers=fields, unknown=UNKNOWN)

        return await drive(exchanges, session, at_once)
