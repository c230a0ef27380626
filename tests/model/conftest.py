"""One prepared database for the searches of a module."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection

from tests.model.prepared import prepared


@pytest.fixture(scope="module")
def connection(module_database: str) -> Iterator[Connection]:
    with prepared(module_database) as connection:
        yield connection
