"""Read a secret from where the configuration says it is kept.

The field types call this while the file is loaded. No message of this file repeats a secret, nor a text that might be
one: a person who forgets `env:` writes the secret itself.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationInfo

MIN_SECRET_BYTES = 32  # the length of the SHA-256 output: RFC 2104 section 3 discourages a shorter key
MIN_TOKEN_CHARACTERS = 16  # 64 bits as hexadecimal digits: out of reach of guessing over a network
MAX_SECRET_BYTES = 65536  # a file that is longer is not a secret; /dev/zero has no end

_VISIBLE = range(0x21, 0x7F)  # ASCII without controls and space: what a header field carries unchanged
_ENV_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where `env:` looks; handed to the schema as the context of its validation.

    `known` is what `env:NAME` and `file:/path` stand for where that has been read already; what is read is added.
    """

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    known: dict[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, info: ValidationInfo) -> Sources:
        """Return the sources that a validation was given; without any, no variable is set."""
        return info.context if isinstance(info.context, Sources) else cls()


def read_secret(value: object, sources: Sources) -> bytes:
    """Return the bytes that `env:NAME`, `file:/path` or a literal stands for.

    Line ends at the end of a file are not part of the secret. Reads the file at once; raises `ValueError` with a
    message for the author of the configuration.
    """
    match value:
        case str() if value in sources.known:
            return sources.known[value]
        case str() if value.startswith("env:"):
            found = _read_env(value.removeprefix("env:"), sources.env)
            return sources.known.setdefault(value, found)
        case str() if value.startswith("file:"):
            return sources.known.setdefault(value, _read_file(value.removeprefix("file:")))
        case str():
            return value.encode()
        case _:
            raise ValueError("expected text: env:NAME, file:/path or the secret itself, in quotes")


def read_signing_secret(value: object, sources: Sources) -> bytes:
    """Return a secret that is long enough to sign with: at least 32 bytes. Raises `ValueError`."""
    secret = read_secret(value, sources)
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"a secret has at least {MIN_SECRET_BYTES} bytes, this one has {len(secret)}")
    return secret


def read_token(value: object, sources: Sources) -> str:
    """Return a secret that can be sent as a bearer token: 16 or more visible ASCII characters. Raises `ValueError`."""
    secret = read_secret(value, sources)
    if len(secret) < MIN_TOKEN_CHARACTERS:
        raise ValueError(f"a token has at least {MIN_TOKEN_CHARACTERS} characters, this one has {len(secret)}")
    if not all(byte in _VISIBLE for byte in secret):
        raise ValueError("a token has visible ASCII characters only, no spaces")
    return secret.decode()


def _read_env(name: str, env: Mapping[str, str]) -> bytes:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError("expected the name of an environment variable after env:")
    if name not in env:
        raise ValueError(f"the environment variable {name} is not set")
    return os.fsencode(env[name])


def _read_file(path: str) -> bytes:
    if not path.startswith("/") or not path.isprintable():
        raise ValueError("expected an absolute path after file:")
    try:
        with Path(path).open("rb") as stream:
            secret = stream.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(secret) > MAX_SECRET_BYTES:
        raise ValueError(f"{path} is longer than {MAX_SECRET_BYTES} bytes: it is no secret")
    return secret.rstrip(b"\r\n")
