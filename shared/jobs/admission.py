"""Letting jobs into the queue: their rows, first events and bells, the limits of their tenants. Many at once.

Async, in the caller's transaction, never commits. Knows nothing of what a job asks for.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final, NamedTuple, cast
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from shared.ahead import after
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

# One statement, however many jobs, and one to look: what a submission costs is mostly the number of times that SQL is
# asked.
_RECORD: Final = text(f"""
WITH adding AS MATERIALIZED (
    SELECT {_ADD} FROM (
        SELECT DISTINCT tenant_id FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS asked (tenant_id uuid)) AS tenants
), recorded AS (
    INSERT INTO jobs (id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, state, state_version, event_seq, queued_at)
    SELECT id, tenant_id, type, queue, spec, inputs, summary, labels, priority, max_attempts,
        timeout_seconds, start_deadline, retry_of, 'queued', 1, 1, CASE WHEN needs = '[]' THEN clock_timestamp() END
    FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS asked (id uuid, tenant_id uuid, type text, queue text, spec jsonb,
        inputs jsonb, summary text, labels jsonb, priority smallint, max_attempts integer, timeout_seconds integer,
        start_deadline timestamptz, retry_of uuid, needs jsonb)
    RETURNING id, queued_at
), needed AS (
    INSERT INTO needs (job_id, field, needs_job_id, told) SELECT id, field, needs_job_id, told
    FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS asked (id uuid, needs jsonb),
        jsonb_to_recordset(needs) AS need (field text, needs_job_id uuid, told jsonb)
), event AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, 1, 'job.state', jsonb_build_object('state', 'queued', 'state_version', 1, 'attempt', 0) FROM recorded
), bell AS (
    INSERT INTO outbox (job_id) SELECT id FROM recorded WHERE queued_at IS NOT NULL
)
SELECT count(*) FROM adding
""")  # noqa: S608  (constants of ours)
_LOOK: Final = text("""
SELECT array(SELECT created_at FROM jobs WHERE id = ANY(:ids) ORDER BY id) AS created_at, array_agg(
    (SELECT array[count(*), count(queued_at)] FROM (
        SELECT queued_at FROM jobs WHERE jobs.tenant_id = asked.tenant_id AND state = 'queued' LIMIT :most) AS waiting)
    ORDER BY place) AS waiting
FROM unnest(:tenants) WITH ORDINALITY AS asked (tenant_id, place)
""")

_UNTOUCHED: Final[Mapping[str, Any]] = {
    name: value for name, value in Job.model_construct().__dict__.items() if not name.startswith("_")
}


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


class _Waiting(NamedTuple):
    """How many jobs of a tenant are queued."""

    all: int
    in_line: int
    """Without those that wait for other jobs."""


async def admit(session: AsyncSession, jobs: Sequence[NewJob], settings: JobSettings) -> list[Job]:
    """Record new jobs, each with its first event and its bell; returns them in the same order.

    Raises:
        QueueFull: not all of them find a place in the queue of their tenant.
    """
    if not jobs:
        return []
    by_tenant: defaultdict[UUID, list[UUID]] = defaultdict(list)
    for job in jobs:
        by_tenant[job.tenant_id].append(job.id)
    tenants = sorted(by_tenant)  # so that of two crowds neither waits for the other
    record = after((_RECORD, {"jobs": json.dumps([_as_json(job) for job in jobs])}))
    created_at, waiting = await _look(session, [job.id for job in jobs], tenants, settings, record)
    for tenant_id, of_tenant in zip(tenants, waiting, strict=True):
        await _enter(session, tenant_id, by_tenant[tenant_id], of_tenant, settings)
    return [_recorded(job, created_at[job.id]) for job in jobs]


async def _look(
    session: AsyncSession,
    job_ids: Sequence[UUID],
    tenants: Sequence[UUID],
    settings: JobSettings,
    how: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Mapping[UUID, datetime], Sequence[_Waiting]]:
    """When each job was recorded, and how many of each tenant wait, counted up to one more than may."""
    ids = sorted(job_ids)
    asked = {"ids": ids, "tenants": list(tenants), "most": settings.max_queued + 1}
    found = (await session.execute(_LOOK, asked, execution_options=how)).one()
    return dict(zip(ids, found.created_at, strict=True)), [_Waiting(*counts) for counts in found.waiting]


def _recorded(job: NewJob, created_at: datetime) -> Job:
    """The row, as far as anybody looks at it; to have the ORM make one takes twenty times as long."""
    times = {"created_at": created_at, "queued_at": None if job.needs else created_at}
    return cast(Job, SimpleNamespace(**{**_UNTOUCHED, **vars(job), **times, "event_seq": 1}))


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
    _, (waiting,) = await _look(session, [], [tenant_id], settings)
    await _enter(session, tenant_id, [job_id], waiting, settings)


async def _enter(
    session: AsyncSession, tenant_id: UUID, job_ids: Sequence[UUID], waiting: _Waiting, settings: JobSettings
) -> None:
    if waiting.all > settings.max_queued - MARGIN:
        await _take_turn(session, tenant_id)
        _, (waiting,) = await _look(session, [], [tenant_id], settings)
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
