"""One prepared database for the searches of a module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Connection

from tests.model.prepared import prepared

HERE: Final = Path(__file__).parent
HANGS: Final = 7200
"""Seconds. Here is nothing that could be too slow, only much to do, on a machine that may be busy with other things."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(HANGS))


@pytest.fixture(scope="module")
def connection(module_database: str) -> Iterator[Connection]:
    with prepared(module_database) as connection:
        yield connection
