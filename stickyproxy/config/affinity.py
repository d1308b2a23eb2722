"""The section `affinity`: which client goes to which upstream, and how the proxy remembers it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema, model_validator

from stickyproxy.config.errors import Mistake
from stickyproxy.config.fields import (
    Flag,
    OrFalse,
    Read,
    Seconds,
    SecondsOrZero,
    Section,
    in_seconds,
    read_items,
    read_seconds,
    refuse,
    text,
    whole_number,
)
from stickyproxy.config.keys import MAX_KEYS, AffinityKey, read_keys
from stickyproxy.config.secret import Sources, read_signing_secret
from stickyproxy.config.units import shown

# RFC 6265 section 4.1.1: cookie-name is a token (RFC 2616 section 2.2). 64: a browser sends it with every request.
_COOKIE_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}"
_COOKIE_PATH = r"/[\x20-\x3a\x3c-\x7e]*"  # RFC 6265 section 4.1.1: no control characters and no ";"
_COOKIE_DOMAIN = r"\.?[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"

_ON_UNAVAILABLE_FORMS = "redispatch, refuse or {wait: 10s}"


@dataclass(frozen=True, slots=True)
class OnUnavailable:
    """What happens to a client whose upstream cannot be used.

    `wait_s` is how long a request is held before it is redispatched; 0.0 unless `action` is `wait`.
    """

    action: Literal["redispatch", "refuse", "wait"] = "redispatch"
    wait_s: float = 0.0


def read_on_unavailable(raw: object) -> OnUnavailable:
    """Return what `redispatch`, `refuse` or `{wait: 10s}` means. Raises `ValueError`."""
    match raw:
        case "redispatch":
            return OnUnavailable("redispatch")
        case "refuse":
            return OnUnavailable("refuse")
        case {"wait": duration, **others} if not others:
            try:
                return OnUnavailable("wait", read_seconds(duration))
            except ValueError as error:
                refuse([(("wait",), str(error))])
        case _:
            raise ValueError(f"expected {_ON_UNAVAILABLE_FORMS}, got {shown(raw)}")


def _read_secure(raw: object) -> bool | str:
    if isinstance(raw, bool) or raw == "auto":
        return raw if isinstance(raw, bool) else "auto"
    raise ValueError(f"expected auto, true or false, got {shown(raw)}")


CookiePath = Annotated[str, text(_COOKIE_PATH, 'a path that begins with "/", without ";" and control characters')]
CookieDomain = Annotated[str, text(_COOKIE_DOMAIN, "a domain name")]
SameSite = Literal["lax", "strict", "none"]
Secure = Annotated[bool | Literal["auto"], Read(_read_secure, {"enum": ["auto", True, False]})]


class Cookie(Section):
    """The affinity cookie: its name and its attributes (RFC 6265bis section 4.1.2)."""

    expected: ClassVar[str] = "a mapping of keys or false"

    name: (
        Annotated[str, text(_COOKIE_NAME, "a cookie name of 1 to 64 characters without spaces and separators")] | None
    ) = Field(
        default=None,
        description="The cookie's name; null: stickyproxy, with the name of the cluster behind it, and with the port "
        "of the first listener where no secrets are given and it is not 80, 443 or 8080.",
    )
    path: CookiePath = Field(default="/", description="The paths that the browser sends the cookie to.")
    domain: CookieDomain | None = Field(
        default=None, description="The domain with its subdomains that get the cookie; null: this host only."
    )
    max_age_s: Seconds | None = Field(
        default=None, description="How long the browser keeps the cookie; null: until it closes."
    )
    http_only: Flag = Field(default=True, description="Whether scripts of the page cannot read the cookie.")
    same_site: SameSite = Field(
        default="lax", description="Whether the cookie goes along with requests from other sites."
    )
    secure: Secure = Field(
        default="auto", description="Whether the cookie goes over TLS only; auto: where the client came by TLS."
    )
    partitioned: Flag = Field(default=False, description="Whether the cookie is kept apart for each embedding site.")

    @model_validator(mode="after")
    def _check_attributes(self) -> Self:
        if mistakes := self.find_mistakes():
            refuse(mistakes)
        return self

    def find_mistakes(self) -> list[Mistake]:
        """Return a mistake for each attribute that browsers would not take beside the others."""
        return [*self._find_insecure(), *self._find_prefix_mistakes()]

    def _find_insecure(self) -> list[Mistake]:
        if self.secure is not False:
            return []
        mistakes: list[Mistake] = []
        if self.same_site == "none":
            mistakes.append((("same_site",), "browsers refuse same_site: none with secure: false"))
        if self.partitioned:
            mistakes.append((("partitioned",), "browsers refuse partitioned: true with secure: false"))
        return mistakes

    def _find_prefix_mistakes(self) -> list[Mistake]:
        """RFC 6265bis section 4.1.3; browsers compare the prefixes without regard to case."""
        name = (self.name or "").lower()
        prefix = next((known for known in ("__Host-", "__Secure-") if name.startswith(known.lower())), None)
        mistakes: list[Mistake] = []
        if prefix and self.secure is False:
            mistakes.append((("secure",), f"a cookie named {prefix}... cannot have secure: false"))
        if prefix == "__Host-" and self.path != "/":
            mistakes.append((("path",), "a cookie named __Host-... has the path /"))
        if prefix == "__Host-" and self.domain is not None:
            mistakes.append((("domain",), "a cookie named __Host-... has no domain"))
        return mistakes


def _read_secrets(raw: object, info: ValidationInfo) -> tuple[bytes, ...]:
    sources = Sources.of(info)
    return read_items(raw, lambda item: read_signing_secret(item, sources), 'a list, as in ["env:STICKYPROXY_SECRET"]')


class Affinity(Section):
    """Which client goes to which upstream."""

    cookie: OrFalse[Cookie] = Field(default_factory=Cookie, description="The affinity cookie; false: none.")
    secrets: Annotated[
        tuple[bytes, ...],
        PlainValidator(_read_secrets),
        WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    ] = Field(
        default=(),
        repr=False,
        description="Keys that sign the tokens, 32 bytes or more each: env:NAME, file:/path or the key itself. "
        "The first signs, all verify. With none, one is made at the first start and kept in state_directory.",
    )
    policy: Literal["least_sessions", "round_robin", "random"] = Field(
        default="least_sessions", description="How a client without a pin gets its upstream."
    )
    on_unavailable: Annotated[
        OnUnavailable,
        Read(
            read_on_unavailable,
            {
                "anyOf": [
                    {"enum": ["redispatch", "refuse"]},
                    {
                        "type": "object",
                        "properties": {"wait": {"type": "string"}},
                        "required": ["wait"],
                        "additionalProperties": False,
                    },
                ]
            },
        ),
    ] = Field(
        default=OnUnavailable(),
        json_schema_extra={"default": "redispatch"},
        description="What happens to a client whose upstream cannot be used: another upstream, a 503, or the request "
        "is held so long and then goes to another.",
    )
    client_address: Flag = Field(
        default=False, description="Whether clients without a cookie are pinned by their address."
    )
    keys: Annotated[tuple[AffinityKey, ...], BeforeValidator(read_keys)] = Field(
        default=(),
        max_length=MAX_KEYS,
        description="What requests carry, beside the cookie, that says where their client belongs. What is learned "
        "comes before the cookie, what is hashed after it; presets bring those of their frameworks.",
    )
    max_keys: Annotated[int, whole_number(1, 1_000_000)] = Field(
        default=65_536,
        description="How many keys are remembered at most, 43 bytes each; the room is taken at the start.",
    )
    max_idle_s: Seconds | None = Field(
        default=None, description="A token that was not used for so long is not honoured; null: no limit."
    )
    max_life_s: Seconds | None = Field(
        default=None, description="A token older than this is not honoured; null: no limit."
    )
    session_idle_s: SecondsOrZero = in_seconds(
        "5m", "How long after its last request a client counts as an active session."
    )
