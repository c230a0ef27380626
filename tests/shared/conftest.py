"""A session on a database of the module's own, rolled back after each test."""

from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import make_engine
from shared.settings import DatabaseSettings
from tests.shared.desk import Desk


@pytest.fixture(scope="module")
def engine(module_database: str) -> Iterator[Engine]:
    engine = make_engine(DatabaseSettings(url=SecretStr(module_database)), "test")
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """Rolled back afterwards."""
    with Session(engine) as session:
        yield session
        session.rollback()


@pytest.fixture
def desk(database: str) -> Iterator[Desk]:
    engine = make_engine(DatabaseSettings(url=SecretStr(database)), "test")
    yield Desk(database, engine)
    engine.dispose()
