"""Letting jobs into the queue: their rows, first events and bells, the limits of their tenants. Many at once.

Async, in the caller's transaction, never commits. Knows nothing of what a job asks for.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, func, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from shared.errors import QueueFull
from shared.ids import uuid7
from shared.jobs import fairness
from shared.jobs.rows import Job, JsonObject
from shared.jobs.state import JobState, JobType
from shared.settings import JobSettings

MARGIN: Final = 400
"""Places below the limit of a queue from which on submissions are counted one after the other: more than all processes
together record at the same moment."""
_LIMIT_LOCK: Final = 0x6A6F6273
"""First key of the advisory lock, to keep it apart from others'."""

# One statement, however many jobs: what a submission costs is mostly the number of times that SQL is asked.
_COLUMNS: Final = tuple(Job.metadata.tables["jobs"].c)
_RECORD: Final = text(f"""
WITH recorded AS (
    INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, state, state_version, event_seq)
    SELECT id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, 'queued', 1, 1
    FROM jsonb_to_recordset(:jobs) AS asked (id uuid, tenant_id uuid, type text, queue text, spec jsonb, inputs jsonb,
        summary text, labels jsonb, priority smallint, max_attempts integer, timeout_seconds integer,
        start_deadline timestamptz, retry_of uuid)
    RETURNING *
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, 1, 'job.state', jsonb_build_object('state', 'queued', 'state_version', 1, 'attempt', 0) FROM recorded
), bell AS (
    INSERT INTO outbox (job_id) SELECT id FROM recorded
)
SELECT {", ".join(column.name for column in _COLUMNS)} FROM recorded
""").bindparams(bindparam("jobs", type_=JSONB))  # noqa: S608  (constants of ours)
_RECORDED: Final = select(Job).from_statement(_RECORD.columns(*_COLUMNS))


@dataclass(kw_only=True)
class NewJob:
    """A job before it is recorded. Fields are named like the columns of ``Job``."""

    id: UUID = field(default_factory=uuid7)
    tenant_id: UUID
    type: JobType
    queue: str
    spec: JsonObject
    inputs: JsonObject
    summary: str
    max_attempts: int
    priority: int = 1
    labels: JsonObject = field(default_factory=dict[str, Any])
    timeout_seconds: int | None = None
    start_deadline: datetime | None = None
    retry_of: UUID | None = None


async def admit(session: AsyncSession, jobs: Sequence[NewJob], settings: JobSettings) -> list[Job]:
    """Record new jobs, each with its first event and its bell; returns them in the same order.

    Raises:
        QueueFull: not all of them find a place in the queue of their tenant.
    """
    if not jobs:
        return []
    rows = await session.execute(_RECORDED, {"jobs": [_as_json(job) for job in jobs]})
    recorded = {job.id: job for job in rows.scalars()}
    by_tenant: defaultdict[UUID, list[UUID]] = defaultdict(list)
    for job in jobs:
        by_tenant[job.tenant_id].append(job.id)
    for tenant_id, job_ids in by_tenant.items():
        await enter(session, tenant_id, job_ids, settings)
    return [recorded[job.id] for job in jobs]


def _as_json(job: NewJob) -> JsonObject:
    ids = {"id": str(job.id), "tenant_id": str(job.tenant_id)}
    retry_of = None if job.retry_of is None else str(job.retry_of)
    deadline = None if job.start_deadline is None else job.start_deadline.isoformat()
    return {**vars(job), **ids, "retry_of": retry_of, "start_deadline": deadline}


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
