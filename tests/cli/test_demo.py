"""What the demo serves, and what it refuses before anything starts."""

from collections.abc import Sequence
from typing import Self

import pytest

from stickyproxy.cli import demo
from stickyproxy.config import Config
from stickyproxy.demo.launcher import DemoError
from tests.cli.running import run


class FakeDemo:
    """Stands in for the apps."""

    names = ("alpha", "beta")
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    admin_url: str | None = None
    error: DemoError | None = None

    def __init__(self, *, admin_url: str) -> None:
        type(self).admin_url = admin_url

    async def __aenter__(self) -> Self:
        if self.error is not None:
            raise self.error
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


@pytest.fixture
def apps(monkeypatch: pytest.MonkeyPatch) -> type[FakeDemo]:
    class Apps(FakeDemo):
        pass

    monkeypatch.setattr(demo, "Demo", Apps)
    return Apps


def test_the_demo_serves_its_apps_and_says_where(apps: type[FakeDemo], served: list[Config]) -> None:
    result = run("demo", "--listen", "127.0.0.1:81", "--admin", "127.0.0.1:91")
    assert (result.exit_code, apps.admin_url) == (0, "http://127.0.0.1:91")
    assert "http://127.0.0.1:81\n" in result.stdout
    assert "http://127.0.0.1:91/metrics\n" in result.stdout
    [config] = served
    assert [str(one.address) for one in config.upstreams] == ["127.0.0.1:1", "127.0.0.1:2"]
    assert config.admin is not None
    assert str(config.admin.address) == "127.0.0.1:91"


@pytest.mark.parametrize("listen", [":81", "0.0.0.0:81", "[::]:81"])
def test_the_demo_on_all_interfaces_names_one_that_a_browser_can_open(
    listen: str, apps: type[FakeDemo], served: list[Config]
) -> None:
    result = run("demo", "--listen", listen)
    assert "http://localhost:81\n" in result.stdout
    assert str(served[0].listeners[0].address) == listen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--admin", "off"), "--admin: the page links to the metrics"),
        (("--admin", "127.0.0.1:0"), "--admin: the page links to the metrics"),
        (("--admin", "unix:/run/admin.sock"), "--admin: the page links to the metrics"),
        (("--admin", "nonsense"), "--admin: expected an address"),
        (("--listen", "unix:/run/demo.sock"), "--listen: a browser cannot open a Unix socket"),
        (("--listen", "nonsense"), "--listen: expected an address"),
    ],
)
def test_the_demo_refuses_what_it_cannot_show_before_it_starts_anything(
    arguments: Sequence[str], said: str, apps: type[FakeDemo], served: list[Config]
) -> None:
    result = run("demo", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"stickyproxy: {said}")
    assert apps.admin_url is None
    assert not served


def test_a_demo_whose_apps_do_not_start_is_one_clear_line(apps: type[FakeDemo], served: list[Config]) -> None:
    apps.error = DemoError("alpha was killed by SIGKILL before it listened")
    result = run("demo")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "stickyproxy: alpha was killed by SIGKILL before it listened\n"
