"""Letting jobs into the queue: their rows, first events and bells, the limits of their tenants. Many at once.

Async, in the caller's transaction, never commits. Knows nothing of what a job asks for.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, func, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared.errors import QueueFull
from shared.jobs import fairness
from shared.jobs.rows import Job
from shared.jobs.state import JobState
from shared.settings import JobSettings

MARGIN: Final = 100
"""Places below the limit of a queue from which on submissions are counted one after the other."""
_LIMIT_LOCK: Final = 0x6A6F6273
"""First key of the advisory lock, to keep it apart from others'."""

# One statement, however many jobs: what a submission costs is mostly the number of times that SQL is asked.
_RECORD: Final = text("""
WITH recorded AS (
    INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, state, state_version, event_seq)
    SELECT id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, 'queued', 1, 1
    FROM jsonb_to_recordset(:jobs) AS asked (id uuid, tenant_id uuid, type text, queue text, spec jsonb, inputs jsonb,
        summary text, labels jsonb, priority smallint, max_attempts integer, timeout_seconds integer,
        start_deadline timestamptz, retry_of uuid)
    RETURNING id, created_at, queued_at
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, 1, 'job.state', jsonb_build_object('state', 'queued', 'state_version', 1, 'attempt', 0) FROM recorded
), bell AS (
    INSERT INTO outbox (job_id) SELECT id FROM recorded
)
SELECT id, created_at, queued_at FROM recorded
""").bindparams(bindparam("jobs", type_=JSONB))
_COPIED: Final = ("spec", "inputs", "summary", "labels", "priority", "max_attempts", "timeout_seconds", "queue")


async def admit(session: AsyncSession, jobs: Sequence[Job], settings: JobSettings) -> None:
    """Record new jobs, which learn from it when they were; each with its first event and its bell.

    Raises:
        QueueFull: not all of them find a place in the queue of their tenant.
    """
    if not jobs:
        return
    rows = await session.execute(_RECORD, {"jobs": [_fields(job) for job in jobs]})
    times = {row.id: row for row in rows}
    by_tenant: defaultdict[UUID, list[UUID]] = defaultdict(list)
    for job in jobs:
        job.created_at, job.queued_at = times[job.id].created_at, times[job.id].queued_at
        by_tenant[job.tenant_id].append(job.id)
    for tenant_id, job_ids in by_tenant.items():
        await enter(session, tenant_id, job_ids, settings)


def _fields(job: Job) -> dict[str, Any]:
    copied = {name: getattr(job, name) for name in _COPIED}
    ids = {"id": str(job.id), "tenant_id": str(job.tenant_id), "type": job.type.value}
    retry_of = None if job.retry_of is None else str(job.retry_of)
    deadline = None if job.start_deadline is None else job.start_deadline.isoformat()
    return {**copied, **ids, "retry_of": retry_of, "start_deadline": deadline}


async def enter(session: AsyncSession, tenant_id: UUID, job_ids: Sequence[UUID], settings: JobSettings) -> None:
    """Let jobs that wait now join their tenant's line, unless that is full; they are in it already.

    Raises:
        QueueFull: with them, more jobs wait than may.
    """
    waiting = select(col(Job.id)).where(col(Job.tenant_id) == tenant_id, col(Job.state) == JobState.QUEUED)
    count = select(func.count()).select_from(waiting.limit(settings.max_queued + 1).subquery())
    num_waiting = await session.scalar(count) or 0
    if num_waiting > settings.max_queued - MARGIN:
        # Near the limit submissions of a tenant take turns, so that not even many at once exceed it.
        await session.execute(select(func.pg_advisory_xact_lock(_LIMIT_LOCK, func.hashtext(str(tenant_id)))))
        num_waiting = await session.scalar(count) or 0
        if num_waiting > settings.max_queued:
            raise QueueFull(f"{settings.max_queued} jobs are waiting already")
    if num_waiting == len(job_ids):  # else the tenant has been in line before
        await session.execute(*fairness.enter(tenant_id, *job_ids, quantum=settings.quantum))
