"""The sections `tls` of a listener and of an upstream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.explain import explain
from stickyproxy.config.load import load_text
from stickyproxy.config.tls import Certificate, ListenerTls, UpstreamTls

if TYPE_CHECKING:
    from stickyproxy.config.fields import Section

A, B = Path("/tls/a.pem"), Path("/tls/b.key")


def mistakes(section: type[Section], raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        section.model_validate(raw)
    return list(explain(raised.value, section))


def test_the_defaults_of_a_listener() -> None:
    tls = ListenerTls.model_validate({"certificates": str(A)})
    assert (tls.minimum_version, tls.client_ca, tls.client_certificates) == ("1.2", None, "required")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("/tls/a.pem", [(A, None)]),
        ({"certificate": "/tls/a.pem"}, [(A, None)]),
        ({"certificate": "/tls/a.pem", "key": None}, [(A, None)]),
        ({"certificate": "/tls/a.pem", "key": "/tls/b.key"}, [(A, B)]),
        (["/tls/a.pem"], [(A, None)]),
        ([{"certificate": "/tls/a.pem", "key": "/tls/b.key"}, "/tls/a.pem"], [(A, B), (A, None)]),
    ],
)
def test_certificates_are_one_or_a_list_of_paths_or_mappings(
    raw: object, expected: list[tuple[Path, Path | None]]
) -> None:
    tls = ListenerTls.model_validate({"certificates": raw})
    assert [(one.certificate, one.key) for one in tls.certificates] == expected
    assert ListenerTls(certificates=tls.certificates) == tls


CERTIFICATE = "expected the path of a PEM file or a mapping of keys"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([], [((), "expected at least one certificate")]),
        (7, [((), f"{CERTIFICATE}, got a number")]),
        ("a.pem", [(("certificate",), "expected an absolute path, got 'a.pem'")]),
        (
            [["/a"], "b"],
            [((0,), f"{CERTIFICATE}, got a list"), ((1, "certificate"), "expected an absolute path, got 'b'")],
        ),
        ([None], [((0,), f"{CERTIFICATE}, got nothing")]),
        ({"key": "/a"}, [((), "the key 'certificate' is missing")]),
        ([{"key": "/a"}], [((0,), "the key 'certificate' is missing")]),
        (
            {"certificate": "/a", "kye": "/b"},
            [(("kye",), "unknown key 'kye'; did you mean 'key'?")],
        ),
        (
            ["/a", {"certificate": "/a", "kye": "/b"}],
            [((1, "kye"), "unknown key 'kye'; did you mean 'key'?")],
        ),
    ],
)
def test_what_are_no_certificates(raw: object, expected: list[tuple[tuple[str | int, ...], str]]) -> None:
    found = mistakes(ListenerTls, {"certificates": raw})
    assert found == [(("certificates", *path), message) for path, message in expected]


def test_every_mistake_has_its_line() -> None:
    text = """\
listeners:
  - address: ":443"
    tls:
      certificates:
        - certificate: /a
          kye: /b
        - b.pem
      client_ca: c
  - address: ":444"
    tls:
      certificates:
        certificate: /a
        kye: /b
"""
    with pytest.raises(ConfigErrors) as raised:
        load_text(text, {})
    assert [(error.line, error.path_in_file) for error in raised.value.errors] == [
        (6, "listeners[0].tls.certificates[0].kye"),
        (7, "listeners[0].tls.certificates[1]"),
        (8, "listeners[0].tls.client_ca"),
        (13, "listeners[1].tls.certificates.kye"),
    ]


@pytest.mark.parametrize(
    ("written", "version"), [("1.2", "1.2"), ("1.3", "1.3"), ('"1.2"', "1.2"), ("'1.3'", "1.3"), ("1.30", "1.3")]
)
def test_the_minimum_version_may_be_a_number(written: str, version: str) -> None:
    config = load_text(f'listeners: [{{address: ":1", tls: {{certificates: /a, minimum_version: {written}}}}}]', {})
    assert config.listeners[0].tls is not None
    assert config.listeners[0].tls.minimum_version == version


@pytest.mark.parametrize(
    ("raw", "shown"),
    [("1.1", "'1.1'"), (1.1, "1.1"), (1, "1"), ("TLSv1.2", "'TLSv1.2'"), (True, "true"), (["1.2"], "a list")],
)
def test_what_is_no_minimum_version(raw: object, shown: str) -> None:
    found = mistakes(ListenerTls, {"certificates": "/a", "minimum_version": raw})
    assert found == [(("minimum_version",), f'expected "1.2" or "1.3", got {shown}')]


def test_client_certificates_need_those_who_sign_them() -> None:
    tls = ListenerTls.model_validate({"certificates": "/a", "client_ca": "/ca", "client_certificates": "optional"})
    assert (tls.client_ca, tls.client_certificates) == (Path("/ca"), "optional")
    message = "client_certificates needs client_ca, which says whose are accepted"
    for value in ("optional", "required"):
        found = mistakes(ListenerTls, {"certificates": "/a", "client_certificates": value})
        assert found == [(("client_certificates",), message)]
    assert mistakes(ListenerTls, {"certificates": "/a", "client_ca": "/ca", "client_certificates": "no"}) == [
        (("client_certificates",), "expected required or optional, got 'no'")
    ]


def test_the_defaults_of_an_upstream() -> None:
    assert UpstreamTls().model_dump() == {
        "ca": None,
        "verify": True,
        "server_name": None,
        "certificate": None,
        "key": None,
    }


def test_everything_of_an_upstream() -> None:
    raw = {"ca": "/ca", "verify": False, "server_name": "App.example.", "certificate": "/c", "key": "/k"}
    assert UpstreamTls.model_validate(raw).model_dump() == {
        "ca": Path("/ca"),
        "verify": False,
        "server_name": "app.example",
        "certificate": Path("/c"),
        "key": Path("/k"),
    }
    assert UpstreamTls.model_validate({"certificate": "/c"}).key is None


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({"key": "/k"}, ("key",), "key needs certificate: a key alone shows nothing"),
        ({"ca": "ca.pem"}, ("ca",), "expected an absolute path, got 'ca.pem'"),
        ({"verify": 0}, ("verify",), "expected true or false, got 0"),
        ({"server_name": 7}, ("server_name",), "expected text, got 7; put quotes around it"),
        (
            {"server_name": "https://a"},
            ("server_name",),
            "expected an IPv6 address, as in ::1, or a name without a port",
        ),
        ({"sni": "a"}, ("sni",), "unknown key 'sni'; known here: ca, verify, server_name, certificate, key"),
    ],
)
def test_a_wrong_key_of_an_upstream(raw: object, path: tuple[str, ...], message: str) -> None:
    assert mistakes(UpstreamTls, raw) == [(path, message)]


def test_the_json_schema_has_every_form() -> None:
    schema = ListenerTls.model_json_schema()
    item = [{"type": "string"}, {"$ref": "#/$defs/Certificate"}]
    assert schema["required"] == ["certificates"]
    assert schema["properties"]["certificates"]["anyOf"] == [
        *item,
        {"type": "array", "items": {"anyOf": item}, "minItems": 1},
    ]
    assert schema["properties"]["minimum_version"]["enum"] == ["1.2", "1.3", 1.2, 1.3]
    assert schema["properties"]["client_certificates"]["enum"] == ["required", "optional"]
    assert Certificate.model_json_schema()["required"] == ["certificate"]
    assert UpstreamTls.model_json_schema()["properties"]["server_name"]["anyOf"] == [
        {"type": "string"},
        {"type": "null"},
    ]
