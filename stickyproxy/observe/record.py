"""The facts of one finished exchange or tunnel, for the access log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One finished exchange or tunnel. Text is as it came off the wire: the log escapes it.

    `status` is what the client got, 499 where it went away first. Sizes are body or tunnel bytes; durations seconds.
    `close_code`, `initiator` and `cause` are of tunnels only.
    """

    kind: str
    request_id: str
    client: str
    method: bytes
    target: bytes
    host: bytes
    status: int
    upstream: str
    affinity: str
    attempts: int
    duration_s: float
    received_bytes: int
    sent_bytes: int
    referer: bytes = b""
    user_agent: bytes = b""
    error: str = ""
    close_code: int = 0
    initiator: str = ""
    cause: str = ""
