"""Letting jobs into the queue: their rows, first events and bells, the limits of their tenants. Many at once.

Async, in the caller's transaction, never commits. Knows nothing of what a job asks for.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from shared.errors import QueueFull
from shared.ids import uuid7
from shared.jobs import fairness
from shared.jobs.rows import Job, JsonObject
from shared.jobs.state import JobType
from shared.settings import JobSettings

MARGIN: Final = 400
"""Places below the limit of a queue from which on submissions are counted one after the other: more than all processes
together record at the same moment (32 each, ``api/crowd.py``)."""
PATIENCE: Final = timedelta(seconds=2)
"""For so long a submission near the limit waits for those that were counted before it and have not ended."""

# Two advisory locks of a tenant, by their first key: shared by all transactions that add to its queue, until they end;
# and held by the one of them that is counted now, near the limit.
_ADDING: Final = 0x6A6F6273
_COUNTED: Final = 0x6A6F6274
_TENANT: Final = "hashtext(CAST(tenant_id AS text))"
_ADD: Final = f"pg_advisory_xact_lock_shared({_ADDING}, {_TENANT})"
_JOIN: Final = text(f"SELECT {_ADD} FROM (SELECT CAST(:tenant_id AS uuid) AS tenant_id)")  # noqa: S608  (a constant)
_TAKE_TURN: Final = text(f"SELECT pg_advisory_xact_lock({_COUNTED}, hashtext(:tenant_id))")
# Who waits for the turn counts again in it, with our jobs. Whoever else is adding may have been counted without them.
_UNCOUNTED: Final = text(f"""
WITH of_tenant AS (
    SELECT classid, pid, granted FROM pg_locks WHERE locktype = 'advisory' AND objid = CAST(hashtext(:tenant_id) AS oid)
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid()
)
SELECT EXISTS (SELECT FROM of_tenant AS adding WHERE classid = {_ADDING} AND granted AND NOT EXISTS (
    SELECT FROM of_tenant AS waiting WHERE classid = {_COUNTED} AND NOT granted AND waiting.pid = adding.pid))
""")  # noqa: S608  (constants of ours)
_PAUSE: Final = text("SELECT pg_sleep(0.005)")

# One statement, however many jobs: what a submission costs is mostly the number of times that SQL is asked.
_COLUMNS: Final = tuple(Job.metadata.tables["jobs"].c)
_RECORD: Final = text(f"""
WITH adding AS MATERIALIZED (
    SELECT {_ADD} FROM (SELECT DISTINCT tenant_id FROM jsonb_to_recordset(:jobs) AS asked (tenant_id uuid)) AS tenants
), recorded AS (
    INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, state, state_version, event_seq, queued_at)
    SELECT id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, 'queued', 1, 1, CASE WHEN needs = '[]' THEN clock_timestamp() END
    FROM jsonb_to_recordset(:jobs) AS asked (id uuid, tenant_id uuid, type text, queue text, spec jsonb, inputs jsonb,
        summary text, labels jsonb, priority smallint, max_attempts integer, timeout_seconds integer,
        start_deadline timestamptz, retry_of uuid, needs jsonb)
    RETURNING *
), needed AS (
    INSERT INTO needs (job_id, field, needs_job_id, told) SELECT id, field, needs_job_id, told
    FROM jsonb_to_recordset(:jobs) AS asked (id uuid, needs jsonb),
        jsonb_to_recordset(needs) AS need (field text, needs_job_id uuid, told jsonb)
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, 1, 'job.state', jsonb_build_object('state', 'queued', 'state_version', 1, 'attempt', 0) FROM recorded
), bell AS (
    INSERT INTO outbox (job_id) SELECT id FROM recorded WHERE queued_at IS NOT NULL
)
SELECT {", ".join(column.name for column in _COLUMNS)} FROM recorded WHERE EXISTS (SELECT FROM adding)
""").bindparams(bindparam("jobs", type_=JSONB))  # noqa: S608  (constants of ours)
_COUNT: Final = text("""
SELECT count(*) AS all, count(queued_at) AS in_line
FROM (SELECT queued_at FROM jobs WHERE tenant_id = :tenant_id AND state = 'queued' LIMIT :most) AS waiting
""")
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
    needs: Sequence[JsonObject] = ()
    """Rows of ``Need``: while there are such, it has no place in line."""


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
    for tenant_id, job_ids in sorted(by_tenant.items()):  # so that of two crowds neither waits for the other
        await _enter(session, tenant_id, job_ids, settings)
    return [recorded[job.id] for job in jobs]


def _as_json(job: NewJob) -> JsonObject:
    ids = {"id": str(job.id), "tenant_id": str(job.tenant_id)}
    retry_of = None if job.retry_of is None else str(job.retry_of)
    deadline = None if job.start_deadline is None else job.start_deadline.isoformat()
    return {**vars(job), **ids, "retry_of": retry_of, "start_deadline": deadline, "needs": list(job.needs)}


async def rejoin(session: AsyncSession, tenant_id: UUID, job_id: UUID, settings: JobSettings) -> None:
    """Let a job that waits again join its tenant's line, unless that is full; it is in it already.

    Raises:
        QueueFull: with it, more jobs wait than may.
    """
    await session.execute(_JOIN, {"tenant_id": str(tenant_id)})
    await _enter(session, tenant_id, [job_id], settings)


async def _enter(session: AsyncSession, tenant_id: UUID, job_ids: Sequence[UUID], settings: JobSettings) -> None:
    asked = {"tenant_id": tenant_id, "most": settings.max_queued + 1}
    waiting = (await session.execute(_COUNT, asked)).one()
    if waiting.all > settings.max_queued - MARGIN:
        await _take_turn(session, tenant_id)
        waiting = (await session.execute(_COUNT, asked)).one()
        if waiting.all > settings.max_queued:
            raise QueueFull(f"{settings.max_queued} jobs are waiting already")
    if waiting.in_line <= len(job_ids):  # else the tenant has been in line before
        await session.execute(*fairness.enter(tenant_id, *job_ids, quantum=settings.quantum))


async def _take_turn(session: AsyncSession, tenant_id: UUID) -> None:
    """Until this transaction ends, nobody who was not seen by it adds to the tenant's queue.

    Near the limit submissions of a tenant take turns, and none is counted before those have ended that were counted
    when there was room, so that not even many at once exceed the limit, however long one of them is stopped.
    """
    tenant = {"tenant_id": str(tenant_id)}
    await session.execute(_TAKE_TURN, tenant)
    give_up = time.monotonic() + PATIENCE.total_seconds()
    while await session.scalar(_UNCOUNTED, tenant):
        if time.monotonic() > give_up:
            raise QueueFull("the queue is nearly full, and a submission that was counted before has not ended")
        await session.execute(_PAUSE)
