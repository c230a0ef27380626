"""A migrated database made ready for the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session

from shared.ahead import support
from tests.model.database import INSTALL
from tests.model.operations import prepare


def tuned(url: str, *, keeps_plans: bool = True, **how: Any) -> Engine:
    """An engine for many small statements, of which each is sent many times."""
    engine = create_engine(url, **how)

    def tune(raw: Any, record: object) -> None:
        if keeps_plans:
            # Else each rollback makes it forget what PostgreSQL has planned already.
            raw._prepared.clear = lambda: False
            raw.prepare_threshold, raw.prepared_max = 1, 1_000
        # Thinking between two statements takes as long as it takes.
        raw.execute("SET idle_in_transaction_session_timeout = 0")
        raw.execute("SET jit = off")
        raw.execute("SET plan_cache_mode = force_generic_plan")
        raw.commit()

    event.listen(engine, "connect", tune)
    support(engine)
    return engine


@contextmanager
def prepared(url: str, *, keeps_plans: bool = True) -> Iterator[Connection]:
    """A connection to the migrated and empty database at ``url``, tuned for many small statements."""
    engine = tuned(url, keeps_plans=keeps_plans)
    with pytest.MonkeyPatch.context() as patch, engine.connect() as connection:
        # Else it reads each longer statement anew, to find its parameters.
        patch.setattr(psycopg._queries, "MAX_CACHED_STATEMENT_LENGTH", 100_000)
        patch.setattr(psycopg._queries, "MAX_CACHED_STATEMENT_PARAMS", 1_000)
        raw: Any = connection.connection.driver_connection
        raw.execute(INSTALL)
        raw.commit()
        with Session(connection) as session:
            prepare(session)
            session.commit()
        yield connection
    engine.dispose()
