"""A configuration as it was loaded, with all that it was made from, so that another process makes the very same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stickyproxy.config.source import ConfigSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stickyproxy.config.schema import Config


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, where it comes from, the text of its file, and the secrets that were read for it.

    The text and the secrets are as they were then: files that change later change nothing here.
    """

    source: ConfigSource
    text: str = field(repr=False)  # a secret may stand in it
    config: Config
    known: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, source: ConfigSource, env: Mapping[str, str]) -> Loaded:
        """Read the file, and those that it names. Raises `ConfigErrors` with every mistake."""
        return cls.of_text(source, source.read_text(), env)

    @classmethod
    def of_text(cls, source: ConfigSource, text: str, env: Mapping[str, str]) -> Loaded:
        """Take a text in place of the file's. Raises `ConfigErrors` with every mistake."""
        known: dict[str, bytes] = {}
        return cls(source, text, source.load_text(text, env, known), known)

    def to_json(self) -> dict[str, object]:
        """Return plain values for `json`. They hold secrets: they go to processes of the proxy only."""
        known = {name: secret.hex() for name, secret in self.known.items()}
        return {"source": self.source.to_json(), "text": self.text, "known": known}

    @classmethod
    def from_json(cls, raw: Mapping[str, object], env: Mapping[str, str]) -> Loaded:
        """Return what `to_json` wrote; other keys are ignored. Raises `ValueError`, `ConfigErrors` for a mistake."""
        text, known = raw.get("text"), raw.get("known")
        if not isinstance(text, str) or not isinstance(known, dict):
            raise ValueError("what came is no configuration")  # noqa: TRY004 - foreign JSON, no bug
        secrets = {str(name): bytes.fromhex(str(secret)) for name, secret in known.items()}
        source = ConfigSource.from_json(raw.get("source"))
        return cls(source, text, source.load_text(text, env, secrets), secrets)
