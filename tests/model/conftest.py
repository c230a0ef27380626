"""One prepared database for the searches of a module, and the long searches in processes of their own."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Connection

from noisemill.local.servers import Postgres
from tests.conftest import _fresh_database as fresh_database
from tests.model.elsewhere import LANES, Elsewhere
from tests.model.prepared import prepared

HERE: Final = Path(__file__).parent
WAITS: Final = "test_search.py"
"""The module that waits for them."""
HANGS: Final = 7200
"""Seconds. Here is nothing that could be too slow, only much to do, on a machine that may be busy with other things."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The model first, so that its processes disturb nobody else; within it the module that waits comes last."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(HANGS))
    items.sort(key=lambda item: (item.path.parent != HERE, item.path == HERE / WAITS))


@pytest.fixture(scope="module")
def connection(module_database: str) -> Iterator[Connection]:
    with prepared(module_database) as connection:
        yield connection


@pytest.fixture(scope="session", autouse=True)
def elsewhere(request: pytest.FixtureRequest, postgres: Postgres, migrated_template: str) -> Iterator[Elsewhere | None]:
    """Begins before the first test of the folder, if one is to run that waits for it."""
    waiting = (item for item in request.session.items if item.path == HERE / WAITS)
    if not any(item.get_closest_marker("long") is None for item in waiting):
        yield None
        return
    with ExitStack() as stack:
        urls = [stack.enter_context(fresh_database(postgres, migrated_template)) for _ in LANES]
        searches = Elsewhere(urls)
        stack.callback(searches.end)
        yield searches
