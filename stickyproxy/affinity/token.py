"""The token: the signed value in the affinity cookie.

`v1.` and base64url of upstream digest (8 bytes), client id (10), pinned-at and seen-at (4 each, seconds since 1970),
and a keyed BLAKE2b MAC of 128 bits over all of it: 59 characters. Nothing about the upstream can be read from it, and
nothing but a secret is needed to read it, so replicas that share the secret share no state.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.snapshot import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIENT_ID_BYTES: Final = 10
_MAC_BYTES: Final = 16
_PAYLOAD_BYTES: Final = DIGEST_BYTES + CLIENT_ID_BYTES + 4 + 4
_PREFIX: Final = b"v1."
_LENGTH: Final = len(_PREFIX) + (_PAYLOAD_BYTES + _MAC_BYTES) * 4 // 3
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_+/", b"+/**")  # the standard alphabet's own signs are not base64url


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says: this client (10 bytes) is pinned to that upstream (8 bytes) since `pinned_at`.

    `seen_at` is when the token was last written. Both are seconds since 1970 by the wall clock.
    """

    digest: bytes
    client_id: bytes
    pinned_at: int
    seen_at: int


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a token holds, in seconds of the wall clock; None is for ever."""

    max_idle_s: float | None = None
    max_life_s: float | None = None

    def expires_at(self, token: Token) -> float:
        """Return the wall-clock time after which the token is as good as none."""
        idle = token.seen_at + self.max_idle_s if self.max_idle_s is not None else float("inf")
        life = token.pinned_at + self.max_life_s if self.max_life_s is not None else float("inf")
        return min(idle, life)


class TokenCodec:
    """Signs with the first of its secrets and accepts what any of them signed, so that secrets can be rotated."""

    __slots__ = ("_keys",)

    def __init__(self, secrets: Sequence[bytes]) -> None:
        self._keys = [blake2b(secret, digest_size=32, person=b"stickyproxy-key").digest() for secret in secrets]

    def write(self, token: Token) -> bytes:
        """Return the cookie value for a token: 59 characters of base64url and a dot."""
        payload = token.digest + token.client_id + token.pinned_at.to_bytes(4, "big") + token.seen_at.to_bytes(4, "big")
        return _PREFIX + binascii.b2a_base64(payload + _mac(self._keys[0], payload), newline=False).translate(_TO_URL)

    def parse(self, value: bytes, now: float) -> Token | None:
        """Return the token, or None where it is cut, forged or of another version.

        Takes one MAC for each secret, whatever the number of upstreams. Times ahead of `now`, by the clock of another
        replica or of this machine before it was put right, count as now: the MAC says that the token is genuine.
        """
        if len(value) != _LENGTH or not value.startswith(_PREFIX):
            return None
        try:
            raw = binascii.a2b_base64(value[len(_PREFIX) :].translate(_FROM_URL), strict_mode=True)
        except binascii.Error:
            return None
        payload, mac = raw[:_PAYLOAD_BYTES], raw[_PAYLOAD_BYTES:]
        if not any([compare_digest(_mac(key, payload), mac) for key in self._keys]):  # noqa: C419 -- all, in equal time
            return None
        return Token(
            payload[:DIGEST_BYTES],
            payload[DIGEST_BYTES : DIGEST_BYTES + CLIENT_ID_BYTES],
            min(int.from_bytes(payload[-8:-4], "big"), int(now)),
            min(int.from_bytes(payload[-4:], "big"), int(now)),
        )


def _mac(key: bytes, payload: bytes) -> bytes:
    return blake2b(payload, key=key, digest_size=_MAC_BYTES).digest()
