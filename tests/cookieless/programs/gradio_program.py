"""Clients of `gradio_client` itself, without cookies; run by a Python that has it; prints JSON.

Each request of it comes on a new connection. A prediction is two exchanges: the event, and the stream of its result.
"""

import argparse
import os
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from gradio_client import Client  # type: ignore[import-not-found]

from tests.cookieless.outcome import Outcome

TIMEOUT_S = 30.0
PREDICTIONS = 23
LOCK = Lock()


class CookielessClient(Client):  # type: ignore[misc]
    """A client that does not copy the cookies of its first answer, as it does since it was made for sticky sessions."""

    def _get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super()._get_config()
        self.cookies.clear()
        return config


def begin(outcome: Outcome, exchanges: int) -> None:
    """Count them."""
    with LOCK:
        outcome.exchanges += exchanges


def session(url: str, outcome: Outcome, timeout_s: float) -> None:
    """Make a client, and let it count."""
    begin(outcome, 3)  # its configuration, the description of the API, and the heartbeat
    client = CookielessClient(url, verbose=False, ssl_verify=False, analytics_enabled=False)
    try:
        for number in range(1, PREDICTIONS + 1):
            begin(outcome, 2)
            told = str(client.submit(api_name="/count").result(timeout_s))
            counted = re.search(r"(\d+) counted by ([\w-]+)", told)
            if not counted or int(counted[1]) != number:
                outcome.note_wrong(f"prediction {number}: {told[:200]}")
                return
            outcome.served.add(counted[2])
    except Exception as error:  # noqa: BLE001  # of many kinds, none of them documented
        outcome.note_wrong(f"{type(error).__name__}: {error}")
    finally:
        client.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("exchanges", type=int)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="a lost prediction waits for ever")
    options = parser.parse_args()
    outcome = Outcome()

    def go_on(_: int) -> None:
        while outcome.exchanges < options.exchanges:
            with LOCK:
                outcome.sessions += 1
            session(options.url, outcome, options.timeout_s)

    with ThreadPoolExecutor(options.at_once) as threads:
        list(threads.map(go_on, range(options.at_once)))
    print(outcome.dump(), flush=True)
    os._exit(0)  # threads that wait for a stream that broke off would be waited for


main()
