"""A sticky-session reverse proxy: HTTP and WebSocket, each client pinned to one upstream process."""

__version__ = "0.1.0"
