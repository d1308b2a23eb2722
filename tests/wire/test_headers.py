"""Header sections: what is legal, what is made canonical, and which fields are special."""

from __future__ import annotations

from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickyproxy.wire.headers import (
    CONNECTION,
    CONTENT_LENGTH,
    COOKIE,
    FORWARDED,
    HOST,
    REQUEST_SPECIALS,
    RESPONSE_CACHE_CONTROL,
    RESPONSE_CONNECTION,
    RESPONSE_CONTENT_LENGTH,
    RESPONSE_PIN,
    RESPONSE_SPECIALS,
    RESPONSE_TRANSFER_ENCODING,
    RESPONSE_UPGRADE,
    TRANSFER_ENCODING,
    UPGRADE,
    VIA,
    FieldError,
    canonicalise,
    drop_fields,
    find_field,
    find_fields,
    parse_content_length,
    parse_list,
)

TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DROPPED = object()


def canonical(lines: bytes) -> bytes:
    """Return the lines in canonical form, in the middle of other data that must not matter."""
    data = b"\x00:" + lines + b" \n"
    changed = canonicalise(data, 2, 2 + len(lines))
    return lines if changed is None else changed


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(b"", id="no field"),
        pytest.param(b"Host: a\r\nAccept: */*\r\n", id="two fields"),
        pytest.param(b"X: a b\tc\r\n", id="white space inside a value"),
        pytest.param(b"X: \x80\xff\r\n", id="obs-text"),
        pytest.param(b"!#$%&'*+-.^_`|~09AZaz: v\r\n", id="every character of a token"),
    ],
)
def test_a_canonical_section_is_not_copied(lines: bytes) -> None:
    assert canonicalise(lines, 0, len(lines)) is None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(b"X:a\r\n", b"X: a\r\n", id="no space after the colon"),
        pytest.param(b"X: \t a\r\n", b"X: a\r\n", id="white space before the value"),
        pytest.param(b"X: a \t\r\n", b"X: a\r\n", id="a space and a tab after the value"),
        pytest.param(b"X: a \r\nY: b\r\n", b"X: a\r\nY: b\r\n", id="a space after the value"),
        pytest.param(b"X: a\t\r\n", b"X: a\r\n", id="a tab after the value"),
        pytest.param(b"X:\r\n", b"X: \r\n", id="an empty value"),
        pytest.param(b"X: \r\n", b"X: \r\n", id="an empty value after a space"),
        pytest.param(b"X: \t \r\n", b"X: \r\n", id="a value of white space"),
        pytest.param(b"X::\r\n", b"X: :\r\n", id="a value that is a colon"),
    ],
)
def test_a_legal_section_is_made_canonical(lines: bytes, expected: bytes) -> None:
    assert canonical(lines) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        pytest.param(b"X: a\r\n b\r\n", "a folded header line (obs-fold)", id="obs-fold by a space"),
        pytest.param(b"X: a\r\n\tb\r\n", "a folded header line (obs-fold)", id="obs-fold by a tab"),
        pytest.param(b" X: a\r\n", "a folded header line (obs-fold)", id="white space before the first field"),
        pytest.param(b"X a\r\n", "a header line without a colon", id="no colon"),
        pytest.param(b"\r\nX: a\r\n", "a header line without a colon", id="an empty line"),
        pytest.param(b": a\r\n", "an empty header field name", id="no name"),
        pytest.param(b"X : a\r\n", "white space before the colon of a header field", id="space before the colon"),
        pytest.param(b"X\t: a\r\n", "white space before the colon of a header field", id="tab before the colon"),
        pytest.param(b"X Y: a\r\n", "a character that no header field name may have", id="space inside a name"),
        pytest.param(b"X\x00Y: a\r\n", "a character that no header field name may have", id="NUL inside a name"),
        pytest.param(b"X\xc4: a\r\n", "a character that no header field name may have", id="obs-text inside a name"),
        pytest.param(b"X\nY: a\r\n", "a character that no header field name may have", id="bare LF inside a name"),
        pytest.param(b"(X): a\r\n", "a character that no header field name may have", id="a delimiter inside a name"),
        pytest.param(b"X: a\x00b\r\n", "a control character in a header field value", id="NUL"),
        pytest.param(b"X: a\rb\r\n", "a control character in a header field value", id="bare CR"),
        pytest.param(b"X: a\nY: b\r\n", "a control character in a header field value", id="bare LF"),
        pytest.param(b"X: a\x0bb\r\n", "a control character in a header field value", id="vertical tab"),
        pytest.param(b"X: a\x7fb\r\n", "a control character in a header field value", id="DEL"),
        pytest.param(b"X: a\r\r\n", "a control character in a header field value", id="CR before CRLF"),
        pytest.param(b"X:\x0ba\r\n", "a control character in a header field value", id="vertical tab as white space"),
    ],
)
def test_what_breaks_the_grammar_is_refused(lines: bytes, reason: str) -> None:
    with pytest.raises(FieldError) as caught:
        canonical(lines)
    assert str(caught.value) == reason


