"""The sections `timeouts` and `limits`: how long the proxy waits, and how much it takes."""

from typing import Annotated

from pydantic import Field

from stickyproxy.config.fields import (
    Seconds,
    SecondsOrOff,
    SecondsOrZero,
    Section,
    in_bytes,
    in_seconds,
    or_word,
    size,
    whole_number,
)


class Timeouts(Section):
    """How long the proxy waits; `off`, where a timeout allows it, waits without end."""

    tls_handshake_s: Seconds = in_seconds("10s", "For the TLS handshake and the PROXY protocol header of a client.")
    head_s: Seconds = in_seconds("10s", "For the whole head of a request, from its first byte.")
    body_idle_s: SecondsOrOff = in_seconds("60s", "For the next bytes of a request's body; or off.")
    keep_alive_s: SecondsOrZero = in_seconds("75s", "For the next request on a connection of a client.")
    send_s: SecondsOrOff = in_seconds("60s", "For a client to take anything of what is sent to it; or off.")
    connect_s: Seconds = in_seconds("5s", "For a connection to an upstream.")
    response_s: SecondsOrOff = in_seconds("300s", "For the head of an upstream's response; or off.")
    response_idle_s: SecondsOrOff = in_seconds(
        "300s",
        "For the next bytes of a response's body; or off. Event streams (text/event-stream) may be silent for ever.",
    )
    websocket_handshake_s: Seconds = in_seconds("60s", "For the upstream's answer to a WebSocket handshake.")
    upstream_keep_alive_s: SecondsOrZero = in_seconds(
        "4s", "How long an idle connection to an upstream is kept. Below the 5s after which uvicorn closes its own."
    )
    tunnel_idle_s: SecondsOrOff = in_seconds(
        "off", "For the next bytes of a tunnel (WebSocket), from either side; or off."
    )
    tunnel_max_age_s: SecondsOrOff = in_seconds(
        "off", "How long a tunnel may live; it is closed then, and its client reconnects; or off."
    )
    tunnel_max_age_jitter_percent: Annotated[int, whole_number(0, 50)] = Field(
        default=10,
        description="By how much of tunnel_max_age the age of each tunnel varies at random, in percent, so that not "
        "all end together.",
    )
    linger_s: SecondsOrZero = in_seconds(
        "2s", "How long what a client still sends is read and dropped after an early response, so that it arrives."
    )


class Limits(Section):
    """How much the proxy takes before it refuses."""

    head_bytes: Annotated[int, size("1KiB", "16MiB")] = in_bytes("128KiB", "The head of a request or a response.")
    line_bytes: Annotated[int, size("256B", "16MiB")] = in_bytes("64KiB", "One line of a head.")
    fields: Annotated[int, whole_number(1, 10_000)] = Field(default=200, description="Header fields in a head.")
    target_bytes: Annotated[int, size("256B", "1MiB")] = in_bytes("16KiB", "The target (path and query) of a request.")
    handshake_bytes: Annotated[int, size("1KiB", "16MiB")] = in_bytes("128KiB", "The head of a WebSocket handshake.")
    body_bytes: Annotated[int | None, or_word("off", size("0B", "1024GiB"))] = Field(
        default=None, json_schema_extra={"default": "off"}, description="The body of a request; off: any length."
    )
    trailers_bytes: Annotated[int, size("0B", "1MiB")] = in_bytes("8KiB", "The trailers of a chunked body.")
    chunk_extensions_bytes: Annotated[int, size("0B", "1MiB")] = in_bytes(
        "4KiB", "The chunk extensions of one chunked body."
    )
    buffer_bytes: Annotated[int, size("4KiB", "16MiB")] = in_bytes(
        "64KiB", "What may wait to be written to one connection before the other side is no longer read."
    )
    connections: Annotated[int | None, or_word("auto", whole_number(1, 1_000_000))] = Field(
        default=None,
        json_schema_extra={"default": "auto"},
        description="Open connections of clients, tunnels included; beyond it new ones wait in the kernel's queue. "
        "auto: half of the descriptors that the process may open.",
    )
    connections_per_address: Annotated[int | None, or_word("off", whole_number(1, 1_000_000))] = Field(
        default=None,
        json_schema_extra={"default": "off"},
        description="Open connections from one client address, trusted proxies apart; beyond it 503; off: any number.",
    )
    upstream_idle_connections: Annotated[int, whole_number(0, 65_536)] = Field(
        default=256, description="Idle connections kept to each upstream."
    )
