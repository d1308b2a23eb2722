"""Bytes to facts and facts to bytes, without any I/O: heads, header fields, bodies, cookies, WebSocket frames."""