@pytest.mark.parametrize("byte", range(256))
def test_exactly_the_octets_of_the_grammar_are_taken(byte: int) -> None:
    """RFC 9110, sections 5.5 and 5.6.2; each octet in a name and in a value, in lines canonical and not."""
    octet = bytes((byte,))
    is_in_value = byte == 0x09 or 0x20 <= byte != 0x7F
    for lines, is_legal in (
        (b"X" + octet + b"Y: a\r\n", octet in TOKEN_BYTES or octet == b":"),
        (b"X" + octet + b"Y:a\r\n", octet in TOKEN_BYTES or octet == b":"),
        (b"X: a" + octet + b"b\r\n", is_in_value),
        (b"X:a" + octet + b"b\r\n", is_in_value),
    ):
        if is_legal:
            canonical(lines)
        else:
            with pytest.raises(FieldError):
                canonical(lines)


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"X", b":", b" ", b"\t", b"\r\n", b"\n", b"\r", b"\0", b"v", b"\xff", b"\x0b"])))
def test_any_lines_are_canonical_after_one_pass_or_refused(parts: list[bytes]) -> None:
    lines = b"".join(parts) + b"\r\n"
    try:
        once = canonical(lines)
    except FieldError:
        return
    assert canonicalise(once, 0, len(once)) in {None, once}
    for line in once.split(b"\r\n")[:-1]:
        name, separator, value = line.partition(b": ")
        assert separator
        assert name.strip(TOKEN_BYTES) == b""
        assert value == value.strip(b" \t")
        assert not set(value) & {0, 10, 11, 13}


@pytest.mark.parametrize("filler", [b" ", b"\t", b"a", b" a", b"X: a\r\n", b":"])
def test_refusing_a_long_line_takes_no_longer_than_taking_it(filler: bytes) -> None:
    """Backtracking over 100 KB would take seconds; reading it takes less than a millisecond."""
    lines = b"X:" + filler * (100_000 // len(filler)) + b"\x01\r\n"
    began_at = perf_counter()
    with pytest.raises(FieldError):
        canonical(lines)
    assert perf_counter() - began_at < 1.0


def kind_of(pattern: object, line: bytes) -> object:
    match = (REQUEST_SPECIALS if pattern is REQUEST_SPECIALS else RESPONSE_SPECIALS).match(b"\n" + line.lower())
    if match is None:
        return None
    assert match.end() == line.index(b": ") + 3
    return DROPPED if match.lastindex is None else match.lastindex


FORWARDED_ENDS = "By", "For", "Host", "Port", "Prefix", "Proto", "Protocol", "Scheme", "Server", "SSL"
FORWARDED_NAMES = [f"X-Forwarded-{end}" for end in FORWARDED_ENDS]
FORWARDED_NAMES += ["X-Real-IP", "X-Request-ID", "X-Scheme"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Host", HOST),
        ("Cookie", COOKIE),
        ("Connection", CONNECTION),
        ("Content-Length", CONTENT_LENGTH),
        ("Transfer-Encoding", TRANSFER_ENCODING),
        ("Upgrade", UPGRADE),
        ("Via", VIA),
        ("Forwarded", FORWARDED),
        *[(name, FORWARDED) for name in FORWARDED_NAMES],
        *[(name, DROPPED) for name in ("TE", "Keep-Alive", "HTTP2-Settings", "Proxy-Connection", "Proxy")],
        ("Proxy-Authorization", DROPPED),
        *[(name, DROPPED) for name in ("Stickyproxy-Pin", "stickyproxy_pin", "STICKYPROXY-PIN")],
        *[(name, None) for name in ("Stickyproxy", "Stickyproxy-Pins", "X-Stickyproxy-Pin", "Stickyproxypin")],
        *[
            (name, None)
            for name in ("Hostess", "Cookie2", "TEA", "X-Host", "X-Forwarded", "X-Forwarded-User", "Expect", "V")
        ],
    ],
)
def test_special_fields_of_a_request(name: str, kind: object) -> None:
    assert kind_of(REQUEST_SPECIALS, name.encode() + b": v") == kind


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding", *FORWARDED_NAMES])
def test_no_underscore_makes_a_special_field_of_another(name: str) -> None:
    """A CGI-like environment cannot tell `_` from `-`: every such spelling is dropped."""
    hyphens = [at for at, character in enumerate(name) if character == "-"]
    for chosen in range(1, 1 << len(hyphens)):
        spelling = list(name)
        for bit, at in enumerate(hyphens):
            if chosen >> bit & 1:
                spelling[at] = "_"
        assert kind_of(REQUEST_SPECIALS, "".join(spelling).encode() + b": v") is DROPPED


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Connection", RESPONSE_CONNECTION),
        ("Content-Length", RESPONSE_CONTENT_LENGTH),
        ("Cache-Control", RESPONSE_CACHE_CONTROL),
        ("Transfer-Encoding", RESPONSE_TRANSFER_ENCODING),
        ("Upgrade", RESPONSE_UPGRADE),
        ("Stickyproxy-Pin", RESPONSE_PIN),
        ("Stickyproxy-Pins", None),
        ("X-Stickyproxy-Pin", None),
        ("TE", DROPPED),
        ("Keep-Alive", DROPPED),
        ("Proxy-Connection", DROPPED),
        ("Proxy-Authenticate", DROPPED),
        ("Proxy-Authentication-Info", DROPPED),
        ("Proxy-Status", None),
        ("Set-Cookie", None),
        ("Date", None),
        ("Content-Type", None),
    ],
)
def test_special_fields_of_a_response(name: str, kind: object) -> None:
    assert kind_of(RESPONSE_SPECIALS, name.encode() + b": v") == kind


