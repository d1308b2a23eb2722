"""Where secrets come from; and that no message repeats one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import pytest
from pydantic import BaseModel, PlainValidator

from stickyproxy.config.secret import Sources, read_secret, read_signing_secret, read_token

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s" * 32
NOWHERE = Sources()


def test_a_literal_is_itself() -> None:
    assert read_secret("é", NOWHERE) == "é".encode()


def test_env_is_looked_up() -> None:
    assert read_secret("env:NAME", Sources({"NAME": "x\udcff"})) == b"x\xff"


@pytest.mark.parametrize("content", [b"s\xff", b"s\xff\n", b"s\xff\r\n"])
def test_a_file_is_read_without_its_last_line_end(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    assert read_secret(f"file:{path}", NOWHERE) == b"s\xff"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (7, "expected text: env:NAME, file:/path or the secret itself, in quotes"),
        (None, "expected text: env:NAME, file:/path or the secret itself, in quotes"),
        ("env:NAME", "the environment variable NAME is not set"),
        ("env:", "expected the name of an environment variable after env:"),
        ("env:A-B", "expected the name of an environment variable after env:"),
        ("file:secret", "expected an absolute path after file:"),
        ("file:/a\0b", "expected an absolute path after file:"),
        ("file:/nowhere/secret", "cannot read /nowhere/secret: No such file or directory"),
        ("file:/", "cannot read /: Is a directory"),
        ("file:/dev/zero", "/dev/zero is longer than 65536 bytes: it is no secret"),
    ],
)
def test_what_cannot_be_read_is_refused(written: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_secret(written, NOWHERE)


def test_a_signing_secret_has_32_bytes() -> None:
    assert read_signing_secret(SECRET, NOWHERE) == SECRET.encode()
    with pytest.raises(ValueError, match=r"^a secret has at least 32 bytes, this one has 31$"):
        read_signing_secret(SECRET[1:], NOWHERE)


def test_a_token_has_16_visible_characters() -> None:
    assert read_token("t" * 16, NOWHERE) == "t" * 16
    with pytest.raises(ValueError, match=r"^a token has at least 16 characters, this one has 15$"):
        read_token("t" * 15, NOWHERE)
    for bad in (" ", "é", "\n", "\x7f"):
        with pytest.raises(ValueError, match=r"^a token has visible ASCII characters only, no spaces$"):
            read_token("t" * 16 + bad, NOWHERE)


class Validation(BaseModel):
    field: Annotated[object, PlainValidator(lambda _, info: Sources.of(info))]


def test_sources_are_the_context_of_a_validation() -> None:
    given = Sources({"NAME": SECRET})
    assert Validation.model_validate({"field": 1}, context=given).field is given
    assert Validation.model_validate({"field": 1}).field == Sources()


def test_the_environment_is_not_shown() -> None:
    assert SECRET not in repr(Sources({"NAME": SECRET}))
