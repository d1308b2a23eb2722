"""What tests of all folders share, and how they are spread over processes: file by file, one browser at a time."""

from collections.abc import Iterator

import pytest

from tests.helpers.processes import Children


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    with Children(tmp_path_factory.mktemp("children")) as children:
        yield children


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file together, for they share what is dear to start, and all those with a browser."""
    for item in items:
        is_browser = item.get_closest_marker("browser") is not None
        item.add_marker(pytest.mark.xdist_group("browser" if is_browser else str(item.path)))
