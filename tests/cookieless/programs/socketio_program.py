"""Clients of python-socketio itself, without a cookie; run by a Python that has it and aiohttp; prints JSON.

They know whether the app's count goes on, and try once: what is refused is not hidden by another attempt.
"""

import argparse
import asyncio
from contextlib import suppress

import aiohttp
import socketio

from tests.cookieless.outcome import Outcome

TRANSPORTS = {"polling": ["polling"], "upgrade": ["polling", "websocket"], "websocket": ["websocket"]}
TIMEOUT_S = 30
DISCONNECT_TIMEOUT_S = 1
CLICKS = 20


async def session(url: str, transport: str, outcome: Outcome, timeout_s: float) -> None:
    """Connect, click, and disconnect."""
    outcome.sessions += 1
    counts: asyncio.Queue[int | str] = asyncio.Queue()  # a text is the end
    welcomed = asyncio.Event()

    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        client = socketio.AsyncClient(reconnection=False, http_session=http)

        def welcome(process: str) -> None:
            outcome.served.add(process)
            welcomed.set()

        client.on("welcome", welcome)
        client.on("count", counts.put_nowait)
        client.on("disconnect", lambda reason: counts.put_nowait(f"disconnected: {reason}"))
        try:
            outcome.exchanges += 3 if transport != "websocket" else 1
            await client.connect(url, transports=TRANSPORTS[transport], wait_timeout=timeout_s)
            async with asyncio.timeout(timeout_s):
                await welcomed.wait()
                for number in range(1, CLICKS + 1):
                    outcome.exchanges += 2 if client.transport() == "polling" else 1
                    await client.emit("click")
                    if (count := await counts.get()) != number:
                        outcome.note_wrong(f"click {number}: {count}")
                        break
        except (socketio.exceptions.SocketIOError, TimeoutError) as error:
            outcome.note_wrong(f"{type(error).__name__}: {error}")
        finally:
            # By polling it would wait for the end of its last poll.
            with suppress(TimeoutError):
                await asyncio.wait_for(client.disconnect(), DISCONNECT_TIMEOUT_S)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("transport", choices=TRANSPORTS)
    parser.add_argument("exchanges", type=int)
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="a refused connect waits for so long")
    parser.add_argument("--at-once", type=int, default=4)
    options = parser.parse_args()
    outcome = Outcome()

    async def go_on() -> None:
        while outcome.exchanges < options.exchanges:
            await session(options.url, options.transport, outcome, options.timeout_s)

    await asyncio.gather(*(go_on() for _ in range(options.at_once)))
    print(outcome.dump())


asyncio.run(main())
