"""The token: opaque, of one length, refused when anything about it is wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.affinity.snapshot import upstream_digest
from stickyproxy.affinity.token import CLIENT_ID_BYTES, Lifetimes, Token, TokenCodec

SECRET = b"s" * 32
NOW = 1_800_000_000
TOKEN = Token(upstream_digest("app-1"), b"0123456789", NOW - 60, NOW)
CODEC = TokenCodec([SECRET])
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

TOKENS = st.builds(
    Token,
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=CLIENT_ID_BYTES, max_size=CLIENT_ID_BYTES),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
END_OF_TIME = 2**32


@settings(deadline=None)
@given(TOKENS, st.binary(min_size=1, max_size=100))
def test_what_is_written_is_read_again(token: Token, secret: bytes) -> None:
    codec = TokenCodec([secret])
    value = codec.write(token)
    assert codec.parse(value, END_OF_TIME) == token
    assert re.fullmatch(rb"v1\.[A-Za-z0-9_-]{56}", value)


def test_a_token_is_the_same_everywhere() -> None:
    """Replicas must agree, whatever version they run: a change of this value would end all pins."""
    assert CODEC.write(TOKEN) == b"v1.fNwL5M8rrSMwMTIzNDU2Nzg5a0nRxGtJ0gAdHIX_SlSkxtSho0xfX-e_"
    assert len(CODEC.write(TOKEN)) == 59


@pytest.mark.parametrize("position", range(59))
def test_any_other_character_anywhere_is_refused(position: int) -> None:
    value = CODEC.write(TOKEN)
    assert CODEC.parse(value, NOW) == TOKEN
    for bit in range(8):
        changed = bytearray(value)
        changed[position] ^= 1 << bit
        assert CODEC.parse(bytes(changed), NOW) is None
    for character in ALPHABET:
        if character != value[position]:
            assert CODEC.parse(value[:position] + bytes((character,)) + value[position + 1 :], NOW) is None


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"v1.", id="the version alone"),
        pytest.param(CODEC.write(TOKEN)[:-1], id="cut"),
        pytest.param(CODEC.write(TOKEN) + b"A", id="longer"),
        pytest.param(CODEC.write(TOKEN) + b"=", id="padded"),
        pytest.param(b"v2." + CODEC.write(TOKEN)[3:], id="another version"),
        pytest.param(CODEC.write(TOKEN)[:57] + b"==", id="padding inside"),
        pytest.param(CODEC.write(TOKEN)[:-2] + b"\r\n", id="a line end inside"),
        pytest.param(CODEC.write(TOKEN)[:-2] + b"  ", id="white space inside"),
        pytest.param(b"v1." + b"\xff" * 56, id="no characters of base64url"),
        pytest.param(b"v1." + b"A" * 56, id="all zeros"),
    ],
)
def test_what_is_no_token_is_refused(value: bytes) -> None:
    assert CODEC.parse(value, NOW) is None


def test_the_other_alphabet_of_base64_is_refused() -> None:
    """One pin has one value: a second spelling of it would be a second entry in every cache."""
    for client in range(200):
        value = CODEC.write(Token(TOKEN.digest, b"%010d" % client, NOW, NOW))
        if b"-" in value or b"_" in value:
            assert CODEC.parse(value.replace(b"-", b"+").replace(b"_", b"/"), NOW) is None
            break
    else:
        raise AssertionError("no token with - or _")


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_refused_quietly(value: bytes) -> None:
    assert CODEC.parse(value, NOW) is None
    assert CODEC.parse((b"v1." + value + b"A" * 59)[:59], NOW) is None


def test_a_forged_token_is_refused() -> None:
    assert TokenCodec([b"another secret"]).parse(CODEC.write(TOKEN), NOW) is None
    own, other = CODEC.write(TOKEN), CODEC.write(Token(upstream_digest("app-2"), *list_of(TOKEN)[1:]))
    assert CODEC.parse(other[:20] + own[20:], NOW) is None


def list_of(token: Token) -> tuple[bytes, bytes, int, int]:
    return token.digest, token.client_id, token.pinned_at, token.seen_at


def test_secrets_are_rotated() -> None:
    before, both, after = TokenCodec([b"old"]), TokenCodec([b"new", b"old"]), TokenCodec([b"new"])
    assert both.parse(before.write(TOKEN), NOW) == TOKEN
    assert after.parse(both.write(TOKEN), NOW) == TOKEN
    assert both.write(TOKEN) == after.write(TOKEN)
    assert after.parse(before.write(TOKEN), NOW) is None


def test_nothing_can_be_read_from_a_token() -> None:
    value = CODEC.write(TOKEN)
    assert b"app" not in value
    assert b"127.0.0.1" not in value
    others = {
        CODEC.write(Token(upstream_digest(f"http://127.0.0.1:{port}"), *list_of(TOKEN)[1:])) for port in range(99)
    }
    assert {len(other) for other in others} == {len(value)}
    assert len(others) == 99


@pytest.mark.parametrize("ahead_s", [0, 1, 300, 3600, 10**8])
def test_times_ahead_of_the_clock_count_as_now(ahead_s: int) -> None:
    """By another replica's clock, or by this machine's before it was put right; the token is genuine all the same."""
    value = CODEC.write(Token(TOKEN.digest, TOKEN.client_id, NOW + ahead_s, NOW + ahead_s))
    assert CODEC.parse(value, NOW + 0.5) == Token(TOKEN.digest, TOKEN.client_id, NOW, NOW)


def test_times_in_the_past_stay() -> None:
    past = Token(TOKEN.digest, TOKEN.client_id, NOW - 86_400, NOW - 3600)
    assert CODEC.parse(CODEC.write(past), NOW) == past


@pytest.mark.parametrize(
    ("lifetimes", "expires_at"),
    [
        (Lifetimes(), float("inf")),
        (Lifetimes(max_idle_s=100), NOW + 100),
        (Lifetimes(max_life_s=100), NOW - 60 + 100),
        (Lifetimes(max_idle_s=10, max_life_s=100), NOW + 10),
        (Lifetimes(max_idle_s=100, max_life_s=70), NOW + 10),
        (Lifetimes(max_idle_s=0), NOW),
    ],
)
def test_a_token_expires_by_idleness_or_by_age(lifetimes: Lifetimes, expires_at: float) -> None:
    assert lifetimes.expires_at(TOKEN) == expires_at
