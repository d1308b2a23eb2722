"""The section `health`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stickyproxy.config.explain import explain
from stickyproxy.config.health import Health, Probe, StatusRange

STATUS = 'expected a status such as 200 or a range such as "200-399"'


def mistakes(raw: object) -> list[tuple[object, str]]:
    with pytest.raises(ValidationError) as raised:
        Health.model_validate(raw)
    return list(explain(raised.value, Health))


def test_the_default_is_a_tcp_probe() -> None:
    probe = Health().probe
    assert probe == Probe()
    assert probe.path is None
    assert probe.expect == (StatusRange(200, 399),)
    assert (probe.interval_s, probe.timeout_s, probe.rise, probe.fall, probe.jitter_percent) == (5.0, 2.0, 2, 3, 10)


def test_no_probe() -> None:
    assert Health.model_validate({"probe": False}).probe is None


@pytest.mark.parametrize(
    ("raw", "ranges"),
    [
        (200, [(200, 200)]),
        ("204", [(204, 204)]),
        ("200-399", [(200, 399)]),
        ([200, "300-399"], [(200, 200), (300, 399)]),
    ],
)
def test_expected_statuses(raw: object, ranges: list[tuple[int, int]]) -> None:
    probe = Probe.model_validate({"path": "/healthz?full=1", "expect": raw})
    assert list(probe.expect) == ranges
    assert all(probe.expects(first) and probe.expects(last) for first, last in ranges)
    assert not probe.expects(199)
    assert not probe.expects(500)


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ("399-200", (), "expected the lower status first, got '399-200'"),
        ("2xx", (), f"{STATUS}, got '2xx'"),
        (99, (), f"{STATUS}, got 99"),
        (600, (), f"{STATUS}, got 600"),
        (True, (), f"{STATUS}, got true"),
        (200.0, (), f"{STATUS}, got 200.0"),
        ([], (), "expected at least one status"),
        ([200, [300]], (1,), f"{STATUS}, got a list"),
    ],
)
def test_what_is_no_status(raw: object, path: tuple[int, ...], message: str) -> None:
    assert mistakes({"probe": {"path": "/", "expect": raw}}) == [(("probe", "expect", *path), message)]


@pytest.mark.parametrize(
    ("key", "raw", "message"),
    [
        ("path", "healthz", "expected a path that begins with \"/\", without spaces, got 'healthz'"),
        ("path", "/a b", "expected a path that begins with \"/\", without spaces, got '/a b'"),
        ("path", "/a#b", "expected a path that begins with \"/\", without spaces, got '/a#b'"),
        ("expect", 200, "expect needs path: without it the probe is a TCP connect and has no status"),
        ("interval", "0s", "expected a duration above 0, got '0s'"),
        ("timeout", 0, "expected a duration above 0, got 0"),
        ("rise", 0, "expected a whole number from 1 to 100, got 0"),
        ("fall", "3", "expected a whole number from 1 to 100, got '3'; remove the quotes"),
        ("jitter", 51, "expected a whole number from 0 to 50, got 51"),
        ("jitter", -1, "expected a whole number from 0 to 50, got -1"),
    ],
)
def test_a_wrong_key_of_the_probe(key: str, raw: object, message: str) -> None:
    assert mistakes({"probe": {key: raw}}) == [(("probe", key), message)]
