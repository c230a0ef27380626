"""What a key means when it expires."""

from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, Select, text
from sqlalchemy.ext.asyncio import AsyncSession

from shared.jobs import idempotency
from tests.shared.desk import Desk

LIFETIME = timedelta(hours=1)


class Slow:
    """A session that is overtaken between the INSERT that meets a key and the SELECT that reads it."""

    def __init__(self, session: AsyncSession, overtaking: Engine) -> None:
        self._session, self._overtaking = session, overtaking
        self.scalar = session.scalar

    async def execute(self, statement: Any) -> Any:
        if isinstance(statement, Select):
            with self._overtaking.begin() as connection:
                connection.execute(text("DELETE FROM idempotency_keys"))
        return await self._session.execute(statement)


def test_a_key_that_is_removed_while_it_is_asked_for_is_free(desk: Desk) -> None:
    def begin(session: Any) -> Any:
        return idempotency.begin(session, desk.tenant_id, "k", "0" * 64, lifetime=LIFETIME)

    assert desk.do(begin) is None
    assert desk.do(lambda session: begin(Slow(session, desk.engine))) is None

    with desk.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM idempotency_keys")) == 1
