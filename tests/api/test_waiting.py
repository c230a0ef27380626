"""Places in the queue are those in which jobs are then claimed."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlmodel import col

from api import waiting
from shared.jobs import workers
from shared.jobs.rows import Job
from shared.jobs.state import JobState, Priority
from shared.wire import QueueView
from tests.shared.line import SETTINGS, Line

AGEING = SETTINGS.ageing.total_seconds()
SHORT, LONG = 10.0, 31.0
"""Seconds that jobs of the tenants take: no sum of some is one of others, so that there are no ties."""


@pytest.fixture
def line(database: str) -> Iterator[Line]:
    engine = create_engine(database)
    with Session(engine, expire_on_commit=False) as session:
        yield Line(session)
    engine.dispose()


@pytest.fixture
def look(database: str, line: Line) -> Callable[[], dict[UUID, QueueView]]:
    """What is said now of all that waits."""

    async def read() -> dict[UUID, QueueView]:
        engine = create_async_engine(database)
        async with AsyncSession(engine) as session:
            jobs = (await session.scalars(select(Job).where(col(Job.state) == JobState.QUEUED))).all()
            facts = await waiting.facts(session, jobs, SETTINGS)
        await engine.dispose()
        return {job_id: fact.queue for job_id, fact in facts.items() if fact.queue is not None}

    def now() -> dict[UUID, QueueView]:
        line.session.commit()
        return asyncio.run(read())

    return now


def in_order(said: dict[UUID, QueueView]) -> list[UUID]:
    assert sorted(view.position for view in said.values()) == list(range(1, len(said) + 1))
    return sorted(said, key=lambda job_id: said[job_id].position)


def sign_in(line: Line, name: str, queues: Sequence[str]) -> None:
    says = {"host": "h", "pid": 1, "device": None, "state": "idle", "job_id": None}
    workers.sign_in(line.session, name=name, queues=list(queues), **says)


def move(line: Line, job_id: UUID, change: str) -> None:
    line.session.execute(text(f"UPDATE jobs SET {change} WHERE id = :id"), {"id": job_id})


def test_jobs_are_claimed_in_the_order_of_their_places(line: Line, look: Callable[[], dict[UUID, QueueView]]) -> None:
    """Three tenants who have had different amounts, whose jobs differ, and who all asked for several priorities."""
    seconds = {line.tenant("first"): SHORT, line.tenant("second"): LONG, line.tenant("third"): LONG}
    for tenant_id, usual in seconds.items():
        line.join(tenant_id, count=6)
        for _ in range(6):
            line.serve(usual)
    for tenant_id in seconds:
        for priority, count in ((Priority.NORMAL, 4), (Priority.LOW, 2), (Priority.HIGH, 1)):
            line.join(tenant_id, priority=priority, count=count)

    said = in_order(look())

    claimed: list[UUID] = []
    for _ in said:
        claim = line.start()
        line.sleep(seconds[claim.tenant_id])
        line.finish(claim)
        claimed.append(claim.job_id)
    assert claimed == said


def test_a_line_that_was_not_served_for_long_has_risen(line: Line, look: Callable[[], dict[UUID, QueueView]]) -> None:
    low, urgent = line.tenant("low"), line.tenant("urgent")
    waited = line.join(low, priority=Priority.LOW, count=2)
    line.sleep(2 * AGEING)
    came = line.join(urgent, priority=Priority.HIGH, count=2)

    assert in_order(look()) == [waited[0], *came, waited[1]]


def test_a_job_that_backs_off_is_passed_over(line: Line, look: Callable[[], dict[UUID, QueueView]]) -> None:
    first, second = line.join(line.tenant("t"), count=2)
    move(line, first, "not_before = clock_timestamp() + interval '1 hour'")

    said = look()

    assert (said[second].position, said[first].reason) == (1, "backing_off")


def test_queues_that_share_workers_are_one_line(line: Line, look: Callable[[], dict[UUID, QueueView]]) -> None:
    first, second, third = line.join(line.tenant("t"), count=3)
    move(line, second, "queue = 'train'")
    sign_in(line, "w1", ["generate"])
    sign_in(line, "w2", ["train"])
    apart = look()

    sign_in(line, "w2", ["train", "generate"])
    together = look()

    assert [apart[job_id].position for job_id in (first, second, third)] == [1, 1, 2]
    assert [together[job_id].position for job_id in (first, second, third)] == [1, 2, 3]


@pytest.mark.parametrize("gone", ["state = 'draining'", "seen_at = clock_timestamp() - interval '1 minute'"])
def test_a_worker_that_takes_nothing_more_is_none(
    line: Line, look: Callable[[], dict[UUID, QueueView]], gone: str
) -> None:
    (job_id,) = line.join(line.tenant("t"))
    sign_in(line, "w1", ["generate"])
    before = look()[job_id].reason

    line.session.execute(text(f"UPDATE workers SET {gone}"))

    assert (before, look()[job_id].reason) == ("waiting_for_worker", "no_compatible_worker")


def test_places_far_back_are_not_counted(line: Line, look: Callable[[], dict[UUID, QueueView]]) -> None:
    tenant_id = line.tenant("flood")
    many = text("""
        INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, state, max_attempts)
        SELECT gen_random_uuid(), :tenant_id, 'train', 'train', '{}', '{}', 'waits', 'queued', 3
        FROM generate_series(1, :count)""")
    line.session.execute(many, {"tenant_id": tenant_id, "count": waiting.FARTHEST + 50})

    places = sorted(view.position for view in look().values())

    assert places == [*range(1, waiting.FARTHEST + 1), *[waiting.FARTHEST + 1] * 50]
