"""Fixtures of the tests with a browser: Chromium and child processes once for each module, visitors for each test."""

from collections.abc import Generator, Iterator
from typing import Protocol, runtime_checkable

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.helpers.browser import Visitors, launch_chromium
from tests.helpers.recipe import Recipe


@runtime_checkable
class Reporting(Protocol):
    """A fixture that has something to show when a test fails."""

    def reports(self) -> Iterator[tuple[str, str]]: ...


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Reporting):
                report.sections.extend(value.reports())
    return report


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright, launch_chromium(playwright) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    """Run the recipe of a framework, which tests name as the parameter of this fixture."""
    with Recipe(request.param, tmp_path_factory.mktemp(request.param)) as recipe:
        yield recipe


@pytest.fixture
def url_without_affinity(site: Recipe, visitors: Visitors) -> Iterator[str]:
    """Start a proxy that ends before its visitors leave: Chromium closes no page that loads itself again and again."""
    yield site.start_without_affinity()
    site.stop_without_affinity()


@pytest.fixture
def visitors(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitors]:
    with Visitors(browser, tmp_path_factory.mktemp("visitors")) as visitors:
        yield visitors
