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
    status: int
    method: bytes = b""
    target: bytes = b""
    host: bytes = b""
    upstream: str = ""
    affinity: str = ""
    attempts: int = 0
    duration_s: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    referer: bytes = b""
    user_agent: bytes = b""
    error: str = ""
    close_code: int = 0
    initiator: str = ""
    cause: str = ""
