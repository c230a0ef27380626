"""What SQL knows about jobs beyond their rows: attempts, places in the queue, and who could run them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from sqlalchemy import UUID as SQL_UUID
from sqlalchemy import Text, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared.jobs.rows import Attempt, Job
from shared.jobs.state import JobState
from shared.jobs.workers import GONE_AFTER
from shared.wire import QueueView

FARTHEST: Final = 5000
"""Places in a queue are counted up to here, so that a long queue does not slow down submissions."""


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What a view of a job needs besides its row."""

    attempts: Sequence[Attempt] = field(default_factory=list[Attempt])
    device_seconds: float | None = None
    queue: QueueView | None = None


# The order is that of the claim (shared/jobs/attempts.py); jobs that back off are passed over by it.
_PLACES = text("""
SELECT ranked.id, ranked.place FROM unnest(:queues) AS q (name), LATERAL (
    SELECT id, 1 + count(*) FILTER (WHERE not_before IS NULL OR not_before <= clock_timestamp()) OVER (
        ORDER BY priority DESC, queued_at, id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS place
    FROM (
        SELECT id, priority, queued_at, not_before FROM jobs WHERE state = 'queued' AND queue = q.name
        ORDER BY priority DESC, queued_at, id LIMIT :farthest
    ) AS first
) AS ranked WHERE ranked.id = ANY(:ids)
""").bindparams(bindparam("queues", type_=ARRAY(Text)), bindparam("ids", type_=ARRAY(SQL_UUID)))

_SERVED = text("""
SELECT clock_timestamp() AS now, array(
    SELECT DISTINCT unnest(queues) FROM workers WHERE state <> 'stopped' AND seen_at > clock_timestamp() - :gone_after
) AS queues
""")


async def facts(session: AsyncSession, jobs: Sequence[Job]) -> dict[UUID, JobFacts]:
    """The facts of each job, in at most four statements."""
    attempts, seconds = await _attempts(session, [job.id for job in jobs if job.fence])
    places = await _places(session, [job for job in jobs if job.state == JobState.QUEUED])
    return {
        job.id: JobFacts(attempts=attempts[job.id], device_seconds=seconds.get(job.id), queue=places.get(job.id))
        for job in jobs
    }


async def _attempts(
    session: AsyncSession, ids: Sequence[UUID]
) -> tuple[defaultdict[UUID, list[Attempt]], dict[UUID, float]]:
    found: defaultdict[UUID, list[Attempt]] = defaultdict(list)
    seconds: defaultdict[UUID, float] = defaultdict(float)
    if ids:
        until = func.coalesce(Attempt.ended_at, func.clock_timestamp())
        lasted = func.extract("epoch", until - col(Attempt.started_at))
        statement = select(Attempt, lasted).where(col(Attempt.job_id).in_(ids)).order_by(col(Attempt.fence))
        for row, duration in await session.execute(statement):
            found[row.job_id].append(row)
            seconds[row.job_id] += float(duration)
    return found, {job_id: round(total, 3) for job_id, total in seconds.items()}


async def _places(session: AsyncSession, waiting: Sequence[Job]) -> dict[UUID, QueueView]:
    if not waiting:
        return {}
    queues = sorted({job.queue for job in waiting})
    wanted = {"queues": queues, "ids": [job.id for job in waiting], "farthest": FARTHEST}
    place = {row.id: row.place for row in await session.execute(_PLACES, wanted)}
    served = (await session.execute(_SERVED, {"gone_after": GONE_AFTER})).one()
    return {
        job.id: QueueView(position=place.get(job.id, FARTHEST + 1), reason=_reason(job, served.now, served.queues))
        for job in waiting
    }


def _reason(
    job: Job, now: datetime, served: Sequence[str]
) -> Literal["waiting_for_worker", "no_compatible_worker", "backing_off"]:
    if job.not_before is not None and job.not_before > now:
        return "backing_off"
    return "waiting_for_worker" if job.queue in served else "no_compatible_worker"