def test_fields_are_dropped_by_whole_names_in_any_case_and_parts_keep_their_places() -> None:
    section = [b"A: 1\r\nB: 2\r\n", b"b: 3\r\n", b"BB: b\r\nC: B: 4\r\n"]
    assert drop_fields(section, {b"b"}) == [b"A: 1\r\n", b"", b"BB: b\r\nC: B: 4\r\n"]
    assert drop_fields(section, {b"d"}) == section


def test_the_first_field_of_a_name_is_found() -> None:
    section = [b"Aa: 1\r\nB: 2\r\n", b"", b"a: 3\r\nA: 4\r\n"]
    assert find_field(section, b"a") == b"3"
    assert find_field(section, b"b") == b"2"
    assert find_field(section, b"c") == b""


def test_all_fields_of_a_name_are_found() -> None:
    section = [b"Aa: 1\r\nA: 2\r\n", b"", b"a: \r\nB: a: 3\r\nA: 4: 5\r\n"]
    assert find_fields(section, b"a") == [b"2", b"", b"4: 5"]
    assert find_fields(section, b"c") == []


@pytest.mark.parametrize(("value", "length"), [(b"0", 0), (b"007", 7), (b"9" * 18, 10**18 - 1)])
def test_a_content_length_is_a_plain_number(value: bytes, length: int) -> None:
    assert parse_content_length(value) == length


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"+1", id="a plus"),
        pytest.param(b"-1", id="a minus"),
        pytest.param(b"1_0", id="an underscore"),
        pytest.param(b"1 0", id="a space"),
        pytest.param(b"5, 5", id="a list"),
        pytest.param(b"0x5", id="hexadecimal"),
        pytest.param(b"5.0", id="a fraction"),
        pytest.param("\N{ARABIC-INDIC DIGIT FIVE}".encode(), id="a digit of another script"),
        pytest.param(b"\xb2", id="a superscript"),
        pytest.param(b"5\n", id="a line feed after it"),
        pytest.param(b"9" * 19, id="more than 18 digits"),
    ],
)
def test_a_content_length_that_is_no_plain_number_is_refused(value: bytes) -> None:
    with pytest.raises(FieldError, match=r"^an invalid Content-Length$"):
        parse_content_length(value)


@pytest.mark.parametrize(
    ("value", "items"),
    [
        (b"", []),
        (b" , ,\t", []),
        (b"Close", [b"close"]),
        (b"a ,\tB\t, c d ,", [b"a", b"b", b"c d"]),
    ],
)
def test_a_list_is_read_in_lower_case_without_its_empty_items(value: bytes, items: list[bytes]) -> None:
    assert parse_list(value) == items
