"""What the tests of request heads and of response heads share: limits, bytes to try, and what no section may hold."""

from __future__ import annotations

from hypothesis import strategies as st

from stickyproxy.wire.head import HeadLimits

LIMITS = HeadLimits()
BOTH = "both Content-Length and Transfer-Encoding"
SEVERAL = "several Content-Length fields"
BAD_LENGTH = "an invalid Content-Length"
PARTS = st.sampled_from(
    [
        b"GET", b"POST", b"CONNECT", b"OPTIONS", b" ", b"  ", b"/", b"*", b"/x?y", b"http://b.example/z", b"HTTP/1.1",
        b"HTTP/1.0", b"HTTP/2.0", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b": ", b":", b"Host", b"host: a", b"Cookie: c=d",
        b"Content-Length", b"content-length: 5", b"Transfer-Encoding: chunked", b"chunked", b"Connection: ", b"close",
        b"keep-alive", b"Upgrade: websocket", b"upgrade, host", b"X: y", b"X_Y: z", b"\0", b"\t", b"\xff", b",", b"0",
        b"Via: 1.1 x", b"X-Forwarded-For: 1.2.3.4", b"Expect: 100-continue", b"HTTP/1.1 200 OK", b"204", b"HTTP/1.0 1",
    ]
)  # fmt: skip
ANY_BYTES = st.one_of(st.binary(max_size=60), st.lists(PARTS, max_size=25).map(b"".join))


def check_section(section: list[bytes]) -> None:
    for line in b"".join(section).split(b"\r\n")[:-1]:
        name, separator, value = line.partition(b": ")
        assert name
        assert separator
        assert not set(name) & set(b" \t\r\n\0:")
        assert not set(value) & set(b"\r\n\0")
