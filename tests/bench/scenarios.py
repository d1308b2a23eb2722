"""What is measured: each scenario is a kind of load, a number of connections and the figure to compare by."""

from dataclasses import dataclass, replace
from enum import Enum, auto


class Load(Enum):
    """Who makes the load: wrk over HTTP, WebSockets that send echoes, or WebSockets that only stay open."""

    HTTP = auto()
    ECHO = auto()
    HOLD = auto()


@dataclass(frozen=True)
class Scenario:
    """One row of the comparison. `size_bytes` is a response body or the payload of a WebSocket message."""

    name: str
    title: str
    load: Load
    connections: int
    size_bytes: int
    is_close: bool = False
    is_tls: bool = False  # towards the proxy; behind it, all is plain

    @property
    def is_websocket(self) -> bool:
        return self.load is not Load.HTTP

    @property
    def path(self) -> str:
        """Return what is asked for; the file behind an HTTP path is as long as its name says."""
        return "/ws" if self.is_websocket else f"/{self.size_bytes}"

    @property
    def figure(self) -> str:
        """Return the field of a `Sample` that the targets are compared by; less is better."""
        return "kib" if self.load is Load.HOLD else "cpu_us"

    @property
    def unit(self) -> str:
        if self.load is Load.HOLD:
            return "KiB/connection"
        return "us CPU/echo" if self.load is Load.ECHO else "us CPU/request"


# 64 connections keep the proxy busy without a pause; 3000 idle ones make what one costs stand out of the process's own
# memory; the others are what a browser or a file download looks like.
_PLAIN = {
    scenario.name: scenario
    for scenario in (
        Scenario("http", "GET of 1 KiB on 64 connections", Load.HTTP, 64, 1024),
        Scenario("single", "GET of 1 KiB on one connection: latency", Load.HTTP, 1, 1024),
        Scenario("close", "GET of 1 KiB, a new connection for each, 16 at a time", Load.HTTP, 16, 1024, is_close=True),
        Scenario("body", "GET of 10 MiB on 4 connections", Load.HTTP, 4, 10 * 2**20),
        Scenario("ws", "echoes of 64 bytes on 32 WebSockets", Load.ECHO, 32, 64),
        Scenario("ws1k", "echoes of 1 KiB on 32 WebSockets", Load.ECHO, 32, 1024),
        Scenario("ws64k", "echoes of 64 KiB on 16 WebSockets", Load.ECHO, 16, 65536),
        Scenario("idle", "memory of 3000 idle WebSockets", Load.HOLD, 3000, 64),
    )
}
# With `close-tls` nearly every handshake resumes a session: wrk keeps the tickets that a target gives it.
_OVER_TLS = ("http", "single", "close", "ws", "idle")
SCENARIOS = {
    **_PLAIN,
    **{
        f"{name}-tls": replace(
            _PLAIN[name], name=f"{name}-tls", title=f"{_PLAIN[name].title}, over TLS 1.3", is_tls=True
        )
        for name in _OVER_TLS
    },
}
