"""What goes ahead of a statement happens before it, with it, or not at all."""

import asyncio

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from shared.ahead import Ahead, after
from shared.database import PLANNED_ONCE, make_async_engine
from shared.ids import uuid7
from shared.jobs import admission
from shared.jobs.admission import NewJob
from shared.jobs.rows import Tenant
from shared.jobs.state import JobType
from shared.settings import DatabaseSettings, JobSettings
from tests.shared.desk import Desk

COUNT = text("SELECT count(*) FROM tenants WHERE name LIKE 'ahead %'")
FAILING = text("SELECT 1 / 0")


def adding(name: str) -> Ahead:
    return text("INSERT INTO tenants (id, name) VALUES (:id, :name)"), {"id": uuid7(), "name": f"ahead {name}"}


@pytest.fixture(params=["READ COMMITTED", "AUTOCOMMIT"])
def desired(request: pytest.FixtureRequest, desk: Desk) -> Engine:
    return desk.engine.execution_options(isolation_level=request.param)


def test_what_goes_ahead_has_happened(desired: Engine) -> None:
    with Session(desired) as session:
        assert session.scalar(COUNT, execution_options=after(adding("a"), adding("b"))) == 2
        assert session.scalar(COUNT) == 2


def test_of_what_goes_together_all_happens_or_nothing(desired: Engine) -> None:
    with Session(desired) as session, pytest.raises(DBAPIError, match="division by zero"):
        session.execute(FAILING, execution_options=after(adding("a")))
    with Session(desired) as session:
        assert session.scalar(COUNT) == 0


def test_a_session_that_commits_each_statement_goes_on_after_an_error(desk: Desk) -> None:
    with Session(desk.engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(DBAPIError, match="division by zero"):
            session.execute(FAILING, execution_options=after(adding("a")))
        with pytest.raises(DBAPIError, match="adapt"):
            session.execute(COUNT, execution_options=after((text("SELECT :it"), {"it": object()})))
        clause, values = adding("b")
        session.execute(clause, values)
    with Session(desk.engine) as session:
        assert session.scalar(COUNT) == 1


def test_the_first_error_is_raised_and_nothing_happens_after_it(desired: Engine) -> None:
    twice = adding("a")
    with Session(desired) as session, pytest.raises(IntegrityError):
        session.execute(COUNT, execution_options=after(twice, twice))
    with Session(desired) as session:
        assert session.scalar(COUNT) == 0


def test_a_setting_ahead_of_a_statement_ends_with_it_or_its_transaction(desired: Engine) -> None:
    mode = text("SELECT current_setting('plan_cache_mode')")
    with Session(desired) as session:
        assert session.scalar(mode, execution_options=PLANNED_ONCE) == "force_generic_plan"
    with Session(desired) as session:
        assert session.scalar(mode) == "auto"


def test_it_goes_ahead_in_the_event_loop_too(desk: Desk) -> None:
    async def ask() -> int:
        engine = make_async_engine(DatabaseSettings(url=SecretStr(desk.url)), "test")
        try:
            async with AsyncSession(engine) as session:
                return await session.scalar(COUNT, execution_options=after(adding("a"))) or 0
        finally:
            await engine.dispose()

    assert asyncio.run(ask()) == 1


def test_a_crowd_counts_as_adding_to_the_queue_of_each_of_its_tenants(desk: Desk) -> None:
    """Who is counted near a limit waits for all that were counted before (``shared/jobs/admission.py``)."""
    locks = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")

    async def admit(session: AsyncSession) -> int:
        others = [Tenant(name=f"ahead {n}") for n in range(2)]
        session.add_all(others)
        await session.flush()
        how = {"type": JobType.TRAIN, "queue": "train", "spec": {}, "inputs": {}, "summary": "s", "max_attempts": 1}
        jobs = [NewJob(tenant_id=tenant_id, **how) for tenant_id in (desk.tenant_id, *(one.id for one in others))]
        recorded = await admission.admit(session, jobs, JobSettings())
        assert [job.tenant_id for job in recorded] == [job.tenant_id for job in jobs]
        return await session.scalar(locks) or 0

    assert desk.ask(admit) == [3]
