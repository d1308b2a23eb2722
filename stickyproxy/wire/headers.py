"""Header fields: the grammar of a section, and the names that a proxy treats specially.

A section is read by one regular expression in C. Every line must match it from one line feed to the next, so the
number of matches is compared with the number of line feeds: a line that does not match (a bare CR or LF, NUL, a space
before the colon, an empty name, a fold) cannot hide. Lines that are legal but not in the canonical form
`Name: value` are rewritten to it; what leaves this module is always canonical (RFC 9112, section 5).
"""

from __future__ import annotations

import re
from typing import Final

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, section 5.6.2
_CANONICAL = re.compile(
    rb"(?<=\n)((" + TOKEN + rb"): (?:[!-~\x80-\xff][\t -~\x80-\xff]*)?)\r\n",
)
_LOOSE = re.compile(rb"(" + TOKEN + rb"):[ \t]*([\t -~\x80-\xff]*)")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_LIST_ITEM = re.compile(rb"[^, \t][^,]*")

Fields = list[tuple[bytes, bytes]]
"""Each field as (whole canonical line without CRLF, name as spelled)."""


class FieldError(ValueError):
    """A header section or a field value breaks the grammar; the text says how."""


# What the proxy does with a field. Plain integers: they are compared for every field of every head.
ORDINARY: Final = 0  # passes unchanged
CACHE_CONTROL: Final = 1  # passes unchanged, and is read on responses
EXPECT: Final = 2  # passes unchanged, and is read on requests
HOST: Final = 3
COOKIE: Final = 4
FORWARDED: Final = 5  # says who the client is: taken over from trusted proxies only
VIA: Final = 6
CONNECTION: Final = 7
CONTENT_LENGTH: Final = 8
TRANSFER_ENCODING: Final = 9
UPGRADE: Final = 10
HOP: Final = 11  # concerns one connection only: always dropped

_KINDS: Final[dict[bytes, int]] = {
    b"host": HOST,
    b"connection": CONNECTION,
    b"content-length": CONTENT_LENGTH,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"upgrade": UPGRADE,
    b"cookie": COOKIE,
    b"keep-alive": HOP,
    b"proxy-connection": HOP,
    b"te": HOP,
    b"http2-settings": HOP,  # h2c is never passed on
    b"proxy": HOP,  # becomes HTTP_PROXY in CGI-like applications ("httpoxy", CVE-2016-5385)
    b"forwarded": FORWARDED,
    b"x-forwarded-for": FORWARDED,
    b"x-forwarded-proto": FORWARDED,
    b"x-forwarded-host": FORWARDED,
    b"x-forwarded-port": FORWARDED,
    b"x-forwarded-prefix": FORWARDED,
    b"x-forwarded-scheme": FORWARDED,
    b"x-forwarded-ssl": FORWARDED,
    b"x-scheme": FORWARDED,
    b"x-real-ip": FORWARDED,
    b"x-request-id": FORWARDED,
    b"via": VIA,
    b"cache-control": CACHE_CONTROL,
    b"expect": EXPECT,
}

# Spellings already seen. Bounded, so that a client that invents names costs no memory; full, it only gets slower.
_MAX_SPELLINGS: Final = 2048
kind_by_spelling: dict[bytes, int] = {}


def classify(name: bytes) -> int:
    """Return the kind of a field name in any spelling, and remember it in `kind_by_spelling`.

    Applications with CGI-like environments cannot tell `_` from `-`: `Content_Length` is dropped as they would
    take it for the real one.
    """
    lower = name.lower()  # bytes.lower() changes ASCII letters only
    kind = _KINDS.get(lower, ORDINARY)
    if kind == ORDINARY and b"_" in lower and _KINDS.get(lower.replace(b"_", b"-"), ORDINARY):
        kind = HOP
    if len(kind_by_spelling) < _MAX_SPELLINGS:
        kind_by_spelling[name] = kind
    return kind


def split_fields(section: bytes, start: int, end: int) -> Fields:
    """Split `section[start:end]`, lines that each end in CRLF, into canonical fields.

    `section[start - 1]` must be the line feed that ends the line before. Raises FieldError.
    """
    fields: Fields = _CANONICAL.findall(section, start - 1, end)
    if (
        len(fields) != section.count(b"\n", start, end)
        or section.find(b" \r\n", start, end) >= 0
        or section.find(b"\t\r\n", start, end) >= 0
    ):
        return _canonicalise(section[start:end])
    return fields


def _canonicalise(section: bytes) -> Fields:
    fields: Fields = []
    for line in section.split(b"\r\n")[:-1]:
        match = _LOOSE.fullmatch(line)
        if match is None:
            raise FieldError(_fault_of(line))
        name, value = match.groups()
        fields.append((name + b": " + value.rstrip(b" \t"), name))
    return fields


def _fault_of(line: bytes) -> str:
    if line[:1] in {b" ", b"\t"}:
        return "a folded header line (obs-fold)"  # RFC 9112, section 5.2
    name, colon, value = line.partition(b":")
    if not colon:
        return "a header line without a colon"
    if not name:
        return "an empty header field name"
    if name[-1:] in {b" ", b"\t"}:
        return "white space before the colon of a header field"  # RFC 9112, section 5.1
    if re.fullmatch(TOKEN, name) is None:
        return "a character that no header field name may have"
    if re.search(rb"[\x00-\x08\n-\x1f\x7f]", value):
        return "a control character in a header field value"  # RFC 9110, section 5.5
    return "a header line that breaks the grammar"


def parse_content_length(value: bytes) -> int:
    """Parse a Content-Length (RFC 9110, section 8.6) into bytes; raise FieldError unless it is one plain number."""
    if _DIGITS.fullmatch(value) is None:
        raise FieldError("an invalid Content-Length")
    return int(value)


def parse_list(value: bytes) -> list[bytes]:
    """Parse a comma-separated list of tokens into lower-case items (RFC 9110, section 5.6.1)."""
    return [item.rstrip(b" \t").lower() for item in _LIST_ITEM.findall(value)]
