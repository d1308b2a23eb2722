"""Clients of the package `mcp` itself over streamable HTTP, without cookies; run by a Python that has it."""

import argparse
from collections.abc import Iterator

import anyio
import httpx  # type: ignore[import-not-found]
from mcp import ClientSession, McpError  # type: ignore[import-not-found]
from mcp.client.streamable_http import streamable_http_client  # type: ignore[import-not-found]

from tests.cookieless.outcome import Outcome

TIMEOUT_S = 30
CALLS = 40


class NoCookies(httpx.Cookies):  # type: ignore[misc]
    """A jar that stays empty."""

    def extract_cookies(self, response: httpx.Response) -> None:
        """Take nothing."""


def make_client() -> httpx.AsyncClient:
    """Make the HTTP client of a session."""
    client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)
    client._cookies = NoCookies()  # there is no option for this
    return client


def leaves(error: BaseException) -> Iterator[str]:
    """Give the text of each error of a group, groups within it too."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield f"{type(error).__name__}: {error}"


async def session(url: str, outcome: Outcome) -> None:
    """Call the tool that counts."""
    outcome.sessions += 1
    outcome.exchanges += 3  # initialize, the notification, and the stream
    try:
        with anyio.fail_after(TIMEOUT_S):
            async with (
                make_client() as http,
                streamable_http_client(f"{url}/mcp", http_client=http) as (reading, writing, _),
                ClientSession(reading, writing) as client,
            ):
                await client.initialize()
                for number in range(1, CALLS + 1):
                    outcome.exchanges += 1
                    told = (await client.call_tool("count", {})).content[0].text
                    count, _, process = told.partition(" counted by ")
                    if count != str(number):
                        outcome.note_wrong(f"call {number}: {told}")
                        return
                    outcome.served.add(process)
    except* (McpError, httpx.HTTPError, TimeoutError) as errors:
        outcome.note_wrong("; ".join(leaves(errors)))


async def run(url: str, exchanges: int, at_once: int) -> None:
    outcome = Outcome()

    async def go_on() -> None:
        while outcome.exchanges < exchanges:
            await session(url, outcome)

    async with anyio.create_task_group() as group:
        for _ in range(at_once):
            group.start_soon(go_on)
    print(outcome.dump())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("exchanges", type=int)
    parser.add_argument("--at-once", type=int, default=4)
    options = parser.parse_args()
    anyio.run(run, options.url, options.exchanges, options.at_once)


main()
