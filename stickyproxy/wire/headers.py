"""Header sections: their grammar, and where in one the fields stand that a proxy treats specially.

Two regular expressions do the work in C, so that an ordinary field costs nothing in Python: one says whether the whole
section is well-formed and canonical (`Name: value`, no white space to spare), the other finds the few fields that are
not simply passed on. A section that is legal but not canonical is rewritten first; one that is not legal is refused.
What leaves the proxy is therefore always canonical (RFC 9112, section 5).
"""

from __future__ import annotations

import re
from typing import Final

TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, section 5.6.2
_CANONICAL = re.compile(rb"(?:" + TOKEN + rb"+: (?:[!-~\x80-\xff][\t -~\x80-\xff]*+(?<![ \t]))?+\r\n)*+")
# Possessive, or a long run of spaces before a control character would cost the square of its length.
_LOOSE = re.compile(rb"(" + TOKEN + rb"):[ \t]*+([\t -~\x80-\xff]*+)")
_NUMBER = re.compile(rb"[0-9]{1,18}")
_LIST_ITEM = re.compile(rb"[^, \t][^,]*")

# The numbers are those of the groups in the expressions below. What matches without a group is dropped: it concerns
# one connection only (RFC 9110, section 7.6.1), or an application with a CGI-like environment, which cannot tell `_`
# from `-`, would take it for a field that the proxy vouches for. `Proxy` would become HTTP_PROXY there ("httpoxy").
# Proxy-Authorization and Proxy-Authenticate are for the next proxy, which is this one (RFC 9110, section 11.7).
# Stickyproxy-Pin is what an application says of a pin: in a response it is read and dropped, in a request just dropped.
# The alternatives are arranged by their first letters, for they are tried one by one at each line.
_SAID = rb"(?:by|for|host|p(?:ort|refix|roto(?:col)?)|s(?:cheme|erver|sl))"
REQUEST_SPECIALS: Final = re.compile(
    rb"\n(?:(host)|c(?:(ookie)|on(?:(nection)|(tent-length)|tent_length))|t(?:(ransfer-encoding)|ransfer_encoding|e)"
    rb"|(upgrade)|(via)"
    rb"|(x-(?:forwarded-" + _SAID + rb"|re(?:al-ip|quest-id)|scheme)|forwarded)"
    rb"|x[-_](?:forwarded[-_]" + _SAID + rb"|re(?:al[-_]ip|quest[-_]id)|scheme)"
    rb"|keep-alive|http2-settings|proxy(?:-connection|-authorization)?|stickyproxy[-_]pin): "
)
HOST, COOKIE, CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE, VIA, FORWARDED = range(1, 9)
RESPONSE_SPECIALS: Final = re.compile(
    rb"\n(?:c(?:on(?:(nection)|(tent-length))|(ache-control))|t(?:(ransfer-encoding)|e)|(upgrade)|(stickyproxy-pin)"
    rb"|keep-alive|proxy-(?:connection|authenticat(?:e|ion-info))): "
)
(
    RESPONSE_CONNECTION,
    RESPONSE_CONTENT_LENGTH,
    RESPONSE_CACHE_CONTROL,
    RESPONSE_TRANSFER_ENCODING,
    RESPONSE_UPGRADE,
    RESPONSE_PIN,
) = range(1, 7)

Section = list[bytes]
"""A header section in parts, each of whole canonical lines with their CRLF."""


class FieldError(ValueError):
    """A header section or a field value breaks the grammar; the text says how."""


def canonicalise(data: bytes, start: int, end: int) -> bytes | None:
    """Return the lines `data[start:end]`, which all end in CRLF, in canonical form; None where they are already.

    Raises FieldError where they are not legal.
    """
    if _CANONICAL.fullmatch(data, start, end) is not None:
        return None
    lines = []
    for line in data[start:end].split(b"\r\n")[:-1]:
        match = _LOOSE.fullmatch(line)
        if match is None:
            raise FieldError(_fault_of(line))
        name, value = match.groups()
        lines.append(name + b": " + value.rstrip(b" \t") + b"\r\n")
    return b"".join(lines)


def _fault_of(line: bytes) -> str:
    if line[:1] in {b" ", b"\t"}:
        return "a folded header line (obs-fold)"  # RFC 9112, section 5.2
    name, colon, _ = line.partition(b":")
    if not colon:
        return "a header line without a colon"
    if not name:
        return "an empty header field name"
    if name[-1:] in {b" ", b"\t"}:
        return "white space before the colon of a header field"  # RFC 9112, section 5.1
    if re.fullmatch(TOKEN, name) is None:
        return "a character that no header field name may have"
    return "a control character in a header field value"  # RFC 9110, section 5.5


def drop_fields(section: Section, names: set[bytes]) -> Section:
    """Return the section without the fields of these lower-case names; each part keeps its place. O(fields)."""
    return [
        b"".join(line + b"\r\n" for line in part.split(b"\r\n")[:-1] if line.partition(b":")[0].lower() not in names)
        for part in section
    ]


def find_field(section: Section, name: bytes) -> bytes:
    """Return the value of the first field of this lower-case name, or nothing; for the slow path only. O(fields)."""
    for part in section:
        for line in part.split(b"\r\n"):
            if line[: len(name)].lower() == name and line[len(name) : len(name) + 1] == b":":
                return line[len(name) + 2 :]
    return b""


def find_fields(section: Section, name: bytes) -> list[bytes]:
    """Return the values of all fields of this lower-case name; for the slow path only. O(fields)."""
    start = name + b":"
    lines = (line for part in section for line in part.split(b"\r\n"))
    return [line[len(start) + 1 :] for line in lines if line[: len(start)].lower() == start]


def count_fields(section: Section, name: bytes) -> int:
    """Return how many fields have this lower-case name; for the slow path only. O(fields)."""
    start = name + b":"
    return sum(line[: len(start)].lower() == start for part in section for line in part.split(b"\r\n"))


def parse_content_length(value: bytes) -> int:
    """Parse a Content-Length (RFC 9110, section 8.6) into bytes; raise FieldError unless it is one plain number."""
    if _NUMBER.fullmatch(value) is None:
        raise FieldError("an invalid Content-Length")
    return int(value)


def parse_list(value: bytes) -> list[bytes]:
    """Parse a comma-separated list of tokens into lower-case items (RFC 9110, section 5.6.1)."""
    return [item.rstrip(b" \t").lower() for item in _LIST_ITEM.findall(value)]
