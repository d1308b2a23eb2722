"""Many sessions, several at once."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp

from tests.cookieless.outcome import Outcome, UnexpectedAnswerError, WrongProcessError

AT_ONCE: Final = 8
SESSION_TIMEOUT_S: Final = 60.0


async def drive(exchanges: int, session: Callable[[Outcome], Awaitable[None]], at_once: int = AT_ONCE) -> Outcome:
    """Run one session after the other, `at_once` at a time, until so many exchanges were begun.

    A session ends at the first exchange that goes wrong. Whoever begins an exchange counts it.
    """
    outcome = Outcome()

    async def go_on() -> None:
        while outcome.exchanges < exchanges:
            outcome.sessions += 1
            before = outcome.exchanges
            try:
                async with asyncio.timeout(SESSION_TIMEOUT_S):
                    await session(outcome)
            except WrongProcessError as error:
                outcome.note_wrong(str(error))
            except (UnexpectedAnswerError, aiohttp.ClientError, OSError, TimeoutError) as error:
                outcome.note_failed(f"{type(error).__name__}: {error}")
            assert outcome.exchanges > before, "a session without an exchange would be repeated for ever"

    await asyncio.gather(*(go_on() for _ in range(at_once)))
    return outcome
