"""A body on its way: read by one framing, written in another."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickyproxy.proxy.relay import Relay
from stickyproxy.proxy.settings import Settings
from stickyproxy.wire.body import BodyError
from stickyproxy.wire.head import CHUNKED, UNTIL_CLOSE

SETTINGS = Settings(trailers_bytes=100, chunk_extensions_bytes=10)


def test_a_length_is_counted_and_what_follows_is_excess() -> None:
    relay = Relay(5, SETTINGS, is_chunked=False)
    assert relay.feed(b"hel") == b"hel"
    assert not relay.is_done
    assert relay.feed(b"lo, world") == b"lo"
    assert relay.is_done
    assert (relay.excess, relay.relayed_bytes) == (b", world", 5)


def test_chunks_are_framed_anew() -> None:
    relay = Relay(CHUNKED, SETTINGS, is_chunked=True)
    assert relay.feed(b"0003;a=b\r\nabc\r\n2\r\nde\r\n") == b"5\r\nabcde\r\n"
    assert relay.feed(b"1") == b""
    assert relay.feed(b"\r\nf\r\n0\r\nX-Sum: 1\r\n\r\nnext") == b"1\r\nf\r\n0\r\nX-Sum: 1\r\n\r\n"
    assert relay.is_done
    assert (relay.excess, relay.relayed_bytes) == (b"next", 6)


def test_chunks_become_plain_octets() -> None:
    relay = Relay(CHUNKED, SETTINGS, is_chunked=False)
    assert relay.feed(b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n") == b"abc"
    assert relay.is_done
    assert relay.end() == b""


def test_a_body_until_close_becomes_chunks_with_an_end() -> None:
    relay = Relay(UNTIL_CLOSE, SETTINGS, is_chunked=True)
    assert relay.feed(b"abc") == b"3\r\nabc\r\n"
    assert not relay.is_done
    assert relay.end() == b"0\r\n\r\n"
    assert relay.excess == b""


@pytest.mark.parametrize(
    "broken", [b"x\r\n", b"1;" + b"a" * 50 + b"\r\n", b"0\r\nX: " + b"a" * 200 + b"\r\n\r\n", b"1\r\nab"]
)
def test_broken_framing_is_an_error(broken: bytes) -> None:
    with pytest.raises(BodyError):
        Relay(CHUNKED, SETTINGS, is_chunked=True).feed(broken)


@given(payload=st.binary(max_size=300), cuts=st.lists(st.integers(0, 400), max_size=8), step=st.integers(1, 50))
def test_any_cut_gives_the_same_payload(payload: bytes, cuts: list[int], step: int) -> None:
    parts = [payload[at : at + step] for at in range(0, len(payload), step)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    relay, again = Relay(CHUNKED, SETTINGS, is_chunked=True), Relay(CHUNKED, SETTINGS, is_chunked=False)
    got, bounds = b"", sorted({0, len(framed), *(min(cut, len(framed)) for cut in cuts)})
    for begin, end in itertools.pairwise(bounds):
        got += again.feed(relay.feed(framed[begin:end]))
    assert got == payload
    assert relay.is_done
    assert again.is_done
    assert relay.relayed_bytes == again.relayed_bytes == len(payload)


# Who hears the payload


@pytest.mark.parametrize("is_chunked", [True, False])
def test_the_payload_is_heard_before_it_is_passed_on_until_that_is_enough(*, is_chunked: bool) -> None:
    relay = Relay(CHUNKED, SETTINGS, is_chunked=is_chunked)
    heard: list[bytes] = []

    def hear(payload: bytes) -> bool:
        heard.append(payload)
        return len(heard) < 2

    relay.hear = hear
    passed = relay.feed(b"3\r\nabc\r\n") + relay.feed(b"1") + relay.feed(b"\r\nd\r\n1\r\ne\r\n")
    assert heard == [b"abc", b"de"], "without the framing, and not where there is none"
    assert relay.hear is None
    passed += relay.feed(b"1\r\nf\r\n0\r\n\r\n")
    assert heard == [b"abc", b"de"]
    assert passed == (b"3\r\nabc\r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\n" if is_chunked else b"abcdef")
